"""Blocks whose weights several layers share: they exist once, and each use reads the embeddings of its own tokens."""

from dataclasses import replace

import pytest
import torch

import cobra
from cobra import PRESETS
from cobra.checkpoint import named_tensors
from cobra.config import CobraConfig
from cobra.lm import LanguageModel, LMConfig, stack
from cobra.lm.decode import decoder_for
from cobra.lm.sequence_parallel import check_shardable
from cobra.typed_config import from_dict, to_dict
from tests.cobra.lm_ways import STACKS, build, cast
from tests.cobra.test_reading_in_pieces import assert_same, whole_and_pieces
from vision_scan.errors import UserError

USE, OTHER, BARE, _ = STACKS["two shared blocks"]


def config(*layers) -> LMConfig:
    return LMConfig(d_model=16, vocab_size=29, layers=layers)


def test_weights_of_a_block_exist_once(tmp_path):
    lm = config(USE, OTHER, BARE, USE)
    model = LanguageModel(lm)
    assert len(model.shared) == 2
    names = [name for name in named_tensors(model) if name.endswith("attention.q_proj.weight")]
    assert names == ["shared.0.attention.q_proj.weight", "shared.1.attention.q_proj.weight"]
    whole = cobra.build(replace(PRESETS["tiny"], lm=replace(lm, d_model=64, vocab_size=300)), seed=0)
    cobra.save(whole, tmp_path / "model")
    same = cobra.load(tmp_path / "model", device="cpu", dtype="float32")
    ids = torch.arange(3, 20)[None]
    assert torch.equal(same.lm(ids)[0], whole.lm(ids)[0])
    assert from_dict(CobraConfig, to_dict(whole.config)) == whole.config


def test_every_use_moves_the_block():
    model = LanguageModel(config(USE, BARE)).double()
    ids = torch.arange(7)[None]
    both = [parameter.detach().clone() for parameter in model.shared.parameters()]
    before = model(ids)[0]
    for index in range(2):
        projection = model.layers[index].mixer.proj.weight
        kept = projection.detach().clone()
        projection.data.zero_()  # the other use alone
        alone = model(ids)[0]
        gradients = torch.autograd.grad(alone.sum(), list(model.shared.parameters()))
        assert all(gradient.any() for gradient in gradients)
        assert (alone - before).abs().max() > 1e-3
        projection.data.copy_(kept)
    assert all(torch.equal(*pair) for pair in zip(both, model.shared.parameters(), strict=True))


def test_the_embeddings_matter_beside_the_stream():
    """Behind a layer that takes the stream to 0, the block still tells tokens apart."""
    model = build("two shared blocks")
    block = model.layers[0]
    segments = stack.Segments(torch.zeros(1, dtype=torch.int64), embeddings=torch.randn(1, 5, 16))
    x = torch.zeros(1, 5, 16)
    y, _ = block(x, None, segments, torch.float32, model.shared[0])
    assert y.std(dim=1).max() > 1e-3


def test_pieces_are_given_their_own_embeddings(monkeypatch):
    """A window keeps the state from growing, so that rows are read in pieces."""
    monkeypatch.setattr(stack, "PIECE_TOKENS", 24)
    monkeypatch.setattr(stack, "LEAST_PIECE", 8)
    model = LanguageModel(config(replace(OTHER, block=0), replace(OTHER, block=0, mlp_rank=0))).double()
    whole, parts, lengths = whole_and_pieces(model, monkeypatch, input_ids=torch.randint(29, (1, 60)))
    assert lengths == [24, 24, 12]
    assert_same(parts, whole)


@pytest.mark.parametrize(
    "layers", [(USE, replace(USE, shared=OTHER.shared)), (OTHER,), (USE, replace(USE, block=2))],
    ids=["two of one number", "none of 0", "none of 1"],
)  # fmt: skip
def test_numbers_of_blocks_that_do_not_fit_are_named(layers):
    with pytest.raises(UserError, match=r"shared blocks are numbered .* must count from 0") as caught:
        config(*layers)
    assert "\n" not in str(caught.value)


def test_settings_that_a_block_cannot_have_are_named():
    gated = replace(USE.shared.attention, gated=True)
    with pytest.raises(UserError, match=r"attention\.gated must be false .* mlp\.gated true"):
        replace(USE.shared, attention=gated)
    with pytest.raises(UserError, match="attention_rank -1 and mlp_rank 2 must be 0 or more"):
        replace(USE, attention_rank=-1)


def test_it_is_neither_compiled_nor_sharded():
    model = build("two shared blocks")
    with torch.no_grad():
        assert decoder_for(model, 1, 1) is None
    with pytest.raises(UserError, match=r"layer 0 \(shared_attention\) needs whole rows"):
        check_shardable([block.mixer for block in model.layers])


def test_the_state_of_a_use_is_its_own():
    _, state = cast("two shared blocks", torch.float64)(torch.arange(9)[None])
    assert [set(layer) for layer in state.layers] == [{"0.k", "0.v", "0.position", "1.conv", "1.ssm"}] * 4
    assert not torch.equal(state.layers[0]["0.k"], state.layers[2]["0.k"])
