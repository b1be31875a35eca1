"""How much does a reader of fixed memory still know of one picture among many?

Models read rows of pictures of which one shows a digit (eval/needles.py), and are then asked which. Beside Mamba-2
read its twins: attention to all, attention to a window whose cache is as large as Mamba-2's state, and three layers of
Mamba-2 to one of attention. Half of the models have learned from short rows only, the others from longer ones too; all
are asked about rows that are many times longer than any that they have learned from.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from eval import needles
from eval.ablations.backbones import BASELINE, make_layers
from eval.ablations.plots import STYLE
from eval.ablations.small_models import choose_levels, model_settings
from eval.ablations.trials import Benchmark, Stage, Study, Trial
from eval.environment import num_cores

VERSION = 1  # counts up with everything that changes a score
SEEDS = 3
READERS = (BASELINE, "transformer", "window", "hybrid")
SHORT, LONG = 4, 32  # pictures of the longest rows that are learned from
ROWS = "rows"  # what is learned from in the end, by the name that the course has for it
TRAININGS = {"long": {ROWS: "long"}, "short": {ROWS: "short"}}  # all are scored on rows of all lengths

SIDE = needles.MIN_SIDE
IMAGE = {"height": SIDE, "width": SIDE}
TOWER = {"kind": "small", "patch_size": 4, "d_model": 64, "depth": 2, "num_heads": 4, "stem": "patch"}
CONNECTOR = {"kind": "space_to_depth", "factor": 2}  # 16 tokens of a picture
PICTURES = {
    "alone": {"train": 6000, "test": 1, "longest": 1, "lengths": (1,), "depths": (0.0,)},
    "short": {"train": 4000, "test": 1, "longest": SHORT, "lengths": (1,), "depths": (0.0,)},
    "long": {"train": 4000, "test": 6, "longest": LONG},
}
MODEL = {"connector": CONNECTOR, "vision_encoder": TOWER, "image": IMAGE}
STEADY = ("optim.decay_ratio=0.1",)  # what comes behind goes on
COURSE = (
    Stage(data="alone", steps=600, settings=STEADY),
    Stage(data="short", steps=500, settings=STEADY),
    Stage(data=ROWS, steps=700),
)


def _draw(folder: Path, given: Mapping[str, Any], on_progress) -> None:
    needles.build(folder, seed=0, workers=num_cores(), on_progress=on_progress, **given)


def _count(given: Mapping[str, Any]) -> int:
    return needles.num_pictures(**given)


def make_trial(training: str, reader: str, seed: int) -> Trial:
    """A model that learns from rows of some lengths."""
    settings = model_settings(layers=make_layers(reader), **MODEL)
    factors = {"training": training, "reader": reader}
    return Trial(factors=factors, seed=seed, tower="digits", settings=settings, sets=TRAININGS[training])


def study(levels: Sequence[str] | None = None, seeds: int | None = None) -> Study:
    """The study of some readers; Mamba-2 is always among them."""
    readers = choose_levels("reader", levels, READERS, (BASELINE,))
    return Study(
        name="needle",
        about="How much does a reader still know of one picture among many?",
        version=VERSION,
        benchmark=Benchmark(task="needle", scored="long", build=_draw, count=_count),
        pictures=PICTURES,
        towers={"digits": model_settings(layers=make_layers(BASELINE), **MODEL)},
        tower_stage=Stage(data="alone", steps=300, settings=("train.batch_size=64",)),
        course=COURSE,
        trials=[
            make_trial(training, reader, seed)
            for seed in range(seeds or SEEDS)
            for training in TRAININGS
            for reader in readers
        ],
        factor="reader",
        baseline=BASELINE,
        main={"training": "long"},
        plots={"needle.png": draw_heat_maps},
    )


def draw_heat_maps(results: Sequence[Mapping], path: Path) -> None:
    """Accuracy by number of pictures and depth of the needle, a panel for each reader and training."""
    found: dict[tuple[str, str], list[Mapping]] = {}
    for result in results:
        place = result["factors"]["training"], result["factors"]["reader"]
        found.setdefault(place, []).append(result["details"]["depths"])
    trainings = list(dict.fromkeys(training for training, _ in found))
    readers = list(dict.fromkeys(reader for _, reader in found))
    with matplotlib.rc_context({**STYLE, "axes.grid": False}):
        size = (1.2 + 2.4 * max(1, len(readers)), 0.8 + 1.9 * max(1, len(trainings)))
        figure = Figure(figsize=size, layout="constrained", facecolor="white")
        if found:
            _draw_panels(figure, found, trainings, readers)
        figure.savefig(path, dpi=140)


def _draw_panels(figure: Figure, found: Mapping, trainings: Sequence[str], readers: Sequence[str]) -> None:
    panels = figure.subplots(len(trainings), len(readers), squeeze=False, sharex=True, sharey=True)
    shown = None
    for row, training in enumerate(trainings):
        for column, reader in enumerate(readers):
            axes, tables = panels[row, column], found.get((training, reader), [])
            if not tables:
                axes.set_axis_off()
                continue
            lengths, depths = list(tables[0]), list(next(iter(tables[0].values())))
            values = 100 * np.mean(
                [[[table[n][d]["accuracy"] for n in lengths] for d in depths] for table in tables], axis=0
            )
            shown = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
            for (y, x), value in np.ndenumerate(values):
                look = {"ha": "center", "va": "center", "color": "white" if value < 60 else "black"}
                axes.text(x, y, f"{value:.0f}", fontsize=7, **look)
            axes.set_xticks(range(len(lengths)), lengths, fontsize=7)
            axes.set_yticks(range(len(depths)), depths, fontsize=7)
            if row == 0:
                axes.set_title(reader, fontsize=9)
            if column == 0:
                axes.set_ylabel(f"trained on {training} rows\nshare of pictures in front", fontsize=8)
    figure.supxlabel("pictures in the row", fontsize=8)
    if shown is not None:
        figure.colorbar(shown, ax=panels, label="right answers, percent (chance 10)", shrink=0.8)
