"""What a state has read, and by which model: digests that tell one from another."""

import copy
from dataclasses import replace

import pytest
import torch
from PIL import Image

import cobra
from cobra.content import fingerprint
from vision_scan.errors import UserError


@pytest.fixture(scope="module")
def model():
    return cobra.build("tiny", seed=1)


def picture(value: int, size=(40, 30)) -> Image.Image:
    image = Image.new("RGB", size, "teal")
    image.putpixel((size[0] // 2, size[1] // 2), (value, 0, 0))
    return image


def digest(state) -> str:
    return state.info["content"]["sha256"]


def test_content_does_not_depend_on_how_reading_is_cut(model):
    images = [picture(0), picture(255), picture(90)]
    whole = model.prefill(images=images)
    assert whole.info["content"]["num_tokens"] == int(whole.lengths)
    parts = None
    for image in images:
        parts = model.prefill(images=[image], state=parts)
    assert digest(parts) == digest(whole)
    for chunk_size in (1, 7, 100_000):
        assert digest(model.prefill(images=images, chunk_size=chunk_size)) == digest(whole)


def test_everything_read_changes_the_content(model):
    states = [
        model.prefill(),
        model.prefill("What is it?"),
        model.prefill("What is it!"),
        model.prefill(images=[picture(0)]),
        model.prefill(images=[picture(255)]),
        model.prefill(images=[picture(0, (30, 40))]),
        model.prefill(images=[picture(0), picture(255)]),
        model.prefill(images=[picture(255), picture(0)]),
        model.prefill("<image>What is it?", [picture(0)]),
        model.prefill("What is it?<image>", [picture(0)]),
    ]
    states += [model.answer("Why?", state=states[0], max_new_tokens=n, return_state=True)[1] for n in (1, 2)]
    assert len({digest(state) for state in states}) == len(states)


def test_an_answer_and_the_same_words_read_again_are_the_same_content(model):
    _, state = model.answer("What is it?", [picture(0)], max_new_tokens=5, return_state=True)
    stream = model.stream("What is it?", [picture(0)], max_new_tokens=5)
    "".join(stream)
    assert digest(stream.state) == digest(state)
    assert digest(model.prefill("x", state=state)) == digest(model.prefill("x", state=stream.state))


def test_content_is_unknown_where_tokens_came_another_way(model):
    state = model.prefill("Hello")
    _, after = model.lm(torch.tensor([[5, 6]]), state=state)
    assert "content" not in model.prefill("more", state=after).info
    batch = model.processor(text=["abc", "abcde"])
    _, state = model.generate(**batch, max_new_tokens=3, return_state=True)
    assert "content" not in state.info and state.info["model"] == fingerprint(model)


def test_fingerprint_is_the_weights_whatever_their_dtype(model, tmp_path):
    cobra.save(model, tmp_path / "model")
    for dtype in ("float32", "bfloat16"):
        assert fingerprint(cobra.load(tmp_path / "model", dtype=dtype)) == fingerprint(model)
    others = [cobra.build("tiny", seed=2), cobra.load(tmp_path / "model", dtype="float32", weights="int8")]
    trained = copy.deepcopy(model)
    with torch.no_grad():
        trained.lm.layers[1].mixer.dt_bias += 0.1
    renamed = copy.deepcopy(model)
    renamed.config = replace(model.config, template="zephyr")
    marks = [fingerprint(other) for other in (model, *others, trained, renamed)]
    assert len(set(marks)) == len(marks)


def test_fingerprint_follows_training(model):
    learning = copy.deepcopy(model)
    before = fingerprint(learning)
    assert fingerprint(learning) == before
    with torch.no_grad():
        for parameter in learning.connector.parameters():
            parameter.mul_(1.5)
    assert fingerprint(learning) != before
    replaced = copy.deepcopy(model)
    replaced.lm.norm_f.weight = torch.nn.Parameter(replaced.lm.norm_f.weight * 2)
    assert fingerprint(replaced) != before


def test_a_state_of_another_model_is_refused(model, tmp_path):
    state = model.prefill(images=[picture(0)])
    state.save(tmp_path / "one.state")
    loaded = cobra.State.load(tmp_path / "one.state")
    assert loaded.info == state.info
    other = cobra.build("tiny", seed=2)
    for ask in (
        lambda: other.answer("What?", state=loaded),
        lambda: next(other.stream("What?", state=loaded)),
        lambda: other.prefill("What?", state=loaded),
        lambda: other.answer_batch([("What?", None)], state=loaded),
        lambda: other.generate(torch.tensor([[5]]), max_new_tokens=1, state=loaded),
    ):
        with pytest.raises(UserError, match="another model"):
            ask()


@pytest.mark.parametrize("preset", ["tiny", "hybrid-tiny"])
def test_a_state_in_8_bits_is_smaller_and_close(preset, tmp_path):
    model = cobra.build(preset, seed=1)
    state = model.prefill(images=[picture(value) for value in range(5)])
    small = state.quantize()
    matrices = sum(layer["ssm"].nbytes for layer in state.layers if "ssm" in layer)
    codes = sum(layer["ssm"].nbytes + layer["ssm_scale"].nbytes for layer in small.layers if "ssm" in layer)
    assert codes < 0.3 * matrices and state.nbytes - small.nbytes == matrices - codes
    for exact, coded, wide in zip(state.layers, small.layers, small.dequantize().layers, strict=True):
        assert exact.keys() == wide.keys()
        for name in exact:
            if name != "ssm":
                assert torch.equal(exact[name], coded[name])
                continue
            step = exact[name].abs().amax(-1, keepdim=True) / 127
            assert ((exact[name] - wide[name]).abs() <= 0.5001 * step).all()
            assert (exact[name] != wide[name]).any()
    small.save(tmp_path / "small.state")
    loaded = cobra.State.load(tmp_path / "small.state")
    for ask in (small, loaded):
        assert model.answer("What?", state=ask, max_new_tokens=4) == model.answer(
            "What?", state=small.dequantize(), max_new_tokens=4
        )
    assert small.quantize().nbytes == small.nbytes and state.dequantize() is state
    two = small.select(torch.tensor([0, 0]))
    assert len(model.answer_batch([("What?", None), ("Why?", None)], state=two, max_new_tokens=2)) == 2


def test_nothing_read_is_nothing_in_8_bits(model):
    empty = model.lm.allocate_state(2).quantize().dequantize()
    assert all((tensor == 0).all() for layer in empty.layers for tensor in layer.values())
