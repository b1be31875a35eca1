"""Reading and checking LLaVA rows."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from cobra.prompt import Turn
from train.data.dataset import open_dataset
from train.settings import DataSettings
from vision_scan.errors import UserError

ASK = {"from": "human", "value": "<image>\nwhat?"}
PLAIN = {"from": "human", "value": "what?"}
ANSWER = {"from": "gpt", "value": "this"}
GOOD = {"id": "good", "image": "good.png", "conversations": [ASK, ANSWER]}
BOX = [0.0, 0.0, 0.5, 0.5]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    Image.new("RGB", (9, 7), (1, 2, 3)).save(tmp_path / "good.png")
    Image.effect_noise((64, 64), 90).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    return tmp_path


def load(folder: Path, rows: Any, needs: str = "conversations", **settings: Any):
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return open_dataset(DataSettings(path=str(path), **settings), needs)


def test_images_may_be_one_several_or_none(folder: Path) -> None:
    two = {"from": "human", "value": "<image> and <image>, the same?"}
    rows = load(
        folder,
        [
            GOOD,
            {"id": 2, "image": ["good.png", "whole.jpg"], "conversations": [two, ANSWER]},
            {"conversations": [PLAIN, ANSWER]},
            {"id": "null", "image": None, "conversations": [PLAIN, ANSWER]},
        ],
    )
    assert [len(row.images) for row in rows] == [1, 2, 0, 0]
    assert rows[0].images[0].path == folder / "good.png"
    assert rows[0].turns == (Turn("user", ASK["value"]), Turn("assistant", "this"))
    assert [row.id for row in rows] == ["'good'", "2", "number 2", "'null'"]


def test_jsonl_gives_the_same_rows(folder: Path) -> None:
    path = folder / "data.jsonl"
    line = json.dumps({**GOOD, "note": "a\u2028b"}, ensure_ascii=False)
    path.write_text(f"{line}\n\n{line}\n")
    assert list(open_dataset(DataSettings(path=str(path)))) == list(load(folder, [GOOD, GOOD]))


def test_opening_answer_is_dropped(folder: Path) -> None:
    (row,) = load(folder, [{"id": 1, "conversations": [ANSWER, PLAIN, ANSWER]}])
    assert [turn.role for turn in row.turns] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ("text", "expected a mapping"),
        ({"id": "x"}, "no 'conversations'"),
        ({"id": "x", "conversations": []}, "list of turns"),
        ({"id": "x", "conversations": "hello"}, "list of turns"),
        ({"id": "x", "conversations": [{"role": "user", "content": "hi"}]}, "a turn must be"),
        ({"id": "x", "conversations": [{"from": "bot", "value": "hi"}]}, "'bot'"),
        ({"id": "x", "conversations": [PLAIN, PLAIN, ANSWER]}, "alternate"),
        ({"id": "x", "conversations": [PLAIN]}, "no answer to learn from"),
        ({"id": "x", "conversations": [PLAIN, {"from": "gpt", "value": " "}]}, "no answer"),
        ({**GOOD, "image": 7}, "path or a list of paths"),
        ({**GOOD, "conversations": [PLAIN, ANSWER]}, "0 <image> marks .* for 1 images"),
        ({"id": "x", "conversations": [ASK, ANSWER]}, "1 <image> marks .* for 0 images"),
        ({**GOOD, "image": "none.png"}, "none.png: no such file"),
        ({**GOOD, "image": "empty.png"}, "empty.png: .*empty"),
        ({**GOOD, "image": "text.png"}, "text.png: not an image"),
        ({**GOOD, "image": "."}, "not a file"),
    ],
)
def test_bad_row_is_named(folder: Path, row: Any, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        load(folder, [GOOD, row])
    assert "data.json: 1 of 2 rows cannot be used: row " in str(caught.value)
    assert "data.skip_bad=true" in str(caught.value)
    assert "\n" not in str(caught.value)

    kept = load(folder, [GOOD, row], skip_bad=True)
    assert len(kept) == 1
    assert len(kept.bad) == 1


@pytest.mark.parametrize(
    ("regions", "told"),
    [
        ({}, "must be a list"),
        ([{"box": [0, 0, 1], "labels": {}}], "x0, y0, x1, y1"),
        ([{"box": [0, 0, 2, 1], "labels": {}}], "within 0 to 1"),
        ([{"box": [0.5, 0, 0.5, 1], "labels": {}}], "x0 < x1"),
        ([{"box": BOX, "labels": ["red"]}], "kind: value"),
    ],
)
def test_bad_regions_are_named(folder: Path, regions: Any, told: str) -> None:
    with pytest.raises(UserError, match=told):
        load(folder, [{**GOOD, "regions": regions}], needs="regions")


def test_regions_need_no_conversation(folder: Path) -> None:
    row = {"image": "good.png", "regions": [{"box": BOX, "labels": {"digit": 7}}]}
    (loaded,) = load(folder, [row], needs="regions")
    assert loaded.regions[0].labels == {"digit": "7"}
    with pytest.raises(UserError, match="no 'regions'"):
        load(folder, [GOOD], needs="regions")


CHOICE = {"id": "pair", "image": "good.png", "conversations": [ASK], "chosen": "this", "rejected": "that"}


@pytest.mark.parametrize("chosen", ["this", {"from": "gpt", "value": "this"}, {"role": "assistant", "content": "this"}])
@pytest.mark.parametrize("more", [[], [ANSWER, PLAIN]])
def test_preference_data_has_two_answers_to_the_last_turn(folder: Path, chosen: Any, more: list) -> None:
    row = {**CHOICE, "chosen": chosen, "conversations": [ASK, *more]}
    (loaded,) = load(folder, [row], needs="chosen")
    assert loaded.answers == ("this", "that")
    assert [turn.role for turn in loaded.turns] == ["user", "assistant", "user"][: 1 + len(more)]
    assert loaded.num_characters == sum(len(turn.text) for turn in loaded.turns) + 8
    dataset = load(folder, [row], needs="chosen")
    assert list(dataset.texts())[-2:] == ["this", "that"]
    assert dataset.lengths[0] > loaded.num_characters


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"chosen": None}, r"has no 'chosen'; keys: id, image, conversations, rejected"),
        ({"rejected": None}, r"has 'chosen' and no 'rejected'; keys: id, image, conversations, chosen"),
        ({"rejected": "this "}, r"'chosen' and 'rejected' are the same answer, 'this '|'this'"),
        ({"rejected": " "}, r"'rejected' has no text"),
        ({"chosen": 7}, r"'chosen' must be text, .* got 7"),
        ({"chosen": {"from": "human", "value": "x"}}, r"'chosen' must be text, .* got \{'from': 'human'"),
        ({"chosen": ["a", "b"]}, r"'chosen' must be text"),
        ({"chosen": [{"role": "assistant", "content": [{"type": "image"}]}]}, r"'chosen' must be text"),
        ({"chosen": "see <image>"}, r"'chosen' has an <image> mark; images stand in human turns"),
        ({"conversations": [ASK, ANSWER]}, r"ends with a gpt turn; 'chosen' and 'rejected' answer a human turn"),
        ({"conversations": [ANSWER]}, r"has no human turn; 'chosen' and 'rejected' answer a human turn"),
        ({"conversations": None}, r"has 'chosen' and no 'conversations', 'messages' or 'prompt' in front of it"),
        ({"conversations": [PLAIN]}, r"0 <image> marks .* for 1 images"),
        ({"conversations": [ASK, ASK]}, "alternate"),
        ({"image": "none.png"}, r"none.png: no such file"),
    ],
)
def test_bad_preference_data_is_named(folder: Path, changes: dict[str, Any], told: str) -> None:
    row = {key: value for key, value in {**CHOICE, **changes, "id": "bad"}.items() if value is not None}
    with pytest.raises(UserError, match=rf"1 of 2 rows cannot be used: row 'bad': .*({told})") as caught:
        load(folder, [CHOICE, row], needs="chosen")
    assert "\n" not in str(caught.value)
    kept = load(folder, [CHOICE, row], needs="chosen", skip_bad=True)
    assert len(kept) == len(kept.bad) == 1


def test_rows_with_one_answer_are_no_preference_data(folder: Path) -> None:
    with pytest.raises(UserError, match="has no 'chosen'; keys: id, image, conversations"):
        load(folder, [GOOD], needs="chosen")


def test_truncated_image_is_found_by_a_full_check_only(folder: Path) -> None:
    cut = {**GOOD, "id": "cut", "image": "cut.jpg"}
    assert len(load(folder, [GOOD, cut])) == 2
    with pytest.raises(UserError, match=r"row 'cut': .*cut.jpg"):
        load(folder, [GOOD, cut], check="full")


def test_unchecked_images_need_not_exist(folder: Path) -> None:
    assert load(folder, [{**GOOD, "image": "none.png"}], check="none")


def test_many_bad_rows_are_counted_and_the_first_named(folder: Path) -> None:
    rows = [{**GOOD, "id": index, "image": "none.png"} for index in range(50)]
    with pytest.raises(UserError, match=r"50 of 50 rows .*row 0:.*row 4:.*\.\.\.") as caught:
        load(folder, rows, skip_bad=True)
    assert "row 5:" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("data.json", "", "is empty"),
        ("data.json", "[]", "no rows"),
        ("data.json", '{"a": 1}', "expected a list of rows"),
        ("data.json", "[1, 2", "not JSON"),
        ("data.json", "not json", "not JSON"),
        ("data.jsonl", json.dumps(GOOD) + "\n{", "data.jsonl line 2 is not JSON"),
    ],
)
def test_file_that_is_not_llavas(folder: Path, name: str, content: str, told: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=told) as caught:
        open_dataset(DataSettings(path=str(folder / name)))
    assert name in str(caught.value)


def test_missing_paths(folder: Path) -> None:
    with pytest.raises(UserError, match=r"set data.path"):
        open_dataset(DataSettings())
    with pytest.raises(UserError, match=r"none.json: No such file"):
        open_dataset(DataSettings(path=str(folder / "none.json")))
    with pytest.raises(UserError, match="cannot read"):
        open_dataset(DataSettings(path=str(folder)))
    with pytest.raises(UserError, match=r"data.image_root .*pics is not a folder"):
        load(folder, [GOOD], image_root=str(folder / "pics"))


def test_fingerprint_follows_the_rows_that_are_used(folder: Path) -> None:
    prints = [
        load(folder, [GOOD]).fingerprint,
        load(folder, [GOOD, GOOD]).fingerprint,
        load(folder, [GOOD, {**GOOD, "id": "z", "image": "none.png"}], skip_bad=True).fingerprint,
        load(folder, [GOOD, {**GOOD, "id": "z", "image": "none.png"}], check="none").fingerprint,
    ]
    assert len(set(prints)) == 4
    assert load(folder, [GOOD]).fingerprint == prints[0]
