"""Falcon-H1 as transformers publishes it: Mamba-2 and attention side by side, and behind them a feed-forward layer."""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from cobra.lm import LMConfig
from cobra.lm.mlp import MLPConfig
from cobra.lm.parallel import ParallelConfig

from .hybrid import blocks, finish, multiplier, multipliers, read_attention, read_mamba, stream_eps
from .layout import Layout, Options, Pieces, Shapes, is_published_as


def _read_falcon_h1(options: Options) -> LMConfig:
    d_model, eps = options.take("hidden_size", int), options.take("rms_norm_eps", float, 1e-5)
    mamba = replace(
        read_mamba(options, d_model, eps, options.take("mamba_d_ssm", int, None)),
        rmsnorm=options.take("mamba_rms_norm", bool, False),
        norm_before_gate=options.take("mamba_norm_before_gate", bool, True),
    )
    options.demand("projectors_bias", mamba.bias)  # of the projection out
    mixer = ParallelConfig(mixers=(mamba, read_attention(options, d_model)))
    feed_forward = MLPConfig(d_ff=options.take("intermediate_size", int), bias=options.take("mlp_bias", bool, False))
    for name in FALCON_H1_MULTIPLIERS:
        options.ignore(name)  # see _adapt_falcon_h1
    options.ignore("mamba_use_mlp", "mlp_expansion_factor", "attn_layer_indices")
    layers = (mixer, feed_forward) * options.take("num_hidden_layers", int)
    return finish(options, d_model, layers, stream_eps(options, eps))


FALCON_H1_MULTIPLIERS = (
    "attention_in_multiplier", "attention_out_multiplier", "key_multiplier", "lm_head_multiplier", "mlp_multipliers",
    "ssm_in_multiplier", "ssm_multipliers", "ssm_out_multiplier",
)  # fmt: skip


def _falcon_h1_prefixes(config: LMConfig) -> dict[str, str]:
    return blocks(config, lambda layer, block: {"mixers.0.": f"{block}mamba.", "mixers.1.": f"{block}self_attn."})


def _adapt_falcon_h1(
    config: LMConfig, options: Mapping[str, Any], pieces: Pieces, shapes: Shapes
) -> Pieces:
    by = partial(multiplier, options)
    stream, attention_in = 1 / by("embedding_multiplier"), by("attention_in_multiplier")
    gate, down = multipliers(options, "mlp_multipliers", 2)
    mamba = config.layers[0].mixers[0]
    groups = mamba.ngroups * mamba.d_state
    _, _, d_ssm, _, nheads = mamba.projected(config.d_model)
    sizes, by_part = (d_ssm, d_ssm, groups, groups, nheads), multipliers(options, "ssm_multipliers", 5)
    projected = torch.cat([torch.full((size,), value) for size, value in zip(sizes, by_part, strict=True)])
    # What a bias is added to was multiplied by what stands in front of it too, the bias by what stands behind.
    factors: dict[str, float | Tensor] = {
        "mixers.0.in_proj.weight": by("ssm_in_multiplier") * projected[:, None],
        "mixers.0.in_proj.bias": projected,
        "mixers.0.out_proj": stream * by("ssm_out_multiplier"),
        "mixers.1.q_proj.weight": attention_in,
        "mixers.1.k_proj.weight": attention_in * by("key_multiplier"),
        "mixers.1.k_proj.bias": by("key_multiplier"),
        "mixers.1.v_proj.weight": attention_in,
        "mixers.1.o_proj": stream * by("attention_out_multiplier"),
        "gate_proj": gate,
        "down_proj": stream * down,
        "norm_f.weight": by("lm_head_multiplier"),
    }
    adapted = {}
    for name, (piece,) in pieces.items():
        leaf = name.rpartition("mixer.")[2]
        found = [factor for part, factor in factors.items() if leaf == part or leaf.startswith(f"{part}.")]
        if found:
            adapted[name] = (replace(piece, factor=found[0]),)
    return adapted


FALCON_H1 = Layout(
    name="transformers Falcon-H1",
    detects=is_published_as("falcon_h1", "model.embed_tokens.weight"),
    read_config=_read_falcon_h1,
    prefixes=_falcon_h1_prefixes,
    adapt=_adapt_falcon_h1,
)
