"""Should the question stand in front of the picture, behind it, or both?

A recurrent reader cannot look back: with the question behind, it has to keep all that anybody may ask about.
"""

from collections.abc import Sequence
from dataclasses import replace

from eval.ablations.backbones import make_layers
from eval.ablations.small_models import (
    PICTURES,
    SEEDS,
    SHUFFLED,
    choose_levels,
    shuffled_order,
    small_study,
    small_trial,
)
from eval.ablations.trials import Study, Trial
from eval.scene_files import QUESTION_PLACES

VERSION = 2  # counts up with everything that changes a score
BASELINE = "last"
NUM_LAYERS = 3  # of the reader
OTHER_SEEDS = 4  # of the transformer, which can look back


def name_sets(position: str) -> dict[str, str]:
    """The same pictures with the question elsewhere, by the name of those that have it behind them."""
    return {} if position == BASELINE else {name: f"{name}-{position}" for name in PICTURES}


def make_trial(reader: str, position: str, seed: int) -> Trial:
    """A model that learns with the question in one place and is asked so; the control is the baseline, which reads the
    picture in a shuffle."""
    is_control = position == SHUFFLED
    return small_trial(
        {"reader": reader, "position": position},
        seed,
        connector={"kind": "mlp"},
        layers=make_layers(reader, NUM_LAYERS),
        reading_order=shuffled_order(seed) if is_control else "raster",
        sets=name_sets(BASELINE if is_control else position),
    )


def study(levels: Sequence[str] | None = None, seeds: int | None = None) -> Study:
    """The study of some places of the question; last and the control are always among them."""
    names = choose_levels("place of the question", levels, QUESTION_PLACES, (BASELINE, SHUFFLED))
    places = [name for name in names if name != SHUFFLED]
    seeds = seeds or SEEDS
    trials = [make_trial("mamba2", name, seed) for seed in range(seeds) for name in names]
    others = [make_trial("transformer", name, seed) for seed in range(min(seeds, OTHER_SEEDS)) for name in places]
    made = small_study(
        name="question_position",
        about="Should the question stand in front of the picture, behind it, or both?",
        version=VERSION,
        trials=trials + others,
        factor="position",
        baseline=BASELINE,
        main={"reader": "mamba2"},
        control=(SHUFFLED, "trace"),
    )
    moved = {new: {**PICTURES[name], "question": place} for place in places for name, new in name_sets(place).items()}
    return replace(made, pictures={**PICTURES, **moved})
