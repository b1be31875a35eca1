"""Records of a run: always `metrics.jsonl`, a progress bar or lines, and Weights & Biases when asked."""

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from cobra.progress import on_terminal
from cobra.typed_config import to_dict
from train.hardware import peak_flops, peak_memory
from train.profiling import StepProfiler
from train.progress import ProgressBar, ProgressLines
from train.run_directory import write_atomic
from train.settings import RunConfig
from train.ssm_statistics import SSMStatistics
from train.validation import Validated

METRICS, SAMPLES, WANDB_ID = "metrics.jsonl", "samples.jsonl", "wandb_id.txt"

# What the keys of a record are called at Weights & Biases; see docs/train.md. Accuracies that an objective adds go
# under `train/`, those of held-out rows (`val_...`) under `val/`.
WANDB_NAMES = {
    "loss": "train/loss",
    "lr": "train/lr",
    "grad_norm": "train/grad_norm",
    "val_loss": "val/loss",
    "tokens_per_s": "perf/tokens_per_s",
    "step_ms": "perf/step_ms",
    "data_ms": "perf/data_ms",
    "checkpoint_stall_s": "perf/checkpoint_stall_s",
    "val_s": "perf/val_s",
    "tflops": "perf/tflops",
    "mfu": "perf/mfu",
    "mem_gb": "perf/mem_gb",
    "seconds": "perf/seconds",
    "images_per_sample": "data/images_per_sample",
    "pad_frac": "data/pad_frac",
    "supervised_tokens": "data/supervised_tokens",
    "truncated": "data/truncated",
    "dt_mean": "ssm/dt_mean",
    "dt_max": "ssm/dt_max",
    "state_norm": "ssm/state_norm",
}

Record = dict[str, Any]

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Something that records go to."""

    def write(self, record: Record) -> None: ...

    def write_samples(self, samples: Sequence[Record]) -> None:
        """Takes held-out questions with their answers."""

    def close(self) -> None: ...


class Metrics:
    """What is seen of a run, on its first process.

    Args:
        output: the run's directory.
        config: the run's settings.
        num_steps: of the whole run.
        start: steps already done; later records in the files, of a part that was killed, are
            dropped.
        device: of this process.
        world_size: how many processes there are, all on devices of a kind.
        statistics: looks at recurrent layers in the steps that are recorded; None: nobody does.
    """

    def __init__(
        self,
        output: Path,
        config: RunConfig,
        num_steps: int,
        start: int,
        device: torch.device | None = None,
        world_size: int = 1,
        statistics: SSMStatistics | None = None,
    ) -> None:
        kept = _drop_later(output / METRICS, start)
        _drop_later(output / SAMPLES, start)
        self._every, self._num_steps = config.log.every, num_steps
        self._statistics = statistics
        device = device or torch.device("cpu")
        self._profiler = StepProfiler(output, config.log.profiled_steps, device)
        self._window = Window(start, device, world_size, peak_flops(device, config.log.peak_tflops))
        self._began = time.perf_counter() - (kept[-1]["seconds"] if kept else 0.0)
        progress = ProgressBar if on_terminal() else ProgressLines
        self._sinks: list[Sink] = [JsonLines(output), progress(num_steps, start)]
        if config.log.wandb:
            self._sinks.append(Wandb(output, config))

    def begin(self, step: int) -> None:
        """Has those who look on look at a step, counted from 1, that comes next."""
        began = time.perf_counter()
        self._profiler.begin(step)
        self._window.pause(time.perf_counter() - began)
        if self._statistics is not None and self._is_recorded(step):
            self._statistics.begin()

    def add(
        self,
        record: Record,
        counts: dict[str, float],
        data_seconds: float = 0.0,
        stall_seconds: float = 0.0,
        validated: Validated | None = None,
    ) -> None:
        """Takes a step's measurements and, every `log.every` steps and where the step was followed by a validation,
        records them with what happened since last time.

        Args:
            record: `step` (steps done) and what was measured.
            counts: tokens, images, ... of the step over all processes, as the batches count them.
            data_seconds: how long the step waited for its batches.
            stall_seconds: how long it waited for a checkpoint.
            validated: of held-out rows.
        """
        found = {} if self._statistics is None else self._statistics.end()
        self._window.add(counts, data_seconds, stall_seconds)
        if validated is not None:
            self._window.pause(validated.seconds)
        if not self._is_recorded(record["step"]) and validated is None:
            return
        now = time.perf_counter()
        held_out = {} if validated is None else {**validated.means, "val_s": round(validated.seconds, 3)}
        record = {**record, **held_out, **self._window.close(record["step"], now), **found}
        record["seconds"] = round(now - self._began, 3)
        for sink in self._sinks:
            sink.write(record)
            if validated is not None and validated.samples:
                sink.write_samples(validated.samples)

    def close(self) -> None:
        self._profiler.close()
        for sink in self._sinks:
            sink.close()

    def _is_recorded(self, step: int) -> bool:
        return step % self._every == 0 or step == self._num_steps


class Window:
    """The steps since the last record, over all processes.

    Args:
        start: steps already done.
        device, world_size: of a process, and how many there are.
        peak: operations a second that a device could do at most, None if that is not known.
    """

    def __init__(self, start: int, device: torch.device, world_size: int, peak: float | None) -> None:
        self._device, self._world_size, self._peak = device, world_size, peak
        self._begin(start, time.perf_counter())

    def _begin(self, step: int, now: float) -> None:
        self._step, self._since = step, now
        self._counts: dict[str, float] = {}
        self._data_seconds = self._stall_seconds = self._paused_seconds = 0.0

    def pause(self, seconds: float) -> None:
        """Time that is not the training's."""
        self._paused_seconds += seconds

    def add(self, counts: dict[str, float], data_seconds: float, stall_seconds: float) -> None:
        """One step more."""
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + count
        self._data_seconds += data_seconds
        self._stall_seconds += stall_seconds

    def close(self, step: int, now: float) -> Record:
        """What is recorded of the steps up to this one; the next window begins."""
        elapsed, num_steps = now - self._since - self._paused_seconds, step - self._step
        counts = self._counts
        flops_per_s = counts["flops"] / elapsed / self._world_size
        record: Record = {
            "tokens_per_s": round(counts["num_tokens"] / elapsed, 1),
            "step_ms": round(1000 * elapsed / num_steps, 3),
            "data_ms": round(1000 * self._data_seconds / num_steps, 3),
            "checkpoint_stall_s": round(self._stall_seconds, 4),
            "tflops": float(f"{flops_per_s / 1e12:.4g}"),
        }
        if self._peak is not None:
            record["mfu"] = float(f"{flops_per_s / self._peak:.4g}")
        memory = peak_memory(self._device)
        if memory is not None:
            record["mem_gb"] = round(memory / 1e9, 3)
        record |= {
            "images_per_sample": round(counts["num_images"] / max(1.0, counts["num_rows"]), 3),
            "pad_frac": round(counts["num_padding"] / max(1.0, counts["num_padding"] + counts["num_tokens"]), 4),
            "supervised_tokens": int(counts["num_supervised"]),
            "truncated": int(counts["num_truncated"]),
        }
        self._begin(step, now)
        return record


