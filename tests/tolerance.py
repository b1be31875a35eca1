"""How close is close: one table by dtype, and one comparison by root mean square."""

import math

import torch
from torch import Tensor

# RMS(actual - expected) / RMS(expected) of two ways to compute the same thing. float64 is the law
# of the operators (1e-10); the others are a few roundings of the dtype.
RATIO = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}

# What `assert_as_good_as` grants beyond twice the plain computation's error, as a ratio: it covers
# a plain result that happens to be exact, so about one rounding of the dtype.
FLOOR = {torch.float32: 3e-7, torch.bfloat16: 2e-3, torch.float16: 5e-4}


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected) in float64; 0 if they are equal, nan if a value is."""
    actual, expected = actual.detach().double(), expected.detach().double().to(actual.device)
    error, size = (actual - expected).norm().item(), expected.norm().item()
    return 0.0 if error == 0 else error / size if size else math.inf


def assert_close(name: str, actual: Tensor, expected: Tensor, ratio: float | None = None) -> None:
    """Fails unless shapes agree and the RMS ratio is at most `ratio`; None: RATIO of the dtype."""
    assert actual.shape == expected.shape, (
        f"{name}: {tuple(actual.shape)} != {tuple(expected.shape)}"
    )
    ratio = RATIO[actual.dtype] if ratio is None else ratio
    found = rms_ratio(actual, expected)
    assert found <= ratio, f"{name}: RMS error ratio {found:.3g}, allowed {ratio:.3g}"


def assert_as_good_as(name: str, actual: Tensor, plain: Tensor, truth: Tensor) -> None:
    """Fails unless the error against the float64 truth is at most twice the plain one's + FLOOR."""
    assert actual.shape == truth.shape, f"{name}: {tuple(actual.shape)} != {tuple(truth.shape)}"
    assert actual.dtype == plain.dtype, f"{name}: {actual.dtype} != {plain.dtype}"
    found, allowed = rms_ratio(actual, truth), 2 * rms_ratio(plain, truth) + FLOOR[actual.dtype]
    assert found <= allowed, f"{name}: RMS error ratio {found:.3g}, allowed {allowed:.3g}"
