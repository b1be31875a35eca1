"""Twins: as many parameters, as many bytes of state, and the same laws."""

import copy
import dataclasses

import pytest
import torch

import cobra
from cobra.config import PRESETS, TINY_ATTENTION
from cobra.cost import LMCost
from cobra.lm import LanguageModel, LMConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from cobra.twins import hybrid_twin, transformer_twin, window_twin
from tests.tolerance import assert_close
from vision_scan.errors import UserError

# Size in the names of twins -> whose they are.
MODELS = {
    "tiny": "tiny",
    **{size: f"mamba2-{size}" for size in ("130m", "370m", "780m", "1.3b", "2.7b")},
    "3b": "cobra-3b",
}
KINDS = ("transformer", "window", "hybrid")


def count(lm: LMConfig) -> int:
    """Parameters of the model itself, not by formula."""
    with torch.device("meta"):
        return sum(p.numel() for p in LanguageModel(lm).parameters())


def held(lm: LMConfig, dtype: torch.dtype, context: int = 1) -> int:
    """Bytes that a row's state takes, as allocated."""
    with torch.device("meta"):
        return LanguageModel(lm).to(dtype).allocate_state(1, context).nbytes


def attention_of(lm: LMConfig) -> AttentionConfig:
    (found,) = {layer for layer in lm.layers if layer.kind == "attention"}
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", MODELS)
def test_twins_differ_only_in_their_layers_and_hardly_in_parameters(size, kind):
    ours, theirs = PRESETS[MODELS[size]], PRESETS[f"{kind}-{size}"]
    assert dataclasses.replace(theirs, lm=ours.lm) == ours
    assert dataclasses.replace(theirs.lm, layers=ours.lm.layers) == ours.lm
    counts = count(theirs.lm), count(ours.lm)
    assert abs(counts[0] - counts[1]) / counts[1] < 0.002
    tables = ours.lm.vocab_size * ours.lm.d_model
    layers = [number - tables for number in counts]
    assert abs(layers[0] - layers[1]) / layers[1] < 0.002  # not only because embeddings outweigh all
    attention = attention_of(theirs.lm)
    assert attention.num_heads * attention.headdim >= ours.lm.d_model
    assert attention.num_kv_heads < attention.num_heads and attention.rope_theta is not None


