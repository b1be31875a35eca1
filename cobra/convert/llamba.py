"""Llamba: Llama's blocks, with a discrete Mamba-2 in place of attention.

Source: Bick et al. 2025, "Llamba: Scaling Distilled Recurrent Models for Efficient Language Processing"
(arXiv:2502.14458), as published with cartesia-ai/edge.
"""

from collections.abc import Mapping
from typing import Any

from cobra.lm import LMConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from vision_scan.errors import UserError, choose

from .layout import TRANSFORMERS_KEYS, Layout, Options, Piece, Pieces, Shapes, is_published_as, rows
from .mamba import padded_vocab
from .transformer import block_prefixes

NORM_EPS = 1e-5  # of the norms of all blocks, whatever `norm_epsilon` says, which is the last one's
ACTIVATIONS = {"identity": None, "silu": "silu", "swish": "silu"}


def _read(options: Options) -> LMConfig:
    d_model = options.take("d_model", int)
    layer, feed_forward = _read_mixer(options.section("ssm_cfg"), d_model), _read_mlp(options.section("mlp_cfg"))
    options.demand("norm_epsilon", NORM_EPS)
    options.demand("lm_head_bias", False)
    options.demand("lm_head_prenorm", "rms")
    options.ignore(*TRANSFORMERS_KEYS, "resid_dropout", "tie_word_embeddings")  # the last is not what ties them
    return LMConfig(
        d_model=d_model,
        vocab_size=padded_vocab(options),
        layers=(layer, feed_forward) * options.take("n_layer", int, 32),
        norm_eps=NORM_EPS,
        tie_word_embeddings=options.take("tie_embeddings", bool, False),
    )


def _read_mixer(ssm: Options, d_model: int) -> Mamba2Config:
    d_inner, nheads = ssm.take("expand", int, 1) * d_model, ssm.take("n_v_heads", int, 32)
    bias = ssm.take("bias", bool, False)
    if d_inner % max(nheads, 1):
        raise UserError(f"{ssm.where}: n_v_heads {nheads} must divide expand * d_model, which is {d_inner}")
    mixer = Mamba2Config(
        d_state=ssm.take("d_state", int, 64),
        headdim=d_inner // max(nheads, 1),
        d_inner=d_inner,
        ngroups=ssm.take("n_qk_heads", int, 32),
        d_conv=ssm.take("d_conv", int, 4),
        chunk_size=ssm.take("chunk_size", int, 128),
        rmsnorm=False,
        bias=bias,
        z_bias=not bias,
        conv_bias=ssm.take("conv_bias", bool, True),
        conv_activation=choose(f"activation in {ssm.where}", ssm.take("activation", str, "identity"), ACTIVATIONS),
        discrete=True,
    )
    ssm.close()
    mixer.nheads(d_model)  # raises what does not fit, while it is known of which file that is
    return mixer


def _read_mlp(mlp: Options) -> MLPConfig:
    mlp.demand("act_fn", "silu", "swish")
    mlp.demand("bias", False)
    feed_forward = MLPConfig(d_ff=mlp.take("intermediate_size", int, 14336))
    mlp.close()
    return feed_forward


def _prefixes(config: LMConfig) -> dict[str, str]:
    names = {"embedding.": "backbone.embedding.", "norm_f.": "backbone.final_layernorm.", "lm_head.": "lm_head."}
    return {**names, **block_prefixes(config, "backbone", lambda layer: "mixer")}


def _adapt(config: LMConfig, options: Mapping[str, Any], pieces: Pieces, shapes: Shapes) -> Pieces:
    """Their projection in makes x, B, C, z and dt; ours z, x, B, C and dt."""
    adapted = {}
    for name, (piece,) in pieces.items():
        if name.endswith((".in_proj.weight", ".in_proj.bias")):
            *_, z, xBC, _ = config.layers[0].projected(config.d_model)
            parts = (xBC, xBC + z), (0, xBC), (xBC + z, None)
            adapted[name] = tuple(Piece(piece.name, shapes[name], rows(*part)) for part in parts)
    return adapted


LLAMBA = Layout(
    name="Llamba",
    detects=is_published_as("llamba", "backbone.embedding.weight"),
    read_config=_read,
    prefixes=_prefixes,
    adapt=_adapt,
)
