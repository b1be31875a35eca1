"""Pictures of runs."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from train.metrics import METRICS, Record, read_metrics
from train.progress import short_count
from vision_scan.errors import UserError

MOST_RUNS = 6
COLUMNS = 3
NAME_LENGTH = 36  # characters of a run in the legend
# Okabe and Ito 2008, without yellow: told apart by colour-blind readers, and on paper.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
GREY = "#5f6368"


@dataclass(frozen=True)
class Panel:
    """One curve of each run.

    Attributes:
        key: of the records.
        title: with the unit.
        is_noisy: every record faintly, a running mean on top.
        has_marks: a mark at each record, of which there are few.
        may_be_log: a logarithmic axis where values differ more than tenfold; otherwise the axis begins at 0.
        form: how the axis writes a value.
    """

    key: str
    title: str
    is_noisy: bool = False
    has_marks: bool = False
    may_be_log: bool = False
    form: Callable[[float], str] = "{:g}".format


PANELS = (
    Panel("loss", "training loss", is_noisy=True, may_be_log=True),
    Panel("val_loss", "validation loss", has_marks=True, may_be_log=True),
    Panel("lr", "learning rate"),
    Panel("grad_norm", "gradient norm", is_noisy=True, may_be_log=True),
    Panel("tokens_per_s", "tokens per second", is_noisy=True, form=short_count),
    Panel("mfu", "model FLOPs utilisation", is_noisy=True, form=lambda share: f"{100 * share:.3g}%"),
)


def plot_runs(runs: Sequence[Path], path: Path, window: int | None = None) -> None:
    """Draws the curves of runs into one picture, a panel for each quantity that any of them has recorded.

    Args:
        runs: output directories, 1 to 6.
        path: the picture; its suffix decides the format.
        window: records in the running mean; None: a fiftieth of the run's, at least 5.
    Raises:
        UserError: if there are too many runs, a run has no records, or matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError("plotting needs matplotlib: pip install 'cobra-vlm[eval]'") from error
    if len(runs) > MOST_RUNS:
        raise UserError(f"{len(runs)} runs to plot, allowed: 1 to {MOST_RUNS}; draw some of them in another picture")
    curves = dict(zip(short_names(runs), map(_read, runs), strict=True))
    panels = [panel for panel in PANELS if any(panel.key in r for records in curves.values() for r in records)]
    columns = min(COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(max(4.2 * columns, 6.0), 2.9 * rows + 0.5), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
    for axes in grid.flat[len(panels) :]:
        axes.remove()
    for panel, axes in zip(panels, grid.flat, strict=False):
        for colour, records in zip(COLOURS, curves.values(), strict=False):
            _draw(axes, panel, records, colour, window)
        _dress(axes, panel, is_last=panel in panels[-columns:])
    _add_legend(figure, list(curves))
    figure.savefig(path, dpi=160)


def _read(run: Path) -> list[Record]:
    records = read_metrics(run)
    if not records:
        raise UserError(f"{run} has no records ({METRICS} is missing or empty)")
    return records


def _draw(axes: Any, panel: Panel, records: list[Record], colour: str, window: int | None) -> None:
    points = [(record["step"], record[panel.key]) for record in records if panel.key in record]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    if not panel.is_noisy:
        is_marked = panel.has_marks or len(points) == 1
        axes.plot(steps, values, color=colour, lw=1.6, marker="o" if is_marked else None, ms=3.5)
        return
    means = running_means(values, window or max(5, len(values) // 50))
    axes.plot(steps, values, color=colour, alpha=0.22, lw=0.7)
    axes.plot(steps, means, color=colour, lw=1.6, marker="o" if len(points) == 1 else None, ms=3.5)


def _dress(axes: Any, panel: Panel, is_last: bool) -> None:
    """Title, scale, limits and ticks."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    axes.set_title(panel.title, loc="left", fontsize=10, color="#202124")
    axes.set_xlabel("step" if is_last else "", fontsize=9, color=GREY)
    low, high = _limits(axes)
    if panel.may_be_log and 0 < 10 * low < high:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.1, 1.1 * high)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        margin = 0.06 * (high - low) or 0.06 * abs(high) or 1.0
        axes.set_ylim(low - margin if panel.may_be_log else min(0.0, low), high + margin)
        axes.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: panel.form(value)))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, steps=[1, 2, 5, 10]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, place: short_count(value)))
    axes.grid(True, color="#e8eaed", lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(labelsize=8, colors=GREY, length=0, labelbottom=is_last)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#bdc1c6")


def _limits(axes: Any) -> tuple[float, float]:
    """The range of all curves, but the middle 98 percent only of those that are drawn faintly."""
    lows: list[float] = []
    highs: list[float] = []
    for line in axes.get_lines():
        values = sorted(value for value in line.get_ydata() if math.isfinite(value))
        if values:
            cut = len(values) // 100 if line.get_alpha() is not None else 0
            lows.append(values[cut])
            highs.append(values[-1 - cut])
    return (min(lows), max(highs)) if lows else (0.0, 1.0)


def _add_legend(figure: Any, names: list[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=colour, lw=2.2, label=name) for colour, name in zip(COLOURS, names, strict=False)]
    legend = figure.legend(
        handles=handles, loc="outside upper left", ncols=min(3, len(names)), fontsize=9, frameon=False, handlelength=1.4
    )
    for text in legend.get_texts():
        text.set_color("#202124")


def running_means(values: Sequence[float], window: int) -> list[float]:
    """The mean of each value and of those before it, `window` in all."""
    means, total = [], 0.0
    for index, value in enumerate(values):
        total += value - (values[index - window] if index >= window else 0.0)
        means.append(total / min(index + 1, window))
    return means


def short_names(runs: Sequence[Path]) -> list[str]:
    """What the legend calls runs: their paths without the folders that all of them share, long ones cut in the
    middle."""
    shared = os.path.commonpath([run.absolute().parent for run in runs])
    names = [str(run.absolute().relative_to(shared)) for run in runs]
    return [name if len(name) <= NAME_LENGTH else _cut(name) for name in names]


def _cut(name: str) -> str:
    half = (NAME_LENGTH - 1) // 2
    return name[:half] + "\N{HORIZONTAL ELLIPSIS}" + name[-half:]
