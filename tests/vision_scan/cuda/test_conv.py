"""The CUDA kernels of the short convolution: several runs of a line, vectors and single channels."""

import pytest
import torch
from torch import Tensor

import vision_scan
from tests.tolerance import assert_as_good_as, assert_close
from tests.vision_scan.cuda.loaded import in_any_order_of_threads, needs_kernels
from vision_scan.ops import register
from vision_scan.ops.cuda.layout import cells

pytestmark = [needs_kernels, pytest.mark.usefixtures("registered", "poison")]


def draw(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(torch.get_default_device())


def sample(batch, seqlen, d, taps, rows=None, bias=True, dtype=torch.float32) -> dict[str, Tensor]:
    """Channels last in memory, as a projection writes them."""
    tensors = {
        "x": draw(batch, seqlen, d, seed=1).to(dtype).transpose(1, 2),
        "weight": draw(d, taps, seed=2),
        "initial_state": draw(batch if rows is None else rows, d, taps - 1, seed=3).to(dtype),
    }
    return {**tensors, "bias": draw(d, seed=4)} if bias else tensors


def outputs_and_gradients(inputs: dict[str, Tensor], **options) -> list[Tensor]:
    leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
    outputs = vision_scan.causal_conv1d(**leaves, **options, return_final_state=True)
    # Of few digits, so that they are the same in every dtype.
    cotangents = [torch.linspace(-1, 1, t.numel()).sin().bfloat16().view(t.shape).to(t) for t in outputs]
    return [*(t.detach() for t in outputs), *torch.autograd.grad(outputs, list(leaves.values()), cotangents)]


def assert_is_reference(inputs: dict[str, Tensor], **options) -> None:
    """In float64 the reference runs."""
    before = dict(register.FALLBACKS)
    found = in_any_order_of_threads(lambda: outputs_and_gradients(inputs, **options))
    assert before == register.FALLBACKS
    truth = outputs_and_gradients({name: t.double() for name, t in inputs.items()}, **options)
    for name, actual, expected in zip(["y", "final_state", *inputs], found, truth, strict=True):
        assert_close(name, actual, expected, 1e-5)


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 5, 16])
@pytest.mark.parametrize(("seqlen", "d"), [(3, 24), (70, 8), (70, 7)])
def test_any_number_of_taps_channels_and_tokens_is_the_reference(seqlen, d, taps, activation):
    assert_is_reference(sample(2, seqlen, d, taps), activation=activation)


def test_channels_of_several_blocks():
    assert_is_reference(sample(2, 18, 136, 4), activation="silu")


def test_without_bias_and_state():
    inputs = sample(3, 33, 16, 4, bias=False)
    del inputs["initial_state"]
    assert_is_reference(inputs, activation="silu")


def rows_of(*runs: tuple[int, int]) -> list[int]:
    return [index for index, count in runs for _ in range(count)]


PADDED = {
    "left": rows_of((-1, 37), (0, 23)),
    "right": rows_of((0, 3), (-1, 57)),
    "a gap of several runs": rows_of((0, 5), (-1, 40), (0, 15)),
    "a new segment behind a gap": rows_of((0, 5), (-1, 40), (1, 15)),
    "every other token": rows_of(*[(0, 1), (-1, 1)] * 30),
    "segments of one token": list(range(60)),
    "segments at the ends of runs": rows_of((0, 16), (1, 17), (2, 15), (3, 12)),
    "nothing": rows_of((-1, 60)),
    "one token": rows_of((-1, 31), (4, 1), (-1, 28)),
}


@pytest.mark.parametrize("d", [8, 5])
@pytest.mark.parametrize("taps", [2, 3, 4, 6])
@pytest.mark.parametrize("rows", [list(PADDED)[i : i + 3] for i in (0, 3, 6)], ids=" | ".join)
def test_padding_is_stepped_over(rows, taps, d):
    inputs = sample(len(rows), 60, d, taps)
    seq_idx = torch.tensor([PADDED[row] for row in rows], device=inputs["x"].device)
    assert_is_reference(inputs, activation="silu", seq_idx=seq_idx)


@pytest.mark.parametrize(
    "bounds",
    [[0, 60], [0, 0, 1, 3, 3, 60, 60], [0, 16, 32, 48, 60], [0, 15, 17, 31, 33, 60], [0, 60, 60], [0, 0, 60]],
    ids=str,
)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize(("taps", "d"), [(4, 8), (3, 5), (6, 8)])
def test_packed_segments(bounds, padded, taps, d):
    inputs = sample(1, 60, d, taps, rows=len(bounds) - 1)
    device = inputs["x"].device
    # Segments of both kinds at once: the first real token of a packed one starts from that one's own state.
    index = rows_of((0, 2), (-1, 1), (1, 15), (2, 1), (-1, 20), (3, 8), (-1, 3), (3, 10))
    seq_idx = torch.tensor([index], device=device) if padded else None
    assert_is_reference(
        inputs, activation="silu", cu_seqlens=torch.tensor(bounds, device=device), seq_idx=seq_idx
    )


