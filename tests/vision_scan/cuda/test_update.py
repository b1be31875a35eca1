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
        "state": random_state(2, 2, 4, 8), "scales": None, **{k: tokens[k] for k in ("x", "dt", "A")},
        "A_is_log": False,
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


def stream_of_tokens(steps: int, rows=2, nheads=4, headdim=20, ngroups=1, d_state=32, dtype=torch.float32):
    """Tokens that come one after another, of heads that forget slowly (as trained ones do) and fast."""
    tokens = ssd_tokens(rows, steps, nheads, headdim, ngroups, d_state, dtype)
    tokens["dt_bias"] = torch.linspace(-6, -2, nheads, device=DEVICE)
    tokens["A"] = -torch.linspace(0.5, 4, nheads, device=DEVICE)
    parts = []
    for t in range(steps):
        each = {name: tokens[name][:, t : t + 1] for name in ("x", "dt", "B", "C", "z")}
        parts.append({**tokens, **each})
    return tokens, parts


ORDER = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "dt_softplus")


def native_arguments(part: dict) -> list:
    x, dt, A, B, C, D, z, dt_bias, dt_softplus = (part[name] for name in ORDER)
    return [x, dt, A, False, B, C, D, z, dt_bias, dt_softplus, 0.0, float("inf")]


def test_a_state_in_8_bits_drifts_little():
    """Over 300 tokens. A scale for each row of the state: it takes up the decay without loss."""
    tokens, parts = stream_of_tokens(300)
    state = random_state(2, 4, 20, 32)
    scales = state.abs().amax(-1) / 127
    codes = (state / scales[..., None]).round().to(torch.int8)
    start = codes.clone(), scales.clone()
    exact = by_reference(state, tokens)

    def run() -> list[Tensor]:
        codes.copy_(start[0]), scales.copy_(start[1])
        outputs = []
        for part in parts:
            outputs.append(torch.empty_like(part["x"], memory_format=torch.contiguous_format))
            NATIVE.ssd_update(codes, scales, *native_arguments(part), None, None, outputs[-1], False)
        return [torch.cat(outputs, 1), codes.clone(), scales.clone()]

    y, codes_after, scales_after = in_any_order_of_threads(run)
    assert codes_after.abs().amax(-1).eq(127).all()  # the largest number of a row has the largest code
    assert_close("state", codes_after * scales_after[..., None], state, 0.05)
    assert_close("outputs", y, exact, 0.05)
    assert not torch.equal(y, exact)


def test_a_skipped_row_of_codes_keeps_its_bits_and_zeros_stay_zeros():
    _, (part,) = stream_of_tokens(1)
    codes = torch.zeros(2, 4, 20, 32, dtype=torch.int8, device=DEVICE)
    scales, y = torch.zeros(2, 4, 20, device=DEVICE), torch.empty(2, 1, 4, 20, device=DEVICE)
    slots = torch.tensor([-1, 0], dtype=torch.int32, device=DEVICE)
    part["x"] = part["x"].clone()
    part["x"][1, 0, 0, :7] = 0
    NATIVE.ssd_update(codes, scales, *native_arguments(part), None, slots, y, False)
    assert not codes[1].any() and not scales[1].any() and not y[0].any()
    assert not codes[0, 0, :7].any() and codes[0, 0, 7:].any(-1).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("room", [1, 2, 5, 8])
def test_deferred_updates_are_the_updates(room, dtype):
    steps, nheads, ngroups = 16, 8, 2
    tokens, parts = stream_of_tokens(steps, nheads=nheads, ngroups=ngroups, dtype=dtype)
    start = random_state(3, nheads, 20, 32)
    slots = torch.tensor([2, 0], dtype=torch.int32, device=DEVICE)
    expected_state = start.clone()
    expected = by_reference(expected_state, tokens, slots=slots)

    def run() -> list[Tensor]:
        state, outputs = start.clone(), []
        kept_x = torch.full((3, room, nheads, 20), torch.nan, dtype=dtype, device=DEVICE)
        kept_B = torch.full((3, room, ngroups, 32), torch.nan, dtype=dtype, device=DEVICE)
        kept_dt = torch.full((3, room, nheads), torch.nan, device=DEVICE)
        waiting = torch.zeros(2, dtype=torch.int32, device=DEVICE)
        for t, part in enumerate(parts):
            before = state.clone()
            outputs.append(torch.empty_like(part["x"], memory_format=torch.contiguous_format))
            NATIVE.deferred_ssd_update(
                state, kept_x, kept_B, kept_dt, waiting, *native_arguments(part), None, slots, outputs[-1]
            )
            assert torch.equal(state, before) == ((t + 1) % room != 0)  # written every `room` steps only
            waiting.add_(1).remainder_(room)
        return [torch.cat(outputs, 1), state]

    y, state = in_any_order_of_threads(run)
    assert_close("y", y, expected)
    assert torch.equal(state[1], start[1])
    if steps % room == 0:
        assert_close("state", state, expected_state)


def test_a_deferred_step_of_padding_changes_nothing():
    _, (part,) = stream_of_tokens(1)
    state = random_state(2, 4, 20, 32)
    kept = [torch.ones(2, 2, 4, 20), torch.ones(2, 2, 1, 32), torch.ones(2, 2, 4), state]
    kept = [t.to(DEVICE) for t in kept]
    before, y = [t.clone() for t in kept], torch.empty(2, 1, 4, 20, device=DEVICE)
    marks = torch.tensor([[1], [0]], dtype=torch.uint8, device=DEVICE)
    waiting = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    NATIVE.deferred_ssd_update(state, *kept[:3], waiting, *native_arguments(part), marks, None, y)
    assert not y[0].any() and y[1].any()
    for found, was in zip(kept, before, strict=True):
        assert torch.equal(found[0], was[0])
    assert not torch.equal(state[1], before[3][1])
    with pytest.raises(ValueError, match=r"kept_B must have shape \[2, 2, 1, 32\], got \[2, 1, 1, 32\]"):
        NATIVE.deferred_ssd_update(
            state,
            kept[0],
            kept[1][:, :1].contiguous(),
            kept[2],
            waiting,
            *native_arguments(part),
            None,
            None,
            y,
        )
