"""What hybrids of Mamba-2 and attention have in common as transformers publishes them, and Bamba.

Files of some have multipliers beside the weights, of embeddings, layers and logits; here they are multiplied into the
weights, which computes the same, and runs on kernels that know nothing of them. One of the embeddings divides what all
layers add to the residual stream instead, whose size no norm sees, so that embeddings that are the head too stay as
they are; the norms' epsilon becomes smaller by its square.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from cobra.lm import LMConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from vision_scan.errors import UserError

from .layout import TRANSFORMERS_KEYS, Layout, Options, is_published_as
from .mamba import read_dt_limit
from .source import CONFIG
from .transformer import read_rope

OUTPUTS = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "out_proj.bias", "o_proj.bias", "down_proj.bias")
LAYER_TYPES = {"linear_attention": "mamba", "mamba": "mamba", "full_attention": "attention", "attention": "attention"}


def read_mamba(options: Options, d_model: int, norm_eps: float, d_ssm: int | None = None) -> Mamba2Config:
    """The options that begin with `mamba_`.

    Args:
        d_ssm: channels of the recurrence; None: `mamba_expand` times d_model.
    """
    expand = options.take("mamba_expand", int, 2)
    d_inner = d_ssm or expand * d_model
    nheads = options.take("mamba_n_heads", int, 128)
    if options.is_set("mamba_d_head", "auto"):
        options.ignore("mamba_d_head")
    headdim = options.take("mamba_d_head", int, d_inner // max(nheads, 1))
    if nheads * headdim != d_inner:
        raise UserError(f"{options.where}: mamba_n_heads {nheads} x mamba_d_head {headdim} are not {d_inner} channels")
    return Mamba2Config(
        d_state=options.take("mamba_d_state", int, 256),
        headdim=headdim,
        d_inner=d_inner,
        ngroups=options.take("mamba_n_groups", int, 1),
        d_conv=options.take("mamba_d_conv", int, 4),
        chunk_size=options.take("mamba_chunk_size", int, 256),
        norm_eps=norm_eps,
        bias=options.take("mamba_proj_bias", bool, False),
        conv_bias=options.take("mamba_conv_bias", bool, True),
        dt_limit=read_dt_limit(options, "time_step_limit"),
    )


def read_attention(options: Options, d_model: int, turning: float = 1.0) -> AttentionConfig:
    """The options of attention; `turning`: see `read_rope`."""
    num_heads = options.take("num_attention_heads", int)
    headdim = options.take("head_dim", int, d_model // max(num_heads, 1))
    bias = options.take("attention_bias", bool, False)
    options.demand("attention_dropout", 0.0)
    return AttentionConfig(
        num_heads=num_heads,
        num_kv_heads=options.take("num_key_value_heads", int, num_heads),
        headdim=headdim,
        qkv_bias=bias,
        o_bias=bias,
        **read_rope(options, headdim, turning),
    )


def finish(options: Options, d_model: int, layers: Sequence[Any], norm_eps: float) -> LMConfig:
    """The configuration of these layers, with what is left of the options."""
    options.demand("hidden_act", "silu", "swish")
    options.ignore(*TRANSFORMERS_KEYS, "num_logits_to_keep", "use_mamba_kernels", "output_router_logits")
    options.ignore("router_aux_loss_coef", "z_loss_coefficient", "num_hidden_layers")
    return LMConfig(
        d_model=d_model,
        vocab_size=options.take("vocab_size", int),
        layers=tuple(layers),
        norm_eps=norm_eps,
        tie_word_embeddings=options.take("tie_word_embeddings", bool, False),
    )


def multipliers(options: Mapping[str, Any], name: str, count: int) -> list[float]:
    """Several of config.json, all 1 where they are absent or null.

    Raises:
        UserError: if they are not so many numbers other than 0.
    """
    value = options.get(name)
    values = [1.0] * count if value is None else value if isinstance(value, list) else [value]
    if len(values) != count or not all(isinstance(each, (int, float)) and each for each in values):
        allowed = "a number" if count == 1 else f"{count} numbers"
        raise UserError(f"{CONFIG}: {name} is {value!r}, must be {allowed} other than 0")
    return [float(each) for each in values]


def multiplier(options: Mapping[str, Any], name: str) -> float:
    """One of config.json, 1 where it is absent or null."""
    return multipliers(options, name, 1)[0]


def stream_eps(options: Options, norm_eps: float) -> float:
    """Epsilon of the norms of a residual stream that is not multiplied by `embedding_multiplier`."""
    name = "embedding_multiplier"
    return norm_eps / multiplier({name: options.take(name, float, 1.0)}, name) ** 2


def blocks(config: LMConfig, mixers: Callable[[Any, str], Mapping[str, str]]) -> dict[str, str]:
    """Names of blocks of a mixer and a feed-forward layer, as Bamba and Falcon-H1 have them.

    Args:
        mixers: (a mixer's configuration, how the names of its block begin) -> how those of its tensors do, ours behind
            `mixer.` -> published.
    """
    names = {"embedding.": "model.embed_tokens.", "norm_f.": "model.final_layernorm.", "lm_head.": "lm_head."}
    for index in range(len(config.layers) // 2):
        mixer, feed_forward, block = f"layers.{2 * index}.", f"layers.{2 * index + 1}.", f"model.layers.{index}."
        names |= {
            f"{mixer}norm.": f"{block}input_layernorm.",
            **{f"{mixer}mixer.{own}": theirs for own, theirs in mixers(config.layers[2 * index], block).items()},
            f"{feed_forward}norm.": f"{block}pre_ff_layernorm.",
            f"{feed_forward}mixer.": f"{block}feed_forward.",
        }
    return names


def _read_bamba(options: Options) -> LMConfig:
    d_model, eps = options.take("hidden_size", int), options.take("rms_norm_eps", float, 1e-5)
    count = options.take("num_hidden_layers", int)
    attends = options.take("attn_layer_indices", list, [])
    # transformers turns half of the channels, whatever older files say beside it.
    attention = read_attention(options, d_model, turning=0.5)
    options.ignore("attn_rotary_emb")
    mamba = read_mamba(options, d_model, eps)
    feed_forward = MLPConfig(d_ff=options.take("intermediate_size", int), bias=options.take("mlp_bias", bool, False))
    layers = [layer for i in range(count) for layer in (attention if i in attends else mamba, feed_forward)]
    return finish(options, d_model, layers, eps)


def _bamba_prefixes(config: LMConfig) -> dict[str, str]:
    return blocks(config, lambda layer, block: {"": f"{block}{'mamba' if layer.kind == 'mamba2' else 'self_attn'}."})


BAMBA = Layout(
    name="transformers Bamba",
    detects=is_published_as("bamba", "model.embed_tokens.weight"),
    read_config=_read_bamba,
    prefixes=_bamba_prefixes,
)
