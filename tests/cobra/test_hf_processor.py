"""The processor of transformers writes and encodes what ours does, for every template."""

import base64
import io
from dataclasses import replace

import pytest
import torch
from PIL import Image

import cobra
from cobra.prompt import IGNORE, TEMPLATES, Turn, render
from tests.cobra.test_prompt import TOKENIZERS
from vision_scan.errors import UserError

transformers = pytest.importorskip("transformers")
import cobra.hf  # noqa: E402 (registers the classes)

pytestmark = pytest.mark.usefixtures("one_thread")

RED, BLUE = Image.new("RGB", (40, 30), "red"), Image.new("RGB", (20, 64), "blue")


def text(words):
    return {"type": "text", "text": words}


def image(picture=RED):
    return {"type": "image", "image": picture}


def user(*content):
    return {"role": "user", "content": content[0] if isinstance(content[0], str) else list(content)}


def assistant(words):
    return {"role": "assistant", "content": words}


# Messages, and the turns that they are.
CONVERSATIONS = {
    "question": ([user("What?")], [Turn("user", "What?")]),
    "image first": ([user(image(), text("What?"))], [Turn("user", "<image>\nWhat?")]),
    "image last": ([user(text("What?"), image(), image(BLUE))], [Turn("user", "<image>\n<image>\nWhat?")]),
    "between": (
        [user(text("Is "), image(), text(" or "), image(BLUE), text(" darker?"))],
        [Turn("user", "Is <image> or <image> darker?")],
    ),
    "image alone": ([user(image())], [Turn("user", "<image>\n")]),
    "turns": (
        [user(image(), text("What?")), assistant("A cat."), user(text("And "), image(BLUE)), assistant("")],
        [Turn("user", "<image>\nWhat?"), Turn("assistant", "A cat."), Turn("user", "<image>\nAnd "),
         Turn("assistant", "")],
    ),
    "system": (
        [{"role": "system", "content": "Be brief."}, {"role": "developer", "content": [text("Be "), text("kind.")]},
         user(image(), text("Hi")), assistant("Yo"), user("Bye")],
        [Turn("user", "Be brief.\n\nBe kind.\n\n<image>\nHi"), Turn("assistant", "Yo"), Turn("user", "Bye")],
    ),
    "signs": ([user("\n 'é' \"ж\" {{ x }} \\n ")], [Turn("user", "\n 'é' \"ж\" {{ x }} \\n ")]),
}  # fmt: skip


@pytest.fixture(scope="module", params=TEMPLATES)
def pair(request, tmp_path_factory):
    """Our processor of a model with a template, and the one that transformers reads from its directory."""
    config = cobra.PRESETS["tiny"]
    config = replace(config, template=request.param, lm=replace(config.lm, layers=config.lm.layers[:1]))
    model = cobra.build(config, tokenizer=TOKENIZERS[request.param])
    path = tmp_path_factory.mktemp(request.param) / "model"
    cobra.save(model, path)
    return model.processor, transformers.AutoProcessor.from_pretrained(path)


def pictures(messages):
    return [part["image"] for one in messages if isinstance(one["content"], list) for part in one["content"]
            if part["type"] == "image"]  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations_are_written_and_encoded_as_ours(pair, name):
    own, theirs = pair
    messages, turns = CONVERSATIONS[name]
    images = pictures(messages)
    expected = own(text=[turns], images=[images])
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=turns[-1].role == "user")
    # Our ids as text, an image's many tokens as its one mark.
    count = own.config.tokens_per_tile
    as_text = own.tokenizer.decode(expected["input_ids"][0].tolist(), skip_special=False)
    assert rendered == as_text.replace("<image>" * count, "<image>")

    batch = theirs.apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    from_text = theirs(text=rendered, images=images or None, return_tensors="pt")
    for found in (batch, from_text):
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["attention_mask"], expected["attention_mask"])
        assert ("pixel_values" in found) == bool(images)
        if images:
            assert torch.equal(found["pixel_values"], expected["pixel_values"])
            assert torch.equal(found["image_sizes"], expected["image_sizes"])


MARKED = "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}!{% endgeneration %}" \
    "{% else %}{{ m.role }}: {{ m.content }} - {% endif %}{% endfor %}"  # fmt: skip


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_assistants_tokens_are_those_that_have_labels(pair, name):
    own, theirs = pair
    messages, turns = CONVERSATIONS[name]
    images = pictures(messages)
    rendered = render(turns, own.tokenizer, own.template, own.image_tokens(len(images)), supervised=False)
    expected = [int(label != IGNORE) for label in rendered.labels]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    assert theirs.apply_chat_template(messages, **options)["assistant_masks"] == [expected]
    # What the template marks, where it is given as one's own.
    template = f"{theirs.chat_template}{{# mine #}}"
    found = theirs.apply_chat_template(messages, template, **options)
    assert found["input_ids"] == [rendered.input_ids] and found["assistant_masks"] == [expected]
    # In a batch, on either side of the padding.
    rows = [[user("?"), assistant("a long answer to it")], messages]
    for side in ("left", "right"):
        batch = theirs.apply_chat_template(
            rows, return_tensors="pt", processor_kwargs={"padding_side": side, "pad_to_multiple_of": 8}, **options
        )
        mask = batch["attention_mask"].bool()
        assert batch["input_ids"].shape[1] % 8 == 0 and not mask.all()
        assert batch["assistant_masks"][1, mask[1]].tolist() == expected
        assert not batch["assistant_masks"][~mask].any()


