"""Scan orders: in which sequence the cells of a grid are read.

An order is data: one or more visiting lists over the cells of a (height, width) grid, where cell
(i, j) has the id i * width + j. Position t of list k reads cell P[k][t]; the inverse is the rank
map R[k][P[k][t]] = t. Reading is a gather with P, writing back a gather with R (see scan.py).

To add an order, write a function from the grid of cell ids to its visiting lists, and add one line
to SCAN_ORDERS. Keyword arguments with defaults become options: "random(seed=1)".
"""

from __future__ import annotations

import ast
import copy
import functools
import inspect
import operator
from collections.abc import Callable, Sequence
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
    index: Tensor = field(init=False)
    inverse: Tensor = field(init=False)
    _moved: dict[torch.device, ScanOrder] = field(init=False)

    @torch.inference_mode(False)  # else what is cached while answering could not be trained with
    def __post_init__(self) -> None:
        height, width = _size(self.height, self.width)
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


# Not a base class: its method `index` would clash with ours.
Sequence.register(ScanOrder)  # pyright: ignore[reportAttributeAccessIssue]


def order(
    name: str | ScanOrder, height: int, width: int, depth: int | None = None, **options: Any
) -> ScanOrder:
    """The scan order of that name on a grid; made once per size and options, then shared.

    Args:
        name: a key of SCAN_ORDERS, with options in brackets if wanted: "random(seed=1)". A
            ScanOrder that fits the grid is returned as it is; torch.compile(fullgraph=True) takes
            orders in this form only.
        height, width: size of the grid in cells, at least 1.
        depth: number of the layer that asks; picks its list where the schedule is `by_layer`.
            None keeps all lists.
        options: the same options as in brackets.
    Raises:
        UserError: if the name, an option, its type, or a size is not allowed.
    """
    height, width = _size(height, width)
    depth = None if depth is None else _integer("depth", depth, 0)
    if isinstance(name, ScanOrder):
        if options or (name.height, name.width) != (height, width):
            raise UserError(f"{name!r} is made for its own grid and takes no options, "
                            f"not {height}x{width} {options or ''}; make another by name")
        return name if depth is None else name.at(depth)
    name, in_brackets = _parse(str(name))
    make = choose("scan order", name, SCAN_ORDERS)
    if twice := in_brackets.keys() & options.keys():
        raise UserError(f"give option {min(twice)!r} of scan order {name!r} once, not twice")
    checked = _check_options(name, make, in_brackets | options)
    return _build(make, name, height, width, depth, tuple(sorted(checked.items())))


@functools.lru_cache(maxsize=128)
def _build(
    make: Callable[..., ScanOrder], name: str, height: int, width: int, depth: int | None,
    options: tuple[tuple[str, Any], ...],
) -> ScanOrder:
    in_brackets = ", ".join(f"{key}={value}" for key, value in options)
    label = f"{name}({in_brackets})" if options else name
    return replace(make(height, width, depth, **dict(options)), name=label)


def _size(height: Any, width: Any) -> tuple[int, int]:
    return _integer("height", height, 1), _integer("width", width, 1)


def _integer(what: str, value: Any, least: int) -> int:
    number = operator.index(value) if hasattr(value, "__index__") else least - 1
    if isinstance(value, bool) or number < least:
        raise UserError(f"{what} of a scan order must be an int of at least {least}, not {value!r}")
    return number


@functools.lru_cache(maxsize=128)
def _parse(text: str) -> tuple[str, dict[str, Any]]:
    """Split "name(option=value, ...)" into the name and its options; a bare word is a string."""
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        call = tree if isinstance(tree, ast.Call) else ast.Call(tree, [], [])
        options = {str(word.arg): _value(word.value) for word in call.keywords}
        if isinstance(call.func, ast.Name) and len(options) == len(call.args + call.keywords):
            return call.func.id, options
    except (SyntaxError, ValueError):
        pass
    raise UserError(f"scan order {text!r} cannot be read; "
                    "write a name, or name(option=value, ...), each option once")


