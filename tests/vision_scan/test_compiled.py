"""The CPU kernels of csrc/cpu. The tests of every operator run through them too, where they serve."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import vision_scan
from vision_scan.ops import cpu, register
from vision_scan.ops.reference.ssd import ssd_recurrent

ROOT = Path(__file__).resolve().parents[2]
KERNELS = (
    *("selective_scan", "selective_scan_2d", "ssd", "ssd_2d", "ssd_update"),
    *("causal_conv1d", "causal_conv1d_2d", "causal_conv1d_update", "gated_rmsnorm"),
)
built = pytest.mark.skipif("cpu" in register.MISSING_KERNELS, reason=str(register.MISSING_KERNELS))


@pytest.mark.skipif(sys.platform != "linux", reason="built on Linux")
def test_kernels_are_there():
    """Else everything below, and every speed, would be that of the reference without a word."""
    asked_for = os.environ.get("VISION_SCAN_REFERENCE") != "1"
    capable = torch.backends.cpu.get_cpu_capability() != "DEFAULT"
    report = vision_scan.backend_report()
    assert {report[name]["cpu"] for name in KERNELS} == {"compiled" if asked_for and capable else "reference"}


def ssd_sample(nheads: int, ngroups: int, headdim: int, d_state: int, seqlen: int, batch: int = 2) -> dict:
    generator = torch.Generator().manual_seed(nheads * seqlen)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    return {
        "x": draw(batch, seqlen, nheads, headdim),
        "dt": draw(batch, seqlen, nheads),
        "A": -draw(nheads).abs(),
        "B": draw(batch, seqlen, ngroups, d_state),
        "C": draw(batch, seqlen, ngroups, d_state),
        "D": draw(nheads, headdim),
        "z": draw(batch, seqlen, nheads, headdim),
        "dt_bias": draw(nheads),
        "initial_state": draw(batch, nheads, headdim, d_state),
    }


def run_ssd(sample: dict, cotangents: list[torch.Tensor], **options) -> list[torch.Tensor]:
    """Outputs, then gradients."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in sample.items()}
    outputs = vision_scan.ssd(**leaves, dt_softplus=True, return_final_state=True, **options)
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), cotangents)]


@built
@pytest.mark.parametrize(
    ("nheads", "ngroups", "headdim", "d_state", "seqlen"),
    [
        (10, 1, 33, 17, 200),  # three blocks of heads, nothing a whole vector, four chunks
        (4, 2, 64, 128, 64),  # everything whole, one chunk
        (6, 3, 8, 4, 1),
        (5, 1, 16, 256, 131),
    ],
)
def test_ssd_of_any_size_is_the_recurrence(nheads, ngroups, headdim, d_state, seqlen):
    sample = ssd_sample(nheads, ngroups, headdim, d_state, seqlen)
    before = dict(register.FALLBACKS)
    with torch.no_grad():
        cotangents = [torch.randn_like(t) for t in (sample["x"], sample["initial_state"])]
    found = run_ssd(sample, cotangents)
    assert before == register.FALLBACKS  # no call went to the reference
    leaves = {name: tensor.double().requires_grad_() for name, tensor in sample.items()}
    order = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
    outputs = ssd_recurrent(
        *(leaves[name] for name in order), True, 0.0, float("inf"), leaves["initial_state"], None
    )
    grads = torch.autograd.grad(outputs, list(leaves.values()), [c.double() for c in cotangents])
    for name, actual, expected in zip(["y", "state", *sample], found, [*outputs, *grads], strict=True):
        error = (actual - expected).norm() / expected.norm()
        assert error < 1e-5, f"{name}: {error:.1e}"


@built
@torch.no_grad()
@pytest.mark.parametrize("name", ["x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_state"])
def test_a_nan_is_never_swallowed(name):
    """Training stops at a loss that is not finite; a kernel must not hide one behind a decay of zero."""
    sample = ssd_sample(4, 1, 16, 16, 5)
    sample[name].view(-1)[0] = float("nan")
    y, _ = vision_scan.ssd(**sample, dt_softplus=True, return_final_state=True)
    assert y.isnan().any()
    scan = {"x": "u", "D": None}.get(name, name)
    inputs = {
        **{key: torch.randn(2, 8, 5) for key in ("u", "dt", "z")},
        **{key: torch.randn(2, 3, 5) for key in ("B", "C")},
        "A": -torch.rand(8, 3),
        "dt_bias": torch.randn(8),
        "initial_state": torch.randn(2, 8, 3),
    }
    if scan:
        inputs[scan].view(-1)[0] = float("nan")
        assert vision_scan.selective_scan(**inputs, dt_softplus=True).isnan().any()


