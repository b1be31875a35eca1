"""Needles: rows as they are described, balanced, the same from a seed, read strictly and scored by length and depth."""

import json
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cobra
from eval import runner
from eval.__main__ import main
from eval.ablations.needle import draw_heat_maps
from eval.needles import build, num_pictures, split_group
from eval.tasks import TASKS
from vision_scan.errors import UserError

LENGTHS, DEPTHS = (1, 3, 8), (0.0, 0.5, 1.0)
SIZE = {"longest": 6, "lengths": LENGTHS, "depths": DEPTHS, "hay": 12}


@pytest.fixture(scope="module")
def needles(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "needles"
    seen = []
    build(path, 40, 10, 3, **SIZE, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (num_pictures(40, 10, **SIZE),) * 2 == (len([*path.glob("images/**/*.png")]),) * 2
    return path


def rows_of(path: Path, split: str) -> list[dict]:
    return json.loads((path / f"{split}.json").read_text())


def brightest(path: Path) -> float:
    """Digits shine, the dimmed photographs do not."""
    return float(np.asarray(Image.open(path), dtype=float).max())


def test_the_needle_stands_where_its_row_says(needles):
    for row in rows_of(needles, "test"):
        length, depth = split_group(row["kind"])
        places = [place for place, name in enumerate(row["image"]) if "/needle/" in name]
        assert len(row["image"]) == length and places == [round(depth * (length - 1))]
        assert row["conversations"][0]["value"].count("<image>\n") == length


def test_only_the_needle_shines(needles):
    shines = {what: [brightest(p) for p in needles.glob(f"images/*/{what}/*.png")] for what in ("needle", "hay")}
    assert min(shines["needle"]) > 180 and max(shines["hay"]) < 150


def test_digits_are_balanced_in_every_group_and_never_the_same_for_all(needles):
    answers = defaultdict(list)
    for row in rows_of(needles, "test"):
        answers[row["kind"]].append(row["conversations"][1]["value"])
    assert len(answers) == len(LENGTHS) * len(DEPTHS)
    assert all(sorted(found) == list("0123456789") for found in answers.values())
    assert len({tuple(found) for found in answers.values()}) == len(answers)


def test_rows_to_train_on_have_all_lengths_and_ask_for_digit_and_colour(needles):
    rows = rows_of(needles, "train")
    lengths = Counter(len(row["image"]) for row in rows)
    assert set(lengths) == set(range(1, 7)) and lengths[1] + lengths[2] > lengths[5] + lengths[6]
    assert len({next(i for i, name in enumerate(r["image"]) if "/needle/" in name) for r in rows}) > 3
    for row in rows:
        values = [turn["value"] for turn in row["conversations"]]
        assert values[0].startswith("<image>\n" * len(row["image"])) and "<image>" not in values[2]
        assert any(value.isdecimal() for value in values) and len(values) == 4
        assert ("regions" in row) == (len(row["image"]) == 1)
    alone = [row["conversations"] for row in rows if len(row["image"]) == 1]
    assert len({tuple(turn["value"] for turn in turns[::2]) for turns in alone}) == 2  # either question comes first


def test_the_same_whoever_draws_and_another_from_another_seed(needles, tmp_path):
    build(tmp_path / "two", 40, 10, 3, **SIZE, workers=2)
    build(tmp_path / "other", 40, 10, 4, **SIZE)
    for split in ("train", "test"):
        assert rows_of(tmp_path / "two", split) == rows_of(needles, split) != rows_of(tmp_path / "other", split)
    name = "images/test/needle/000007.png"
    assert (tmp_path / "two" / name).read_bytes() == (needles / name).read_bytes()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--lengths", "3,x"], "--lengths '3,x': give numbers joined by commas"),
        (["--lengths", "0"], "must be 1 or more"),
        (["--depths", "0,1.5"], "must be from 0 (the first picture) to 1 (the last)"),
        (["--longest", "0"], "must be 1 or more"),
        (["--size", "16", "32"], "both sides must be 32 or more"),
        (["--test", "0"], "each must be 1 or more"),
    ],
)
def test_numbers_out_of_range_are_one_line(options, message, tmp_path, capsys):
    assert main(["needles", "--output", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("error: ") and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_samples_are_read_with_their_pictures_in_order(needles):
    samples = TASKS["needle"].load(needles)
    for sample, row in zip(samples, rows_of(needles, "test"), strict=True):
        assert [str(path) for path in sample.images] == [str(needles / "images" / name) for name in row["image"]]
        assert sample.question == "Which digit is shown?"  # the marks are left out
        assert sample.truth == row["conversations"][1]["value"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "many"}, "kind 'many' is not PICTURES@DEPTH, such as 100@0.25"),
        ({"image": ["test/needle/000000.png", 3]}, "'image' must be a string or a list of them"),
        ({"image": []}, "'image' must be a string or a list of them"),
        ({"image": ["test/needle/000000.png", "nowhere.png"]}, "must have 2 <image> marks, on a line of its own each"),
        ({"image": ["nowhere.png"]}, "nowhere.png does not exist"),
    ],
)
def test_rows_that_are_wrong_are_refused(needles, tmp_path, change, message):
    (tmp_path / "images").symlink_to(needles / "images")
    (tmp_path / "test.json").write_text(json.dumps([{**rows_of(needles, "test")[0], **change}]))
    with pytest.raises(UserError) as caught:
        TASKS["needle"].load(tmp_path)
    assert message in str(caught.value) and "row 0" in str(caught.value)


