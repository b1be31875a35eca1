"""Zamba2 as transformers publishes it: Mamba-2, and in front of some of its layers one of a few transformer blocks that
are used in turn."""

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from cobra.lm import LMConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from cobra.lm.shared_attention import SharedAttentionConfig, SharedBlockConfig
from vision_scan.errors import UserError, choose

from .layout import TRANSFORMERS_KEYS, Layout, Options, Piece, Pieces, Shapes, is_published_as, rows
from .transformer import read_rope

KINDS = {"linear_attention": "mamba", "mamba": "mamba", "hybrid": "hybrid"}


def _read(options: Options) -> LMConfig:
    d_model, eps = options.take("hidden_size", int), options.take("rms_norm_eps", float, 1e-5)
    bias = options.take("add_bias_linear", bool, False)
    mamba = _read_mamba(options, d_model, bias)
    shared = SharedBlockConfig(
        attention=_read_attention(options, d_model),
        mlp=MLPConfig(
            d_ff=options.take("intermediate_size", int, 4 * d_model),
            activation=options.take("hidden_act", str, "gelu"),
            bias=bias,
        ),
        norm_eps=eps,
    )
    num_blocks, rank = options.take("num_mem_blocks", int, 1), options.take("adapter_rank", int, 128)
    if num_blocks < 1:
        raise UserError(f"{options.where}: num_mem_blocks {num_blocks} must be 1 or more")
    use = SharedAttentionConfig(
        shared=shared,
        mamba=mamba,
        attention_rank=rank if options.take("use_shared_attention_adapter", bool, False) else 0,
        mlp_rank=rank,
    )
    layers, uses = [], 0
    for kind in _read_kinds(options):
        layers.append(replace(use, block=uses % num_blocks) if kind == "hybrid" else mamba)
        uses += kind == "hybrid"
    options.ignore(*TRANSFORMERS_KEYS, "num_logits_to_keep", "use_mamba_kernels", "use_mem_eff_path", "use_conv_bias")
    options.ignore("num_query_groups", "kv_channels", *(f"time_step_{name}" for name in ("min", "max", "floor")))
    return LMConfig(
        d_model=d_model,
        vocab_size=options.take("vocab_size", int, 32000),
        layers=tuple(layers),
        norm_eps=eps,
        tie_word_embeddings=options.take("tie_word_embeddings", bool, True),
    )


def _read_kinds(options: Options) -> list[str]:
    where = f"{options.where}: kind of layer"
    kinds = [choose(where, kind, KINDS) for kind in options.take("layers_block_type", list)]
    depth = options.take("num_hidden_layers", int, len(kinds))
    if depth != len(kinds):
        raise UserError(f"{options.where}: layers_block_type has {len(kinds)} entries for {depth} layers")
    options.demand("hybrid_layer_ids", [index for index, kind in enumerate(kinds) if kind == "hybrid"])
    return kinds


def _read_mamba(options: Options, d_model: int, bias: bool) -> Mamba2Config:
    d_inner, nheads = options.take("mamba_expand", int, 2) * d_model, options.take("n_mamba_heads", int, 8)
    if nheads < 1 or d_inner % nheads:
        raise UserError(
            f"{options.where}: n_mamba_heads {nheads} must divide mamba_expand * hidden_size, which is {d_inner}"
        )
    options.demand("mamba_headdim", d_inner // nheads)
    options.demand("time_step_limit", [0.0, math.inf])
    return Mamba2Config(
        d_state=options.take("mamba_d_state", int, 64),
        headdim=d_inner // nheads,
        d_inner=d_inner,
        ngroups=options.take("mamba_ngroups", int, 1),
        d_conv=options.take("mamba_d_conv", int, 4),
        chunk_size=options.take("chunk_size", int, 256),
        bias=bias,
    )


def _read_attention(options: Options, d_model: int) -> AttentionConfig:
    num_heads = options.take("num_attention_heads", int, 32)
    if num_heads < 1 or 2 * d_model % num_heads:
        raise UserError(
            f"{options.where}: num_attention_heads {num_heads} must divide 2 * hidden_size, which is {2 * d_model}"
        )
    headdim = 2 * d_model // num_heads
    options.demand("attention_head_dim", headdim)
    options.demand("head_dim", headdim)
    options.demand("attention_hidden_size", 2 * d_model)
    options.demand("attention_dropout", 0.0)
    options.demand("sliding_window")
    options.demand("use_long_context", False)
    rope: dict[str, Any] = {"rope_theta": None}
    if options.take("use_mem_rope", bool, False):
        rope = read_rope(options)
    options.ignore("rope_theta", "rope_parameters", "rope_scaling")
    num_kv_heads = options.take("num_key_value_heads", int, num_heads)
    return AttentionConfig(num_heads=num_heads, num_kv_heads=num_kv_heads, headdim=headdim, **rope)


def _prefixes(config: LMConfig) -> dict[str, str]:
    names = {"embedding.": "model.embed_tokens.", "norm_f.": "model.final_layernorm.", "lm_head.": "lm_head."}
    blocks: dict[int, str] = {}  # by number, what the first layer that uses it calls it
    uses = 0
    for index, layer in enumerate(config.layers):
        own, theirs = f"layers.{index}.", f"model.layers.{index}."
        if layer.kind == "mamba2":
            names |= {f"{own}norm.": f"{theirs}input_layernorm.", f"{own}mixer.": f"{theirs}mamba."}
            continue
        block = blocks.setdefault(layer.block, f"{theirs}shared_transformer.")
        names |= {
            f"{own}norm.": f"{theirs}mamba_decoder.input_layernorm.",
            f"{own}mixer.mamba.": f"{theirs}mamba_decoder.mamba.",
            f"{own}mixer.proj.": f"{theirs}linear.",
            f"{own}mixer.added.gate_up.": f"{block}feed_forward.gate_up_proj_adapter_list.{uses}.",
            **{
                f"{own}mixer.added.{name}.": f"{block}self_attn.linear_{name}_adapter_list.{uses}."
                for name in ("q", "k", "v")
            },
        }
        uses += 1
    for number, block in blocks.items():
        names |= {
            f"shared.{number}.norm.": f"{block}input_layernorm.",
            f"shared.{number}.attention.": f"{block}self_attn.",
            f"shared.{number}.mlp_norm.": f"{block}pre_ff_layernorm.",
            f"shared.{number}.mlp.": f"{block}feed_forward.",
        }
    return names


def _adapt(config: LMConfig, options: Mapping[str, Any], pieces: Pieces, shapes: Shapes) -> Pieces:
    """Their queries are sqrt(2) times as large as ours; gate and up are one projection."""
    adapted = {}
    for name, (piece,) in pieces.items():
        if name.endswith((".attention.q_proj.weight", ".added.q.1.weight")):
            adapted[name] = (replace(piece, factor=math.sqrt(2)),)
        for part, leaf in enumerate(("gate_proj", "up_proj")):
            if f".mlp.{leaf}." in name:
                d_ff, *others = shapes[name]
                both = piece.name.replace(leaf, "gate_up_proj")
                own = rows(part * d_ff, (part + 1) * d_ff)
                adapted[name] = (Piece(both, (2 * d_ff, *others), own),)
    return adapted


ZAMBA2 = Layout(
    name="transformers Zamba2",
    detects=is_published_as("zamba2", "model.embed_tokens.weight"),
    read_config=_read,
    prefixes=_prefixes,
    adapt=_adapt,
)
