"""Tiny checkpoints with random weights in the published layouts, made by transformers' classes where it has them."""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file

from tests.cobra.distilled import Distilled, llamba, mamba1_in_llama, mamba2_in_llama
from tests.cobra.test_oracles import randomise

ROWS, MERGES = 288, 20  # of the embeddings, more than the tokenizer has ids
TEXTS = ["how many lighthouses are there in the harbour, and where is the other boat?"] * 3
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 300.0, "factor": 8.0, "low_freq_factor": 0.3,
    "high_freq_factor": 2.0, "original_max_position_embeddings": 24,
}  # fmt: skip


def mamba1(**options):
    from transformers import MambaConfig, MambaForCausalLM

    settings = {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": ROWS, "state_size": 6, **options}
    return randomise(MambaForCausalLM(MambaConfig(**settings)))


def mamba2(**options):
    from transformers import Mamba2Config, Mamba2ForCausalLM

    settings = {
        "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": ROWS, "state_size": 6, "num_heads": 8,
        "head_dim": 16, "n_groups": 1, "chunk_size": 16, "tie_word_embeddings": True, **options,
    }  # fmt: skip
    return randomise(Mamba2ForCausalLM(Mamba2Config(**settings)))


TRANSFORMER = {
    "hidden_size": 64, "intermediate_size": 44, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": ROWS, "rms_norm_eps": 1e-3,
}  # fmt: skip


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    return randomise(LlamaForCausalLM(LlamaConfig(**{**TRANSFORMER, **options})))


def qwen2(**options):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    return randomise(Qwen2ForCausalLM(Qwen2Config(**{**TRANSFORMER, **options})))


HYBRID = {
    "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": ROWS, "mamba_n_heads": 8,
    "mamba_d_head": 16, "mamba_d_state": 6, "mamba_chunk_size": 16, "rms_norm_eps": 1e-3, "pad_token_id": 0,
}  # fmt: skip


def granite(**options):
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    settings = {
        **HYBRID, "intermediate_size": 20, "shared_intermediate_size": 24, "num_hidden_layers": 3,
        "num_local_experts": 0, "num_experts_per_tok": 0, "layer_types": ["mamba", "attention", "mamba"],
        # With tied embeddings a larger share of the stream would make every token follow itself.
        "embedding_multiplier": 0.7, "residual_multiplier": 2.2, "attention_multiplier": 0.2, "logits_scaling": 3,
        "tie_word_embeddings": True, **options,
    }  # fmt: skip
    return randomise(GraniteMoeHybridForCausalLM(GraniteMoeHybridConfig(**settings)))


def bamba(**options):
    from transformers import BambaConfig, BambaForCausalLM

    settings = {**HYBRID, "intermediate_size": 20, "num_hidden_layers": 3, "attn_layer_indices": [1], **options}
    return randomise(BambaForCausalLM(BambaConfig(**settings)))


def nemotron_h(**options):
    from transformers import NemotronHConfig, NemotronHForCausalLM

    settings = {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": ROWS, "head_dim": 6,
        "intermediate_size": 20, "hybrid_override_pattern": "M-*M", "mamba_num_heads": 8, "mamba_head_dim": 6,
        "ssm_state_size": 6, "n_groups": 2, "chunk_size": 16, "layer_norm_epsilon": 1e-3, "n_routed_experts": 6,
        "num_experts_per_tok": 2, "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 10,
        # transformers clamps the steps of a prompt from below by this, and those of decoding not; the published code
        # does neither.
        "time_step_min": 1e-30, **options,
    }  # fmt: skip
    return randomise(NemotronHForCausalLM(NemotronHConfig(**settings)))


def falcon_h1(**options):
    from transformers import FalconH1Config, FalconH1ForCausalLM

    settings = {
        **HYBRID, "intermediate_size": 20, "num_hidden_layers": 2, "mamba_d_ssm": 80, "mamba_n_heads": 5,
        "embedding_multiplier": 5.5, "lm_head_multiplier": 0.4, "key_multiplier": 0.7, "attention_in_multiplier": 0.9,
        "attention_out_multiplier": 1.3, "ssm_in_multiplier": 1.2, "ssm_out_multiplier": 0.8,
        "ssm_multipliers": [0.6, 0.7, 1.1, 1.4, 0.9], "mlp_multipliers": [0.8, 1.6], **options,
    }  # fmt: skip
    return randomise(FalconH1ForCausalLM(FalconH1Config(**settings)))


def zamba2(**options):
    from transformers import Zamba2Config, Zamba2ForCausalLM

    settings = {
        "hidden_size": 64, "num_attention_heads": 4, "vocab_size": ROWS, "num_hidden_layers": 4, "n_mamba_heads": 8,
        "layers_block_type": ["mamba", "hybrid", "hybrid", "hybrid"], "num_mem_blocks": 2,
        "mamba_d_state": 6, "chunk_size": 16, "intermediate_size": 20, "adapter_rank": 5, "rms_norm_eps": 1e-3,
        "time_step_min": 1e-30, **options,  # as Nemotron-H's
    }  # fmt: skip
    model = randomise(Zamba2ForCausalLM(Zamba2Config(**settings)))
    for name, parameter in model.named_parameters():
        if "q_proj" in name or "linear_q_adapter" in name:
            parameter.mul_(0.3)  # attention to one token alone leaps to another one by rounding
    return model


def falcon_mamba(**options):
    from transformers import FalconMambaConfig, FalconMambaForCausalLM

    settings = {
        "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": ROWS, "state_size": 6, "intermediate_size": 96,
        "mixer_rms_eps": 1e-3, "tie_word_embeddings": False, **options,
    }  # fmt: skip
    return randomise(FalconMambaForCausalLM(FalconMambaConfig(**settings)))


QWEN3 = {
    "hidden_size": 64, "intermediate_size": 20, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 12, "vocab_size": ROWS, "linear_key_head_dim": 5, "linear_value_head_dim": 6,
    "linear_num_key_heads": 2, "linear_num_value_heads": 6, "rms_norm_eps": 1e-3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "rope_parameters": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
}  # fmt: skip


def qwen3_next(**options):
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    settings = {
        **QWEN3, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12,
        "shared_expert_intermediate_size": 10, "mlp_only_layers": [1], **options,
    }  # fmt: skip
    return randomise(Qwen3NextForCausalLM(Qwen3NextConfig(**settings)))


def qwen3_5(**options):
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

    return randomise(Qwen3_5ForCausalLM(Qwen3_5TextConfig(**QWEN3, **options)))


def qwen3_5_vision_language(**options):
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5Config
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForConditionalGeneration

    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 8, "num_heads": 2, "out_hidden_size": 64}
    text = {**QWEN3, "rope_parameters": {**QWEN3["rope_parameters"], "mrope_section": [1, 1, 1]}}
    return randomise(Qwen3_5ForConditionalGeneration(Qwen3_5Config(text_config=text, vision_config=vision, **options)))


