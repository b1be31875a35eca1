"""Tiles of their own sizes (native aspect ratios, LLaVA-UHD): choices against transformers' image processors, tokens of
mixed batches against each image alone."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cobra
from cobra.config import CobraConfig
from cobra.connector import CONNECTORS, LinearConfig, MQTConfig
from cobra.cost import tile_work
from cobra.image import ImageConfig, to_patches, to_pixels
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.stack import LMConfig
from cobra.processor import Processor
from cobra.prompt import Turn
from cobra.tiles import NativeConfig, SizedLayout, SliceSeparators, TileFrame, UHDConfig
from cobra.tiles.sized import encode_tiles
from cobra.token_reduction import ToMeConfig
from cobra.tokenizer import Tokenizer
from cobra.typed_config import from_dict, override, to_dict
from cobra.vision_encoder import FusedEncoderConfig, S2EncoderConfig, SmallEncoderConfig, TimmEncoder, TimmEncoderConfig
from tests.cobra import tower_samples
from tests.cobra.shards import assert_pieces_are_of
from tests.cobra.test_tiles import picture, rectangles
from tests.tolerance import assert_close
from vision_scan.errors import UserError

SMALL = SmallEncoderConfig(patch_size=4, d_model=8, num_heads=2)
TILINGS = {"native": NativeConfig(min_cells=2, max_cells=30), "uhd": UHDConfig()}
# Two of one shape, one of a single cell at most, two that are extremely long.
SIZES = [(40, 17), (9, 90), (33, 34), (40, 17), (1, 3), (1, 3000), (900, 2)]


def config(kind: str = "native", **changes) -> CobraConfig:
    settings = {
        "image": ImageConfig(height=16, width=20, tiles=TILINGS[kind]),
        "vision_encoder": SMALL,
        "connector": LinearConfig(),
        "lm": LMConfig(d_model=8, vocab_size=300, layers=(Mamba2Config(d_state=4, headdim=4, chunk_size=8),)),
    }
    return CobraConfig(**{**settings, **changes})


@pytest.fixture(scope="module", params=list(TILINGS))
def model(request):
    return cobra.build(config(request.param), dtype="float64")


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]


def test_native_sizes_are_those_of_qwen2_vl():
    """Where theirs keep to the limits and the image is not extremely long."""
    smart_resize = pytest.importorskip("transformers.models.qwen2_vl.image_processing_qwen2_vl").smart_resize
    num_compared = 0
    for least, most, stride in ((4, 1280, 28), (64, 256, 14), (1, 9, 8)):
        tiling = NativeConfig(min_cells=least, max_cells=most)
        for height, width in rectangles(2000):
            rows, columns = tiling.choose(height, width, stride)
            assert 1 <= rows * columns <= most, (height, width)
            if max(height, width) > 200 * min(height, width):
                continue
            theirs = smart_resize(height, width, stride, least * stride**2, most * stride**2)
            if math.prod(theirs) <= most * stride**2:
                num_compared += 1
                assert (rows * stride, columns * stride) == theirs, (height, width)
                assert rows * columns >= least
    assert num_compared > 5000


def test_native_sizes_by_hand():
    tiling = NativeConfig(min_cells=4, max_cells=12)
    assert tiling.choose(10, 30, 10) == (2, 4)  # three cells are too few: twice the area fits, rounded up
    assert tiling.choose(20, 30, 10) == (2, 3)
    assert tiling.choose(24, 46, 10) == (2, 5)
    assert tiling.choose(300, 300, 10) == (3, 3)  # 12 cells would be 3.46 each way
    assert tiling.choose(1, 5000, 10) == (1, 12) and tiling.choose(5000, 1, 10) == (12, 1)
    assert NativeConfig(min_cells=1).choose(10, 10, 10) == NativeConfig(min_cells=1).choose(1, 1, 10) == (1, 1)
    assert NativeConfig(min_cells=3, max_cells=3).choose(50, 50, 10) == (1, 1)  # 2 x 2 are too many


def test_slices_by_hand():
    frame = TileFrame((336, 336), (24, 24), 14)
    tiling = UHDConfig(max_slices=6)
    # 672 x 1008 (height x width) has six times the pixels: 2 x 3 slices, whole, and the overview in 274 x 411 pixels.
    assert tiling.layout(672, 1008, frame) == SizedLayout(14, (19, 29), 19 * 29, 2, 3, (24, 24), 577)
    assert tiling.layout(672, 1008, frame).num_tokens == 19 * 29 + 6 * 577
    assert tiling.layout(336, 336, frame) == SizedLayout(14, (24, 24), 576)  # no more pixels than a slice
    assert tiling.layout(100, 50, frame) == SizedLayout(14, (33, 16), 33 * 16)  # made larger all the same
    # Two slices or three (one cannot be): of 337 x 336 two rows are as near as two columns, and come first.
    assert tiling.choose(337, 336, (336, 336)) == (2, 1) and tiling.choose(336, 337, (336, 336)) == (1, 2)
    assert tiling.choose(100_000, 10, (336, 336)) == (6, 1)
    assert UHDConfig(max_slices=1).choose(5000, 5000, (336, 336)) == (0, 0)


@pytest.mark.parametrize(("resolution", "most"), [(336, 7), (448, 9)])
def test_slices_are_those_of_transformers(resolution, most, monkeypatch):
    """MiniCPM-V slices as LLaVA-UHD does, but rounds to the nearest cell where LLaVA-UHD rounds down."""
    module = pytest.importorskip("transformers.models.minicpmv4_6.image_processing_pil_minicpmv4_6")
    monkeypatch.setattr(module, "ensure_divide", lambda length, by: max(math.floor(length / by) * by, by))
    theirs, merged = object.__new__(module.MiniCPMV4_6ImageProcessorPil), {"patch_size": 7, "downsample_mode": "4x"}
    frame, tiling = TileFrame((resolution, resolution), (resolution // 14,) * 2, 14), UHDConfig(max_slices=most)
    found = set()
    for height, width in rectangles(3000):
        if max(height, width) > 100 * min(height, width):
            continue
        layout = tiling.layout(height, width, frame)
        grid = theirs.get_sliced_grid((height, width), most, resolution)
        overview = theirs.find_best_resize((height, width), resolution, **merged, allow_upscale=grid is None)
        assert tuple(14 * side for side in layout.overview) == overview, (height, width)
        if grid is None:
            assert not layout.num_slices
            continue
        assert [layout.rows, layout.columns] == grid, (height, width)
        whole = theirs.get_refine_size((height, width), grid, resolution, **merged, allow_upscale=True)
        assert (14 * layout.rows * layout.slice[0], 14 * layout.columns * layout.slice[1]) == whole, (height, width)
        found.add(tuple(grid))
    assert len(found) > 12


@pytest.mark.parametrize("kind", TILINGS)
@pytest.mark.parametrize("connector", ["linear", "pool2d", "ldpv2", "space_to_depth", "mqt"])
def test_no_image_has_more_tokens_than_the_largest_layout(kind, connector):
    own = {"num_queries": 4, "num_heads": 2} if connector == "mqt" else {}
    made = config(kind, connector=CONNECTORS[connector].Config(**own))
    sizes = [*rectangles(500), *SIZES, (1, 1), (1, 10**6), (10**6, 1)]
    counts = [made.layout(*size).num_tokens for size in sizes]
    most = made.largest_layout
    assert 1 <= min(counts) <= max(counts) <= most.num_tokens
    if kind == "native":
        assert max(counts) == most.num_tokens
    limit = 30 if kind == "native" else 20  # cells of a tile of 16 x 20 pixels
    for layout in [most, *(made.layout(*size) for size in sizes)]:
        assert all(1 <= rows * columns <= limit for rows, columns in layout.grids())
        assert layout.num_tiles == len(layout.grids())
        assert layout.num_entries == sum(map(math.prod, layout.grids()))


def test_the_patches_are_the_picture_cut_row_by_row():
    """A picture of whole cells is not resized; its slices are pieces of it, and its overview is that of one tile."""
    image = picture(16, 24)
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0) / 255
    native = to_patches(image, NativeConfig().layout(16, 24, TileFrame((16, 16), (4, 4), 4)))
    assert native.shape == (24, 3, 4, 4)
    for number, patch in enumerate(native):
        y, x = 4 * (number // 6), 4 * (number % 6)
        torch.testing.assert_close(patch, pixels[:, y : y + 4, x : x + 4], rtol=0, atol=1e-7)
    layout = SizedLayout(4, (2, 3), 6, 2, 3, (2, 2), 5)
    patches = to_patches(image, layout)
    assert len(patches) == layout.num_entries == 6 + 6 * 4
    overview = to_pixels(image, ImageConfig(height=8, width=12))
    tiles = encode_tiles(patches, [layout], lambda tiles: tiles)
    assert torch.equal(tiles[0], overview[0])
    for number, tile in enumerate(tiles[1:]):
        y, x = 8 * (number // 3), 8 * (number % 3)
        torch.testing.assert_close(tile, pixels[:, y : y + 8, x : x + 8], rtol=0, atol=1e-7)


def test_separators_stand_between_slices_and_at_the_ends_of_rows():
    join = SliceSeparators(2).double()
    layouts = [SizedLayout(4, (1, 3), 3, 2, 3, (1, 2), 3), SizedLayout(4, (1, 1), 1)]
    sizes = [3, *[2] * 6, 1]
    tokens = [torch.full((size, 2), float(number), dtype=torch.float64) for number, size in enumerate(sizes)]
    comma, newline = join.comma, join.newline
    expected = [*tokens[0]]
    for number in range(1, 7):
        expected += [*tokens[number], newline if number in (3, 6) else comma]
    joined = join(tokens, layouts)
    assert torch.equal(joined, torch.stack([*expected, *tokens[7]]))
    assert len(joined) == sum(layout.num_tokens for layout in layouts)
    join([torch.zeros(1, 2)], layouts[1:]).sum().backward()  # no slices, and a gradient of zero all the same
    assert not comma.grad.any() and not newline.grad.any()


@torch.no_grad()
def test_a_batch_of_mixed_sizes_is_its_images_alone(model, pictures):
    """Several pictures in a row, one, none: every row has the tokens that a tower alone makes of each tile."""
    texts = ["<image>a<image><image>", "no picture", "b<image>", "<image><image><image>"]
    images = [pictures[:3], None, pictures[3:4], pictures[4:]]
    batch = model.processor(text=texts, images=images, padding_side="right")
    layouts = [model.config.layout(*size) for size in SIZES]
    assert len({layout.num_tokens for layout in layouts}) > 3
    assert batch["tiles_per_image"].tolist() == [layout.num_entries for layout in layouts]
    assert batch["pixel_values"].shape == (sum(layout.num_entries for layout in layouts), 3, 4, 4)
    counts = (batch["input_ids"] == model.tokenizer.image_id).sum(1).tolist()
    tokens = [layout.num_tokens for layout in layouts]
    assert counts == [sum(tokens[:3]), 0, tokens[3], sum(tokens[4:])]
    together = model.embed(batch["input_ids"], batch["pixel_values"].double(), batch["image_sizes"])
    for row, (text, some) in enumerate(zip(texts, images, strict=True)):
        one = model.processor(text=[text], images=[some])
        pixels = None if one["pixel_values"] is None else one["pixel_values"].double()
        alone = model.embed(one["input_ids"], pixels, one["image_sizes"])
        assert_close(text, together[row : row + 1, : alone.shape[1]], alone, 1e-12)


@torch.no_grad()
def test_tokens_are_those_of_tower_and_connector_on_the_resized_image(pictures):
    """Native: the same as a model of one tile whose size is the image's."""
    native = cobra.build(config(), dtype="float64")
    for image in pictures:
        rows, columns = native.config.layout(image.height, image.width).overview
        fixed = replace(native.config, image=ImageConfig(height=4 * rows, width=4 * columns))
        other = cobra.build(fixed, dtype="float64")
        other.load_state_dict(native.state_dict())
        both = []
        for each in (native, other):
            batch = each.processor(text=["<image>"], images=[[image]])
            both.append(each.embed(batch["input_ids"], batch["pixel_values"].double(), batch["image_sizes"]))
        assert_close(str(image.size), *both, 1e-12)


