"""config.json of released language models, and how many parameters they have. Nothing is downloaded."""

_LIKE_MAMBA_130M = {
    "fused_add_norm": True, "residual_in_fp32": True, "rms_norm": True, "d_model": 768, "n_layer": 24
}  # fmt: skip
_LIKE_LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu", "mlp_bias": False,
    "attention_bias": False, "attention_dropout": 0.0, "bos_token_id": 0, "eos_token_id": [1, 8],
    "initializer_range": 0.02, "pretraining_tp": 1, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
    "transformers_version": "4.45.0.dev0", "use_cache": True, "rms_norm_eps": 1e-05,
}  # fmt: skip
_JAMBA = {
    "architectures": ["JambaForCausalLM"], "attention_dropout": 0.0, "attn_layer_offset": 4, "attn_layer_period": 8,
    "auto_map": {"AutoConfig": "configuration_jamba.JambaConfig"}, "bos_token_id": 1, "eos_token_id": 2,
    "expert_layer_offset": 1, "expert_layer_period": 2, "hidden_act": "silu", "hidden_size": 4096,
    "initializer_range": 0.02, "intermediate_size": 14336, "mamba_conv_bias": True, "mamba_d_conv": 4,
    "mamba_d_state": 16, "mamba_dt_rank": 256, "mamba_expand": 2, "mamba_inner_layernorms": True,
    "mamba_proj_bias": False, "model_type": "jamba", "n_ctx": 262144, "num_attention_heads": 32, "num_experts": 16,
    "num_experts_per_tok": 2, "num_hidden_layers": 32, "num_key_value_heads": 8, "output_router_logits": False,
    "pad_token_id": 0, "rms_norm_eps": 1e-06, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "torch_dtype": "bfloat16", "transformers_version": "4.40.0.dev0", "use_cache": True,
    "use_mamba_kernels": False, "vocab_size": 65536,
}  # fmt: skip
_ZAMBA2 = {
    "model_type": "zamba2", "adapter_rank": 128, "add_bias_linear": False, "attention_dropout": 0.0, "bos_token_id": 1,
    "chunk_size": 256, "eos_token_id": 2, "hidden_act": "gelu", "initializer_range": 0.02, "mamba_d_conv": 4,
    "mamba_expand": 2, "max_position_embeddings": 4096, "num_attention_heads": 32, "num_key_value_heads": 32,
    "num_logits_to_keep": 1, "pad_token_id": 0, "rms_norm_eps": 1e-05, "rope_theta": 10000, "time_step_floor": 0.0001,
    "time_step_max": 0.1, "time_step_min": 0.001, "use_cache": True, "use_conv_bias": True, "use_long_context": False,
    "use_mamba_kernels": True, "use_mem_eff_path": False, "vocab_size": 32000,
}  # fmt: skip


