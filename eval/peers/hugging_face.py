"""transformers' models as contestants: its Mamba-2 with our weights, and its Llama with the shapes of our
transformer twin."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from cobra.convert import Layout
from cobra.convert.mamba import MAMBA2
from cobra.convert.transformer import LLAMA
from cobra.lm import LanguageModel
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
    model, tensors = _build(MAMBA2, lm.config), lm.state_dict()
    pieces = MAMBA2.locate(lm.config, {}, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    model.load_state_dict({pieces[name][0].name: tensor for name, tensor in tensors.items()})
    return model.eval()


def build_llama(config: LMConfig, seed: int) -> nn.Module:
    """transformers' LlamaForCausalLM with the shapes of a transformer twin and random weights, float32."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _build(LLAMA, config, max_position_embeddings=16384).eval()


def _build(layout: Layout, config: LMConfig, **options: int) -> nn.Module:
    transformers = _import_quietly()
    assert layout.write_config is not None
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    theirs = transformers.AutoConfig.for_model(**layout.write_config(config), **tokens, **options)
    return transformers.AutoModelForCausalLM.from_config(theirs)


def _import_quietly() -> Any:
    """transformers, without what it says of every layer that has no kernel for a GPU."""
    import transformers

    transformers.logging.set_verbosity_error()
    return transformers
