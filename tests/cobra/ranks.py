"""Processes that are connected by gloo, started once for all tests of a file."""

import multiprocessing
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOAD = ["torch._dynamo", "pytest"]  # once, in the process that the ranks fork from
PATIENCE_S = 60  # processes that wait for each other forever are a failure, not a hang


class Ranks:
    """`sizes[-1]` processes, and groups of the first so many of them.

    Calling it runs `function(group, *arguments)`, importable by name, on each process of a group and returns
    the results in the order of the ranks. Processes that wait for each other are ended, and with them the
    tests that follow.
    """

    def __init__(self, folder: Path, sizes: tuple[int, ...]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        self.sizes = sizes
        self._pipes, self._processes = [], []
        for rank in range(sizes[-1]):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, folder / "store", rank, sizes), daemon=True)
            process.start()
            self._pipes.append(here)
            self._processes.append(process)

    def __call__(self, size: int, function: Callable, *arguments: Any) -> list:
        pipes = self._pipes[:size]
        for pipe in pipes:
            pipe.send((size, function, arguments))
        results = []
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(PATIENCE_S):
                self.close()
                raise TimeoutError(f"rank {rank} of {size} has not answered")
            result, failure = pipe.recv()
            if failure is not None:
                raise RuntimeError(f"rank {rank} of {size}:\n{failure}")
            results.append(result)
        return results

    def close(self) -> None:
        for process in self._processes:
            process.terminate()
        for process in self._processes:
            process.join()


def _serve(pipe, store: Path, rank: int, sizes: tuple[int, ...]) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=sizes[-1])
    groups = {size: dist.new_group(range(size)) for size in sizes}
    while True:
        size, function, arguments = pipe.recv()
        try:
            pipe.send((function(groups[size], *arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
