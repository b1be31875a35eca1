"""Held-out rows: their loss, and answers to the first questions of a few, while a run goes on."""

import contextlib
import logging
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from cobra.prompt import count_marks
from train import processes
from train.data.batches import BatchSource
from train.data.collate import Batch
from train.data.dataset import Dataset, choose_rows, open_dataset
from train.data.loader import load_steps
from train.data.rows import BadRowError
from train.engine import PlainEngine
from train.objectives import Conversation, Objective
from train.resume import get_random_state, set_random_state
from train.settings import RunConfig, ValSettings
from vision_scan.errors import UserError

MAX_NEW_TOKENS = 64  # of a sample's answer

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Validated:
    """What a validation found.

    Attributes:
        means: `val_loss`, and `val_` before the names of the objective's other stats.
        samples: `step`, `id`, `question`, `answer`, `reference` each, on the first process.
        seconds: that it took.
    """

    means: dict[str, float]
    samples: list[dict[str, Any]]
    seconds: float


class HeldOutBatches:
    """The batches of one process, by number; rows of similar length are together, and each is in one batch of one
    process.

    All processes have equally many, since under ZeRO they call the model together: where rows run out, a batch is there
    to be run only, and its weight is 0.

    Args:
        objective: renders and collates the rows.
        rows: all of them.
        numbers: those that are taken.
        batch_size: rows of a batch.
        rank, world_size: this process, and how many there are.
    """

    def __init__(
        self, objective: Objective, rows: Dataset, numbers: list[int], batch_size: int, rank: int, world_size: int
    ) -> None:
        self.objective = objective
        self.rows = rows
        self.numbers = sorted(numbers, key=lambda number: rows.lengths[number])
        self.rank, self.world_size = rank, world_size
        self._piece = batch_size * world_size

    def __len__(self) -> int:
        return -(-len(self.numbers) // self._piece)

    def __call__(self, index: int) -> list[Batch]:
        numbers = self.numbers[index * self._piece : (index + 1) * self._piece]
        samples = [sample for number in numbers[self.rank :: self.world_size] for sample in self._sample(number)]
        if samples:
            return [self.objective.collate(samples)]
        spare = next((sample for number in self.numbers for sample in self._sample(number)), None)
        if spare is None:
            raise BadRowError(f"no row of {self.rows.path} can be used any more")
        return [replace(self.objective.collate([spare]), weight=0.0)]

    def _sample(self, number: int) -> list[Any]:
        """A row as a list of one; of none if it turns out to be bad, which is no reason to end a run."""
        try:
            return [self.objective.sample(self.rows[number])]
        except BadRowError as error:
            log.warning("not validated on: %s", error)
            return []


class Validation:
    """The held-out rows of a run; see `ValSettings`.

    Args:
        settings: which rows, and when.
        rows: all of them.
        objective: of the run.
        training: of the run; its batch size and processes are taken.
        num_steps: of the run.
        workers: processes that make batches ahead.
    """

    def __init__(
        self,
        settings: ValSettings,
        rows: Dataset,
        objective: Objective,
        training: BatchSource,
        num_steps: int,
        workers: int,
    ) -> None:
        self.rows = rows
        count = len(rows) if settings.rows is None else min(settings.rows, len(rows))
        numbers = choose_rows(f"random:{count}", len(rows), "val.rows").tolist()
        share = training.micro_batch_size, training.rank, training.world_size
        self.batches = HeldOutBatches(objective, rows, numbers, *share)
        self._every, self._num_steps, self._workers = settings.every, num_steps, workers
        self._asked = numbers[: settings.samples]

    def describe(self) -> str:
        """A line of the plan."""
        of = f"{len(self.batches.numbers):,} of {len(self.rows):,} rows"
        asked = f", {len(self._asked)} of them answered" if self._asked else ""
        return f"validation: {self.rows.path}, {of} every {self._every:,} steps{asked}"

    def after(self, step: int, engine: PlainEngine) -> Validated | None:
        """Validates if it is time to after `step` steps; changes nothing of the training, no random state either.

        Raises:
            UserError: if no row can be used any more, on the process that met it.
        """
        if step % self._every and step != self._num_steps:
            return None
        began = time.perf_counter()
        with evaluating(engine.objective):
            means = self._measure(engine)
            samples = self._answer(step, engine) if engine.rank == 0 else []
        return Validated(means, samples, time.perf_counter() - began)

    def _measure(self, engine: PlainEngine) -> dict[str, float]:
        """Means over all rows of all processes: sums divided by sums."""
        sums: dict[str, torch.Tensor] = {}
        pin = engine.device.type == "cuda"
        share = self.batches.world_size / engine.world_size  # of processes that read rows together each counts a part
        steps = load_steps(self.batches, 0, len(self.batches), self._workers, pin_memory=pin)
        with contextlib.closing(steps):
            for loaded in steps:
                if isinstance(loaded, BadRowError):
                    raise loaded
                (batch,) = loaded
                loss, stats = engine.evaluate(batch)
                pairs = {"loss": torch.stack([loss, loss.new_tensor(share * batch.weight)]), **stats}
                for name, pair in pairs.items():
                    sums[name] = sums.get(name, 0) + pair.double() * (batch.weight > 0)
        flat = engine.sum([number for pair in sums.values() for number in pair.tolist()])
        means = zip(sums, flat[::2], flat[1::2], strict=True)
        return {f"val_{name}": value / max(count, 1e-9) for name, value, count in means}

    def _answer(self, step: int, engine: PlainEngine) -> list[dict[str, Any]]:
        """The first question of each row that is asked, answered greedily, and what the row says."""
        samples = []
        for number in self._asked:
            row = self.rows[number]
            question, reference = row.texts[:2]  # what stands behind the first question, chosen or not
            images = row.images[: count_marks(question)]
            try:
                opened = [image.open() for image in images]
                answer = engine.objective.model.answer(question, opened, max_new_tokens=MAX_NEW_TOKENS)
            except UserError as error:
                log.warning("not answered: row %s: %s", row.id, error)
                continue
            name = {"step": step, "id": row.id.strip("'"), "question": question}
            samples.append({**name, "answer": answer, "reference": reference})
        return samples


@contextlib.contextmanager
def evaluating(objective: Objective) -> Iterator[None]:
    """Evaluation mode, and afterwards every module's mode and all random states as they were."""
    modes = {module: module.training for module in objective.modules()}
    states = get_random_state()
    objective.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        set_random_state(states)


def open_validation(
    config: RunConfig, objective: Objective, training: BatchSource, num_steps: int, workers: int
) -> Validation | None:
    """The held-out rows that `val.path` names, None if it names none.

    Raises:
        UserError: on rows that cannot be used, and on samples that cannot be answered.
    """
    _check_samples(config, objective)
    if config.val.path is None:
        return None
    settings = replace(config.data, path=config.val.path, image_root=config.val.image_root)
    rows = open_dataset(settings, objective.needs, training.rank, training.world_size, processes.gather)
    return Validation(config.val, rows, objective, training, num_steps, workers)


def _check_samples(config: RunConfig, objective: Objective) -> None:
    samples = config.val.samples
    if samples and config.val.path is None:
        raise UserError(f"val.samples={samples} needs held-out rows: set val.path")
    if samples and not isinstance(objective, Conversation):
        raise UserError(
            f"val.samples={samples} needs train.objective=conversation, got {config.train.objective}; set it to 0"
        )
    if samples and config.zero.stage == 3:
        raise UserError(
            f"val.samples={samples} needs zero.stage=0, 1 or 2, got 3, under which no process has all weights; "
            "set it to 0, the validation loss works at every stage"
        )