@pytest.mark.parametrize("size", MODELS)
def test_the_transformer_and_the_window_differ_in_the_window_alone(size):
    full, window = PRESETS[f"transformer-{size}"].lm, PRESETS[f"window-{size}"].lm
    assert [layer.kind for layer in full.layers] == ["attention", "mlp"] * (len(full.layers) // 2)
    assert attention_of(full).window is None and attention_of(window).window > 1
    layers = (dataclasses.replace(x, window=None) if x.kind == "attention" else x for x in window.layers)
    assert tuple(layers) == full.layers


@pytest.mark.parametrize("size", MODELS)
def test_every_fourth_layer_of_a_hybrid_is_attention(size):
    ours, hybrid = PRESETS[MODELS[size]].lm, PRESETS[f"hybrid-{size}"].lm
    kind = ours.layers[0].kind
    assert [layer.kind for layer in hybrid.layers] == [*[kind] * 3, "attention", "mlp"] * (len(ours.layers) // 4)
    assert {layer for layer in hybrid.layers if layer.kind == kind} == set(ours.layers)
    assert attention_of(hybrid) == attention_of(PRESETS[f"transformer-{size}"].lm)


@pytest.mark.parametrize("size", MODELS)
def test_a_full_window_holds_as_many_bytes_as_the_state(size):
    ours, window = PRESETS[MODELS[size]].lm, PRESETS[f"window-{size}"].lm
    dtype, other = torch.bfloat16, torch.float32
    if size == "tiny":
        dtype, other = other, dtype
    state, cache = held(ours, dtype), held(window, dtype)
    layers = tuple(
        dataclasses.replace(layer, window=layer.window + 1) if layer.kind == "attention" else layer
        for layer in window.layers
    )
    assert cache <= state < held(dataclasses.replace(window, layers=layers), dtype)
    assert cache / state > 0.98
    assert held(window, dtype, context=10**6) == cache  # at any length
    # Only a cache is halved by a narrower dtype, so a window cannot match in both.
    assert (held(window, other) > held(ours, other)) == (size != "tiny")


@torch.no_grad()
def test_bytes_match_in_a_state_that_has_read():
    ids = torch.randint(384, (3, 70), generator=torch.Generator().manual_seed(0))
    states = {name: cobra.build(name, seed=0).lm(ids)[1].nbytes / 3 for name in ("tiny", "window-tiny", "hybrid-tiny")}
    for name, found in states.items():
        assert found == LMCost(PRESETS[name].lm).state_bytes(70, 4)
    per_token = 3 * (2 * 4 * 32 * 4 + 8)  # 3 layers of 4 heads of 32 keys and values, and the position
    assert states["tiny"] - per_token < states["window-tiny"] <= states["tiny"]
    assert states["hybrid-tiny"] == 3 / 4 * states["tiny"] + 70 * (2 * 4 * 32 * 4 + 8)


def test_tiny_twins_have_the_attention_that_learns_looking_up():
    assert attention_of(PRESETS["hybrid-tiny"].lm) == TINY_ATTENTION
    assert dataclasses.replace(attention_of(PRESETS["window-tiny"].lm), window=None) == TINY_ATTENTION


@pytest.mark.parametrize("d_model", [64, 96, 192, 320, 1024])
@pytest.mark.parametrize("headdim", [16, 32])
@pytest.mark.parametrize("pairs", [None, 4])
def test_twins_of_any_width(d_model, headdim, pairs):
    lm = LMConfig(d_model=d_model, vocab_size=300, layers=(Mamba2Config(headdim=16, d_state=64),) * 6)
    attention = AttentionConfig(num_heads=d_model // headdim, num_kv_heads=1, headdim=headdim)
    twins = [transformer_twin(lm, attention, pairs), window_twin(lm, attention, pairs), hybrid_twin(lm, attention)]
    for twin in twins:
        assert abs(count(twin) - count(lm)) / count(lm) < 0.03
    assert [layer.kind for layer in twins[2].layers] == [*["mamba2"] * 3, "attention", "mlp", *["mamba2"] * 2]


@pytest.mark.parametrize("activation_bytes", [2, 4])
@pytest.mark.parametrize("recurrence", [Mamba1Config(d_state=5), Mamba2Config(d_state=40, headdim=8, ngroups=2)])
def test_windows_of_any_recurrence_and_dtype(recurrence, activation_bytes):
    dtype = {2: torch.bfloat16, 4: torch.float32}[activation_bytes]
    lm = LMConfig(d_model=48, vocab_size=30, layers=(recurrence, MLPConfig(d_ff=50)) * 3)
    attention = AttentionConfig(num_heads=3, num_kv_heads=1, headdim=10, window=5)
    twin = window_twin(lm, attention, 2, activation_bytes)
    spare = held(lm, dtype) - held(twin, dtype)
    assert 0 <= spare < 2 * (2 * 10 * activation_bytes + 8)
    assert attention_of(twin).window != 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["window-tiny", "hybrid-tiny"])
@torch.no_grad()
def test_decoding_far_past_the_window_is_one_forward(name, dtype):
    """In place, as generation does: in float32 by the compiled decoder, in float64 by the layers."""
    lm = copy.deepcopy(cobra.build(name, seed=0).lm).to(dtype)
    ids = torch.randint(384, (2, 131), generator=torch.Generator().manual_seed(1))
    expected, _ = lm(ids)
    for begun in (1, 47, 48, 49, 100):  # around the window of 48, and far beyond it
        logits, state = lm(ids[:, :begun])
        parts = [logits]
        for token in ids[:, begun:].split(1, dim=1):
            logits, state = lm(token, state=state, overwrite_state=True)
            parts.append(logits)
        ratio = 1e-10 if dtype == torch.float64 else 1e-4
        assert_close(f"{name}, {begun} read at once", torch.cat(parts, 1), expected, ratio)
        assert state.lengths.tolist() == [131, 131]


@torch.no_grad()
def test_a_window_forgets_what_the_state_may_keep():
    """Three layers of 48 reach 3 * 47 tokens back; a hybrid sees all."""
    ids = torch.randint(384, (1, 200), generator=torch.Generator().manual_seed(2))
    changed = ids.clone()
    changed[0, 20] = (ids[0, 20] + 1) % 384
    for name, reach in (("window-tiny", 20 + 3 * 47), ("hybrid-tiny", 199)):
        lm = copy.deepcopy(cobra.build(name, seed=0).lm).double()
        moved = (lm(changed)[0] - lm(ids)[0])[0].norm(dim=-1)
        assert moved[20] > 0 and moved[reach] > 0 and not moved[:20].any() and not moved[reach + 1 :].any()


MAMBA2 = LMConfig(d_model=64, vocab_size=9, layers=(Mamba2Config(d_state=8),) * 4)
WRONG = {
    "a hybrid of three layers": (
        lambda: hybrid_twin(dataclasses.replace(MAMBA2, layers=MAMBA2.layers[:3])), "every 4th layer.*has 3"
    ),
    "attention larger than the layer": (
        lambda: hybrid_twin(MAMBA2, AttentionConfig(num_heads=64, num_kv_heads=64)), "leaves none .*fewer or smaller"
    ),
    "a window for a growing state": (lambda: window_twin(hybrid_twin(MAMBA2)), "grows with the context"),
    "a window for float64": (lambda: window_twin(MAMBA2, activation_bytes=8), "8 must be 2 .* or 4"),
    "a state smaller than a token": (
        lambda: window_twin(
            LMConfig(d_model=64, vocab_size=9, layers=(Mamba2Config(d_state=1, expand=1, headdim=1, d_conv=1),) * 2),
            AttentionConfig(num_heads=1, num_kv_heads=1, headdim=64),
            activation_bytes=4,
        ),
        "holds no token's keys",
    ),
}  # fmt: skip


@pytest.mark.parametrize("wrong", WRONG)
def test_mistakes_are_named(wrong):
    call, told = WRONG[wrong]
    with pytest.raises(UserError, match=told) as caught:
        call()
    assert "\n" not in str(caught.value)
