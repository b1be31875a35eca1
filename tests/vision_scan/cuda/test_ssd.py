"""Mamba-2's scan in csrc/cuda, on a GPU or emulated: what the tests of the operators do not reach."""

import pytest
import torch

import vision_scan
from tests.tolerance import RATIO, assert_close
from vision_scan.ops import register
from vision_scan.ops.cuda import ssd as adapter
from vision_scan.ops.reference.ssd import ssd_recurrent

NAMES = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state")
SIZES = {  # nheads, ngroups, headdim, d_state, seqlen
    "odd": (3, 1, 33, 17, 130),
    "whole": (2, 1, 64, 128, 128),
    "one-token": (6, 3, 8, 4, 1),
    "many-states": (1, 1, 16, 256, 70),
    "two-blocks-of-channels": (1, 1, 128, 64, 65),
    "narrow": (2, 2, 32, 32, 65),
}


@pytest.fixture(autouse=True)
def device() -> str:
    """Where the CUDA kernels run here."""
    devices = [device for name, device in register.KERNELS if name == "ssd"]
    emulated = hasattr(torch.ops.vision_scan_cuda, "descending")
    if "cuda" not in devices and not emulated:
        pytest.skip("the CUDA kernels are not loaded")
    return "cpu" if emulated else "cuda"


def sample(nheads, ngroups, headdim, d_state, seqlen, batch=1, dtype=torch.float32) -> dict:
    generator = torch.Generator().manual_seed(nheads * seqlen)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    return {
        "x": draw(batch, seqlen, nheads, headdim).to(dtype),
        "dt": draw(batch, seqlen, nheads).to(dtype),
        "A": -draw(nheads).abs(),
        "B": draw(batch, seqlen, ngroups, d_state).to(dtype),
        "C": draw(batch, seqlen, ngroups, d_state).to(dtype),
        "D": draw(nheads, headdim),
        "z": draw(batch, seqlen, nheads, headdim).to(dtype),
        "dt_bias": draw(nheads),
        "initial_state": draw(batch, nheads, headdim, d_state),
    }


def arguments(tensors: dict, device: str, seq_idx=None) -> tuple:
    """Of the compiled operator."""
    values = {name: t.to(device) for name, t in tensors.items()}
    order = [values[name] for name in NAMES[:-1]]
    return adapter._arguments(*order, True, 0.0, float("inf"), values["initial_state"], seq_idx, None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
def test_every_size_is_the_recurrence(sizes, dtype, device):
    """Values and gradients; every number of float32 is as exact for 16-bit inputs as for float32."""
    tensors = sample(*sizes, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(tensors[name].shape, generator=generator) for name in ("x", "initial_state")]
    cotangents[0] = cotangents[0].to(dtype)
    before = dict(register.FALLBACKS)

    def run(leaves, scan):
        leaves = {name: t.requires_grad_() for name, t in leaves.items()}
        outputs = scan(leaves)
        given = [c.to(out) for c, out in zip(cotangents, outputs, strict=True)]
        return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), given)]

    found = run(
        {name: t.to(device).clone() for name, t in tensors.items()},
        lambda leaves: vision_scan.ssd(**leaves, dt_softplus=True, return_final_state=True),
    )
    assert before == register.FALLBACKS
    expected = run(
        {name: t.double() for name, t in tensors.items()},
        lambda leaves: ssd_recurrent(
            *(leaves[name] for name in NAMES[:-1]), True, 0.0, float("inf"), leaves["initial_state"], None
        ),
    )
    for name, actual, true in zip(["y", "state", *NAMES], found, expected, strict=True):
        assert_close(name, actual.cpu(), true)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("segments", [2, 3, 9])
