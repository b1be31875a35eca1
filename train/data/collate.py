"""Samples to batches."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
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
    num_images: int
    num_padding: int = 0
    """Tokens that only fill up rows."""
    num_truncated: int = 0
    """Rows that lost turns."""
    ids: tuple[str, ...]
    """The rows, for messages."""
    lengths: tuple[int, ...] = ()
    """Tokens that the language model reads of each row, of pairs of each of the two."""
    shared_lengths: tuple[int, ...] = ()
    """Tokens that stand in front of both rows of a pair, and are read once."""

    @property
    def num_rows(self) -> int:
        return len(self.ids)

    def pin_memory(self) -> "Batch":
        """The same in page-locked memory, from where a GPU copies beside its work."""
        pinned = {
            name: value.pin_memory() if isinstance(value, Tensor) else value
            for name, value in self.inputs.items()
        }
        return replace(self, inputs=pinned)


@dataclass(frozen=True)
class Sample:
    """One rendered conversation."""

    id: str
    input_ids: Sequence[int]
    labels: Sequence[int]
    pixel_values: Tensor | None
    """(tiles, 3, height, width) in [0, 1], float32, as `Processor` makes them, or None without images."""
    image_sizes: tuple[tuple[int, int], ...] = ()
    """Height and width of each image before resizing."""
    num_images: int = 0
    is_video: bool = False
    """Whether the images are the frames of one video."""
    is_truncated: bool = False


def pad_right(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of different lengths as one (batch, longest) int64 tensor, filled up on the right."""
    longest = max(len(row) for row in rows)
    return torch.tensor([[*row, *([value] * (longest - len(row)))] for row in rows])


def _num_frames(sample: Sample) -> list[int]:
    """Of each image or video of a row."""
    if sample.is_video and sample.num_images:
        return [sample.num_images]
    return [1] * sample.num_images


def stack_images(samples: Sequence[Sample]) -> dict[str, Tensor | None]:
    """What a model takes of the images of rows, one row behind the other: `pixel_values`, (tiles, 3, height, width),
    or None if no row has an image, `image_sizes`, (images, 2) int64, and `num_frames`, int64, 1 of each image and of
    each video how many of the images are its frames."""
    pixels = [sample.pixel_values for sample in samples if sample.pixel_values is not None]
    sizes = [size for sample in samples for size in sample.image_sizes]
    frames = [count for sample in samples for count in _num_frames(sample)]
    return {
        "pixel_values": torch.cat(pixels) if pixels else None,
        "image_sizes": torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
        "num_frames": torch.tensor(frames, dtype=torch.int64),
    }


def collate_conversations(samples: Sequence[Sample], pad_id: int, packing: bool = False) -> Batch:
    """Rows as one batch, the tiles in the order of the rows.

    Args:
        samples: the rows.
        pad_id: fills up short rows on the right, where a causal model needs no mask.
        packing: put the rows one behind the other instead, without any padding.
    Returns:
        A batch whose inputs are `input_ids` and `labels`, (batch, longest) int64, labels of pads -100, and those of
        `stack_images`; if packed, `input_ids`, `labels` and `seq_idx` (1, all tokens) int64, in which every row is a
        segment. Its weight is the number of labels after the shift: the first token of a row is predicted from nothing.
    """
    # Nothing stands before a row's first token; in a pack the last token of another row does.
    labels = [[IGNORE, *sample.labels[1:]] for sample in samples]
    lengths = [len(sample.input_ids) for sample in samples]
    inputs: dict[str, Any] = stack_images(samples)
    if packing:
        inputs["input_ids"] = torch.tensor([[i for sample in samples for i in sample.input_ids]])
        inputs["labels"] = torch.tensor([[label for row in labels for label in row]])
        inputs["seq_idx"] = torch.repeat_interleave(torch.tensor(lengths))[None]
    else:
        inputs["input_ids"] = pad_right([sample.input_ids for sample in samples], pad_id)
        inputs["labels"] = pad_right(labels, IGNORE)
    num_supervised = int((inputs["labels"] != IGNORE).sum())
    return Batch(
        inputs=inputs,
        weight=float(num_supervised),
        num_tokens=sum(lengths),
        num_supervised=num_supervised,
        num_images=sum(sample.num_images for sample in samples),
        num_padding=inputs["input_ids"].numel() - sum(lengths),
        num_truncated=sum(sample.is_truncated for sample in samples),
        ids=tuple(sample.id for sample in samples),
        lengths=tuple(lengths),
    )