def test_scores_are_told_by_length_and_depth():
    records = [
        {"group": f"{length}@{depth:g}", "score": float(length < 100 or depth == 1)}
        for length in (100, 2) for depth in (1.0, 0.0, 0.5) for _ in range(2)
    ]  # fmt: skip
    summary = TASKS["needle"].summarise(records)
    assert list(summary["groups"]) == list(summary["depths"]) == ["2", "100"]
    assert summary["groups"]["100"]["accuracy"] == pytest.approx(1 / 3) and summary["groups"]["2"]["count"] == 6
    assert list(summary["depths"]["100"]) == ["0", "0.5", "1"]
    assert [row["accuracy"] for row in summary["depths"]["100"].values()] == [0, 0, 1]
    assert summary["accuracy"] == pytest.approx(2 / 3)


class Counting:
    """Answers with the number of pictures that it is shown."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []

    def answer_batch(self, requests, *, max_new_tokens):
        self.batches.append([len(images) for _, images in requests])
        return [str(len(images)) for _, images in requests]


def test_batches_hold_no_more_pictures_than_memory_should(needles, monkeypatch):
    samples, model = TASKS["needle"].load(needles), Counting()
    monkeypatch.setattr(runner, "MOST_PICTURES", 10)
    answers = runner.answer_samples(model, samples, batch_size=4)
    assert answers == [str(len(sample.images)) for sample in samples]
    assert max(map(len, model.batches)) == 4 and max(map(sum, model.batches)) <= 10
    assert all(sum(a) + sum(b) > 10 or len(a) == 4 for a, b in zip(model.batches, model.batches[1:], strict=False))
    model.batches.clear()
    runner.answer_samples(model, [max(samples, key=lambda sample: len(sample.images))] * 2, batch_size=3)
    assert model.batches == [[8], [8]]  # one that is too large goes alone


def test_a_model_is_scored_on_rows_of_all_lengths(needles, tmp_path, capsys):
    model = cobra.build("tiny")
    cobra.save(model, tmp_path / "model")
    command = ["tasks", "--tasks", "needle", "--model", str(tmp_path / "model"), "--data", str(needles)]
    assert main([*command, "--output", str(tmp_path), "--limit", "9", "--max-new-tokens", "1"]) == 0
    assert json.loads((tmp_path / "needle.json").read_text())["summary"]["groups"].keys() == {"1", "3", "8"}
    assert "  8           " in capsys.readouterr().out


def test_heat_maps_are_drawn_of_what_is_there(tmp_path):
    accuracies = {"1": {"0": 0.9, "1": 0.8}, "30": {"0": 0.1, "1": 1.0}}
    depths = {n: {depth: {"accuracy": value} for depth, value in row.items()} for n, row in accuracies.items()}
    results = [
        {"factors": {"training": training, "reader": reader}, "details": {"depths": depths}}
        for training, reader in (("long", "mamba2"), ("long", "window"), ("short", "mamba2"))
    ]
    for number, some in enumerate((results, [])):
        draw_heat_maps(some, tmp_path / f"{number}.png")
        assert Image.open(tmp_path / f"{number}.png").width > 200
