"""Plane scenes: the same from a seed, balanced, true to their pictures, and mute to short cuts.

Answers are read off the pixels here by flood filling, which knows nothing of how they were drawn.
"""

import contextlib
import json
import pickle
from collections import Counter

import numpy as np
import pytest

from eval import runner, scene_files
from eval.__main__ import main
from eval.plane_curves import Difficulty, _walks
from eval.plane_scenes import DEFAULT, KINDS, build, make_scene
from eval.plane_shapes import COLOURS, Grid
from eval.scene_questions import guess_from_text
from eval.tasks import TASKS
from tests.eval.plane_pixels import WHITE, background, blobs, fill

NUMBERS = {"colour": 200, "relation": 1000, "count": 800, "trace": 400}  # of pictures that tests look at
CHANCE = {"colour": 1 / 4, "relation": 1 / 2, "count": 1 / 5, "trace": 1 / 3}  # of who has read the question


def read_answer(scene) -> str:
    """The answer by the pixels and the question's words."""
    kind, words = scene.question.kind, scene.question.text.rstrip("?").split()
    if kind == "trace":
        return follow(scene.image)
    found = blobs(scene.image)
    if kind == "count":
        return str(sum(blob.shape == "circle" for blob in found))
    if kind == "colour":
        (colour,) = (blob.colour for blob in found if blob.shape == "square")
        return colour
    places = {blob.shape: blob.middle for blob in found}
    assert len(places) == len(found) == 4
    (y, x), (b, a) = places[words[2]], places[words[-1]]
    before, behind = words[3], words[5]
    difference = {"left": a - x, "above": b - y}[before]
    assert abs(difference) >= 4
    return before if difference > 0 else behind


def follow(image: np.ndarray) -> str:
    """The one colour that ink leads to from the star, which is the biggest white blob."""
    star = max(blobs(image, ["white"]), key=lambda blob: len(blob.rows))
    groups = fill((image != background(image)).any(2))
    start = (star.rows[0], star.columns[0])
    (group,) = (g for g in groups if start in set(zip(*g, strict=True)))
    reached = {tuple(colour) for colour in image[group].tolist()}
    (name,) = (name for name, colour in COLOURS.items() if colour in reached)
    return name


@pytest.fixture(scope="module")
def drawn():
    return {kind: [make_scene(0, "train", kind, i) for i in range(n)] for kind, n in NUMBERS.items()}


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "plane"
    build(path, train=6, test=4, seed=3)
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_what_the_pictures_show(drawn, kind):
    for scene in drawn[kind][:150]:
        assert read_answer(scene) == scene.question.answer


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_balanced_in_every_beginning(drawn, kind):
    answers = KINDS[kind].answers(DEFAULT)
    seen = Counter()
    for scene in drawn[kind]:
        seen[scene.question.answer] += 1
        counts = [seen[answer] for answer in answers]
        assert max(counts) - min(counts) <= 1
    firsts = {tuple(s.question.answer for s in drawn[kind][i : i + len(answers)]) for i in range(0, 60, len(answers))}
    assert len(firsts) > 1  # not one order over and over


@pytest.mark.parametrize("kind", KINDS)
def test_make_scene_depends_on_its_arguments_only(drawn, kind):
    again = make_scene(0, "train", kind, 7)
    np.testing.assert_array_equal(again.image, drawn[kind][7].image)
    assert again.question == drawn[kind][7].question
    for other in (make_scene(1, "train", kind, 7), make_scene(0, "test", kind, 7), make_scene(0, "train", kind, 8)):
        assert (other.image != again.image).any()


@pytest.mark.parametrize("kind", KINDS)
def test_text_tells_nothing(drawn, kind):
    questions = [scene.question for scene in drawn[kind]]
    half = len(questions) // 2
    guess = guess_from_text(questions[:half], questions[half:], [kind])[kind]
    assert guess <= CHANCE[kind] + 0.07


