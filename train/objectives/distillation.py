"""What a student takes from a teacher, in three stages: what its layers weigh, what they say, and what it answers.

Source: Bick et al. 2024, "Transformers to SSMs: Distilling Quadratic Knowledge to Subquadratic Models" (MOHAWK,
arXiv:2408.10189). Two things differ. Its first stage writes out the teacher's and the student's matrices of tokens by
tokens, seqlen^2 numbers a head; here both are multiplied with the same random values, which gives the same distance in
expectation (Hutchinson's estimate) in memory that grows with seqlen. And its distances are relative here, to the size
of what the teacher has, so that no layer outweighs the others.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cobra.lm.mixer import Segments
from cobra.lm.stack import Block
from cobra.model import Cobra, next_labels
from cobra.prompt import IGNORE
from train.data.collate import Batch, Sample
from train.data.dataset import Dataset
from train.settings import DistillSettings, RunConfig
from train.students import replaced_layers
from vision_scan.errors import UserError

from .companion import Companion
from .conversation import Conversation
from .objective import Stats

NUM_PROBES = 64  # random vectors that matrices are compared by, for each row and layer


class Distillation(Conversation):
    """What the stages share: a teacher that reads the same rows."""

    reads_shards = False

    def __init__(self, model: Cobra, rows: Dataset, teacher: Companion, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, rows, autocast)
        self.teacher = teacher
        self.frozen_readers = (teacher.model,)

    def describe(self) -> Iterator[str]:
        yield f"teacher: {self.teacher.describe()}"

    @classmethod
    def build(
        cls, config: RunConfig, model: Cobra, rows: Dataset, autocast: torch.dtype | None, device: torch.device
    ) -> "Distillation":
        path = config.distill.teacher
        if path is None:
            raise UserError(
                f"train.objective={config.train.objective} needs a teacher: set distill.teacher to a model directory"
            )
        companion = Companion(path, model, "distill.teacher", autocast, device)
        return cls(model, rows, companion, autocast, **cls.arguments(config))

    @classmethod
    def arguments(cls, config: RunConfig) -> dict[str, Any]:
        """Further arguments of the objective."""
        return {}

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Says of each token whether it is one; pads are not."""
        batch = super().collate(samples)
        shape = batch.inputs["input_ids"].shape
        if self.packing:
            is_real = torch.ones(shape, dtype=torch.bool)
        else:
            is_real = torch.arange(shape[1]) < torch.tensor(batch.lengths)[:, None]
        return replace(batch, inputs={**batch.inputs, "is_real": is_real})

    def _teach(self, inputs: dict[str, Any]) -> Tensor:
        """What the teacher makes of a batch, see `_read`."""
        with torch.no_grad():
            embeds = _embed(self.teacher.model, inputs)
        # Nothing here has a gradient. Without the mode a CPU would read long rows in pieces, and layers have to be
        # looked at with whole rows.
        with torch.enable_grad():
            return _read(self.teacher.model, inputs, embeds)


