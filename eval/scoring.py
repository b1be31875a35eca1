"""Metrics that benchmarks share: pure functions of answers and scores."""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import TypedDict

Z_95 = 1.959964  # two-sided 95 percent quantile of the normal distribution


class Accuracy(TypedDict):
    """Mean score of `count` answers, with the 95 percent interval of that mean."""

    accuracy: float
    interval: tuple[float, float]
    count: int


def normalise(text: str) -> str:
    """Lower case, single spaces, no space around it, no full stop at its end."""
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").rstrip().lower()


def exact_match(answer: str, truth: str) -> float:
    """1.0 if answer and truth are the same after `normalise`, else 0.0."""
    return float(normalise(answer) == normalise(truth))


def wilson_interval(hits: float, count: int) -> tuple[float, float]:
    """95 percent interval of a proportion: sensible for few samples and near 0 and 1.

    Args:
        hits: sum of scores between 0 and 1; for 0/1 scores, the number of successes.
        count: number of samples, at least 1.
    Returns:
        (low, high) in 0..1.
    Raises:
        ValueError: if count is below 1 or hits is outside 0..count.
    Source: Wilson 1927, "Probable inference, the law of succession, and statistical inference".
    """
    if count < 1 or not 0 <= hits <= count:
        raise ValueError(f"{hits} hits of {count}: need count >= 1 and 0 <= hits <= count")
    share = hits / count
    spread = Z_95**2 / count
    centre = share + spread / 2
    half = Z_95 * math.sqrt((share * (1 - share) + spread / 4) / count)
    low, high = (centre - half) / (1 + spread), (centre + half) / (1 + spread)
    return max(0.0, low), min(1.0, high)


def accuracy(scores: Iterable[float]) -> Accuracy:
    """Mean, interval and count of at least one score in 0..1."""
    scores = list(scores)
    interval = wilson_interval(sum(scores), len(scores))
    return Accuracy(accuracy=sum(scores) / len(scores), interval=interval, count=len(scores))


class Difference(TypedDict):
    """Mean difference of two scores of the same `n` samples, with the 95 percent interval of that mean."""

    difference: float
    low: float
    high: float
    n: int


def paired_difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """How much more the first scores, sample by sample; at least one."""
    differences = [one - other for one, other in zip(first, second, strict=True)]
    n = len(differences)
    mean = sum(differences) / n
    half = Z_95 * math.sqrt(sum((difference - mean) ** 2 for difference in differences) / n / n)
    return Difference(difference=mean, low=mean - half, high=mean + half, n=n)


def accuracy_by_group(scores: Iterable[tuple[str, float]]) -> dict[str, Accuracy]:
    """Accuracy of each group from (group, score) pairs, groups in order of appearance."""
    groups: dict[str, list[float]] = defaultdict(list)
    for group, score in scores:
        groups[group].append(score)
    return {group: accuracy(values) for group, values in groups.items()}
