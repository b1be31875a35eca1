from dataclasses import replace

import pytest
import torch
from PIL import Image

import cobra
from cobra.processor import Processor, iter_images, list_images, pad
from cobra.prompt import Turn, mark_images, render
from cobra.reading import opening, pieces_of
from cobra.tokenizer import Tokenizer
from tests.cobra.serve_ways import png, prompt
from tests.cobra.test_prompt import TOKENIZERS
from vision_scan.errors import UserError

TOKENIZER = Tokenizer.bytes()
CONFIG = cobra.PRESETS["tiny"]
RED = Image.new("RGB", (30, 20), (255, 0, 0))
BLUE = Image.new("RGB", (64, 64), (0, 0, 255))


@pytest.fixture
def processor():
    return Processor(CONFIG, TOKENIZER)


def row(batch, index):
    return batch["input_ids"][index][batch["attention_mask"][index].bool()].tolist()


def test_call_makes_the_documented_tensors(processor):
    batch = processor(text=["<image>\nab", "c", "<image><image>"], images=[[RED], None, [BLUE, RED]])
    tokens = CONFIG.tokens_per_tile
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (3, 2 * tokens)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert row(batch, 0) == [257] * tokens + [10, 97, 98]
    assert row(batch, 1) == [99]
    assert row(batch, 2) == [257] * (2 * tokens)
    assert batch["pixel_values"].shape == (3, 3, 64, 64)
    assert batch["pixel_values"].dtype == torch.float32
    assert batch["pixel_values"][:, :, 32, 32].tolist() == [[1, 0, 0], [0, 0, 1], [1, 0, 0]]
    assert batch["image_sizes"].tolist() == [[20, 30], [64, 64], [20, 30]]
    assert batch["tiles_per_image"].tolist() == [1, 1, 1]


def test_call_without_images(processor):
    batch = processor(text=["a", "bcd"])
    assert batch["pixel_values"] is None
    assert batch["image_sizes"].shape == (0, 2)
    assert batch["tiles_per_image"].shape == (0,)


@pytest.mark.parametrize(("side", "expected"), [("left", [256, 256, 97]), ("right", [97, 256, 256])])
def test_call_pads_on_the_side_asked_for(processor, side, expected):
    batch = processor(text=["a", "bcd"], padding_side=side)
    assert batch["input_ids"].tolist() == [expected, [98, 99, 100]]
    assert batch["attention_mask"].tolist() == [[int(i != 256) for i in expected], [1, 1, 1]]


def test_a_raw_prompt_may_hold_special_tokens_and_a_conversation_may_not(processor):
    raw = row(processor(text=["<|user|>a<|end|><|assistant|>"]), 0)
    turns = row(processor(text=[[Turn("user", "a")]]), 0)
    assert raw == turns == [258, 97, 260, 259]
    assert TOKENIZER.end_id not in row(processor(text=[[Turn("user", "<|end|>")]]), 0)[:-2]


def test_a_raw_prompt_is_cut_at_marks_like_a_conversation(processor):
    turns = [Turn("user", "x <image>\n y"), Turn("assistant", "z")]
    raw = "<|user|>x <image>\n y<|end|><|assistant|>z<|end|>"
    batch = processor(text=[turns, raw], images=[[RED], [RED]])
    assert row(batch, 0) == row(batch, 1)
    assert row(batch, 0) == processor.render(turns, 1).input_ids


def test_render_uses_the_template_and_the_tile_size_of_the_model(processor):
    turns = [Turn("user", "<image>\na"), Turn("assistant", "b")]
    expected = render(turns, TOKENIZER, processor.template, [CONFIG.tokens_per_tile])
    assert processor.render(turns, 1) == expected
    with pytest.raises(UserError, match="no supervised token"):
        processor.render(turns[:1], 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"text": "a"}, "single string"),
        ({"text": ["a", "b"], "images": [[RED]]}, "2 texts, but images for 1"),
        ({"text": ["a", "<image>"]}, "row 1: 1 <image> marks for 0 images"),
        ({"text": ["a"], "images": [[RED]]}, "row 0: 0 <image> marks for 1 images"),
        ({"text": [[Turn("user", "<image>")]]}, "row 0: 1 <image> marks for 0 images"),
        ({"text": ["a"], "padding_side": "middle"}, "middle"),
    ],
)
def test_call_refuses_what_does_not_fit(processor, arguments, message):
    with pytest.raises(UserError, match=message):
        processor(**arguments)


