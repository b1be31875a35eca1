"""Mamba-3's scan: numpy loops = step recurrence = scan = update, values, states and gradients."""

import math

import pytest
import torch
from torch import Tensor

import vision_scan
from tests.tolerance import assert_as_good_as, assert_close
from tests.vision_scan import truth
from tests.vision_scan.samples import array_options, as_arrays, segments
from vision_scan.ops.reference.mamba3 import empty_state, mamba3_recurrent

STATE = ("ssm", "angle", "k", "v")
PACKED = segments("0000.11.2.3..", "......0001111", ".............", "0.1.1...22222")

# Sizes and options of a sample. Chunks are of 4 tokens times rank unless said otherwise.
CASES = {
    "one token": {"seqlen": 1},
    "one token, rank 3": {"seqlen": 1, "rank": 3},
    "below a chunk": {"seqlen": 3, "headdim": 1, "d_state": 2, "num_phases": 1},
    "odd": {"seqlen": 13, "nheads": 3, "headdim": 5, "d_state": 7, "num_phases": 3, "batch": 2},
    "chunks of 1": {"seqlen": 6, "chunk_size": 1},
    "chunks of 1, rank 2": {"seqlen": 5, "rank": 2, "chunk_size": 1},
    "rank 2, odd": {"seqlen": 13, "rank": 2, "d_state": 7, "num_phases": 3, "chunk_size": 5},
    "rank 4": {"seqlen": 9, "rank": 4, "num_phases": 1, "D": False},
    "rank 1 with factors": {"seqlen": 7, "mimo_x": True},
    "no state, no D": {"seqlen": 9, "state": False, "D": False},
    "packed": {"seqlen": 13, "batch": 4, "seq_idx": PACKED},
    "packed, rank 3": {"seqlen": 13, "batch": 4, "rank": 3, "seq_idx": PACKED},
    "packed without a state": {"seqlen": 13, "batch": 4, "rank": 2, "seq_idx": PACKED, "state": False},
    "steps of all sizes": {"seqlen": 17, "steps": (-40.0, 5.0)},
    "steps of all sizes, rank 2": {"seqlen": 17, "rank": 2, "steps": (-40.0, 5.0)},
    "decays of all sizes": {"seqlen": 17, "decays": (-12.0, 5.0)},
    "Euler": {"seqlen": 8, "lam": 1.0},
    "all of the token before": {"seqlen": 8, "lam": 0.0, "rank": 2},
}  # fmt: skip


def sample(
    seqlen: int, batch: int = 1, nheads: int = 2, headdim: int = 3, d_state: int = 6, num_phases: int = 2,
    rank: int = 1, state: bool = True, D: bool = True, mimo_x: bool = False, lam: float | None = None,
    steps: tuple[float, float] = (-3.0, 0.5), decays: tuple[float, float] = (-2.0, 1.0),
    seq_idx: Tensor | None = None, chunk_size: int = 4, dtype: torch.dtype = torch.float64,
) -> tuple[dict[str, Tensor], dict[str, Tensor], dict]:  # fmt: skip
    """Inputs, initial state (empty: none) and options; `steps` and `decays` are powers of e."""
    noise = torch.Generator().manual_seed(seqlen + rank)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=noise, dtype=torch.float64)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand((batch, seqlen, nheads), generator=noise, dtype=torch.float64)

    inputs = {
        "x": normal(batch, seqlen, nheads, headdim),
        "dt": uniform(*steps).exp(),
        "A": -uniform(*decays).exp(),
        "lam": uniform(0, 1) if lam is None else torch.full_like(uniform(0, 1), lam),
        "B": normal(batch, seqlen, rank, nheads, d_state),
        "C": normal(batch, seqlen, rank, nheads, d_state),
        "rate": 3 * normal(batch, seqlen, num_phases),
    }
    if D:
        inputs["D"] = normal(nheads)
    if rank > 1 or mimo_x:
        inputs["mimo_x"] = normal(nheads, rank, headdim)
    initial = {
        "ssm": normal(batch, nheads, headdim, d_state),
        "angle": normal(batch, nheads, num_phases),
        "k": normal(batch, rank, nheads, d_state),
        "v": normal(batch, nheads, headdim),
    } if state else {}  # fmt: skip
    inputs, initial = ({name: t.to(dtype) for name, t in part.items()} for part in (inputs, initial))
    return inputs, initial, {"seq_idx": seq_idx, "chunk_size": chunk_size}