# Layout, config.json, and the parameters of the model that it belongs to.
RELEASED: dict[str, tuple[str, dict, int]] = {
    "mamba-130m": (
        "state-spaces Mamba",
        {**_LIKE_MAMBA_130M, "vocab_size": 50277, "ssm_cfg": {}, "pad_vocab_size_multiple": 8},
        129_135_360,
    ),
    "mamba2-130m": (
        "state-spaces Mamba",
        {
            **_LIKE_MAMBA_130M, "vocab_size": 50277, "ssm_cfg": {"layer": "Mamba2"}, "d_intermediate": 0,
            "attn_layer_idx": [], "attn_cfg": {}, "pad_vocab_size_multiple": 16, "tie_embeddings": True,
        },
        128_989_632,
    ),
    "mamba-130m-hf": (
        "transformers Mamba",
        {
            **_LIKE_MAMBA_130M, "architectures": ["MambaForCausalLM"], "model_type": "mamba", "ssm_cfg": {},
            "pad_vocab_size_multiple": 8, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
            "conv_kernel": 4, "d_inner": 1536, "expand": 2, "hidden_act": "silu", "hidden_size": 768,
            "initializer_range": 0.1, "intermediate_size": 1536, "layer_norm_epsilon": 1e-05,
            "num_hidden_layers": 24, "rescale_prenorm_residual": False, "state_size": 16,
            "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1,
            "time_step_min": 0.001, "time_step_rank": 48, "time_step_scale": 1.0, "torch_dtype": "float32",
            "transformers_version": "4.39.0.dev0", "use_bias": False, "use_cache": True,
            "use_conv_bias": True, "vocab_size": 50280,
        },
        129_135_360,
    ),
    "mamba-codestral-7b": (
        "transformers Mamba-2",
        {
            "architectures": ["Mamba2ForCausalLM"], "model_type": "mamba2", "bos_token_id": 0,
            "chunk_size": 256, "conv_kernel": 4, "eos_token_id": 0, "expand": 2, "head_dim": 64,
            "hidden_act": "silu", "hidden_size": 4096, "initializer_range": 0.1, "intermediate_size": 8192,
            "layer_norm_epsilon": 1e-05, "n_groups": 8, "norm_before_gate": True, "num_heads": 128,
            "num_hidden_layers": 64, "pad_token_id": 0, "rescale_prenorm_residual": False,
            "residual_in_fp32": True, "rms_norm": True, "state_size": 128, "tie_word_embeddings": False,
            "time_step_floor": 0.0001, "time_step_init_scheme": "random", "time_step_max": 0.1,
            "time_step_limit": [0.0, float("inf")], "time_step_min": 0.001, "time_step_rank": 256,
            "time_step_scale": 1.0, "torch_dtype": "bfloat16", "transformers_version": "4.44.0.dev0",
            "use_bias": False, "use_cache": True, "use_conv_bias": True, "vocab_size": 32768,
        },
        7_285_403_648,
    ),
    "llama-3.2-1b": (
        "transformers Llama",
        {
            **_LIKE_LLAMA, "head_dim": 64, "hidden_size": 2048, "intermediate_size": 8192,
            "max_position_embeddings": 131072, "num_attention_heads": 32, "num_hidden_layers": 16,
            "num_key_value_heads": 8, "rope_theta": 500000.0, "vocab_size": 128256,
            "rope_scaling": {
                "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
        },
        1_235_814_400,
    ),
    "smollm2-135m": (
        "transformers Llama",
        {
            **_LIKE_LLAMA, "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
            "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30,
            "num_key_value_heads": 3, "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000,
            "vocab_size": 49152,
        },
        134_515_008,
    ),
    "qwen2.5-0.5b": (
        "transformers Qwen2",
        {
            "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "bos_token_id": 151643,
            "eos_token_id": 151643, "hidden_act": "silu", "hidden_size": 896, "initializer_range": 0.02,
            "intermediate_size": 4864, "max_position_embeddings": 32768, "max_window_layers": 24,
            "model_type": "qwen2", "num_attention_heads": 14, "num_hidden_layers": 24,
            "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
            "sliding_window": 32768, "tie_word_embeddings": True, "torch_dtype": "bfloat16",
            "transformers_version": "4.40.1", "use_cache": True, "use_mrope": False,
            "use_sliding_window": False, "vocab_size": 151936,
        },
        494_032_768,
    ),
    "falcon-mamba-7b": (
        "transformers Falcon-Mamba",
        {
            "architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba", "bos_token_id": 0,
            "conv_kernel": 4, "eos_token_id": 11, "expand": 16, "hidden_act": "silu", "hidden_size": 4096,
            "initializer_range": 0.1, "intermediate_size": 8192, "layer_norm_epsilon": 1e-05,
            "mixer_rms_eps": 1e-06, "num_hidden_layers": 64, "pad_token_id": 11, "rescale_prenorm_residual": False,
            "residual_in_fp32": True, "state_size": 16, "tie_word_embeddings": False, "time_step_floor": 0.0001,
            "time_step_init_scheme": "random", "time_step_max": 0.1, "time_step_min": 0.001,
            "time_step_rank": 256, "time_step_scale": 1.0, "torch_dtype": "bfloat16", "use_bias": False,
            "use_cache": True, "use_conv_bias": True, "use_mambapy": False, "vocab_size": 65024,
        },
        7_272_665_088,
    ),
    "bamba-9b": (
        "transformers Bamba",
        {
            "architectures": ["BambaForCausalLM"], "model_type": "bamba", "attention_bias": False,
            "attention_dropout": 0.0, "attn_layer_indices": [9, 18, 27], "attn_rotary_emb": 64, "hidden_act": "silu",
            "hidden_size": 4096, "intermediate_size": 14336, "mamba_chunk_size": 256, "mamba_conv_bias": True,
            "mamba_d_conv": 4, "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1,
            "mamba_n_heads": 128, "mamba_proj_bias": False, "max_position_embeddings": 262144, "mlp_bias": False,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "num_logits_to_keep": 1,
            "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000.0, "tie_word_embeddings": False,
            "use_mamba_kernels": True, "vocab_size": 128256,
        },
        9_780_235_392,
    ),
    "granite-4.0-h-micro": (
        "transformers Granite-4.0-H",
        {
            "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid",
            "attention_bias": False, "attention_dropout": 0.0, "attention_multiplier": 0.015625,
            "embedding_multiplier": 12, "hidden_act": "silu", "hidden_size": 2048, "init_method": "mup",
            "initializer_range": 0.1, "intermediate_size": 8192,
            "layer_types": ["attention" if index % 10 == 5 else "mamba" for index in range(40)],
            "logits_scaling": 8, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4,
            "mamba_d_head": 64, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 64,
            "mamba_proj_bias": False, "max_position_embeddings": 131072, "normalization_function": "rmsnorm",
            "num_attention_heads": 32, "num_experts_per_tok": 0, "num_hidden_layers": 40, "num_key_value_heads": 8,
            "num_local_experts": 0, "output_router_logits": False, "position_embedding_type": "nope",
            "residual_multiplier": 0.22, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000,
            "router_aux_loss_coef": 0.01, "shared_intermediate_size": 8192, "tie_word_embeddings": True,
            "vocab_size": 100352,
        },
        3_191_396_096,
    ),
    "nemotron-h-8b": (
        "transformers Nemotron-H",
        {
            "architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h", "attention_bias": False,
            "attention_dropout": 0.0, "attention_head_dim": 128, "chunk_size": 128, "conv_kernel": 4, "expand": 2,
            "hidden_dropout": 0.0, "hidden_size": 4096,
            "hybrid_override_pattern": "M-M-M-M*-" + 3 * "M-M-M-M-M*-" + "M-M-M-M-M-", "intermediate_size": 21504,
            "layer_norm_epsilon": 1e-05, "mamba_head_dim": 64, "mamba_hidden_act": "silu", "mamba_num_heads": 128,
            "mamba_proj_bias": False, "mlp_bias": False, "mlp_hidden_act": "relu2", "n_groups": 8,
            "num_attention_heads": 32, "num_hidden_layers": 52, "num_key_value_heads": 8, "num_logits_to_keep": 1,
            "rescale_prenorm_residual": True, "residual_in_fp32": False, "ssm_state_size": 128,
            "tie_word_embeddings": False, "time_step_floor": 0.0001, "time_step_limit": [0.0, float("inf")],
            "time_step_max": 0.1, "time_step_min": 0.001, "time_step_rank": 256, "use_bias": False,
            "use_conv_bias": True, "use_mamba_kernels": True, "vocab_size": 131072,
        },
        8_100_852_736,
    ),
    "falcon-h1-0.5b": (
        "transformers Falcon-H1",
        {
            "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "attention_bias": False,
            "attention_dropout": 0.0, "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.9375,
            "embedding_multiplier": 5.656854249492381, "head_dim": 64, "hidden_act": "silu", "hidden_size": 1024,
            "intermediate_size": 2048, "key_multiplier": 0.390625, "lm_head_multiplier": 0.0390625,
            "mamba_chunk_size": 128, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64,
            "mamba_d_ssm": 1536, "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 24,
            "mamba_norm_before_gate": False, "mamba_proj_bias": False, "mamba_rms_norm": False,
            "mamba_use_mlp": True, "max_position_embeddings": 16384, "mlp_bias": False, "mlp_expansion_factor": 8,
            "mlp_multipliers": [0.8838834764831844, 0.5859375], "num_attention_heads": 8, "num_hidden_layers": 36,
            "num_key_value_heads": 2, "num_logits_to_keep": 1, "projectors_bias": False, "rms_norm_eps": 1e-05,
            "rope_scaling": None, "rope_theta": 1e11, "ssm_in_multiplier": 1.25,
            "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
            "ssm_out_multiplier": 0.23570226039551587, "tie_word_embeddings": False, "vocab_size": 32784,
        },
        521_411_104,
    ),
    "zamba2-1.2b": (
        "transformers Zamba2",
        {
            **_ZAMBA2, "hidden_size": 2048, "intermediate_size": 8192, "mamba_d_state": 128, "mamba_ngroups": 1,
            "n_mamba_heads": 64, "num_hidden_layers": 38, "num_mem_blocks": 1, "use_mem_rope": True,
            "use_shared_attention_adapter": True,
            "layers_block_type": ["hybrid" if index % 6 == 5 else "mamba" for index in range(38)],
        },
        1_215_064_704,
    ),
    "zamba2-2.7b": (
        "transformers Zamba2",
        {
            **_ZAMBA2, "hidden_size": 2560, "intermediate_size": 10240, "mamba_d_state": 64, "mamba_ngroups": 1,
            "n_mamba_heads": 80, "num_hidden_layers": 54, "num_mem_blocks": 2, "use_mem_rope": False,
            "use_shared_attention_adapter": False,
            "layers_block_type": [
                "hybrid" if index in (6, 12, 18, 24, 30, 36, 42, 47, 51) else "mamba" for index in range(54)
            ],
        },
        2_662_214_560,
    ),
    "zamba2-7b": (
        "transformers Zamba2",
        {
            **_ZAMBA2, "hidden_size": 3584, "intermediate_size": 14336, "mamba_d_state": 64, "mamba_ngroups": 2,
            "n_mamba_heads": 112, "num_hidden_layers": 81, "num_mem_blocks": 2, "use_mem_rope": True,
            "use_shared_attention_adapter": False,
            "layers_block_type": [
                "hybrid" if index == 6 or (index % 6 == 5 and 5 < index < 80) else "mamba" for index in range(81)
            ],
        },
        7_356_749_648,
    ),
    "jamba-v0.1": ("transformers Jamba", _JAMBA, 51_570_323_328),
    "jamba-9b": ("transformers Jamba", {**_JAMBA, "num_experts": 1, "num_experts_per_tok": 1}, 9_290_690_432),
    "llamba-3b": (
        "Llamba",
        {
            "model_type": "llamba", "vocab_size": 128256, "tie_embeddings": True, "pad_vocab_size_multiple": 8,
            "lm_head_bias": False, "d_model": 3072, "n_layer": 28, "resid_dropout": 0.0, "norm_epsilon": 1e-05,
            "mlp_cfg": {"intermediate_size": 8192, "bias": False, "act_fn": "silu"},
            "ssm_cfg": {
                "d_state": 64, "n_v_heads": 32, "n_qk_heads": 32, "expand": 1, "chunk_size": 128,
                "activation": "identity", "bias": False,
            },
        },
        # A projection of 10272 rows, 7168 channels convolved, z_bias, D, a projection out, a feed-forward layer.
        28 * (10272 * 3072 + 5 * 7168 + 3072 + 32 + 3072**2 + 3 * 8192 * 3072 + 2 * 3072) + (128256 + 1) * 3072,
    ),
    "llama3.1-mamba-8b-distill": (
        "MambaInLlama",
        {
            **_LIKE_LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072,
            "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "rope_theta": 500000.0,
            "tie_word_embeddings": False, "vocab_size": 128256,
            "rope_scaling": {
                "factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3",
            },
            "mamba_config.json": {
                "d_model": 4096, "ssm_cfg": {"expand": 1}, "rms_norm_eps": 1e-05, "vocab_size": None, "d_xb": 1024,
                "intermediate_size": 14336, "hidden_act": "silu", "n_layer": 32, "attn_layers": list(range(1, 32, 2)),
            },
        },
        # Llama 3.1 8B, but in half of the layers z, steps of rank 256, convolutions, decays and D are added.
        8_030_261_248 + 16 * (4096**2 + 2 * 256 * 4096 + 4096 + 5 * 4096 + 17 * 4096),
    ),
}  # fmt: skip
