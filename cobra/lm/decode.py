"""Decoding on a CPU: a few tokens through the whole stack in one call of csrc/cpu/decode.h.

`LanguageModel.forward` comes here with every call that may overwrite its state; what cannot be served, for
instance a layer kind without `add_to`, float16 or an active autograd, is left to the layers themselves.
"""

from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vision_scan.ops.register import MISSING_KERNELS

from .state import State

if TYPE_CHECKING:
    from .stack import LanguageModel

MOST_ROWS = 64  # tokens of all rows; a product with more rows is no longer bound by memory


class Decoder:
    """The compiled form of a language model.

    It holds the model's own tensors. They may be trained, cast or moved in place; if a module or a parameter
    is replaced by another object, or a hook is added, the decoder is `stale`.
    """

    def __init__(self, lm: "LanguageModel") -> None:
        head = stored(lm.lm_head)
        self._native = torch.classes.vision_scan_cpu.Decoder(
            lm.norm_f.weight, lm.norm_f.eps, head, lm.config.vocab_size
        )
        for block in lm.layers:
            block.mixer.add_to(self._native, block.norm)
        self._mixers = [block.mixer for block in lm.layers]
        modules = list(lm.modules())
        self._held = [
            (table, name, value)
            for module in modules
            for table in (module._parameters, module._buffers, module._modules)
            for name, value in table.items()
        ]
        self._hooks = [
            hooks
            for module in modules
            if module is not lm
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    @property
    def stale(self) -> bool:
        """Whether the model has changed in a way that this does not follow."""
        replaced = (table[name] is not value for table, name, value in self._held)
        return any(map(len, self._hooks)) or any(replaced)

    def step(self, hidden: Tensor, state: State, mask: Tensor | None, keep: int) -> tuple[Tensor, State]:
        """Reads tokens into a state that is overwritten.

        Args:
            hidden: (batch, seqlen, d_model) float32, overwritten.
            mask: (batch,) bool, False: the row is padding; or None.
            keep: logits of the last so many tokens.
        """
        layers = [
            mixer.reserve(layer, state.lengths) if hasattr(mixer, "reserve") else layer
            for mixer, layer in zip(self._mixers, state.layers, strict=True)
        ]
        tensors = [
            layer[name]
            for mixer, layer in zip(self._mixers, layers, strict=True)
            for name in mixer.step_states
        ]
        logits = self._native.step(hidden, tensors, state.lengths, mask, keep)
        read = hidden.shape[1] if mask is None else mask.long()
        return logits, State(layers, state.lengths + read, dict(state.info))


_DECODERS: "WeakKeyDictionary[LanguageModel, Decoder]" = WeakKeyDictionary()


def stored(linear: nn.Module) -> list[Tensor]:
    """A projection as the kernels take it: its weight, or the packed codes and scales of a quantised one."""
    return linear.packed if hasattr(linear, "packed") else [linear.weight]


def decoder_for(lm: "LanguageModel", state: State, batch: int, seqlen: int) -> Decoder | None:
    """The compiled form of `lm`, if it serves a call with these tokens on this state."""
    if (
        torch.is_grad_enabled()
        or not 1 <= batch * seqlen <= MOST_ROWS
        or lm.device.type != "cpu"
        or lm.dtype not in (torch.float32, torch.bfloat16)
        or "cpu" in MISSING_KERNELS
        or torch.is_autocast_enabled("cpu")
        or torch.compiler.is_compiling()
        or not all(_serves(block.mixer, seqlen) for block in lm.layers)
        or not all(_fits(tensor, lm.dtype) for layer in state.layers for tensor in layer.values())
    ):
        return None
    decoder = _DECODERS.get(lm)
    if decoder is None or decoder.stale:
        decoder = _DECODERS[lm] = Decoder(lm)
    return decoder


def _serves(mixer: nn.Module, seqlen: int) -> bool:
    return hasattr(mixer, "add_to") and seqlen <= mixer.most_step_tokens


def _fits(tensor: Tensor, dtype: torch.dtype) -> bool:
    return tensor.is_contiguous() and tensor.dtype in (dtype, torch.float32, torch.int64)
