"""The protocol of a contest: contestants take turns on one machine.

A visit is one measurement of one contestant. The first visit of each warms up; then a round visits all of
them once, every second round backwards (`eval.efficiency.interleaved`), so that a machine that slows down
touches all alike. Reported are median and quartiles over the visits. A contestant has a budget of time: the
slow get fewer visits, the slowest only the first, which then counts; one that does not finish a visit within
the limit, or runs out of memory, is reported as such.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cobra.config import PRESETS, CobraConfig
from cobra.cost import LMCost
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.stack import LMConfig
from cobra.model import Cobra
from eval.efficiency import interleaved, spread
from eval.peers.limits import OutOfTimeError, is_out_of_memory, memory_limit, time_limit
from vision_scan.errors import UserError, choose

# RMS(logits - reference) / RMS(reference), the reference being ours in float32, for 8 and 4 bits with the
# weights rounded likewise: what is left is the rounding of activations to 8 bits, which a deep random model
# amplifies.
TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1, "int8": 0.25, "q8_0": 0.25, "int4": 0.25, "q4_0": 0.25}
# Bits of a weight, scales included: 8 + 16 / 64, 4 + 16 / 32; llama.cpp has a float16 scale for 32 weights.
BITS = {"float32": 32.0, "bfloat16": 16.0, "int8": 8.25, "int4": 4.5, "q8_0": 8.5, "q4_0": 4.5}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is measured and how often.

    Attributes:
        preset: of the Mamba-2 model; the Llama has the shapes of its transformer twin.
        rounds: visits of each contestant.
        threads: of every contestant.
        prompt_tokens: read before decoding; llama_contexts: the same for the Llama.
        decode_tokens: timed tokens of a visit, after `warmup_tokens` untimed ones.
        check_tokens: length of the prompt over which logits are compared.
        batch: of the second row of decoding.
        prefill_lengths, ubatches: tokens read at once; llama.cpp's physical batches to choose from.
        train_tokens: of a training step, batch 1.
        grid, d_inner, d_states: of the two-dimensional scan.
        short_context, long_context, context_chunk: tokens read before decoding, and how many at once.
        budget_s: a contestant's time in a contest, after which it has no further visit.
        limit_s: a visit is given up after so long.
        read_bytes, gemm_size: of the machine's measurement.
        seed: of weights and tokens.
    """

    preset: str = "mamba2-130m"
    rounds: int = 7
    threads: int = 1
    prompt_tokens: int = 64
    llama_contexts: tuple[int, ...] = (64, 2048)
    decode_tokens: int = 24
    warmup_tokens: int = 4
    check_tokens: int = 32
    batch: int = 8
    prefill_lengths: tuple[int, ...] = (2048, 8192)
    ubatches: tuple[int, ...] = (512, 2048)
    train_tokens: int = 2048
    grid: tuple[int, int] = (56, 56)
    d_inner: int = 192
    d_states: tuple[int, ...] = (16, 1)
    short_context: int = 1000
    long_context: int = 1_000_000
    context_chunk: int = 2048
    budget_s: float = 120.0
    limit_s: float = 300.0
    read_bytes: int = 1 << 30
    gemm_size: int = 2048
    seed: int = 0

    def __post_init__(self) -> None:
        layers = self.config.lm.layers
        is_mamba2 = len(set(layers)) == 1 and isinstance(layers[0], Mamba2Config)
        if not is_mamba2 or self._llama_preset not in PRESETS:
            raise UserError(f"preset {self.preset!r}: give one of Mamba-2 layers alone, as mamba2-130m")
        for name in ("rounds", "threads", "budget_s"):
            if not getattr(self, name) >= 1:
                raise UserError(f"{name.removesuffix('_s')} is {getattr(self, name)}: give at least 1")
        if self.long_context < self.short_context:
            raise UserError(f"the longest context is {self.long_context}: give {self.short_context} or more")

    @property
    def config(self) -> CobraConfig:
        return choose("preset", self.preset, PRESETS)

    @property
    def llama(self) -> LMConfig:
        """The transformer of the same parameter count."""
        return PRESETS[self._llama_preset].lm

    @property
    def _llama_preset(self) -> str:
        return f"transformer-{self.preset.removeprefix('mamba2-')}"

    def ids(self, batch: int, seqlen: int, seed: int = 0) -> Tensor:
        """Random tokens, (batch, seqlen) int64."""
        generator = torch.Generator().manual_seed(self.seed + seed)
        return torch.randint(self.config.lm.vocab_size, (batch, seqlen), generator=generator)


@dataclass(frozen=True, kw_only=True)
class Field:
    """What the contests of a run share.

    Attributes:
        model: ours, float32; its language model's weights are everybody's.
        peers: names of the rivals that take part.
        machine: see `eval.machine.measure_machine`.
        folder: for files, removed after the run.
        progress: (title, units) -> context that gives a function to be told of units done.
    """

    settings: Settings
    model: Cobra
    peers: tuple[str, ...]
    machine: dict
    folder: Path
    progress: Callable[[str, int], AbstractContextManager[Callable[[int], None]]]

    @property
    def cost(self) -> LMCost:
        return LMCost(self.settings.config.lm)


