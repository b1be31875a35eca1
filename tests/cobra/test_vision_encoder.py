import functools
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from cobra.image import ImageConfig
from cobra.vision_encoder import (
    VISION_ENCODERS,
    FusedEncoder,
    FusedEncoderConfig,
    SmallEncoder,
    SmallEncoderConfig,
    TimmEncoder,
    TimmEncoderConfig,
    load_tower_weights,
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


# Published size of the file and size of the tower, in patches; what the file has that the tower drops.
TOWERS = {
    "vit_tiny_patch16_224": ((4, 4), (6, 3), {"norm", "head"}),
    "vit_large_patch14_reg4_dinov2.lvd142m": ((5, 5), (7, 4), {"norm"}),
    "vit_so400m_patch14_siglip_384": ((5, 5), (3, 6), {"norm", "attn_pool"}),
    "vit_large_patch14_clip_quickgelu_336.openai": ((4, 4), (6, 6), {"norm", "head"}),
    "vit_medium_patch16_gap_240": ((4, 4), (4, 4), {"head"}),
}


@pytest.fixture
def timm(monkeypatch):
    """timm, whose ViTs have three narrow blocks."""
    timm = pytest.importorskip("timm")
    small = functools.partial(timm.create_model, depth=3, embed_dim=24, num_heads=2)
    monkeypatch.setattr(timm, "create_model", small)
    return timm


def in_pixels(name: str, patches: tuple[int, int]) -> tuple[int, int]:
    size = TimmEncoderConfig(name=name).patch_size
    return patches[0] * size, patches[1] * size


def publish(timm, name: str, path) -> dict[str, Tensor]:
    """Writes random weights of the whole model as its authors would."""
    model = timm.create_model(name, img_size=in_pixels(name, TOWERS[name][0]))
    noise = torch.Generator().manual_seed(0)
    tensors = {k: torch.randn(t.shape, generator=noise) * 0.3 for k, t in model.state_dict().items()}
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"state_dict": tensors, "epoch": 3} if path.suffix == ".pth" else tensors, path)
    return tensors


def tower(name: str, block: int = -2) -> TimmEncoder:
    height, width = in_pixels(name, TOWERS[name][1])
    config = TimmEncoderConfig(name=name, block=block)
    return TimmEncoder(config, ImageConfig(height=height, width=width)).eval()


def features_by_timm(timm, name: str, path, x: Tensor, block: int = -2) -> Tensor:
    """Those of timm's own model of this image size, with weights that timm itself read and resampled."""
    settings = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}, "num_classes": 0}
    whole = timm.create_model(name, img_size=tuple(x.shape[-2:]), **settings).eval()
    data = timm.data.resolve_model_data_config(whole)
    mean, std = (torch.tensor(data[key]).view(3, 1, 1) for key in ("mean", "std"))
    maps = whole.forward_intermediates((x - mean) / std, norm=False, intermediates_only=True)
    return maps[block].movedim(1, -1)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin", ".pth"])
@pytest.mark.parametrize("name", TOWERS)
@torch.no_grad()
def test_a_tower_with_published_weights_is_timms_model(timm, tmp_path, name, suffix):
    path = tmp_path / f"tower{suffix}"
    tensors = publish(timm, name, path)
    assert TOWERS[name][2] <= {key.partition(".")[0] for key in tensors}
    x = pixels(2, *in_pixels(name, TOWERS[name][1])).float()
    for block in (-2, 0):
        encoder = tower(name, block)
        load_tower_weights(encoder, [path])
        assert_close(name, encoder(x), features_by_timm(timm, name, path, x, block), 1e-6)


@torch.no_grad()
def test_fused_towers_take_a_file_each_in_order(timm, tmp_path):
    names = ["vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384"]
    paths = [tmp_path / "dino.bin", tmp_path / "siglip.safetensors"]
    for name, path in zip(names, paths, strict=True):
        publish(timm, name, path)
    towers = tuple(TimmEncoderConfig(name=name) for name in names)
    encoder = FusedEncoder(FusedEncoderConfig(towers=towers), ImageConfig(height=56, width=98)).eval()
    load_tower_weights(encoder, tuple(map(str, paths)))
    x = pixels(1, 56, 98).float()
    pairs = zip(names, paths, encoder(x).split(24, dim=-1), strict=True)
    for name, path, part in pairs:
        assert_close(name, part, features_by_timm(timm, name, path, x), 1e-6)


