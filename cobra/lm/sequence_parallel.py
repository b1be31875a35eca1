"""Sequence parallelism: each row is cut over the processes of a group, and each reads its own piece, a shard.

What a linear recurrence makes of the state S that enters a shard is affine,

    S_after = advance(transition, S_before) + final,

with `final` the state that the shard leaves behind from a zero state. Every process works out its own pair,
all pairs are gathered by all, and each process composes those in front of it: that gives the state that
enters its shard, and the ordinary operator goes on from there. In the backward pass the gradients of the
entering states are gathered and composed in the other direction. No process waits for the result of the one
before, and what is sent does not grow with the length of the rows.

Source: state passing between devices, Dao & Gu 2024, "Transformers are SSMs" (arXiv:2405.21060), section 8.2;
the gather in place of a chain as Sun et al. 2025, "LASP-2" (arXiv:2502.07563).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

import vision_scan
from vision_scan import real_and_runs
from vision_scan.errors import UserError
from vision_scan.ops import discretize

Advance = Callable[[Tensor, Tensor], Tensor]
"""(transition, state) -> state: what a shard makes of the state that enters it, linear in both."""


@dataclass(frozen=True)
class SequenceShard:
    """The piece of each row that this process reads, and what it must know of the pieces before it.

    Attributes:
        group: the processes that share the rows, in the order of the pieces.
        start, stop: the columns of this piece.
        starts: (batch,) int64 on the CPU, tokens before the piece in the segment that it begins with.
        seq_idx: (batch, stop - start) int64, that of the piece, or None.
        continues: (batch,) bool, whether the piece goes on in the segment before it; None: all do.
        passes: (batch,) bool, whether that segment lasts to the end of the piece; None: all do.
    """

    group: "dist.ProcessGroup"
    start: int
    stop: int
    starts: Tensor
    seq_idx: Tensor | None = None
    continues: Tensor | None = None
    passes: Tensor | None = None

    @staticmethod
    def cut(
        batch: int, seqlen: int, group: "dist.ProcessGroup", seq_idx: Tensor | None = None
    ) -> "SequenceShard":
        """This process's piece of rows of seqlen tokens; the pieces' lengths differ by at most one.

        Args:
            seq_idx: (batch, seqlen) integer, that of the whole rows: a change starts a new segment, below 0
                is padding.
        Raises:
            UserError: if there are fewer tokens than processes, or seq_idx is of another shape.
        """
        rank, size = dist.get_rank(group), dist.get_world_size(group)
        if seqlen < size:
            raise UserError(
                f"rows of {seqlen} tokens cannot be cut over {size} processes: each needs 1 token at least; "
                "take fewer processes for a row, or pad the rows"
            )
        if seq_idx is not None and seq_idx.shape != (batch, seqlen):
            raise UserError(
                f"seq_idx must have the shape of the whole rows {(batch, seqlen)}, got {tuple(seq_idx.shape)}"
            )
        start, stop = (place * seqlen // size for place in (rank, rank + 1))
        if seq_idx is None:
            return SequenceShard(group, start, stop, torch.full((batch,), start, device="cpu"))
        real, run = real_and_runs(seq_idx)
        before = run[:, max(start - 1, 0)] * (start > 0)
        own, own_run = real[:, start:stop], run[:, start:stop]
        first = own_run.gather(1, own.long().argmax(1, keepdim=True))[:, 0]
        first = torch.where(own.any(1), first, before)
        starts = (real & (run == first[:, None]))[:, :start].sum(1).cpu()
        own_idx = seq_idx[:, start:stop].long()
        return SequenceShard(group, start, stop, starts, own_idx, first == before, own_run[:, -1] == before)

    def take(self, whole: Tensor) -> Tensor:
        """(batch, seqlen, ...) -> (batch, stop - start, ...)."""
        return whole[:, self.start : self.stop]

    def entering_state(self, final: Tensor, transition: Tensor, advance: Advance = torch.mul) -> Tensor:
        """The state in front of this process's first token; all processes must call it.

        Args:
            final: (batch, ...), float32 or wider: the state that the shard leaves behind from a zero state.
            transition: (batch, ...), same dtype, batch on the first axis: what becomes of an entering state
                if no segment ends within the shard.
            advance: applies a transition; the product of elements, unless the recurrence mixes them.
        Returns:
            the shape and dtype of `final`.
        """
        transition = transition * _per_row(self.passes, transition)
        state = _EnteringState.apply(final, transition, advance, self.group)
        return state * _per_row(self.continues, state)


def _per_row(flags: Tensor | None, like: Tensor) -> Tensor | float:
    """(batch,) bool as factors for a tensor with the batch in front."""
    return 1.0 if flags is None else flags.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


class _EnteringState(torch.autograd.Function):
    """The exclusive scan over the processes. Only this process's own tensors are kept for the backward pass,
    so that its memory does not grow with their number."""

    @staticmethod
    def forward(ctx: Any, final: Tensor, transition: Tensor, advance: Advance, group: Any) -> Tensor:
        state = torch.zeros_like(final)
        for left, passed in _gather([final, transition], group)[: dist.get_rank(group)]:
            state = advance(passed, state) + left
        ctx.save_for_backward(transition, state)
        ctx.advance, ctx.group = advance, group
        return state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        transition, state = ctx.saved_tensors
        later = _gather([grad, transition], ctx.group)[dist.get_rank(ctx.group) + 1 :]
        after = torch.zeros_like(grad)  # of the state behind this shard
        for entering, passed in reversed(later):
            after = _pull_back(ctx.advance, passed, state, after)[1] + entering
        return after, _pull_back(ctx.advance, transition, state, after)[0], None, None


def _pull_back(advance: Advance, transition: Tensor, state: Tensor, grad: Tensor) -> tuple[Tensor, ...]:
    """The gradients of transition and state, given that of advance(transition, state)."""
    inputs = [t.detach().requires_grad_() for t in (transition, state)]
    with torch.enable_grad():
        return torch.autograd.grad(advance(*inputs), inputs, grad)


def _gather(tensors: Sequence[Tensor], group: Any) -> list[list[Tensor]]:
    """The tensors of every process, in the order of their ranks; shapes and the dtype are the same in all."""
    sizes = [tensor.numel() for tensor in tensors]
    own = torch.cat([tensor.flatten() for tensor in tensors])
    every = own.new_empty(dist.get_world_size(group) * len(own))
    dist.all_gather_into_tensor(every, own, group=group)
    return [
        [part.view_as(tensor) for part, tensor in zip(one.split(sizes), tensors, strict=True)]
        for one in every.split(len(own))
    ]


def ssd_map(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, dt_bias: Tensor | None, dt_limit: Sequence[float],
    seq_idx: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """What `vision_scan.ssd` (with a softplus) does to a state, without scanning: one product of matrices.

    Args:
        x, dt, A, B, dt_bias, dt_limit, seq_idx: as `vision_scan.ssd`.
    Returns:
        final: (batch, nheads, headdim, d_state), from a zero state, float32 or wider; transition:
        (batch, nheads, 1, 1), the decay of all tokens together.
    """
    # It would keep another tensor of the size of x, and costs little once more.
    return checkpoint(_ssd_map, x, dt, A, B, dt_bias, dt_limit, seq_idx, use_reentrant=False,
                      preserve_rng_state=False)  # fmt: skip


def _ssd_map(x, dt, A, B, dt_bias, dt_limit, seq_idx) -> tuple[Tensor, Tensor]:
    with torch.autocast(x.device.type, enabled=False):
        wide = torch.promote_types(x.dtype, torch.float32)
        dt, run = _steps(dt, dt_bias, dt_limit, seq_idx, wide)
        # Differences of running sums are taken in float64, as in the scan.
        through = (dt * A.to(wide)).double().cumsum(1)  # batch seqlen nheads
        weight = (through[:, -1:] - through).exp().to(wide) * dt
        if run is not None:
            weight = weight * (run == run[:, -1:])[..., None]
        inflow = (x.to(wide) * weight[..., None]).unflatten(2, (B.shape[2], -1)).flatten(3)
        # In this order the gradient of inflow is laid out as x is.
        final = B.to(wide).movedim(1, 3) @ inflow.movedim(1, 2)  # batch ngroups d_state heads*headdim
        final = final.mT.reshape(len(x), *x.shape[2:], -1)
        return final, through[:, -1, :, None, None].exp().to(wide)


def selective_scan_map(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, dt_bias: Tensor, seq_idx: Tensor | None
) -> tuple[Tensor, Tensor]:
    """What `vision_scan.selective_scan` (with a softplus) does to a state. As each channel and state has a
    decay of its own, it takes a scan, whose outputs are dropped.

    Args:
        u, dt, A, B, C, dt_bias, seq_idx: as `vision_scan.selective_scan`.
    Returns:
        final: (batch, d, d_state), from a zero state, float32 or wider; transition: the same shape, the decay
        of all tokens together.
    """
    _, final = vision_scan.selective_scan(
        u, dt, A, B, C, dt_bias=dt_bias, dt_softplus=True, return_final_state=True, seq_idx=seq_idx
    )
    total = checkpoint(_total_step, dt, dt_bias, seq_idx, final.dtype, use_reentrant=False,
                       preserve_rng_state=False)  # fmt: skip
    return final, torch.exp(total[..., None] * A.to(final.dtype))


def _total_step(dt: Tensor, dt_bias: Tensor, seq_idx: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(batch, d, seqlen) -> (batch, d)."""
    with torch.autocast(dt.device.type, enabled=False):
        return _steps(dt.transpose(1, 2), dt_bias, (0.0, torch.inf), seq_idx, dtype)[0].sum(1)


