"""Continuous batching: whatever runs beside a conversation, and whatever was read before, its answer is that of a fresh
reading."""

import copy
import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from PIL import ExifTags, Image

import cobra
from cobra.serve.answer import BusyError
from cobra.serve.engine import ALONE, LEAST_CHUNK, Engine
from cobra.serve.prompt import IMAGES_PER_SEGMENT, Message, Picture, Prompt, arrange
from cobra.tiles import AnyResConfig, NativeConfig, UHDConfig
from tests.cobra.serve_ways import ask, behind, fresh, lively, png, prompt, run, wait_until, whole
from vision_scan.errors import UserError


@pytest.fixture(scope="module", params=["mamba2", "hybrid"])
def model(request):
    mamba2 = cobra.PRESETS["tiny"].lm.layers[0]
    attention, mlp = cobra.PRESETS["transformer-tiny"].lm.layers[:2]
    layers = {"mamba2": (mamba2,) * 2, "hybrid": (mamba2, replace(attention, window=9), attention, mlp)}
    return lively(layers=layers[request.param])


def test_an_answer_is_that_of_the_model(model):
    engine = Engine(model)
    one = prompt(model, [png(1), png(2), "What is it?"])
    told = ask(engine, one, 12)
    run(engine)
    pictures = [png(1), png(2)]
    assert told.text == model.answer("What is it?", pictures, max_new_tokens=12) == fresh(model, one, 12)
    assert told.outcome.prompt_tokens == one.num_tokens
    assert told.outcome.new_tokens == 12 and told.outcome.reason == "length"
    assert engine.num_running == engine.slots.used == 0


def test_many_at_once_are_each_as_alone(model):
    engine = Engine(model, slots=3, max_waiting=100, cache_bytes=0)
    draw = random.Random(0)
    asked = []
    for number in range(14):
        pictures = [png(draw.randrange(5)) for _ in range(draw.randrange(3))]
        turns = [[*pictures, f"Question {number}?" * draw.randrange(1, 5)]]
        if draw.random() < 0.5:
            turns += ["An answer.", "And now?"]
        conversation, length = prompt(model, *turns), draw.randrange(1, 15)
        asked.append((conversation, length, ask(engine, conversation, length)))
        for _ in range(draw.randrange(4)):
            engine.step()
    run(engine)
    for conversation, length, told in asked:
        assert told.text == fresh(model, conversation, length)
        assert told.outcome.error is None and told.outcome.cached_tokens == 0
    assert len({told.text for *_, told in asked}) > 7
    assert engine.slots.used == 0


def test_the_hard_conversation(model):
    """20 turns, one more image each turn, branching back twice: only new tokens are read, answers are fresh ones."""
    engine = Engine(model)
    turns, histories = [], []
    for number in range(20):
        if number in (8, 15):
            turns = list(histories[number - 5])  # back to an earlier point, and on another way
        turns.append([png(number), f"What is picture {number}?"])
        conversation = prompt(model, *turns)
        told = ask(engine, conversation, 6)
        run(engine)
        assert told.text == fresh(model, conversation, 6), number
        behind = conversation.num_tokens - sum(segment.num_tokens for segment in conversation.segments[-2:])
        assert told.outcome.cached_tokens == behind, number
        histories.append([*turns, told.text])
        turns.append(told.text)
    assert engine.counters.images == 20


def test_the_same_question_again_costs_nothing_and_another_its_words(model):
    engine = Engine(model)
    album = [png(number) for number in range(5)]
    first = ask(engine, prompt(model, [*album, "What is it?"]), 4)
    run(engine)
    again = ask(engine, prompt(model, [*album, "What is it?"]), 4)
    run(engine)
    assert first.outcome.cached_tokens == 0 and again.text == first.text
    assert again.outcome.cached_tokens == again.outcome.prompt_tokens
    other = prompt(model, [*album, "Which?"])
    told = ask(engine, other, 4)
    run(engine)
    assert told.text == fresh(model, other, 4)
    assert told.outcome.prompt_tokens - told.outcome.cached_tokens == other.segments[-1].num_tokens < 10


def test_one_image_more_in_a_long_row_costs_little(model):
    engine = Engine(model)
    album = [png(number) for number in range(2 * IMAGES_PER_SEGMENT + 5)]
    ask(engine, prompt(model, [*album, "Well?"]), 1)
    run(engine)
    longer = prompt(model, [*album, png(999), "Well?"])
    told = ask(engine, longer, 3)
    run(engine)
    assert told.text == fresh(model, longer, 3)
    per_image = longer.segments[0].num_tokens // IMAGES_PER_SEGMENT
    assert told.outcome.cached_tokens == pytest.approx(2 * IMAGES_PER_SEGMENT * per_image, abs=2 * per_image)


