"""Qwen3-Next and the language models of Qwen3.5 as transformers publishes them: Gated DeltaNet or gated attention, and
behind each a feed-forward layer or experts.

Norms of the stream, of queries and of keys are stored as what they are above 1.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from cobra.lm import LMConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.gated_deltanet import GatedDeltaNetConfig
from cobra.lm.mlp import MLPConfig
from cobra.lm.moe import MoEConfig
from vision_scan.errors import UserError, choose

from .layout import TRANSFORMERS_KEYS, Layout, Options, Piece, Pieces, Shapes, is_published_as
from .transformer import read_rope

PERIOD = 4  # of older files without layer_types: the last of so many layers attends
VISION_KEYS = (
    "vision_config", "image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id",
)  # fmt: skip


def _read(options: Options, feed_forwards: Callable[[Options, int], list[Any]]) -> LMConfig:
    """What all have in common.

    Args:
        feed_forwards: (options, number of layers) -> the feed-forward layer of each.
    """
    d_model, eps = options.take("hidden_size", int), options.take("rms_norm_eps", float, 1e-6)
    headdim, count = options.take("head_dim", int, 256), options.take("num_hidden_layers", int)
    num_heads = options.take("num_attention_heads", int, 16)
    options.demand("attention_bias", False)
    options.demand("attention_dropout", 0.0)
    options.demand("hidden_act", "silu", "swish")
    options.demand("attn_output_gate", True)
    mixers = {
        "full_attention": AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=options.take("num_key_value_heads", int, num_heads),
            headdim=headdim,
            qk_norm=True,
            norm_eps=eps,
            gated=True,
            **read_rope(options, headdim, options.take("partial_rotary_factor", float, 0.25)),
        ),
        "linear_attention": GatedDeltaNetConfig(
            num_k_heads=options.take("linear_num_key_heads", int, 16),
            num_v_heads=options.take("linear_num_value_heads", int, 32),
            head_k_dim=options.take("linear_key_head_dim", int, 128),
            head_v_dim=options.take("linear_value_head_dim", int, 128),
            d_conv=options.take("linear_conv_kernel_dim", int, 4),
            norm_eps=eps,
        ),
    }
    period = options.take("full_attention_interval", int, PERIOD)
    usual = ["linear_attention" if (index + 1) % period else "full_attention" for index in range(count)]
    kinds = options.take("layer_types", list, usual)
    if len(kinds) != count:
        raise UserError(f"{options.where}: layer_types has {len(kinds)} entries for {count} layers")
    chosen = [choose(f"entry of layer_types in {options.where}", kind, mixers) for kind in kinds]
    layers = [layer for pair in zip(chosen, feed_forwards(options, count), strict=True) for layer in pair]
    options.ignore(*TRANSFORMERS_KEYS, "output_router_logits", "router_aux_loss_coef", "mamba_ssm_dtype")
    options.ignore("mtp_num_hidden_layers", "mtp_use_dedicated_embeddings")
    return LMConfig(
        d_model=d_model,
        vocab_size=options.take("vocab_size", int),
        layers=tuple(layers),
        norm_eps=eps,
        tie_word_embeddings=options.take("tie_word_embeddings", bool, False),
    )


def _dense(options: Options, count: int) -> list[MLPConfig]:
    return [MLPConfig(d_ff=options.take("intermediate_size", int))] * count


def _sparse(options: Options, count: int) -> list[MLPConfig | MoEConfig]:
    dense = MLPConfig(d_ff=options.take("intermediate_size", int, 5632))
    experts = MoEConfig(
        num_experts=options.take("num_experts", int, 512),
        top_k=options.take("num_experts_per_tok", int, 10),
        d_ff=options.take("moe_intermediate_size", int, 512),
        norm_topk=options.take("norm_topk_prob", bool, True),
        shared_d_ff=options.take("shared_expert_intermediate_size", int, 512),
        shared_gate=True,
    )
    step, exceptions = options.take("decoder_sparse_step", int, 1), options.take("mlp_only_layers", list, [])
    return [dense if index in exceptions or (index + 1) % max(step, 1) else experts for index in range(count)]


def _read_vision_language(options: Options) -> LMConfig:
    """The language model of one that sees too."""
    text = options.section("text_config")
    if text.is_set("tie_word_embeddings", None):
        text.demand("tie_word_embeddings")
    config = _read(text, _dense)
    text.close()
    options.demand("tie_word_embeddings", config.tie_word_embeddings)
    options.ignore(*TRANSFORMERS_KEYS, *VISION_KEYS)
    return config


def _prefixes(config: LMConfig, inner: str = "model.") -> dict[str, str]:
    names = {"embedding.": f"{inner}embed_tokens.", "norm_f.": f"{inner}norm.", "lm_head.": "lm_head."}
    for index in range(len(config.layers) // 2):
        mixer, feed_forward, block = f"layers.{2 * index}.", f"layers.{2 * index + 1}.", f"{inner}layers.{index}."
        is_delta = config.layers[2 * index].kind == "gated_deltanet"
        names |= {
            f"{mixer}norm.": f"{block}input_layernorm.",
            f"{mixer}mixer.": f"{block}linear_attn." if is_delta else f"{block}self_attn.",
            f"{feed_forward}norm.": f"{block}post_attention_layernorm.",
            f"{feed_forward}mixer.router.": f"{block}mlp.gate.",
            f"{feed_forward}mixer.shared.": f"{block}mlp.shared_expert.",
            f"{feed_forward}mixer.shared_gate.": f"{block}mlp.shared_expert_gate.",
            f"{feed_forward}mixer.": f"{block}mlp.",
        }
    return names


def _adapt(
    dealt: Callable[[GatedDeltaNetConfig, int, str], tuple[Piece, ...]],
    config: LMConfig,
    options: Mapping[str, Any],
    pieces: Pieces,
    shapes: Shapes,
) -> Pieces:
    """
    Args:
        dealt: (layer, d_model, how the names of its tensors begin) -> the rows of its projection in.
    """
    adapted: dict[str, tuple[Piece, ...]] = {}
    for name, (piece,) in pieces.items():
        layer = config.layers[int(name.split(".")[1])] if name.startswith("layers.") else None
        leaf = name.rpartition("mixer.")[2]
        is_stream_norm = name.endswith(("norm.weight", "norm_f.weight")) and "mixer." not in name
        if is_stream_norm or leaf in QK_NORMS:
            adapted[name] = (Piece(piece.name, shift=1.0),)
        elif layer is not None and layer.kind == "gated_deltanet" and leaf == "in_proj.weight":
            adapted[name] = dealt(layer, config.d_model, piece.name.removesuffix(leaf))
        elif layer is not None and layer.kind == "attention" and leaf in ("q_proj.weight", "gate_proj.weight"):
            adapted[name] = (_half_of_each_head(piece.name.removesuffix(leaf), leaf, layer, config.d_model),)
    return adapted


QK_NORMS = ("q_norm.weight", "k_norm.weight")


def _half_of_each_head(prefix: str, leaf: str, layer: AttentionConfig, d_model: int) -> Piece:
    """Queries and gates, which stand below one another head by head."""
    half, heads = int(leaf == "gate_proj.weight"), (layer.num_heads, 2, layer.headdim)
    shape = 2 * layer.num_heads * layer.headdim, d_model
    return Piece(f"{prefix}q_proj.weight", shape, lambda both: both.unflatten(0, heads)[:, half].flatten(0, 1))


def _in_blocks(layer: GatedDeltaNetConfig, d_model: int, prefix: str) -> tuple[Piece, ...]:
    """Qwen3.5's: four tensors, of all heads each."""
    keys, values = layer.num_k_heads * layer.head_k_dim, layer.num_v_heads * layer.head_v_dim
    rows = {"qkv": 2 * keys + values, "z": values, "b": layer.num_v_heads, "a": layer.num_v_heads}
    return tuple(Piece(f"{prefix}in_proj_{name}.weight", (count, d_model)) for name, count in rows.items())


