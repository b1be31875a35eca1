"""What stands in the patches of an image: for the tower, and for connector and embeddings."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cobra.model import Cobra
from train.data.collate import Batch
from train.data.dataset import Dataset
from train.data.rows import Row
from vision_scan.errors import UserError

from .objective import Objective, Stats


class PatchLabels(Objective):
    """What the objectives on the labels of patches share.

    A patch's target is the label of the box that covers its centre (the last one, if boxes
    overlap), or "none". The losses of patches without a label are weighed down so that, over the
    data, they count as much as those of the patches within boxes.
    """

    needs = "regions"

    def __init__(self, model: Cobra, rows: Dataset, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, rows, autocast)
        image = model.config.image
        if image.resize != "squash":
            raise UserError(
                f"an objective on regions needs image.resize=squash, got {image.resize}: its boxes "
                "are fractions of the whole image"
            )
        if image.tiles is not None:
            raise UserError("an objective on regions looks at one tile of an image: set image.tiles=none")
        self.height, self.width = model.config.grid
        self.classes = region_classes(rows)
        if not self.classes:
            raise UserError(
                f"{rows.path}: an objective on regions needs at least one label, found none in any "
                "row"
            )
        self.background_weight = self._balance(rows)

    def targets(self, row: Row) -> Tensor:
        """The class of each patch for each kind of label, (height, width, kinds), int64, 0 for
        none."""
        targets = torch.zeros(self.height, self.width, len(self.classes), dtype=torch.long)

        def first(edge: float, size: int) -> int:
            """The first of `size` patches whose centre lies at or behind an edge."""
            return max(0, math.ceil(edge * size - 0.5))

        for region in row.regions or ():
            x0, y0, x1, y1 = region.box
            rows = slice(first(y0, self.height), first(y1, self.height))
            columns = slice(first(x0, self.width), first(x1, self.width))
            targets[rows, columns] = torch.tensor([self._class(kind, region.labels.get(kind)) for kind in self.classes])
        return targets

    def _class(self, kind: str, label: str | None) -> int:
        """The number of a label, 0 for none."""
        if label is None:
            return 0
        if label not in self.classes[kind]:  # of held-out rows
            raise UserError(f"label {label!r} of kind {kind!r} stands in no row of data.path")
        return self.classes[kind].index(label)

    def _balance(self, rows: Dataset, num_rows: int = 512) -> float:
        stride = max(1, len(rows) // num_rows)
        targets = torch.stack([self.targets(rows[n]) for n in range(0, len(rows), stride)])
        labelled = int((targets > 0).sum())
        return min(1.0, labelled / max(1, targets.numel() - labelled)) if labelled else 1.0

    def weights(self, targets: Tensor) -> Tensor:
        """How much each target counts, of the shape of `targets`."""
        return torch.where(targets > 0, 1.0, self.background_weight)

    def _sample(self, row: Row) -> tuple[str, Tensor, Tensor]:
        return row.id, self.model.processor.pixels(row.images[0].open()), self.targets(row)

    def num_tokens(self, row: Row) -> int:
        return self.height * self.width

    def collate(self, samples: Sequence[tuple[str, Tensor, Tensor]]) -> Batch:
        ids, pixels, targets = zip(*samples, strict=True)
        targets = torch.stack(targets)
        return Batch(
            inputs={"pixel_values": torch.cat(pixels), "targets": targets},
            weight=float(self.weights(targets).sum()),
            num_tokens=targets[..., 0].numel(),
            num_supervised=targets[..., 0].numel(),
            num_images=len(ids),
            ids=ids,
        )

    def _accuracies(self, right: Tensor, targets: Tensor) -> Stats:
        """Share of labelled patches that are right, for each kind; right (..., kinds)."""
        return {
            f"{kind}_accuracy": torch.stack(
                [(right[..., index] * (targets[..., index] > 0)).sum(), (targets[..., index] > 0).sum()]
            )
            for index, kind in enumerate(self.classes)
        }


class Regions(PatchLabels):
    """What stands in each patch: one linear head for each kind of label on the tower's features."""

    parts = ("vision_encoder",)

    def __init__(self, model: Cobra, rows: Dataset, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, rows, autocast)
        d_vision = model.vision_encoder.d_model
        self.heads = nn.ModuleList(
            nn.Linear(d_vision, len(names)) for names in self.classes.values()
        )
        self.heads.to(model.device)

    def compute(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        features = self.model.vision_encoder(inputs["pixel_values"].to(self.model.device))
        targets, weights = inputs["targets"], self.weights(inputs["targets"])
        loss = features.new_zeros((), dtype=torch.float32)
        right = torch.zeros_like(weights)
        for index, head in enumerate(self.heads):
            logits = head(features).float()
            target = targets[..., index]
            losses = F.cross_entropy(logits.flatten(0, -2), target.flatten(), reduction="none")
            loss = loss + (losses * weights[..., index].flatten()).sum()
            right[..., index] = logits.argmax(-1) == target
        stats = {"patch_accuracy": torch.stack([(right * weights).sum(), weights.sum()])}
        return loss, {**stats, **self._accuracies(right, targets)}


class Naming(PatchLabels):
    """Each image token's label, read off by the embeddings of the label's words.

    Teaches connector and embeddings one language before the language model learns to look things
    up: an image token of a red 7 comes to resemble the words "red" and "7", one of the background
    no word at all (its score, against those of the words, is zero).
    """

    parts = ("vision_encoder", "connector")
    most_zero_stage = 2

    def __init__(self, model: Cobra, rows: Dataset, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, rows, autocast)
        if model.config.tokens_per_tile != self.height * self.width:
            raise UserError(
                "objective naming needs a connector that makes a token of each patch, "
                f"{model.config.connector.kind} makes {model.config.tokens_per_tile} of "
                f"{self.height} x {self.width}"
            )
        for index, names in enumerate(self.classes.values()):
            spelling = self._spelling(names[1:])
            self.register_buffer(f"spelling{index}", spelling.to(model.device), persistent=False)

    def _spelling(self, names: Sequence[str]) -> Tensor:
        """What each name is made of, (2, names, vocab_size): shares of tokens at the start of a
        text, and behind a space, where most tokenizers use other ones."""
        tokenizer, size = self.model.tokenizer, self.model.config.lm.vocab_size
        shares = torch.zeros(2, len(names), size)
        for form, space in enumerate(("", " ")):
            for row, name in enumerate(names):
                ids = torch.tensor(tokenizer.encode(space + name))
                shares[form, row].index_add_(0, ids, torch.full(ids.shape, 1 / len(ids)))
        return shares

    def compute(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        lm, targets, weights = self.model.lm, inputs["targets"], self.weights(inputs["targets"])
        tokens = lm.norm_f(self.model.encode_images(inputs["pixel_values"].to(self.model.device)))
        tokens = tokens.unflatten(1, (self.height, self.width))
        loss = tokens.new_zeros((), dtype=torch.float32)
        right = torch.zeros_like(weights)
        for index in range(len(self.classes)):
            vectors = self.get_buffer(f"spelling{index}") @ lm.embedding.weight  # 2 forms, names, d
            scores = torch.einsum("nyxd,fcd->fnyxc", tokens, vectors).float()
            scores = F.pad(scores, (1, 0))
            target = targets[..., index]
            for form in scores:
                losses = F.cross_entropy(form.flatten(0, -2), target.flatten(), reduction="none")
                loss = loss + (losses * weights[..., index].flatten()).sum() / len(scores)
            right[..., index] = scores.mean(0).argmax(-1) == target
        return loss, self._accuracies(right, targets)


def region_classes(rows: Iterable[Row]) -> dict[str, list[str]]:
    """Every kind of label in the data with its values in sorted order, after "none"."""
    values: dict[str, set[str]] = {}
    for row in rows:
        for region in row.regions or ():
            for kind, value in region.labels.items():
                values.setdefault(kind, set()).add(value)
    return {kind: ["none", *sorted(values[kind] - {"none"})] for kind in sorted(values)}
