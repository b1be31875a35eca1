"""A result of `eval.peers.measure` as a picture."""

import textwrap
from pathlib import Path
from typing import Any

from eval.peers.tables import short

# Colour-blind safe (Okabe & Ito).
COLOURS = {
    "ours": "#0072B2",
    "our torch form": "#56B4E9",
    "llama.cpp": "#E69F00",
    "transformers Mamba-2": "#009E73",
    "transformers Llama": "#CC79A7",
    "published recurrence, taken apart at once": "#000000",
    "published recurrence": "#999999",
}
STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
}
INK, MUTED = "#1b1f24", "#57606a"
# Contest -> what a visit's seconds are drawn as: axis label, and value of (seconds, row).
QUANTITIES = {
    "decode": ("ms per token", lambda seconds, row: 1e3 * seconds / row["batch"]),
    "prefill": ("ms per token", lambda seconds, row: 1e3 * seconds / row["tokens"]),
    "training": ("s per step", lambda seconds, row: seconds),
    "scan_2d": ("ms", lambda seconds, row: 1e3 * seconds),
    "context": ("ms per token", lambda seconds, row: 1e3 * seconds),
}


def draw(result: dict, path: Path) -> None:
    """Writes a .png: for each row that has a time a dot, its median, and a line from quartile to quartile."""
    import matplotlib
    from matplotlib.figure import Figure

    contests = {
        name: [row for row in contest["rows"] if row["seconds"]]
        for name, contest in result["contests"].items()
    }
    heights = [0.26 * len(rows) + 1.1 for rows in contests.values()]
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(8.6, sum(heights) + 0.3), facecolor="white", layout="constrained")
        axes = figure.subplots(len(contests), squeeze=False, height_ratios=heights)
        for (name, rows), panel in zip(contests.items(), axes[:, 0], strict=True):
            _draw_contest(panel, name, result["contests"][name]["title"], rows)
        figure.savefig(path, dpi=150)


def _draw_contest(axes, name: str, title: str, rows: list[dict]) -> None:
    from matplotlib.ticker import LogLocator, NullFormatter

    label, value = QUANTITIES[name]
    places = range(len(rows))
    medians, lows, highs = (
        [value(row["seconds"][key], row) for row in rows] for key in ("median", "q1", "q3")
    )
    colours = [COLOURS.get(row["family"], MUTED) for row in rows]
    axes.hlines(places, lows, highs, color=colours, linewidth=3, alpha=0.5)
    axes.scatter(medians, places, color=colours, s=36, zorder=3)
    for place, median, high, row in zip(places, medians, highs, rows, strict=True):
        wrong = row["check"] and not row["check"]["passed"]
        text = short(median) + (" wrong answers" if wrong else "")
        end = (max(median, high), place)
        axes.annotate(text, end, (5, 0), textcoords="offset points", va="center", fontsize=8)
    axes.set(xscale="log", xlim=(0.7 * min(lows, default=1.0), 2.2 * max(highs, default=10.0)))
    axes.set_xlabel(f"{label}, log scale: further left is faster")
    axes.set_yticks(places, [row["name"] for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.tick_params(axis="x", which="both", colors=MUTED)
    axes.xaxis.label.set_color(MUTED)
    low, high = axes.get_xlim()
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,)))
    axes.xaxis.set_major_formatter(lambda tick, _: f"{tick:g}")
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="both", color="#d8dee4", linewidth=0.7)
    axes.set_title(textwrap.fill(title, 42), loc="left", fontsize=10.5, color=INK)
