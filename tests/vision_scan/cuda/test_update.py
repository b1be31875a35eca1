"""The CUDA kernels of the updates, on sizes and layouts that the operators' common tests do not have."""

import pytest
import torch
from torch import Tensor

import vision_scan
from tests.tolerance import assert_close
from tests.vision_scan.cuda.loaded import EMULATED, in_any_order_of_threads, needs_kernels
from vision_scan.ops.register import FALLBACKS, REFERENCES

NATIVE = torch.ops.vision_scan_cuda
DEVICE = "cpu" if EMULATED else "cuda"
pytestmark = [needs_kernels, pytest.mark.usefixtures("poison")]


def ssd_tokens(rows, seqlen, nheads, headdim, ngroups, d_state, dtype=torch.float32, seed=0) -> dict:
    """x, B, C, z and dt as pieces of what one projection gives."""
    noise = torch.Generator().manual_seed(seed)
    d_inner, groups = nheads * headdim, ngroups * d_state
    sizes = [d_inner, d_inner, groups, groups, nheads]
    wide = torch.randn(rows, seqlen, sum(sizes), generator=noise).to(DEVICE, dtype)
    z, x, B, C, dt = wide.split(sizes, dim=-1)
    x, z = (t.unflatten(-1, (nheads, headdim)) for t in (x, z))
    B, C = (t.unflatten(-1, (ngroups, d_state)) for t in (B, C))
    draw = torch.randn(2, nheads, generator=noise).to(DEVICE)
    return {
        "x": x, "dt": dt, "A": -draw[0].exp(), "B": B, "C": C, "D": draw[1], "z": z,
        "dt_bias": draw[0], "dt_softplus": True,
    }  # fmt: skip


