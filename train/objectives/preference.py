"""Of two answers the better one, without a model of rewards: direct preference optimisation.

The reward of an answer is how much more likely it is than under a frozen reference, beta * (log p - log p_ref) with
log-probabilities summed over its tokens, its end included; the loss of a row is -log sigmoid of the chosen answer's
reward less the rejected one's.

A row's conversation and its images are read once; both answers go on from the state behind them.

Sources: Rafailov et al. 2023, "Direct Preference Optimization" (arXiv:2305.18290), label_smoothing as in its authors'
note on conservative DPO; ipo: Azar et al. 2023 (arXiv:2310.12036), by mean log-probabilities of a token as its authors
computed; hinge: Zhao et al. 2023, "SLiC-HF" (arXiv:2305.10425); sft: Pang et al. 2024 (arXiv:2404.19733).
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cobra.model import Cobra
from cobra.prompt import IGNORE
from train.data.collate import Batch
from train.data.dataset import Dataset
from train.data.pairs import Pair, PairSample, collate_pairs, render_pair
from train.data.rows import Row
from train.lora import adapted_parts, without_adapters
from train.settings import PARTS, PreferenceSettings, RunConfig
from vision_scan.errors import UserError

from .companion import Companion, check_reads_alike
from .conversation import Conversation
from .objective import Stats

LOSSES: dict[str, Callable[[Tensor, PreferenceSettings], Tensor]] = {
    "sigmoid": lambda margin, settings: (
        -(1 - settings.label_smoothing) * F.logsigmoid(settings.beta * margin)
        - settings.label_smoothing * F.logsigmoid(-settings.beta * margin)
    ),
    "ipo": lambda margin, settings: (margin - 1 / (2 * settings.beta)) ** 2,
    "hinge": lambda margin, settings: F.relu(1 - settings.beta * margin),
}
"""Loss of each row, given by how much its chosen answer's log-ratio exceeds the rejected one's."""


class Preference(Conversation):
    """The chosen answer rather than the rejected one.

    Args:
        model, rows, autocast: see `Objective`.
        settings: of the loss.
        reference: None: the model itself without its adapters.
    """

    needs = "chosen"
    reads_shards = False

    def __init__(
        self,
        model: Cobra,
        rows: Dataset,
        autocast: torch.dtype | None,
        settings: PreferenceSettings,
        reference: Companion | None,
    ) -> None:
        super().__init__(model, rows, autocast)
        for name, is_set in (
            ("data.packing", self.packing),
            ("data.captions", self.captions),
            ("model.connector.nested", getattr(model.config.connector, "nested", False)),
        ):
            if is_set:
                raise UserError(f"train.objective=preference reads padded conversations, whole: set {name}=false")
        self.settings = settings
        self.reference = reference
        self.frozen_readers = (model if reference is None else reference.model,)

    @classmethod
    def build(
        cls, config: RunConfig, model: Cobra, rows: Dataset, autocast: torch.dtype | None, device: torch.device
    ) -> "Preference":
        path, setting = _reference_path(config)
        check_reads_alike(model, path, setting)
        reference = None
        if config.preference.reference is not None or not _is_its_own_reference(config):
            reference = Companion(path, model, setting, autocast, device)
        return cls(model, rows, autocast, config.preference, reference)

    def describe(self) -> Iterator[str]:
        if self.reference is None:
            yield "reference: the model without its adapters"
        else:
            yield f"reference: {self.reference.describe()}"

    def _sample(self, row: Row) -> Any:
        pair = self.render_pair(row)
        return PairSample(self._with_images(row, len(row.images), pair.prompt, ()), pair.answers)

    def render_pair(self, row: Row) -> Pair:
        """The ids of a row. Of an answer nothing can be left out, nor of what it answers to.

        Raises:
            UserError: if a row is longer than `data.max_tokens`.
        """
        pair = render_pair(row, self.model.processor)
        longest = max(pair.lengths)
        if self.max_tokens is not None and longest > self.max_tokens:
            raise UserError(
                f"it has {longest} tokens with the longer answer, data.max_tokens is {self.max_tokens}, and neither "
                "answers nor questions are cut; raise it, or set data.skip_bad=true to leave such rows out"
            )
        return pair

    def num_tokens(self, row: Row) -> int:
        return self.render_pair(row).num_tokens

    def measure(self, row: Row) -> tuple[int, int]:
        pair = render_pair(row, self.model.processor)
        return pair.num_tokens, sum(map(len, pair.answers))

    def collate(self, samples: Sequence[Any]) -> Batch:
        return collate_pairs(samples, self.model.tokenizer.pad_id)

    def compute(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        settings = self.settings
        log_probs = answer_log_probs(self.model, inputs)
        with torch.no_grad():
            if self.reference is not None:
                expected = answer_log_probs(self.reference.model, inputs)
            else:
                with without_adapters(self.model):
                    expected = answer_log_probs(self.model, inputs)
        lengths = (inputs["labels"] != IGNORE).sum(1).view(2, -1)
        ratios = log_probs - expected
        chosen, rejected = ratios / lengths if settings.loss == "ipo" else ratios
        losses = LOSSES[settings.loss](chosen - rejected, settings)
        if settings.sft:
            losses = losses - settings.sft * log_probs[0] / lengths[0]
        return losses.sum(), self._stats(ratios.detach(), log_probs.detach())

    def _stats(self, ratios: Tensor, log_probs: Tensor) -> Stats:
        """Means over rows; ratios and log_probs (2, batch), of the chosen and the rejected answers."""
        chosen, rejected = self.settings.beta * ratios
        values = {
            "reward_accuracy": (chosen > rejected).float(),
            "reward_margin": chosen - rejected,
            "reward_chosen": chosen,
            "reward_rejected": rejected,
            "log_prob_chosen": log_probs[0],
            "log_prob_rejected": log_probs[1],
        }
        return {name: torch.stack([value.sum(), value.new_tensor(len(value))]) for name, value in values.items()}


def answer_log_probs(model: Cobra, inputs: dict[str, Any]) -> Tensor:
    """Log-probabilities of answers, summed over their tokens.

    Args:
        model: reads.
        inputs: of `collate_pairs`.
    Returns:
        (2, batch), float32 or wider, those of the chosen and of the rejected answers.
    """
    mask, labels = inputs["attention_mask"], inputs["labels"]
    images = [inputs[name] for name in ("pixel_values", "image_sizes", "num_frames")]
    embeds = model.embed(inputs["input_ids"], *images)
    prompts, state = model.lm.read(inputs_embeds=embeds, attention_mask=mask)
    rows = torch.arange(len(labels), device=labels.device) % len(mask)
    last = prompts[rows, mask.sum(1)[rows] - 1]
    # Behind the end of an answer any id will do: what is read there counts nowhere.
    answers, _ = model.lm.read(labels[:, :-1].clamp(min=0), state=state.select(rows))
    is_answer = labels != IGNORE
    losses = model.lm.losses(torch.cat([last[:, None], answers], 1)[is_answer], labels[is_answer])
    sums = losses.new_zeros(labels.shape).masked_scatter(is_answer, losses).sum(1)
    return -sums.view(2, -1)


def _reference_path(config: RunConfig) -> tuple[str, str]:
    """The directory of the reference, and the setting that names it.

    Raises:
        UserError: if there is none, or it is not the model that the run begins with.
    """
    init = config.init
    if config.preference.reference is not None:
        return config.preference.reference, "preference.reference"
    if init.path is None:
        raise UserError(
            "train.objective=preference needs a model that it begins with and is held against: give --init-from DIR, "
            "or preference.reference"
        )
    if {*init.parts} != {*PARTS} or init.fresh or init.towers:
        raise UserError(
            "init.parts, init.fresh or init.towers make the run begin with another model than init.path has: leave "
            "them as they are by default, or give the reference by preference.reference"
        )
    return init.path, "init.path"


def _is_its_own_reference(config: RunConfig) -> bool:
    """Whether the model without its adapters is the one that the run began with: all that learns is adapters, which
    began with adding nothing."""
    learns = [part for part in PARTS if part not in config.train.freeze]
    return config.lora.init == "default" and set(learns) <= set(adapted_parts(config))
