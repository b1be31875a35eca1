"""The operators of one dimension behind one face, and random inputs for them.

A sample is (tensors, options): the differentiable inputs by name, and everything else. Padding and
segments are written as strings, one per row: "..0011" is two pads, then two segments of two tokens.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

import vision_scan
from tests.vision_scan import truth
from vision_scan.ops.reference.causal_conv1d import causal_conv1d_recurrent
from vision_scan.ops.reference.gated_delta_rule import gated_delta_rule_recurrent
from vision_scan.ops.reference.gated_rmsnorm import gated_rmsnorm_by_group
from vision_scan.ops.reference.selective_scan import selective_scan_recurrent
from vision_scan.ops.reference.ssd import ssd_recurrent

Sample = tuple[dict[str, Tensor], dict]


@dataclass(frozen=True)
class Operator:
    """The public operator, its recurrence and its truth, each -> tuple of outputs, and its sampler.

    `token_axis`: of every input that has tokens; the first one names the output's.
    """

    run: Callable[..., tuple[Tensor, ...]]
    recurrence: Callable[..., tuple[Tensor, ...]]
    truth: Callable[..., tuple[np.ndarray, ...]]
    token_axis: Mapping[str, int]
    sample: Callable[..., Sample]


def segments(*rows: str) -> Tensor:
    return torch.tensor([[-1 if token == "." else int(token) for token in row] for row in rows])


def relayout(t: Tensor, layout: str) -> Tensor:
    """The same values, laid out as asked: plain, a slice of a wider tensor, or transposed."""
    if layout == "plain" or t.dim() == 0:
        return t
    if layout == "transposed":
        return t.movedim(0, -1).contiguous().movedim(-1, 0)
    wide = torch.full((*t.shape[:-1], t.shape[-1] + 3), 1e4, dtype=t.dtype)
    wide[..., 1:-2] = t
    return wide[..., 1:-2]


class _Random:
    """Inputs of one sample: activations in the model's dtype, parameters in float32 or wider."""

    def __init__(self, dtype: torch.dtype, layout: str, seed: int):
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype, self.layout = dtype, layout

    def activation(self, *shape: int) -> Tensor:
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return relayout(t.to(self.dtype), self.layout)

    def unit(self, *shape: int) -> Tensor:
        """Vectors of length 1 along the last axis."""
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return relayout((t / t.norm(dim=-1, keepdim=True)).to(self.dtype), self.layout)

    def parameter(self, *shape: int, low: float = -1.0, high: float = 1.0) -> Tensor:
        t = torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low
        return relayout(t.to(torch.promote_types(self.dtype, torch.float32)), self.layout)

    def dt(self, softplus: bool, *shape: int) -> Tensor:
        t = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        t = t - 1.0 if softplus else 0.05 + t.abs() / 2
        return relayout(t.to(self.dtype), self.layout)


def sample_ssd(
    *, batch=1, seqlen=8, nheads=2, headdim=3, ngroups=1, d_state=4, D="heads", z=False,
    dt_bias=True, dt_softplus=True, dt_limit=(0.0, math.inf), initial_state=True, seq_idx=None,
    chunk_size=16, dtype=torch.float64, layout="plain", seed=0,
) -> Sample:  # fmt: skip
    random = _Random(dtype, layout, seed)
    tensors = {
        "x": random.activation(batch, seqlen, nheads, headdim),
        "dt": random.dt(dt_softplus, batch, seqlen, nheads),
        "A": random.parameter(nheads, low=-1.5, high=-0.1),
        "B": random.activation(batch, seqlen, ngroups, d_state),
        "C": random.activation(batch, seqlen, ngroups, d_state),
    }
    if D is not None:
        tensors["D"] = random.parameter(nheads, *([headdim] if D == "channels" else []))
    if z:
        tensors["z"] = random.activation(batch, seqlen, nheads, headdim)
    if dt_bias:
        tensors["dt_bias"] = random.parameter(nheads, low=0.0, high=0.5)
    if initial_state:
        tensors["initial_state"] = random.parameter(batch, nheads, headdim, d_state)
    options = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "chunk_size": chunk_size}
    return tensors, _with_segments(options, seq_idx)


def sample_gated_delta_rule(
    *, batch=1, seqlen=8, num_k_heads=1, num_v_heads=2, head_k_dim=4, head_v_dim=3, scale=None,
    least_g=-1.5, initial_state=True, seq_idx=None, chunk_size=16, dtype=torch.float64, layout="plain", seed=0,
) -> Sample:  # fmt: skip
    random = _Random(dtype, layout, seed)
    tensors = {
        "q": random.activation(batch, seqlen, num_k_heads, head_k_dim),
        "k": random.unit(batch, seqlen, num_k_heads, head_k_dim),
        "v": random.activation(batch, seqlen, num_v_heads, head_v_dim),
        "g": random.parameter(batch, seqlen, num_v_heads, low=least_g, high=-0.01),
        "beta": random.parameter(batch, seqlen, num_v_heads, low=0.0, high=1.0),
    }
    if initial_state:
        tensors["initial_state"] = random.parameter(batch, num_v_heads, head_v_dim, head_k_dim)
    return tensors, _with_segments({"scale": scale, "chunk_size": chunk_size}, seq_idx)


