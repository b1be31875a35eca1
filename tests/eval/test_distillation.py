"""The study of students: real commands, honest steps, honest differences."""

import json
from pathlib import Path

import pytest

from eval import distillation
from eval.__main__ import build_parser, main
from eval.demo import FORMAT as DEMO_FORMAT
from eval.demo import Settings
from eval.distillation import LR, STAGES, STUDENTS, collect, describe, draw, split_steps, stages
from eval.files import read_json, write_json, write_lines
from eval.pipeline import Pipeline
from vision_scan.errors import UserError


def write_answers(folder: Path, scores: dict[str, list[float]]) -> None:
    write_lines(
        folder / "digit_scenes.jsonl",
        (
            {"id": f"{skill}/{number}", "group": skill, "score": score}
            for skill, values in scores.items()
            for number, score in enumerate(values)
        ),
    )


@pytest.fixture
def demo(tmp_path: Path) -> Path:
    """As much of a finished demo as the study looks at."""
    folder = tmp_path / "demo"
    settings = vars(Settings.full())
    state = {"format": DEMO_FORMAT, "quick": False, "settings": settings, "steps": {"one": {"done": True}}}
    write_json(folder / "demo.json", state)
    write_answers(folder / "tasks" / "transformer", {"count": [1, 1, 0, 1], "read": [1, 0]})
    return folder


def test_every_command_is_one_that_the_programs_accept(tmp_path: Path) -> None:
    from train.__main__ import build_parser as build_train_parser
    from train.recipes import RECIPES
    from train.settings import change

    for stage in stages(tmp_path / "out", tmp_path / "demo", 188):
        for lane in stage.values():
            steps, previous = 0, None
            for step in lane:
                program, *arguments = step.arguments
                if program == "eval":
                    build_parser().parse_args(arguments)
                    continue
                options = build_train_parser().parse_args(arguments)
                config = change(RECIPES[options.recipe](), options.set)
                steps += config.train.steps
                assert config.distill.teacher == str(tmp_path / "demo" / "transformer")
                assert "vision_encoder" in config.train.freeze
                assert options.init_from == previous
                previous = options.output
            assert steps == 188


@pytest.mark.parametrize("steps", [30, 31, 188, 1001])
def test_steps_are_split_without_rest(steps: int) -> None:
    for student in STUDENTS.values():
        counts = split_steps(student.recipes, steps)
        assert sum(counts) == steps and min(counts) >= 1
        assert set(student.recipes) <= set(LR)
    assert sum(STAGES.values()) == pytest.approx(1)


def test_a_fifth_of_the_twins_steps_is_taken(demo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pipeline, "run", lambda pipeline: 75)
    assert distillation.run(demo, tmp_path / "out", say=lambda line: None) == 75
    record = json.loads((tmp_path / "out" / "distill.json").read_text())
    assert (record["budget"], record["of"]) == (188, 940)
    assert distillation.run(demo, tmp_path / "out", say=lambda line: None) == 75  # goes on


def test_differences_are_paired_by_question(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for key in STUDENTS:
        write_answers(out / "tasks" / key, {"read": [1, 1], "count": [1, 1, 0, 0]})
    result = collect(demo, out, 188, 940)
    assert {skill: row["accuracy"] for skill, row in result["teacher"].items()} == {
        "all": pytest.approx(4 / 6), "count": 0.75, "read": 0.5
    }  # fmt: skip
    for student in result["students"].values():
        found = {skill: row["against_teacher"]["difference"] for skill, row in student["skills"].items()}
        assert found == {"all": 0.0, "count": -0.25, "read": 0.5}
    lines = describe(result)
    assert lines[2] == "| teacher, percent right | 66.7 | 75.0 | 50.0 |"
    assert lines[3].startswith("| Mamba-2 | +0.0 ±") and lines[3].count("*") == 1 and "-25.0" in lines[3]
    draw(result, tmp_path / "students.png")
    assert (tmp_path / "students.png").stat().st_size > 5000


def test_docs_show_the_measured_results() -> None:
    docs = Path(__file__).resolve().parents[2] / "docs"
    text = (docs / "train.md").read_text(encoding="utf-8")
    result = read_json(docs / "students.json")
    assert set(result["students"]) == set(STUDENTS)
    for line in describe(result):
        assert line in text


def test_what_is_no_finished_demo_is_said(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"

    def refused(match: str, path: Path = demo) -> None:
        assert main(["distill", "--demo", str(path), "--output", str(out)]) == 2
        told = capsys.readouterr().err
        assert match in told and told.count("\n") == 1
        assert not out.exists()

    refused("is no demo's directory", tmp_path / "nowhere")
    state = json.loads((demo / "demo.json").read_text())
    write_json(demo / "demo.json", {**state, "steps": {"one": {"done": False}}})
    refused("is not finished")
    write_json(demo / "demo.json", {**state, "settings": vars(Settings.quick())})
    refused("too few for 3 stages; run the full demo")
    write_json(demo / "demo.json", {**state, "format": 1})
    refused("format 1")


def test_a_folder_of_something_else_is_left_alone(demo: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "file").write_text("mine")
    with pytest.raises(UserError, match="exists and is no study of students"):
        distillation.run(demo, out)
    assert [path.name for path in out.iterdir()] == ["file"]
