"""A study's pictures: effects with intervals, and accuracy against cost."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib
from matplotlib.figure import Figure

from eval.ablations.contrasts import Contrast, Scores, interval, level_name
from eval.ablations.trials import Study

if TYPE_CHECKING:
    from eval.ablations.report import Analysis

# Colour-blind safe (Okabe & Ito).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e6ea",
}


def draw(study: Study, analysis: "Analysis", results: Sequence[Mapping], output: Path) -> list[Path]:
    """Draws what there is to draw; returns the paths."""
    paths = []
    levels = dict.fromkeys(level for one in analysis.scores for level in one.levels)
    colours = {level: COLOURS[number % len(COLOURS)] for number, level in enumerate(levels)}
    with matplotlib.rc_context(STYLE):
        if analysis.main:
            paths.append(_save(_effects(study, analysis.main, colours), output / "effects.png"))
        if main := [one for one in analysis.scores if study.is_main(dict(one.cell))]:
            paths.append(_save(_costs(study, main, results, colours), output / "cost.png"))
        for name, draw_more in study.plots.items():
            draw_more(results, output / name)
            paths.append(output / name)
    return paths


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140)
    return path


def _effects(study: Study, contrasts: Sequence[Contrast], colours: Mapping[str, str]) -> Figure:
    """A panel for each cell and task: the difference of each level from the baseline."""
    cells = list(dict.fromkeys(one.cell for one in contrasts))
    tasks = list(dict.fromkeys(one.task for one in contrasts))
    levels = list(dict.fromkeys(one.level for one in contrasts))
    size = (2.3 + 2.1 * len(tasks), 0.9 + len(cells) * (0.5 + 0.24 * len(levels)))
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    panels = figure.subplots(len(cells), len(tasks), squeeze=False, sharex=True, sharey=True)
    for row, cell in enumerate(cells):
        for column, task in enumerate(tasks):
            axes = panels[row, column]
            chosen = {one.level: one for one in contrasts if (one.cell, one.task) == (cell, task)}
            axes.axvline(0, color="#57606a", linewidth=1)
            for place, level in enumerate(levels):
                if level in chosen:
                    _draw_effect(axes, place, chosen[level], colours[level])
            if not chosen:
                look = {"ha": "center", "va": "center", "color": "#57606a", "backgroundcolor": "white"}
                axes.text(0.5, 0.5, "not judged", transform=axes.transAxes, **look)
            axes.set_yticks(range(len(levels)), levels)
            axes.set_ylim(len(levels) - 0.5, -0.5)
            if row == 0:
                axes.set_title(task, fontsize=9)
            if column == 0:
                axes.set_ylabel(_title(study, cell), fontsize=9, labelpad=8)
    about = f"points of accuracy against {study.baseline}, 95 percent interval; filled: p (Holm) < 0.05"
    figure.supxlabel(about, fontsize=8)
    return figure


def _draw_effect(axes, place: int, one: Contrast, colour: str) -> None:
    value = 100 * one.difference
    if not math.isnan(one.low):
        axes.plot([100 * one.low, 100 * one.high], [place, place], color=colour, linewidth=2)
    is_found = one.p_holm < 0.05
    axes.plot([value], [place], "o", color=colour, markerfacecolor=colour if is_found else "white", markersize=5)


def _title(study: Study, cell) -> str:
    """The levels in which the main cells differ, or all of a cell's."""
    return ", ".join(level for name, level in cell if name not in study.main) or ", ".join(level for _, level in cell)


def _costs(
    study: Study, scores: Sequence[Scores], results: Sequence[Mapping], colours: Mapping[str, str]
) -> Figure:
    """A panel for each main cell: mean accuracy of all tasks against operations, for each level."""
    cells = list(dict.fromkeys(one.cell for one in scores))
    cost = {}
    for result in results:
        cell = tuple((name, level) for name, level in result["factors"].items() if name != study.factor)
        cost[cell, level_name(result["factors"][study.factor])] = result["flops"] / 1e6
    figure = Figure(figsize=(1.9 + 1.9 * len(cells), 3.2), layout="constrained", facecolor="white")
    panels = figure.subplots(1, len(cells), squeeze=False, sharey=True)[0]
    for axes, cell in zip(panels, cells, strict=True):
        for number, (level, colour) in enumerate(colours.items()):
            found = [one.levels[level] for one in scores if one.cell == cell and level in one.levels]
            if found:
                value = 100 * sum(interval(list(one.values()))[0] for one in found) / len(found)
                look = {"color": colour, "markersize": 7, "alpha": 0.8, "linestyle": ""}
                axes.plot([cost[cell, level]], [value], marker="os^Dv<>P"[number % 8], label=level, **look)
        costs = [cost[cell, level] for level in colours if (cell, level) in cost]
        axes.set_xlim(0.94 * min(costs), 1.06 * max(costs))  # so that what costs the same looks so
        axes.locator_params(axis="x", nbins=4)
        axes.set_title(_title(study, cell), fontsize=9)
    panels[0].set_ylabel("accuracy, mean of the tasks, percent", fontsize=8)
    figure.supxlabel("million operations to read a picture and 8 tokens", fontsize=8)
    known = dict(pair for axes in panels for pair in zip(*axes.get_legend_handles_labels()[::-1], strict=True))
    figure.legend(known.values(), known.keys(), fontsize=8, frameon=False, borderpad=0.8, loc="outside right center")
    return figure
