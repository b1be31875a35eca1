"""Which language model reads the picture? Stacks of one width and parameter count."""

from collections.abc import Callable, Mapping, Sequence

from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.stack import LMConfig
from cobra.twins import hybrid_twin, transformer_twin, window_twin
from cobra.typed_config import from_dict, to_dict
from eval.ablations.small_models import (
    D_MODEL,
    READER,
    SEEDS,
    SHUFFLED,
    VOCABULARY,
    choose_levels,
    shuffled_order,
    small_study,
    small_trial,
)
from eval.ablations.trials import Study, Trial

VERSION = 2  # counts up with everything that changes a score
BASELINE = "mamba2"
NUM_LAYERS = 4  # the fewest of which a hybrid can be made

ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=4, headdim=16)
# As wide as the baseline's, with as much of a channel forgotten at the start; dt_rank makes up for the parameters.
MAMBA1 = Mamba1Config(d_state=16, expand=1, dt_rank=12, dt_min=READER["dt_min"], dt_max=READER["dt_max"])

BACKBONES: Mapping[str, Callable[[LMConfig], LMConfig]] = {
    "mamba2": lambda lm: lm,
    "mamba1": lambda lm: LMConfig(d_model=lm.d_model, vocab_size=lm.vocab_size, layers=(MAMBA1,) * len(lm.layers)),
    "transformer": lambda lm: transformer_twin(lm, ATTENTION, pairs=2),
    "window": lambda lm: window_twin(lm, ATTENTION, pairs=2, activation_bytes=4),
    "hybrid": lambda lm: hybrid_twin(lm, ATTENTION),
}


def make_layers(name: str, num_layers: int = NUM_LAYERS) -> list[dict]:
    """Those of a backbone that has as many parameters as so many layers of Mamba-2."""
    layers = (from_dict(Mamba2Config, READER),) * num_layers
    lm = LMConfig(d_model=D_MODEL, vocab_size=VOCABULARY, layers=layers)
    return to_dict(BACKBONES[name](lm).layers)


def make_trial(name: str, seed: int) -> Trial:
    """A model with one backbone; the control is the baseline, which reads the picture in a shuffle."""
    return small_trial(
        {"connector": "mlp", "backbone": name},
        seed,
        connector={"kind": "mlp"},
        layers=make_layers(BASELINE if name == SHUFFLED else name),
        reading_order=shuffled_order(seed) if name == SHUFFLED else "raster",
    )


def study(levels: Sequence[str] | None = None, seeds: int | None = None) -> Study:
    """The study of some backbones; Mamba-2 and the control are always among them."""
    names = choose_levels("backbone", levels, BACKBONES, (BASELINE, SHUFFLED))
    return small_study(
        name="backbones",
        about="Which language model reads the picture?",
        version=VERSION,
        trials=[make_trial(name, seed) for seed in range(seeds or SEEDS) for name in names],
        factor="backbone",
        baseline=BASELINE,
        main={"connector": "mlp"},
        control=(SHUFFLED, "trace"),
    )
