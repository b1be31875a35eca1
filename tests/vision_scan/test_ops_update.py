"""Updates of a few tokens, in place, into slots: the same numbers as the scans."""

import itertools

import pytest
import torch

import vision_scan
from tests.tolerance import assert_as_good_as, assert_close
from tests.vision_scan.samples import OPERATORS, SCANS, segments, tokens_of, true_outputs

pytestmark = pytest.mark.usefixtures("poison")

UPDATES = {
    "ssd": vision_scan.ssd_update,
    "gated_delta_rule": vision_scan.gated_delta_rule_update,
    "selective_scan": vision_scan.selective_scan_update,
    "causal_conv1d": vision_scan.causal_conv1d_update,
}
EXTRA = {
    "ssd": {"z": True, "ngroups": 2, "D": "channels"},
    "gated_delta_rule": {"num_k_heads": 2, "num_v_heads": 4},
    "selective_scan": {"z": True, "ngroups": 2},
}
LENGTHS = [1, 2, 3, 4, 5, 8, 15, 16]
every_scan = pytest.mark.parametrize("name", SCANS)


def sampled(name, **sizes):
    """(tensors, options, state): three rows of tokens and five slots, all of them filled."""
    extra = {**EXTRA.get(name, {}), **sizes}
    tensors, options = OPERATORS[name].sample(batch=3, **extra)
    state = OPERATORS[name].sample(**{**extra, "batch": 5, "seqlen": 1, "seq_idx": None})[0][
        "initial_state"
    ]
    del tensors["initial_state"]
    options.pop("chunk_size", None)
    return tensors, options, state


def scan(name, tensors, options, state):
    """The scan from the given states: (y, final states)."""
    return OPERATORS[name].run(**tensors, **options, initial_state=state)


@pytest.mark.parametrize("seqlen", LENGTHS)
@every_scan
def test_equals_the_scan_in_permuted_slots(name, seqlen):
    tensors, options, state = sampled(name, seqlen=seqlen)
    before, slots = state.clone(), torch.tensor([3, 0, 4])
    y, final = scan(name, tensors, options, before[slots])
    found = UPDATES[name](state, **tensors, **options, state_indices=slots)
    assert_close("y", found, y)
    assert_close("states", state[slots], final)
    assert torch.equal(state[[1, 2]], before[[1, 2]])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
@every_scan
def test_skipped_rows_leave_every_slot_alone(name, dtype):
    tensors, options, state = sampled(name, seqlen=3)
    before = state.clone()
    y, final = scan(name, tensors, options, before[[0, 2, 0]])
    slots = torch.tensor([-1, 2, -1], dtype=dtype)
    found = UPDATES[name](state, **tensors, **options, state_indices=slots)
    assert not found[[0, 2]].any()
    assert_close("y", found[1], y[1])
    assert_close("state", state[2], final[1])
    assert torch.equal(state[[0, 1, 3, 4]], before[[0, 1, 3, 4]])
    nothing = UPDATES[name](before, **tensors, **options, state_indices=torch.full_like(slots, -1))
    assert not nothing.any() and torch.equal(before[[0, 1]], state[[0, 1]])


@every_scan
def test_without_indices_row_i_uses_slot_i(name):
    tensors, options, state = sampled(name, seqlen=5)
    state = state[:3].clone()
    y, final = scan(name, tensors, options, state.clone())
    assert_close("y", UPDATES[name](state, **tensors, **options), y)
    assert_close("states", state, final)


ROWS = {
    "left": ["...00", "00000", "....0"],
    "right": ["00...", ".....", "0...."],
    "segments": ["00.11", "1.1.2", "01234"],
}


