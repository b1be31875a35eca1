"""Efficient video sampling: what is kept against transformers' Nemotron and a loop over places; counts, batches,
learning."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.nn.functional import cosine_similarity

import cobra
from cobra.config import CobraConfig
from cobra.connector import CONNECTORS, LinearConfig, MQTConfig
from cobra.image import ImageConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.stack import LMConfig
from cobra.prompt import Turn
from cobra.tiles import AnyResConfig, NativeConfig, TileLayout, UHDConfig
from cobra.token_reduction import ToMeConfig
from cobra.typed_config import from_dict, override, to_dict
from cobra.video import EVSConfig, Video, changed_most
from cobra.vision_encoder import SmallEncoderConfig
from tests.cobra.shards import assert_pieces_are_of
from tests.cobra.test_tiles import picture
from tests.tolerance import assert_close
from vision_scan.errors import UserError

TILES = {"fixed": None, "native": NativeConfig(max_cells=24)}


def config(**changes) -> CobraConfig:
    settings = {
        "image": ImageConfig(height=16, width=20),
        "vision_encoder": SmallEncoderConfig(patch_size=4, d_model=8, num_heads=2),
        "connector": LinearConfig(),
        "lm": LMConfig(d_model=8, vocab_size=300, layers=(Mamba2Config(d_state=4, headdim=4, chunk_size=8),)),
        "video": EVSConfig(pruning_rate=0.6),
    }
    return CobraConfig(**{**settings, **changes})


@pytest.fixture(scope="module", params=list(TILES))
def model(request):
    return cobra.build(config(image=ImageConfig(height=16, width=20, tiles=TILES[request.param])), dtype="float64")


def video(count: int, height: int = 32, width: int = 40, seed: int = 0) -> Video:
    """Frames that stand still but for a block, which moves on from one to the next."""
    frames = [picture(height, width, seed) for _ in range(count)]
    for number, frame in enumerate(frames):
        frame.paste((255, 0, 0), (2 * number, 0, 2 * number + width // 4, height // 2))
    return Video(frames)


def random_frames(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rate", [0.0, 0.3, 0.5, 0.75, 0.9, 0.99])
@pytest.mark.parametrize("shape", [(5, 4, 3), (2, 1, 1), (8, 3, 5), (1, 2, 2)])
def test_what_is_kept_is_what_nemotron_keeps(rate, shape):
    module = pytest.importorskip("transformers.models.nemotron_h_omni.modeling_nemotron_h_omni")
    frames, height, width = shape
    x = random_frames(frames, height * width, 6)
    theirs = module.compute_retention_mask(video_embeds=x.flatten(0, 1), thw=shape, spatial_merge_size=1, q=rate)
    count = EVSConfig(pruning_rate=rate).num_tokens(frames, height * width)
    assert changed_most(x, count).tolist() == theirs.nonzero()[:, 0].tolist()


def test_what_is_kept_is_what_a_loop_over_places_keeps():
    x = random_frames(6, 7, 5)
    x[2, 3] = x[1, 3]  # stands still
    x[3] = 2 * x[2]  # all of it does, by the cosine
    found = []
    for frame in range(1, 6):
        for place in range(7):
            found.append((1 - cosine_similarity(x[frame, place], x[frame - 1, place], dim=0).item(), 7 * frame + place))
    ranked = [place for _, place in sorted(found, key=lambda each: -each[0])]
    for count in (7, 20, 30, 42):
        assert changed_most(x, count).tolist() == sorted([*range(7), *ranked[: count - 7]])
    assert not {17, *range(21, 28)} & set(changed_most(x, 42 - 8).tolist())


def test_counts_by_hand():
    quarter = EVSConfig(pruning_rate=0.75)
    assert [quarter.num_tokens(frames, 10) for frames in (1, 2, 4, 5, 8)] == [10, 10, 10, 12, 20]
    assert EVSConfig(pruning_rate=0).num_tokens(7, 10) == 70
    assert quarter.layout([TileLayout(10)] * 8).num_tokens == 20
    assert quarter.layout([TileLayout(10)] * 8).num_tiles == 8


@torch.no_grad()
def test_tokens_of_a_video_are_those_of_its_frames_that_changed_most(model):
    """Held against the tokens that a model without `video` makes of each frame."""
    whole = cobra.build(replace(model.config, video=None), dtype="float64")
    whole.load_state_dict(model.state_dict())
    clip = video(6)
    batch = whole.processor(text=["<image>"], images=[[clip]])
    assert "num_frames" not in batch
    frames = whole.embed(batch["input_ids"], batch["pixel_values"].double(), batch["image_sizes"])[0]
    frames = frames.unflatten(0, (6, -1))
    one = model.processor(text=["<image>"], images=[clip])
    tokens = model.embed(one["input_ids"], one["pixel_values"].double(), one["image_sizes"], one["num_frames"])[0]
    count = int(6 * frames.shape[1] * (1 - 0.6))
    assert one["num_frames"].tolist() == [6] and len(tokens) == count
    assert_close("kept", tokens, frames.flatten(0, 1)[changed_most(frames, count)], 1e-12)


@torch.no_grad()
def test_a_batch_is_its_rows_alone(model):
    clips = [video(5), video(1, seed=1), video(9, 20, 60, seed=2)]
    images = [[clips[0], picture(40, 17), clips[1]], None, [picture(9, 90)], [clips[2]]]
    texts = ["<image>a<image><image>", "no picture", "b<image>", "<image>"]
    batch = model.processor(text=texts, images=images, padding_side="right")
    assert batch["num_frames"].tolist() == [5, 1, 1, 1, 9]
    assert len(batch["image_sizes"]) == len(batch["tiles_per_image"]) == 17
    assert batch["tiles_per_image"].sum() == len(batch["pixel_values"])
    inputs = batch["pixel_values"].double(), batch["image_sizes"], batch["num_frames"]
    together = model.embed(batch["input_ids"], *inputs)
    for row, (text, some) in enumerate(zip(texts, images, strict=True)):
        one = model.processor(text=[text], images=[some])
        pixels = None if one["pixel_values"] is None else one["pixel_values"].double()
        alone = model.embed(one["input_ids"], pixels, one["image_sizes"], one["num_frames"])
        assert_close(text, together[row : row + 1, : alone.shape[1]], alone, 1e-12)

    assert_pieces_are_of(model, together, batch["input_ids"], *inputs)


@pytest.mark.parametrize("tiles", TILES)
def test_answers_of_a_batch_are_those_of_each_alone(tiles):
    model = cobra.build(config(image=ImageConfig(height=16, width=20, tiles=TILES[tiles])))
    clip = video(5)
    requests = [("What?", [clip, picture(16, 90)]), ("Why?", None), ("<image>?", clip), ("Who?", clip)]
    alone = [model.answer(question, images, max_new_tokens=4) for question, images in requests]
    assert model.answer_batch(requests, max_new_tokens=4) == alone
    state = model.prefill(images=[clip, picture(16, 90)])
    assert state.info["num_images"] == 2
    assert model.answer("What?", state=state, max_new_tokens=4) == alone[0]
    batch = model.processor(text=["<image>", "a"], images=[[clip], None])
    assert model.generate(**batch, max_new_tokens=2).shape == (2, 2)


@pytest.mark.parametrize("connector", ["mlp", "msc", "pool2d", "space_to_depth", "mqt"])
def test_connectors_serve_it_and_everything_learns(connector):
    own = {"msc": {"mixer": Mamba2Config(d_state=4, headdim=4)}, "mqt": {"num_queries": 4, "num_heads": 2}}
    model = cobra.build(config(connector=CONNECTORS[connector].Config(**own.get(connector, {}))))
    batch = model.processor(text=["<image>ab"], images=[[video(4)]])
    labels = batch["input_ids"].masked_fill(batch["input_ids"] == model.tokenizer.image_id, -100)
    model.loss({**batch, "labels": labels})[0].backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and (parameter.grad.any() or "bias" in name), name


def write_clips(folder: Path) -> Path:
    """Two videos of four frames, a picture, and a row of text."""
    rows = []
    for clip, question in enumerate(("<video>\nwhat?", "see <video> moves")):
        (folder / f"clip{clip}").mkdir()
        for number, frame in enumerate(video(4, seed=clip).frames):
            frame.save(folder / f"clip{clip}" / f"{number}.png")
        rows.append({"id": f"v{clip}", "video": f"clip{clip}", "conversations": question})
    Image.new("RGB", (30, 20)).save(folder / "0.png")
    rows += [{"id": "p", "image": "0.png", "conversations": "<image>?"}, {"id": "t", "conversations": "hm?"}]
    for row in rows:
        said = [("human", row["conversations"]), ("gpt", "yes"), ("human", "?"), ("gpt", "no")]
        row["conversations"] = [{"from": who, "value": text} for who, text in said]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("packing", ["false", "true"])
def test_rows_of_video_are_learned_from_as_they_are_read(tiles, packing, tmp_path):
    """Each alone as together, and the ids those of the processor."""
    from tests.train.small_run import load, small_config
    from train.cost import RowCost, TrainingCost
    from train.init import build_model, build_objective

    settings = ['model.video={"kind": "evs", "pruning_rate": 0.5}', f"data.packing={packing}"]
    if TILES[tiles] is not None:
        settings.append(f"model.image.tiles={json.dumps(to_dict(TILES[tiles]))}")
    run = small_config(write_clips(tmp_path), *settings)
    rows = load(run)
    objective = build_objective(run, build_model(run, rows), rows, torch.device("cpu"))
    model = objective.model
    samples = [objective.sample(row) for row in rows]
    assert [objective.num_tokens(row) for row in rows] == [len(sample.input_ids) for sample in samples]
    batch = objective.collate(samples)
    assert batch.inputs["num_frames"].tolist() == [4, 4, 1]
    per_frame = model.config.layout(32, 40).num_tokens
    image_id = model.tokenizer.image_id
    kept = [list(sample.input_ids).count(image_id) for sample in samples]
    assert kept == [2 * per_frame, 2 * per_frame, model.config.layout(20, 30).num_tokens, 0]
    read = ([video(4)], [video(4, seed=1)], [tmp_path / "0.png"], None)
    for row, sample, images in zip(rows, samples, read, strict=True):
        turns = [Turn(turn.role, turn.text.replace("<image>" * 4, "<image>")) for turn in row.turns]
        one = model.processor(text=[turns], images=[images])
        assert one["input_ids"][0].tolist() == list(sample.input_ids)
        assert images is None or torch.equal(one["pixel_values"], sample.pixel_values)
    with torch.no_grad():
        together, _ = objective(batch.inputs)
        alone = sum(objective(objective.collate([sample]).inputs)[0] for sample in samples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)
    cost = RowCost(TrainingCost(objective), objective, rows)
    assert cost._tokens_per_image == sum(kept) / 9


def test_configurations_are_read_and_written():
    assert from_dict(CobraConfig, to_dict(config())) == config()
    data = to_dict(config(video=None))
    del data["video"]
    assert from_dict(CobraConfig, data) == config(video=None)
    assert override(config(video=None), "video", '{"kind": "evs", "pruning_rate": 0.6}') == config()


@pytest.mark.parametrize(
    ("message", "make"),
    [
        ("pruning_rate=1", lambda: EVSConfig(pruning_rate=1.0)),
        ("a list of one or more frames", lambda: Video([])),
        ("a list of one or more frames", lambda: Video("clip.mp4")),
        ("set token_reduction=none", lambda: config(token_reduction=ToMeConfig(num_tokens=4))),
        ("set image.tiles=none, or native", lambda: config(image=ImageConfig(height=16, width=16, tiles=UHDConfig()))),
        ("set image.tiles=none, or", lambda: config(image=ImageConfig(height=16, width=16, tiles=AnyResConfig()))),
        ("set connector.nested=false", lambda: config(connector=MQTConfig(num_queries=4, nested=True))),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(message, make):
    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_frames_of_different_shapes_are_refused_where_it_matters():
    mixed = Video([picture(32, 40), picture(40, 17)])
    native = cobra.build(config(image=ImageConfig(height=16, width=20, tiles=TILES["native"])))
    with pytest.raises(UserError, match=r"frames of a video become 20 and 21 tokens"):
        native.answer("?", mixed)
    cobra.build(config()).answer("?", mixed, max_new_tokens=1)
    plain = cobra.build(replace(native.config, video=None))
    assert plain.processor.tiles(mixed).num_tokens == 41


def test_counts_that_do_not_fit_are_refused(model):
    batch = model.processor(text=["<image>"], images=[[video(3)]])
    with pytest.raises(UserError, match="num_frames says 2 images, pixel_values have 3"):
        model.embed(batch["input_ids"], batch["pixel_values"], batch["image_sizes"], torch.tensor([2]))
