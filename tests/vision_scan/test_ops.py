"""Laws of the scans: padding, segments, packing, splitting, composition, limits."""

import itertools
import math
import random

import pytest
import torch

from tests.tolerance import assert_close
from tests.vision_scan import truth
from tests.vision_scan.samples import (
    OPERATORS,
    SCANS,
    array_options,
    as_arrays,
    cotangents_of,
    segments,
    tokens_of,
    with_gradients,
)

pytestmark = pytest.mark.usefixtures("poison", "registered")

every_scan = pytest.mark.parametrize("name", SCANS)
PADS = {
    "left": ["...0000", "0000000"],
    "right": ["0000...", ".000000"],
    "middle": ["00...00", "0.0.0.0"],
    "whole-row": [".......", "0000000"],
    "segments": ["00.1122", "2..2.11"],
    "same-after-pads": ["11..112", "0.....0"],
    "alternating": ["0101.01", "5.5.6.6"],
}


def sampled(name, **sizes):
    """A sample with every optional input that the operator has, in small chunks."""
    extra = {
        "ssd": {"z": True, "chunk_size": 4},
        "gated_delta_rule": {"num_k_heads": 2, "num_v_heads": 4, "chunk_size": 4},
        "selective_scan": {"z": True, "ngroups": 2},
    }
    return OPERATORS[name].sample(**extra.get(name, {}), **sizes)


def blend(name, tensors, where, value):
    """The inputs with `value`, a number or other inputs, where `where` (batch, seqlen) is True."""
    out = dict(tensors)
    for key, axis in OPERATORS[name].token_axis.items():
        if key in tensors:
            t = tensors[key].movedim(axis, 1)
            mask = where.view(*where.shape, *(1,) * (t.dim() - 2)).expand(t.shape)
            new = value[key].movedim(axis, 1) if isinstance(value, dict) else t.new_tensor(value)
            out[key] = torch.where(mask, new, t).movedim(1, axis)
    return out


def at_tokens(name, key, tensor, where):
    """The entries of an input (or its gradient) at the tokens of `where`."""
    return tensor.movedim(OPERATORS[name].token_axis[key], 1)[where]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rows", PADS.values(), ids=PADS)
@every_scan
def test_pads_change_nothing_whatever_stands_there(name, rows, dtype):
    tensors, options = sampled(name, batch=2, seqlen=7, seq_idx=rows, dtype=dtype)
    pad = options["seq_idx"] < 0
    clean = blend(name, tensors, pad, 0.0)
    run = OPERATORS[name].run
    cotangents = cotangents_of(run(**clean, **options))
    outputs, grads = with_gradients(run, (clean, options), cotangents)
    assert not at_tokens(name, next(iter(OPERATORS[name].token_axis)), outputs[0], pad).any()
    for garbage in (1e30, -1e30):
        dirty = blend(name, tensors, pad, garbage)
        found, found_grads = with_gradients(run, (dirty, options), cotangents)
        for part, actual, expected in zip(("y", "final state"), found, outputs, strict=True):
            assert torch.equal(actual, expected), f"{part} with {garbage:g} at pads"
        for key, grad in found_grads.items():
            assert torch.equal(grad, grads[key]), f"gradient of {key} with {garbage:g} at pads"
            if key in OPERATORS[name].token_axis:
                assert not at_tokens(name, key, grad, pad).any(), f"gradient of {key} at pads"


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64], ids=str)
@every_scan
def test_seq_idx_of_any_integer_type(name, dtype):
    tensors, options = sampled(name, batch=2, seqlen=7, seq_idx=PADS["segments"])
    expected = OPERATORS[name].run(**tensors, **options)
    found = OPERATORS[name].run(**tensors, **{**options, "seq_idx": options["seq_idx"].to(dtype)})
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@every_scan
def test_padded_row_equals_the_row_alone(name):
    """Three rows, padded left, not at all and in the middle, against each without its pads."""
    rows = ["....00000", "000000000", "00..000.."]
    tensors, options = sampled(name, batch=3, seqlen=9, seq_idx=rows)
    y, state = OPERATORS[name].run(**tensors, **options)
    seq_idx = options.pop("seq_idx")
    for i in range(3):
        real = seq_idx[i] >= 0
        alone = {}
        for key, t in tensors.items():
            is_per_row = key in OPERATORS[name].token_axis or key == "initial_state"
            alone[key] = t[i : i + 1] if is_per_row else t
            if key in OPERATORS[name].token_axis:
                axis = OPERATORS[name].token_axis[key] % t.dim()
                alone[key] = alone[key].index_select(axis, real.nonzero()[:, 0])
        y_alone, state_alone = OPERATORS[name].run(**alone, **options)
        key, axis = next(iter(OPERATORS[name].token_axis.items()))
        at_real = y[i : i + 1].index_select(axis % y.dim(), real.nonzero()[:, 0])
        assert_close(f"y of row {i}", at_real, y_alone, 1e-12)
        assert_close(f"state of row {i}", state[i : i + 1], state_alone, 1e-12)


