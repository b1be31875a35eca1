"""The demo: data, training, evaluation, comparison and report, as the commands that a user would
type.

Every step is a command of its own, printed before it runs. What is done is recorded in demo.json,
with its time, so that an
interrupted demo goes on where it stopped: finished steps are skipped, training resumes from its
    last checkpoint.
"""

import functools
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from eval.files import read_json, write_json
from vision_scan.errors import UserError

STATE_FILE = "demo.json"
STOPPED, INTERRUPTED = 75, 130  # exit statuses of a command that was asked to stop
MODELS = {
    "cobra": {"name": "Cobra", "preset": "tiny", "what": "Mamba-2 layers", "constant_state": True},
    "transformer": {
        "name": "Transformer",
        "preset": "transformer-tiny",
        "what": "attention and feed-forward layers",
        "constant_state": False,
    },
}
# Rough seconds of a finetuning step on two cores, for the time that is left.
STEP_S = {"cobra": 1.6, "transformer": 0.8}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the demo.

    Attributes:
        scenes, test_scenes: pictures to train on and to be asked about.
        tower_steps, align_steps, finetune_steps: optimizer steps of the three stages; both models
            take the same.
        longest_context: of the decoding measurement, which starts at 256 tokens and doubles.
        rounds, prefill_rounds: repeats of the decoding measurement.
        seed: of data and training.
    """

    scenes: int
    test_scenes: int
    tower_steps: int
    align_steps: int
    finetune_steps: int
    longest_context: int = 16384
    rounds: int = 9
    prefill_rounds: int = 3
    seed: int = 0

    @classmethod
    def full(cls) -> "Settings":
        """What the report's claims are made with."""
        return cls(scenes=6000, test_scenes=400, tower_steps=1200, align_steps=200, finetune_steps=2000)

    @classmethod
    def quick(cls) -> "Settings":
        """The whole path in minutes; the models learn little."""
        steps = {"tower_steps": 60, "align_steps": 20, "finetune_steps": 60}
        return cls(scenes=300, test_scenes=40, longest_context=4096, rounds=5, prefill_rounds=1, **steps)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One command of the demo.

    Attributes:
        name: key in demo.json.
        title: what it does, for people.
        arguments: of `python -m`.
        output: what the step leaves behind, if a second run would not just overwrite it.
        is_resumable: whether it goes on from a half-made output; if not, that is removed first.
        expected_s: rough seconds on two cores; only the ratios between steps matter, for the time
            that is left.
    """

    name: str
    title: str
    arguments: tuple[str, ...]
    output: Path | None = None
    is_resumable: bool = False
    expected_s: float

    @property
    def command(self) -> tuple[str, ...]:
        """As a user would type it; a training run that was begun is resumed."""
        resume = ("--resume",) if self.is_resumable and self.output.exists() else ()
        return ("python", "-m", *self.arguments, *resume)

    def begin(self) -> dict:
        """The step's record in demo.json."""
        command = shlex.join(("python", "-m", *self.arguments))
        return {"title": self.title, "command": command, "seconds": 0.0, "done": False}


def steps(root: Path, settings: Settings) -> list[Step]:
    """The demo's commands, in order."""
    scenes = root / "scenes"
    data = ("--set", f"data.image_root={scenes / 'images'}", "--set", f"train.seed={settings.seed}")
    tower = root / "tower"
    result = [
        Step(
            name="scenes",
            title="Draw the digit scenes",
            arguments=(
                *("eval", "scenes", "--output", str(scenes), "--seed", str(settings.seed)),
                *("--scenes", str(settings.scenes), "--test-scenes", str(settings.test_scenes)),
            ),
            output=scenes,
            expected_s=4 + 0.01 * (settings.scenes + settings.test_scenes),
        ),
        Step(
            name="tower",
            title="Pretrain the vision tower that both models share",
            arguments=(
                *("train", "--recipe", "tiny-tower", "--output", str(tower)),
                *(
                    "--set",
                    f"data.path={scenes / 'train.json'}",
                    *data,
                    "--set",
                    f"train.steps={settings.tower_steps}",
                ),
            ),
            output=tower,
            is_resumable=True,
            expected_s=8 + 0.3 * settings.tower_steps,
        ),
    ]
    for key in MODELS:
        result += _training_steps(root, settings, key, data)
    for key in MODELS:
        result += _question_steps(root, settings, key)
    result.append(_efficiency_step(root, settings))
    report = ("eval", "report", str(root))
    return [*result, Step(name="report", title="Write the report", arguments=report, expected_s=5)]


