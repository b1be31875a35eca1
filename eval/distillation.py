"""Students of the demo's transformer: how much of what it can do a state-space model takes over, in how few steps.

Each student is made of the finished twin, learns in the three stages of train/objectives/distillation.py, and answers
the demo's questions. Beside them stands the same student that learns from the rows' own answers alone, in as many
steps, and all together take at most a fifth of the steps that the twin took.
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.demo import FORMAT as DEMO_FORMAT
from eval.demo import STATE_FILE
from eval.files import check_format, read_json, read_lines, write_json
from eval.pipeline import Lane, Pipeline, Stage, Step, clock, open_record
from eval.runner import result_paths
from eval.scoring import accuracy, paired_difference
from vision_scan.errors import UserError

TASK = "digit_scenes"
RECORD, RESULT, PICTURE = "distill.json", "students.json", "students.png"
FORMAT = 1  # of both files
SHARE = 0.2  # of the steps that the twin took behind the tower, which is nobody's to learn again
BAR = 0.02  # what a student may be worse than its teacher
ALL = "all"
# Of the steps; the shares of stages that a student leaves out fall to its last.
STAGES = {"distill-mixer": 0.06, "distill-hidden": 0.16, "distill-logits": 0.78}
# As the demo's recipes, faster in as few steps.
SETTINGS = {
    "train.batch_size": 16,
    "train.dtype": "float32",
    "data.length_group": 4,
    "optim.kind": "muon",
    "optim.momentum": 0.8,
    "optim.warmup_ratio": 0.02,
    "optim.decay_ratio": 0.7,
    "optim.clip": 1,
    "distill.hidden_weight": 0.3,
}
LR = {"distill-mixer": 6e-3, "distill-hidden": 6e-3, "distill-logits": 4e-3, "tiny": 4e-3}
STEP_S = 0.4


@dataclass(frozen=True)
class Student:
    """What a student is made of, and learns from.

    Attributes:
        title: for people.
        settings: of its runs.
        recipes: of its runs, one after the other.
    """

    title: str
    settings: tuple[str, ...]
    recipes: tuple[str, ...] = tuple(STAGES)


STUDENTS = {
    "mamba2": Student("Mamba-2", ()),
    "hybrid": Student("Mamba-2, one of three layers attention", ("distill.keep=1",)),
    "gated_deltanet": Student("Gated DeltaNet", ("distill.student=gated_deltanet",)),
    "logits": Student("Mamba-2, the last stage alone", (), ("distill-logits",)),
    "both": Student("Mamba-2, half of what it is taught the rows' answers", ("distill.label_share=0.5",)),
    "labels": Student("Mamba-2, without its teacher's answers", ("train.freeze=vision_encoder,connector",), ("tiny",)),
}
"""The last three tell what the stages, and the teacher's answers, are for."""


def stages(root: Path, demo: Path, steps: int) -> list[Stage]:
    """The commands: students two by two, side by side."""
    lanes = {student.title: _lane(root, demo, key, steps) for key, student in STUDENTS.items()}
    names = list(lanes)
    return [{name: lanes[name] for name in names[start : start + 2]} for start in range(0, len(names), 2)]


def split_steps(recipes: Sequence[str], steps: int) -> list[int]:
    """How many steps each run takes, in all exactly so many."""
    counts = [int(steps * STAGES.get(recipe, 0)) for recipe in recipes[:-1]]
    return [*counts, steps - sum(counts)]


def _lane(root: Path, demo: Path, key: str, steps: int) -> Lane:
    student, previous, lane = STUDENTS[key], None, []
    for recipe, count in zip(student.recipes, split_steps(student.recipes, steps), strict=True):
        is_last = recipe == student.recipes[-1]
        name = key if is_last else f"{key}-{recipe}"
        changes = {
            "data.path": demo / "scenes" / "train.json",
            "data.image_root": demo / "scenes" / "images",
            "distill.teacher": demo / "transformer",
            "train.steps": count,
            "optim.lr": LR[recipe],
            **SETTINGS,
        }
        assignments = [*(f"{setting}={value}" for setting, value in changes.items()), *student.settings]
        words = ["train", "--recipe", recipe, "--output", str(root / name)]
        words += ["--init-from", str(previous)] if previous else []
        words += [word for assignment in assignments for word in ("--set", assignment)]
        lane.append(
            Step(
                name=name,
                title=f"{student.title}: {recipe}",
                arguments=tuple(words),
                output=root / name,
                is_resumable=True,
                expected_s=8 + STEP_S * count,
            )
        )
        previous = root / name
    options = {"model": root / key, "task": TASK, "data": demo / "scenes", "output": root / "tasks" / key}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    ask = Step(
        name=f"{key}-questions", title=f"{student.title}: questions", arguments=("eval", "tasks", *words), expected_s=20
    )
    return [*lane, ask]


