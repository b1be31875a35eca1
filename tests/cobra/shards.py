"""Pieces of rows, as processes that read rows together have them."""

from typing import Any

from torch import Tensor

from cobra.lm.sequence_parallel import SequenceShard
from cobra.model import Cobra
from tests.tolerance import assert_close


class Piece(SequenceShard):
    """`length` tokens of each row from `start` on, without a process around it."""

    def __init__(self, start: int, length: int) -> None:
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "length", length)

    def take(self, x: Tensor) -> Tensor:
        return x[:, self.start : self.start + self.length]


def assert_pieces_are_of(model: Cobra, whole: Tensor, input_ids: Tensor, pixel_values: Tensor, *images: Any) -> None:
    """Embedding three pieces of rows one by one gives what embedding the rows whole gave."""
    length = -(-whole.shape[1] // 3)
    for start in range(0, whole.shape[1], length):
        shard = Piece(start, length)
        found = model.embed_shard(input_ids, pixel_values, shard, *images)
        assert_close(f"piece from {start}", found, shard.take(whole), 1e-12)
