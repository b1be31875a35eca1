"""A study on paper: its trials, and results as if they had been trained."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from eval.ablations.small_models import PLANE
from eval.ablations.trials import DATA, Stage, Study, Trial
from eval.files import write_json

LEVELS = ("raster", "random", "hilbert", "cross4")
PLACES = ("connector", "reading")
CHANCE = {"colour": 0.25, "trace": 0.5}


def make_trial(place: str, order: str, seed: int, positions: str = "no") -> Trial:
    order = f"random(seed={seed})" if order == "random" else order
    factors = {"place": place, "positions": positions, "order": order}
    return Trial(factors=factors, seed=seed, tower="patch", settings=())


def make_study(seeds: int = 8, levels: tuple[str, ...] = LEVELS, places: tuple[str, ...] = PLACES) -> Study:
    """The main cells without positions; with positions two seeds, of raster and random."""
    main = [make_trial(place, order, seed) for seed in range(seeds) for place in places for order in levels]
    others = [make_trial(place, order, seed, "yes") for seed in range(2) for place in places for order in levels[:2]]
    return Study(
        name="orders", about="Does it matter?", version=3, benchmark=PLANE, pictures={}, towers={"patch": ()},
        tower_stage=Stage(data="plane", steps=1), course=(Stage(data="plane", steps=1),), trials=[*main, *others],
        factor="order", baseline="raster", main={"positions": "no"}, control=("random", "trace"),
    )  # fmt: skip


def make_result(study: Study, trial: Trial, accuracy: Mapping[str, float], **changes) -> dict:
    """As run_trial writes it."""
    return {
        "study": study.name, "version": study.version, "name": trial.name, "factors": dict(trial.factors),
        "seed": trial.seed, "accuracy": dict(accuracy), "questions": dict.fromkeys(accuracy, 400),
        "parameters": 150_000 + 480 * ("cross4" in trial.name),
        "flops": 9_000_000 + 500_000 * ("reading" in trial.name),
        "losses": [0.5], "seconds": 90.0, "commit": "abc123", **changes,
    }  # fmt: skip


def make_results(
    study: Study, effects: Mapping[tuple[str, str], float], base: Mapping[str, float], spread: float = 0.01
) -> list[dict]:
    """Those of all trials: `base` accuracy of each task, plus what a level adds to a task, plus what a seed does."""
    results = []
    for trial in study.trials:
        order, draw = trial.factors["order"].partition("(")[0], np.random.default_rng([trial.seed, 7])
        own = np.random.default_rng([trial.seed, LEVELS.index(order), len(trial.factors["place"])])
        accuracy = {
            task: min(1.0, value + effects.get((order, task), 0.0) + draw.normal(0, 0.03) + own.normal(0, spread))
            for task, value in base.items()
        }
        results.append(make_result(study, trial, accuracy))
    return results


def write_chance(output: Path, chance: Mapping[str, float] = CHANCE) -> None:
    write_json(output / DATA / "plane" / "meta.json", {"chance": dict(chance)})
