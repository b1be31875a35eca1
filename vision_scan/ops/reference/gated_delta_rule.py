"""The gated delta rule, as a step recurrence and in chunks.

A head's state S (head_v_dim, head_k_dim) is a linear map from keys to values. Each token lets it fade, looks up what it
answers to the token's key, and moves the answer towards the token's value by the share beta_t:

    u_t = beta_t (v_t - exp(g_t) S_{t-1} k_t),        S_t = exp(g_t) S_{t-1} + u_t k_t^T,        y_t = scale S_t q_t,

which is S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T. Steps shrink the state if beta |k|^2 is at
most 2, so keys should have unit length.

The chunked form: within a chunk the u depend on each other by their keys and on the entering state S only through what
it answers. With L[i, j] = exp(g_{j+1} + ... + g_i),

    (I + tril(beta K K^T * L, -1)) U = beta (V - L_entry K S^T),

one triangular system for all tokens of the chunk, solved for both terms before S is known (the WY representation by a
UT transform). Then states and outputs follow as in ssd.py, with U in place of dt x.

Letters: b batch, c chunk, q in-chunk, g group (key head), h head (value head), p head_v_dim, n head_k_dim.
Source: Yang, Kautz & Hatamizadeh 2024, "Gated Delta Networks" (arXiv:2412.06464), section 3; the chunked form without
decay, Yang et al. 2024 (arXiv:2406.06484), section 3.
"""

import torch
from torch import Tensor

from .chunks import Chunks, per_head
from .segments import real_and_runs, run_packed
from .ssd import update_slots

NOTHING_LEFT = -750.0  # exp of it is 0 in every dtype; sums of such stay exact enough for their differences


def gated_delta_rule_recurrent(q, k, v, g, beta, scale, initial_state, seq_idx) -> tuple[Tensor, Tensor]:
    """The recurrence, one token after another; arguments as `vision_scan.gated_delta_rule`."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    heads_per_key = v.shape[2] // k.shape[2]
    q, k = (t.to(dtype).repeat_interleave(heads_per_key, dim=2) for t in (q, k))
    values, decay, beta = v.to(dtype), torch.exp(g.to(dtype)), beta.to(dtype)
    state = _start(initial_state, v, k, dtype)
    if seq_idx is not None:
        real, run = real_and_runs(seq_idx)
        kept = torch.cat([run[:, :1] == 0, run[:, 1:] == run[:, :-1]], dim=1)
        decay = decay * kept[..., None].to(dtype)
    outputs = []
    for t in range(v.shape[1]):
        faded = state * decay[:, t, :, None, None]
        answer = torch.einsum("bhpn,bhn->bhp", faded, k[:, t])
        change = beta[:, t, :, None] * (values[:, t] - answer)
        new = faded + change[..., None] * k[:, t, :, None, :]
        state = new if seq_idx is None else torch.where(real[:, t, None, None, None], new, state)
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, q[:, t] * scale))
    y = torch.stack(outputs, dim=1)
    if seq_idx is not None:
        y = torch.where(real[..., None, None], y, 0.0)
    return y.to(v.dtype), state


def gated_delta_rule_chunked(
    q, k, v, g, beta, scale, initial_state, seq_idx, cu_seqlens, chunk_size
) -> tuple[Tensor, Tensor]:
    """The chunked matrix form; arguments as `vision_scan.gated_delta_rule`."""
    if cu_seqlens is not None:

        def kernel(rows, row_seq_idx):
            q, k, v, g, beta = rows
            return gated_delta_rule_chunked(
                q, k, v, g, beta, scale, initial_state, row_seq_idx, None, chunk_size
            )

        return run_packed(kernel, [q, k, v, g, beta], seq_idx, cu_seqlens)

    dtype = torch.promote_types(v.dtype, torch.float32)
    inputs = [q.to(dtype) * scale, *(t.to(dtype) for t in (k, v, g.clamp(min=NOTHING_LEFT), beta))]
    real = run = None
    if seq_idx is not None:
        real, run = real_and_runs(seq_idx)
        inputs = [torch.where(real.view(*real.shape, *(1,) * (t.dim() - 2)), t, 0.0) for t in inputs]
    y, state = _scan_chunks(*inputs, _start(initial_state, v, k, dtype), run, chunk_size)
    if real is not None:
        y = torch.where(real[..., None, None], y, 0.0)
    return y.to(v.dtype).contiguous(), state.contiguous()


def _start(initial_state: Tensor | None, v: Tensor, k: Tensor, dtype: torch.dtype) -> Tensor:
    if initial_state is not None:
        return initial_state.to(dtype)
    return v.new_zeros((v.shape[0], *v.shape[2:], k.shape[-1]), dtype=dtype)


def _scan_chunks(q, k, v, g, beta, state, run, chunk_size) -> tuple[Tensor, Tensor]:
    """The stages on prepared inputs: q scaled, all of them zero at padding.

    Args:
        state: (batch, num_v_heads, head_v_dim, head_k_dim).
        run: (batch, seqlen) or None: tokens of different runs do not see each other.
    """
    batch, seqlen, num_v_heads, head_v_dim = v.shape
    chunks = Chunks.of(seqlen, chunk_size)
    Q, K, V, beta = (chunks.cut(t) for t in (q, k, v, beta))
    inside, from_entry, to_end = chunks.decays(chunks.cut(g), run, V.dtype)

    # Only what is below the diagonal is read of it, which is 1.
    system = per_head(K @ K.transpose(-1, -2), inside * beta[..., None])  # b c h q q
    known = torch.cat([V, per_head(K, from_entry[..., None])], dim=-1) * beta[..., None]
    solved = torch.linalg.solve_triangular(system, known, upper=False, unitriangular=True)
    written, asked = solved.split([head_v_dim, k.shape[-1]], dim=-1)  # U = written - asked S^T
    keys = per_head(K, to_end[..., None])
    entries, changes = [], []
    for c in range(chunks.num_chunks):
        entries.append(state)
        change = written[:, c] - asked[:, c] @ state.transpose(-1, -2)  # b h q p
        changes.append(change)
        state = state * from_entry[:, c, :, -1, None, None] + change.transpose(-1, -2) @ keys[:, c]

    carried = per_head(Q, from_entry[..., None]) @ torch.stack(entries, dim=1).transpose(-1, -2)
    weights = per_head(Q @ K.transpose(-1, -2), inside)
    y = weights @ torch.stack(changes, dim=1) + carried
    return y.movedim(3, 2).reshape(batch, -1, num_v_heads, head_v_dim)[:, :seqlen], state


def gated_delta_rule_update(state, q, k, v, g, beta, scale, seq_idx, state_indices) -> Tensor:
    """A few tokens onto states that are overwritten; arguments as `vision_scan.gated_delta_rule_update`."""

    def advance(states, rows):
        q_, k_, v_, g_, beta_, seq_idx_ = (None if t is None else t[rows] for t in (q, k, v, g, beta, seq_idx))
        return gated_delta_rule_recurrent(q_, k_, v_, g_, beta_, scale, states, seq_idx_)

    return update_slots(advance, state, v, state_indices)
