"""A long prompt is read in pieces on a CPU, and nobody can tell but by the clock."""

import pytest
import torch

import cobra
from cobra.lm import stack


@pytest.fixture
def lm(monkeypatch):
    monkeypatch.setattr(stack, "PIECE_TOKENS", 48)
    monkeypatch.setattr(stack, "LEAST_PIECE", 16)
    return cobra.build("tiny", seed=3).lm.double()


def whole_and_pieces(lm, monkeypatch, **inputs):
    calls = []
    read = lm._read

    def count(x, *others):
        calls.append(x.shape[1])
        return read(x, *others)

    monkeypatch.setattr(lm, "_read", count)
    with torch.no_grad():
        pieces = lm.read(**inputs)
        in_pieces = calls.copy()
        monkeypatch.setattr(stack, "PIECE_TOKENS", 10**9)
        whole = lm.read(**inputs)
    return whole, pieces, in_pieces


def assert_same(one, other):
    torch.testing.assert_close(one[0], other[0], rtol=1e-9, atol=1e-9)
    assert torch.equal(one[1].lengths, other[1].lengths)
    for left, right in zip(one[1].layers, other[1].layers, strict=True):
        for name in left:
            torch.testing.assert_close(left[name], right[name], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ("batch", "seqlen", "pieces"), [(1, 150, [48, 48, 48, 6]), (4, 40, [16, 16, 8]), (1, 97, [48, 48, 1])]
)
def test_hidden_states_and_state_are_those_of_one_go(lm, monkeypatch, batch, seqlen, pieces):
    ids = torch.randint(256, (batch, seqlen))
    whole, parts, lengths = whole_and_pieces(lm, monkeypatch, input_ids=ids)
    assert lengths == pieces
    assert_same(parts, whole)


def test_padding_on_both_sides_and_a_state_that_is_kept(lm, monkeypatch):
    ids = torch.randint(256, (2, 130))
    mask = torch.ones(2, 130, dtype=torch.bool)
    mask[0, :70] = False  # longer than a piece
    mask[1, 100:] = False
    with torch.no_grad():
        _, state = lm.read(torch.randint(256, (2, 9)))
    before = state.clone()
    whole, parts, lengths = whole_and_pieces(lm, monkeypatch, input_ids=ids, attention_mask=mask, state=state)
    assert len(lengths) == 6
    for result in (whole, parts):
        result[0][~mask] = 0
    assert_same(parts, whole)
    for left, right in zip(state.layers, before.layers, strict=True):
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_packed_rows_and_gradients_are_read_in_one_go(lm, monkeypatch):
    ids = torch.randint(256, (1, 150))
    segments = (torch.arange(150) // 48)[None]  # a segment begins where a piece would
    *_, lengths = whole_and_pieces(lm, monkeypatch, input_ids=ids, seq_idx=segments)
    assert lengths == [150]
    monkeypatch.setattr(stack, "PIECE_TOKENS", 48)
    calls = []
    read = lm._read
    monkeypatch.setattr(lm, "_read", lambda x, *others: calls.append(x.shape[1]) or read(x, *others))
    lm.read(ids)
    assert calls == [150]


def test_layers_with_a_growing_state_are_read_in_one_go(monkeypatch):
    monkeypatch.setattr(stack, "PIECE_TOKENS", 48)
    lm = cobra.build("transformer-tiny").lm
    with torch.no_grad():
        assert not lm._reads_in_pieces(torch.zeros(1, 500, 8))
