"""The operators as PyTorch sees them: opcheck, compile, autocast, threads; report; refusals."""

import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

import vision_scan
from tests.tolerance import assert_close
from tests.vision_scan.samples import (
    OPERATORS,
    cotangents_of,
    sample_causal_conv1d,
    sample_causal_conv1d_2d,
    sample_gated_delta_rule,
    sample_gated_rmsnorm,
    sample_selective_scan,
    sample_selective_scan_2d,
    sample_ssd,
    sample_ssd_2d,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("poison", "registered")

SEGMENTS = ["00.1122", "2..2.11"]
REGISTERED = {
    "causal_conv1d", "causal_conv1d_2d", "causal_conv1d_update", "gated_delta_rule",
    "gated_delta_rule_update", "gated_rmsnorm", "selective_scan", "selective_scan_2d",
    "selective_scan_update", "ssd", "ssd_2d", "ssd_update",
}  # fmt: skip


def sample_update(sample: Callable, **sizes) -> tuple[dict, dict]:
    """A sample of an update: three slots, two rows, one of them padded."""
    tensors, options = sample(batch=2, seqlen=5, seq_idx=["0.000", ".0111"], **sizes)
    del tensors["initial_state"]
    options.pop("chunk_size", None)
    state = sample(batch=3, seqlen=5, **sizes)[0]["initial_state"]
    return {"state": state, **tensors}, {**options, "state_indices": torch.tensor([2, 0])}


# Every public operator with every input that it can take: operator -> sample for a dtype.
SAMPLES: dict[str, Callable[[torch.dtype], tuple[dict, dict]]] = {
    "ssd": lambda dtype: sample_ssd(
        batch=2, seqlen=7, z=True, D="channels", chunk_size=4, seq_idx=SEGMENTS, dtype=dtype
    ),
    "gated_delta_rule": lambda dtype: sample_gated_delta_rule(
        batch=2, seqlen=7, chunk_size=4, seq_idx=SEGMENTS, dtype=dtype
    ),
    "selective_scan": lambda dtype: sample_selective_scan(
        batch=2, seqlen=7, z=True, ngroups=2, seq_idx=SEGMENTS, dtype=dtype
    ),
    "causal_conv1d": lambda dtype: sample_causal_conv1d(
        batch=2, seqlen=7, seq_idx=SEGMENTS, dtype=dtype
    ),
    "gated_rmsnorm": lambda dtype: sample_gated_rmsnorm(dtype=dtype),
    "ssd_2d": lambda dtype: sample_ssd_2d(per_list=True, dtype=dtype),
    "selective_scan_2d": lambda dtype: sample_selective_scan_2d(per_list=True, dtype=dtype),
    "causal_conv1d_2d": lambda dtype: sample_causal_conv1d_2d(
        per_list=True, per_list_weight=True, dtype=dtype
    ),
    "ssd_update": lambda dtype: sample_update(sample_ssd, z=True, ngroups=2, dtype=dtype),
    "gated_delta_rule_update": lambda dtype: sample_update(sample_gated_delta_rule, dtype=dtype),
    "selective_scan_update": lambda dtype: sample_update(
        sample_selective_scan, z=True, ngroups=2, dtype=dtype
    ),
    "causal_conv1d_update": lambda dtype: sample_update(sample_causal_conv1d, dtype=dtype),
}
# Without the optional inputs; packed rows; other layouts.
MORE_SAMPLES = [
    ("ssd", lambda: sample_ssd(D=None, dt_bias=False, initial_state=False, dtype=torch.bfloat16)),
    ("ssd", lambda: packed(sample_ssd(seqlen=7, initial_state=False))),
    ("ssd", lambda: sample_ssd(batch=3, seqlen=5, z=True, layout="transposed")),
    ("gated_delta_rule", lambda: sample_gated_delta_rule(initial_state=False, dtype=torch.bfloat16)),
    ("gated_delta_rule", lambda: packed(sample_gated_delta_rule(seqlen=7, initial_state=False))),
    ("gated_delta_rule", lambda: sample_gated_delta_rule(batch=3, seqlen=5, layout="transposed")),
    ("selective_scan", lambda: sample_selective_scan(D=False, dt_bias=False, initial_state=False)),
    ("selective_scan", lambda: packed(sample_selective_scan(seqlen=7, initial_state=False))),
    ("selective_scan", lambda: sample_selective_scan(batch=3, z=True, layout="transposed")),
    ("causal_conv1d", lambda: sample_causal_conv1d(bias=False, initial_state=False)),
    ("causal_conv1d", lambda: packed(sample_causal_conv1d(seqlen=7, initial_state=False))),
    ("causal_conv1d", lambda: sample_causal_conv1d(batch=3, layout="transposed")),
    ("gated_rmsnorm", lambda: sample_gated_rmsnorm(z=False, layout="transposed")),
    ("ssd_2d", lambda: concat(sample_ssd_2d(layout="slice"))),
    ("selective_scan_2d", lambda: concat(sample_selective_scan_2d(layout="slice"))),
]


def packed(sample, seqlen=7):
    return sample[0], {**sample[1], "cu_seqlens": torch.tensor([0, 3, seqlen])}


def concat(sample):
    return sample[0], {**sample[1], "merge": "concat"}


class Recorder(TorchDispatchMode):
    """Notes every call of an operator of ours, on copies of its arguments."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "vision_scan":
            copies = torch.utils._pytree.tree_map_only(Tensor, _copy, args)
            self.calls.append((func, copies))
        return func(*args, **(kwargs or {}))


def _copy(t: Tensor) -> Tensor:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype).copy_(t.detach())


def recorded(name: str, sample: tuple[dict, dict]) -> list:
    """The calls of registered operators that a public call and its backward make."""
    tensors, options = sample
    is_update = name.endswith("_update")
    leaves = {key: t if is_update else t.detach().requires_grad_() for key, t in tensors.items()}
    with Recorder() as recorder:
        outputs = getattr(vision_scan, name)(**leaves, **options)
        if not is_update:
            outputs.backward(cotangents_of([outputs])[0].to(outputs.dtype))
    return recorder.calls


ALL_SAMPLES = [(name, lambda make=make: make(torch.float32)) for name, make in SAMPLES.items()]
ALL_SAMPLES += MORE_SAMPLES


@pytest.mark.parametrize(
    "name, make", ALL_SAMPLES, ids=[f"{name}-{i}" for i, (name, _) in enumerate(ALL_SAMPLES)]
)
def test_opcheck(name, make):
    """Schema, fake and autograd of the operator and of its backward."""
    calls = recorded(name, make())
    assert {call[0]._schema.name.split("::")[1] for call in calls} == (
        {name} if name.endswith("_update") else {name, f"{name}_backward"}
    )
    for func, args in calls:
        is_differentiable = not func._schema.name.endswith(("_update", "_backward"))
        if is_differentiable:
            args = [
                a.requires_grad_() if isinstance(a, Tensor) and a.is_floating_point() else a
                for a in args
            ]
        library.opcheck(func, tuple(args))


# Large enough for PyTorch to share out the work (32768 elements).
BIG = {
    "ssd": lambda dtype: sample_ssd(
        batch=2,
        seqlen=300,
        nheads=8,
        headdim=16,
        d_state=16,
        ngroups=2,
        chunk_size=128,
        dtype=dtype,
    ),
    "ssd-packed": lambda dtype: packed(
        sample_ssd(seqlen=300, nheads=8, headdim=16, d_state=16, initial_state=False, dtype=dtype),
        300,
    ),
    "gated_delta_rule": lambda dtype: sample_gated_delta_rule(
        batch=2, seqlen=300, num_k_heads=4, num_v_heads=8, head_k_dim=16, head_v_dim=16, chunk_size=64, dtype=dtype
    ),
    "selective_scan": lambda dtype: sample_selective_scan(
        batch=2, seqlen=300, d=64, d_state=8, dtype=dtype
    ),
    "causal_conv1d": lambda dtype: sample_causal_conv1d(batch=2, seqlen=300, d=256, dtype=dtype),
    "gated_rmsnorm": lambda dtype: sample_gated_rmsnorm(shape=(600, 256), dtype=dtype),
    "ssd_2d": lambda dtype: sample_ssd_2d(batch=1, grid=(32, 24), nheads=4, headdim=8, dtype=dtype),
    "selective_scan_2d": lambda dtype: sample_selective_scan_2d(
        batch=1, grid=(32, 24), d=32, dtype=dtype
    ),
    "causal_conv1d_2d": lambda dtype: sample_causal_conv1d_2d(
        batch=1, grid=(32, 40), d=96, dtype=dtype
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", BIG)
def test_same_bits_on_one_and_two_threads(name, dtype):
    torch.use_deterministic_algorithms(False)  # as in use: the poison fixture has turned it on
    sample = BIG[name](dtype)

    def run(**inputs):
        return (getattr(vision_scan, name.removesuffix("-packed"))(**inputs),)

    cotangents = cotangents_of(run(**sample[0], **sample[1]))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(with_gradients(run, sample, cotangents))
    finally:
        torch.set_num_threads(before)
    (outputs, grads), (found, found_grads) = results
    assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True))
    assert [key for key in grads if not torch.equal(found_grads[key], grads[key])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_autocast_changes_nothing(name, dtype):
    """The scan accumulates in float32 under autocast, forwards and backwards."""
    sample = OPERATORS[name].sample(dtype=dtype)
    cotangents = cotangents_of(OPERATORS[name].run(**sample[0], **sample[1]))
    outputs, grads = with_gradients(OPERATORS[name].run, sample, cotangents)
    with torch.autocast(torch.get_default_device().type, torch.bfloat16):
        found, found_grads = with_gradients(OPERATORS[name].run, sample, cotangents)
    if name in ("ssd", "gated_delta_rule", "selective_scan"):
        assert found[1].dtype == torch.float32
    for actual, expected in zip(found, outputs, strict=True):
        assert actual.dtype == expected.dtype and torch.equal(actual, expected)
    for key, grad in grads.items():
        assert torch.equal(found_grads[key], grad), f"gradient of {key}"


@pytest.mark.parametrize("used", [0, 1], ids=["y", "state"])
@pytest.mark.parametrize("name", ["ssd", "gated_delta_rule", "selective_scan", "causal_conv1d"])
def test_an_output_that_is_not_used_has_a_gradient_of_zero(name, used):
    sample = OPERATORS[name].sample(batch=2, dtype=torch.float32)
    outputs = OPERATORS[name].run(**sample[0], **sample[1])
    cotangents = cotangents_of(outputs)
    _, found = with_gradients(
        lambda **inputs: (OPERATORS[name].run(**inputs)[used],), sample, cotangents[used : used + 1]
    )
    cotangents[1 - used] = torch.zeros_like(outputs[1 - used])
    _, expected = with_gradients(OPERATORS[name].run, sample, cotangents)
    for key, grad in expected.items():
        assert torch.equal(found[key], grad), f"gradient of {key}"


@pytest.mark.parametrize("name", ["ssd", "gated_delta_rule", "causal_conv1d"])
def test_compiles_without_graph_breaks(name):
    sample = SAMPLES[name](torch.float32)
    cotangents = cotangents_of(OPERATORS[name].run(**sample[0], **sample[1]))
    outputs, grads = with_gradients(OPERATORS[name].run, sample, cotangents)
    compiled = torch.compile(OPERATORS[name].run, fullgraph=True, backend="aot_eager")
    found, found_grads = with_gradients(compiled, sample, cotangents)
    torch.compiler.reset()
    for actual, expected in zip(found, outputs, strict=True):
        assert torch.equal(actual, expected)
    for key, grad in grads.items():
        assert_close(f"gradient of {key}", found_grads[key], grad, 1e-6)


def test_backend_report_covers_every_operator():
    report = vision_scan.backend_report()
    assert set(report) == REGISTERED
    for name, entry in report.items():
        backends = {entry["cpu"], entry["cuda"]}
        assert backends <= {"compiled", "mamba_ssm", "causal_conv1d", "fla", "reference"}, name
        assert isinstance(entry["fallbacks"], int)
        assert bool(entry["why"]) == (backends != {"compiled"}), name


# Made too long along this axis where no other input contradicts the last one.
AXIS = {
    ("causal_conv1d", "x"): 1,
    ("causal_conv1d_update", "x"): 1,
    ("causal_conv1d_2d", "weight"): 1,
    ("ssd_2d", "x"): -2,
}
# Changes that leave a valid shape behind: another batch size, another number of slots.
VALID = {
    ("causal_conv1d_2d", "x", "one-row"),
    ("ssd_update", "state", "one-row"),
    ("gated_delta_rule_update", "state", "one-row"),
    ("selective_scan_update", "state", "one-row"),
    ("causal_conv1d_update", "state", "one-row"),
}
# What is expected (numbers, or the names of the axes), then what was given.
TWO_SHAPES = re.compile(r"\(.+\).*\(.*\d.*\)|multiple of")


def wrong_shapes() -> list[tuple[str, str, str]]:
    inputs = []
    for name, make in SAMPLES.items():
        tensors, options = make(torch.float32)
        inputs += [
            (name, key) for key in [*tensors, *(["seq_idx"] if "seq_idx" in options else [])]
        ]
    cases = [(*input_, how) for input_ in inputs for how in ("longer", "one-row", "extra-axis")]
    return [case for case in cases if case not in VALID]


@pytest.mark.parametrize("name, key, how", wrong_shapes())
def test_a_wrong_shape_is_a_value_error_with_both_shapes(name, key, how):
    tensors, options = SAMPLES[name](torch.float32)
    inputs = {**tensors, **options}
    t = inputs[key]
    if how == "longer":
        axis = AXIS.get((name, key), -1)
        inputs[key] = torch.cat([t, t.narrow(axis, 0, 1)], dim=axis)
    elif how == "one-row":
        inputs[key] = t[:1]
    else:
        inputs[key] = t[..., None]
    before = inputs["state"].clone() if "state" in inputs else None
    with pytest.raises(ValueError, match=TWO_SHAPES):
        getattr(vision_scan, name)(**inputs)
    assert before is None or torch.equal(inputs["state"], before)


def test_other_refusals():
    tensors, options = sample_ssd(nheads=3, ngroups=2, initial_state=False)
    with pytest.raises(ValueError, match="nheads 3 must be a multiple of ngroups 2"):
        vision_scan.ssd(**tensors, **options)
    tensors, options = sample_gated_delta_rule(num_v_heads=3, num_k_heads=2)
    with pytest.raises(ValueError, match="num_v_heads 3 must be a multiple of num_k_heads 2"):
        vision_scan.gated_delta_rule(**tensors, **options)
    tensors, options = sample_selective_scan(d=4, ngroups=3)
    with pytest.raises(ValueError, match="4 must be a multiple of ngroups 3"):
        vision_scan.selective_scan(**tensors, **options)
    tensors, _ = sample_causal_conv1d()
    with pytest.raises(ValueError, match="'relu'"):
        vision_scan.causal_conv1d(**tensors, activation="relu")
    with pytest.raises(ValueError, match="d 12 must be a multiple of group_size 5"):
        vision_scan.gated_rmsnorm(torch.zeros(2, 12), torch.zeros(12), group_size=5)


@pytest.mark.parametrize("boundaries", [[0, 3], [1, 8], [0, 5, 3, 8], [0, 9]], ids=str)
@pytest.mark.parametrize("name", ["ssd", "gated_delta_rule", "selective_scan", "causal_conv1d"])
def test_wrong_cu_seqlens(name, boundaries):
    tensors, options = OPERATORS[name].sample(initial_state=False)
    with pytest.raises(ValueError, match="cu_seqlens must rise from 0 to seqlen 8"):
        OPERATORS[name].run(**tensors, **options, cu_seqlens=torch.tensor(boundaries))
    tensors, options = OPERATORS[name].sample(batch=2, initial_state=False)
    with pytest.raises(ValueError, match="batch must be 1, got 2"):
        OPERATORS[name].run(**tensors, **options, cu_seqlens=torch.tensor([0, 8]))
