"""Jamba as transformers publishes it: Mamba with norms inside or attention, and behind each a feed-forward layer or
experts."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

from cobra.lm import LMConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mlp import MLPConfig
from cobra.lm.moe import MoEConfig

from .hybrid import blocks, finish
from .layout import Layout, Options, is_published_as


def _read(options: Options) -> LMConfig:
    d_model, eps = options.take("hidden_size", int), options.take("rms_norm_eps", float, 1e-6)
    num_heads, d_ff = options.take("num_attention_heads", int, 32), options.take("intermediate_size", int, 14336)
    if options.is_set("mamba_dt_rank", "auto"):
        options.ignore("mamba_dt_rank")
    mamba = Mamba1Config(
        d_state=options.take("mamba_d_state", int, 16),
        expand=options.take("mamba_expand", int, 2),
        d_conv=options.take("mamba_d_conv", int, 4),
        dt_rank=options.take("mamba_dt_rank", int, None),
        inner_norms="learned",
        norm_eps=eps,
        bias=options.take("mamba_proj_bias", bool, False),
        conv_bias=options.take("mamba_conv_bias", bool, True),
    )
    attention = AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=options.take("num_key_value_heads", int, num_heads),
        headdim=d_model // max(num_heads, 1),
        rope_theta=None,
    )
    dense, num_experts = MLPConfig(d_ff=d_ff), options.take("num_experts", int, 16)
    experts = dense
    top_k = options.take("num_experts_per_tok", int, 2)
    if num_experts > 1:
        experts = MoEConfig(num_experts=num_experts, top_k=top_k, d_ff=d_ff, norm_topk=False)
    attends, has_experts = _periodic(options, "attn_layer", 8, 4), _periodic(options, "expert_layer", 2, 1)
    layers = [
        layer
        for index in range(options.take("num_hidden_layers", int))
        for layer in (attention if attends(index) else mamba, experts if has_experts(index) else dense)
    ]
    options.demand("attention_dropout", 0.0)
    options.demand("sliding_window")
    options.demand("mamba_inner_layernorms", True)
    options.ignore("use_mambapy", "use_associative_scan", "calc_logits_for_entire_prompt", "n_ctx", "auto_map")
    return finish(options, d_model, layers, eps)


def _periodic(options: Options, name: str, period: int, offset: int):
    """Which layers something is in: every so many-th, from an offset on."""
    period, offset = options.take(f"{name}_period", int, period), options.take(f"{name}_offset", int, offset)
    return lambda index: index % max(period, 1) == offset


def _prefixes(config: LMConfig) -> dict[str, str]:
    def mixers(layer, block: str) -> dict[str, str]:
        norms = {f"{own}_norm.": f"{block}mamba.{theirs}_layernorm." for own, theirs in NORMS.items()}
        return {**norms, "": f"{block}mamba."} if layer.kind == "mamba1" else {"": f"{block}self_attn."}

    return blocks(config, mixers)


def _first_prefixes(config: LMConfig) -> dict[str, str]:
    """As the model's first code named things, in which a feed-forward layer was an expert without a router."""
    names = _prefixes(config)
    for own, theirs in names.items():
        for later, first in FIRST.items():
            theirs = theirs.replace(later, first)
        number = int(own.split(".")[1]) if own.startswith("layers.") else 0
        is_dense = own.endswith("mixer.") and config.layers[number].kind == "mlp"
        names[own] = theirs + "experts.0." * is_dense
    return names


NORMS = {"dt": "dt", "B": "b", "C": "c"}
FIRST = {
    ".b_layernorm.": ".B_layernorm.", ".c_layernorm.": ".C_layernorm.", ".pre_ff_layernorm.": ".pre_moe_layernorm.",
    ".feed_forward.": ".moe.",
}  # fmt: skip


def has_first_names(names: Collection[str]) -> bool:
    return any(".pre_moe_layernorm." in name for name in names)


def _detects(is_first: bool) -> Callable[[Mapping[str, Any], Collection[str]], bool]:
    is_jamba = is_published_as("jamba", "model.embed_tokens.weight")
    return lambda config, names: is_jamba(config, names) and has_first_names(names) == is_first


JAMBA = Layout(
    name="transformers Jamba",
    detects=_detects(False),
    read_config=_read,
    prefixes=_prefixes,
)
JAMBA_FIRST = Layout(
    name="Jamba of its first code",
    detects=_detects(True),
    read_config=_read,
    prefixes=_first_prefixes,
)
