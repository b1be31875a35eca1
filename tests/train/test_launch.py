"""The templates of train/launch: what they would start, and two nodes that are network namespaces."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.train.small_run import ROOT, SETTINGS, environment, losses, small_config
from train.run import run

LAUNCH = ROOT / "train" / "launch"
NODES = ("cobra-a", "cobra-b")


def arguments(data: Path, output: Path, *changes: str) -> list[str]:
    """What follows the name of a template."""
    sets = [word for change in (*SETTINGS, f"data.path={data}", *changes) for word in ("--set", change)]
    return ["--recipe", "tiny", "--output", str(output), *sets]


def launch(template: str, words: list[str], **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(LAUNCH / template), *words],
        env=environment(PYTHON=sys.executable, USER="me", **variables),
        capture_output=True,
        text=True,
        timeout=1200,
    )


@pytest.fixture
def slurm(tmp_path: Path) -> Path:
    """Stand-ins for srun and scontrol: srun writes down what it was given and ends with $SRUN_STATUS."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, script in (
        ("srun", 'echo "$@" > "$RECORD"; exit "${SRUN_STATUS:-0}"'),
        ("scontrol", 'if [ "$1" = show ]; then echo node-7; else echo "$@" >> "$RECORD"; fi'),
    ):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.mark.parametrize("template", ["slurm.sh", "torchrun.sh", "deepspeed.sh"])
def test_dry_run_prints_plan_and_command_and_starts_nothing(data: Path, tmp_path: Path, template: str) -> None:
    words = arguments(data, tmp_path / "run")
    done = launch(template, words, DRY_RUN="1", PROCESSES="2", SLURM_NTASKS="2")
    assert done.returncode == 0, done.stderr
    plan, command = done.stdout.rsplit("\n", 2)[0], done.stdout.splitlines()[-1]
    assert plan.startswith("recipe tiny: preset tiny") and "ZeRO 3" in plan
    assert "train --resume --recipe tiny --output" in command
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("template", ["slurm.sh", "torchrun.sh"])
def test_mistake_is_found_before_anything_starts(data: Path, tmp_path: Path, template: str) -> None:
    words = arguments(data, tmp_path / "run", "train.micro_batch_size=3")
    done = launch(template, words, PROCESSES="2", SLURM_NTASKS="2")
    assert done.returncode == 2
    assert done.stderr.startswith("error: train.batch_size=4 is not a multiple of") and done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (75, True)])
def test_job_is_queued_again_when_it_was_stopped(
    data: Path, tmp_path: Path, slurm: Path, status: int, requeued: bool
) -> None:
    record = tmp_path / "record"
    done = launch(
        "slurm.sh",
        arguments(data, tmp_path / "run"),
        PATH=f"{slurm}:{os.environ['PATH']}",
        RECORD=str(record),
        SRUN_STATUS=str(status),
        SLURM_JOB_ID="123",
        SLURM_JOB_NUM_NODES="2",
        SLURM_NTASKS="4",
        SLURM_SUBMIT_DIR=str(ROOT),
    )
    assert done.returncode == (0 if requeued else status), done.stderr
    told = record.read_text().splitlines()
    assert told[0].startswith("--nodes 2 --ntasks 4 --cpus-per-task ") and "-m train --resume --recipe tiny" in told[0]
    assert told[1:] == (["requeue 123"] if requeued else [])


def test_processes_find_each_other_by_what_slurm_says(data: Path, tmp_path: Path, slurm: Path) -> None:
    """Two tasks that know nothing but Slurm's variables."""
    changes = ("train.batch_size=4", "train.micro_batch_size=1", "optim.kind=adamw")
    assert run(small_config(data, "train.engine=plain", *changes), tmp_path / "one")
    variables = {
        "PATH": f"{slurm}:{os.environ['PATH']}",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_STEP_NODELIST": "node-[7-8]",
        "MASTER_ADDR": "127.0.0.1",
    }
    tasks = [
        subprocess.Popen(
            [sys.executable, "-m", "train", *arguments(data, tmp_path / "two", *changes)],
            cwd=ROOT,
            env=environment(**variables, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    said = [task.communicate(timeout=1200)[0] for task in tasks]
    assert [task.returncode for task in tasks] == [0, 0], said
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


def test_hostfile_counts_its_slots(data: Path, tmp_path: Path) -> None:
    words = arguments(data, tmp_path / "run")
    done = launch("deepspeed.sh", words, DRY_RUN="1", HOSTFILE=str(LAUNCH / "hostfile.example"))
    assert done.returncode == 2  # 16 processes, and a batch of 4 rows
    assert "x 16 processes" in done.stderr
    (tmp_path / "hosts").write_text("# two hosts\nleft slots=1\nright   slots=1\n")
    done = launch("deepspeed.sh", words, DRY_RUN="1", HOSTFILE=str(tmp_path / "hosts"))
    assert done.returncode == 0, done.stderr
    assert f"--hostfile {tmp_path / 'hosts'} --module train --resume" in done.stdout


@pytest.fixture
def nodes() -> Iterator[None]:
    """Two network namespaces with a cable between them."""
    steps = [
        f"netns add {NODES[0]}",
        f"netns add {NODES[1]}",
        f"link add cable netns {NODES[0]} type veth peer name cable netns {NODES[1]}",
        *(f"-n {node} addr add 10.77.0.{number}/24 dev cable" for number, node in enumerate(NODES, start=1)),
        *(f"-n {node} link set {device} up" for node in NODES for device in ("cable", "lo")),
    ]

    def remove() -> None:
        for node in NODES:
            subprocess.run(["ip", "netns", "delete", node], capture_output=True)

    try:
        remove()
        for step in steps:
            done = subprocess.run(["ip", *step.split()], capture_output=True, text=True)
            if done.returncode:
                pytest.skip(f"network namespaces are not permitted here: ip {step}: {done.stderr.strip()}")
        yield
    except FileNotFoundError:
        pytest.skip("network namespaces need iproute2: no program ip")
    finally:
        remove()


def test_two_nodes(nodes: None, data: Path, tmp_path: Path) -> None:
    changes = ("train.micro_batch_size=1", "optim.kind=adamw", "zero.stage=2", "train.batch_size=4")
    plain = ("train.engine=plain", "zero.stage=0")
    assert run(small_config(data, *changes[:2], *plain, "train.batch_size=4"), tmp_path / "one")
    words = arguments(data, tmp_path / "two", *changes)
    variables = {"NODES": "2", "PROCESSES": "1", "MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "cable"}
    started = [
        subprocess.Popen(
            ["ip", "netns", "exec", node, "bash", str(LAUNCH / "torchrun.sh"), *words],
            env=environment(PYTHON=sys.executable, NODE=str(number), **variables),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number, node in enumerate(NODES)
    ]
    try:
        said = [node.communicate(timeout=1200)[0] for node in started]
    finally:
        for node in started:
            node.kill()
    assert [node.returncode for node in started] == [0, 0], said
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
