"""Mixtures of experts, against transformers' own and a loop over tokens; mixers side by side against their sum."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from cobra.lm import LanguageModel, LMConfig, State
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mixer import LayerCost, Segments
from cobra.lm.mlp import MLPConfig
from cobra.lm.moe import MoE, MoEConfig
from cobra.lm.parallel import Parallel, ParallelConfig
from tests.tolerance import assert_close
from vision_scan.errors import UserError

D_MODEL = 12
CONFIGS = {
    "softmax": MoEConfig(num_experts=6, top_k=2, d_ff=10),
    "not normed": MoEConfig(num_experts=5, top_k=3, d_ff=8, norm_topk=False, gated=False, activation="gelu"),
    "sigmoid": MoEConfig(num_experts=6, top_k=2, d_ff=10, scores="sigmoid", routed_scale=2.5),
    "groups": MoEConfig(num_experts=8, top_k=3, d_ff=10, scores="sigmoid", num_groups=4, top_groups=2),
    "latent, shared": MoEConfig(
        num_experts=4, top_k=1, d_ff=10, d_latent=6, shared_d_ff=7, gated=False, activation="relu2"
    ),
    "shared gate": MoEConfig(num_experts=4, top_k=4, d_ff=10, shared_d_ff=7, shared_gate=True),
}
SEGMENTS = Segments(torch.zeros(1, dtype=torch.int64))


def lively(layer: nn.Module) -> nn.Module:
    generator = torch.Generator().manual_seed(0)
    for tensor in [*layer.parameters(), *layer.buffers()]:
        tensor.data = torch.randn(tensor.shape, generator=generator, dtype=torch.float64) / tensor.shape[-1] ** 0.5
    return layer


def by_token(layer: MoE, x: torch.Tensor) -> torch.Tensor:
    """What a token gets, its experts chosen by sorted lists."""
    config, router = layer.config, layer.router
    logits = (router.weight @ x).tolist()
    if config.scores == "softmax":
        weights = merits = torch.tensor(logits, dtype=torch.float64).softmax(0).tolist()
    else:
        weights = torch.tensor(logits, dtype=torch.float64).sigmoid().tolist()
        merits = [weight + more for weight, more in zip(weights, router.correction.tolist(), strict=True)]
    size = config.num_experts // config.num_groups
    groups = [range(start, start + size) for start in range(0, config.num_experts, size)]
    groups.sort(key=lambda group: -sum(sorted((merits[number] for number in group), reverse=True)[:2]))
    open_ones = [number for group in groups[: config.top_groups] for number in group]
    chosen = sorted(open_ones, key=lambda number: -merits[number])[: config.top_k]
    total = sum(weights[number] for number in chosen) if config.norm_topk else 1.0
    inner = x if config.d_latent is None else layer.down_proj(x)
    y = sum(
        config.routed_scale * weights[number] / total * layer.experts[number](inner, None, SEGMENTS)[0]
        for number in chosen
    )
    if config.d_latent is not None:
        y = layer.up_proj(y)
    if config.shared_d_ff:
        shared, _ = layer.shared(x, None, SEGMENTS)
        y = y + (shared * layer.shared_gate(x).sigmoid() if config.shared_gate else shared)
    return y


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_each_token_goes_through_its_experts(name):
    layer = lively(MoE(CONFIGS[name], D_MODEL))
    x = torch.randn(2, 9, D_MODEL, dtype=torch.float64)
    y, state = layer(x, None, SEGMENTS)
    expected = torch.stack([by_token(layer, token) for token in x.flatten(0, 1)]).view_as(x)
    assert not state
    assert_close(name, y, expected, 1e-12)


@torch.no_grad()
def test_qwen3_next_and_nemotron_compute_the_same():
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHConfig, NemotronHMoE
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextConfig, Qwen3NextSparseMoeBlock

    x = torch.randn(2, 9, D_MODEL, dtype=torch.float64)
    theirs = lively(
        Qwen3NextSparseMoeBlock(
            Qwen3NextConfig(
                hidden_size=D_MODEL, num_experts=5, num_experts_per_tok=2, moe_intermediate_size=8,
                shared_expert_intermediate_size=6,
            )
        )
    )  # fmt: skip
    config = MoEConfig(num_experts=5, top_k=2, d_ff=8, shared_d_ff=6, shared_gate=True)
    config = replace(config, norm_topk=theirs.gate.norm_topk_prob)
    names = {
        "router.weight": theirs.gate.weight, "shared_gate.weight": theirs.shared_expert_gate.weight,
        **{f"shared.{name}": tensor for name, tensor in theirs.shared_expert.state_dict().items()},
    }  # fmt: skip
    for number in range(5):
        gate, up = theirs.experts.gate_up_proj[number].chunk(2)
        parts = {"gate": gate, "up": up, "down": theirs.experts.down_proj[number]}
        names |= {f"experts.{number}.{part}_proj.weight": tensor for part, tensor in parts.items()}
    assert_close("Qwen3-Next", _with(config, names)(x, None, SEGMENTS)[0], theirs(x), 1e-6)  # a softmax in float32

    theirs = lively(
        NemotronHMoE(
            NemotronHConfig(
                hidden_size=D_MODEL, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=8,
                moe_shared_expert_intermediate_size=7, n_group=3, topk_group=2, routed_scaling_factor=1.5,
                moe_latent_size=5,
            )
        )
    )  # fmt: skip
    config = MoEConfig(
        num_experts=6, top_k=2, d_ff=8, gated=False, activation="relu2", scores="sigmoid", routed_scale=1.5,
        num_groups=3, top_groups=2, shared_d_ff=7, d_latent=5,
    )  # fmt: skip
    names = {
        "router.weight": theirs.gate.weight, "router.correction": theirs.gate.e_score_correction_bias,
        "down_proj.weight": theirs.fc1_latent_proj.weight, "up_proj.weight": theirs.fc2_latent_proj.weight,
        **{f"shared.{name}": tensor for name, tensor in theirs.shared_experts.state_dict().items()},
    }  # fmt: skip
    for number in range(6):
        names[f"experts.{number}.up_proj.weight"] = theirs.experts.up_proj[number]
        names[f"experts.{number}.down_proj.weight"] = theirs.experts.down_proj[number]
    assert_close("Nemotron", _with(config, names)(x, None, SEGMENTS)[0], theirs(x), 1e-6)


def _with(config: MoEConfig, tensors: dict[str, torch.Tensor]) -> MoE:
    layer = MoE(config, D_MODEL).double()
    layer.load_state_dict(tensors, strict=True)
    return layer


def test_costs_tell_what_a_token_has_to_do_with():
    config = MoEConfig(num_experts=8, top_k=2, d_ff=10, shared_d_ff=6)
    cost = config.cost(D_MODEL)
    expert, shared, router = 3 * D_MODEL * 10, 3 * D_MODEL * 6, 8 * D_MODEL
    assert cost.parameters == 8 * expert + shared + router and cost.idle_parameters == 6 * expert
    assert cost.flops_per_token == 2 * (2 * expert + shared + router)


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("top_k 7 of 6 experts", {"top_k": 7}),
        ("groups must be of one size", {"num_groups": 4}),
        ("in 3 of 2 groups", {"num_groups": 2, "top_groups": 3}),
        ("top_k 2 of 6 experts in 1 of 6 groups", {"num_groups": 6}),
        ("shared_d_ff 0 must be", {"shared_gate": True}),
        ("scores", {"scores": "tanh"}),
        ("activation", {"activation": "silo"}),
        ("d_latent 0", {"d_latent": 0}),
    ],
)
def test_what_cannot_be_is_refused(message, changes):
    with pytest.raises(UserError, match=message):
        MoEConfig(**{"num_experts": 6, "top_k": 2, "d_ff": 10, **changes})


MAMBA2 = Mamba2Config(d_state=5, headdim=8, chunk_size=4)
ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, headdim=8, window=6)


@torch.no_grad()
def test_mixers_side_by_side_add_up():
    layer = lively(Parallel(ParallelConfig(mixers=(MAMBA2, ATTENTION, MLPConfig(d_ff=7))), D_MODEL))
    x = torch.randn(1, 9, D_MODEL, dtype=torch.float64)
    y, state = layer(x, None, SEGMENTS)
    parts = [mixer(x, None, SEGMENTS) for mixer in layer.mixers]
    assert_close("sum", y, sum(part for part, _ in parts), 1e-12)
    assert state.keys() == {"0.conv", "0.ssm", "1.k", "1.v", "1.position"}
    assert torch.equal(state["0.ssm"], parts[0][1]["ssm"])


@torch.no_grad()
def test_states_of_mixers_side_by_side_can_have_8_bits(tmp_path):
    config = LMConfig(d_model=16, vocab_size=29, layers=(ParallelConfig(mixers=(MAMBA2, ATTENTION)), MAMBA2))
    model = LanguageModel(config)
    _, state = model(torch.arange(12)[None])
    small = state.quantize()
    assert small.layers[0]["0.ssm"].dtype == small.layers[1]["ssm"].dtype == torch.int8
    assert small.layers[0]["0.ssm_scale"].shape == state.layers[0]["0.ssm"].shape[:-1]
    small.save(tmp_path / "state")
    wide = State.load(tmp_path / "state").dequantize()
    assert wide.layers[0].keys() == state.layers[0].keys()
    for layer, name in ((0, "0.ssm"), (1, "ssm")):
        assert_close(name, wide.layers[layer][name], state.layers[layer][name], 0.01)
    assert small.quantize().layers[0]["0.ssm"].dtype == torch.int8 and wide.dequantize() is wide


def test_costs_side_by_side_add_up():
    cost = ParallelConfig(mixers=(MAMBA2, ATTENTION)).cost(D_MODEL)
    one, other = MAMBA2.cost(D_MODEL), ATTENTION.cost(D_MODEL)
    assert cost.state_bytes(9, 2) == one.state_bytes(9, 2) + other.state_bytes(9, 2)
    assert cost == LayerCost(
        parameters=one.parameters + other.parameters,
        flops_per_token=one.flops_per_token + other.flops_per_token,
        flops_per_context_token=other.flops_per_context_token,
        state_elements=one.state_elements,
        tail_elements=one.tail_elements,
        cache_elements=other.cache_elements,
        cache_index_bytes=8,
        window=6,
    )


@pytest.mark.parametrize(
    ("message", "mixers"),
    [("1 mixers", (MAMBA2,)), ("one window", (ATTENTION, replace(ATTENTION, window=None)))],
)
def test_mixers_that_cannot_stand_side_by_side_are_refused(message, mixers):
    with pytest.raises(UserError, match=message):
        ParallelConfig(mixers=mixers)
