import math
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

import cobra
from cobra.config import PRESETS, CobraConfig
from cobra.connector import FusedMLPConfig
from cobra.image import ImageConfig
from cobra.lm import LMConfig
from cobra.lm.mlp import MLPConfig
from cobra.model import FIXED_SENTENCE, chance_loss, fixed_sentence_loss
from cobra.tokenizer import Tokenizer
from cobra.vision_encoder import SmallEncoderConfig, TimmEncoderConfig
from tests.tolerance import assert_close
from vision_scan.errors import UserError

IMAGE = 257  # of the byte tokenizer


def small(preset: str) -> CobraConfig:
    """The preset with two layers and 2 x 3 = 6 tokens per tile."""
    config = PRESETS[preset]
    return replace(
        config,
        image=ImageConfig(height=16, width=24),
        vision_encoder=SmallEncoderConfig(patch_size=8, d_model=32, depth=1, num_heads=2),
        lm=replace(config.lm, layers=config.lm.layers[-3:]),  # of a hybrid: one of each kind
    )


@pytest.fixture(scope="module", params=["tiny", "transformer-tiny", "window-tiny", "hybrid-tiny"])
def model(request):
    return cobra.build(small(request.param)).double()


def pixels(count: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(count, 3, 16, 24, generator=generator, dtype=torch.float64)


def text(length: int, seed: int = 0) -> list[int]:
    return torch.randint(256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


TILE = [IMAGE] * 6


@torch.no_grad()
def test_tile_tokens_stand_where_the_image_ids_are(model):
    rows = [
        TILE + text(3) + TILE + text(9, 1),  # two pictures
        text(24, 2),  # none
        text(1, 3) + TILE + text(17, 4),
    ]
    ids, pictures = torch.tensor(rows), pixels(3)
    embeds = model.embed(ids, pictures)
    assert embeds.shape == (3, 24, model.config.lm.d_model)
    tokens = model.encode_images(pictures)
    assert tokens.shape == (3, 6, model.config.lm.d_model)
    assert torch.pdist(tokens.flatten(0, 1)).min() > 1e-6
    for row, start, tile in ((0, 0, 0), (0, 9, 1), (2, 1, 2)):
        assert torch.equal(embeds[row, start : start + 6], tokens[tile])
    is_text = ids != IMAGE
    assert torch.equal(embeds[is_text], model.lm.embedding(ids[is_text]))


@torch.no_grad()
def test_pictures_may_be_torn_apart_by_text_but_keep_their_order(model):
    pictures = pixels(2)
    ids = torch.tensor([[IMAGE] * 4 + text(3) + [IMAGE] * 8])
    tokens = model.encode_images(pictures).flatten(0, 1)
    embeds = model.embed(ids, pictures)
    assert torch.equal(torch.cat([embeds[0, :4], embeds[0, 7:]]), tokens)


@torch.no_grad()
def test_text_alone_is_read_by_the_language_model_alone(model):
    ids = torch.tensor([text(9), text(9, 1)])
    assert torch.equal(model.embed(ids), model.lm.embedding(ids))
    logits, _ = model.lm(inputs_embeds=model.embed(ids, None))
    assert torch.equal(logits, model.lm(ids)[0])


@pytest.mark.parametrize(
    ("places", "tiles"), [(6, 0), (6, 2), (0, 1), (5, 1), (7, 1), (12, 1)]
)  # fmt: skip
def test_a_mismatch_names_both_numbers(model, places, tiles):
    ids = torch.tensor([[IMAGE] * places + text(3)])
    with pytest.raises(UserError, match=rf"{places} image tokens.*{6 * tiles}"):
        model.embed(ids, pixels(tiles) if tiles else None)


@torch.no_grad()
def test_two_images_are_two_placeholders(model):
    grey = [Image.new("RGB", (30, 20), (value,) * 3) for value in (10, 240)]
    batch = model.processor(text=["<image> and <image>?"], images=[grey])
    assert int((batch["input_ids"] == model.tokenizer.image_id).sum()) == 12
    assert batch["pixel_values"].shape == (2, 3, 16, 24)
    embeds = model.embed(batch["input_ids"], batch["pixel_values"].double())
    assert embeds.shape[:2] == batch["input_ids"].shape
    for images in (grey[:1], [*grey, grey[0]]):
        with pytest.raises(UserError, match=f"2 <image> marks for {len(images)} images"):
            model.processor(text=["<image> and <image>?"], images=[images])


def batch_of_three(model) -> dict[str, Tensor]:
    """A row with two pictures, one without, one with one; padded on the right, two answers each."""
    rows = [TILE + text(2) + TILE + text(12, 1), text(15, 2), TILE + text(8, 3)]
    longest = max(map(len, rows))
    ids = torch.full((3, longest), model.tokenizer.pad_id)
    labels = torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = torch.tensor(row)
        labels[index, len(row) - 7 : len(row) - 4] = ids[index, len(row) - 7 : len(row) - 4]
        labels[index, len(row) - 2 : len(row)] = ids[index, len(row) - 2 : len(row)]
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels(3)}


def cross_entropy_by_hand(model, batch) -> tuple[float, int]:
    total, count = 0.0, 0
    logits, _ = model.lm(inputs_embeds=model.embed(batch["input_ids"], batch["pixel_values"]))
    for row, labels in zip(logits.tolist(), batch["labels"].tolist(), strict=True):
        for t in range(len(labels) - 1):
            if labels[t + 1] != -100:
                total += math.log(sum(map(math.exp, row[t]))) - row[t][labels[t + 1]]
                count += 1
    return total, count


@torch.no_grad()
def test_loss_is_the_shifted_cross_entropy_summed(model):
    batch = batch_of_three(model)
    total, count = model.loss(batch)
    expected, tokens = cross_entropy_by_hand(model, batch)
    assert total.shape == count.shape == () and count.dtype == torch.int64
    assert int(count) == tokens == 15
    assert total.item() == pytest.approx(expected, rel=1e-9)


@torch.no_grad()
def test_loss_of_text_alone(model):
    batch = {key: value[1:2] for key, value in batch_of_three(model).items()} | {"pixel_values": None}
    total, count = model.loss(batch)
    assert (total.item(), int(count)) == pytest.approx(cross_entropy_by_hand(model, batch), rel=1e-9)
    del batch["pixel_values"]
    assert model.loss(batch)[0].item() == total.item()


@torch.no_grad()
def test_loss_of_a_batch_is_that_of_its_rows(model):
    """Pads at the right and pictures of neighbours do not matter."""
    batch = batch_of_three(model)
    tiles = {0: slice(0, 2), 2: slice(2, 3)}
    totals, counts = [], []
    for row in range(3):
        length = int((batch["input_ids"][row] != model.tokenizer.pad_id).nonzero().max()) + 1
        alone = {name: batch[name][row : row + 1, :length] for name in ("input_ids", "labels")}
        alone["pixel_values"] = batch["pixel_values"][tiles[row]] if row in tiles else None
        total, count = model.loss(alone)
        totals.append(total.item())
        counts.append(int(count))
    total, count = model.loss(batch)
    assert total.item() == pytest.approx(sum(totals), rel=1e-9)
    assert counts == [5, 5, 5] and int(count) == 15


@torch.no_grad()
def test_the_first_label_cannot_be_predicted_and_does_not_count(model):
    ids = torch.tensor([text(4)])
    total, count = model.loss({"input_ids": ids, "labels": ids, "pixel_values": None})
    assert int(count) == 3
    nothing = {"input_ids": ids, "labels": torch.full_like(ids, -100), "pixel_values": None}
    total, count = model.loss(nothing)
    assert total.item() == 0 and int(count) == 0


@torch.no_grad()
def test_loss_is_float32_in_a_bfloat16_model():
    model = cobra.build(small("tiny"), dtype="bfloat16")
    batch = batch_of_three(model)
    exact = cobra.build(small("tiny")).double().loss(batch)[0]
    total, _ = model.loss(batch | {"pixel_values": batch["pixel_values"].float()})
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(exact.item(), rel=0.01)


def test_gradient_reaches_every_parameter(model):
    model.zero_grad()
    model.loss(batch_of_three(model))[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        assert parameter.grad.any(), name
    model.zero_grad()


@torch.no_grad()
def test_swapping_rows_swaps_outputs(model):
    rows = [TILE + text(2) + TILE + text(5, 1), text(9, 2), TILE + text(8, 3)]
    tiles = [pixels(2, 1), pixels(0), pixels(1, 2)]

    def read(order) -> Tensor:
        longest = max(map(len, rows))
        ids = torch.tensor([[7] * (longest - len(rows[i])) + rows[i] for i in order])
        mask = torch.tensor([[0] * (longest - len(rows[i])) + [1] * len(rows[i]) for i in order])
        embeds = model.embed(ids, torch.cat([tiles[i] for i in order]))
        return model.lm(inputs_embeds=embeds, attention_mask=mask, logits_to_keep=1)[0]

    logits = read([0, 1, 2])
    assert torch.pdist(logits[:, 0]).min() > 1e-6
    for order in ([1, 0, 2], [2, 1, 0], [1, 2, 0]):
        assert_close(str(order), read(order), logits[order], 1e-10)


def test_pictures_matter_and_their_order_too(model):
    ids = torch.tensor([TILE + text(2) + TILE + text(3, 1)])
    found = []
    for pictures in (pixels(2), pixels(2).flip(0), pixels(2, 5)):
        with torch.no_grad():
            found.append(model.lm(inputs_embeds=model.embed(ids, pictures), logits_to_keep=1)[0].flatten())
    assert torch.pdist(torch.stack(found)).min() > 1e-6


def test_build_is_deterministic_in_its_seed_and_leaves_the_global_random_states_alone():
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    first, again, other = (cobra.build(small("tiny"), seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]
    torch.rand(5)
    later = cobra.build(small("tiny"), seed=3)
    for name, parameter in first.named_parameters():
        assert torch.equal(parameter, again.get_parameter(name)), name
        assert torch.equal(parameter, later.get_parameter(name)), name
    for name, parameter in first.named_parameters():
        if name.endswith(("proj.weight", "conv_weight", "dt_bias", "A_log", "embedding.weight")):
            assert not torch.equal(parameter, other.get_parameter(name)), name


def test_build_by_name_or_configuration_in_evaluation_mode():
    model = cobra.build("tiny")
    assert model.config == PRESETS["tiny"] and not model.training
    assert model.dtype == torch.float32 and model.device.type == "cpu"
    same = cobra.build(PRESETS["tiny"], dtype=torch.float32)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, same.get_parameter(name)), name


def test_build_in_another_dtype_rounds_the_same_weights():
    exact, half = cobra.build(small("tiny")), cobra.build(small("tiny"), dtype="bfloat16")
    assert half.dtype == torch.bfloat16
    for name, parameter in half.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).to(parameter.dtype)), name


