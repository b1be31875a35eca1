"""Statistics of a study, beside scipy's, a brute force, numbers by hand and simulated studies of known truth."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from eval.ablations.contrasts import Scores, contrast, friedman, gather, holm, interval, level_name

CELL = (("place", "tower"),)


def scores(**levels: dict[int, float]) -> Scores:
    return Scores(cell=CELL, task="trace", levels=levels, chance=0.5)


def by_seed(values) -> dict[int, float]:
    return dict(enumerate(values))


def drawn(seed: int, num_seeds: int, *means: float, spread: float = 0.03) -> list[np.ndarray]:
    """Accuracies of levels, of which those of one seed have something in common."""
    draw = np.random.default_rng(seed)
    common = draw.normal(0, 0.05, num_seeds)
    return [mean + common + draw.normal(0, spread, num_seeds) for mean in means]


@pytest.mark.parametrize("num_seeds", [2, 3, 8, 20])
@pytest.mark.parametrize("difference", [0.0, 0.02, -0.1])
def test_a_contrast_is_the_paired_test_of_scipy(num_seeds, difference):
    one, other = drawn(num_seeds, num_seeds, 0.7 + difference, 0.7)
    found = contrast(scores(a=by_seed(one), b=by_seed(other)), "a", "b")
    expected = stats.ttest_rel(one, other)
    bounds = expected.confidence_interval(0.95)
    assert found.p == pytest.approx(expected.pvalue, rel=1e-9)
    assert (found.low, found.high) == pytest.approx((bounds.low, bounds.high), rel=1e-9)
    assert found.difference == pytest.approx((one - other).mean()) and found.num_seeds == num_seeds
    assert (found.cell, found.task, found.level) == (CELL, "trace", "a")


def test_a_contrast_by_hand():
    """Differences 1, 2, 3 and 6 points: mean 3, variance 14/3, error 1.0801; t 2.7775 against 3.1824 at 3 degrees."""
    found = contrast(
        scores(a=by_seed([0.61, 0.52, 0.73, 0.86]), b=by_seed([0.60, 0.50, 0.70, 0.80])), "a", "b"
    )
    assert 100 * found.difference == pytest.approx(3)
    assert 100 * found.error == pytest.approx(math.sqrt(14 / 3 / 4))
    assert (100 * found.low, 100 * found.high) == pytest.approx((3 - 3.43741, 3 + 3.43741), abs=1e-4)
    assert found.p == pytest.approx(0.06909, abs=1e-4)
    assert 100 * found.detectable == pytest.approx(1.0801 * (3.18245 + 0.97847), abs=1e-3)


def test_pairs_are_the_seeds_that_both_have():
    one, other = {0: 0.6, 2: 0.7, 3: 0.9, 5: 0.8}, {5: 0.7, 1: 0.1, 3: 0.75, 0: 0.55}
    found = contrast(scores(a=one, b=other), "a", "b")
    assert found.num_seeds == 3
    assert found.p == pytest.approx(stats.ttest_rel([0.6, 0.9, 0.8], [0.55, 0.75, 0.7]).pvalue)
    assert contrast(scores(a={0: 0.6}, b={1: 0.6}), "a", "b") is None
    assert contrast(scores(a={0: 0.6}), "a", "b") is None


def test_one_seed_has_a_difference_and_nothing_else():
    found = contrast(scores(a={4: 0.8}, b={4: 0.7}), "a", "b")
    assert found.difference == pytest.approx(0.1) and found.num_seeds == 1
    assert all(math.isnan(value) for value in (found.low, found.high, found.p, found.detectable))


@pytest.mark.parametrize("values", [(0.5, 0.5), (1.0, 1.0, 1.0), (0.3, 0.9, 0.1)])
def test_equal_scores_are_no_difference(values):
    found = contrast(scores(a=by_seed(values), b=by_seed(values)), "a", "b")
    assert (found.difference, found.low, found.high, found.p, found.detectable) == (0, 0, 0, 1, 0)


@pytest.mark.parametrize("pairs", [[(0.55, 0.5), (0.6, 0.55)], [(0.8, 0.5), (0.7, 0.4), (0.4, 0.1)]], ids=str)
def test_differences_that_are_the_same_by_chance_are_no_certainty(pairs):
    """Student's t would give them p = 0, or 1e-15 for the rounding of 0.55 - 0.5, which survives any number of
    contrasts; of two seeds on 400 questions, one pair in 30 does that."""
    one, other = zip(*pairs, strict=True)
    found = contrast(scores(a=by_seed(one), b=by_seed(other)), "a", "b")
    assert found.difference == pytest.approx(one[0] - other[0])
    assert all(math.isnan(value) for value in (found.p, found.low, found.high, found.detectable))


def brute_force_holm(p_values: list[float]) -> list[float]:
    """The closed test: a hypothesis falls if Bonferroni rejects every set of hypotheses that it is in."""
    indices = range(len(p_values))
    sets = [group for size in range(1, len(p_values) + 1) for group in itertools.combinations(indices, size)]
    of_set = {group: min(1.0, len(group) * min(p_values[i] for i in group)) for group in sets}
    return [max(p for group, p in of_set.items() if i in group) for i in indices]


def test_holm_is_the_closed_test_of_bonferroni():
    draw = np.random.default_rng(0)
    for size in (1, 2, 3, 5, 7):
        for scale in (0.01, 0.2, 1.0):
            p_values = (scale * draw.uniform(size=size)).round(3).tolist()  # some are tied
            assert holm(p_values) == pytest.approx(brute_force_holm(p_values)), p_values


def test_holm_by_hand():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.9, 0.6]) == [1.0, 1.0]
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([]) == []


@pytest.mark.parametrize(("num_seeds", "family"), [(8, 1), (8, 12), (4, 1), (20, 40)])
def test_the_detectable_difference_is_found_four_times_of_five(num_seeds, family):
    """Of 4000 studies with that true difference and the true spread; p of the first of Holm's steps."""
    draw, spread = np.random.default_rng(num_seeds + family), 0.04
    error = spread / math.sqrt(num_seeds)
    made = contrast(scores(a=by_seed([0.1, 0.2]), b=by_seed([0.0, 0.0])), "a", "b")
    true = replace(made, num_seeds=num_seeds, error=error, family=family).detectable
    differences = draw.normal(true, spread, (4000, num_seeds))
    p = stats.ttest_1samp(differences, 0, axis=1).pvalue
    found = float((p < 0.05 / family).mean())
    assert 0.74 < found < 0.86
    smaller = stats.ttest_1samp(differences - true / 2, 0, axis=1).pvalue
    assert float((smaller < 0.05 / family).mean()) < 0.5


