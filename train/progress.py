"""Progress of what takes long: a bar on a terminal, a line every few seconds elsewhere."""

import importlib.util
import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 10.0


def on_terminal() -> bool:
    """Whether a bar can be drawn on standard error."""
    return sys.stderr.isatty() and importlib.util.find_spec("rich") is not None


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