@torch.no_grad()
def test_weights_take_the_dtype_of_the_encoder(timm, tmp_path):
    name = "vit_tiny_patch16_224"
    tensors = publish(timm, name, tmp_path / "tower.bin")
    encoder = tower(name).bfloat16()
    load_tower_weights(encoder, [tmp_path / "tower.bin"])
    assert torch.equal(encoder.tower.blocks[0].mlp.fc1.bias, tensors["blocks.0.mlp.fc1.bias"].bfloat16())


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("missing pos_embed", {"pos_embed": None}),
        ("missing blocks.1.attn.qkv.bias", {"blocks.1.attn.qkv.bias": None}),
        ("unexpected blocks.3.norm1.bias", {"blocks.3.norm1.bias": torch.ones(24)}),
        ("unexpected reg_token", {"reg_token": torch.ones(1, 4, 24)}),
        (r"cls_token \(1, 1, 25\) instead of \(1, 1, 24\)", {"cls_token": torch.ones(1, 1, 25)}),
        (r"\(24, 3, 14, 14\) instead of", {"patch_embed.proj.weight": torch.ones(24, 3, 14, 14)}),
        (r"pos_embed \(1, 19, 25\) instead", {"pos_embed": torch.ones(1, 17, 25)}),
        ("adapt", {"pos_embed": torch.ones(1, 8, 25)}),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(timm, tmp_path, message, change, suffix):
    name, path = "vit_tiny_patch16_224", tmp_path / f"tower{suffix}"
    tensors = publish(timm, name, path) | change
    tensors = {key: tensor for key, tensor in tensors.items() if tensor is not None}
    save_file(tensors, path) if suffix == ".safetensors" else torch.save({"model": tensors}, path)
    encoder = tower(name)
    before = {key: tensor.clone() for key, tensor in encoder.state_dict().items()}
    with pytest.raises(UserError, match=message) as caught:
        load_tower_weights(encoder, [path])
    assert str(path) in str(caught.value) and name in str(caught.value) and "\n" not in str(caught.value)
    assert all(torch.equal(tensor, before[key]) for key, tensor in encoder.state_dict().items())


class Payload:
    def __reduce__(self):
        return os.abort, ()


@pytest.mark.parametrize(
    ("file", "write", "message"),
    [
        ("gone.safetensors", lambda path: None, "no such file"),
        ("folder", lambda path: path.mkdir(), "no such file"),
        ("broken.safetensors", lambda path: path.write_bytes(b"broken"), "damaged"),
        ("broken.pth", lambda path: path.write_bytes(b"broken"), "damaged"),
        ("empty.bin", lambda path: path.write_bytes(b""), "damaged"),
        ("code.pth", lambda path: torch.save({"pos_embed": Payload()}, path), "more than plain tensors"),
        ("list.pth", lambda path: torch.save([torch.ones(2)], path), "a list, not a state dict"),
        ("number.pth", lambda path: torch.save({"epoch": 3}, path), "epoch is not a tensor"),
    ],
)
def test_a_file_that_is_none_is_named(timm, tmp_path, file, write, message):
    write(tmp_path / file)
    with pytest.raises(UserError, match=message) as caught:
        load_tower_weights(tower("vit_tiny_patch16_224"), [tmp_path / file])
    assert file in str(caught.value) and "\n" not in str(caught.value)


def test_files_are_as_many_as_timm_towers(timm, tmp_path):
    with pytest.raises(UserError, match=r"2 tower files for 1 pretrained towers \(vit_tiny_patch16_224\)"):
        load_tower_weights(tower("vit_tiny_patch16_224"), [tmp_path, tmp_path])
    with pytest.raises(UserError, match=r"1 tower files for 0 pretrained towers \(none\)"):
        load_tower_weights(build(), [tmp_path])


def test_loading_leaves_the_file_as_it_is(timm, tmp_path):
    name, path = "vit_large_patch14_reg4_dinov2.lvd142m", tmp_path / "tower.safetensors"
    tensors = publish(timm, name, path)
    load_tower_weights(tower(name), [path])
    assert all(torch.equal(tensor, tensors[key]) for key, tensor in load_file(path).items())
