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
STEP_S = {"cobra": 0.24, "transformer": 0.2}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Sizes of the demo.

    Attributes:
        scenes, test_scenes: pictures to train on and to be asked about.
        tower_steps, naming_steps, align_steps, finetune_steps: optimizer steps of the stages; both models
            take the same.
        longest_context: of the decoding measurement, which starts at 256 tokens and doubles.
        rounds, prefill_rounds: repeats of the decoding measurement.
        seed: of data and training.
    """

    scenes: int
    test_scenes: int
    tower_steps: int
    naming_steps: int
    align_steps: int
    finetune_steps: int
    longest_context: int = 16384
    rounds: int = 9
    prefill_rounds: int = 3
    seed: int = 0

    @classmethod
    def full(cls) -> "Settings":
        """What the report's claims are made with."""
        steps = {"tower_steps": 1000, "naming_steps": 60, "align_steps": 400, "finetune_steps": 1000}
        return cls(scenes=12000, test_scenes=400, **steps)

    @classmethod
    def quick(cls) -> "Settings":
        """The whole path in minutes; the models learn little."""
        steps = {"tower_steps": 60, "naming_steps": 10, "align_steps": 20, "finetune_steps": 60}
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
        is_begun = self.is_resumable and self.output is not None and self.output.exists()
        return ("python", "-m", *self.arguments, *(["--resume"] if is_begun else []))

    def begin(self) -> dict:
        """The step's record in demo.json."""
        command = shlex.join(("python", "-m", *self.arguments))
        return {"title": self.title, "command": command, "seconds": 0.0, "done": False}


def steps(root: Path, settings: Settings) -> list[Step]:
    """The demo's commands, in order."""
    shared = "Pretrain the vision tower that both models share"
    tower = _train(root, settings, "tower", shared, "tiny-tower", settings.tower_steps, step_s=0.12)
    training = [step for key in MODELS for step in _train_model(root, settings, key)]
    questions = [step for key in MODELS for step in _ask(root, settings, key)]
    report = ("eval", "report", str(root))
    return [
        _draw(root, settings),
        tower,
        *training,
        *questions,
        _measure(root, settings),
        Step(name="report", title="Write the report", arguments=report, expected_s=5),
    ]


def _options(values: dict[str, object]) -> list[str]:
    """Command-line words: {"seed": 0} is --seed 0."""
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _draw(root: Path, settings: Settings) -> Step:
    scenes = root / "scenes"
    options = {
        "output": scenes,
        "seed": settings.seed,
        "scenes": settings.scenes,
        "test-scenes": settings.test_scenes,
    }
    return Step(
        name="scenes",
        title="Draw the digit scenes",
        arguments=("eval", "scenes", *_options(options)),
        output=scenes,
        expected_s=4 + 0.01 * (settings.scenes + settings.test_scenes),
    )


def _train(
    root: Path,
    settings: Settings,
    name: str,
    title: str,
    recipe: str,
    num_steps: int,
    *start: str,
    data: str = "train.json",
    step_s: float,
) -> Step:
    """A training run into root / name; `start` says which model, and what it begins with."""
    changes = {
        "data.path": root / "scenes" / data,
        "data.image_root": root / "scenes" / "images",
        "train.seed": settings.seed,
        "train.steps": num_steps,
    }
    sets = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    output = root / name
    return Step(
        name=name,
        title=title,
        arguments=("train", "--recipe", recipe, "--output", str(output), *start, *sets),
        output=output,
        is_resumable=True,
        expected_s=8 + step_s * num_steps,
    )


def _train_model(root: Path, settings: Settings, key: str) -> list[Step]:
    title, step_s = MODELS[key]["name"], STEP_S[key]
    preset = ("--set", f"model.preset={MODELS[key]['preset']}")

    def start(name: str) -> tuple[str, ...]:
        return (*preset, "--init-from", str(root / name))

    named, aligned = f"{key}-naming", f"{key}-align"
    naming = (named, f"{title}: name", "tiny-naming", settings.naming_steps, *start("tower"))
    align = (aligned, f"{title}: align", "tiny-align", settings.align_steps, *start(named))
    # As in most published recipes the tower rests, which also spares its backward pass.
    frozen = (*start(aligned), "--set", "train.freeze=vision_encoder")
    finetune = (key, f"{title}: finetune", "tiny", settings.finetune_steps, *frozen)
    return [
        _train(root, settings, *naming, step_s=0.1),
        _train(root, settings, *align, data="align.json", step_s=0.8 * step_s),
        _train(root, settings, *finetune, step_s=step_s),
    ]


def _ask(root: Path, settings: Settings, key: str) -> list[Step]:
    options = {
        "model": root / key,
        "task": "digit_scenes",
        "data": root / "scenes",
        "output": root / "tasks" / key,
    }
    title, plain = MODELS[key]["name"], ("eval", "tasks", *_options(options))
    expected_s = 4 + 0.06 * settings.test_scenes
    return [
        Step(name=f"{key}-{name}", title=f"{title}: {about}", arguments=words, expected_s=expected_s)
        for name, about, words in (
            ("questions", "questions", plain),
            ("control", "blank-image control", (*plain, "--control", "blank")),
        )
    ]


def _measure(root: Path, settings: Settings) -> Step:
    models = [word for key in MODELS for word in ("--model", f"{key}={root / key}")]
    options = {
        "longest-context": settings.longest_context,
        "rounds": settings.rounds,
        "prefill-rounds": settings.prefill_rounds,
        "output": root / "efficiency.json",
    }
    return Step(
        name="efficiency",
        title="Decoding against context length",
        arguments=("eval", "efficiency", *models, *_options(options)),
        expected_s=5 + settings.longest_context * settings.prefill_rounds / 500,
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
