"""How should the directions of a scan be put together?"""

from collections.abc import Sequence
from typing import Any

from eval.ablations.scan_orders import scan_blocks
from eval.ablations.small_models import (
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
BASELINE, SHARE = "sum", "share"
CROSS = {"kind": "msc", **scan_blocks("cross4")}

# Each list has all channels, but for the last: there each has a quarter of them.
MERGES: dict[str, dict[str, Any]] = {
    **{merge: {**CROSS, "lists": "all", "combine": merge} for merge in (BASELINE, "mean", "gated", "concat")},
    SHARE: CROSS,
}


def make_trial(name: str, seed: int) -> Trial:
    """A model with two blocks of scans in four directions; the control's go along one list, a shuffle."""
    connectors = with_shuffled(MERGES, BASELINE, seed)
    return small_trial(
        {"order": "cross4", "merge": name},
        seed,
        connector=connectors[name],
        layers=match_readers(connectors, num_layers=1)[name],
    )


def study(levels: Sequence[str] | None = None, seeds: int | None = None) -> Study:
    """The study of some ways of merging; the sum and the control are always among them."""
    names = choose_levels("merge", levels, MERGES, (BASELINE, SHUFFLED))
    return small_study(
        name="merge",
        about="How should the directions of a scan be put together?",
        version=VERSION,
        trials=[make_trial(name, seed) for seed in range(seeds or SEEDS) for name in names],
        factor="merge",
        baseline=BASELINE,
        main={"order": "cross4"},
        control=(SHUFFLED, "trace"),
    )
