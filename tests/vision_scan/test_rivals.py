"""Other packages' kernels behind ours: which is asked, and that everything trains through them. They cannot
run here; modules of their names take their place, which compute with the reference in torch."""

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import vision_scan
from tests.tolerance import assert_close
from tests.vision_scan.samples import OPERATORS, cotangents_of, with_gradients
from vision_scan.ops import register
from vision_scan.ops.cuda import rivals
from vision_scan.ops.reference.causal_conv1d import causal_conv1d_shifted
from vision_scan.ops.reference.selective_scan import selective_scan_chunked
from vision_scan.ops.reference.ssd import ssd_chunked

pytestmark = pytest.mark.usefixtures("registered")

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = {"causal_conv1d": "causal_conv1d", "selective_scan": "mamba_ssm", "ssd": "mamba_ssm"}
# What each package takes: its own limits are tested below.
SAMPLES = {
    "causal_conv1d": {"batch": 2, "seqlen": 9, "d": 8, "dtype": torch.float32},
    "selective_scan": {"batch": 2, "seqlen": 9, "z": True, "initial_state": False, "dtype": torch.float32},
    "ssd": {"batch": 2, "seqlen": 9, "z": True, "D": "channels", "dtype": torch.float32},
}


class NoStateGradient(torch.autograd.Function):
    """As in mamba_ssm: the last state looks as if it had a gradient, and passes none on."""

    @staticmethod
    def forward(ctx, state: Tensor) -> Tensor:
        return state.clone()

    @staticmethod
    def backward(ctx, *grads) -> Tensor:
        return torch.zeros_like(grads[0])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Puts the modules where the packages would be; counts the calls of their functions."""
    counts = Counter()

    def causal_conv1d_fn(
        x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
        final_states_out=None, activation=None,
    ):  # fmt: skip
        counts["causal_conv1d"] += 1
        assert seq_idx is None and final_states_out is None and return_final_states
        assert x.stride(1) == 1 and x.stride(0) % 8 == x.stride(2) % 8 == 0
        assert initial_states is None or initial_states.stride(1) == 1
        return causal_conv1d_shifted(x, weight, bias, activation or "", initial_states, None, None)

    def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
    ):
        counts["selective_scan"] += 1
        assert return_last_state
        y, state = selective_scan_chunked(
            u, delta, A, B, C, D, z, delta_bias, delta_softplus, None, None, None
        )
        return y, NoStateGradient.apply(state)

    def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
        cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
        return_varlen_states=False,
    ):  # fmt: skip
        counts["ssd"] += 1
        assert return_final_states and not return_varlen_states and seq_idx is None and cu_seqlens is None
        return ssd_chunked(
            x, dt, A, B, C, D, z, dt_bias, dt_softplus, *dt_limit, initial_states, None, None, chunk_size
        )

    for path, function in (
        (rivals.CONVOLUTION, causal_conv1d_fn),
        (rivals.SELECTIVE_SCAN, selective_scan_fn),
        (rivals.SSD, mamba_chunk_scan_combined),
    ):
        module, _, name = path.rpartition(".")
        monkeypatch.setitem(sys.modules, module.split(".")[0], ModuleType(module.split(".")[0]))
        monkeypatch.setitem(sys.modules, module, ModuleType(module))
        setattr(sys.modules[module], name, function)
    rivals._function.cache_clear()
    yield counts
    rivals._function.cache_clear()


@pytest.fixture
def chains(calls):
    """The rivals on CPU tensors, alone: as on a GPU for which there are no kernels of ours."""
    names = [f"{name}{suffix}" for name in PACKAGE for suffix in ("", "_backward")]
    before = {name: list(register.KERNELS.get((name, "cpu"), ())) for name in names}
    for name in names:
        register.KERNELS.get((name, "cpu"), []).clear()
    rivals.take_over_all("cpu")
    yield {name: register.KERNELS[name, "cpu"] for name in names}
    for name in names:
        register.KERNELS[name, "cpu"][:] = before[name]


def run(name: str, tensors: dict, options: dict, with_state: bool = True) -> list[Tensor]:
    """Outputs and gradients; `with_state`: also of the final state."""
    used = slice(None) if with_state else slice(0, 1)

    def outputs_of(**inputs):
        return OPERATORS[name].run(**inputs)[used]

    with torch.no_grad():
        cotangents = cotangents_of(outputs_of(**tensors, **options))
    outputs, gradients = with_gradients(outputs_of, (tensors, options), cotangents)
    return [*outputs, *gradients.values()]


@pytest.mark.parametrize("name", PACKAGE)
def test_a_rival_computes_and_trains(name, calls, chains):
    tensors, options = OPERATORS[name].sample(**SAMPLES[name])
    before = dict(register.FALLBACKS)
    found = run(name, tensors, options, with_state=name != "selective_scan")
    assert before == register.FALLBACKS
    assert calls == {name: 3}  # one without gradients, one before the backward, one in it
    assert vision_scan.backend_report()[name]["cpu"] == PACKAGE[name]
    for chain in chains.values():
        chain.clear()
    for actual, expected in zip(found, run(name, tensors, options, name != "selective_scan"), strict=True):
        assert_close(name, actual, expected, 1e-6)


def test_a_gradient_that_mamba_ssm_leaves_out_comes_from_the_reference(calls, chains):
    tensors, options = OPERATORS["selective_scan"].sample(**SAMPLES["selective_scan"])
    before = vision_scan.backend_report()["selective_scan"]["fallbacks"]
    found = run("selective_scan", tensors, options)
    assert calls == {"selective_scan": 2}
    assert vision_scan.backend_report()["selective_scan"]["fallbacks"] == before + 1
    for chain in chains.values():
        chain.clear()
    for actual, expected in zip(found, run("selective_scan", tensors, options), strict=True):
        assert_close("selective_scan", actual, expected, 1e-6)


UNSERVED = {
    "padding": ("causal_conv1d", {"batch": 1, "seq_idx": ["..0001122"]}),
    "channels": ("causal_conv1d", {"d": 12}),
    "taps": ("causal_conv1d", {"width": 5}),
    "dtype": ("causal_conv1d", {"dtype": torch.float64}),
    "state of a scan": ("selective_scan", {"initial_state": True}),
    "segments of a scan": ("selective_scan", {"batch": 1, "seq_idx": ["000111222"]}),
    "segments of ssd": ("ssd", {"batch": 1, "seq_idx": ["000111222"]}),
}


@pytest.mark.parametrize("case", UNSERVED)
def test_what_a_rival_cannot_do_goes_to_the_reference(case, calls, chains):
    name, sizes = UNSERVED[case]
    tensors, options = OPERATORS[name].sample(**{**SAMPLES[name], **sizes})
    run(name, tensors, options)
    assert not calls


def test_packed_segments_go_to_the_reference(calls, chains):
    tensors, options = OPERATORS["causal_conv1d"].sample(**{**SAMPLES["causal_conv1d"], "batch": 1})
    del tensors["initial_state"]
    run("causal_conv1d", tensors, {**options, "cu_seqlens": torch.tensor([0, 4, 9])})
    assert not calls


def test_ours_come_first(calls, chains):
    """A rival is asked only what the kernels before it do not serve."""
    chain = chains["causal_conv1d"]
    ours = register.Kernel("compiled", lambda *args: chain[1].run(*args), lambda x, *args: x.shape[2] < 5)
    chain.insert(0, ours)
    assert vision_scan.backend_report()["causal_conv1d"]["cpu"] == "compiled"
    asked = []
    chain[0] = ours._replace(run=lambda *args: asked.append(args) or chain[1].run(*args))
    x, weight = torch.randn(1, 8, 4), torch.randn(8, 4)
    with torch.no_grad():
        vision_scan.causal_conv1d(x, weight)
        assert len(asked) == 1
        vision_scan.causal_conv1d(torch.randn(1, 8, 5), weight)
    assert len(asked) == 1
    assert calls == {"causal_conv1d": 2}


@pytest.mark.parametrize("layout", ["tokens first", "a piece", "channels first"])
def test_a_convolution_is_not_copied_where_it_need_not_be(layout, calls, chains, monkeypatch):
    wide = torch.randn(2, 9, 24)
    x = {
        "tokens first": torch.randn(2, 9, 8).transpose(1, 2),
        "a piece": wide[..., 8:16].transpose(1, 2),
        "channels first": torch.randn(2, 8, 9),
    }[layout]
    seen = []
    function = sys.modules["causal_conv1d"].causal_conv1d_fn
    monkeypatch.setattr(
        sys.modules["causal_conv1d"],
        "causal_conv1d_fn",
        lambda t, *a, **k: seen.append(t) or function(t, *a, **k),
    )
    y = vision_scan.causal_conv1d(x, torch.randn(8, 4))
    assert (seen[0].data_ptr() == x.data_ptr()) == (layout != "channels first")
    assert y.transpose(1, 2).is_contiguous()


def test_a_package_that_does_not_import_is_left_out(chains, monkeypatch, recwarn):
    monkeypatch.setattr(register, "GIVEN_UP", {})
    monkeypatch.setitem(sys.modules, "causal_conv1d", None)  # makes the import fail
    rivals._function.cache_clear()
    x, weight = torch.randn(1, 8, 5), torch.randn(8, 4)
    for _ in range(2):
        found = vision_scan.causal_conv1d(x, weight)
        assert_close("y", found, causal_conv1d_shifted(x, weight, None, "", None, None, None)[0])
    (told,) = recwarn.list
    assert "causal_conv1d cannot be used: ModuleNotFoundError" in str(told.message)
    report = vision_scan.backend_report()["causal_conv1d"]
    assert report["cpu"] == "reference" and "causal_conv1d cannot be used" in report["why"]


def test_a_kernel_of_ours_that_fails_is_an_error(calls, chains):
    def fails(*args):
        raise RuntimeError("ours")

    chains["causal_conv1d"].insert(0, register.Kernel("compiled", fails, lambda *args: True))
    with torch.no_grad(), pytest.raises(RuntimeError, match="ours"):
        vision_scan.causal_conv1d(torch.randn(1, 8, 5), torch.randn(8, 4))
    assert chains["causal_conv1d"][0].run is fails and not calls


def test_nothing_is_imported_before_it_is_called():
    script = """
import importlib.util, sys
from importlib.machinery import ModuleSpec
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: (
    ModuleSpec(name, None) if name in ("mamba_ssm", "causal_conv1d", "fla") else found(name, *rest)
)
import vision_scan
report = vision_scan.backend_report()
assert report["ssd"]["cuda"] == "mamba_ssm" and report["causal_conv1d"]["cuda"] == "causal_conv1d", report
assert report["gated_delta_rule"]["cuda"] == "fla", report
assert report["ssd_2d"]["cuda"] == "reference" and report["ssd"]["why"].startswith("no kernel for"), report
assert not {"mamba_ssm", "causal_conv1d", "fla", "triton"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=True)