def sample_selective_scan(
    *, batch=1, seqlen=8, d=4, ngroups=None, d_state=3, D=True, z=False, dt_bias=True,
    dt_softplus=True, initial_state=True, seq_idx=None, dtype=torch.float64, layout="plain", seed=0,
) -> Sample:  # fmt: skip
    random = _Random(dtype, layout, seed)
    groups = () if ngroups is None else (ngroups,)
    tensors = {
        "u": random.activation(batch, d, seqlen),
        "dt": random.dt(dt_softplus, batch, d, seqlen),
        "A": random.parameter(d, d_state, low=-1.5, high=-0.1),
        "B": random.activation(batch, *groups, d_state, seqlen),
        "C": random.activation(batch, *groups, d_state, seqlen),
    }
    if D:
        tensors["D"] = random.parameter(d)
    if z:
        tensors["z"] = random.activation(batch, d, seqlen)
    if dt_bias:
        tensors["dt_bias"] = random.parameter(d, low=0.0, high=0.5)
    if initial_state:
        tensors["initial_state"] = random.parameter(batch, d, d_state)
    return tensors, _with_segments({"dt_softplus": dt_softplus}, seq_idx)


def sample_causal_conv1d(
    *, batch=1, seqlen=8, d=3, width=4, bias=True, activation="silu", initial_state=True,
    seq_idx=None, dtype=torch.float64, layout="plain", seed=0,
) -> Sample:  # fmt: skip
    random = _Random(dtype, layout, seed)
    tensors = {"x": random.activation(batch, d, seqlen), "weight": random.activation(d, width)}
    if bias:
        tensors["bias"] = random.activation(d)
    if initial_state:
        tensors["initial_state"] = random.activation(batch, d, width - 1)
    return tensors, _with_segments({"activation": activation}, seq_idx)


def sample_gated_rmsnorm(
    *, shape=(2, 5, 12), z=True, eps=1e-5, group_size=None, norm_before_gate=False,
    dtype=torch.float64, layout="plain", seed=0,
) -> Sample:  # fmt: skip
    random = _Random(dtype, layout, seed)
    tensors = {"x": random.activation(*shape), "weight": random.parameter(shape[-1])}
    if z:
        tensors["z"] = random.activation(*shape)
    return tensors, {"eps": eps, "group_size": group_size, "norm_before_gate": norm_before_gate}


def sample_ssd_2d(
    *, batch=2, grid=(2, 3), lists=4, per_list=False, nheads=2, headdim=3, ngroups=1, d_state=2,
    D=True, dt_bias=True, dt_softplus=True, dt_limit=(0.0, math.inf), chunk_size=4,
    dtype=torch.float64, layout="plain", seed=0,
) -> Sample:  # fmt: skip
    random = _Random(dtype, layout, seed)
    cells = (batch, lists, *grid)
    tensors = {
        "x": random.activation(*(cells if per_list else (batch, *grid)), nheads, headdim),
        "dt": random.dt(dt_softplus, *cells, nheads),
        "A": random.parameter(lists, nheads, low=-1.5, high=-0.1),
        "B": random.activation(*cells, ngroups, d_state),
        "C": random.activation(*cells, ngroups, d_state),
    }
    if D:
        tensors["D"] = random.parameter(lists, nheads)
    if dt_bias:
        tensors["dt_bias"] = random.parameter(lists, nheads, low=0.0, high=0.5)
    return tensors, {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "chunk_size": chunk_size}


def sample_selective_scan_2d(
    *, batch=2, grid=(2, 3), lists=4, per_list=False, d=4, ngroups=1, d_state=2, D=True,
    dt_bias=True, dt_softplus=True, dtype=torch.float64, layout="plain", seed=0,
) -> Sample:  # fmt: skip
    random = _Random(dtype, layout, seed)
    cells = (batch, lists, *grid)
    tensors = {
        "u": random.activation(*(cells if per_list else (batch, *grid)), d),
        "dt": random.dt(dt_softplus, *cells, d),
        "A": random.parameter(lists, d, d_state, low=-1.5, high=-0.1),
        "B": random.activation(*cells, ngroups, d_state),
        "C": random.activation(*cells, ngroups, d_state),
    }
    if D:
        tensors["D"] = random.parameter(lists, d)
    if dt_bias:
        tensors["dt_bias"] = random.parameter(lists, d, low=0.0, high=0.5)
    return tensors, {"dt_softplus": dt_softplus}


def sample_causal_conv1d_2d(
    *, batch=2, grid=(2, 3), lists=4, per_list=False, per_list_weight=False, d=3, kernel=3,
    bias=True, activation="silu", dtype=torch.float64, layout="plain", seed=0,
) -> Sample:  # fmt: skip
    random = _Random(dtype, layout, seed)
    own = (lists,) if per_list_weight else ()
    tensors = {
        "x": random.activation(batch, *((lists,) if per_list else ()), *grid, d),
        "weight": random.activation(*own, d, kernel),
    }
    if bias:
        tensors["bias"] = random.activation(*own, d)
    return tensors, {"activation": activation}


