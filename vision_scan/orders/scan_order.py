"""The visiting lists of a grid, checked, with measures of how far neighbours are taken apart."""

from __future__ import annotations

import copy
import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vision_scan.errors import UserError, choose

MERGES = {
    "sum": "the lists' results are added",
    "mean": "the lists' results are averaged",
    "gated": "the lists' results are added, each weighted by a gate per cell",
    "concat": "the lists' results are kept apart",
    "scatter": "the lists are disjoint: every cell takes the one result that it has",
}
SCHEDULES = {
    "together": "every layer reads all lists",
    "by_layer": "layer l reads list l modulo the number of lists",
}


@dataclass(frozen=True, eq=False, repr=False)
class ScanOrder:
    """The visiting lists of one grid; a read-only sequence of them, checked when it is made.

    Under the merge `scatter` the lists together hold every cell exactly once; under any other merge
    each list does. Orders are cached and shared: never write into their tensors.

    Args:
        lists: visiting lists, each (length,) int64 (or anything that makes such a tensor); -1 is a
            pad, which reads zeros and writes nowhere.
        height, width: size of the grid in cells.
        merge: how the results of the lists become one, a key of MERGES.
        schedule: whether a layer reads all lists or takes its turn, a key of SCHEDULES.
        name: what to call it in pictures and messages.
        is_causal: whether a cell is read after those in front of it; else every cell sees all others alike, and the
            one list only says how they are laid out. `ssd_2d` serves such an order, the other operators refuse it.
    Attributes:
        index: the lists stacked, (num_orders, seqlen) int64, short lists padded with -1.
        inverse: position of each cell in each list, (num_orders, height * width) int64; -1 where
            the list does not hold the cell.
    Raises:
        UserError: if the lists do not hold the cells as said above, or a choice is unknown.
    """

    lists: Sequence[Tensor]
    height: int
    width: int
    merge: str = "sum"
    schedule: str = "together"
    name: str = "custom"
    is_causal: bool = True
    index: Tensor = field(init=False)
    inverse: Tensor = field(init=False)
    _moved: dict[torch.device, ScanOrder] = field(init=False)

    @torch.inference_mode(False)  # else what is cached while answering could not be trained with
    def __post_init__(self) -> None:
        height, width = read_size(self.height, self.width)
        self.__dict__.update(height=height, width=width)
        choose("merge", self.merge, MERGES)
        choose("schedule", self.schedule, SCHEDULES)
        # "cpu" spelled out, here and below: a torch.device("meta") around must not fill the cache.
        paths = [p if isinstance(p, Tensor) else torch.tensor(p, device="cpu") for p in self.lists]
        lists = [path.flatten().long() for path in paths]
        if not lists:
            raise UserError(f"scan order {self.name!r} has no visiting list; give at least one")
        self._check(lists)
        index = torch.nn.utils.rnn.pad_sequence(lists, batch_first=True, padding_value=-1)
        inverse = index.new_full((len(lists), self.height * self.width), -1)
        order, position = (index >= 0).nonzero(as_tuple=True)
        inverse[order, index[order, position]] = position
        self._set_tensors(index, inverse, [len(path) for path in lists])

    def _check(self, lists: list[Tensor]) -> None:
        cells = self.height * self.width
        groups = {"all lists together": torch.cat(lists)}
        if self.merge != "scatter":
            groups = {f"list {k}": path for k, path in enumerate(lists)}
        for who, path in groups.items():
            where = f"scan order {self.name!r} on {self.height}x{self.width}: {who}"
            if path.numel() and not -1 <= path.min() <= path.max() < cells:
                raise UserError(f"{where} may hold the cells 0 to {cells - 1} and -1 for a pad")
            count = path[path >= 0].bincount(minlength=cells)
            if (count != 1).any():
                cell = int((count != 1).nonzero()[0])
                raise UserError(f"{where} must hold every cell once; "
                                f"cell {cell} occurs {count[cell]} times")

    def _set_tensors(self, index: Tensor, inverse: Tensor, lengths: list[int]) -> None:
        lists = tuple(row[:length] for row, length in zip(index, lengths, strict=True))
        self.__dict__.update(lists=lists, index=index, inverse=inverse, _moved={})

    def __len__(self) -> int:
        return len(self.lists)

    def __getitem__(self, k: int) -> Tensor:
        return self.lists[k]

    def __repr__(self) -> str:
        shape = f"{self.height}x{self.width}, {len(self)} x {self.seqlen}"
        return f"ScanOrder({self.name}, {shape}, {self.merge})"

    @property
    def seqlen(self) -> int:
        """Length of the longest list, pads included."""
        return self.index.shape[1]

    @property
    def is_dense(self) -> bool:
        """Whether every list holds every cell and no pad."""
        return self.merge != "scatter" and self.seqlen == self.height * self.width

    def at(self, depth: int) -> ScanOrder:
        """What layer number `depth` reads: its one list under `by_layer`, otherwise all lists."""
        if self.schedule == "together":
            return self
        return replace(self, lists=(self.lists[depth % len(self)],))

    def to(self, device: torch.device | str) -> ScanOrder:
        """The same order with its tensors on `device`; each device's copy is made once."""
        device = torch.device(device)
        if device == self.index.device:
            return self
        if device not in self._moved:
            moved = copy.copy(self)
            with torch.inference_mode(False):
                index, inverse = self.index.to(device), self.inverse.to(device)
                moved._set_tensors(index, inverse, [len(path) for path in self.lists])
            self._moved[device] = moved
        return self._moved[device]

    @functools.cached_property
    def _steps(self) -> Tensor:
        """Manhattan distance between neighbours in the sequence, of all lists, pads left out."""
        cells = [path[path >= 0] for path in self.lists]
        width = self.width
        return torch.cat([(c // width).diff().abs() + (c % width).diff().abs() for c in cells])

    @property
    def mean_step(self) -> float:
        """Mean Manhattan distance on the grid between neighbours in the sequence; 1 is the best."""
        return float(self._steps.double().mean()) if self._steps.numel() else 0.0

    @property
    def max_step(self) -> int:
        """Largest Manhattan distance on the grid between neighbours in the sequence."""
        return int(self._steps.max()) if self._steps.numel() else 0

    @property
    def mean_gap(self) -> float:
        """Mean distance in the sequence between neighbours on the grid (cells that share a side).

        This is how long a state must remember a cell until it reads the next one beside it, in the
        list that brings the two closest. Pairs that no list holds are left out; 0 if none is left.
        """
        rank = self.inverse.view(-1, self.height, self.width)
        gaps = []
        for a, b in ((rank[:, 1:], rank[:, :-1]), (rank[:, :, 1:], rank[:, :, :-1])):
            gap = (a - b).abs().masked_fill((a < 0) | (b < 0), rank.numel())
            gaps.append(gap.amin(0).flatten())
        gap = torch.cat(gaps)
        gap = gap[gap < rank.numel()]
        return float(gap.double().mean()) if gap.numel() else 0.0

    @property
    def distortion(self) -> float:
        """Euclidean distance on the grid between neighbours in the sequence, summed, of the lists on average.

        Source: the score of FractalMamba++.
        """
        width, total = self.width, 0.0
        for path in self.lists:
            cells = path[path >= 0]
            total += float(torch.hypot((cells // width).diff().double(), (cells % width).diff().double()).sum())
        return total / len(self)

    @property
    def dilation(self) -> float:
        """Largest squared Euclidean distance of two cells over their distance in the sequence, of the list where it is
        smallest: how far apart on the grid what is near in the sequence can be. Hilbert's curve stays below 6.

        Source: Gotsman & Lindenbaum 1996, "On the metric properties of discrete space-filling curves".
        """
        return min(_dilation(path[path >= 0], self.width) for path in self.lists)


def _dilation(cells: Tensor, width: int) -> float:
    rows, columns = cells // width, cells % width
    worst = 0.0
    for gap in range(1, len(cells)):  # one distance in the sequence at a time: memory stays that of the list
        squared = (rows[gap:] - rows[:-gap]) ** 2 + (columns[gap:] - columns[:-gap]) ** 2
        worst = max(worst, int(squared.max()) / gap)
    return worst


# Not a base class: its method `index` would clash with ours.
Sequence.register(ScanOrder)  # pyright: ignore[reportAttributeAccessIssue]


def read_size(height: Any, width: Any) -> tuple[int, int]:
    """Height and width of a grid, checked."""
    return read_integer("height", height, 1), read_integer("width", width, 1)


def read_integer(what: str, value: Any, least: int) -> int:
    """An integer of at least `least`.

    Raises:
        UserError: on anything else.
    """
    number = operator.index(value) if hasattr(value, "__index__") else least - 1
    if isinstance(value, bool) or number < least:
        raise UserError(f"{what} of a scan order must be an int of at least {least}, not {value!r}")
    return number
