"""Which calls are decoded in one compiled call, and which are not: nothing gives other results."""

import copy
import operator

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cobra.lm import LanguageModel, LMConfig, State
from cobra.lm.attention import AttentionConfig
from cobra.lm.decode import MOST_ROWS, Decoder
from cobra.lm.mamba2 import Mamba2
from cobra.lm.precision import Projection, RMSNorm
from cobra.lm.stack import Block
from cobra.quantize import QuantizedLinear
from tests.cobra.decode_ways import (
    assert_same_bits,
    assert_same_state,
    decode,
    fresh,
    model_of,
    plain_decode,
    random_ids,
)
from tests.tolerance import assert_close
from vision_scan.errors import UserError
from vision_scan.ops.register import MISSING_KERNELS

pytestmark = [
    pytest.mark.skipif("cpu" in MISSING_KERNELS, reason=str(MISSING_KERNELS)),
    pytest.mark.usefixtures("one_thread"),
]


UNSERVED = {  # dtype of the model, what is active, options, the error allowed
    "autograd": (torch.float32, torch.enable_grad, {}, 1e-5),
    "float64": (torch.float64, torch.no_grad, {}, 1e-10),
    "float16": (torch.float16, torch.no_grad, {}, 2e-2),
    "autocast": (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16), {}, 1e-1),
    "seq_idx": (torch.float32, torch.no_grad, {"seq_idx": torch.zeros(2, 1, dtype=torch.int64)}, 1e-5),
    "a state to be kept": (torch.float32, torch.no_grad, {"overwrite_state": False}, 1e-5),
}


@pytest.mark.parametrize("case", UNSERVED)
@torch.no_grad()
def test_what_is_not_served_goes_layer_by_layer(case, taken):
    dtype, active, options, ratio = UNSERVED[case]
    model, ids = model_of("hybrid", dtype), random_ids(model_of("hybrid"), 2, 5)
    expected, _ = model_of("hybrid", torch.float64)(ids)
    state, parts = model.allocate_state(2), []
    with active():
        for token in ids.split(1, dim=1):
            logits, state = model(token, state=state, **{"overwrite_state": True, **options})
            parts.append(logits)
    assert_close(case, torch.cat(parts, 1).double(), expected, ratio)
    assert not taken


@pytest.mark.parametrize("weights", ["plain", "int8"])
@torch.no_grad()
def test_biases_and_scaled_positions_go_layer_by_layer(weights, taken):
    model = fresh("biases and scaled positions")
    if weights != "plain":
        for name in ("q_proj", "k_proj", "v_proj"):
            mixer = model.layers[0].mixer
            setattr(mixer, name, QuantizedLinear.of(getattr(mixer, name), weights))
    ids = random_ids(model, 2, 9)
    parts, _ = decode(model, ids.split(1, dim=1))
    assert_close(weights, torch.cat(parts, 1), model(ids)[0])
    assert not taken


@pytest.mark.parametrize("name", ["gated attention", "mamba1 norms", "mamba2 options"])
@torch.no_grad()
def test_what_the_kernels_do_not_know_goes_layer_by_layer(name, taken):
    model = fresh(name)
    ids = random_ids(model, 2, 9)
    parts, _ = decode(model, ids.split(1, dim=1))
    assert_close(name, torch.cat(parts, 1), model(ids)[0])
    assert not taken


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_states_with_another_layout_in_memory(name):
    model = model_of(name)
    _, state = plain_decode(model, [random_ids(model, 2, 4)])
    layers = [{name: t.mT.contiguous().mT for name, t in layer.items()} for layer in state.layers]
    last = [random_ids(model, 2, 2, seed=1)]
    found, found_state = decode(model, last, State(layers, state.lengths))
    expected, expected_state = plain_decode(model, last, state)
    assert_close("logits", found[0], expected[0])
    assert_same_state(found_state, expected_state)


def test_more_rows_tokens_or_kinds_than_it_knows(monkeypatch, taken):
    def check(name, *shape):
        model = fresh(name)
        ids = random_ids(model, *shape)
        assert_close(name, decode(model, [ids])[0][0], model(ids)[0])

    check("mamba2", MOST_ROWS + 1, 1)
    check("mamba2", 1, MOST_ROWS + 1)
    check("attention", 2, 2)
    check("gated_deltanet", 2, 1)
    monkeypatch.delattr(Mamba2, "add_to")
    check("hybrid", 2, 1)
    assert not taken


@pytest.mark.parametrize("place", ["layers.1", "layers.0.mixer.out_proj", "norm_f", "embedding"])
def test_hooks_are_called(place, taken):
    model, calls = fresh("mamba2"), []
    ids = [random_ids(model, 2, 1)]
    expected = decode(model, ids)[0][0]
    model.get_submodule(place).register_forward_hook(lambda *call: calls.append(place))
    assert_close("logits", decode(model, ids)[0][0], expected)
    assert calls
    assert len(taken) == 1


