"""A study's report: one table, plots, and a paragraph that says what can be concluded and what not."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from eval.ablations import plots
from eval.ablations.contrasts import (
    ABOVE_CHANCE,
    Cell,
    Contrast,
    Scores,
    contrast,
    friedman,
    gather,
    holm,
    interval,
    level_name,
)
from eval.ablations.trials import DATA, Study
from eval.files import read_json, write_lines, write_text

NEGLIGIBLE = 0.03  # a difference that nobody would choose by
UNFINISHED = "The study is not finished: what follows is how it stands, and no result of it."


@dataclass(frozen=True, kw_only=True)
class Analysis:
    """What a study's results say.

    Attributes:
        scores: by cell and task.
        main: contrasts of the main cells; those that have a p value are adjusted together.
        others: those of the other cells.
    """

    scores: Sequence[Scores]
    main: Sequence[Contrast]
    others: Sequence[Contrast]


def analyse(study: Study, results: Sequence[Mapping], chance: Mapping[str, float]) -> Analysis:
    """The contrasts of every level against the baseline, in tasks that models solve in a cell at all."""
    scores = gather(results, study.factor, chance)
    found = [
        made
        for one in scores
        if one.counts
        for level in one.levels
        if level != study.baseline and (made := contrast(one, level, study.baseline)) is not None
    ]
    main = [one for one in found if study.is_main(dict(one.cell))]
    others = [one for one in found if not study.is_main(dict(one.cell))]
    judged = [number for number, one in enumerate(main) if not math.isnan(one.p)]
    adjusted = holm([main[number].p for number in judged])
    for number, p in zip(judged, adjusted, strict=True):
        main[number] = replace(main[number], p_holm=p, family=len(judged))
    return Analysis(scores=scores, main=main, others=others)


def write(study: Study, results: Sequence[Mapping], output: Path) -> list[Path]:
    """Writes results.jsonl, report.md and its pictures; returns the report's paths."""
    write_lines(output / "results.jsonl", results)
    chance = read_json(output / DATA / study.benchmark.scored / "meta.json")["chance"]
    analysis = analyse(study, results, chance)
    pictures = plots.draw(study, analysis, results, output)
    text = render(study, analysis, results, [path.name for path in pictures])
    write_text(output / "report.md", text)
    return [output / "report.md", *pictures]


def render(study: Study, analysis: Analysis, results: Sequence[Mapping], pictures: Sequence[str]) -> str:
    """The report as markdown."""
    commits = sorted({str(result["commit"]) for result in results})
    seconds = sum(result["seconds"] for result in results)
    made = f", at commit {', '.join(commits)}, in {seconds / 3600:.1f} hours of one core each" if results else ""
    lines = [
        f"# {study.about}",
        "",
        f"{len(results)} of {len(study.trials)} trials are done, version {study.version}{made}. Differences are in "
        f"points of accuracy, against {study.baseline}, paired by seed, with 95 percent intervals over seeds.",
        "",
        *([] if len(results) == len(study.trials) else [f"{UNFINISHED}\n"]),
        *conclude(study, analysis),
        "",
        *(f"![{name}]({name})\n" for name in pictures),
        *_contrast_table("Main cell", analysis.main, adjusted=True),
        *_contrast_table("Other cells", analysis.others, adjusted=False),
        *_score_table(study, analysis.scores),
        *_cost_table(study, results),
    ]
    return "\n".join(lines).rstrip() + "\n"


def conclude(study: Study, analysis: Analysis) -> list[str]:
    """What can be said, sentence by sentence."""
    said = []
    if study.control is not None:
        said.append(_judge_control(study, analysis))
    judged = [one for one in analysis.main if not math.isnan(one.p_holm)]
    found = [one for one in judged if one.p_holm < 0.05]
    if found:
        listed = "; ".join(_phrase(one) for one in sorted(found, key=lambda one: -abs(one.difference)))
        said.append(f"Found in the main cell, after Holm over {len(judged)} contrasts: {listed}.")
    elif judged:
        said.append(f"After Holm, none of the {len(judged)} contrasts of the main cell is significant.")
    open_ones = [one for one in judged if one.p_holm >= 0.05]
    if open_ones:
        rest = [one for one in open_ones if max(abs(one.low), abs(one.high)) > NEGLIGIBLE]
        said.append(
            f"Of {'the others' if found else 'these'}, {len(open_ones) - len(rest)} of {len(open_ones)} are within "
            f"{100 * NEGLIGIBLE:.0f} points by their whole interval, which can be called equal."
        )
        if rest:
            said.append(_limit(rest))
    left_out = sorted({(one.task, _describe(one.cell)) for one in analysis.scores if not one.counts})
    if left_out:
        listed = "; ".join(f"{task} ({cell})" for task, cell in left_out)
        said.append(
            f"Not judged, because models are less than {100 * ABOVE_CHANCE:.0f} points above chance there: {listed}."
        )
    return said or ["Too few trials are done to say anything."]