def test_no_state_of_another_image_is_ever_reused(monkeypatch):
    """Turns over look-alike images in a cache that is far too small: what stands behind a conversation is what stands
    behind a fresh reading of it, and not what stands behind any other."""
    model = lively(layers=cobra.PRESETS["tiny"].lm.layers[:1])
    engine = Engine(model, cache_bytes=40 * (model.lm.allocate_state(1).nbytes + 4 * 261), slots=4, max_waiting=1000)
    found, begin = {}, engine._begin_answer
    monkeypatch.setattr(engine, "_begin_answer", lambda answer, read: begin(answer, found.setdefault(id(answer), read)))
    draw, files, known = random.Random(3), [png(50 * number) for number in range(6)], {}
    for _ in range(40):
        told = []
        for _ in range(draw.randrange(1, 6)):
            turns = [[*draw.choices(files, k=draw.randrange(3)), draw.choice("ab")]]
            for _ in range(draw.randrange(3)):
                turns += ["x", [*draw.choices(files, k=draw.randrange(3)), draw.choice("ab")]]
            conversation = prompt(model, *turns)
            ask(engine, conversation, 1)
            told.append((conversation, engine._waiting[-1]))
        run(engine)
        for conversation, answer in told:
            digest = conversation.segments[-1].digest
            if digest not in known:
                known[digest] = behind(model, conversation)
            error = (found[id(answer)].logits[0, -1] - known[digest]).abs().max()
            assert error < 1e-4
        found.clear()
    assert engine.cache.hits > 20 and engine.cache.evicted > 20 and engine.cache.nbytes <= engine.cache.budget
    logits = torch.stack(list(known.values()))
    distances = (logits[:, None] - logits).abs().amax(-1) + torch.eye(len(logits))
    assert len(logits) > 60 and (distances > 1e-3).float().mean() > 0.9  # some differ in what was long ago alone


def test_digests_of_conversations_differ_wherever_anything_does():
    model = lively(layers=cobra.PRESETS["tiny"].lm.layers[:1])
    files = [Picture.of(model, png(number)) for number in range(40)]
    draw, seen, count = random.Random(0), {}, 0
    for _ in range(10_000):
        messages = []
        for place in range(draw.choice((1, 1, 3))):
            pictures = draw.choices(files, k=draw.randrange(3)) if place % 2 == 0 else []
            messages.append(Message(("user", "assistant")[place % 2], (*pictures, draw.choice("abc"))))
        spelled = ""  # all that stands in front of a segment's end
        for segment in Prompt(model, messages).segments:
            spelled += repr([piece if isinstance(piece, list) else piece.source for piece in segment.pieces])
            assert seen.setdefault(segment.digest, spelled) == spelled
            count += 1
    assert count > 15_000 and len(set(seen.values())) == len(seen) > 5_000


def test_a_long_reading_does_not_stall_the_others(model):
    engine = Engine(model, stall=1e-9)  # as little as can be: chunks of 16 tokens
    first = ask(engine, prompt(model, "Hello"), 60)
    while not first.pieces:
        engine.step()
    long = ask(engine, prompt(model, [*[png(number) for number in range(40)], "Well?"]), 2)
    made = [engine.counters.new_tokens]
    while first.outcome is None:
        engine.step()
        made.append(engine.counters.new_tokens)
    # A token each step, while there is still much to be read.
    assert [b - a for a, b in pairwise(made)] == [1] * (len(made) - 1) and len(made) > 20
    assert long.outcome is None
    run(engine)
    assert long.outcome.error is None


def test_chunks_are_short_as_long_as_anybody_else_is_there(model, monkeypatch):
    engine, chunks = Engine(model, slots=2, cache_bytes=0), []
    monkeypatch.setattr(engine, "_adapt", lambda tokens, seconds, times: chunks.append((tokens, times)))
    long = ask(engine, prompt(model, "a" * 900), 1)
    for _ in range(2):
        engine.step()
    assert all(LEAST_CHUNK < tokens <= ALONE * LEAST_CHUNK and times == ALONE for tokens, times in chunks)
    before = len(chunks)
    ask(engine, prompt(model, "b" * (3 * LEAST_CHUNK)), 4)
    run(engine)
    beside = [tokens for tokens, times in chunks[before:] if times == 1]
    assert len(beside) > 4 and max(beside) <= LEAST_CHUNK
    assert chunks[-1] > (LEAST_CHUNK, 1) and long.outcome.reason == "length"  # alone again


