"""Digit scenes: the same from a seed, true to their pictures, and mute about their answers."""

import json
import sys
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from vision_scan.errors import UserError

pytest.importorskip("sklearn")
pytest.importorskip("skimage")

from eval import scene_files, scenes
from eval.scene_questions import CELLS, KINDS, RELATION_GAP, drill, guess_from_text, order_turns
from eval.scenes import COLOURS, build, make_scene, split_scans

NUM_SCENES = 600
SIDE = 64


@pytest.fixture(scope="module")
def train_scenes():
    return [make_scene(0, "train", index) for index in range(NUM_SCENES)]


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "scenes"
    build(path, scenes=12, test_scenes=8, seed=3)
    return path


def read(path):
    return json.loads(path.read_text())


def pairs(row):
    turns = row["conversations"]
    assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
    return [(a["value"], b["value"]) for a, b in zip(turns[::2], turns[1::2], strict=True)]


def test_split_scans_share_none_and_hold_every_value():
    from sklearn.datasets import load_digits

    target = load_digits().target
    split = split_scans(0)
    train, test = np.concatenate(split["train"]), np.concatenate(split["test"])
    assert not set(train) & set(test)
    assert len(set(train) | set(test)) == len(target) == 1797
    for name in split:
        for value, indices in enumerate(split[name]):
            assert (target[indices] == value).all()
            share = len(indices) / (target == value).sum()
            assert share == pytest.approx({"train": 0.8, "test": 0.2}[name], abs=0.01)
    assert any((a != b).any() for a, b in zip(split["test"], split_scans(1)["test"], strict=True))


def test_scenes_use_scans_of_their_split_only(train_scenes):
    allowed = set(np.concatenate(split_scans(0)["train"]))
    assert {digit.scan for scene in train_scenes for digit in scene.digits} <= allowed
    allowed = set(np.concatenate(split_scans(0)["test"]))
    assert {digit.scan for i in range(100) for digit in make_scene(0, "test", i).digits} <= allowed


def test_make_scene_depends_on_seed_split_and_index_only(train_scenes):
    again = make_scene(0, "train", 7)
    np.testing.assert_array_equal(again.image, train_scenes[7].image)
    assert again.questions == train_scenes[7].questions
    for other in (make_scene(1, "train", 7), make_scene(0, "test", 7), make_scene(0, "train", 8)):
        assert (other.image != again.image).any()


def test_digits_are_different_apart_and_in_reading_order(train_scenes):
    for scene in train_scenes:
        digits = scene.digits
        assert 1 <= len(digits) <= 6
        assert len({digit.value for digit in digits}) == len(digits)
        xs = np.array([digit.x for digit in digits])
        assert (np.diff(xs) >= scenes.ORDER_GAP).all()
        covered = np.zeros((SIDE, SIDE), dtype=int)
        for digit in digits:
            x0, y0, x1, y1 = digit.box
            assert 0 <= x0 < x1 <= SIDE and 0 <= y0 < y1 <= SIDE and y1 - y0 >= 11
            covered[y0:y1, x0:x1] += 1
            assert min(abs(c - t) for c in (digit.x, digit.y) for t in (SIDE / 3, 2 * SIDE / 3)) > 1
        assert covered.max() == 1


def test_boxes_hold_the_colour_and_the_background_does_not(train_scenes):
    names = list(COLOURS)
    table = np.array(list(COLOURS.values()), dtype=float)
    for scene in train_scenes[:100]:
        outside = np.ones((SIDE, SIDE), dtype=bool)
        for digit in scene.digits:
            x0, y0, x1, y1 = digit.box
            outside[y0:y1, x0:x1] = False
            patch = scene.image[y0:y1, x0:x1].reshape(-1, 3).astype(float)
            brightest = patch[patch.max(1) >= np.quantile(patch.max(1), 0.8)].mean(0)
            assert names[np.abs(table - brightest).sum(1).argmin()] == digit.colour
        assert scene.image[outside].max() <= 0.45 * 255 + 1


def test_answers_are_what_the_digits_say(train_scenes):
    """Answers by an independent reading of the question's words."""
    for scene in train_scenes:
        by_value = {str(digit.value): digit for digit in scene.digits}
        order = list(by_value)
        for question in scene.questions:
            words = question.text.rstrip(".?").split()
            last = by_value.get(words[-1])
            if question.kind == "presence":
                truth = "yes" if last else "no"
            elif question.kind == "count":
                truth = str(len(order))
            elif question.kind == "read":
                truth = " ".join(order)
            elif question.kind == "colour":
                truth = last.colour
            elif question.kind == "relation":
                a, b = by_value[words[1]], last
                gap = {
                    "left": b.x - a.x,
                    "right": a.x - b.x,
                    "above": b.y - a.y,
                    "below": a.y - b.y,
                }
                assert abs(gap[words[3]]) >= RELATION_GAP * SIDE
                truth = "true" if gap[words[3]] > 0 else "false"
            elif words[0] == "Where":
                truth = CELLS[int(last.y * 3 / SIDE)][int(last.x * 3 / SIDE)]
            elif " of the " in question.text:
                step = -1 if "left of" in question.text else 1
                assert order.index(words[-1]) + step >= 0
                truth = order[order.index(words[-1]) + step]
            else:
                cell = question.text.removeprefix("Which digit is at the ").rstrip("?")
                (truth,) = (v for v, d in by_value.items() if d.cell((SIDE, SIDE)) == cell)
            assert question.answer == truth, question


