"""The small tower as a study takes it apart: patches alone, no positions, scans behind."""

import dataclasses
import json
import re

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cobra
from cobra.config import PRESETS
from cobra.cost import tile_work
from cobra.image import ImageConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.model import Cobra
from cobra.scan_block import ScanBlocksConfig
from cobra.tokenizer import Tokenizer
from cobra.typed_config import from_dict
from cobra.vision_encoder import SmallEncoder, SmallEncoderConfig
from tests.tolerance import assert_close
from vision_scan.errors import UserError

PATCH = 8
ROWS, COLUMNS = 3, 4
MIXER = Mamba2Config(d_state=4, headdim=4, expand=1, chunk_size=8)


def scan(order: str, **changes) -> ScanBlocksConfig:
    return ScanBlocksConfig(order=order, lists="share", mixer=MIXER, **changes)


def config(**changes) -> SmallEncoderConfig:
    """A tower that sees its own patch alone."""
    return SmallEncoderConfig(**{
        "patch_size": PATCH, "d_model": 16, "depth": 0, "num_heads": 2, "stem": "patch", "positions": False, **changes
    })  # fmt: skip


def build(**changes) -> SmallEncoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallEncoder(config(**changes), ImageConfig(height=32, width=32)).double()


def picture(seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(1, 3, PATCH * ROWS, PATCH * COLUMNS, generator=generator, dtype=torch.float64)


def patches(pixels: Tensor) -> Tensor:
    """(1, 3, height, width) -> (rows * columns, 3, PATCH, PATCH)."""
    cut = pixels[0].unflatten(2, (-1, PATCH)).unflatten(1, (-1, PATCH))
    return cut.permute(1, 3, 0, 2, 4).flatten(0, 1)


def mosaic(tiles: Tensor) -> Tensor:
    """The way back."""
    grid = tiles.unflatten(0, (ROWS, COLUMNS)).permute(2, 0, 3, 1, 4)
    return grid.flatten(3, 4).flatten(1, 2)[None]


@torch.no_grad()
def moved_cells(encoder: SmallEncoder, cell: int) -> list[int]:
    """The cells, in raster order, whose features move with one pixel of one patch."""
    x = picture()
    tiles = patches(x)
    assert torch.equal(mosaic(tiles), x)
    tiles[cell, 0, 0, 0] += 0.3
    moved = (encoder(mosaic(tiles)) - encoder(x))[0].flatten(0, 1).norm(dim=-1)
    return (moved > 1e-12).nonzero().flatten().tolist()


@pytest.mark.parametrize("positions", [False, True])
@pytest.mark.parametrize("cell", [0, 5, 11])
def test_a_patch_alone_is_seen(cell, positions):
    assert moved_cells(build(positions=positions), cell) == [cell]
    assert len(moved_cells(build(positions=positions, stem="conv"), cell)) > 1  # the test could fail
    assert len(moved_cells(build(positions=positions, depth=1), cell)) == ROWS * COLUMNS


@torch.no_grad()
def test_every_pixel_of_a_patch_counts():
    encoder, x = build(), picture().requires_grad_()
    with torch.enable_grad():
        encoder(x)[0, 1, 2].square().sum().backward()
    reached = patches(x.grad).ne(0).flatten(1)
    assert reached[1 * COLUMNS + 2].all() and not reached[[i for i in range(12) if i != 6]].any()


@torch.no_grad()
def test_without_positions_equal_patches_have_equal_features():
    one = patches(picture())[:1]
    features = build()(mosaic(one.expand(ROWS * COLUMNS, -1, -1, -1)))[0].flatten(0, 1)
    assert_close("features", features, features[:1].expand_as(features), 1e-12)
    attended = build(depth=2)(mosaic(one.expand(ROWS * COLUMNS, -1, -1, -1)))[0].flatten(0, 1)
    assert_close("behind attention", attended, attended[:1].expand_as(attended), 1e-12)
    placed = build(positions=True)(mosaic(one.expand(ROWS * COLUMNS, -1, -1, -1)))[0].flatten(0, 1)
    assert torch.pdist(placed).min() > 1e-2


@pytest.mark.parametrize("depth", [0, 2])
@torch.no_grad()
def test_without_positions_features_move_with_their_patches(depth):
    encoder, tiles = build(depth=depth), patches(picture())
    shuffle = torch.randperm(len(tiles), generator=torch.Generator().manual_seed(2))
    before, after = (encoder(mosaic(each))[0].flatten(0, 1) for each in (tiles, tiles[shuffle]))
    assert_close("features", after, before[shuffle], 1e-12)


@pytest.mark.parametrize(
    ("order", "cells"),
    [
        ("raster", [5, 6, 7, 8, 9, 10, 11]),
        ("raster_rev", [0, 1, 2, 3, 4, 5]),
        ("column", [2, 3, 5, 6, 7, 9, 10, 11]),  # column by column from (1, 1)
        ("cross4", list(range(12))),
    ],
)
def test_a_scan_tells_the_cells_behind_in_its_order(order, cells):
    assert moved_cells(build(scan=scan(order)), 5) == cells


def test_blocks_of_an_order_that_takes_turns_read_other_ways():
    """Rows and back together reach every cell, rows twice do not."""
    assert moved_cells(build(scan=scan("nd_cycle", depth=2)), 5) == list(range(12))
    assert moved_cells(build(scan=scan("raster", depth=2)), 5) == list(range(5, 12))


def test_gradient_reaches_every_parameter():
    encoder = build(depth=1, positions=True, scan=scan("cross4", depth=2))
    features = encoder(picture())
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (features * weights).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@torch.no_grad()
def test_pixels_beyond_whole_patches_are_not_seen():
    encoder, x = build(scan=scan("hilbert")), torch.rand(1, 3, 21, 30, dtype=torch.float64)
    assert torch.equal(encoder(x), encoder(x[..., :16, :24]))


def test_a_stored_tower_of_before_reads_as_it_was(tmp_path):
    """config.json without the newer fields, and the same weights by the same names."""
    model = cobra.build(dataclasses.replace(PRESETS["tiny"], image=ImageConfig(height=16, width=24)), seed=3)
    cobra.save(model, tmp_path)
    path = tmp_path / "config.json"
    written = json.loads(path.read_text())
    for name in ("stem", "positions", "scan"):
        del written["vision_encoder"][name]
    del written["connector"]["lists"], written["reading_order"]
    path.write_text(json.dumps(written))
    again = cobra.load(tmp_path, dtype="float32")
    assert again.config == model.config
    pixels = torch.rand(2, 3, 16, 24)
    assert torch.equal(again.encode_images(pixels), model.encode_images(pixels))


def test_a_tower_of_patches_and_scans_survives_the_file(tmp_path):
    tower = config(scan=scan("cross4", depth=2))
    model = cobra.build(dataclasses.replace(PRESETS["tiny"], vision_encoder=tower), seed=3)
    cobra.save(model, tmp_path)
    again = cobra.load(tmp_path, dtype="float32")
    assert again.config.vision_encoder == tower
    pixels = torch.rand(1, 3, 64, 64)
    assert torch.equal(again.vision_encoder(pixels), model.vision_encoder(pixels))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("got 'linear', allowed: conv | patch", {"stem": "linear"}),
        ("did you mean 'hilbert'", {"scan": {"order": "hilbrt"}}),
        ("got 'half', allowed: all | share", {"scan": {"lists": "half"}}),
    ],
)
def test_wrong_settings_are_refused_in_one_line(message, changes):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        from_dict(SmallEncoderConfig, changes)
    assert "\n" not in str(caught.value)


