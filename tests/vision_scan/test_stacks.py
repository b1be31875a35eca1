"""Orders of videos and of tiles."""

import pytest
import torch

import vision_scan
from vision_scan import VOLUME_ORDERS, order_tiles, order_video, order_volume
from vision_scan.errors import UserError
from vision_scan.orders import SCAN_ORDERS


def lists(order) -> list[str]:
    return [" ".join(map(str, path.tolist())) for path in order]


def test_video_by_hand():
    assert lists(order_video("column", 2, 2, 3)) == ["0 3 1 4 2 5 6 9 7 10 8 11"]
    assert lists(order_video("column", 2, 2, 3, first="time")) == ["0 6 3 9 1 7 4 10 2 8 5 11"]
    assert lists(order_video("raster", 2, 1, 2, backwards=True)) == ["0 1 2 3", "3 2 1 0"]
    assert lists(order_video("bi2", 2, 1, 2)) == ["0 1 2 3", "1 0 3 2"]  # time runs forwards in both
    assert lists(order_video("es2d", 2, 1, 3)) == ["0 2 3 5", "-1 -1 -1 -1", "1 -1 4 -1", "-1 -1 -1 -1"]
    assert lists(order_video("zigma8", 2, 1, 2, depth=2)) == ["1 0 3 2"]


# Of 2 frames of 2 x 3 cells, 0 1 2 / 3 4 5 and 6 7 8 / 9 10 11: worked out from the axes of Mamba-ND's code.
VOLUME = {
    "H+": "0 1 2 3 4 5 6 7 8 9 10 11",
    "H-": "11 10 9 8 7 6 5 4 3 2 1 0",
    "W+": "0 3 1 4 2 5 6 9 7 10 8 11",
    "W-": "11 8 10 7 9 6 5 2 4 1 3 0",
    "T+": "0 6 3 9 1 7 4 10 2 8 5 11",
    "T-": "11 5 8 2 10 4 7 1 9 3 6 0",
}


def test_volume_by_hand():
    assert VOLUME_ORDERS.keys() == {*VOLUME, "nd_cycle"}
    for name, expected in VOLUME.items():
        assert lists(order_volume(name, 2, 2, 3)) == [expected]
        assert lists(order_volume(name, 2, 2, 3, depth=7)) == [expected]
    cycle = order_volume("nd_cycle", 2, 2, 3)
    assert (lists(cycle), cycle.schedule, cycle.height, cycle.width) == (list(VOLUME.values()), "by_layer", 4, 3)


def released_layer(x: torch.Tensor, layer: int) -> torch.Tensor:
    """x (frames, height, width) as layer number `layer` of Mamba-ND's video classifier reads it: pairs of layers take
    the axes in turns, and the second of a pair reads backwards."""
    axes = ("thw", "twh", "wht")[layer // 2 % 3]
    read = torch.einsum(f"thw->{axes}", x).flatten()
    return read.flip(0) if layer % 2 else read


@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 4), (2, 5, 3), (4, 2, 2), (1, 3, 2), (5, 4, 1)], ids=str)
def test_a_volume_is_read_as_the_released_layers_read_it(size):
    x = torch.arange(size[0] * size[1] * size[2]).view(size)
    for layer in range(14):  # twice round, and on
        order = order_volume("nd_cycle", *size, depth=layer)
        read = vision_scan.scan_2d(x.flatten(0, 1)[None], order)
        assert read.tolist() == [[released_layer(x, layer).tolist()]]
        assert torch.equal(vision_scan.merge_2d(read, order)[0], x.flatten(0, 1))


def test_a_volume_of_one_frame_is_a_picture():
    cycle, picture = order_volume("nd_cycle", 1, 3, 4), vision_scan.order("nd_cycle", 3, 4)
    assert lists(cycle)[:4] == lists(picture) and lists(cycle)[4:] == lists(picture)[2:]


