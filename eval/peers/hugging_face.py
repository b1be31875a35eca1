"""transformers' models as contestants: its Mamba-2 with our weights, and its Llama with the shapes of our
transformer twin."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cobra.lm import LanguageModel
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from cobra.lm.stack import LMConfig

FORMS = ("float32", "bfloat16")


class TheirReader:
    """A causal language model of transformers, with its own cache."""

    def __init__(self, model: nn.Module, family: str, form: str) -> None:
        self.family, self.form = family, form
        self._model = model.to(getattr(torch, form)).eval()
        self._cache_name = "past_key_values" if family.endswith("Llama") else "cache_params"

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        return self._model(input_ids=ids, use_cache=False).logits[0].float()

    @torch.inference_mode()
    def read(self, ids: Tensor) -> tuple[Tensor, Any]:
        return self._forward(ids, None)

    @torch.inference_mode()
    def resume(self, state: Any) -> Any:
        return copy.deepcopy(state)

    def adopt(self, state: Any) -> Any:
        """A key-value cache that a model in another dtype has filled; reading is slow in bfloat16 without
        instructions for it, and how long a step takes does not depend on the values."""
        state = copy.deepcopy(state)
        for layer in state.layers:
            layer.keys, layer.values = (t.to(self._model.dtype) for t in (layer.keys, layer.values))
            layer.dtype = self._model.dtype
        return state

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        return self._forward(tokens[:, None], state)

    def _forward(self, ids: Tensor, cache: Any) -> tuple[Tensor, Any]:
        given = {self._cache_name: cache} if cache is not None else {}
        output = self._model(input_ids=ids, use_cache=True, logits_to_keep=1, **given)
        return output.logits[:, -1].float(), getattr(output, self._cache_name)


def build_mamba2(lm: LanguageModel) -> nn.Module:
    """transformers' Mamba2ForCausalLM with the weights of ours, float32."""
    transformers = _import_quietly()
    config, layer = lm.config, lm.config.layers[0]
    assert isinstance(layer, Mamba2Config)
    model = transformers.Mamba2ForCausalLM(
        transformers.Mamba2Config(
            hidden_size=config.d_model,
            vocab_size=config.vocab_size,
            num_hidden_layers=len(config.layers),
            num_heads=layer.nheads(config.d_model),
            head_dim=layer.headdim,
            expand=layer.expand,
            state_size=layer.d_state,
            n_groups=layer.ngroups,
            conv_kernel=layer.d_conv,
            chunk_size=layer.chunk_size,
            time_step_limit=layer.dt_limit,
            layer_norm_epsilon=config.norm_eps,
            tie_word_embeddings=config.tie_word_embeddings,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )
    model.load_state_dict({_their_name(name): tensor for name, tensor in lm.state_dict().items()})
    return model.eval()


def build_llama(config: LMConfig, seed: int) -> nn.Module:
    """transformers' LlamaForCausalLM with the shapes of a transformer twin and random weights, float32."""
    transformers = _import_quietly()
    attention, mlp = config.layers[:2]
    assert isinstance(attention, AttentionConfig) and isinstance(mlp, MLPConfig)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                hidden_size=config.d_model,
                vocab_size=config.vocab_size,
                num_hidden_layers=len(config.layers) // 2,
                num_attention_heads=attention.num_heads,
                num_key_value_heads=attention.num_kv_heads,
                head_dim=attention.headdim,
                intermediate_size=mlp.d_ff,
                rms_norm_eps=config.norm_eps,
                tie_word_embeddings=config.tie_word_embeddings,
                max_position_embeddings=16384,
                pad_token_id=0,
                bos_token_id=1,
                eos_token_id=2,
            )
        )
    return model.eval()


def _their_name(name: str) -> str:
    if name.startswith("lm_head."):
        return name
    return "backbone." + name.replace("embedding.", "embeddings.", 1)


def _import_quietly() -> Any:
    """transformers, without what it says of every layer that has no kernel for a GPU."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers
