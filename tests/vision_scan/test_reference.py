"""The truth chain: numpy loops = step recurrence = operator: values, final states, gradients."""

import pytest
import torch

from tests.tolerance import assert_as_good_as, assert_close
from tests.vision_scan import truth
from tests.vision_scan.samples import (
    OPERATORS,
    array_options,
    as_arrays,
    cotangents_of,
    true_outputs,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("poison")

# (operator, sizes and options). Chunks: 16 tokens for ssd, about sqrt(seqlen) for selective_scan.
CASES = {
    "ssd-one-token": ("ssd", {"seqlen": 1}),
    "ssd-below-chunk": ("ssd", {"seqlen": 7, "headdim": 5, "d_state": 3, "z": True}),
    "ssd-not-a-multiple": (
        "ssd",
        {"batch": 3, "seqlen": 37, "nheads": 4, "ngroups": 2, "D": "channels"},
    ),
    "ssd-multiple": (
        "ssd",
        {"seqlen": 32, "nheads": 3, "headdim": 1, "ngroups": 3, "D": None, "z": True},
    ),
    "ssd-257": ("ssd", {"seqlen": 257, "headdim": 2, "chunk_size": 64, "D": "channels", "z": True}),
    "ssd-one-state": ("ssd", {"seqlen": 19, "headdim": 2, "d_state": 1, "initial_state": False}),
    "ssd-slices": (
        "ssd",
        {"batch": 3, "seqlen": 21, "nheads": 2, "ngroups": 2, "z": True, "layout": "slice"},
    ),
    "ssd-transposed": (
        "ssd",
        {"batch": 3, "seqlen": 21, "nheads": 2, "z": True, "layout": "transposed"},
    ),
    "ssd-limit": ("ssd", {"seqlen": 40, "dt_limit": (0.2, 0.6)}),
    "ssd-limit-raw": ("ssd", {"seqlen": 40, "dt_softplus": False, "dt_limit": (0.2, 0.6)}),
    "ssd-raw": ("ssd", {"batch": 3, "seqlen": 18, "dt_softplus": False, "dt_bias": False}),
    "ssd-pads": (
        "ssd",
        {
            "batch": 3,
            "seqlen": 9,
            "chunk_size": 4,
            "z": True,
            "seq_idx": ["...001122", "0.1.1...2", "........."],
        },
    ),
    "ssd-pads-not-a-multiple": (
        "ssd",
        {
            "batch": 3,
            "seqlen": 10,
            "chunk_size": 4,
            "seq_idx": ["0000111122", "00.1112222", "00.111.2.."],
        },
    ),
    "ssd-raw-pads": (
        "ssd",
        {
            "batch": 2,
            "seqlen": 9,
            "chunk_size": 4,
            "dt_limit": (0.2, 0.6),
            "seq_idx": ["0..000...", "3333.3311"],
        },
    ),
    "delta-one-token": ("gated_delta_rule", {"seqlen": 1}),
    "delta-below-chunk": ("gated_delta_rule", {"seqlen": 7, "head_k_dim": 5, "head_v_dim": 6, "scale": 0.7}),
    "delta-not-a-multiple": (
        "gated_delta_rule",
        {"batch": 3, "seqlen": 37, "num_k_heads": 2, "num_v_heads": 6},
    ),
    "delta-multiple": (
        "gated_delta_rule",
        {"seqlen": 32, "num_k_heads": 3, "num_v_heads": 3, "head_v_dim": 1},
    ),
    "delta-257": ("gated_delta_rule", {"seqlen": 257, "head_v_dim": 2, "chunk_size": 64, "least_g": -0.1}),
    "delta-chunks-of-one": ("gated_delta_rule", {"batch": 3, "seqlen": 5, "chunk_size": 1}),
    "delta-one-key-channel": (
        "gated_delta_rule",
        {"seqlen": 19, "head_k_dim": 1, "initial_state": False},
    ),
    "delta-slices": (
        "gated_delta_rule",
        {"batch": 3, "seqlen": 21, "num_k_heads": 2, "num_v_heads": 2, "layout": "slice"},
    ),
    "delta-transposed": ("gated_delta_rule", {"batch": 3, "seqlen": 21, "layout": "transposed"}),
    "delta-pads": (
        "gated_delta_rule",
        {"batch": 3, "seqlen": 9, "chunk_size": 4, "seq_idx": ["...001122", "0.1.1...2", "........."]},
    ),
    "delta-pads-not-a-multiple": (
        "gated_delta_rule",
        {"batch": 3, "seqlen": 10, "chunk_size": 4, "seq_idx": ["0000111122", "00.1112222", "00.111.2.."]},
    ),
    "scan-one-token": ("selective_scan", {"seqlen": 1}),
    "scan-below-chunk": ("selective_scan", {"seqlen": 3, "d": 5, "z": True}),
    "scan-not-a-multiple": ("selective_scan", {"batch": 3, "seqlen": 37, "d": 6, "ngroups": 2}),
    "scan-multiple": (
        "selective_scan",
        {"seqlen": 36, "d": 3, "ngroups": 3, "d_state": 5, "z": True},
    ),
    "scan-257": ("selective_scan", {"seqlen": 257, "d": 2, "d_state": 3, "z": True}),
    "scan-one-state": (
        "selective_scan",
        {"seqlen": 19, "d_state": 1, "D": False, "initial_state": False},
    ),
    "scan-slices": (
        "selective_scan",
        {"batch": 3, "seqlen": 21, "ngroups": 2, "z": True, "layout": "slice"},
    ),
    "scan-transposed": (
        "selective_scan",
        {"batch": 3, "seqlen": 21, "z": True, "layout": "transposed"},
    ),
    "scan-raw": (
        "selective_scan",
        {"batch": 3, "seqlen": 18, "dt_softplus": False, "dt_bias": False},
    ),
    "scan-pads": (
        "selective_scan",
        {
            "batch": 3,
            "seqlen": 9,
            "ngroups": 1,
            "z": True,
            "seq_idx": ["...001122", "0.1.1...2", "........."],
        },
    ),
    "conv-one-token": ("causal_conv1d", {"seqlen": 1}),
    "conv-below-width": ("causal_conv1d", {"batch": 3, "seqlen": 2, "activation": None}),
    "conv-width": ("causal_conv1d", {"seqlen": 4, "bias": False}),
    "conv-257": ("causal_conv1d", {"seqlen": 257, "width": 3, "d": 5}),
    "conv-width-2": (
        "causal_conv1d",
        {"batch": 3, "seqlen": 11, "width": 2, "initial_state": False},
    ),
    "conv-width-1": ("causal_conv1d", {"seqlen": 5, "width": 1}),
    "conv-slices": ("causal_conv1d", {"batch": 3, "seqlen": 10, "layout": "slice"}),
    "conv-transposed": ("causal_conv1d", {"batch": 3, "seqlen": 10, "layout": "transposed"}),
    "conv-pads": (
        "causal_conv1d",
        {"batch": 3, "seqlen": 9, "seq_idx": ["...001122", "0.1.1...2", "........."]},
    ),
    "conv-width-1-pads": (
        "causal_conv1d",
        {"batch": 2, "seqlen": 4, "width": 1, "seq_idx": ["0.11", "...."]},
    ),
    "norm": ("gated_rmsnorm", {}),
    "norm-plain": ("gated_rmsnorm", {"shape": (7,), "z": False, "eps": 0.1}),
    "norm-groups": ("gated_rmsnorm", {"group_size": 4}),
    "norm-before-gate": ("gated_rmsnorm", {"group_size": 3, "norm_before_gate": True}),
    "norm-slices": ("gated_rmsnorm", {"layout": "slice"}),
    "norm-transposed": ("gated_rmsnorm", {"layout": "transposed", "norm_before_gate": True}),
}
HALF_CASES = {
    "ssd": (
        "ssd",
        {
            "batch": 3,
            "seqlen": 70,
            "nheads": 4,
            "ngroups": 2,
            "headdim": 5,
            "D": "channels",
            "z": True,
        },
    ),
    "ssd-pads": (
        "ssd",
        {
            "batch": 2,
            "seqlen": 9,
            "chunk_size": 4,
            "z": True,
            "seq_idx": ["...001122", "0.1.1...2"],
        },
    ),
    "ssd-long": ("ssd", {"seqlen": 257, "chunk_size": 256}),
    "delta": (
        "gated_delta_rule",
        {"batch": 3, "seqlen": 70, "num_k_heads": 2, "num_v_heads": 4, "head_k_dim": 5, "least_g": -0.2},
    ),
    "delta-pads": (
        "gated_delta_rule",
        {"batch": 2, "seqlen": 9, "chunk_size": 4, "seq_idx": ["...001122", "0.1.1...2"]},
    ),
    "delta-long": ("gated_delta_rule", {"seqlen": 257, "chunk_size": 64, "least_g": -0.1}),
    "scan": ("selective_scan", {"batch": 3, "seqlen": 70, "d": 6, "ngroups": 2, "z": True}),
    "scan-pads": (
        "selective_scan",
        {"batch": 2, "seqlen": 9, "z": True, "seq_idx": ["...001122", "0.1.1...2"]},
    ),
    "conv": ("causal_conv1d", {"batch": 3, "seqlen": 70}),
    "conv-pads": (
        "causal_conv1d",
        {"batch": 2, "seqlen": 9, "seq_idx": ["...001122", "0.1.1...2"]},
    ),
    "norm": ("gated_rmsnorm", {"shape": (5, 64), "group_size": 32}),
    "norm-before-gate": ("gated_rmsnorm", {"shape": (5, 64), "norm_before_gate": True}),
}
GRADCHECK = {
    "delta": ("gated_delta_rule", {"seqlen": 5, "chunk_size": 2, "seq_idx": ["0.011"]}),
    "ssd": ("ssd", {"seqlen": 5, "chunk_size": 2, "z": True, "seq_idx": ["0.011"]}),
    "scan": (
        "selective_scan",
        {"seqlen": 5, "d": 2, "z": True, "ngroups": 2, "seq_idx": ["0.011"]},
    ),
    "conv": ("causal_conv1d", {"seqlen": 6, "d": 2, "width": 3, "seq_idx": ["0.0111"]}),
    "norm": ("gated_rmsnorm", {"shape": (2, 6), "group_size": 3}),
}


def cases(table):
    return pytest.mark.parametrize("name, sizes", table.values(), ids=table)


def test_poison_fills_memory_with_nan():
    like = torch.zeros(3)
    made = [
        torch.empty(3),
        torch.empty_like(like),
        like.new_empty(3),
        torch.empty_strided((3,), (2,)),
    ]
    assert all(t.isnan().all() for t in made)


@cases(CASES)
def test_truth_chain_values(name, sizes):
    operator, sample = OPERATORS[name], OPERATORS[name].sample(**sizes)
    tensors, options = sample
    expected = true_outputs(name, sample)
    for who, found in (
        ("recurrence", operator.recurrence(**tensors, **options)),
        ("operator", operator.run(**tensors, **options)),
    ):
        for part, actual, true in zip(("y", "final state"), found, expected, strict=False):
            assert actual.dtype == torch.float64
            assert_close(f"{who}: {part}", actual, true)


@cases(CASES)
def test_truth_chain_gradients(name, sizes):
    """Operator against recurrence entry by entry, and against the truth along directions."""
    operator, sample = OPERATORS[name], OPERATORS[name].sample(**sizes)
    tensors, options = sample
    cotangents = cotangents_of(operator.run(**tensors, **options))
    _, plain = with_gradients(operator.recurrence, sample, cotangents)
    _, found = with_gradients(operator.run, sample, cotangents)
    generator = torch.Generator().manual_seed(2)
    for key, tensor in tensors.items():
        assert_close(f"gradient of {key}", found[key], plain[key])
        direction = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        slopes = truth.along(
            operator.truth, as_arrays(tensors), {key: direction.cpu().numpy()}, **array_options(options)
        )
        slope = sum(
            (torch.from_numpy(s).to(c.device) * c).sum() for s, c in zip(slopes, cotangents, strict=True)
        )
        size = found[key].norm() * direction.norm()
        assert abs((found[key] * direction).sum() - slope) <= 1e-10 * size, key


@cases(GRADCHECK)
def test_gradcheck(name, sizes):
    tensors, options = OPERATORS[name].sample(**sizes)
    leaves = [t.requires_grad_() for t in tensors.values()]

    def run(*values):
        return OPERATORS[name].run(**dict(zip(tensors, values, strict=True)), **options)

    assert torch.autograd.gradcheck(run, leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@cases(HALF_CASES)
def test_low_precision_is_as_good_as_the_plain_recurrence(name, sizes, dtype):
    """Over several samples: a parameter of two heads says little in one of them."""
    operator, tensors = OPERATORS[name], {}
    for seed in range(6):
        sample = operator.sample(**sizes, dtype=dtype, seed=seed)
        exact = ({key: t.double() for key, t in sample[0].items()}, sample[1])
        outputs = true_outputs(name, sample)
        cotangents = cotangents_of(outputs)
        _, true = with_gradients(operator.recurrence, exact, cotangents)
        plain_outputs, plain = with_gradients(operator.recurrence, sample, cotangents)
        found_outputs, found = with_gradients(operator.run, sample, cotangents)
        triples = {
            f"output {i}": t for i, t in enumerate(zip(found_outputs, plain_outputs, outputs, strict=True))
        }
        for key, value in sample[0].items():
            assert found[key].dtype == value.dtype
            triples[f"gradient of {key}"] = found[key], plain[key], true[key]
        for key, triple in triples.items():
            tensors.setdefault(key, []).append([t.flatten() for t in triple])
    for key, samples in tensors.items():
        assert_as_good_as(key, *(torch.cat(parts) for parts in zip(*samples, strict=True)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["ssd", "gated_delta_rule", "selective_scan"])
def test_scan_state_is_float32_and_output_has_the_dtype_of_the_input(name, dtype):
    tensors, options = OPERATORS[name].sample(dtype=dtype)
    y, state = OPERATORS[name].run(**tensors, **options)
    assert (y.dtype, state.dtype) == (dtype, torch.float32)


def test_long_decay_is_not_lost_to_cancellation():
    """Cumulated log-decay of thousands: its differences still have to be float32-exact."""
    operator, sample = (
        OPERATORS["ssd"],
        OPERATORS["ssd"].sample(
            seqlen=257,
            chunk_size=256,
            dt_limit=(20.0, 30.0),
            initial_state=False,
            dtype=torch.float32,
        ),
    )
    sample[0]["A"] = torch.tensor([-1e-3, -8.0])
    y, state = operator.run(**sample[0], **sample[1])
    for actual, expected in zip((y, state), true_outputs("ssd", sample), strict=True):
        assert_close("far decay", actual, expected, 1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_decays_that_leave_nothing_are_exact(dtype):
    """Among tokens that fade a little: what comes behind such a token is as exact as elsewhere."""
    operator = OPERATORS["gated_delta_rule"]
    sample = operator.sample(batch=2, seqlen=40, least_g=-0.1, dtype=dtype)
    g = sample[0]["g"]
    g[:, 5], g[:, 17:19], g[0, 30], g[1, 0] = -1e4, -1e30, -torch.inf, -800.0
    outputs = true_outputs("gated_delta_rule", sample)
    cotangents = cotangents_of(outputs)
    exact = ({key: t.double() for key, t in sample[0].items()}, sample[1])
    _, expected = with_gradients(operator.recurrence, exact, cotangents)
    found, grads = with_gradients(operator.run, sample, cotangents)
    for actual, true in zip(found, outputs, strict=True):
        assert_close("output", actual, true)
    for key, grad in grads.items():
        assert_close(f"gradient of {key}", grad, expected[key])


def test_keys_that_repeat_are_replaced_and_not_added():
    """With beta 1 and no decay, a key has the value that it was last given: what a sum of outer products has not."""
    keys = torch.eye(3, dtype=torch.float64)[[0, 1, 0, 2, 1, 0]][None, :, None]
    v = torch.arange(12, dtype=torch.float64).view(1, 6, 1, 2)
    none, full = torch.zeros(1, 6, 1, dtype=torch.float64), torch.ones(1, 6, 1, dtype=torch.float64)
    run = OPERATORS["gated_delta_rule"].run
    y, state = run(q=keys, k=keys, v=v, g=none, beta=full, scale=1.0, chunk_size=4)
    assert_close("y", y, v, 1e-15)
    assert_close("state", state[0, 0].T, v[0, [5, 4, 3], 0], 1e-15)
