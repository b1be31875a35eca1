"""The command line: its arguments, its messages, its exit statuses."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import cobra
from cobra.quantize import quantize
from tests.train.small_run import ROOT, call, command, environment, losses
from train.__main__ import build_parser, main
from train.recipes import RECIPES


def test_arguments_are_frozen() -> None:
    """Everything else is a setting of the recipe: `--set`."""
    found = {option for action in build_parser()._actions for option in action.option_strings}
    launcher = {"--local_rank"}  # what the deepspeed launcher adds
    assert found - launcher == {"-h", "--help", "--recipe", "--output", "--set", "--init-from", "--resume"}


def test_help_names_every_recipe() -> None:
    told = build_parser().format_help()
    assert all(f"  {name} " in told for name in RECIPES)
    assert "example:" in told


def test_run_prints_its_plan_and_exits_0(data: Path, tmp_path: Path) -> None:
    done = call(command(data, tmp_path / "run", "train.micro_batch_size=2"))
    assert done.returncode == 0, done.stderr
    told = done.stdout
    for part in ("vision_encoder", "connector", "lm"):
        assert f"  {part} " in told
    assert "2 rows x 2 accumulated x 1 processes" in told
    assert "deepspeed, cpu, float32" in told
    assert "ssd reference" in told or "ssd compiled" in told
    assert "10 rows" in told
    assert "DeepSpeed" not in told + done.stderr  # its own chatter
    assert "step 6/6" in done.stderr
    cobra.load(tmp_path / "run")


def test_sigterm_exits_75_and_resume_needs_no_settings(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    changes = ("train.engine=plain", "train.steps=400")
    process = subprocess.Popen(
        command(data, output, *changes), cwd=ROOT, env=environment(), stderr=subprocess.PIPE
    )
    deadline = time.monotonic() + 120
    while len(losses(output)) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=1200)
    assert process.returncode == 75
    assert b"python -m train --resume --output" in errors
    done = len(losses(output))
    assert 3 <= done < 400
    assert os.listdir(output / "checkpoints") != []
    assert main(["--resume", "--output", str(output), "--set", "train.steps=401"]) == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--recipe", "tny"], "unknown recipe 'tny'; did you mean 'tiny'"),
        ([], "no --recipe; allowed: tiny-tower"),
        (["--recipe", "tiny"], "set data.path"),
        (["--recipe", "tiny", "--set", "optim.lrr=1"], "did you mean 'lr'"),
        (["--recipe", "tiny", "--init-from", "/nowhere"], "--init-from /nowhere"),
        (["--recipe", "tiny", "--set", "model.weights=int8"], "model.weights: got int8"),
        (["--resume"], "holds no run"),
    ],
)
def test_mistake_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert told in captured.err
    assert not (tmp_path / "run").exists()


def test_a_quantised_start_is_refused(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cobra.save(quantize(cobra.build("tiny"), "int4"), tmp_path / "small")
    arguments = ["--recipe", "tiny", "--set", f"data.path={data}", "--init-from", str(tmp_path / "small")]
    assert main([*arguments, "--output", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: ") and "int4, which cannot learn" in told and told.count("\n") == 1


@pytest.mark.parametrize("output", ["data.json", "data.json/run"])
def test_an_output_that_cannot_be_is_refused(data: Path, capsys: pytest.CaptureFixture[str], output: str) -> None:
    arguments = ["--recipe", "tiny", "--set", f"data.path={data}", "--set", "train.engine=plain"]
    assert main([*arguments, "--output", str(data.parent / output)]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: --output") and "give a" in told


def test_missing_argument_exits_2_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--recipe", "tiny"]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: the following arguments are required: --output (see python -m train --help)"
    ]


def test_data_check_counts_and_names(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "check", str(data)]) == 0
    assert "10 usable rows, 8 images" in capsys.readouterr().out
    rows = json.loads(data.read_text())
    rows[3]["image"] = "none.png"
    data.write_text(json.dumps(rows))
    assert main(["data", "check", str(data), "--image-root", str(data.parent)]) == 2
    told = capsys.readouterr().out
    assert "9 usable rows" in told
    assert "row 'row3': " in told
    image = data.parent / "0.png"
    image.write_bytes(image.read_bytes()[:-30])
    assert main(["data", "check", str(data), "--full"]) == 2
    assert "row 'row0': " in capsys.readouterr().out


def test_plot_writes_a_picture(data: Path, tmp_path: Path, capsys) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    picture = tmp_path / "loss.png"
    assert main(["plot", str(tmp_path / "run"), "--output", str(picture)]) == 0
    assert picture.exists()
    assert main(["plot", str(tmp_path / "none")]) == 2
