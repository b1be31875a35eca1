from dataclasses import replace

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import cobra
from cobra.config import PRESETS
from cobra.connector import CONNECTORS
from cobra.cost import TOWERS as COSTS
from cobra.cost import tile_work
from cobra.towers import HIERARCHICAL, TOWERS
from cobra.towers.efficientvmamba import EfficientVMambaConfig
from cobra.towers.groupmamba import GroupMambaConfig
from cobra.towers.vmamba import VMambaConfig
from cobra.typed_config import from_dict, to_dict
from cobra.vision_encoder import load_tower_weights
from tests.cobra.tower_samples import IMAGE, SMALL, build, head, on_meta, pixels, published
from tests.tolerance import assert_close
from tests.vision_scan.modules.samples import randomised
from vision_scan.errors import UserError

SIZES = [(64, 64), (33, 70), (5, 4)]


# Authors' own count to the last one (VMamba, analyze/tp.py), or published millions, cut off.
PARAMETERS = {
    "vmamba-t": 30249064, "vmamba-s": 50147752, "vmamba-b": 88557800,
    "efficientvmamba-t": 6, "efficientvmamba-s": 11, "efficientvmamba-b": 33,
    "groupmamba-t": 23, "groupmamba-s": 34, "groupmamba-b": 57,
}  # fmt: skip


@pytest.mark.parametrize("name", TOWERS)
def test_parameters_are_as_many_as_published(name):
    tower = on_meta(name)
    total = sum(p.numel() for p in tower.parameters()) + sum(t.numel() for t in head(tower).values())
    assert total == PARAMETERS[name] or total // 10**6 == PARAMETERS[name]


@pytest.mark.parametrize(
    ("name", "billions"),
    [("vmamba-t", 4.9), ("vmamba-b", 15.4), ("efficientvmamba-s", 1.3), ("efficientvmamba-b", 4.0)],
)
def test_multiplications_are_as_many_as_published(name, billions):
    """Of weights; VMamba counts scans and norms too, which is little."""
    work = COSTS[TOWERS[name].kind](on_meta(name), 7, 7)
    assert work.weights / 2e9 == pytest.approx(billions, rel=0.03)