@pytest.mark.parametrize(("taps", "d"), [(4, 16), (3, 6), (7, 4)])
@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("own_weight", [False, True])
@pytest.mark.parametrize("order", ["cross4", "hilbert", "bi2"])
def test_along_visiting_lists(order, own_weight, apart, taps, d):
    height, width = 5, 8
    K = len(vision_scan.order(order, height, width))
    lists = (K,) if own_weight else ()
    inputs = {
        "x": draw(2, *((K,) if apart else ()), height, width, d),
        "weight": draw(*lists, d, taps, seed=1),
        "bias": draw(*lists, d, seed=2),
    }

    def compute(inputs):
        leaves = {name: t.clone().requires_grad_() for name, t in inputs.items()}
        y = vision_scan.causal_conv1d_2d(**leaves, order=order)
        cotangent = torch.linspace(-1, 1, y.numel()).sin().view(y.shape).to(y)
        return [y.detach(), *torch.autograd.grad(y, list(leaves.values()), cotangent)]

    before = dict(register.FALLBACKS)
    found = in_any_order_of_threads(lambda: compute(inputs))
    assert before == register.FALLBACKS
    truth = compute({name: t.double() for name, t in inputs.items()})
    for name, actual, expected in zip(["y", *inputs], found, truth, strict=True):
        assert_close(name, actual, expected, 1e-5)


@pytest.mark.parametrize("own_weight", [True, False])
@pytest.mark.parametrize("d", [16, 24, 5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, d, own_weight):
    inputs = sample(2, 37, d, 4, dtype=dtype)
    if own_weight:
        inputs = {name: t.to(dtype) for name, t in inputs.items()}
    found = outputs_and_gradients(inputs, activation="silu")
    truth = outputs_and_gradients({name: t.double() for name, t in inputs.items()}, activation="silu")
    for name, actual, expected in zip(["y", "final_state", *inputs], found, truth, strict=True):
        if actual.dtype == dtype:
            assert_as_good_as(name, actual, expected.to(dtype), expected)
        else:  # a parameter's, float32
            assert_close(name, actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("first", "width"), [(0, 64), (64, 64), (3, 64), (8, 13)])
def test_pieces_of_a_projection_are_read_where_they_lie(first, width, dtype):
    wide = draw(2, 21, 160).to(dtype)
    piece = wide[..., first : first + width]
    assert cells(piece, 2).data_ptr() == piece.data_ptr()
    weight = draw(width, 4)
    found, expected = (
        vision_scan.causal_conv1d(x.transpose(1, 2), weight, None, "silu")
        for x in (piece, piece.contiguous())
    )
    assert torch.equal(found, expected)
    assert found.stride() == expected.stride()
    assert found.transpose(1, 2).is_contiguous()


@torch.no_grad()
def test_wrong_bounds_read_nothing_outside_of_the_row():
    """Their values are not checked on a GPU: it would have to be waited for."""
    x, weight = draw(1, 8, 40), draw(8, 4)
    for bounds in ([0, 3], [-9, 80], [0, 30, 7, 40], [50, 60]):
        vision_scan.causal_conv1d(x, weight, cu_seqlens=torch.tensor(bounds, device=x.device))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": torch.randn(5, 8)}, "x must have 3 or 4 axes, got 2"),
        ({"x": torch.randn(1, 5, 16)[..., ::2]}, "x must be contiguous behind its first 2 axes"),
        ({"weight": torch.randn(1, 8, 17)}, "weight must have 1 to 16 taps, got 17"),
        ({"weight": torch.randn(2, 8, 4)}, r"weight must have shape \[1, 8, 4\], got \[2, 8, 4\]"),
        ({"bias": torch.randn(1, 8).double()}, "bias must be Float, got Double"),
        ({"initial_state": torch.randn(1, 8, 4)}, r"initial_state must have shape \[1, 8, 3\]"),
        ({"index": torch.zeros(1, 5).long()}, "index must be Int, got Long"),
        ({"marks": torch.zeros(1, 4, dtype=torch.uint8)}, r"marks must have shape \[1, 5\], got \[1, 4\]"),
    ],
)
def test_no_pointer_is_touched_before_everything_is_checked(change, told):
    device = torch.get_default_device()
    arguments = {
        "x": torch.randn(1, 5, 8, device=device),
        "weight": torch.randn(1, 8, 4, device=device),
        **dict.fromkeys(("bias", "initial_state", "index", "marks", "bounds")),
    }
    options = {"silu": True, "everywhere": True}
    torch.ops.vision_scan_cuda.conv(**arguments, **options)
    with pytest.raises(ValueError, match=told):
        changed = {name: t.to(device) for name, t in change.items()}
        torch.ops.vision_scan_cuda.conv(**{**arguments, **changed}, **options)
