"""Does the order in which patches are read matter? The design that docs/ablate.md lays down."""

import functools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from cobra.scan_block import ScanBlock, ScanBlocksConfig
from cobra.typed_config import from_dict
from eval.ablations.contrasts import level_name
from eval.ablations.small_models import (
    COURSE,
    D_MODEL,
    MIXER,
    PICTURES,
    PLANE,
    READER,
    SEEDS,
    SIDE,
    TOWER_STAGE,
    model_settings,
    name_tower,
    shuffled_order,
    tower,
    tower_settings,
)
from eval.ablations.trials import Study, Trial
from vision_scan.draw import draw_receptive_fields
from vision_scan.errors import UserError
from vision_scan.orders import sequential_order
from vision_scan.receptive import receptive_field

ORDERS = ("raster", "random", "cross4", "hilbert", "snake_row_tl", "local")
PLACES = ("connector", "tower", "reading")
OTHER_SEEDS = 2  # of the cells that are not main ones
VERSION = 2  # counts up with everything that changes a score


def scan_blocks(order: str) -> dict:
    """Two blocks along an order; several lists share the channels, so that every order costs the same."""
    return {"order": order, "lists": "share", "depth": 2, "mixer": MIXER}


def make_trial(place: str, order: str, seed: int, attention: bool = False, positions: bool = False) -> Trial:
    """A model that reads along `order` in one place and by rows elsewhere.

    A model with a scan in tower or connector has one layer in the language model; where the order is that of its
    reading, it has three.
    """
    blocks = scan_blocks(order)
    settings = model_settings(
        connector={"kind": "msc", **blocks} if place == "connector" else {"kind": "mlp"},
        layers=[READER] * (3 if place == "reading" else 1),
        vision_encoder=tower(attention, positions, blocks if place == "tower" else None),
        reading_order=order if place == "reading" else "raster",
    )
    return Trial(
        factors={
            "place": place,
            "tower": "attention" if attention else "patch",
            "positions": "yes" if positions else "no",
            "order": order,
        },
        seed=seed,
        tower=name_tower(attention, positions),
        settings=settings,
        fresh=("vision_encoder.scans",) if place == "tower" else (),
    )


def _orders(place: str, orders: Sequence[str], seed: int) -> Iterator[str]:
    """The orders of a place: the control has a shuffle of its own for each seed, and a reader has one sequence."""
    for order in orders:
        if order == "random":
            yield shuffled_order(seed)
        elif place != "reading" or len(sequential_order(order)) == 1:
            yield order


def design(orders: Sequence[str], seeds: int, other_seeds: int = OTHER_SEEDS) -> list[Trial]:
    """All trials: `seeds` of each order and place with a tower that sees patches alone and no positions, `other_seeds`
    with other towers; seed by seed, so that what is there at any time is balanced."""
    trials = [
        make_trial(place, order, seed)
        for seed in range(seeds)
        for place in PLACES
        for order in _orders(place, orders, seed)
    ]
    others = [
        make_trial(place, order, seed, attention, positions)
        for seed in range(min(seeds, other_seeds))
        for attention, positions in ((False, True), (True, False), (True, True))
        for place in PLACES
        for order in _orders(place, [order for order in orders if order in ("raster", "random", "hilbert")], seed)
    ]
    return trials + others


def draw_fields(orders: Sequence[str], results: Sequence[Mapping], path: Path) -> None:
    """Effective receptive fields of the two blocks along each order, before they learn, on the study's grid."""
    fields = {}
    for order in orders:
        fields[order] = receptive_field(_blocks(order), SIDE // 8, SIDE // 8, D_MODEL)
    draw_receptive_fields(fields, path)


def _blocks(order: str) -> nn.Sequential:
    config = from_dict(ScanBlocksConfig, scan_blocks(order))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(*(ScanBlock(config, D_MODEL, depth) for depth in range(config.depth)))


def study(levels: Sequence[str] | None = None, seeds: int | None = None) -> Study:
    """The study of some orders; raster, which the others are held against, and the control are always among them.

    Raises:
        UserError: if an order is unknown, its lists cannot share the channels, or it differs from another by its seed
            alone.
    """
    orders = list(dict.fromkeys(("raster", "random", *(levels or ORDERS))))
    for order in orders:
        _blocks(order)
    names = [level_name(order) for order in orders]
    if twice := [order for order in orders if names.count(level_name(order)) > 1]:
        raise UserError(
            f"levels {', '.join(twice)} differ in their seed alone, and count as one; random has a shuffle of its own "
            "for each seed: name each order once"
        )
    kinds = [(attention, positions) for attention in (False, True) for positions in (False, True)]
    return Study(
        name="scan_orders",
        about="Does the order in which patches are read matter?",
        version=VERSION,
        benchmark=PLANE,
        pictures=PICTURES,
        towers={name_tower(*kind): tower_settings(*kind) for kind in kinds},
        tower_stage=TOWER_STAGE,
        course=COURSE,
        trials=design(orders, seeds or SEEDS),
        factor="order",
        baseline="raster",
        main={"tower": "patch", "positions": "no"},
        control=("random", "trace"),
        plots={"fields.png": functools.partial(draw_fields, orders)},
    )