NAMES = {
    "vmamba-t": {
        "patch_embed.0.weight": (48, 3, 3, 3),
        "patch_embed.2.weight": (48,),
        "patch_embed.5.weight": (96, 48, 3, 3),
        "patch_embed.7.bias": (96,),
        "layers.0.blocks.1.op.in_proj.weight": (96, 96),
        "layers.1.blocks.0.op.x_proj.weight": (4 * (12 + 2), 192),
        "layers.2.blocks.7.mlp.fc1.weight": (1536, 384),
        "layers.2.downsample.1.weight": (768, 384, 3, 3),
        "layers.2.downsample.3.weight": (768,),
        "layers.3.blocks.1.norm2.weight": (768,),
    },
    "vmamba-s": {"layers.2.blocks.14.op.A_logs": (4 * 768, 1)},
    "vmamba-b": {"layers.3.blocks.1.op.dt_projs.weight": (4 * 2048, 64)},
    "efficientvmamba-t": {
        "patch_embed.0.weight": (48, 3, 4, 4),
        "patch_embed.2.bias": (48,),
        "layers.0.blocks.0.op.A_logs": (4 * 96, 16),
        "layers.1.blocks.1.se.channel_select.weight": (96, 12),
        "layers.1.blocks.1.conv_branch.1.num_batches_tracked": (),
        "layers.0.downsample.norm.weight": (192,),
        "layers.1.downsample.reduction.weight": (192, 384),
        "layers.2.1.conv_pw.0.weight": (768, 192, 1, 1),
        "layers.2.4.conv_dw.1.running_mean": (768,),
        "layers.2.4.se.conv_reduce.bias": (96,),
        "layers.2.6.reduction.weight": (384, 768),
        "layers.3.2.conv_pw2.1.weight": (384,),
    },
    "groupmamba-b": {
        "patch_embed1.conv.0.weight": (64, 3, 7, 7),
        "patch_embed1.conv.7.running_var": (64,),
        "patch_embed1.proj.weight": (96, 64, 3, 3),
        "patch_embed3.norm.weight": (424,),
        "block3.20.attn.mamba_g4.dt_projs_bias": (1, 106),
        "block2.5.mlp.dwconv.dwconv.bias": (1536,),
        "norm3.weight": (424,),
    },
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_the_authors(name):
    shapes = {key: tuple(tensor.shape) for key, tensor in on_meta(name).state_dict().items()}
    assert NAMES[name].items() <= shapes.items()
    assert not any(key.partition(".")[0] in HIERARCHICAL[TOWERS[name].kind].head_names for key in shapes)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_any_rectangle_works_and_rows_do_not_mix(kind, size):
    tower = randomised(build(SMALL[kind])).train()  # batch norms too keep to what is stored
    x = pixels(3, *size)
    features = tower(x)
    assert features.shape == (3, *SMALL[kind].grid(*size), tower.d_model)
    assert_close("alone", torch.cat([tower(picture[None]) for picture in x]), features, 1e-10)
    assert_close("eval", tower.eval()(x), features, 1e-10)


@pytest.mark.parametrize(("kind", "cells"), [("vmamba", (7, 8)), ("efficientvmamba", (7, 7)), ("groupmamba", (7, 8))])
def test_a_released_tower_has_a_cell_for_32_pixels(kind, cells):
    tower = on_meta(f"{kind}-t")
    assert tower.config.grid(224, 227) == cells
    assert tower(torch.zeros(1, 3, 224, 227, device="meta")).shape == (1, *cells, tower.d_model)


@pytest.mark.parametrize("kind", SMALL)
def test_gradients_reach_every_parameter(kind):
    tower = randomised(build(SMALL[kind]))
    x = pixels(2, 33, 50)
    (tower(x) * torch.randn(tower(x).shape, generator=torch.Generator().manual_seed(3))).sum().backward()
    for name, parameter in tower.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.any(), name


def as_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """As older code of the authors wrote it: other names, lists with an axis of their own, wrapped twice."""
    old = {}
    for name, tensor in tensors.items():
        for part in ("x_proj", "dt_projs"):
            if name.endswith(f"{part}.weight"):
                K = tensors[name.replace(f"{part}.weight", "dt_projs_bias")].shape[0]
                name, tensor = name.replace(f"{part}.weight", f"{part}_weight"), tensor.unflatten(0, (K, -1))
        name = name.replace("classifier.", "").replace(".op.", ".self_attention.") if "mlp" not in name else name
        old[f"module.module.{name}"] = tensor
    return old


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("is_old", [False, True])
@pytest.mark.parametrize("kind", SMALL)
def test_released_weights_are_loaded(tmp_path, kind, is_old, suffix):
    tower, path = build(SMALL[kind]), tmp_path / f"tower{suffix}"
    tensors = published(tower)
    # EVSS blocks never had the older names, VSS blocks did.
    written = as_once(tensors) if is_old and kind != "efficientvmamba" else tensors
    if suffix == ".pth":
        torch.save({"model": written, "epoch": 3}, path)
    else:
        save_file({name: tensor.contiguous() for name, tensor in written.items()}, path)
    load_tower_weights(tower, [path])
    for name, tensor in tower.state_dict().items():
        assert torch.equal(tensor, tensors[name]), name


def test_efficientvmambas_older_patch_embedding_is_loaded(tmp_path):
    tower, path = build(SMALL["efficientvmamba"]), tmp_path / "tower.pth"
    tensors = published(tower)
    names = {"patch_embed.0.": "patch_embed.proj.", "patch_embed.2.": "patch_embed.norm."}
    torch.save({names.get(n[:14], n[:14]) + n[14:]: t for n, t in tensors.items()}, path)
    load_tower_weights(tower, [path])
    assert torch.equal(tower.patch_embed[2].bias, tensors["patch_embed.2.bias"])


@pytest.mark.parametrize("kind", SMALL)
def test_weights_of_another_variant_are_refused_in_a_line(tmp_path, kind):
    path = tmp_path / "tower.pth"
    small = SMALL[kind]
    deeper = replace(small, depths=(*small.depths[:-1], small.depths[-1] + 1))
    wider = replace(small, dims=(*small.dims[:-1], 2 * small.dims[-1]))
    for other, fault in ((deeper, "missing"), (wider, "misshapen")):
        torch.save(published(build(small)), path)
        tower = build(other)
        before = {name: tensor.clone() for name, tensor in tower.state_dict().items()}
        with pytest.raises(UserError, match=f"tower.pth, read as {kind}, does not fit.*{fault}") as caught:
            load_tower_weights(tower, [path])
        assert "\n" not in str(caught.value)
        assert all(torch.equal(tensor, before[name]) for name, tensor in tower.state_dict().items())


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("unexpected outnorm3.weight", {"outnorm3.weight": torch.ones(12)}),
        ("missing layers.0.blocks.0.op.Ds", {"layers.0.blocks.0.op.Ds": None}),
        (r"A_logs \(32, 2\) instead of \(32, 1\)", {"layers.0.blocks.0.op.A_logs": torch.ones(32, 2)}),
        ("epoch is not a tensor", {"epoch": 3}),
    ],
)
def test_a_tensor_that_does_not_fit_is_named(tmp_path, message, change):
    tower, path = build(SMALL["vmamba"]), tmp_path / "tower.pth"
    torch.save({name: t for name, t in {**published(tower), **change}.items() if t is not None}, path)
    with pytest.raises(UserError, match=message):
        load_tower_weights(tower, [path])