@every_scan
def test_segments_of_a_row_equal_separate_rows(name):
    tensors, options = sampled(name, seqlen=12, seq_idx=["000001133333"])
    y, state = OPERATORS[name].run(**tensors, **options)
    del options["seq_idx"]
    for start, stop in ((0, 5), (5, 7), (7, 12)):
        alone = tokens_of(name, tensors, start, stop)
        if start:
            del alone["initial_state"]
        y_alone, state_alone = OPERATORS[name].run(**alone, **options)
        axis = next(iter(OPERATORS[name].token_axis.values()))
        assert_close(f"y[{start}:{stop}]", y.narrow(axis, start, stop - start), y_alone, 1e-12)
    assert_close("final state", state, state_alone, 1e-12)


@pytest.mark.parametrize("packing", ["seq_idx", "cu_seqlens"])
@every_scan
def test_segments_do_not_leak(name, packing):
    """Another content in one segment: the others' outputs and gradients keep their bits."""
    seq_idx = segments("000001111222")
    tensors, options = sampled(name, seqlen=12, initial_state=False, dtype=torch.float32)
    other, _ = sampled(name, seqlen=12, initial_state=False, dtype=torch.float32, seed=7)
    options[packing] = seq_idx if packing == "seq_idx" else torch.tensor([0, 5, 9, 12])
    key = next(iter(OPERATORS[name].token_axis))
    run = OPERATORS[name].run
    cotangents = cotangents_of(run(**tensors, **options))
    (y, _), grads = with_gradients(run, (tensors, options), cotangents)
    for i in range(3):
        changed = blend(name, tensors, seq_idx == i, other)
        (found, _), found_grads = with_gradients(run, (changed, options), cotangents)
        inside, outside = seq_idx == i, seq_idx != i
        assert not torch.equal(at_tokens(name, key, found, inside), at_tokens(name, key, y, inside))
        assert torch.equal(at_tokens(name, key, found, outside), at_tokens(name, key, y, outside))
        for input_ in OPERATORS[name].token_axis.keys() & tensors.keys():
            a, b = (at_tokens(name, input_, g[input_], outside) for g in (found_grads, grads))
            assert torch.equal(a, b), f"gradient of {input_}"


@every_scan
def test_the_future_does_not_reach_the_past(name):
    tensors, options = sampled(name, batch=2, seqlen=12, dtype=torch.float32)
    other, _ = sampled(name, batch=2, seqlen=12, dtype=torch.float32, seed=7)
    late = torch.arange(12).expand(2, -1) >= 6
    key = next(iter(OPERATORS[name].token_axis))
    y = OPERATORS[name].run(**tensors, **options)[0]
    found = OPERATORS[name].run(**blend(name, tensors, late, other), **options)[0]
    assert torch.equal(at_tokens(name, key, found, ~late), at_tokens(name, key, y, ~late))


