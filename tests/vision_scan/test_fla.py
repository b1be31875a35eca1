"""`gated_delta_rule` on fla. Its kernels need a GPU; a slow function with fla's arguments, layout and demands takes
their place here, and Triton's interpreter runs the kernels themselves where fla is installed."""

import importlib.util
import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

import vision_scan
from tests.tolerance import RATIO, assert_close
from tests.vision_scan.samples import cotangents_of, sample_gated_delta_rule, segments, with_gradients
from vision_scan.ops import register
from vision_scan.ops.cuda import gated_delta_rule as adapter
from vision_scan.ops.cuda import rivals

ROOT = Path(__file__).resolve().parents[2]
NAME = "gated_delta_rule"
DEVICE = torch.get_default_device().type
needs_fla = pytest.mark.skipif(importlib.util.find_spec("fla") is None, reason="fla is not installed")


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None, chunk_indices=None, cp_context=None,
):  # fmt: skip
    """Stands in for fla's function: q and k (batch, seqlen, heads, head_k_dim), v (batch, seqlen, value heads,
    head_v_dim), states (rows or segments, value heads, head_k_dim, head_v_dim). Decays are differences of sums over
    the logarithms, as in the kernels."""
    assert q.dtype == k.dtype == v.dtype and g.dtype == beta.dtype == torch.promote_types(v.dtype, torch.float32)
    assert output_final_state and not (use_qk_l2norm_in_kernel or use_beta_sigmoid_in_kernel or allow_neg_eigval)
    assert cu_seqlens_cpu is None and chunk_indices is None and cp_context is None and not state_v_first
    rows = [(i, slice(None)) for i in range(len(q))]
    if cu_seqlens is not None:
        assert len(q) == 1 and cu_seqlens.dtype == torch.int64
        bounds = cu_seqlens.tolist()
        assert bounds[0] == 0 and bounds[-1] == q.shape[1] and all(torch.diff(cu_seqlens) > 0)
        rows = [(0, slice(*bounds[i : i + 2])) for i in range(len(bounds) - 1)]
    shape = (len(rows), v.shape[2], k.shape[3], v.shape[3])
    assert initial_state is None or initial_state.shape == shape
    start = torch.zeros(shape, dtype=g.dtype) if initial_state is None else initial_state
    parts = [
        _slow(*(t[row, piece].to(g.dtype) for t in (q, k, v, g, beta)), scale, state)
        for (row, piece), state in zip(rows, start, strict=True)
    ]
    y = torch.cat([y for y, _ in parts]).view(v.shape)
    return y.to(q.dtype), torch.stack([state for _, state in parts])