def _training_steps(root: Path, settings: Settings, key: str, data: tuple[str, ...]) -> list[Step]:
    scenes, aligned, output = root / "scenes", root / f"{key}-align", root / key
    title = MODELS[key]["name"]
    step_s = STEP_S[key]
    model = ("--set", f"model.preset={MODELS[key]['preset']}")
    align = (
        *("train", "--recipe", "tiny-align", "--output", str(aligned), *model),
        *("--init-from", str(root / "tower"), "--set", "init.parts=vision_encoder"),
        *(
            "--set",
            f"data.path={scenes / 'captions.json'}",
            *data,
            "--set",
            f"train.steps={settings.align_steps}",
        ),
    )
    finetune = (
        *(
            "train",
            "--recipe",
            "tiny",
            "--output",
            str(output),
            *model,
            "--init-from",
            str(aligned),
        ),
        *(
            "--set",
            f"data.path={scenes / 'train.json'}",
            *data,
            "--set",
            f"train.steps={settings.finetune_steps}",
        ),
    )
    return [
        Step(
            name=f"{key}-align",
            title=f"{title}: align",
            arguments=align,
            output=aligned,
            is_resumable=True,
            expected_s=8 + 0.6 * step_s * settings.align_steps,
        ),
        Step(
            name=key,
            title=f"{title}: finetune",
            arguments=finetune,
            output=output,
            is_resumable=True,
            expected_s=8 + step_s * settings.finetune_steps,
        ),
    ]


def _question_steps(root: Path, settings: Settings, key: str) -> list[Step]:
    arguments = (
        *(
            "eval",
            "tasks",
            "--model",
            str(root / key),
            "--task",
            "digit_scenes",
            "--data",
            str(root / "scenes"),
        ),
        *("--output", str(root / "tasks" / key)),
    )
    title = MODELS[key]["name"]
    expected_s = 4 + 0.06 * settings.test_scenes
    blank = (*arguments, "--control", "blank")
    return [
        Step(
            name=f"{key}-questions",
            title=f"{title}: questions",
            arguments=arguments,
            expected_s=expected_s,
        ),
        Step(
            name=f"{key}-control",
            title=f"{title}: blank-image control",
            arguments=blank,
            expected_s=expected_s,
        ),
    ]


def _efficiency_step(root: Path, settings: Settings) -> Step:
    arguments = (
        *(
            "eval",
            "efficiency",
            *(word for key in MODELS for word in ("--model", f"{key}={root / key}")),
        ),
        *("--longest-context", str(settings.longest_context), "--rounds", str(settings.rounds)),
        *(
            "--prefill-rounds",
            str(settings.prefill_rounds),
            "--output",
            str(root / "efficiency.json"),
        ),
    )
    expected_s = 5 + settings.longest_context * settings.prefill_rounds / 500
    return Step(
        name="efficiency",
        title="Decoding against context length",
        arguments=arguments,
        expected_s=expected_s,
    )


def run(root: Path, settings: Settings, quick: bool, say: Callable[[str], None] | None = None) -> int:
    """Runs what is left of the demo in `root`.

    Args:
        root: the demo's directory; new, empty, or of an earlier run with the same settings.
        settings: sizes.
        quick: whether the report must say that this is the quick run.
        say: prints a line; None: on standard output.
    Returns:
        Exit status: 0 done, 75 stopped by request, else the status of the step that failed.
    Raises:
        UserError: if `root` holds something else.
    """
    say = say or functools.partial(print, flush=True)  # in order with what the steps print
    state = _open(root, settings, quick)
    todo = steps(root, settings)
    for number, step in enumerate(todo, start=1):
        record = state["steps"].setdefault(step.name, step.begin())
        if record["done"]:
            continue
        place = f"{number}/{len(todo)}"
        say(f"\n[{place}] {step.title}   ({_clock(todo, state)})")
        if step.output and step.output.exists() and not step.is_resumable:
            shutil.rmtree(step.output)
        command = step.command
        say(f"$ {shlex.join(command)}")
        start = time.monotonic()
        status, is_stopped = _run_command([sys.executable, *command[1:]])
        record["seconds"] += time.monotonic() - start
        record["done"] = status == 0
        # Of the largest step so far: the system counts the maximum over all children.
        record["peak_rss_bytes"] = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        write_json(root / STATE_FILE, state)
        if is_stopped or status in (STOPPED, INTERRUPTED):
            say(f"Stopped at step {place}; the same command goes on from here.")
            return STOPPED
        if status:
            say(f"Step {place} ended with status {status}; once that is mended, the same command")
            say("goes on from here.")
            return status if status > 0 else 1
    _say_goodbye(root, state, say)
    return 0