def _with_segments(options: dict, rows: Sequence[str] | None) -> dict:
    return options if rows is None else {**options, "seq_idx": segments(*rows)}


def _recurrent_ssd(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, math.inf),
    initial_state=None, seq_idx=None, chunk_size=None,
):  # fmt: skip
    return ssd_recurrent(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, *dt_limit, initial_state, seq_idx
    )


def _recurrent_selective_scan(
    u,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    initial_state=None,
    seq_idx=None,
):
    return selective_scan_recurrent(
        u, dt, A, B, C, D, z, dt_bias, dt_softplus, initial_state, seq_idx
    )


def _recurrent_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, seq_idx=None, chunk_size=None
):
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    return gated_delta_rule_recurrent(q, k, v, g, beta, scale, initial_state, seq_idx)


def _recurrent_conv(x, weight, bias=None, activation=None, initial_state=None, seq_idx=None):
    return causal_conv1d_recurrent(x, weight, bias, activation or "", initial_state, seq_idx)


def _norm_by_group(x, weight, z=None, eps=1e-5, group_size=None, norm_before_gate=False):
    return (gated_rmsnorm_by_group(x, weight, z, eps, group_size or x.shape[-1], norm_before_gate),)


OPERATORS = {
    "ssd": Operator(
        lambda **inputs: vision_scan.ssd(**inputs, return_final_state=True),
        _recurrent_ssd,
        lambda chunk_size=None, **inputs: truth.ssd(**inputs),
        {"x": 1, "dt": 1, "B": 1, "C": 1, "z": 1},
        sample_ssd,
    ),
    "gated_delta_rule": Operator(
        lambda **inputs: vision_scan.gated_delta_rule(**inputs, return_final_state=True),
        _recurrent_gated_delta_rule,
        lambda chunk_size=None, **inputs: truth.gated_delta_rule(**inputs),
        {"v": 1, "q": 1, "k": 1, "g": 1, "beta": 1},
        sample_gated_delta_rule,
    ),
    "selective_scan": Operator(
        lambda **inputs: vision_scan.selective_scan(**inputs, return_final_state=True),
        _recurrent_selective_scan,
        truth.selective_scan,
        {"u": -1, "dt": -1, "B": -1, "C": -1, "z": -1},
        sample_selective_scan,
    ),
    "causal_conv1d": Operator(
        lambda **inputs: vision_scan.causal_conv1d(**inputs, return_final_state=True),
        _recurrent_conv,
        truth.causal_conv1d,
        {"x": -1},
        sample_causal_conv1d,
    ),
    "gated_rmsnorm": Operator(
        lambda **inputs: (vision_scan.gated_rmsnorm(**inputs),),
        _norm_by_group,
        truth.gated_rmsnorm,
        {},
        sample_gated_rmsnorm,
    ),
}
SCANS = ["ssd", "gated_delta_rule", "selective_scan", "causal_conv1d"]


def as_arrays(tensors: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {name: t.detach().double().cpu().numpy() for name, t in tensors.items()}


def array_options(options: Mapping) -> dict:
    return {key: v.cpu().numpy() if isinstance(v, Tensor) else v for key, v in options.items()}


def true_outputs(name: str, sample: Sample) -> tuple[Tensor, ...]:
    """What the operator must give, in float64, on the values of the inputs in their dtype."""
    tensors, options = sample
    outputs = OPERATORS[name].truth(**as_arrays(tensors), **array_options(options))
    return tuple(torch.from_numpy(out) for out in outputs)


def with_gradients(
    run: Callable[..., tuple[Tensor, ...]], sample: Sample, cotangents: Sequence[Tensor]
) -> tuple[tuple[Tensor, ...], dict[str, Tensor]]:
    """(outputs, gradient of each input) for cotangents of the outputs, cast to their dtype."""
    tensors, options = sample
    leaves = {name: t.detach().requires_grad_() for name, t in tensors.items()}
    outputs = run(**leaves, **options)
    grads = torch.autograd.grad(
        outputs,
        list(leaves.values()),
        [c.to(o.dtype) for c, o in zip(cotangents, outputs, strict=True)],
    )
    return tuple(o.detach() for o in outputs), dict(zip(leaves, grads, strict=True))


def cotangents_of(outputs: Sequence[Tensor], seed: int = 1) -> list[Tensor]:
    """Random, float64; of bfloat16's precision, so that every dtype is handed the same values."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(out.shape, generator=generator, dtype=torch.float64).bfloat16().double()
        for out in outputs
    ]


def tokens_of(name: str, tensors: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """The inputs with only the tokens start ... stop - 1."""
    axes = OPERATORS[name].token_axis
    return {
        key: t.narrow(axes[key], start, stop - start) if key in axes else t
        for key, t in tensors.items()
    }
