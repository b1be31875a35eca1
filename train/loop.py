"""The training loop."""

import math
from dataclasses import dataclass

import torch

from train.batches import BatchSource
from train.collate import Batch
from train.dataset import BadRowError
from train.engine import PlainEngine
from train.metrics import Metrics
from train.objectives import Stats
from train.optim import set_lr
from train.recipes import RunConfig
from train.resume import Checkpoints
from train.stop import StopRequest
from vision_scan.errors import UserError


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
    checkpoints: Checkpoints


def train(loop: Loop, stop: StopRequest, metrics: Metrics | None = None) -> bool:
    """Trains up to the last step.

    Args:
        loop: see there.
        stop: looked at between steps.
        metrics: takes what was measured; None on all processes but the first.
    Returns:
        whether it got there; if not, it was asked to stop, and everything is saved.
    Raises:
        UserError: if a row turns out to be bad (on every process); everything is saved.
        NonFiniteError: before a step with a loss or gradient that is not finite; everything is
            saved.
    """
    engine, config = loop.engine, loop.config
    for step in range(loop.start, loop.num_steps):
        batches, error = _fetch(loop, step)
        weight, num_tokens, num_supervised, num_errors, num_stops = engine.sum(
            [
                sum(batch.weight for batch in batches),
                sum(batch.num_tokens for batch in batches),
                sum(batch.num_supervised for batch in batches),
                error is not None,
                stop.requested,
            ]
        )
        if num_errors or num_stops:
            loop.checkpoints.save(engine, step)
            if num_errors:
                raise error or UserError("a row cannot be used; the process that met it names it")
            return False

        lr = set_lr(engine.optimizer, step, loop.num_steps, config.optim)
        measured: Stats = {}
        for index, batch in enumerate(batches):
            loss, stats = engine.backward(batch, 1 / weight, last=index == len(batches) - 1)
            for name, value in {"loss": torch.stack([loss, loss.new_zeros(())]), **stats}.items():
                measured[name] = measured.get(name, 0) + value.detach()
        grad_norm = engine.clip(config.optim.clip)
        means = _means(engine, measured, weight)
        if not (math.isfinite(means["loss"]) and math.isfinite(grad_norm)):
            loop.checkpoints.save(engine, step)
            raise NonFiniteError(_diagnose(engine, step, means["loss"], grad_norm, batches))
        engine.step()

        if metrics is not None:
            record = {
                "step": step + 1,
                **means,
                "lr": lr,
                "grad_norm": grad_norm,
                "supervised_tokens": int(num_supervised),
            }
            metrics.add(record, num_tokens)
        if (step + 1) % config.train.save_every == 0 or step + 1 == loop.num_steps:
            loop.checkpoints.save(engine, step + 1)
    return True


def _fetch(loop: Loop, step: int) -> tuple[list[Batch], BadRowError | None]:
    try:
        return loop.source(step), None
    except BadRowError as error:
        return [], error


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
    bad = [
        name
        for name, parameter in engine.objective.named_parameters()
        if parameter.grad is not None and not parameter.grad.isfinite().all()
    ]
    where = (
        f"; not finite: the gradients of {', '.join(bad[:3])} ({len(bad)} tensors)" if bad else ""
    )
    rows = ", ".join(name for batch in batches for name in batch.ids[:4])
    return (
        f"step {step + 1}: loss {loss}, gradient norm {grad_norm}{where}; the step was not taken "
        f"and the state before it is saved. Rows: {rows}, ... Try a lower optim.lr or "
        "train.dtype=float32"
    )