def _open(root: Path, settings: Settings, quick: bool) -> dict:
    """The state of the demo in `root`, which is made if it does not exist."""
    path = root / STATE_FILE
    fresh = {"format": 1, "quick": quick, "settings": asdict(settings), "steps": {}}
    if not path.exists():
        if root.exists() and (not root.is_dir() or any(root.iterdir())):
            raise UserError(f"--output {root} exists and is no demo's directory; name another, or remove it")
        root.mkdir(parents=True, exist_ok=True)
        write_json(path, fresh)
        return fresh
    state = read_json(path)
    try:
        same = state["settings"] == fresh["settings"] and state["quick"] == quick
    except (KeyError, TypeError):
        raise UserError(
            f"{path} is not the record of a demo; name another --output, or remove {root}"
        ) from None
    if not same:
        raise UserError(f"{root} holds a demo with other settings; name another --output, or remove it")
    return state


def _run_command(command: list[str]) -> tuple[int, bool]:
    """Runs a command in this terminal: its exit status, and whether a signal asked to stop.

    Ctrl-C reaches the command too, which saves what it has; SIGTERM is handed on to it.
    """
    is_stopped = False
    process = subprocess.Popen(command)

    def stop(number: int, frame) -> None:
        nonlocal is_stopped
        is_stopped = True
        if number == signal.SIGTERM:
            process.terminate()

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        return process.wait(), is_stopped
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _clock(todo: list[Step], state: dict) -> str:
    """Time spent and time left, at the pace against expectation of what is done."""
    spent = sum(record["seconds"] for record in state["steps"].values())
    done = {name for name, record in state["steps"].items() if record["done"]}
    expected = {step.name: step.expected_s for step in todo}
    finished = sum(expected[name] for name in done)
    # Half a minute at the expected pace keeps the first short steps from deciding the estimate.
    pace = (sum(state["steps"][name]["seconds"] for name in done) + 30) / (finished + 30)
    left = pace * (sum(expected.values()) - finished)
    return f"{_minutes(spent)} so far, about {_minutes(left)} to go"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _say_goodbye(root: Path, state: dict, say: Callable[[str], None]) -> None:
    rows = read_json(root / "report.json")["verdict"]
    total = sum(record["seconds"] for record in state["steps"].values())
    say(f"\nThe demo is complete ({_minutes(total)}). What it shows:")
    marks = {True: "+", False: "-", None: " "}
    for row in rows:
        say(f"  {marks[row['reached']]} {row['claim']}: {row['measured']}")
    if any(row["reached"] is False for row in rows):
        why = ", as is to be expected of the quick run" if state["quick"] else ""
        say(f"  (-: target not reached{why})")
    say(f"\nreport   {root / 'report.html'}")
    say(f"numbers  {root / 'report.json'}")
    say(f"models   {'  '.join(str(root / key) for key in MODELS)}")
    row = read_json(root / "scenes" / "test.json")[0]
    question = row["conversations"][0]["value"].replace("<image>", "").strip()
    image = root / "scenes" / "images" / row["image"]
    cobra = "cobra" if shutil.which("cobra") else str(Path(sys.executable).with_name("cobra"))
    say("\nAsk the model, about this picture or one of yours:")
    say(f"  {cobra} answer --model {root / 'cobra'} --image {image} {shlex.quote(question)}")
    say(f"  {cobra} chat --model {root / 'cobra'} --image {image}")