def test_what_is_read_is_answered_in_the_same_step(model):
    engine = Engine(model, slots=2, cache_bytes=0)
    told = ask(engine, prompt(model, "Well?"), 2)
    engine.step()
    assert engine.slots.used == 1 and told.text


def test_short_ones_overtake_a_long_one(model):
    engine = Engine(model)
    long = ask(engine, prompt(model, [*[png(number) for number in range(100)], "Well?"]), 2)
    engine.step()
    short = ask(engine, prompt(model, "Hello"), 2)
    while short.outcome is None:
        assert long.outcome is None
        engine.step()
    run(engine)
    assert long.outcome.error is None


def test_stop_texts_end_an_answer_and_are_not_told(model):
    engine = Engine(model)
    one = prompt(model, "Tell me")
    whole = fresh(model, one, 12)
    ends = ask(engine, one, 12)
    run(engine)
    for stop in (whole[3:5], whole[0], whole[-1], "\0never"):
        told = ask(engine, one, 12, stop=["\0or this", stop])
        run(engine)
        assert told.text == (whole[: whole.index(stop)] if stop in whole else whole)
        assert told.outcome.reason == ("stop" if stop in whole else ends.outcome.reason)
    after = prompt(model, "Tell me", whole, "More")
    told = ask(engine, after, 5)
    run(engine)
    assert told.text == fresh(model, after, 5)


def test_seeds_repeat_draws_whatever_runs_beside(model):
    engine = Engine(model, cache_bytes=0)
    drawn = {"do_sample": True, "temperature": 3.0}
    alone = ask(engine, prompt(model, "Hello"), 10, seed=7, **drawn)
    run(engine)
    others = [ask(engine, prompt(model, "Other"), 9, seed=seed, **drawn) for seed in range(5)]
    beside = ask(engine, prompt(model, "Hello"), 10, seed=7, **drawn)
    run(engine)
    assert beside.text == alone.text and len({told.text for told in others}) > 1


def test_cancelled_requests_leave_at_once_and_hear_nothing(model):
    engine = Engine(model, slots=2, max_waiting=10)
    told = [ask(engine, prompt(model, f"Hello {number}"), 500) for number in range(5)]
    for _ in range(6):
        engine.step()
    assert engine.slots.used == 2 and engine.num_waiting == 3
    heard = [len(one.pieces) for one in told]
    for number in (0, 2):
        told[number].cancel()
    engine.step()
    engine.step()
    assert len(told[0].pieces) == heard[0] and told[0].outcome is None
    for one in told:
        one.cancel()
    assert run(engine) <= 1 and engine.slots.used == engine.num_running == engine.num_waiting == 0
    assert engine.counters.cancelled == 5
    fine = ask(engine, prompt(model, "Fine?"), 3)
    run(engine)
    assert fine.text == fresh(model, prompt(model, "Fine?"), 3)


def test_as_many_as_may_wait_wait(model):
    engine = Engine(model, slots=1, max_waiting=2)
    for _ in range(3):
        ask(engine, prompt(model, "Hello"), 2)
    with pytest.raises(BusyError, match="waiting; try again later"):
        ask(engine, prompt(model, "Hello"), 2)
    run(engine)
    ask(engine, prompt(model, "Hello"), 2)
    assert engine.counters.refused == 1 and engine.counters.requests == 4


