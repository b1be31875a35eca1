from dataclasses import replace

import pytest
import torch
from PIL import Image

import cobra
from cobra.lm.attention import AttentionConfig
from cobra.prompt import Turn
from cobra.streaming import TextStreamer
from vision_scan.errors import UserError

QUESTIONS = ["What is it?", "x", "How many digits are there, and what colours do they have?"]


def lively(layers) -> cobra.Cobra:
    """A small model whose random weights are large enough that its answers depend on the prompt."""
    config = cobra.PRESETS["tiny"]
    lm = replace(config.lm, layers=layers, vocab_size=261, tie_word_embeddings=False)
    model = cobra.build(replace(config, lm=lm), seed=1)
    for name, parameter in model.lm.named_parameters():
        if parameter.dim() == 2 and "layers" in name:
            parameter.data *= 4
    # It never writes <pad> or <image>, so that answers can be read again as prompts.
    model.lm.lm_head.weight.data[256:258] = 0
    return model


@pytest.fixture(scope="module", params=["mamba2", "transformer", "hybrid"])
def model(request):
    mamba2 = cobra.PRESETS["tiny"].lm.layers[0]
    attention, mlp = cobra.PRESETS["transformer-tiny"].lm.layers[:2]
    assert isinstance(attention, AttentionConfig)
    layers = {
        "mamba2": (mamba2,) * 3,
        "transformer": (attention, mlp) * 2,
        "hybrid": (mamba2, replace(attention, window=7), mamba2, mlp),
    }
    return lively(layers[request.param])


@pytest.fixture(scope="module")
def images():
    """A few pictures of different shapes, none of them like another."""
    noise = torch.Generator().manual_seed(0)
    sizes = [(64, 64), (40, 90), (20, 20)]
    return [
        Image.fromarray(torch.randint(256, (*size, 3), generator=noise, dtype=torch.uint8).numpy())
        for size in sizes
    ]


def prompts(model, images=None, padding_side="left"):
    text = [[Turn("user", question)] for question in QUESTIONS]
    if images is not None:
        text = [
            [Turn("user", f"<image>\n{QUESTIONS[0]}")],
            [Turn("user", QUESTIONS[1])],
            [Turn("user", f"Compare <image> and <image>. {QUESTIONS[2]}")],
        ]
        images = [images[:1], [], images[1:]]
    return model.processor(text=text, images=images, padding_side=padding_side)


