"""The output directory of a run: its settings, and its checkpoints as files."""

import json
import logging
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import cobra.checkpoint
from cobra.typed_config import from_dict, to_dict
from train.settings import RunConfig
from vision_scan.errors import UserError

log = logging.getLogger(__name__)

RUN, MANIFEST = "run.json", "manifest.json"
# What may change between the parts of a run: nothing that moves a number by more than rounding.
FREE_SETTINGS = (
    "log",
    "val.",
    "zero",
    "train.save_every",
    "train.keep",
    "train.async_save",
    "train.recompute",
    "train.segment_tokens",
    "train.engine",
    "train.micro_batch_size",
    "train.skip_nonfinite",
    "train.timeout",
    "data.path",
    "data.image_root",
    "data.check",
    "data.skip_bad",
    "data.workers",
)


def describe_file(path: Path) -> dict[str, int]:
    """Size and checksum of a file."""
    checksum = 0
    with path.open("rb") as file:
        while piece := file.read(1 << 24):
            checksum = zlib.crc32(piece, checksum)
    return {"bytes": path.stat().st_size, "crc32": checksum}


def find_damage(path: Path) -> str | None:
    """What is wrong with a checkpoint's files, None if nothing is."""
    try:
        files = json.loads((path / MANIFEST).read_text())
        for name, expected in files.items():
            if describe_file(path / name) != expected:
                return f"{path / name} is not as it was written"
    except (OSError, ValueError, AttributeError) as error:
        return f"{path}: {error}"
    return None


def choose_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint that is undamaged, from the one that `latest` names on; None if there is none at all.
    Damaged ones behind it are put aside under another name.

    Raises:
        UserError: if all are damaged.
    """
    latest = latest_checkpoint(output)
    if latest is None:
        return None
    candidates = [path for path in list_checkpoints(latest.parent) if step_of(path) <= step_of(latest)]
    for later in list_checkpoints(latest.parent)[len(candidates) :]:  # the run was taken back behind them
        _put_aside(later, "later")
    damaged: dict[Path, str] = {}
    for path in reversed(candidates):
        damage = find_damage(path)
        if damage is None:
            if damaged:
                log.warning("damaged: %s; going on from %s", "; ".join(damaged.values()), path)
            for bad in damaged:
                _put_aside(bad, "damaged")
            return path
        damaged[path] = damage
    raise UserError(
        f"no checkpoint can be used: {'; '.join(damaged.values())}; put a copy back, or start anew in another "
        "--output"
    )


def _put_aside(path: Path, why: str) -> None:
    aside = path.with_name(f"{why}-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    path.rename(aside)


def step_name(step: int) -> str:
    """The directory name of a checkpoint."""
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps done at a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


def latest_checkpoint(output: Path) -> Path | None:
    """The checkpoint that a run continues from, None if it has none: the one that `latest` names, or a newer one that
    was complete before it could be named."""
    folder = output / "checkpoints"
    found = {path.name: path for path in list_checkpoints(folder)}
    try:
        named = found[(folder / "latest").read_text().strip()]
        written = (folder / "latest").stat().st_mtime_ns
    except (OSError, KeyError):  # killed before the very first one was named
        return list(found.values())[-1] if found else None
    newer = [path for path in found.values() if path.stat().st_mtime_ns > written and step_of(path) > step_of(named)]
    return newer[-1] if newer else named


def holds_run(output: Path) -> bool:
    """Whether a directory holds a run or a model already."""
    return any((output / name).exists() for name in (RUN, "checkpoints", cobra.checkpoint.CONFIG))


def write_run(output: Path, config: RunConfig) -> None:
    """Creates the output directory and writes down the settings.

    Raises:
        UserError: if it cannot be created.
    """
    try:
        (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {output} cannot be created ({error}); give another directory") from error
    write_atomic(output / RUN, to_json(config))


def read_run(output: Path) -> RunConfig:
    """The settings of the run in `output`.

    Raises:
        UserError: if there is none.
    """
    path = output / RUN
    try:
        return from_dict(RunConfig, json.loads(path.read_text()), str(path))
    except OSError as error:
        raise UserError(
            f"{output} holds no run to resume ({RUN}: {error.strerror}); use --recipe"
        ) from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not JSON: {error}") from error


def check_same(old: RunConfig, new: RunConfig, output: Path) -> None:
    """Refuses to continue a run under settings that would change its numbers.

    Raises:
        UserError: naming the settings, with old and new value.
    """
    before, after = _flatten(to_dict(old)), _flatten(to_dict(new))
    changed = [
        f"{name} was {before.get(name)!r}, is {after.get(name)!r}"
        for name in sorted(before.keys() | after.keys())
        if before.get(name) != after.get(name) and not name.startswith(FREE_SETTINGS)
    ]
    if changed:
        raise UserError(
            f"{output}: cannot resume with other settings: {'; '.join(changed)}; leave --recipe "
            "and --set away to continue the run as it was, or start another with --init-from"
        )


def write_atomic(path: Path, text: str) -> None:
    """Replaces a text file; a reader sees the old or the new one, never a part."""
    staging = path.with_name(f".{path.name}")
    staging.write_text(text)
    flush(staging)
    staging.replace(path)
    flush(path.parent)


def to_json(config: RunConfig) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix.removesuffix("."): node}
    return {
        name: leaf
        for key, value in node.items()
        for name, leaf in _flatten(value, f"{prefix}{key}.").items()
    }


def flush(path: Path) -> None:
    """Has the operating system write a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