def jamba(**options):
    from transformers import JambaConfig, JambaForCausalLM

    settings = {
        "hidden_size": 64, "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": ROWS, "rms_norm_eps": 1e-3, "num_experts": 5, "attn_layer_period": 3,
        "attn_layer_offset": 1, "mamba_d_state": 6, **options,
    }  # fmt: skip
    return randomise(JambaForCausalLM(JambaConfig(**settings)))


def lfm2(**options):
    from transformers import Lfm2Config, Lfm2ForCausalLM

    settings = {
        "hidden_size": 64, "intermediate_size": 60, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": ROWS, "norm_eps": 1e-3, "block_multiple_of": 16,
        "full_attn_idxs": [1], **options,
    }  # fmt: skip
    return randomise(Lfm2ForCausalLM(Lfm2Config(**settings)))


Save = Callable[[torch.nn.Module, Path], None]


def as_published(model, path: Path) -> None:
    model.save_pretrained(path)


def in_shards(model, path: Path) -> None:
    model.save_pretrained(path, max_shard_size="60KB")
    assert len(list(path.glob("*.safetensors"))) > 2


def as_pickle(model, path: Path) -> None:
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin")


def as_old_pickle(model, path: Path) -> None:
    model.config.save_pretrained(path)
    torch.save(model.state_dict(), path / "pytorch_model.bin", _use_new_zipfile_serialization=False)