class ByLayer(Distillation):
    """Each replaced layer reads what the teacher's layer in its place reads, and is held against it. Nothing but these
    layers learns, each by itself.

    The loss of a row is the mean over the layers of |own - teacher's|^2 / |teacher's|^2, summed over the row's tokens;
    rows count by their tokens.
    """

    parts = ("lm",)

    def __init__(self, model: Cobra, rows: Dataset, teacher: Companion, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, rows, teacher, autocast)
        self.replaced = replaced_layers(model, teacher.model)

    def describe(self) -> Iterator[str]:
        yield from super().describe()
        kinds = ", ".join(f"{index} {self.model.config.lm.layers[index].kind}" for index in self.replaced)
        yield f"layers held against the teacher's: {kinds}"

    def freeze_idle(self) -> None:
        learning = tuple(f"lm.layers.{index}.mixer." for index in self.replaced)
        for name, parameter in self.model.named_parameters():
            if not name.startswith(learning):
                parameter.requires_grad_(False)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """All tokens count."""
        batch = super().collate(samples)
        return replace(batch, weight=float(batch.num_tokens))

    def compute(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        is_real, learns = inputs["is_real"], torch.is_grad_enabled()
        errors: dict[int, Tensor] = {}

        def compare(index: int):
            def look(block: Block, arguments: tuple, result: tuple) -> None:
                with torch.set_grad_enabled(learns):
                    own, given = self.compare(index, block, *arguments[:4], result[0])
                own, given = (value.float().square().sum(-1) * is_real for value in (own - given, given))
                errors[index] = (own.sum(1) / given.sum(1) * is_real.sum(1)).sum()

            return look

        layers = self.teacher.model.lm.layers
        hooks = [layers[index].register_forward_hook(compare(index)) for index in self.replaced]
        try:
            self._teach(inputs)
        finally:
            for hook in hooks:
                hook.remove()
        count = is_real.sum()
        stats = {f"layer{index}_error": torch.stack([error.detach(), count]) for index, error in errors.items()}
        return torch.stack(list(errors.values())).mean(), stats

    def compare(
        self, index: int, teacher: Block, x: Tensor, state: None, segments: Segments, dtype: torch.dtype, y: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What the student's layer has and what the teacher's has, both (batch, seqlen, channels).

        Args:
            index: of the layer.
            teacher: its.
            x, state, segments, dtype: what the teacher's layer was given.
            y: what it made of it.
        """
        raise NotImplementedError


class Mixers(ByLayer):
    """The matrices that layers mix tokens with, head by head."""

    most_zero_stage = 2

    def __init__(self, model: Cobra, rows: Dataset, teacher: Companion, autocast: torch.dtype | None = None) -> None:
        super().__init__(model, rows, teacher, autocast)
        for index in self.replaced:
            for whose, lm in (("student", model.lm), ("teacher", teacher.model.lm)):
                if not hasattr(lm.layers[index].mixer, "mix"):
                    raise UserError(
                        f"distill_mixer: layer {index} of the {whose}, {lm.config.layers[index].kind}, has no matrix "
                        "of tokens by tokens to compare; begin with distill-hidden"
                    )

    def compare(self, index, teacher, x, state, segments, dtype, y) -> tuple[Tensor, Tensor]:
        own = self.model.lm.layers[index]
        values = torch.randn(*x.shape[:2], NUM_PROBES, dtype=dtype, device=x.device)
        with torch.no_grad():
            given = teacher.mixer.mix(teacher.norm(x).to(dtype), values, segments)
        mixed = own.mixer.mix(own.norm(x).to(dtype), values, segments)
        if mixed.shape != given.shape:
            raise UserError(
                f"distill_mixer: the student's layers have {mixed.shape[2]} heads, the teacher's {given.shape[2]}; "
                "matrices can only be compared head by head: begin with distill-hidden"
            )
        return mixed.flatten(2), given.flatten(2)


class HiddenStates(ByLayer):
    """What layers add to the residual stream."""

    def compare(self, index, teacher, x, state, segments, dtype, y) -> tuple[Tensor, Tensor]:
        lm = self.model.lm
        return lm.layers[index](x, state, segments, dtype, lm.shared_by(index))[0] - x, y - x


class Answers(Distillation):
    """The probabilities of the next token of every answer: the divergence KL(wanted || student) from the teacher's, or
    from a mixture of them with what the row says (Hinton et al. 2015, arXiv:1503.02531); and, by `hidden_weight`, the
    states that the head reads, token by token |own - teacher's|^2 / |teacher's|^2, the mean of a row for each of its
    answers' tokens."""

    def __init__(
        self,
        model: Cobra,
        rows: Dataset,
        teacher: Companion,
        autocast: torch.dtype | None = None,
        settings: DistillSettings | None = None,
    ) -> None:
        super().__init__(model, rows, teacher, autocast)
        self.settings = settings or DistillSettings()
        widths = model.config.lm.d_model, teacher.model.config.lm.d_model
        if self.settings.hidden_weight and widths[0] != widths[1]:
            raise UserError(
                f"distill.hidden_weight compares states of one width, and the student has {widths[0]} channels, the "
                f"teacher {widths[1]}: set it to 0"
            )

    @classmethod
    def arguments(cls, config: RunConfig) -> dict[str, Any]:
        return {"settings": config.distill}

    def compute(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        teacher, model, settings = self.teacher.model.lm, self.model, self.settings
        targets = next_labels(inputs["labels"])
        supervised = targets != IGNORE
        taught, hidden = self._teach(inputs), _read(model, inputs, _embed(model, inputs))
        given, places = taught[supervised], targets[supervised]

        def wanted(rows: slice) -> Tensor:
            logs = teacher.logits(given[rows]).log_softmax(-1)
            if not settings.label_share:
                return logs
            logs, own = logs + math.log1p(-settings.label_share), places[rows, None]
            label = logs.new_tensor(math.log(settings.label_share))
            return logs.scatter(1, own, torch.logaddexp(logs.gather(1, own), label))

        loss = model.lm.divergence(hidden[supervised], wanted)
        if not settings.hidden_weight:
            return loss, {}
        is_real, hidden, taught = inputs["is_real"], hidden.float(), taught.float()
        errors = (hidden - taught).square().sum(-1) / taught.square().sum(-1)
        error = ((errors * is_real).sum(1) / is_real.sum(1) * supervised.sum(1)).sum()
        stats = {"hidden_error": torch.stack([error.detach(), supervised.sum()])}
        return loss + settings.hidden_weight * error, stats


def _embed(model: Cobra, inputs: dict[str, Any]) -> Tensor:
    names = "input_ids", "pixel_values", "image_sizes", "num_frames"
    return model.embed(*(inputs.get(name) for name in names))


def _read(model: Cobra, inputs: dict[str, Any], embeds: Tensor) -> Tensor:
    """The normed hidden states of a batch, (batch, seqlen, d_model)."""
    return model.lm.read(inputs_embeds=embeds, seq_idx=inputs.get("seq_idx"))[0]
