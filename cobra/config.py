"""What a model is made of, and the presets."""

from dataclasses import dataclass, replace
from typing import Literal

from vision_scan.errors import UserError, choose
from vision_scan.orders import sequential_order

from .connector import ConnectorConfig, FusedMLPConfig, KeepsGrid, MSCConfig, Pool2dConfig, VSSL2Config
from .connector import MLPConfig as MLPConnectorConfig
from .image import ImageConfig
from .lm.attention import AttentionConfig
from .lm.mamba1 import Mamba1Config
from .lm.mamba2 import Mamba2Config
from .lm.mlp import MLPConfig
from .lm.released import RELEASED
from .lm.stack import LMConfig
from .prompt import TEMPLATES
from .tiles import Layout, SizedLayout, TileFrame, TileLayout
from .token_reduction import TokenReductionConfig
from .twins import hybrid_twin, transformer_twin, window_twin
from .video import EVSConfig
from .vision_encoder import FusedEncoderConfig, SmallEncoderConfig, TimmEncoderConfig, VisionEncoderConfig


@dataclass(frozen=True, kw_only=True)
class CobraConfig:
    """A vision-language model: pixels -> vision encoder -> connector -> language model.

    Attributes:
        image: size of a tile and how images are fitted into it, or cut into several.
        template: how a conversation is written, a name of `prompt.TEMPLATES`.
        weights: how the language model's projections are stored, see quantize.py.
        token_reduction: fewer tokens of a tile than the connector would make, see token_reduction.py.
        reading_order: the scan order in which the language model gets the tokens of a tile, one of a single list.
        video: fewer tokens of a video than its frames would have, see video.py.
    """

    image: ImageConfig
    vision_encoder: VisionEncoderConfig
    connector: ConnectorConfig
    lm: LMConfig
    template: str = "compact"
    weights: Literal["plain", "int8", "int4"] = "plain"
    token_reduction: TokenReductionConfig | None = None
    reading_order: str = "raster"
    video: EVSConfig | None = None

    def __post_init__(self) -> None:
        choose("template", self.template, TEMPLATES)
        if self.token_reduction is not None:
            self.token_reduction.check(self.grid, self.connector)
        if self.image.tiles is not None:
            self._check_tiles()
        if self.reading_order != "raster":
            self._check_reading_order()
        if self.video is not None:
            self._check_video()
        self.tokens_per_tile  # noqa: B018 (an image smaller than a patch fails here)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of vision features of one tile."""
        return self.vision_encoder.grid(self.image.height, self.image.width)

    @property
    def connector_grid(self) -> tuple[int, int]:
        """Rows and columns that the connector gets of one tile; what a reduction left of them is a row."""
        reduction = self.token_reduction
        return (1, reduction.num_tokens) if reduction and reduction.behind == "vision_encoder" else self.grid

    @property
    def tokens_per_tile(self) -> int:
        """Tokens of the language model that one tile becomes."""
        reduction = self.token_reduction
        return reduction.num_tokens if reduction else self.connector.num_tokens(*self.grid)

    @property
    def tile_frame(self) -> TileFrame:
        """What tilings go by."""
        image, tiles = self.image, self.image.tiles
        stride = self.vision_encoder.stride if tiles and tiles.varies else 0
        return TileFrame((image.height, image.width), self.grid, stride, self.connector.num_tokens)

    @property
    def entry_size(self) -> tuple[int, int]:
        """Height and width of an entry of `pixel_values`: a tile, or a cell of tiles of their own sizes."""
        stride = self.tile_frame.stride
        return (stride, stride) if stride else (self.image.height, self.image.width)

    def layout(self, height: int, width: int) -> Layout:
        """The tiles and tokens of an image of height x width pixels, upright."""
        tiles = self.image.tiles
        return TileLayout(self.tokens_per_tile) if tiles is None else tiles.layout(height, width, self.tile_frame)

    @property
    def one_tile(self) -> Layout:
        """That of one tile of `image.height` x `image.width` pixels."""
        stride = self.tile_frame.stride
        return SizedLayout(stride, self.grid, self.tokens_per_tile) if stride else TileLayout(self.tokens_per_tile)

    @property
    def largest_layout(self) -> Layout:
        """One that no image's exceeds in tokens."""
        tiles = self.image.tiles
        return self.one_tile if tiles is None else tiles.largest(self.tile_frame)

    def _check_tiles(self) -> None:
        tiles, connector = self.image.tiles, self.connector
        if tiles.needs_cells and not (isinstance(connector, KeepsGrid) and self.token_reduction is None):
            what = "a token_reduction" if self.token_reduction is not None else f"connector {connector.kind}"
            raise UserError(
                f"image.tiles puts the tokens of tiles together as one map, so there must be one of each cell; {what} "
                "makes fewer: take a connector such as mlp or msc and no token_reduction, or image.tiles=none"
            )
        if self.token_reduction is not None:
            raise UserError(
                f"image.tiles={tiles.kind} makes tiles of different sizes, and a token_reduction as many tokens of "
                "each: take one of the two, or a connector that makes fewer tokens, such as space_to_depth"
            )
        if tiles.separates and getattr(connector, "nested", False):
            raise UserError(
                f"connector.nested takes tokens of each tile out of a row, and image.tiles={tiles.kind} has others "
                "between them: set connector.nested=false, or image.tiles=none"
            )
        self.tile_frame  # noqa: B018 (an encoder that cannot take tiles of any size fails here)

    def _check_video(self) -> None:
        tiles = self.image.tiles
        for is_in_the_way, name, otherwise in (
            (self.token_reduction is not None, "token_reduction", "none"),
            (tiles is not None and (tiles.separates or tiles.attention_of), "image.tiles", "none, or native"),
            (getattr(self.connector, "nested", False), "connector.nested", "false"),
        ):
            if is_in_the_way:
                raise UserError(
                    "video compares each token of a frame with that at the same place of the frame before, and "
                    f"{name} gives frames others: set {name}={otherwise}, or video=none"
                )

    def _check_reading_order(self) -> None:
        num_lists = len(sequential_order(self.reading_order))
        if num_lists > 1:
            raise UserError(
                f"reading_order {self.reading_order!r} has {num_lists} lists, and the language model reads one "
                "sequence: take an order of one list, for instance hilbert"
            )
        has_map = isinstance(self.connector, KeepsGrid) and self.token_reduction is None
        if not has_map or self.image.tiles is not None:
            raise UserError(
                f"reading_order {self.reading_order!r} needs one token of each cell of one tile: take a connector such "
                "as mlp or msc, no token_reduction and image.tiles=none; or reading_order=raster"
            )


