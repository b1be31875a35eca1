"""The CUDA kernels of the selective scan, at sizes that make them take another way than other tests."""

import pytest
import torch

import vision_scan
from tests.tolerance import assert_as_good_as, assert_close
from tests.vision_scan.cuda.loaded import in_any_order_of_threads, needs_kernels
from vision_scan.ops import register

pytestmark = [needs_kernels, pytest.mark.usefixtures("registered")]


def sample(batch, height, width, d, d_state, ngroups=1, order="cross4", apart=False, dtype=torch.float32):
    """Inputs of `selective_scan_2d`; `apart`: each list reads a grid of its own."""
    K = len(vision_scan.order(order, height, width))
    generator = torch.Generator().manual_seed(d + d_state)

    def draw(*size):
        return torch.randn(size, generator=generator).to(torch.get_default_device())

    lists = (K,) if apart else ()
    return {
        "u": draw(batch, *lists, height, width, d).to(dtype),
        "dt": (draw(batch, K, height, width, d) - 1).to(dtype),
        "A": -draw(K, d, d_state).abs(),
        "B": draw(batch, K, height, width, ngroups, d_state).to(dtype),
        "C": draw(batch, K, height, width, ngroups, d_state).to(dtype),
        "D": draw(K, d),
        "dt_bias": draw(K, d),
    }


def outputs_and_gradients(inputs, **options):
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    y = vision_scan.selective_scan_2d(**leaves, dt_softplus=True, **options)
    # Of few digits, so that it is the same in every dtype.
    cotangent = torch.linspace(-1, 1, y.numel(), device=y.device).sin().view(y.shape).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), cotangent)]


SIZES = {
    "several tiles, a list of its own each": dict(batch=2, height=19, width=15, d=24, d_state=3, apart=True),
    "odd channels in groups": dict(batch=1, height=17, width=16, d=21, d_state=5, ngroups=3),
    "two blocks of a group": dict(batch=1, height=4, width=5, d=40, d_state=16),
    "one state": dict(batch=2, height=23, width=12, d=48, d_state=1, order="hilbert"),
    "most states": dict(batch=1, height=3, width=5, d=6, d_state=64, order="bi2"),
    "more cells than shared memory holds": dict(batch=1, height=61, width=60, d=8, d_state=2, order="bi2"),
    "one cell": dict(batch=1, height=1, width=1, d=3, d_state=2),
}


@pytest.mark.parametrize("merge", ["sum", "mean", "concat"])
@pytest.mark.parametrize("size", SIZES)
def test_any_size_is_the_reference(size, merge):
    inputs = sample(**SIZES[size])
    options = {"order": SIZES[size].get("order", "cross4"), "merge": merge}
    before = dict(register.FALLBACKS)
    found = outputs_and_gradients(inputs, **options)
    assert before == register.FALLBACKS
    truth = outputs_and_gradients({name: t.double() for name, t in inputs.items()}, **options)
    for name, actual, expected in zip(["y", *inputs], found, truth, strict=True):
        assert_close(name, actual, expected, 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_loses_no_more_than_rounding(dtype):
    inputs = sample(2, 18, 17, 32, 4, dtype=dtype)
    found = outputs_and_gradients(inputs)
    truth = outputs_and_gradients({name: t.double() for name, t in inputs.items()})
    rounded = [t.to(f.dtype) for t, f in zip(truth, found, strict=True)]
    for name, actual, plain, expected in zip(["y", *inputs], found, rounded, truth, strict=True):
        if actual.dtype == dtype:
            assert_as_good_as(name, actual, plain, expected)
        else:  # a parameter's, float32
            assert_close(name, actual, expected)


@pytest.mark.parametrize("size", ["several tiles, a list of its own each", "two blocks of a group"])
def test_the_same_bits_in_any_order_of_threads(size):
    """Gradients of B and C add over blocks in any order, unless deterministic algorithms are asked for."""
    inputs = sample(**SIZES[size])
    torch.use_deterministic_algorithms(True)
    try:
        parts = in_any_order_of_threads(lambda: outputs_and_gradients(inputs))
    finally:
        torch.use_deterministic_algorithms(False)
    for name, added, apart in zip(["y", *inputs], outputs_and_gradients(inputs), parts, strict=True):
        assert_close(name, added, apart, 1e-6)


def test_every_cell_is_written(poison):
    inputs = sample(1, 17, 17, 18, 2)
    assert not any(t.isnan().any() for t in outputs_and_gradients(inputs))


def test_long_sequences_keep_small_steps():
    """dt of 1e-4 and a memory of thousands of tokens: the softplus may not lose digits where it is small."""
    inputs = sample(1, 40, 40, 4, 2, order="raster")
    inputs["dt"] = inputs["dt"] - 8
    inputs["A"] = inputs["A"] * 0.1
    found = outputs_and_gradients(inputs, order="raster")
    truth = outputs_and_gradients({name: t.double() for name, t in inputs.items()}, order="raster")
    for name, actual, expected in zip(["y", *inputs], found, truth, strict=True):
        assert_close(name, actual, expected, 1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"u": torch.randn(2, 5)}, "u must have 3 or 4 axes, got 2"),
        ({"A": torch.randn(1, 3, 2)}, r"u must have shape \[1, 5, 3\], got \[1, 5, 4\]"),
        ({"A": torch.randn(1, 4, 65)}, "d_state must be from 1 to 64, got 65"),
        ({"C": torch.randn(1, 1, 5, 1, 2).bfloat16()}, "C must be Float, got BFloat16"),
        ({"dt": torch.randn(1, 1, 4, 5).mT}, "dt must be contiguous"),
        ({"index": torch.zeros(2, 5, dtype=torch.int32)}, r"index must have shape \[1, 5\]"),
    ],
)
def test_no_pointer_is_touched_before_everything_is_checked(change, told):
    arguments = {
        "u": torch.randn(1, 5, 4),
        "dt": torch.randn(1, 1, 5, 4),
        "A": torch.randn(1, 4, 2),
        "B": torch.randn(1, 1, 5, 1, 2),
        "C": torch.randn(1, 1, 5, 1, 2),
        **dict.fromkeys(("D", "dt_bias", "initial_state", "index", "marks", "bounds")),
    }
    options = {"dt_softplus": True, "merge": True, "scale": 1.0, "everywhere": True}
    torch.ops.vision_scan_cuda.selective(**arguments, **options)
    change = {name: t.to(torch.get_default_device()) for name, t in change.items()}
    with pytest.raises(ValueError, match=told):
        torch.ops.vision_scan_cuda.selective(**{**arguments, **change}, **options)