def test_questions_repeat_nothing_and_have_every_kind(train_scenes):
    for scene in train_scenes:
        assert len({question.text for question in scene.questions}) == len(scene.questions)
        kinds = {question.kind for question in scene.questions}
        assert kinds >= set(KINDS) - {"relation"}
        assert "relation" in kinds or len(scene.digits) < 4


def test_language_alone_stays_near_chance():
    train = [q for i in range(2500) for q in make_scene(0, "train", i).questions]
    test = [q for i in range(1000) for q in make_scene(0, "test", i).questions]
    guess = guess_from_text(train, test)
    assert guess["presence"] <= 0.55 and guess["relation"] <= 0.55
    assert guess["count"] <= 0.25 and guess["colour"] <= 0.25
    assert guess["position"] <= 0.18 and guess["read"] <= 0.05


def test_guess_from_text_finds_a_leak(train_scenes):
    """The measure of the test above would see answers that follow from the words."""
    questions = [q for q in train_scenes[0].questions]
    assert set(guess_from_text(questions, questions).values()) == {1.0}


def test_statements_are_balanced(train_scenes):
    answers = Counter(q.answer for s in train_scenes for q in s.questions)
    assert answers["yes"] / (answers["yes"] + answers["no"]) == pytest.approx(0.5, abs=0.04)
    assert answers["true"] / (answers["true"] + answers["false"]) == pytest.approx(0.5, abs=0.04)
    firsts = [next(q.answer for q in s.questions if q.kind == "presence") for s in train_scenes]
    assert firsts == ["yes", "no"] * (NUM_SCENES // 2)


def test_order_turns_opens_with_every_kind_counts_early_and_reads_last(train_scenes):
    rng = np.random.default_rng(0)
    turns = [order_turns(rng, scene.questions) for scene in train_scenes]
    counted = []
    for scene, conversation in zip(train_scenes, turns, strict=True):
        assert sorted(map(str, conversation)) == sorted(map(str, scene.questions))
        kinds = [question.kind for question in conversation]
        assert "read" in (kinds[0], kinds[-1])
        counted.append(kinds.index("count") / len(kinds))
    assert np.mean(counted) < 0.35
    openings = Counter(conversation[0].kind for conversation in turns)
    assert all(openings[kind] > 0.1 * NUM_SCENES for kind in KINDS)


@pytest.mark.parametrize("canvas", [(64, 96), (150, 100)], ids=str)
def test_make_scene_scales_to_other_canvases(canvas):
    for index in range(20):
        scene = make_scene(0, "train", index, canvas)
        assert scene.image.shape == (*canvas, 3) and scene.image.dtype == np.uint8
        unit = min(canvas) / 64
        for digit in scene.digits:
            assert 11 * unit <= digit.box[3] - digit.box[1] <= 27 * unit
            assert digit.box[2] <= canvas[1] and digit.box[3] <= canvas[0]


def test_build_writes_rows_that_fit_their_pictures(data_dir):
    assert sorted(p.name for p in data_dir.iterdir()) == [
        *("align.json", "images", "meta.json", "test.json", "train.json"),
    ]
    align, train = read(data_dir / "align.json"), read(data_dir / "train.json")
    assert len(train) == 12
    easy = []
    for index, row in enumerate(train):
        scene = make_scene(3, "train", index)
        assert row["image"] == f"train/{index:06d}.png"
        if len(scene.digits) <= 3:
            easy.append((row["image"], scene.digits))
        with Image.open(data_dir / "images" / row["image"]) as image:
            np.testing.assert_array_equal(np.asarray(image), scene.image)
        turns = pairs(row)
        assert turns[0][0].startswith("<image>\n")
        assert "<image>" not in "".join(question for question, _ in turns[1:])
        asked = Counter((q.removeprefix("<image>\n"), a) for q, a in turns)
        assert asked == Counter((q.text, q.answer) for q in scene.questions)
        for region, digit in zip(row["regions"], scene.digits, strict=True):
            place = digit.cell((SIDE, SIDE))
            assert region["labels"] == {"digit": str(digit.value), "colour": digit.colour, "place": place}
            np.testing.assert_allclose(np.array(region["box"]) * SIDE, digit.box, atol=0.01)
    assert easy and [row["image"] for row in align] == [image for image, _ in easy]
    for row, (_, digits) in zip(align, easy, strict=True):
        check_drill(row, digits)


def check_drill(row: dict, digits: tuple) -> None:
    """Every value is asked after, pairs are compared, and the reading comes last."""
    assert row["conversations"][0]["value"].startswith("<image>\n")
    turns = [(question.removeprefix("<image>\n"), answer) for question, answer in pairs(row)]
    assert turns.pop() == ("Read the digits from left to right.", " ".join(str(d.value) for d in digits))
    present = {str(digit.value): digit for digit in digits}
    single, compared = {}, {}
    for question, answer in turns:
        names = question.removesuffix("?").split()
        (single if len(names) == 1 else compared)[tuple(names)] = answer
    assert len(single) + len(compared) == len(turns)
    looks = {value: f"{digit.colour} {digit.cell((SIDE, SIDE))}" for value, digit in present.items()}
    assert single == {(str(v),): looks.get(str(v), "no") for v in range(10)}
    assert len(compared) == len(digits) * (len(digits) - 1)
    for (one, other), answer in compared.items():
        across, down = answer.split()
        assert across == ("left" if present[one].x < present[other].x else "right")
        below = present[one].y - present[other].y
        assert down == ("level" if abs(below) < 0.14 * SIDE else "below" if below > 0 else "above")


def test_build_asks_one_question_of_each_kind_per_test_scene(data_dir):
    rows, meta = read(data_dir / "test.json"), read(data_dir / "meta.json")
    assert len({row["id"] for row in rows}) == len(rows)
    counts = Counter(row["kind"] for row in rows)
    assert dict(counts) == meta["questions"]["test"]
    assert all(counts[kind] == 8 for kind in KINDS if kind != "relation")
    presence = Counter(pairs(row)[0][1] for row in rows if row["kind"] == "presence")
    assert presence == {"yes": 4, "no": 4}
    assert all((data_dir / "images" / row["image"]).is_file() for row in rows)


def test_drill_of_a_known_scene():
    digits = (
        scenes.Digit(value=3, colour="red", box=(2, 2, 12, 18), scan=0),
        scenes.Digit(value=7, colour="blue", box=(26, 24, 38, 40), scan=1),
    )
    turns = drill(np.random.default_rng(0), digits, (64, 64))
    assert len(turns) == 10 + 2 + 1
    for turn in (
        ("3?", "red top left"),
        ("7?", "blue center"),
        ("1?", "no"),
        ("3 7?", "left above"),
        ("7 3?", "right below"),
    ):
        assert turn in turns
    assert turns[-1] == ("Read the digits from left to right.", "3 7")


def test_build_continues_a_smaller_set(data_dir, tmp_path):
    calls = []
    build(tmp_path / "small", 4, 2, seed=3, on_progress=lambda done, total: calls.append(done))
    assert calls == [1, 2, 3, 4, 5, 6]
    assert read(tmp_path / "small" / "train.json") == read(data_dir / "train.json")[:4]
    align = read(tmp_path / "small" / "align.json")
    assert align == read(data_dir / "align.json")[: len(align)]
    name = "images/test/000001.png"
    assert (tmp_path / "small" / name).read_bytes() == (data_dir / name).read_bytes()


def test_build_refuses_a_directory_that_holds_something(tmp_path):
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(UserError, match="not an empty directory"):
        build(tmp_path, 1, 1, seed=0)
    assert [p.name for p in tmp_path.iterdir()] == ["mine.txt"]
    (tmp_path / "empty").mkdir()
    build(tmp_path / "empty", 1, 1, seed=0)
    assert (tmp_path / "empty" / "meta.json").is_file()


@pytest.mark.parametrize(
    "wrong",
    [{"scenes": 0}, {"test_scenes": 0}, {"seed": -1}, {"canvas": (63, 64)}, {"workers": 0}],
    ids=lambda wrong: next(iter(wrong)),
)
def test_build_refuses_numbers_out_of_range(tmp_path, wrong):
    with pytest.raises(UserError, match="must be"):
        build(tmp_path / "out", **{"scenes": 1, "test_scenes": 1, "seed": 0, **wrong})
    assert not list(tmp_path.iterdir())


def test_build_does_not_depend_on_the_number_of_processes(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(scene_files, "SCENES_PER_TASK", 3)
    calls = []
    build(tmp_path / "two", 12, 8, seed=3, on_progress=lambda *call: calls.append(call), workers=2)
    assert calls == [(done, 20) for done in range(1, 21)]
    files = {path.relative_to(data_dir): path.read_bytes() for path in data_dir.rglob("*.*")}
    assert len(files) == 20 + 4
    for name, content in files.items():
        assert (tmp_path / "two" / name).read_bytes() == content, name


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("failure", [RuntimeError, KeyboardInterrupt])
def test_build_leaves_nothing_when_it_is_cut_short(tmp_path, monkeypatch, failure, workers):
    monkeypatch.setattr(scene_files, "SCENES_PER_TASK", 1)

    def fail(done, total):
        if done == 3:
            raise failure

    with pytest.raises(failure):
        build(tmp_path / "out", 4, 1, seed=0, on_progress=fail, workers=workers)
    assert not list(tmp_path.iterdir())


def test_make_scene_names_the_extra_that_is_missing(monkeypatch):
    scenes._scans.cache_clear()
    split_scans.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(UserError, match=r"cobra-vlm\[eval\]"):
        split_scans(0)
