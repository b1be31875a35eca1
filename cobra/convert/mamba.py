"""Mamba and Mamba-2 as state-spaces publishes them, and as transformers does."""

from collections.abc import Collection, Mapping
from typing import Any

from cobra.lm import LMConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from vision_scan.errors import UserError, choose

from .layout import TRANSFORMERS_KEYS, Layout, Options, is_published_as

# How weights begin, and which kernels run.
TRAINING_KEYS = (
    "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "A_init_range", "conv_init",
    "use_fast_path", "use_mem_eff_path",
)  # fmt: skip
# The same in transformers, and what its conversion left behind of the published file. The residual stream is
# float32 here whatever `residual_in_fp32` says; `norm_before_gate` stands in ported files, but transformers
# does not read it: it gates first.
_TRANSFORMERS_TRAINING_KEYS = (
    "time_step_min", "time_step_max", "time_step_floor", "time_step_scale", "time_step_init_scheme",
    "rescale_prenorm_residual", "residual_in_fp32", "use_mambapy", "use_associative_scan",
    "emb_initializer_range", "d_model", "d_inner", "n_layer", "ssm_cfg", "fused_add_norm",
    "pad_vocab_size_multiple", "norm_before_gate",
)  # fmt: skip


def _ssm_mamba1(ssm: Options) -> Mamba1Config:
    ssm.demand("bias", False)
    ssm.demand("conv_bias", True)
    ssm.ignore(*TRAINING_KEYS)
    return Mamba1Config(
        d_state=ssm.take("d_state", int, 16),
        d_conv=ssm.take("d_conv", int, 4),
        expand=ssm.take("expand", int, 2),
        dt_rank=read_dt_rank(ssm, "dt_rank"),
    )


def _ssm_mamba2(ssm: Options) -> Mamba2Config:
    ssm.demand("bias", False)
    ssm.demand("conv_bias", True)
    ssm.demand("d_ssm")
    ssm.demand("D_has_hdim", False)
    ssm.demand("rmsnorm", True)
    ssm.demand("activation", "silu", "swish")
    ssm.ignore(*TRAINING_KEYS)
    return Mamba2Config(
        d_state=ssm.take("d_state", int, 128),
        headdim=ssm.take("headdim", int, 64),
        expand=ssm.take("expand", int, 2),
        ngroups=ssm.take("ngroups", int, 1),
        d_conv=ssm.take("d_conv", int, 4),
        chunk_size=ssm.take("chunk_size", int, 256),
        norm_before_gate=ssm.take("norm_before_gate", bool, False),
        dt_limit=read_dt_limit(ssm, "dt_limit"),
    )


_SSM_LAYERS = {"Mamba1": _ssm_mamba1, "Mamba2": _ssm_mamba2}


def _read_state_spaces(options: Options) -> LMConfig:
    ssm = options.section("ssm_cfg")
    layer = choose(f"layer in {ssm.where}", ssm.take("layer", str, "Mamba1"), _SSM_LAYERS)(ssm)
    ssm.close()
    options.demand("rms_norm", True)
    options.demand("attn_layer_idx", [])
    options.demand("d_intermediate", 0)
    options.ignore("attn_cfg", "fused_add_norm", "residual_in_fp32")
    return LMConfig(
        d_model=options.take("d_model", int),
        vocab_size=padded_vocab(options),
        layers=(layer,) * options.take("n_layer", int),
        tie_word_embeddings=options.take("tie_embeddings", bool, True),
    )


def _read_mamba1(options: Options) -> LMConfig:
    d_model, expand = options.take("hidden_size", int), options.take("expand", int, 2)
    layer = Mamba1Config(
        d_state=options.take("state_size", int, 16),
        d_conv=options.take("conv_kernel", int, 4),
        expand=expand,
        dt_rank=read_dt_rank(options, "time_step_rank"),
    )
    options.demand("intermediate_size", expand * d_model)
    return _transformers_stack(options, d_model, layer, 1e-5, is_tied=True)


def _read_falcon_mamba(options: Options) -> LMConfig:
    d_model = options.take("hidden_size", int)
    layer = Mamba1Config(
        d_state=options.take("state_size", int, 16),
        d_conv=options.take("conv_kernel", int, 4),
        # Released files say expand 16 and mean this.
        d_inner=options.take("intermediate_size", int, options.take("expand", int, 2) * d_model),
        dt_rank=read_dt_rank(options, "time_step_rank"),
        inner_norms="plain",
        norm_eps=options.take("mixer_rms_eps", float, 1e-6),
    )
    return _transformers_stack(options, d_model, layer, 1e-5, is_tied=True)


def _read_mamba2(options: Options) -> LMConfig:
    d_model, eps = options.take("hidden_size", int), options.take("layer_norm_epsilon", float, 1e-5)
    layer = Mamba2Config(
        d_state=options.take("state_size", int, 128),
        headdim=options.take("head_dim", int, 64),
        expand=options.take("expand", int, 2),
        ngroups=options.take("n_groups", int, 8),
        d_conv=options.take("conv_kernel", int, 4),
        chunk_size=options.take("chunk_size", int, 256),
        norm_eps=eps,
        dt_limit=read_dt_limit(options, "time_step_limit"),
    )
    options.demand("num_heads", layer.nheads(d_model))
    options.demand("intermediate_size", layer.expand * d_model)
    options.ignore("time_step_rank")
    return _transformers_stack(options, d_model, layer, eps, is_tied=False)


