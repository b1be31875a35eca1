"""The next token of every answer."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from cobra.model import Cobra
from cobra.prompt import IGNORE, Rendered, count_marks
from train.data.collate import Batch, Sample, collate_conversations
from train.data.dataset import Dataset
from train.data.rows import Row
from vision_scan.errors import UserError

from .objective import Objective, Stats


class Conversation(Objective):
    """The next token of every answer: `model.loss`."""

    needs = "conversations"
    reads_shards = True
    """Whether several processes can read each row together."""

    def __init__(self, model: Cobra, rows: Dataset, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, rows, autocast)
        self.group: dist.ProcessGroup | None = None
        """Processes that read each row together."""
        self.max_tokens = rows.settings.max_tokens
        self.packing = rows.settings.packing
        self.captions = rows.settings.captions

    def _sample(self, row: Row) -> Sample:
        rendered = self.render(row)
        is_truncated = rendered.num_turns < len(row.turns)
        return self._with_images(row, rendered.num_images, rendered.input_ids, rendered.labels, is_truncated)

    def _with_images(
        self, row: Row, num_images: int, input_ids: Sequence[int], labels: Sequence[int], is_truncated: bool = False
    ) -> Sample:
        """The ids of a row, and the tiles of its first images."""
        tiles = [self.model.processor.tiles(image.open()) for image in row.images[:num_images]]
        return Sample(
            id=row.id,
            input_ids=input_ids,
            labels=labels,
            pixel_values=torch.cat([tile.pixel_values for tile in tiles]) if tiles else None,
            image_sizes=tuple(size for tile in tiles for size in tile.sizes),
            num_images=num_images,
            is_video=row.is_video,
            is_truncated=is_truncated,
        )

    def render(self, row: Row) -> Rendered:
        """The conversation, or as many of its first exchanges as fit into `data.max_tokens`: never half a turn or
        half an image.

        Raises:
            UserError: if not even the first exchange fits.
        """
        turns = row.turns
        while True:
            num_images = sum(count_marks(turn.text) for turn in turns if turn.role == "user")
            rendered = self.model.processor.render(
                turns, num_images, self.captions, row.read_sizes(), row.is_video
            )
            if self.max_tokens is None or len(rendered.input_ids) <= self.max_tokens:
                return rendered
            if len(turns) <= 2:
                raise UserError(
                    f"its first exchange has {len(rendered.input_ids)} tokens, data.max_tokens is "
                    f"{self.max_tokens}; raise it, or set data.skip_bad=true to leave such rows out"
                )
            turns = turns[: (len(turns) - 1) // 2 * 2]

    def num_tokens(self, row: Row) -> int:
        return len(self.render(row).input_ids)

    def measure(self, row: Row) -> tuple[int, int]:
        rendered = self.model.processor.render(
            row.turns, len(row.images), self.captions, row.read_sizes(), row.is_video
        )
        return len(rendered.input_ids), sum(label != IGNORE for label in rendered.labels)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        return collate_conversations(samples, self.model.tokenizer.pad_id, self.packing)

    def compute(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        loss, _ = self.model.loss(inputs, self.group)
        return loss, {}
