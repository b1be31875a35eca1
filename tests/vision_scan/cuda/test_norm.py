"""The CUDA kernels of the gated RMS norm: every way to share a group out, and where the tensors lie."""

import pytest
import torch
from torch import Tensor

import vision_scan
from tests.tolerance import assert_as_good_as, assert_close
from tests.vision_scan.cuda.loaded import in_any_order_of_threads, needs_kernels
from vision_scan.ops import register
from vision_scan.ops.cuda.layout import cells

pytestmark = [needs_kernels, pytest.mark.usefixtures("registered", "poison")]

# rows, channels, group_size
SIZES = {
    "one lane": (3, 4, 4),
    "many groups of a few lanes": (37, 24, 8),
    "lanes of two rows in a warp": (5, 96, 96),
    "half a warp, one group": (70, 64, 64),
    "two vectors a lane": (6, 400, 400),
    "four vectors a lane": (4, 2 * 800, 800),
    "a block": (6, 5120, 5120),
    "blocks of groups": (4, 2 * 2560, 2560),
    "too much to hold": (5, 2 * 9000, 9000),
    "the widest": (2, 16384, 16384),
    "no whole vector": (9, 3 * 37, 37),
    "no whole vector, a block": (5, 1001, 1001),
    "no whole vector, too much to hold": (5, 3001, 3001),
}


def sample(rows: int, channels: int, dtype=torch.float32) -> list[Tensor]:
    """x, z, weight."""
    generator = torch.Generator().manual_seed(channels)
    drawn = [
        torch.randn(size, generator=generator) for size in ((rows, channels), (rows, channels), (channels,))
    ]
    x, z, weight = (t.to(torch.get_default_device()) for t in drawn)
    return [x.to(dtype), z.to(dtype), weight]


def outputs_and_gradients(x: Tensor, z: Tensor | None, weight: Tensor, **options) -> list[Tensor]:
    leaves = [t.clone().requires_grad_() for t in (x, z, weight) if t is not None]
    y = vision_scan.gated_rmsnorm(leaves[0], leaves[-1], None if z is None else leaves[1], **options)
    # Of few digits, so that it is the same in every dtype.
    cotangent = torch.linspace(-1, 1, y.numel(), device=y.device).sin().view(y.shape).bfloat16().to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, cotangent)]


@pytest.mark.parametrize("gate", ["before", "behind", "none"])
@pytest.mark.parametrize("size", SIZES)
def test_any_width_is_the_reference(size, gate):
    rows, channels, group_size = SIZES[size]
    x, z, weight = sample(rows, channels)
    z = None if gate == "none" else z
    options = {"group_size": group_size, "norm_before_gate": gate == "behind"}
    before = dict(register.FALLBACKS)
    found = in_any_order_of_threads(lambda: outputs_and_gradients(x, z, weight, **options))
    assert before == register.FALLBACKS
    doubles = (None if t is None else t.double() for t in (x, z, weight))
    names = ["y", "dx", *(["dz"] if z is not None else []), "dweight"]
    for name, actual, expected in zip(names, found, outputs_and_gradients(*doubles, **options), strict=True):
        assert_close(name, actual, expected, 1e-5)


@pytest.mark.parametrize("own_weight", [True, False])
@pytest.mark.parametrize("size", ["a block", "many groups of a few lanes", "no whole vector, a block"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype, size, own_weight):
    rows, channels, group_size = SIZES[size]
    x, z, weight = sample(rows, channels, dtype)
    weight = weight.to(dtype) if own_weight else weight
    found = outputs_and_gradients(x, z, weight, group_size=group_size)
    truth = outputs_and_gradients(*(t.double() for t in (x, z, weight)), group_size=group_size)
    for name, actual, expected in zip(["y", "dx", "dz", "dweight"], found, truth, strict=True):
        assert actual.dtype == (weight.dtype if name == "dweight" else dtype)
        if actual.dtype == dtype:
            assert_as_good_as(name, actual, expected.to(dtype), expected)
        else:
            assert_close(name, actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("first", "width"), [(0, 96), (96, 96), (3, 96), (5, 37)])
def test_pieces_of_a_projection_are_read_where_they_lie(first, width, dtype):
    wide = sample(14, 224, dtype)[0].view(2, 7, 224)
    piece = wide[..., first : first + width]
    assert cells(piece, 2).data_ptr() == piece.data_ptr()
    weight = torch.linspace(-1, 1, width, device=wide.device)
    found, expected = (vision_scan.gated_rmsnorm(t, weight, t) for t in (piece, piece.contiguous()))
    assert_close("y", found, expected, 1e-6 if dtype == torch.float32 else None)
    if first % 8 == 0:  # whole vectors in both
        assert torch.equal(found, expected)


def test_gate_of_another_dtype_loses_no_digit():
    x, z, weight = sample(4, 64)
    found = vision_scan.gated_rmsnorm(x.bfloat16(), weight, z)
    assert torch.equal(found, vision_scan.gated_rmsnorm(x.bfloat16().float(), weight, z).bfloat16())


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": torch.randn(2, 3, 8)}, "x must have 2 axes, got 3"),
        ({"x": torch.randn(2, 16)[:, ::2]}, "x must be contiguous behind its first 1 axes"),
        ({"z": torch.randn(2, 9)}, r"z must have shape \[2, 8\], got \[2, 9\]"),
        ({"z": torch.randn(2, 8).double()}, "z must be Float, got Double"),
        ({"weight": torch.randn(16)[::2]}, "weight must be contiguous"),
        ({"weight": torch.randn(8).half()}, "weight must be Float, got Half"),
        ({"group_size": 3}, "group_size must divide channels 8"),
    ],
)
def test_no_pointer_is_touched_before_everything_is_checked(change, told):
    arguments = {"x": torch.randn(2, 8), "weight": torch.randn(8), "z": torch.randn(2, 8)}
    change = {
        name: t.to(torch.get_default_device()) if isinstance(t, Tensor) else t for name, t in change.items()
    }
    options = {"eps": 1e-5, "group_size": 8, "norm_before_gate": False}
    torch.ops.vision_scan_cuda.norm(**arguments, **options)
    with pytest.raises(ValueError, match=told):
        torch.ops.vision_scan_cuda.norm(**{**arguments, **options, **change})