class Half(nn.Module):
    def forward(self, x):
        return x / 2


class HalfLinear(nn.Linear):
    def forward(self, x):
        return super().forward(x) / 2


def put(path: str, make, *args, **options):
    """A change that sets an attribute to make(what is there now)."""

    def change(model):
        owner, _, name = path.rpartition(".")
        owner = operator.attrgetter(owner)(model) if owner else model
        setattr(owner, name, make(getattr(owner, name), *args, **options))

    return change


def change_all(model):
    for parameter in model.parameters():
        parameter.mul_(1.3)


def load(model, **options):
    model.load_state_dict({key: 1.1 * value for key, value in model.state_dict().items()}, **options)


def halve_by_parametrization(model):
    parametrize.register_parametrization(model.layers[0].mixer.in_proj, "weight", Half())


FOLLOWED = {
    "weights in place": change_all,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "bfloat16 and back": lambda model: model.to(torch.bfloat16).to(torch.float32),
    "a parameter": put("layers.0.mixer.in_proj.weight", lambda old: nn.Parameter(1.5 * old)),
    "its data": put("lm_head.weight.data", lambda old: 1.5 * old),
    "a tied head": lambda model: put("lm_head.weight", lambda _: model.embedding.weight)(model),
    "a norm": put("norm_f", lambda _: RMSNorm(16, eps=0.5)),
    "a projection": put("layers.1.mixer.up_proj", lambda _: Projection(16, 24)),
    "a mixer": put("layers.0.mixer", lambda old: Mamba2(old.config, 16)),
    "a block": lambda model: put("layers.2", lambda old: Block(old.mixer.config, model.config))(model),
    "load_state_dict": load,
    "load_state_dict, assigned": lambda model: load(model, assign=True),
}
UNKNOWN = {  # served or not, the results have to be right
    "a head with a bias": put("lm_head", lambda _: nn.Linear(16, 29)),
    "a projection that does more": put("layers.0.mixer.out_proj", lambda _: HalfLinear(32, 16, bias=False)),
    "a projection of another kind": put("layers.0.mixer.out_proj", lambda old: nn.Sequential(old, Half())),
    "a norm of another kind": put("layers.0.norm", lambda _: nn.Identity()),
    "a weight in another layout": put("lm_head.weight.data", lambda old: (2 * old).mT.contiguous().mT),
    "a parametrised weight": halve_by_parametrization,
}


@pytest.mark.parametrize("change", [*FOLLOWED, *UNKNOWN])
def test_changes_of_the_model_are_followed(change, taken):
    model = fresh("hybrid")
    ids = [random_ids(model, 2, 1)]
    before = decode(model, ids)[0][0]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        {**FOLLOWED, **UNKNOWN}[change](model)
    (logits,), state = decode(model, ids)
    (expected,), expected_state = plain_decode(model, ids)
    ratio = 3e-2 if model.dtype == torch.bfloat16 else 1e-5
    assert not torch.equal(logits, before)
    assert_close("logits", logits, expected, ratio)
    assert_same_state(state, expected_state, ratio)
    assert change in UNKNOWN or len(taken) == 2


@torch.no_grad()
def test_what_a_parametrised_weight_is_made_of_is_followed():
    model = fresh("hybrid")
    halve_by_parametrization(model)
    ids = [random_ids(model, 2, 1)]
    decode(model, ids)
    model.layers[0].mixer.in_proj.parametrizations.weight.original.mul_(2)
    assert_close("logits", decode(model, ids)[0][0], plain_decode(model, ids)[0][0])


def windowed(window: int | None) -> LanguageModel:
    layer = AttentionConfig(num_heads=2, num_kv_heads=1, headdim=6, window=window)
    return LanguageModel(LMConfig(d_model=16, vocab_size=29, layers=(layer,)))


@pytest.mark.parametrize("name", ["mamba1", "mamba2", "attention", "mlp", 3, 7])
@pytest.mark.parametrize(
    "other", ["mamba1", "mamba2 ngroups 2", "attention", "mlp", "hybrid", "rows", 5, None]
)
@torch.no_grad()
def test_a_state_of_another_model_is_the_callers_mistake(name, other):
    """Numbers are windows, None a cache of everything."""
    model = model_of(name) if isinstance(name, str) else windowed(name)
    made = (
        model if other in (name, "rows") else model_of(other) if isinstance(other, str) else windowed(other)
    )
    state = made.allocate_state(3 if other in (name, "rows") else 2, 9)
    kept = copy.deepcopy(state)
    with pytest.raises(UserError, match="the state"):
        model(random_ids(model, 2, 1), state=state, overwrite_state=True)
    assert_same_bits(state, kept)


