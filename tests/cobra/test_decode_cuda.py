"""Decoding in the kernels of csrc/cuda: when a graph is recorded and replayed, and what is refused. That the
steps are right is test_decode.py, which takes these kernels where they are there."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cobra.lm import LanguageModel, LMConfig, decode_cuda
from cobra.lm.decode import Decoder
from cobra.lm.mamba2 import Mamba2, Mamba2Config
from cobra.lm.precision import Projection, RMSNorm
from cobra.lm.state import SSM_SCALE, State
from tests.cobra.decode_ways import assert_same_state, decode, fresh, model_of, plain_decode, random_ids
from tests.tolerance import assert_close
from tests.vision_scan.cuda.loaded import EMULATED, in_any_order_of_threads, needs_kernels

DEVICE = "cpu" if EMULATED else "cuda"
NATIVE = torch.ops.vision_scan_cuda
pytestmark = [needs_kernels, pytest.mark.usefixtures("one_thread")]


@pytest.fixture
def recorded(monkeypatch) -> list[int]:
    """Of each graph the number of its kernels; on a CPU a list of the kernels stands for it."""
    calls, record = [], decode_cuda.record

    def spy(step):
        launches = step.launches
        calls.append(len(launches))
        return (lambda: [kernel() for kernel in launches]) if EMULATED else record(step)

    monkeypatch.setattr(decode_cuda, "record", spy)
    monkeypatch.setattr(decode_cuda, "can_record", lambda device: True)
    return calls


def even() -> LanguageModel:
    return fresh("even mamba2").to(DEVICE)


def columns(model, batch: int, count: int) -> list[Tensor]:
    return [random_ids(model, batch, 1, seed=seed).to(DEVICE) for seed in range(count)]


@pytest.mark.parametrize(("batch", "kernels"), [(1, 2 * 3 + 1), (9, 2 * 6 + 2)])
def test_a_graph_is_recorded_for_the_second_step_of_a_state_and_replayed(recorded, batch, kernels):
    model = even()
    ids = columns(model, batch, 5)
    expected, expected_state = plain_decode(model, ids)
    logits, state = decode(model, ids)
    assert recorded == [kernels]
    assert_close("logits", torch.cat(logits, 1), torch.cat(expected, 1))
    assert_same_state(state, expected_state)
    kept = [part.clone() for part in logits]
    decode(model, ids, state)
    assert recorded == [kernels] and all(map(torch.equal, logits, kept))  # results are not overwritten


def test_each_state_has_a_graph_of_its_own(recorded):
    model = even()
    ids = columns(model, 1, 4)
    expected, expected_state = plain_decode(model, ids)
    one, other = model.allocate_state(1), model.allocate_state(1)
    for part in ids:  # in turn
        (found,), one = decode(model, [part], one)
        (again,), other = decode(model, [part], other)
        assert torch.equal(found, again)
    assert_close("logits", found, expected[-1])
    assert_same_state(one, expected_state)
    assert_same_state(other, expected_state)
    assert len(recorded) == 2


def test_graphs_do_not_keep_states_alive(recorded, monkeypatch):
    monkeypatch.setattr(decode_cuda, "MOST_GRAPHS", 2)
    model = even()
    states = [model.allocate_state(1) for _ in range(4)]
    for state in states:
        decode(model, columns(model, 1, 3), state)
    native = Decoder(model)._native
    for state in states:
        for part in columns(model, 1, 3):
            hidden = model.embedding(part).detach().float()
            native.step(hidden, [t for layer in state.layers for t in layer.values()], state.lengths, None, 1)
    assert len(native._graphs) == 2
    assert all(not step.launches for step, _ in native._graphs.values())


@torch.no_grad()
def test_a_state_of_8_bits_stays_near_that_of_float32():
    """What benchmarks/gpu.sh measures; the scale of a row of the state follows its decay."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        layers = (Mamba2Config(d_state=16, headdim=16),) * 2
        model = LanguageModel(LMConfig(d_model=64, vocab_size=300, layers=layers)).to(DEVICE)
    ids = columns(model, 3, 12)
    state = model.allocate_state(3)
    layers = []
    for layer in state.layers:
        codes = torch.zeros_like(layer["ssm"], dtype=torch.int8)
        layers.append(
            {"conv": layer["conv"].clone(), "ssm": codes, SSM_SCALE: layer["ssm"].new_zeros(codes.shape[:3])}
        )
    compact, decoder = State(layers, state.lengths, {}), Decoder(model)
    for part in ids:
        expected, state = model(part, state=state, overwrite_state=True)
        found, compact = decoder.step(model.embedding(part).float(), compact, None, 1)
        assert_close("logits", found, expected, 0.05)
    assert not torch.equal(found, expected)
    for layer, exact in zip(compact.layers, state.layers, strict=True):
        assert_close("state", layer["ssm"] * layer[SSM_SCALE][..., None], exact["ssm"], 0.05)
    del layers[-1][SSM_SCALE]
    with pytest.raises(ValueError, match="state ssm must be"):
        decoder.step(model.embedding(ids[0]).float(), compact, None, 1)


