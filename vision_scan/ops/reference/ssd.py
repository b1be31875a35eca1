"""Mamba-2's state-space duality (SSD), as a step recurrence and in chunks.

With one scalar A per head, a_t = exp(dt_t A), the state S (headdim, d_state) follows

    S_t = a_t S_{t-1} + dt_t x_t B_t^T,        y_t = S_t C_t + D x_t,        out_t = y_t SiLU(z_t).

The chunked form cuts the sequence into chunks. Inside a chunk the output is a masked attention,
(C B^T * L) (dt x) with L[i, j] = a_{j+1} ... a_i; each chunk leaves a state, the states are passed from
chunk to chunk, and the state that enters a chunk adds C_i S_entry, decayed.

Letters: b batch, c chunk, q in-chunk, g group, r heads of a group, h head, p headdim, n d_state.
Source: Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), section 6 and listing 1.
"""

import torch
from torch import Tensor

from .chunks import Chunks, per_head
from .segments import real_and_runs, run_packed


def discretize(
    dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float, dtype
) -> Tensor:
    """dt + bias, softplus, then the clamp to the limits, in `dtype`; dt (..., nheads)."""
    dt = dt.to(dtype)
    if dt_bias is not None:
        dt = dt + dt_bias.to(dtype)
    if dt_softplus:
        dt = torch.nn.functional.softplus(dt)
        if dt_min <= 0.0 and dt_max == float("inf"):
            return dt  # a clamp would change nothing
    return dt.clamp(dt_min, dt_max)


def skip_and_gate(y: Tensor, x: Tensor, D: Tensor | None, z: Tensor | None) -> Tensor:
    """y + D x, then the gate SiLU(z); y, x, z (..., nheads, headdim), D (nheads[, headdim])."""
    if D is not None:
        D = D.to(y.dtype)
        y = torch.addcmul(y, x.to(y.dtype), D[:, None] if D.dim() == 1 else D)
    return y if z is None else y * torch.nn.functional.silu(z.to(y.dtype))


def ssd_recurrent(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx
) -> tuple[Tensor, Tensor]:
    """The recurrence, one token after another; arguments as `vision_scan.ssd`."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    heads_per_group = x.shape[2] // B.shape[2]
    dt = discretize(dt, dt_bias, dt_softplus, dt_min, dt_max, dtype)
    decay = torch.exp(dt * A.to(dtype))
    B, C = (t.to(dtype).repeat_interleave(heads_per_group, dim=2) for t in (B, C))
    state = _start(initial_state, x, B, dtype)
    if seq_idx is not None:
        real, run = real_and_runs(seq_idx)
        kept = torch.cat([run[:, :1] == 0, run[:, 1:] == run[:, :-1]], dim=1)
        decay = decay * kept[..., None].to(dtype)
    outputs = []
    for t in range(x.shape[1]):
        inflow = (dt[:, t, :, None] * x[:, t].to(dtype))[..., None] * B[:, t, :, None, :]
        new = state * decay[:, t, :, None, None] + inflow
        state = new if seq_idx is None else torch.where(real[:, t, None, None, None], new, state)
        outputs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    y = skip_and_gate(torch.stack(outputs, dim=1), x, D, z)
    if seq_idx is not None:
        y = torch.where(real[..., None, None], y, 0.0)
    return y.to(x.dtype), state


def ssd_noncausal(x, dt, A, B, C, D, dt_bias, dt_softplus, dt_min, dt_max) -> Tensor:
    """y = (sum over all cells of dt |A| x B^T) C + D x, so that no cell is nearer than another; the only form.

    Arguments as `vision_scan.ssd_2d`. Returns (batch, K, height, width, nheads, headdim).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    dt_bias, D = (None if t is None else t[:, None, None] for t in (dt_bias, D))  # of a list, for all cells
    weight = discretize(dt, dt_bias, dt_softplus, dt_min, dt_max, dtype) * A.to(dtype).abs()[:, None, None]
    wide = (x[:, None] if x.dim() == 5 else x).to(dtype)
    inflow = (wide * weight[..., None]).unflatten(-2, (B.shape[-2], -1))
    state = torch.einsum("bkyxghp,bkyxgn->bkghpn", inflow, B.to(dtype))
    y = torch.einsum("bkghpn,bkyxgn->bkyxghp", state, C.to(dtype)).flatten(-3, -2)
    if D is not None:
        y = y + wide * (D[..., None] if D.dim() == 4 else D)
    return y.to(x.dtype)


