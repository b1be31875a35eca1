"""The Mamba-2 mixer with its options against its formulas, one token and one head after the other."""

import copy
import math

import pytest
import torch
from torch import Tensor

from cobra.lm.mamba2 import Mamba2, Mamba2Config
from cobra.lm.mixer import Segments
from tests.cobra.test_oracles import randomise
from tests.tolerance import assert_close

D_MODEL = 16
SMALL = {"d_state": 5, "headdim": 8, "chunk_size": 4}
OPTIONS = {
    "plain": {},
    "no activation": {"conv_activation": None, "ngroups": 2},
    "no activation, no bias, no norm": {"conv_activation": None, "conv_bias": False, "rmsnorm": False},
    "discrete": {"discrete": True, "z_bias": True, "rmsnorm": False, "conv_activation": None, "ngroups": 4},
    "discrete, steps limited": {"discrete": True, "dt_limit": (0.2, 0.7), "D_has_hdim": True},
}


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


def slow(mixer: Mamba2, x: Tensor) -> Tensor:
    """One row (seqlen, D_MODEL), in plain numbers."""
    config, weights = mixer.config, {name: tensor.tolist() for name, tensor in mixer.state_dict().items()}
    groups = config.ngroups * config.d_state
    inner, nheads, group = mixer.d_ssm, mixer.nheads, mixer.nheads // config.ngroups
    act = silu if config.conv_activation == "silu" else float
    states = [[[0.0] * config.d_state for _ in range(config.headdim)] for _ in range(nheads)]
    seen, result = [], []
    for token in x.tolist():
        projected = [sum(w * v for w, v in zip(row, token, strict=True)) for row in weights["in_proj.weight"]]
        z = [v + b for v, b in zip(projected, weights.get("z_bias", [0.0] * inner), strict=False)]
        dt = projected[-nheads:]
        seen.append(projected[inner:-nheads])
        bias = weights.get("conv1d.bias", [0.0] * len(seen[-1]))
        xBC = [
            act(b + sum(w * past[c] for w, past in zip(reversed(taps), reversed(seen), strict=False)))
            for c, ((taps,), b) in enumerate(zip(weights["conv1d.weight"], bias, strict=True))
        ]
        y = []
        for h in range(nheads):
            step = math.log1p(math.exp(dt[h] + (0.0 if config.discrete else weights["dt_bias"][h])))
            step = min(max(step, config.dt_limit[0]), config.dt_limit[1])
            decay = math.exp(-step if config.discrete else -math.exp(weights["A_log"][h]) * step)
            weight = 1.0 if config.discrete else step
            start = inner + h // group * config.d_state
            B, C = xBC[start : start + config.d_state], xBC[start + groups : start + groups + config.d_state]
            for p in range(config.headdim):
                value, state = xBC[h * config.headdim + p], states[h][p]
                state[:] = [decay * s + weight * value * b for s, b in zip(state, B, strict=True)]
                skip = weights["D"][h * config.headdim + p if config.D_has_hdim else h]
                read = sum(s * c for s, c in zip(state, C, strict=True)) + skip * value
                y.append(read * silu(z[len(y)]))
        if mixer.norm is not None:
            size = inner // config.ngroups
            roots = [
                math.sqrt(sum(v * v for v in y[i : i + size]) / size + config.norm_eps) for i in range(0, inner, size)
            ]
            y = [v / roots[i // size] * weights["norm.weight"][i] for i, v in enumerate(y)]
        result.append([sum(w * v for w, v in zip(row, y, strict=True)) for row in weights["out_proj.weight"]])
    return torch.tensor(result, dtype=torch.float64)


@pytest.mark.parametrize("options", OPTIONS)
@torch.no_grad()
def test_the_mixer_computes_its_formulas(options):
    mixer = randomise(Mamba2(Mamba2Config(**SMALL, **OPTIONS[options]), D_MODEL)).double()
    x = torch.randn(1, 11, D_MODEL, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found, _ = mixer(x, None, Segments(torch.zeros(1, dtype=torch.int64)))
    assert_close(options, found[0], slow(mixer, x[0]), 1e-10)


@pytest.mark.parametrize("shift", [-300.0, -80.0, -20.0, 0.0, 80.0])
def test_discrete_states_that_hardly_fade_or_at_once_are_exact_in_float32(shift):
    """A step of softplus(-300) is 0 in float32: what is divided by it would be infinite, and its gradient no number."""
    config = Mamba2Config(**SMALL, discrete=True, bias=True, rmsnorm=False, conv_activation=None)
    mixer = randomise(Mamba2(config, D_MODEL))
    mixer.in_proj.bias[-mixer.nheads :] = shift
    x = torch.randn(1, 40, D_MODEL, generator=torch.Generator().manual_seed(0))
    segments = Segments(torch.zeros(1, dtype=torch.int64))
    weights = torch.randn(1, 40, D_MODEL, generator=torch.Generator().manual_seed(1))

    def run(mixer: Mamba2, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x.clone().requires_grad_()
        y, _ = mixer(x, None, segments)
        (grad,) = torch.autograd.grad((y * weights.to(x.dtype)).sum(), x)
        return y.detach(), grad

    found, expected = run(mixer, x), run(copy.deepcopy(mixer).double(), x.double())
    assert_close("output", found[0].double(), expected[0], 1e-5)
    assert_close("gradient", found[1].double(), expected[1], 1e-5)
    with torch.no_grad():
        state, steps = mixer.allocate(1, 0, "cpu", torch.float32), []
        for token in x.split(1, dim=1):
            y, state = mixer(token, state, Segments(torch.zeros(1, dtype=torch.int64), overwrite=True))
            steps.append(y)
    assert_close("token by token", torch.cat(steps, 1).double(), expected[0], 1e-5)
