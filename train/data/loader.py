"""Batches made ahead of the step that needs them, in processes of their own."""

import signal
from collections.abc import Callable, Generator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from train.data.collate import Batch
from train.data.rows import BadRowError

STEPS_AHEAD = 2  # of each worker

Loaded = list[Batch] | BadRowError
"""The micro-batches of a step, or what is wrong with one of their rows."""


class Steps(Dataset):
    """A source of batches as a map from steps."""

    def __init__(self, source: Callable[[int], list[Batch]]) -> None:
        self.source = source

    def __getitem__(self, step: int) -> Loaded:
        try:
            return self.source(step)
        except BadRowError as error:  # as a value: a worker would lose its type and its one line
            return error


def load_steps(
    source: Callable[[int], list[Batch]], start: int, end: int, workers: int, pin_memory: bool = False
) -> Generator[Loaded, None, None]:
    """The batches of the steps from `start` to `end`, in order; with workers or without, they are the same. To be
    closed where they are not gone through to the end.

    Args:
        source: makes them.
        start, end: steps.
        workers: processes that make them ahead; 0: each is made when it is asked for.
        pin_memory: put them where a GPU copies them from beside its work.
    """
    steps = Steps(source)
    if workers == 0:
        yield from (steps[step] for step in range(start, end))
        return
    loader = DataLoader(
        steps,
        batch_size=None,
        sampler=range(start, end),
        num_workers=workers,
        prefetch_factor=STEPS_AHEAD,
        pin_memory=pin_memory,
        worker_init_fn=_ignore_signals,
        multiprocessing_context="fork",  # the rows' index is shared, not copied
        # Of its own: the random state of the run must not depend on how batches are made.
        generator=torch.Generator().manual_seed(0),
    )
    batches: Any = iter(loader)
    try:
        yield from batches
    finally:
        # Workers do not hear the signal by which a process that fails would end them, and it would wait for them.
        batches._shutdown_workers()


def _ignore_signals(worker: int) -> None:
    """A request to stop reaches every process of a job; the run finishes its step first, and needs its workers."""
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
