from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from cobra.config import PRESETS
from cobra.connector import CONNECTORS
from cobra.cost import TOWERS, LMCost, Work, count_parts, tile_work
from cobra.image import ImageConfig
from cobra.lm import LAYERS, LanguageModel, LMConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.gated_deltanet import GatedDeltaNetConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mamba3 import Mamba3Config
from cobra.lm.mlp import MLPConfig
from cobra.model import Cobra
from cobra.token_reduction import ToMeConfig
from cobra.tokenizer import Tokenizer
from cobra.vision_encoder import VISION_ENCODERS, S2EncoderConfig
from tests.cobra.lm_ways import STACKS as WAYS

# research/systems.md 4.2, after the released state-spaces checkpoints.
PUBLISHED = {
    "mamba2-130m": 128_989_632,
    "mamba2-370m": 368_346_624,
    "mamba2-780m": 780_161_280,
    "mamba2-1.3b": 1_343_757_312,
    "mamba2-2.7b": 2_702_599_680,
}

MAMBA2 = Mamba2Config(d_state=5, headdim=8, ngroups=2, d_conv=3)
DELTA = GatedDeltaNetConfig(num_k_heads=2, num_v_heads=6, head_k_dim=5, head_v_dim=4, d_conv=3)
GQA = AttentionConfig(num_heads=4, num_kv_heads=2, headdim=8)
WINDOW = AttentionConfig(num_heads=4, num_kv_heads=1, headdim=8, window=6)
MAMBA3 = Mamba3Config(d_state=5, headdim=8, ngroups=2)
MIMO = Mamba3Config(d_state=7, headdim=4, expand=3, ngroups=3, rank=2, rope_fraction=1.0, is_outproj_norm=True)
BIASED = AttentionConfig(num_heads=4, num_kv_heads=2, headdim=8, qkv_bias=True)
MLP = MLPConfig(d_ff=24)
STACKS = {
    "mamba1": (Mamba1Config(d_state=5), Mamba1Config(d_state=3, expand=3, d_conv=2, dt_rank=5)),
    "mamba2": (MAMBA2,) * 3,
    "gated_deltanet": (DELTA,) * 3,
    "mamba3": (MAMBA3, MIMO, MAMBA3),
    "attention": (GQA, MLP) * 2,
    "window": (WINDOW, MLP),
    "biases": (BIASED, MLP),
    "hybrid": (MAMBA2, GQA, MLP, WINDOW, MAMBA2),
    **{name: WAYS[name] for name in ("gated attention", "mamba2 options", "mamba1 norms")},
    **{name: WAYS[name] for name in ("experts", "parallel", "gated_conv", "two shared blocks")},
}


def config(stack: str, **changes) -> LMConfig:
    return LMConfig(**{"d_model": 16, "vocab_size": 29, "layers": STACKS[stack], **changes})


def build(config: LMConfig, dtype=torch.float32) -> LanguageModel:
    return LanguageModel(config).to(dtype).requires_grad_(False)


def read(model: LanguageModel, batch: int, seqlen: int, **options):
    return model(torch.zeros(batch, seqlen, dtype=torch.int64), **options)[1]


@pytest.mark.parametrize(("preset", "parameters"), PUBLISHED.items())
def test_published_parameter_counts(preset, parameters):
    lm = PRESETS[preset].lm
    assert LMCost(lm).parameters == parameters
    assert count_parts(PRESETS[preset])["lm"] == parameters


@pytest.mark.parametrize("preset", PRESETS)
def test_the_formula_of_a_preset_counts_its_parameters(preset):
    with torch.device("meta"):
        model = LanguageModel(PRESETS[preset].lm)
    assert LMCost(PRESETS[preset].lm).parameters == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("stack", STACKS)
def test_the_formula_of_a_stack_counts_its_parameters(stack, is_tied):
    lm = config(stack, tie_word_embeddings=is_tied)
    assert LMCost(lm).parameters == sum(p.numel() for p in build(lm).parameters())