@pytest.mark.parametrize("kind", TILINGS)
def test_answers_of_a_batch_are_those_of_each_alone(kind, pictures):
    model = cobra.build(config(kind))
    requests = [("What?", pictures[:2]), ("Why?", None), ("<image>?", pictures[2]), ("Who?", pictures[3:])]
    alone = [model.answer(question, images, max_new_tokens=4) for question, images in requests]
    assert model.answer_batch(requests, max_new_tokens=4) == alone
    state = model.prefill(images=pictures[:2])
    assert model.answer("What?", state=state, max_new_tokens=4) == alone[0]
    batch = model.processor(text=["<image>", "a"], images=[[pictures[2]], None])
    assert model.generate(**batch, max_new_tokens=2).shape == (2, 2)


@torch.no_grad()
def test_pieces_of_a_row_are_embedded_as_the_whole(model, pictures):
    images = [pictures[:3], pictures[3:]]
    batch = model.processor(text=["ab<image>c<image><image>", "<image>" * 4], images=images)
    ids, pixels, sizes = batch["input_ids"], batch["pixel_values"].double(), batch["image_sizes"].tolist()
    assert_pieces_are_of(model, model.embed(ids, pixels, sizes), ids, pixels, sizes)


@pytest.mark.parametrize("kind", TILINGS)
def test_everything_learns_and_is_saved(kind, pictures, tmp_path):
    model = cobra.build(config(kind))
    turns = [Turn("user", "<image>a<image>"), Turn("assistant", "b")]
    rendered = model.processor.render(turns, 2, sizes=SIZES)
    ids, labels = (torch.tensor([x]) for x in (rendered.input_ids, rendered.labels))
    pixels = torch.cat([model.processor.pixels(image) for image in pictures[:2]])
    loss, _ = model.loss({"input_ids": ids, "labels": labels, "pixel_values": pixels, "image_sizes": SIZES[:2]})
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad.any() or "bias" in name), name
    cobra.save(model, tmp_path / "model")
    again = cobra.load(tmp_path / "model")
    assert again.config == model.config
    assert again.answer("?", pictures, max_new_tokens=3) == model.answer("?", pictures, max_new_tokens=3)


