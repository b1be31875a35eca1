"""Activations computed again in the backward pass: the same numbers from less memory."""

import gc

import pytest
import torch

from cobra.lm.attention import AttentionConfig
from cobra.lm.gated_deltanet import GatedDeltaNetConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mamba3 import Mamba3Config
from cobra.lm.mlp import MLPConfig
from cobra.lm.recompute import begins_anew, last_segment
from cobra.lm.shared_attention import SharedAttentionConfig, SharedBlockConfig
from cobra.lm.stack import LanguageModel, LMConfig

LAYERS = {
    "mamba2": Mamba2Config(d_state=8, headdim=8, chunk_size=16),
    "mamba1": Mamba1Config(d_state=4),
    "gated_deltanet": GatedDeltaNetConfig(num_k_heads=2, num_v_heads=4, head_k_dim=4, head_v_dim=6, chunk_size=16),
    "mamba3": Mamba3Config(d_state=8, headdim=8, rank=2, chunk_size=16),
    "attention": AttentionConfig(num_heads=2, num_kv_heads=1, headdim=8),
    "window": AttentionConfig(num_heads=2, num_kv_heads=2, headdim=8, window=5),
    "shared_attention": SharedAttentionConfig(
        shared=SharedBlockConfig(
            attention=AttentionConfig(num_heads=2, num_kv_heads=1, headdim=8), mlp=MLPConfig(d_ff=24)
        ),
        mamba=Mamba2Config(d_state=8, headdim=8, chunk_size=16),
        attention_rank=3,
        mlp_rank=2,
    ),
}
SEQ_IDX = torch.tensor(
    [
        [0] * 9 + [1] * 8 + [2] * 20,
        [-1] * 10 + [0] * 6 + [-1] * 7 + [0] * 5 + [1] * 9,  # a segment that goes on behind padding
        [0] * 37,
    ]
)


def build(kind: str) -> LanguageModel:
    torch.manual_seed(0)
    config = LMConfig(d_model=16, vocab_size=11, layers=(LAYERS[kind], MLPConfig(d_ff=24), LAYERS[kind]))
    return LanguageModel(config).double().train()


def read(lm: LanguageModel, seq_idx: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Hidden states and all gradients of one pass."""
    torch.manual_seed(1)
    embeds = torch.randn(3, 37, 16, dtype=torch.float64, requires_grad=True)
    lm.zero_grad()
    hidden, _ = lm.read(inputs_embeds=embeds, seq_idx=seq_idx)
    real = 1.0 if seq_idx is None else (seq_idx >= 0)[..., None]
    ((hidden * real) ** 2).sum().backward()
    found = {name: p.grad for name, p in lm.named_parameters() if p.grad is not None}
    return {"hidden": (hidden * real).detach(), "embeds": embeds.grad, **found}


@pytest.mark.parametrize("seq_idx", [None, SEQ_IDX], ids=["plain", "packed"])
@pytest.mark.parametrize(("layers", "tokens"), [(True, 0), (False, 16), (False, 7), (False, 1), (True, 16)])
@pytest.mark.parametrize("kind", LAYERS)
def test_recomputing_changes_no_number(
    kind: str, layers: bool, tokens: int, seq_idx: torch.Tensor | None
) -> None:
    lm = build(kind)
    expected = read(lm, seq_idx)
    lm.recompute_layers, lm.recompute_tokens = layers, tokens
    found = read(lm, seq_idx)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-9, atol=1e-10, msg=name)


def kept_bytes(lm: LanguageModel, seqlen: int) -> int:
    """Bytes that are kept between forward and backward pass, by autograd or by what computes again; parameters
    apart."""
    kept: dict[int, int] = {}
    own = {p.untyped_storage().data_ptr() for p in lm.parameters()}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    embeds = torch.randn(1, seqlen, 16, dtype=torch.float64, requires_grad=True)
    own |= {thing.untyped_storage().data_ptr() for thing in gc.get_objects() if isinstance(thing, torch.Tensor)}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden, _ = lm.read(inputs_embeds=embeds)
        for thing in gc.get_objects():
            if isinstance(thing, torch.Tensor):
                pack(thing)
    del hidden
    return sum(kept.values())


def test_segments_keep_less_than_layers_and_layers_less_than_all() -> None:
    lm = build("mamba2")
    sizes = []
    for layers, tokens in ((False, 0), (True, 0), (False, 32)):
        lm.recompute_layers, lm.recompute_tokens = layers, tokens
        sizes.append(kept_bytes(lm, 512))
    assert sizes[0] > 4 * sizes[1] > 4 * sizes[2], sizes


def test_evaluation_is_not_recomputed(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = build("mamba2")
    lm.recompute_layers, lm.recompute_tokens = True, 4
    monkeypatch.setattr("cobra.lm.stack.recompute", lambda *inputs: pytest.fail("recomputed"))
    monkeypatch.setattr("cobra.lm.stack.read_by_segments", lambda *inputs: pytest.fail("recomputed"))
    lm.eval()(torch.tensor([[1, 2, 3, 4, 5, 6]]))


def test_where_segments_end_and_begin() -> None:
    last = last_segment(None, torch.tensor([[0, 0], [-1, -1], [3, -1]]))
    assert last.tolist() == [0, -1, 3]
    assert last_segment(last, torch.tensor([[-1, -1], [0, 1], [4, -1]])).tolist() == [0, 1, 4]
    assert begins_anew(last, torch.tensor([[1, 1], [0, 0], [-1, 3]])).tolist() == [True, False, False]
