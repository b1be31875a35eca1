"""Which connector? Models of as many parameters."""

from collections.abc import Sequence
from typing import Any

from eval.ablations.small_models import (
    MIXER,
    SEEDS,
    choose_levels,
    match_readers,
    small_study,
    small_trial,
)
from eval.ablations.trials import Study, Trial

VERSION = 2  # counts up with everything that changes a score
BASELINE = "mlp"
NUM_LAYERS = 3  # of the reader: with three, the baseline learns to follow lines
OTHER_SEEDS = 2  # behind a tower of patches

SS2D = {"expand": 1.0, "dt_min": MIXER["dt_min"], "dt_max": MIXER["dt_max"]}

# Of 36 cells, the first six make 36 tokens and the others 9. The sizes are chosen where there is a choice, so that
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


def make_trial(name: str, seed: int, attention: bool = True) -> Trial:
    """A model with one connector, behind a tower of one kind."""
    return small_trial(
        {"tower": "attention" if attention else "patch", "connector": name},
        seed,
        connector=CONNECTORS[name],
        layers=match_readers(CONNECTORS, NUM_LAYERS)[name],
        attention=attention,
    )


def study(levels: Sequence[str] | None = None, seeds: int | None = None) -> Study:
    """The study of some connectors; the baseline is always among them."""
    default = [name for name in CONNECTORS if name not in ASKED_FOR]
    names = choose_levels("connector of the study", levels, CONNECTORS, (BASELINE,), default)
    seeds = seeds or SEEDS
    trials = [make_trial(name, seed) for seed in range(seeds) for name in names]
    others = [make_trial(name, seed, attention=False) for seed in range(min(seeds, OTHER_SEEDS)) for name in names]
    return small_study(
        name="connectors",
        about="Which connector?",
        version=VERSION,
        trials=trials + others,
        factor="connector",
        baseline=BASELINE,
        main={"tower": "attention"},
        control=None,  # no connector is known to be worse than another behind such a tower
    )