CU_SEQLENS = {
    "three": ([0, 5, 6, 11], None),
    "one": ([0, 11], None),
    "empty-segment": ([0, 4, 4, 11], None),
    "pads-inside": ([0, 5, 6, 11], [".00.1.000.."]),
}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("boundaries, pads", CU_SEQLENS.values(), ids=CU_SEQLENS)
@every_scan
def test_cu_seqlens_equals_separate_calls(name, boundaries, pads, dtype):
    """Values against the truth, and gradients against separate calls of the operator."""
    tensors, options = sampled(name, seqlen=11, seq_idx=pads)
    rows = sampled(name, batch=len(boundaries) - 1, seqlen=11)[0]["initial_state"]
    tensors["initial_state"] = rows
    arrays = {**as_arrays(tensors), **({"seq_idx": options["seq_idx"].cpu().numpy()} if pads else {})}
    flags = {key: value for key, value in options.items() if key != "seq_idx"}
    axes = {**OPERATORS[name].token_axis, "seq_idx": 1}
    expected = truth.by_segment(
        OPERATORS[name].truth, boundaries, axes, arrays, **array_options(flags)
    )
    packed = {**options, "cu_seqlens": torch.tensor(boundaries, dtype=dtype)}
    cotangents = cotangents_of([torch.from_numpy(e) for e in expected])
    found, grads = with_gradients(OPERATORS[name].run, (tensors, packed), cotangents)
    for part, actual, true in zip(("y", "states"), found, expected, strict=True):
        assert_close(part, actual, torch.from_numpy(true))

    axis = next(iter(OPERATORS[name].token_axis.values()))
    expected_grads = {key: torch.zeros_like(t) for key, t in tensors.items()}
    for i, (start, stop) in enumerate(itertools.pairwise(boundaries)):
        if start == stop:
            expected_grads["initial_state"][i] = cotangents[1][i]
            continue
        part = tokens_of(name, {**tensors, "initial_state": rows[i : i + 1]}, start, stop)
        part_options = {**flags, **({"seq_idx": options["seq_idx"][:, start:stop]} if pads else {})}
        part_cotangents = [
            cotangents[0].narrow(axis, start, stop - start),
            cotangents[1][i : i + 1],
        ]
        _, part_grads = with_gradients(OPERATORS[name].run, (part, part_options), part_cotangents)
        for key, grad in part_grads.items():
            whole = expected_grads[key]
            if key == "initial_state":
                whole[i : i + 1] += grad
            elif key in OPERATORS[name].token_axis:
                whole.narrow(OPERATORS[name].token_axis[key], start, stop - start).add_(grad)
            else:
                whole += grad
    for key, grad in expected_grads.items():
        assert_close(f"gradient of {key}", grads[key], grad)


@pytest.mark.parametrize(
    "pads", [None, ["0.00..0000000.000", "..000000000000000"]], ids=["real", "pads"]
)
@every_scan
def test_any_split_equals_one_shot(name, pads):
    """Outputs, final state and gradients through the carried states; also in tiny pieces."""
    sample = sampled(name, batch=2, seqlen=17, seq_idx=pads)
    run = OPERATORS[name].run
    cotangents = cotangents_of(run(**sample[0], **sample[1]))
    outputs, grads = with_gradients(run, sample, cotangents)
    rng = random.Random(0)
    splits = [
        list(range(1, 17)),
        [1],
        [2, 3],
        [16],
        *(sorted(rng.sample(range(1, 17), 4)) for _ in range(6)),
    ]

    for points in splits:

        def in_pieces(seq_idx=None, points=points, **inputs):
            tensors = {k: v for k, v in inputs.items() if isinstance(v, torch.Tensor)}
            flags = {k: v for k, v in inputs.items() if k not in tensors}
            ys, state = [], tensors.pop("initial_state")
            for start, stop in zip([0, *points], [*points, 17], strict=True):
                piece = tokens_of(name, tensors, start, stop)
                mask = None if seq_idx is None else seq_idx[:, start:stop]
                y, state = run(**piece, **flags, initial_state=state, seq_idx=mask)
                ys.append(y)
            return torch.cat(ys, dim=next(iter(OPERATORS[name].token_axis.values()))), state

        found, found_grads = with_gradients(in_pieces, sample, cotangents)
        for part, actual, expected in zip(("y", "final state"), found, outputs, strict=True):
            assert_close(f"{part} split at {points}", actual, expected)
        for key, grad in grads.items():
            assert_close(f"gradient of {key} split at {points}", found_grads[key], grad)