@dataclass(kw_only=True)
class Contestant:
    """One row of a table.

    Attributes:
        name: unique in its contest.
        family: ours, or whose it is.
        form: dtype or weight format.
        visit: does the work once: seconds, and a result to be checked (or None).
        ideal_s: seconds on the roofline, None where there is none.
        least_s: seconds that it is known to need, from the measured speed of what it calls; 0: not known.
        facts: further entries of the row.
    """

    name: str
    family: str
    form: str
    visit: Callable[[], tuple[float, Any]]
    ideal_s: float | None = None
    least_s: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Record:
    """What became of a contestant: seconds of its visits, its last result, and why it failed, if it did."""

    seconds: list[float] = field(default_factory=list)
    warmed_up: bool = True
    spent_s: float = 0.0
    result: Any = None
    failed: str | None = None


def race(
    contestants: list[Contestant],
    settings: Settings,
    advance: Callable[[int], None] = lambda units: None,
) -> dict[str, Record]:
    """Lets contestants take turns; `advance` is told of (rounds + 1) units for each of them."""
    records = {one.name: Record() for one in contestants}
    for one in contestants:
        record = records[one.name]
        if one.least_s > settings.limit_s:
            record.failed = f"not tried, its matrix products alone take {one.least_s:.0f} s"
        else:
            _visit(one, record, settings)
        if record.seconds and 2 * record.spent_s > settings.budget_s:
            record.warmed_up = False  # too slow for a visit that does not count
        elif record.seconds:
            record.seconds.clear()
        advance(1)
    for one in interleaved(contestants, settings.rounds):
        record = records[one.name]
        visits = len(record.seconds) + record.warmed_up
        if not record.failed and record.spent_s * (1 + 1 / visits) <= settings.budget_s:
            _visit(one, record, settings)
        advance(1)
    return records


def _visit(one: Contestant, record: Record, settings: Settings) -> None:
    """One visit, its whole time charged to the budget; a failure is noted."""
    start = time.perf_counter()
    try:
        with time_limit(settings.limit_s), memory_limit():
            seconds, record.result = one.visit()
        record.seconds.append(seconds)
    except OutOfTimeError:
        record.failed = f"not one visit within {settings.limit_s:.0f} s"
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        record.failed = "out of memory"
    record.spent_s += time.perf_counter() - start


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of a call, and its result."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def make_row(one: Contestant, record: Record, check: dict | None = None, **facts: Any) -> dict:
    """The row of a contestant: name, family, form, seconds (median, quartiles, visits), whether it warmed up,
    fraction of the roofline, check, why it failed."""
    seconds = spread(record.seconds) if record.seconds else None
    return {
        "name": one.name,
        "family": one.family,
        "form": one.form,
        "seconds": seconds,
        "warmed_up": record.warmed_up,
        "roofline": one.ideal_s / seconds["median"] if seconds and one.ideal_s else None,
        "failed": record.failed,
        "check": check,
        **one.facts,
        **facts,
    }


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected), in float64."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return ((actual - expected).norm() / expected.norm()).item()


def make_check(errors: dict[str, float], tolerance: float) -> dict:
    """A check that passes if no error is above the tolerance, or not a number."""
    passed = all(error <= tolerance for error in errors.values())
    return {"errors": errors, "tolerance": tolerance, "passed": passed}


def fastest(rows: list[dict], **wanted: Any) -> dict | None:
    """The row with the least median among those with these entries."""
    fitting = [row for row in rows if row["seconds"] and all(row.get(k) == v for k, v in wanted.items())]
    return min(fitting, key=lambda row: row["seconds"]["median"], default=None)


def make_ratio(what: str, ours: dict | None, other: dict | None, scale: float = 1.0) -> list[dict]:
    """How many times as fast ours is as the other: [] if one of them has no time.

    Args:
        scale: work of a visit of ours over that of the other's.
    Returns:
        one ratio: what, ours, other (names), times, and low, high from the quartiles.
    """
    if ours is None or other is None or not ours["seconds"] or not other["seconds"]:
        return []
    a, b = ours["seconds"], other["seconds"]
    return [
        {
            "what": what,
            "ours": ours["name"],
            "other": other["name"],
            "times": scale * b["median"] / a["median"],
            "low": scale * b["q1"] / a["q3"],
            "high": scale * b["q3"] / a["q1"],
        }
    ]


def decode_bytes(cost: LMCost, context: int, form: str, batch: int = 1) -> float:
    """Memory traffic of decoding a token in each row: `LMCost.decode_bytes` for every weight format; keys and
    values in 2 bytes except for float32 weights."""
    activation_bytes = 4 if form == "float32" else 2
    return cost.parameters * BITS[form] / 8 + batch * cost.state_traffic_bytes(context, activation_bytes)
