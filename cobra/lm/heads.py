"""Channels as heads, of which one may stand for several."""

from torch import Tensor


def by_head(t: Tensor, size: int, channels: int) -> Tensor:
    """(..., own) -> (..., channels / size, size): if there are fewer than `channels`, a head of them stands for as many
    in a row as there are channels more, as keys and values in grouped queries do (Ainslie et al. 2023,
    arXiv:2305.13245)."""
    own, heads = t.shape[-1], t.unflatten(-1, (-1, size))
    return heads if own == channels else heads.repeat_interleave(channels // own, dim=-2)
