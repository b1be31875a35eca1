"""Released Cobra and ML-Mamba: a pickle of projector and language model, and a config.json that names the towers.

Source: h-zhao1997/cobra and WenjunHuang94/ML-Mamba, which both come from prismatic-vlms. What they name is built from
the presets here; the towers, which the checkpoints do not hold, come from files of timm.
"""

from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any

from cobra.config import PRESETS, CobraConfig
from cobra.connector import ConnectorConfig, FusedLDPConfig, FusedMLPConfig, LinearConfig, MLPConfig, MSCConfig
from cobra.lm import LMConfig
from cobra.vision_encoder import FusedEncoderConfig, TimmEncoderConfig, VisionEncoderConfig
from vision_scan.errors import UserError, choose

from .layout import Layout, Options, Piece, Pieces, Shapes, renamed
from .source import CONFIG

_CLIP = TimmEncoderConfig(name="vit_large_patch14_clip_quickgelu_336.openai")
_DINOV2 = TimmEncoderConfig(name="vit_large_patch14_reg4_dinov2.lvd142m")
_SIGLIP = TimmEncoderConfig(name="vit_so400m_patch14_siglip_384")

VISION_BACKBONES: dict[str, tuple[VisionEncoderConfig, int]] = {
    "dinosiglip-vit-so-384px": (FusedEncoderConfig(towers=(_DINOV2, _SIGLIP)), 384),
    "dinoclip-vit-l-336px": (FusedEncoderConfig(towers=(_DINOV2, _CLIP)), 336),
    "siglip-vit-so400m-384px": (_SIGLIP, 384),
    "dinov2-vit-l": (_DINOV2, 224),
    "clip-vit-l-336px": (_CLIP, 336),
}
"""The towers by their id, and the side of their images in pixels."""

LLM_BACKBONES: dict[str, str] = {
    "mamba-2.8b-zephyr": "mamba-2.8b", "mamba-2.8b-slimpj": "mamba-2.8b", "mamba-2.8b": "mamba-2.8b",
    "mamba-1.4b": "mamba-1.4b",
    **{f"mamba2-{size}": f"mamba2-{size}" for size in ("130m", "370m", "780m", "1.3b", "2.7b")},
}  # fmt: skip
"""The preset that has the layers of a language model, by its id."""

PROJECTORS: dict[str, ConnectorConfig] = {
    "fused-gelu-mlp": FusedMLPConfig(),
    "fused-ldpnet": FusedLDPConfig(),
    "gelu-mlp": MLPConfig(),
    "linear": LinearConfig(),
}
"""By the end of `arch_specifier`; the first that fits."""

RESIZES = {"resize-naive": "squash", "letterbox": "letterbox", "resize-crop": "crop"}
TRAINING_KEYS = ("stage", "pretrained_checkpoint", "run_id", "run_root_dir", "hf_token", "seed", "trackers", "dataset",
                 "wandb_project", "wandb_entity")  # fmt: skip


def _read_lm(options: Options) -> LMConfig:
    """The layers of the language model that `llm_backbone_id` names."""
    model = options.section("model")
    preset = choose(f"llm_backbone_id in {model.where}", model.take("llm_backbone_id", str), LLM_BACKBONES)
    options.ignore(*TRAINING_KEYS)
    return PRESETS[preset].lm


def _whole(lm: LMConfig, values: Mapping[str, Any], connector: ConnectorConfig | None = None) -> CobraConfig:
    """The model around it."""
    model = Options(values["model"], f"{CONFIG}: model")
    name = model.take("vision_backbone_id", str)
    encoder, side = choose(f"vision_backbone_id in {model.where}", name, VISION_BACKBONES)
    resize = model.take("image_resize_strategy", str, "resize-naive")
    image = replace(
        PRESETS["cobra-3b"].image,
        height=side,
        width=side,
        resize=choose(f"image_resize_strategy in {model.where}", resize, RESIZES),
    )
    if connector is None:
        arch = model.take("arch_specifier", str)
        found = [projector for end, projector in PROJECTORS.items() if arch.endswith(end)]
        if not found:
            raise UserError(f"{model.where}: arch_specifier is {arch!r}, must end in {', '.join(PROJECTORS)}")
        connector = found[0]
    return replace(PRESETS["cobra-3b"], image=image, vision_encoder=encoder, connector=connector, lm=lm)


def _whole_ml_mamba(lm: LMConfig, values: Mapping[str, Any]) -> CobraConfig:
    return _whole(lm, values, PRESETS["ml-mamba-3b"].connector)


def _connector(config: CobraConfig, shapes: Shapes) -> Pieces:
    """Cobra's projector: of one module, whose name stands twice."""
    outer = "projector.projector."
    return renamed({"proj.": outer, "mlp.": outer, "peg.conv.": f"{outer}4.peg.0."}, shapes)


def _connector_ml_mamba(config: CobraConfig, shapes: Shapes) -> Pieces:
    """ML-Mamba's: what each direction has of its own stands in tensors of its own, `_b` backwards."""
    assert isinstance(config.connector, MSCConfig)
    names = {"mlp.": "mlp.", "projector.": "projector.projector.", "norm_f.": "bidirectional_mamba.norm_f."}
    for number in range(config.connector.depth):
        names[f"blocks.{number}."] = f"bidirectional_mamba.layers.{number}."
    pieces = dict(renamed(names, shapes))
    for name, (piece,) in list(pieces.items()):
        prefix, _, leaf = piece.name.rpartition("mixer.")
        if prefix and leaf in DIRECTED:
            both = [DIRECTED[leaf].format(suffix) for suffix in ("", "_b")]
            _, *rest = shapes[name]
            shape = (rest[0], 1, rest[1]) if leaf == "conv_weight" else tuple(rest)
            pieces[name] = tuple(Piece(f"{prefix}mixer.{own}", shape, _as_list(leaf)) for own in both)
    return pieces


DIRECTED = {
    "conv_weight": "conv1d{}.weight", "conv_bias": "conv1d{}.bias", "dt_bias": "dt_bias{}", "A_log": "A_log{}",
    "D": "D{}",
}  # fmt: skip


def _as_list(leaf: str) -> Callable:
    """A direction's tensor as the row of one list; of convolutions without the axis of length 1."""
    return (lambda tensor: tensor[None, :, 0]) if leaf == "conv_weight" else (lambda tensor: tensor[None])


def _prefixes(outer: str) -> Callable[[LMConfig], dict[str, str]]:
    return lambda config: {
        "embedding.": f"{outer}backbone.embedding.", "layers.": f"{outer}backbone.layers.",
        "norm_f.": f"{outer}backbone.norm_f.", "lm_head.": f"{outer}lm_head.",
    }  # fmt: skip


def _detects(embedding: str) -> Callable[[Mapping[str, Any], Collection[str]], bool]:
    return lambda config, names: isinstance(config.get("model"), dict) and embedding in names


COBRA = Layout(
    name="released Cobra",
    detects=_detects("llm_backbone.llm.backbone.embedding.weight"),
    read_config=_read_lm,
    prefixes=_prefixes("llm_backbone.llm."),
    whole=_whole,
    connector=_connector,
)
ML_MAMBA = Layout(
    name="released ML-Mamba",
    detects=_detects("llm_backbone.backbone.embedding.weight"),
    read_config=_read_lm,
    prefixes=_prefixes("llm_backbone."),
    whole=_whole_ml_mamba,
    connector=_connector_ml_mamba,
)
