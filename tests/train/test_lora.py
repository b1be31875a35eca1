"""Adapters: that every one of them counts, and that merging changes nothing."""

import copy
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cobra
from cobra.checkpoint import named_tensors
from cobra.config import PRESETS
from cobra.connector import CONNECTORS
from cobra.lm import LAYERS, LMConfig
from cobra.model import Cobra
from cobra.quantize import QuantizedLinear, quantize
from tests.cobra.lm_ways import D_MODEL, check
from tests.cobra.lm_ways import small as small_layer
from tests.cobra.test_connector import small as small_connector
from tests.tolerance import assert_close
from tests.train.small_run import small_config
from train import lora
from train.optim import build_optimizer, parameter_groups
from train.settings import LoraSettings, LrScale, OptimSettings
from vision_scan.errors import UserError

PARTS = ("connector", "lm")
PROJECTIONS = {
    "mamba1": {"in_proj", "x_proj", "dt_proj", "out_proj"},
    "mamba2": {"in_proj", "out_proj"},
    "gated_deltanet": {"in_proj", "out_proj"},
    "mamba3": {"in_proj", "out_proj"},
    "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "mlp": {"gate_proj", "up_proj", "down_proj"},
}
PROJECTIONS["gated_conv"] = PROJECTIONS["mamba2"]
PROJECTIONS["moe"] = PROJECTIONS["mlp"]
PROJECTIONS["parallel"] = PROJECTIONS["mamba2"] | PROJECTIONS["attention"] | PROJECTIONS["mlp"]
PROJECTIONS["shared_attention"] = PROJECTIONS["parallel"] | {"proj", "q", "k", "v", "gate_up"}
INITS = ("default", "pissa")


def small_model(layer: str = "mamba1", connector: str = "mlp") -> Cobra:
    """Two layers of a kind, that are read by one connector."""
    lm = LMConfig(d_model=D_MODEL, vocab_size=300, layers=(small_layer(layer),) * 2)
    config = replace(PRESETS["tiny"], lm=lm, connector=small_connector(connector))
    return cobra.build(config, seed=3).train()


def with_adapters(model: Cobra, learned: bool = True, parts: tuple = PARTS, **settings: Any) -> Cobra:
    """The model, with adapters that are no longer as they were at the start."""
    lora.inject(model, LoraSettings(**{"rank": 3, **settings}), parts, seed=0)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(1)
        for name, parameter in model.named_parameters():
            if learned and ".lora_" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


def test_without_adapters_is_the_model_that_they_were_put_into() -> None:
    model = small_model()
    before = logits(model)
    with_adapters(model)
    learns = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    after = logits(model)
    with pytest.raises(ZeroDivisionError), lora.without_adapters(model):
        assert torch.equal(logits(model), before)
        assert learns == {name: parameter.requires_grad for name, parameter in model.named_parameters()}
        _ = 1 / 0
    assert torch.equal(logits(model), after) and not torch.equal(before, after)


def batch(model: Cobra) -> dict[str, Tensor]:
    """A picture, and ten tokens."""
    noise = torch.Generator().manual_seed(0)
    ids = torch.full((1, model.config.tokens_per_tile + 10), model.tokenizer.image_id)
    ids[:, -10:] = torch.randint(200, (1, 10), generator=noise)
    image = model.config.image
    pixels = torch.rand(1, 3, image.height, image.width, generator=noise)
    labels = torch.where(ids == model.tokenizer.image_id, -100, ids)
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels}


def logits(model: Cobra) -> Tensor:
    """Of the whole model, (1, seqlen, vocab_size)."""
    inputs = batch(model)
    with torch.no_grad():
        return model.lm(inputs_embeds=model.embed(inputs["input_ids"], inputs["pixel_values"]))[0]


def factors(model: torch.nn.Module, leaf: str) -> Iterator[tuple[str, Any]]:
    """What the adapters' names end with, "lora_B.default.weight", by projection."""
    for name, parameter in model.named_parameters():
        if name.endswith(f".{leaf}.default.weight"):
            yield name.removesuffix(f".{leaf}.default.weight"), parameter