def scan(inputs: dict, initial: dict, options: dict) -> tuple[Tensor, ...]:
    y, state = vision_scan.mamba3(**inputs, initial_state=initial or None, **options)
    return y, *(state[name] for name in STATE)


def recurrence(inputs: dict, initial: dict, options: dict) -> tuple[Tensor, ...]:
    y, state = mamba3_recurrent(**inputs, initial_state=initial or None, seq_idx=options["seq_idx"])
    return y, *(state[name] for name in STATE)


def true_outputs(inputs: dict, initial: dict, options: dict) -> list[Tensor]:
    found = truth.mamba3(**as_arrays(inputs | initial), seq_idx=array_options(options)["seq_idx"])
    return list(map(torch.from_numpy, found))


def assert_all_close(found, expected, ratio: float | None = None) -> None:
    """Angles agree if they are a multiple of 2 pi apart."""
    for name, one, other in zip(("y", *STATE), found, expected, strict=True):
        if name == "angle":
            one, other = torch.polar(torch.ones_like(one), one), torch.polar(torch.ones_like(other), other)
            one, other = torch.view_as_real(one), torch.view_as_real(other)
        assert_close(name, one, other, ratio)


def gradients(run, inputs: dict, initial: dict, options: dict) -> dict[str, Tensor]:
    """Of one random weight on every output and on every part of the final state; dt and A, which differ by orders of
    magnitude, by the gradients of their logarithms."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in (inputs | initial).items()}
    outputs = run({name: leaves[name] for name in inputs}, {name: leaves[name] for name in initial}, options)
    total = sum((out * weight).sum() for out, weight in zip(outputs, weights_of(outputs), strict=True))
    found = dict(zip(leaves, torch.autograd.grad(total, list(leaves.values())), strict=True))
    return found | {name: found[name] * inputs[name] for name in ("dt", "A")}


def weights_of(outputs) -> list[Tensor]:
    noise = torch.Generator().manual_seed(7)
    return [torch.randn(out.shape, generator=noise, dtype=torch.float64).to(out.dtype) for out in outputs]


@pytest.mark.parametrize("case", CASES)
def test_values_and_states_are_those_of_numpy_loops(case):
    parts = sample(**CASES[case])
    expected = true_outputs(*parts)
    assert_all_close(recurrence(*parts), expected, 1e-10)
    assert_all_close(scan(*parts), expected, 1e-10)


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_recurrence(case):
    parts = sample(**CASES[case])
    found, expected = gradients(scan, *parts), gradients(recurrence, *parts)
    for name, gradient in found.items():
        assert gradient.any() or (case == "Euler" and name in ("k", "v")), name
        assert_close(f"gradient of {name}", gradient, expected[name], 1e-10)


@pytest.mark.parametrize("case", ["odd", "packed, rank 3", "rank 4", "steps of all sizes"])
def test_gradients_are_those_of_numpy_loops(case):
    """Along a random direction of one input after the other."""
    inputs, initial, options = parts = sample(**CASES[case])
    found = gradients(scan, *parts)
    arrays, seq_idx = as_arrays(inputs | initial), array_options(options)["seq_idx"]
    weights = [weight.cpu().numpy() for weight in weights_of(recurrence(*parts))]
    noise = torch.Generator().manual_seed(11)
    for name, gradient in found.items():
        direction = torch.randn(gradient.shape, generator=noise, dtype=torch.float64)
        scaled = direction * inputs[name] if name in ("dt", "A") else direction
        moved = truth.along(truth.mamba3, arrays, as_arrays({name: scaled}), seq_idx=seq_idx)
        expected = sum((out * weight).sum() for out, weight in zip(moved, weights, strict=True))
        size = gradient.norm().item() * direction.norm().item()
        assert abs((gradient * direction).sum().item() - expected) <= 1e-11 * size, name


@pytest.mark.parametrize("rank", [1, 2])
def test_eulers_rule_without_turning_is_the_scan_of_mamba2(rank):
    """A rank of R is then R tokens in one: the decay comes with the first, all see the last's state."""
    inputs, _, _ = sample(seqlen=11, rank=rank, state=False, lam=1.0)
    inputs["rate"] = torch.zeros_like(inputs["rate"])
    inputs["A"] = inputs["A"][:, :1].expand_as(inputs["A"])
    y, state = vision_scan.mamba3(**inputs)
    factors = inputs.get("mimo_x", torch.ones(2, 1, 3, dtype=torch.float64))
    expected, ssm = torch.zeros_like(y), torch.zeros_like(state["ssm"])
    for r in range(rank):
        v = inputs["x"] * factors[:, r]
        for query in range(rank):
            part, final = vision_scan.ssd(
                v, inputs["dt"], inputs["A"][0, 0], inputs["B"][:, :, r], inputs["C"][:, :, query],
                return_final_state=True,
            )  # fmt: skip
            expected[:, :, query] += part
        expected[:, :, r] += inputs["D"][:, None] * v
        ssm += final
    assert_close("y", y, expected, 1e-12)
    assert_close("state", state["ssm"], ssm, 1e-12)