def as_pickled_shards(model, path: Path) -> None:
    model.config.save_pretrained(path)
    places = {}
    for index, (name, tensor) in enumerate(model.state_dict().items()):
        places[name] = f"pytorch_model-{index:05}.bin"
        torch.save({name: tensor.clone()}, path / places[name])
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def as_state_spaces(**ssm) -> Save:
    def save(model, path: Path) -> None:
        theirs = model.config
        config = {
            "d_model": theirs.hidden_size, "n_layer": theirs.num_hidden_layers, "vocab_size": ROWS - 5,
            "ssm_cfg": {"d_state": theirs.state_size, **ssm}, "rms_norm": True, "residual_in_fp32": True,
            "fused_add_norm": True, "pad_vocab_size_multiple": 8,
        }  # fmt: skip
        tensors = {
            name.replace("backbone.embeddings", "backbone.embedding"): tensor
            for name, tensor in model.state_dict().items()
        }
        assert "lm_head.weight" in tensors  # tied, and saved nevertheless, as theirs are
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        torch.save(tensors, path / "pytorch_model.bin")

    return save


def first_jamba_names(tensors: dict, is_dense: Callable[[int], bool]) -> dict:
    """Jamba's tensors by the names of its first code, in which a feed-forward layer was an expert without a router."""
    named = {}
    for name, tensor in tensors.items():
        if ".feed_forward." in name:
            experts = "experts.0." if is_dense(int(name.split(".")[2])) else ""
            name = name.replace("feed_forward.", f"moe.{experts}")
        name = name.replace("pre_ff_layernorm", "pre_moe_layernorm")
        named[name.replace("b_layernorm", "B_layernorm").replace("c_layernorm", "C_layernorm")] = tensor
    return named


def as_first_jamba(model, path: Path) -> None:
    model.save_pretrained(path)
    tensors = load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    torch.save(first_jamba_names(tensors, lambda index: index % 2 == 0), path / "pytorch_model.bin")
    change_config(path, n_ctx=262144, mamba_inner_layernorms=True, auto_map={"AutoConfig": "x.JambaConfig"})


def as_distilled(model: Distilled, path: Path) -> None:
    model.save(path)


