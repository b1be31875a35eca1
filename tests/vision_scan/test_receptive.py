"""Effective receptive fields: against Jacobians, where they are zero, and their pictures."""

import math

import pytest
import torch
from PIL import Image, ImageChops
from torch import Tensor, nn

import vision_scan
from vision_scan import SS2D, SS2DConfig, VSSBlock
from vision_scan.draw import EMPTY, draw_receptive_fields
from vision_scan.errors import UserError
from vision_scan.modules import PlaneScan
from vision_scan.receptive import effective_share, reached_share, receptive_field

CHANNELS = 4
GRID = (4, 7)


def scan(order: str, depth: int | None = None, kind=SS2D) -> nn.Module:
    """A mixer whose cells mix along the order alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = SS2DConfig(d_state=3, d_conv=1, dt_min=0.1, dt_max=0.5)
        return kind(config, CHANNELS, order, depth) if kind is SS2D else kind(config, CHANNELS, 1)


def test_the_field_of_a_linear_map_is_the_norm_of_its_jacobian():
    """Exactly, and in one sample, where there is one output channel; on average over signs where there are more."""
    height, width, noise = 3, 5, torch.Generator().manual_seed(0)
    for channels, samples, ratio in ((1, 1, 1e-6), (3, 4000, 0.05)):
        weight = torch.randn(channels, height * width * 2, generator=noise)
        field = receptive_field(
            lambda x, weight=weight: (x.flatten() @ weight.T).expand(1, 2, 3, -1), height, width, 2, samples=samples
        )
        expected = weight.view(channels, height, width, 2).square().sum((0, 3)).sqrt().double()
        torch.testing.assert_close(field, expected, rtol=ratio, atol=0)


def test_the_field_of_a_nonlinear_map_is_averaged_over_inputs():
    field = receptive_field(lambda x: x**2, 3, 4, 1, cell=(2, 1), samples=20_000, dtype=torch.float64)
    assert field[2, 1].item() == pytest.approx(2.0, rel=0.02)  # the root of the mean of (2 x)^2
    assert field.count_nonzero() == 1


@pytest.mark.parametrize("cell", [None, (0, 0), (3, 6), (0, 6), (3, 0), (1, 5)], ids=str)
@pytest.mark.parametrize("order", ["raster", "column_rev", "hilbert", "diagonal", "random", "local(window=3)"])
def test_what_a_scan_reads_later_is_exactly_zero(order, cell):
    field = receptive_field(scan(order), *GRID, CHANNELS, cell, samples=2)
    row, column = cell or (2, 3)
    (ranks,) = vision_scan.order(order, *GRID).inverse.view(-1, *GRID)
    assert torch.equal(field > 0, ranks <= ranks[row, column])


@pytest.mark.parametrize("order", ["bi2", "cross4", "plain4", "rot4"])
def test_lists_that_go_both_ways_see_everything(order):
    assert reached_share(receptive_field(scan(order), *GRID, CHANNELS, (0, 2), samples=1)) == 1.0


def test_disjoint_lists_see_their_own_cells():
    """The list of odd rows and even columns goes down the columns: 7 21 . 9 23 . 11 25 . 13 27 ."""
    field = receptive_field(scan("es2d"), 5, 7, CHANNELS, (3, 4), samples=1)
    assert field.flatten().nonzero()[:, 0].tolist() == [7, 9, 11, 21, 23, 25]


def test_a_plane_scan_sees_the_rectangle_to_its_corner():
    field = receptive_field(scan("", kind=PlaneScan), *GRID, CHANNELS, (2, 4), samples=1)
    expected = torch.zeros(GRID, dtype=torch.bool)
    expected[:3, :5] = True
    assert torch.equal(field > 0, expected)


def test_noncausal_and_attention_see_everything():
    def noncausal(x: Tensor) -> Tensor:
        dt, A, B = x.mean(-1)[:, None, ..., None].exp(), -torch.ones(1, 1), torch.ones(1, 1, *x.shape[1:3], 1, 1)
        return vision_scan.ssd_2d(x[..., None, :], dt, A, B, B, order="noncausal").flatten(-2)

    def attention(x: Tensor) -> Tensor:
        cells = x.flatten(1, 2)
        return nn.functional.scaled_dot_product_attention(cells, cells, cells).view_as(x)

    for function in (noncausal, attention):
        field = receptive_field(function, 3, 8, CHANNELS, (0, 7), samples=2)
        assert field.shape == (3, 8) and reached_share(field) == 1.0


def test_layers_that_take_turns_see_more_and_more():
    seen = []
    for depth in range(1, 5):
        layers = nn.Sequential(*(scan("nd_cycle", layer) for layer in range(depth)))
        seen.append(reached_share(receptive_field(layers, *GRID, CHANNELS, (0, 3), samples=1)))
    assert seen[0] == 4 / 28 and seen[1] == seen[3] == 1.0  # behind rows, their reverse


def test_a_field_fades_along_the_list():
    row = receptive_field(scan("raster"), 1, 24, CHANNELS, (0, 23), samples=64)[0]
    assert (row[16:23].mean() < 0.5 * row[23]) and (row[:8].mean() < 0.5 * row[16:23].mean())


def test_the_output_may_be_of_another_size():
    pool = nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(3, 5, 3, padding=1))
    field = receptive_field(lambda x: pool(x.movedim(-1, 1)).movedim(1, -1), 8, 10, 3, samples=2)
    expected = torch.zeros(8, 10, dtype=torch.bool)
    expected[2:8, 2:8] = True  # cell (2, 2) of (4, 5), and the cells around it
    assert torch.equal(field > 0, expected)


def test_nothing_is_left_behind():
    block = VSSBlock(SS2DConfig(d_state=2), CHANNELS)
    state = torch.random.get_rng_state()
    with torch.inference_mode():
        field = receptive_field(block, *GRID, CHANNELS, samples=2, seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in block.parameters())
    assert field.dtype == torch.float64 and not field.requires_grad
    assert torch.equal(field, receptive_field(block, *GRID, CHANNELS, samples=2, seed=3))
    assert not torch.equal(field, receptive_field(block, *GRID, CHANNELS, samples=2, seed=4))


def test_bfloat16_modules_have_fields():
    field = receptive_field(scan("raster").bfloat16(), *GRID, CHANNELS, dtype=torch.bfloat16, samples=2)
    assert field.dtype == torch.float64 and (field[:2] > 0).all() and not field[3].any()


def test_shares():
    field = torch.tensor([[0.0, 1.0, 0.04], [0.05, 0.5, 0.0]])
    assert reached_share(field) == pytest.approx(4 / 6)
    assert effective_share(field) == pytest.approx(3 / 6)
    assert effective_share(field, threshold=0.5) == pytest.approx(2 / 6)
    assert reached_share(0 * field) == effective_share(0 * field) == 0.0


def test_pictures_hold_every_cell(tmp_path):
    """The same colours whatever the scale; blank where nothing is seen."""
    field = torch.tensor([[0.0, 10.0, 1.0], [0.01, 0.001, 0.0]])
    path = tmp_path / "fields.png"
    image = draw_receptive_fields({"a": field}, path, at=(0, 1))
    with Image.open(path) as saved:
        assert image.mode == "RGB" and not ImageChops.difference(saved, image).getbbox()
    assert not ImageChops.difference(draw_receptive_fields({"a": 7 * field}, at=(0, 1)), image).getbbox()
    left, top = 24, 24 + 42
    colours = [image.getpixel((left + j * 24 + 4, top + i * 24 + 4)) for i in range(2) for j in range(3)]
    blank = Image.new("RGB", (1, 1), EMPTY).getpixel((0, 0))
    assert [colour == blank for colour in colours] == [True, False, False, False, False, True]
    light = [sum(colour) for colour in colours]
    assert light[1] < light[2] < light[3] == light[4]  # a thousandth and less look alike


@pytest.mark.parametrize("sizes", [[(1, 1)], [(1, 30)], [(9, 2), (3, 4), (5, 5)], [(2, 3)] * 9], ids=str)
def test_pictures_of_any_number_and_size(sizes):
    fields = {f"a rather long title, number {k}": torch.rand(size) + 0.1 for k, size in enumerate(sizes)}
    image = draw_receptive_fields(fields, cell=10, columns=3)
    columns = min(len(sizes), 3)
    rows = math.ceil(len(sizes) / 3)
    assert image.width >= columns * 10 * max(width for _, width in sizes)
    assert image.height >= rows * (42 + 10 * min(height for height, _ in sizes))
    rest = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    assert rest[0] > 8 and rest[2] < image.width - 8 and rest[3] < image.height - 4  # nothing is cut off


def test_pictures_of_a_field_of_nothing():
    assert draw_receptive_fields({"none": torch.zeros(2, 3)}).mode == "RGB"


@pytest.mark.parametrize(
    ("call", "told"),
    [
        (lambda: receptive_field(nn.Identity(), 0, 3, 1), "height .* not 0"),
        (lambda: receptive_field(nn.Identity(), 2, 3, 0), "1 or more channels, not 0"),
        (lambda: receptive_field(nn.Identity(), 2, 3, 1, samples=0), "1 or more samples, not 0"),
        (lambda: receptive_field(nn.Identity(), 2, 3, 1, cell=(2, 0)), "cell 2,0 is outside of a grid of 2x3"),
        (lambda: receptive_field(nn.Identity(), 2, 3, 1, cell=(0, -1)), "row and column .* not -1"),
        (lambda: receptive_field(lambda x: x[0], 2, 3, 1), r"not to \(2, 3, 1\)"),
        (lambda: receptive_field(lambda x: (x, x), 2, 3, 1), "not to tuple"),
        (lambda: receptive_field(torch.Tensor.detach, 2, 3, 1), "does not depend on its input"),
        (lambda: receptive_field(lambda x: torch.ones_like(x, requires_grad=True), 2, 3, 1), "does not depend on its"),
        (lambda: draw_receptive_fields({}), "0 receptive fields"),
        (lambda: draw_receptive_fields({"a": torch.ones(2, 2)}, cell=7), "at least 8"),
        (lambda: draw_receptive_fields({"a": torch.ones(2, 2)}, at=(2, 0)), r"outside of a field of 2x2"),
        (lambda: draw_receptive_fields({"a": torch.ones(2, 2)}, "a.nonsense"), r"ends in \.png"),
    ],
)
def test_mistakes_are_named(call, told):
    with pytest.raises(UserError, match=told) as caught:
        call()
    assert "\n" not in str(caught.value)