def test_only_differences_of_phases_count():
    """A turn of everything that is carried turns the state, and leaves the output as it is."""
    inputs, initial, options = sample(seqlen=9)
    y, *_ = scan(inputs, initial, options)
    turned = {**initial, "angle": initial["angle"] + 1.3}
    for name in ("ssm", "k"):
        pairs = torch.view_as_complex(initial[name][..., :4].unflatten(-1, (2, 2)).contiguous())
        pairs = torch.view_as_real(pairs * torch.polar(torch.ones(()).double(), torch.tensor(1.3, dtype=torch.float64)))
        turned[name] = torch.cat([pairs.flatten(-2), initial[name][..., 4:]], dim=-1)
    assert_close("turned", scan(inputs, turned, options)[0], y, 1e-12)
    assert (scan(inputs, {**initial, "angle": turned["angle"]}, options)[0] - y).norm() > 0.1 * y.norm()


@pytest.mark.parametrize("sizes", [(1,), (4, 1, 8), (2, 3, 8)], ids=str)
@pytest.mark.parametrize("case", ["odd", "rank 2, odd", "packed, rank 3", "packed"])
@torch.no_grad()
def test_pieces_and_updates_are_the_whole(case, sizes):
    """A piece continues its state's segment: where it begins with another, the state is emptied first."""
    inputs, initial, options = sample(**CASES[case])
    expected = scan(inputs, initial, options)
    seq_idx = options["seq_idx"]
    for is_update in (False, True):
        state, parts, start = {name: tensor.clone() for name, tensor in initial.items()}, [], 0
        last = None if seq_idx is None else [-1] * len(seq_idx)
        while start < inputs["x"].shape[1]:
            size = sizes[len(parts) % len(sizes)]
            rows = slice(start, start + size)
            piece = {name: t if name in ("D", "mimo_x") else t[:, rows] for name, t in inputs.items()}
            index = None if seq_idx is None else seq_idx[:, rows]
            if index is not None:
                forget_others(state, index, last)
            if is_update and piece["B"].shape[1] * piece["B"].shape[2] <= 16:
                before = {name: tensor.data_ptr() for name, tensor in state.items()}
                parts.append(vision_scan.mamba3_update(state, **piece, seq_idx=index))
                assert {name: tensor.data_ptr() for name, tensor in state.items()} == before
            else:
                kept = {name: tensor.clone() for name, tensor in state.items()}
                y, after = vision_scan.mamba3(**piece, initial_state=state, seq_idx=index, chunk_size=3)
                assert all(torch.equal(state[name], kept[name]) for name in STATE)
                parts, state = [*parts, y], after
            start += size
        assert_all_close((torch.cat(parts, 1), *(state[name] for name in STATE)), expected, 1e-10)


def forget_others(state: dict[str, Tensor], seq_idx: Tensor, last: list[int]) -> None:
    """Empties the state of rows whose next real token is of another segment than their last, and notes the new last."""
    for row, index in enumerate(seq_idx.tolist()):
        real = [segment for segment in index if segment >= 0]
        if real:
            if last[row] not in (-1, real[0]):
                for tensor in state.values():
                    tensor[row] = 0
            last[row] = real[-1]


@torch.no_grad()
def test_nothing_of_a_later_token_is_in_an_output():
    inputs, initial, options = sample(seqlen=12, rank=2, dtype=torch.float32)
    y, *_ = scan(inputs, initial, options)
    for name in ("x", "dt", "A", "lam", "B", "C", "rate"):
        changed = {**inputs, name: inputs[name].clone()}
        changed[name][:, 7] *= 0.5
        moved = scan(changed, initial, options)[0] != y
        assert not moved[:, :7].any() and moved[:, 7:].any(), name


