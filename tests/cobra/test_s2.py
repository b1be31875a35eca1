"""S2: against the loops of the paper's description, and torch's own pooling."""

import functools
import math

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import cobra
from cobra.config import CobraConfig
from cobra.connector import LinearConfig
from cobra.image import ImageConfig
from cobra.lm.mlp import MLPConfig
from cobra.lm.stack import LMConfig
from cobra.token_reduction import ToMeConfig
from cobra.typed_config import from_dict, to_dict
from cobra.vision_encoder import (
    FusedEncoderConfig,
    S2Encoder,
    S2EncoderConfig,
    SmallEncoderConfig,
    TimmEncoderConfig,
    load_tower_weights,
)
from cobra.vision_encoder.s2 import cut_tiles, join_tiles
from tests.tolerance import assert_close
from vision_scan.errors import UserError

SMALL = SmallEncoderConfig(patch_size=4, d_model=8, num_heads=2)


def build(*scales: int, height: int = 24, width: int = 24, tower=SMALL) -> S2Encoder:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = S2EncoderConfig(tower=tower, scales=scales)
        return S2Encoder(config, ImageConfig(height=height, width=width)).double().eval()


def pixels(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.rand(batch, 3, height, width, generator=generator, dtype=torch.float64)


def cubic(distance: float, a: float = -0.75) -> float:
    """Keys' kernel, with the parameter that torch's bicubic has."""
    d = abs(distance)
    if d <= 1:
        return (a + 2) * d**3 - (a + 3) * d**2 + 1
    return a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a if d < 2 else 0.0


def resizing(before: int, after: int) -> Tensor:
    """The matrix of a bicubic resize along one axis, without anti-aliasing, edges repeated."""
    matrix = torch.zeros(after, before, dtype=torch.float64)
    for row in range(after):
        centre = (row + 0.5) * before / after - 0.5
        for tap in range(math.floor(centre) - 1, math.floor(centre) + 3):
            matrix[row, min(max(tap, 0), before - 1)] += cubic(tap - centre)
    return matrix


def slow(encoder: S2Encoder, image: Tensor, scales: tuple[int, ...]) -> Tensor:
    """Of one image (3, height, width), tile by tile and cell by cell."""
    tile = tuple(side // max(scales) for side in image.shape[1:])
    first = [scales[0] * side // 4 for side in tile]
    parts = []
    for scale in scales:
        resized = resizing(image.shape[1], scale * tile[0]) @ image @ resizing(image.shape[2], scale * tile[1]).T
        rows = []
        for row in range(scale):
            line = [
                resized[:, row * tile[0] :, column * tile[1] :][:, : tile[0], : tile[1]] for column in range(scale)
            ]
            rows.append(torch.cat([encoder.tower(part[None])[0] for part in line], dim=1))
        whole = torch.cat(rows)
        mean = torch.zeros(*first, whole.shape[-1], dtype=whole.dtype)
        for y in range(first[0]):
            for x in range(first[1]):
                top, left = y * whole.shape[0] // first[0], x * whole.shape[1] // first[1]
                bottom = -(-(y + 1) * whole.shape[0] // first[0])
                right = -(-(x + 1) * whole.shape[1] // first[1])
                mean[y, x] = whole[top:bottom, left:right].flatten(0, 1).mean(0)
        parts.append(mean)
    return torch.cat(parts, dim=-1)


@pytest.mark.parametrize("size", [(24, 24), (24, 48), (48, 24)], ids=str)
@pytest.mark.parametrize("scales", [(1, 2), (1, 2, 3), (2, 1), (2, 3), (1,)], ids=str)
@torch.no_grad()
def test_features_are_those_of_a_loop_over_tiles(scales, size):
    encoder = build(*scales, height=size[0], width=size[1])
    images = pixels(2, *size)
    features = encoder(images)
    assert features.shape == (2, *encoder.config.grid(*size), encoder.d_model)
    assert encoder.d_model == 8 * len(scales)
    assert_close("features", features, torch.stack([slow(encoder, image, scales) for image in images]), 1e-10)


@torch.no_grad()
def test_one_scale_is_the_tower_itself():
    encoder, images = build(1), pixels(2, 24, 20)
    assert torch.equal(encoder(images), encoder.tower(images))


@torch.no_grad()
def test_the_detail_of_the_image_is_seen_at_the_largest_scale_only():
    """A change that a smaller picture has no pixel of reaches the channels of the large one alone."""
    encoder = build(1, 3)
    image = pixels(1, 24, 24)
    changed = image.clone()
    changed[..., 0, 0] += 1  # at a third of the size bicubic taps are pixels 1, 4, 7, ... and their neighbours
    small, large = (encoder(image) - encoder(changed)).abs().amax((0, 1, 2)).split(8)
    assert large.min() > 0
    assert small.max() < large.min()


def test_tiles_are_cut_by_row_column_and_image_and_joined_again():
    images = pixels(3, 6, 8)
    tiles = cut_tiles(images, 2)
    assert tiles.shape == (12, 3, 3, 4)
    assert torch.equal(tiles[1 * 6 + 0 * 3 + 2], images[2, :, 3:, :4])
    assert torch.equal(tiles[0 * 6 + 1 * 3 + 0], images[0, :, :3, 4:])
    assert torch.equal(join_tiles(tiles.movedim(1, -1), 2), images.movedim(1, -1))


@torch.no_grad()
def test_bfloat16_stays_bfloat16_and_is_averaged_in_float32():
    encoder = build(1, 2)
    exact = encoder(pixels(2, 24, 24))
    narrow = encoder.bfloat16()(pixels(2, 24, 24).float())
    assert narrow.dtype == torch.bfloat16
    assert (narrow - exact).abs().max() < 0.05 * exact.abs().max()


def test_gradient_reaches_every_parameter():
    encoder = build(1, 2)
    encoder(pixels(1, 24, 24)).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in encoder.parameters())


@pytest.mark.parametrize("is_fused", [False, True], ids=["timm", "fused"])
@torch.no_grad()
def test_published_weights_go_into_the_wrapped_tower(monkeypatch, tmp_path, is_fused):
    timm = pytest.importorskip("timm")
    small = functools.partial(timm.create_model, depth=3, embed_dim=24, num_heads=2)
    monkeypatch.setattr(timm, "create_model", small)
    one = TimmEncoderConfig(name="vit_tiny_patch16_224")
    tower = FusedEncoderConfig(towers=(one, one)) if is_fused else one
    encoder = build(1, 2, height=64, width=96, tower=tower).float()
    path = tmp_path / "tower.safetensors"
    save_file(timm.create_model(one.name, img_size=(32, 48)).state_dict(), path)
    assert len(encoder.towers) == 1 + is_fused
    load_tower_weights(encoder, [path] * len(encoder.towers))
    expected = timm.create_model(
        one.name, img_size=(32, 48), pretrained=True, pretrained_cfg_overlay={"file": str(path)}
    ).eval()
    image = pixels(1, 64, 96).float()
    corner = expected.forward_intermediates(
        (image[..., :32, :48] - 0.5) / 0.5, norm=False, intermediates_only=True
    )[-2].movedim(1, -1)
    width = encoder.towers[0].d_model
    # Scale 2 of a corner: each cell of the first scale is the mean of two by two of the tile's, here of 2 x 3 patches.
    found = encoder(image)[:, 0, 0, -width:]
    assert encoder(image).shape == (1, 2, 3, 2 * len(encoder.towers) * 24)
    assert_close("corner", found, corner[:, :2, :2].mean((1, 2)), 1e-6)


def model_config(**changes) -> CobraConfig:
    settings = {
        "image": ImageConfig(height=24, width=32),
        "vision_encoder": S2EncoderConfig(tower=SMALL),
        "connector": LinearConfig(),
        "lm": LMConfig(d_model=16, vocab_size=300, layers=(MLPConfig(d_ff=8),)),
    }
    return CobraConfig(**{**settings, **changes})


@torch.no_grad()
def test_a_model_has_the_tokens_of_its_tower_and_survives_saving(tmp_path):
    config = model_config()
    assert config.tokens_per_tile == 3 * 4
    assert from_dict(CobraConfig, to_dict(config)) == config
    model = cobra.build(config)
    tokens = model.encode_images(pixels(2, 24, 32).float())
    assert tokens.shape == (2, 12, 16)
    cobra.save(model, tmp_path / "model")
    assert torch.equal(cobra.load(tmp_path / "model").encode_images(pixels(2, 24, 32).float()), tokens)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("whole numbers from 1", lambda: S2EncoderConfig(tower=SMALL, scales=())),
        ("whole numbers from 1", lambda: S2EncoderConfig(tower=SMALL, scales=(0, 1))),
        ("whole numbers from 1", lambda: S2EncoderConfig(tower=SMALL, scales=(2, 2))),
        ("25 x 32 cannot be cut into 2 x 2", lambda: model_config(image=ImageConfig(height=25, width=32))),
        ("smaller than a patch", lambda: model_config(image=ImageConfig(height=6, width=32))),
        ("s2 has several", lambda: cobra.build(model_config(token_reduction=ToMeConfig(num_tokens=4)))),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(message, make):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@torch.no_grad()
def test_pixels_of_another_size_must_be_tiles_too():
    with pytest.raises(UserError, match="multiples of 2"):
        build(1, 2)(pixels(1, 24, 25))
