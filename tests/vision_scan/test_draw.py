"""Pictures of orders: layout, where ink falls, and what is refused."""

from __future__ import annotations

import pytest
from PIL import Image, ImageChops

from vision_scan.draw import EMPTY, draw_order
from vision_scan.errors import UserError
from vision_scan.orders import SCAN_ORDERS, ScanOrder, order


@pytest.mark.parametrize("name", SCAN_ORDERS)
def test_draws_every_order_in_its_own_way(name):
    image = draw_order(order(name, 3, 4), cell=24)
    assert image.mode == "RGB" and image.size == draw_order(order(name, 3, 4), cell=24).size
    other = draw_order(order("random(seed=5)" if name != "random" else "raster", 3, 4), cell=24)
    assert image.size != other.size or ImageChops.difference(image, other).getbbox()


def test_one_list_has_its_map_beside_and_several_stand_in_a_row():
    one, two, four = (draw_order(order(name, 6, 9)) for name in ("raster", "bi2", "cross4"))
    assert one.width > 2 * 9 * 40 and one.height < 2 * 6 * 40
    assert two.height == four.height > 2 * 6 * 40
    assert four.width - two.width >= 2 * 9 * 40


def test_cells_that_a_list_does_not_hold_stay_blank():
    left, right = [0, -1, 3], [1, 2, 4, 5]
    image = draw_order(ScanOrder([left, right], 2, 3, merge="scatter"), cell=40)
    empty = Image.new("RGB", (1, 1), EMPTY).getpixel((0, 0))
    # The map of list 0 stands in the lower left corner, within a margin of 24 pixels.
    grid = image.crop((24, image.height - 24 - 80, 24 + 120, image.height - 24))
    blank = [cell for cell in range(6)
             if grid.getpixel((cell % 3 * 40 + 8, cell // 3 * 40 + 8)) == empty]
    assert blank == [1, 2, 4, 5]


def test_saves(tmp_path):
    path = tmp_path / "hilbert.png"
    image = draw_order(order("hilbert", 6, 9), path)
    with Image.open(path) as saved:
        assert saved.size == image.size and not ImageChops.difference(saved, image).getbbox()


@pytest.mark.parametrize("size", [(1, 1), (1, 7), (5, 1), (27, 27)])
def test_draws_any_grid(size):
    image = draw_order(order("hilbert", *size), cell=8)
    assert image.width >= 2 * 8 * size[1] and image.height >= 8 * size[0]


def test_bad_input_is_refused(tmp_path):
    with pytest.raises(UserError, match="at least 8"):
        draw_order(order("raster", 2, 2), cell=7)
    with pytest.raises(UserError, match=r"ends in \.png"):
        draw_order(order("raster", 2, 2), tmp_path / "order.nonsense")
    with pytest.raises(UserError, match="cannot save"):
        draw_order(order("raster", 2, 2), tmp_path / "missing" / "order.png")
