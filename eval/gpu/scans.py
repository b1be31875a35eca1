"""Part bench-scan: the 2-D selective scan beside mamba_ssm's with cross-scan and merge, Mamba-2's scan beside
`mamba_chunk_scan_combined`, and the gated delta rule beside fla's; all beside our own form in torch."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import vision_scan
from eval.gpu import rivals
from eval.gpu.operators import FORWARD, Contest, Entrant, measure
from eval.gpu.results import attempt
from eval.gpu.stopwatch import ROUNDS, Stopwatch, nbytes
from eval.gpu.targets import D_STATES, PASSES, delta_name, scan_2d_name, ssd_name
from eval.peers.scans import chunked, compiled, to_sequences
from vision_scan.ops.register import REFERENCES


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of what is measured.

    Attributes:
        batch, grid, d_inner, d_states: of the 2-D scan.
        ssd_batch, seqlen, nheads, headdim, d_state: of Mamba-2's scan, one group; of the gated delta rule, two
            value heads of headdim to a key head of d_state.
        dtype: of activations; parameters are float32.
        checked_rows: the last ones of a batch, computed in float32 as well.
        rounds: visits of each contestant.
    """

    batch: int = 64
    grid: tuple[int, int] = (56, 56)
    d_inner: int = 192
    d_states: tuple[int, ...] = D_STATES
    ssd_batch: int = 8
    seqlen: int = 4096
    nheads: int = 80
    headdim: int = 64
    d_state: int = 128
    dtype: torch.dtype = torch.bfloat16
    checked_rows: int = 1
    rounds: int = ROUNDS
    seed: int = 0


def run(stopwatch: Stopwatch, ceilings: dict, settings: Settings, keep: Callable[[dict], None]) -> None:
    """Measures all, and hands over each row as it is there."""
    for d_state in settings.d_states:
        for passes in PASSES:
            make = partial(scan_2d_contest, stopwatch.device, settings, d_state)
            keep(_measure(stopwatch, ceilings, scan_2d_name(d_state, passes), passes, make, settings.rounds))
    for passes in PASSES:
        make = partial(ssd_contest, stopwatch.device, settings)
        keep(_measure(stopwatch, ceilings, ssd_name(passes), passes, make, settings.rounds))
    for passes in PASSES:
        make = partial(delta_contest, stopwatch.device, settings)
        keep(_measure(stopwatch, ceilings, delta_name(passes), passes, make, settings.rounds))


def _measure(stopwatch, ceilings, name: str, passes: str, make: Callable[[], Contest], rounds: int) -> dict:
    return attempt(name, lambda: measure(stopwatch, ceilings, name, passes, make(), rounds))


def scan_2d_contest(device: torch.device, settings: Settings, d_state: int) -> Contest:
    """Ours takes grids, channels last. The rival takes what its own projections give it: the grid with the
    channels first, and dt, B and C as sequences already; it copies the grid along four paths and adds them up
    again."""
    batch, (height, width), d_inner = settings.batch, settings.grid, settings.d_inner
    normal = _random(device, settings)
    u, dt = normal(batch, height, width, d_inner), normal(batch, 4, height, width, d_inner, scale=0.5)
    A = -torch.arange(1.0, d_state + 1, device=device).expand(4, d_inner, d_state).contiguous()
    B, C = (normal(batch, 4, height, width, 1, d_state) for _ in range(2))
    D, dt_bias = normal(4, d_inner).float(), normal(4, d_inner).float() - 3.0
    weight = normal(*u.shape)
    leaves = [u, dt, A, B, C, D, dt_bias]
    ours = Entrant(name="ours", leaves=leaves, run=compiled, weight=weight)
    torch_form = Entrant(name="our torch form", leaves=leaves, run=chunked, weight=weight, is_rival=False)
    return Contest(
        ours=ours,
        others=[*_mamba_ssm(leaves, weight), torch_form],
        names=("u", "dt", "A", "B", "C", "D", "dt_bias"),
        expected=lambda passes: _of_rows(
            chunked, leaves, weight, settings, (0, 1, 3, 4), torch.float32, passes
        ),
        last_rows=lambda passes: _of_rows(
            compiled, leaves, weight, settings, (0, 1, 3, 4), settings.dtype, passes
        ),
        per_row=(0, 1, 2, 4, 5),
        bytes_moved=lambda passes: _traffic([u, dt, B, C], [u], passes),
        # A state's decay (a product, an exponential), its inflow (two products), its step and its readout.
        flops=lambda passes: (8 if passes == FORWARD else 28) * dt.numel() * d_state,
    )