def test_a_damaged_image_fails_alone(model):
    engine = Engine(model)
    whole = png(3, (300, 200))
    bad = ask(engine, prompt(model, [whole[: len(whole) // 2], "Well?"]), 4)
    good = ask(engine, prompt(model, [whole, "Well?"]), 4)
    run(engine)
    assert isinstance(bad.outcome.error, UserError) and "damaged" in str(bad.outcome.error)
    assert good.text == fresh(model, prompt(model, [whole, "Well?"]), 4)
    assert engine.slots.used == 0


def test_a_failing_step_fails_what_runs_and_nothing_else(model, monkeypatch):
    engine = Engine(model)
    engine.start()
    first = ask(engine, prompt(model, "Hello"), 10_000)
    wait_until(lambda: first.pieces)
    monkeypatch.setattr(engine.slots, "step", lambda tokens: 1 / 0)
    wait_until(lambda: first.outcome)
    assert isinstance(first.outcome.error, ZeroDivisionError)
    monkeypatch.undo()
    second = ask(engine, prompt(model, "Hello"), 3)
    wait_until(lambda: second.outcome)
    engine.close()
    assert second.text == fresh(model, prompt(model, "Hello"), 3)
    with pytest.raises(BusyError, match="stopping"):
        ask(engine, prompt(model, "Hello"), 3)


def test_closing_tells_everybody(model):
    engine = Engine(model, slots=1)
    engine.start()
    told = [ask(engine, prompt(model, "Hello"), 100_000) for _ in range(3)]
    wait_until(lambda: told[0].pieces)
    engine.close()
    assert all(isinstance(one.outcome.error, BusyError) for one in told)


def test_images_stand_where_models_learn_them():
    model = lively(layers=cobra.PRESETS["tiny"].lm.layers[:1])
    a, b = Picture.of(model, png(1)), Picture.of(model, png(2))
    assert arrange([a, b, "Well?"]) == arrange(["Well?", a, b]) == [a, "\n", b, "\n", "Well?"]
    assert arrange(["Is ", a, " like ", b]) == ["Is ", a, " like ", b]
    assert arrange([a, " or ", b, "?"]) == [a, " or ", b, "?"]
    assert arrange(["one ", "two"]) == ["one two"] and arrange([a]) == [a, "\n"] and arrange(["", ""]) == []


@pytest.mark.parametrize(
    ("roles", "message"),
    [([], "last"), (["assistant"], "last"), (["user", "user"], "message 2"), (["assistant", "user"], "message 1")],
)
def test_turns_alternate(roles, message):
    model = lively(layers=cobra.PRESETS["tiny"].lm.layers[:1])
    with pytest.raises(UserError, match=message):
        Prompt(model, [Message(role, ("x",)) for role in roles])


def test_slots_grow_with_what_is_kept_of_each_token(model):
    engine = Engine(model, slots=2, cache_bytes=0)
    short, long = prompt(model, "Hi"), prompt(model, "Hello " * 80)
    told = [ask(engine, short, 150), ask(engine, long, 40), ask(engine, short, 30)]
    run(engine)
    expected = [fresh(model, short, 150), fresh(model, long, 40), fresh(model, short, 30)]
    assert [one.text for one in told] == expected


@pytest.mark.parametrize(
    "tiles", [AnyResConfig(), NativeConfig(min_cells=2, max_cells=30), UHDConfig()], ids=["anyres", "native", "uhd"]
)
def test_images_that_take_tokens_by_their_shape(tiles):
    """Tokens are counted by the header, before anything is decoded: of pictures of every shape, and turned by EXIF."""
    model = lively(layers=cobra.PRESETS["tiny"].lm.layers[:1], tiles=tiles)
    turned = Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    files = [png(1, (200, 70)), png(2, (31, 150)), png(3, (7, 5)), png(4, (200, 70), exif=turned)]
    engine = Engine(model)
    conversations = [prompt(model, [*files[:2], "a"]), prompt(model, [files[2], "b"]), prompt(model, [files[3], "c"])]
    told = [ask(engine, conversation) for conversation in conversations]
    run(engine)
    for conversation, one in zip(conversations, told, strict=True):
        assert one.outcome.error is None and one.text == fresh(model, conversation)
        assert one.outcome.prompt_tokens == whole(model, conversation)[0].shape[1]
    assert model.answer("c", [files[3]], max_new_tokens=8) == told[2].text


def test_bfloat16_is_within_its_own_error():
    """What stands behind conversations in bfloat16, read in chunks beside others, is as near to float32 as a reading in
    one piece is."""
    exact = lively(layers=cobra.PRESETS["tiny"].lm.layers[:2])
    half = copy.deepcopy(exact).to(torch.bfloat16)
    engine = Engine(half, slots=3, stall=1e-9)
    found, begin = [], engine._begin_answer
    engine._begin_answer = lambda answer, read: (found.append((answer, read.logits[0, -1])), begin(answer, read))[1]
    turns = [[[png(number, (90, 33)), f"Question {number}" * (number + 1)]] for number in range(5)]
    told = [ask(engine, prompt(half, *turn), 20) for turn in turns]
    run(engine)
    assert all(one.outcome.error is None for one in told) and len(found) == 5
    ours = theirs = 0.0
    for turn in turns:
        conversation = prompt(half, *turn)
        digest = conversation.segments[-1].digest
        (logits,) = [row for answer, row in found if answer.request.prompt.segments[-1].digest == digest]
        truth = behind(exact, conversation)
        ours += (logits.float() - truth).square().mean().item()
        theirs += (behind(half, conversation).float() - truth).square().mean().item()
    assert 0 < ours < 4 * theirs


def test_a_cache_without_room_keeps_nothing(model):
    engine = Engine(model, cache_bytes=10)
    for _ in range(2):
        told = ask(engine, prompt(model, "Hello"), 2)
        run(engine)
    assert told.outcome.cached_tokens == 0 and len(engine.cache) == engine.cache.nbytes == 0
    assert torch.is_grad_enabled()