@pytest.mark.parametrize("garbage", [0.0, 1e30, -1e30], ids="{:g}".format)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@every_scan
def test_pads_and_segments(name, rows, garbage):
    tensors, options, state = sampled(name, seqlen=5, seq_idx=rows)
    before, slots, pad = state.clone(), torch.tensor([3, 0, 4]), options["seq_idx"] < 0
    y, final = scan(name, tensors, options, before[slots])
    for key, axis in OPERATORS[name].token_axis.items():
        if key in tensors:
            tensors[key].movedim(axis, 1)[pad] = garbage
    found = UPDATES[name](state, **tensors, **options, state_indices=slots)
    axis = next(iter(OPERATORS[name].token_axis.values()))
    assert not found.movedim(axis, 1)[pad].any()
    assert_close("y", found, y)
    assert_close("states", state[slots], final)
    idle = pad.all(dim=1)
    assert torch.equal(state[slots[idle]], before[slots[idle]])


@every_scan
def test_updates_in_a_row_equal_one_scan(name):
    """A sequence of 40 tokens in updates of 1 to 16."""
    tensors, options, state = sampled(name, seqlen=40)
    state = state[:3].clone()
    y, final = scan(name, tensors, options, state.clone())
    pieces, points = [], [0, 1, 3, 6, 22, 23, 39, 40]
    for start, stop in itertools.pairwise(points):
        pieces.append(UPDATES[name](state, **tokens_of(name, tensors, start, stop), **options))
    assert_close("y", torch.cat(pieces, dim=next(iter(OPERATORS[name].token_axis.values()))), y)
    assert_close("states", state, final)


@pytest.mark.parametrize("indexed", [False, True], ids=["all-slots", "indexed"])
@every_scan
def test_writes_into_the_given_tensor(name, indexed):
    """Also where it is a slice of a wider one: what lies beside it keeps its bits."""
    tensors, options, state = sampled(name, seqlen=2)
    num_slots = 5 if indexed else 3
    wide = torch.full((num_slots, *state.shape[1:-1], state.shape[-1] + 2), 7.0, dtype=state.dtype)
    view = wide[..., 1:-1]
    view.copy_(state[:num_slots])
    slots = torch.tensor([3, 0, 4]) if indexed else torch.arange(3)
    _, final = scan(name, tensors, options, view[slots].clone())
    UPDATES[name](view, **tensors, **options, state_indices=slots if indexed else None)
    assert_close("states", wide[slots][..., 1:-1], final)
    assert (wide[..., 0] == 7).all() and (wide[..., -1] == 7).all()


@pytest.mark.parametrize("layout", ["slice", "transposed"])
@every_scan
def test_layouts(name, layout):
    tensors, options, state = sampled(name, seqlen=3, layout=layout)
    y, final = scan(name, tensors, options, state[:3].clone())
    state = state[:3].clone()
    assert_close("y", UPDATES[name](state, **tensors, **options), y)
    assert_close("states", state, final)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_scan
def test_low_precision_is_as_good_as_the_recurrence(name, dtype):
    tensors, options, state = sampled(name, seqlen=16, dtype=dtype)
    state = state[:3].clone()
    sample = ({**tensors, "initial_state": state.clone()}, options)
    plain, true = OPERATORS[name].recurrence(**sample[0], **options), true_outputs(name, sample)
    y = UPDATES[name](state, **tensors, **options)
    assert y.dtype == dtype
    for part, actual, expected, exact in zip(("y", "states"), (y, state), plain, true, strict=True):
        assert_as_good_as(part, actual, expected, exact)


@pytest.mark.parametrize("seqlen", [0, 17])
@every_scan
def test_refuses_other_than_1_to_16_tokens(name, seqlen):
    tensors, options, state = sampled(name, seqlen=20)
    short = tokens_of(name, tensors, 0, seqlen)
    with pytest.raises(ValueError, match=rf"1 to 16 tokens.*{seqlen}"):
        UPDATES[name](state[:3], **short, **options)


@every_scan
def test_refuses_rows_that_do_not_match_the_slots(name):
    tensors, options, state = sampled(name, seqlen=2)
    with pytest.raises(ValueError, match=r"\(5, .*\(3, "):
        UPDATES[name](state, **tensors, **options)
    with pytest.raises(ValueError, match=r"\(2, .*\(3, "):
        UPDATES[name](state, **tensors, **options, state_indices=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"\(3, 2\).*\(3, 5\)"):
        UPDATES[name](state[:3], **tensors, **options, seq_idx=segments("00000", "00000", "00000"))