def run(demo: Path, root: Path, say: Callable[[str], None] | None = None) -> int:
    """Makes, trains and asks what is left of the students.

    Args:
        demo: the directory of a finished demo.
        root: where everything goes; new, empty, or of an earlier run.
        say: prints a line; None: on standard output.
    Returns:
        Exit status: 0 done, 75 stopped by request, else the status of the step that failed.
    Raises:
        UserError: if the demo is not finished, or `root` holds something else.
    """
    say = say or functools.partial(print, flush=True)
    settings = _settings(demo)
    taken = settings["naming_steps"] + settings["align_steps"] + settings["finetune_steps"]
    steps = int(SHARE * taken)
    if steps < len(STAGES) / min(STAGES.values()):
        raise UserError(f"{demo}: a fifth of its {taken} steps are too few for {len(STAGES)} stages; run the full demo")
    about = {"demo": str(demo), "budget": steps, "of": taken}
    record = open_record(root / RECORD, FORMAT, about, "study of students")
    status = Pipeline(stages(root, demo, steps), record, root / RECORD, say).run()
    if status == 0:
        result = collect(demo, root, steps, taken)
        write_json(root / RESULT, result)
        draw(result, root / PICTURE)
        say(f"\nThe students are done ({clock(record['seconds'])}).\n")
        for line in describe(result):
            say(line)
        say(f"\nnumbers  {root / RESULT}\npicture  {root / PICTURE}")
    return status


def _settings(demo: Path) -> dict:
    """The sizes of a finished demo."""
    path = demo / STATE_FILE
    if not path.is_file():
        raise UserError(f"--demo {demo} is no demo's directory; make one with `python -m eval demo`")
    state = read_json(path)
    check_format(state, DEMO_FORMAT, path)
    if not all(step["done"] for step in state["steps"].values()) or not result_paths(
        demo / "tasks" / "transformer", TASK, "none"
    )[0].is_file():
        raise UserError(f"--demo {demo} is not finished; the command that began it goes on")
    return state["settings"]


def collect(demo: Path, root: Path, steps: int, taken: int) -> dict:
    """Accuracy by skill of the teacher and the students, and what each student lacks."""
    teacher = _scores(demo / "tasks" / "transformer")
    rows = {}
    for key, student in STUDENTS.items():
        own = _scores(root / "tasks" / key)
        rows[key] = {
            "title": student.title,
            "skills": {
                skill: {
                    **accuracy(own[skill].values()),
                    "against_teacher": paired_difference(
                        [own[skill][name] for name in scores], list(scores.values())
                    ),
                }
                for skill, scores in teacher.items()
            },
        }
    return {
        "format": FORMAT,
        "steps": steps,
        "of": taken,
        "teacher": {skill: accuracy(scores.values()) for skill, scores in teacher.items()},
        "students": rows,
    }


def _scores(folder: Path) -> dict[str, dict[str, float]]:
    """Skill -> question -> score; the first skill is all of them."""
    scores: dict[str, dict[str, float]] = {ALL: {}}
    for record in read_lines(result_paths(folder, TASK, "none")[0]):
        for skill in (ALL, record["group"]):
            scores.setdefault(skill, {})[record["id"]] = record["score"]
    return scores


def describe(result: dict) -> list[str]:
    """A table in markdown: what the teacher gets right, and how many points more or less each student does."""
    skills = list(result["teacher"])
    lines = [
        f"| after {result['steps']} steps of the twin's {result['of']} | " + " | ".join(skills) + " |",
        "| --- |" + " ---: |" * len(skills),
        "| teacher, percent right | "
        + " | ".join(f"{100 * result['teacher'][skill]['accuracy']:.1f}" for skill in skills)
        + " |",
    ]
    for student in result["students"].values():
        cells = []
        for skill in skills:
            found = student["skills"][skill]["against_teacher"]
            half = found["high"] - found["difference"]
            mark = "" if found["difference"] >= -BAR else " *"
            cells.append(f"{100 * found['difference']:+.1f} ± {100 * half:.1f}{mark}")
        lines.append(f"| {student['title']} | " + " | ".join(cells) + " |")
    told = f"Points against the teacher, 95 percent intervals over questions; *: worse by more than {100 * BAR:.0f}."
    return [*lines, "", told]


def draw(result: dict, path: Path) -> None:
    """Points against the teacher, a panel for each skill."""
    import matplotlib
    from matplotlib.figure import Figure

    from eval.ablations.plots import COLOURS, STYLE

    skills, students = list(result["teacher"]), list(result["students"].values())
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(2.6 + 1.35 * len(skills), 1.2 + 0.34 * len(students)), layout="constrained")
        figure.set_facecolor("white")
        panels = figure.subplots(1, len(skills), sharey=True, sharex=True)
        for axes, skill in zip(panels, skills, strict=True):
            axes.axvspan(-100 * BAR, 100 * BAR, color="#e3e6ea", linewidth=0)
            axes.axvline(0, color="#8a8f98", linewidth=1)
            for row, student in enumerate(students):
                found = student["skills"][skill]["against_teacher"]
                low, middle, high = (100 * found[name] for name in ("low", "difference", "high"))
                colour = COLOURS[row % len(COLOURS)]
                axes.plot([low, high], [row, row], color=colour, linewidth=2)
                axes.plot([middle], [row], "o", color=colour, markersize=5)
            axes.set_title(f"{skill}\nteacher {100 * result['teacher'][skill]['accuracy']:.0f} %", fontsize="medium")
        panels[0].set_yticks(range(len(students)), [student["title"] for student in students])
        panels[0].invert_yaxis()
        figure.supxlabel(
            f"points against the teacher (band: {100 * BAR:.0f}), after {result['steps']} of its {result['of']} steps",
            fontsize="medium",
        )
        figure.savefig(path, dpi=140)
