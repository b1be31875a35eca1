"""The head of a language model, and its loss without ever holding all logits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .precision import Projection, product_dtype
from .recompute import recompute

PIECE_ELEMENTS = 1 << 24  # logits that exist at once in the loss

Teacher = Callable[[slice], Tensor]
"""Which rows -> logits (rows, vocab_size) of another model."""


class LMHead(Projection):
    """Hidden states to logits, or, with targets, to their loss."""

    def forward(self, x: Tensor, targets: "Tensor | Teacher | None" = None, each: bool = False) -> Tensor:
        """x (..., d_model) -> logits (..., vocab_size).

        With targets (...), int64: the sum of their cross entropies, a scalar; with another model's logits, which are
        asked for by rows of x (rows, d_model): the sum of the divergences KL(other || own). The logits, the largest
        array of a training step by far, exist in pieces of PIECE_ELEMENTS, and the gradients are worked out beside
        them.

        With `each`: the cross entropies one by one, (...). How much each of them counts is known in the backward pass
        only, where the logits of a piece are computed again.
        """
        if targets is None:
            return super().forward(x)
        if each:
            rows = max(1, PIECE_ELEMENTS // len(self.weight))
            pieces = zip(x.flatten(0, -2).split(rows), targets.flatten().split(rows), strict=True)
            return torch.cat([recompute(self._cross_entropies, *piece) for piece in pieces]).view(targets.shape)
        targets = targets.flatten() if isinstance(targets, Tensor) else targets
        return _CrossEntropy.apply(x.flatten(0, -2), self.weight, targets, product_dtype(x), torch.is_grad_enabled())

    def _cross_entropies(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = super().forward(x)
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return nn.functional.cross_entropy(wide, targets, reduction="none")


class _CrossEntropy(torch.autograd.Function):
    """The gradients of the sum are made in the forward pass, while a piece's logits are there, and only
    scaled in the backward pass: nothing is computed twice."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor | Teacher, dtype: torch.dtype, records: bool
    ) -> Tensor:
        needs_hidden, needs_weight = (need and records for need in ctx.needs_input_grad[:2])
        with torch.autocast(hidden.device.type, enabled=False):
            rows = max(1, min(len(hidden), PIECE_ELEMENTS // len(weight)))
            matrix = weight.to(dtype)
            wide = torch.promote_types(dtype, torch.float32)
            logits = matrix.new_empty(rows, len(matrix))
            total = matrix.new_zeros((), dtype=wide)
            dhidden = torch.empty_like(hidden) if needs_hidden else None
            dweight = torch.zeros_like(matrix, dtype=wide) if needs_weight else None
            for start in range(0, len(hidden), rows):
                x = hidden[start : start + rows].to(dtype)
                piece = torch.mm(x, matrix.t(), out=logits[: len(x)]).to(wide)
                wanted = _wanted(targets, slice(start, start + len(x)), wide)
                total -= wanted.mean_of(piece)
                peak = piece.amax(1, keepdim=True)
                exponentials = piece.sub_(peak).exp_()
                sums = exponentials.sum(1, keepdim=True)
                total += (sums.log() + peak).sum()
                if not (needs_hidden or needs_weight):
                    continue
                gradient = wanted.subtract_from(exponentials.div_(sums)).to(dtype)
                if dhidden is not None:
                    dhidden[start : start + rows] = gradient @ matrix
                if dweight is not None and wide == dtype:
                    dweight.addmm_(gradient.t(), x)
                elif dweight is not None:
                    dweight += gradient.t() @ x
        ctx.weight_dtype = weight.dtype
        ctx.save_for_backward(dhidden, dweight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dhidden, dweight = ctx.saved_tensors
        # In place: the weight's is as large as the weight. Autograd refuses a second pass by itself.
        dhidden = None if dhidden is None else dhidden.mul_(grad)
        dweight = None if dweight is None else dweight.mul_(grad).to(ctx.weight_dtype)
        return dhidden, dweight, None, None, None


class _Tokens:
    """What is wanted of a piece: one token a row, of places (rows, 1)."""

    def __init__(self, places: Tensor) -> None:
        self._places = places

    def mean_of(self, logits: Tensor) -> Tensor:
        """The sum over the rows of the logit that is wanted."""
        return logits.gather(1, self._places).sum()

    def subtract_from(self, shares: Tensor) -> Tensor:
        """In place, the gradient of the loss for the logits."""
        return shares.scatter_add_(1, self._places, -shares.new_ones(self._places.shape))


class _Shares:
    """What is wanted of a piece: all tokens of a row by their shares (rows, vocab_size)."""

    def __init__(self, logits: Tensor) -> None:
        self._log = logits.log_softmax(1)
        self._shares = self._log.exp()

    def mean_of(self, logits: Tensor) -> Tensor:
        """The same for shares, their own entropy taken off, so that equal ones diverge by 0."""
        return (self._shares * (logits - self._log)).sum()

    def subtract_from(self, shares: Tensor) -> Tensor:
        return shares.sub_(self._shares)


def _wanted(targets: Tensor | Teacher, rows: slice, dtype: torch.dtype) -> _Tokens | _Shares:
    return _Tokens(targets[rows, None]) if isinstance(targets, Tensor) else _Shares(targets(rows).to(dtype))
