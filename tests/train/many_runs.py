"""Several small runs, one after the other, in processes that stay: starting DeepSpeed takes longer than a run.

`python -m tests.train.many_runs PLAN.json` is what each process does; the plan lists runs as {"data", "output",
"changes", "resume", "measure", "spoil"}.
"""

import contextlib
import gc
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from cobra.lm.mamba2 import Mamba2
from tests.train.small_run import ROOT, environment, small_config
from train.engine import BUCKET_ELEMENTS, PlainEngine, ZeroEngine
from train.objectives import Conversation
from train.processes import leave
from train.run import run
from vision_scan.errors import UserError


def launch(arguments: Sequence[str], count: int, **options: Any) -> list[subprocess.Popen[str]]:
    """The same command in `count` processes that know of each other."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    address = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            arguments,
            cwd=ROOT,
            env=environment(**address, RANK=str(rank), LOCAL_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            **options,
        )
        for rank in range(count)
    ]


def run_many(plan: list[dict[str, Any]], count: int, folder: Path) -> None:
    """Carries a plan out in `count` processes.

    Raises:
        AssertionError: with what the processes said, if one failed or hung.
    """
    path = folder / f"plan-{count}.json"
    path.write_text(json.dumps(plan))
    workers = launch([sys.executable, "-m", "tests.train.many_runs", str(path)], count)
    try:
        said = [worker.communicate(timeout=1200)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * count, "\n".join(said)


def watch_dtypes(output: Path) -> Any:
    """Writes down, at the first forward pass of a Mamba-2 layer, in which dtypes its parameters are there."""

    def note(module: torch.nn.Module, inputs: Any) -> None:
        path = output.with_suffix(".dtypes.json")
        if isinstance(module, Mamba2) and not path.exists():
            names = {name: str(parameter.dtype) for name, parameter in module.named_parameters()}
            path.write_text(json.dumps({**names, "input": str(inputs[0].dtype)}))

    return torch.nn.modules.module.register_module_forward_pre_hook(note)


def held_bytes() -> int:
    """Bytes of all tensors that Python knows of, and of gradients."""
    storages: dict[int, int] = {}
    for thing in gc.get_objects():
        if isinstance(thing, torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    storage = tensor.untyped_storage()
                    storages[storage.data_ptr()] = storage.nbytes()
    return sum(size for size in storages.values() if size != 4 * BUCKET_ELEMENTS)


@contextlib.contextmanager
def spoiling(calls: set[int]) -> Iterator[None]:
    """Makes the loss of some micro-batches infinite, counted from 0."""
    compute, seen = Conversation.compute, iter(range(1_000_000))

    def spoiled(self: Conversation, inputs: dict[str, Any]) -> Any:
        loss, stats = compute(self, inputs)
        return (loss * torch.inf if next(seen) in calls else loss), stats

    with mock.patch.object(Conversation, "compute", spoiled):
        yield


@contextlib.contextmanager
def measuring(output: Path) -> Iterator[None]:
    """Writes down what the process holds around a run's last step, beside what it held before the run."""
    gc.collect()
    before, found = held_bytes(), {}

    def watch(kind: type) -> Any:
        step = kind.step

        def watched(self: Any, max_norm: float) -> float:
            found["before the step"] = held_bytes() - before
            norm = step(self, max_norm)
            found["after the step"] = held_bytes() - before
            return norm

        return step, watched

    kept = {kind: watch(kind) for kind in (PlainEngine, ZeroEngine)}
    for kind, (_, watched) in kept.items():
        kind.step = watched
    try:
        yield
    finally:
        for kind, (step, _) in kept.items():
            kind.step = step
        output.with_suffix(".memory.json").write_text(json.dumps(found))


def main() -> None:
    for entry in json.loads(Path(sys.argv[1]).read_text()):
        output = Path(entry["output"])
        config = small_config(Path(entry["data"]), *entry["changes"])
        hook = watch_dtypes(output) if os.environ["RANK"] == "0" else None
        measure = measuring(output) if entry.get("measure") else contextlib.nullcontext()
        try:
            with measure, spoiling(set(entry.get("spoil", ()))):
                run(config, output, resume=entry.get("resume", False))
        except UserError as error:
            output.with_suffix(f".error-{os.environ['RANK']}").write_text(str(error))
        if hook is not None:
            hook.remove()


if __name__ == "__main__":
    main()
    leave(0)