def random_state(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def by_reference(state: Tensor, tokens: dict, dt_limit=(0.0, float("inf")), slots=None) -> Tensor:
    names = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")
    return REFERENCES["ssd_update"](state, *(tokens[name] for name in names), *dt_limit, None, slots)


SIZES = {  # nheads, headdim, ngroups, d_state: each way of giving a state to lanes
    "mamba2": (2, 64, 1, 128),
    "a quarter of the lanes": (4, 8, 2, 16),
    "wide": (2, 20, 1, 256),
    "single numbers": (3, 5, 3, 7),
    "many single numbers": (2, 3, 1, 255),
    "one of each": (1, 1, 1, 1),
    "few wide": (2, 70, 2, 4),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("size", SIZES)
def test_ssd_update_reads_pieces_of_a_projection(size, dtype):
    nheads, headdim, _, d_state = SIZES[size]
    tokens = ssd_tokens(2, 3, *SIZES[size], dtype)
    state = random_state(2, nheads, headdim, d_state)
    kept, before = state.clone(), FALLBACKS.get("ssd_update", 0)
    y = vision_scan.ssd_update(state, **tokens, dt_limit=(0.1, 1.5))
    assert FALLBACKS.get("ssd_update", 0) == before
    expected = by_reference(kept, tokens, (0.1, 1.5))
    assert_close("y", y, expected)
    assert_close("state", state, kept, 1e-5)


@pytest.mark.parametrize("offset", [1, 2, 4])
def test_ssd_update_of_misaligned_pieces(offset):
    tokens, state = ssd_tokens(2, 2, 2, 4, 1, 8), random_state(2, 2, 4, 8)
    kept = state.clone()
    for name in ("B", "C"):
        wide = torch.full((2, 2, 16 + offset), torch.nan, device=DEVICE)
        tokens[name] = wide[..., offset : offset + 8].copy_(tokens[name].flatten(2)).unflatten(-1, (1, 8))
    assert_close("y", vision_scan.ssd_update(state, **tokens), by_reference(kept, tokens))
    assert_close("state", state, kept)


def test_a_slot_that_does_not_exist_is_skipped():
    tokens, state = ssd_tokens(3, 2, 2, 4, 1, 8), random_state(2, 2, 4, 8)
    kept = state.clone()
    y = vision_scan.ssd_update(state, **tokens, state_indices=torch.tensor([1, 2, 1 << 30], device=DEVICE))
    some = {k: v[:1] if k in ("x", "dt", "B", "C", "z") else v for k, v in tokens.items()}
    expected = by_reference(kept, some, slots=torch.tensor([1], device=DEVICE))
    assert_close("y", y[:1], expected)
    assert not y[1:].any() and torch.equal(state[0], kept[0])
    assert_close("state", state, kept)


def test_convolution_in_place_in_a_projection():
    """As decoding calls it: channels last, the output over the input, what lies beside it untouched."""
    noise = torch.Generator().manual_seed(0)
    for taps in (1, 2, 4, 5, 16):
        wide = torch.randn(3, 4, 21, generator=noise).to(DEVICE)
        weight, bias = torch.randn(150, taps + 1, generator=noise).to(DEVICE)[:13].split([taps, 1], dim=1)
        state = torch.randn(3, 13, taps - 1, generator=noise).to(DEVICE)
        kept, before = state.clone(), wide.clone()
        weight, bias = weight.contiguous(), bias[:, 0].contiguous()
        x = wide[..., 5:18].transpose(1, 2)
        expected = REFERENCES["causal_conv1d_update"](kept, x.clone(), weight, bias, "silu", None, None)
        NATIVE.conv_update(state, x, weight, bias, True, None, None, x)
        assert_close(f"{taps} taps", x, expected)
        assert torch.equal(wide[..., :5], before[..., :5]) and torch.equal(wide[..., 18:], before[..., 18:])
        if taps > 1:
            assert torch.equal(state, kept)


@pytest.mark.parametrize("size", SIZES)
def test_the_order_of_threads_changes_no_bit(size):
    nheads, headdim, _, d_state = SIZES[size]
    tokens = ssd_tokens(2, 3, *SIZES[size])

    def update() -> list[Tensor]:
        state = random_state(2, nheads, headdim, d_state)
        return [vision_scan.ssd_update(state, **tokens), state]

    in_any_order_of_threads(update)


SPOILT = {
    "state in bfloat16": ({"state": lambda t: t.bfloat16()}, "state must be Float, got BFloat16"),
    "state strided": ({"state": lambda t: t.mT.contiguous().mT}, "state must be contiguous"),
    "d_state of B": ({"B": lambda t: t[..., :4]}, r"B must have shape \[2, 2, 1, 8\], got \[2, 2, 1, 4\]"),
    "dtype of C": ({"C": lambda t: t.half()}, "C must be Float, got Half"),
    "x strided": ({"x": lambda t: t.mT.contiguous().mT}, "x must be contiguous for each token"),
    "A of less": ({"A": lambda t: t[:1]}, r"A must have shape \[2\], got \[1\]"),
    "y of another dtype": ({"y": lambda t: t.bfloat16()}, "y must be Float, got BFloat16"),
    "marks": ({"marks": lambda _: torch.zeros(2, 2, device=DEVICE)}, "marks must be Byte, got Float"),
    "slots": (
        {"slots": lambda _: torch.zeros(3, dtype=torch.int32, device=DEVICE)},
        r"slots must have shape \[2\], got \[3\]",
    ),
    "a row less": ({"state": lambda t: t[:1]}, "without slots there is a row for each state, got 2 for 1"),
}


@pytest.mark.parametrize("case", SPOILT)
def test_ssd_update_checks_before_it_changes_anything(case):
    tokens = ssd_tokens(2, 2, 2, 4, 1, 8)
    call = {
        "state": random_state(2, 2, 4, 8), **{k: tokens[k] for k in ("x", "dt", "A")}, "A_is_log": False,
        **{k: tokens[k] for k in ("B", "C", "D", "z", "dt_bias", "dt_softplus")}, "dt_min": 0.0,
        "dt_max": 1.0, "marks": None, "slots": None, "y": torch.zeros(2, 2, 2, 4, device=DEVICE),
        "chained": False,
    }  # fmt: skip
    kept = call["state"].clone()
    changes, message = SPOILT[case]
    spoilt = {**call, **{name: change(call[name]) for name, change in changes.items()}}
    with pytest.raises(ValueError, match=message):
        NATIVE.ssd_update(**spoilt)
    assert torch.equal(call["state"], kept) and not call["y"].any()