def native_call() -> tuple[LanguageModel, dict]:
    """A step of the hybrid, whose states are conv, ssm of layer 0, then k, v, position of layer 2, ..."""
    model = fresh("hybrid")
    layers = model.allocate_state(2, 4).layers
    starts = torch.zeros(2, dtype=torch.int64)
    states = [tensor for layer in layers for tensor in layer.values()]
    return model, {
        "hidden": torch.ones(2, 1, 16),
        "states": states,
        "starts": starts,
        "real": None,
        "keep": 1,
    }


def given(name: str, value):
    return lambda call: call.update({name: value})


def at(index: int, change):
    return lambda call: call["states"].__setitem__(index, change(call["states"][index]))


SPOILT = {
    "2 axes": (given("hidden", torch.zeros(2, 16)), "hidden must have 3 axes, got 2"),
    "float64": (given("hidden", torch.zeros(2, 1, 16).double()), "hidden must be Float, got Double"),
    "d_model": (given("hidden", torch.zeros(2, 1, 15)), r"norm.weight must have shape \[15\], got \[16\]"),
    "strided": (given("hidden", torch.zeros(2, 1, 32)[..., ::2]), "hidden must be contiguous"),
    "two tokens": (given("hidden", torch.zeros(2, 2, 16)), "one token at a time, got 2"),
    "starts": (given("starts", torch.zeros(1).long()), r"starts must have shape \[2\], got \[1\]"),
    "int32 starts": (given("starts", torch.zeros(2).int()), "starts must be Long, got Int"),
    "real as numbers": (given("real", torch.ones(2)), "real must be Bool, got Float"),
    "real of more": (given("real", torch.ones(3).bool()), r"real must have shape \[2\], got \[3\]"),
    "keep 0": (given("keep", 0), "keep must be from 1 to seqlen 1, got 0"),
    "keep 2": (given("keep", 2), "keep must be from 1 to seqlen 1, got 2"),
    "a state less": (lambda call: call["states"].pop(), "got only 14 states"),
    "a state more": (lambda call: call["states"].append(torch.zeros(1)), "expected 15 states, got 16"),
    "conv in bfloat16": (at(0, Tensor.bfloat16), "convolution's state, weight and bias must have one dtype"),
    "conv in float64": (at(0, Tensor.double), "conv must be Float, got Double"),
    "conv of less": (at(0, lambda t: t[:, 1:].clone()), r"must have shape \[2, 42, 3\], got \[2, 41, 3\]"),
    "ssm in bfloat16": (at(1, Tensor.bfloat16), "ssm must be Float, got BFloat16"),
    "ssm strided": (at(1, lambda t: t.mT.contiguous().mT), "ssm must be contiguous"),
    "k of other heads": (at(2, lambda t: t[:, :1].clone()), "k must have shape"),
    "k of 3 axes": (at(2, lambda t: t[0]), "k must have 4 axes, got 3"),
    "v of more slots": (at(3, lambda t: torch.cat([t, t], 2)), "v must have shape"),
    "v in bfloat16": (at(3, Tensor.bfloat16), "one dtype"),
    "int32 positions": (at(4, Tensor.int), "position must be Long, got Int"),
    "the last state": (at(-1, lambda t: t[:1].clone()), "ssm must have shape"),
}  # fmt: skip
SPOILT_WEIGHTS = {
    "lm_head": (Tensor.double, "lm_head must be Float, got Double"),
    "norm_f": (lambda t: t[1:].clone(), r"norm_f.weight must have shape \[16\], got \[15\]"),
    "layers.7.mixer.out_proj": (lambda t: t[:, 1:].clone(), r"out_proj must have shape \[16, 32\], got"),
    "layers.1.mixer.down_proj": (Tensor.half, "down_proj must be Float, got Half"),
}


@pytest.mark.parametrize("case", [*SPOILT, *SPOILT_WEIGHTS])
def test_the_compiled_step_checks_before_it_changes_anything(case):
    model, call = native_call()
    native, states, hidden = Decoder(model)._native, list(call["states"]), call["hidden"].clone()
    kept = [tensor.clone() for tensor in states]
    change, message = {**SPOILT, **SPOILT_WEIGHTS}[case]
    if case in SPOILT:
        change(call)
    else:
        weight = model.get_submodule(case).weight
        weight.data = change(weight.data)
    with pytest.raises(ValueError, match=message):
        native.step(*call.values())
    assert all(map(torch.equal, states, kept))
    assert case in SPOILT or torch.equal(call["hidden"], hidden)