TINY_TOWER = SmallEncoderConfig(patch_size=8, d_model=128, depth=1, num_heads=4)
TINY_MIXER = Mamba2Config(d_state=16, headdim=64, expand=1, chunk_size=64)

_TINY = CobraConfig(
    image=ImageConfig(height=64, width=64),
    vision_encoder=TINY_TOWER,
    connector=MSCConfig(order="cross4", mixer=TINY_MIXER),
    lm=LMConfig(
        d_model=128,
        vocab_size=384,
        layers=(
            # Slow decay and large steps at the start: a question stands hundreds of tokens behind its image.
            Mamba2Config(
                d_state=32, ngroups=2, chunk_size=64, A_init_range=(0.01, 0.5), dt_min=0.02, dt_max=0.5
            ),
        )
        * 4,
    ),
)

# In short runs, one of each, fewer heads for keys and values or fewer pairs took longer to learn looking up.
# A slow rotation, because what is looked up stands hundreds of tokens away.
TINY_ATTENTION = AttentionConfig(num_heads=8, num_kv_heads=4, headdim=32, rope_theta=500_000.0)

# d_model and number of layers of the released state-spaces checkpoints, whose vocabulary of 50277 is padded
# to 50280 and 50288.
_MAMBA1_SIZES = {
    "130m": (768, 24),
    "370m": (1024, 48),
    "790m": (1536, 48),
    "1.4b": (2048, 48),
    "2.8b": (2560, 64),
}
_MAMBA1_LMS = {
    size: LMConfig(d_model=d_model, vocab_size=50280, layers=(Mamba1Config(),) * depth)
    for size, (d_model, depth) in _MAMBA1_SIZES.items()
}
_MAMBA2_SIZES = {
    "130m": (768, 24),
    "370m": (1024, 48),
    "780m": (1536, 48),
    "1.3b": (2048, 48),
    "2.7b": (2560, 64),
}
_MAMBA2_LMS = {
    size: LMConfig(d_model=d_model, vocab_size=50288, layers=(Mamba2Config(),) * depth)
    for size, (d_model, depth) in _MAMBA2_SIZES.items()
}

