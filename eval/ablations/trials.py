"""One trial of a study: a model is trained stage by stage, and scored. The only importer of train."""

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import cobra
from cobra.cost import LMCost, tile_work
from cobra.model import Cobra
from eval import runner
from eval.environment import commit
from eval.files import read_lines, write_json
from eval.tasks import TASKS
from train.processes import choose_device
from train.recipes import RECIPES
from train.run import run
from train.settings import RunConfig, change
from vision_scan.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A stretch of training.

    Attributes:
        data: name of a set of pictures of the study.
        steps: of the optimizer.
        settings: as `--set` takes them, besides those of the study.
    """

    data: str
    steps: int
    settings: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A model to train and to score.

    Attributes:
        factors: what a study compares by, name -> level; with the seed they name the trial.
        seed: of weights, order of the rows and dropout; trials of equal seed see the same batches.
        tower: the pretrained tower that it begins with, a key of `Study.towers`.
        settings: what makes the model, as `--set` takes it.
        fresh: modules of the tower that begin at random, because they are what is compared.
        sets: name of a set of pictures in the course -> the one that this trial has in its place, in training and in
            scoring; those that are not named stay.
    """

    factors: Mapping[str, str]
    seed: int
    tower: str
    settings: tuple[str, ...]
    fresh: tuple[str, ...] = ()
    sets: Mapping[str, str] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """A folder's name."""
        levels = [level.translate(str.maketrans("(=", "--", ")")) for level in self.factors.values()]
        return "_".join([*levels, f"seed{self.seed}"])

    def set_for(self, name: str) -> str:
        """The set of pictures that it has where the course says `name`."""
        return self.sets.get(name, name)


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    """What models of a study learn from and are scored by.

    Attributes:
        task: of eval.tasks, whose samples score.
        scored: name of the set of pictures that these are of.
        build: (folder, arguments of a set, called after every picture) -> draws the set.
        count: arguments of a set -> how many pictures that are.
    """

    task: str
    scored: str
    build: Callable[[Path, Mapping[str, Any], Callable[[int, int], None]], object]
    count: Callable[[Mapping[str, Any]], int]


@dataclass(frozen=True, kw_only=True)
class Study:
    """What is compared, and how.

    Attributes:
        name, about: of the command line.
        version: of everything that decides a score; results of another version are not mixed in.
        benchmark: what pictures and questions there are.
        pictures: name of a set of pictures -> arguments of its `build`.
        towers: name of a pretrained tower -> its settings.
        tower_stage: how towers are pretrained, all alike.
        course: the stages of a trial.
        trials: in the order in which they are run, those that matter most first.
        factor, baseline: what is compared, and the level that the others are held against.
        main: levels of other factors that make the main cells, whose p values are adjusted together.
        control: level and task in which a difference must be found, else the study cannot find any; None: none.
        plots: name of a picture of the report, beside those of all studies -> (results, file) -> draws it.
    """

    name: str
    about: str
    version: int
    benchmark: Benchmark
    pictures: Mapping[str, Mapping[str, Any]]
    towers: Mapping[str, tuple[str, ...]]
    tower_stage: Stage
    course: tuple[Stage, ...]
    trials: Sequence[Trial]
    factor: str
    baseline: str
    main: Mapping[str, str]
    control: tuple[str, str] | None = None
    plots: Mapping[str, Callable[[Sequence[Mapping], Path], None]] = field(default_factory=dict)

    def is_main(self, factors: Mapping[str, str]) -> bool:
        """Whether a cell, or a trial, has the levels that the main cells have."""
        return all(factors.get(name) == level for name, level in self.main.items())


RESULTS, DATA, TOWERS, WORK = "results", "data", "towers", "work"  # folders of a study's output


