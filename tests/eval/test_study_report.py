"""What a study's report concludes of results whose truth is known, and that it is whole."""

import math
import re
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from eval.ablations import report
from eval.ablations.report import UNFINISHED, analyse, conclude, render
from tests.eval.fake_study import CHANCE, make_results, make_study, write_chance

EASY = {"colour": 0.7, "trace": 0.8}
CONTROL = {("random", "trace"): -0.12}


def said(effects, base=EASY, study=None, spread=0.01, keep=lambda result: True) -> str:
    study = study or make_study()
    results = [result for result in make_results(study, effects, base, spread) if keep(result)]
    return " ".join(conclude(study, analyse(study, results, CHANCE)))


def test_main_cells_are_judged_together_and_others_apart():
    study = make_study()
    found = analyse(study, make_results(study, CONTROL, EASY), CHANCE)
    assert len(found.main) == 2 * 2 * 3 and {one.family for one in found.main} == {12}
    assert {dict(one.cell)["positions"] for one in found.main} == {"no"}
    assert all(one.level != "raster" for one in (*found.main, *found.others))
    assert len(found.others) == 2 * 2 and all(math.isnan(one.p_holm) for one in found.others)
    assert {one.num_seeds for one in found.others} == {2} and {one.num_seeds for one in found.main} == {8}
    assert all(one.p <= one.p_holm <= 1 for one in found.main)


def test_a_control_that_is_found_is_said_first():
    text = said(CONTROL)
    assert text.startswith("The positive control (random against raster on trace) is detected wherever it was looked")
    assert "Found in the main cell, after Holm over 12 contrasts: random -1" in text
    assert "Of the others, 10 of 10 are within 3 points by their whole interval, which can be called equal." in text
    assert "About the rest" not in text and "NOT" not in text and "Not judged" not in text


def test_a_control_that_is_not_found_takes_everything_back():
    text = said({("cross4", "colour"): 0.2})
    assert "is NOT detected" in text and "nothing follows from it" in text
    assert "cross4 +2" in text or "cross4 +1" in text


def test_a_control_the_other_way_round_is_none():
    assert "is NOT detected" in said({("random", "trace"): 0.12})


def test_a_control_that_is_found_in_one_place_says_in_how_many():
    study = make_study()
    results = make_results(study, CONTROL, EASY)
    for result in results:
        if result["factors"]["place"] == "reading" and result["factors"]["order"].startswith("random"):
            result["accuracy"]["trace"] += 0.12
    text = " ".join(conclude(study, analyse(study, results, CHANCE)))
    assert "is detected in 1 of 2 places" in text and "random" in text


@pytest.mark.parametrize(
    "settings",
    [
        {"base": {"colour": 0.7, "trace": 0.6}},  # hardly above chance
        {"study": make_study(seeds=1)},
        {"keep": lambda result: not result["factors"]["order"].startswith("random")},
        {"keep": lambda result: False},
    ],
)
def test_a_control_that_cannot_be_judged_warns(settings):
    text = said(CONTROL, **settings)
    assert "cannot be judged yet: nothing below is to be relied on" in text


def test_a_task_that_is_not_solved_is_named_and_not_judged():
    text = said(CONTROL, base={"colour": 0.4, "trace": 0.8})
    assert "Not judged, because models are less than 20 points above chance there: colour (place connector" in text
    assert " on colour" not in text and "after Holm over 6 contrasts" in text


def test_nothing_found_says_how_small_a_difference_would_have_been():
    study = replace(make_study(), control=None)
    text = said({}, study=study, spread=0.05)
    assert "After Holm, none of the 12 contrasts of the main cell is significant." in text
    assert re.search(r"Of these, \d+ of 12 are within 3 points", text)
    (least, most) = re.search(r"a true difference of (\S+) to (\S+) points", text).groups()
    results = analyse(study, make_results(study, {}, EASY, 0.05), CHANCE).main
    rest = [one.detectable for one in results if max(abs(one.low), abs(one.high)) > 0.03]
    assert (float(least), float(most)) == pytest.approx((100 * min(rest), 100 * max(rest)), abs=0.051)


def test_of_two_seeds_no_difference_would_have_been_found():
    """Where the spread asks for more points than there are, no number of them is given."""
    text = said({}, study=make_study(seeds=2), spread=0.2)
    assert "with so few seeds, no difference would have been found" in text and "true difference" not in text


def test_a_study_that_is_not_finished_says_so():
    study = make_study()
    results = make_results(study, CONTROL, EASY)
    for number, is_finished in ((len(results), True), (len(results) - 1, False)):
        text = render(study, analyse(study, results[:number], CHANCE), results[:number], [])
        assert (UNFINISHED in text) != is_finished


