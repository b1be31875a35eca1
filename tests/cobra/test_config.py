import dataclasses
import functools

import pytest
import torch

from cobra.config import PRESETS, CobraConfig
from cobra.connector import CONNECTORS, LinearConfig
from cobra.cost import LMCost, count_parts
from cobra.image import ImageConfig
from cobra.lm import LAYERS, LMConfig
from cobra.lm.attention import AttentionConfig, Llama3RopeScaling
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from cobra.vision_encoder import VISION_ENCODERS, SmallEncoderConfig
from vision_scan.errors import UserError


@functools.cache
def parameters(preset: str) -> dict[str, int]:
    """Of each part, on the meta device: shapes without memory."""
    if PRESETS[preset].vision_encoder.kind != "small":
        pytest.importorskip("timm")
    return count_parts(PRESETS[preset])


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_builds(preset):
    config, parts = PRESETS[preset], parameters(preset)
    assert list(parts) == ["vision_encoder", "connector", "lm"]
    assert min(parts.values()) > 0
    cells = config.grid[0] * config.grid[1]
    assert config.tokens_per_tile == (cells // 4 if config.connector.kind == "pool2d" else cells)


def test_the_presets_of_the_house_are_there():
    assert {"tiny", "cobra-3b", "ml-mamba-3b", "ml-mamba-3b-drawn", "vl-mamba", "llava-1.5"} <= PRESETS.keys()


def test_the_language_model_of_transformer_3b_is_as_large_as_that_of_ml_mamba_3b():
    ours, theirs = PRESETS["ml-mamba-3b"], PRESETS["transformer-3b"]
    assert theirs.vision_encoder == ours.vision_encoder and theirs.image == ours.image
    found, wanted = LMCost(theirs.lm).parameters, LMCost(ours.lm).parameters
    assert abs(found - wanted) / wanted < 0.03


def test_tiny_is_as_described():
    config = PRESETS["tiny"]
    assert (config.image.height, config.image.width) == (64, 64)
    assert config.grid == (8, 8) and config.tokens_per_tile == 64
    assert 128 <= config.lm.d_model <= 192
    assert config.connector.kind == "msc" and config.connector.order == "cross4"


def test_ml_mamba_presets_say_how_they_differ():
    released, drawn = PRESETS["ml-mamba-3b"].connector, PRESETS["ml-mamba-3b-drawn"].connector
    assert (released.order, released.combine, released.pre_norm, released.depth) == ("bi2", "mean", False, 2)
    assert (drawn.order, drawn.combine, drawn.pre_norm) == ("cross4", "sum", True)
    assert PRESETS["ml-mamba-3b"].tokens_per_tile == 729
    assert PRESETS["ml-mamba-3b"].template == "zephyr"


def vit(width: int, blocks: int, d_ff: int, positions: int, more: int) -> int:
    """Parameters of a ViT/14: embeddings of patches and positions, blocks with two norms each, and more."""
    attention, norms = 4 * (width * width + width), 4 * width
    mlp = 2 * width * d_ff + d_ff + width
    return 3 * 14 * 14 * width + positions * width + blocks * (attention + norms + mlp) + more


# Without the last block and what follows it. Four registers, a class token, a bias of patches and two layer
# scales a block; a bias of patches; a class token, which has a position, and a norm in front.
DINOV2 = vit(1024, 23, 4096, 729, more=(4 + 1 + 1 + 2 * 23) * 1024)
SIGLIP = vit(1152, 26, 4304, 729, more=1152)
CLIP = vit(1024, 23, 4096, 577, more=(1 + 2) * 1024)


def mamba_2_8b() -> int:
    """From the shapes in the released checkpoint."""
    mixer = 5120 * 16 + 5120 + 10240 * 2560 + 5120 * 4 + 5120 + 192 * 5120 + 5120 * 160 + 5120 + 2560 * 5120
    return 50280 * 2560 + 64 * (mixer + 2560) + 2560


@pytest.mark.parametrize(
    ("preset", "vision_encoder", "connector", "lm"),
    [
        ("cobra-3b", DINOV2 + SIGLIP, 47_789_568, mamba_2_8b()),
        ("ml-mamba-3b", DINOV2 + SIGLIP, 5_573_120 + 119_834_560 + 58_997_760, 2_702_599_680),
        ("vl-mamba", SIGLIP, None, mamba_2_8b()),
        ("llava-1.5", CLIP, 20_979_712, 6_738_415_616),  # that of Llama 2 7B
        ("longllava-9b", CLIP, 20_979_712, 9_290_690_432),
        ("longllava-a13b", CLIP, 20_979_712, 51_570_323_328),  # that of Jamba v0.1
    ],
)
def test_published_systems_have_their_published_sizes(preset, vision_encoder, connector, lm):
    parts = parameters(preset)
    assert parts["vision_encoder"] == vision_encoder
    assert connector in (None, parts["connector"])  # VL-Mamba's is not published
    assert parts["lm"] == lm == LMCost(PRESETS[preset].lm).parameters


def test_the_parts_of_whole_towers_add_up_to_what_is_published():
    """transformers' CLIPVisionModel has 303,507,456 parameters: a block and a norm more than is needed."""
    block, norm = vit(1024, 1, 4096, 0, 0) - vit(1024, 0, 4096, 0, 0), 2 * 1024
    assert CLIP + block + norm == 303_507_456
    assert round(mamba_2_8b(), -8) == 2_800_000_000


def test_cobra_is_as_released():
    config = PRESETS["cobra-3b"]
    assert [tower.name for tower in config.vision_encoder.towers] == [
        "vit_large_patch14_reg4_dinov2.lvd142m", "vit_so400m_patch14_siglip_384"
    ]  # fmt: skip
    assert {tower.block for tower in config.vision_encoder.towers} == {-2}
    assert (config.image.height, config.image.width, config.image.resize) == (384, 384, "squash")
    assert config.connector.kind == "fused_mlp" and config.template == "zephyr"
    assert config.tokens_per_tile == 729
    assert PRESETS["ml-mamba-3b"].vision_encoder == config.vision_encoder


def test_vl_mamba_is_its_best_variant():
    config = PRESETS["vl-mamba"]
    assert (config.connector.kind, config.connector.order) == ("vss_l2", "bi2")
    assert config.vision_encoder.name == "vit_so400m_patch14_siglip_384"
    assert config.lm == PRESETS["mamba-2.8b"].lm and config.tokens_per_tile == 729


def test_llava_is_as_released():
    timm = pytest.importorskip("timm")
    config = PRESETS["llava-1.5"]
    name, block = config.vision_encoder.name, config.vision_encoder.block
    assert block == -2 and config.connector.kind == "mlp" and config.template == "vicuna_v1"
    assert config.tokens_per_tile == 576 and config.image.resize == "letterbox"
    with torch.device("meta"):
        tower = timm.create_model(name)
    assert type(tower.blocks[0].mlp.act).__name__ == "QuickGELU"
    assert timm.get_pretrained_cfg(name).hf_hub_id == "timm/vit_large_patch14_clip_336.openai"
    # The colour in LLaVA's code: the mean of what the tower was trained on, in whole steps.
    assert config.image.fill == tuple(int(part * 255) for part in tower.pretrained_cfg["mean"])
    assert not config.lm.tie_word_embeddings and config.lm.norm_eps == 1e-5
    attention, mlp = config.lm.layers[:2]
    assert (attention.num_heads, attention.num_kv_heads, attention.headdim) == (32, 32, 128)
    assert attention.rope_theta == 10000.0 and mlp.d_ff == 11008 and len(config.lm.layers) == 64


def test_configurations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["tiny"].lm.d_model = 3


@pytest.mark.parametrize(
    "table", [LAYERS, CONNECTORS, VISION_ENCODERS], ids=["layers", "connectors", "encoders"]
)
def test_tables_name_every_kind_by_its_config(table):
    for kind, module in table.items():
        (field,) = (field for field in dataclasses.fields(module.Config) if field.name == "kind")
        assert field.default == kind and field.kw_only
        assert module.Config.__dataclass_params__.frozen


def small_config(**changes) -> CobraConfig:
    settings = {
        "image": ImageConfig(height=32, width=48),
        "vision_encoder": SmallEncoderConfig(patch_size=8, d_model=16, num_heads=2),
        "connector": LinearConfig(),
        "lm": LMConfig(d_model=16, vocab_size=300, layers=(MLPConfig(d_ff=8),)),
    }
    return CobraConfig(**{**settings, **changes})


def test_tokens_of_a_tile_that_is_not_square():
    config = small_config()
    assert config.grid == (4, 6) and config.tokens_per_tile == 24


def test_an_unknown_template_names_the_nearest():
    with pytest.raises(UserError, match="'compact'"):
        small_config(template="compakt")


def test_an_image_smaller_than_a_patch_fails_at_construction():
    with pytest.raises(UserError, match="4 x 64"):
        small_config(image=ImageConfig(height=4, width=64))


def scaling(**changes) -> Llama3RopeScaling:
    right = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    return Llama3RopeScaling(**{**right, "original_max_position_embeddings": 8192, **changes})


WRONG = {
    "no layers": lambda: LMConfig(d_model=8, vocab_size=8, layers=()),
    "d_model 0": lambda: LMConfig(d_model=0, vocab_size=8, layers=(MLPConfig(d_ff=8),)),
    "vocab_size 0": lambda: LMConfig(d_model=8, vocab_size=0, layers=(MLPConfig(d_ff=8),)),
    "d_ff 0": lambda: MLPConfig(d_ff=0),
    "num_heads not a multiple": lambda: AttentionConfig(num_heads=4, num_kv_heads=3),
    "num_heads 0": lambda: AttentionConfig(num_heads=0, num_kv_heads=1),
    "num_kv_heads 0": lambda: AttentionConfig(num_heads=4, num_kv_heads=0),
    "num_kv_heads negative": lambda: AttentionConfig(num_heads=4, num_kv_heads=-2),
    "odd headdim": lambda: AttentionConfig(num_heads=4, num_kv_heads=2, headdim=9),
    "headdim 0": lambda: AttentionConfig(num_heads=4, num_kv_heads=2, headdim=0),
    "window 0": lambda: AttentionConfig(num_heads=4, num_kv_heads=2, window=0),
    "scaled positions that are none": lambda: AttentionConfig(
        num_heads=4, num_kv_heads=2, rope_theta=None, rope_scaling=scaling()
    ),
    "rope factor 0": lambda: scaling(factor=0.0),
    "rope factors upside down": lambda: scaling(low_freq_factor=4.0),
    "rope of no context": lambda: scaling(original_max_position_embeddings=0),
    "mamba2 d_state 0": lambda: Mamba2Config(d_state=0),
    "mamba2 headdim 0": lambda: Mamba2Config(headdim=0),
    "mamba2 ngroups 0": lambda: Mamba2Config(ngroups=0),
    "mamba2 d_conv 0": lambda: Mamba2Config(d_conv=0),
    "mamba2 chunk_size 0": lambda: Mamba2Config(chunk_size=0),
    "mamba2 another activation": lambda: Mamba2Config(conv_activation="gelu"),
    "mamba2 heads of x": lambda: Mamba2Config(d_state=8, headdim=8, ngroups=8, d_xb=24).projected(32),
    "mamba2 groups with heads of x": lambda: Mamba2Config(d_state=8, headdim=8, d_xb=16).projected(32),
    "mamba1 heads of x": lambda: Mamba1Config(d_state=8, d_xb=24).projected(32),
    "mamba2 one dt_limit": lambda: Mamba2Config(dt_limit=(0.1,)),
    "mamba2 dt_limit upside down": lambda: Mamba2Config(dt_limit=(0.5, 0.1)),
    "mamba2 dt_min 0": lambda: Mamba2Config(dt_min=0.0),
    "mamba2 heads": lambda: Mamba2Config(headdim=48).nheads(64),
    "mamba2 groups": lambda: Mamba2Config(headdim=32, ngroups=3).nheads(64),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_a_wrong_size_fails_at_construction(wrong):
    with pytest.raises(UserError) as caught:
        WRONG[wrong]()
    assert "\n" not in str(caught.value)


def test_no_positions_need_no_even_heads():
    assert AttentionConfig(num_heads=2, num_kv_heads=1, headdim=9, rope_theta=None).headdim == 9
