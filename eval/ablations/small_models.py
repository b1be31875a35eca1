"""What the studies share: pictures, small towers and readers, and the course in which they learn.

What stands here decides the scores of every study: a change counts up the VERSION of all of them.
"""

import functools
import json
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cobra.connector import CONNECTORS
from cobra.lm.mlp import MLPConfig
from cobra.typed_config import from_dict
from eval import plane_scenes
from eval.ablations.trials import Benchmark, Stage, Study, Trial
from eval.environment import num_cores
from eval.plane_curves import Difficulty
from vision_scan.errors import choose

SIDE = 48  # of a picture, in pixels
D_MODEL = 64
LONGEST = 6  # cells of a curve

MIXER = {"d_state": 16, "headdim": 16, "expand": 1, "chunk_size": 64, "A_init_range": [0.01, 1.0], "dt_min": 0.02,
         "dt_max": 0.5}  # fmt: skip
READER = {"kind": "mamba2", **MIXER, "d_state": 32}
IMAGE = {"height": SIDE, "width": SIDE}
VOCABULARY = 384  # room for the ids of the towers' tokenizer, which has read questions of all kinds

SEEDS = 8  # of the main cells
SHUFFLED = "shuffled"  # the level of a control: the baseline, reading cells in a shuffle of its own for each seed
LEAST_D_FF = 16


def _pictures(longest: int, train: int, test: int = 1, **more: Any) -> dict:
    difficulty = {"num_curves": 2, "cells": (2, longest)}
    return {"train": train, "test": test, "seed": 0, "canvas": (SIDE, SIDE), "difficulty": difficulty, **more}


# What is learned late or not at all beside the rest comes first: counting by itself, then relations and short curves
# with it. From long curves alone, nothing is learned in any order.
PICTURES = {
    "counts": _pictures(2, 4000, kinds=("count",)),
    "near": _pictures(2, 2500, kinds=("relation", "count", "trace")),
    "plane": _pictures(LONGEST, 6000, 400),
}


def _draw(folder: Path, given: Mapping[str, Any], on_progress: Callable[[int, int], None]) -> None:
    arguments = {**given, "difficulty": Difficulty(**given["difficulty"])}
    plane_scenes.build(folder, **arguments, on_progress=on_progress, workers=num_cores())


def _count_pictures(given: Mapping[str, Any]) -> int:
    return (given["train"] + given["test"]) * len(given.get("kinds", plane_scenes.KINDS))


PLANE = Benchmark(task="plane_scenes", scored="plane", build=_draw, count=_count_pictures)
TOWER_STAGE = Stage(data="plane", steps=150, settings=("train.batch_size=64",))
COURSE = (
    Stage(data="counts", steps=250, settings=("optim.decay_ratio=0.1",)),
    Stage(data="near", steps=450, settings=("optim.decay_ratio=0.1",)),
    Stage(data="plane", steps=850),
)


def tower(attention: bool, positions: bool, scan: dict | None = None) -> dict:
    """A tower of one kind."""
    return {"kind": "small", "patch_size": 8, "d_model": D_MODEL, "depth": 2 if attention else 0, "num_heads": 4,
            "stem": "patch", "positions": positions, "scan": scan}  # fmt: skip


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def name_tower(attention: bool, positions: bool) -> str:
    return f"{'attention' if attention else 'patch'}_{'positions' if positions else 'nowhere'}"


def tower_settings(attention: bool, positions: bool) -> tuple[str, ...]:
    """Of the model whose tower is pretrained."""
    return (f"model.image={_text(IMAGE)}", f"model.vision_encoder={_text(tower(attention, positions))}")


def model_settings(
    *,
    connector: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    vision_encoder: Mapping[str, Any],
    reading_order: str = "raster",
    image: Mapping[str, int] = IMAGE,
) -> tuple[str, ...]:
    """A model whose language model has some layers, as `--set` takes it."""
    parts = {
        "image": image,
        "vision_encoder": vision_encoder,
        "connector": connector,
        "lm.d_model": D_MODEL,
        "lm.vocab_size": VOCABULARY,
        "lm.layers": list(layers),
        "reading_order": reading_order,
    }
    return tuple(f"model.{name}={_text(value)}" for name, value in parts.items())


