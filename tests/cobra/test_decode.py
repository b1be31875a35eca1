"""A decoding step in one compiled call against the same step layer by layer."""

import copy
import gc
import weakref

import pytest
import torch
from torch import Tensor

from cobra.lm.decode import native_for
from tests.cobra.decode_ways import (
    BATCHES,
    EMULATED,
    MIXED,
    NAMES,
    assert_same_bits,
    assert_same_state,
    decode,
    fresh,
    has_attention,
    model_of,
    plain_decode,
    random_ids,
    served,
    tensors_of,
)
from tests.cobra.lm_ways import STACKS
from tests.tolerance import assert_as_good_as, assert_close

pytestmark = [
    pytest.mark.skipif(native_for("cpu") is None, reason="no compiled steps"),
    pytest.mark.usefixtures("one_thread"),
]


def some_chunks(model, batch: int) -> list[Tensor]:
    """Tokens of several steps: windows wrap round and caches grow, or steps have several tokens."""
    sizes = [1] * 9 if has_attention(model) else [1, 2, 4, 1, 3]
    return list(random_ids(model, batch, sum(sizes)).split(sizes, dim=1))


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_steps_in_float32_are_those_of_the_layers(name, batch, taken):
    model = model_of(name)
    chunks = some_chunks(model, batch)
    logits, state = decode(model, chunks)
    assert taken == [batch] * len(chunks)
    expected, expected_state = plain_decode(model, chunks)
    assert len(taken) == len(chunks)
    assert logits[0].dtype == torch.float32
    assert_close("logits", torch.cat(logits, 1), torch.cat(expected, 1))
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", NAMES)
def test_steps_in_bfloat16_are_as_good_as_the_layers(name, batch, taken):
    model = model_of(name, torch.bfloat16)
    chunks = some_chunks(model, batch)
    logits, state = decode(model, chunks)
    assert taken == [batch] * len(chunks)
    plain, plain_state = plain_decode(model, chunks)
    truth, truth_state = decode(copy.deepcopy(model).double(), chunks)
    assert logits[0].dtype == plain[0].dtype == torch.float32
    results = (torch.cat(parts, 1) for parts in (logits, plain, truth))
    # Logits layer by layer have values of bfloat16, so nothing is lost here.
    found, expected, exact = results
    assert_as_good_as("logits", found.bfloat16(), expected.bfloat16(), exact)
    for key, tensor in tensors_of(state).items():
        if tensor.is_floating_point():
            expected, exact = tensors_of(plain_state)[key], tensors_of(truth_state)[key]
            assert_as_good_as(key, tensor.bfloat16(), expected.bfloat16(), exact)


@pytest.mark.parametrize("batch", [1, 2, 4])
@pytest.mark.parametrize("name", [name for name in NAMES if not has_attention(model_of(name))])
def test_several_tokens_in_a_step(name, batch, taken):
    model = model_of(name)
    most = native_for("cpu").most_tokens
    lengths = [n for n in (2, 3, 5, 8, 13, 16, 17, 31, 64) if n <= most and batch * n <= native_for("cpu").most_rows]
    for seqlen in lengths:
        chunks = list(random_ids(model, batch, 2 * seqlen, seed=seqlen).split(seqlen, dim=1))
        logits, state = decode(model, chunks)
        expected, expected_state = plain_decode(model, chunks)
        assert_close(f"{seqlen} tokens", torch.cat(logits, 1), torch.cat(expected, 1))
        assert_same_state(state, expected_state)
    assert len(taken) == 2 * len(lengths)


@pytest.mark.parametrize(("name", "length"), [("mamba2", 16), *((name, 1) for name in served(["mamba1", "hybrid"]))])
@torch.no_grad()
def test_a_short_reading_from_nothing_is_a_step_too(name, length, taken):
    model = model_of(name)
    ids = random_ids(model, 2, length)
    logits, state = model(ids, overwrite_state=True)
    assert taken == [2]
    expected, expected_state = model(ids)
    assert taken == [2]
    assert_close("logits", logits, expected)
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", served([*STACKS, "odd mamba1", "odd groups", "odd attention"]))
@torch.no_grad()
def test_rows_of_padding_keep_their_bits_and_leave_others_alone(name, dtype, taken):
    model = model_of(name, dtype)
    ids, batch = random_ids(model, 3, 12), 3
    _, state = model(ids[:, :4], state=model.allocate_state(batch, 8))
    for t in range(4, 12):
        one, mask = ids[:, t : t + 1], torch.ones(batch, 1, dtype=torch.int64)
        mask[t % 3] = 0
        kept, unmasked = state.clone(), state.clone()
        logits, state = model(one, state=state, attention_mask=mask, overwrite_state=True)
        expected, unmasked = model(one, state=unmasked, overwrite_state=True)
        assert state.lengths.tolist() == (kept.lengths + mask[:, 0]).tolist()
        real = mask[:, 0].bool()
        assert torch.equal(logits[real], expected[real])
        for key, tensor in tensors_of(state).items():
            assert torch.equal(tensor[real], tensors_of(unmasked)[key][real]), key
            before = tensors_of(kept)[key][~real]
            if tensor.shape == tensors_of(kept)[key].shape:
                assert torch.equal(tensor[~real], before), key
            else:  # a cache that has grown
                assert key.endswith((" k", " v", "position"))
                assert torch.equal(tensor[~real].narrow(-1 if key.endswith("n") else 2, 0, 8), before), key
    assert len(taken) == 16


