"""LLaVA-1.5 and MobileVLM V2 as their authors publish them: Llama's tensors, and a projector among them.

Source: haotian-liu/LLaVA and Meituan-AutoML/MobileVLM. The tower, which the checkpoints do not hold, comes from a file
of timm.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from cobra.config import PRESETS, CobraConfig
from cobra.connector import ConnectorConfig, LDPv2Config, LinearConfig, MLPConfig
from cobra.lm import LMConfig
from cobra.vision_encoder import TimmEncoderConfig
from vision_scan.errors import choose

from .layout import Layout, Options, Pieces, Shapes, renamed
from .source import CONFIG
from .transformer import LLAMA

TOWERS: dict[str, tuple[TimmEncoderConfig, int]] = {
    "openai/clip-vit-large-patch14-336": (TimmEncoderConfig(name="vit_large_patch14_clip_quickgelu_336.openai"), 336),
    "openai/clip-vit-large-patch14": (TimmEncoderConfig(name="vit_large_patch14_clip_quickgelu_224.openai"), 224),
}
"""By `mm_vision_tower`, with the side of their images in pixels."""

PROJECTORS: dict[str, tuple[ConnectorConfig, dict[str, str]]] = {
    "mlp2x_gelu": (MLPConfig(), {"proj.": ""}),
    "linear": (LinearConfig(), {"proj.": ""}),
    "ldpnetv2": (LDPv2Config(), {"mlp.": "mlp.mlp.", "peg.conv.": "peg.peg.0."}),
}
"""By `mm_projector_type`: the connector, and how names of its tensors begin behind `model.mm_projector.`."""

ASPECTS = {"pad": "letterbox", "square": "squash"}
# How it was trained; the last four are read by whole_llava.
OTHER_KEYS = (
    "freeze_mm_mlp_adapter", "freeze_mm_vision_resampler", "tune_mm_mlp_adapter", "tune_mm_vision_resampler",
    "unfreeze_mm_vision_tower", "use_mm_proj", "mm_projector_lr", "tokenizer_model_max_length",
    "tokenizer_padding_side", "vision_tower_type", "mm_hidden_size",
    "mm_vision_tower", "mm_projector_type", "mm_vision_select_layer", "image_aspect_ratio",
)  # fmt: skip


def _read_lm(options: Options) -> LMConfig:
    read_vision_options(options)
    return LLAMA.read_config(options)


def read_vision_options(options: Options) -> None:
    """What `whole_llava` reads, and what must be as it is there."""
    for name in ("mm_use_im_start_end", "mm_use_im_patch_token"):  # tokens around a picture
        options.demand(name, False)
    options.demand("mm_vision_select_feature", "patch")
    options.demand("mm_patch_merge_type", "flat")
    options.ignore(*OTHER_KEYS)


def whole_llava(lm: LMConfig, values: Mapping[str, Any]) -> CobraConfig:
    """The model around a language model."""
    options = Options(values, CONFIG)
    name = options.take("mm_vision_tower", str)
    towers = {name: tower for key, tower in TOWERS.items() for name in (key, key.rpartition("/")[2])}
    # A folder of the authors' own says no less than the name on the hub.
    name = name if name in towers else name.rstrip("/").rpartition("/")[2].replace("_", "-")
    tower, side = choose(f"mm_vision_tower in {CONFIG}", name, towers)
    aspect = options.take("image_aspect_ratio", str, "square")
    resize = choose(f"image_aspect_ratio in {CONFIG}", aspect, ASPECTS)
    projector = options.take("mm_projector_type", str, "linear")
    connector, _ = choose(f"mm_projector_type in {CONFIG}", projector, PROJECTORS)
    base = PRESETS["llava-1.5"]
    return replace(
        base,
        image=replace(base.image, height=side, width=side, resize=resize),
        vision_encoder=replace(tower, block=options.take("mm_vision_select_layer", int, -2)),
        connector=connector,
        lm=lm,
    )


def _connector(config: CobraConfig, shapes: Shapes) -> Pieces:
    names = next(names for connector, names in PROJECTORS.values() if connector == config.connector)
    return renamed({own: f"model.mm_projector.{theirs}" for own, theirs in names.items()}, shapes)


def _detects(*model_types: str) -> Callable[[Mapping[str, Any], Collection[str]], bool]:
    return lambda config, names: config.get("model_type") in model_types and any(
        name.startswith("model.mm_projector.") for name in names
    )


LLAVA = Layout(
    name="LLaVA-1.5",
    detects=_detects("llava", "llava_llama"),
    read_config=_read_lm,
    prefixes=LLAMA.prefixes,
    left_out=LLAMA.left_out,
    whole=whole_llava,
    connector=_connector,
)
MOBILEVLM = Layout(
    name="MobileVLM V2",
    detects=_detects("mobilevlm", "mobilellama"),
    read_config=_read_lm,
    prefixes=LLAMA.prefixes,
    left_out=LLAMA.left_out,
    whole=whole_llava,
    connector=_connector,
)