def shuffled_order(seed: int) -> str:
    """The order of the control."""
    return f"random(seed={seed})"


def with_shuffled(connectors: Mapping[str, Mapping[str, Any]], baseline: str, seed: int) -> dict[str, dict[str, Any]]:
    """Connectors that scan, and the control's: the baseline along a shuffle."""
    made = {name: dict(connector) for name, connector in connectors.items()}
    return {**made, SHUFFLED: {**made[baseline], "order": shuffled_order(seed)}}


def choose_levels(
    what: str,
    given: Iterable[str] | None,
    known: Collection[str],
    always: Sequence[str],
    default: Collection[str] | None = None,
) -> list[str]:
    """The levels that are compared: those that a study cannot do without, and what is asked for.

    Args:
        what: they are called in messages.
        given: what is asked for; None: the default ones.
        default: None: all.
    Raises:
        UserError: on one that is not known.
    """
    levels = list(dict.fromkeys((*always, *(given or default or known))))
    for level in levels:
        choose(what, level, dict.fromkeys((*always, *known)))
    return levels


def small_trial(
    factors: Mapping[str, str],
    seed: int,
    *,
    connector: Mapping[str, Any],
    layers: Sequence[Mapping[str, Any]],
    attention: bool = False,
    reading_order: str = "raster",
    sets: Mapping[str, str] | None = None,
) -> Trial:
    """A trial of one model; see `Trial`.

    Args:
        layers: of the language model.
        attention: whether the tower attends globally and knows positions. Else each of its features is of one patch and
            does not say of which, and whatever a question needs of the plane is for connector and reader to find.
    """
    settings = model_settings(
        connector=connector, layers=layers, vision_encoder=tower(attention, attention), reading_order=reading_order
    )
    return Trial(factors=factors, seed=seed, tower=name_tower(attention, attention), settings=settings, sets=sets or {})


def small_study(
    *,
    name: str,
    about: str,
    version: int,
    trials: Sequence[Trial],
    factor: str,
    baseline: str,
    main: Mapping[str, str],
    control: tuple[str, str] | None,
) -> Study:
    """A study whose models learn and are scored as in every study; see `Study`."""
    kinds = {name_tower(attention, attention): tower_settings(attention, attention) for attention in (False, True)}
    return Study(
        name=name,
        about=about,
        version=version,
        benchmark=PLANE,
        pictures=PICTURES,
        towers={trial.tower: kinds[trial.tower] for trial in trials},
        tower_stage=TOWER_STAGE,
        course=COURSE,
        trials=trials,
        factor=factor,
        baseline=baseline,
        main=main,
        control=control,
    )


def match_readers(connectors: Mapping[str, Mapping[str, Any]], num_layers: int) -> dict[str, list[dict]]:
    """For each connector the layers of a language model, so that all models have as many parameters: Mamba-2, and a
    gated feed-forward layer that takes up what the connector leaves of the largest one's."""
    sizes = {name: count_parameters(connector) for name, connector in connectors.items()}
    largest, channel = max(sizes.values()), MLPConfig(d_ff=1).cost(D_MODEL).parameters
    return {
        name: [READER] * num_layers + [{"kind": "mlp", "d_ff": LEAST_D_FF + round((largest - size) / channel)}]
        for name, size in sizes.items()
    }


def count_parameters(connector: Mapping[str, Any]) -> int:
    """Of a connector between tower and language model of the studies."""
    return _count(json.dumps(connector))


@functools.cache  # a study asks about the same few again for each trial
def _count(connector: str) -> int:
    config = json.loads(connector)
    made: Any = CONNECTORS[config["kind"]]
    with torch.device("meta"):
        module = made(from_dict(made.Config, config), D_MODEL, D_MODEL)
    return sum(parameter.numel() for parameter in module.parameters())