def test_nested_connectors_learn_on_tiles_of_any_size(pictures, monkeypatch):
    model = cobra.build(config(connector=MQTConfig(num_queries=4, num_heads=2, nested=True)))
    batch = model.processor(text=["<image>a<image>b"], images=[pictures[:2]])
    batch["labels"] = batch["input_ids"].masked_fill(batch["input_ids"] == model.tokenizer.image_id, -100)
    expected = model.loss(batch)
    model.train()
    monkeypatch.setattr(model.connector, "draw", lambda: 4)
    torch.testing.assert_close(model.loss(batch), expected)
    monkeypatch.setattr(model.connector, "draw", lambda: 2)
    loss, count = model.loss(batch)
    assert count == expected[1] and loss != expected[0]


@pytest.mark.parametrize("kind", TILINGS)
def test_a_batch_without_images_goes_through_all_modules(kind):
    model = cobra.build(config(kind))
    model.encodes_always = True
    ids = torch.tensor([[97, 98]])
    embeds = model.embed(ids)
    assert torch.equal(embeds, model.lm.embedding(ids))
    embeds.sum().backward()
    for name, parameter in [*model.connector.named_parameters(), *model.vision_encoder.named_parameters()]:
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("connector", ["mlp", "msc", "vss_l2", "pool2d", "ldpv2", "space_to_depth", "reshape", "mqt"])
def test_connectors_serve_both(connector, model, pictures):
    own = {
        "msc": {"mixer": Mamba2Config(d_state=4, headdim=4)},
        "mqt": {"num_queries": 4, "num_heads": 2, "nested": not model.config.image.tiles.separates},
    }
    made = replace(model.config, connector=CONNECTORS[connector].Config(**own.get(connector, {})))
    check_images(cobra.build(made, dtype="float64"), pictures)


