"""The states of conversations that are being answered, side by side in one batch of a fixed size."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cobra.lm.state import State

if TYPE_CHECKING:
    from cobra.lm import LanguageModel


class Slots:
    """Rows of one state, of which the first `used` are taken, without gaps: a step reads and writes just these.

    Args:
        lm: whose state it is.
        count: rows at most.
        capacity: tokens that full attention reserves room for in the beginning; it grows by doubling.
    """

    def __init__(self, lm: "LanguageModel", count: int, capacity: int = 0) -> None:
        self.count = count
        self.used = 0
        self._lm = lm
        self._capacity = capacity
        self._pool = lm.allocate_state(count, capacity)

    @property
    def nbytes(self) -> int:
        return self._pool.nbytes

    def put(self, state: State, capacity: int) -> int:
        """Copies a state of one row into a free slot: its place.

        Args:
            capacity: tokens that the row may come to have read.
        """
        if self.used == self.count:
            raise ValueError(f"all {self.count} slots are taken")
        self._reserve(capacity)
        self._write(self.used, state)
        self.used += 1
        return self.used - 1

    def take(self, place: int) -> State:
        """A copy of a slot's state, without the room that it has not used."""
        return self._lm.trim_state(self._pool.select(torch.tensor([place])))

    def free(self, place: int) -> int | None:
        """Gives a slot back. The last one moves into the gap: the place it had, or None if it was this one."""
        self.used -= 1
        if place == self.used:
            return None
        self._write(place, self.take(self.used))
        return self.used

    def step(self, tokens: Tensor) -> Tensor:
        """Reads a token (used,) of each taken slot; gives the logits (used, vocab) behind it."""
        pool, rows = self._pool, slice(0, self.used)
        layers = [{name: tensor[rows] for name, tensor in layer.items()} for layer in pool.layers]
        logits, after = self._lm(
            input_ids=tokens[:, None], state=State(layers, pool.lengths[rows]), logits_to_keep=1, overwrite_state=True
        )
        for own, given, new in zip(pool.layers, layers, after.layers, strict=True):
            for name, tensor in new.items():
                if tensor.data_ptr() != given[name].data_ptr():  # a layer that does not write in place
                    own[name][rows] = tensor
        pool.lengths[rows] = after.lengths
        return logits[:, -1]

    def _reserve(self, capacity: int) -> None:
        """Makes room for longer rows, where layers keep something of each token."""
        if capacity <= self._capacity:
            return
        old, self._capacity = self._pool, max(capacity, 2 * self._capacity)
        self._pool = self._lm.allocate_state(self.count, self._capacity)
        for place in range(self.used):
            self._write(place, old.select(torch.tensor([place])))

    def _write(self, place: int, state: State) -> None:
        for own, given in zip(self._pool.layers, state.layers, strict=True):
            for name, tensor in given.items():
                _copy(own[name][place], tensor[0], empty=-1 if name == "position" else 0)
        self._pool.lengths[place] = state.lengths[0]


def _copy(target: Tensor, source: Tensor, empty: int) -> None:
    """Copies what may have another number of tokens along one axis; those beyond are empty."""
    if target.shape == source.shape:
        target.copy_(source)
        return
    inside = tuple(slice(0, min(sizes)) for sizes in zip(target.shape, source.shape, strict=True))
    target.fill_(empty)
    target[inside] = source[inside]
