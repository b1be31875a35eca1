import pytest
import torch
from PIL import Image

import cobra
from cobra.processor import Processor, iter_images, list_images, pad
from cobra.prompt import Turn, render
from cobra.tokenizer import Tokenizer
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