@pytest.mark.parametrize("tower", [*tower_samples.SMALL, "s2", "timm", "eva", "fused"])
def test_towers_serve_both(tower, model, pictures):
    vit = TimmEncoderConfig(name="vit_tiny_patch16_224", block=0)
    encoders = {
        **tower_samples.SMALL,
        "s2": S2EncoderConfig(tower=SMALL),
        "timm": vit,
        "eva": TimmEncoderConfig(name="eva02_tiny_patch14_224", block=0),
        "fused": FusedEncoderConfig(towers=(vit, TimmEncoderConfig(name="vit_small_patch16_224", block=0))),
    }
    if tower in ("timm", "eva", "fused"):
        pytest.importorskip("timm")
    stride = encoders[tower].stride
    image = replace(model.config.image, height=2 * stride, width=3 * stride)
    made = cobra.build(replace(model.config, vision_encoder=encoders[tower], image=image), dtype="float64")
    for rows, columns in ((1, 1), (1, 7), (5, 2)):
        assert made.config.vision_encoder.grid(rows * stride, columns * stride) == (rows, columns)
    assert tile_work(made, (2, 3)) == tile_work(made)
    assert tile_work(made, (4, 3))["vision_encoder"].weights > tile_work(made)["vision_encoder"].weights
    check_images(made, pictures)


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "eva02_tiny_patch14_224"])
def test_a_timm_tower_is_that_of_each_size(name, tmp_path):
    """The same as the tower of that size alone, into which timm loads the weights, positions resampled."""
    pytest.importorskip("timm")
    config = TimmEncoderConfig(name=name)
    stride, grids = config.stride, ((4, 4), (1, 1), (3, 2), (6, 9))
    nominal = ImageConfig(height=4 * stride, width=4 * stride, tiles=NativeConfig())
    tower = TimmEncoder(config, nominal).double().eval()
    save_file(tower.tower.state_dict(), tmp_path / "tower.safetensors")
    for rows, columns in grids:
        fixed = TimmEncoder(config, ImageConfig(height=rows * stride, width=columns * stride)).double().eval()
        fixed.load_weights(tmp_path / "tower.safetensors")
        noise = torch.rand(2, 3, rows * stride, columns * stride, generator=torch.Generator().manual_seed(0)).double()
        assert_close(f"{rows} x {columns}", tower(noise), fixed(noise), 1e-5)  # timm resamples in float32