def test_pixels_takes_any_source(processor, tmp_path):
    RED.save(tmp_path / "red.png")
    for source in (RED, tmp_path / "red.png", str(tmp_path / "red.png")):
        assert processor.pixels(source)[0, :, 5, 5].tolist() == [1, 0, 0]


def test_images_may_be_given_in_any_way():
    for given in (RED, [RED], (RED,), iter([RED])):
        assert list_images(given) == [RED]
    assert list_images(None) == []
    assert list_images("a.png") == ["a.png"]
    assert list_images(iter([1, 2, 3]), most=2) == [1, 2]
    with pytest.raises(UserError, match="got float"):
        iter_images(1.0)


def test_pad_of_nothing():
    assert pad([], 0, "left")[0].shape == (0, 0)
    assert pad([[]], 0, "left")[0].shape == (1, 0)


@pytest.fixture(scope="module")
def told_apart():
    """A model whose template has something around images and frames."""
    tokenizer = TOKENIZERS["longllava"]
    lm = replace(CONFIG.lm, layers=CONFIG.lm.layers[:1], vocab_size=tokenizer.vocab_size)
    return cobra.build(replace(CONFIG, lm=lm, template="longllava"), seed=3, tokenizer=tokenizer)


def ids_of(model, pieces):
    image = model.tokenizer.image_id
    return [index for piece in pieces for index in (piece if isinstance(piece, list) else [image] * piece.num_tokens)]


CLIP = cobra.Video([BLUE, RED, BLUE])
AROUND = {  # a question, its images, and the whole prompt, one token for an image
    "in front": (
        "What?", [RED, CLIP],
        "<img>I</img>\n<vid><img>I</img><t><img>I</img><t><img>I</img></vid>\nWhat?",
    ),
    "between": ("Is <image> in <image>?", [RED, CLIP], "Is <img>I</img> in "
                "<vid><img>I</img><t><img>I</img><t><img>I</img></vid>?"),
    "by hand": ("<vid><image><t><img><image></img></vid>What?", [RED, BLUE],
                "<vid><img>I</img><t><img>I</img></vid>What?"),
}  # fmt: skip


@pytest.mark.parametrize("case", AROUND)
def test_every_way_of_reading_has_the_same_around_images(told_apart, case):
    model, (question, images, expected) = told_apart, AROUND[case]
    tokens = model.config.tokens_per_tile
    expected = expected.replace("I<", "<image>" * tokens + "<")
    text = f"<|startoftext|><|User|>\n{expected}\n<|startoftext|><|Assistant|>\n"
    turns = [Turn("user", mark_images(question, len(images)))]
    batch = model.processor(text=[turns], images=[images])
    ids = row(batch, 0)
    assert model.tokenizer.decode(ids, skip_special=False) == text
    assert len(batch["image_sizes"]) == len(batch["pixel_values"]) == ids.count(model.tokenizer.image_id) // tokens
    read = ids_of(model, pieces_of(model, question, images))
    template = model.processor.template
    assert [*opening(model, None), *read, *template.encode(template.user_close, model.tokenizer)] == ids
    answer = model.answer(question, images, max_new_tokens=6)
    assert model.answer_batch([(question, images), ("x", None)], max_new_tokens=6)[0] == answer
    assert model.tokenizer.decode(model.generate(**batch, max_new_tokens=6)[0].tolist()) == answer


def test_a_server_has_the_same_around_images(told_apart):
    served = prompt(told_apart, [png(1), "What?"])
    ids = ids_of(told_apart, (piece for segment in served.segments for piece in segment.open(told_apart)))
    batch = told_apart.processor(text=[[Turn("user", "<image>\nWhat?")]], images=[[RED]])
    assert ids == row(batch, 0)