@pytest.mark.parametrize("kind", LAYERS)
def test_every_kind_of_layer_is_counted_here(kind):
    assert any(layer.kind == kind for layers in STACKS.values() for layer in layers)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stack", STACKS)
def test_state_bytes_are_those_of_a_filled_state(stack, dtype):
    lm = config(stack)
    model, size = build(lm, dtype), dtype.itemsize
    for context in (1, 5, 6, 40):
        expected = LMCost(lm).state_bytes(context, size)
        assert read(model, 1, context).nbytes == expected
        assert read(model, 3, context).nbytes == 3 * expected
        assert model.allocate_state(2, capacity=context).nbytes == 2 * expected
        reserved = model.allocate_state(1, capacity=context)
        half = read(model, 1, (context + 1) // 2, state=reserved, overwrite_state=True)
        assert half.nbytes == expected


def test_state_bytes_by_hand():
    lm, context = config("hybrid"), 10
    mamba2 = 4 * (32 * 5) + 2 * (32 + 2 * 2 * 5) * 2
    gqa = context * (2 * 2 * 8 * 2 + 8)
    window = 6 * (2 * 1 * 8 * 2 + 8)
    assert LMCost(lm).state_bytes(context, activation_bytes=2) == 2 * mamba2 + gqa + window


def test_state_bytes_of_mamba3_by_hand():
    """Matrices, phases and keys in float32, values as the activations."""
    siso = 4 * (32 * 5 + 4 * 1 + 4 * 5) + 2 * 32
    mimo = 4 * (48 * 7 + 12 * 3 + 2 * 12 * 7) + 2 * 48
    assert LMCost(config("mamba3")).state_bytes(10, activation_bytes=2) == 2 * siso + mimo


def test_state_bytes_of_mamba2_130m():
    """18.9 MB of matrix states in float32, whatever the context; tails come on top."""
    cost = LMCost(PRESETS["mamba2-130m"].lm)
    matrices, tails = 24 * 24 * 64 * 128 * 4, 24 * 1792 * 3
    assert matrices == 18_874_368
    for context in (1, 256, 16_384, 10**6):
        assert cost.state_bytes(context, 2) == matrices + 2 * tails
        assert cost.state_bytes(context, 4) == matrices + 4 * tails
    with torch.device("meta"):
        model = LanguageModel(PRESETS["mamba2-130m"].lm)
        assert model.bfloat16().allocate_state(1).nbytes == matrices + 2 * tails


def test_state_bytes_of_mamba2_2_7b():
    """41.9M elements, 160 MiB in float32."""
    cost = LMCost(PRESETS["mamba2-2.7b"].lm)
    assert cost.state_bytes(1, 0) == 160 * 2**20


def test_the_cache_of_the_twin_grows_and_the_state_does_not():
    ours, twin = LMCost(PRESETS["mamba2-2.7b"].lm), LMCost(PRESETS["transformer-2.7b"].lm)
    assert ours.state_bytes(10**6) == ours.state_bytes(1)
    assert twin.state_bytes(2000) == 2 * twin.state_bytes(1000)
    assert twin.state_bytes(10**6) > 50 * ours.state_bytes(10**6)


# Operations by hand; d_model 16, d_inner 32 in 4 heads of 8, d_state 5, 2 groups: 52 channels of convolution.
HEAD = 2 * 16 * 29
MAMBA2_FLOPS = 2 * (16 * (32 + 52 + 4) + 32 * 16) + 2 * 52 * 3 + 5 * 32 * 5
GQA_FLOPS, GQA_SEEN = 2 * (16 * 32 + 2 * 16 * 16 + 32 * 16), 2 * (32 + 32)
WINDOW_FLOPS, WINDOW_SEEN = 2 * (16 * 32 + 2 * 16 * 8 + 32 * 16), 2 * (32 + 32)
MLP_FLOPS = 2 * 3 * 16 * 24


@pytest.mark.parametrize("context", [0, 3, 5, 6, 100])
def test_decode_flops_by_hand(context):
    found = LMCost(config("hybrid")).decode_flops(context)
    fixed = HEAD + 2 * MAMBA2_FLOPS + GQA_FLOPS + MLP_FLOPS + WINDOW_FLOPS
    assert found == fixed + (context + 1) * GQA_SEEN + min(context + 1, 6) * WINDOW_SEEN


@pytest.mark.parametrize("seqlen", [1, 5, 6, 7, 50])
def test_prefill_flops_are_those_of_its_steps_but_for_the_head(seqlen):
    cost = LMCost(config("hybrid"))
    steps = sum(cost.decode_flops(context) for context in range(seqlen))
    assert cost.prefill_flops(seqlen) == steps - (seqlen - 1) * HEAD


def test_decode_flops_of_a_transformer_are_those_that_torch_counts():
    model = build(config("attention"))
    for context in (1, 9):
        state = read(model, 1, context)
        with FlopCounterMode(display=False) as counter:
            read(model, 1, 1, state=state, overwrite_state=True)
        assert counter.get_total_flops() == LMCost(config("attention")).decode_flops(context)


def test_decode_flops_of_mamba2_hold_the_matrix_products_that_torch_counts():
    """Scan and convolution are no matrix products when decoding; the rest is."""
    assert products_of_a_step("mamba2") == LMCost(config("mamba2")).decode_flops(4) - 3 * (2 * 52 * 3 + 5 * 32 * 5)


def test_decode_flops_of_gated_deltanet_hold_the_matrix_products_that_torch_counts():
    """6 states of 4 x 5, and 2 * 2 * 5 + 6 * 4 channels of the convolution."""
    expected = LMCost(config("gated_deltanet")).decode_flops(4) - 3 * (2 * 44 * 3 + 7 * 6 * 4 * 5)
    assert products_of_a_step("gated_deltanet") == expected


def products_of_a_step(stack: str) -> int:
    model = build(config(stack))
    state = read(model, 1, 4)
    with FlopCounterMode(display=False) as counter:
        read(model, 1, 1, state=state, overwrite_state=True)
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm]


