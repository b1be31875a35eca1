"""A decoding step in one compiled call against the same step layer by layer."""

import contextlib
import copy
import functools
import gc
import operator
import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from cobra.lm import LanguageModel, LMConfig, State
from cobra.lm.attention import AttentionConfig
from cobra.lm.decode import MOST_ROWS, Decoder
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2, Mamba2Config
from cobra.lm.mixer import UPDATE_TOKENS
from cobra.lm.mlp import MLPConfig
from cobra.lm.precision import RMSNorm
from cobra.lm.stack import Block
from tests.cobra.lm_ways import STACKS, build
from tests.cobra.test_oracles import randomise
from tests.tolerance import RATIO, assert_as_good_as, assert_close
from vision_scan.errors import UserError
from vision_scan.ops.register import MISSING_KERNELS

pytestmark = pytest.mark.skipif("cpu" in MISSING_KERNELS, reason=str(MISSING_KERNELS))

ODD_MAMBA2 = Mamba2Config(d_state=7, headdim=5, expand=1)
GROUPED = Mamba2Config(d_state=9, headdim=3, expand=4, ngroups=2, norm_before_gate=True, dt_limit=(0.1, 0.4))
ODD_MAMBA1 = Mamba1Config(d_state=17, expand=3, dt_rank=3)
ODD_HEADS = AttentionConfig(num_heads=3, num_kv_heads=1, headdim=10)
ODD_WINDOW = AttentionConfig(num_heads=5, num_kv_heads=5, headdim=3, rope_theta=None, window=3)
# Sizes behind no power of two: (d_model, vocabulary, layers, tied).
ODD = {
    "odd mamba2": (15, 31, (ODD_MAMBA2,) * 2, True),
    "odd mamba2 untied": (35, 6, (Mamba2Config(d_state=33, headdim=7, expand=1),) * 2, False),
    "odd groups": (9, 17, (GROUPED,) * 2, True),
    "odd mamba1": (13, 41, (ODD_MAMBA1,) * 2, True),
    "rank one": (7, 1, (Mamba1Config(d_state=1, expand=1),) * 2, False),
    "odd attention": (19, 23, (ODD_HEADS, MLPConfig(d_ff=21), ODD_WINDOW, MLPConfig(d_ff=1)), False),
    "wide mlp": (71, 37, (MLPConfig(d_ff=139),) * 2, True),
    "wide": (69, 50, (Mamba2Config(d_state=40, headdim=23, ngroups=3), Mamba1Config()), False),
}  # fmt: skip
for taps in (1, 2, 3, 4, 5):
    both = (Mamba2Config(d_state=4, headdim=6, d_conv=taps), Mamba1Config(d_conv=taps))
    ODD[f"d_conv {taps}"] = (12, 13, both, True)
NAMES = [*STACKS, *ODD]
BATCHES = [1, 2, 3, 5, 8, 13]


@functools.cache
def model_of(name: str, dtype=torch.float32) -> LanguageModel:
    """A model to be left as it is; `fresh` is one to change."""
    if dtype is not torch.float32:
        return copy.deepcopy(model_of(name)).to(dtype)
    if name in STACKS:
        return build(name)
    d_model, vocab, layers, is_tied = ODD[name]
    config = LMConfig(d_model=d_model, vocab_size=vocab, layers=layers, tie_word_embeddings=is_tied)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = randomise(LanguageModel(config))
    for parameter_name, parameter in model.named_parameters():
        if "proj.weight" in parameter_name:
            parameter.mul_(0.6)  # or float32 has too few digits for a comparison
    return model


def fresh(name: str, dtype=torch.float32) -> LanguageModel:
    return copy.deepcopy(model_of(name, dtype))


def has_attention(model: LanguageModel) -> bool:
    return any(layer.kind == "attention" for layer in model.config.layers)