def alone(batch, row, tokens_per_tile=64):
    """One row of a batch without its pads."""
    keep = batch["attention_mask"][row].bool()
    tiles = [int((ids == 257).sum()) // tokens_per_tile for ids in batch["input_ids"]]
    start = sum(tiles[:row])
    pixels = None
    if tiles[row]:
        pixels = batch["pixel_values"][start : start + tiles[row]]
    return {"input_ids": batch["input_ids"][row : row + 1, keep], "pixel_values": pixels}


@pytest.mark.parametrize("has_images", [False, True])
@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_generate_rows_of_a_batch_are_as_if_alone(model, images, has_images, padding_side):
    batch = prompts(model, images if has_images else None, padding_side)
    together = model.generate(**batch, max_new_tokens=12, stop_ids=[])
    rows = [model.generate(**alone(batch, row), max_new_tokens=12, stop_ids=[])[0] for row in range(3)]
    assert together.tolist() == [row.tolist() for row in rows]
    assert len({tuple(row.tolist()) for row in rows}) == 3


def test_generate_accepts_pads_anywhere(model):
    batch = prompts(model)
    expected = model.generate(**batch, max_new_tokens=6)
    ids, mask = batch["input_ids"], batch["attention_mask"]
    scattered = torch.full((3, ids.shape[1] + 5), 7)
    scattered_mask = torch.zeros_like(scattered)
    places = torch.tensor([i for i in range(scattered.shape[1]) if i not in (0, 3, 4, 9)])[:-1]
    scattered[:, places], scattered_mask[:, places] = ids, mask
    assert torch.equal(model.generate(scattered, scattered_mask, max_new_tokens=6), expected)


def test_generate_is_the_argmax_of_the_whole_sequence(model, images):
    batch = alone(prompts(model, images), 2)
    new = model.generate(**batch, max_new_tokens=8, stop_ids=[])
    whole = torch.cat([batch["input_ids"], new], dim=1)
    with torch.no_grad():
        logits, _ = model.lm(inputs_embeds=model.embed(whole, batch["pixel_values"]))
    assert torch.equal(logits[:, -9:-1].argmax(-1), new)


@pytest.mark.parametrize("chunk", [1, 7, 10_000])
def test_generate_chunks_of_any_size_agree(model, images, monkeypatch, chunk):
    batch = prompts(model, images)
    expected = model.generate(**batch, max_new_tokens=6)
    monkeypatch.setattr("cobra.generate.CHUNK_SIZE", chunk)
    assert torch.equal(model.generate(**batch, max_new_tokens=6), expected)


def test_generate_pads_after_the_stop_token(model):
    batch = prompts(model)
    free = model.generate(**batch, max_new_tokens=12, stop_ids=[])
    stop = int(free[0, 4])
    stopped = model.generate(**batch, max_new_tokens=12, stop_ids=[stop])
    for row, stopped_row in zip(free.tolist(), stopped.tolist(), strict=True):
        end = row.index(stop) + 1 if stop in row else len(row)
        expected = row[:end] + [model.tokenizer.pad_id] * (stopped.shape[1] - end)
        assert stopped_row == expected[: stopped.shape[1]]
    assert stopped[0, 4] == stop


def test_generate_stops_at_the_end_token_by_default(model, monkeypatch):
    batch = alone(prompts(model), 0)
    free = model.generate(**batch, max_new_tokens=12, stop_ids=[])[0].tolist()
    monkeypatch.setattr(type(model.processor.template), "end_id", lambda *_: free[3])
    stopped = model.generate(**batch, max_new_tokens=12)[0].tolist()
    assert stopped == free[: free.index(free[3]) + 1]


def test_generate_state_has_consumed_every_returned_token(model, images):
    batch = prompts(model, images)
    whole = model.generate(**batch, max_new_tokens=12, stop_ids=[])
    first, state = model.generate(**batch, max_new_tokens=5, stop_ids=[], return_state=True)
    kept = state.clone()
    # Continue with the sixth token of the unbroken run, once from each row's own state.
    rest = model.generate(whole[:, 5:6], max_new_tokens=6, stop_ids=[], state=state)
    assert torch.equal(torch.cat([first, whole[:, 5:6], rest], 1), whole)
    for layer, kept_layer in zip(state.layers, kept.layers, strict=True):
        assert all(torch.equal(layer[name], kept_layer[name]) for name in layer)


def test_generate_state_has_not_consumed_pads(model):
    batch = prompts(model)
    free = model.generate(**batch, max_new_tokens=12, stop_ids=[])
    stop = int(free[0, 2])
    ids, state = model.generate(**batch, max_new_tokens=12, stop_ids=[stop], return_state=True)
    following = torch.full((3, 1), 65)
    together = model.generate(following, max_new_tokens=5, stop_ids=[], state=state)
    for row in range(3):
        length = ids[row].tolist().index(stop) + 1 if stop in ids[row] else ids.shape[1]
        prompt = torch.cat(
            [alone(batch, row)["input_ids"], ids[row : row + 1, :length], following[:1]], dim=1
        )
        expected = model.generate(prompt, max_new_tokens=5, stop_ids=[])
        assert together[row].tolist() == expected[0].tolist()


def test_generate_shares_a_state_of_one_row(model):
    state = model.prefill("Some context. ")
    ends = [model.tokenizer.encode(question) for question in ("abc", "xyz")]
    shared = model.generate(torch.tensor(ends), max_new_tokens=5, state=state, stop_ids=[])
    for row, end in enumerate(ends):
        own = model.generate(torch.tensor([end]), max_new_tokens=5, state=state, stop_ids=[])
        assert shared[row].tolist() == own[0].tolist()


def test_generate_samples_by_seed_and_row(model):
    batch = prompts(model)
    options = {"max_new_tokens": 8, "do_sample": True, "temperature": 2.0, "stop_ids": []}
    first = model.generate(**batch, **options, seed=5)
    assert torch.equal(first, model.generate(**batch, **options, seed=5))
    assert torch.equal(first, model.generate(**batch, **options, seed=[5, 6, 7]))
    assert not torch.equal(first, model.generate(**batch, **options, seed=6))
    row = model.generate(**alone(batch, 1), **options, seed=6)
    assert row[0].tolist() == first[1].tolist()


def test_generate_tolerates_none_for_sampling_options(model):
    batch = prompts(model)
    options = {"temperature": None, "top_p": None, "top_k": None}
    assert torch.equal(
        model.generate(**batch, max_new_tokens=3, **options),
        model.generate(**batch, max_new_tokens=3),
    )


def test_generate_of_nothing_new(model):
    batch = prompts(model)
    ids, state = model.generate(**batch, max_new_tokens=0, return_state=True)
    assert ids.shape == (3, 0)
    assert state.batch == 3


def test_generate_leaves_autograd_and_training_mode_alone(model):
    model.generate(**prompts(model), max_new_tokens=2)
    assert torch.is_grad_enabled()
    _, state = model.answer("a", max_new_tokens=2, return_state=True)
    assert not any(tensor.is_inference() for layer in state.layers for tensor in layer.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attention_mask": torch.zeros(3, 2)}, "attention_mask has shape"),
        ({"attention_mask": None, "input_ids": torch.zeros(3, 0, dtype=torch.long)}, "empty"),
        ({"tiles_per_image": torch.tensor([2])}, "0 tiles"),
        ({"pixel_values": torch.zeros(1, 3, 64, 64)}, "0 image tokens"),
        ({"seed": [1], "do_sample": True}, "1 seeds for 3 rows"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
    ],
)
def test_generate_refuses_what_does_not_fit(model, change, message):
    batch = {**prompts(model), "max_new_tokens": 2, **change}
    if "pixel_values" in change:
        batch["tiles_per_image"] = None
    with pytest.raises(UserError, match=message):
        model.generate(**batch)


def test_generate_refuses_a_row_of_pads_and_a_state_of_other_rows(model):
    batch = prompts(model)
    _, state = model.generate(**batch, max_new_tokens=1, return_state=True)
    with pytest.raises(UserError, match="3 rows for 2 prompts"):
        model.generate(torch.ones(2, 4, dtype=torch.long), max_new_tokens=1, state=state)
    batch["attention_mask"][1] = 0
    with pytest.raises(UserError, match="empty"):
        model.generate(**batch, max_new_tokens=1)


def test_answer_is_the_rendered_conversation(model, images):
    turns = [Turn("user", f"<image>\n<image>\n{QUESTIONS[0]}")]
    batch = model.processor(text=[turns], images=[images[:2]])
    expected = model.tokenizer.decode(model.generate(**batch, max_new_tokens=10)[0].tolist())
    assert model.answer(QUESTIONS[0], images[:2], max_new_tokens=10) == expected


def test_answer_from_a_prefill_is_the_same(model, images):
    expected = model.answer(QUESTIONS[0], images, max_new_tokens=10)
    state = model.prefill(images=images)
    kept = state.clone()
    for _ in range(2):  # the state serves any number of questions
        assert model.answer(QUESTIONS[0], state=state, max_new_tokens=10) == expected
    assert model.answer(QUESTIONS[2], state=state, max_new_tokens=10) != expected
    assert state.info == kept.info and (state.info["num_images"], state.info["turn"]) == (3, "open")
    assert state.lengths.tolist() == [1 + 3 * (64 + 1)]
    for layer, kept_layer in zip(state.layers, kept.layers, strict=True):
        assert all(torch.equal(layer[name], kept_layer[name]) for name in layer)


def test_prefill_in_parts_is_prefill_at_once(model, images):
    state = model.prefill(images=images[:1])
    state = model.prefill(images=images[1:], state=state)
    expected = model.answer(QUESTIONS[0], images, max_new_tokens=10)
    assert model.answer(QUESTIONS[0], state=state, max_new_tokens=10) == expected
    small = model.prefill(images=images, chunk_size=5)
    assert model.answer(QUESTIONS[0], state=small, max_new_tokens=10) == expected


def test_prefill_survives_a_file(model, images, tmp_path):
    state = model.prefill("Look: <image>.", images[:1])
    state.save(tmp_path / "state")
    loaded = cobra.State.load(tmp_path / "state")
    assert model.answer("?", state=loaded, max_new_tokens=6) == model.answer(
        "?", state=state, max_new_tokens=6
    )


def test_answer_continues_a_conversation(model, images):
    """Three turns through states are the whole conversation rendered at once."""
    tokenizer = model.tokenizer
    first, state = model.answer("Eh?", images[:1], max_new_tokens=4, return_state=True)
    assert state.info["turn"] == "closed"
    state = model.prefill(images=images[1:2], state=state)
    second, state = model.answer("And this?", state=state, max_new_tokens=4, return_state=True)
    third = model.answer("See <image>!", images[2:], state=state, max_new_tokens=4)
    # The answers are given as ids: a random model writes what is no text.
    ids = []
    template = model.processor.template
    conversation = ["<image>\nEh?", "<image>\nAnd this?", "See <image>!"]
    answers = []
    for index, text in enumerate(conversation):
        turn = model.processor(text=[[Turn("user", text)]], images=[images[index : index + 1]])
        ids += turn["input_ids"][0].tolist()
        pixels = torch.cat([model.processor.pixels(image) for image in images[: index + 1]])
        new = model.generate(torch.tensor([ids]), pixel_values=pixels, max_new_tokens=4)[0].tolist()
        answers.append(tokenizer.decode(new))
        end = template.end_id(tokenizer)
        ids += new if end in new else [*new, end]
    assert [first, second, third] == answers


def test_answer_places_marked_images(model, images):
    marked = "From <image> to <image>: what?"
    batch = model.processor(text=[[Turn("user", marked)]], images=[images[:2]])
    expected = model.tokenizer.decode(model.generate(**batch, max_new_tokens=8)[0].tolist())
    assert model.answer(marked, images[:2], max_new_tokens=8) == expected


def test_answer_takes_images_in_any_way(model, images, tmp_path):
    images[0].save(tmp_path / "a.png")
    path = tmp_path / "a.png"
    expected = model.answer("?", [images[0]], max_new_tokens=5)
    for given in (images[0], path, str(path), path.read_bytes(), iter([path]), (path,)):
        assert model.answer("?", given, max_new_tokens=5) == expected
    assert model.answer("?", max_new_tokens=5) == model.answer("?", [], max_new_tokens=5)


def test_prefill_reads_images_as_they_come(model, images):
    """An endless iterator is read up to the image that stops it, a chunk in memory at a time."""
    seen = []

    def endless():
        while True:
            seen.append(len(seen))
            if len(seen) > 40:
                raise KeyboardInterrupt
            yield images[0]

    tiles = []
    encode_images = model.encode_images
    model.encode_images = lambda pixels: tiles.append(len(pixels)) or encode_images(pixels)
    try:
        with pytest.raises(KeyboardInterrupt):
            model.prefill(images=endless(), chunk_size=200)
    finally:
        del model.encode_images
    assert max(tiles) == 4
    assert sum(tiles) >= 36


@pytest.mark.parametrize("num_images", [0, 1, 3])
def test_answer_counts_marks(model, images, num_images):
    with pytest.raises(UserError, match="2 <image> marks for"):
        model.answer("<image> or <image>?", images[:num_images], max_new_tokens=2)
    with pytest.raises(UserError, match="request 1: 2 <image> marks for"):
        model.answer_batch([("?", None), ("<image> or <image>?", images[:num_images])])


def test_answer_names_what_is_no_image(model):
    with pytest.raises(UserError, match=r"none\.png"):
        model.answer("?", "none.png")
    with pytest.raises(UserError, match="got int"):
        model.answer("?", 7)


def test_answer_batch_is_each_alone(model, images):
    requests = [
        (QUESTIONS[0], images[:1]),
        (QUESTIONS[1], None),
        ("<image> or <image>?", images[1:]),
        (QUESTIONS[2], images),
    ]
    together = model.answer_batch(requests, max_new_tokens=10)
    assert together == [model.answer(*request, max_new_tokens=10) for request in requests]
    assert model.answer_batch(requests[::-1], max_new_tokens=10) == together[::-1]
    assert model.answer_batch([]) == []


def test_answer_batch_asks_many_questions_about_one_state(model, images):
    _, closed = model.answer("Eh?", images[:1], max_new_tokens=3, return_state=True)
    for state in (model.prefill(images=images), closed):
        together = model.answer_batch([(q, None) for q in QUESTIONS], state=state, max_new_tokens=8)
        assert together == [model.answer(q, state=state, max_new_tokens=8) for q in QUESTIONS]


def test_streamed_pieces_join_to_the_answer(model, images):
    pieces = []
    streamer = TextStreamer(model.tokenizer, pieces.append)
    expected = model.answer(QUESTIONS[0], images, max_new_tokens=40)
    assert model.answer(QUESTIONS[0], images, max_new_tokens=40, streamer=streamer) == expected
    assert "".join(pieces) == expected
    assert len(pieces) > 1


def test_text_streamer_serves_one_row(model):
    with pytest.raises(UserError, match="one row, got 3"):
        model.generate(
            **prompts(model),
            max_new_tokens=2,
            streamer=TextStreamer(model.tokenizer, print),
        )


def test_streamers_of_transformers_fit(model, capsys):
    transformers = pytest.importorskip("transformers")

    class Codec:
        def decode(self, ids, **_):
            return model.tokenizer.decode(ids)

    expected = model.answer("?", max_new_tokens=20)
    model.answer("?", max_new_tokens=20, streamer=transformers.TextStreamer(Codec()))
    assert capsys.readouterr().out == expected + "\n"