def test_decode_flops_of_mamba3_hold_the_projections_that_torch_counts():
    model = build(config("mamba3"))
    state = read(model, 1, 4)
    with FlopCounterMode(display=False) as counter:
        read(model, 1, 1, state=state, overwrite_state=True)
    products = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    assert products == LMCost(config("mamba3")).decode_flops(4) - 2 * 7 * 32 * 5 - 13 * 48 * 7


@pytest.mark.parametrize("weight_bytes", [2, 4])
@pytest.mark.parametrize("batch", [1, 3])
def test_decode_bytes_by_hand(batch, weight_bytes):
    lm, context = config("hybrid"), 40
    mamba2 = 2 * 4 * 32 * 5  # read and written
    keys = context * 2 * 2 * 8 * weight_bytes + 6 * 2 * 1 * 8 * weight_bytes
    expected = LMCost(lm).parameters * weight_bytes + batch * (2 * mamba2 + keys)
    assert LMCost(lm).decode_bytes(context, weight_bytes, batch) == expected


def test_decode_bytes_of_mamba2_do_not_depend_on_the_context():
    cost = LMCost(PRESETS["mamba2-130m"].lm)
    assert cost.decode_bytes(10) == cost.decode_bytes(10**6) == 2 * 128_989_632 + 2 * 18_874_368


def test_parts_are_counted_one_by_one():
    parts = count_parts(PRESETS["tiny"])
    assert parts["lm"] == LMCost(PRESETS["tiny"].lm).parameters
    assert parts["lm"] < sum(parts.values())


def test_work_is_prefill_with_more_logits_or_none():
    for stack in STACKS:
        cost = LMCost(config(stack))
        for seqlen, logits in ((1, 0), (9, 0), (9, 1), (9, 9)):
            work = cost.work(seqlen, logits)
            assert work.weights + work.mixing == cost.prefill_flops(seqlen) + (logits - 1) * HEAD
    assert LMCost(config("attention")).work(9, 2).mixing == 45 * 2 * GQA_SEEN


