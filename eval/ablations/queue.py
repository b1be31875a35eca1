"""Works through a study: pictures, towers, trials; in several processes, on several machines, in pieces.

What is done is skipped, and who is at something has a claim on it: a file, made once. So the same command, given again
or given on many machines with one shared folder, takes what is left.
"""

import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from cobra import checkpoint
from eval.ablations import orders
from eval.ablations.trials import DATA, RESULTS, TOWERS, WORK, Study, Trial
from eval.files import read_json, read_lines, write_json
from vision_scan.errors import UserError

CLAIMS = "claims"
STALE_SECONDS = 1800.0  # after which the holder of a claim on another machine is taken to be gone; trials take minutes
POLL_SECONDS = 2.0


@contextlib.contextmanager
def claim(output: Path, name: str) -> Iterator[bool]:
    """Whether nobody else is at something; as long as the block lasts, nobody else will be."""
    path, mark = output / CLAIMS / name, _mark()
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _one_at_a_time(path.parent):  # else two could find a claim stale, and one remove the other's new one
            if _is_stale(path):
                path.unlink(missing_ok=True)
            with open(path, "x", encoding="utf-8") as file:
                file.write(mark)
    except FileExistsError:
        yield False
        return
    try:
        yield True
    finally:
        with contextlib.suppress(FileNotFoundError):
            if path.read_text(encoding="utf-8") == mark:  # and not of another machine, which took us for gone
                path.unlink()


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    with open(folder / ".lock", "w", encoding="utf-8") as file:
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _mark() -> str:
    return f"{socket.gethostname()} {os.getpid()} {_beginning(os.getpid())}\n"


def _beginning(pid: int) -> str:
    """When a process of this machine began, in a unit of the system: numbers of processes come again. "" if unknown."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def _is_stale(path: Path) -> bool:
    try:
        host, pid, beginning = (*path.read_text(encoding="utf-8").split(), "", "", "")[:3]
        age = time.time() - path.stat().st_mtime
    except OSError:
        return False
    if host != socket.gethostname() or not pid.isdecimal():
        return age > STALE_SECONDS
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return bool(beginning) and _beginning(int(pid)) not in ("", beginning)


def open_output(study: Study, output: Path) -> None:
    """Begins a study in a folder, or finds it there.

    Raises:
        UserError: if the folder holds something else, or the study in another version.
    """
    path, mark = output / "study.json", {"study": study.name, "version": study.version}
    is_taken = output.exists() and (not output.is_dir() or any(output.glob("[!.]*")))
    if path.exists():  # looked for behind `is_taken`: another process may have begun the study in between
        found = read_json(path)
        if found == mark:
            return
        if isinstance(found, dict):
            raise UserError(
                f"{output} holds the study {found.get('study')} in version {found.get('version')}, not {study.name} in "
                f"version {study.version}; name another --output"
            )
    if is_taken:
        raise UserError(f"--output {output} exists and is no study; name a new directory")
    write_json(path, mark)


def results(study: Study, output: Path) -> list[dict]:
    """Those that are there, of the study's trials, in their order."""
    paths = (_result(output, trial) for trial in study.trials)
    return [read_json(path) for path in paths if path.exists()]


def read_results(study: Study, file: Path) -> list[dict]:
    """The trials of a results.jsonl.

    Raises:
        UserError: if they are of another study or version.
    """
    records = read_lines(file)
    for record in records:
        if (record.get("study"), record.get("version")) != (study.name, study.version):
            raise UserError(
                f"{file} holds results of {record.get('study')} in version {record.get('version')}, this is "
                f"{study.name} in version {study.version}: they cannot be mixed; leave --begin-with out"
            )
    return records


def take_results(study: Study, output: Path, records: Iterable[dict]) -> int:
    """Takes trials as done, but for those that are; returns how many."""
    missing = {trial.name for trial in study.trials if not _result(output, trial).exists()}
    found = {record["name"]: record for record in records if record.get("name") in missing}
    for name, record in found.items():
        write_json(output / RESULTS / f"{name}.json", record)
    return len(found)


def _result(output: Path, trial: Trial) -> Path:
    return output / RESULTS / f"{trial.name}.json"


def prepare(study: Study, output: Path, progress: Callable) -> None:
    """Draws the pictures and pretrains the towers that are not there; waits for those that somebody else is making."""
    for name, given in study.pictures.items():

        def draw(name=name, given=given) -> None:
            with progress(f"pictures {name}", study.benchmark.count(given)) as advance:
                study.benchmark.build(output / DATA / name, given, lambda *_: advance(1))

        _make(output, f"pictures-{name}", output / DATA / name, draw)
    missing = [name for name in study.towers if not _tower(output, name).exists()]
    with progress("towers", max(1, len(missing))) as advance:
        for name in missing:
            _make(output, f"tower-{name}", _tower(output, name), lambda name=name: _in_process(study, name, output))
            advance(1)


def _tower(output: Path, name: str) -> Path:
    return output / TOWERS / name / checkpoint.CONFIG


def _make(output: Path, name: str, place: Path, make: Callable[[], None]) -> None:
    while not place.exists():
        with claim(output, name) as ours:
            if ours:
                make()
        if not ours:
            time.sleep(POLL_SECONDS)


def _in_process(study: Study, tower: str, output: Path) -> None:
    """In a process of its own, as trials, whose lines go to a file."""
    with _pool(output, 1) as pool:
        pool.submit(_pretrain, study, tower, output).result()


def run(study: Study, output: Path, jobs: int, until: float | None, progress: Callable) -> int:
    """Runs the trials that are left, some at a time.

    Args:
        jobs: processes, of one thread each.
        until: the time.monotonic() from which on no trial is begun any more; None: no limit.
        progress: see cobra/progress.py.
    Returns:
        How many are still to be done here or elsewhere.
    """
    todo = [trial for trial in study.trials if not _result(output, trial).exists()]
    waiting = iter(todo)
    with progress(f"trials of {study.name}", max(1, len(todo))) as advance, _pool(output, jobs) as pool:
        running: set[Future] = set()
        while True:
            is_late = until is not None and time.monotonic() >= until
            while len(running) < jobs and not is_late and (trial := next(waiting, None)) is not None:
                running.add(pool.submit(_try, study, trial, output))
            if not running:
                break
            done, running = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                future.result()
                advance(1)
    return sum(not _result(output, trial).exists() for trial in study.trials)


@contextlib.contextmanager
def _pool(output: Path, jobs: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that leave interrupts to this one, and whose lines go to files."""
    (output / WORK).mkdir(parents=True, exist_ok=True)
    pool = ProcessPoolExecutor(jobs, get_context("spawn"), _begin, (output,))
    try:
        yield pool
    except BaseException:  # an interrupt too: what was begun begins again next time
        for process in list((getattr(pool, "_processes", None) or {}).values()):
            process.kill()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _begin(output: Path) -> None:
    import torch

    from cobra.memory import keep_freed_memory

    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stderr = sys.stdout = open(output / WORK / f"log-{os.getpid()}.txt", "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    orders.load_kept(output)
    torch.set_num_threads(1)  # small models gain nothing from more, and processes side by side lose by it
    keep_freed_memory()


def _pretrain(study: Study, tower: str, output: Path) -> None:
    from eval.ablations.trials import pretrain

    pretrain(study, tower, output)


def _try(study: Study, trial: Trial, output: Path) -> None:
    """Runs a trial, unless somebody else has done it or is at it."""
    from eval.ablations.trials import run_trial

    with claim(output, trial.name) as ours:
        if ours and not _result(output, trial).exists():
            run_trial(study, trial, output)