def put(name: str, change):
    """A change that replaces a parameter's or module's data."""

    def apply(model):
        owner, _, leaf = name.rpartition(".")
        owner = model.get_submodule(owner)
        setattr(owner, leaf, change(getattr(owner, leaf)))

    return apply


def swap_data(model):
    model.lm_head.weight.data = 1.5 * model.lm_head.weight.data


CHANGES = {
    "weights in place": lambda model: [p.mul_(1.3) for p in model.parameters()],
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "float16": lambda model: model.to(torch.float16),
    "a parameter": put("layers.0.mixer.A_log", lambda old: nn.Parameter(0.5 * old)),
    "its data": swap_data,
    "a norm": put("norm_f", lambda _: RMSNorm(136, eps=0.5).to(DEVICE)),
    "a mixer": put("layers.0.mixer", lambda old: Mamba2(old.config, 136).to(DEVICE)),
    "another projection": put("layers.0.mixer.out_proj", lambda _: Projection(272, 136).to(DEVICE)),
    "a head in another layout": put("lm_head.weight", lambda old: nn.Parameter((2 * old).mT.contiguous().mT)),
    "a head with a bias": put("lm_head", lambda _: nn.Linear(136, 40).to(DEVICE)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_graphs_follow_changes_of_the_model(change, recorded):
    model = even()
    ids = columns(model, 1, 4)
    before, state = decode(model, ids)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        CHANGES[change](model)
    state = state if model.dtype == torch.float32 else model.allocate_state(1)
    start = state.clone()
    logits, state = decode(model, ids, state)
    expected, expected_state = plain_decode(model, ids, start)
    ratio = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}[model.dtype]
    assert not torch.equal(logits[-1], before[-1])
    assert_close("logits", torch.cat(logits, 1), torch.cat(expected, 1), ratio)
    assert_same_state(state, expected_state, ratio)


def test_other_kinds_of_layers_are_left_to_themselves(taken):
    for name in ("hybrid", "mamba1", "attention"):
        model = copy.deepcopy(model_of(name)).to(DEVICE)
        ids = columns(model, 2, 2)
        assert_close(name, decode(model, ids)[0][-1], model(torch.cat(ids, 1))[0][:, -1:])
    assert not taken


def at(index: int, change):
    return lambda call: call["states"].__setitem__(index, change(call["states"][index]))


def given(**values):
    return lambda call: call.update(values)


def offset(t: Tensor) -> Tensor:
    return torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)