def test_what_a_pass_back_costs_depends_on_what_learns():
    work = Work(weights=10.0, mixing=1.0)
    assert work.training_flops() == 3 * 11
    assert work.training_flops(learning=1.0, is_behind=False) == 3 * 11
    assert work.training_flops(learning=0.0, is_behind=True) == 2 * 10 + 3
    assert work.training_flops(learning=0.25, is_behind=False) == 2.25 * 10 + 3
    assert work.training_flops(learning=0.0, is_behind=False) == 11


def meta_model(**changes) -> Cobra:
    with torch.device("meta"):
        return Cobra(replace(PRESETS["tiny"], **changes), Tokenizer.bytes())


def count(module: torch.nn.Module, *size: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(torch.zeros(size, device="meta"))
    return counter.get_total_flops()


def test_every_kind_of_tower_has_a_formula():
    assert TOWERS.keys() == VISION_ENCODERS.keys()


@pytest.mark.parametrize("preset", ["tiny", "cobra-3b", "llava-1.5"])
def test_operations_of_a_tower_are_those_that_torch_counts(preset):
    """Small, fused and single; with class and register tokens or without."""
    parts = PRESETS[preset]
    model = meta_model(image=parts.image, vision_encoder=parts.vision_encoder)
    work = tile_work(model)["vision_encoder"]
    counted = count(model.vision_encoder, 1, 3, parts.image.height, parts.image.width)
    assert work.weights + work.mixing == counted
    assert 0 < work.mixing < work.weights


@pytest.mark.parametrize("scales", [(1, 2), (2, 3)], ids=str)
@pytest.mark.parametrize("tower", [PRESETS["tiny"].vision_encoder, PRESETS["llava-1.5"].vision_encoder], ids=str)
def test_operations_at_several_scales_are_those_that_torch_counts(tower, scales):
    image = ImageConfig(height=336, width=168)
    model = meta_model(image=image, vision_encoder=S2EncoderConfig(tower=tower, scales=scales))
    work = tile_work(model)["vision_encoder"]
    assert work.weights + work.mixing == count(model.vision_encoder, 1, 3, image.height, image.width)


@pytest.mark.parametrize(
    "kind", ["linear", "mlp", "fused_mlp", "ldpv2", "fused_ldp", "pool2d", "space_to_depth", "reshape", "mqt"]
)
def test_operations_of_a_connector_are_those_that_torch_counts(kind):
    model = meta_model(connector=CONNECTORS[kind].Config(), image=ImageConfig(height=72, width=56))
    work = tile_work(model)["connector"]
    assert work.weights + work.mixing == count(model.connector, 1, 9, 7, 128)
    assert work.mixing == (4 * 256 * 63 * 128 if kind == "mqt" else 0)


@pytest.mark.parametrize("behind", ["vision_encoder", "connector"])
def test_a_connector_in_front_of_which_tokens_become_fewer_acts_on_those(behind):
    reduced = ToMeConfig(num_tokens=10, behind=behind)
    model = meta_model(connector=CONNECTORS["mlp"].Config(), token_reduction=reduced)
    assert tile_work(model)["connector"] == Work(2 * (64 if behind == "connector" else 10) * 2 * 128 * 128, 0)


def test_operations_of_scanning_connectors_by_hand():
    cells, d = 64, 128
    msc = tile_work(meta_model())["connector"]  # cross4, d_state 16, expand 1, one block with SwiGLU
    channels, heads = d + 2 * 16, 2
    mixer = d * (d + channels + heads) + d * d + 4 * channels * 4
    assert msc == Work(2 * cells * (d * d + mixer + 3 * d * d + d * d), 5 * 4 * cells * d * 16)
    vss = tile_work(meta_model(connector=CONNECTORS["vss_l2"].Config(order="bi2")))["connector"]
    inner, rank = 2 * d, 8
    scan = d * 2 * inner + 9 * inner + inner * 2 * (rank + 32) + 2 * rank * inner + inner * d
    assert vss == Work(2 * cells * (2 * d * d + scan), 7 * 2 * cells * inner * 16)