def test_an_unknown_stem_is_no_stem_of_patches():
    with pytest.raises(UserError, match="unknown stem 'linear'; allowed: conv, patch"):
        config(stem="linear")


@pytest.mark.parametrize("depth", [0, 2])
@pytest.mark.parametrize(
    ("stem", "order"), [("patch", None), ("patch", "raster"), ("patch", "cross4"), ("conv", "hilbert")]
)
def test_operations_are_the_products_that_torch_counts_and_the_scans(stem, order, depth):
    blocks = None if order is None else scan(order, depth=2)
    tower = config(stem=stem, depth=depth, scan=blocks)
    image = ImageConfig(height=PATCH * ROWS, width=PATCH * COLUMNS)
    with torch.device("meta"):
        model = Cobra(dataclasses.replace(PRESETS["tiny"], vision_encoder=tower, image=image), Tokenizer.bytes())
    work = tile_work(model)["vision_encoder"]
    encoder = build(stem=stem, depth=depth, scan=blocks)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder(picture())
    convolved = scanned = 0
    if order is not None:
        lists, cells = (4 if order == "cross4" else 1), ROWS * COLUMNS
        channels = 16 // lists + 2 * 4  # of a share: its inner ones, B and C
        convolved, scanned = 2 * 2 * cells * lists * channels * 4, 2 * 5 * cells * 16 * 4
    scans = (torch.ops.aten.bmm, torch.ops.aten.baddbmm)  # of the reference, where nothing is compiled
    products = sum(count for op, count in counter.get_flop_counts()["Global"].items() if op not in scans)
    assert work.weights + work.mixing == products + convolved + scanned