@pytest.mark.parametrize(
    ("given", "nearest"),
    [("tinny", "tiny"), ("mamba2-130", "mamba2-130m"), ("Tiny", "tiny"), ("mamba2-1.3", "mamba2-1.3b")],
)  # fmt: skip
def test_an_unknown_preset_names_the_nearest(given, nearest):
    with pytest.raises(UserError, match=f"'{given}'.*did you mean '{nearest}'"):
        cobra.build(given)


def test_an_unknown_dtype_is_the_callers_mistake():
    with pytest.raises(UserError, match="float23"):
        cobra.build("tiny", dtype="float23")


def test_a_tokenizer_larger_than_the_vocabulary_is_the_callers_mistake():
    config = small("tiny")
    too_small = replace(config, lm=replace(config.lm, vocab_size=260))
    with pytest.raises(UserError, match=r"261 ids.*260"):
        cobra.build(too_small)
    fits = cobra.build(replace(config, lm=replace(config.lm, vocab_size=261)))
    assert fits.lm.embedding.num_embeddings == 261
    trained = Tokenizer.train(["eins zwei drei vier"] * 3, 270)
    model = cobra.build(config, tokenizer=trained)
    assert model.tokenizer is trained and model.processor.tokenizer is trained


@torch.no_grad()
def test_a_model_of_other_parts():
    """A timm tower, another connector, a tile that is not square."""
    pytest.importorskip("timm")
    config = CobraConfig(
        image=ImageConfig(height=32, width=48),
        vision_encoder=TimmEncoderConfig(name="vit_tiny_patch16_224", block=0),
        connector=FusedMLPConfig(),
        lm=LMConfig(d_model=16, vocab_size=300, layers=(MLPConfig(d_ff=8),)),
    )
    model = cobra.build(config)
    assert config.tokens_per_tile == 6
    ids = torch.tensor([[IMAGE] * 12 + text(2)])
    embeds = model.embed(ids, torch.rand(2, 3, 32, 48))
    assert embeds.shape == (1, 14, 16) and embeds.isfinite().all()


@pytest.mark.parametrize("preset", ["tiny", "transformer-tiny", "hybrid-tiny"])
@torch.no_grad()
def test_the_fixed_sentence_is_foretold_by_chance_at_first_and_better_when_it_was_learned(preset):
    model = cobra.build(small(preset), tokenizer=Tokenizer.train([FIXED_SENTENCE], 300))
    loss, num_tokens = fixed_sentence_loss(model)
    ids = torch.tensor([model.tokenizer.encode(FIXED_SENTENCE)])
    logits = model.lm(ids)[0][:, :-1]
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert num_tokens == ids.shape[1] - 1 > 40
    assert loss == pytest.approx(expected.item(), rel=1e-5)
    assert chance_loss(model) == pytest.approx(math.log(384))
    assert abs(loss - chance_loss(model)) < 1
    optimizer = torch.optim.AdamW(model.lm.parameters(), lr=1e-2)
    for _ in range(8):
        with torch.enable_grad():
            hidden, _ = model.lm.read(ids[:, :-1])
            (model.lm.loss(hidden, ids[:, 1:]) / num_tokens).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert fixed_sentence_loss(model)[0] < chance_loss(model) - 2
    assert fixed_sentence_loss(model.bfloat16())[0] < chance_loss(model) - 2
