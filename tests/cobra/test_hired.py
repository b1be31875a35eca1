"""HiRED: which cells become tokens against a slow choice, budgets met exactly, batches equal to single images."""

import itertools
from dataclasses import replace

import pytest
import torch

import cobra
from cobra.image import ImageConfig
from cobra.prompt import Turn
from cobra.tiles import AnyResConfig, HiREDConfig, TileFrame
from cobra.tiles.hired import BudgetLayout, choose_cells, share_out
from cobra.typed_config import override
from cobra.vision_encoder import SmallEncoderConfig, TimmEncoder, TimmEncoderConfig
from tests.cobra.shards import assert_pieces_are_of
from tests.cobra.test_tiles import SIZES, assert_blank_calls_all, config, picture, rectangles
from tests.tolerance import assert_close
from vision_scan.errors import UserError

HIRED = HiREDConfig(budget=0.3)
TALL = TileFrame((12, 20), (3, 5))  # cells of 4 pixels


def hired(tiles: HiREDConfig = HIRED, depth: int = 2, **changes):
    encoder = SmallEncoderConfig(patch_size=4, d_model=8, num_heads=2, depth=depth)
    image = ImageConfig(height=12, width=20, tiles=tiles, resize="squash")
    return config(**{"image": image, "vision_encoder": encoder, **changes})


@pytest.fixture(scope="module")
def model():
    return cobra.build(hired(), dtype="float64")


def test_budgets_by_hand():
    # LLaVA-NeXT with 20 percent: of 5 x 576 cells 576, half of them the overview's.
    frame, tiles = TileFrame((336, 336), (24, 24)), HiREDConfig()
    assert tiles.layout(672, 672, frame) == BudgetLayout(288, 2, 2, 0, 0, 48, 48, budget=288)
    # Of 3 x 576 cells 345; 36 of 48 rows show a picture of 480 x 640, which changes no budget.
    assert tiles.layout(500, 1000, frame).num_tokens == 345
    assert tiles.layout(480, 640, frame).num_tokens == 576
    # The overview has no more cells than it has; what it leaves is the grid's, and the other way round.
    assert replace(tiles, budget=0.9, overview_share=1.0).layout(672, 672, frame) == BudgetLayout(
        576, 2, 2, 0, 0, 48, 48, budget=2592 - 576
    )
    assert replace(tiles, budget=0.7, overview_share=0.0).layout(480, 640, frame) == BudgetLayout(
        2016 - 36 * 48, 2, 2, 6, 0, 36, 48, budget=36 * 48
    )
    whole = replace(tiles, budget=1.0).layout(480, 640, frame)
    assert (whole.overview, whole.budget) == (576, 36 * 48)
    assert replace(tiles, budget=1e-6).layout(480, 640, frame).num_tokens == 1


def test_the_largest_layout_is_never_passed():
    settings = hired()
    counts = [settings.layout(*size).num_tokens for size in rectangles(500)]
    assert max(counts) == settings.largest_layout.num_tokens
    without = replace(settings, image=replace(settings.image, tiles=AnyResConfig())).largest_layout
    assert settings.largest_layout.num_tokens < 0.3 * without.num_tokens


def test_shares_are_those_of_webster_one_by_one():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        scores = torch.rand(5, generator=generator, dtype=torch.float64)
        most = torch.randint(0, 9, (5,), generator=generator)
        for total in range(int(most.sum()) + 1):
            given = [0] * 5
            for _ in range(total):
                open_ones = [number for number in range(5) if given[number] < most[number]]
                given[max(open_ones, key=lambda number: scores[number] / (2 * given[number] + 1))] += 1
            assert share_out(scores, most, total).tolist() == given
    assert share_out(torch.zeros(3), torch.tensor([1, 2, 3]), 6).tolist() == [1, 2, 3]  # nobody is attended to
    assert share_out(torch.tensor([3.0, 1.0]), torch.tensor([99, 99]), 8).tolist() == [6, 2]


