"""Kernels and models on a GPU: built, tested and timed part by part, into one file of results."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

import torch

import vision_scan
from eval.gpu import commands, decoding, scans, training
from eval.gpu.results import Results, describe, now, open_results, query_card
from eval.gpu.stopwatch import Stopwatch, measure_ceilings, reason
from eval.gpu.targets import is_right
from vision_scan.errors import UserError, choose

LIMIT_S = 480.0
LOGS = Path("build/gpu-logs")


def _bench(part: str, run: Callable, settings: Callable, evict_bytes: int | None = None) -> Callable:
    """A part that measures: the ceilings, then its own rows."""

    def measure(results: Results, logs: Path) -> None:
        del logs
        ceilings = measure_ceilings(Stopwatch("cuda"))
        results.content["ceilings"] = ceilings
        results.note(part, card=query_card())
        torch.cuda.empty_cache()
        stopwatch = Stopwatch("cuda") if evict_bytes is None else Stopwatch("cuda", evict_bytes)
        run(stopwatch, ceilings, settings(), lambda row: results.keep(part, row))
        results.note(part, card_after=query_card(), backend=vision_scan.backend_report())

    return measure


PARTS: dict[str, Callable[[Results, Path], None]] = {
    "build": commands.build,
    "peers": commands.build_peers,
    "test": commands.test,
    "sanitize": commands.sanitize,
    "bench-scan": _bench("bench-scan", scans.run, scans.Settings),
    "bench-decode": _bench("bench-decode", decoding.run, decoding.Settings),
    # Without an array to evict with: its weights alone are many times the caches, and memory is short.
    "bench-train": _bench("bench-train", training.run, training.Settings, evict_bytes=0),
}


def run_parts(
    parts: Sequence[str], folder: Path, limit_s: float = LIMIT_S, device: str = "cuda",
    command: Callable[[str, Path], list[str]] | None = None,
) -> Results:  # fmt: skip
    """Runs parts one after the other, each in a process of its own and within its time.

    Args:
        parts: keys of PARTS; empty: all of them, in their order. Where no kernels are built, they are built
            first.
        folder: of the results.
        limit_s: a part that takes longer is stopped; what it has measured stays, and the next one begins.
        command: (part, results file) -> the program that runs a part; for tests.
    Returns:
        the results, as they are on disk.
    Raises:
        UserError: on an unknown part, and where there is no GPU; nothing is written then.
    """
    for part in parts:
        choose("part", part, PARTS)
    if limit_s <= 0:
        raise UserError(f"the limit is {limit_s:g} s: give more than 0")
    check_device(device)
    card, commit, head = describe(device)
    results = open_results(folder, card, commit, now()[:10], head)
    parts = list(parts or PARTS)
    if "build" not in parts and find_spec("vision_scan._cuda") is None:
        parts.insert(0, "build")
    for part in parts:
        results.begin(part)
        started = time.perf_counter()
        process = subprocess.Popen(
            (command or _command)(part, results.path), cwd=commands.ROOT, start_new_session=True
        )
        try:
            status = process.wait(limit_s)
            ended = "done" if status == 0 else "failed"
        except subprocess.TimeoutExpired:
            ended = f"out of time after {limit_s:.0f} s"
        finally:
            commands.stop(process)  # whatever it has left, and all of it on an interruption
        results = Results.load(results.path)
        results.note(part, status=ended, seconds=time.perf_counter() - started)
    return results


def check_device(device: str) -> None:
    """Raises UserError where torch sees no GPU."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        built = (
            "this torch is built without CUDA"
            if torch.version.cuda is None
            else "nvidia-smi says what is there"
        )
        raise UserError(f"no GPU is visible to torch; {built}. Without one: make test, make cuda")


def run_part(part: str, path: Path) -> int:
    """What the process of a part does: fills the results file; returns the exit status."""
    results = Results.load(path)
    try:
        PARTS[part](results, LOGS)
    except commands.FailedPartError as error:
        results.note(part, note=str(error))
        sys.stderr.write(f"{part}: {error}\n")
        return 1
    except Exception as error:
        results.note(part, note=reason(error))
        raise
    return 0


def _command(part: str, path: Path) -> list[str]:
    return [sys.executable, "-m", "eval.gpu", part, str(path.resolve())]


def passed(results: Results) -> bool:
    """Whether every part that has run is done and every measurement gives right results, or did not fit."""
    parts, rows = results.content["parts"].values(), results.content["measurements"].values()
    return all(part["status"] == "done" for part in parts) and all(
        is_right(row) if row["seconds"] else row["failed"] == "out of memory" for row in rows
    )
