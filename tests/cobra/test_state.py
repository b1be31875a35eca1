import errno
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cobra.lm import LanguageModel, LMConfig, State
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from tests.tolerance import assert_close
from vision_scan.errors import UserError

MAMBA2 = Mamba2Config(d_state=5, headdim=8, chunk_size=4)
GQA = AttentionConfig(num_heads=4, num_kv_heads=2, headdim=8)
WINDOW = AttentionConfig(num_heads=2, num_kv_heads=1, headdim=8, window=5)
HYBRID = (MAMBA2, MLPConfig(d_ff=24), GQA, WINDOW)


def build(layers, dtype=torch.float32) -> LanguageModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LanguageModel(LMConfig(d_model=16, vocab_size=29, layers=layers))
    return model.to(dtype).requires_grad_(False)


def ids(batch: int, seqlen: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(29, (batch, seqlen), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def model() -> LanguageModel:
    return build(HYBRID)


@pytest.fixture
def state(model) -> State:
    """Of three rows that have read 4, 9 and 6 tokens."""
    mask = torch.zeros(3, 9)
    for row, length in enumerate((4, 9, 6)):
        mask[row, -length:] = 1
    _, state = model(ids(3, 9), attention_mask=mask)
    state.info.update(num_tokens=[4, 9, 6], turn="open", nested={"a": [1, None, True, 0.5, "é"]})
    return state


def flat(state: State) -> dict[str, torch.Tensor]:
    return {f"{i}.{name}": t for i, layer in enumerate(state.layers) for name, t in layer.items()}


def assert_equal(found: State, expected: State) -> None:
    assert torch.equal(found.lengths, expected.lengths)
    assert found.info == expected.info
    assert flat(found).keys() == flat(expected).keys()
    for name, tensor in flat(found).items():
        assert tensor.dtype == flat(expected)[name].dtype, name
        assert torch.equal(tensor, flat(expected)[name]), name


def held_bytes(state: State) -> int:
    """Bytes of memory that the tensors keep alive, not only those that they show."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in flat(state).values()}
    return sum(storages.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [(MAMBA2,) * 2, (MAMBA2, WINDOW)], ids=["mamba2", "with a window"])
def test_nbytes_do_not_grow_with_the_text(layers, dtype):
    model = build(layers, dtype)
    expected = model.allocate_state(2).nbytes
    assert expected > 0
    for seqlen in (1, 2, 7, 300):
        _, state = model(ids(2, seqlen))
        assert state.nbytes == expected, seqlen
        _, state = model(ids(2, 9), state=state)
        assert state.nbytes == expected, seqlen
        _, state = model(ids(2, 1), state=state, overwrite_state=True)
        assert state.nbytes == expected, seqlen


@pytest.mark.parametrize("layers", [(MAMBA2,), (GQA,), (WINDOW,)], ids=["mamba2", "attention", "window"])
def test_nbytes_are_what_a_state_keeps_in_memory(layers):
    """A tail that is a view of its whole prompt would keep the prompt alive."""
    model = build(layers)
    for batch, seqlen in ((1, 200), (3, 20), (2, 50)):
        _, state = model(ids(batch, seqlen))
        assert held_bytes(state) <= 1.3 * state.nbytes, (batch, seqlen)
        _, state = model(ids(batch, 100), state=state)
        assert held_bytes(state) <= 1.3 * state.nbytes, (batch, seqlen)


def test_nbytes_by_hand():
    state = build((MAMBA2, WINDOW, GQA), torch.bfloat16).allocate_state(3, capacity=11)
    # d_inner 32 in 4 heads of 8, d_state 5; 32 + 2 * 5 channels of the convolution.
    mamba2 = 4 * 8 * 5 * 4 + (32 + 10) * 3 * 2
    window = 5 * (2 * 1 * 8 * 2 + 8)
    gqa = 11 * (2 * 2 * 8 * 2 + 8)
    assert state.nbytes == 3 * (mamba2 + window + gqa)
    assert state.batch == 3


def test_clone_shares_nothing(model, state):
    copy = state.clone()
    assert_equal(copy, state)
    kept = state.clone()
    for tensor in flat(copy).values():
        tensor.fill_(7)
    copy.lengths += 1
    copy.info["nested"]["a"].append("more")
    copy.info["turn"] = "closed"
    assert_equal(state, kept)
    assert kept.info["nested"]["a"] == [1, None, True, 0.5, "é"]


def test_select_takes_rows_in_any_order_as_a_copy(model, state):
    kept = state.clone()
    rows = torch.tensor([2, 0])
    picked = state.select(rows)
    assert picked.batch == 2 and picked.lengths.tolist() == [6, 4]
    for name, tensor in flat(picked).items():
        assert torch.equal(tensor, flat(state)[name][rows]), name
        tensor.fill_(7)
    picked.info["nested"]["a"].clear()
    assert_equal(state, kept)
    identity = state.select(torch.arange(3))
    for name, tensor in flat(identity).items():
        assert tensor.data_ptr() != flat(state)[name].data_ptr(), name


@torch.no_grad()
def test_branches_of_a_row_go_their_own_ways(model):
    double = build(HYBRID, torch.float64)
    prompt = ids(1, 7)
    _, state = double(prompt)
    branches = state.select(torch.tensor([0, 0, 0]))
    rest = ids(3, 4, seed=1)
    parts = []
    for token in rest.split(1, dim=1):
        logits, branches = double(token, state=branches, overwrite_state=True)
        parts.append(logits)
    whole, _ = double(torch.cat([prompt.expand(3, -1), rest], dim=1))
    assert_close("branches", torch.cat(parts, dim=1), whole[:, 7:], 1e-10)
    again, _ = double(rest[:1], state=state)
    assert_close("the trunk afterwards", again, whole[:1, 7:], 1e-10)


def test_detach_cuts_gradients_off():
    model = build((MAMBA2, GQA)).requires_grad_()
    _, state = model(ids(1, 3))
    assert all(t.requires_grad for t in flat(state).values() if t.is_floating_point())
    detached = state.detach()
    assert not any(t.requires_grad for t in flat(detached).values())
    assert_equal(detached, state)


def test_to_a_device_keeps_values(state):
    assert_equal(state.to("cpu"), state)
    moved = state.to("meta")
    assert {t.device.type for t in flat(moved).values()} == {"meta"}
    assert moved.lengths.tolist() == [4, 9, 6]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_save_and_load(tmp_path, dtype):
    model = build(HYBRID, dtype)
    _, state = model(ids(2, 6))
    state.info.update(turn="open", nested={"a": [1, None, True, 0.5, "é"]})
    state.save(tmp_path / "s.state")
    loaded = State.load(tmp_path / "s.state")
    assert_equal(loaded, state)
    assert loaded.nbytes == state.nbytes
    logits, _ = model(ids(2, 3, seed=1), state=loaded)
    assert torch.equal(logits, model(ids(2, 3, seed=1), state=state)[0])
    assert [file.name for file in tmp_path.iterdir()] == ["s.state"]


def test_save_of_parts_of_other_tensors(model, state, tmp_path):
    """safetensors refuses tensors that are not contiguous or share memory; parts of a state may be so."""
    shared = State([{n: t[1:] for n, t in layer.items()} for layer in state.layers], state.lengths[1:])
    shared.layers[0]["turned"] = shared.layers[0]["ssm"].transpose(-1, -2)
    shared.save(str(tmp_path / "rows"))
    assert_equal(State.load(str(tmp_path / "rows")), shared)


def test_save_replaces_a_file_and_a_failed_save_leaves_it(state, tmp_path):
    file = tmp_path / "s"
    state.save(file)
    state.info["turn"] = "closed"
    state.save(file)
    assert State.load(file).info["turn"] == "closed"
    state.info["bad"] = object()
    with pytest.raises(TypeError):
        state.save(file)
    assert State.load(file).info["turn"] == "closed"


def test_a_full_disk_leaves_nothing_behind(state, tmp_path, monkeypatch):
    def write_a_part(path, content):
        with open(path, "wb") as file:
            file.write(content[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_a_part)
    with pytest.raises(OSError, match="No space left"):
        state.save(tmp_path / "s")
    assert not list(tmp_path.iterdir())


def test_a_state_of_empty_layers_survives_a_file(tmp_path):
    model = build((MLPConfig(d_ff=8), MAMBA2, MLPConfig(d_ff=8)))
    _, state = model(ids(1, 2))
    state.save(tmp_path / "s")
    assert [sorted(layer) for layer in State.load(tmp_path / "s").layers] == [[], ["conv", "ssm"], []]


def damaged(state: State, tmp_path) -> dict[str, bytes]:
    state.save(tmp_path / "good")
    good = (tmp_path / "good").read_bytes()
    save_file({"x": torch.zeros(2)}, tmp_path / "other")
    header = {"format_version": 999, "num_layers": 0, "info": {}}
    save_file({"lengths": torch.zeros(1)}, tmp_path / "future", {"cobra_state": json.dumps(header)})
    header = {"format_version": 1, "num_layers": 1, "info": {}}
    save_file({"layers.0.k": torch.zeros(1)}, tmp_path / "headless", {"cobra_state": json.dumps(header)})
    return {
        "empty": b"",
        "text": b"this is a text file, not a state\n" * 20,
        "header cut off": good[:50],
        "tensors cut off": good[:-9],
        "too long": good + b"123",
        "absurd header": b"\xff" * 100,
        "another safetensors file": (tmp_path / "other").read_bytes(),
        "a future format": (tmp_path / "future").read_bytes(),
        "no lengths": (tmp_path / "headless").read_bytes(),
        "metadata that is not JSON": good.replace(b'{\\"format_version\\"', b'x\\"format_version\\"', 1),
    }


DAMAGES = [
    "empty", "text", "header cut off", "tensors cut off", "too long", "absurd header",
    "another safetensors file", "a future format", "no lengths", "metadata that is not JSON",
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_named(state, tmp_path, damage):
    contents = damaged(state, tmp_path)[damage]
    assert contents != (tmp_path / "good").read_bytes()
    file = tmp_path / "bad.state"
    file.write_bytes(contents)
    with pytest.raises(UserError, match=r"bad\.state") as caught:
        State.load(file)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nothing.state", tmp_path):
        with pytest.raises(UserError, match=str(path)):
            State.load(path)


OTHERS = {
    "more layers": (MAMBA2, GQA, MAMBA2),
    "fewer layers": (MAMBA2,),
    "other kinds": (GQA, MAMBA2),
    "other sizes": (Mamba2Config(d_state=3, headdim=8), GQA),
    "other heads": (MAMBA2, WINDOW),
}


@pytest.mark.parametrize("other", OTHERS)
def test_a_state_of_another_model_is_the_callers_mistake(other):
    """A state read from a file may belong to any model."""
    _, state = build(OTHERS[other])(ids(1, 3))
    with pytest.raises(UserError):
        build((MAMBA2, GQA))(ids(1, 3), state=state)


def test_allocated_states_are_empty_and_take_no_batch_of_zero_for_granted():
    state = build(HYBRID).allocate_state(2, capacity=6)
    assert state.lengths.tolist() == [0, 0] and state.info == {}
    for name, tensor in flat(state).items():
        value = -1 if name.endswith("position") else 0
        assert (tensor == value).all(), name
    sizes = {name: tuple(t.shape) for name, t in flat(state).items()}
    assert sizes["2.k"] == (2, 2, 6, 8) and sizes["3.k"] == (2, 1, 5, 8)
    assert math.prod(sizes["0.ssm"]) == 2 * 4 * 8 * 5
