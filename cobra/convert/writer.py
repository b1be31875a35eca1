"""A safetensors file written tensor by tensor."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# Format: https://huggingface.co/docs/safetensors, "Format".
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int32: "I32", torch.uint8: "U8", torch.int8: "I8", torch.bool: "BOOL",
}  # fmt: skip
ALIGNMENT = 8


class Entry(NamedTuple):
    """A tensor to be written: what it will be, and what makes it when its turn comes."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return self.dtype.itemsize * math.prod(self.shape)


def write_tensors(file: Path, entries: Sequence[Entry], advance: Callable[[int], object]) -> None:
    """Writes a safetensors file; no more than one of its tensors is in memory at a time.

    Args:
        entries: in any order; wide dtypes are written first, so that each begins at a multiple of its size.
        advance: is told of each further number of bytes.
    """
    entries = sorted(entries, key=lambda entry: (-entry.dtype.itemsize, entry.name))
    header: dict[str, dict] = {"__metadata__": {"format": "pt"}}
    end = 0
    for entry in entries:
        begin, end = end, end + entry.nbytes
        header[entry.name] = {
            "dtype": DTYPES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    with open(file, "wb") as out:
        out.write(len(text).to_bytes(8, "little"))
        out.write(text)
        for entry in entries:
            tensor = entry.read().detach().to(entry.dtype).contiguous()
            assert tuple(tensor.shape) == entry.shape, entry.name
            out.write(tensor.flatten().view(torch.uint8).numpy().data)
            advance(entry.nbytes)
