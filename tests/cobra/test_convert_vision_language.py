"""Released Cobra, ML-Mamba, LLaVA and MobileVLM, as small as can be and in the released layouts: what is converted
computes what their parts do, put together here by hand of transformers' language models, timm's towers and torch."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, linear, silu, softplus

import cobra
from cobra.cli import main
from cobra.config import PRESETS
from cobra.convert import llava, longllava, plan, prismatic
from cobra.cost import count_parts
from cobra.lm import LMConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.vision_encoder import FusedEncoderConfig, TimmEncoderConfig
from tests.cobra.published import ROWS, first_jamba_names, jamba, mamba1, mamba2, train_tokenizer
from tests.cobra.published import llama as llama_of_transformers
from tests.cobra.released import RELEASED
from tests.cobra.test_oracles import randomise
from tests.tolerance import assert_close
from vision_scan.errors import UserError

timm = pytest.importorskip("timm")
pytest.importorskip("transformers")

TOWERS = ("vit_tiny_patch16_224", "vit_tiny_patch16_224.augreg_in21k")
WIDTH, D_MODEL, SIDE = 2 * 192, 64, 48


@pytest.fixture
def small(monkeypatch):
    """Ids that stand for small parts."""
    encoder = FusedEncoderConfig(towers=tuple(TimmEncoderConfig(name=name) for name in TOWERS))
    monkeypatch.setitem(prismatic.VISION_BACKBONES, "small", (encoder, SIDE))
    one = LMConfig(d_model=D_MODEL, vocab_size=ROWS, layers=(Mamba1Config(d_state=6),) * 2)
    other = LMConfig(d_model=D_MODEL, vocab_size=ROWS, layers=(Mamba2Config(d_state=6, headdim=16, chunk_size=16),) * 2)
    for name, lm in (("small-mamba", one), ("small-mamba2", other)):
        monkeypatch.setitem(PRESETS, name, cobra.CobraConfig(**{**vars(PRESETS["cobra-3b"]), "lm": lm}))
        monkeypatch.setitem(prismatic.LLM_BACKBONES, name, name)


def settings(llm: str, **changes) -> dict:
    model = {
        "model_id": "cobra+3b", "vision_backbone_id": "small", "llm_backbone_id": llm,
        "arch_specifier": "no-align+fused-gelu-mlp", "image_resize_strategy": "resize-naive", "llm_max_length": 2048,
    }  # fmt: skip
    return {"model": {**model, **changes}, "seed": 7}


def write(path: Path, config: dict, parts: dict[str, dict], folder: str = "checkpoints") -> list[Path]:
    """A checkpoint as released, with the tokenizer, and the files of its towers."""
    (path / folder).mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    torch.save({"model": parts}, path / folder / "latest-checkpoint.pt")
    train_tokenizer(path / "tokenizer.json")
    files = []
    for number, name in enumerate(TOWERS):
        torch.manual_seed(number)
        tower = timm.create_model(name, pretrained=False, num_classes=0, img_size=SIDE)
        files.append(path / f"tower{number}.pth")
        torch.save(tower.state_dict(), files[-1])
    return files


def random_linear(d_in: int, d_out: int) -> nn.Linear:
    return nn.Linear(d_in, d_out).requires_grad_(False)


class Projector(nn.Module):
    """Cobra's, whose keys begin with its own name."""

    def __init__(self, d_in: int) -> None:
        super().__init__()
        self.projector = nn.Sequential(
            nn.Linear(d_in, 4 * d_in), nn.GELU(), nn.Linear(4 * d_in, D_MODEL), nn.GELU(), nn.Linear(D_MODEL, D_MODEL)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.projector(x)


def features(pixels: Tensor, files: list[Path]) -> Tensor:
    """(n, patches, WIDTH): the last block but one of each tower, side by side."""
    found = []
    for name, file in zip(TOWERS, files, strict=True):
        tower = timm.create_model(name, pretrained=False, num_classes=0, img_size=SIDE).eval()
        tower.load_state_dict(torch.load(file, weights_only=True))
        mean, std = (torch.tensor(tower.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
        (patches,) = tower.get_intermediate_layers((pixels - mean) / std, n={len(tower.blocks) - 2})
        found.append(patches)
    return torch.cat(found, -1)


def as_released(model, prefix: str) -> dict[str, Tensor]:
    tensors = {**model.state_dict(), "lm_head.weight": model.get_input_embeddings().weight}
    return {prefix + name.replace("backbone.embeddings", "backbone.embedding"): x for name, x in tensors.items()}


def logits_of(model, theirs, tokens: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ours and theirs, behind a picture whose tokens are `tokens` (patches, D_MODEL)."""
    embeds = torch.cat([tokens, theirs.get_input_embeddings()(ids)])[None]
    ours, _ = model.lm(inputs_embeds=embeds)
    return ours, theirs(inputs_embeds=embeds, use_cache=False).logits


@torch.no_grad()
def test_cobra(small, tmp_path, capsys):
    theirs = mamba1(tie_word_embeddings=True)
    projector = randomise(Projector(WIDTH))
    parts = {"projector": projector.state_dict(), "llm_backbone": as_released(theirs, "llm.")}
    source, out = tmp_path / "cobra+3b", tmp_path / "out"
    files = write(source, settings("small-mamba"), parts)
    arguments = ["convert", str(source), str(out), *(word for file in files for word in ("--tower", str(file)))]
    assert main(arguments) == 0
    told = capsys.readouterr().out
    assert "released Cobra" in told and "fused_mlp" in told
    model = cobra.load(out, dtype="float32")
    assert model.config.template == "zephyr" and model.config.image.resize == "squash"
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    expected = projector(features(pixels, files))
    found = model.encode_images(pixels)
    assert_close("image tokens", found, expected, 1e-5)
    ours, wanted = logits_of(model, theirs, found[0], torch.arange(5, 20))
    assert_close("logits", ours, wanted, 1e-4)
    picture = torch.zeros(SIDE, 80, 3, dtype=torch.uint8).numpy()
    assert isinstance(model.answer("What?", images=[cobra.image.Image.fromarray(picture)], max_new_tokens=3), str)


def scan(x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """x (length, heads, headdim), dt (length, heads), B, C (length, d_state): token by token."""
    state, y = torch.zeros(*x.shape[1:], B.shape[-1], dtype=x.dtype), []
    for t in range(len(x)):
        state = (dt[t] * A).exp()[:, None, None] * state + (dt[t][:, None] * x[t])[..., None] * B[t]
        y.append(state @ C[t] + D[:, None] * x[t])
    return torch.stack(y)


def bidirectional(p: dict[str, Tensor], x: Tensor, heads: int, d_state: int) -> Tensor:
    """ML-Mamba's mixer on one row of patches (length, D_MODEL), as its fork of mamba_ssm computes it: both directions
    from one projection, each with a gated norm, their mean projected out."""
    projected = linear(x, p["in_proj.weight"])
    inner = p["out_proj.weight"].shape[1]

    def direction(projected: Tensor, suffix: str) -> Tensor:
        z, xBC, dt = projected.split([inner, inner + 2 * d_state, heads], -1)
        kernel = p[f"conv1d{suffix}.weight"][:, 0]
        padded = nn.functional.pad(xBC.T, (kernel.shape[1] - 1, 0)).unfold(1, kernel.shape[1], 1)
        xBC = silu((padded * kernel[:, None]).sum(-1) + p[f"conv1d{suffix}.bias"][:, None]).T
        values, B, C = xBC.split([inner, d_state, d_state], -1)
        dt = softplus(dt + p[f"dt_bias{suffix}"])
        y = scan(values.unflatten(-1, (heads, -1)), dt, -p[f"A_log{suffix}"].exp(), B, C, p[f"D{suffix}"]).flatten(1)
        y = y * silu(z)
        return y * (y.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * p["norm.weight"]

    both = direction(projected, "") + direction(projected.flip(0), "_b").flip(0)
    return linear(both / 2, p["out_proj.weight"])


@torch.no_grad()
def test_ml_mamba(small, tmp_path, monkeypatch):
    theirs = mamba2()
    heads, d_state, depth = 2, 6, 2
    inner, generator = 2 * D_MODEL, torch.Generator().manual_seed(3)
    mixer_sizes = Mamba2Config(d_state=d_state, headdim=inner // heads, chunk_size=16)
    released = PRESETS["ml-mamba-3b"]
    connector = cobra.config.MSCConfig(**{**vars(released.connector), "mixer": mixer_sizes})
    monkeypatch.setitem(PRESETS, "ml-mamba-3b", cobra.CobraConfig(**{**vars(released), "connector": connector}))

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / shape[-1] ** 0.5

    channels, tensors = inner + 2 * d_state, {}
    for number in range(depth):
        shapes = {
            "mixer.in_proj.weight": (inner + channels + heads, D_MODEL), "mixer.norm.weight": (inner,),
            "mixer.out_proj.weight": (D_MODEL, inner), "norm.weight": (D_MODEL,), "norm.bias": (D_MODEL,),
            **{f"mlp.w{k}.weight": (D_MODEL, D_MODEL) for k in (1, 2, 3)},
            **{f"mlp.w{k}.bias": (D_MODEL,) for k in (1, 2, 3)},
        }  # fmt: skip
        for end in ("", "_b"):
            shapes |= {f"mixer.conv1d{end}.weight": (channels, 1, 4), f"mixer.conv1d{end}.bias": (channels,)}
            shapes |= {f"mixer.{name}{end}": (heads,) for name in ("dt_bias", "A_log", "D")}
        tensors |= {f"layers.{number}.{name}": random(*shape) for name, shape in shapes.items()}
    tensors |= {"norm_f.weight": random(D_MODEL), "norm_f.bias": random(D_MODEL)}
    first, projector = randomise(nn.Linear(WIDTH, D_MODEL)), randomise(Projector(D_MODEL))
    parts = {
        "mlp": {"0.weight": first.weight, "0.bias": first.bias}, "bidirectional_mamba": tensors,
        "projector": projector.state_dict(), "llm_backbone": as_released(theirs, ""),
    }  # fmt: skip
    source = tmp_path / "ml-mamba"
    files = write(source, settings("small-mamba2"), parts, folder=".")
    cobra.convert.convert(source, tmp_path / "out", towers=files)
    model = cobra.load(tmp_path / "out", dtype="float32")
    assert model.config.connector == connector
    pixels = torch.rand(2, 3, SIDE, SIDE, generator=generator)
    expected = []
    for x in gelu(first(features(pixels, files))):
        for number in range(depth):
            prefix = f"layers.{number}."
            p = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
            mixer = {name.removeprefix("mixer."): t for name, t in p.items() if name.startswith("mixer.")}
            x = x + bidirectional(mixer, x, heads, d_state)
            inside = layer_norm(x, (D_MODEL,), p["norm.weight"], p["norm.bias"])
            w1, w2 = (linear(inside, p[f"mlp.w{k}.weight"], p[f"mlp.w{k}.bias"]) for k in (1, 2))
            x = x + linear(silu(w1) * w2, p["mlp.w3.weight"], p["mlp.w3.bias"])
        expected.append(projector(layer_norm(x, (D_MODEL,), tensors["norm_f.weight"], tensors["norm_f.bias"])))
    found = model.encode_images(pixels)
    assert_close("image tokens", found, torch.stack(expected), 1e-4)
    ours, wanted = logits_of(model, theirs, found[0], torch.arange(5, 20))
    assert_close("logits", ours, wanted, 1e-4)


class PEG(nn.Module):
    """MobileVLM's: a depthwise convolution beside what it sees, on a square of tokens (n, side * side, D_MODEL)."""

    def __init__(self) -> None:
        super().__init__()
        self.peg = nn.Sequential(nn.Conv2d(D_MODEL, D_MODEL, 3, 1, 1, groups=D_MODEL))

    def forward(self, x: Tensor) -> Tensor:
        side = int(x.shape[1] ** 0.5)
        map_ = x.mT.unflatten(-1, (side, side))
        return (self.peg(map_) + map_).flatten(2).mT


@pytest.mark.parametrize("kind", ["mlp2x_gelu", "linear", "ldpnetv2"])
@torch.no_grad()
def test_llava_and_mobilevlm(tmp_path, monkeypatch, kind):
    is_mobile = kind == "ldpnetv2"
    tower = TimmEncoderConfig(name=TOWERS[0])
    monkeypatch.setitem(llava.TOWERS, "small", (tower, 64))
    theirs = llama_of_transformers()
    if kind == "linear":
        projector = randomise(nn.Linear(192, D_MODEL))
        tensors = projector.state_dict()
    else:
        mlp = randomise(nn.Sequential(nn.Linear(192, D_MODEL), nn.GELU(), nn.Linear(D_MODEL, D_MODEL)))
        peg = randomise(PEG())
        tensors = mlp.state_dict()
        if is_mobile:
            tensors = {f"mlp.mlp.{name}": t for name, t in tensors.items()}
            tensors |= {f"peg.{name}": t for name, t in peg.state_dict().items()}

        def projector(x: Tensor) -> Tensor:
            x = mlp(x)
            if not is_mobile:
                return x
            pooled = nn.functional.adaptive_avg_pool2d(x.mT.unflatten(-1, (4, 4)), (2, 2))
            return peg(pooled.flatten(2).mT)

    config = {
        **theirs.config.to_dict(), "model_type": "mobilevlm" if is_mobile else "llava", "mm_projector_type": kind,
        "mm_vision_tower": "small", "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
        "mm_hidden_size": 192, "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True,
        "image_aspect_ratio": "pad", "freeze_mm_mlp_adapter": False, "image_grid_pinpoints": None,
    }  # fmt: skip
    source = tmp_path / "llava"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    state = {**theirs.state_dict(), **{f"model.mm_projector.{name}": t for name, t in tensors.items()}}
    torch.save(state, source / "pytorch_model.bin")
    train_tokenizer(source / "tokenizer.json", specials=("<s>", "</s>"))
    made = timm.create_model(TOWERS[0], pretrained=False, num_classes=0, img_size=64).eval()
    torch.save(made.state_dict(), tmp_path / "tower.pth")
    conversion = cobra.convert.convert(source, tmp_path / "out", towers=[tmp_path / "tower.pth"])
    assert conversion.layout.name == ("MobileVLM V2" if is_mobile else "LLaVA-1.5")
    model = cobra.load(tmp_path / "out", dtype="float32")
    assert model.config.template == "vicuna_v1" and model.config.image.resize == "letterbox"
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(made.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    (patches,) = made.get_intermediate_layers((pixels - mean) / std, n={len(made.blocks) - 2})
    found = model.encode_images(pixels)
    assert_close("image tokens", found, projector(patches), 1e-5)
    ours, wanted = logits_of(model, theirs, found[0], torch.arange(5, 20))
    assert_close("logits", ours, wanted, 1e-4)


@pytest.mark.parametrize("mode", ["2d", "1d"])
@pytest.mark.parametrize("is_first", [False, True], ids=["later names", "first names"])
@torch.no_grad()
def test_longllava(tmp_path, monkeypatch, capsys, is_first, mode):
    monkeypatch.setitem(llava.TOWERS, "openai/small-tower", (TimmEncoderConfig(name=TOWERS[0]), 64))
    theirs = jamba()
    theirs.save_pretrained(tmp_path / "jamba")
    state = load_file(tmp_path / "jamba" / "model.safetensors")
    state = first_jamba_names(state, lambda index: index % 2 == 0) if is_first else state
    mlp = randomise(nn.Sequential(nn.Linear(192, D_MODEL), nn.GELU(), nn.Linear(D_MODEL, D_MODEL)))
    state |= {f"model.mm_projector.{name}": tensor for name, tensor in mlp.state_dict().items()}
    state["model.vision_tower.vision_tower.vision_model.post_layernorm.weight"] = torch.ones(192)  # of a frozen tower
    config = {
        **json.loads((tmp_path / "jamba" / "config.json").read_text()), "model_type": "llava_jamba", "n_ctx": 262144,
        "mm_vision_tower": "./models/small_tower", "mm_projector_type": "mlp2x_gelu", "resamplePooling": mode,
        "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_patch_merge_type": "flat",
        "mm_hidden_size": 192, "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True,
        "image_aspect_ratio": "pad", "tune_mm_mlp_adapter": False, "tokenizer_padding_side": "right",
        "tokenizer_model_max_length": 40960, "mm_projector_lr": None, "freeze_mm_mlp_adapter": False,
    }  # fmt: skip
    source = tmp_path / "longllava"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(config))
    torch.save(state, source / "pytorch_model.bin")
    train_tokenizer(source / "tokenizer.json", specials=("<|startoftext|>", "<|endoftext|>"))
    made = timm.create_model(TOWERS[0], pretrained=False, num_classes=0, img_size=64).eval()
    torch.save(made.state_dict(), tmp_path / "tower.pth")
    out = tmp_path / "out"
    arguments = ["convert", str(source), str(out), "--tower", str(tmp_path / "tower.pth")]
    assert main([*arguments, "--dry-run"]) == 0 and not out.exists()
    assert main(arguments) == 0
    assert "LongLLaVA" in capsys.readouterr().out
    model = cobra.load(out, dtype="float32")
    assert (model.config.template, model.config.image.resize) == ("longllava", "letterbox")
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(made.pretrained_cfg[key]).view(3, 1, 1) for key in ("mean", "std"))
    (patches,) = made.get_intermediate_layers((pixels - mean) / std, n={len(made.blocks) - 2})
    if mode == "2d":  # of a 4 x 4 map the means of 2 x 2 cells
        pooled = patches.unflatten(1, (2, 2, 2, 2)).mean((2, 4)).flatten(1, 2)
    else:  # of four cells in a row those in the middle
        pooled = patches.unflatten(1, (4, 4))[:, :, 1:3].mean(2)
    found = model.encode_images(pixels)
    assert_close("image tokens", found, mlp(pooled), 1e-5)
    ours, wanted = logits_of(model, theirs, found[0], torch.arange(5, 20))
    assert_close("logits", ours, wanted, 1e-4)
    picture = cobra.image.Image.fromarray(torch.zeros(64, 80, 3, dtype=torch.uint8).numpy())
    assert isinstance(model.answer("What?", images=[cobra.Video([picture] * 2)], max_new_tokens=3), str)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resamplePooling": None}, "resamplePooling is missing"),
        ({"resamplePooling": "3d"}, "unknown resamplePooling"),
        ({"mm_projector_type": "linear"}, "mm_projector_type is 'linear'"),
        ({"mm_vision_tower": "google/siglip-so400m-patch14-384"}, "unknown mm_vision_tower"),
        ({"mm_use_im_start_end": True}, "mm_use_im_start_end is True"),
        ({"mm_patch_merge_type": "unpad"}, "mm_patch_merge_type is 'unpad'"),
    ],
)
def test_what_longllava_is_not_is_named(changes, message):
    lm = {"model_type": "llava_jamba", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": ROWS}
    values = {
        **lm, "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_projector_type": "mlp2x_gelu",
        "resamplePooling": "2d", **changes,
    }  # fmt: skip
    with pytest.raises(UserError, match=message):
        longllava.LONGLLAVA.whole(longllava.LONGLLAVA.read_config(cobra.convert.Options(values, "config.json")), values)


@pytest.mark.parametrize(("preset", "lm"), [("longllava-9b", "jamba-9b"), ("longllava-a13b", "jamba-v0.1")])
def test_longllavas_own_ids_lead_to_the_presets(preset, lm):
    _, values, parameters = RELEASED[lm]
    values = {
        **values, "model_type": "llava_jamba", "mm_vision_tower": "./models/clip_vit_large_patch14_336",
        "mm_projector_type": "mlp2x_gelu", "resamplePooling": "2d", "mm_vision_select_layer": -2,
        "image_aspect_ratio": "pad",
    }  # fmt: skip
    options = cobra.convert.Options(values, "config.json")
    found = longllava.LONGLLAVA.read_config(options)
    options.close()
    assert longllava.LONGLLAVA.whole(found, values) == PRESETS[preset]
    assert count_parts(PRESETS[preset])["lm"] == parameters


def test_llavas_own_ids_lead_to_the_preset():
    values = {
        "model_type": "llava", "hidden_act": "silu", "hidden_size": 4096, "image_aspect_ratio": "pad",
        "image_grid_pinpoints": None, "freeze_mm_mlp_adapter": False, "freeze_mm_vision_resampler": False,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_length": 4096, "max_position_embeddings": 4096,
        "mm_hidden_size": 1024, "mm_projector_type": "mlp2x_gelu", "mm_resampler_type": None,
        "mm_use_im_patch_token": False, "mm_use_im_start_end": False, "mm_vision_select_feature": "patch",
        "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip-vit-large-patch14-336",
        "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 32, "pad_token_id": 0,
        "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False,
        "torch_dtype": "float16", "tune_mm_mlp_adapter": False, "tune_mm_vision_resampler": False,
        "unfreeze_mm_vision_tower": False, "use_cache": True, "use_mm_proj": True, "vocab_size": 32000,
    }  # fmt: skip
    options = cobra.convert.Options(values, "config.json")
    lm = llava.LLAVA.read_config(options)
    options.close()
    assert llava.LLAVA.whole(lm, values) == PRESETS["llava-1.5"]


@pytest.mark.parametrize("preset", ["cobra-3b", "ml-mamba-3b"])
def test_the_released_ids_lead_to_the_presets(preset):
    llm = {"cobra-3b": "mamba-2.8b-zephyr", "ml-mamba-3b": "mamba2-2.7b"}[preset]
    values = settings(llm, vision_backbone_id="dinosiglip-vit-so-384px")
    layout = {"cobra-3b": prismatic.COBRA, "ml-mamba-3b": prismatic.ML_MAMBA}[preset]
    lm = layout.read_config(cobra.convert.Options(values, "config.json"))
    found = layout.whole(lm, values)
    assert found == PRESETS[preset]
    # Published: 47,789,568; 5,573,120 + 119.8 million + 58,997,760.
    expected = {"cobra-3b": 47_789_568, "ml-mamba-3b": 5_573_120 + 119_834_560 + 58_997_760}[preset]
    assert count_parts(found)["connector"] == expected


@pytest.mark.parametrize(
    ("message", "llm", "changes", "spoil"),
    [
        ("0 tower files for 2 pretrained towers", "small-mamba", {}, {}),
        ("llm_backbone_id", "mamba-9b", {}, {}),
        ("vision_backbone_id", "small-mamba", {"vision_backbone_id": "dino"}, {}),
        ("arch_specifier is 'mlp'", "small-mamba", {"arch_specifier": "mlp"}, {}),
        ("image_resize_strategy", "small-mamba", {"image_resize_strategy": "stretch"}, {}),
        ("missing projector.projector.4.bias", "small-mamba", {}, {"projector.4.bias": None}),
        ("unexpected projector.projector.5", "small-mamba", {}, {"projector.5": torch.zeros(1)}),
    ],
)
def test_what_does_not_fit_is_one_line(small, tmp_path, capsys, message, llm, changes, spoil):
    projector = {**Projector(WIDTH).state_dict(), **spoil}
    projector = {name: tensor for name, tensor in projector.items() if tensor is not None}
    parts = {"projector": projector, "llm_backbone": as_released(mamba1(tie_word_embeddings=True), "llm.")}
    source = tmp_path / "cobra+3b"
    write(source, settings(llm, **changes), parts)
    with pytest.raises(UserError, match=message):
        plan(source)
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and not (tmp_path / "out").exists()
