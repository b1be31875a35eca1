"""What a study's scores say: means and paired differences with intervals, and what could have been found."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE, POWER = 0.95, 0.8
LEAST_SPREAD = 1e-9  # standard error of equal differences: what is left of them by rounding
ABOVE_CHANCE = 0.20  # of the best level's mean, below which a task says nothing in a cell

Cell = tuple[tuple[str, str], ...]
"""Levels of the factors but for the compared one, name and level."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Of one task in one cell of the design.

    Attributes:
        cell, task: which.
        levels: level of the compared factor -> seed -> accuracy.
        chance: what guessing from the text scores.
    """

    cell: Cell
    task: str
    levels: Mapping[str, Mapping[int, float]]
    chance: float

    @property
    def counts(self) -> bool:
        """Whether models of one level solve the task here: that those of others learn nothing is a finding too."""
        best = max(float(np.mean(list(scores.values()))) for scores in self.levels.values())
        return best >= self.chance + ABOVE_CHANCE


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """A level against the baseline, paired by seed.

    Attributes:
        difference, low, high: mean of the differences of accuracy and its 95 percent interval (Student's t); without
            bounds (nan) where p is nan.
        num_seeds: pairs.
        error: standard error of the difference; nan with fewer than 2 seeds.
        p: two-sided; nan with fewer than 2 seeds, or if all differences are the same and not 0: of few seeds on few
            questions, such a tie is chance, and no measure of the spread.
        family: how many contrasts are judged together.
        p_holm: after Holm, over the family; nan outside of one.
    """

    cell: Cell
    task: str
    level: str
    difference: float
    low: float
    high: float
    num_seeds: int
    error: float
    p: float
    family: int = 1
    p_holm: float = math.nan

    @property
    def detectable(self) -> float:
        """The smallest true difference that would have been found, among the family, with a chance of 80 percent; given
        the spread between seeds, and as the first of Holm's steps finds it."""
        if math.isnan(self.p):
            return math.nan
        tail, freedom = (1 - CONFIDENCE) / 2 / self.family, self.num_seeds - 1
        return self.error * float(stats.t.isf(tail, freedom) + stats.t.ppf(POWER, freedom))


def level_name(level: str) -> str:
    """A level but for its seed: "random(seed=3)", a shuffle of its own for each seed, is "random"."""
    return re.sub(r"\(seed=\d+\)$", "", level)


def gather(results: Iterable[Mapping], factor: str, chance: Mapping[str, float]) -> list[Scores]:
    """Scores by cell and task, in the order in which they first occur.

    Args:
        results: of trials.
        factor: the one that is compared, see `level_name`.
    """
    found: dict[tuple[Cell, str], dict[str, dict[int, float]]] = defaultdict(lambda: defaultdict(dict))
    for result in results:
        cell = tuple((name, level) for name, level in result["factors"].items() if name != factor)
        level = level_name(result["factors"][factor])
        for task, accuracy in result["accuracy"].items():
            found[cell, task][level][result["seed"]] = accuracy
    return [
        Scores(cell=cell, task=task, levels=dict(levels), chance=chance[task])
        for (cell, task), levels in found.items()
    ]


def interval(values: Sequence[float]) -> tuple[float, float, float]:
    """Mean and its 95 percent interval by Student's t; without bounds (nan) for fewer than 2 values."""
    mean = float(np.mean(values))
    if len(values) < 2:
        return mean, math.nan, math.nan
    half = stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1) * float(np.std(values, ddof=1)) / math.sqrt(len(values))
    return mean, mean - half, mean + half


def contrast(scores: Scores, level: str, baseline: str) -> Contrast | None:
    """A level against the baseline over the seeds that both have; None without any."""
    first, second = scores.levels.get(level, {}), scores.levels.get(baseline, {})
    seeds = sorted(first.keys() & second.keys())
    if not seeds:
        return None
    differences = [first[seed] - second[seed] for seed in seeds]
    mean, low, high = interval(differences)
    error = p = math.nan
    if len(seeds) > 1:
        error = float(np.std(differences, ddof=1)) / math.sqrt(len(seeds))
        if error > LEAST_SPREAD:
            p = float(2 * stats.t.sf(abs(mean) / error, len(seeds) - 1))
        elif abs(mean) <= LEAST_SPREAD:
            p = 1.0
        else:
            low = high = math.nan
    return Contrast(
        cell=scores.cell, task=scores.task, level=level, difference=mean, low=low, high=high,
        num_seeds=len(seeds), error=error, p=p,
    )  # fmt: skip


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusted p values. Source: Holm 1979, "A simple sequentially rejective multiple test procedure"."""
    adjusted, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def friedman(scores: Scores) -> tuple[float, int, int]:
    """Whether the levels differ at all: p of the Friedman test over the seeds that all levels have.

    Returns:
        p (nan with fewer than 2 seeds or 3 levels); levels; seeds.
    """
    seeds = sorted(set.intersection(*(set(level) for level in scores.levels.values())))
    if len(seeds) < 2 or len(scores.levels) < 3:
        return math.nan, len(scores.levels), len(seeds)
    table = [[level[seed] for seed in seeds] for level in scores.levels.values()]
    if all(row == table[0] for row in table):
        return 1.0, len(table), len(seeds)
    return float(stats.friedmanchisquare(*table).pvalue), len(table), len(seeds)
