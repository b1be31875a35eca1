"""The contest of the two-dimensional selective scan: ours, compiled, against the published recurrence and
against our own form in torch."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

import vision_scan
from eval.peers.contest import (
    Contestant,
    Field,
    Settings,
    fastest,
    make_check,
    make_ratio,
    make_row,
    race,
    rms_ratio,
    timed,
)
from eval.peers.limits import PeakMemory, is_out_of_memory, memory_limit
from vision_scan.ops.reference.grid import read_grids
from vision_scan.ops.register import REFERENCES

TOLERANCE = {"forward": 1e-4, "forward + backward": 1e-3}
ORDER = "cross4"
OURS, CHUNKED = "ours", "our torch form"
# As it is written, each step takes its slice out of one tensor, which costs a tensor of that size for each
# step in the backward pass. Taken apart at once, it costs one in all: the better rival, with the same sums.
UNBOUND, PUBLISHED = "published recurrence, taken apart at once", "published recurrence"


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What is scanned, float32: K visiting lists, the channels d of a grid.

    Attributes:
        grids: u (1, height, width, d), dt (1, K, height, width, d), A (K, d, d_state), B and C (1, K, height,
            width, 1, d_state), D and dt_bias (K, d): what ours takes.
        sequences: the same, with dt (1, K * d, seqlen), B and C (1, K, d_state, seqlen) in the order of the
            lists, A, D and dt_bias flattened to K * d: what the published form gets from its projections.
        weight: (1, height, width, d), the gradient that comes back to the output.
    """

    grids: list[Tensor]
    sequences: list[Tensor]
    weight: Tensor


def make_inputs(grid: tuple[int, int], d_inner: int, d_state: int, seed: int = 0) -> Inputs:
    """Random inputs of the usual sizes; dt is of the size of 0.05 after the softplus."""
    generator = torch.Generator().manual_seed(seed)
    height, width = grid
    lists = vision_scan.order(ORDER, height, width).index.shape[0]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    u, dt = normal(1, height, width, d_inner), 0.5 * normal(1, lists, height, width, d_inner)
    A = -torch.arange(1.0, d_state + 1).expand(lists, d_inner, d_state).contiguous()
    B, C = (normal(1, lists, height, width, 1, d_state) for _ in range(2))
    D, dt_bias = normal(lists, d_inner), normal(lists, d_inner) - 3.0
    grids = [u, dt, A, B, C, D, dt_bias]
    return Inputs(grids=grids, sequences=to_sequences(grids), weight=normal(*u.shape))


def to_sequences(grids: list[Tensor]) -> list[Tensor]:
    """As `Inputs.sequences`; gradients of grids as well."""
    u, dt, A, B, C, D, dt_bias = grids
    index = vision_scan.order(ORDER, *u.shape[1:3]).index
    dt, B, C = (read_grids(t.flatten(2, 3), index) for t in (dt, B, C))
    dt = dt.transpose(2, 3).flatten(1, 2)
    B, C = (t.squeeze(3).transpose(2, 3) for t in (B, C))
    return [u, *(t.contiguous() for t in (dt, A.flatten(0, 1), B, C, D.flatten(), dt_bias.flatten()))]


def published(u, dt, A, B, C, D, dt_bias, at_once: bool = False) -> Tensor:
    """SS2D as it is published, where there is no GPU: the grid is copied along four paths, all decays and
    inflows are computed, the recurrence runs over them in a loop of tokens, and the paths are added up.

    Args:
        u and the rest: as `Inputs.sequences`.
        at_once: take the tensors of all steps apart before the loop, not slice by slice in it.
    Returns:
        (1, height, width, d).
    Source: Liu et al. 2024, "VMamba" (arXiv:2401.10166), cross-scan and cross-merge; Gu & Dao 2023, "Mamba"
    (arXiv:2312.00752), algorithm 2, with the steps of `selective_scan_ref` in mamba_ssm.
    """
    _, height, width, d_inner = u.shape
    rows, columns = u.flatten(1, 2), u.transpose(1, 2).flatten(1, 2)
    paths = torch.stack([rows, columns, rows.flip(1), columns.flip(1)], dim=1)  # batch 4 seqlen d
    x = paths.transpose(2, 3).flatten(1, 2)
    dt = torch.nn.functional.softplus(dt + dt_bias[:, None])
    B, C = (t.repeat_interleave(d_inner, dim=1) for t in (B, C))
    decays = torch.exp(torch.einsum("bdl,dn->bdln", dt, A))
    inflows = torch.einsum("bdl,bdnl,bdl->bdln", dt, B, x)
    state, outputs = torch.zeros_like(decays[:, :, 0]), []
    steps = ((decays[:, :, t], inflows[:, :, t], C[:, :, :, t]) for t in range(x.shape[2]))
    if at_once:
        steps = zip(decays.unbind(2), inflows.unbind(2), C.unbind(3), strict=True)
    for decay, inflow, readout in steps:
        state = decay * state + inflow
        outputs.append(torch.einsum("bdn,bdn->bd", state, readout))
    y = torch.stack(outputs, dim=2) + x * D[:, None]
    y = y.unflatten(1, (4, d_inner))
    by_rows, by_columns = y[:, 0] + y[:, 2].flip(-1), y[:, 1] + y[:, 3].flip(-1)
    by_rows = by_rows.unflatten(-1, (height, width))
    by_columns = by_columns.unflatten(-1, (width, height)).transpose(-1, -2)
    return (by_rows + by_columns).permute(0, 2, 3, 1)


