"""The demo: its commands are real ones, it goes on where it stopped, and a small one runs to the end."""

import json
import os
import shlex
import sys
from pathlib import Path

import pytest

import cobra
from eval import demo
from eval.__main__ import build_parser, main
from eval.demo import Settings, steps
from eval.pipeline import STOPPED, Pipeline
from vision_scan.errors import UserError

SMALLEST = Settings(
    scenes=12,
    test_scenes=2,
    tower_steps=1,
    naming_steps=3,
    align_steps=1,
    finetune_steps=2,
    longest_context=300,
    rounds=1,
    prefill_rounds=1,
)


@pytest.fixture
def commands(monkeypatch):
    """Replaces running commands: records them, and ends each with the status that `commands.act` gives."""

    class Commands(list):
        act = staticmethod(lambda command: 0)

        def run(self, pipeline, command, prefix, environment):
            assert command[0] == sys.executable and command[1] == "-m"
            self.append(command[2:])
            return self.act(command[2:]), 1 << 20

    commands = Commands()
    monkeypatch.setattr(Pipeline, "_run_command", lambda *given: commands.run(*given))
    monkeypatch.setattr(demo, "_say_goodbye", lambda root, state, say: say("done"))
    return commands


def test_every_command_is_one_that_the_programs_accept(tmp_path):
    from train.__main__ import build_parser as build_train_parser
    from train.recipes import RECIPES
    from train.settings import change

    for settings in (Settings.full(), Settings.quick()):
        for step in steps(tmp_path, settings):
            program, *arguments = step.arguments
            if program == "train":
                options = build_train_parser().parse_args(arguments)
                config = change(RECIPES[options.recipe](), options.set)
                assert Path(options.output) == step.output
                assert config.train.steps == getattr(settings, f"{_stage(step.name)}_steps")
            else:
                assert program == "eval"
                build_parser().parse_args(arguments)


def _stage(name: str) -> str:
    _, _, stage = name.partition("-")
    return name if name == "tower" else stage or "finetune"


def test_both_models_take_the_same_data_steps_and_settings(tmp_path):
    by_name = {step.name: step.arguments for step in steps(tmp_path, Settings.full())}
    for stage in ("", "-align", "-naming"):
        ours, twin = (by_name[f"{key}{stage}"] for key in ("cobra", "transformer"))
        renamed = [
            word.replace("transformer-tiny", "tiny").replace(f"{tmp_path}/transformer", f"{tmp_path}/cobra")
            for word in twin
        ]
        assert list(ours) == renamed


def test_finished_steps_are_skipped_and_training_is_resumed(tmp_path, commands):
    root = tmp_path / "demo"
    finetune = next(list(step.arguments) for step in steps(root, SMALLEST) if step.name == "cobra")

    def stop_in_finetuning(command):
        if command == finetune:
            (root / "cobra").mkdir()
            return STOPPED
        return 0

    commands.act = stop_in_finetuning
    said: list[str] = []
    assert demo.run(root, SMALLEST, quick=True, say=said.append) == STOPPED
    assert "goes on from here" in said[-1]
    before = list(commands)
    assert finetune in before
    # The other model's lane may have come to its end meanwhile, what follows both has not begun.
    assert not any(command[:2] == ["eval", "efficiency"] for command in before)

    commands.act = lambda command: 0
    assert demo.run(root, SMALLEST, quick=True, say=said.append) == 0
    after = commands[len(before) :]
    assert [*finetune, "--resume"] in after
    done = [command for command in before if command != finetune] + after
    expected = [list(step.arguments) for step in steps(root, SMALLEST) if step.name != "cobra"]
    assert sorted(done) == sorted([*expected, [*finetune, "--resume"]])

    total = len(commands)
    assert demo.run(root, SMALLEST, quick=True, say=said.append) == 0
    assert len(commands) == total, "a finished demo runs nothing"


def test_each_model_goes_through_its_steps_in_order_after_the_data(tmp_path, commands):
    root = tmp_path / "demo"
    assert demo.run(root, SMALLEST, quick=True, say=lambda line: None) == 0
    names = {tuple(step.arguments): step.name for step in steps(root, SMALLEST)}
    order = [names[tuple(command)] for command in commands]
    assert order[:2] == ["scenes", "tower"] and order[-2:] == ["efficiency", "report"]
    for key in ("cobra", "transformer"):
        lane = [name for name in order if name.startswith(key)]
        assert lane == [f"{key}-naming", f"{key}-align", key, f"{key}-questions", f"{key}-control"]


def test_half_made_scenes_are_made_again(tmp_path, commands):
    root = tmp_path / "demo"

    def fail(command):
        (root / "scenes").mkdir()
        (root / "scenes" / "half").touch()
        return 1

    commands.act = fail
    assert demo.run(root, SMALLEST, quick=True, say=lambda line: None) == 1

    def check(command):
        assert not (root / "scenes").exists()
        return 1

    commands.act = check
    assert demo.run(root, SMALLEST, quick=True, say=lambda line: None) == 1
    assert len(commands) == 2


@pytest.mark.parametrize(("status", "expected"), [(2, 2), (1, 1), (-9, 1), (130, STOPPED), (75, STOPPED)])
def test_a_step_that_ends_badly_ends_the_demo(tmp_path, commands, status, expected):
    commands.act = lambda command: status
    assert demo.run(tmp_path / "demo", SMALLEST, quick=True, say=lambda line: None) == expected
    assert len(commands) == 1


def test_commands_are_printed_with_place_and_time(tmp_path, commands):
    said: list[str] = []
    demo.run(tmp_path / "demo", SMALLEST, quick=True, say=said.append)
    total = len(steps(tmp_path / "demo", SMALLEST))
    assert f"[1/{total}] Draw the digit scenes" in said[0] and "to go" in said[0]
    printed = [shlex.split(line[2:]) for line in said if line.startswith("$ ")]
    assert sorted(words[2:] for words in printed) == sorted(list(command) for command in commands)


def test_output_that_is_no_demo_is_refused_and_left_alone(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("all of it")
    assert main(["demo", "--quick", "--output", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert os.listdir(tmp_path) == ["thesis.txt"]
    with pytest.raises(UserError, match="no demo's directory"):
        demo.run(tmp_path / "thesis.txt", SMALLEST, quick=True)


def test_a_demo_with_other_settings_is_refused(tmp_path, commands):
    demo.run(tmp_path / "demo", SMALLEST, quick=True, say=lambda line: None)
    with pytest.raises(UserError, match="other settings"):
        demo.run(tmp_path / "demo", SMALLEST, quick=False)


@pytest.mark.slow
def test_the_smallest_demo_runs_to_the_end(tmp_path):
    root = tmp_path / "demo"
    said: list[str] = []
    assert demo.run(root, SMALLEST, quick=True, say=said.append) == 0
    report = json.loads((root / "report.json").read_text())
    assert report["quick"] is True
    assert [len(stage["points"]) for stage in report["training"]["cobra"]] == [1, 2]
    assert report["accuracy"]["transformer"]["control"]["count"] > 0
    sizes = [sum(model["parameters"].values()) for model in report["models"].values()]
    assert abs(sizes[0] / sizes[1] - 1) < 0.03
    assert report["efficiency"]["models"]["cobra"]["check"]["passed"]
    assert "quick run" in (root / "report.html").read_text()
    command = shlex.split(next(line for line in said if " answer " in line))
    model = cobra.load(command[command.index("--model") + 1])
    image, question = command[command.index("--image") + 1 :]
    assert isinstance(model.answer(question, images=[image], max_new_tokens=2), str)
