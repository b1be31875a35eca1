import pytest
import torch
from torch import Tensor

from cobra.image import ImageConfig
from cobra.vision_encoder import (
    VISION_ENCODERS,
    FusedEncoderConfig,
    SmallEncoder,
    SmallEncoderConfig,
    TimmEncoderConfig,
    patch_grid,
    position_grid,
)
from tests.tolerance import assert_close
from vision_scan.errors import UserError

IMAGE = ImageConfig(height=32, width=32)


def build(patch_size=8, d_model=24, depth=2, num_heads=2) -> SmallEncoder:
    config = SmallEncoderConfig(patch_size=patch_size, d_model=d_model, depth=depth, num_heads=num_heads)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallEncoder(config, IMAGE).double()


def pixels(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64)


SIZES = [(32, 32), (64, 64), (16, 56), (56, 16), (8, 8), (33, 47), (39, 8), (15, 200)]


@pytest.mark.parametrize("size", SIZES, ids=str)
@torch.no_grad()
def test_any_image_size_gives_the_grid_of_the_config(size):
    encoder = build()
    features = encoder(pixels(2, *size))
    assert features.shape == (2, size[0] // 8, size[1] // 8, 24)
    assert features.shape[1:3] == SmallEncoderConfig(patch_size=8, d_model=24).grid(*size)
    assert features.dtype == torch.float64 and features.isfinite().all()


@pytest.mark.parametrize("patch_size", [2, 4, 16])
@torch.no_grad()
def test_any_patch_size(patch_size):
    assert build(patch_size)(pixels(1, 33, 40)).shape == (1, 33 // patch_size, 40 // patch_size, 24)


@torch.no_grad()
def test_what_does_not_fill_a_patch_is_not_seen():
    encoder, x = build(), pixels(1, 21, 30)
    assert_close("cut", encoder(x), encoder(x[..., :16, :24]), 1e-12)


@torch.no_grad()
def test_rows_and_columns_are_not_swapped():
    """Without attention, a bright patch lights up its own cell, and its neighbours by the convolutions."""
    encoder = build(depth=0)
    with torch.no_grad():  # group norms look at the whole picture; here only places matter
        for module in encoder.stem.modules():
            if isinstance(module, torch.nn.GroupNorm):
                module.forward = lambda x: x
    dark = torch.zeros(1, 3, 40, 64, dtype=torch.float64)
    light = dark.clone()
    light[..., 24:32, 8:16] = 1
    moved = (encoder(light) - encoder(dark)).norm(dim=-1)[0]
    assert moved.argmax() == 3 * 8 + 1
    near = torch.zeros(5, 8, dtype=torch.bool)
    near[:, 0:5] = True  # the convolutions together reach less than three cells far
    assert moved[~near].eq(0).all()


@torch.no_grad()
def test_every_cell_sees_the_whole_picture_and_only_its_own():
    encoder, x = build(), pixels(2, 32, 48)
    before = encoder(x)
    x[0, :, 31, 47] += 0.5
    moved = (encoder(x) - before).norm(dim=-1)
    assert (moved[0] > 0).all() and (moved[1] == 0).all()


@torch.no_grad()
def test_the_place_of_a_patch_matters():
    encoder = build()
    features = encoder(torch.full((1, 3, 32, 32), 0.7, dtype=torch.float64))
    inner = features[0, 1:3, 1:3].flatten(0, 1)
    assert torch.pdist(inner).min() > 1e-3


def test_positions_are_all_different_and_of_rows_and_columns():
    grid = position_grid(5, 9, 24, torch.device("cpu"))
    assert grid.shape == (5, 9, 24)
    assert torch.pdist(grid.flatten(0, 1)).min() > 0.1
    assert torch.equal(grid[2, :, :12], grid[2, :1, :12].expand(9, -1))
    assert torch.equal(grid[:, 2, 12:], grid[:1, 2, 12:].expand(5, -1))
    larger = position_grid(7, 11, 24, torch.device("cpu"))
    assert torch.equal(larger[:5, :9], grid)  # a place does not move with the size of the picture


def test_gradient_reaches_every_parameter():
    encoder = build()
    features = encoder(pixels(2, 24, 16))
    (features * torch.randn(features.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@torch.no_grad()
def test_pixels_are_taken_as_they_come_and_cast_inside():
    encoder = build()
    x = pixels(1, 32, 32)
    exact = encoder(x)
    half = encoder.bfloat16()(x.float())
    assert half.dtype == torch.bfloat16
    assert_close("bfloat16", half, exact, 0.05)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("power of two", {"patch_size": 6}),
        ("power of two", {"patch_size": 1}),
        ("power of two", {"patch_size": 0}),
        ("power of two", {"patch_size": -8}),
        ("multiple", {"d_model": 26, "num_heads": 2}),
        ("multiple", {"d_model": 24, "num_heads": 5}),
        ("num_heads", {"num_heads": 0}),
        ("d_model", {"d_model": 0}),
        ("depth", {"depth": -1}),
    ],
)
def test_wrong_settings_fail_at_construction(message, settings):
    with pytest.raises(UserError, match=message):
        SmallEncoderConfig(**settings)


@pytest.mark.parametrize("size", [(7, 32), (32, 7), (0, 0)])
def test_an_image_smaller_than_a_patch_is_the_callers_mistake(size):
    with pytest.raises(UserError, match=f"{size[0]} x {size[1]}.*8 pixels"):
        patch_grid(*size, 8)
    with pytest.raises(UserError, match="smaller than a patch"):
        build()(torch.zeros(1, 3, *size))


def test_fused_towers_must_agree_on_the_grid():
    towers = tuple(TimmEncoderConfig(name=f"vit_base_patch{size}_224") for size in (16, 32))
    with pytest.raises(UserError, match="same grid"):
        FusedEncoderConfig(towers=towers).grid(224, 224)
    same = FusedEncoderConfig(towers=(towers[0], towers[0]))
    assert same.grid(224, 240) == (14, 15)


def test_fused_towers_are_at_least_one():
    with pytest.raises(UserError):
        FusedEncoderConfig(towers=()).grid(224, 224)


@pytest.mark.parametrize(
    ("name", "patch_size"),
    [("vit_large_patch14_reg4_dinov2.lvd142m", 14), ("vit_so400m_patch14_siglip_384", 14),
     ("vit_tiny_patch16_224", 16)],
)  # fmt: skip
def test_the_patch_size_is_in_the_name_of_a_tower(name, patch_size):
    assert TimmEncoderConfig(name=name).patch_size == patch_size


def test_the_table_names_every_kind():
    for kind, encoder in VISION_ENCODERS.items():
        assert encoder.Config.__dataclass_fields__["kind"].default == kind