def assert_each_counts(model: Cobra, part: str, kinds: set[str]) -> None:
    """Every adapter of a part has a gradient, and a change of it alone changes the output."""
    model.loss(batch(model))[0].backward()
    found = set()
    for leaf in ("lora_A", "lora_B"):
        for name, factor in factors(getattr(model, part), leaf):
            assert factor.grad.abs().max() > 0, (name, leaf)
            found.add(lora._kind(f"{part}.{name}"))
    assert found == kinds
    before = logits(model)
    for name, factor in factors(getattr(model, part), "lora_B"):
        kept = factor.detach().clone()
        with torch.no_grad():
            factor.zero_()
            assert (logits(model) - before).abs().max() > 1e-7, name
            factor.copy_(kept)


@pytest.mark.parametrize("kind", LAYERS)
def test_every_projection_of_a_layer_learns_and_counts(kind: str) -> None:
    model = with_adapters(small_model(layer=kind), parts=("lm",))
    assert_each_counts(model, "lm", PROJECTIONS[kind])
    trained = {name for name, parameter in model.lm.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, _ in model.lm.named_parameters() if ".lora_" in name}
    assert all(parameter.requires_grad for parameter in model.connector.parameters())


@pytest.mark.parametrize("kind", CONNECTORS)
def test_every_projection_of_a_connector_learns_and_counts(kind: str) -> None:
    model = with_adapters(small_model(connector=kind), parts=("connector",))
    names = lora._projections(model, "connector")
    assert_each_counts(model, "connector", {lora._kind(name) for name in names} - {"dt_projs"})
    assert all(parameter.requires_grad for parameter in model.lm.parameters())


@pytest.mark.parametrize("kind", LAYERS)
@torch.no_grad()
def test_steps_read_what_one_shot_reads(kind: str) -> None:
    """The compiled steps know nothing of adapters, and have been made for the model without them."""
    model = small_model(layer=kind).eval()
    state = model.lm.allocate_state(1, 8)
    tokens = torch.tensor([[5]])
    plain, _ = model.lm(tokens, state=state.clone(), overwrite_state=True)
    with_adapters(model, parts=("lm",)).eval()
    changed, _ = model.lm(tokens, state=state.clone(), overwrite_state=True)
    assert (changed - plain).abs().max() > 1e-3
    for way in ("steps overwritten", "packed", "padded left"):
        check(model.lm, way, 1e-4)


@torch.no_grad()
def test_adapter_of_dt_changes_the_product_and_not_the_bias() -> None:
    model = small_model()
    mixer = model.lm.layers[0].mixer
    u = torch.randn(2, mixer.d_inner, 7, generator=torch.Generator().manual_seed(0))
    low = mixer.x_proj(u.transpose(1, 2))[..., : mixer.dt_rank]
    before, bias = mixer._scan_inputs(u)[0], mixer.dt_proj.bias
    assert_close("dt", before.transpose(1, 2), low @ mixer.dt_proj.weight.T)
    with_adapters(model, parts=("lm",), targets=("dt_proj",))
    layer = mixer.dt_proj
    change = layer.scaling["default"] * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    assert_close("dt", (mixer._scan_inputs(u)[0] - before).transpose(1, 2), low @ change.T)
    assert mixer._scan_parameters()["dt_bias"] is bias
    model.to(torch.bfloat16)
    assert layer.base_layer.bias.dtype == mixer.A_log.dtype == torch.float32
    assert layer.base_layer.weight.dtype == layer.lora_A["default"].weight.dtype == torch.bfloat16


@pytest.mark.parametrize("init", INITS)
@pytest.mark.parametrize("layer", LAYERS)
def test_merged_model_is_the_unmerged_one(layer: str, init: str) -> None:
    plain = small_model(layer=layer)
    adapted = with_adapters(copy.deepcopy(plain), init=init)
    merged = lora.merged_tensors(adapted)
    assert merged.keys() == named_tensors(plain).keys()
    before = logits(plain)
    cobra.checkpoint.assign_tensors(plain, merged, "the merged tensors")
    assert (logits(plain) - before).abs().max() > 1e-3
    assert_close("logits", logits(plain), logits(adapted), ratio=1e-5)
    assert lora.merged_tensors(plain).keys() == merged.keys()  # without adapters nothing changes