def _steps(dt, dt_bias, dt_limit, seq_idx, dtype) -> tuple[Tensor, Tensor | None]:
    """dt (batch, seqlen, ...) as the scans use it, 0 at padding, and the runs, if there is a seq_idx."""
    dt = discretize(dt, dt_bias, True, *dt_limit, dtype)
    if seq_idx is None:
        return dt, None
    real, run = real_and_runs(seq_idx)
    return torch.where(real[..., None], dt, 0.0), run


def window_map(x: Tensor, taps: int, seq_idx: Tensor | None) -> tuple[Tensor, Tensor]:
    """What a causal convolution does to its window, the last `taps` inputs: those of the shard move in and
    push older ones out. A shard may have fewer of them than the window is long. The transition is applied by
    `shift`.

    Args:
        x: (batch, channels, seqlen); seq_idx (batch, seqlen) or None.
    Returns:
        final: (batch, channels, taps), from an empty window, float32 or wider; transition: (batch, taps,
        taps), with ones where an entry of the window moves from row to column.
    """
    seqlen = x.shape[2]
    places = torch.arange(seqlen, device=x.device).expand(len(x), -1)
    if seq_idx is not None:
        real, run = real_and_runs(seq_idx)
        places = torch.where(real & (run == run[:, -1:]), places, -1)
    last = places.topk(min(taps, seqlen), dim=1).values.flip(1)
    last = torch.nn.functional.pad(last, (taps - last.shape[1], 0), value=-1)
    index = last.clamp(min=0)[:, None].expand(-1, x.shape[1], -1)
    final = torch.where((last >= 0)[:, None], x.gather(2, index), 0.0)
    final = final.to(torch.promote_types(x.dtype, torch.float32))
    moved = (last >= 0).sum(1)[:, None, None]
    place = torch.arange(taps, device=x.device)
    return final, (place[:, None] == place + moved).to(final.dtype)


def shift(transition: Tensor, window: Tensor) -> Tensor:
    """window (batch, channels, taps) times transition (batch, taps, taps)."""
    with torch.autocast(window.device.type, enabled=False):
        return window @ transition


def check_shardable(mixers: Sequence[torch.nn.Module]) -> None:
    """Layers can read shards if they say so, `reads_shards` (mixer.py).

    Raises:
        UserError: naming the first layer that cannot.
    """
    for index, mixer in enumerate(mixers):
        if not getattr(mixer, "reads_shards", False):
            kind = getattr(getattr(mixer, "config", None), "kind", type(mixer).__name__)
            raise UserError(
                f"layer {index} ({kind}) needs whole rows and cannot read shards of them: take a model whose "
                "layers are mamba1, mamba2 and mlp, or do without sequence parallelism"
            )