def slow_choice(early, last, layout, cells) -> tuple[list[int], list[tuple[int, int]]]:
    """Cells of the overview, and tile and cell of those of the grid, in order."""
    height, width = cells
    overview = sorted(range(height * width), key=lambda cell: -last[0, cell])[: layout.overview]
    tiles = list(itertools.product(range(layout.rows), range(layout.columns)))
    steps = 60  # points of a cell of the overview each way, enough for exact shares
    scores = dict.fromkeys(tiles, 0.0)
    for row, column in itertools.product(range(height), range(width)):
        for down, across in itertools.product(range(steps), repeat=2):
            y = layout.top + (row + (down + 0.5) / steps) * layout.height / height
            x = layout.left + (column + (across + 0.5) / steps) * layout.width / width
            scores[int(y // height), int(x // width)] += float(early[row * width + column]) / steps**2
    shown: dict[tuple[int, int], list[int]] = {tile: [] for tile in tiles}
    for (down, across), (row, column) in itertools.product(tiles, itertools.product(range(height), range(width))):
        y, x = down * height + row - layout.top, across * width + column - layout.left
        if 0 <= y < layout.height and 0 <= x < layout.width:
            shown[down, across].append(row * width + column)
    given = dict.fromkeys(tiles, 0)
    for _ in range(layout.budget):
        open_ones = [tile for tile in tiles if given[tile] < len(shown[tile])]
        given[max(open_ones, key=lambda tile: scores[tile] / (given[tile] + 0.5))] += 1
    kept = []
    for number, tile in enumerate(tiles):
        best = sorted(shown[tile], key=lambda cell: -last[1 + number, cell])[: given[tile]]
        kept += [(tile[0] * height + c // width, tile[1] * width + c % width, 1 + number, c) for c in best]
    return sorted(overview), [(number, cell) for _, _, number, cell in sorted(kept)]


@pytest.mark.parametrize("size", [(100, 30), (37, 61), (40, 40), (16, 90), (5, 8)], ids=str)
@pytest.mark.parametrize("tiles", [HIRED, HiREDConfig(budget=0.7, overview_share=0.1, grids=((2, 3), (3, 1)))])
def test_cells_are_those_of_a_slow_choice(size, tiles):
    layout = tiles.layout(*size, TALL)
    generator = torch.Generator().manual_seed(size[0])
    early = torch.rand(15, generator=generator, dtype=torch.float64)
    last, tokens = (torch.rand(layout.num_tiles, 15, generator=generator, dtype=torch.float64) for _ in range(2))
    overview, grid = slow_choice(early, last, layout, TALL.cells)
    assert len(overview) + len(grid) == layout.num_tokens
    found = choose_cells(tokens[..., None], early, last, layout, TALL.cells)
    assert torch.equal(found[0][:, 0], tokens[0, overview])
    assert torch.equal(found[1][:, 0], torch.stack([tokens[place] for place in grid]))


def test_a_tile_that_is_attended_to_gets_the_budget():
    """The overview's lower right corner is all that the early block looks at."""
    layout = HiREDConfig(grids=((2, 2),), budget=0.2, overview_share=0.0).layout(24, 40, TALL)
    assert layout == BudgetLayout(0, 2, 2, 0, 0, 6, 10, budget=15)
    early = torch.zeros(15)
    early[-1] = 1.0
    tokens = torch.arange(5.0)[:, None, None].expand(5, 15, 1)
    overview, grid = choose_cells(tokens, early, torch.rand(5, 15), layout, TALL.cells)
    assert len(overview) == 0 and grid[:, 0].tolist() == [4.0] * 15


@torch.no_grad()
def test_the_blocks_that_are_asked_for_are_looked_at(model):
    """Of a model: the early block shares out, the last one chooses, the connector's tokens are taken."""
    image, layout = picture(100, 30), model.config.layout(100, 30)
    batch = model.processor(text=["<image>"], images=[[image]])
    pixels = batch["pixel_values"].double()
    features, (early, last) = model.vision_encoder(pixels, attention_of=(0, -1))
    _, (second,) = model.vision_encoder(pixels, attention_of=(1,))
    assert torch.equal(last.received, second.received) and not torch.equal(early.received, last.received)
    overview, grid = slow_choice(early.received[0], last.received, layout, (3, 5))
    tokens = model.connector(features)
    expected = torch.stack([*(tokens[0, cell] for cell in overview), *(tokens[place] for place in grid)])
    assert_close("tokens", model.embed(batch["input_ids"], pixels, batch["image_sizes"])[0], expected, 1e-12)


@torch.no_grad()
def test_a_batch_of_different_layouts_is_its_rows_alone(model):
    pictures = [picture(*size, seed=seed) for seed, size in enumerate(SIZES)]
    texts = ["<image>a<image>", "no picture", "b<image>", "<image>"]
    images = [pictures[:2], None, pictures[2:3], pictures[3:]]
    batch = model.processor(text=texts, images=images, padding_side="right")
    pixels, sizes = batch["pixel_values"].double(), batch["image_sizes"]
    together = model.embed(batch["input_ids"], pixels, sizes)
    for row, (text, some) in enumerate(zip(texts, images, strict=True)):
        one = model.processor(text=[text], images=[some])
        alone_pixels = None if one["pixel_values"] is None else one["pixel_values"].double()
        alone = model.embed(one["input_ids"], alone_pixels, one["image_sizes"])
        assert_close(text, together[row : row + 1, : alone.shape[1]], alone, 1e-12)
    assert_pieces_are_of(model, together, batch["input_ids"], pixels, sizes.tolist())


def test_it_answers_learns_and_is_saved_without_parameters_of_its_own(tmp_path):
    model = cobra.build(hired())
    requests = [("What?", [picture(40, 17), picture(16, 90)]), ("Why?", None), ("<image>?", picture(9, 7))]
    alone = [model.answer(question, images, max_new_tokens=4) for question, images in requests]
    assert model.answer_batch(requests, max_new_tokens=4) == alone
    plain = cobra.build(hired(tiles=None))
    assert plain.state_dict().keys() == model.state_dict().keys()
    turns, size = [Turn("user", "<image>a"), Turn("assistant", "b")], (16, 90)
    rendered = model.processor.render(turns, 1, sizes=[size])
    ids, labels = (torch.tensor([x]) for x in (rendered.input_ids, rendered.labels))
    pixels = model.processor.pixels(picture(*size))
    loss, _ = model.loss({"input_ids": ids, "labels": labels, "pixel_values": pixels, "image_sizes": (size,)})
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    cobra.save(model, tmp_path / "model")
    assert cobra.load(tmp_path / "model").config == model.config


def test_a_batch_without_images_calls_the_same_modules():
    assert_blank_calls_all(cobra.build(hired()))


@torch.no_grad()
def test_it_chooses_alike_in_bfloat16():
    """Attention is compared in float32, so that most of the cells are those of float32."""
    model = cobra.build(hired())
    batch = model.processor(text=["<image>"], images=[[picture(100, 30)]])
    inputs = batch["input_ids"], batch["pixel_values"], batch["image_sizes"]
    exact = model.embed(*inputs)
    half = model.to(torch.bfloat16).embed(*inputs)
    assert half.dtype == torch.bfloat16 and half.shape == exact.shape
    alike = ((half.float() - exact).norm(dim=-1) < 0.05 * exact.norm(dim=-1)).float().mean()
    assert alike > 0.7


@pytest.mark.parametrize(
    "name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "vit_base_patch16_siglip_224"]
)
@torch.no_grad()
def test_timm_towers_tell_the_attention_of_each_block(name):
    """Against the weights that timm's own attention computes."""
    pytest.importorskip("timm")
    side = 14 if "patch14" in name else 16
    encoder = TimmEncoder(TimmEncoderConfig(name=name, block=2), ImageConfig(height=2 * side, width=3 * side)).eval()
    pixels, weights = torch.rand(2, 3, 2 * side, 3 * side), []
    features, found = encoder(pixels, attention_of=(0, 2, 1))
    assert torch.equal(features, encoder(pixels)) and not any(b._forward_pre_hooks for b in encoder.tower.blocks)
    for block in encoder.tower.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: weights.append(output))
    encoder(pixels)
    prefix = encoder.tower.num_prefix_tokens
    for attention, number in zip(found, (0, 2, 1), strict=True):
        asked = weights[number][:, :, 0] if encoder.tower.cls_token is not None else weights[number].mean(2)
        assert_close(f"block {number}", attention.received, asked.mean(1)[:, prefix:], 1e-5)


def test_settings_are_written_as_others():
    settings = hired(tiles=None)
    found = override(settings, "image.tiles", '{"kind": "hired", "budget": 0.3}')
    assert found == hired()


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("tiles.budget=0", lambda: HiREDConfig(budget=0.0)),
        ("tiles.budget=1.5", lambda: HiREDConfig(budget=1.5)),
        ("tiles.overview_share=2", lambda: HiREDConfig(overview_share=2)),
        ("tiles.block=-1", lambda: HiREDConfig(block=-1)),
        ("block 2, and the tower has 2 up to its features", lambda: cobra.build(hired(replace(HIRED, block=2)))),
        ("tiles=hired .* the tower has 0 .* raise vision_encoder.depth", lambda: cobra.build(hired(depth=0))),
        ("set image.tiles=none", lambda: override(hired(), "video", '{"kind": "evs"}')),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(message, make):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