def random_ids(model: LanguageModel, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def layer_by_layer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cobra.lm.stack.decoder_for", lambda *call: None)
        yield


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sizes here are too small for more, which on busy cores wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """The number of rows of each call that was compiled."""
    calls, step = [], Decoder.step

    def spy(self, hidden, *args):
        calls.append(len(hidden))
        return step(self, hidden, *args)

    monkeypatch.setattr(Decoder, "step", spy)
    return calls


Run = tuple[list[Tensor], State]


@torch.no_grad()
def decode(model, chunks, state=None, **options) -> Run:
    state = model.allocate_state(len(chunks[0])) if state is None else state
    parts = []
    for chunk in chunks:
        logits, state = model(chunk, state=state, overwrite_state=True, **options)
        parts.append(logits)
    return parts, state


def plain_decode(model, chunks, state=None, **options) -> Run:
    with layer_by_layer():
        return decode(model, chunks, state, **options)


def tensors_of(state: State) -> dict[str, Tensor]:
    return {f"{i} {name}": t for i, layer in enumerate(state.layers) for name, t in layer.items()}


def assert_same_state(state: State, expected: State, ratio=RATIO[torch.float32]) -> None:
    assert state.lengths.tolist() == expected.lengths.tolist()
    wanted = tensors_of(expected)
    assert tensors_of(state).keys() == wanted.keys()
    for name, tensor in tensors_of(state).items():
        assert tensor.dtype == wanted[name].dtype
        if tensor.is_floating_point():
            assert_close(name, tensor, wanted[name], ratio)
        else:
            assert torch.equal(tensor, wanted[name]), name


def assert_same_bits(state: State, kept: State) -> None:
    for name, tensor in tensors_of(state).items():
        assert torch.equal(tensor, tensors_of(kept)[name]), name


def some_chunks(model, batch: int) -> list[Tensor]:
    """Tokens of several steps: windows wrap round and caches grow, or steps have several tokens."""
    sizes = [1] * 9 if has_attention(model) else [1, 2, 4, 1, 3]
    return list(random_ids(model, batch, sum(sizes)).split(sizes, dim=1))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_steps_in_float32_are_those_of_the_layers(name, batch, taken):
    model = model_of(name)
    chunks = some_chunks(model, batch)
    logits, state = decode(model, chunks)
    assert taken == [batch] * len(chunks)
    expected, expected_state = plain_decode(model, chunks)
    assert len(taken) == len(chunks)
    assert logits[0].dtype == torch.float32
    assert_close("logits", torch.cat(logits, 1), torch.cat(expected, 1))
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_steps_in_bfloat16_are_as_good_as_the_layers(name, batch, taken):
    model = model_of(name, torch.bfloat16)
    chunks = some_chunks(model, batch)
    logits, state = decode(model, chunks)
    assert taken == [batch] * len(chunks)
    plain, plain_state = plain_decode(model, chunks)
    truth, truth_state = decode(copy.deepcopy(model).double(), chunks)
    assert logits[0].dtype == plain[0].dtype == torch.float32
    results = (torch.cat(parts, 1) for parts in (logits, plain, truth))
    # Logits layer by layer have values of bfloat16, so nothing is lost here.
    found, expected, exact = results
    assert_as_good_as("logits", found.bfloat16(), expected.bfloat16(), exact)
    for key, tensor in tensors_of(state).items():
        if tensor.is_floating_point():
            expected, exact = tensors_of(plain_state)[key], tensors_of(truth_state)[key]
            assert_as_good_as(key, tensor.bfloat16(), expected.bfloat16(), exact)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name in NAMES if not has_attention(model_of(name))])
def test_several_tokens_in_a_step(name, batch, taken):
    model = model_of(name)
    for seqlen in range(2, UPDATE_TOKENS + 1):
        chunks = list(random_ids(model, batch, 2 * seqlen, seed=seqlen).split(seqlen, dim=1))
        logits, state = decode(model, chunks)
        expected, expected_state = plain_decode(model, chunks)
        assert_close(f"{seqlen} tokens", torch.cat(logits, 1), torch.cat(expected, 1))
        assert_same_state(state, expected_state)
    assert len(taken) == 2 * (UPDATE_TOKENS - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*STACKS, "odd mamba1", "odd groups", "odd attention"])
@torch.no_grad()
def test_rows_of_padding_keep_their_bits_and_leave_others_alone(name, dtype, taken):
    model = model_of(name, dtype)
    ids, batch = random_ids(model, 3, 12), 3
    _, state = model(ids[:, :4], state=model.allocate_state(batch, 8))
    for t in range(4, 12):
        one, mask = ids[:, t : t + 1], torch.ones(batch, 1, dtype=torch.int64)
        mask[t % 3] = 0
        kept, unmasked = state.clone(), state.clone()
        logits, state = model(one, state=state, attention_mask=mask, overwrite_state=True)
        expected, unmasked = model(one, state=unmasked, overwrite_state=True)
        assert state.lengths.tolist() == (kept.lengths + mask[:, 0]).tolist()
        real = mask[:, 0].bool()
        assert torch.equal(logits[real], expected[real])
        for key, tensor in tensors_of(state).items():
            assert torch.equal(tensor[real], tensors_of(unmasked)[key][real]), key
            before = tensors_of(kept)[key][~real]
            if tensor.shape == tensors_of(kept)[key].shape:
                assert torch.equal(tensor[~real], before), key
            else:  # a cache that has grown
                assert key.endswith((" k", " v", "position"))
                assert torch.equal(tensor[~real].narrow(-1 if key.endswith("n") else 2, 0, 8), before), key
    assert len(taken) == 16


