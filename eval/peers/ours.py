"""Our models as contestants."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from cobra.model import Cobra
from cobra.quantize import GROUP_SIZES, quantize

FORMS = ("float32", "bfloat16", "int8", "int4")


class OurReader:
    """A `cobra.lm.LanguageModel` in one of FORMS."""

    family = "ours"

    def __init__(self, model: Cobra, form: Any) -> None:
        """Takes a float32 model and leaves it as it is."""
        self.form = form
        self._lm = model.lm
        if form in GROUP_SIZES:
            self._lm = quantize(_language_only(model), form).lm
        elif form != "float32":
            self._lm = copy.deepcopy(model.lm).to(getattr(torch, form))

    @torch.inference_mode()
    def logits(self, ids: Tensor) -> Tensor:
        return self._lm(ids)[0][0]

    @torch.inference_mode()
    def read(self, ids: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        """As `Reader.read`; goes on from `state`, which is overwritten, if one is given."""
        logits, state = self._lm(ids, state=state, overwrite_state=state is not None, logits_to_keep=1)
        return logits[:, -1], state

    def go_on(self, ids: Tensor, state: Any) -> Tensor:
        """Logits (seqlen, vocab) of tokens (1, seqlen) behind a state, scanned, not decoded."""
        return self._lm(ids, state=state, overwrite_state=False)[0][0]

    def resume(self, state: Any) -> Any:
        return state.clone()

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        logits, state = self._lm(tokens[:, None], state=state, overwrite_state=True)
        return logits[:, -1], state


def rounding(model: Cobra, form: Any) -> Callable[[str, Tensor], Tensor]:
    """What int8 or int4 make of a matrix: (name of its module, weight) -> weight, float32."""
    lm = quantize(_language_only(model), form).lm

    def change(name: str, weight: Tensor) -> Tensor:
        module: Any = lm.get_submodule(name)
        return module.weight if hasattr(module, "packed") else weight

    return change


def with_weights(model: Cobra, change: Callable[[str, Tensor], Tensor]) -> "OurReader":
    """A float32 reader of the same model whose matrices are replaced by what `change` makes of them."""
    reader = OurReader(_language_only(model), "float32")
    is_tied = reader._lm.config.tie_word_embeddings
    for name, module in reader._lm.named_modules():
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Embedding) and not is_tied):
            module.weight.data = change(name, module.weight)
    return reader


def _language_only(model: Cobra) -> Cobra:
    """A copy of the language model in a model that shares everything else."""
    twin = copy.copy(model)
    twin._modules = {**model._modules, "lm": copy.deepcopy(model.lm)}
    return twin
