"""How many tokens does a picture need? At equal parameters."""

from collections.abc import Mapping, Sequence

from eval.ablations.small_models import SEEDS, choose_levels, match_readers, small_study, small_trial
from eval.ablations.trials import Study, Trial

VERSION = 2  # counts up with everything that changes a score
BASELINE, MAIN = "36", "pool2d"
OTHER_SEEDS = 4  # of the other connector
NUM_LAYERS = 3  # of the reader

# Connector -> number of tokens -> what makes so many of 6 x 6 cells. No factor of pool2d makes 18.
CONNECTORS: Mapping[str, Mapping[str, dict]] = {
    "pool2d": {
        count: {"kind": "pool2d", "factor": factor} for count, factor in ((BASELINE, 1), ("9", 2), ("4", 3), ("1", 6))
    },
    "mqt": {
        count: {"kind": "mqt", "num_queries": 36, "num_heads": 4, "keep": int(count)}
        for count in (BASELINE, "18", "9", "4", "1")
    },
}
COUNTS = tuple(CONNECTORS["mqt"])


def design(counts: Sequence[str], seeds: int) -> list[Trial]:
    """All trials: `seeds` of each number of tokens of the main connector, fewer of the other."""
    layers = match_readers({name: sizes[BASELINE] for name, sizes in CONNECTORS.items()}, NUM_LAYERS)
    return [
        small_trial(
            {"connector": name, "tokens": count},
            seed,
            connector=CONNECTORS[name][count],
            layers=layers[name],
            attention=True,
        )
        for name in CONNECTORS
        for seed in range(seeds if name == MAIN else min(seeds, OTHER_SEEDS))
        for count in counts
        if count in CONNECTORS[name]
    ]


def study(levels: Sequence[str] | None = None, seeds: int | None = None) -> Study:
    """The study of some numbers of tokens; that of the cells is always among them."""
    counts = choose_levels("number of tokens", levels, COUNTS, (BASELINE,))
    return small_study(
        name="num_tokens",
        about="How many tokens does a picture need?",
        version=VERSION,
        trials=design(counts, seeds or SEEDS),
        factor="tokens",
        baseline=BASELINE,
        main={"connector": MAIN},
        control=None,  # what fewer tokens lose is the question
    )
