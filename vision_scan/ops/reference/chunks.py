"""What chunked forms share: a sequence cut into chunks, and how far decays reach within one and across its ends.

Letters: b batch, c chunk, q in-chunk, g group, h head.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Chunks(NamedTuple):
    """How a sequence is cut: `num_chunks` pieces of `chunk_size`, with `spare` empty places behind its end."""

    num_chunks: int
    chunk_size: int
    spare: int

    @staticmethod
    def of(seqlen: int, most: int) -> "Chunks":
        """Pieces of at most `most` tokens, as even as can be: little is padded."""
        num_chunks = -(-seqlen // min(most, seqlen))
        chunk_size = -(-seqlen // num_chunks)
        return Chunks(num_chunks, chunk_size, num_chunks * chunk_size - seqlen)

    def cut(self, t: Tensor) -> Tensor:
        """(batch, seqlen, h or g, ...) -> (b, c, h or g, q, ...), zeros behind the end."""
        t = torch.nn.functional.pad(t, (0, 0) * (t.dim() - 2) + (0, self.spare)) if self.spare else t
        return t.reshape(len(t), self.num_chunks, self.chunk_size, *t.shape[2:]).movedim(2, 3)

    def decays(self, log_decay: Tensor, run: Tensor | None, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """What is left of one token at another.

        Args:
            log_decay: (b, c, h, q), at most 0.
            run: (batch, seqlen) or None: tokens of different runs do not see each other.
        Returns:
            inside: (b, c, h, q, q), of token j at token i of its chunk, 0 for j > i;
            from_entry, to_end: (b, c, h, q), of what enters the chunk at token i, and of token i at the end.
        """
        # Differences of running sums are taken in float64: in float32 they would cost up to four digits.
        total = log_decay.double().cumsum(dim=-1)
        causal = torch.ones(self.chunk_size, self.chunk_size, dtype=torch.bool, device=total.device).tril()
        to_end = (total[..., -1:] - total).exp().to(dtype)
        from_entry = total.exp().to(dtype)
        if run is not None:
            # Padding behind the end continues the last run, so that it does not cut the final state off.
            runs = torch.cat([run, run[:, -1:].expand(-1, self.spare)], dim=1)
            runs = runs.view(-1, self.num_chunks, self.chunk_size)
            entry_run = torch.cat([runs.new_zeros(len(runs), 1), runs[:, :-1, -1]], dim=1)
            causal = causal & (runs[..., :, None] == runs[..., None, :])[:, :, None]
            to_end = to_end * (runs == runs[..., -1:])[:, :, None]
            from_entry = from_entry * (runs == entry_run[..., None])[:, :, None]
        exponent = (total[..., :, None] - total[..., None, :]).to(dtype)
        inside = exponent.masked_fill_(~causal, -torch.inf).exp_()
        return inside, from_entry, to_end


def per_head(t: Tensor, weight: Tensor) -> Tensor:
    """(b, c, g, ...) times a weight of each head, (b, c, h, ...); the heads of a group follow one another."""
    heads = weight.unflatten(2, (t.shape[2], -1))
    return (t[:, :, :, None] * heads).flatten(2, 3)
