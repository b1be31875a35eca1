"""Training in less memory: activations are computed again in the backward pass instead of being kept.

By layer, what is kept is the residual stream in front of each (Chen et al. 2016, arXiv:1604.06174). By segment, a row
is read in pieces, each going on from the state behind the last, and what is kept of a piece is that state alone: of all
layers together no more than of one decoding step, however many tokens the piece has.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .state import State

Read = Callable[[Tensor, State | None, Tensor | None, bool], tuple[Tensor, State]]


def recompute(function: Callable[..., Any], *inputs: Any) -> Any:
    """`function(*inputs)`, of which nothing but the inputs is kept for the backward pass."""
    return checkpoint(function, *inputs, use_reentrant=False)


def read_by_segments(
    read: Read, x: Tensor, state: State | None, seq_idx: Tensor | None, size: int
) -> tuple[Tensor, State | None]:
    """Reads rows in pieces whose activations are recomputed.

    Args:
        read: (embeddings, state, seq_idx, overwrite) -> (hidden states, state).
        x: (batch, seqlen, d_model).
        state: what the rows have read before, or None.
        seq_idx: (batch, seqlen) int64 or None, see `LanguageModel.forward`.
        size: tokens of a piece.
    Returns:
        what `read` returns of all tokens at once, to rounding.
    """
    hidden, before = [], None
    for start in range(0, x.shape[1], size):
        tokens = slice(start, start + size)
        index = None if seq_idx is None else seq_idx[:, tokens]
        if index is not None:
            if state is not None and before is not None:
                state = state.forget(begins_anew(before, index))
            before = last_segment(before, index)
        part, state = recompute(read, x[:, tokens], state, index, False)
        hidden.append(part)
    return torch.cat(hidden, 1), state


def last_segment(before: Tensor | None, index: Tensor) -> Tensor:
    """(batch,) int64: the segment of each row's last real token so far, -1 if there was none."""
    place = torch.where(index >= 0, torch.arange(index.shape[1], device=index.device), -1).amax(1)
    last = index.gather(1, place.clamp(min=0)[:, None])[:, 0]
    earlier = torch.full_like(last, -1) if before is None else before
    return torch.where(place >= 0, last, earlier)


def begins_anew(before: Tensor, index: Tensor) -> Tensor:
    """(batch,) bool: whether a row's first real token in `index` is of another segment than its last one before."""
    place = (index >= 0).long().argmax(1)
    first = index.gather(1, place[:, None])[:, 0]
    return (first >= 0) & (before >= 0) & (first != before)
