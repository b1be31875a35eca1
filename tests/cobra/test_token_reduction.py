"""Token reductions against loops over cells that were written from the papers, and as part of a model."""

import json
import math
from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

import cobra
from cobra.config import PRESETS, CobraConfig
from cobra.connector import CONNECTORS, MLPConfig
from cobra.image import ImageConfig
from cobra.lm import LMConfig
from cobra.token_reduction import TOKEN_REDUCTIONS, ToMeConfig, VisionZipConfig, group_means, similar_groups
from cobra.towers.vmamba import VMambaConfig
from cobra.typed_config import override
from cobra.vision_encoder import (
    FusedEncoderConfig,
    PatchAttention,
    SmallEncoder,
    SmallEncoderConfig,
    TimmEncoder,
    TimmEncoderConfig,
)
from tests.cobra.test_connector import small as small_connector
from tests.tolerance import assert_close
from vision_scan.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

CELLS = [1, 2, 7, 24, 35]


def tokens(cells: int, batch: int = 3, d: int = 6, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, cells, d, generator=generator, dtype=torch.float64)


def attention(cells: int, batch: int = 3) -> PatchAttention:
    return PatchAttention(received=tokens(cells, batch, 1, seed=1)[..., 0].softmax(-1), keys=tokens(cells, batch, 5, 2))


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b) / math.sqrt(float(a @ a) * float(b @ b))


