"""Records of a run: always `metrics.jsonl`, a progress bar or lines, and Weights & Biases when
asked."""

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any, Protocol

from cobra.typed_config import to_dict
from train.progress import SECONDS_BETWEEN_LINES, on_terminal
from train.recipes import RunConfig
from train.resume import write_atomic

METRICS = "metrics.jsonl"

log = logging.getLogger(__name__)


class Sink(Protocol):
    """Something that records go to."""

    def write(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class Metrics:
    """All sinks of a run.

    Args:
        output: the run's directory.
        config: the run's settings.
        num_steps: of the whole run.
        start: steps already done; later records in the file, of a part that was killed, are
            dropped.
    """

    def __init__(self, output: Path, config: RunConfig, num_steps: int, start: int) -> None:
        kept = [record for record in read_metrics(output) if record["step"] <= start]
        write_atomic(output / METRICS, "".join(json.dumps(record) + "\n" for record in kept))
        self._every, self._num_steps = config.log.every, num_steps
        self._step = start
        self._counts: dict[str, float] = {}
        self._data_seconds = self._stall_seconds = 0.0
        self._last = time.perf_counter()
        self._began = self._last - (kept[-1]["seconds"] if kept else 0.0)
        self._sinks: list[Sink] = [JsonLines(output / METRICS), _progress(num_steps, start)]
        if config.log.wandb:
            self._sinks.append(Wandb(output, config))

    def add(
        self, record: dict[str, Any], counts: dict[str, float], data_seconds: float = 0.0, stall_seconds: float = 0.0
    ) -> None:
        """Takes a step's measurements and, every `log.every` steps, records them with the speed
        since last time.

        Args:
            record: `step` (steps done) and what was measured.
            counts: tokens, images, ... of the step over all processes, as the batches count them.
            data_seconds: how long the step waited for its batches.
            stall_seconds: how long it waited for a checkpoint.
        """
        for name, count in counts.items():
            self._counts[name] = self._counts.get(name, 0.0) + count
        self._data_seconds += data_seconds
        self._stall_seconds += stall_seconds
        if record["step"] % self._every and record["step"] != self._num_steps:
            return
        now = time.perf_counter()
        elapsed, num_steps = now - self._last, record["step"] - self._step
        counted = self._counts
        record = {
            **record,
            "supervised_tokens": int(counted["num_supervised"]),
            "images": int(counted["num_images"]),
            "pad_frac": round(counted["num_padding"] / max(1.0, counted["num_padding"] + counted["num_tokens"]), 4),
            "truncated": int(counted["num_truncated"]),
            "tokens_per_s": round(counted["num_tokens"] / elapsed, 1),
            "seconds_per_step": round(elapsed / num_steps, 5),
            "data_ms": round(1000 * self._data_seconds / num_steps, 3),
            "checkpoint_stall_s": round(self._stall_seconds, 4),
            "seconds": round(now - self._began, 3),
        }
        self._step, self._last = record["step"], now
        self._counts, self._data_seconds, self._stall_seconds = {}, 0.0, 0.0
        for sink in self._sinks:
            sink.write(record)

    def close(self) -> None:
        for sink in self._sinks:
            sink.close()


class JsonLines:
    """One JSON object a line, flushed at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a")

    def write(self, record: dict[str, Any]) -> None:
        self._file.write(json.dumps(record) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class ProgressLines:
    """A line every few seconds, for logs."""

    def __init__(self, num_steps: int, start: int) -> None:
        self._num_steps = num_steps
        self._start = start
        self._began = time.perf_counter()
        self._next = 0.0

    def write(self, record: dict[str, Any]) -> None:
        now = time.perf_counter()
        if now < self._next and record["step"] < self._num_steps:
            return
        self._next = now + SECONDS_BETWEEN_LINES
        done = record["step"] - self._start
        left = int((now - self._began) / done * (self._num_steps - record["step"]))
        sys.stderr.write(
            f"step {record['step']}/{self._num_steps}  {describe(record)}  "
            f"{record['seconds_per_step']:.3g} s/step  left {left // 60}:{left % 60:02d}\n"
        )
        sys.stderr.flush()

    def close(self) -> None:
        pass


class ProgressBar:
    """A bar on the terminal."""

    def __init__(self, num_steps: int, start: int) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
        )

        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=num_steps, completed=start)

    def write(self, record: dict[str, Any]) -> None:
        self._progress.update(self._task, completed=record["step"], description=describe(record))

    def close(self) -> None:
        self._progress.stop()


class Wandb:
    """Weights & Biases; whatever goes wrong there is a warning here, never the end of a run."""

    def __init__(self, output: Path, config: RunConfig) -> None:
        self._run = None
        try:
            import wandb

            # Without a key the client would ask for one, on a cluster for ever.
            is_offline = not os.environ.get("WANDB_MODE") and not wandb.api.api_key
            self._run = wandb.init(
                project=config.log.project,
                name=output.name,
                dir=str(output),
                mode="offline" if is_offline else None,  # None: as WANDB_MODE says
                config=to_dict(config),
                settings=wandb.Settings(init_timeout=60, silent=True),
            )
        except Exception as error:
            log.warning("wandb is not used: %s", error)

    def write(self, record: dict[str, Any]) -> None:
        if self._run is None:
            return
        try:
            self._run.log(record, step=record["step"])
        except Exception as error:
            log.warning("wandb is no longer used: %s", error)
            self._run = None

    def close(self) -> None:
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:
            log.warning("wandb did not finish: %s", error)


def describe(record: dict[str, Any]) -> str:
    """The numbers that a person watches."""
    accuracy = f"  patches {record['patch_accuracy']:.1%}" if "patch_accuracy" in record else ""
    return f"loss {record['loss']:.4f}{accuracy}  lr {record['lr']:.2g}"


def read_metrics(output: Path) -> list[dict[str, Any]]:
    """The records of a run; a last line cut short by a kill is left out."""
    path = output / METRICS
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _progress(num_steps: int, start: int) -> Sink:
    return ProgressBar(num_steps, start) if on_terminal() else ProgressLines(num_steps, start)
