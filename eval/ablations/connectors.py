"""Which connector? Models of as many parameters, behind a tower whose features know nothing of one another."""

from collections.abc import Sequence
from typing import Any

from eval.ablations.small_models import (
    MIXER,
    SEEDS,
    SHUFFLED,
    choose_levels,
    match_readers,
    patch_study,
    patch_trial,
    shuffled_order,
)
from eval.ablations.trials import Study, Trial

VERSION = 1  # counts up with everything that changes a score
BASELINE = "mlp"
NUM_LAYERS = 3  # of the reader: with three, the baseline learns to follow lines

SS2D = {"expand": 1.0, "dt_min": MIXER["dt_min"], "dt_max": MIXER["dt_max"]}

# Of 36 cells, the first group makes 36 tokens and the second 9. The sizes are chosen where there is a choice, so that
# no connector is much larger than the others; what is left of the parameters goes to the reader.
CONNECTORS: dict[str, dict[str, Any]] = {
    "mlp": {"kind": "mlp"},
    "linear": {"kind": "linear"},
    "msc": {"kind": "msc", "order": "cross4", "lists": "share", "swiglu": False, "mixer": MIXER},
    "vss_l2": {"kind": "vss_l2", "mixer": SS2D},
    "vss_mlp": {"kind": "vss_mlp", "mixer": SS2D},
    "mqt": {"kind": "mqt", "num_queries": 36, "num_heads": 4},
    "ldpv2": {"kind": "ldpv2"},
    "pool2d": {"kind": "pool2d"},
    "space_to_depth": {"kind": "space_to_depth", "factor": 2},
    "reshape": {"kind": "reshape", "factor": 2},
}
ASKED_FOR = ("vss_mlp", "reshape")  # alone: near twins of vss_l2 and space_to_depth


def make_trial(name: str, seed: int) -> Trial:
    """A model with one connector; the control is the baseline, whose tokens are read in a shuffle."""
    kind = BASELINE if name == SHUFFLED else name
    return patch_trial(
        {"reader": "mamba2", "connector": name},
        seed,
        connector=CONNECTORS[kind],
        layers=match_readers(CONNECTORS, NUM_LAYERS)[kind],
        reading_order=shuffled_order(seed) if name == SHUFFLED else "raster",
    )


def study(levels: Sequence[str] | None = None, seeds: int | None = None) -> Study:
    """The study of some connectors; the baseline and the control are always among them."""
    default = [name for name in CONNECTORS if name not in ASKED_FOR]
    names = choose_levels("connector of the study", levels, CONNECTORS, (BASELINE, SHUFFLED), default)
    return patch_study(
        name="connectors",
        about="Which connector?",
        version=VERSION,
        trials=[make_trial(name, seed) for seed in range(seeds or SEEDS) for name in names],
        factor="connector",
        baseline=BASELINE,
        main={"reader": "mamba2"},
        control=(SHUFFLED, "trace"),
    )
