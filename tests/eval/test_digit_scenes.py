"""The digit-scene benchmark: strict about its files, exact in its score."""

import json

import pytest

from eval.scene_questions import KINDS
from eval.scoring import accuracy, accuracy_by_group, exact_match, normalise, wilson_interval
from eval.tasks import TASKS, Sample
from vision_scan.errors import UserError

digit_scenes = TASKS["digit_scenes"]


def row(number, **changes):
    value = {
        "id": f"test/{number}",
        "image": "test/000000.png",
        "kind": "presence",
        "conversations": [
            {"from": "human", "value": "<image>\nIs there a 7?"},
            {"from": "gpt", "value": "yes"},
        ],
    }
    return {**value, **changes}


def turns(*values):
    names = ("human", "gpt", "human")
    return [{"from": name, "value": value} for name, value in zip(names, values, strict=False)]


@pytest.fixture
def write(tmp_path):
    (tmp_path / "images" / "test").mkdir(parents=True)
    (tmp_path / "images" / "test" / "000000.png").write_bytes(b"not decoded here")

    def write(content):
        text = content if isinstance(content, str) else json.dumps(content)
        (tmp_path / "test.json").write_text(text)
        return tmp_path

    return write


def test_load_reads_samples_and_limits_them(write):
    data_dir = write([row(i) for i in range(5)])
    samples = digit_scenes.load(data_dir)
    assert len(samples) == 5
    assert samples[0] == Sample(
        id="test/0",
        question="Is there a 7?",
        images=(data_dir / "images/test/000000.png",),
        truth="yes",
        group="presence",
    )
    assert digit_scenes.load(data_dir, limit=2) == samples[:2]
    assert digit_scenes.load(data_dir, limit=99) == samples


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ({}, "expected a list"),
        ([], "at least one"),
        ([1], "row 0: expected an object"),
        ([row(0), row(0)], "'test/0' stands in more than one row"),
        ([row(0, id=3)], "'id' must be a string"),
        ([row(0, image=None)], "'image' must be a string"),
        ([row(0, image="test/1.png")], "1.png does not exist"),
        ([row(0), row(1, kind="color")], "row 1: kind 'color' is not one of presence"),
        ([row(0, conversations=None)], "one human turn and one gpt turn"),
        ([row(0, conversations=["a", "b"])], "one human turn and one gpt turn"),
        ([row(0, conversations=turns("<image>\na", "b", "c"))], "one human turn and one gpt"),
        ([row(0, conversations=turns("Is there a 7?", "yes"))], "one <image> mark, on a line of its own"),
        ([row(0, conversations=turns("<image>\n<image>\na", "b"))], "one <image> mark"),
        ([row(0, conversations=turns("Is there a <image> 7?", "b"))], "one <image> mark"),
        ([row(0, conversations=turns("<image>\na", " "))], "must be a string that is not empty"),
    ],
)
def test_load_names_what_is_wrong(write, content, message):
    with pytest.raises(UserError, match=message) as caught:
        digit_scenes.load(write(content))
    assert "test.json" in str(caught.value) and "\n" not in str(caught.value)


def test_load_says_how_to_make_missing_files(tmp_path):
    with pytest.raises(UserError, match="python -m eval scenes"):
        digit_scenes.load(tmp_path / "nowhere")


def test_load_refuses_a_limit_below_one(write):
    with pytest.raises(UserError, match="limit 0"):
        digit_scenes.load(write([row(0)]), limit=0)


def test_load_takes_what_the_generator_writes(tmp_path):
    pytest.importorskip("sklearn")
    pytest.importorskip("skimage")
    from eval.scenes import build

    meta = build(tmp_path / "scenes", scenes=1, test_scenes=6, seed=0)
    samples = digit_scenes.load(tmp_path / "scenes")
    assert len(samples) == sum(meta["questions"]["test"].values())
    assert {sample.group for sample in samples} == set(KINDS)
    assert not any("<image>" in sample.question for sample in samples)


def test_score_and_summarise():
    sample = Sample(id="a", question="?", images=(), truth="top left", group="position")
    assert digit_scenes.score(sample, " Top  Left. ") == 1.0
    assert digit_scenes.score(sample, "top") == 0.0
    records = [
        *({"group": "read", "score": 1.0, "answer": "7"}, {"group": "presence", "score": 0.0}),
        *({"group": "presence", "score": 1.0}, {"group": "presence", "score": 1.0}),
    ]
    summary = digit_scenes.summarise(iter(records))
    assert summary["accuracy"] == 0.75 and summary["count"] == 4
    assert list(summary["groups"]) == ["presence", "read"]
    assert summary["groups"]["presence"]["accuracy"] == pytest.approx(2 / 3)
    assert json.loads(json.dumps(summary))["groups"]["read"]["count"] == 1


def test_tasks_have_the_members_of_the_protocol():
    for task in TASKS.values():
        assert isinstance(task.VERSION, int)
        assert all(callable(getattr(task, name)) for name in ("load", "score", "summarise"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [("Yes.", "yes"), ("  3\t 7\n1 ", "3 7 1"), ("top left .", "top left"), ("3.5", "3.5")],
)
def test_normalise(text, expected):
    assert normalise(text) == expected


def test_exact_match_is_of_the_whole_answer():
    assert exact_match("YES", "yes.") == 1.0
    assert exact_match("yes it is", "yes") == 0.0
    assert exact_match("3 71", "3 7 1") == 0.0


@pytest.mark.parametrize(
    ("hits", "count", "expected"),
    [
        (0, 10, (0.0, 0.2775)),
        (5, 10, (0.2366, 0.7634)),
        (10, 10, (0.7225, 1.0)),
        (15, 148, (0.0624, 0.1605)),  # Newcombe 1998, table I
    ],
)
def test_wilson_interval_equals_published_figures(hits, count, expected):
    assert wilson_interval(hits, count) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("hits", "count"), [(0, 0), (3, 2), (-1, 2)])
def test_wilson_interval_refuses_impossible_counts(hits, count):
    with pytest.raises(ValueError, match="hits of"):
        wilson_interval(hits, count)


def test_accuracy_by_group_counts_each_group():
    table = accuracy_by_group([("b", 1.0), ("a", 0.5), ("b", 0.0)])
    assert list(table) == ["b", "a"]
    assert table["b"] == accuracy([1.0, 0.0])
    assert table["a"]["accuracy"] == 0.5 and table["a"]["count"] == 1
