"""What steps and rows take, in floating point operations by the formulas of cobra/cost.py."""

import functools
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from torch import Tensor

from cobra.cost import LMCost, Work, tile_work
from cobra.model import Cobra
from cobra.tiles import Layout
from cobra.tokenizer import IMAGE
from train.data.collate import Batch
from train.data.dataset import Dataset
from train.objectives import Objective
from train.settings import PARTS, Part
from vision_scan.errors import UserError

NUM_SAMPLED = 256  # rows whose text is rendered to learn how many tokens a character makes


class TrainingCost:
    """Operations of forward and backward passes under an objective, and of the forward passes of its frozen readers.

    A frozen part counts its forward pass and, if something in front of it learns, the gradients of its activations; of
    a part that learns in places, as under LoRA, the share of its parameters. Padding and what is computed again do not
    count. To be made before an engine takes the parameters apart.
    """

    def __init__(self, objective: Objective) -> None:
        self._learner = _ModelCost(objective.model, objective.parts)
        self._readers = [_ModelCost(model, PARTS, learns=False) for model in objective.frozen_readers]

    def count_tiles(self, layouts: Sequence[Layout]) -> float:
        """How many tiles of `image.height` x `image.width` pixels take as many operations as those of images."""
        return self._learner.count_tiles(layouts)

    def of_batch(self, batch: Batch) -> float:
        """Operations of a step's pass over a micro-batch, logits of supervised tokens only."""
        pixels = batch.inputs.get("pixel_values")
        sizes, num_frames = (batch.inputs.get(name) for name in ("image_sizes", "num_frames"))
        layouts = [] if pixels is None else self._learner.model.layouts(pixels, sizes, num_frames)
        return self.of(self.count_tiles(layouts), batch.lengths, batch.num_supervised, batch.shared_lengths)

    def of(
        self, num_tiles: float, lengths: Sequence[int], num_supervised: int, shared_lengths: Sequence[int] = ()
    ) -> float:
        """Of so many tiles, see `count_tiles`, and rows of so many tokens, of which those that two rows share are
        read once."""
        models = [self._learner, *self._readers]
        return sum(model.of(num_tiles, lengths, num_supervised, shared_lengths) for model in models)


class _ModelCost:
    """Operations of one model, see `TrainingCost`."""

    def __init__(self, model: Cobra, parts: Sequence[Part], learns: bool = True) -> None:
        self.model, self._parts = model, parts
        self._lm = LMCost(model.config.lm) if "lm" in parts else None
        self._learning = {part: learns * _share(getattr(model, part).parameters()) for part in PARTS}
        self._is_behind = any(self._learning[part] > 0 for part in ("vision_encoder", "connector"))
        self._of_grid = functools.cache(self._of_tile)
        self._tile = self._of_grid(model.config.grid)

    def _of_tile(self, grid: tuple[int, int]) -> float:
        """Operations of a tile of so many rows and columns of cells."""
        total, is_behind = 0.0, False
        own = None if grid == self.model.config.grid else grid
        for part, work in tile_work(self.model, own).items():
            if part in self._parts:
                total += work.training_flops(self._learning[part], is_behind)
            is_behind |= self._learning[part] > 0
        return total

    def count_tiles(self, layouts: Sequence[Layout]) -> float:
        config = self.model.config
        grids = Counter(grid for layout in layouts for grid in layout.grids(config.grid))
        same = grids.pop(config.grid, 0)
        return same + sum(count * self._of_grid(grid) for grid, count in grids.items()) / (self._tile or 1)

    def of(
        self, num_tiles: float, lengths: Sequence[int], num_supervised: int, shared_lengths: Sequence[int]
    ) -> float:
        total = num_tiles * self._tile
        if self._lm is not None:
            read = sum((self._lm.work(length, 0) for length in lengths), self._lm.work(0, num_supervised))
            shared = sum((self._lm.work(length, 0) for length in shared_lengths), Work())
            learning = self._learning["lm"], self._is_behind and num_tiles > 0
            total += read.training_flops(*learning) - shared.training_flops(*learning)
        return total


class RowCost:
    """Operations of a row by its number, for sharing rows out evenly: of its tiles, and of as many tokens as its
    characters and images make on average.

    The average is taken over `NUM_SAMPLED` rows at even distances, so it is the same on every process.

    Args:
        cost: of the objective.
        objective: renders rows.
        rows: all of them.
    """

    def __init__(self, cost: TrainingCost, objective: Objective, rows: Dataset) -> None:
        self._cost = cost
        self._rows = rows
        self._most_tokens = rows.settings.max_tokens
        num_characters = num_tokens = num_supervised = num_images = 0
        processor, layouts = objective.model.processor, list[Layout]()
        for number in np.linspace(0, len(rows) - 1, min(len(rows), NUM_SAMPLED)).astype(int):
            try:
                row = rows[number]
                found = processor.layouts(len(row.images), row.read_sizes(), row.is_video)
                length, learned = objective.measure(row)
            except UserError:  # it is for the step that reads the row to leave it out, or to end the run
                continue
            num_characters += _text_size(row.num_characters, len(row.images))
            num_tokens += length - sum(layout.num_tokens for layout in found)
            layouts += found
            num_images += len(row.images)
            num_supervised += learned
        layouts, num_images = layouts or [processor.config.largest_layout], num_images or 1
        self._tokens_per_image = sum(layout.num_tokens for layout in layouts) / num_images
        self._tiles_per_image = cost.count_tiles(layouts) / num_images
        self.tokens_per_character = num_tokens / max(1, num_characters)
        self._supervised_per_character = num_supervised / max(1, num_characters)

    def __call__(self, number: int) -> float:
        return self.row_cost(int(self._rows.num_characters[number]), int(self._rows.num_images[number]))

    def row_cost(self, num_characters: int, num_images: int) -> float:
        """Operations of a row with so much text and so many images, of the mean of tiles."""
        size = _text_size(num_characters, num_images)
        length = round(size * self.tokens_per_character) + round(num_images * self._tokens_per_image)
        length = min(length, self._most_tokens or length)
        num_supervised = min(length, round(size * self._supervised_per_character))
        return self._cost.of(num_images * self._tiles_per_image, [length], num_supervised)


def _text_size(num_characters: int, num_images: int) -> int:
    """Characters without the marks of images."""
    return max(0, num_characters - len(IMAGE) * num_images)


def _share(parameters: Iterable[Tensor]) -> float:
    """The share of parameters that learn, 0 to 1."""
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in parameters]
    return sum(count for count, learns in counts if learns) / max(1, sum(count for count, _ in counts))
