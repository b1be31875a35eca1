"""LongLLaVA as its authors publish it: Jamba's tensors, and a projector among them, in front of which features are
pooled.

Source: FreedomIntelligence/LongLLaVA. The tower, which was never trained, comes from a file of timm; a copy of it in
the checkpoint is not read.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from cobra.config import CobraConfig
from cobra.connector import Pool2dConfig
from cobra.lm import LMConfig
from vision_scan.errors import choose

from .jamba import JAMBA, JAMBA_FIRST, has_first_names
from .layout import Layout, Options, Pieces, Shapes, renamed
from .llava import read_vision_options, whole_llava
from .source import CONFIG

POOLINGS: dict[str, Pool2dConfig] = {"2d": Pool2dConfig(mode="2d"), "1d": Pool2dConfig(mode="1d")}
"""By `resamplePooling`."""


def _read_lm(options: Options) -> LMConfig:
    options.demand("mm_projector_type", "mlp2x_gelu")
    read_vision_options(options)
    options.ignore("resamplePooling")  # see _whole
    return JAMBA.read_config(options)


def _whole(lm: LMConfig, values: Mapping[str, Any]) -> CobraConfig:
    config = whole_llava(lm, values)
    # Their training does not write it down, though without it four times as many tokens would be made.
    pooling = choose(f"resamplePooling in {CONFIG}", Options(values, CONFIG).take("resamplePooling", str), POOLINGS)
    return replace(config, connector=pooling, template="longllava")


def _connector(config: CobraConfig, shapes: Shapes) -> Pieces:
    return renamed({"mlp.": "model.mm_projector."}, shapes)


def _detects(is_first: bool) -> Callable[[Mapping[str, Any], Collection[str]], bool]:
    return lambda config, names: (
        config.get("model_type") == "llava_jamba"
        and any(name.startswith("model.mm_projector.") for name in names)
        and has_first_names(names) == is_first
    )


LONGLLAVA = Layout(
    name="LongLLaVA",
    detects=_detects(False),
    read_config=_read_lm,
    prefixes=JAMBA.prefixes,
    left_out=r"model\.vision_tower\..*",
    whole=_whole,
    connector=_connector,
)
LONGLLAVA_FIRST = replace(
    LONGLLAVA,
    name="LongLLaVA, on Jamba's first code",
    detects=_detects(True),
    prefixes=JAMBA_FIRST.prefixes,
)