def _value(tree: ast.expr) -> Any:
    if isinstance(tree, ast.Name):
        return {"true": True, "false": False}.get(tree.id, tree.id)
    return ast.literal_eval(tree)


def _check_options(name: str, make: Callable[..., Any], options: dict[str, Any]) -> dict[str, Any]:
    """The options, each known to `make` and of the type of its default (an int may be a float)."""
    if not options:  # inspection takes as long as a small scan
        return {}
    parameters = inspect.signature(make).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    defaults.pop("depth", None)
    checked = {}
    for key, value in options.items():
        if not defaults:
            raise UserError(f"scan order {name!r} takes no options; leave {key}={value} out")
        wanted = type(choose(f"option of scan order {name!r}", key, defaults))
        if wanted is float and type(value) is int:
            value = float(value)
        if type(value) is not wanted:
            raise UserError(f"option {key} of scan order {name!r} takes {wanted.__name__}, not {value!r}")
        checked[key] = value
    return checked


def _sorted_by(key: Callable[[Tensor, Tensor], Tensor], grid: Tensor) -> Tensor:
    """The entries of a grid in ascending order of key(row, column)."""
    rows, columns = torch.ones_like(grid).nonzero().T
    return grid.flatten()[key(rows, columns).argsort()]


def _snake(grid: Tensor) -> Tensor:
    """Rows top to bottom, the first to the right, the next to the left, and so on."""
    path = grid.clone()
    path[1::2] = grid[1::2].flip(1)
    return path.flatten()


def _spiral(grid: Tensor) -> Tensor:
    """Clockwise from the top left corner inwards: take the top row, turn the rest, repeat."""
    path = []
    while grid.numel():
        path.append(grid[0])
        grid = grid[1:].rot90()
    return torch.cat(path)


def _diagonal(grid: Tensor) -> Tensor:
    """Lines of equal row + column from the top left on, each from top right to bottom left."""
    return _sorted_by(lambda row, column: (row + column) * grid.numel() + row, grid)


def _morton(grid: Tensor) -> Tensor:
    """Z curve: by the number whose bits are those of row and column, interleaved."""

    def code(row: Tensor, column: Tensor) -> Tensor:
        bits = range(max(grid.shape).bit_length())
        pairs = [(2 * (row >> bit & 1) + (column >> bit & 1)) << 2 * bit for bit in bits]
        return torch.stack(pairs).sum(0)

    return _sorted_by(code, grid)


def _random(grid: Tensor, seed: int = 0) -> list[Tensor]:
    if not 0 <= seed < 2**63:
        raise UserError(f"option seed of scan order 'random' must be in 0 .. 2**63 - 1, not {seed}")
    generator = torch.Generator("cpu").manual_seed(seed)
    return [torch.randperm(grid.numel(), generator=generator, device="cpu")]


def _hilbert(grid: Tensor, free_end: bool = True) -> Tensor:
    """Hilbert curve of any rectangle, from its top left corner; every step is between neighbours.

    A long rectangle is cut across, any other is covered by an arch of three parts: down along the
    left, across the bottom, up along the right. Cuts fall on even numbers, so that each part can
    begin and end at two corners of one side: that needs an even side or an odd number of cells.
    With `free_end` the last part may end at its bottom left instead of its top right corner, which
    leaves no rectangle without such a path. On squares of side 2^n this is Hilbert's curve.

    Source: after J. Cerveny's generalized Hilbert curve, github.com/jakubcerveny/gilbert (which
    has a diagonal step where the longer side alone is odd; `free_end` is our way around it).
    """
    height, width = grid.shape
    if height == 1 or width == 1:
        return grid.flatten()
    if free_end and height > width:
        return _hilbert(grid.T)
    if 2 * width > 3 * height:
        left = width // 2 + width // 2 % 2
        return torch.cat([_hilbert(grid[:, :left], False), _hilbert(grid[:, left:], free_end)])
    if free_end and width % 2 == 1 and height % 2 == 0:
        return _hilbert(grid.T, False)
    left, top = width // 2, height // 2
    top += top % 2 if height > 2 else 0
    down, up = grid[:top, :left].T, grid[:top, left:].flip(0, 1).T
    return torch.cat([_hilbert(part, False) for part in (down, grid[top:], up)])


