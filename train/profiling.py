"""A look of torch.profiler at some steps of a run."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

FOLDER = "profile"
NUM_OPERATIONS = 40  # rows of the table

log = logging.getLogger(__name__)


class StepProfiler:
    """Records the steps that `log.profile` names into `OUTPUT/profile/`: a Chrome trace, and a table of the operations
    that took longest. If that fails, the run goes on without.

    Args:
        output: the run's directory.
        steps: a range of steps, counted from 1; empty: nothing is recorded.
        device: of this process.
    """

    def __init__(self, output: Path, steps: range, device: torch.device) -> None:
        self._folder = output / FOLDER
        self._steps = steps
        self._device = device
        self._profile: profile | None = None

    def begin(self, step: int) -> None:
        """Before a step; the steps come in order."""
        if self._profile is not None and step not in self._steps:
            self.close()
        if step not in self._steps:
            return
        self._last = step
        if self._profile is None:
            self._first = step
            activities = [ProfilerActivity.CPU]
            if self._device.type == "cuda":
                activities.append(ProfilerActivity.CUDA)
            self._profile = profile(activities=activities)
            self._profile.start()

    def close(self) -> None:
        """Writes down what was recorded, if anything was."""
        if self._profile is None:
            return
        recorded, self._profile = self._profile, None
        name = f"steps-{self._first:06d}-{self._last:06d}"
        trace, table = self._folder / f"{name}.json", self._folder / f"{name}.txt"
        order = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
        try:
            recorded.stop()
            self._folder.mkdir(exist_ok=True)
            recorded.export_chrome_trace(str(trace))
            table.write_text(recorded.key_averages().table(sort_by=order, row_limit=NUM_OPERATIONS) + "\n")
        except Exception as error:  # a full disk must not end the run
            log.warning("no profile: %s", error)
            return
        log.info("profile of steps %d to %d: %s (for ui.perfetto.dev), %s", self._first, self._last, trace, table)
