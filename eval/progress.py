"""Progress of the commands: a bar on a terminal, a line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10.0


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how far a command is, on standard error; gives the function that is told of each
    advance.

    Args:
        title: what is going on.
        total: units of the whole.
    """
    if not sys.stderr.isatty():
        yield _lines(title, total)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TaskProgressColumn,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn(title),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(title, total=total)
        yield lambda units: bar.advance(task, units)


def _lines(title: str, total: int) -> Callable[[int], None]:
    began = time.monotonic()
    done, next_line = 0, began + SECONDS_BETWEEN_LINES

    def advance(units: int) -> None:
        nonlocal done, next_line
        done += units
        now = time.monotonic()
        if now >= next_line or done == total:
            left = (now - began) / done * (total - done)
            sys.stderr.write(f"{title}: {done / total:.0%}, {now - began:.0f} s, left {left:.0f} s\n")
            sys.stderr.flush()
            next_line = now + SECONDS_BETWEEN_LINES

    return advance
