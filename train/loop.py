"""The training loop."""

import math
import time
from collections.abc import Generator
from dataclasses import dataclass

import torch

from train.cost import TrainingCost
from train.data.batches import BatchSource
from train.data.collate import Batch
from train.data.loader import Loaded
from train.data.rows import BadRowError
from train.engine import PlainEngine
from train.metrics import Metrics
from train.objectives import Stats
from train.optim import set_lr
from train.resume import Checkpoints
from train.settings import RunConfig
from train.stop import StopRequest
from train.validation import Validation
from vision_scan.errors import UserError

# Of batches.
COUNTS = ("weight", "num_tokens", "num_supervised", "num_images", "num_rows", "num_padding", "num_truncated")


class NonFiniteError(RuntimeError):
    """The loss or the gradient is not a number; nothing was updated with it."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """What the loop works with."""

    config: RunConfig
    num_steps: int
    start: int
    """Steps done already."""
    engine: PlainEngine
    source: BatchSource
    batches: Generator[Loaded, None, None]
    """Of the steps from `start` on."""
    checkpoints: Checkpoints
    cost: TrainingCost
    validation: Validation | None


def train(loop: Loop, stop: StopRequest, metrics: Metrics | None = None) -> bool:
    """Trains up to the last step.

    Args:
        loop: see there.
        stop: looked at between steps.
        metrics: sees what happens; None on all processes but the first.
    Returns:
        whether it got there; if not, it was asked to stop, and everything is saved.
    Raises:
        UserError: if a row turns out to be bad (on every process); everything is saved.
        NonFiniteError: before a step with a loss or gradient that is not finite; everything is
            saved.
    """
    engine, config, checkpoints = loop.engine, loop.config, loop.checkpoints
    num_skipped = 0
    for step in range(loop.start, loop.num_steps):
        if metrics is not None:
            metrics.begin(step + 1)
        began = time.perf_counter()
        batches, error = _fetch(loop)
        fetched = time.perf_counter() - began
        counts = _count(batches) | {"flops": sum(map(loop.cost.of_batch, batches))}
        counts |= {"errors": error is not None, "stops": stop.requested}
        # Processes that read rows together have all of them the whole rows' counts.
        share = 1 / config.train.sequence_parallel
        counts = dict(zip(counts, engine.sum([share * count for count in counts.values()]), strict=True))
        if counts["errors"] or counts["stops"]:
            checkpoints.save(engine, step, last=True)
            if counts["errors"]:
                raise error or UserError("a row cannot be used; the process that met it names it")
            return False

        lr = set_lr(engine.optimizer, step, loop.num_steps, config.optim)
        means = _means(engine, _accumulate(engine, batches, 1 / counts["weight"]), counts["weight"])
        grad_norm = engine.step(config.optim.clip)  # of a loss that is not finite, no gradient is
        num_skipped = 0 if math.isfinite(grad_norm) else num_skipped + 1
        if num_skipped:
            told = _diagnose(engine, step, means["loss"], grad_norm, batches)
            if num_skipped > config.train.skip_nonfinite:
                checkpoints.save(engine, step, last=True)
                raise NonFiniteError(told)
            engine.discard()

        validated = loop.validation.after(step + 1, engine) if loop.validation is not None else None
        stall = 0.0
        if (step + 1) % config.train.save_every == 0 or step + 1 == loop.num_steps:
            stall = checkpoints.save(engine, step + 1, last=step + 1 == loop.num_steps)
        if metrics is not None:
            record = {"step": step + 1, **means, "lr": lr, "grad_norm": grad_norm}
            metrics.add(record, counts, fetched, stall, validated)
    return True


def _fetch(loop: Loop) -> tuple[list[Batch], BadRowError | None]:
    loaded = next(loop.batches)
    return ([], loaded) if isinstance(loaded, BadRowError) else (loaded, None)


def _count(batches: list[Batch]) -> dict[str, float]:
    """What is summed over the processes."""
    return {
        name: sum(getattr(batch, name) for batch in batches)
        for name in COUNTS
    }


def _accumulate(engine: PlainEngine, batches: list[Batch], scale: float) -> Stats:
    """Adds up the gradients of a step's micro-batches, and what was measured on the way."""
    measured: Stats = {}
    for index, batch in enumerate(batches):
        loss, stats = engine.backward(batch, scale, last=index == len(batches) - 1)
        for name, value in {"loss": torch.stack([loss, loss.new_zeros(())]), **stats}.items():
            measured[name] = measured.get(name, 0) + value.detach()
    return measured


def _means(engine: PlainEngine, measured: Stats, weight: float) -> dict[str, float]:
    """The measured sums over all processes, each divided by what belongs under it."""
    flat = engine.sum([number for pair in measured.values() for number in pair.tolist()])
    pairs = dict(zip(measured, zip(flat[::2], flat[1::2], strict=True), strict=True))
    return {
        "loss": pairs.pop("loss")[0] / weight,
        **{name: value / max(count, 1e-9) for name, (value, count) in pairs.items()},
    }


def _diagnose(
    engine: PlainEngine, step: int, loss: float, grad_norm: float, batches: list[Batch]
) -> str:
    bad = engine.bad_gradients()
    where = (
        f"; not finite: the gradients of {', '.join(bad[:3])} ({len(bad)} tensors)" if bad else ""
    )
    rows = ", ".join(name for batch in batches for name in batch.ids[:4])
    return (
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}{where}; the step was not taken "
        f"and the state before it is saved. Rows: {rows}, ... Go on without such steps by --resume --set "
        "train.skip_nonfinite=3, or begin again with a lower optim.lr or train.dtype=float32"
    )