@pytest.mark.parametrize("init", INITS)
def test_adapted_model_begins_as_the_model_without(init: str) -> None:
    plain = small_model()
    before, tensors = logits(plain), {name: t.detach().clone() for name, t in named_tensors(plain).items()}
    drawn = torch.get_rng_state()
    adapted = with_adapters(plain, learned=False, init=init)
    assert torch.equal(torch.get_rng_state(), drawn)
    torch.testing.assert_close(logits(adapted), before, rtol=1e-4, atol=1e-5)
    for name, tensor in lora.merged_tensors(adapted).items():
        torch.testing.assert_close(tensor, tensors[name], rtol=0, atol=1e-6)


def test_power_iterations_keep_the_model_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lora, "MOST_EXACT", 0)
    plain = small_model()
    adapted = with_adapters(copy.deepcopy(plain), learned=False, init="pissa")
    assert adapted.peft_config["default"].init_lora_weights == "pissa_niter_16"
    torch.testing.assert_close(logits(adapted), logits(plain), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_pissa_takes_the_strongest_directions() -> None:
    model = small_model(layer="mlp")
    whole = model.lm.layers[0].mixer.up_proj.weight.detach().clone()
    layer = with_adapters(model, learned=False, init="pissa", alpha=6.0).lm.layers[0].mixer.up_proj
    U, S, V = torch.linalg.svd(whole)
    strongest = U[:, :3] @ S[:3].diag() @ V[:3]
    assert layer.scaling["default"] == 2
    product = 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    torch.testing.assert_close(product, strongest, rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight, whole - strongest, rtol=0, atol=1e-5)
    assert torch.equal(layer.initial_A, layer.lora_A["default"].weight)
    assert layer.initial_A.data_ptr() != layer.lora_A["default"].weight.data_ptr()


@pytest.mark.parametrize("init", INITS)
def test_rank_is_at_most_the_shorter_side(init: str) -> None:
    model = small_model()
    assert model.lm.layers[0].mixer.dt_rank == 1
    expected = logits(model)
    with_adapters(model, learned=False, init=init, rank=200, alpha=100.0)
    for name, A in factors(model, "lora_A"):
        layer = model.get_submodule(name)
        rank = min(200, *layer.base_layer.weight.shape)
        assert A.shape == (rank, layer.in_features) and layer.lora_B["default"].weight.shape == (
            layer.out_features,
            rank,
        )
        assert layer.scaling["default"] == pytest.approx(0.5)
    torch.testing.assert_close(logits(model), expected, rtol=1e-3, atol=1e-4)


def test_adapter_that_others_put_on_the_head_counts_in_the_loss() -> None:
    import peft

    model = small_model()
    peft.inject_adapter_in_model(peft.LoraConfig(r=2, target_modules=["lm_head"], init_lora_weights=False), model)
    hidden, targets = torch.randn(5, D_MODEL), torch.arange(5)
    expected = F.cross_entropy(model.lm.logits(hidden), targets, reduction="sum")
    loss = model.lm.loss(hidden, targets)
    assert torch.equal(loss, expected)
    loss.backward()
    assert model.lm.lm_head.lora_A["default"].weight.grad.abs().max() > 0


@torch.no_grad()
def test_quantised_projections_keep_their_adapters() -> None:
    model = with_adapters(small_model(layer="mlp"), parts=("lm",)).eval()
    exact = logits(model)
    quantize(model, "int8")
    assert isinstance(model.lm.layers[0].mixer.up_proj.base_layer, QuantizedLinear)
    quantised = logits(model)
    assert_close("logits", quantised, exact, ratio=0.05)
    for _, factor in factors(model, "lora_B"):
        factor.zero_()
    assert (logits(model) - quantised).norm() > 0.1 * exact.norm()
    check(model.lm, "steps overwritten", 1e-4)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
@pytest.mark.parametrize("init", INITS)
def test_adapters_have_groups_of_their_own_that_adamw_takes(kind: str, init: str) -> None:
    holder = torch.nn.Module()
    holder.model = with_adapters(small_model(), init=init)
    settings = OptimSettings(kind=kind, weight_decay=0.1, lr_scale=LrScale(connector=0.5))
    groups = {group["name"]: group for group in parameter_groups(holder, settings)}
    for part, scale in (("connector", 0.5), ("lm", 1.0)):
        group = groups[f"{part}, LoRA"]
        assert {id(p) for p in group["params"]} == {
            id(p) for name, p in getattr(holder.model, part).named_parameters() if ".lora_" in name
        }
        assert (group["lr_scale"], group["muon"]) == (scale, False)
        assert group["weight_decay"] == (0 if init == "pissa" else 0.1)
    others = {name for name in groups if not name.endswith("LoRA")}
    assert others and all(name.startswith("vision_encoder") for name in others)
    build_optimizer(holder, settings).step()


def test_targets_choose_projections_by_name() -> None:
    model = with_adapters(small_model(), targets=("x_proj", "proj"))
    assert {lora._kind(name) for name, _ in factors(model, "lora_A")} == {"x_proj", "proj"}
    with pytest.raises(UserError, match=r"lora.targets 'q_proj';.* allowed: proj, in_proj, x_proj, dt_proj, out_proj$"):
        with_adapters(small_model(), targets=("q_proj",))
    with pytest.raises(UserError, match=r"lora.targets 'lm_head'; allowed: in_proj"):
        with_adapters(small_model(), parts=("lm",), targets=("lm_head",))
    bare = small_model()
    bare.connector = torch.nn.Identity()
    with pytest.raises(UserError, match=r"lora.parts=connector have no projection"):
        with_adapters(bare, parts=("connector",))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rank": -1}, r"lora.rank: got -1, allowed: 0 or more"),
        ({"alpha": 0.0}, r"lora.alpha: got 0.0, allowed: more than 0, or none"),
        ({"dropout": 1.0}, r"lora.dropout: got 1.0, allowed: 0 to below 1"),
        ({"dropout": 0.1, "init": "pissa"}, r"lora.dropout: got 0.1, allowed with lora.init=pissa: 0"),
        ({"parts": ()}, r"lora.parts: got none"),
    ],
)
def test_settings_that_mean_nothing_are_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        LoraSettings(**changes)