def test_the_assistants_tokens_of_another_template(pair):
    own, theirs = pair
    rows = [[user("Why?"), assistant("So"), user("And?"), assistant("Thus")], [user("x"), assistant("y")]]
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "padding": False}
    found = theirs.apply_chat_template(rows, MARKED, **options)
    texts = ["user: Why? - So!user: And? - Thus!", "user: x - y!"]
    for ids, mask, text_, said in zip(
        found["input_ids"], found["assistant_masks"], texts, ("So!Thus!", "y!"), strict=True
    ):
        assert own.tokenizer.decode(ids) == text_
        assert own.tokenizer.decode([token for token, is_said in zip(ids, mask, strict=True) if is_said]) == said


def test_a_template_that_was_saved_is_the_one_that_writes(pair, tmp_path):
    own, _ = pair
    mine = cobra.hf.CobraProcessor(own, MARKED)
    mine.save_pretrained(tmp_path)
    for processor in (mine, transformers.AutoProcessor.from_pretrained(tmp_path)):
        (ids,) = processor.apply_chat_template([user("Why?"), assistant("So")], tokenize=True)
        assert own.tokenizer.decode(ids) == "user: Why? - So!"


def test_an_answer_that_goes_on_has_no_end(pair):
    own, theirs = pair
    messages = [user("What?"), assistant("A c")]
    expected = own(text=[[Turn("user", "What?"), Turn("assistant", "A c")]])["input_ids"][:, :-1]
    found = theirs.apply_chat_template(messages, tokenize=True, continue_final_message=True, return_tensors="pt")
    assert torch.equal(found, expected)


def test_what_is_said_is_no_special_token(pair):
    own, theirs = pair
    words = f"Say {own.template.end} and {own.template.user_close}"
    found = theirs.apply_chat_template([user(words)], tokenize=True, return_tensors="pt")[0].tolist()
    around = own.template.system + own.template.user_open + own.template.user_close
    assert found.count(own.template.end_id(own.tokenizer)) == around.count(own.template.end)


def test_the_fast_tokenizer_has_the_same_ids(pair):
    own, theirs = pair
    tokenizer = theirs.tokenizer
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast) and tokenizer.is_fast
    for words in ("What is 12?", " é ж\n\n", f"a{own.template.end}b<image>c<pad>", "<|user|>x<|assistant|>"):
        ids = tokenizer(words, add_special_tokens=False)["input_ids"]
        assert ids == own.tokenizer.encode(words, allow_special=True)
        assert tokenizer.decode(ids, skip_special_tokens=False) == own.tokenizer.decode(ids, skip_special=False)
        assert theirs.batch_decode([ids], skip_special_tokens=True) == [own.tokenizer.decode(ids)]
    assert (tokenizer.pad_token_id, tokenizer.image_token_id) == (own.tokenizer.pad_id, own.tokenizer.image_id)
    assert tokenizer.eos_token_id == own.template.end_id(own.tokenizer)
    assert len(tokenizer) == own.tokenizer.vocab_size


def test_a_tokenizer_alone_knows_its_tokens(pair, tmp_path):
    own, theirs = pair
    theirs.save_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer.pad_token_id == own.tokenizer.pad_id
    assert tokenizer.eos_token_id == own.template.end_id(own.tokenizer)
    assert len(tokenizer) == own.tokenizer.vocab_size and tokenizer.padding_side == "left"
    words = f" é{own.template.end}b<image>"
    assert tokenizer(words)["input_ids"] == own.tokenizer.encode(words, allow_special=True)


@pytest.mark.parametrize("side", ["left", "right"])
def test_batches_are_padded_as_ours(pair, side):
    own, theirs = pair
    rows = ["<image>\nWhat?", "x", "<image> or <image>?"]
    images = [RED, BLUE, RED]
    expected = own(text=rows, images=[[RED], [], [BLUE, RED]], padding_side=side)
    for given in (images, [[RED], [], [BLUE, RED]]):  # in order, or by row
        found = theirs(text=rows, images=given, padding=True, padding_side=side, return_tensors="pt")
        for name in ("input_ids", "attention_mask", "pixel_values", "image_sizes"):
            assert torch.equal(found[name], expected[name])
    lists = theirs(text=rows, images=images, padding=False)
    assert lists["input_ids"] == [
        row[mask.bool()].tolist() for row, mask in zip(expected["input_ids"], expected["attention_mask"], strict=True)
    ]
    batch = theirs.apply_chat_template([[user(row)] for row in rows[1:2] * 2], tokenize=True, return_dict=True)
    assert len(batch["input_ids"]) == 2


