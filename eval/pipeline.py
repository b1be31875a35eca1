"""Runs commands as a user would type them: one after another in this terminal, or side by side.

What is done is recorded with its time, so that an interrupted run goes on where it stopped: finished steps
are skipped, training resumes from its last checkpoint.
"""

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from eval.environment import num_cores
from eval.files import check_format, read_json, write_json
from vision_scan.errors import UserError

STOPPED, INTERRUPTED = 75, 130  # exit statuses of a command that was asked to stop
THREADS = "OMP_NUM_THREADS"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command.

    Attributes:
        name: its key in the record.
        title: what it does, for people.
        arguments: of `python -m`.
        output: what the step leaves behind, if a second run would not just overwrite it.
        is_resumable: whether it goes on from a half-made output; if not, that is removed first.
        expected_s: rough seconds; only the ratios between steps matter, for the time that is left.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    output: Path | None = None
    is_resumable: bool = False
    expected_s: float

    @property
    def command(self) -> tuple[str, ...]:
        """As a user would type it; a training run that was begun is resumed."""
        is_begun = self.is_resumable and self.output is not None and self.output.exists()
        return ("python", "-m", *self.arguments, *(["--resume"] if is_begun else []))

    def begin(self, stage: int, lane: str) -> dict:
        """The step's record."""
        return {
            "title": self.title,
            "command": shlex.join(("python", "-m", *self.arguments)),
            "stage": stage,
            "lane": lane,
            "seconds": 0.0,
            "peak_rss_bytes": 0,
            "done": False,
        }


Lane = list[Step]
"""Steps of which each needs the one before."""
Stage = dict[str, Lane]
"""Lanes by name that run side by side; the names stand in front of what their commands print."""


def open_record(path: Path, current: int, about: dict, what: str) -> dict:
    """The record at `path`, in whose folder everything is made; a new one if there is none.

    Args:
        path: of the record.
        current: its format.
        about: what it says of the run beside its steps; as JSON has it.
        what: the run, for messages: "demo".
    Raises:
        UserError: if the folder holds something else, or a run with other settings.
    """
    root = path.parent
    if not path.exists():
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"--output {root} exists and is no {what}'s directory; name another, or remove it")
        root.mkdir(parents=True, exist_ok=True)
        record = {"format": current, **about, "steps": {}, "seconds": 0.0}
        write_json(path, record)
        return record
    record = read_json(path)
    check_format(record, current, path)
    if {name: record.get(name) for name in about} != about:
        raise UserError(f"{root} holds a {what} with other settings; name another --output, or remove it")
    return record