def _by_key_head(layer: GatedDeltaNetConfig, d_model: int, prefix: str) -> tuple[Piece, ...]:
    """Qwen3-Next's: two tensors, dealt out by key head."""
    per_key = layer.num_v_heads // layer.num_k_heads
    keys, values = layer.head_k_dim, per_key * layer.head_v_dim

    def pieces(name: str, sizes: list[int]) -> list[Piece]:
        def part(number: int, tensor: Tensor) -> Tensor:
            return tensor.unflatten(0, (layer.num_k_heads, -1)).split(sizes, dim=1)[number].flatten(0, 1)

        shape = layer.num_k_heads * sum(sizes), d_model
        return [Piece(f"{prefix}{name}.weight", shape, partial(part, number)) for number in range(len(sizes))]

    return (*pieces("in_proj_qkvz", [keys, keys, values, values]), *pieces("in_proj_ba", [per_key, per_key]))


QWEN3_NEXT = Layout(
    name="transformers Qwen3-Next",
    detects=is_published_as("qwen3_next", "model.embed_tokens.weight"),
    read_config=lambda options: _read(options, _sparse),
    prefixes=_prefixes,
    left_out=r"mtp\..*",  # what foretells several tokens at once
    adapt=partial(_adapt, _by_key_head),
)
QWEN3_5 = Layout(
    name="transformers Qwen3.5, language model",
    detects=is_published_as("qwen3_5_text", "model.embed_tokens.weight"),
    read_config=lambda options: _read(options, _dense),
    prefixes=_prefixes,
    left_out=r"mtp\..*",
    adapt=partial(_adapt, _in_blocks),
)
QWEN3_5_VL = Layout(
    name="transformers Qwen3.5",
    detects=is_published_as("qwen3_5", "model.language_model.embed_tokens.weight"),
    read_config=_read_vision_language,
    prefixes=partial(_prefixes, inner="model.language_model."),
    left_out=r"mtp\..*|model\.visual\..*",
    adapt=partial(_adapt, _in_blocks),
)
