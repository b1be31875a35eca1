"""Checkpoints that are whole or absent, and the way back from one to the same numbers.

`OUTPUT/checkpoints/step-000100/` is a model directory with `train_state.safetensors` (what the optimizer keeps of each
parameter, by name), `train_state.json` (position, random states), `run.json` (the run's settings) and `manifest.json`
(size and checksum of every file); `OUTPUT/checkpoints/latest` names the newest. Its form does not depend on the engine,
the ZeRO stage or the number of processes, so a run may be continued with others. A finished run's OUTPUT is a model
directory too. Adapters (lora.py) are merged into the weights of a model directory; `train_state.safetensors` has them
as they are, and a finished run writes them to `OUTPUT/adapter` for peft.
"""

import json
import logging
import os
import random
import shutil
import threading
import time
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cobra.checkpoint
from cobra.typed_config import from_dict, to_dict
from train.engine import PlainEngine
from train.lora import is_adapter, merged_tensors, save_adapters
from train.processes import gather
from train.recipes import RunConfig
from vision_scan.errors import UserError

log = logging.getLogger(__name__)

RUN, STATE, POSITION, MANIFEST = "run.json", "train_state.safetensors", "train_state.json", "manifest.json"
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
    "data.workers",
)


class CheckpointError(RuntimeError):
    """A checkpoint that had to be written could not be."""


class Checkpoints:
    """The checkpoints of one output directory.

    The state is copied while the training waits, and written beside it. A checkpoint that cannot be written (a full
    disk) is a warning while the training can go on; the one before it stays.
    """

    def __init__(self, output: Path, config: RunConfig, fingerprint: str) -> None:
        self.folder = output / "checkpoints"
        self.config = config
        self.fingerprint = fingerprint
        self._writer: threading.Thread | None = None
        self._error: str | None = None

    def save(self, engine: PlainEngine, step: int, last: bool = False) -> float:
        """Writes the checkpoint after `step` steps, on the first process.

        All files go to a temporary directory, are flushed to the disk, and appear by one rename.

        Args:
            engine: has the state.
            step: steps done.
            last: wait until it is written.
        Returns:
            the seconds for which the training stood still.
        Raises:
            CheckpointError: if the last checkpoint cannot be written; the one before it is still there.
        """
        began = time.perf_counter()
        self._join()
        random_states = gather(get_random_state())
        path = self.folder / step_name(step)
        tensors = snapshot(engine)
        if engine.rank == 0:
            position = {
                "step": step,
                "data": self.fingerprint,
                "random": [state["words"] for state in random_states],
            }
            for rank, state in enumerate(random_states):
                for kind, value in state["tensors"].items():
                    tensors[f"random:{rank}:{kind}"] = value
            self._writer = threading.Thread(
                target=self._write, args=(engine, path, tensors, position), name="checkpoint"
            )
            self._writer.start()
        if last or not self.config.train.async_save:
            failed = self._join()
            if last and failed:
                raise CheckpointError(failed)
        return time.perf_counter() - began

    def close(self) -> None:
        """Waits for what is still being written."""
        self._join()

    def _join(self) -> str | None:
        """Waits for the writer; what went wrong, which is logged too."""
        if self._writer is not None:
            self._writer.join()
        self._writer, error, self._error = None, self._error, None
        if error:
            log.error(error)
        return error

    def _write(
        self, engine: PlainEngine, path: Path, tensors: dict[str, Tensor], position: dict[str, Any]
    ) -> None:
        staging = self.folder / f".{path.name}"
        try:
            if not path.exists():
                self._clear()
                self._fill(engine, staging, tensors, position)
                staging.rename(path)
                _flush(self.folder)
            write_atomic(self.folder / "latest", path.name + "\n")
            for old in list_checkpoints(self.folder)[: -self.config.train.keep]:
                old.rename(old.with_name(f".{old.name}"))  # a kill must not leave half of it
            self._clear()
        except Exception as error:  # in a thread of its own, where nobody would see it
            shutil.rmtree(staging, ignore_errors=True)
            self._error = self._explain(path, tensors, error)

    def _fill(
        self, engine: PlainEngine, staging: Path, tensors: dict[str, Tensor], position: dict[str, Any]
    ) -> None:
        from safetensors.torch import save_file

        model = _starting_with("model.", tensors)
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.")}
        cobra.checkpoint.save(engine.objective.model, staging, model)
        save_file(others, staging / STATE)
        (staging / POSITION).write_text(json.dumps(position) + "\n")
        (staging / RUN).write_text(_to_json(self.config))
        files = {file.name: describe_file(file) for file in sorted(staging.iterdir())}
        (staging / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")
        for name in (STATE, POSITION, RUN, MANIFEST):
            _flush(staging / name)
        _flush(staging)

    def _explain(self, path: Path, tensors: dict[str, Tensor], error: Exception) -> str:
        needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
        room = ""
        if self.folder.exists():
            room = f"; it takes {needed / 1e9:.2f} GB, {shutil.disk_usage(self.folder).free / 1e9:.2f} GB are free"
        before = list_checkpoints(self.folder)
        kept = f"the newest one is {before[-1]}" if before else "there is none yet"
        return (
            f"checkpoint {path} could not be written: {error}{room}; {kept}; make room, or lower train.keep "
            "(--resume --set train.keep=1)"
        )

    def _clear(self) -> None:
        """Removes what a kill may have left, and what is no longer wanted."""
        for leftover in self.folder.glob(".step-*"):
            shutil.rmtree(leftover)

    def restore(self, engine: PlainEngine, path: Path) -> int:
        """Puts optimizer, objective and random states back; returns the number of steps done.

        The model itself comes from `train.init.load_model` before the objective is built.

        Raises:
            UserError: if the state is damaged or the data is not what it was.
        """
        from safetensors import safe_open

        position = read_position(path)
        if position["data"] != self.fingerprint:
            raise UserError(
                f"{self.config.data.path} has changed since {path} was written; put the old file "
                f"back, or start a new run with --init-from {path} --output OTHER"
            )
        with safe_open(path / STATE, framework="pt") as file:
            keys: dict[str, list[str]] = {}
            for name in file.keys():  # noqa: SIM118 (no mapping)
                keys.setdefault(name.rpartition(":")[0], []).append(name)

            def read(name: str) -> dict[str, Tensor]:
                return {key.rpartition(":")[2]: file.get_tensor(key) for key in keys.get(f"optimizer:{name}", [])}

            engine.load_optimizer_state(read)
            self._restore_random(engine, position, file)
        return position["step"]

    def _restore_random(self, engine: PlainEngine, position: dict[str, Any], file: Any) -> None:
        """Of a process that was not there before: from the seed, the step and its number."""
        if engine.rank >= len(position["random"]):
            torch.manual_seed(hash((self.config.train.seed, position["step"], engine.rank)))
            return
        prefix = f"random:{engine.rank}:"
        names = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        tensors = {key.removeprefix(prefix): file.get_tensor(key) for key in names}
        set_random_state({"words": position["random"][engine.rank], "tensors": tensors})


def snapshot(engine: PlainEngine, with_optimizer: bool = True) -> dict[str, Tensor]:
    """Copies, on the CPU of the first process, of what a run is made of: `model.NAME`, adapters merged in,
    `adapter:model.NAME`, `objective:NAME` and `optimizer:PARAMETER:KEY`. To be called by all processes."""
    tensors: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        if engine.rank == 0:
            tensors[name] = torch.empty_like(tensor, device="cpu", memory_format=torch.contiguous_format).copy_(tensor)

    for name, tensor in engine.weights():
        keep(name, tensor)
    for name, value in engine.objective.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.nn.Parameter):  # buffers
            keep(name, value)
    adapters = {f"adapter:{name}": tensor for name, tensor in tensors.items() if is_adapter(name)}
    merged = merged_tensors(engine.objective, tensors)
    tensors = {name if name.startswith("model.") else f"objective:{name}": value for name, value in merged.items()}
    tensors |= adapters
    for name, state in engine.optimizer_state() if with_optimizer else ():
        for key, value in state.items():
            keep(f"optimizer:{name}:{key}", value)
    return tensors


