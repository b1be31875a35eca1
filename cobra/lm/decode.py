"""Decoding: a few tokens through the whole stack at once: on a CPU in one call of csrc/cpu/decode.h, on a GPU
in one graph (decode_cuda.py).

`LanguageModel.forward` comes here with every call that may overwrite its state; what cannot be served, for
instance a layer kind without `add_to` or an active autograd, is left to the layers themselves.
"""

import itertools
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from vision_scan.ops.register import KERNELS, MISSING_KERNELS

from .head import LMHead
from .mixer import UPDATE_TOKENS
from .precision import Projection, RMSNorm
from .state import SSM_SCALE, State

if TYPE_CHECKING:
    from .stack import LanguageModel

MOST_ROWS = 64  # tokens of all rows, on a CPU: with more, the layers, whose products are one large one each, are faster


class Native(NamedTuple):
    """Compiled steps for a kind of device.

    Attributes:
        make: (norm, eps, head, vocab) -> what the layers add themselves to, and what makes the steps.
        dtypes: of a model.
        most_rows: tokens of all rows that a step may have.
        most_tokens: tokens of one row that it may have.
    """

    make: Callable[..., Any]
    dtypes: tuple[torch.dtype, ...]
    most_rows: float
    most_tokens: int


def native_for(device: str) -> Native | None:
    """The compiled steps for a type of device. Where the CUDA kernels are emulated, that is the CPU."""
    if device == "cpu" and "cpu" not in MISSING_KERNELS:
        return Native(torch.classes.vision_scan_cpu.Decoder, (torch.float32, torch.bfloat16), MOST_ROWS, MOST_ROWS)
    if "cuda" in MISSING_KERNELS or ("ssd_update", device) not in KERNELS:
        return None
    from .decode_cuda import CudaDecoder

    return Native(CudaDecoder, (torch.float32, torch.bfloat16, torch.float16), float("inf"), UPDATE_TOKENS)


class UnservableError(Exception):
    """A model that has something which the kernels do not know."""


class Decoder:
    """The compiled form of a language model.

    It holds the model's own tensors. They may be trained, cast or moved in place; if a module or a parameter
    is replaced by another object, the decoder is `stale`.

    Raises:
        UnservableError: if there is a layer, norm or projection of another kind than the kernels know.
    """

    def __init__(self, lm: "LanguageModel") -> None:
        native = native_for(lm.device.type)
        norms = [lm.norm_f, *(block.norm for block in lm.layers)]
        mixers = [block.mixer for block in lm.layers]
        modules = list(lm.modules())
        is_known = all(type(norm) is RMSNorm for norm in norms) and all(map(_is_known, mixers))
        if native is None or not is_known:
            raise UnservableError
        self.device_type = lm.device.type
        self._native = native.make(
            lm.norm_f.weight, lm.norm_f.eps, stored(lm.lm_head, LMHead), lm.config.vocab_size
        )
        for block in lm.layers:
            block.mixer.add_to(self._native, block.norm)
        self._most_tokens = min(getattr(mixer, "most_step_tokens", native.most_tokens) for mixer in mixers)
        self._names = [mixer.step_states for mixer in mixers]
        self._reserve = [getattr(mixer, "reserve", None) for mixer in mixers]
        self._tables = [
            table for module in modules for table in (module._parameters, module._buffers, module._modules)
        ]
        self._held = self._objects()
        self._hooks = [
            hooks
            for module in modules
            if module is not lm
            for hooks in (module._forward_hooks, module._forward_pre_hooks)
        ]

    @property
    def stale(self) -> bool:
        """Whether an object of the model has been replaced."""
        return list(map(id, self._objects())) != list(map(id, self._held))

    def _objects(self) -> list:
        return list(itertools.chain.from_iterable(map(dict.values, self._tables)))

    def serves(self, seqlen: int) -> bool:
        """Whether so many tokens of a row can be read at once, with nobody looking on."""
        return seqlen <= self._most_tokens and not any(self._hooks)

    def step(self, hidden: Tensor, state: State, mask: Tensor | None, keep: int) -> tuple[Tensor, State]:
        """Reads tokens into a state that is overwritten.

        Args:
            hidden: (batch, seqlen, d_model) float32, overwritten.
            mask: (batch,) bool, False: the row is padding; or None.
            keep: logits of the last so many tokens.
        Raises:
            ValueError: if a tensor is of another shape, dtype or layout than the kernels take; the state is
                as it was.
        """
        layers = [
            reserve(layer, state.lengths) if reserve else layer
            for reserve, layer in zip(self._reserve, state.layers, strict=True)
        ]
        tensors = [
            layer[name]
            for names, layer in zip(self._names, layers, strict=True)
            for name in (*names, SSM_SCALE)
            if name in layer
        ]
        logits = self._native.step(hidden, tensors, state.lengths, mask, keep)
        read = hidden.shape[1] if mask is None else mask.long().cpu()
        return logits, State(layers, state.lengths + read, dict(state.info))


_DECODERS: "WeakKeyDictionary[LanguageModel, Decoder]" = WeakKeyDictionary()


def stored(projection: nn.Module, kind: type[nn.Module] = Projection) -> list[Tensor]:
    """A projection as the kernels take it: its weight, or the packed codes and scales of a quantised one.

    Raises:
        UnservableError: if it adds a bias, or is another module than a `kind`, which may compute something
            else.
    """
    if kind is Projection and getattr(projection, "bias", None) is not None:
        raise UnservableError
    if hasattr(projection, "packed"):
        return projection.packed
    if type(projection) is not kind:
        raise UnservableError
    return [projection.weight]


def decoder_for(lm: "LanguageModel", batch: int, seqlen: int) -> Decoder | None:
    """The compiled form of `lm`, if it serves a call with these tokens."""
    device = lm.device.type
    native = native_for(device)
    if (
        native is None
        or torch.is_grad_enabled()
        or not 1 <= batch * seqlen <= native.most_rows
        or lm.dtype not in native.dtypes
        or torch.is_autocast_enabled(device)
        or torch.compiler.is_compiling()
    ):
        return None
    decoder = _DECODERS.get(lm)
    if decoder is None or decoder.stale or decoder.device_type != device:
        try:
            decoder = _DECODERS[lm] = Decoder(lm)
        except UnservableError:
            return None
    return decoder if decoder.serves(seqlen) else None


def _is_known(mixer: nn.Module) -> bool:
    convolution = getattr(mixer, "conv1d", None)
    return hasattr(mixer, "add_to") and (convolution is None or convolution.bias is not None)