def ssd_chunked(
    x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, initial_state, seq_idx, cu_seqlens, chunk_size
) -> tuple[Tensor, Tensor]:
    """The chunked matrix form; arguments as `vision_scan.ssd`."""
    if cu_seqlens is not None:

        def kernel(rows, row_seq_idx):
            x, dt, B, C, z = rows
            return ssd_chunked(
                x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max,
                initial_state, row_seq_idx, None, chunk_size,
            )  # fmt: skip

        return run_packed(kernel, [x, dt, B, C, z], seq_idx, cu_seqlens)

    dtype = torch.promote_types(x.dtype, torch.float32)
    dt = discretize(dt, dt_bias, dt_softplus, dt_min, dt_max, dtype)
    inflow, B, C = x.to(dtype) * dt[..., None], B.to(dtype), C.to(dtype)
    real = run = None
    if seq_idx is not None:
        real, run = real_and_runs(seq_idx)
        dt = torch.where(real[..., None], dt, 0.0)
        inflow, B, C = (torch.where(real[..., None, None], t, 0.0) for t in (inflow, B, C))
    y, state = _scan_chunks(
        inflow,
        dt * A.to(dtype),
        B,
        C,
        _start(initial_state, x, B, dtype),
        run,
        chunk_size,
    )
    y = skip_and_gate(y, x, D, z)
    if real is not None:
        y = torch.where(real[..., None, None], y, 0.0)
    return y.to(x.dtype).contiguous(), state.contiguous()


def _start(initial_state: Tensor | None, x: Tensor, B: Tensor, dtype: torch.dtype) -> Tensor:
    if initial_state is not None:
        return initial_state.to(dtype)
    return x.new_zeros((x.shape[0], *x.shape[2:], B.shape[-1]), dtype=dtype)


def _scan_chunks(inflow, log_decay, B, C, state, run, chunk_size) -> tuple[Tensor, Tensor]:
    """The four stages on prepared inputs.

    Args:
        inflow: dt x, (batch, seqlen, nheads, headdim), zero at padding.
        log_decay: dt A, (batch, seqlen, nheads), zero at padding.
        B, C: (batch, seqlen, ngroups, d_state).
        state: (batch, nheads, headdim, d_state).
        run: (batch, seqlen) or None: tokens of different runs do not see each other.
    """
    batch, seqlen, nheads, headdim = inflow.shape
    chunks = Chunks.of(seqlen, chunk_size)
    X, B, C = chunks.cut(inflow).contiguous(), chunks.cut(B), chunks.cut(C)
    inside, from_entry, to_end = chunks.decays(chunks.cut(log_decay), run, X.dtype)

    left = X.transpose(-1, -2) @ per_head(B, to_end[..., None])  # b c h p n
    entries = []
    for decay, added in zip(from_entry[..., -1, None, None].unbind(1), left.unbind(1), strict=True):
        entries.append(state)
        state = state * decay + added
    carried = per_head(C, from_entry[..., None]) @ torch.stack(entries, dim=1).transpose(-1, -2)
    weights = per_head(C @ B.transpose(-1, -2), inside)
    y = (weights @ X + carried).movedim(3, 2).reshape(batch, -1, nheads, headdim)
    return y[:, :seqlen], state


def ssd_update(
    state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_min, dt_max, seq_idx, state_indices
) -> Tensor:
    """A few tokens onto states that are overwritten; arguments as `vision_scan.ssd_update`."""

    def advance(states, rows):
        picked = [None if t is None else t[rows] for t in (x, dt, B, C, z, seq_idx)]
        x_, dt_, B_, C_, z_, seq_idx_ = picked
        return ssd_recurrent(
            x_, dt_, A, B_, C_, D, z_, dt_bias, dt_softplus, dt_min, dt_max, states, seq_idx_
        )

    return update_slots(advance, state, x, state_indices)


def update_slots(advance, state: Tensor, x: Tensor, state_indices: Tensor | None) -> Tensor:
    """Applies `advance(states, rows) -> (y, states)` to the slots that the rows name.

    Args:
        state: (num_slots, ...), overwritten.
        x: (batch, ...), gives the shape and dtype of the output.
        state_indices: (batch,) slot of each row, below 0: the row is skipped and its output is 0; None:
            row i uses slot i.
    """
    if state_indices is None:
        y, new = advance(state, slice(None))
        state.copy_(new)
        return y
    rows = (state_indices >= 0).nonzero()[:, 0]
    slots = state_indices[rows].long()
    y, new = advance(state[slots], rows)
    state.index_copy_(0, slots, new.to(state.dtype))
    return torch.zeros_like(x).index_copy(0, rows, y)
