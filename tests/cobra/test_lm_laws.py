"""Law 1: however a text is cut, packed, padded and batched, the language model reads the same."""

import copy
from dataclasses import dataclass
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from cobra.lm import LAYERS, State
from cobra.lm.mixer import LayerCost
from tests.cobra.lm_ways import (
    D_MODEL,
    LENGTHS,
    STACKS,
    VOCAB,
    WAYS,
    build,
    cast,
    check,
    lively,
    one_shot,
    prompts,
    read_on,
    stacks,
    texts,
    truth,
)  # fmt: skip
from tests.tolerance import assert_as_good_as, assert_close
from vision_scan.errors import UserError


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stack", STACKS)
def test_every_way_of_reading_gives_the_logits_of_one_shot(stack, way):
    check(cast(stack, torch.float64), way, 1e-10)


@pytest.mark.parametrize("stack", STACKS)
def test_every_way_of_reading_in_float32(stack):
    for way in WAYS:
        check(build(stack), way, 1e-4)


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_every_way_of_reading_in_bfloat16_is_as_good_as_one_shot(stack):
    model = cast(stack, torch.bfloat16)
    exact = truth(copy.deepcopy(model).double())
    plain = truth(model)
    assert 1e-4 < ((plain - exact).norm() / exact.norm()).item() < 0.1 or stack == "mlp"
    for way in ("steps overwritten", "chunks 1 2 3", "padded left", "packed", "ragged steps overwritten"):
        found = read_on(model, WAYS[way](model, prompts()), way == "padded left")
        # Logits are float32 with values of bfloat16, so nothing is lost here.
        assert_as_good_as(way, found.bfloat16(), plain.bfloat16(), exact)


@pytest.mark.parametrize("stack", [name for name in STACKS if name not in ("mlp", "moe")])
@torch.no_grad()
def test_every_token_matters_to_later_ones_and_none_to_earlier_ones(stack):
    """Otherwise the tests above would pass for layers that see nothing."""
    model, text = cast(stack, torch.float64), texts()[0]
    before = model(text[None])[0][0]
    changed = text.clone()
    changed[7] = (changed[7] + 1) % VOCAB
    moved = (model(changed[None])[0][0] - before).norm(dim=-1)
    # Another token may go through another expert, and products of other sizes round differently.
    rounding = 1e-13 if any(layer.kind == "moe" for layer in STACKS[stack]) else 0.0
    assert (moved[:7] <= rounding).all()
    # Two windowed layers of 5 reach 8 tokens back, two convolutions of 3 reach 4.
    far, end = {"window": (12, 16), "gated_conv": (12, 12)}.get(stack, (len(text), len(text)))
    assert (moved[7:far] > 1e-6).all()
    assert (moved[end:] == 0).all()


@pytest.mark.parametrize("stack", STACKS)
def test_gradients_do_not_depend_on_the_way_of_reading(stack):
    model = copy.deepcopy(cast(stack, torch.float64)).requires_grad_()
    noise = torch.Generator().manual_seed(4)
    weights = torch.randn(sum(LENGTHS), VOCAB, generator=noise, dtype=torch.float64)

    def gradients(read) -> dict[str, Tensor]:
        logits = torch.cat([logits for logits, _ in read(model, prompts())])
        found = torch.autograd.grad((logits * weights).sum(), list(model.parameters()))
        return dict(zip(dict(model.named_parameters()), found, strict=True))

    expected = gradients(one_shot)
    assert all(gradient.any() for gradient in expected.values())
    for way in ("chunks 1 2 3", "padded left", "padded in the middle", "packed in front", "scattered"):
        for name, gradient in gradients(WAYS[way]).items():
            assert_close(f"{way}: {name}", gradient, expected[name], 1e-9)


def snapshot(state: State) -> State:
    return copy.deepcopy(state)


def assert_same_bits(state: State, kept: State) -> None:
    assert torch.equal(state.lengths, kept.lengths)
    assert state.info == kept.info
    for layer, kept_layer in zip(state.layers, kept.layers, strict=True):
        assert layer.keys() == kept_layer.keys()
        for name, tensor in layer.items():
            assert tensor.dtype == kept_layer[name].dtype
            assert torch.equal(tensor, kept_layer[name]), name


READS = {
    "one token": {"seqlen": 1},
    "some tokens": {"seqlen": 5},
    "a padded token": {"seqlen": 1, "attention_mask": torch.tensor([[1], [0]])},
    "pads only": {"seqlen": 3, "attention_mask": torch.zeros(2, 3)},
    "segments": {"seqlen": 4, "seq_idx": torch.tensor([[0, 0, 1, 1], [-1, 0, 0, 2]])},
}


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_the_state_passed_in_is_never_changed(stack, read):
    """Nor is it by overwriting the state that came back: the two share no memory."""
    model, options = build(stack), dict(READS[read])
    seqlen = options.pop("seqlen")
    _, state = model(torch.tensor([[1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1]]))
    state.info["turn"] = {"kept": [1]}
    kept = snapshot(state)
    _, after = model(torch.full((2, seqlen), 8), state=state, **options)
    assert_same_bits(state, kept)
    for token in (9, 10):
        _, after = model(torch.full((2, 1), token), state=after, overwrite_state=True)
    after.info["turn"] = "changed"
    assert_same_bits(state, kept)


@torch.no_grad()
def test_overwriting_is_really_in_place():
    """The decoding path must not quietly fall back to copies of caches."""
    model = build("hybrid")
    _, state = model(torch.ones(2, 3, dtype=torch.int64), state=model.allocate_state(2, capacity=9))
    before = [tensor.data_ptr() for layer in state.layers for tensor in layer.values()]
    _, after = model(torch.ones(2, 1, dtype=torch.int64), state=state, overwrite_state=True)
    assert [tensor.data_ptr() for layer in after.layers for tensor in layer.values()] == before