@torch.no_grad()
def check_images(model: cobra.Cobra, images: list[Image.Image]) -> None:
    """As many tokens as the layouts say, and of all images together what each has alone."""
    batch = model.processor(text=["<image>" * len(images)], images=[images])
    together = model.embed(batch["input_ids"], batch["pixel_values"].double(), batch["image_sizes"])
    start = 0
    for image in images:
        one = model.processor(text=["<image>"], images=[[image]])
        alone = model.embed(one["input_ids"], one["pixel_values"].double(), one["image_sizes"])
        assert alone.shape[1] == model.config.layout(image.height, image.width).num_tokens
        assert_close(str(image.size), together[:, start : start + alone.shape[1]], alone, 1e-10)
        start += alone.shape[1]
    assert start == together.shape[1]


def test_configurations_are_read_and_written():
    for kind in TILINGS:
        assert from_dict(CobraConfig, to_dict(config(kind))) == config(kind)
    plain = config(image=ImageConfig(height=16, width=20))
    assert override(plain, "image.tiles", '{"kind": "uhd"}') == config("uhd")
    assert override(config("uhd"), "image.tiles", "none") == plain


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("min_cells 9 is more than max_cells 8", lambda: NativeConfig(min_cells=9, max_cells=8)),
        ("native: min_cells 0 must be 1", lambda: NativeConfig(min_cells=0)),
        ("uhd: max_slices 0 must be 1", lambda: UHDConfig(max_slices=0)),
        ("tiles=native .* token_reduction", lambda: config(token_reduction=ToMeConfig(num_tokens=4))),
        ("set connector.nested=false", lambda: config("uhd", connector=MQTConfig(num_queries=4, nested=True))),
        ("put scale 1 in front", lambda: config(vision_encoder=S2EncoderConfig(tower=SMALL, scales=(2, 1)))),
        (
            "patches of one size",
            lambda: config(
                vision_encoder=FusedEncoderConfig(
                    towers=tuple(TimmEncoderConfig(name=f"vit_tiny_patch{size}_224") for size in (14, 16))
                ),
                image=ImageConfig(height=16, width=16, tiles=NativeConfig()),
            ),
        ),
        (
            "takes images of one size",
            lambda: cobra.build(
                config(
                    vision_encoder=TimmEncoderConfig(name="beit_base_patch16_224"),
                    image=ImageConfig(height=32, width=32, tiles=NativeConfig()),
                )
            ),
        ),
        ("0 sizes for 1 images", lambda: Processor(config(), Tokenizer.bytes()).image_tokens(1)),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(message, make):
    if message == "takes images of one size":
        pytest.importorskip("timm")
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("image_sizes is missing", lambda pixels, sizes: (pixels, None)),
        ("cells in pixel_values, but images of image_sizes have", lambda pixels, sizes: (pixels[1:], sizes)),
        ("cells of 2 x 4 pixels, the model's are 4 x 4", lambda pixels, sizes: (pixels[:, :, :2], sizes)),
    ],
)
def test_inputs_that_do_not_fit_are_refused(model, message, change):
    batch = model.processor(text=["<image>"], images=[[picture(32, 40)]])
    with pytest.raises(UserError, match=message):
        model.embed(batch["input_ids"], *change(batch["pixel_values"], batch["image_sizes"]))