class Pipeline:
    """Stages, one after another, and the record of what is done.

    Args:
        stages: what to do.
        record: {"steps": {name: record}, "seconds": time by the clock, ...}, changed in place; a step's
            record says its "title", "command", "seconds", "peak_rss_bytes" (the most memory it took, or this
            process before it, if that is more), whether it is "done", and the number of its "stage" and the
            name of its "lane".
        path: the file of the record.
        say: prints a line.
    """

    def __init__(self, stages: list[Stage], record: dict, path: Path, say: Callable[[str], None]) -> None:
        self.stages, self.record, self.path, self.say = stages, record, path, say
        steps = [step for stage in stages for lane in stage.values() for step in lane]
        self.places = {step.name: f"{number}/{len(steps)}" for number, step in enumerate(steps, start=1)}
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._is_stopped = False
        self._status = 0

    def run(self) -> int:
        """Runs what is left.

        Returns:
            Exit status: 0 done, 75 stopped by request, else the status of a step that failed.
        """
        self._before, self._start = self.record["seconds"], time.monotonic()
        with self._signals():
            for number in range(len(self.stages)):
                self._run_stage(number)
                if self._status:
                    return self._status if self._status > 0 else 1
                if self._is_stopped:
                    self.say("Stopped; the same command goes on from here.")
                    return STOPPED
        return 0

    def _run_stage(self, number: int) -> None:
        stage = self.stages[number]
        if len(stage) == 1:
            self._run_lane(number, *stage, None, {})
            return
        environment = {THREADS: str(max(1, _num_threads() // len(stage)))}
        width = max(map(len, stage))
        with ThreadPoolExecutor(len(stage)) as pool:
            lanes = [
                pool.submit(self._run_lane, number, name, f"{name:>{width}} | ", environment)
                for name in stage
            ]
            for lane in lanes:
                lane.result()

    def _run_lane(self, stage: int, name: str, prefix: str | None, environment: dict[str, str]) -> None:
        for step in self.stages[stage][name]:
            with self._lock:
                record = self.record["steps"].setdefault(step.name, step.begin(stage, name))
            if record["done"]:
                continue
            if self._is_stopped or self._status:
                return
            self._run_step(step, record, prefix, environment)

    def _run_step(self, step: Step, record: dict, prefix: str | None, environment: dict[str, str]) -> None:
        place = self.places[step.name]
        self.say(f"\n[{place}] {step.title}   ({self._times()})")
        if step.output and step.output.exists() and not step.is_resumable:
            shutil.rmtree(step.output)
        command = step.command
        self.say(f"$ {shlex.join(command)}")
        start = time.monotonic()
        status, peak = self._run_command([sys.executable, *command[1:]], prefix, environment)
        with self._lock:
            record["seconds"] += time.monotonic() - start
            record["done"] = status == 0
            record["peak_rss_bytes"] = max(record["peak_rss_bytes"], peak)
            self.record["seconds"] = self._seconds()
            write_json(self.path, self.record)
            is_first = not self._is_stopped and not self._status
            if status in (STOPPED, INTERRUPTED):
                self._is_stopped = True
            elif status and is_first:
                self._status = status
                self.say(f"Step {place} ended with status {status}; once that is mended, the same command")
                self.say("goes on from here.")
            if status and is_first:
                self._terminate()

    def _run_command(
        self, command: list[str], prefix: str | None, environment: dict[str, str]
    ) -> tuple[int, int]:
        """Runs a command: its exit status, and the most memory that it took in bytes.

        Args:
            prefix: stands in front of each line that it prints; None: the terminal is all its own.
        """
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"}
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, **({} if prefix is None else pipe)
        )
        self._running.add(process.pid)
        try:
            for line in process.stdout or ():
                self.say(f"{prefix}{line.rstrip()}")
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            return process.returncode, 1024 * usage.ru_maxrss
        finally:
            self._running.discard(process.pid)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Ctrl-C reaches the commands too, which save what they have; SIGTERM is handed on to them."""

        def stop(number: int, frame) -> None:
            self._is_stopped = True
            if number == signal.SIGTERM:
                self._terminate()

        previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _terminate(self) -> None:
        for pid in list(self._running):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)

    def _seconds(self) -> float:
        """Time by the clock, that of earlier runs included."""
        return self._before + time.monotonic() - self._start

    def _times(self) -> str:
        """Time spent and time left, at the pace against expectation of what is done."""
        steps = self.record["steps"]

        def is_done(step: Step) -> bool:
            return step.name in steps and steps[step.name]["done"]

        def expected(done: bool) -> float:
            return sum(
                max(sum(step.expected_s for step in lane if is_done(step) == done) for lane in stage.values())
                for stage in self.stages
            )

        spent = self._seconds()
        # Half a minute at the expected pace keeps the first short steps from deciding the estimate.
        pace = (spent + 30) / (expected(True) + 30)
        return f"{clock(spent)} so far, about {clock(pace * expected(False))} to go"


def peak_memory(record: dict) -> int:
    """The most bytes taken at a time, if the largest steps of lanes side by side met."""
    lanes: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for step in record["steps"].values():
        lane = lanes[step["stage"]]
        lane[step["lane"]] = max(lane[step["lane"]], step["peak_rss_bytes"])
    return max(sum(lane.values()) for lane in lanes.values())


def _num_threads() -> int:
    """For all lanes together: as many as a command alone would take."""
    try:
        return int(os.environ.get(THREADS, ""))
    except ValueError:
        return num_cores()


def clock(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