@pytest.mark.parametrize("stack", STACKS)
@torch.no_grad()
def test_pads_alone_leave_a_state_as_it_was(stack):
    model, text = cast(stack, torch.float64), texts()[0]
    logits, state = model(text[None, :10])
    for overwrite in (False, True):
        pads = {"attention_mask": torch.zeros(1, 4), "overwrite_state": overwrite}
        _, after = model(torch.zeros(1, 4, dtype=torch.int64), state=state.clone(), **pads)
        assert after.lengths.tolist() == [10]
        rest, _ = model(text[None, 10:], state=after)
        assert_close("behind pads", torch.cat([logits, rest], 1), model(text[None])[0], 1e-10)
    _, empty = model(torch.zeros(1, 4, dtype=torch.int64), attention_mask=torch.zeros(1, 4))
    assert_close("from pads", model(text[None], state=empty)[0], model(text[None])[0], 1e-10)


@torch.no_grad()
def test_mask_and_segments_together():
    model, rows = cast("hybrid", torch.float64), prompts()
    ids = torch.cat([rows[1], rows[2], rows[2]])[None]
    seq_idx = torch.tensor([[5] * 9 + [0] * 2 + [5] * 2])
    mask = torch.ones_like(ids)
    mask[0, 3], mask[0, 11] = 0, 0  # inside the first segment, and the first token of the last
    logits, state = model(ids, attention_mask=mask, seq_idx=seq_idx)
    kept = torch.cat([rows[1][:3], rows[1][4:]])
    alone = [model(row[None])[0][0] for row in (kept, rows[2], rows[2][1:])]
    assert_close("packed and masked", logits[0, mask[0].bool()], torch.cat(alone), 1e-10)
    assert state.lengths.tolist() == [1]


@torch.no_grad()
def test_embeddings_and_ids_read_alike_and_logits_to_keep_are_the_last():
    model, text = cast("hybrid", torch.float64), texts()[1][None]
    logits, _ = model(text)
    embedded, _ = model(inputs_embeds=model.embedding(text), logits_to_keep=3)
    assert_close("the last 3", embedded, logits[:, -3:], 1e-12)


@pytest.mark.parametrize(
    ("message", "inputs"),
    [
        ("exactly one", {}),
        ("exactly one", {"input_ids": torch.zeros(1, 2).long(), "inputs_embeds": torch.zeros(1, 2, D_MODEL)}),
        ("attention_mask", {"input_ids": torch.zeros(2, 2).long(), "attention_mask": torch.ones(2, 5)}),
        ("seq_idx", {"input_ids": torch.zeros(2, 2).long(), "seq_idx": torch.ones(1, 2).long()}),
        ("3 rows", {"input_ids": torch.zeros(2, 2).long(), "state": 3}),
    ],
)
def test_inputs_that_do_not_fit_are_the_callers_mistake(message, inputs):
    model = build("hybrid")
    if "state" in inputs:
        inputs = {**inputs, "state": model.allocate_state(inputs["state"])}
    with pytest.raises(UserError, match=message):
        model(**inputs)


@dataclass(frozen=True, kw_only=True)
class LeakyConfig:
    kind: Literal["leaky"] = "leaky"
    d_state: int

    def cost(self, d_model: int) -> LayerCost:
        return LayerCost(parameters=d_model, flops_per_token=2 * d_model, state_elements=d_model)


class Leaky(nn.Module):
    """A further kind of layer: h_t = decay h_{t-1} + x_t, y_t = h_t."""

    Config = LeakyConfig

    def __init__(self, config, d_model):
        super().__init__()
        self.decay = nn.Parameter(torch.full((d_model,), 0.5))

    def allocate(self, batch, capacity, device, dtype):
        return {"h": torch.zeros(batch, len(self.decay), device=device, dtype=dtype)}

    def forward(self, x, state, segments):
        h = self.allocate(len(x), 0, x.device, x.dtype)["h"] if state is None else state["h"]
        positions, _ = segments.positions_and_runs(x.shape[1], x.device)
        outputs = []
        for t in range(x.shape[1]):
            position = positions[:, t, None]
            h = torch.where(position == 0, 0.0, h)
            h = torch.where(position >= 0, h * self.decay + x[:, t], h)
            outputs.append(h)
        return torch.stack(outputs, 1), {"h": h}


class Forgetful(Leaky):
    """Breaks the law: every call starts anew."""

    def forward(self, x, state, segments):
        return super().forward(x, None, segments)


class Leaking(Leaky):
    """Breaks the law: pads are read like tokens."""

    def forward(self, x, state, segments):
        return super().forward(x, state, type(segments)(segments.starts, None, segments.overwrite))


def test_a_new_kind_in_the_table_is_tested(monkeypatch):
    monkeypatch.setitem(LAYERS, "leaky", Leaky)
    layers = stacks()["leaky"]
    assert [layer.kind for layer in layers] == ["leaky"] * 2
    for way in WAYS:
        check(lively(layers).double(), way, 1e-10)


@pytest.mark.parametrize(
    ("broken", "way"), [(Forgetful, "steps"), (Forgetful, "chunks 3 1 19"), (Leaking, "padded left"),
                        (Leaking, "scattered"), (Leaking, "packed")]
)  # fmt: skip
def test_a_new_kind_that_breaks_the_law_is_caught(monkeypatch, broken, way):
    monkeypatch.setitem(LAYERS, "leaky", broken)
    with pytest.raises(AssertionError):
        check(lively(stacks()["leaky"]).double(), way, 1e-10)