def test_layers_of_a_volume_see_it_from_all_sides():
    """One layer of T+ sees what stands left of a cell or over it in its column, in any frame; six see everything."""
    size, cell = (3, 2, 4), (1, 1, 2)

    def seen(depths) -> torch.Tensor:
        x = torch.ones(1, *size, 1, dtype=torch.float64, requires_grad=True)
        y = x.flatten(1, 2)
        for depth in depths:
            order = order_volume("nd_cycle", *size, depth=depth)
            dt, B = torch.ones(1, 1, 6, 4, 1, dtype=torch.float64), torch.ones(1, 1, 6, 4, 1, 1, dtype=torch.float64)
            A = torch.full((1, 1), -0.1, dtype=torch.float64)
            y = vision_scan.ssd_2d(y[..., None], dt, A, B, B, order=order)[..., 0]
        y.unflatten(1, size[:2])[(0, *cell)].sum().backward()
        return x.grad[0, ..., 0] > 0

    expected = torch.zeros(size, dtype=torch.bool)
    expected[:, :, :2] = True
    expected[:, 0, 2] = True
    expected[:2, 1, 2] = True
    assert torch.equal(seen([4]), expected)
    assert seen(range(6)).all()


def test_tiles_by_hand():
    # Two tiles of 2 x 2 beside each other: 0 1 | 4 5 over 2 3 | 6 7.
    assert lists(order_tiles("raster", 1, 2, 2, 2)) == ["0 1 4 5 2 3 6 7"]
    assert lists(order_tiles("raster", 2, 1, 2, 2)) == ["0 1 2 3 4 5 6 7"]
    assert lists(order_tiles("column", 2, 2, 1, 2)) == ["0 4 1 5 2 6 3 7"]


@pytest.mark.parametrize("name", SCAN_ORDERS)
@pytest.mark.parametrize("size", [(1, 1, 1), (3, 1, 4), (2, 5, 3), (4, 2, 2)], ids=str)
@pytest.mark.parametrize("first", ["space", "time"])
def test_every_order_reads_a_video(name, size, first):
    frames, height, width = size
    order, frame = order_video(name, *size, first=first), vision_scan.order(name, height, width)
    assert (order.height, order.width, len(order), order.merge) == (frames * height, width, len(frame), frame.merge)
    x = torch.arange(frames * height * width).view(1, frames, height, width)
    for read, path in zip(vision_scan.scan_2d(x.flatten(1, 2), order)[0], frame, strict=True):
        cells = x[0].flatten(1)[:, path.clamp(min=0)].masked_fill(path < 0, 0)
        expected = cells.flatten() if first == "space" else cells.T.flatten()
        assert read[: len(expected)].tolist() == expected.tolist()


@pytest.mark.parametrize("name", SCAN_ORDERS)
def test_every_order_reads_tiles_as_the_picture_that_they_make(name):
    rows, columns, height, width = 2, 3, 2, 1
    picture = torch.randn(1, rows * height, columns * width)
    tiles = picture.view(1, rows, height, columns, width).transpose(2, 3).reshape(1, -1, width)
    order = order_tiles(name, rows, columns, height, width)
    assert torch.equal(vision_scan.scan_2d(tiles, order), vision_scan.scan_2d(picture, name))


def test_operators_take_them():
    order = order_video("cross4", 3, 2, 2)
    x = torch.randn(1, 3, 2, 2, 2, 4)
    dt, B, C = torch.rand(1, 4, 6, 2, 2), torch.randn(1, 4, 6, 2, 1, 3), torch.randn(1, 4, 6, 2, 1, 3)
    A = -torch.rand(4, 2)
    y = vision_scan.ssd_2d(x.flatten(1, 2), dt, A, B, C, order=order)
    later = x.clone()
    later[:, 2] += 1.0
    again = vision_scan.ssd_2d(later.flatten(1, 2), dt, A, B, C, order=order)
    assert torch.equal(y[:, :4], again[:, :4]) and not torch.equal(y[:, 4:], again[:, 4:])  # causal in time


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: order_video("raster", 0, 2, 2), "frames .* at least 1, not 0"),
        (lambda: order_video("raster", 2, 2, 2, first="both"), "allowed: space, time"),
        (lambda: order_video("rastr", 2, 2, 2), "did you mean 'raster'"),
        (lambda: order_video("es2d", 2, 2, 2, backwards=True), "disjoint"),
        (lambda: order_volume("H", 2, 2, 2), r"scan order of a volume 'H'; allowed: H\+, W\+"),
        (lambda: order_volume("nd_cycle", 0, 2, 2), "frames .* not 0"),
        (lambda: order_volume("nd_cycle", 2, 2, 2, depth=-1), "depth .* not -1"),
        (lambda: order_tiles("raster", 1, 0, 2, 2), "columns .* not 0"),
    ],
)
def test_mistakes_are_named(call, told):
    with pytest.raises(UserError, match=told):
        call()
