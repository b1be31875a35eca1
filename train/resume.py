"""Checkpoints that are whole or absent, and the way back from one to the same numbers.

`OUTPUT/checkpoints/step-000100/` is a model directory with `train_state.pt` (optimizer, random
states, position) and `run.json` (the run's settings); `OUTPUT/checkpoints/latest` names the newest.
A finished run's OUTPUT is a model directory too.
"""

import json
import os
import pickle
import random
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch

import cobra.checkpoint
from cobra.typed_config import from_dict, to_dict
from train.engine import PlainEngine
from train.recipes import RunConfig
from vision_scan.errors import UserError

RUN, STATE = "run.json", "train_state.pt"
# What may change between the parts of a run: nothing that moves a number.
FREE_SETTINGS = (
    "log",
    "train.save_every",
    "train.keep",
    "data.path",
    "data.image_root",
    "data.check",
)


class Checkpoints:
    """The checkpoints of one output directory."""

    def __init__(self, output: Path, config: RunConfig, fingerprint: str) -> None:
        self.folder = output / "checkpoints"
        self.config = config
        self.fingerprint = fingerprint

    def save(self, engine: PlainEngine, step: int) -> None:
        """Writes the checkpoint after `step` steps, on the first process; the others wait.

        All files go to a temporary directory, are flushed to the disk, and appear by one rename.
        """
        random_states = engine.gather(get_random_state())
        path = self.folder / step_name(step)
        if engine.rank == 0 and not path.exists():
            self._clear()
            staging = self.folder / f".{path.name}"
            cobra.checkpoint.save(engine.objective.model, staging)
            state = {
                "step": step,
                "optimizer": engine.optimizer.state_dict(),
                "objective": engine.objective.extra_state(),
                "random": random_states,
                "data": self.fingerprint,
            }
            torch.save(state, staging / STATE)
            (staging / RUN).write_text(_to_json(self.config))
            for name in (STATE, RUN):
                _flush(staging / name)
            _flush(staging)
            staging.rename(path)
            _flush(self.folder)
        if engine.rank == 0:
            write_atomic(self.folder / "latest", path.name + "\n")
            for old in list_checkpoints(self.folder)[: -self.config.train.keep]:
                old.rename(old.with_name(f".{old.name}"))  # a kill must not leave half of it
            self._clear()
        engine.gather(None)

    def _clear(self) -> None:
        """Removes what a kill may have left, and what is no longer wanted."""
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)

    def restore(self, engine: PlainEngine, path: Path) -> int:
        """Puts optimizer, objective and random states back; returns the number of steps done.

        The model itself comes from `cobra.checkpoint.load(path)` before the objective is built.

        Raises:
            UserError: if the state is damaged or the data is not what it was.
        """
        state = read_state(path)
        if state["data"] != self.fingerprint:
            raise UserError(
                f"{self.config.data.path} has changed since {path} was written; put the old file "
                f"back, or start a new run with --init-from {path} --output OTHER"
            )
        engine.objective.load_extra_state(state["objective"])
        engine.optimizer.load_state_dict(state["optimizer"])
        if engine.rank < len(state["random"]):
            set_random_state(state["random"][engine.rank])
        return state["step"]


def read_state(path: Path) -> dict[str, Any]:
    """The `train_state.pt` of a checkpoint; nothing in it is executed."""
    try:
        return torch.load(path / STATE, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path / STATE} is missing, damaged, or holds more than tensors and numbers; write "
            "the name of another checkpoint into the file 'latest' beside it"
        ) from error


def step_name(step: int) -> str:
    """The directory name of a checkpoint."""
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def latest_checkpoint(output: Path) -> Path | None:
    """The checkpoint that a run continues from, None if it has none."""
    folder = output / "checkpoints"
    found = {path.name: path for path in list_checkpoints(folder)}
    try:
        return found[(folder / "latest").read_text().strip()]
    except (OSError, KeyError):  # killed before the very first one was named
        return list(found.values())[-1] if found else None


def holds_run(output: Path) -> bool:
    """Whether a directory holds a run or a model already."""
    return any((output / name).exists() for name in (RUN, "checkpoints", cobra.checkpoint.CONFIG))


def write_run(output: Path, config: RunConfig) -> None:
    """Creates the output directory and writes down the settings."""
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    write_atomic(output / RUN, _to_json(config))


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


def get_random_state() -> dict[str, Any]:
    """The random states of this process, in types that `weights_only` loads."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    return {
        "python": [version, list(words), gauss],
        "numpy": {**numpy, "state": {**numpy["state"], "key": numpy["state"]["key"].tolist()}},
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undoes `get_random_state`."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def write_atomic(path: Path, text: str) -> None:
    """Replaces a text file; a reader sees the old or the new one, never a part."""
    staging = path.with_name(f".{path.name}")
    staging.write_text(text)
    _flush(staging)
    staging.replace(path)
    _flush(path.parent)


def _to_json(config: RunConfig) -> str:
    return json.dumps(to_dict(config), indent=2) + "\n"


def _flatten(node: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(node, dict):
        return {prefix.removesuffix("."): node}
    return {
        name: leaf
        for key, value in node.items()
        for name, leaf in _flatten(value, f"{prefix}{key}.").items()
    }


def _flush(path: Path) -> None:
    """Has the operating system write a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