def _transformers_stack(
    options: Options, d_model: int, layer: Mamba1Config | Mamba2Config, eps: float, is_tied: bool
) -> LMConfig:
    """What both have in common; `is_tied` where config.json does not say."""
    options.demand("hidden_act", "silu", "swish")
    options.demand("use_bias", False)
    options.demand("use_conv_bias", True)
    options.demand("rms_norm", True)
    options.ignore(*TRANSFORMERS_KEYS, *_TRANSFORMERS_TRAINING_KEYS)
    return LMConfig(
        d_model=d_model,
        vocab_size=options.take("vocab_size", int),
        layers=(layer,) * options.take("num_hidden_layers", int),
        norm_eps=options.take("layer_norm_epsilon", float, eps),
        tie_word_embeddings=options.take("tie_word_embeddings", bool, is_tied),
    )


def _write_mamba1(config: LMConfig) -> dict[str, Any]:
    layer: Any = config.layers[0]
    return {
        "model_type": "mamba",
        "architectures": ["MambaForCausalLM"],
        "expand": max(1, layer.inner(config.d_model) // config.d_model),
        **_write_selective_scan(config),
    }


def _write_falcon_mamba(config: LMConfig) -> dict[str, Any]:
    layer: Any = config.layers[0]
    return {
        "model_type": "falcon_mamba",
        "architectures": ["FalconMambaForCausalLM"],
        "intermediate_size": layer.inner(config.d_model),
        "mixer_rms_eps": layer.norm_eps,
        **_write_selective_scan(config),
    }


def _write_selective_scan(config: LMConfig) -> dict[str, Any]:
    layer: Any = config.layers[0]
    return {
        "state_size": layer.d_state,
        "conv_kernel": layer.d_conv,
        "time_step_rank": layer.rank(config.d_model),
        **_write_transformers_stack(config),
    }


def _write_mamba2(config: LMConfig) -> dict[str, Any]:
    layer: Any = config.layers[0]
    expand = max(1, sum(layer.widths(config.d_model)) // config.d_model)
    # No `time_step_limit`, for there is none: transformers clamps the steps of a prompt and not those of decoding, so
    # that a model with limits would go on otherwise there than here.
    return {
        "model_type": "mamba2",
        "architectures": ["Mamba2ForCausalLM"],
        "state_size": layer.d_state,
        "head_dim": layer.headdim,
        "num_heads": expand * config.d_model // layer.headdim,
        "expand": expand,
        "n_groups": layer.ngroups,
        "conv_kernel": layer.d_conv,
        "chunk_size": layer.chunk_size,
        **_write_transformers_stack(config),
    }


def _write_transformers_stack(config: LMConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.d_model,
        "num_hidden_layers": len(config.layers),
        "vocab_size": config.vocab_size,
        "layer_norm_epsilon": config.norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "hidden_act": "silu",
        "use_bias": False,
        "use_conv_bias": True,
        "residual_in_fp32": True,
    }


def read_dt_rank(options: Options, name: str) -> int | None:
    if options.is_set(name, "auto"):
        options.ignore(name)
    return options.take(name, int, None)


def padded_vocab(options: Options) -> int:
    """Rows of embeddings that are padded to a multiple."""
    vocab, multiple = options.take("vocab_size", int), options.take("pad_vocab_size_multiple", int, 8)
    return vocab + -vocab % max(multiple, 1)


def read_dt_limit(options: Options, name: str) -> tuple[float, ...]:
    limit = options.take(name, list, list(Mamba2Config.dt_limit))
    if not all(isinstance(bound, (int, float)) for bound in limit):
        raise UserError(f"{options.where}: {name} is {limit!r}, must be a lower and an upper bound")
    return tuple(map(float, limit))


def _prefixes(embedding: str):
    def prefixes(config: LMConfig) -> dict[str, str]:
        inner = {"layers.": "backbone.layers.", "norm_f.": "backbone.norm_f."}
        return {"embedding.": f"backbone.{embedding}.", **inner, "lm_head.": "lm_head."}

    return prefixes


def _is_state_spaces(config: Mapping[str, Any], names: Collection[str]) -> bool:
    return "ssm_cfg" in config and config.get("model_type") != "llamba" and "backbone.embedding.weight" in names


STATE_SPACES = Layout(
    name="state-spaces Mamba",
    detects=_is_state_spaces,
    read_config=_read_state_spaces,
    prefixes=_prefixes("embedding"),
)
MAMBA1 = Layout(
    name="transformers Mamba",
    detects=is_published_as("mamba", "backbone.embeddings.weight"),
    read_config=_read_mamba1,
    prefixes=_prefixes("embeddings"),
    block=("mamba1",),
    write_config=_write_mamba1,
)
FALCON_MAMBA = Layout(
    name="transformers Falcon-Mamba",
    detects=is_published_as("falcon_mamba", "backbone.embeddings.weight"),
    read_config=_read_falcon_mamba,
    prefixes=_prefixes("embeddings"),
    block=("mamba1",),
    write_config=_write_falcon_mamba,
)
MAMBA2 = Layout(
    name="transformers Mamba-2",
    detects=is_published_as("mamba2", "backbone.embeddings.weight"),
    read_config=_read_mamba2,
    prefixes=_prefixes("embeddings"),
    block=("mamba2",),
    write_config=_write_mamba2,
)
