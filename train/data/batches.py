"""Which rows a step sees, and its micro-batches."""

import functools
import hashlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from train.data.collate import Batch
from train.data.dataset import Dataset, Share
from train.data.rows import BadRowError
from train.objectives import Objective
from vision_scan.errors import UserError

log = logging.getLogger(__name__)


class SampleOrder:
    """Which rows make up the batch of each step: a function of the step, so resuming is exact.

    The rows are shuffled anew every epoch and the epochs are joined without a seam, so a batch is
    always full, however few the rows. Within a group of batches the rows are sorted by length
    before they are cut into batches, and the batches are shuffled again.

    Args:
        lengths: of all rows.
        batch_size: rows per step.
        seed: of the order.
        length_group: batches that are sorted together.
        shares: the rows of each source of a mixture; None: all rows are of one.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        length_group: int = 16,
        shares: Sequence[Share] | None = None,
    ) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.length_group = length_group
        self.shares = shares or [Share(0, len(lengths), 1.0)]
        self.epoch_size = sum(share.per_epoch for share in self.shares)
        self._epoch = functools.lru_cache(maxsize=4)(self._shuffled)
        self._pass = functools.lru_cache(maxsize=4 * len(self.shares))(self._pass_over)
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
        order = self._permutation("group", group, self.length_group)
        return [batches[index] for index in order]

    def _row(self, number: int) -> int:
        epoch, index = divmod(number, self.epoch_size)
        return int(self._epoch(epoch)[index])

    def _shuffled(self, epoch: int) -> np.ndarray:
        rows = np.concatenate([self._drawn(number, epoch) for number in range(len(self.shares))])
        return rows[self._permutation("epoch", epoch, self.epoch_size)]

    def _drawn(self, number: int, epoch: int) -> np.ndarray:
        """The rows that an epoch takes of a share: the next ones of its own endless passes, so that every row is
        seen equally often in the long run, whatever the weight."""
        share = self.shares[number]
        if share.per_epoch == share.count:
            return np.arange(share.start, share.start + share.count)
        places = np.arange(epoch * share.per_epoch, (epoch + 1) * share.per_epoch)
        passes, offsets = np.divmod(places, share.count)
        rows = np.empty_like(places)
        for one in np.unique(passes):
            rows[passes == one] = self._pass(number, int(one))[offsets[passes == one]]
        return share.start + rows

    def _pass_over(self, number: int, one: int) -> np.ndarray:
        return self._permutation(f"share {number}", one, self.shares[number].count)

    def _permutation(self, purpose: str, number: int, size: int) -> np.ndarray:
        digest = hashlib.sha256(f"{self.seed} {purpose} {number}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randperm(size, generator=generator).numpy()


class BatchSource:
    """The micro-batches of one process, as a function of the step.

    A step's rows, sorted by length, are cut into equal pieces, one for each micro-batch, and each piece is dealt out
    to the processes so that all of them have about the same work.

    Args:
        objective: renders and collates the rows.
        rows: all of them.
        order: gives the rows of a step.
        cost: what a row takes, by number, in any unit.
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
        rows: Dataset,
        order: SampleOrder,
        cost: Callable[[int], float] | None = None,
        micro_batch_size: int | None = None,
        rank: int = 0,
        world_size: int = 1,
        skip_bad: bool = False,
    ) -> None:
        self.objective = objective
        self.rows = rows
        self.order = order
        self.cost = cost or (lambda number: float(order.lengths[number]))
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
        return [
            self.objective.collate([self._sample(number) for number in dealt[self.rank]])
            for dealt in self.deals(step)
        ]

    def deals(self, step: int) -> list[list[list[int]]]:
        """The row numbers of a step: of each micro-batch, of each process."""
        numbers = self.order.batch(step)
        return [
            deal(numbers[start : start + self._piece], self.world_size, self.cost)
            for start in range(0, len(numbers), self._piece)
        ]

    def _sample(self, number: int) -> Any:
        for offset in range(len(self.rows)):
            row_number = (number + offset) % len(self.rows)
            try:
                return self.objective.sample(self.rows[row_number])
            except BadRowError as error:
                if not self.skip_bad:
                    raise
                if str(error) not in self.skipped:
                    self.skipped.add(str(error))
                    log.warning("skipped %s (%d so far)", error, len(self.skipped))
        raise BadRowError("no row of the data can be used any more")


def deal(numbers: list[int], world_size: int, cost: Callable[[int], float]) -> list[list[int]]:
    """Rows to processes, equally many to each and of about the same cost: the dearest first, each to the process
    that has the least so far."""
    if world_size == 1:
        return [numbers]
    most = len(numbers) // world_size
    loads = [0.0] * world_size
    dealt: list[list[int]] = [[] for _ in range(world_size)]
    costs = [cost(number) for number in numbers]
    for place in sorted(range(len(numbers)), key=lambda place: -costs[place]):
        rank = min((r for r in range(world_size) if len(dealt[r]) < most), key=loads.__getitem__)
        loads[rank] += costs[place]
        dealt[rank].append(place)
    return [[numbers[place] for place in sorted(places)] for places in dealt]
