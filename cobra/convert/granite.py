"""Granite 4.0 H as transformers publishes it: Mamba-2 or attention, and behind each a feed-forward layer or experts."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cobra.lm import LMConfig
from cobra.lm.mlp import MLPConfig
from cobra.lm.moe import MoEConfig
from vision_scan.errors import UserError, choose

from .hybrid import LAYER_TYPES, OUTPUTS, finish, multiplier, read_attention, read_mamba, stream_eps
from .layout import Layout, Options, Piece, Pieces, Shapes, is_published_as


def _read_granite(options: Options) -> LMConfig:
    d_model, eps = options.take("hidden_size", int), options.take("rms_norm_eps", float, 1e-6)
    count = options.take("num_hidden_layers", int)
    kinds = options.take("layer_types", list, ["mamba"] * count)
    has_positions = options.is_set("position_embedding_type", "rope")
    options.demand("position_embedding_type", "rope", "nope")
    options.demand("normalization_function", "rmsnorm")
    attention = read_attention(options, d_model)
    if not has_positions:
        attention = replace(attention, rope_theta=None, rope_scaling=None)
    mixers = {"mamba": read_mamba(options, d_model, eps), "attention": attention}
    feed_forward = _read_granite_experts(options)
    if len(kinds) != count:
        raise UserError(f"{options.where}: layer_types has {len(kinds)} entries for {count} layers")
    layers = [
        layer
        for kind in kinds
        for layer in (mixers[choose(f"entry of layer_types in {options.where}", kind, LAYER_TYPES)], feed_forward)
    ]
    options.ignore("init_method")
    options.ignore("residual_multiplier", "attention_multiplier", "logits_scaling")  # see _adapt_granite
    return finish(options, d_model, layers, stream_eps(options, eps))


def _read_granite_experts(options: Options) -> MLPConfig | MoEConfig:
    shared, d_ff = options.take("shared_intermediate_size", int, 1024), options.take("intermediate_size", int, 11008)
    num_experts, top_k = options.take("num_local_experts", int, 8), options.take("num_experts_per_tok", int, 2)
    if not num_experts:
        return MLPConfig(d_ff=shared)
    return MoEConfig(num_experts=num_experts, top_k=top_k, d_ff=d_ff, shared_d_ff=shared)


def _granite_prefixes(config: LMConfig) -> dict[str, str]:
    names = {"embedding.": "model.embed_tokens.", "norm_f.": "model.norm.", "lm_head.": "lm_head."}
    for index in range(len(config.layers) // 2):
        mixer, feed_forward, block = f"layers.{2 * index}.", f"layers.{2 * index + 1}.", f"model.layers.{index}."
        is_mamba = config.layers[2 * index].kind == "mamba2"
        has_experts = config.layers[2 * index + 1].kind == "moe"
        experts = {
            f"{feed_forward}mixer.router.": f"{block}block_sparse_moe.router.layer.",
            f"{feed_forward}mixer.shared.down_proj.": f"{block}shared_mlp.output_linear.",
            f"{feed_forward}mixer.shared.": f"{block}shared_mlp.",
            f"{feed_forward}mixer.experts.": f"{block}block_sparse_moe.",
        }
        dense = {
            f"{feed_forward}mixer.down_proj.": f"{block}shared_mlp.output_linear.",
            f"{feed_forward}mixer.": f"{block}shared_mlp.",
        }
        names |= {
            f"{mixer}norm.": f"{block}input_layernorm.",
            f"{mixer}mixer.": f"{block}mamba." if is_mamba else f"{block}self_attn.",
            f"{feed_forward}norm.": f"{block}post_attention_layernorm.",
            **(experts if has_experts else dense),
        }
    return names


def _adapt_granite(
    config: LMConfig, options: Mapping[str, Any], pieces: Pieces, shapes: Shapes
) -> Pieces:
    stream = multiplier(options, "residual_multiplier") / multiplier(options, "embedding_multiplier")
    adapted = {}
    for name, (piece,) in pieces.items():
        _, number, *_ = name.split(".")
        layer = config.layers[int(number)] if name.startswith("layers.") else None
        leaf, factor = name.rpartition("mixer.")[2], stream if name.endswith(OUTPUTS) else 1.0
        if layer is not None and leaf in ("q_proj.weight", "q_proj.bias"):
            factor = multiplier(options, "attention_multiplier") * layer.headdim**0.5
        if name == "norm_f.weight":
            factor = 1 / multiplier(options, "logits_scaling")
        if leaf.startswith("experts."):
            _, expert, projection, _ = leaf.split(".")
            piece = _expert(piece.name, int(expert), projection, layer, config.d_model)
        elif leaf.removeprefix("shared.") in ("gate_proj.weight", "up_proj.weight"):
            linear = piece.name.rpartition("shared_mlp.")[0] + "shared_mlp.input_linear.weight"
            piece = _half(linear, "gate" in leaf, shapes[name])
        adapted[name] = (replace(piece, factor=factor),)
    return adapted


def _half(name: str, is_first: bool, shape: tuple[int, ...]) -> Piece:
    """A projection that stands above or below another in one tensor."""
    rows, *rest = shape
    own = slice(0, rows) if is_first else slice(rows, 2 * rows)
    return Piece(name, (2 * rows, *rest), lambda both: both[own])


def _expert(name: str, number: int, projection: str, moe: MoEConfig, d_model: int) -> Piece:
    """A projection of one expert in the tensor of all."""
    block, count, d_ff = name.partition("block_sparse_moe.")[0] + "block_sparse_moe.", moe.num_experts, moe.d_ff
    if projection == "down_proj":
        return Piece(f"{block}output_linear.weight", (count, d_model, d_ff), lambda all_of_them: all_of_them[number])
    start = 0 if projection == "gate_proj" else d_ff
    return Piece(
        f"{block}input_linear.weight",
        (count, 2 * d_ff, d_model),
        lambda all_of_them: all_of_them[number, start : start + d_ff],
    )


GRANITE = Layout(
    name="transformers Granite-4.0-H",
    detects=is_published_as("granitemoehybrid", "model.embed_tokens.weight"),
    read_config=_read_granite,
    prefixes=_granite_prefixes,
    adapt=_adapt_granite,
)
