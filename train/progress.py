"""Progress of what takes long: a bar on a terminal, a line every few seconds elsewhere."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from cobra.progress import SECONDS_BETWEEN_LINES

BAR_WIDTH = 12


class ProgressLines:
    """A line every few seconds and after each validation, for logs."""

    def __init__(self, num_steps: int, start: int) -> None:
        self._num_steps = num_steps
        self._start = start
        self._began = time.perf_counter()
        self._next = 0.0

    def write(self, record: dict[str, Any]) -> None:
        now = time.perf_counter()
        if now < self._next and record["step"] < self._num_steps and "val_loss" not in record:
            return
        self._next = now + SECONDS_BETWEEN_LINES
        done = record["step"] - self._start
        left = clock((now - self._began) / done * (self._num_steps - record["step"]))
        seconds = record["step_ms"] / 1000
        self._print(f"step {record['step']}/{self._num_steps}  {describe(record)}  {seconds:.3g} s/step  left {left}")

    def write_samples(self, samples: Sequence[dict[str, Any]]) -> None:
        for sample in samples:
            self._print(describe_sample(sample))

    def _print(self, line: str) -> None:
        sys.stderr.write(f"{line}\n")
        sys.stderr.flush()

    def close(self) -> None:
        pass


class ProgressBar:
    """A bar on the terminal."""

    def __init__(self, num_steps: int, start: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(stderr=True)
        others = BAR_WIDTH + len(f"{num_steps}/{num_steps}") + len("left 0:00:00") + 4
        self._room = max(0, console.width - others)
        self._progress = Progress(
            BarColumn(bar_width=BAR_WIDTH),
            MofNCompleteColumn(),
            TextColumn("{task.description}", markup=False),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._progress.start()
        self._task = self._progress.add_task("", total=num_steps, completed=start)

    def write(self, record: dict[str, Any]) -> None:
        shown = fit(describe(record), self._room)
        self._progress.update(self._task, completed=record["step"], description=shown)

    def write_samples(self, samples: Sequence[dict[str, Any]]) -> None:
        for sample in samples:
            self._progress.console.print(describe_sample(sample), markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()


def describe(record: dict[str, Any]) -> str:
    """The numbers that a person watches; those that a record does not have are left out."""
    parts = {
        "loss": lambda loss: f"loss {loss:.4f}",
        "val_loss": lambda loss: f"val {loss:.4f}",
        "patch_accuracy": lambda share: f"patches {share:.1%}",
        "reward_accuracy": lambda share: f"preferred {share:.1%}",
        "tokens_per_s": lambda rate: f"{short_count(rate)} tokens/s",
        "mfu": lambda share: f"MFU {share:.1%}",
        "tflops": lambda rate: "" if "mfu" in record else f"{rate:.3g} TFLOP/s",
        "mem_gb": lambda size: f"{size:.3g} GB",
        "data_ms": lambda waited: f"data {waited / max(record['step_ms'], 1e-9):.0%}",
        "lr": lambda lr: f"lr {lr:.2g}",
    }
    return "  ".join(filter(None, (form(record[key]) for key, form in parts.items() if key in record)))


def fit(text: str, room: int) -> str:
    """As many of the parts of a description, from its start, as have room."""
    return text if len(text) <= room else text[: room + 2].rpartition("  ")[0]


def describe_sample(sample: dict[str, Any]) -> str:
    """A held-out question with what was answered, in one line."""
    return (
        f"step {sample['step']}, {sample['id']}: {sample['question']!r} -> {sample['answer']!r}, "
        f"should be {sample['reference']!r}"
    )


def short_count(number: float) -> str:
    """1234567 -> 1.23M."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Minutes and seconds, behind an hour hours too: 1:02:03."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
