"""Scan orders: worked tables, laws over every order and grid, and what is refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from vision_scan import orders
from vision_scan.errors import UserError, choose
from vision_scan.orders import SCAN_ORDERS, ScanOrder, order

GRIDS = [(1, 1), (1, 7), (5, 1), (3, 4), (2, 3), (14, 14), (27, 27), (5, 7)]
SNAKES = [name for name in SCAN_ORDERS if name.startswith("snake_")]

every_order = pytest.mark.parametrize("name", SCAN_ORDERS)
every_grid = pytest.mark.parametrize("size", GRIDS, ids=lambda size: f"{size[0]}x{size[1]}")

# (name, height, width): the visiting lists, written out by hand from the published definitions.
TABLES = {
    ("raster", 3, 3): ["0 1 2 3 4 5 6 7 8"],
    ("raster_rev", 2, 3): ["5 4 3 2 1 0"],
    ("column", 2, 3): ["0 3 1 4 2 5"],
    ("column_rev", 3, 3): ["8 5 2 7 4 1 6 3 0"],
    ("bi2", 2, 3): ["0 1 2 3 4 5", "5 4 3 2 1 0"],
    ("cross4", 3, 3): [
        "0 1 2 3 4 5 6 7 8", "0 3 6 1 4 7 2 5 8", "8 7 6 5 4 3 2 1 0", "8 5 2 7 4 1 6 3 0",
    ],
    ("cross4", 2, 3): ["0 1 2 3 4 5", "0 3 1 4 2 5", "5 4 3 2 1 0", "5 2 4 1 3 0"],
    ("rot4", 3, 3): [
        "0 1 2 3 4 5 6 7 8", "2 5 8 1 4 7 0 3 6", "8 7 6 5 4 3 2 1 0", "6 3 0 7 4 1 8 5 2",
    ],
    ("rot4", 2, 3): ["0 1 2 3 4 5", "2 5 1 4 0 3", "5 4 3 2 1 0", "3 0 4 1 5 2"],
    ("plain4", 3, 3): [
        "0 1 2 5 4 3 6 7 8", "8 7 6 3 4 5 2 1 0", "0 3 6 7 4 1 2 5 8", "8 5 2 1 4 7 6 3 0",
    ],
    ("plain4", 4, 4): [
        "0 1 2 3 7 6 5 4 8 9 10 11 15 14 13 12", "12 13 14 15 11 10 9 8 4 5 6 7 3 2 1 0",
        "0 4 8 12 13 9 5 1 2 6 10 14 15 11 7 3", "3 7 11 15 14 10 6 2 1 5 9 13 12 8 4 0",
    ],
    ("snake_row_tl", 3, 3): ["0 1 2 5 4 3 6 7 8"],
    ("snake_col_tl", 3, 3): ["0 3 6 7 4 1 2 5 8"],
    ("snake_row_tr", 3, 3): ["2 1 0 3 4 5 8 7 6"],
    ("snake_col_tr", 3, 3): ["2 5 8 7 4 1 0 3 6"],
    ("snake_row_bl", 3, 3): ["6 7 8 5 4 3 0 1 2"],
    ("snake_col_bl", 3, 3): ["6 3 0 1 4 7 8 5 2"],
    ("snake_row_br", 3, 3): ["8 7 6 3 4 5 2 1 0"],
    ("snake_col_br", 3, 3): ["8 5 2 1 4 7 6 3 0"],
    ("snake_row_br", 2, 3): ["5 4 3 0 1 2"],
    ("snake_col_tr", 2, 3): ["2 5 4 1 0 3"],
    ("hilbert", 4, 4): ["0 1 5 4 8 12 13 9 10 14 15 11 7 6 2 3"],
    ("diagonal", 2, 3): ["0 1 3 2 4 5"],
    ("antidiagonal", 3, 3): ["2 1 5 0 4 8 3 7 6"],
    ("spiral", 3, 4): ["0 1 2 3 7 11 10 9 8 4 5 6"],
    ("morton", 4, 4): ["0 1 4 5 2 3 6 7 8 9 12 13 10 11 14 15"],
    ("morton", 2, 3): ["0 1 3 4 2 5"],
    ("es2d", 4, 4): ["0 2 8 10", "4 12 6 14", "1 3 9 11", "5 13 7 15"],
    ("es2d", 2, 3): ["0 2", "3 5", "1 -1", "4 -1"],
    ("es2d(pad=compact)", 3, 3): ["0 2 6 8", "3 5", "1 7", "4"],
    ("es2d(step=3)", 3, 4): ["0 3", "4 7", "8 11", "1 -1", "5 -1", "9 -1", "2 -1", "6 -1", "10 -1"],
    ("es2d(step=1)", 2, 3): ["0 1 2 3 4 5"],
    ("local", 4, 4): ["0 1 4 5 2 3 6 7 8 9 12 13 10 11 14 15"],
    ("local(columns=true)", 4, 4): ["0 4 1 5 8 12 9 13 2 6 3 7 10 14 11 15"],
    ("local", 3, 3): ["0 1 3 4 2 -1 5 -1 6 7 -1 -1 8 -1 -1 -1"],
    ("local(pad=compact)", 3, 3): ["0 1 3 4 2 5 6 7 8"],
    ("local(backwards=true, pad=compact)", 3, 3): ["8 7 6 5 2 4 3 1 0"],
    ("local(window=3)", 3, 4): ["0 1 2 4 5 6 8 9 10 3 -1 -1 7 -1 -1 11 -1 -1"],
    ("zigma8", 3, 3): [
        "0 1 2 5 4 3 6 7 8", "0 3 6 7 4 1 2 5 8", "2 1 0 3 4 5 8 7 6", "2 5 8 7 4 1 0 3 6",
        "6 7 8 5 4 3 0 1 2", "6 3 0 1 4 7 8 5 2", "8 7 6 3 4 5 2 1 0", "8 5 2 1 4 7 6 3 0",
    ],
    ("nd_cycle", 3, 3): [
        "0 1 2 3 4 5 6 7 8", "8 7 6 5 4 3 2 1 0", "0 3 6 1 4 7 2 5 8", "8 5 2 7 4 1 6 3 0",
    ],
}


@pytest.mark.parametrize("key", TABLES, ids=lambda key: f"{key[0]}-{key[1]}x{key[2]}")
def test_order_matches_table(key):
    assert [" ".join(map(str, path.tolist())) for path in order(*key)] == TABLES[key]


@every_order
@every_grid
def test_order_is_permutations_and_inverse_restores(name, size):
    o = order(name, *size)
    cells = size[0] * size[1]
    assert isinstance(o, Sequence) and (o.height, o.width, o.name) == (*size, name)
    assert o.index.dtype == o.inverse.dtype == torch.int64
    assert o.index.shape == (len(o), o.seqlen) and o.inverse.shape == (len(o), cells)
    for path, row, rank in zip(o, o.index, o.inverse, strict=True):
        assert torch.equal(path, row[: len(path)]) and (row[len(path) :] == -1).all()
        assert path[rank[rank >= 0]].tolist() == (rank >= 0).nonzero().flatten().tolist()
    held = [torch.cat(list(o))] if o.merge == "scatter" else list(o)
    for path in held:
        assert sorted(path[path >= 0].tolist()) == list(range(cells))


@every_order
def test_function_gives_what_order_gives(name):
    made, cached = SCAN_ORDERS[name](3, 5, depth=1), order(name, 3, 5, depth=1)
    assert torch.equal(made.index, cached.index)
    assert order(name, 3, 5, 1) is cached
    assert order(cached, 3, 5) is cached
    assert SCAN_ORDERS[name].__doc__


@pytest.mark.parametrize("name", [*SNAKES, "plain4", "spiral", "hilbert"])
@every_grid
def test_continuous_order_steps_to_neighbours(name, size):
    assert order(name, *size).max_step == (0 if size == (1, 1) else 1)


def test_hilbert_is_continuous_on_every_rectangle():
    torn = [(h, w) for h in range(1, 25) for w in range(1, 25)
            if h * w > 1 and order("hilbert", h, w).max_step != 1]
    assert torn == []


def _classic_hilbert(side: int) -> list[tuple[int, int]]:
    """(row, column) along Hilbert's curve, by the bit rule for a square of side 2^n."""
    path = []
    for distance in range(side * side):
        x = y = 0
        rest, block = distance, 1
        while block < side:
            right, down = rest // 2 & 1, (rest ^ rest // 2) & 1
            if not down:
                if right:
                    x, y = block - 1 - x, block - 1 - y
                x, y = y, x
            x, y, rest, block = x + block * right, y + block * down, rest // 4, block * 2
        path.append((y, x))
    return path