def _slow(q, k, v, g, beta, scale, state) -> tuple[Tensor, Tensor]:
    q, k = (t.repeat_interleave(v.shape[1] // t.shape[1], dim=1) for t in (q, k))
    total, outputs = g.cumsum(0), []
    for t in range(len(q)):
        state = state * (total[t] - (total[t - 1] if t else 0.0)).exp()[:, None, None]
        change = beta[t, :, None] * (v[t] - torch.einsum("hn,hnp->hp", k[t], state))
        state = state + k[t, :, :, None] * change[:, None]
        outputs.append(torch.einsum("hn,hnp->hp", q[t] * scale, state))
    return torch.stack(outputs), state


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """Puts the stand-in where fla would be, and counts its calls."""
    counts = Counter()

    def counted(*args, **kwargs):
        counts[NAME] += 1
        return chunk_gated_delta_rule(*args, **kwargs)

    for path in ("fla", "fla.ops", adapter.MODULE):
        monkeypatch.setitem(sys.modules, path, ModuleType(path))
    sys.modules["fla"].__version__ = "0.6.0"
    sys.modules[adapter.MODULE].chunk_gated_delta_rule = counted
    adapter._function.cache_clear()
    yield counts
    adapter._function.cache_clear()


@pytest.fixture
def chains(calls, monkeypatch: pytest.MonkeyPatch) -> dict[str, list]:
    """fla alone, for tensors of the tests' device."""
    monkeypatch.setattr(register, "GIVEN_UP", {})
    names = (NAME, f"{NAME}_backward")
    before = {name: list(register.KERNELS.get((name, DEVICE), ())) for name in names}
    for name in names:
        register.KERNELS.get((name, DEVICE), []).clear()
    rivals.take_over_all(DEVICE)
    yield {name: register.KERNELS[name, DEVICE] for name in names}
    for name in names:
        register.KERNELS[name, DEVICE][:] = before[name]


def through_fla(
    q, k, v, g, beta, scale=None, initial_state=None, seq_idx=None, chunk_size=64, cu_seqlens=None
) -> tuple[Tensor, Tensor]:
    scale = k.shape[-1] ** -0.5 if scale is None else scale
    return adapter.scan(q, k, v, g, beta, scale, initial_state, seq_idx, cu_seqlens, chunk_size)


def through_us(**inputs) -> tuple[Tensor, Tensor]:
    return vision_scan.gated_delta_rule(**inputs, return_final_state=True)


def with_resets(sample):
    sample[0]["g"][:, 2], sample[0]["g"][:, 4:6], sample[0]["g"][0, 7] = -torch.inf, -1e30, -60.0
    return sample


def packed(sample, bounds: list[int], states: bool = True):
    """The one row of a sample in pieces, each with an initial state."""
    tensors, options = sample
    if states:
        shape = (len(bounds) - 1, *tensors["initial_state"].shape[1:])
        tensors["initial_state"] = torch.randn(shape, dtype=tensors["v"].dtype)
    return tensors, {**options, "cu_seqlens": torch.tensor(bounds)}


PADS = ["...001122", "0.1.1...2", ".........", "000000000", "0.0.0.0.0"]
SAMPLES = {
    "rows": lambda: sample_gated_delta_rule(batch=3, seqlen=9, scale=0.7),
    "no-start": lambda: sample_gated_delta_rule(batch=2, seqlen=9, initial_state=False),
    "heads": lambda: sample_gated_delta_rule(batch=2, seqlen=5, num_k_heads=3, num_v_heads=6),
    "resets": lambda: with_resets(sample_gated_delta_rule(batch=2, seqlen=9)),
    "segments": lambda: sample_gated_delta_rule(batch=2, seqlen=9, seq_idx=["000111222", "555533300"]),
    "pads": lambda: sample_gated_delta_rule(batch=5, seqlen=9, num_k_heads=2, num_v_heads=4, seq_idx=PADS),
    "pads-no-start": lambda: sample_gated_delta_rule(batch=5, seqlen=9, initial_state=False, seq_idx=PADS),
    "pads-resets": lambda: with_resets(sample_gated_delta_rule(batch=5, seqlen=9, seq_idx=PADS)),
    "only-pads": lambda: sample_gated_delta_rule(batch=2, seqlen=3, seq_idx=["...", "..."]),
    "one-row-after-empty-ones": lambda: sample_gated_delta_rule(batch=3, seqlen=4, seq_idx=["....", "....", "1.12"]),
    "packed": lambda: packed(sample_gated_delta_rule(seqlen=9), [0, 3, 3, 8, 9, 9]),
    "packed-no-start": lambda: packed(sample_gated_delta_rule(seqlen=9, initial_state=False), [0, 0, 4, 9], False),
    "packed-pads": lambda: packed(sample_gated_delta_rule(seqlen=9, seq_idx=["0.011..12"]), [0, 4, 5, 7, 9]),
}


def paddings(sample) -> Tensor:
    """(batch, seqlen) bool."""
    tensors, options = sample
    return options.get("seq_idx", torch.zeros(tensors["v"].shape[:2])) < 0


@pytest.mark.parametrize("make", SAMPLES.values(), ids=SAMPLES)
def test_outputs_states_and_gradients_are_those_of_the_reference(make, calls):
    sample = make()
    outputs = through_us(**sample[0], **sample[1])
    cotangents = cotangents_of(outputs)
    expected, expected_grads = with_gradients(through_us, sample, cotangents)
    found, grads = with_gradients(through_fla, sample, cotangents)
    pad = paddings(sample)
    assert calls[NAME] == (not pad.all())
    for part, actual, true in zip(("y", "final state"), found, expected, strict=True):
        assert actual.dtype == true.dtype and actual.is_contiguous()
        assert_close(part, actual, true)
    for key, grad in expected_grads.items():
        assert_close(f"gradient of {key}", grads[key], grad)
    nothing = [found[0], *(grads[key] for key in ("q", "k", "v", "g", "beta"))]
    assert not any(t[pad].any() for t in nothing)


def test_rows_without_a_real_token_keep_their_state(calls):
    sample = SAMPLES["pads"]()
    _, state = through_fla(**sample[0], **sample[1])
    assert torch.equal(state[2], sample[0]["initial_state"][2])


def test_what_stands_in_padding_is_never_read(calls):
    tensors, options = SAMPLES["pads"]()
    expected = through_fla(**tensors, **options)
    for key in ("q", "k", "v", "g", "beta"):
        tensors[key][paddings((tensors, options))] = torch.nan
    for actual, true in zip(through_fla(**tensors, **options), expected, strict=True):
        assert torch.equal(actual, true)


@pytest.mark.parametrize("dtype", adapter.DTYPES, ids=str)
@pytest.mark.parametrize("narrow", ["all", "values"])
def test_the_operator_computes_and_trains_through_fla(narrow, dtype, calls, chains):
    """Queries and keys may be float32, as a layer that has given them unit length hands them over."""
    tensors, options = sample_gated_delta_rule(
        batch=2, seqlen=9, num_k_heads=2, num_v_heads=4, head_k_dim=16, head_v_dim=32, dtype=dtype,
        seq_idx=["0011.1222", ".........",],
    )  # fmt: skip
    if narrow == "values":
        tensors |= {key: tensors[key].float() for key in ("q", "k")}
    sample, before = (tensors, options), dict(register.FALLBACKS)
    cotangents = cotangents_of(through_us(**tensors, **options))
    found, grads = with_gradients(through_us, sample, cotangents)
    assert before == register.FALLBACKS
    assert calls == {NAME: 3}  # one for the cotangents, one before the backward, one in it
    assert vision_scan.backend_report()[NAME][DEVICE] == "fla"
    for chain in chains.values():
        chain.clear()
    expected, expected_grads = with_gradients(through_us, sample, cotangents)
    for actual, true in zip(found, expected, strict=True):
        assert actual.dtype == true.dtype
        assert_close("output", actual, true, RATIO[dtype])
    for key, grad in expected_grads.items():
        assert grads[key].dtype == grad.dtype
        assert_close(f"gradient of {key}", grads[key], grad, RATIO[dtype])


SERVED = {"head_k_dim": 16, "head_v_dim": 16, "dtype": torch.bfloat16}
UNSERVED = {
    "float32": {"dtype": torch.float32},
    "float64": {"dtype": torch.float64},
    "small-keys": {"head_k_dim": 8},
    "odd-values": {"head_v_dim": 17},
    "large-keys": {"head_k_dim": 272},
}


@pytest.mark.parametrize("sizes", UNSERVED.values(), ids=UNSERVED)
def test_what_fla_cannot_do_goes_to_the_reference(sizes, calls, chains):
    tensors, options = sample_gated_delta_rule(**{**SERVED, **sizes})
    through_us(**tensors, **options)
    assert not calls and not register.GIVEN_UP
    tensors, options = sample_gated_delta_rule(**SERVED)
    through_us(**tensors, **options)
    assert calls == {NAME: 1}


class FailsBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y: Tensor) -> Tensor:
        return y.clone()

    @staticmethod
    def backward(ctx, *grads) -> Tensor:
        raise RuntimeError("this Triton is known to be wrong here\nmore")


def run_twice(recwarn) -> list[str]:
    """Two forwards with their backwards on 16 bits, right ones; gives the warnings."""
    sample = sample_gated_delta_rule(**SERVED)
    exact = ({key: t.double() for key, t in sample[0].items()}, sample[1])
    cotangents = cotangents_of(through_us(**exact[0], **exact[1]))
    expected, expected_grads = with_gradients(through_us, exact, cotangents)
    for _ in range(2):
        found, grads = with_gradients(through_us, sample, cotangents)
        for actual, true in zip([*found, *grads.values()], [*expected, *expected_grads.values()], strict=True):
            assert_close("result", actual, true, RATIO[torch.bfloat16])
    return [str(one.message) for one in recwarn.list]


def test_a_backward_that_fails_is_left_to_the_reference(calls, chains, monkeypatch, recwarn):
    def fails(*args, **kwargs):
        y, state = chunk_gated_delta_rule(*args, **kwargs)
        calls[NAME] += 1
        return FailsBackward.apply(y), state

    monkeypatch.setattr(sys.modules[adapter.MODULE], "chunk_gated_delta_rule", fails)
    (told,) = run_twice(recwarn)
    assert told.startswith("fla cannot be used: RuntimeError: this Triton is known to be wrong here; our form")
    assert calls == {NAME: 3}  # two forwards, one backward
    report = vision_scan.backend_report()[NAME]
    assert report[DEVICE] == "fla" and "this Triton is known to be wrong here" in report["why"]


@pytest.mark.parametrize("how", ["import", "version", "name"])
def test_fla_that_cannot_be_used_is_told_of_once(how, calls, chains, monkeypatch, recwarn):
    if how == "import":
        monkeypatch.setitem(sys.modules, "fla", None)  # makes the import fail
    elif how == "version":
        sys.modules["fla"].__version__ = "0.5.12"
    else:
        del sys.modules[adapter.MODULE].chunk_gated_delta_rule
    (told,) = run_twice(recwarn)
    assert told.startswith("fla cannot be used: ") and not calls
    report = vision_scan.backend_report()[NAME]
    assert report[DEVICE] == "reference" and "fla cannot be used: " in report["why"]
    assert how != "version" or "fla 0.5.12 is older than 0.6" in report["why"]


def test_a_mistake_of_the_caller_or_too_little_memory_is_not_the_fault_of_fla(calls, chains, monkeypatch):
    tensors, options = sample_gated_delta_rule(**SERVED, initial_state=False)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to seqlen 8"):
        through_us(**tensors, **options, cu_seqlens=torch.tensor([0, 9]))

    def needs_more(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[adapter.MODULE], "chunk_gated_delta_rule", needs_more)
        adapter._function.cache_clear()
        with pytest.raises(torch.OutOfMemoryError):
            through_us(**tensors, **options)
    adapter._function.cache_clear()
    through_us(**tensors, **options)
    assert calls == {NAME: 1} and not register.GIVEN_UP


@needs_fla
def test_the_stand_in_computes_what_fla_says():
    """fla's own slow form knows no groups of heads and no segments."""
    from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule

    tensors, _ = sample_gated_delta_rule(batch=2, seqlen=9, num_k_heads=2, num_v_heads=2, dtype=torch.float32)
    q, k, v, g, beta, state = tensors.values()
    more = {"scale": 0.7, "initial_state": state.transpose(-1, -2), "output_final_state": True}
    expected = naive_recurrent_gated_delta_rule(q, k, v, beta, g, **more)
    for actual, true in zip(chunk_gated_delta_rule(q, k, v, g, beta, **more), expected, strict=True):
        assert_close("output", actual, true, 1e-6)


# Kernels are tried with one set of sizes, as nothing can be timed; the interpreter's own `range` gives plain integers,
# on which fla calls a method of Triton's.
INTERPRET = """
import json, sys
import numpy as np
import torch
import triton.language as tl
from triton.runtime.autotuner import Autotuner
from triton.runtime.interpreter import TensorHandle

Autotuner.prune_configs = lambda self, kwargs: self.configs[:1]
import fla.ops.common.chunk_delta_h as with_loops

def tensors(*bounds):
    for i in range(*map(int, bounds)):
        yield tl.tensor(TensorHandle(np.array([i], dtype=np.int32), tl.int32), tl.int32)

with_loops.range = tensors
from tests.tolerance import rms_ratio
from tests.vision_scan.samples import cotangents_of, with_gradients
from tests.vision_scan.test_fla import INTERPRETED, through_fla, through_us

errors = {}
for dtype in (torch.float32, torch.float16):
    sample = INTERPRETED[sys.argv[1]](dtype)
    exact = ({key: t.double() for key, t in sample[0].items()}, sample[1])
    cotangents = cotangents_of(through_us(**exact[0], **exact[1]))
    expected, expected_grads = with_gradients(through_us, exact, cotangents)
    found, grads = with_gradients(through_fla, sample, cotangents)
    pairs = {"y": (found[0], expected[0]), "state": (found[1], expected[1])}
    pairs |= {key: (grads[key], expected_grads[key]) for key in grads}
    errors[str(dtype)] = {key: rms_ratio(*pair) for key, pair in pairs.items()}
print(json.dumps(errors))
"""
LONG = {"head_k_dim": 16, "head_v_dim": 32, "least_g": -0.5}
INTERPRETED = {
    "rows": lambda dtype: sample_gated_delta_rule(batch=2, seqlen=70, dtype=dtype, **LONG),
    "pads": lambda dtype: sample_gated_delta_rule(
        batch=3, seqlen=80, dtype=dtype, **LONG,
        seq_idx=["0" * 70 + "." * 7 + "001", "." * 80, "0.1" + "2" * 30 + "." * 47],
    ),
    "resets": lambda dtype: with_resets(sample_gated_delta_rule(seqlen=70, dtype=dtype, **LONG)),
    "packed": lambda dtype: packed(sample_gated_delta_rule(seqlen=70, dtype=dtype, **LONG), [0, 3, 3, 69, 70]),
}  # fmt: skip


@needs_fla
@pytest.mark.slow
@pytest.mark.parametrize("case", INTERPRETED)
def test_the_kernels_of_fla_agree_in_the_interpreter(case):
    """Products are exact there, so float32 is float32. Resets cost some of its digits (`LEAST_G`)."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, "-W", "ignore", "-c", INTERPRET, case]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = json.loads(done.stdout.splitlines()[-1])
    allowed = {"torch.float32": 1e-4 if case == "resets" else 1e-5, "torch.float16": RATIO[torch.float16]}
    for dtype, ratios in errors.items():
        assert all(ratio <= allowed[dtype] for ratio in ratios.values()), (dtype, ratios)


def test_segments_are_packed_in_order():
    found = adapter.Packed.of(segments("..00.1", "......", "2.2211"), None, 3, 6)
    assert found.places.tolist() == [2, 3, 5, 12, 14, 15, 16, 17]
    assert found.bounds.tolist() == [0, 2, 3, 6, 8]
    assert found.row.tolist() == [0, 0, 2, 2] and found.last.tolist() == [1, 1, 3]