def slow_tome(x: Tensor, keys: Tensor, num_tokens: int) -> Tensor:
    """One picture: groups of cells as lists, in the order of the place that they stand at."""
    groups = [[cell] for cell in range(len(x))]
    while len(groups) > num_tokens:
        key = [keys[group].mean(0) for group in groups]
        edges = []
        for a in range(0, len(groups), 2):
            if len(groups) > 1:
                best = max(range(1, len(groups), 2), key=lambda b, a=a: cosine(key[a], key[b]))
                edges.append((cosine(key[a], key[best]), a, best))
        fewer = min(len(groups) - num_tokens, len(groups) // 2)
        gone = []
        for _, a, b in sorted(edges, reverse=True)[:fewer]:
            groups[b] = groups[b] + groups[a]
            gone.append(a)
        groups = [group for place, group in enumerate(groups) if place not in gone]
    return torch.stack([x[group].mean(0) for group in groups])


def slow_visionzip(x: Tensor, seen: PatchAttention, row: int, config: VisionZipConfig) -> Tensor:
    received, keys = seen.received[row], seen.keys[row]
    dominant = sorted(range(len(x)), key=lambda cell: -float(received[cell]))[: config.dominant]
    rest = [cell for cell in range(len(x)) if cell not in dominant]
    found = {cell: x[cell] for cell in dominant}
    if config.contextual:
        step = max(1, len(rest) // config.contextual)
        anchors = rest[::step][: config.contextual]
        owned: dict[int, list[Tensor]] = {anchor: [] for anchor in anchors}
        for cell in rest:
            if cell not in anchors:
                owned[max(anchors, key=lambda anchor, cell=cell: cosine(keys[cell], keys[anchor]))].append(x[cell])
        for anchor, others in owned.items():
            found[anchor] = x[anchor] + (sum(others) / len(others) if others else 0)
    return torch.stack([found[cell] for cell in sorted(found)])


@pytest.mark.parametrize("cells", CELLS)
def test_tome_is_its_formula(cells):
    x, seen = tokens(cells), attention(cells)
    for num_tokens in {1, 2, cells // 3, cells // 2, cells - 1, cells} & set(range(1, cells + 1)):
        expected = torch.stack([slow_tome(x[row], seen.keys[row], num_tokens) for row in range(3)])
        assert_close(str(num_tokens), ToMeConfig(num_tokens=num_tokens).reduce(x, seen), expected, 1e-12)


@pytest.mark.parametrize("cells", CELLS)
def test_visionzip_is_its_formula(cells):
    x, seen = tokens(cells), attention(cells)
    shares = (cells // 2, cells // 4), (cells // 3, 2)
    for dominant, contextual in [(1, 0), (cells, 0), (0, 1), (0, cells), (5, 3), *shares]:
        if 1 <= dominant + contextual <= cells:
            config = VisionZipConfig(dominant=dominant, contextual=contextual)
            expected = torch.stack([slow_visionzip(x[row], seen, row, config) for row in range(3)])
            assert_close(str(config), config.reduce(x, seen), expected, 1e-12)


REDUCTIONS = {"tome": ToMeConfig(num_tokens=5), "visionzip": VisionZipConfig(dominant=3, contextual=2)}


def test_every_reduction_is_tested():
    assert REDUCTIONS.keys() == TOKEN_REDUCTIONS.keys()


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_as_many_tokens_as_cells_are_the_cells(kind):
    x, seen = tokens(12), attention(12)
    every = {"tome": ToMeConfig(num_tokens=12), "visionzip": VisionZipConfig(dominant=12, contextual=0)}[kind]
    assert torch.equal(every.reduce(x, seen), x)


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_pictures_of_a_batch_are_reduced_as_if_alone(kind):
    x, seen, config = tokens(24), attention(24), REDUCTIONS[kind]
    together = config.reduce(x, seen)
    for row in range(3):
        one = slice(row, row + 1)
        alone = config.reduce(x[one], PatchAttention(seen.received[one], seen.keys[one]))
        assert_close(str(row), together[one], alone, 1e-12)


def test_cells_that_are_kept_stay_in_raster_order():
    cells, seen = torch.arange(24.0).expand(3, -1)[..., None], attention(24)
    kept = VisionZipConfig(dominant=7, contextual=0).reduce(cells, seen)[..., 0]
    assert (kept.diff() > 0).all()
    # Of two rounds that merge nothing but pairs of neighbours, what is left is in their order.
    keys = torch.eye(6).repeat_interleave(4, dim=0)[None]
    assert similar_groups(keys, 6).tolist() == [[group for group in range(6) for _ in range(4)]]


@pytest.mark.parametrize("kind", REDUCTIONS)
def test_autocast_changes_no_choice(kind):
    x, seen = tokens(200).float(), attention(200)
    seen = PatchAttention(seen.received.float(), seen.keys.float())
    plain = REDUCTIONS[kind].reduce(x, seen)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(REDUCTIONS[kind].reduce(x, seen), plain)


def test_means_of_groups_in_half_precision_are_summed_in_float32():
    x = torch.full((1, 4000, 1), 1.01).bfloat16()
    found = group_means(x, torch.zeros(1, 4000, dtype=torch.int64), 2)
    assert found.dtype == torch.bfloat16 and found[0, 0] == x[0, 0] and found[0, 1] == 0


def test_attention_received_by_hand():
    q, k = tokens(9, 2, 4, 3).unflatten(0, (1, 2)), tokens(9, 2, 4, 4).unflatten(0, (1, 2))
    rows = torch.stack([torch.exp(q[0, h] @ k[0, h].T / 2) for h in range(2)])
    rows = (rows / rows.sum(-1, keepdim=True)).mean(0)
    plain, classed = PatchAttention.of(q, k), PatchAttention.of(q, k, 3, True)
    assert_close("all", plain.received[0], rows.mean(0), 1e-12)
    assert_close("class", classed.received[0], rows[0, 3:], 1e-12)
    assert_close("keys", classed.keys[0], k[0, :, 3:].mean(0), 1e-12)


@torch.no_grad()
def test_small_tower_gives_the_attention_of_its_last_block(monkeypatch):
    encoder = SmallEncoder(SmallEncoderConfig(d_model=24, depth=2, num_heads=2), ImageConfig(height=24, width=40))
    seen = []

    def attend(q, k, v):
        weights = (q @ k.mT / math.sqrt(q.shape[-1])).softmax(-1)
        seen.append((weights, k))
        return weights @ v

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", attend)
    pixels = torch.rand(3, 3, 24, 40)
    features, (found,) = encoder(pixels, attention_of=(-1,))
    weights, k = seen[1]
    assert len(seen) == 2 and torch.equal(features, encoder(pixels))
    assert_close("received", found.received, weights.mean((1, 2)), 1e-6)
    assert_close("keys", found.keys, k.mean(1), 1e-6)
    assert_close("sum", found.received.sum(-1), torch.ones(3), 1e-6)


@pytest.mark.parametrize(
    ("name", "prefix", "is_classed"),
    [
        ("vit_tiny_patch16_224", 1, True),
        ("vit_small_patch14_reg4_dinov2.lvd142m", 5, True),
        ("vit_base_patch16_siglip_224", 0, False),
    ],
)
@torch.no_grad()
def test_timm_tower_gives_the_attention_of_its_last_block(monkeypatch, name, prefix, is_classed):
    pytest.importorskip("timm")
    side = 14 if "patch14" in name else 16
    encoder = TimmEncoder(TimmEncoderConfig(name=name, block=2), ImageConfig(height=2 * side, width=3 * side)).eval()
    encoder.check_attention("it", (-1,))
    pixels = torch.rand(3, 3, 2 * side, 3 * side)
    features, (found,) = encoder(pixels, attention_of=(-1,))
    assert torch.equal(features, encoder(pixels))
    attn = encoder.tower.blocks[-1].attn
    attn.fused_attn = False
    weights = []
    attn.attn_drop.register_forward_hook(lambda module, inputs, output: weights.append(output))
    encoder(pixels)
    (weights,) = weights
    expected = weights[:, :, 0] if is_classed else weights.mean(2)
    assert weights.shape[-1] == prefix + 6
    assert_close("received", found.received, expected.mean(1)[:, prefix:], 1e-5)
    assert found.keys.shape == (3, 6, attn.head_dim)


def small_config(**changes) -> CobraConfig:
    settings = {
        "image": ImageConfig(height=24, width=40),
        "vision_encoder": SmallEncoderConfig(patch_size=8, d_model=16, num_heads=2),
        "connector": MLPConfig(),
        "lm": LMConfig(d_model=16, vocab_size=300, layers=(replace(PRESETS["tiny"].lm.layers[0], headdim=8),)),
    }
    return CobraConfig(**{**settings, **changes})


VARIANTS = {
    **{
        f"{kind} behind the {behind}": {"token_reduction": replace(reduction, behind=behind), "connector": connector}
        for kind, reduction in REDUCTIONS.items()
        for behind, connector in (("vision_encoder", MLPConfig()), ("connector", small_connector("msc")))
    },
    **{
        kind: {"connector": small_connector(kind)} for kind in ("pool2d", "space_to_depth", "reshape", "mqt")
    },
    "pool2d 1d": {"connector": replace(small_connector("pool2d"), mode="1d")},
    "mqt with few": {"connector": replace(small_connector("mqt"), keep=4, num_queries=4)},
}


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_the_language_model_gets_as_many_tokens_as_the_processor_expands(name, tmp_path):
    config = small_config(**VARIANTS[name])
    model = cobra.build(config)
    grey = Image.new("RGB", (30, 20), "grey")
    batch = model.processor(text=["<image> and <image>?", "<image>"], images=[[grey, grey], [grey]])
    assert int((batch["input_ids"] == model.tokenizer.image_id).sum()) == 3 * config.tokens_per_tile
    assert model.encode_images(batch["pixel_values"]).shape == (3, config.tokens_per_tile, 16)
    assert model.embed(batch["input_ids"], batch["pixel_values"]).shape == (*batch["input_ids"].shape, 16)
    cobra.save(model, tmp_path / "model")
    loaded = cobra.load(tmp_path / "model", dtype="float32")
    assert loaded.config == config
    answers = [m.answer("What?", images=[grey], max_new_tokens=4) for m in (model, loaded)]
    assert answers[0] == answers[1]


@pytest.mark.parametrize("name", VARIANTS)
def test_a_training_step_reaches_every_parameter(name):
    config = small_config(**VARIANTS[name])
    model = cobra.build(config).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(200, (3, config.tokens_per_tile + 6), generator=generator)
    ids[:, : config.tokens_per_tile] = model.tokenizer.image_id
    labels = torch.where(ids == model.tokenizer.image_id, -100, ids)
    pixels = torch.rand(3, 3, 24, 40, generator=generator)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, _ = model.loss({"input_ids": ids, "labels": labels, "pixel_values": pixels})
    loss.backward()
    for part in (model.vision_encoder, model.connector, model.lm):
        for parameter_name, parameter in part.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.any(), parameter_name


@torch.no_grad()
def test_tokens_of_a_model_are_those_of_its_parts():
    config = small_config(token_reduction=REDUCTIONS["visionzip"])
    model, pixels = cobra.build(config).double(), torch.rand(3, 3, 24, 40, dtype=torch.float64)
    features, (seen,) = model.vision_encoder(pixels, attention_of=(-1,))
    kept = [slow_visionzip(features[row].flatten(0, 1), seen, row, config.token_reduction) for row in range(3)]
    assert_close("in front", model.encode_images(pixels), model.connector(torch.stack(kept)[:, None]), 1e-10)
    behind = replace(config, token_reduction=replace(REDUCTIONS["visionzip"], behind="connector"))
    model.config = behind
    after = model.connector(features)
    kept = [slow_visionzip(after[row], seen, row, behind.token_reduction) for row in range(3)]
    assert_close("behind", model.encode_images(pixels), torch.stack(kept), 1e-10)


def test_a_directory_is_read_with_the_reduction_that_its_config_says_or_none(tmp_path):
    cobra.save(cobra.build(small_config()), tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    data = json.loads(file.read_text())
    assert data.pop("token_reduction") is None
    file.write_text(json.dumps(data))  # as from before there were any
    assert cobra.load(tmp_path / "model").config == small_config()
    file.write_text(json.dumps({**data, "token_reduction": {"kind": "tome", "num_tokens": 4}}))
    model = cobra.load(tmp_path / "model")
    assert model.config.tokens_per_tile == 4
    assert model.answer("What?", images=[Image.new("RGB", (9, 9))], max_new_tokens=2)


def test_settings_as_text():
    config = override(small_config(), "token_reduction", '{"kind": "tome", "num_tokens": 4}')
    assert config.token_reduction == ToMeConfig(num_tokens=4) and config.tokens_per_tile == 4
    assert override(config, "token_reduction.num_tokens", "9").tokens_per_tile == 9
    assert override(config, "token_reduction", "none") == small_config()


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("16 tokens, but a tile has 3 x 5 cells: give from 1 to 15", {"token_reduction": ToMeConfig(num_tokens=16)}),
        ("0 tokens", {"token_reduction": ToMeConfig(num_tokens=0)}),
        (
            "looks at one cell at a time, msc does not.*behind=connector",
            {"token_reduction": REDUCTIONS["tome"], "connector": small_connector("msc")},
        ),
        (
            "makes one token of each cell, pool2d does not",
            {"token_reduction": ToMeConfig(num_tokens=5, behind="connector"), "connector": small_connector("pool2d")},
        ),
        ("behind='lm'", {"token_reduction": ToMeConfig(num_tokens=5, behind="lm")}),
    ],
)
def test_what_does_not_suit_fails_at_construction(message, changes):
    with pytest.raises(UserError, match=message):
        small_config(**changes)


@pytest.mark.parametrize(("dominant", "contextual"), [(-1, 5), (5, -1), (0, 0)])
def test_visionzip_refuses_impossible_numbers(dominant, contextual):
    with pytest.raises(UserError, match=f"dominant {dominant}, contextual {contextual}"):
        VisionZipConfig(dominant=dominant, contextual=contextual)


@pytest.mark.parametrize(
    ("message", "encoder"),
    [
        ("vision_encoder.depth", SmallEncoderConfig(patch_size=8, d_model=16, num_heads=2, depth=0)),
        ("plain block", TimmEncoderConfig(name="eva02_tiny_patch14_224", block=2)),
        ("vmamba has none", VMambaConfig(dims=(8, 16), depths=(1, 1))),
        ("one tower", FusedEncoderConfig(towers=(TimmEncoderConfig(name="vit_tiny_patch16_224"),) * 2)),
    ],
)
def test_a_tower_without_a_readable_attention_is_refused(message, encoder):
    pytest.importorskip("timm")
    config = small_config(
        image=ImageConfig(height=48, width=48), vision_encoder=encoder, token_reduction=ToMeConfig(num_tokens=4)
    )
    with pytest.raises(UserError, match=message):
        cobra.build(config)


def test_every_connector_says_whether_it_can_stand_behind_a_reduction():
    suits = {kind for kind in CONNECTORS if accepts(ToMeConfig(num_tokens=5), kind)}
    assert suits == {"linear", "mlp", "fused_mlp"}
    suits = {kind for kind in CONNECTORS if accepts(ToMeConfig(num_tokens=5, behind="connector"), kind)}
    assert suits == {"linear", "mlp", "fused_mlp", "msc", "vss_mlp", "vss_l2"}


def accepts(reduction: ToMeConfig, kind: str) -> bool:
    try:
        small_config(token_reduction=reduction, connector=small_connector(kind))
    except UserError:
        return False
    return True