MAMBA2_SSM = {"layer": "Mamba2", "headdim": 16, "chunk_size": 16}
CASES: dict[str, tuple] = {  # what is published, its options, how it is saved, the layout
    "mamba": (mamba1, {}, as_published, "transformers Mamba"),
    "mamba, more of everything": (
        mamba1,
        {
            "expand": 3,
            "conv_kernel": 3,
            "time_step_rank": 5,
            "tie_word_embeddings": False,
            "layer_norm_epsilon": 1e-2,
        },
        in_shards,
        "transformers Mamba",
    ),
    "mamba as state-spaces": (mamba1, {}, as_state_spaces(), "state-spaces Mamba"),
    "mamba-2": (mamba2, {}, as_published, "transformers Mamba-2"),
    "mamba-2, groups, untied": (
        mamba2,
        {"n_groups": 2, "tie_word_embeddings": False, "conv_kernel": 3, "layer_norm_epsilon": 1e-2},
        as_old_pickle,
        "transformers Mamba-2",
    ),
    "mamba-2 as state-spaces": (mamba2, {}, as_state_spaces(**MAMBA2_SSM), "state-spaces Mamba"),
    "llama": (llama, {}, in_shards, "transformers Llama"),
    "llama 3.2": (
        llama,
        {"rope_parameters": LLAMA3_ROPE, "tie_word_embeddings": True, "head_dim": 12},
        as_pickle,
        "transformers Llama",
    ),
    "qwen2": (qwen2, {"tie_word_embeddings": True}, as_published, "transformers Qwen2"),
    "qwen2, sliding window": (
        qwen2,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
        as_pickled_shards,
        "transformers Qwen2",
    ),
    "qwen3-next": (qwen3_next, {}, as_published, "transformers Qwen3-Next"),
    "qwen3.5": (qwen3_5, {"tie_word_embeddings": True}, in_shards, "transformers Qwen3.5, language model"),
    "qwen3.5 that sees": (qwen3_5_vision_language, {}, as_published, "transformers Qwen3.5"),
    "falcon-mamba": (falcon_mamba, {}, as_published, "transformers Falcon-Mamba"),
    "granite": (granite, {}, as_published, "transformers Granite-4.0-H"),
    "granite, positions, biases": (
        granite,
        {
            "position_embedding_type": "rope", "attention_bias": True, "mamba_proj_bias": True, "mamba_n_groups": 2,
            "tie_word_embeddings": False,
        },
        as_pickle,
        "transformers Granite-4.0-H",
    ),
    "granite, experts": (
        granite, {"num_local_experts": 5, "num_experts_per_tok": 2}, in_shards, "transformers Granite-4.0-H"
    ),
    "bamba": (bamba, {}, as_published, "transformers Bamba"),
    "bamba, tied, groups": (
        bamba,
        {"tie_word_embeddings": True, "mamba_n_groups": 4, "mlp_bias": True, "mamba_conv_bias": False},
        as_published,
        "transformers Bamba",
    ),
    "nemotron-h": (nemotron_h, {}, as_published, "transformers Nemotron-H"),
    "nemotron-h, experts": (
        nemotron_h,
        {
            "hybrid_override_pattern": "ME*E", "n_group": 3, "topk_group": 2, "routed_scaling_factor": 1.5,
            "moe_latent_size": 8,
        },
        as_published,
        "transformers Nemotron-H",
    ),
    "jamba": (jamba, {}, as_published, "transformers Jamba"),
    "jamba, dense": (
        jamba,
        {"num_experts": 1, "mamba_proj_bias": True, "mamba_conv_bias": False, "mamba_dt_rank": 5,
         "tie_word_embeddings": True},
        as_published,
        "transformers Jamba",
    ),
    "jamba as at first": (jamba, {}, as_first_jamba, "Jamba of its first code"),
    "lfm2": (lfm2, {}, as_published, "transformers LFM2"),
    "lfm2, biases": (
        lfm2,
        {"conv_bias": True, "conv_L_cache": 4, "tie_word_embeddings": False, "block_auto_adjust_ff_dim": False},
        as_published,
        "transformers LFM2",
    ),
    "falcon-h1": (falcon_h1, {}, as_published, "transformers Falcon-H1"),
    "falcon-h1, norms, tied": (
        falcon_h1,
        {
            "mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_heads": 6, "mamba_d_ssm": 96,
            "mamba_n_groups": 2, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True,
            "mamba_proj_bias": True, "projectors_bias": True, "embedding_multiplier": 0.3,
        },
        as_published,
        "transformers Falcon-H1",
    ),
    "zamba2": (zamba2, {}, as_published, "transformers Zamba2"),
    "zamba2, positions, adapters of attention": (
        zamba2,
        {
            "use_mem_rope": True, "use_shared_attention_adapter": True, "num_mem_blocks": 1, "mamba_ngroups": 2,
            "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
            "rope_parameters": {"rope_type": "default", "rope_theta": 300.0},
        },
        as_published,
        "transformers Zamba2",
    ),
    "zamba2, biases, untied, grouped keys": (
        zamba2,
        {"add_bias_linear": True, "tie_word_embeddings": False, "num_key_value_heads": 2, "num_mem_blocks": 3},
        in_shards,
        "transformers Zamba2",
    ),
    "llamba": (llamba, {}, as_distilled, "Llamba"),
    "llamba, groups, biases, untied": (
        llamba,
        {
            "ssm_cfg": {
                "n_qk_heads": 2, "expand": 2, "bias": True, "conv_bias": False, "activation": "silu", "d_conv": 3
            },
            "tie_embeddings": False,
        },
        as_distilled,
        "Llamba",
    ),
    "mamba in llama": (mamba1_in_llama, {}, as_distilled, "MambaInLlama"),
    "mamba in llama, other sizes": (
        mamba1_in_llama, {"attends": (), "d_xb": 16, "d_state": 8, "dt_rank": 3}, as_distilled, "MambaInLlama"
    ),
    "mamba-2 in llama": (mamba2_in_llama, {}, as_distilled, "MambaInLlama, Mamba-2"),
    "mamba-2 in llama, other norms": (
        mamba2_in_llama, {"attends": (), "d_xb": 16, "norm_before_gate": True, "chunk_size": 16}, as_distilled,
        "MambaInLlama, Mamba-2",
    ),
}  # fmt: skip


def train_tokenizer(file: Path, specials: tuple[str, ...] = ("<|endoftext|>",)) -> Path:
    """A byte-level BPE as others make them, which knows nothing of Cobra."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + MERGES, special_tokens=list(specials), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.save(str(file))
    return file


def change_config(path: Path, **changes) -> None:
    config = json.loads((path / "config.json").read_text())
    config.update(changes)
    (path / "config.json").write_text(json.dumps(config))


def spoil(path: Path, change: Callable[[dict], object]) -> None:
    tensors = torch.load(path / "pytorch_model.bin", weights_only=True)
    change(tensors)
    torch.save(tensors, path / "pytorch_model.bin")