def _limit(contrasts: Sequence[Contrast]) -> str:
    """How large a difference would have been found, where none was; accuracies differ by 100 points at most."""
    found = [100 * one.detectable for one in contrasts if one.detectable <= 1]
    if not found:
        return "About the rest nothing is known: with so few seeds, no difference would have been found."
    blind = f"; {len(contrasts) - len(found)} of them could have had any" if len(found) < len(contrasts) else ""
    return (
        f"About the rest nothing is known but that a true difference of {min(found):.1f} to {max(found):.1f} points "
        f"(see the table{blind}) would have been found, after Holm too, with a chance of 80 percent."
    )


def _judge_control(study: Study, analysis: Analysis) -> str:
    level, task = study.control
    found = [one for one in analysis.main if (one.level, one.task) == (level, task) and not math.isnan(one.p_holm)]
    what = f"The positive control ({level} against {study.baseline} on {task})"
    if not found:
        return f"{what} cannot be judged yet: nothing below is to be relied on."
    seen = [one for one in found if one.p_holm < 0.05 and one.difference < 0]
    listed = "; ".join(_phrase(one) for one in found)
    if len(seen) == len(found):
        return f"{what} is detected wherever it was looked for: {listed}."
    if seen:
        return f"{what} is detected in {len(seen)} of {len(found)} places: {listed}."
    return f"{what} is NOT detected ({listed}): this study cannot find anything, and nothing follows from it."


def _phrase(one: Contrast) -> str:
    return (
        f"{one.level} {100 * one.difference:+.1f} ({100 * one.low:+.1f} to {100 * one.high:+.1f}) on {one.task}, "
        f"{_describe(one.cell)}"
    )


def _describe(cell: Cell) -> str:
    return ", ".join(f"{name} {level}" for name, level in cell)


def _number(value: float, form: str = "+.1f", scale: float = 100) -> str:
    return "" if math.isnan(value) else format(scale * value, form)


def _contrast_table(title: str, contrasts: Sequence[Contrast], adjusted: bool) -> list[str]:
    if not contrasts:
        return []
    last = " p (Holm) |" if adjusted else " p |"
    lines = [f"## {title}", "", f"| cell | task | level | seeds | difference | 95 % | detectable |{last}"]
    lines.append("| --- " * 8 + "|")
    for one in contrasts:
        p = one.p_holm if adjusted else one.p
        bounds = "" if math.isnan(one.low) else f"{_number(one.low)} to {_number(one.high)}"
        lines.append(
            f"| {_describe(one.cell)} | {one.task} | {one.level} | {one.num_seeds} | {_number(one.difference)} | "
            f"{bounds} | {_number(one.detectable, '.1f')} | {_number(p, '.3g', 1)} |"
        )
    return [*lines, ""]


def _score_table(study: Study, scores: Sequence[Scores]) -> list[str]:
    if not scores:
        return []
    levels = list(dict.fromkeys(level for one in scores for level in one.levels))
    lines = ["## Accuracy", "", f"Percent, mean over seeds and half of the 95 percent interval, by {study.factor}.", ""]
    lines.append(f"| cell | task | chance | {' | '.join(levels)} | any difference (Friedman p) |")
    lines.append("| --- " * (4 + len(levels)) + "|")
    for one in scores:
        cells = []
        for level in levels:
            values = list(one.levels.get(level, {}).values())
            if not values:
                cells.append("")
                continue
            mean, low, _ = interval(values)
            cells.append(f"{100 * mean:.1f}" + ("" if math.isnan(low) else f" ± {100 * (mean - low):.1f}"))
        p, _, _ = friedman(one)
        lines.append(
            f"| {_describe(one.cell)} | {one.task} | {100 * one.chance:.0f} | {' | '.join(cells)} | "
            f"{_number(p, '.3g', 1)} |"
        )
    return [*lines, ""]


def _cost_table(study: Study, results: Sequence[Mapping]) -> list[str]:
    if not results:
        return []
    costs: dict[tuple[str, str], tuple[int, int]] = {}
    for result in results:
        place = _describe(tuple((n, level) for n, level in result["factors"].items() if n != study.factor))
        level = level_name(result["factors"][study.factor])
        costs[place, level] = result["parameters"], result["flops"]
    lines = ["## Cost", "", "Parameters, and operations of reading a picture and 8 tokens of text.", ""]
    lines += ["| cell | level | parameters | operations |", "| --- " * 4 + "|"]
    lines += [f"| {cell} | {level} | {p:,} | {flops:,} |" for (cell, level), (p, flops) in costs.items()]
    return [*lines, ""]