def test_everything_found_leaves_no_others():
    effects = {(level, task): -0.1 for level in ("random", "hilbert", "cross4") for task in EASY}
    text = said(effects)
    assert "after Holm over 12 contrasts" in text and "Of the others" not in text and "Of these" not in text
    assert text.count("; ") >= 11


def test_contrasts_of_one_seed_stand_in_the_table_and_count_for_nothing():
    study = make_study()
    results = make_results(study, CONTROL, EASY)
    few = [one for one in results if not (one["factors"]["order"] == "cross4" and one["seed"])]
    found = analyse(study, few, CHANCE)
    assert len(found.main) == 12 and {one.family for one in found.main if one.level != "cross4"} == {8}
    assert all(math.isnan(one.p_holm) for one in found.main if one.level == "cross4")
    assert "after Holm over 8 contrasts" in " ".join(conclude(study, found))


def test_without_control_and_results_nothing_can_be_said():
    study = replace(make_study(), control=None)
    assert said({}, study=study, keep=lambda _: False) == "Too few trials are done to say anything."


def tables(text: str) -> dict[str, list[list[str]]]:
    """Title -> rows of cells, the head first."""
    found: dict[str, list[list[str]]] = {}
    for line in text.splitlines():
        if line.startswith("## "):
            found[line[3:]] = []
        elif line.startswith("|") and not line.startswith("| ---"):
            found[list(found)[-1]].append([cell.strip() for cell in line.strip("|").split("|")])
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    output = tmp_path_factory.mktemp("study")
    study = make_study()
    write_chance(output)
    results = make_results(study, CONTROL, EASY)
    return study, results, output, report.write(study, results, output)


def test_a_report_is_whole(written):
    _, results, output, paths = written
    assert [path.name for path in paths] == ["report.md", "effects.png", "cost.png"]
    text = paths[0].read_text()
    assert "72 of 72 trials are done, version 3, at commit abc123, in 1.8 hours" in text
    assert len((output / "results.jsonl").read_text().splitlines()) == len(results)
    found = tables(text)
    assert list(found) == ["Main cell", "Other cells", "Accuracy", "Cost"]
    assert [len(rows) - 1 for rows in found.values()] == [12, 4, 8, 2 * 4 + 2 * 2]
    for rows in found.values():
        assert len({len(row) for row in rows}) == 1
    assert all(f"![{path.name}]({path.name})" in text for path in paths[1:])


def test_the_tables_say_what_the_results_do(written):
    _, results, _, paths = written
    found = tables(paths[0].read_text())
    scores = {
        level: [
            result["accuracy"]["trace"] for result in results
            if result["factors"]["place"] == "reading" and result["factors"]["positions"] == "no"
            and result["factors"]["order"].startswith(level)
        ]
        for level in ("raster", "random")
    }  # fmt: skip
    (row,) = (row for row in found["Accuracy"] if row[:2] == ["place reading, positions no", "trace"])
    head = found["Accuracy"][0]
    for level, values in scores.items():
        assert row[head.index(level)].startswith(f"{100 * np.mean(values):.1f} ± ")
    assert row[2] == "50" and float(row[-1]) < 0.05
    (row,) = (row for row in found["Main cell"] if row[:3] == ["place reading, positions no", "trace", "random"])
    difference = 100 * (np.mean(scores["random"]) - np.mean(scores["raster"]))
    assert row[3] == "8" and row[4] == f"{difference:+.1f}" and float(row[-1]) < 0.001
    assert ["place connector, positions no", "cross4", "150,480", "9,000,000"] in found["Cost"]


def test_pictures_have_ink_in_every_panel_and_nothing_at_their_edges(written):
    """Labels that are cut off would touch the edge."""
    *_, paths = written
    for path in paths[1:]:
        pixels = np.asarray(Image.open(path).convert("L"))
        assert pixels.shape[1] > 400 and (pixels < 128).mean() > 0.002
        assert all((edge > 250).all() for edge in (pixels[:2], pixels[-2:], pixels[:, :2], pixels[:, -2:])), path.name


def test_a_report_of_one_trial_or_none_is_written(tmp_path):
    study = make_study()
    write_chance(tmp_path)
    results = make_results(study, CONTROL, EASY)
    for count in (0, 1, 5):
        paths = report.write(study, results[:count], tmp_path)
        text = paths[0].read_text()
        assert f"{count} of 72 trials are done" in text and "nan" not in text
        pictures = {0: [], 1: ["cost.png"], 5: ["effects.png", "cost.png"]}[count]
        assert [path.name for path in paths] == ["report.md", *pictures]
        assert list(tables(text)) == {0: [], 1: ["Accuracy", "Cost"], 5: ["Main cell", "Accuracy", "Cost"]}[count]
