"""Bounds on a visit, so that a slow or greedy contestant ends as a line in the table and not the run."""

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

MARGIN_BYTES = 1 << 30  # memory that a visit leaves to everything else


class OutOfTimeError(Exception):
    """A visit took longer than its limit."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises OutOfTimeError in the block once `seconds` have passed, but between two Python instructions: a
    long call into C++ ends first. Does nothing outside the main thread, where there are no signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_) -> None:
        raise OutOfTimeError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@contextmanager
def memory_limit() -> Iterator[None]:
    """Inside the block an allocation fails when the machine's free memory is used up, instead of the system
    killing the process. Does nothing where /proc does not tell."""
    room = _read_bytes("/proc/meminfo", "MemAvailable")
    size = _read_bytes("/proc/self/status", "VmSize")
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    if room is None or size is None or soft != resource.RLIM_INFINITY:
        yield
        return
    resource.setrlimit(resource.RLIMIT_AS, (size + max(room - MARGIN_BYTES, MARGIN_BYTES), hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that an allocation failed; torch raises a RuntimeError of its own."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


class PeakMemory:
    """Peak of this process's resident memory over a block, above what it was before.

    Attributes:
        added_bytes: the difference, 0 until the block has ended.
    """

    def __enter__(self) -> "PeakMemory":
        self.added_bytes = 0
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from VmRSS
        self._before = _peak_bytes()
        return self

    def __exit__(self, *_) -> None:
        self.added_bytes = max(0, _peak_bytes() - self._before)


def _peak_bytes() -> int:
    found = _read_bytes("/proc/self/status", "VmHWM")
    return found if found is not None else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _read_bytes(path: str, key: str) -> int | None:
    """The value in bytes of a line "key:  123 kB"."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    found = [line.split()[1] for line in lines if line.startswith(f"{key}:")]
    return 1024 * int(found[0]) if found else None
