"""What `seq_idx` and `cu_seqlens` mean, once for every operator.

`seq_idx` (batch, seqlen), integer: a token below 0 is padding, and state and convolution window pass it
unchanged; a real token whose index differs from that of the last real token before it starts a new
segment from a zero state. The initial state belongs to a row's first segment, the final state is the one
after its last real token. `cu_seqlens` (num_segments + 1,): the boundaries of segments packed into one
row; initial and final states then have one row per segment.
"""

from collections.abc import Callable

import torch
from torch import Tensor


def real_and_runs(seq_idx: Tensor) -> tuple[Tensor, Tensor]:
    """Padding and resets as two tensors.

    Args:
        seq_idx: (batch, seqlen), integer.
    Returns:
        real: (batch, seqlen) bool, False at padding.
        run: (batch, seqlen) int64, how many resets there were up to and including each token; two
            tokens exchange information if and only if their runs are equal. The initial state has run 0.
    """
    real = seq_idx >= 0
    position = torch.arange(seq_idx.shape[1], device=seq_idx.device).expand_as(seq_idx)
    last_real = torch.where(real, position, -1).cummax(dim=1).values
    before = torch.nn.functional.pad(last_real[:, :-1], (1, 0), value=-1)
    index_before = seq_idx.gather(1, before.clamp(min=0))
    reset = real & (before >= 0) & (index_before != seq_idx)
    return real, reset.cumsum(dim=1)


def unpack(cu_seqlens: Tensor, seq_idx: Tensor | None, batch: int, seqlen: int) -> tuple[Tensor, Tensor]:
    """Index tensors between one packed row and one padded row per segment.

    Args:
        cu_seqlens: (num_segments + 1,) boundaries, from 0 to seqlen.
        seq_idx: (1, seqlen) or None; padding inside the packed row.
        batch, seqlen: of the packed row.
    Returns:
        source: (num_segments, longest) int64, which packed token stands there; 0 behind a segment's end.
        seq_idx: (num_segments, longest) int64, of the padded rows.
    """
    if batch != 1:
        raise ValueError(f"cu_seqlens packs segments into one row: batch must be 1, got {batch}")
    starts, ends = cu_seqlens[:-1].long(), cu_seqlens[1:].long()
    lengths = ends - starts
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != seqlen or bool((lengths < 0).any()):
        raise ValueError(f"cu_seqlens must rise from 0 to seqlen {seqlen}, got {cu_seqlens.tolist()}")
    offset = torch.arange(int(lengths.max()), device=cu_seqlens.device)
    inside = offset < lengths[:, None]
    source = torch.where(inside, starts[:, None] + offset, 0)
    inner = torch.zeros_like(source) if seq_idx is None else seq_idx[0][source].long()
    return source, torch.where(inside, inner, -1)


def run_packed(
    kernel: Callable[..., tuple[Tensor, Tensor]],
    sequences: list[Tensor | None],
    seq_idx: Tensor | None,
    cu_seqlens: Tensor,
) -> tuple[Tensor, Tensor]:
    """Runs a kernel on the segments of one packed row as the rows of a padded batch.

    Args:
        kernel: (list of sequences (batch, seqlen, ...), seq_idx) -> (y (batch, seqlen, ...), states).
        sequences: tensors (1, seqlen, ...) or None.
        seq_idx: (1, seqlen) or None; padding inside the packed row.
        cu_seqlens: (num_segments + 1,).
    Returns:
        y: (1, seqlen, ...); states: (num_segments, ...).
    """
    batch, seqlen = next(value.shape[:2] for value in sequences if value is not None)
    source, row_seq_idx = unpack(cu_seqlens, seq_idx, batch, seqlen)
    rows = [None if value is None else value[0][source] for value in sequences]
    y, states = kernel(rows, row_seq_idx)
    real = row_seq_idx >= 0
    return y.new_zeros((seqlen, *y.shape[2:])).index_put((source[real],), y[real])[None], states
