"""A question in front of its picture, behind it, or both: what is written, taught and asked."""

import json
from pathlib import Path

import pytest

import cobra
from cobra.prompt import IGNORE, Turn, render
from eval.__main__ import main
from eval.plane_scenes import build
from eval.scene_files import QUESTION_PLACES
from eval.tasks import TASKS
from vision_scan.errors import UserError

FORMS = {"last": "<image>\n{0}", "first": "{0}\n<image>", "both": "{0}\n<image>\n{0}"}


def read(path: Path):
    return json.loads(path.read_text())


def ask(row: dict) -> str:
    return row["conversations"][0]["value"]


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    """A set for each place, from the same seed."""
    path = tmp_path_factory.mktemp("sets")
    for place in QUESTION_PLACES:
        arguments = ["--train", "3", "--test", "2", "--question", place, "--workers", "1"]
        assert main(["plane-scenes", "--output", str(path / place), *arguments]) == 0
    return path


@pytest.mark.parametrize("place", FORMS)
def test_question_stands_where_it_is_asked_for_and_nothing_else_moves(sets, place):
    assert read(sets / place / "meta.json") == {**read(sets / "last" / "meta.json"), "question": place}
    for name in ("train.json", "test.json"):
        for row, plain in zip(read(sets / place / name), read(sets / "last" / name), strict=True):
            question = ask(plain).removeprefix("<image>\n")
            assert "<image>" not in question and ask(row) == FORMS[place].format(question)
            plain["conversations"][0]["value"] = ask(row)
            assert row == plain
            image = Path("images") / row["image"]
            assert (sets / place / image).read_bytes() == (sets / "last" / image).read_bytes()


@pytest.mark.parametrize("place", FORMS)
def test_a_model_is_asked_as_it_is_taught(sets, monkeypatch, place):
    """One by one and in batches."""
    model, row = cobra.build("tiny", seed=0), read(sets / place / "test.json")[0]
    taught = render(
        [Turn("user", ask(row)), Turn("assistant", "red")],
        model.tokenizer,
        model.processor.template,
        [model.config.tokens_per_tile],
    )
    prompt = [token for token, label in zip(taught.input_ids, taught.labels, strict=True) if label == IGNORE]
    read_ids, embed = [], model.embed
    monkeypatch.setattr(model, "embed", lambda ids, *args, **more: read_ids.extend(ids[0]) or embed(ids, *args, **more))
    sample = TASKS["plane_scenes"].load(sets / place)[0]
    model.answer_batch([(sample.question, list(sample.images))], max_new_tokens=1)
    assert [int(token) for token in read_ids] == prompt
    read_ids.clear()
    model.answer(sample.question, list(sample.images), max_new_tokens=1)
    assert [int(token) for token in read_ids] == prompt


def test_a_question_behind_its_picture_is_asked_without_a_mark(sets):
    assert all("<image>" not in sample.question for sample in TASKS["plane_scenes"].load(sets / "last"))


def test_an_unknown_place_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="unknown place of the question 'middle'; allowed: last, first, both"):
        build(tmp_path / "set", 1, 1, seed=0, question="middle")
    assert main(["plane-scenes", "--output", str(tmp_path / "set"), "--question", "middle"]) == 2
    assert capsys.readouterr().err.count("\n") == 1 and not (tmp_path / "set").exists()
