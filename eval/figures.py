"""The figures of the report: matplotlib draws them, the page colours them.

Every figure is returned as an SVG string to stand inside HTML. Its colours are placeholders that
become CSS variables (`--ink`, `--series-0`, ...), so that one drawing follows the reader's light or
dark theme; text stays text.
"""

import io
from math import ceil
from typing import Any

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

INK, MUTED, GRID, SURFACE = "#010101", "#020202", "#030303", "#040404"
SERIES = ("#050505", "#060606", "#070707", "#080808")
VARIABLES = {INK: "--ink", MUTED: "--muted", GRID: "--line", SURFACE: "--surface"} | {
    colour: f"--series-{i}" for i, colour in enumerate(SERIES)
}
MARKERS = ("o", "s", "^", "D")
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "cobra",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": GRID,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.7,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "ytick.minor.size": 0,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
}
BARS: dict[Any, Any] = {**STYLE, "axes.grid.axis": "x"}


def loss_curves(runs: dict[str, list[dict]]) -> str:
    """Training loss against steps, log axis; the stages of a run stand one after the other.

    Args:
        runs: model name -> stages, each {"stage": name, "points": [[step, loss], ...]}.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.2))
        axes = figure.subplots()
        for colour, (name, stages) in zip(SERIES, runs.items(), strict=False):
            offset = 0
            for i, stage in enumerate(stages):
                steps = [offset + step for step, _ in stage["points"]]
                losses = [loss for _, loss in stage["points"]]
                axes.plot(steps, losses, color=colour, alpha=0.22, linewidth=1)
                axes.plot(steps, _smooth(losses), color=colour, label=name if i == 0 else None)
                if steps and colour == SERIES[0]:
                    axes.text(
                        (steps[0] + steps[-1]) / 2,
                        1.02,
                        stage["stage"],
                        transform=axes.get_xaxis_transform(),
                        color=MUTED,
                        ha="center",
                    )
                    if i:
                        axes.axvline(offset, color=MUTED, linewidth=0.8, linestyle=(0, (3, 3)))
                offset = steps[-1] if steps else offset
        axes.set(yscale="log", xlabel="step", ylabel="loss per answer token")
        axes.set_yticks(_log_ticks(*axes.get_ylim()))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(loc="upper right")
        return _svg(figure, "Training loss against steps")


def accuracy_bars(rows: list[str], results: dict[str, dict[str, list[dict]]]) -> str:
    """Accuracy per kind of question: a bar per model, inside it the blank-image control, with 95
    percent intervals.

    Args:
        rows: labels, top to bottom.
        results: model name -> {"questions": [...], "control": [...]}, one {"accuracy", "interval"}
            per row, in 0..1.
    """
    with matplotlib.rc_context(BARS):
        figure = Figure(figsize=(5.2, 0.55 * len(rows) + 0.8))
        axes = figure.subplots()
        height = 0.74 / len(results)
        for i, (name, result) in enumerate(results.items()):
            centres = [row - 0.37 + (i + 0.5) * height for row in range(len(rows))]
            bar = {"height": height * 0.86, "color": SERIES[i], "linewidth": 0}
            axes.barh(centres, _percent(result["questions"]), label=name, **bar)
            _whiskers(axes, centres, result["questions"], INK)
            label = "same, blank image" if i == len(results) - 1 else None
            axes.barh(
                centres,
                _percent(result["control"]),
                height=height * 0.86,
                color=SURFACE,
                alpha=0.55,
                linewidth=0,
            )
            axes.barh([-9], [0], color=MUTED, alpha=0.35, label=label)
            _whiskers(axes, centres, result["control"], MUTED)
        axes.set(
            xlim=(0, 100.5),
            ylim=(len(rows) - 0.5, -0.5),
            yticks=range(len(rows)),
            yticklabels=rows,
            xlabel="percent right",
        )
        axes.tick_params(axis="y", labelcolor=INK)
        axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=len(results) + 1)
        return _svg(figure, "Accuracy per kind of question")


def curves_against_context(curves: dict[str, list[dict]], label: str, format_value) -> str:
    """A quantity against context length on log axes, with quartiles where they are known.

    Args:
        curves: model name -> points {"context", "median", and maybe "q1", "q3"}.
        label: what is drawn, with its unit.
        format_value: value -> tick label.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.6, 3.3))
        axes = figure.subplots()
        for colour, marker, (name, points) in zip(SERIES, MARKERS, curves.items(), strict=False):
            contexts = [point["context"] for point in points]
            axes.plot(
                contexts,
                [point["median"] for point in points],
                color=colour,
                marker=marker,
                markersize=5,
                label=name,
            )
            if all("q1" in point for point in points):
                axes.fill_between(
                    contexts,
                    [p["q1"] for p in points],
                    [p["q3"] for p in points],
                    color=colour,
                    alpha=0.2,
                    linewidth=0,
                )
        axes.set(xscale="log", yscale="log", xlabel="tokens of context")
        axes.set_title(label, loc="left", fontsize=10.5, color=INK)
        _context_ticks(axes, sorted({point["context"] for points in curves.values() for point in points}))
        low, high = _decades([point["median"] for points in curves.values() for point in points])
        axes.set_ylim(low, high)
        axes.set_yticks(_log_ticks(low, high))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: format_value(value)))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(loc="upper left")
        return _svg(figure, f"{label} against context length")


def _whiskers(axes, centres: list[float], results: list[dict], colour: str) -> None:
    low, high = zip(*(result["interval"] for result in results), strict=True)
    axes.hlines(
        centres,
        [100 * value for value in low],
        [100 * value for value in high],
        color=colour,
        linewidth=1.6,
    )


def _percent(results: list[dict]) -> list[float]:
    return [100 * result["accuracy"] for result in results]


def _smooth(values: list[float]) -> list[float]:
    """Centred moving average over about a twentieth of the curve."""
    half = max(1, ceil(len(values) / 40))
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def _context_ticks(axes, contexts: list[int]) -> None:
    kept = contexts[:: max(1, ceil(len(contexts) / 7))]
    axes.set_xticks(kept, [f"{c // 1024}k" if c % 1024 == 0 else str(c) for c in kept])
    axes.xaxis.set_minor_locator(NullLocator())


def _decades(values: list[float]) -> tuple[float, float]:
    """Limits that leave the curve room, at least a factor of ten apart so that noise does not look
    like a trend."""
    low, high = min(values) / 1.6, max(values) * 2.2
    return (low, high) if high / low >= 10 else ((low * high / 10) ** 0.5, (low * high * 10) ** 0.5)


def _log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5 times powers of ten between the limits, or powers of ten alone where those would be
    many."""
    powers = [10.0**exponent for exponent in range(-12, 15)]
    ticks = [factor * power for power in powers for factor in (1, 2, 5) if low <= factor * power <= high]
    return ticks if len(ticks) <= 7 else [power for power in powers if low <= power <= high]


def _svg(figure: Figure, title: str) -> str:
    text = io.StringIO()
    figure.savefig(
        text,
        format="svg",
        transparent=True,
        bbox_inches="tight",
        pad_inches=0.04,
        metadata={"Date": None, "Title": title},
    )
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for placeholder, variable in VARIABLES.items():
        svg = svg.replace(placeholder, f"var({variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{title}" ', 1)