def _mamba_ssm(leaves: list[Tensor], weight: Tensor) -> list[Entrant | tuple[str, str, bool]]:
    names = ("mamba_ssm in bfloat16", "mamba_ssm in float32")
    try:
        selective_scan_fn = rivals.entry("selective_scan_fn")
    except rivals.MissingRivalError as error:
        return [(name, str(error), True) for name in names]
    height, width = leaves[0].shape[1:3]

    def scan(u, dt, A, B, C, D, dt_bias) -> Tensor:
        y = selective_scan_fn(cross_scan(u), dt, A, B, C, D, None, dt_bias, True)
        return cross_merge(y, height, width)

    sequences = to_sequences(leaves)
    sequences[0] = leaves[0].permute(0, 3, 1, 2).contiguous()
    back = weight.permute(0, 3, 1, 2).contiguous()

    def comparable(result: list[Tensor]) -> list[Tensor]:  # the output, and du
        return [t.permute(0, 2, 3, 1) for t in result[:2]]

    wide = [t.float() for t in sequences]
    return [
        Entrant(name=names[0], leaves=sequences, run=scan, weight=back, comparable=comparable),
        Entrant(name=names[1], leaves=wide, run=scan, weight=back.float(), comparable=comparable),
    ]


def cross_scan(u: Tensor) -> Tensor:
    """(batch, d, height, width) -> (batch, 4 d, seqlen): by rows, by columns, and both backwards.

    Source: Liu et al. 2024, "VMamba" (arXiv:2401.10166)."""
    rows, columns = u.flatten(2), u.transpose(2, 3).flatten(2)
    return torch.cat([rows, columns, rows.flip(-1), columns.flip(-1)], dim=1)


def cross_merge(y: Tensor, height: int, width: int) -> Tensor:
    """What the four paths of `cross_scan` give, added up on the grid."""
    rows, columns, rows_back, columns_back = y.chunk(4, dim=1)
    by_rows, by_columns = rows + rows_back.flip(-1), columns + columns_back.flip(-1)
    by_columns = by_columns.unflatten(-1, (width, height)).transpose(-1, -2)
    return by_rows.unflatten(-1, (height, width)) + by_columns


def ssd_contest(device: torch.device, settings: Settings) -> Contest:
    batch, seqlen, heads, d_state = settings.ssd_batch, settings.seqlen, settings.nheads, settings.d_state
    normal = _random(device, settings)
    x, dt = normal(batch, seqlen, heads, settings.headdim), normal(batch, seqlen, heads, scale=0.5)
    B, C = (normal(batch, seqlen, 1, d_state) for _ in range(2))
    A = -torch.linspace(1.0, 16.0, heads, device=device)
    D, dt_bias = normal(heads).float(), normal(heads).float() - 3.0
    weight = normal(*x.shape)
    leaves = [x, dt, A, B, C, D, dt_bias]

    def ours(x, dt, A, B, C, D, dt_bias) -> Tensor:
        return vision_scan.ssd(x, dt, A, B, C, D, None, dt_bias, True)

    def reference(x, dt, A, B, C, D, dt_bias) -> Tensor:
        limits, nothing = (0.0, float("inf")), (None, None, None)
        return REFERENCES["ssd"](x, dt, A, B, C, D, None, dt_bias, True, *limits, *nothing, 256)[0]

    others: list[Entrant | tuple[str, str, bool]] = []
    try:
        combined = rivals.entry("mamba_chunk_scan_combined")

        def theirs(x, dt, A, B, C, D, dt_bias) -> Tensor:
            return combined(x, dt, A, B, C, 256, D=D, dt_bias=dt_bias, dt_softplus=True)

        others.append(Entrant(name="mamba_chunk_scan_combined", leaves=leaves, run=theirs, weight=weight))
    except rivals.MissingRivalError as error:
        others.append(("mamba_chunk_scan_combined", str(error), True))
    others.append(Entrant(name="our torch form", leaves=leaves, run=reference, weight=weight, is_rival=False))
    per_token = (
        heads * settings.headdim * (4 * d_state + 256) + 256 * d_state
    )  # chunks of 256, half of them masked
    rows = (0, 1, 3, 4)
    return Contest(
        ours=Entrant(name="ours", leaves=leaves, run=ours, weight=weight),
        others=others,
        names=("x", "dt", "A", "B", "C", "D", "dt_bias"),
        expected=lambda passes: _of_rows(reference, leaves, weight, settings, rows, torch.float32, passes),
        last_rows=lambda passes: _of_rows(ours, leaves, weight, settings, rows, settings.dtype, passes),
        per_row=(0, 1, 2, 4, 5),
        bytes_moved=lambda passes: _traffic([x, dt, B, C], [x], passes),
        flops=lambda passes: (1 if passes == FORWARD else 3) * batch * seqlen * per_token,
    )


