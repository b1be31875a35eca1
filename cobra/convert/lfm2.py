"""LFM2 as transformers publishes it: gated short convolutions or attention, and behind each a feed-forward layer."""

from dataclasses import replace

from cobra.lm import LMConfig
from cobra.lm.gated_conv import GatedConvConfig
from cobra.lm.mlp import MLPConfig
from vision_scan.errors import choose

from .hybrid import finish, read_attention
from .layout import Layout, Options, is_published_as


def _read(options: Options) -> LMConfig:
    d_model, eps = options.take("hidden_size", int, 2560), options.take("norm_eps", float, 1e-5)
    count = options.take("num_hidden_layers", int, 32)
    attends = options.take("full_attn_idxs", list, list(range(count)))
    kinds = options.take("layer_types", list, ["full_attention" if i in attends else "conv" for i in range(count)])
    attention = replace(read_attention(options, d_model), qk_norm=True, norm_eps=eps)
    conv = GatedConvConfig(d_conv=options.take("conv_L_cache", int, 3), bias=options.take("conv_bias", bool, False))
    mixers = {"full_attention": attention, "conv": conv}
    feed_forward = MLPConfig(d_ff=_feed_forward_width(options))
    layers = [
        layer
        for kind in kinds
        for layer in (choose(f"entry of layer_types in {options.where}", kind, mixers), feed_forward)
    ]
    is_tied = options.take("tie_embedding", bool, options.take("tie_word_embeddings", bool, True))
    options.ignore("block_dim", "block_norm_eps", "block_use_swiglu", "block_use_xavier_init", "block_mlp_init_scale")
    options.ignore("block_out_init_scale", "conv_dim", "conv_dim_out", "conv_use_xavier_init", "num_heads", "theta")
    options.ignore("use_pos_enc")
    return replace(finish(options, d_model, layers, eps), tie_word_embeddings=is_tied)


def _feed_forward_width(options: Options) -> int:
    """Channels inside: as said, or of what is said two thirds, rounded up to a multiple."""
    width = options.take("block_ff_dim", int, options.take("intermediate_size", int, 12288))
    factor = options.take("block_ffn_dim_multiplier", float, 1.0)
    multiple = options.take("block_multiple_of", int, 256)
    if not options.take("block_auto_adjust_ff_dim", bool, True):
        return width
    width = int(factor * int(2 * width / 3))
    return -(-width // multiple) * multiple


def _prefixes(config: LMConfig) -> dict[str, str]:
    names = {"embedding.": "model.embed_tokens.", "norm_f.": "model.embedding_norm.", "lm_head.": "lm_head."}
    for index in range(len(config.layers) // 2):
        mixer, feed_forward, block = f"layers.{2 * index}.", f"layers.{2 * index + 1}.", f"model.layers.{index}."
        attention = {"o_proj": "out_proj", "q_norm": "q_layernorm", "k_norm": "k_layernorm"}
        is_conv = config.layers[2 * index].kind == "gated_conv"
        names |= {
            f"{mixer}norm.": f"{block}operator_norm.",
            **({} if is_conv else {f"{mixer}mixer.{a}.": f"{block}self_attn.{b}." for a, b in attention.items()}),
            f"{mixer}mixer.": f"{block}conv." if is_conv else f"{block}self_attn.",
            f"{feed_forward}norm.": f"{block}ffn_norm.",
            **{f"{feed_forward}mixer.{a}_proj.": f"{block}feed_forward.{b}." for a, b in FEED_FORWARD.items()},
        }
    return names


FEED_FORWARD = {"gate": "w1", "up": "w3", "down": "w2"}

LFM2 = Layout(
    name="transformers LFM2",
    detects=is_published_as("lfm2", "model.embed_tokens.weight"),
    read_config=_read,
    prefixes=_prefixes,
)