SPOILT = {
    "2 axes": (given(hidden=torch.zeros(2, 136)), "hidden must have 3 axes, got 2"),
    "float64": (given(hidden=torch.zeros(2, 1, 136).double()), "hidden must be torch.float32"),
    "d_model": (given(hidden=torch.zeros(2, 1, 135)), r"must have shape \[135\], got \[136\]"),
    "keep 2": (given(keep=2), "keep must be from 1 to seqlen 1, got 2"),
    "real as numbers": (given(real=torch.ones(2)), "real must be torch.bool"),
    "a state less": (lambda call: call["states"].pop(), "expected 4 states, .* got 3"),
    "conv in bfloat16": (at(0, Tensor.bfloat16), "state conv must be torch.float32"),
    "conv of less": (at(0, lambda t: t[:, 1:].clone()), "state conv must have shape"),
    "the last ssm strided": (at(3, lambda t: t.mT.contiguous().mT), "state ssm must be contiguous"),
    "the last ssm in bfloat16": (at(3, Tensor.bfloat16), "state ssm must be torch.float32"),
    "the last ssm misaligned": (at(3, offset), "state ssm must begin at a multiple of 16 bytes"),
    "rows": (at(3, lambda t: t[:1].clone()), "state ssm must have shape"),
}  # fmt: skip


@pytest.mark.parametrize("case", SPOILT)
@torch.no_grad()
def test_a_step_checks_before_it_changes_anything(case):
    model = even()
    state = model.allocate_state(2)
    call = {
        "hidden": torch.ones(2, 1, 136), "states": [t for layer in state.layers for t in layer.values()],
        "starts": state.lengths, "real": None, "keep": 1,
    }  # fmt: skip
    states = list(call["states"])
    change, message = SPOILT[case]
    change(call)
    call = {k: v.to(DEVICE) if isinstance(v, Tensor) else v for k, v in call.items()}
    with pytest.raises(ValueError, match=message):
        Decoder(model)._native.step(**call)
    assert not any(t.any() for t in states)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 8])
@pytest.mark.parametrize(("columns", "group", "outputs"), [(2560, 2560, 40), (32, 16, 17), (136, 68, 300)])
def test_project_against_float64(rows, columns, group, outputs, dtype):
    """Its sums are as good as float32's, with tokens rounded to the weight's dtype."""
    noise = torch.Generator().manual_seed(0)
    x, gate = (torch.randn(rows, 2, columns, generator=noise).to(DEVICE) for _ in range(2))
    norm = torch.randn(columns, generator=noise).to(DEVICE)
    weight = torch.randn(outputs, columns, generator=noise).to(DEVICE, dtype)

    def project() -> list[Tensor]:
        y = torch.ones(rows, 1, outputs, device=DEVICE)
        NATIVE.project(
            x, 1, norm, 1e-5, group, None, weight, y, True, None, None, None, 0, None, False
        )  # the last token of two
        both = torch.empty(rows // 2, 2, outputs, device=DEVICE)
        NATIVE.project(
            x[: rows // 2], 2, norm, 1e-5, group, gate[: rows // 2], weight, both, False, None, None, None, 0,
            None, False,
        )  # fmt: skip
        return [y, both]

    y, both = in_any_order_of_threads(project)
    wide = (
        nn.functional.rms_norm(x.double().unflatten(-1, (-1, group)), (group,), eps=1e-5).flatten(-2) * norm
    )
    tokens = (wide[:, 1:].to(torch.float32).to(dtype)).double()
    ratio = 1e-6 if dtype == torch.float32 else 3e-4  # a few tokens lie between two numbers of the dtype
    assert_close("y", y, 1 + tokens @ weight.double().T, ratio)
    gated = (wide * nn.functional.silu(gate.double()))[: rows // 2].to(torch.float32).to(dtype).double()
    assert_close("gated", both, gated @ weight.double().T, ratio)


def test_a_step_of_the_size_of_mamba2_130m_in_bfloat16(recorded):
    """Sizes at which every warp has columns of its own and blocks take several outputs."""
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        config = LMConfig(d_model=768, vocab_size=300, layers=(Mamba2Config(),))
        model = LanguageModel(config).to(DEVICE, torch.bfloat16)
    ids = columns(model, 1, 3)
    logits, state = decode(model, ids)
    expected, expected_state = plain_decode(model, ids)
    assert_close("logits", torch.cat(logits, 1), torch.cat(expected, 1), 1e-2)
    assert_same_state(state, expected_state, 1e-2)
