"""Scan orders: in which sequence the cells of a grid are read.

An order is data: one or more visiting lists over the cells of a (height, width) grid, where cell
(i, j) has the id i * width + j. Position t of list k reads cell P[k][t]; the inverse is the rank
map R[k][P[k][t]] = t. Reading is a gather with P, writing back a gather with R (see scan.py).

To add an order, write a function from the grid of cell ids to its visiting lists (curves.py), and add one line
to SCAN_ORDERS. Keyword arguments with defaults become options: "random(seed=1)".
"""

from __future__ import annotations

import ast
import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from vision_scan.errors import UserError, choose

from . import curves
from .scan_order import MERGES, SCHEDULES, ScanOrder, read_integer, read_size

__all__ = ["MERGES", "SCAN_ORDERS", "SCHEDULES", "ScanOrder", "order", "sequential_order"]

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
    height, width = read_size(height, width)
    depth = None if depth is None else read_integer("depth", depth, 0)
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


def sequential_order(name: str, depth: int | None = None) -> ScanOrder:
    """An order on a small grid, for a module that will read grids along it cell after cell: what is wrong with the
    name shows here, and not at the first picture.

    Raises:
        UserError: if the name is not allowed, or the order has no sequence.
    """
    example = order(name, 2, 3, depth)
    if not example.is_causal:
        raise UserError(f"order {name!r} has no sequence to read; take another, for instance cross4")
    return example


@functools.lru_cache(maxsize=128)
def _build(
    make: Callable[..., ScanOrder], name: str, height: int, width: int, depth: int | None,
    options: tuple[tuple[str, Any], ...],
) -> ScanOrder:
    in_brackets = ", ".join(f"{key}={value}" for key, value in options)
    label = f"{name}({in_brackets})" if options else name
    with torch.device("cpu"):  # whatever that of a model which is being made: the order is shared
        return replace(make(height, width, depth, **dict(options)), name=label)


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


def _order(
    about: str, lists_of: Callable[..., Sequence[Tensor]], **kind: Any
) -> Callable[..., ScanOrder]:
    """From a function of the grid of cell ids to one of (height, width, depth=None, **options).

    Args:
        about: its docstring.
        lists_of: the function.
        kind: merge, schedule and is_causal of the ScanOrder, where they are not the usual.
    """

    @functools.wraps(lists_of)  # keeps the signature, which names the options
    def make(height: int, width: int, depth: int | None = None, **options: Any) -> ScanOrder:
        height, width = read_size(height, width)
        grid = torch.arange(height * width, device="cpu").view(height, width)
        built = ScanOrder(lists_of(grid, **options), height, width, **kind)
        return built if depth is None else built.at(depth)

    make.__doc__ = about
    return make


# Sources: cross4, rot4: VMamba (arXiv:2401.10166); bi2: Vim (arXiv:2401.09417); plain4: PlainMamba
# (arXiv:2403.17695); the eight snakes, zigma8: ZigMa (arXiv:2403.13802); es2d: EfficientVMamba
# (arXiv:2403.09977); local: LocalMamba (arXiv:2403.09338); nd_cycle: Mamba-ND (arXiv:2402.05892); noncausal: VSSD
# (arXiv:2407.18559).
SCAN_ORDERS: dict[str, Callable[..., ScanOrder]] = {
    "raster": _order("rows, left to right, top down", lambda g: [g.flatten()]),
    "raster_rev": _order("raster backwards", lambda g: [g.flatten().flip(0)]),
    "column": _order("columns, top down, left to right", lambda g: [g.T.flatten()]),
    "column_rev": _order("column backwards", lambda g: [g.T.flatten().flip(0)]),
    "bi2": _order("raster both ways", lambda g: curves.both_ways(g.flatten())),
    "cross4": _order("raster and column both ways", lambda g: curves.both_ways(g.flatten(), g.T.flatten())),
    "rot4": _order("raster of the grid after 0 to 3 quarter turns counter-clockwise",
                   lambda g: [g.rot90(k).flatten() for k in range(4)]),
    "snake_row_tl": _order("row snake from top left", lambda g: [curves.snake(g)]),
    "snake_row_tr": _order("row snake from top right", lambda g: [curves.snake(g.flip(1))]),
    "snake_row_bl": _order("row snake from bottom left", lambda g: [curves.snake(g.flip(0))]),
    "snake_row_br": _order("row snake from bottom right", lambda g: [curves.snake(g.flip(0, 1))]),
    "snake_col_tl": _order("column snake from top left", lambda g: [curves.snake(g.T)]),
    "snake_col_tr": _order("column snake from top right", lambda g: [curves.snake(g.flip(1).T)]),
    "snake_col_bl": _order("column snake from bottom left", lambda g: [curves.snake(g.flip(0).T)]),
    "snake_col_br": _order("column snake from bottom right", lambda g: [curves.snake(g.flip(0, 1).T)]),
    "plain4": _order("row snake, its reverse, column snake, its reverse",
                     lambda g: [*curves.both_ways(curves.snake(g)), *curves.both_ways(curves.snake(g.T))]),
    "zigma8": _order("the eight snakes, layer by layer", lambda g: curves.snakes(g), schedule="by_layer"),
    "nd_cycle": _order("raster, its reverse, column, its reverse, layer by layer",
                       lambda g: [path for line in (g, g.T) for path in curves.both_ways(line.flatten())],
                       schedule="by_layer"),
    "diagonal": _order("lines of equal row + column from the top left", lambda g: [curves.diagonal(g)]),
    "antidiagonal": _order("diagonal from the top right", lambda g: [curves.diagonal(g.flip(1))]),
    "spiral": _order("clockwise inwards from the top left", lambda g: [curves.spiral(g)]),
    "hilbert": _order("Hilbert curve of any rectangle", lambda g: [curves.hilbert(g)]),
    "morton": _order("Z curve: bits of row and column interleaved", lambda g: [curves.morton(g)]),
    "local": _order("windows row by row, each read row by row", curves.windows),
    "es2d": _order("disjoint lists: every step-th row and column, from each first cell", curves.skips, merge="scatter"),
    "noncausal": _order("no order: every cell sees all others alike (ssd_2d alone)", lambda g: [g.flatten()],
                        is_causal=False),
    "random": _order("a shuffle, picked by seed", curves.random),
}
