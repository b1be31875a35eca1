"""`gated_delta_rule` on the Triton kernels of fla (flash-linear-attention).

fla scans rows of one length, or segments that lie one behind the other in one row, each from a state of its own; it
knows no padding. Rows with padding or several segments become such a row: of the real tokens alone, with a boundary
wherever the row or the segment changes. What it gives is put back where the tokens came from.

It multiplies in the dtype of the values and adds up in float32. Float32 values would be multiplied with the 10 bits of
tf32, so they are left to our form in torch, as is float64. Queries and keys are rounded to the dtype of the values.
"""

import importlib
from collections.abc import Callable, Sequence
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..reference.gated_delta_rule import gated_delta_rule_chunked
from ..reference.segments import unpack

MODULE = "fla.ops.gated_delta_rule"
OLDEST = (0, 6)  # the version whose arguments these are; older ones ignore what they do not know
DTYPES = (torch.bfloat16, torch.float16)
MOST_HEAD_K_DIM = 256  # its kernels hold a state in four pieces of 64 rows
TILE = 16  # the least that a product takes; odd sizes in 16 bits have been compiled wrongly
# Stands for all stronger decays, -inf too: sums of logarithms are subtracted, and those of -inf would be NaN. 2e-22 of
# a state is nothing in 16 bits, and sums over a chunk of 64 tokens are still exact to 3e-4 in float32.
LEAST_G = -50.0


def serves(q, k, v, g, beta, scale, initial_state, seq_idx, cu_seqlens, chunk_size) -> bool:
    """Packing asks the GPU how many tokens are real, which a CUDA graph that is being captured must not."""
    head_k_dim, head_v_dim = k.shape[-1], v.shape[-1]
    fits = head_k_dim % TILE == head_v_dim % TILE == 0 and head_k_dim <= MOST_HEAD_K_DIM
    packs = seq_idx is not None or cu_seqlens is not None
    captured = packs and v.is_cuda and torch.cuda.is_current_stream_capturing()
    return v.dtype in DTYPES and v.numel() > 0 and fits and not captured


def scan(q, k, v, g, beta, scale, initial_state, seq_idx, cu_seqlens, chunk_size) -> tuple[Tensor, Tensor]:
    """Arguments as `vision_scan.gated_delta_rule`; autograd can record it."""
    tokens = (q, k, v, g, beta)
    if seq_idx is None and cu_seqlens is None:
        return _scan_rows(tokens, scale, initial_state, None)
    packed = Packed.of(seq_idx, cu_seqlens, v.shape[0], v.shape[1])
    if packed.places.numel() == 0:  # a kernel cannot be started for no token
        return gated_delta_rule_chunked(q, k, v, g, beta, scale, initial_state, seq_idx, cu_seqlens, chunk_size)
    tokens = [t.flatten(0, 1).index_select(0, packed.places)[None] for t in tokens]
    start = None if initial_state is None else packed.to_segments(initial_state)
    y, states = _scan_rows(tokens, scale, start, packed.bounds)
    y = v.new_zeros(v.shape).flatten(0, 1).index_copy(0, packed.places, y[0])
    return y.view(v.shape), packed.to_rows(states, initial_state)


def _scan_rows(
    tokens: Sequence[Tensor], scale: float, initial_state: Tensor | None, bounds: Tensor | None
) -> tuple[Tensor, Tensor]:
    """fla's function on q, k, v, g and beta. Its states are (head_k_dim, head_v_dim); heads are grouped as ours."""
    q, k, v, g, beta = tokens
    wide = torch.promote_types(v.dtype, torch.float32)
    y, state = _function()(
        q.to(v.dtype), k.to(v.dtype), v, g.to(wide).clamp(min=LEAST_G), beta.to(wide), scale=scale,
        initial_state=None if initial_state is None else initial_state.to(wide).transpose(-1, -2),
        output_final_state=True, cu_seqlens=bounds,
    )  # fmt: skip
    return y.contiguous(), state.transpose(-1, -2).contiguous()


@cache
def _function() -> Callable:
    version = importlib.import_module("fla").__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST:
        raise ImportError(f"fla {version} is older than {'.'.join(map(str, OLDEST))}")
    return importlib.import_module(MODULE).chunk_gated_delta_rule


class Packed(NamedTuple):
    """The real tokens of a batch one behind the other. A row is one of the batch, or a segment of `cu_seqlens`.

    Attributes:
        places: (num_real,) int64, which of the batch * seqlen tokens stands there.
        bounds: (num_segments + 1,) int64, where segments begin; none is empty.
        row: (num_segments,) int64, the row that a segment is of, ascending.
        last: (num_rows,) int64, the last segment of each row; below 0 or of another row: it has none.
    """

    places: Tensor
    bounds: Tensor
    row: Tensor
    last: Tensor

    @staticmethod
    def of(seq_idx: Tensor | None, cu_seqlens: Tensor | None, batch: int, seqlen: int) -> "Packed":
        if cu_seqlens is not None:
            source, seq_idx = unpack(cu_seqlens, seq_idx, batch, seqlen)
        else:
            assert seq_idx is not None
            source = torch.arange(batch * seqlen, device=seq_idx.device).view(batch, seqlen)
        rows, columns = (seq_idx >= 0).nonzero(as_tuple=True)
        segment = seq_idx[rows, columns]
        is_start = torch.ones_like(rows, dtype=torch.bool)
        is_start[1:] = (rows[1:] != rows[:-1]) | (segment[1:] != segment[:-1])
        starts = is_start.nonzero().flatten()
        row = rows[starts]
        every_row = torch.arange(len(seq_idx), device=row.device)
        return Packed(
            places=source[rows, columns],
            bounds=torch.nn.functional.pad(starts, (0, 1), value=len(rows)),
            row=row,
            last=torch.searchsorted(row, every_row, right=True) - 1,
        )

    def to_segments(self, states: Tensor) -> Tensor:
        """A row's state for its first segment, zero for its others."""
        is_first = torch.ones_like(self.row, dtype=torch.bool)
        is_first[1:] = self.row[1:] != self.row[:-1]
        return torch.where(is_first.view(-1, 1, 1, 1), states.index_select(0, self.row), 0.0)

    def to_rows(self, states: Tensor, initial_state: Tensor | None) -> Tensor:
        """The state behind each row's last segment; a row without any keeps its initial state."""
        last = self.last.clamp(min=0)
        has_any = self.row[last] == torch.arange(len(last), device=last.device)
        before = 0.0 if initial_state is None else initial_state.to(states.dtype)
        return torch.where(has_any.view(-1, 1, 1, 1), states.index_select(0, last), before)