@pytest.mark.parametrize("keep", [0, 1, 2, 5, 9])
@torch.no_grad()
def test_logits_to_keep_are_the_last(keep, taken):
    model = model_of("odd groups")
    ids = random_ids(model, 3, 5)
    (logits,), state = decode(model, [ids], logits_to_keep=keep)
    (expected,), expected_state = plain_decode(model, [ids])
    assert taken == [3] and logits.shape[1] == min(keep or 5, 5)
    assert_close("logits", logits, expected[:, -keep:])
    assert_same_state(state, expected_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_embeddings_given_are_read_and_left_as_they_are(dtype, taken):
    model = model_of(MIXED, dtype)
    embeds = model.embedding(random_ids(model, 2, 1))
    wide = torch.stack([embeds] * 2, -1)[..., 0]  # another layout in memory
    expected, _ = model(random_ids(model, 2, 1), state=model.allocate_state(2), overwrite_state=True)
    for given in (embeds, wide):
        kept = given.clone()
        logits, _ = model(inputs_embeds=given, state=model.allocate_state(2), overwrite_state=True)
        assert torch.equal(logits, expected) and torch.equal(given, kept)
    assert taken == [2] * 3


@pytest.mark.parametrize("batch", [1] if EMULATED else [1, 5])  # there, more rows are torch's own products
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", served([*STACKS, "wide", "odd attention"]))
def test_threads_do_not_change_a_bit(name, dtype, batch, taken):
    model, before, runs = model_of(name, dtype), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3) if name == "odd attention" else (1, 2):
            torch.set_num_threads(threads)
            runs.append(decode(model, some_chunks(model, batch)))
    finally:
        torch.set_num_threads(before)
    for logits, state in runs[1:]:
        assert torch.equal(torch.cat(logits, 1), torch.cat(runs[0][0], 1))
        assert_same_bits(state, runs[0][1])
    assert len(taken) == len(runs) * len(runs[0][0])


@pytest.mark.parametrize("name", served([MIXED, "mamba1", "odd attention"]))
def test_a_nan_stays_in_its_row(name, taken):
    model = model_of(name)
    ids = [random_ids(model, 3, 1, seed=seed) for seed in range(4)]
    expected, _ = decode(model, ids)
    embeds = [model.embedding(column).clone() for column in ids]
    embeds[1][1, 0, 2] = torch.nan
    state, parts = model.allocate_state(3), []
    with torch.no_grad():
        for part in embeds:
            logits, state = model(inputs_embeds=part, state=state, overwrite_state=True)
            parts.append(logits)
    assert len(taken) == 8
    found, others = torch.cat(parts, 1), [0, 2]
    assert torch.equal(found[others], torch.cat(expected, 1)[others])
    assert found[1, 1:].isnan().all() and torch.equal(found[1, 0], expected[0][1, 0])


@torch.no_grad()
def test_models_side_by_side_and_copies_are_independent(taken):
    one, other = fresh("mamba2"), fresh(served(["mamba1", "mamba2 ngroups 2"])[0])
    expected, other_expected = decode(one, some_chunks(one, 2)), decode(other, some_chunks(other, 2))
    twin = copy.deepcopy(one)
    first, other_first = one.allocate_state(2), other.allocate_state(2)
    for column, other_column in zip(some_chunks(one, 2), some_chunks(other, 2), strict=True):
        logits, first = one(column, state=first, overwrite_state=True)
        other_logits, other_first = other(other_column, state=other_first, overwrite_state=True)
    assert torch.equal(logits, expected[0][-1]) and torch.equal(other_logits, other_expected[0][-1])
    for parameter in twin.parameters():
        parameter.mul_(1.5)
    chunks = some_chunks(one, 2)
    assert torch.equal(decode(one, chunks)[0][-1], expected[0][-1])
    assert_close("the copy", decode(twin, chunks)[0][-1], plain_decode(twin, chunks)[0][-1])
    assert all(taken)
    gone = weakref.ref(twin)
    del twin, parameter
    gc.collect()
    assert gone() is None  # the compiled form does not keep its model alive
