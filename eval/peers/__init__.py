"""Our models beside rivals, in one run on one machine: decoding, reading, training, the 2-D scan, long
contexts. `contest.py` has the protocol."""

import gc
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

import cobra
from cobra.cost import LMCost
from eval.environment import describe_environment
from eval.machine import measure_machine
from eval.peers import context, decoding, prefill, scans, training
from eval.peers.contest import Field, Settings
from eval.peers.llama_cpp import system_info
from vision_scan.errors import UserError, choose

# What a rival needs: modules, and the extra that installs them.
PEERS = {"transformers": (("transformers",), "hf"), "llama.cpp": (("llama_cpp", "gguf"), "bench")}
CONTESTS = {
    "decode": decoding.run,
    "prefill": prefill.run,
    "training": training.run,
    "scan_2d": scans.run,
    "context": context.run,
}
FORMAT = 1


@contextmanager
def no_progress(title: str, units: int) -> Iterator[Callable[[int], None]]:
    """Stands in for `cobra.progress.progress` where nobody watches."""
    yield lambda units: None


def check_names(peers: Sequence[str], contests: Sequence[str]) -> None:
    """Raises UserError on unknown names, and on peers that are not installed."""
    for name in contests:
        choose("contest", name, CONTESTS)
    for name in peers:
        modules, extra = choose("peer", name, PEERS)
        if any(find_spec(module) is None for module in modules):
            raise UserError(f"{name} is not installed: pip install 'cobra-vlm[{extra}]'")


def measure(
    settings: Settings,
    peers: Sequence[str] = tuple(PEERS),
    contests: Sequence[str] = tuple(CONTESTS),
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]] = no_progress,
    keep: Callable[[dict], None] = lambda result: None,
) -> dict:
    """Runs contests one after the other.

    Args:
        peers: keys of PEERS.
        contests: keys of CONTESTS.
        progress: as `cobra.progress.progress`.
        keep: called with the result so far after each contest, so that an interruption costs one.
    Returns:
        A JSON-able dict: format, peers, settings, environment, llama_cpp (what it was compiled for, None if
        it does not take part), machine (see `measure_machine`), load_before (processes that were running in
        the minute before), parameters (of ours, and of the Llama), contests (name -> title, unit, rows,
        ratios), passed (whether all checks have).
    Raises:
        UserError: on unknown names and missing packages.
    """
    check_names(peers, contests)
    threads, load = torch.get_num_threads(), os.getloadavg()[0]
    torch.set_num_threads(settings.threads)
    try:
        with tempfile.TemporaryDirectory(prefix="cobra-peers-") as folder:
            field = Field(
                settings=settings,
                model=cobra.build(settings.preset, seed=settings.seed),
                peers=tuple(peers),
                machine=measure_machine(settings.read_bytes, settings.gemm_size),
                folder=Path(folder),
                progress=progress,
            )
            result = _head(field, load)
            for name in contests:
                result["contests"][name] = CONTESTS[name](field)
                result["passed"] = all(
                    passed(row) for contest in result["contests"].values() for row in contest["rows"]
                )
                keep(result)
                gc.collect()
    finally:
        torch.set_num_threads(threads)
    return result


def _head(field: Field, load: float) -> dict:
    """A result without contests."""
    settings = field.settings
    return {
        "format": FORMAT,
        "peers": list(field.peers),
        "settings": asdict(settings),
        "environment": describe_environment(),
        "llama_cpp": system_info() if "llama.cpp" in field.peers else None,
        "machine": field.machine,
        "load_before": load,
        "parameters": {
            settings.preset: field.cost.parameters,
            "Llama": LMCost(settings.llama).parameters,
        },
        "contests": {},
        "passed": True,
    }


def passed(row: dict) -> bool:
    """Whether nothing is known to be wrong with a row."""
    return row["check"] is None or row["check"]["passed"]
