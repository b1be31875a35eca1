"""The demo: data, training, evaluation, comparison and report, as the commands that a user would type.

Every step is a command of its own, printed before it runs; pipeline.py runs them and records in demo.json
what is done, so that an interrupted demo goes on where it stopped.
"""

import functools
import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from eval.files import read_json
from eval.pipeline import Lane, Pipeline, Stage, Step, clock, open_record

STATE_FILE = "demo.json"
FORMAT = 2  # of that file
MODELS = {
    "cobra": {"name": "Cobra", "preset": "tiny", "what": "Mamba-2 layers", "constant_state": True},
    "transformer": {
        "name": "Transformer",
        "preset": "transformer-tiny",
        "what": "attention and feed-forward layers",
        "constant_state": False,
    },
}
# Rough seconds of a finetuning step, for the time that is left: side by side on two cores.
STEP_S = {"cobra": 0.4, "transformer": 0.5}


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
        steps = {"tower_steps": 300, "naming_steps": 60, "align_steps": 320, "finetune_steps": 560}
        return cls(scenes=9600, test_scenes=400, **steps)

    @classmethod
    def quick(cls) -> "Settings":
        """The whole path in minutes; the models learn little."""
        steps = {"tower_steps": 60, "naming_steps": 10, "align_steps": 20, "finetune_steps": 60}
        return cls(scenes=300, test_scenes=40, longest_context=4096, rounds=5, prefill_rounds=1, **steps)


def stages(root: Path, settings: Settings) -> list[Stage]:
    """The demo's commands; the two models are trained and questioned side by side."""
    shared = "Pretrain the vision tower that both models share"
    tower = _train(root, settings, "tower", shared, "tiny-tower", settings.tower_steps, step_s=0.15)
    lanes = {
        model["name"]: [*_train_model(root, settings, key), *_ask(root, settings, key)]
        for key, model in MODELS.items()
    }
    report = ("eval", "report", str(root))
    return [
        {"data": [_draw(root, settings), tower]},
        lanes,
        {
            "report": [
                _measure(root, settings),
                Step(name="report", title="Write the report", arguments=report, expected_s=5),
            ]
        },
    ]


def steps(root: Path, settings: Settings) -> list[Step]:
    """The demo's commands, one lane after the other."""
    return [step for stage in stages(root, settings) for lane in stage.values() for step in lane]


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
        expected_s=4 + 0.0015 * (settings.scenes + settings.test_scenes),
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


def _train_model(root: Path, settings: Settings, key: str) -> Lane:
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
        _train(root, settings, *naming, step_s=0.2),
        _train(root, settings, *align, data="align.json", step_s=0.8 * step_s),
        _train(root, settings, *finetune, step_s=step_s),
    ]


def _ask(root: Path, settings: Settings, key: str) -> Lane:
    options = {
        "model": root / key,
        "task": "digit_scenes",
        "data": root / "scenes",
        "output": root / "tasks" / key,
    }
    title, plain = MODELS[key]["name"], ("eval", "tasks", *_options(options))
    expected_s = 6 + 0.04 * settings.test_scenes
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
        expected_s=5 + settings.longest_context * settings.prefill_rounds / 1000,
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
    record = open_record(root / STATE_FILE, FORMAT, {"quick": quick, "settings": asdict(settings)}, "demo")
    status = Pipeline(stages(root, settings), record, root / STATE_FILE, say).run()
    if status == 0:
        _say_goodbye(root, record, say)
    return status


def _say_goodbye(root: Path, state: dict, say: Callable[[str], None]) -> None:
    rows = read_json(root / "report.json")["verdict"]
    say(f"\nThe demo is complete ({clock(state['seconds'])}). What it shows:")
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