_DINOV2 = TimmEncoderConfig(name="vit_large_patch14_reg4_dinov2.lvd142m")
_SIGLIP = TimmEncoderConfig(name="vit_so400m_patch14_siglip_384")

# Cobra (h-zhao1997/cobra, "cobra+3b"), which squashes images.
_COBRA = CobraConfig(
    image=ImageConfig(height=384, width=384),
    vision_encoder=FusedEncoderConfig(towers=(_DINOV2, _SIGLIP)),
    connector=FusedMLPConfig(),
    lm=_MAMBA1_LMS["2.8b"],
    template="zephyr",
)
_ML_MAMBA = replace(
    _COBRA,
    connector=MSCConfig(
        order="bi2", combine="mean", pre_norm=False, swiglu=True, depth=2, projector="fused_mlp"
    ),
    lm=_MAMBA2_LMS["2.7b"],
)
# LLaVA 1.5 7B: features of the last block but one, images padded with CLIP's mean colour, and Vicuna 7B v1.5,
# which is Llama 2.
_LLAVA = CobraConfig(
    image=ImageConfig(height=336, width=336, resize="letterbox", fill=(122, 116, 104)),
    vision_encoder=TimmEncoderConfig(name="vit_large_patch14_clip_quickgelu_336.openai"),
    connector=MLPConnectorConfig(),
    lm=LMConfig(
        d_model=4096,
        vocab_size=32000,
        layers=(AttentionConfig(num_heads=32, num_kv_heads=32, headdim=128), MLPConfig(d_ff=11008)) * 32,
        tie_word_embeddings=False,
    ),
    template="vicuna_v1",
)


def _twins_of(
    size: str,
    config: CobraConfig,
    attention: AttentionConfig | None = None,
    pairs: int | None = None,
    activation_bytes: int = 2,
) -> dict[str, CobraConfig]:
    """The three twins of a model by name; they differ from it in the layers of the language model alone. Windows are
    matched for models that run in bfloat16, except that of `tiny`, which is trained and run in float32."""
    lms = {
        "transformer": transformer_twin(config.lm, attention, pairs),
        "window": window_twin(config.lm, attention, pairs, activation_bytes),
        "hybrid": hybrid_twin(config.lm, attention),
    }
    return {f"{kind}-{size}": replace(config, lm=lm) for kind, lm in lms.items()}


PRESETS: dict[str, CobraConfig] = {
    "tiny": _TINY,
    **_twins_of("tiny", _TINY, TINY_ATTENTION, pairs=3, activation_bytes=4),
    **{f"mamba-{size}": replace(_TINY, lm=lm) for size, lm in _MAMBA1_LMS.items()},
    **{f"mamba2-{size}": replace(_TINY, lm=lm) for size, lm in _MAMBA2_LMS.items()},
    **{name: replace(_TINY, lm=lm) for name, lm in RELEASED.items()},
    **{
        name: twin
        for size, lm in _MAMBA2_LMS.items()
        for name, twin in _twins_of(size, replace(_TINY, lm=lm)).items()
    },
    "cobra-3b": _COBRA,
    **_twins_of("3b", _COBRA),
    # ML-Mamba's connector as its code has it, and as the paper's figures draw it (four directions).
    "ml-mamba-3b": _ML_MAMBA,
    "ml-mamba-3b-drawn": replace(
        _ML_MAMBA,
        connector=replace(_ML_MAMBA.connector, order="cross4", combine="sum", pre_norm=True),
    ),
    # VL-Mamba's best variant: VSS-L2 with the bidirectional scan, over Mamba-2.8b-slimpj. How its prompts and
    # images were prepared is not published; these are Cobra's ways.
    "vl-mamba": replace(_COBRA, vision_encoder=_SIGLIP, connector=VSSL2Config(order="bi2")),
    "llava-1.5": _LLAVA,
    # LongLLaVA as its last two stages of training had it.
    "longllava-9b": replace(_LLAVA, connector=Pool2dConfig(), lm=RELEASED["jamba-9b"], template="longllava"),
    "longllava-a13b": replace(_LLAVA, connector=Pool2dConfig(), lm=RELEASED["jamba-v0.1"], template="longllava"),
}
