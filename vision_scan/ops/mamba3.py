"""Mamba-3's scan, made of Mamba-2's: `mamba3` over sequences, `mamba3_update` for decoding.

The recurrence (reference/mamba3.py) lets a token write twice: once when it is read, weighted by gamma_t, and once more
when the next one is, weighted by beta_{t+1}. Without the first of these the state H_t = S_t - gamma_t v_t k_t^T follows

    H_t = alpha_t (H_{t-1} + w_t v_{t-1} k_{t-1}^T),        w_t = gamma_{t-1} + (1 - lam_t) dt_t,

which is `ssd`, fed with the token before and with a step of its own for each decay. The rest, gamma_t (q_t . k_t) v_t,
concerns one token. No output holds anything of a later token, not even as a rounding error, as it would if a token's
two weights were added up where it stands.

With a rank above 1 a token becomes as many in a row, of which the first alone decays the state. Query r then has not
seen what the ranks behind r bring in; that is added by products of rank x rank.

`ssd` multiplies what comes in by the same step that makes the state decay, so it is handed that divided by the step.
The gradient of a step is then a difference, and that of a dt next to one many orders of magnitude larger is inexact;
that of its logarithm, so of what a softplus makes it from, is not.

Letters: b batch, l seqlen, r s rank, h head, p headdim, n d_state.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import check_rank, check_shape, check_update_length
from .reference.mamba3 import Mamba3State, empty_state, turn
from .reference.segments import real_and_runs
from .ssd import ssd, ssd_update

# A step that decays nothing in any dtype, and by which dividing is exact.
NO_DECAY = 2.0**-60


def mamba3(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    lam: Tensor,
    B: Tensor,
    C: Tensor,
    rate: Tensor,
    D: Tensor | None = None,
    mimo_x: Tensor | None = None,
    initial_state: Mamba3State | None = None,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Mamba3State]:
    """Scans sequences with a trapezoidal rule, a decay for each token, and states that turn.

    Args:
        x: (batch, seqlen, nheads, headdim), float32, bfloat16, float16 or float64.
        dt: (batch, seqlen, nheads), the step, above 0.
        A: (batch, seqlen, nheads), negative.
        lam: (batch, seqlen, nheads), from 0 to 1, the token's own share of its step; the token before has the rest.
            All ones is Euler's rule, that of Mamba-2.
        B, C: (batch, seqlen, rank, nheads, d_state).
        rate: (batch, seqlen, num_phases), radians for a unit of dt; num_phases at most d_state // 2.
        D: (nheads,).
        mimo_x: (nheads, rank, headdim), factors of x for each rank; None, for a rank of 1: ones.
        initial_state: `ssm` (batch, nheads, headdim, d_state), `angle` (batch, nheads, num_phases) in radians, and of
            the last token `k` (batch, rank, nheads, d_state), turned, and `v` (batch, nheads, headdim). Not changed.
        seq_idx: (batch, seqlen), integer: segments; below 0 is padding (see ops/reference/segments.py).
        chunk_size: work is cut into chunks of this length, in tokens times rank; does not change the result.
    Returns:
        y: (batch, seqlen, rank, nheads, headdim) and the state after the last real token of each row; both float32
        (float64 for float64 inputs), but `v` in the dtype of x. Apart from each other and from the initial state.
    Raises:
        ValueError: on shapes that do not fit.
    Source: Lahoti et al. 2026, "Mamba-3" (arXiv:2603.15569).
    """
    _check(x, dt, A, lam, B, C, rate, D, mimo_x, initial_state, seq_idx)
    state = empty_state(x, B, rate) if initial_state is None else initial_state
    with torch.autocast(x.device.type, enabled=False):
        call = _prepare(x, dt, A, lam, B, C, rate, mimo_x, state, seq_idx)
        y, ssm = ssd(
            **call.inputs, initial_state=state["ssm"], return_final_state=True, chunk_size=chunk_size
        )
        last = {name: tensor.clone() for name, tensor in call.last.items()}  # or all tokens' would be kept
        return _complete(y, call, D, seq_idx), {"ssm": ssm + call.written, **last}


def mamba3_update(
    state: Mamba3State,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    lam: Tensor,
    B: Tensor,
    C: Tensor,
    rate: Tensor,
    D: Tensor | None = None,
    mimo_x: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> Tensor:
    """Advances states by a few tokens, tokens times rank at most 16, in place: the decoding form of `mamba3`.

    Args:
        state: as `initial_state` of `mamba3`, overwritten.
        x, dt, A, lam, B, C, rate, D, mimo_x, seq_idx: as `mamba3`.
    Returns:
        y: (batch, seqlen, rank, nheads, headdim), float32 or wider.
    Raises:
        ValueError: on shapes that do not fit or more tokens.
    """
    _check(x, dt, A, lam, B, C, rate, D, mimo_x, state, seq_idx)
    check_update_length(x.shape[1] * B.shape[2])
    with torch.autocast(x.device.type, enabled=False):
        call = _prepare(x, dt, A, lam, B, C, rate, mimo_x, state, seq_idx)
        y = _complete(ssd_update(state["ssm"], **call.inputs), call, D, seq_idx)
        state["ssm"].add_(call.written)
        for name, tensor in call.last.items():
            state[name].copy_(tensor)
        return y


class _Call(NamedTuple):
    """What a call hands to `ssd`, and what it adds afterwards.

    Attributes:
        inputs: of `ssd`, each token in as many as there are ranks.
        values: (b, l, r, h, p), v of each rank.
        missed: (b, l, r, h, p), what the queries of a token cannot have seen in the scan.
        written: (b, h, p, n), what the last token has written beyond the scan's state.
        last: `angle`, `k` and `v` of the state afterwards, views.
    """

    inputs: dict
    values: Tensor
    missed: Tensor
    written: Tensor
    last: Mamba3State


def _prepare(x, dt, A, lam, B, C, rate, mimo_x, state, seq_idx) -> _Call:
    wide = torch.promote_types(x.dtype, torch.float32)
    plain, dt, A, lam, B, C, rate = (t.to(wide) for t in (x, dt, A, lam, B, C, rate))
    rank = B.shape[2]
    places = None if seq_idx is None else _places(seq_idx)
    phases = _phases(rate[:, :, None] * dt[..., None], state["angle"], places)
    k, q = turn(B, phases), turn(C, phases)

    gamma = lam * dt
    gamma_before, gamma_last = _shift(torch.zeros_like(gamma[:, 0]), gamma, places)  # in the state already
    v_before, v_last = _shift(state["v"], plain, places)
    k_before, k_last = _shift(state["k"], k, places)
    weight = gamma_before + (1 - lam) * dt
    if places is not None:
        weight = torch.where(places.is_first[..., None], 0.0, weight)  # nothing stands before

    def by_rank(v: Tensor) -> Tensor:
        """(b, ..., h, p) -> (b, ..., r, h, p)."""
        return v.unsqueeze(-3) if mimo_x is None else v.unsqueeze(-3) * mimo_x.to(wide).transpose(0, 1)

    steps = (-A * dt).clamp(min=NO_DECAY)
    entering = by_rank(v_before * (torch.exp(-steps) * weight)[..., None])
    values = by_rank(plain)
    own = values * gamma[:, :, None, :, None]
    steps = torch.cat([steps[:, :, None], steps.new_full((*B.shape[:2], rank - 1, B.shape[3]), NO_DECAY)], dim=2)
    inputs = {
        "x": (entering / steps[..., None]).flatten(1, 2),
        "dt": steps.flatten(1, 2),
        "A": -torch.ones_like(steps[0, 0, 0]),
        "B": k_before.flatten(1, 2),
        "C": q.flatten(1, 2),
        "seq_idx": None if seq_idx is None else seq_idx.repeat_interleave(rank, dim=1),
    }
    return _Call(
        inputs=inputs,
        values=values,
        missed=_missed(q, k_before, k, entering, own),
        written=torch.einsum("brhp,brhn->bhpn", by_rank(v_last * gamma_last[..., None]), k_last),
        last={"angle": phases[:, -1], "k": k_last, "v": v_last.to(x.dtype)},
    )


def _missed(q: Tensor, k_before: Tensor, k: Tensor, entering: Tensor, own: Tensor) -> Tensor:
    """The token itself in all ranks, and the token before in the ranks behind a query's own.

    Args:
        q, k_before, k: (b, l, r, h, n).
        entering, own: (b, l, r, h, p), the values that go with k_before and k, weighted.
    """
    if q.shape[2] == 1:
        return (q * k).sum(-1, keepdim=True) * own
    scores = torch.einsum("blrhn,blshn->blhrs", q, torch.cat([k_before, k], dim=2))
    seen = torch.ones_like(scores[0, 0, 0]).tril()  # r 2r: own values are all above
    return torch.einsum("blhrs,blshp->blrhp", scores * (1 - seen), torch.cat([entering, own], dim=2))


def _complete(y: Tensor, call: _Call, D: Tensor | None, seq_idx: Tensor | None) -> Tensor:
    """The output of `ssd`, (b, l r, h, p), as that of `mamba3`, (b, l, r, h, p)."""
    y = y.view_as(call.values) + call.missed
    if D is not None:
        y = torch.addcmul(y, call.values, D.to(y.dtype)[:, None])
    return y if seq_idx is None else torch.where((seq_idx >= 0)[..., None, None, None], y, 0.0)


def _phases(turns: Tensor, start: Tensor, places: "_Places | None") -> Tensor:
    """Running sums of turns (b, l, h, num_phases) within segments, modulo 2 pi; start (b, h, num_phases)."""
    # Summed in float64: float32 would lose the digits of an angle to the many turns before it.
    wide, start = turns.double(), start.double()[:, None]
    if places is None:
        phases = start + wide.cumsum(1)
    else:
        wide = torch.where(places.is_real[..., None, None], wide, 0.0)
        total = wide.cumsum(1)
        rows = torch.arange(len(wide), device=wide.device)[:, None]
        in_front = (total - wide)[rows, places.first]
        phases = total - torch.where(places.is_carried[..., None, None], -start, in_front)
    return torch.remainder(phases, 2 * math.pi).to(turns.dtype)


class _Places(NamedTuple):
    """Where tokens stand among padding and segments.

    Attributes:
        is_real: (b, l) bool, not padding.
        is_first: (b, l) bool, the first of a segment that begins in this call.
        is_carried: (b, l) bool, of the segment that the state belongs to.
        first: (b, l) int64, place of the first token of the same segment; 0 in the state's.
        before: (b, l) int64, place of the last real token before, counted from 1; 0 is the state's last.
        last: (b, 1) int64, the same of the last real token of all.
    """

    is_real: Tensor
    is_first: Tensor
    is_carried: Tensor
    first: Tensor
    before: Tensor
    last: Tensor


def _places(seq_idx: Tensor) -> _Places:
    real, run = real_and_runs(seq_idx)
    place = torch.arange(seq_idx.shape[1], device=seq_idx.device)
    latest = torch.where(real, place + 1, 0).cummax(1).values
    is_first = torch.nn.functional.pad(run[:, 1:] != run[:, :-1], (1, 0))
    return _Places(
        is_real=real,
        is_first=is_first,
        is_carried=run == 0,
        first=torch.where(is_first, place, 0).cummax(1).values,
        before=torch.nn.functional.pad(latest[:, :-1], (1, 0)),
        last=latest[:, -1:],
    )


def _shift(carried: Tensor, t: Tensor, places: _Places | None) -> tuple[Tensor, Tensor]:
    """What stands before each token of t (b, l, ...), carried (b, ...) before the first; and what stands last."""
    entries = torch.cat([carried[:, None].to(t.dtype), t], dim=1)
    if places is None:
        return entries[:, :-1], entries[:, -1]
    rows = torch.arange(len(t), device=t.device)[:, None]
    return entries[rows, places.before], entries[rows, places.last][:, 0]


def _check(x, dt, A, lam, B, C, rate, D, mimo_x, state, seq_idx) -> None:
    check_rank("x", x, "batch seqlen nheads headdim")
    check_rank("B", B, "batch seqlen rank nheads d_state")
    check_rank("rate", rate, "batch seqlen num_phases")
    batch, seqlen, nheads, headdim = x.shape
    rank, d_state, num_phases = B.shape[2], B.shape[4], rate.shape[2]
    for name, tensor in (("dt", dt), ("A", A), ("lam", lam)):
        check_shape(name, tensor, (batch, seqlen, nheads))
    for name, tensor in (("B", B), ("C", C)):
        check_shape(name, tensor, (batch, seqlen, rank, nheads, d_state))
    check_shape("rate", rate, (batch, seqlen, num_phases))
    check_shape("D", D, (nheads,))
    check_shape("mimo_x", mimo_x, (nheads, rank, headdim))
    check_shape("seq_idx", seq_idx, (batch, seqlen))
    if num_phases > d_state // 2:
        raise ValueError(f"rate turns {num_phases} pairs of states, d_state {d_state} has {d_state // 2}")
    if mimo_x is None and rank > 1:
        raise ValueError(f"a rank of {rank} needs mimo_x of shape {(nheads, rank, headdim)}")
    if state is not None:
        check_shape("ssm of the state", state["ssm"], (batch, nheads, headdim, d_state))
        check_shape("angle of the state", state["angle"], (batch, nheads, num_phases))
        check_shape("k of the state", state["k"], (batch, rank, nheads, d_state))
        check_shape("v of the state", state["v"], (batch, nheads, headdim))