@built
def test_bits_do_not_depend_on_the_number_of_threads():
    sample = ssd_sample(10, 1, 33, 17, 200)
    cotangents = [torch.randn_like(t) for t in (sample["x"], sample["initial_state"])]
    x, z, weight = torch.randn(3, 500, 96), torch.randn(3, 500, 96), torch.randn(96)
    taps, bias = torch.randn(96, 4), torch.randn(96)

    def everything() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (x, z, weight, taps, bias)]
        y = vision_scan.gated_rmsnorm(leaves[0], leaves[2], leaves[1], group_size=48)
        y = vision_scan.causal_conv1d(y.transpose(1, 2), leaves[3], leaves[4], "silu")
        return [*run_ssd(sample, cotangents), y, *torch.autograd.grad(y.square().sum(), leaves)]

    assert_same_on_any_number_of_threads(everything)


@built
@pytest.mark.parametrize(("channels", "d_state"), [(144, 1), (70, 16), (96, 3)])
def test_bits_of_the_selective_scan_do_not_depend_on_how_channels_are_shared_out(channels, d_state):
    """144 channels are 4 blocks and a half: which of them stand in one unit follows from the threads."""
    u, dt, A = torch.randn(1, channels, 40), torch.randn(1, channels, 40), -torch.rand(channels, d_state)
    B, C, D = torch.randn(1, d_state, 40), torch.randn(1, d_state, 40), torch.randn(channels)

    def everything() -> list[torch.Tensor]:
        leaves = [t.clone().requires_grad_() for t in (u, dt, A, B, C, D)]
        y = vision_scan.selective_scan(*leaves, dt_softplus=True)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    assert_same_on_any_number_of_threads(everything)


def assert_same_on_any_number_of_threads(everything) -> None:
    threads, found = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3, 5):
            torch.set_num_threads(number)
            found.append(everything())
    finally:
        torch.set_num_threads(threads)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@built
@torch.no_grad()
def test_what_a_kernel_does_not_serve_goes_to_the_reference_and_is_counted():
    x, weight = torch.randn(2, 3, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    before = vision_scan.backend_report()["gated_rmsnorm"]["fallbacks"]
    y = vision_scan.gated_rmsnorm(x, weight)
    assert y.dtype == torch.float64
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (8,), weight, 1e-5))
    assert vision_scan.backend_report()["gated_rmsnorm"]["fallbacks"] == before + 1
    vision_scan.gated_rmsnorm(x.float(), weight.float())
    assert vision_scan.backend_report()["gated_rmsnorm"]["fallbacks"] == before + 1


@built
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    x, z, weight = (torch.randn(4, 64).to(dtype) for _ in range(3))
    found = vision_scan.gated_rmsnorm(x, weight[0], z)
    expected = vision_scan.gated_rmsnorm(x.float(), weight[0].float(), z.float()).to(dtype)
    assert torch.equal(found, expected)


def mixed(wide: torch.Tensor, seq_idx: torch.Tensor, copied: bool) -> list[torch.Tensor]:
    """Convolution, scan and norm of pieces of a projection, copied or where they lie, and its gradient."""
    leaf = wide.clone().requires_grad_()
    pieces = leaf[:, :, 0].split([48, 48, 10, 10, 6, 5], dim=-1)
    x, z, B, C, dt, _ = (piece.contiguous() if copied else piece for piece in pieces)
    weight = torch.linspace(-1, 1, 48 * 4).view(48, 4)
    y = vision_scan.causal_conv1d(x.transpose(1, 2), weight, None, "silu", seq_idx=seq_idx).transpose(1, 2)
    x = x.unflatten(-1, (6, 8))
    B, C = (t.unflatten(-1, (2, 5)) for t in (B, C))
    outputs = [
        vision_scan.ssd(x, dt, -torch.ones(6), B, C, dt_softplus=True, seq_idx=seq_idx),
        vision_scan.gated_rmsnorm(y, torch.ones(48), z, group_size=16),
    ]
    cotangents = [torch.linspace(-1, 1, t.numel()).view(t.shape) for t in outputs]
    return [*outputs, *torch.autograd.grad(outputs, [leaf], cotangents)]