def save_model(engine: PlainEngine, path: Path) -> None:
    """Writes the model alone, and its adapters if it has any, on the first process; to be called by all."""
    tensors = snapshot(engine, with_optimizer=False)
    if engine.rank == 0:
        model, adapters = _starting_with("model.", tensors), _starting_with("adapter:model.", tensors)
        if adapters:
            save_adapters(engine.objective.model, path / "adapter", model | adapters)
        cobra.checkpoint.save(engine.objective.model, path, model)


def _starting_with(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def read_state(path: Path, prefix: str) -> dict[str, Tensor]:
    """What a checkpoint has beside the model under names with a prefix: "objective:", parameters of the objective that
    are not the model's; "adapter:model.", the model's adapters. Without the prefix."""
    from safetensors import safe_open

    with safe_open(path / STATE, framework="pt") as file:
        names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118
        return {name.removeprefix(prefix): file.get_tensor(name) for name in names}


def read_position(path: Path) -> dict[str, Any]:
    """The `train_state.json` of a checkpoint."""
    return json.loads((path / POSITION).read_text())


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
    damaged: dict[Path, str] = {}
    for path in reversed(candidates):
        damage = find_damage(path)
        if damage is None:
            if damaged:
                log.warning("damaged: %s; going on from %s", "; ".join(damaged.values()), path)
            for bad in damaged:
                aside = bad.with_name(f"damaged-{bad.name}")
                shutil.rmtree(aside, ignore_errors=True)
                bad.rename(aside)
            return path
        damaged[path] = damage
    raise UserError(
        f"no checkpoint can be used: {'; '.join(damaged.values())}; put a copy back, or start anew in another "
        "--output"
    )


def step_name(step: int) -> str:
    """The directory name of a checkpoint."""
    return f"step-{step:06d}"


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints of a folder, oldest first."""
    return sorted(folder.glob("step-*"), key=step_of)


def step_of(checkpoint: Path) -> int:
    """The steps done at a checkpoint."""
    return int(checkpoint.name.removeprefix("step-"))


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
    """The random states of this process: `words` for JSON, and `tensors`."""
    version, words, gauss = random.getstate()
    numpy = np.random.get_state(legacy=False)
    tensors = {"torch": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["cuda"] = torch.cuda.get_rng_state()
    key = numpy["state"]["key"].tolist()
    return {
        "words": {
            "python": [version, list(words), gauss],
            "numpy": {**numpy, "state": {**numpy["state"], "key": key}},
        },
        "tensors": tensors,
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Undoes `get_random_state`."""
    version, words, gauss = state["words"]["python"]
    random.setstate((version, tuple(words), gauss))
    numpy = state["words"]["numpy"]
    key = np.array(numpy["state"]["key"], dtype=np.uint32)
    np.random.set_state({**numpy, "state": {**numpy["state"], "key": key}})
    torch.set_rng_state(state["tensors"]["torch"])
    if "cuda" in state["tensors"] and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["tensors"]["cuda"])


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