def chunked(u, dt, A, B, C, D, dt_bias) -> Tensor:
    """What runs our operator where nothing is compiled; arguments as `Inputs.grids`."""
    index = vision_scan.order(ORDER, *u.shape[1:3]).index
    return REFERENCES["selective_scan_2d"](u, dt, A, B, C, D, dt_bias, True, index, "sum")


def compiled(u, dt, A, B, C, D, dt_bias) -> Tensor:
    """Ours; arguments as `Inputs.grids`."""
    return vision_scan.selective_scan_2d(u, dt, A, B, C, D, dt_bias, True, ORDER)


FORMS: dict[str, Callable[..., Tensor]] = {
    OURS: compiled,
    CHUNKED: chunked,
    UNBOUND: partial(published, at_once=True),
    PUBLISHED: published,
}
OF_SEQUENCES = (UNBOUND, PUBLISHED)  # they take `Inputs.sequences`, the others `Inputs.grids`


def run(field: Field) -> dict:
    """Measures each d_state, forward alone and with the backward.

    Returns:
        title, unit, rows (with d_state, passes, peak_bytes), ratios.
    """
    settings = field.settings
    rows, ratios = [], []
    for d_state in settings.d_states:
        for passes in TOLERANCE:
            found = _run_one(field, d_state, passes)
            rows += found
            own = fastest(found, family=OURS)
            for rival in (PUBLISHED, UNBOUND, CHUNKED):
                what = f"2-D scan, d_state {d_state}, {passes}, against {rival}"
                ratios += make_ratio(what, own, fastest(found, family=rival))
    height, width = settings.grid
    title = f"2-D selective scan, {ORDER}, {height} x {width}, {settings.d_inner} channels, float32"
    return {"title": title, "unit": "ms", "rows": rows, "ratios": ratios}


def _run_one(field: Field, d_state: int, passes: str) -> list[dict]:
    settings = field.settings
    inputs = make_inputs(settings.grid, settings.d_inner, d_state, settings.seed)
    contestants, units = [], len(FORMS) * (settings.rounds + 2)
    with field.progress(f"2-D scan, d_state {d_state}, {passes}", units) as advance:
        for family in FORMS:
            peak = measure_peak(settings, family, d_state, passes)
            one = Contestant(
                name=f"{family}, d_state {d_state}, {passes}",
                family=family,
                form="float32",
                visit=lambda family=family: timed(lambda: _work(family, inputs, passes)),
                facts={"d_state": d_state, "passes": passes, "peak_bytes": peak},
            )
            contestants.append(one)
            advance(1)
        records = race(contestants, settings, advance)
    reference = records[f"{UNBOUND}, d_state {d_state}, {passes}"].result
    rows = []
    for one in contestants:
        result, check = records[one.name].result, None
        if result is not None and reference is not None:
            names = ("output", "du", "ddt", "dA", "dB", "dC", "dD", "ddt_bias")
            mine = _comparable(one.family, inputs, result)
            theirs = _comparable(UNBOUND, inputs, reference)
            errors = {name: rms_ratio(a, b) for name, a, b in zip(names, mine, theirs, strict=False)}
            check = make_check(errors, TOLERANCE[passes])
        rows.append(make_row(one, records[one.name], check))
    return rows


def _work(family: str, inputs: Inputs, passes: str) -> list[Tensor]:
    """The output, and with the backward the gradients of all inputs."""
    given = inputs.sequences if family in OF_SEQUENCES else inputs.grids
    if passes == "forward":
        with torch.no_grad():
            return [FORMS[family](*given)]
    leaves = [tensor.detach().requires_grad_() for tensor in given]
    y = FORMS[family](*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.weight)]


def _comparable(family: str, inputs: Inputs, result: list[Tensor]) -> list[Tensor]:
    if family in OF_SEQUENCES or len(result) == 1:
        return result
    return [result[0], *to_sequences(result[1:])]


def measure_peak(settings: Settings, family: str, d_state: int, passes: str) -> int | None:
    """Peak memory that a scan adds to its inputs, in a fresh process: bytes; None if it did not fit, or took
    longer than a visit may."""
    arguments = (family, settings.grid, settings.d_inner, d_state, passes, settings.threads, settings.seed)
    program = "import sys; from eval.peers import scans; sys.stdout.write(scans.peak(sys.argv[1]))"
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", program, json.dumps(arguments)]
    environment = os.environ | {"PYTHONPATH": path}
    try:
        run = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True, timeout=settings.limit_s
        )
    except subprocess.TimeoutExpired:
        return None
    return json.loads(run.stdout)


def peak(arguments: str) -> str:
    """What `measure_peak` runs in the other process: both sides as JSON."""
    family, grid, d_inner, d_state, passes, threads, seed = json.loads(arguments)
    torch.set_num_threads(threads)
    _work(family, make_inputs((2, 2), d_inner, d_state, seed), passes)  # loads libraries, starts threads
    inputs = make_inputs(tuple(grid), d_inner, d_state, seed)
    try:
        with memory_limit(), PeakMemory() as memory:
            _work(family, inputs, passes)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return "null"
    return json.dumps(memory.added_bytes)
