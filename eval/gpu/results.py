"""The file of a card's results: whole at any time, filled as measurements come in.

`benchmarks/results/<card>-<date>.json`. A part that is run again replaces its own measurements in the newest
file of the same card, date and commit; another commit on the same day gets a file of its own.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from eval.environment import describe_environment
from eval.files import check_format, read_json, write_json
from eval.gpu.stopwatch import reason

FORMAT = 1
FOLDER = Path("benchmarks/results")
_ASKED = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit,temperature.gpu"


class Results:
    """One file.

    Attributes:
        path: where it is.
        content: format, card, date, commit, environment, gpu, ceilings, parts (name -> status, seconds, note,
            and what a part found out), measurements (name -> see `make_row`).
    """

    def __init__(self, path: Path, content: dict) -> None:
        self.path, self.content = path, content

    @classmethod
    def load(cls, path: Path) -> "Results":
        content = read_json(path)
        check_format(content, FORMAT, path)
        return cls(path, content)

    def save(self) -> None:
        write_json(self.path, self.content)

    def begin(self, part: str) -> None:
        """Forgets what a part has measured before."""
        kept = {name: row for name, row in self.content["measurements"].items() if row["part"] != part}
        self.content["measurements"] = kept
        self.content["parts"][part] = {"status": "running", "started": now()}
        self.save()

    def note(self, part: str, **facts: Any) -> None:
        """Adds to what is known of a part."""
        self.content["parts"][part] |= facts
        self.save()

    def keep(self, part: str, row: dict) -> None:
        """Adds a measurement."""
        self.content["measurements"][row["name"]] = row | {"part": part, "measured": now()}
        self.save()


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")


def open_results(folder: Path, card: str, commit: str | None, date: str, head: dict) -> Results:
    """The newest file of this card, date and commit, or a new one that begins with `head`."""
    stem = f"{slug(card)}-{date}"
    number = 1
    while (path := folder / (f"{stem}.json" if number == 1 else f"{stem}-{number}.json")).exists():
        number += 1
    if number > 1:
        newest = Results.load(folder / (f"{stem}.json" if number == 2 else f"{stem}-{number - 1}.json"))
        if newest.content["commit"] == commit:
            newest.content |= head
            return newest
    content = {"format": FORMAT, "card": card, "date": date, "commit": commit, **head}
    return Results(path, content | {"ceilings": None, "parts": {}, "measurements": {}})


def slug(card: str) -> str:
    """NVIDIA H200 -> h200."""
    return re.sub(r"[^a-z0-9]+", "-", card.lower().removeprefix("nvidia ")).strip("-")


def describe(device: str) -> tuple[str, str | None, dict]:
    """The card's name, the commit and the head of a results file.

    A checkout without git, as on a machine that only got the files, can name its commit in COBRA_COMMIT.
    """
    environment = describe_environment(device)
    environment["versions"] |= _more_versions()
    commit = environment["commit"] or os.environ.get("COBRA_COMMIT")
    if not device.startswith("cuda"):
        return environment["cpu"], commit, {"environment": environment, "gpu": None}
    properties = torch.cuda.get_device_properties(device)
    gpu = {
        "capability": f"{properties.major}.{properties.minor}",
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda_of_torch": torch.version.cuda,
        **query_card(),
    }
    return properties.name, commit, {"environment": environment, "gpu": gpu}


def query_card() -> dict[str, str]:
    """Driver, clocks and power as nvidia-smi tells them; {} where it does not."""
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", f"--query-gpu={_ASKED}", "--format=csv,noheader", "--id=0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    values = [value.strip() for value in done.stdout.strip().split(",")]
    names = _ASKED.split(",")
    return dict(zip(names, values, strict=True)) if len(values) == len(names) else {}


def _more_versions() -> dict[str, str]:
    from importlib import metadata

    found = {}
    for package in ("triton", "einops"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    nvcc = shutil.which("nvcc")
    if nvcc is not None:
        told = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release [\d.]+, V([\d.]+)", told)
        found |= {"nvcc": release[1]} if release else {}
    return found


def make_row(
    name: str,
    seconds: dict | None,
    *,
    failed: str = "",
    bytes_moved: int = 0,
    flops: int = 0,
    ceilings: dict | None = None,
    check: dict | None = None,
    others: list[dict] | None = None,
    **facts: Any,
) -> dict:
    """A measurement.

    Args:
        seconds: median, q1, q3, n, see `eval.efficiency.spread`; None if it failed.
        bytes_moved, flops: what the work needs at least, for the fractions of the ceilings.
        others: contestants of the same run: name, is_rival, seconds, failed, check.
    Returns:
        a JSON-able dict: name, seconds, failed, bytes, flops, of_copy and of_matrix (fractions), check,
        others, times (how many times as fast as the fastest rival: median, low, high, rival; None: not
        measured), facts.
    """
    rates = ceilings or {}

    def fraction(work: int, key: str) -> float | None:
        return work / rates[key] / seconds["median"] if seconds and work and rates.get(key) else None

    return {
        "name": name,
        "seconds": seconds,
        "failed": failed,
        "bytes": bytes_moved,
        "flops": flops,
        "of_copy": fraction(bytes_moved, "copy_bytes_per_s"),
        "of_matrix": fraction(flops, "matrix_flops_per_s"),
        "check": check,
        "others": others or [],
        "times": _times(seconds, others or []),
        **facts,
    }


def attempt(name: str, work: Callable[[], dict]) -> dict:
    """A measurement, or if it fails a row that says why, so that the rest is measured."""
    try:
        return work()
    except Exception as error:
        return make_row(name, None, failed=reason(error))


def per_step(seconds: dict | None, steps: int) -> dict | None:
    """The same spread for one of several equal steps that were timed together."""
    if seconds is None:
        return None
    return {key: value if key == "n" else value / steps for key, value in seconds.items()}


def _times(seconds: dict | None, others: list[dict]) -> dict | None:
    rivals = [
        one for one in others
        if one["is_rival"] and one["seconds"] and (one["check"] is None or one["check"]["passed"])
    ]  # fmt: skip
    if seconds is None or not rivals:
        return None
    best = min(rivals, key=lambda one: one["seconds"]["median"])
    theirs = best["seconds"]
    return {
        "median": theirs["median"] / seconds["median"],
        "low": theirs["q1"] / seconds["q3"],
        "high": theirs["q3"] / seconds["q1"],
        "rival": best["name"],
    }


def other(name: str, is_rival: bool, timing: Any, check: dict | None = None, **facts: Any) -> dict:
    """A contestant beside ours, see `make_row`; `timing` is an `eval.gpu.stopwatch.Timing`."""
    return {"name": name, "is_rival": is_rival, "seconds": timing.seconds, "failed": timing.failed} | {
        "check": check, **facts
    }  # fmt: skip
