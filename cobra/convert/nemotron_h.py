"""Nemotron-H as transformers publishes it: Mamba-2, attention, feed-forward layers and experts in any order."""

from cobra.lm import LMConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from cobra.lm.moe import MoEConfig
from vision_scan.errors import UserError, choose

from .hybrid import LAYER_TYPES, finish
from .layout import Layout, Options, is_published_as
from .mamba import read_dt_limit


def _read_nemotron_h(options: Options) -> LMConfig:
    d_model, eps = options.take("hidden_size", int), options.take("layer_norm_epsilon", float, 1e-5)
    bias, mlp_bias = options.take("use_bias", bool, False), options.take("mlp_bias", bool, False)
    attention_bias = options.take("attention_bias", bool, False)
    headdim = options.take("head_dim", int, options.take("attention_head_dim", int, 128))
    nheads, mamba_headdim = options.take("mamba_num_heads", int, 128), options.take("mamba_head_dim", int, 64)
    activation = options.take("mlp_hidden_act", str, "relu2")
    num_heads = options.take("num_attention_heads", int, 32)
    layers = {
        "mamba": Mamba2Config(
            d_state=options.take("ssm_state_size", int, 128),
            headdim=mamba_headdim,
            d_inner=nheads * mamba_headdim,
            ngroups=options.take("n_groups", int, 8),
            d_conv=options.take("conv_kernel", int, 4),
            chunk_size=options.take("chunk_size", int, 128),
            norm_eps=eps,
            bias=bias,
            conv_bias=options.take("use_conv_bias", bool, True),
            dt_limit=read_dt_limit(options, "time_step_limit"),
        ),
        "attention": AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=options.take("num_key_value_heads", int, num_heads),
            headdim=headdim,
            rope_theta=None,
            qkv_bias=attention_bias,
            o_bias=attention_bias,
        ),
        "mlp": MLPConfig(
            d_ff=options.take("intermediate_size", int, 21504), activation=activation, gated=False, bias=mlp_bias
        ),
    }
    kinds = _nemotron_kinds(options)
    if "moe" in kinds:
        layers["moe"] = _read_nemotron_experts(options, activation, mlp_bias)
    options.ignore(*NEMOTRON_EXPERTS)
    options.demand("mamba_hidden_act", "silu")
    options.demand("mamba_proj_bias", bias)
    options.demand("sliding_window")
    options.demand("attention_dropout", 0.0)
    options.demand("hidden_dropout", 0.0)
    options.demand("num_nextn_predict_layers", 0)
    options.ignore("mtp_layers_block_type", "mtp_hybrid_override_pattern", "expand", "mamba_ssm_cache_dtype")
    options.ignore("residual_in_fp32", "rescale_prenorm_residual", "rope_theta", "partial_rotary_factor")
    options.ignore(*(f"time_step_{name}" for name in ("min", "max", "floor", "rank")), "norm_eps", "rms_norm_eps")
    options.ignore("hidden_act")  # of no layer
    return finish(options, d_model, [layers[kind] for kind in kinds], eps)


NEMOTRON_EXPERTS = (
    "n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "moe_shared_expert_intermediate_size",
    "moe_latent_size", "moe_shared_expert_overlap", "routed_scaling_factor", "n_group", "topk_group", "norm_topk_prob",
    "n_shared_experts",
)  # fmt: skip


def _nemotron_kinds(options: Options) -> list[str]:
    """Of each layer, from a list of words or a text of letters."""
    where = f"{options.where}: kind of layer"
    pattern = options.take("hybrid_override_pattern", str, "")
    words = options.take("layers_block_type", list, [])
    letters = {"M": "mamba", "-": "mlp", "*": "attention", "E": "moe"}
    if words:
        return [choose(where, word, {**LAYER_TYPES, "mlp": "mlp", "moe": "moe"}) for word in words]
    if not pattern:
        raise UserError(f"{options.where}: neither layers_block_type nor hybrid_override_pattern is there")
    return [choose(where, letter, letters) for letter in pattern]


def _read_nemotron_experts(options: Options, activation: str, bias: bool) -> MoEConfig:
    if bias:
        raise UserError(f"{options.where}: mlp_bias is true, which is not supported with experts")
    options.demand("n_shared_experts", 1)
    return MoEConfig(
        num_experts=options.take("n_routed_experts", int),
        top_k=options.take("num_experts_per_tok", int),
        d_ff=options.take("moe_intermediate_size", int),
        activation=activation,
        gated=False,
        scores="sigmoid",
        norm_topk=options.take("norm_topk_prob", bool, True),
        routed_scale=options.take("routed_scaling_factor", float, 1.0),
        num_groups=options.take("n_group", int, 1),
        top_groups=options.take("topk_group", int, 1),
        shared_d_ff=options.take("moe_shared_expert_intermediate_size", int),
        d_latent=options.take("moe_latent_size", int, None),
    )


def _nemotron_h_prefixes(config: LMConfig) -> dict[str, str]:
    names = {"embedding.": "backbone.embeddings.", "norm_f.": "backbone.norm_f.", "lm_head.": "lm_head."}
    for index, layer in enumerate(config.layers):
        own, theirs = f"layers.{index}.mixer.", f"backbone.layers.{index}.mixer."
        if layer.kind == "moe":
            names |= {
                f"{own}router.correction": f"{theirs}gate.e_score_correction_bias",
                f"{own}router.": f"{theirs}gate.",
                f"{own}shared.": f"{theirs}shared_experts.",
                f"{own}down_proj.": f"{theirs}fc1_latent_proj.",
                f"{own}up_proj.": f"{theirs}fc2_latent_proj.",
            }
        names[f"layers.{index}."] = f"backbone.layers.{index}."
    return names


NEMOTRON_H = Layout(
    name="transformers Nemotron-H",
    detects=is_published_as("nemotron_h", "backbone.embeddings.weight"),
    read_config=_read_nemotron_h,
    prefixes=_nemotron_h_prefixes,
)