def statistics(image: np.ndarray) -> np.ndarray:
    """Ink, colour histogram with 4 steps a channel, pixels of each named colour, and mean colour."""
    ink = (image != background(image)).any(2).sum()
    histogram = np.bincount((image // 64 @ np.array([16, 4, 1])).ravel(), minlength=64)
    named = [(image == colour).all(2).sum() for colour in (*COLOURS.values(), WHITE)]
    return np.concatenate([[1.0, ink], histogram, named, image.mean((0, 1)), image.std((0, 1))])


def linear_accuracy(features: np.ndarray, answers: list[str]) -> float:
    """On the second half, of least squares (with a ridge) on the first."""
    features = (features - features.mean(0)) / np.maximum(features.std(0), 1e-9) + (features.std(0) == 0)
    names = sorted(set(answers))
    labels = np.array([names.index(answer) for answer in answers])
    half = len(labels) // 2
    x, y = features[:half], np.eye(len(names))[labels[:half]]
    weights = np.linalg.solve(x.T @ x + 10 * np.eye(x.shape[1]), x.T @ y)
    return float(((features[half:] @ weights).argmax(1) == labels[half:]).mean())


@pytest.mark.parametrize("kind", ["relation", "count", "trace"])
def test_simple_statistics_tell_nothing(drawn, kind):
    answers = [scene.question.answer for scene in drawn[kind]]
    features = np.stack([statistics(scene.image) for scene in drawn[kind]])
    assert linear_accuracy(features, answers) <= 1 / len(set(answers)) + 0.07  # the question unread


def test_simple_statistics_would_show_a_leak(drawn):
    """The measure of the test above finds what follows from the number of pixels."""
    features = np.stack([statistics(scene.image) for scene in drawn["count"]])
    bins = np.searchsorted(np.quantile(features[:, 1], [0.5]), features[:, 1])
    assert linear_accuracy(features, [str(value) for value in bins]) > 0.9


def test_colours_occur_equally_often_where_one_is_asked_after(drawn):
    for scene in drawn["colour"][:50]:
        assert Counter(blob.colour for blob in blobs(scene.image)) == dict.fromkeys(COLOURS, 2)


def test_shapes_of_one_cell_stay_in_it(drawn):
    for scene in drawn["colour"][:50] + drawn["relation"][:50]:
        for blob in blobs(scene.image):
            assert len(set(zip(blob.rows // 8, blob.columns // 8, strict=True))) == 1


def test_counted_shapes_have_a_constant_number_and_the_size_of_a_patch(drawn):
    for scene in drawn["count"][:50]:
        found = blobs(scene.image)
        assert len(found) == 8
        assert all(7 <= max(blob.box) <= 13 for blob in found)


def test_one_shape_of_a_relation_does_not_settle_it(drawn):
    """Distances reach far, and the best rule on the place of the first shape alone stays below 0.85."""
    distances, votes = [], Counter()
    for scene in drawn["relation"]:
        words = scene.question.text.rstrip("?").split()
        places = {blob.shape: np.array(blob.middle) // 8 for blob in blobs(scene.image)}
        axis = int(words[3] == "left")
        distances.append(abs(places[words[2]] - places[words[-1]])[axis])
        votes[words[3], places[words[2]][axis], scene.question.answer] += 1
    answers = KINDS["relation"].answers(DEFAULT)
    best = sum(
        max(votes[(*known, answer)] for answer in answers) for known in {key[:2] for key in votes}
    )
    assert best / len(distances) < 0.85
    assert set(distances) == {1, 2, 3, 4, 5}


def test_place_of_the_right_mark_tells_nothing(drawn):
    ranks = Counter()
    for scene in drawn["trace"]:
        star = max(blobs(scene.image, ["white"]), key=lambda blob: len(blob.rows))
        marks = {blob.colour: blob for blob in blobs(scene.image)}
        assert len(marks) == 3
        away = {name: np.hypot(*np.subtract(mark.middle, star.middle)) for name, mark in marks.items()}
        ranks[sorted(away, key=away.get).index(scene.question.answer)] += 1
    assert all(abs(ranks[rank] / len(drawn["trace"]) - 1 / 3) < 0.07 for rank in range(3))


def test_curves_are_apart_alike_and_long(drawn):
    sizes = []
    for scene in drawn["trace"][:100]:
        groups = fill((scene.image != background(scene.image)).any(2))
        assert len(groups) == 3
        colours = {tuple(c) for c in scene.image.reshape(-1, 3).tolist()} - {*COLOURS.values(), WHITE}
        assert len(colours) == 2  # one grey for all curves, and the background
        sizes += [len(set(zip(rows // 8, columns // 8, strict=True))) for rows, columns in groups]
    assert min(sizes) >= 8


@pytest.mark.parametrize(
    "difficulty", [Difficulty(num_curves=2), Difficulty(num_curves=4), Difficulty(wiggle=0), Difficulty(wiggle=1)]
)
def test_difficulty_keeps_answers_true(difficulty):
    for index in range(12):
        scene = make_scene(0, "train", "trace", index, difficulty=difficulty)
        assert read_answer(scene) == scene.question.answer
        assert len(blobs(scene.image)) == difficulty.num_curves


def test_crossing_curves_go_straight_on():
    """So that a crossing is no fork: both keep their direction there, at right angles."""
    crossings = 0
    for index in range(60):
        walks = _walks(np.random.default_rng(index), Grid((64, 64)), Difficulty(crossing=True))
        used = Counter(cell for walk in walks for cell in walk)
        assert set(used.values()) <= {1, 2}
        for cell in (cell for cell, times in used.items() if times == 2):
            (one, other) = (walk for walk in walks if cell in walk)
            axes = []
            for walk in (one, other):
                before, after = (np.array(walk[walk.index(cell) + step]) for step in (-1, 1))
                assert (before + after == 2 * np.array(cell)).all()
                axes.append(before[0] == after[0])
            assert axes[0] != axes[1]
            crossings += 1
    assert crossings >= 30


@pytest.mark.parametrize(
    ("kind", "canvas"),
    [(kind, canvas) for kind in KINDS for canvas in [(64, 112), (96, 64), (48, 48), (48, 80)]]
    + [(kind, (150, 100)) for kind in ("count", "trace")],
    ids=str,
)
def test_canvases_of_any_size(kind, canvas):
    for index in range(10):
        scene = make_scene(0, "test", kind, index, canvas)
        assert scene.image.shape == (*canvas, 3) and scene.image.dtype == np.uint8
        assert read_answer(scene) == scene.question.answer


def read(path):
    return json.loads(path.read_text())


def test_build_writes_rows_that_fit_their_pictures(data_dir):
    assert sorted(p.name for p in data_dir.iterdir()) == ["images", "meta.json", "test.json", "train.json"]
    rows = read(data_dir / "train.json")
    assert [row["id"] for row in rows[:5]] == [*(f"train/{kind}/000000" for kind in KINDS), "train/colour/000001"]
    scene = make_scene(3, "train", "count", 2)
    question = scene.question
    assert rows[2 * 4 + 2] == {
        "id": "train/count/000002",
        "image": "train/count/000002.png",
        "conversations": [
            {"from": "human", "value": f"<image>\n{question.text}"},
            {"from": "gpt", "value": question.answer},
        ],
        "regions": scene.regions,
    }
    meta = read(data_dir / "meta.json")
    assert meta["questions"] == {"train": dict.fromkeys(KINDS, 6), "test": dict.fromkeys(KINDS, 4)}
    assert meta["answers"]["trace"] == ["red", "green", "blue"]


def test_build_depends_neither_on_numbers_nor_on_kinds(data_dir, tmp_path):
    build(tmp_path / "few", 2, 1, seed=3, kinds=["trace", "count"])
    files = list((tmp_path / "few").rglob("*.png"))
    assert len(files) == 2 * (2 + 1)
    for path in files:
        assert path.read_bytes() == (data_dir / path.relative_to(tmp_path / "few")).read_bytes()
    rows = read(data_dir / "train.json")
    assert all(row in rows for row in read(tmp_path / "few" / "train.json"))


def test_other_processes_can_draw(data_dir, tmp_path, monkeypatch):
    """What they are sent survives the way; test_scenes.py starts some for the code that sends it."""

    @contextlib.contextmanager
    def pool(workers):
        yield lambda draw, plan: map(pickle.loads(pickle.dumps(draw)), plan)

    monkeypatch.setattr(scene_files, "_pool", pool)
    build(tmp_path / "same", 6, 4, seed=3, workers=2)
    for name in ("train.json", "test.json", "meta.json"):
        assert (tmp_path / "same" / name).read_bytes() == (data_dir / name).read_bytes()


def test_task_scores_each_kind(data_dir):
    class Guesser:
        def answer_batch(self, requests, *, max_new_tokens):
            return ["Left." for _ in requests]

    samples = TASKS["plane_scenes"].load(data_dir)
    assert len(samples) == 16 and [sample.group for sample in samples[:4]] == list(KINDS)
    _, result = runner.run_task(Guesser(), "plane_scenes", samples, model_name="guesser")
    groups = result["summary"]["groups"]
    assert {kind: groups[kind]["accuracy"] for kind in groups} == {
        **dict.fromkeys(KINDS, 0.0),
        "relation": 0.25,
    }


def test_task_says_how_to_make_missing_files(tmp_path, capsys):
    arguments = ["--model", "m", "--data", str(tmp_path), "--output", str(tmp_path / "out")]
    assert main(["tasks", "--task", "plane_scenes", *arguments]) == 2
    assert "python -m eval plane-scenes" in capsys.readouterr().err


def test_command_draws(tmp_path, capsys):
    options = ["--train", "2", "--test", "1", "--kinds", "trace", "--curves", "4", "--size", "64", "80"]
    assert main(["plane-scenes", "--output", str(tmp_path / "out"), "--workers", "1", *options]) == 0
    assert "2 pictures to train on, 1 to test on, of each kind: trace" in capsys.readouterr().out
    assert read(tmp_path / "out" / "meta.json")["difficulty"]["num_curves"] == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--kinds", "colour,trail"], "unknown kind 'trail'"),
        (["--kinds", "color"], "did you mean 'colour'"),
        (["--kinds", "trace,trace"], "name each once"),
        (["--kinds", ""], "unknown kind ''"),
        (["--curves", "5"], "5 curves: must be 2 to 4"),
        (["--wiggle", "1.5"], "wiggle 1.5: must be 0 to 1"),
        (["--wiggle", "nan"], "wiggle nan: must be 0 to 1"),
        (["--train", "0"], "must be 1 or more"),
        (["--seed", "-1"], "seed -1: must be 0 or more"),
        (["--size", "47", "64"], "canvas 47x64"),
        (["--cells", "1", "4"], "curves of 1 to 4 cells"),
        (["--cells", "4", "30"], "up to 14 fit"),
        (["--workers", "0"], "0 workers: must be 1 or more"),
        (["--size", "64x64"], "--size"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, capsys, options, message):
    assert main(["plane-scenes", "--output", str(tmp_path / "out"), *options]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not list(tmp_path.iterdir())
