"""Samples to batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cobra.prompt import IGNORE


@dataclass(frozen=True, kw_only=True)
class Batch:
    """What one forward pass of an objective needs, with the numbers that the loop needs
    beforehand."""

    inputs: dict[str, Any]
    """Tensors for the objective."""
    weight: float
    """What the sum of the losses is to be divided by: for conversations, the supervised tokens."""
    num_tokens: int
    """Real tokens (or patches) read."""
    num_supervised: int
    """Tokens (or patches) that the loss looks at."""
    ids: tuple[str, ...]
    """The rows, for messages."""


@dataclass(frozen=True)
class Sample:
    """One rendered conversation."""

    id: str
    input_ids: Sequence[int]
    labels: Sequence[int]
    pixel_values: Tensor | None
    """(tiles, 3, height, width) in [0, 1], float32, or None without images."""


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one (batch, longest) int64 tensor, filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *([value] * (longest - len(row)))] for row in rows])


def collate_conversations(samples: Sequence[Sample], pad_id: int) -> Batch:
    """Pads on the right, where a causal model needs no mask, and stacks the tiles in the order of
    the rows.

    Returns:
        A batch whose inputs are `input_ids` and `labels`, (batch, longest) int64, labels of pads
        -100, and `pixel_values`, (tiles, 3, height, width), or None if no row has an image. Its
        weight is the number of labels after the shift: the first token of a row is predicted from
        nothing.
    """
    labels = pad_right([sample.labels for sample in samples], IGNORE)
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    num_supervised = int((labels[:, 1:] != IGNORE).sum())
    return Batch(
        inputs={
            "input_ids": pad_right([sample.input_ids for sample in samples], pad_id),
            "labels": labels,
            "pixel_values": torch.cat(pixels) if pixels else None,
        },
        weight=float(num_supervised),
        num_tokens=sum(len(sample.input_ids) for sample in samples),
        num_supervised=num_supervised,
        ids=tuple(sample.id for sample in samples),
    )
