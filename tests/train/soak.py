"""Training that is killed again and again, by SIGKILL, and has to end with the numbers of a run that never was.

`python -m tests.train.soak --kills 30 --output FILE.json` does it at length and writes down what happened.
"""

import argparse
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import cobra
from cobra.progress import track
from tests.train.small_run import command, environment, losses, small_config, write_data
from train.run import run
from train.run_directory import choose_checkpoint, find_damage, list_checkpoints

STEPS_PER_KILL = 20
QUIET: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
LONGEST_WAIT = 0.4  # seconds from the moment that was waited for to the kill


def kill_and_resume(folder: Path, kills: int, seed: int = 0) -> dict[str, Any]:
    """Trains once undisturbed and once with kills at random moments, every other one while a checkpoint is written.

    Args:
        folder: for both runs and their data.
        kills: how many.
        seed: of the moments.
    Returns:
        how often the kill came when, and that all is equal.
    Raises:
        AssertionError: if a checkpoint was lost or damaged, or a number differs.
    """
    data = write_data(folder / "data")
    steps = STEPS_PER_KILL * (kills + 1)
    changes = ("train.engine=plain", f"train.steps={steps}", "train.save_every=1", "train.keep=2")
    whole, output = folder / "whole", folder / "killed"
    assert run(small_config(data, *changes), whole)
    draw, moments, newest = random.Random(seed), [], 0
    for number in track(range(kills), "kills", kills):
        moments.append(_live_until(command(data, output, *changes), output, draw, in_writing=number % 2 == 0))
        checkpoints = list_checkpoints(output / "checkpoints")
        damages = [damage for path in checkpoints if (damage := find_damage(path))]
        assert not damages, damages
        last = max((int(path.name.removeprefix("step-")) for path in checkpoints), default=0)
        assert last >= newest, f"checkpoint {newest} is gone, the newest is {last}"
        newest = last
    done = subprocess.run(
        [*command(data, output, *changes), "--resume"], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert losses(output) == losses(whole)
    one, other = cobra.load(whole).state_dict(), cobra.load(output).state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
    states = [(choose_checkpoint(path) / "train_state.safetensors").read_bytes() for path in (whole, output)]
    assert states[0] == states[1]
    return {
        "kills": kills,
        "while a checkpoint was written": moments.count("writing"),
        "between": moments.count("between"),
        "before the first step of a life": moments.count("starting"),
        "steps": len(losses(whole)),
        "checkpoints lost or damaged": 0,
        "weights, optimizer and losses": "equal bit for bit",
    }


def _live_until(arguments: list[str], output: Path, draw: random.Random, in_writing: bool) -> str:
    """Lets a process train for a while and kills it; in what it was met."""
    done = len(losses(output))
    process = subprocess.Popen([*arguments, "--resume"], env=environment(), **QUIET)
    wait = draw.uniform(0, LONGEST_WAIT)
    if draw.random() < 0.1:
        time.sleep(draw.uniform(0, 4))  # at the start, or in the middle of loading
    else:
        while len(losses(output)) <= done:
            assert process.poll() is None, "ended before it was killed"
            time.sleep(0.002)
        time.sleep(wait)
    while in_writing and not _writes(output) and len(losses(output)) > done:
        if process.poll() is not None:
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    if len(losses(output)) <= done:
        return "starting"
    return "writing" if _writes(output) else "between"


def _writes(output: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process died."""
    return any((output / "checkpoints").glob(".step-*"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = kill_and_resume(Path(folder), options.kills, options.seed)
    report["seconds"] = round(time.monotonic() - began, 1)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    sys.exit(main())
