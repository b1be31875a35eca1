"""Law 3: what must be float32 is float32 in the forward pass itself, whatever the model's dtype."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import cobra
import vision_scan
from cobra.config import PRESETS
from cobra.connector import MSCConfig, MSCConnector
from cobra.lm import LanguageModel, LMConfig, stack
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from cobra.lm.precision import RMSNorm
from tests.tolerance import assert_close
from vision_scan.precision import LayerNorm

MIXER = Mamba2Config(d_state=5, headdim=8, chunk_size=16)
LAYERS = (MIXER, AttentionConfig(num_heads=2, num_kv_heads=1, headdim=8), MLPConfig(d_ff=24), MIXER)
HALVES = [torch.bfloat16, torch.float16]

CASTS = {
    "to(bfloat16)": lambda module: module.to(torch.bfloat16),
    "to(device, dtype)": lambda module: module.to(device="cpu", dtype=torch.bfloat16),
    "bfloat16()": nn.Module.bfloat16,
    "half()": nn.Module.half,
    "type(bfloat16)": lambda module: module.type(torch.bfloat16),
    "half, then back by way of bfloat16": lambda module: module.half().bfloat16(),
    "inside another module": lambda module: nn.Sequential(module).bfloat16()[0],
    "copied": lambda module: copy.deepcopy(module).bfloat16(),
}


@pytest.fixture
def lm() -> LanguageModel:
    torch.manual_seed(0)
    return LanguageModel(LMConfig(d_model=16, vocab_size=29, layers=LAYERS))


@pytest.fixture
def connector() -> MSCConnector:
    torch.manual_seed(0)
    return MSCConnector(MSCConfig(mixer=MIXER), 12, 16)


def must_be_wide(module: nn.Module) -> set[str]:
    """The full names of decays, skips, step biases, and of every parameter of a norm."""
    norms = (RMSNorm, LayerNorm, nn.LayerNorm, nn.RMSNorm, nn.GroupNorm)
    return {
        f"{prefix}.{name}".lstrip(".")
        for prefix, owner in module.named_modules()
        for name, _ in owner.named_parameters(recurse=False)
        if name in ("A_log", "D", "dt_bias") or isinstance(owner, norms)
    }


def assert_wide(module: nn.Module, dtype: torch.dtype) -> None:
    wide = must_be_wide(module)
    for name, parameter in module.named_parameters():
        assert parameter.dtype == (torch.float32 if name in wide else dtype), name


def test_the_list_of_wide_parameters_is_complete(lm, connector):
    assert must_be_wide(lm) == {
        "norm_f.weight",
        *(f"layers.{i}.norm.weight" for i in range(4)),
        *(f"layers.{i}.mixer.{name}" for i in (0, 3) for name in ("A_log", "D", "dt_bias", "norm.weight")),
    }
    block = "blocks.0"
    assert must_be_wide(connector) == {
        *(f"{block}.mixer.{name}" for name in ("A_log", "D", "dt_bias", "norm.weight")),
        *(f"{norm}.{name}" for norm in (f"{block}.pre_norm", f"{block}.norm", "norm_f")
          for name in ("weight", "bias")),
    }  # fmt: skip


@pytest.mark.parametrize("cast", CASTS)
def test_casts_to_half_precision_leave_them_in_float32(lm, connector, cast):
    for module in (lm, connector):
        values = {name: p.detach().clone() for name, p in module.named_parameters()}
        result = CASTS[cast](module)
        assert_wide(result, torch.float16 if cast == "half()" else torch.bfloat16)
        for name in must_be_wide(result):
            assert torch.equal(result.get_parameter(name), values[name]), name


def test_double_makes_them_float64_and_float_brings_them_back(lm, connector):
    for module in (lm, connector):
        assert {p.dtype for p in module.double().parameters()} == {torch.float64}
        assert {p.dtype for p in module.bfloat16().float().parameters()} == {torch.float32}


def test_gradients_are_cast_with_their_parameters(lm):
    lm(torch.tensor([[1, 2, 3]]))[0].sum().backward()
    lm.bfloat16()
    for name, parameter in lm.named_parameters():
        assert parameter.grad.dtype == parameter.dtype, name


def test_tied_embeddings_stay_tied(lm):
    assert lm.bfloat16().lm_head.weight is lm.embedding.weight


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_checkpoint_loaded_in_bfloat16(tmp_path, stored):
    model = cobra.build("tiny", dtype=stored)
    cobra.save(model, tmp_path / "model")
    loaded = cobra.load(tmp_path / "model", dtype="bfloat16")
    for part in (loaded.lm, loaded.connector):
        assert_wide(part, torch.bfloat16)
    a_log = "layers.0.mixer.A_log"
    assert torch.equal(loaded.lm.get_parameter(a_log), model.lm.get_parameter(a_log))


def test_a_checkpoint_that_stores_them_in_bfloat16_is_widened(tmp_path):
    """As others write Mamba-2 checkpoints."""
    cobra.save(cobra.build("tiny"), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(weights).items()}, weights)
    loaded = cobra.load(tmp_path / "model", dtype="bfloat16")
    assert_wide(loaded.lm, torch.bfloat16)
    assert_wide(loaded.connector, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@torch.no_grad()
def test_matrix_states_are_float32_or_wider_and_the_rest_has_the_models_dtype(lm, dtype):
    lm.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    ids = torch.tensor([[1, 2, 3]])
    logits, state = lm(ids)
    states = [lm.allocate_state(1), state, lm(ids, state=state)[1]]
    states += [lm(ids[:, :1], state=state.clone(), overwrite_state=True)[1]]
    assert logits.dtype == wide
    for found in states:
        for index in (0, 3):
            assert found.layers[index]["ssm"].dtype == wide
            assert found.layers[index]["conv"].dtype == dtype
        assert {found.layers[1][name].dtype for name in "kv"} == {dtype}


class Spy:
    """Records the tensors that an operator is called with, and what it returns."""

    def __init__(self, monkeypatch, name: str) -> None:
        self.calls: list[tuple[list, dict, object]] = []
        run = getattr(vision_scan, name)

        def record(*args, **kwargs):
            before = copied(args), dict(zip(kwargs, copied(kwargs.values()), strict=True))
            result = run(*args, **kwargs)
            self.calls.append((*before, copied(result) if isinstance(result, tuple) else result.clone()))
            return result

        def copied(values):  # states may be overwritten afterwards
            return [value.clone() if isinstance(value, torch.Tensor) else value for value in values]

        monkeypatch.setattr(vision_scan, name, record)


def read_under(lm, mode: str):
    """A prompt and one more token, in a bfloat16 model or a float32 model under autocast."""
    ids = torch.arange(12)[None]
    if mode == "bfloat16":
        lm.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        _, state = lm(ids)
        _, state = lm(ids[:, :3], state=state)
        return lm(ids[:, :1], state=state, overwrite_state=True)


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_the_scan_gets_A_D_and_dt_bias_in_float32(lm, monkeypatch, mode):
    monkeypatch.setattr(stack, "decoder_for", lambda *call: None)  # layer by layer
    scan, update = Spy(monkeypatch, "ssd"), Spy(monkeypatch, "ssd_update")
    logits, state = read_under(lm, mode)
    assert len(scan.calls) == 4 and len(update.calls) == 2
    for calls, first in ((scan.calls, 0), (update.calls, 1)):
        for args, kwargs, _ in calls:
            x, A = args[first], args[first + 2]
            assert x.dtype == torch.bfloat16  # otherwise there is nothing to be seen here
            assert {A.dtype, kwargs["D"].dtype, kwargs["dt_bias"].dtype} == {torch.float32}
    assert all(args[0].dtype == torch.float32 for args, _, _ in update.calls)
    assert all(kwargs["initial_state"].dtype == torch.float32 for _, kwargs, _ in scan.calls[2:])
    assert all(result[1].dtype == torch.float32 for _, _, result in scan.calls)
    assert state.layers[0]["ssm"].dtype == torch.float32
    assert logits.dtype == torch.float32


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_the_scan_of_the_connector_gets_them_in_float32(connector, monkeypatch, mode):
    scan = Spy(monkeypatch, "ssd_2d")
    features = torch.randn(1, 3, 2, 12)
    if mode == "bfloat16":
        connector.bfloat16()
        features = features.bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode == "autocast"):
        connector(features)
    ((args, _, _),) = scan.calls
    x, _, A, _, _, D, dt_bias = args
    assert x.dtype == torch.bfloat16
    assert {A.dtype, D.dtype, dt_bias.dtype} == {torch.float32}


@pytest.mark.parametrize("mode", ["bfloat16", "autocast"])
def test_the_scan_accumulates_in_float32(lm, monkeypatch, mode):
    """Against the same operator in float64 on the very inputs that it was given."""
    scan, update = Spy(monkeypatch, "ssd"), Spy(monkeypatch, "ssd_update")
    read_under(lm, mode)

    def double(values):
        return [v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in values]

    monkeypatch.undo()
    for args, kwargs, (y, state) in scan.calls:
        kwargs = dict(zip(kwargs, double(kwargs.values()), strict=True))
        exact_y, exact_state = vision_scan.ssd(*double(args), **kwargs)
        assert_close("state", state, exact_state, 1e-6)
        assert_close("y", y, exact_y, 3e-3)  # one rounding to bfloat16
    for args, kwargs, y in update.calls:
        kwargs = dict(zip(kwargs, double(kwargs.values()), strict=True))
        assert_close("y of an update", y, vision_scan.ssd_update(*double(args), **kwargs), 3e-3)


@pytest.mark.parametrize("norm", [RMSNorm, LayerNorm])
@pytest.mark.parametrize("dtype", HALVES)
def test_norms_compute_in_float32(norm, dtype):
    torch.manual_seed(0)
    module = norm(96)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    x = (torch.randn(50, 96) * 20 + 3).to(dtype)
    y = copy.deepcopy(module).to(dtype)(x)
    assert y.dtype == dtype
    exact = copy.deepcopy(module).double()(x.double())
    assert torch.equal(y, exact.to(dtype)) or (y - exact.to(dtype)).count_nonzero() < 5  # ties of rounding


@torch.no_grad()
def test_the_residual_stream_is_float32_in_a_bfloat16_model(lm):
    lm.bfloat16()
    seen = []
    for block in lm.layers:
        block.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0].dtype, output[0].dtype)))
    lm(torch.tensor([[1, 2]]))
    assert seen == [(torch.float32, torch.float32)] * 4


def test_whole_models_keep_the_lists_above():
    """Every wide parameter of the presets is among those tested."""
    model = cobra.build(PRESETS["tiny"], dtype="bfloat16")
    assert_wide(model.lm, torch.bfloat16)
    assert_wide(model.connector, torch.bfloat16)
