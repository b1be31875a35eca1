"""Which rows a step sees, and its micro-batches."""

import functools
import hashlib
import logging
from collections.abc import Sequence
from typing import Any

import torch

from train.collate import Batch
from train.dataset import BadRowError, Row
from train.objectives import Objective
from vision_scan.errors import UserError

log = logging.getLogger(__name__)


class SampleOrder:
    """Which rows make up the batch of each step: a function of the step, so resuming is exact.

    The rows are shuffled anew every epoch and the epochs are joined without a seam, so a batch is
    always full, however few the rows. Within a group of batches the rows are sorted by length
    before they are cut into batches, and the batches are shuffled again.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, length_group: int = 16
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.length_group = length_group
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffled)
        self._group = functools.lru_cache(maxsize=2)(self._batches)

    def batch(self, step: int) -> list[int]:
        """The row numbers of a step, shortest row first."""
        group, index = divmod(step, self.length_group)
        return self._group(group)[index]

    def _batches(self, group: int) -> list[list[int]]:
        size = self.length_group * self.batch_size
        rows = [self._row(number) for number in range(group * size, (group + 1) * size)]
        rows.sort(key=lambda row: self.lengths[row])
        batches = [
            rows[start : start + self.batch_size] for start in range(0, size, self.batch_size)
        ]
        return [batches[index] for index in self._permutation("group", group, self.length_group)]

    def _row(self, number: int) -> int:
        epoch, index = divmod(number, len(self.lengths))
        return self._epoch(epoch)[index]

    def _shuffled(self, epoch: int) -> list[int]:
        return self._permutation("epoch", epoch, len(self.lengths))

    def _permutation(self, purpose: str, number: int, size: int) -> list[int]:
        digest = hashlib.sha256(f"{self.seed} {purpose} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randperm(size, generator=generator).tolist()


class BatchSource:
    """The micro-batches of one process, as a function of the step.

    A step's rows, sorted by length, are cut into equal pieces, one for each micro-batch, and each
    piece is dealt out to the processes in turn, so that all of them have about the same work.

    Args:
        objective: renders and collates the rows.
        rows: all of them.
        order: gives the rows of a step.
        micro_batch_size: rows per micro-batch and process; None: all of the step's at once.
        rank, world_size: this process, and how many there are.
        skip_bad: take the next row that works for one that does not, and say so, rather than raise
            `BadRowError`.
    Raises:
        UserError: if the rows of a step cannot be shared out equally.
    """

    def __init__(
        self,
        objective: Objective,
        rows: Sequence[Row],
        order: SampleOrder,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        skip_bad: bool = False,
    ) -> None:
        self.objective = objective
        self.rows = rows
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self.skip_bad = skip_bad
        self.micro_batch_size = micro_batch_size or max(1, order.batch_size // world_size)
        self._piece = self.micro_batch_size * world_size
        if order.batch_size % self._piece:
            raise UserError(
                f"train.batch_size={order.batch_size} is not a multiple of train.micro_batch_size="
                f"{self.micro_batch_size} x {world_size} processes; change one of them"
            )
        self.accumulation = order.batch_size // self._piece
        self.skipped: set[str] = set()

    def __call__(self, step: int) -> list[Batch]:
        numbers = self.order.batch(step)
        pieces = [
            numbers[start : start + self._piece] for start in range(0, len(numbers), self._piece)
        ]
        return [
            self.objective.collate(
                [self._sample(number) for number in piece[self.rank :: self.world_size]]
            )
            for piece in pieces
        ]

    def _sample(self, number: int) -> Any:
        for offset in range(len(self.rows)):
            row = self.rows[(number + offset) % len(self.rows)]
            try:
                return self.objective.sample(row)
            except BadRowError as error:
                if not self.skip_bad:
                    raise
                if row.id not in self.skipped:
                    self.skipped.add(row.id)
                    log.warning("skipped %s (%d so far)", error, len(self.skipped))
        raise BadRowError("no row of the data can be used any more")