@pytest.mark.parametrize("rank", [1, 3])
def test_values_at_pads_do_not_matter(rank):
    inputs, initial, options = sample(seqlen=13, batch=4, rank=rank, seq_idx=PACKED)
    expected = scan(inputs, initial, options)
    at_pads = (PACKED < 0).view(4, 13, 1)
    for name in ("x", "dt", "A", "lam", "B", "C", "rate"):
        pads = at_pads.view(4, 13, *[1] * (inputs[name].dim() - 2))
        inputs[name] = torch.where(pads, math.nan, inputs[name])
    for one, other in zip(scan(inputs, initial, options), expected, strict=True):
        assert torch.equal(one, other)
    assert not expected[0][PACKED < 0].any()
    assert all(torch.equal(one[2], initial[name][2]) for name, one in zip(STATE, expected[1:], strict=True)
               if name != "angle")  # fmt: skip


@torch.no_grad()
def test_phases_of_a_long_text_stay_exact_in_float32():
    """40,000 tokens turn by up to 30 radians each; the last ones read as in float64."""
    inputs, _, _ = sample(seqlen=40_000, state=False, nheads=1, headdim=2, steps=(0.0, 1.0))
    narrow = {name: tensor.float() for name, tensor in inputs.items()}
    y, state = vision_scan.mamba3(**narrow)
    exact, true = vision_scan.mamba3(**{name: tensor.double() for name, tensor in narrow.items()})
    turns = (state["angle"] - true["angle"] + math.pi) % (2 * math.pi) - math.pi
    # An increment is rounded to float32: 40,000 roundings of at most 2e-6.
    assert turns.abs().max() < 1e-3
    assert_close("the last", y[:, -500:], exact[:, -500:], 1e-5)


@pytest.mark.parametrize("case", CASES)
def test_float32_is_as_good_as_the_recurrence_in_it(case):
    inputs, initial, options = sample(**CASES[case], dtype=torch.float32)
    wide = [{name: tensor.double() for name, tensor in part.items()} for part in (inputs, initial)]
    plain, exact = recurrence(inputs, initial, options), recurrence(*wide, options)
    for name, one, other, true in zip(("y", *STATE), scan(inputs, initial, options), plain, exact, strict=True):
        if name != "angle":
            assert_as_good_as(name, one, other, true)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_half_precision_is_read_and_computed_in_float32(dtype):
    inputs, initial, options = sample(seqlen=9, batch=2, rank=2)
    inputs["x"], initial["v"] = inputs["x"].to(dtype), initial["v"].to(dtype)
    narrow = [{name: t if t.dtype == dtype else t.float() for name, t in part.items()} for part in (inputs, initial)]
    wide = [{name: tensor.double() for name, tensor in part.items()} for part in (inputs, initial)]
    y, ssm, angle, k, v = scan(*narrow, options)
    assert {t.dtype for t in (y, ssm, angle, k)} == {torch.float32} and v.dtype == dtype
    assert torch.equal(v, inputs["x"][:, -1])
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(scan(*narrow, options)[0], y)
    exact = scan(*wide, options)
    assert_close("y", y, exact[0], 1e-5)
    assert_close("ssm", ssm, exact[1], 1e-5)


def test_states_behind_share_no_memory_with_anything():
    inputs, initial, options = sample(seqlen=5)
    y, *after = scan(inputs, initial, options)
    sizes = [tensor.untyped_storage().nbytes() for tensor in after]
    assert sizes == [tensor.nbytes for tensor in after]  # of their own, and no more than they need
    storages = {t.untyped_storage().data_ptr() for t in (y, *after, *inputs.values(), *initial.values())}
    assert len(storages) == 1 + len(after) + len(inputs) + len(initial)


def test_mistakes_are_named():
    inputs, initial, _ = sample(seqlen=5, rank=2)
    wrong = {
        "dt must have": {"dt": inputs["dt"][:, :4]},
        "C must have": {"C": inputs["C"][:, :, :1]},
        "rank of 2 needs mimo_x": {"mimo_x": None},
        "turns 4 pairs of states, d_state 6 has 3": {"rate": inputs["rate"].repeat(1, 1, 2)},
        "k of the state": {"initial_state": {**initial, "k": initial["k"][:, :1]}},
        "seq_idx must have": {"seq_idx": torch.zeros(1, 4)},
    }
    for message, change in wrong.items():
        with pytest.raises(ValueError, match=message):
            vision_scan.mamba3(**{**inputs, **change})
    with pytest.raises(ValueError, match="1 to 16 tokens, got 18"):
        long, _, _ = sample(seqlen=9, rank=2)
        vision_scan.mamba3_update(empty_state(long["x"], long["B"], long["rate"]), **long)