@pytest.mark.parametrize("pads", [None, ["0.00..1110000.000"]], ids=["real", "segments"])
@pytest.mark.parametrize("name", ["ssd", "gated_delta_rule"])
def test_chunk_size_does_not_matter(name, pads):
    tensors, options = sampled(name, seqlen=17, seq_idx=pads)
    cotangents = cotangents_of(OPERATORS[name].run(**tensors, **options))
    outputs, grads = with_gradients(OPERATORS[name].run, (tensors, options), cotangents)
    for chunk_size in (1, 2, 5, 8, 16, 17, 18, 256):
        sample = (tensors, {**options, "chunk_size": chunk_size})
        found, found_grads = with_gradients(OPERATORS[name].run, sample, cotangents)
        for actual, expected in zip(found, outputs, strict=True):
            assert_close(f"chunk_size {chunk_size}", actual, expected, 1e-12)
        for key, grad in grads.items():
            assert_close(
                f"gradient of {key}, chunk_size {chunk_size}", found_grads[key], grad, 1e-11
            )


@pytest.mark.parametrize("name", ["ssd", "selective_scan"])
def test_segments_compose_affinely(name):
    """final = decay * initial + final from zero, decay = exp(A sum of dt); such pairs compose."""
    rows = ["0.00..0000000.000", "..000000000000000"]
    tensors, options = sampled(
        name, batch=2, seqlen=17, seq_idx=rows, dt_softplus=False, dt_bias=False
    )
    run, start = OPERATORS[name].run, tensors.pop("initial_state")
    seq_idx = options.pop("seq_idx")

    def affine(first, last):
        piece = tokens_of(name, tensors, first, last)
        real = seq_idx[:, first:last] >= 0
        total = (piece["dt"].movedim(OPERATORS[name].token_axis["dt"], 1) * real[..., None]).sum(1)
        decay = (total[..., None] * tensors["A"][None].view(1, total.shape[1], -1)).exp()
        decay = decay if name == "selective_scan" else decay[..., None]
        return decay, run(**piece, **options, seq_idx=seq_idx[:, first:last])[1]

    final = run(**tensors, **options, initial_state=start, seq_idx=seq_idx)[1]
    decay, offset = affine(0, 17)
    assert_close("one segment", decay * start + offset, final)
    points = [0, 1, 4, 9, 10, 17]
    parts = [affine(first, last) for first, last in itertools.pairwise(points)]
    decay, offset = parts[0]
    for next_decay, next_offset in parts[1:]:
        decay, offset = next_decay * decay, next_decay * offset + next_offset
    assert_close("composed", decay * start + offset, final)


def test_ssd_clamps_dt_at_every_limit():
    """Also a negative dt at the default limit of 0, and at a lower limit below 0."""
    for limit in ((0.0, math.inf), (-0.5, math.inf), (-0.5, 0.3), (0.0, 0.3)):
        tensors, options = sampled("ssd", seqlen=9, dt_softplus=False, dt_limit=limit)
        tensors["dt"] = torch.linspace(-1.0, 1.0, 18, dtype=torch.float64).view(1, 9, 2)
        expected = OPERATORS["ssd"].truth(**as_arrays(tensors), **options)
        for actual, true in zip(OPERATORS["ssd"].run(**tensors, **options), expected, strict=True):
            assert_close(f"dt_limit {limit}", actual, torch.from_numpy(true))
