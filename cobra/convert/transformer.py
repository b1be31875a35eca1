"""Llama and Qwen2 as transformers publishes them: blocks of attention and a gated feed-forward layer."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from cobra.lm import LMConfig
from cobra.lm.attention import AttentionConfig, Llama3RopeScaling
from cobra.lm.mlp import MLPConfig
from vision_scan.errors import UserError, choose

from .layout import TRANSFORMERS_KEYS, Layout, Options, is_published_as


def _read_llama(options: Options) -> LMConfig:
    options.demand("attention_bias", False)
    options.demand("mlp_bias", False)
    options.demand("rope_interleaved", False)
    options.ignore("pretraining_tp", "is_llama_config")  # the first splits products over devices
    windows = [None] * options.take("num_hidden_layers", int)
    return _read_blocks(options, windows, qkv_bias=False)


def _read_qwen2(options: Options) -> LMConfig:
    windows = _read_windows(options, options.take("num_hidden_layers", int))
    return _read_blocks(options, windows, qkv_bias=True)


def _read_blocks(options: Options, windows: Sequence[int | None], qkv_bias: bool) -> LMConfig:
    """What both have in common; a block for each window."""
    d_model, num_heads = options.take("hidden_size", int), options.take("num_attention_heads", int)
    rope = read_rope(options)
    feed_forward = MLPConfig(d_ff=options.take("intermediate_size", int))
    num_kv_heads = options.take("num_key_value_heads", int, num_heads)
    headdim = options.take("head_dim", int, d_model // max(num_heads, 1))
    layers: list[AttentionConfig | MLPConfig] = []
    for window in windows:
        attention = AttentionConfig(
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            headdim=headdim,
            **rope,
            window=window,
            qkv_bias=qkv_bias,
        )
        layers += [attention, feed_forward]
    options.demand("hidden_act", "silu", "swish")
    options.demand("attention_dropout", 0.0)
    options.ignore(*TRANSFORMERS_KEYS)
    return LMConfig(
        d_model=d_model,
        vocab_size=options.take("vocab_size", int),
        layers=tuple(layers),
        norm_eps=options.take("rms_norm_eps", float, 1e-6),
        tie_word_embeddings=options.take("tie_word_embeddings", bool, False),
    )


def read_rope(options: Options, headdim: int | None = None, turning: float = 1.0) -> dict[str, Any]:
    """AttentionConfig's settings of rotary positions, from `rope_parameters` (transformers 5) or from `rope_theta` and
    `rope_scaling`.

    Args:
        headdim: of a layout in which a part of the channels may turn; None: all turn.
        turning: the part of the channels that turn, where the file does not say.
    """
    theta = options.take("rope_theta", float, 10000.0)
    context = options.take("max_position_embeddings", int, 0)
    newer, older = options.section("rope_parameters"), options.section("rope_scaling")
    if newer:
        older.close()
    rope = newer or older
    if headdim is None:
        rope.demand("partial_rotary_factor", 1.0)
    rope.ignore("mrope_section", "mrope_interleaved")  # of images; a text's positions are alike on all axes
    turning = rope.take("partial_rotary_factor", float, turning)
    theta = rope.take("rope_theta", float, theta)
    legacy = rope.take("type", str, "default")
    kind = choose(f"rope_type in {rope.where}", rope.take("rope_type", str, legacy), _ROPE_TYPES)
    scaling = kind(rope, context)
    rope.close()
    rotary_dim = None if headdim is None or turning == 1.0 else int(headdim * turning)
    return {"rope_theta": theta, "rope_scaling": scaling, "rotary_dim": rotary_dim}


def _llama3_rope(rope: Options, context: int) -> Llama3RopeScaling:
    return Llama3RopeScaling(
        factor=rope.take("factor", float),
        low_freq_factor=rope.take("low_freq_factor", float),
        high_freq_factor=rope.take("high_freq_factor", float),
        original_max_position_embeddings=rope.take("original_max_position_embeddings", int, context),
    )


_ROPE_TYPES = {"default": lambda rope, context: None, "llama3": _llama3_rope}


def _read_windows(options: Options, depth: int) -> list[int | None]:
    """The window of each block, as `layer_types` says or, in older files, `max_window_layers`, from which on
    blocks have one."""
    is_used = options.take("use_sliding_window", bool, False)
    window = options.take("sliding_window", int, 4096)
    first = options.take("max_window_layers", int, 28)
    kinds = [
        "sliding_attention" if is_used and index >= first else "full_attention" for index in range(depth)
    ]
    kinds = options.take("layer_types", list, kinds)
    windows = {"full_attention": None, **({"sliding_attention": window} if is_used else {})}
    if len(kinds) != depth:
        raise UserError(f"{options.where}: layer_types has {len(kinds)} entries for {depth} layers")
    return [choose(f"entry of layer_types in {options.where}", kind, windows) for kind in kinds]


def _write_llama(config: LMConfig) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "mlp_bias": False,
        **_write_blocks(config),
    }


def _write_qwen2(config: LMConfig) -> dict[str, Any]:
    attentions: Any = config.layers[::2]
    windows = [attention.window for attention in attentions]
    kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
    width = next(filter(None, windows), None)
    return {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": width is not None,
        "sliding_window": width,
        "layer_types": kinds,
        **_write_blocks(config),
    }


def _write_blocks(config: LMConfig) -> dict[str, Any]:
    """What both have in common, of the first block."""
    attention: Any
    feed_forward: Any
    attention, feed_forward, *_ = config.layers
    # Qwen2's own files do not have it where it follows from the others.
    is_usual = attention.headdim * attention.num_heads == config.d_model
    headdim = {} if is_usual else {"head_dim": attention.headdim}
    return {
        **headdim,
        "hidden_size": config.d_model,
        "intermediate_size": feed_forward.d_ff,
        "num_hidden_layers": len(config.layers) // 2,
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "vocab_size": config.vocab_size,
        "rms_norm_eps": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "rope_theta": attention.rope_theta,
        **_write_rope_scaling(attention.rope_scaling),
    }


def _write_rope_scaling(scaling: Llama3RopeScaling | None) -> dict[str, Any]:
    """In the words of transformers 4, which 5 reads too; the length is that for which positions were scaled."""
    if scaling is None:
        return {}
    settings = asdict(scaling)
    length = int(scaling.factor * scaling.original_max_position_embeddings)
    return {"rope_scaling": {"rope_type": settings.pop("kind"), **settings}, "max_position_embeddings": length}


def block_prefixes(config: LMConfig, outer: str, mixer: Callable[[Any], str]) -> dict[str, str]:
    """Names of blocks of a mixer and a feed-forward layer, as Llama has them.

    Args:
        outer: what the blocks are part of.
        mixer: a mixer's configuration -> what it is called in its block.
    """
    names = {}
    for index in range(len(config.layers) // 2):
        first, feed_forward, block = f"layers.{2 * index}.", f"layers.{2 * index + 1}.", f"{outer}.layers.{index}."
        names |= {
            f"{first}norm.": f"{block}input_layernorm.",
            f"{first}mixer.": f"{block}{mixer(config.layers[2 * index])}.",
            f"{feed_forward}norm.": f"{block}post_attention_layernorm.",
            f"{feed_forward}mixer.": f"{block}mlp.",
        }
    return names


def _prefixes(config: LMConfig) -> dict[str, str]:
    return {**TABLES, **block_prefixes(config, "model", lambda layer: "self_attn")}


TABLES = {"embedding.": "model.embed_tokens.", "norm_f.": "model.norm.", "lm_head.": "lm_head."}

def is_llama(config: Mapping[str, Any], names: Collection[str]) -> bool:
    """Whether a checkpoint is Llama's, or one in which layers of Llama were exchanged."""
    return config.get("model_type") == "llama" and "model.embed_tokens.weight" in names


def _is_llama_alone(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return is_llama(config, names) and not any(".mamba." in name for name in names)


LLAMA = Layout(
    name="transformers Llama",
    detects=_is_llama_alone,
    read_config=_read_llama,
    prefixes=_prefixes,
    left_out=r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq",
    block=("attention", "mlp"),
    write_config=_write_llama,
)
QWEN2 = Layout(
    name="transformers Qwen2",
    detects=is_published_as("qwen2", "model.embed_tokens.weight"),
    read_config=_read_qwen2,
    prefixes=_prefixes,
    left_out=LLAMA.left_out,
    block=LLAMA.block,
    write_config=_write_qwen2,
)
