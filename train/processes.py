"""The processes of a run: who they are, how they find each other, and what they tell each other.

A launcher says so in the environment: torchrun and deepspeed by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT; Slurm's srun, with one task for each device, by its own variables.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, Literal, NoReturn, TypeVar

import torch
import torch.distributed as dist

from cobra.lm.precision import has_native_bf16
from vision_scan.errors import UserError

MASTER_PORTS = 20000, 10000  # of Slurm jobs: the first, and how many; a fixed one would clash on a shared node
LEAVING_SECONDS = 5.0  # the first process waits at most so long for others that are leaving too

T = TypeVar("T")


class LostProcessError(RuntimeError):
    """Another process is gone, or does not answer."""


def adopt_slurm() -> None:
    """Puts what srun says into the variables that torch reads, unless a launcher has set them.

    Raises:
        UserError: if the job has several tasks and their first host cannot be found out.
    """
    environment = os.environ
    if "RANK" in environment or "SLURM_PROCID" not in environment or "SLURM_STEP_ID" not in environment:
        return
    num_tasks = int(environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", 1)))
    if num_tasks == 1:
        return
    job = int(environment.get("SLURM_JOB_ID", 0))
    first, count = MASTER_PORTS
    values = {
        "RANK": environment["SLURM_PROCID"],
        "LOCAL_RANK": environment.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": str(num_tasks),
        "MASTER_PORT": str(first + job % count),
    }
    if "MASTER_ADDR" not in environment:
        values["MASTER_ADDR"] = _first_host(environment.get("SLURM_STEP_NODELIST", ""))
    for name, value in values.items():
        environment.setdefault(name, value)


def _first_host(nodes: str) -> str:
    try:
        found = subprocess.run(
            ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
        )
        return found.stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise UserError(
            f"cannot find the first host of {nodes!r} by scontrol; set MASTER_ADDR in the job script"
        ) from error


def is_first() -> bool:
    """Whether this process speaks for all."""
    return os.environ.get("RANK", "0") == "0"


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no CUDA device; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", 0))
    # A launcher may show each process its own device only.
    device = torch.device("cuda", local if local < torch.cuda.device_count() else 0)
    torch.cuda.set_device(device)
    return device


def autocast_dtype(
    name: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> torch.dtype | None:
    """The dtype of the autocast forward pass, None for float32."""
    if name == "auto":
        name = "bfloat16" if has_native_bf16(device) else "float32"
    return torch.bfloat16 if name == "bfloat16" else None


def join_processes(engine: str, device: torch.device, timeout: float = 30.0) -> tuple[int, int]:
    """Connects the processes that a launcher started: (rank, number of processes).

    A single process without a launcher needs no address or port: it talks to itself. Processes
    that are connected already stay so, for the next run.

    Args:
        engine: of the run.
        device: of this process.
        timeout: minutes that a process waits for the others before it gives up.
    Raises:
        UserError: if there are several processes and the engine is plain.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if engine == "plain":
        if world_size > 1:
            raise UserError(
                f"train.engine=plain runs 1 process, got {world_size}; use train.engine=deepspeed"
            )
        return 0, 1
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        limit = timedelta(minutes=timeout)
        if "RANK" in os.environ:
            address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            with name_lost(f"while {world_size} processes were to meet at {address}"):
                dist.init_process_group(backend, timeout=limit)
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=limit)
    return dist.get_rank(), dist.get_world_size()


def share_rows(count: int) -> dist.ProcessGroup | None:
    """The `count` processes, this one among them, that read each row together; None if each reads its own.

    Raises:
        UserError: if the processes cannot be divided so.
    """
    if count == 1:
        return None
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size % count:
        raise UserError(
            f"train.sequence_parallel={count} does not divide the {world_size} processes; start a multiple of it"
        )
    groups = [dist.new_group(range(first, first + count)) for first in range(0, world_size, count)]
    group = groups[dist.get_rank() // count]
    assert isinstance(group, dist.ProcessGroup)
    return group


def limit_waiting(timeout: float) -> None:
    """Has every group of processes, those of libraries too, give up after so many minutes; a new group of torch's takes
    torch's own limit."""
    if dist.is_initialized():
        torch_c10d = dist.distributed_c10d
        limit = getattr(torch_c10d, "set_timeout", None) or torch_c10d._set_pg_timeout  # its name before torch 2.15
        for group in list(torch_c10d._world.pg_map):
            limit(timedelta(minutes=timeout), group)


def leave_processes() -> None:
    """Undoes `join_processes`, for good: DeepSpeed cannot begin again in the same process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def leave(status: int) -> NoReturn:
    """Ends the process with a status that a scheduler acts on. One of several ends at once: threads of the connections
    between them, met by the destructors of their libraries, now and then abort a process that is done."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        sys.exit(status)
    sys.stdout.flush()
    sys.stderr.flush()
    _wait_for_the_others()
    os._exit(status)


def _wait_for_the_others() -> None:
    """The first process holds what the others make their connections through. If it went while one of them is still
    at that, that one would end with an error of the network and not with the line that all of them have."""
    if not dist.is_initialized():
        return
    store = dist.distributed_c10d._get_default_store()
    until = time.monotonic() + LEAVING_SECONDS
    with contextlib.suppress(RuntimeError):  # somebody is gone already
        gone = store.add("cobra/leaving", 1)
        while dist.get_rank() == 0 and gone < dist.get_world_size() and time.monotonic() < until:
            time.sleep(0.05)
            gone = store.add("cobra/leaving", 0)


def gather(item: Any) -> list[Any]:
    """An object of each process, in the order of their ranks."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def on_first(function: Callable[[], T]) -> T:
    """What `function` gives on the first process, on all of them; its error too, so that nobody waits for it in vain.

    Raises:
        Exception: what it raised.
    """
    result: T | Exception | None = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            result = function()
        except Exception as error:
            result = error
    result = gather(result)[0]
    if isinstance(result, Exception):
        raise result
    return result  # pyright: ignore[reportReturnType]


@contextlib.contextmanager
def name_lost(when: str) -> Iterator[None]:
    """Turns torch's error about a process that is gone, or a collective that took too long, into one line.

    Raises:
        LostProcessError: with who noticed it and what to do.
    """
    try:
        yield
    except dist.DistError as error:
        raise _lost(when, error) from error
    except RuntimeError as error:
        if not is_about_processes(error):
            raise
        raise _lost(when, error) from error


def is_about_processes(error: RuntimeError) -> bool:
    """Whether an error of torch comes from the connection between processes."""
    text = str(error)
    signs = ("Connection closed by peer", "Connection reset by peer", "Timed out", "timed out", "NCCL", "gloo")
    return any(sign in text for sign in signs)


def _lost(when: str, error: Exception) -> LostProcessError:
    rank = os.environ.get("RANK", "0")
    reason = " ".join(str(error).split())[:200]
    return LostProcessError(
        f"process {rank} on {socket.gethostname()} lost another one {when} ({reason}); look for the first error of the "
        "other processes (killed for memory, node down), then run again with --resume; raise train.timeout if they "
        "were only slow"
    )
