"""What goes wrong on a cluster: each ends in one clear message and a way on."""

import errno
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import cobra.checkpoint
from tests.train.many_runs import launch, spoiling
from tests.train.small_run import call, command, losses, small_config
from train.__main__ import main
from train.resume import CheckpointError
from train.run import run
from train.run_directory import latest_checkpoint

PLAIN = ("train.engine=plain", "train.save_every=2")


@pytest.fixture(autouse=True)
def stay_connected(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command leaves the processes at its end for good, and other tests run in this one."""
    monkeypatch.setattr("train.processes.leave_processes", lambda: None)


def fill_disk(monkeypatch: pytest.MonkeyPatch, writes: range) -> None:
    """Has the disk full at some of the model's writes."""
    save, count = cobra.checkpoint.save, iter(range(1000))

    def write(model: Any, path: Path, tensors: Any = None) -> None:
        if next(count) in writes:
            Path(path).mkdir(parents=True, exist_ok=True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(model, path, tensors)

    monkeypatch.setattr("cobra.checkpoint.save", write)


def test_full_disk_is_a_warning_while_training_can_go_on(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fill_disk(monkeypatch, range(1, 2))
    output = tmp_path / "run"
    assert run(small_config(data, *PLAIN), output)
    (told,) = [record.message for record in caplog.records if "could not be written" in record.message]
    assert "step-000004" in told and "No space left" in told and "are free" in told
    assert "step-000002" in told and "--resume --set train.keep=1" in told
    assert latest_checkpoint(output).name == "step-000006"
    assert not list((output / "checkpoints").glob(".*"))


def test_full_disk_at_the_end_keeps_what_was_there_and_exits_1(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = tmp_path / "whole"
    assert run(small_config(data, *PLAIN), expected)
    output = tmp_path / "run"
    with monkeypatch.context() as patch:
        fill_disk(patch, range(2, 3))
        with pytest.raises(CheckpointError, match=r"step-000006 could not be written.*step-000004"):
            run(small_config(data, *PLAIN), output)
    assert latest_checkpoint(output).name == "step-000004"
    assert main(["--resume", "--output", str(output)]) == 0
    assert losses(output) == losses(expected)


def test_failing_process_ends_although_its_workers_hear_no_signal(data: Path, tmp_path: Path) -> None:
    script = (
        "import sys; from train import __main__, engine\n"
        "def fail(self, max_norm): raise RuntimeError('out of memory')\n"
        "engine.PlainEngine.step = fail\n"
        "sys.exit(__main__.main(sys.argv[1:]))"
    )
    words = command(data, tmp_path / "run", *PLAIN, "data.workers=1")
    done = call([words[0], "-c", script, *words[3:]])
    assert done.returncode == 1 and "out of memory" in done.stderr


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_steps_that_are_not_finite_may_be_left_out(data: Path, tmp_path: Path, engine: str) -> None:
    config = small_config(data, f"train.engine={engine}", "train.skip_nonfinite=2", "log.every=1")
    with spoiling({2, 3}):
        assert run(config, tmp_path / "run")
    found = losses(tmp_path / "run")
    assert [step for step, loss in enumerate(found) if not loss < float("inf")] == [2, 3]
    assert found[5] < found[0]


def test_a_run_that_ended_at_such_a_step_can_leave_it_out(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    arguments = command(data, output, *PLAIN)[3:]
    with spoiling({3}):
        assert main(arguments) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("failed: step 4: loss inf") and "--resume --set train.skip_nonfinite=3" in told
    with spoiling({0}):  # the same step, in the second life
        assert main(["--resume", "--output", str(output), "--set", "train.skip_nonfinite=3"]) == 0


def start_two(data: Path, output: Path, *changes: str) -> Any:
    """Two processes that are at their fifth step or so."""
    endless = ("train.steps=100000", "train.save_every=100000", "train.micro_batch_size=1", "optim.kind=adamw")
    workers = launch(command(data, output, *endless, *changes), 2)
    deadline = time.monotonic() + 120
    while len(losses(output)) < 5 and time.monotonic() < deadline:
        assert all(worker.poll() is None for worker in workers), workers[0].communicate()
        time.sleep(0.02)
    return workers


def end(workers: Any, seconds: float = 60) -> list[tuple[int, str]]:
    """Exit statuses and what was said."""
    try:
        return [(worker.wait(seconds), worker.communicate()[0]) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()


def test_first_process_leaves_last() -> None:
    """It holds the store through which the others make their groups, and a refused run ends on all of them at once."""
    script = (
        "import time, torch; import torch.distributed as dist; from train import processes\n"
        "rank, _ = processes.join_processes('deepspeed', torch.device('cpu'))\n"
        "if rank:\n"
        "    time.sleep(1)\n"
        "    dist.distributed_c10d._get_default_store().add('late', 1)\n"
        "processes.leave(2)\n"
    )
    ended = end(launch([sys.executable, "-c", script], 2))
    assert [status for status, _ in ended] == [2, 2], ended
    assert all("Error" not in said for _, said in ended)


def test_dead_process_is_noticed_by_the_other(data: Path, tmp_path: Path) -> None:
    first, second = start_two(data, tmp_path / "run")
    second.kill()
    ((status, told),) = end([first])
    assert status == 1
    line = told.splitlines()[-1]
    assert line.startswith("failed: process 0 on ") and "lost another one" in line and "--resume" in line


def test_silent_process_is_given_up_after_the_timeout(data: Path, tmp_path: Path) -> None:
    first, second = start_two(data, tmp_path / "run", "train.timeout=0.05")
    second.send_signal(signal.SIGSTOP)
    try:
        ((status, told),) = end([first])
    finally:
        second.kill()
    assert status == 1, told
    assert "raise train.timeout" in told.splitlines()[-1]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signal_to_every_process_and_worker_saves_and_exits_75(data: Path, tmp_path: Path, number: int) -> None:
    output = tmp_path / "run"
    workers = start_two(data, output, "data.workers=1", "zero.stage=2")
    for worker in workers:
        for child in [worker.pid, *children(worker.pid)]:
            os.kill(child, number)
    ended = end(workers)
    assert [status for status, _ in ended] == [75, 75], ended
    assert f"python -m train --resume --output {output}" in ended[0][1]
    done = len(losses(output))
    assert latest_checkpoint(output).name == f"step-{done:06d}"
    shutil.rmtree(output)


def children(process: int) -> list[int]:
    """The processes that a process has started."""
    found = Path(f"/proc/{process}/task/{process}/children")
    return [int(word) for word in found.read_text().split()] if found.exists() else []


def test_plan_that_needs_more_processes_says_so(data: Path, tmp_path: Path) -> None:
    done = call(command(data, tmp_path / "run", "train.sequence_parallel=2"))
    assert done.returncode == 2
    assert "train.sequence_parallel=2 does not divide the 1 processes" in done.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