def test_intervals_hold_the_truth_in_95_percent():
    draw = np.random.default_rng(1)
    found = [interval(draw.normal(0.3, 0.1, 5).tolist()) for _ in range(2000)]
    covered = np.mean([low <= 0.3 <= high for _, low, high in found])
    assert 0.93 < covered < 0.97
    assert interval([0.4]) == (0.4, pytest.approx(math.nan, nan_ok=True), pytest.approx(math.nan, nan_ok=True))


def test_friedman_is_that_of_scipy():
    for seed, num_seeds in ((0, 2), (1, 5), (2, 8)):
        rows = [row.round(2) for row in drawn(seed, num_seeds, 0.7, 0.72, 0.65, 0.7)]
        found = friedman(scores(**{name: by_seed(row) for name, row in zip("abcd", rows, strict=True)}))
        assert found == (pytest.approx(stats.friedmanchisquare(*rows).pvalue), 4, num_seeds)


def test_friedman_by_hand():
    """Ranks 1, 2, 3 in each of 4 seeds: chi square (4**2 + 8**2 + 12**2) / 4 - 3 * 4 * 4 = 8, p e**-4."""
    a, b, c = (by_seed([rank + common for common in (0, 5, 2, 9)]) for rank in range(3))
    found = friedman(scores(a=a, b=b, c=c))
    assert found == (pytest.approx(math.exp(-4)), 3, 4)


def test_friedman_takes_the_seeds_that_all_levels_have():
    a, b, c = (by_seed(row.tolist()) for row in drawn(0, 6, 0.7, 0.6, 0.65))
    full = friedman(scores(a=a, b=b, c=c))
    assert full[1:] == (3, 6)
    assert friedman(scores(a={**a, 9: 0.1}, b=b, c={**c, 8: 0.1})) == full
    assert friedman(scores(a=a, b=b, c={3: 0.5, 4: 0.6}))[1:] == (3, 2)


def test_friedman_says_nothing_of_one_seed_or_two_levels():
    assert math.isnan(friedman(scores(a={0: 0.5}, b={0: 0.6}, c={0: 0.7}))[0])
    assert math.isnan(friedman(scores(a=by_seed([0.5, 0.7]), b=by_seed([0.4, 0.6])))[0])


def test_friedman_of_equal_scores_finds_no_difference():
    equal = by_seed([0.5, 0.7, 0.6])
    assert friedman(scores(a=equal, b=equal, c=equal))[0] == 1.0


def result(place: str, order: str, seed: int, **accuracy: float) -> dict:
    return {"factors": {"place": place, "order": order}, "seed": seed, "accuracy": accuracy}


def test_scores_are_gathered_by_cell_and_task():
    results = [
        result("tower", "raster", 0, colour=0.9, trace=0.5),
        result("tower", "random(seed=0)", 0, colour=0.8, trace=0.4),
        result("tower", "random(seed=1)", 1, colour=0.7, trace=0.3),
        result("reading", "raster", 0, colour=0.6, trace=0.2),
    ]
    found = gather(results, "order", {"colour": 0.25, "trace": 0.5})
    assert [(one.cell, one.task) for one in found] == [
        ((("place", place),), task) for place in ("tower", "reading") for task in ("colour", "trace")
    ]
    assert found[0].levels == {"raster": {0: 0.9}, "random": {0: 0.8, 1: 0.7}}
    assert found[0].chance == 0.25 and found[0].counts and not found[1].counts


def test_options_of_an_order_are_part_of_the_level():
    """Windows of 2 and of 3 cells are two orders, not one with half of its scores overwritten."""
    results = [result("tower", f"local(window={window})", 0, trace=window / 10) for window in (2, 3)]
    (found,) = gather(results, "order", {"trace": 0.3})
    assert found.levels == {"local(window=2)": {0: 0.2}, "local(window=3)": {0: 0.3}}
    assert level_name("random(seed=12)") == "random" and level_name("spiral") == "spiral"