def pretrain(study: Study, name: str, output: Path) -> None:
    """Trains a tower on what stands in each patch, unless it is there; trials share it."""
    place = output / TOWERS / name
    if (place / cobra.checkpoint.CONFIG).exists():
        return
    draft = output / WORK / f"tower-{name}"
    shutil.rmtree(draft, ignore_errors=True)
    settings = (*study.towers[name], *study.tower_stage.settings, "train.seed=0")
    if not run(_config("tiny-tower", settings, study.tower_stage, output), draft):
        raise KeyboardInterrupt  # told to stop: half a tower is none
    place.parent.mkdir(parents=True, exist_ok=True)
    draft.rename(place)


def run_trial(study: Study, trial: Trial, output: Path) -> dict:
    """Trains and scores one model; its result is written to RESULTS/NAME.json, the model is not kept.

    Returns:
        The result: factors, seed, accuracy and number of questions of each kind, what else the benchmark tells,
        parameters, operations of a forward pass over one row, losses of the stages' last tenths, seconds, commit.
    """
    began = time.monotonic()
    folder = output / WORK / trial.name
    shutil.rmtree(folder, ignore_errors=True)
    origin, losses = None, []
    for number, stage in enumerate(study.course):
        if origin is None:
            fresh = f"init.fresh={','.join(trial.fresh)}"
            start = (f"init.path={output / TOWERS / trial.tower}", "init.parts=vision_encoder")
            start = (*start, fresh)
        else:
            start = (f"init.path={origin}",)
        settings = (*start, *trial.settings, *stage.settings, f"train.seed={trial.seed}")
        origin = folder / f"stage-{number}"
        if not run(_config("tiny", settings, replace(stage, data=trial.set_for(stage.data)), output), origin):
            raise KeyboardInterrupt
        losses.append(_last_loss(origin))
    model = cobra.load(origin, choose_device("auto"), dtype="float32")
    task = study.benchmark.task
    samples = TASKS[task].load(output / DATA / trial.set_for(study.benchmark.scored))
    _, scored = runner.run_task(model, task, samples, model_name=trial.name, batch_size=100)
    groups = scored["summary"].pop("groups")
    result = {
        "study": study.name,
        "version": study.version,
        "name": trial.name,
        "factors": dict(trial.factors),
        "seed": trial.seed,
        "accuracy": {kind: row["accuracy"] for kind, row in groups.items()},
        "questions": {kind: row["count"] for kind, row in groups.items()},
        "details": {name: value for name, value in scored["summary"].items() if isinstance(value, dict)},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "flops": _forward_flops(model),
        "losses": losses,
        "seconds": round(time.monotonic() - began, 1),
        "commit": commit(),
    }
    write_json(output / RESULTS / f"{trial.name}.json", result)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def _config(recipe: str, settings: Sequence[str], stage: Stage, output: Path) -> RunConfig:
    """A recipe as a stage asks for it; without checkpoints on the way, since a trial takes minutes."""
    data = output / DATA / stage.data
    if not data.is_dir():
        raise UserError(f"{data} is missing; give the --output of a study, whose pictures are drawn first")
    fixed = (
        f"data.path={data / 'train.json'}",
        f"data.image_root={data / 'images'}",
        "data.check=none",
        "train.engine=plain",
        f"train.steps={stage.steps}",
        f"train.save_every={stage.steps}",
        "train.keep=1",
        f"train.skip_nonfinite={stage.steps}",  # a run that diverges counts with what it scores
        "log.ssm=false",
    )
    return change(RECIPES[recipe](), (*fixed, *settings))


def _last_loss(folder: Path) -> float:
    """Mean loss of the last tenth of the steps."""
    losses = [record["loss"] for record in read_lines(folder / "metrics.jsonl") if "loss" in record]
    last = losses[-max(1, len(losses) // 10) :]
    return round(sum(last) / len(last), 4)


def _forward_flops(model: Cobra) -> int:
    """Operations of reading a picture and 8 tokens of text."""
    tiles = sum(work.weights + work.mixing for work in tile_work(model).values())
    return round(tiles + LMCost(model.config.lm).prefill_flops(model.config.tokens_per_tile + 8))
