"""How the CUDA kernels take tensors: visiting lists and segments as small integers, one dtype for a scan."""

from typing import overload

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from ..reference.segments import real_and_runs

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def serves(first: Tensor, *others) -> bool:
    return first.dtype in DTYPES and first.numel() > 0


def common_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which a kernel reads all of them without losing a digit; float64 becomes float32."""
    dtype = tensors[0].dtype
    for t in tensors[1:]:
        dtype = torch.promote_types(dtype, t.dtype)
    return dtype if dtype in DTYPES else torch.float32


def cells(t: Tensor, leading: int) -> Tensor:
    """As it lies if its first `leading` axes have one stride and the others are contiguous, like a piece of
    what a projection gives; else contiguous."""
    flat = t.flatten(0, leading - 1)
    return (flat if flat[0].is_contiguous() else flat.contiguous()).unflatten(0, t.shape[:leading])


@overload
def parameter(t: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def parameter(t: None, dtype: torch.dtype) -> None: ...
def parameter(t, dtype):
    """Contiguous, and float32 or of the dtype of the tokens."""
    return None if t is None else (t if t.dtype == dtype else t.float()).contiguous()


_INDICES = WeakIdKeyDictionary()  # visiting lists -> what `lists_of` gives for them


def lists_of(index: Tensor) -> tuple[Tensor, bool]:
    """Visiting lists as int32, and whether each of them is a permutation of as many cells as it is long. An
    order's index is the same tensor at every call, so that the GPU is asked once."""
    if index not in _INDICES:
        _INDICES[index] = index.to(torch.int32).contiguous(), bool((index >= 0).all())
    return _INDICES[index]


def bounds_of(cu_seqlens: Tensor | None) -> Tensor | None:
    return None if cu_seqlens is None else cu_seqlens.to(torch.int32).contiguous()


def marks_of(seq_idx: Tensor | None, cu_seqlens: Tensor | None = None) -> Tensor | None:
    """(batch, seqlen) uint8 for csrc/cuda/tokens.h: 1 for padding, 2 where a new segment starts from a zero
    state; that of `cu_seqlens` starts from its own."""
    if seq_idx is None:
        return None
    real, run = real_and_runs(seq_idx)
    reset = run != torch.nn.functional.pad(run[:, :-1], (1, 0))
    if cu_seqlens is not None:
        position = torch.arange(seq_idx.shape[1], device=seq_idx.device)
        start = cu_seqlens[torch.searchsorted(cu_seqlens, position, right=True) - 1]
        real_before = torch.nn.functional.pad(real.cumsum(1), (1, 0))
        reset &= real_before[:, :-1] > real_before[:, start]
    return (~real).to(torch.uint8) + 2 * reset.to(torch.uint8)
