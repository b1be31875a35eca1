"""AnyRes: layouts and token counts against transformers' LLaVA-NeXT and worked examples; merges against a slow loop."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import cobra
from cobra.config import CobraConfig
from cobra.connector import LinearConfig, Pool2dConfig
from cobra.image import ImageConfig, open_image, to_pixels, upright_size
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.stack import LMConfig
from cobra.processor import Processor
from cobra.prompt import Turn
from cobra.tiles import AnyResConfig, SpatialUnpad, TileFrame, TileLayout, fit
from cobra.token_reduction import ToMeConfig
from cobra.tokenizer import Tokenizer
from cobra.typed_config import from_dict, override, to_dict
from cobra.vision_encoder import SmallEncoderConfig
from tests.cobra.shards import assert_pieces_are_of
from tests.tolerance import assert_close
from vision_scan.errors import UserError

PINPOINTS = AnyResConfig()
LLAVA = TileFrame((336, 336), (24, 24))  # a tile of CLIP, and its grid


def config(**changes) -> CobraConfig:
    settings = {
        "image": ImageConfig(height=16, width=16, tiles=PINPOINTS),
        "vision_encoder": SmallEncoderConfig(patch_size=4, d_model=8, num_heads=2),
        "connector": LinearConfig(),
        "lm": LMConfig(
            d_model=8, vocab_size=300, layers=(Mamba2Config(d_state=4, headdim=4, chunk_size=8),)
        ),
    }
    return CobraConfig(**{**settings, **changes})


@pytest.fixture(scope="module")
def model():
    return cobra.build(config(), dtype="float64")


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def rectangles(count: int) -> list[tuple[int, int]]:
    draw = random.Random(0)
    return [(round(2 ** draw.uniform(3, 12)), round(2 ** draw.uniform(3, 12))) for _ in range(count)]


def test_layouts_by_hand():
    # 500 x 1000: in 1 x 2 tiles 336 x 672 = 225,792 pixels are left, in 2 x 2 no more, so the smaller grid is taken.
    # No padding: 24 rows of 48 cells and a newline.
    assert PINPOINTS.layout(500, 1000, LLAVA) == TileLayout(576, 1, 2, 0, 0, 24, 48)
    assert PINPOINTS.layout(500, 1000, LLAVA).num_tokens == 576 + 24 * 49
    # 672 x 672 in 2 x 2, five tiles, 2880 cells and 48 newlines.
    square = PINPOINTS.layout(672, 672, LLAVA)
    assert (square.num_tiles, square.num_tokens) == (5, 576 + 48 * 48 + 48)
    # 400 x 800 x 0.84 = 336 x 672 again; 480 x 640 needs 2 x 2: of 48 rows 36 show it, 6 above and 6 below do not.
    assert PINPOINTS.layout(480, 640, LLAVA) == TileLayout(576, 2, 2, 6, 0, 36, 48)
    # 300 x 900 in 1 x 3: 1008 across would be larger than the image, so all of its pixels are left.
    assert PINPOINTS.layout(300, 900, LLAVA) == TileLayout(576, 1, 3, 0, 0, 24, 72)


def test_ties_go_to_the_least_waste_and_then_to_the_first():
    tiny = PINPOINTS.choose(10, 10, (336, 336))  # every grid holds all of it
    assert tiny == (2, 1)
    assert AnyResConfig(grids=((2, 2), (1, 3), (3, 1))).choose(10, 10, (336, 336)) == (1, 3)


@pytest.mark.parametrize("grids", [PINPOINTS.grids, ((1, 1), (1, 4), (4, 2), (2, 3), (3, 3))], ids=["llava", "others"])
def test_grids_are_those_of_transformers(grids):
    utils = pytest.importorskip("transformers.image_processing_utils")
    pinpoints = [(rows * 336, columns * 336) for rows, columns in grids]
    for height, width in rectangles(2000):
        rows, columns = AnyResConfig(grids=grids).choose(height, width, (336, 336))
        best = utils.select_best_resolution((height, width), pinpoints)
        assert (rows * 336, columns * 336) == best
        image = np.empty((height, width, 0), dtype=np.uint8)
        expected = utils.get_patch_output_size(image, best, "channels_last")
        assert fit(height, width, best) == expected


def test_token_counts_are_those_of_transformers():
    found = pytest.importorskip("transformers.models.llava_next.processing_llava_next").LlavaNextProcessor
    for height, width in rectangles(2000):
        layout = PINPOINTS.layout(height, width, LLAVA)
        cells, newlines = found._get_unpadded_features(None, height, width, 24, 24, layout.rows, layout.columns)
        if cells:  # they may leave none of an extreme shape
            assert layout.num_tokens == 576 + cells + newlines, (height, width)
        assert 1 <= layout.height <= 24 * layout.rows and 1 <= layout.width <= 24 * layout.columns


@pytest.mark.parametrize("cells", [(3, 3), (4, 2)], ids=str)
def test_merged_tokens_are_those_of_transformers(cells):
    theirs = pytest.importorskip("transformers.models.llava_next.modeling_llava_next").unpad_image
    merge = SpatialUnpad(5).double()
    generator = torch.Generator().manual_seed(0)
    tile = cells[0] * 8, cells[1] * 8
    sizes = [(50, 31), (20, 90), (77, 77), (31, 50), (9, 12)]
    layouts = [PINPOINTS.layout(*size, TileFrame(tile, cells)) for size in sizes]
    tokens = torch.randn(sum(x.num_tiles for x in layouts), cells[0] * cells[1], 5, generator=generator).double()
    joined = merge(tokens, layouts, cells)
    assert len(joined) == sum(layout.num_tokens for layout in layouts)
    start, expected = 0, []
    for size, layout in zip(sizes, layouts, strict=True):
        whole = torch.zeros(5, layout.rows * cells[0], layout.columns * cells[1], dtype=torch.float64)
        for row in range(whole.shape[1]):
            for column in range(whole.shape[2]):
                number = start + 1 + row // cells[0] * layout.columns + column // cells[1]
                whole[:, row, column] = tokens[number, row % cells[0] * cells[1] + column % cells[1]]
        expected += list(tokens[start])
        for line in theirs(whole, size).movedim(0, -1):
            expected += [*line, merge.newline]
        start += layout.num_tiles
    assert torch.equal(joined, torch.stack(expected))


def test_tiles_are_those_of_transformers():
    """Overview and tiles of the image processor that works with Pillow, to within a level of 8 bits or two."""
    module = pytest.importorskip("transformers.models.llava_next.image_processing_pil_llava_next")
    pinpoints = [[rows * 16, columns * 16] for rows, columns in PINPOINTS.grids]
    size = {"height": 16, "width": 16}
    theirs = module.LlavaNextImageProcessorPil(
        size=size, crop_size=size, image_grid_pinpoints=pinpoints, do_normalize=False, do_center_crop=False
    )
    image_config = ImageConfig(height=16, width=16, tiles=PINPOINTS, fill=(0, 0, 0))
    for height, width in [(20, 37), (64, 48), (100, 24), (9, 9)]:
        smooth = picture(3, 3, seed=height).resize((width, height), Image.Resampling.BICUBIC)
        ours = to_pixels(smooth, image_config)
        expected = theirs(smooth, return_tensors="pt")["pixel_values"][0]
        assert ours.shape == expected.shape
        assert (ours - expected.float()).abs().max() <= 2.5 / 255, (height, width)


def test_the_tiles_lie_row_by_row_behind_the_overview():
    """A picture of the size of a grid is cut without any resizing."""
    image = picture(32, 32)
    tiles = to_pixels(image, ImageConfig(height=16, width=16, tiles=PINPOINTS)) * 255
    pixels = torch.from_numpy(np.array(image)).movedim(-1, 0).float()
    assert torch.equal(tiles[:1] / 255, to_pixels(image, ImageConfig(height=16, width=16)))
    for number, (y, x) in enumerate([(0, 0), (0, 16), (16, 0), (16, 16)], start=1):
        assert torch.equal(tiles[number].round(), pixels[:, y : y + 16, x : x + 16])


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".tiff", ".webp", ".bmp"])
@pytest.mark.parametrize("orientation", [None, 1, 3, 6, 8])
def test_the_header_tells_the_size_of_the_upright_picture(tmp_path, suffix, orientation):
    path = tmp_path / f"image{suffix}"
    exif = Image.Exif()
    if orientation is not None and suffix != ".bmp":
        exif[0x0112] = orientation
        picture(20, 30).save(path, exif=exif)
    else:
        picture(20, 30).save(path)
    upright = open_image(path)
    assert upright_size(path) == upright_size(path.read_bytes()) == (upright.height, upright.width)
    with Image.open(path) as opened:
        assert upright_size(opened) == (upright.height, upright.width)


SIZES = [(40, 17), (16, 90), (33, 33), (9, 7)]


@torch.no_grad()
def test_a_batch_of_different_layouts_is_its_rows_alone(model):
    """Two pictures in a row, one, none; every row has the tokens that it has alone."""
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    texts = ["<image>a<image>", "no picture", "b<image>", "<image>"]
    images = [pictures[:2], None, pictures[2:3], pictures[3:]]
    batch = model.processor(text=texts, images=images, padding_side="right")
    layouts = [model.config.layout(*size) for size in SIZES]
    assert len({layout.num_tokens for layout in layouts}) == 4
    assert batch["tiles_per_image"].tolist() == [layout.num_tiles for layout in layouts]
    assert batch["image_sizes"].tolist() == [list(size) for size in SIZES]
    together = model.embed(batch["input_ids"], batch["pixel_values"].double(), batch["image_sizes"])
    for row, (text, some) in enumerate(zip(texts, images, strict=True)):
        one = model.processor(text=[text], images=[some])
        pixels = None if one["pixel_values"] is None else one["pixel_values"].double()
        alone = model.embed(one["input_ids"], pixels, one["image_sizes"])
        assert_close(text, together[row : row + 1, : alone.shape[1]], alone, 1e-12)


def test_answers_of_a_batch_are_those_of_each_alone(model):
    model = cobra.build(config())
    requests = [("What?", [picture(40, 17), picture(16, 90)]), ("Why?", None), ("<image>?", picture(9, 7))]
    alone = [model.answer(question, images, max_new_tokens=4) for question, images in requests]
    assert model.answer_batch(requests, max_new_tokens=4) == alone
    state = model.prefill(images=[picture(40, 17), picture(16, 90)])
    assert model.answer("What?", state=state, max_new_tokens=4) == alone[0]
    batch = model.processor(text=["<image>", "a"], images=[[picture(40, 17)], None])
    assert model.generate(**batch, max_new_tokens=2).shape == (2, 2)


@torch.no_grad()
def test_pieces_of_a_row_are_embedded_as_the_whole(model):
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    batch = model.processor(text=["ab<image>c<image><image>", "<image>d"], images=[pictures[:3], pictures[3:]])
    ids, pixels, sizes = batch["input_ids"], batch["pixel_values"].double(), batch["image_sizes"].tolist()
    assert_pieces_are_of(model, model.embed(ids, pixels, sizes), ids, pixels, sizes)


def test_newline_and_everything_else_learns_and_is_saved(tmp_path):
    model = cobra.build(config())
    turns = [Turn("user", "<image>a"), Turn("assistant", "b")]
    size = (16, 90)
    rendered = model.processor.render(turns, 1, sizes=[size])
    ids, labels = (torch.tensor([x]) for x in (rendered.input_ids, rendered.labels))
    pixels = model.processor.pixels(picture(*size))
    loss, _ = model.loss({"input_ids": ids, "labels": labels, "pixel_values": pixels, "image_sizes": (size,)})
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())
    assert model.connector.unpad.newline.grad.abs().min() > 0
    cobra.save(model, tmp_path / "model")
    again = cobra.load(tmp_path / "model")
    assert again.config == model.config
    assert torch.equal(again.connector.unpad.newline, model.connector.unpad.newline)


def test_a_batch_without_images_goes_through_the_newline_too():
    assert_blank_calls_all(cobra.build(config()))


def assert_blank_calls_all(model) -> None:
    """A batch without images goes through every module of tower and connector, to no effect."""
    model.encodes_always = True
    ids = torch.tensor([[97, 98]])
    embeds = model.embed(ids)
    assert torch.equal(embeds, model.lm.embedding(ids))
    embeds.sum().backward()
    for name, parameter in [*model.connector.named_parameters(), *model.vision_encoder.named_parameters()]:
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_a_configuration_without_tiles_is_read_as_ever():
    plain = config(image=ImageConfig(height=16, width=16))
    data = to_dict(plain)
    del data["image"]["tiles"]
    assert from_dict(CobraConfig, data) == plain
    assert plain.layout(3, 1000) == plain.largest_layout == TileLayout(16)
    assert not hasattr(cobra.build(plain).connector, "unpad")
    assert override(plain, "image.tiles", '{"kind": "anyres"}') == config()
    assert from_dict(CobraConfig, to_dict(config())) == config()


def test_the_largest_layout_is_reached_and_never_passed():
    largest = config().largest_layout
    counts = [config().layout(*size).num_tokens for size in rectangles(500)]
    assert max(counts) <= largest.num_tokens == config().layout(64, 64).num_tokens


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("pairs of rows and columns", lambda: AnyResConfig(grids=())),
        ("pairs of rows and columns", lambda: AnyResConfig(grids=((1, 2, 3),))),
        ("pairs of rows and columns", lambda: AnyResConfig(grids=((0, 2),))),
        ("connector pool2d makes fewer", lambda: config(connector=Pool2dConfig())),
        ("a token_reduction makes fewer", lambda: config(token_reduction=ToMeConfig(num_tokens=4))),
        ("0 sizes for 1 images", lambda: Processor(config(), Tokenizer.bytes()).image_tokens(1)),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(message, make):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("message", "sizes"), [("image_sizes is missing", None), ("5 tiles in pixel_values.* have 3", [(16, 32)])]
)
def test_sizes_that_do_not_fit_are_refused(model, message, sizes):
    batch = model.processor(text=["<image>"], images=[[picture(32, 32)]])
    with pytest.raises(UserError, match=message):
        model.embed(batch["input_ids"], batch["pixel_values"], sizes)


def test_one_tile_never_asks_for_sizes():
    def sizes():
        raise AssertionError("asked")
        yield

    plain = replace(config(), image=ImageConfig(height=16, width=16))
    assert Processor(plain, Tokenizer.bytes()).image_tokens(2, sizes()) == [16, 16]
