"""Ours and others at an operator, forward and with the backward, in one run with checks of their results."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from eval.gpu.results import make_row, other
from eval.gpu.stopwatch import ROUNDS, Stopwatch, Timing, nbytes, race, reason
from eval.gpu.targets import PASSES
from eval.peers.contest import make_check, rms_ratio

TOLERANCE = {torch.bfloat16: 1e-2, torch.float32: 1e-4}
FORWARD = PASSES[0]


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A way to compute an operator.

    Attributes:
        name: in tables.
        leaves: its inputs, in its own layout.
        run: leaves -> output, in its own layout.
        weight: the gradient that comes back to the output.
        comparable: (output, gradients of leaves...) or (output,) -> the same in our layout, for the check;
            only what it returns is compared.
        is_rival: whether ours is to be as fast.
    """

    name: str
    leaves: Sequence[Tensor]
    run: Callable[..., Tensor]
    weight: Tensor
    comparable: Callable[[list[Tensor]], list[Tensor]] = list
    is_rival: bool = True

    def work(self, passes: str) -> list[Tensor]:
        """The output, and with the backward the gradient of each leaf."""
        if passes == FORWARD:
            with torch.no_grad():
                return [self.run(*self.leaves)]
        leaves = [leaf.detach().requires_grad_() for leaf in self.leaves]
        y = self.run(*leaves)
        return [y.detach(), *torch.autograd.grad(y, leaves, self.weight)]


@dataclass(frozen=True, kw_only=True)
class Contest:
    """Ours and others at one operator.

    Attributes:
        ours: an Entrant.
        others: Entrants, or why there is none: (name, reason, is_rival).
        names: of the leaves of ours.
        expected: passes -> the output (and gradients) of the last rows, computed in float32 from the same
            inputs.
        last_rows: passes -> the same from ours, called with these rows alone: it has gradients of parameters
            too, which a call with all rows adds up over them.
        per_row: which entries of (output, gradients...) have rows.
        bytes_moved, flops: passes -> what the work needs at least.
    """

    ours: Entrant
    others: Sequence[Entrant | tuple[str, str, bool]]
    names: Sequence[str]
    expected: Callable[[str], list[Tensor]]
    last_rows: Callable[[str], list[Tensor]]
    per_row: Sequence[int]
    bytes_moved: Callable[[str], int]
    flops: Callable[[str], int]


def measure(
    stopwatch: Stopwatch, ceilings: dict, name: str, passes: str, contest: Contest, rounds: int = ROUNDS
) -> dict:
    """One row: ours with its check, peak memory and the others."""
    expected = contest.expected(passes)
    tolerance = TOLERANCE[contest.ours.leaves[0].dtype]
    check, peak, failed = None, None, ""
    try:
        peak, result = _peak(stopwatch, contest.ours, passes)
        check = check_ours(contest, passes, result, expected, tolerance)
        del result
    except Exception as error:  # noted in the results, so that the rest is measured
        failed = reason(error)
    racing, others = {} if failed else {contest.ours.name: lambda: contest.ours.work(passes)}, []
    facts: dict[str, dict] = {}
    for one in contest.others:
        if isinstance(one, tuple):
            others.append(other(one[0], one[2], Timing(failed=one[1])))
            continue
        try:
            theirs, result = _peak(stopwatch, one, passes)
            error = _check(one.comparable(result), expected, contest, tolerance)
            facts[one.name] = {"check": error, "peak_bytes": theirs}
            racing[one.name] = lambda one=one: one.work(passes)
            del result
        except Exception as error:
            others.append(other(one.name, one.is_rival, Timing(failed=reason(error))))
    timings = race(stopwatch, racing, rounds)
    ours = timings.pop(contest.ours.name, Timing(failed=failed))
    rivals = {one.name: one for one in contest.others if isinstance(one, Entrant)}
    others += [other(key, rivals[key].is_rival, timing, **facts[key]) for key, timing in timings.items()]
    row = make_row(
        name,
        ours.seconds,
        failed=ours.failed,
        bytes_moved=contest.bytes_moved(passes),
        flops=contest.flops(passes),
        ceilings=ceilings,
        check=check,
        others=others,
        peak_bytes=peak,
    )
    return row | {"peak_of_rival": _peak_of_rival(row)}


def _peak(stopwatch: Stopwatch, one: Entrant, passes: str) -> tuple[int | None, list[Tensor]]:
    """Peak memory above inputs and their gradients, after a call that lets libraries allocate theirs."""
    one.work(passes)
    peak, result = stopwatch.added_bytes(lambda: one.work(passes))
    return None if peak is None else peak - nbytes(*result[1:]), result


def check_ours(
    contest: Contest, passes: str, result: list[Tensor], expected: list[Tensor], tolerance: float
) -> dict:
    """The rows that have been computed in float32, out of the whole and alone."""
    check = _check(result, expected, contest, tolerance)
    alone = contest.last_rows(passes)
    names = ("y", *(f"d{name}" for name in contest.names))[: len(expected)]
    errors = {f"{n}, rows alone": rms_ratio(a, b) for n, a, b in zip(names, alone, expected, strict=True)}
    return make_check(check["errors"] | errors, tolerance)


def _check(result: list[Tensor], expected: list[Tensor], contest: Contest, tolerance: float) -> dict:
    names = ("y", *(f"d{name}" for name in contest.names))
    rows = len(expected[0])
    errors = {
        names[i]: rms_ratio(result[i][-rows:], expected[i])
        for i in contest.per_row
        if i < min(len(result), len(expected))
    }
    return make_check(errors, tolerance)


def _peak_of_rival(row: dict) -> float | None:
    """Our added memory over that of the rival that is fastest."""
    if row["times"] is None or row["peak_bytes"] is None:
        return None
    theirs: Any = next(one["peak_bytes"] for one in row["others"] if one["name"] == row["times"]["rival"])
    return row["peak_bytes"] / theirs if theirs else None