@pytest.mark.parametrize("keep", [0, 1, 2, 5, 9])
@torch.no_grad()
def test_logits_to_keep_are_the_last(keep, taken):
    model = model_of("odd groups")
    ids = random_ids(model, 3, 5)
    (logits,), state = decode(model, [ids], logits_to_keep=keep)
    (expected,), expected_state = plain_decode(model, [ids])
    assert taken == [3] and logits.shape[1] == min(keep or 5, 5)
    assert_close("logits", logits, expected[:, -keep:])
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_embeddings_given_are_read_and_left_as_they_are(dtype, taken):
    model = model_of("hybrid", dtype)
    embeds = model.embedding(random_ids(model, 2, 1))
    wide = torch.stack([embeds] * 2, -1)[..., 0]  # another layout in memory
    expected, _ = model(random_ids(model, 2, 1), state=model.allocate_state(2), overwrite_state=True)
    for given in (embeds, wide):
        kept = given.clone()
        logits, _ = model(inputs_embeds=given, state=model.allocate_state(2), overwrite_state=True)
        assert torch.equal(logits, expected) and torch.equal(given, kept)
    assert taken == [2] * 3


@pytest.mark.parametrize("batch", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*STACKS, "wide", "odd attention"])
def test_threads_do_not_change_a_bit(name, dtype, batch, taken):
    model, before, runs = model_of(name, dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3) if name == "odd attention" else (1, 2):
            torch.set_num_threads(threads)
            runs.append(decode(model, some_chunks(model, batch)))
    finally:
        torch.set_num_threads(before)
    for logits, state in runs[1:]:
        assert torch.equal(torch.cat(logits, 1), torch.cat(runs[0][0], 1))
        assert_same_bits(state, runs[0][1])
    assert len(taken) == len(runs) * len(runs[0][0])


@pytest.mark.parametrize("name", ["hybrid", "mamba1", "odd attention"])
def test_a_nan_stays_in_its_row(name, taken):
    model = model_of(name)
    ids = [random_ids(model, 3, 1, seed=seed) for seed in range(4)]
    expected, _ = decode(model, ids)
    embeds = [model.embedding(column).clone() for column in ids]
    embeds[1][1, 0, 2] = torch.nan
    state, parts = model.allocate_state(3), []
    with torch.no_grad():
        for part in embeds:
            logits, state = model(inputs_embeds=part, state=state, overwrite_state=True)
            parts.append(logits)
    assert len(taken) == 8
    found, others = torch.cat(parts, 1), [0, 2]
    assert torch.equal(found[others], torch.cat(expected, 1)[others])
    assert found[1, 1:].isnan().all() and torch.equal(found[1, 0], expected[0][1, 0])


@torch.no_grad()
def test_models_side_by_side_and_copies_are_independent(taken):
    one, other = fresh("mamba2"), fresh("mamba1")
    expected, other_expected = decode(one, some_chunks(one, 2)), decode(other, some_chunks(other, 2))
    twin = copy.deepcopy(one)
    first, other_first = one.allocate_state(2), other.allocate_state(2)
    for column, other_column in zip(some_chunks(one, 2), some_chunks(other, 2), strict=True):
        logits, first = one(column, state=first, overwrite_state=True)
        other_logits, other_first = other(other_column, state=other_first, overwrite_state=True)
    assert torch.equal(logits, expected[0][-1]) and torch.equal(other_logits, other_expected[0][-1])
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    chunks = some_chunks(one, 2)
    assert torch.equal(decode(one, chunks)[0][-1], expected[0][-1])
    assert_close("the copy", decode(twin, chunks)[0][-1], plain_decode(twin, chunks)[0][-1])
    assert all(taken)
    gone = weakref.ref(twin)
    del twin, parameter
    gc.collect()
    assert gone() is None  # the compiled form does not keep its model alive


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


@pytest.mark.parametrize("name", ["mamba1", "mamba2"])
def test_states_with_another_layout_in_memory(name, taken):
    model = model_of(name)
    _, state = plain_decode(model, [random_ids(model, 2, 4)])
    layers = [{name: t.mT.contiguous().mT for name, t in layer.items()} for layer in state.layers]
    last = [random_ids(model, 2, 2, seed=1)]
    found, found_state = decode(model, last, State(layers, state.lengths))
    expected, expected_state = plain_decode(model, last, state)
    assert_close("logits", found[0], expected[0])
    assert_same_state(found_state, expected_state)
    assert not taken


def test_more_rows_tokens_or_kinds_than_it_knows(monkeypatch, taken):
    def check(name, *shape):
        ids = random_ids(model_of(name), *shape)
        assert_close(name, decode(model_of(name), [ids])[0][0], model_of(name)(ids)[0])

    check("mamba2", MOST_ROWS + 1, 1)
    check("mamba2", 1, UPDATE_TOKENS + 1)
    check("attention", 2, 2)
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
    assert len(taken) == (2 if place == "embedding" else 1)


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
    "a projection": put("layers.1.mixer.up_proj", lambda _: nn.Linear(16, 24, bias=False)),
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
