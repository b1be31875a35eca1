"""Checkpoints: whole or absent, and exact."""

from pathlib import Path

import pytest
import torch

import cobra
from tests.train.small_run import losses, small_config, write_data
from tests.train.soak import kill_and_resume
from train.metrics import METRICS
from train.resume import STATE, read_position
from train.run import run
from train.run_directory import latest_checkpoint, list_checkpoints
from train.settings import change
from train.stop import StopRequest
from vision_scan.errors import UserError

# Draws a number of tokens for each step.
NESTED = 'model.connector={"kind": "mqt", "num_queries": 16, "num_heads": 2, "nested": true}'


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asks the next run to stop after so many steps."""
    looked = []

    def requested(self: StopRequest) -> bool:
        looked.append(None)
        return len(looked) > steps

    watched = property(requested, lambda self, value: None)
    monkeypatch.setattr(StopRequest, "requested", watched, raising=False)


def same_tensors(one: Path, other: Path) -> bool:
    first, second = cobra.load(one).state_dict(), cobra.load(other).state_dict()
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
@pytest.mark.parametrize(("recipe", "changes"), [("tiny", ()), ("tiny-tower", ()), ("tiny", (NESTED,))])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    tmp_path: Path, engine: str, recipe: str, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_data(tmp_path / "data")
    skip = "data.skip_bad=true"  # the tower cannot use rows without an image
    config = small_config(data, f"train.engine={engine}", skip, *changes, recipe=recipe)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(config, whole)
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        assert run(config, parts) is False
    assert latest_checkpoint(parts).name == "step-000004"
    torch.manual_seed(123)  # what a new process would not have kept either
    assert run(config, parts, resume=True)
    assert losses(parts) == losses(whole)
    assert same_tensors(whole, parts)
    one, other = latest_checkpoint(whole), latest_checkpoint(parts)
    assert (one / STATE).read_bytes() == (other / STATE).read_bytes()
    assert read_position(one) == read_position(other)


def test_killed_at_any_moment_the_run_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    report = kill_and_resume(tmp_path, kills=3)
    assert report["while a checkpoint was written"] >= 1


def test_kill_before_the_first_checkpoint_begins_again(data: Path, tmp_path: Path) -> None:
    config = small_config(data, "train.engine=plain")
    output = tmp_path / "run"
    assert run(config, output)
    expected = losses(output)
    for path in list_checkpoints(output / "checkpoints"):
        path.rename(path.with_name("." + path.name))  # as a kill during the first save leaves it
    (output / "checkpoints" / "latest").unlink()
    (output / "config.json").unlink()
    assert run(config, output, resume=True)
    assert losses(output) == expected


def test_resume_of_nothing_starts(data: Path, tmp_path: Path) -> None:
    assert run(small_config(data, "train.engine=plain"), tmp_path / "new", resume=True)
    assert len(losses(tmp_path / "new")) == 6


def test_resume_of_a_finished_run_changes_nothing(data: Path, tmp_path: Path) -> None:
    config = small_config(data, "train.engine=plain")
    assert run(config, tmp_path / "run")
    records = (tmp_path / "run" / METRICS).read_text()
    assert run(config, tmp_path / "run", resume=True)
    assert (tmp_path / "run" / METRICS).read_text() == records


def test_half_written_checkpoint_is_no_checkpoint(data: Path, tmp_path: Path) -> None:
    config = small_config(data, "train.engine=plain", "train.save_every=3")
    output = tmp_path / "run"
    assert run(config, output)
    folder = output / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step-000003", "step-000006"]
    (folder / ".step-000009").mkdir()
    (folder / ".step-000009" / STATE).write_bytes(b"half")
    assert latest_checkpoint(output).name == "step-000006"
    (folder / "latest").unlink()
    assert latest_checkpoint(output).name == "step-000006"
    (folder / "latest").write_text("step-000003\n")
    assert latest_checkpoint(output).name == "step-000003"
    assert run(config, output, resume=True)
    assert not (folder / ".step-000009").exists()


def test_the_newest_checkpoints_are_kept(data: Path, tmp_path: Path) -> None:
    changes = ("train.engine=plain", "train.save_every=1", "train.keep=3")
    assert run(small_config(data, *changes), tmp_path / "run")
    names = sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert names == ["latest", "step-000004", "step-000005", "step-000006"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step-000006\n"


def test_other_settings_are_refused_unless_they_move_no_number(data: Path, tmp_path: Path) -> None:
    config = small_config(data, "train.engine=plain")
    output = tmp_path / "run"
    assert run(config, output)
    with pytest.raises(UserError, match=r"optim.lr was 0.0025, is 0.1; train.steps was 6, is 9"):
        run(change(config, ["optim.lr=0.1", "train.steps=9"]), output, resume=True)
    assert run(change(config, ["log.every=2", "train.keep=1"]), output, resume=True)


def test_other_data_is_refused(data: Path, tmp_path: Path) -> None:
    config = small_config(data, "train.engine=plain")
    assert run(config, tmp_path / "run")
    data.write_text(data.read_text().replace("2+2?", "3+3?"))
    with pytest.raises(UserError, match=r"data.json has changed"):
        run(config, tmp_path / "run", resume=True)


def test_output_that_holds_something_is_refused(data: Path, tmp_path: Path) -> None:
    config = small_config(data, "train.engine=plain")
    assert run(config, tmp_path / "run")
    with pytest.raises(UserError, match=r"already holds a run .*--resume"):
        run(config, tmp_path / "run")
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(UserError, match="a model but no run"):
        run(config, tmp_path / "run", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        run(config, tmp_path / "file")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "readme.txt").write_text("mine")
    assert run(config, tmp_path / "notes")


def test_damaged_checkpoint_gives_way_to_the_one_before(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = small_config(data, "train.engine=plain", "train.save_every=3")
    output = tmp_path / "run"
    assert run(config, output)
    expected = (latest_checkpoint(output) / STATE).read_bytes()
    state = latest_checkpoint(output) / STATE
    state.write_bytes(expected[:-1] + bytes([expected[-1] ^ 1]))
    assert run(config, output, resume=True)
    assert "step-000006/train_state.safetensors is not as it was written; going on from" in caplog.text
    assert state.read_bytes() == expected
    assert (output / "checkpoints" / "damaged-step-000006" / STATE).exists()
    for path in list_checkpoints(output / "checkpoints"):
        (path / STATE).write_bytes(b"")
    with pytest.raises(UserError, match=r"no checkpoint can be used: .*000006.*000003"):
        run(config, output, resume=True)


def test_bad_input_writes_nothing(data: Path, tmp_path: Path) -> None:
    for setting in ("init.path=/nowhere", "data.image_root=/nowhere", "train.micro_batch_size=3"):
        with pytest.raises(UserError):
            run(small_config(data, "train.engine=plain", setting), tmp_path / "run")
        assert not (tmp_path / "run").exists()