def _order(
    about: str, lists_of: Callable[..., Sequence[Tensor]], merge: str = "sum", schedule: str = "together",
) -> Callable[..., ScanOrder]:
    """From a function of the grid of cell ids to one of (height, width, depth=None, **options)."""

    @functools.wraps(lists_of)  # keeps the signature, which names the options
    def make(height: int, width: int, depth: int | None = None, **options: Any) -> ScanOrder:
        height, width = _size(height, width)
        grid = torch.arange(height * width, device="cpu").view(height, width)
        built = ScanOrder(lists_of(grid, **options), height, width, merge, schedule)
        return built if depth is None else built.at(depth)

    make.__doc__ = about
    return make


def _both_ways(*paths: Tensor) -> list[Tensor]:
    return [*paths, *(path.flip(0) for path in paths)]


# Sources: cross4, rot4: VMamba (arXiv:2401.10166); bi2: Vim (arXiv:2401.09417); plain4: PlainMamba
# (arXiv:2403.17695); the eight snakes: ZigMa (arXiv:2403.13802).
SCAN_ORDERS: dict[str, Callable[..., ScanOrder]] = {
    "raster": _order("rows, left to right, top down", lambda g: [g.flatten()]),
    "raster_rev": _order("raster backwards", lambda g: [g.flatten().flip(0)]),
    "column": _order("columns, top down, left to right", lambda g: [g.T.flatten()]),
    "column_rev": _order("column backwards", lambda g: [g.T.flatten().flip(0)]),
    "bi2": _order("raster both ways", lambda g: _both_ways(g.flatten())),
    "cross4": _order("raster and column both ways", lambda g: _both_ways(g.flatten(), g.T.flatten())),
    "rot4": _order("raster of the grid after 0 to 3 quarter turns counter-clockwise",
                   lambda g: [g.rot90(k).flatten() for k in range(4)]),
    "snake_row_tl": _order("row snake from top left", lambda g: [_snake(g)]),
    "snake_row_tr": _order("row snake from top right", lambda g: [_snake(g.flip(1))]),
    "snake_row_bl": _order("row snake from bottom left", lambda g: [_snake(g.flip(0))]),
    "snake_row_br": _order("row snake from bottom right", lambda g: [_snake(g.flip(0, 1))]),
    "snake_col_tl": _order("column snake from top left", lambda g: [_snake(g.T)]),
    "snake_col_tr": _order("column snake from top right", lambda g: [_snake(g.flip(1).T)]),
    "snake_col_bl": _order("column snake from bottom left", lambda g: [_snake(g.flip(0).T)]),
    "snake_col_br": _order("column snake from bottom right", lambda g: [_snake(g.flip(0, 1).T)]),
    "plain4": _order("row snake, its reverse, column snake, its reverse",
                     lambda g: [*_both_ways(_snake(g)), *_both_ways(_snake(g.T))]),
    "diagonal": _order("lines of equal row + column from the top left", lambda g: [_diagonal(g)]),
    "antidiagonal": _order("diagonal from the top right", lambda g: [_diagonal(g.flip(1))]),
    "spiral": _order("clockwise inwards from the top left", lambda g: [_spiral(g)]),
    "hilbert": _order("Hilbert curve of any rectangle", lambda g: [_hilbert(g)]),
    "morton": _order("Z curve: bits of row and column interleaved", lambda g: [_morton(g)]),
    "random": _order("a shuffle, picked by seed", _random),
}