@pytest.mark.parametrize("side", [2, 4, 8, 16, 32])
def test_hilbert_on_powers_of_two_is_the_classic_curve(side):
    ours = [(cell // side, cell % side) for cell in order("hilbert", side, side)[0].tolist()]
    classic = _classic_hilbert(side)
    assert ours in (classic, [(x, y) for y, x in classic])


def test_distances_of_raster_and_cross4():
    raster = order("raster", 3, 4)
    assert raster.max_step == 4  # from the end of a row to the start of the next: 1 down, 3 left
    assert raster.mean_step == pytest.approx((9 * 1 + 2 * 4) / 11)
    assert raster.mean_gap == pytest.approx((9 * 1 + 8 * 4) / 17)
    assert order("cross4", 3, 4).mean_gap == 1
    assert (order("raster", 1, 1).mean_step, order("raster", 1, 1).mean_gap) == (0, 0)


def test_distortion_and_dilation_by_hand():
    raster = order("raster", 2, 3)  # steps 1 1 sqrt(1 + 4) 1 1; 2 and 3 are that far apart, one step
    assert raster.distortion == pytest.approx(4 + 5**0.5)
    assert raster.dilation == 5
    both = order("bi2", 2, 3)
    assert (both.distortion, both.dilation) == (pytest.approx(raster.distortion), 5)
    assert order("cross4", 2, 3).dilation == 2  # the columns' list: a diagonal step
    assert order("raster", 1, 1).dilation == order("raster", 1, 1).distortion == 0
    dilations = [order("hilbert", side, side).dilation for side in (2, 4, 8, 16, 32)]
    assert dilations == sorted(dilations) and 5 < dilations[-1] < 6
    assert order("snake_row_tl", 32, 32).dilation > 10 and order("random", 32, 32).dilation > 100


@pytest.mark.parametrize("name", ["zigma8", "nd_cycle"])
def test_layers_take_turns(name):
    whole = order(name, 3, 4)
    assert [order(name, 3, 4, depth)[0].tolist() for depth in range(9)] == [
        whole[depth % len(whole)].tolist() for depth in range(9)
    ]
    assert all(len(order(name, 3, 4, depth)) == 1 for depth in range(9))


def test_measures_leave_out_pads_and_missing_cells():
    o = ScanOrder([[0, -1, 1], [3, 2]], 2, 2, merge="scatter")
    assert (o.mean_step, o.max_step) == (1, 1)
    assert o.mean_gap == 1.5  # 0-1 are two positions apart, 2-3 one; 0-2 and 1-3 share no list


def test_random_depends_on_seed_alone():
    one = order("random(seed=1)", 5, 7)
    torch.manual_seed(3)
    assert torch.equal(one[0], SCAN_ORDERS["random"](5, 7, seed=1)[0])
    assert one is order("random", 5, 7, seed=1) and one.name == "random(seed=1)"
    assert not torch.equal(one[0], order("random", 5, 7)[0])


def test_scatter_lists_may_be_uneven_and_padded():
    o = ScanOrder([[0, -1, 4], [5, 2], [1, 3], []], 2, 3, merge="scatter")
    assert o.index.tolist() == [[0, -1, 4], [5, 2, -1], [1, 3, -1], [-1, -1, -1]]
    assert o.inverse.tolist() == [
        [0, -1, -1, -1, 2, -1], [-1, -1, 1, -1, -1, 0], [-1, 0, -1, 1, -1, -1], [-1] * 6,
    ]
    assert not o.is_dense and order("cross4", 2, 3).is_dense


def test_by_layer_picks_one_list_by_depth():
    paths = order("rot4", 2, 3)
    o = ScanOrder(list(paths), 2, 3, schedule="by_layer")
    for depth in range(6):
        assert torch.equal(o.at(depth).index, paths[depth % 4][None])
        assert torch.equal(order(o, 2, 3, depth).index, paths[depth % 4][None])
    assert paths.at(2) is paths


def test_an_order_of_ones_own_is_one_function_and_one_line(monkeypatch):
    def stripes(height, width, depth=None, period=2):
        cells = sorted(range(height * width), key=lambda cell: (cell % width % period, cell))
        return ScanOrder([cells], height, width)

    monkeypatch.setitem(SCAN_ORDERS, "stripes", stripes)
    assert order("stripes( period = 3 )", 1, 6)[0].tolist() == [0, 3, 1, 4, 2, 5]
    assert order("stripes", 1, 6)[0].tolist() == [0, 2, 4, 1, 3, 5]


def test_orders_are_immutable():
    with pytest.raises(AttributeError):
        order("spiral", 4, 9).height = 3


@every_order
def test_what_is_cached_does_not_depend_on_who_asked_first(name):
    expected = order(name, 4, 9)
    orders._build.cache_clear()
    with torch.inference_mode(), torch.device("meta"):
        o = order(name, 4, 9)
    assert o.index.device.type == "cpu"
    assert torch.equal(o.index, expected.index)
    assert not any(tensor.is_inference() for tensor in (o.index, o.inverse, *o))
    with torch.device("meta"):
        own = ScanOrder([[1, 0]], 1, 2)
    assert own.index.device.type == "cpu"


def test_to_moves_once():
    o = order("bi2", 2, 3)
    assert o.to("cpu") is o
    moved = o.to("meta")
    assert moved is o.to("meta") and moved.to("meta") is moved
    assert {moved.index.device.type, moved.inverse.device.type, moved[0].device.type} == {"meta"}
    assert o.index.device.type == "cpu"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: order("hilbrt", 2, 2), r"'hilbrt'; did you mean 'hilbert'\? allowed: raster,"),
        (lambda: order("raster(", 2, 2), "cannot be read"),
        (lambda: order("random(1)", 2, 2), "cannot be read"),
        (lambda: order("random(seed=1, seed=2)", 2, 2), "cannot be read"),
        (lambda: order("random(sed=1)", 2, 2), "did you mean 'seed'"),
        (lambda: order("random(seed=1.5)", 2, 2), "takes int, not 1.5"),
        (lambda: order("random(seed=one)", 2, 2), "takes int, not 'one'"),
        (lambda: order("random(seed=-1)", 2, 2), "seed"),
        (lambda: order("random(seed=1)", 2, 2, seed=1), "once, not twice"),
        (lambda: order("es2d(step=0)", 2, 2), "'es2d': window and step must be 1 or more, not 0"),
        (lambda: order("local(window=-1)", 2, 2), "'local': window and step must be 1 or more"),
        (lambda: order("local(pad=kep)", 2, 2), "did you mean 'keep'"),
        (lambda: order("local(columns=1)", 2, 2), "takes bool, not 1"),
        (lambda: order("raster", 2, 2, step=2), "takes no options"),
        (lambda: order("raster", 0, 2), "height .* at least 1, not 0"),
        (lambda: order("raster", 2, 2.0), "width .* not 2.0"),
        (lambda: order("raster", 2, True), "width .* not True"),
        (lambda: order("raster", 2, 2, depth=-1), "depth .* at least 0"),
        (lambda: order(order("raster", 2, 3), 3, 2), "2x3.* its own grid .* not 3x2"),
        (lambda: SCAN_ORDERS["raster"](-2, -2), "height"),
        (lambda: ScanOrder([[0, 1, 1, 3]], 2, 2), "list 0 .* cell 1 occurs 2 times"),
        (lambda: ScanOrder([[0, 1, 2, 3], [0, 1, 2]], 2, 2), "list 1 .* cell 3 occurs 0 times"),
        (lambda: ScanOrder([[0, 1], [2, 1]], 2, 2, merge="scatter"), "together .* 1 occurs 2"),
        (lambda: ScanOrder([[0, 1, 2, 4]], 2, 2), "cells 0 to 3"),
        (lambda: ScanOrder([[0, 1, 2, 3, -2]], 2, 2), "-1 for a pad"),
        (lambda: ScanOrder([], 2, 2), "at least one"),
        (lambda: ScanOrder([[0]], 1, 1, merge="add"), "unknown merge 'add'"),
        (lambda: ScanOrder([[0]], 1, 1, schedule="by_layers"), "did you mean 'by_layer'"),
    ],
)
def test_bad_input_is_refused_in_one_line(call, message):
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_choose_finds_exact_keys_only():
    assert choose("fruit", "fig", {"fig": 1, "date": 2}) == 1
    with pytest.raises(UserError, match=r"unknown fruit 'FIG'; did you mean 'fig'\? allowed: fig"):
        choose("fruit", "FIG", {"fig": 1})
    with pytest.raises(UserError, match=r"unknown fruit \['fig'\];"):
        choose("fruit", ["fig"], {"fig": 1})
