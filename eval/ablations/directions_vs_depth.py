"""Many directions in one block, or one direction in many? At equal numbers of passes over the grid."""

from collections.abc import Sequence
from typing import Any

from eval.ablations.small_models import (
    MIXER,
    SEEDS,
    SHUFFLED,
    choose_levels,
    match_readers,
    small_study,
    small_trial,
    with_shuffled,
)
from eval.ablations.trials import Study, Trial

VERSION = 2  # counts up with everything that changes a score
BASELINE = "1x4"


def scans(order: str, depth: int) -> dict[str, Any]:
    """Blocks whose lists have all channels, so that a pass along one costs the same in all of them; without their
    feed-forward layers, of which deeper ones would have more."""
    return {"kind": "msc", "order": order, "lists": "all", "swiglu": False, "depth": depth, "mixer": MIXER}


SHAPES = {BASELINE: scans("raster", 4), "2x2": scans("bi2", 2), "4x1": scans("cross4", 1)}  # lists x blocks


def make_trial(name: str, seed: int) -> Trial:
    """A model with four passes over the grid; the control's go along a shuffle."""
    connectors = with_shuffled(SHAPES, BASELINE, seed)
    return small_trial(
        {"connector": "msc", "lists_x_blocks": name},
        seed,
        connector=connectors[name],
        layers=match_readers(connectors, num_layers=1)[name],
    )


def study(levels: Sequence[str] | None = None, seeds: int | None = None) -> Study:
    """The study of some shapes; the deepest and the control are always among them."""
    names = choose_levels("number of lists x blocks", levels, SHAPES, (BASELINE, SHUFFLED))
    return small_study(
        name="directions_vs_depth",
        about="Many directions in one block, or one direction in many?",
        version=VERSION,
        trials=[make_trial(name, seed) for seed in range(seeds or SEEDS) for name in names],
        factor="lists_x_blocks",
        baseline=BASELINE,
        main={"connector": "msc"},
        control=(SHUFFLED, "trace"),
    )