def test_cutting_the_rows_changes_nothing(segments, dtype, device):
    """Five chunks in up to nine segments, some of them empty, with a reset and padding in one."""
    tensors = sample(4, 2, 20, 24, 300, batch=2, dtype=dtype)
    seq_idx = torch.arange(300, device=device).expand(2, -1) // 170
    seq_idx = torch.where((seq_idx == 1) & (torch.arange(300, device=device) % 7 == 0), -1, seq_idx)
    values = arguments(tensors, device, seq_idx)
    dy, dstate = torch.randn_like(values[0]), torch.randn_like(values[11])
    without_z = (*values[:6], *values[7:])
    expected = [
        *torch.ops.vision_scan_cuda.ssd(*values, 1),
        *torch.ops.vision_scan_cuda.ssd_backward(dy, dstate, *without_z, 1, 1),
    ]
    found = [
        *torch.ops.vision_scan_cuda.ssd(*values, segments),
        *torch.ops.vision_scan_cuda.ssd_backward(dy, dstate, *without_z, segments, segments),
    ]
    names = ("y", "state", "dx", "ddt", "dA", "dB", "dC", "dD", "ddt_bias", "dinitial_state")
    for name, one, other in zip(names, found, expected, strict=True):
        # What the heads of a block have in common in dB and dC is rounded like x.
        assert_close(name, one, other, RATIO[dtype] if name in ("dB", "dC") else None)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bits_do_not_depend_on_the_order_of_threads(dtype, device):
    """A missing barrier would show; on a GPU: the same bits on every run."""
    values = arguments(sample(2, 1, 64, 128, 130, dtype=dtype), device)
    dy, dstate = torch.randn_like(values[0]), torch.randn_like(values[11])
    runs = []
    for descending in (False, True):
        if device == "cpu":
            torch.ops.vision_scan_cuda.descending(descending)
        runs.append(
            [
                *torch.ops.vision_scan_cuda.ssd(*values, 2),
                *torch.ops.vision_scan_cuda.ssd_backward(dy, dstate, *values[:6], *values[7:], 2, 2),
            ]
        )
    if device == "cpu":
        torch.ops.vision_scan_cuda.descending(False)
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_of_a_projection_are_read_where_they_lie(dtype, device):
    """The same bits as of copies, whether 16 bytes can be copied at once or not."""
    for widths in ([128, 128, 32, 32, 2], [128, 128, 34, 34, 1]):
        wide = torch.randn(2, 70, sum(widths)).to(dtype).to(device)
        z, x, B, C, dt = wide.split(widths, dim=-1)
        x, z = (t.unflatten(-1, (widths[-1], -1)) for t in (x, z))
        assert adapter._cells(x, dtype, 2).data_ptr() == x.data_ptr()
        A = -torch.ones(widths[-1], device=device)
        B, C = B[:, :, None], C[:, :, None]
        in_place = vision_scan.ssd(x, dt, A, B, C, z=z)
        copied = vision_scan.ssd(*(t.contiguous() for t in (x, dt, A, B, C)), z=z.contiguous())
        assert torch.equal(in_place, copied)


def test_number_of_segments():
    """One where heads and rows keep the processors busy, and never less than two chunks to a segment."""

    def segments(*args):
        return torch.ops.vision_scan_cuda.ssd_segments(*args)

    assert segments(640, 64, 132) == 1 and segments(264, 10_000, 132) == 1 and segments(1, 3, 132) == 1
    for units in (1, 24, 80, 263):
        for chunks in (4, 5, 128, 2048):
            found = segments(units, chunks, 132)
            assert 1 < found <= chunks // 2
            assert found == chunks // 2 or 6 * 132 <= found * units < 6 * 132 + units


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": torch.randn(1, 2, 4, 4)}, "x must have 5 axes, got 4"),
        ({"A": torch.randn(1, 3)}, r"A must have shape \[1, 2\], got \[1, 3\]"),
        ({"dt": torch.randn(1, 1, 5, 2).double()}, "dt must be Float, got Double"),
        ({"B": torch.randn(2, 1, 5, 1, 3)}, "B must have shape"),
        ({"B": torch.randn(1, 1, 5, 1, 6)[..., ::2]}, "B must be contiguous behind its first 3 axes"),
        ({"B": torch.randn(1, 1, 5, 1, 300)}, "d_state must be from 1 to 256, got 300"),
        ({"index": torch.zeros(1, 5, dtype=torch.int64)}, "index must be Int"),
        ({"segments": -1}, "segments must not be negative"),
    ],
)
def test_no_pointer_is_touched_before_everything_is_checked(change, told, device):
    given = {
        "x": torch.randn(1, 1, 5, 2, 4),
        "dt": torch.randn(1, 1, 5, 2),
        "A": torch.randn(1, 2),
        "B": torch.randn(1, 1, 5, 1, 3),
        "C": torch.randn(1, 1, 5, 1, 3),
        **dict.fromkeys(("D", "z", "dt_bias", "initial_state", "index", "marks", "bounds")),
    }
    options = {"dt_softplus": True, "dt_min": 0.0, "dt_max": 1.0, "segments": 1}
    given = {**given, **options, **change}
    given = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    with pytest.raises(ValueError, match=told):
        torch.ops.vision_scan_cuda.ssd(**given)