def delta_contest(device: torch.device, settings: Settings) -> Contest:
    """Ours is fla's too, through our operator, where fla is installed and not only in benchmarks/peers."""
    batch, seqlen, heads = settings.ssd_batch, settings.seqlen, settings.nheads
    head_v_dim, head_k_dim = settings.headdim, settings.d_state
    normal = _random(device, settings)
    q, k = (torch.nn.functional.normalize(normal(batch, seqlen, heads // 2, head_k_dim), dim=-1) for _ in range(2))
    v, weight = (normal(batch, seqlen, heads, head_v_dim) for _ in range(2))
    g, beta = -normal(batch, seqlen, heads, scale=0.1).abs(), normal(batch, seqlen, heads).sigmoid()
    leaves = [q, k, v, g, beta]

    def ours(q, k, v, g, beta) -> Tensor:
        y = vision_scan.gated_delta_rule(q, k, v, g, beta)
        assert isinstance(y, Tensor)
        return y

    def reference(q, k, v, g, beta) -> Tensor:
        more = (head_k_dim**-0.5, None, None, None, 64)
        return REFERENCES["gated_delta_rule"](q, k, v, g, beta, *more)[0]

    others: list[Entrant | tuple[str, str, bool]] = []
    try:
        chunked = rivals.entry("chunk_gated_delta_rule")

        def theirs(q, k, v, g, beta) -> Tensor:
            return chunked(q, k, v, g, beta)[0]

        others.append(Entrant(name="fla", leaves=leaves, run=theirs, weight=weight))
    except rivals.MissingRivalError as error:
        others.append(("fla", str(error), True))
    others.append(Entrant(name="our torch form", leaves=leaves, run=reference, weight=weight, is_rival=False))
    # Three products with the state; within a chunk of 64, half of five with the other tokens.
    per_token = heads * (6 * head_k_dim * head_v_dim + 64 * (3 * head_k_dim + 2 * head_v_dim))
    rows = tuple(range(len(leaves)))
    return Contest(
        ours=Entrant(name="ours", leaves=leaves, run=ours, weight=weight),
        others=others,
        names=("q", "k", "v", "g", "beta"),
        expected=lambda passes: _of_rows(reference, leaves, weight, settings, rows, torch.float32, passes),
        last_rows=lambda passes: _of_rows(ours, leaves, weight, settings, rows, settings.dtype, passes),
        per_row=(0, 1, 2, 3, 4, 5),
        bytes_moved=lambda passes: _traffic(leaves, [v], passes),
        flops=lambda passes: (1 if passes == FORWARD else 3) * batch * seqlen * per_token,
    )


def _random(device: torch.device, settings: Settings) -> Callable[..., Tensor]:
    generator = torch.Generator(device).manual_seed(settings.seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(shape, generator=generator, device=device)).to(settings.dtype)

    return normal


def _of_rows(
    run: Callable[..., Tensor], leaves: list[Tensor], weight: Tensor, settings: Settings,
    with_rows: tuple[int, ...], dtype: torch.dtype, passes: str,
) -> list[Tensor]:  # fmt: skip
    """The work on the last rows alone, activations in `dtype`."""
    rows = settings.checked_rows
    part = [leaf[-rows:].to(dtype) if i in with_rows else leaf for i, leaf in enumerate(leaves)]
    return Entrant(name="", leaves=part, run=run, weight=weight[-rows:].to(dtype)).work(passes)


def _traffic(inputs: list[Tensor], outputs: list[Tensor], passes: str) -> int:
    """Each input read once and each output written once; with the backward the inputs and the outputs'
    gradients once more, and the inputs' gradients written."""
    forward = nbytes(*inputs) + nbytes(*outputs)
    return forward if passes == FORWARD else 2 * forward + nbytes(*inputs)
