"""How many tokens does a picture need? At equal parameters."""

from collections.abc import Iterator, Mapping, Sequence

from eval.ablations.small_models import SEEDS, choose_levels, match_readers, patch_study, patch_trial
from eval.ablations.trials import Study, Trial

VERSION = 1  # counts up with everything that changes a score
BASELINE = "36"
NUM_LAYERS = 3  # of the reader

# Connector -> number of tokens -> what makes so many of 6 x 6 cells. No factor of pool2d makes 18.
CONNECTORS: Mapping[str, Mapping[str, dict]] = {
    "mqt": {
        count: {"kind": "mqt", "num_queries": 36, "num_heads": 4, "keep": int(count)}
        for count in (BASELINE, "18", "9", "4", "1")
    },
    "pool2d": {
        count: {"kind": "pool2d", "factor": factor} for count, factor in ((BASELINE, 1), ("9", 2), ("4", 3), ("1", 6))
    },
}
COUNTS = tuple(dict.fromkeys(count for sizes in CONNECTORS.values() for count in sizes))


def design(counts: Sequence[str], seeds: int) -> Iterator[Trial]:
    """All trials."""
    layers = match_readers({name: sizes[BASELINE] for name, sizes in CONNECTORS.items()}, NUM_LAYERS)
    for seed in range(seeds):
        for name, sizes in CONNECTORS.items():
            for count in counts:
                if count in sizes:
                    factors = {"connector": name, "tokens": count}
                    yield patch_trial(factors, seed, connector=sizes[count], layers=layers[name])


def study(levels: Sequence[str] | None = None, seeds: int | None = None) -> Study:
    """The study of some numbers of tokens; that of the cells is always among them."""
    counts = choose_levels("number of tokens", levels, COUNTS, (BASELINE,))
    return patch_study(
        name="num_tokens",
        about="How many tokens does a picture need?",
        version=VERSION,
        trials=list(design(counts, seeds or SEEDS)),
        factor="tokens",
        baseline=BASELINE,
        main={},
        control=None,  # what fewer tokens cost is the question, and neither connector takes tokens in a shuffle
    )
