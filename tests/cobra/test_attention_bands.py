"""A window's queries are read in pieces, each against the keys that it can see: the same numbers, less work."""

import pytest
import torch

from cobra.lm import LanguageModel, LMConfig, attention
from cobra.lm.attention import AttentionConfig
from tests.cobra.lm_ways import VOCAB, WAYS, cast, check, lively, one_shot, texts
from tests.tolerance import assert_close


@pytest.fixture
def spans(monkeypatch) -> list[tuple[int, int]]:
    """Queries and keys of every call, with pieces as small as they get."""
    calls, attend = [], attention.attend

    def note(q, k, *others, **options):
        calls.append((q.shape[2], k.shape[2]))
        return attend(q, k, *others, **options)

    monkeypatch.setattr(attention, "attend", note)
    monkeypatch.setattr(attention, "LEAST_BAND", 1)
    return calls


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stack", ["window", "hybrid", "biases and scaled positions"])
def test_every_way_of_reading_in_small_pieces(stack, way, spans, monkeypatch):
    model = cast(stack, torch.float64)
    check(model, way, 1e-10)
    assert len({keys for _, keys in spans}) > 3
    pieces = one_shot(model, texts())
    monkeypatch.setattr(attention, "LEAST_BAND", 10**9)
    for (logits, state), (expected, expected_state) in zip(pieces, one_shot(model, texts()), strict=True):
        assert_close(f"{stack}, whole", logits, expected, 1e-10)
        for layer, expected_layer in zip(state.layers, expected_state.layers, strict=True):
            for name, tensor in layer.items():
                torch.testing.assert_close(tensor, expected_layer[name], rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_work_goes_with_the_window(spans):
    window = AttentionConfig(num_heads=2, num_kv_heads=1, headdim=8, window=7)
    model, ids = lively((window,)), torch.randint(VOCAB, (2, 100))
    _, state = model(ids)
    assert spans == [(7, 7), *[(7, 13)] * 13, (2, 8)]
    spans.clear()
    model(ids[:, :9], state=state)
    assert spans == [(7, 14), (2, 8)]  # the ring is behind the first piece alone


def test_gradients_of_pieces_are_those_of_the_whole(spans, monkeypatch):
    config = AttentionConfig(num_heads=4, num_kv_heads=2, headdim=6, window=5)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LanguageModel(LMConfig(d_model=16, vocab_size=VOCAB, layers=(config,) * 2)).double()
        ids = torch.randint(VOCAB, (3, 23))

    def gradients():
        model.zero_grad()
        model(ids)[0].square().mean().backward()
        return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}

    pieces = gradients()
    monkeypatch.setattr(attention, "LEAST_BAND", 10**9)
    for name, expected in gradients().items():
        assert_close(name, pieces[name], expected, 1e-9)