def test_rows_end_where_they_are_told_to(pair):
    own, theirs = pair
    texts = ["<image>\nWhat is in it, and where?", "x"]
    whole = theirs(text=texts, images=[[RED], []], padding_side="right", return_tensors="pt")
    most = own.config.tokens_per_tile + 3
    found = theirs(
        text=texts, images=[[RED], []], padding_side="right", return_tensors="pt", truncation=True, max_length=most
    )
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(found[name], whole[name][:, :most])
    assert torch.equal(found["pixel_values"], whole["pixel_values"])
    longer = theirs(text=texts[1], padding=False, truncation=True, max_length=most)
    assert longer["input_ids"] == theirs(text=texts[1], padding=False)["input_ids"]


def test_images_come_in_any_form(pair, tmp_path):
    _, theirs = pair
    RED.save(tmp_path / "red.png")
    data = io.BytesIO()
    RED.save(data, "png")
    code = base64.b64encode(data.getvalue()).decode()
    forms = [
        {"type": "image", "path": str(tmp_path / "red.png")},
        {"type": "image", "url": f"data:image/png;base64,{code}"},
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{code}"}},
        {"type": "image", "base64": code},
        {"type": "image", "image": None, "path": str(tmp_path / "red.png"), "text": None},  # a row of a table
    ]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = theirs.apply_chat_template([user(image(), text("?"))], **options)
    for form in forms:
        found = theirs.apply_chat_template([user(form, text("?"))], **options)
        assert torch.equal(found["input_ids"], expected["input_ids"])
        assert torch.equal(found["pixel_values"], expected["pixel_values"])
    beside = theirs.apply_chat_template([user({"type": "image"}, text("?"))], images=[RED], **options)
    assert torch.equal(beside["pixel_values"], expected["pixel_values"])


def test_a_saved_processor_is_read_alone(pair, tmp_path):
    own, theirs = pair
    theirs.save_pretrained(tmp_path / "alone")
    again = transformers.AutoProcessor.from_pretrained(tmp_path / "alone")
    assert again.chat_template == theirs.chat_template
    expected = own(text=["<image> x"], images=[[RED]])
    found = again(text="<image> x", images=RED, return_tensors="pt")
    assert torch.equal(found["input_ids"], expected["input_ids"])
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_wrong_inputs_are_told_in_a_line(pair):
    own, theirs = pair
    both = {"role": "user", "content": [{"type": "audio"}]}
    asked, masks = [user("x"), assistant("y")], {"tokenize": True, "return_assistant_tokens_mask": True}
    needed = len(own.tokenizer.encode("a ")) + own.config.tokens_per_tile
    cut = f"row 1: max_length=5 cuts off images, which end at token {needed}"
    for call, told in (
        (lambda: theirs(images=RED), "a prompt is missing"),
        (lambda: theirs(text="<image> x"), "1 <image> marks for 0 images"),
        (lambda: theirs(text="x", images=[RED]), "0 <image> marks for 1 images"),
        (lambda: theirs(text=["x", "y"], images=[[RED]]), "2 texts, but images for 1 rows"),
        (lambda: theirs(text=["x", "a <image>"], images=[RED], truncation=True, max_length=5), cut),
        (lambda: theirs(text="x", padding="max_length"), "padding='max_length': allowed are True"),
        (lambda: theirs.apply_chat_template(asked, "{{ messages }}", **masks), "does not say what the assistant's"),
        (lambda: theirs.apply_chat_template(asked, continue_final_message=True, **masks), "answers that have ended"),
        (lambda: theirs(text="x", return_tensors="np"), "allowed are pt"),
        (lambda: theirs.apply_chat_template([both], tokenize=True), "content of type 'audio'"),
        (lambda: theirs.apply_chat_template([{"role": "tool", "content": ""}], tokenize=True), "of role 'tool'"),
        (lambda: theirs.apply_chat_template([user("x"), user("y")], tokenize=True), "expected 'assistant'"),
        (lambda: cobra.hf.CobraProcessor.from_pretrained("tests"), "has no config.json"),
    ):
        with pytest.raises(UserError, match=told) as caught:
            call()
        assert "\n" not in str(caught.value)


def test_the_pipeline_answers_as_the_model(tmp_path):
    from tests.cobra.test_generate import lively

    own = lively(cobra.PRESETS["tiny"].lm.layers[:3])
    cobra.save(own, tmp_path / "model")
    pipe = transformers.pipeline("image-text-to-text", model=str(tmp_path / "model"), dtype="float32")
    options = {"generate_kwargs": {"max_new_tokens": 8, "do_sample": False}, "return_full_text": False}
    (chat,) = pipe(text=[user(image(), text("What?"))], **options)
    assert chat["generated_text"] == own.answer("What?", [RED], max_new_tokens=8)
    # Beside each other, as the pipeline takes them too.
    prompt = own.processor.template.user_open + "<image>\nWhat?" + own.processor.template.user_close
    (beside,) = pipe(images=BLUE, text=prompt, **options)
    assert beside["generated_text"] == own.answer("What?", [BLUE], max_new_tokens=8)
