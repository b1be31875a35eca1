"""Progress of the commands: a bar on a terminal, a line now and then elsewhere."""

import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def on_terminal() -> bool:
    """Whether a bar can be drawn on standard error."""
    return sys.stderr.isatty() and importlib.util.find_spec("rich") is not None


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """Shows how far a command is, on standard error; gives the function that is told of each advance. What is over
    within seconds leaves no line in a log.

    Args:
        title: what is going on.
        total: units of the whole.
    """
    if not on_terminal():
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

    left = TextColumn("left"), TimeRemainingColumn()
    columns = TextColumn(title), BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), *left
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
        if now >= next_line or (done == total and now >= began + SECONDS_BETWEEN_LINES):
            left = (now - began) / done * (total - done)
            sys.stderr.write(f"{title}: {done / total:.0%}, {now - began:.0f} s, left {left:.0f} s\n")
            sys.stderr.flush()
            next_line = now + SECONDS_BETWEEN_LINES

    return advance


def track(items: Iterable[T], what: str, total: int | None = None, show: bool = True) -> Iterator[T]:
    """The items, with their progress on standard error if that takes longer than some seconds.

    Args:
        items: what is gone through.
        what: what is done to them.
        total: how many there are, if that is known.
        show: False: only hands the items on.
    """
    if not show:
        yield from items
    elif on_terminal():
        from rich.console import Console
        from rich.progress import track as bar

        yield from bar(items, what, total, console=Console(stderr=True), transient=True)
    else:
        next_line = time.monotonic() + SECONDS_BETWEEN_LINES
        for number, item in enumerate(items, start=1):
            yield item
            if time.monotonic() >= next_line:
                next_line = time.monotonic() + SECONDS_BETWEEN_LINES
                of = f" of {total:,}" if total is not None else ""
                print(f"{what}: {number:,}{of}", file=sys.stderr, flush=True)  # noqa: T201