def test_frozen_parts_get_no_adapters(data: Path) -> None:
    config = small_config(data, "train.freeze=connector", "lora.rank=2")
    assert lora.adapted_parts(config) == ("lm",)
    assert lora.adapted_parts(small_config(data)) == ()
    with pytest.raises(UserError, match=r"lora.parts=connector are all in train.freeze=connector"):
        lora.adapted_parts(small_config(data, "train.freeze=connector", "lora.rank=2", "lora.parts=connector"))


def test_missing_peft_is_named_with_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"lora.rank=3 needs peft: pip install 'cobra-vlm\[train\]'"):
        with_adapters(small_model())


def test_plan_says_what_is_covered() -> None:
    model = with_adapters(small_model(layer="mlp", connector="vss_mlp"), targets=("up_proj", "mlp"))
    first, *lines = lora.describe(model, LoraSettings(rank=3), PARTS)
    found = {tuple(line.split()[:2]): line.split("parameters")[1].strip() for line in lines}
    assert found["lm", "gate_proj"] == found["connector", "dt_projs"] == "without adapters"
    assert found["lm", "up_proj"] == f"{2 * 3 * (D_MODEL + 24):,} in adapters"
    sizes = {name: linear.weight.numel() for part in PARTS for name, linear in lora._projections(model, part).items()}
    covered = sum(size for name, size in sizes.items() if lora._kind(name) in ("up_proj", "mlp"))
    assert f"adapters on {covered / sum(sizes.values()):.1%} of the projections' parameters" in first
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    everything = sum(p.numel() for p in model.parameters())
    assert f"{learning:,} of {everything:,} parameters learn ({learning / everything:.2%})" in first