@built
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("seqlen", [1, 70])
@pytest.mark.parametrize("every", [1, 2])
def test_pieces_of_a_projection_are_read_where_they_lie(batch, seqlen, every):
    generator = torch.Generator().manual_seed(batch)
    wide = torch.randn(batch, seqlen, every, 127, generator=generator)
    seq_idx = torch.arange(seqlen).expand(batch, -1) // 20 - 1
    piece = wide[:, :, 0, 48:96]
    assert cpu._cells(piece, 2).data_ptr() == piece.data_ptr()
    in_place, of_copies = (mixed(wide, seq_idx, copied) for copied in (False, True))
    assert all(torch.equal(*pair) for pair in zip(in_place, of_copies, strict=True))


@built
def test_pieces_without_one_stride_are_copied():
    wide = torch.randn(4, 9, 60)
    for piece in (wide[::2, :, :48], wide[:, :5, :48], wide.transpose(0, 1)[..., :48], wide[..., ::2]):
        cells = cpu._cells(piece, 2)
        assert torch.equal(cells, piece)
        assert cells.is_contiguous()


@built
@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"x": torch.randn(1, 2, 4, 4)}, "x must have 5 axes, got 4"),
        ({"A": torch.randn(1, 3)}, r"A must have shape \[1, 2\], got \[1, 3\]"),
        ({"dt": torch.randn(1, 1, 5, 2).double()}, "dt must be Float, got Double"),
        ({"C": torch.randn(1, 1, 3, 1, 5).transpose(2, 4)}, "C must be contiguous"),
        ({"B": torch.randn(2, 1, 5, 1, 3)[:, :, :, :, ::2]}, "B must have shape"),
        ({"B": torch.randn(1, 1, 5, 1, 6)[..., ::2]}, "B must be contiguous behind its first 3 axes"),
        ({"index": torch.tensor([[0, 1, 2, 3, 5]])}, "index must be below 5"),
        ({"cu_seqlens": torch.tensor([0, 3, 2, 5])}, "cu_seqlens must rise from 0 to seqlen 5"),
    ],
)
def test_no_pointer_is_touched_before_everything_is_checked(change, told):
    arguments = {
        "x": torch.randn(1, 1, 5, 2, 4),
        "dt": torch.randn(1, 1, 5, 2),
        "A": torch.randn(1, 2),
        "B": torch.randn(1, 1, 5, 1, 3),
        "C": torch.randn(1, 1, 5, 1, 3),
        **dict.fromkeys(("D", "dt_bias", "initial_state", "seq_idx", "cu_seqlens", "index")),
    }
    options = {"dt_softplus": True, "dt_min": 0.0, "dt_max": 1.0}
    torch.ops.vision_scan_cpu.ssd(**arguments, **options)
    with pytest.raises(ValueError, match=told):
        torch.ops.vision_scan_cpu.ssd(**{**arguments, **change}, **options)


@built
def test_avx2_is_as_right_as_avx512():
    """A machine without AVX-512 runs other code: its tests run here in a process that may not use it."""
    script = "import torch, sys, vision_scan; sys.exit(torch.ops.vision_scan_cpu.instruction_set() != 'avx2')"
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "avx2"}
    subprocess.run([sys.executable, "-c", script], env=environment, cwd=ROOT, check=True)
    tests = ["test_compiled.py", "test_reference.py"]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-k", "not avx2"]
    command += [f"tests/vision_scan/{name}" for name in tests]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_reference_can_be_asked_for(monkeypatch):
    script = "import vision_scan; print(vision_scan.backend_report()['ssd'])"
    environment = {**os.environ, "VISION_SCAN_REFERENCE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "'cpu': 'reference'" in done.stdout and "VISION_SCAN_REFERENCE=1" in done.stdout
    monkeypatch.setenv("VISION_SCAN_REFERENCE", "1")
    assert "asks for the reference" in cpu._why_missing()
