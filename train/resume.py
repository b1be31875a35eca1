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
import random
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import cobra.checkpoint
from train.engine import PlainEngine
from train.lora import is_adapter, merged_tensors, save_adapters
from train.processes import gather
from train.run_directory import MANIFEST, RUN, describe_file, flush, list_checkpoints, step_name, to_json, write_atomic
from train.settings import RunConfig
from vision_scan.errors import UserError

log = logging.getLogger(__name__)

STATE, POSITION = "train_state.safetensors", "train_state.json"


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
            if last:  # known to all: a process that ended would have its launcher end the one that writes
                failed = gather(failed)[0]
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
                flush(self.folder)
            write_atomic(self.folder / "latest", path.name + "\n")
            for old in list_checkpoints(self.folder)[: -self.config.train.keep]:
                old.rename(old.with_name(f".{old.name}"))  # a kill must not leave half of it
            self._clear()
        except Exception as error:  # in a thread of its own, where nobody would see it
            self._error = f"checkpoint {path} could not be written: {error}"
            shutil.rmtree(staging, ignore_errors=True)
            self._error = self._explain(path, tensors, error)

    def _fill(
        self, engine: PlainEngine, staging: Path, tensors: dict[str, Tensor], position: dict[str, Any]
    ) -> None:
        from safetensors.torch import save_file

        model = _starting_with("model.", tensors)
        others = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.")}
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)  # so that nothing of it ever lies elsewhere
        cobra.checkpoint.save(engine.objective.model, staging, model)
        save_file(others, staging / STATE)
        (staging / POSITION).write_text(json.dumps(position) + "\n")
        (staging / RUN).write_text(to_json(self.config))
        files = {file.name: describe_file(file) for file in sorted(staging.iterdir())}
        (staging / MANIFEST).write_text(json.dumps(files, indent=2) + "\n")
        for name in (STATE, POSITION, RUN, MANIFEST):
            flush(staging / name)
        flush(staging)

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
        for leftover in self.folder.glob(".*step-*"):
            # What another process still has open goes the next time.
            shutil.rmtree(leftover, ignore_errors=True)

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