def test_a_tower_goes_by_the_name_of_its_release():
    assert {name: on_meta(name).name for name in TOWERS} == {name: name for name in TOWERS}
    assert build(SMALL["groupmamba"]).name == "groupmamba"


@pytest.mark.parametrize("config", [*TOWERS.values(), *SMALL.values()], ids=str)
def test_settings_survive_json(config):
    assert from_dict(type(config), to_dict(config)) == config


@torch.no_grad()
@pytest.mark.parametrize("kind", SMALL)
def test_a_tower_in_half_precision_is_near_itself(kind):
    tower, x = randomised(build(SMALL[kind])).eval(), pixels(2, 40, 40)
    exact = tower(x)
    half = tower.float().to(torch.bfloat16)
    features = half(x.float())
    assert features.dtype == torch.bfloat16
    assert_close("bfloat16", features, exact, 0.08)


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("2 dims for 1 depths", lambda: VMambaConfig(dims=(8, 16), depths=(1,))),
        ("0 dims for 0 depths", lambda: VMambaConfig(dims=(), depths=())),
        ("must be 1 or more", lambda: VMambaConfig(dims=(8, 0), depths=(1, 1))),
        ("'cross4'", lambda: VMambaConfig(order="cros4")),
        ("3 mlp_ratios for 2 dims", lambda: GroupMambaConfig(dims=(16, 16), depths=(1, 1), mlp_ratios=(1, 2, 3))),
        ("d_stem 0", lambda: GroupMambaConfig(d_stem=0)),
        ("'raster'", lambda: GroupMambaConfig(orders=("rastr",))),
        ("image 3 x 40 is smaller than a patch of 4", lambda: EfficientVMambaConfig().grid(3, 40)),
        ("image 3 x 8 is smaller", lambda: build(SMALL["efficientvmamba"])(torch.zeros(1, 3, 3, 8))),
    ],
)
def test_what_cannot_be_built_or_seen_is_said(message, make):
    with pytest.raises(UserError, match=message):
        make()


@pytest.mark.parametrize("kind", SMALL)
@torch.no_grad()
def test_a_model_with_a_tower_is_saved_and_loaded(tmp_path, kind):
    tiny = PRESETS["tiny"]
    config = replace(tiny, vision_encoder=SMALL[kind], connector=CONNECTORS["linear"].Config(), image=IMAGE)
    model = cobra.build(config, seed=3)
    randomised(model.vision_encoder).float()
    cobra.save(model, tmp_path / "model")
    loaded = cobra.load(tmp_path / "model", dtype="float32")
    images = [Image.new("RGB", (40, 30), "brown")]
    batches = [m.processor(text=["What is it? <image>"], images=[images]) for m in (model, loaded)]
    ids = [m.generate(**batch, max_new_tokens=4) for m, batch in zip((model, loaded), batches, strict=True)]
    assert torch.equal(*ids)
    x = pixels(1, 32, 32).float()
    assert_close("features", loaded.vision_encoder(x), model.vision_encoder(x), 1e-5)
    for name, tensor in loaded.vision_encoder.state_dict().items():
        assert torch.equal(tensor, model.vision_encoder.state_dict()[name]), name
    assert tile_work(loaded)["vision_encoder"].mixing > 0


def test_operations_of_scans_are_counted():
    config = SMALL["vmamba"]
    work = COSTS["vmamba"](build(config), 2, 3)
    cells = 2 * 3
    assert work.mixing == 7 * 4 * (4 * cells * 8 + 2 * cells * 12)  # twice as many rows and columns in front