class JsonLines:
    """One JSON object a line, flushed at once; the file of samples begins with the first of them."""

    def __init__(self, output: Path) -> None:
        self._output = output
        self._file = (output / METRICS).open("a")

    def write(self, record: Record) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def write_samples(self, samples: Sequence[Record]) -> None:
        with (self._output / SAMPLES).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples)

    def close(self) -> None:
        self._file.close()


class Wandb:
    """Weights & Biases; whatever goes wrong there is a warning here, never the end of a run."""

    def __init__(self, output: Path, config: RunConfig) -> None:
        self._run = None
        try:
            import wandb

            # Without a key the client would ask for one, on a cluster for ever.
            is_offline = not os.environ.get("WANDB_MODE") and not wandb.api.api_key
            known = output / WANDB_ID
            self._run = wandb.init(
                project=config.log.project,
                name=output.name,
                id=known.read_text().strip() if known.exists() else None,
                resume="allow",
                dir=str(output),
                mode="offline" if is_offline else None,  # None: as WANDB_MODE says
                config=to_dict(config),
                settings=wandb.Settings(init_timeout=60, silent=True),
            )
            self._table = wandb.Table
            write_atomic(known, self._run.id + "\n")
        except ImportError:
            log.warning("wandb is not used: it is not installed; pip install 'cobra-vlm[train]'")
        except Exception as error:
            log.warning("wandb is not used: %s", error)

    def write(self, record: Record) -> None:
        named = {wandb_name(key): value for key, value in record.items() if key != "step"}
        self._do("is no longer used", lambda run: run.log(named, step=record["step"]))

    def write_samples(self, samples: Sequence[Record]) -> None:
        columns: list[Any] = list(samples[0])
        rows = [[sample[name] for name in columns] for sample in samples]

        def send(run: Any) -> None:
            run.log({"val/samples": self._table(columns=columns, data=rows)}, step=samples[0]["step"])

        self._do("is no longer used", send)

    def close(self) -> None:
        self._do("did not finish", lambda run: run.finish())

    def _do(self, failure: str, action: Callable[[Any], None]) -> None:
        """Something with the run, if there is one; after a failure there is none."""
        if self._run is None:
            return
        try:
            action(self._run)
        except Exception as error:
            log.warning("wandb %s: %s", failure, error)
            self._run = None


def wandb_name(key: str) -> str:
    """What a key of a record is called at Weights & Biases."""
    other = f"val/{key.removeprefix('val_')}" if key.startswith("val_") else f"train/{key}"
    return WANDB_NAMES.get(key, other)


def read_metrics(output: Path) -> list[Record]:
    """The records of a run; a last line cut short by a kill is left out."""
    return _read_lines(output / METRICS)


def _read_lines(path: Path) -> list[Record]:
    records = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _drop_later(path: Path, start: int) -> list[Record]:
    """The records up to a step, which are then all that the file holds."""
    found = _read_lines(path)
    kept = [record for record in found if record["step"] <= start]
    if path.exists():
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in kept)
        write_atomic(path, "".join(lines))
    return kept
