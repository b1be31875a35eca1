"""MambaInLlama: Llama, with Mamba or Mamba-2 in place of attention in some of its layers, whose x, B and C were values,
keys and queries.

Source: Wang et al. 2024, "The Mamba in the Llama" (arXiv:2408.15237), as published with jxiw/MambaInLlama: what is
Llama's stands in config.json, the rest in mamba_config.json beside it.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from cobra.lm import LMConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from vision_scan.errors import UserError

from .layout import Layout, Options, Piece, Pieces, Shapes
from .mamba import TRAINING_KEYS, read_dt_limit, read_dt_rank
from .source import BESIDE
from .transformer import LLAMA, TABLES, block_prefixes, is_llama

Mixer = Mamba1Config | Mamba2Config
PROJECTIONS = ("in_proj_x", "in_proj_z", "B_proj", "C_proj", "dt_proj_down")  # of Mamba, in the order of our own


def _reads(read_mixer: Callable[[Options, int, int], Mixer]) -> Callable[[Options], LMConfig]:
    """Llama's configuration with some mixers exchanged.

    Args:
        read_mixer: (ssm_cfg, d_inner, d_xb) -> a mixer.
    """

    def read(options: Options) -> LMConfig:
        mamba = options.section(BESIDE)
        llama = LLAMA.read_config(options)
        attention, feed_forward, *_ = llama.layers
        depth = len(llama.layers) // 2
        ssm = mamba.section("ssm_cfg")
        d_inner = mamba.take("d_inner", int, ssm.take("expand", int, 2) * llama.d_model)
        mixer = read_mixer(ssm, d_inner, mamba.take("d_xb", int))
        ssm.close()
        mixer.projected(llama.d_model)  # raises what does not fit, while it is known of which file that is
        attends = mamba.take("attn_layers", list)
        mamba.demand("n_layer", depth)
        mamba.demand("d_model", llama.d_model)
        mamba.demand("intermediate_size", feed_forward.d_ff)
        mamba.demand("rms_norm_eps", llama.norm_eps)
        mamba.demand("vocab_size", llama.vocab_size)
        mamba.demand("hidden_act", "silu", "swish")
        mamba.close()
        if not set(attends) <= set(range(depth)):
            raise UserError(f"{mamba.where}: attn_layers is {attends!r}, must be numbers of layers below {depth}")
        layers = [
            layer for index in range(depth) for layer in (attention if index in attends else mixer, feed_forward)
        ]
        return replace(llama, layers=tuple(layers))

    return read


def _mamba1(ssm: Options, d_inner: int, d_xb: int) -> Mamba1Config:
    ssm.demand("repeat_kv_before_conv", True)
    for name in ("proj_x_bias", "proj_z_bias", "out_proj_bias"):
        ssm.demand(name, False)
    ssm.ignore(*TRAINING_KEYS)
    return Mamba1Config(
        d_state=ssm.take("d_state", int, 16),
        d_inner=d_inner,
        d_xb=d_xb,
        d_conv=ssm.take("d_conv", int, 4),
        dt_rank=read_dt_rank(ssm, "dt_rank"),
        conv_bias=ssm.take("conv_bias", bool, True),
    )


def _mamba2(ssm: Options, d_inner: int, d_xb: int) -> Mamba2Config:
    ssm.demand("repeat_kv_before_conv", False)
    ssm.demand("d_ssm")
    ssm.demand("bias", False)
    ssm.ignore(*TRAINING_KEYS, "headdim")  # a head has as many channels as states, whatever it says
    d_state = ssm.take("d_state", int, 128)
    return Mamba2Config(
        d_state=d_state,
        headdim=d_state,
        d_inner=d_inner,
        ngroups=ssm.take("ngroups", int, 1),
        d_xb=d_xb,
        d_conv=ssm.take("d_conv", int, 4),
        chunk_size=ssm.take("chunk_size", int, 256),
        rmsnorm=ssm.take("rmsnorm", bool, True),
        norm_before_gate=ssm.take("norm_before_gate", bool, False),
        conv_bias=ssm.take("conv_bias", bool, True),
        D_has_hdim=ssm.take("D_has_hdim", bool, False),
        dt_limit=read_dt_limit(ssm, "dt_limit"),
    )


def _prefixes(config: LMConfig) -> dict[str, str]:
    return {**TABLES, **block_prefixes(config, "model", lambda layer: _NAMES.get(layer.kind, "mamba"))}


_NAMES = {"attention": "self_attn"}


def _adapt(config: LMConfig, options: Mapping[str, Any], pieces: Pieces, shapes: Shapes) -> Pieces:
    """Mamba's projections from the layer's input stand in a tensor each."""
    adapted = {}
    for name, (piece,) in pieces.items():
        outer, projection, leaf = piece.name.rpartition("in_proj.")
        if projection:
            _, number, *_ = name.split(".")
            sizes = config.layers[int(number)].projected(config.d_model)
            adapted[name] = tuple(
                Piece(f"{outer}{own}.{leaf}", (size, config.d_model))
                for own, size in zip(PROJECTIONS, sizes, strict=True)
            )
    return adapted


def _detects(projection: str) -> Callable[[Mapping[str, Any], Collection[str]], bool]:
    end = f".mamba.{projection}.weight"
    return lambda config, names: is_llama(config, names) and any(name.endswith(end) for name in names)


MAMBA1_IN_LLAMA = Layout(
    name="MambaInLlama",
    detects=_detects("in_proj_x"),
    read_config=_reads(_mamba1),
    prefixes=_prefixes,
    left_out=LLAMA.left_out,
    adapt=_adapt,
)
MAMBA2_IN_LLAMA = Layout(
    name="MambaInLlama, Mamba-2",
    detects=_detects("in_proj"),
    read_config=_reads(_mamba2),
    prefixes=_prefixes,
    left_out=LLAMA.left_out,
)
