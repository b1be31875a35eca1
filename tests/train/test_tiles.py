"""Training on images of different numbers of tiles and tokens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import cobra
from tests.train.small_run import load, small_config
from train.__main__ import main
from train.cost import RowCost, TrainingCost
from train.objectives import OBJECTIVES
from train.plan import activation_memory, build_meta
from train.run import build_model, build_objective, run
from vision_scan.errors import UserError

TILES = {
    "anyres": 'model.image.tiles={"kind": "anyres", "grids": [[1, 2], [2, 2], [3, 1]]}',
    "native": 'model.image.tiles={"kind": "native", "max_cells": 12}',
    "uhd": 'model.image.tiles={"kind": "uhd", "max_slices": 4}',
}
SIZES = [(20, 16), (90, 20), (15, 50), (33, 40)]


@pytest.fixture
def mixed(data: Path) -> Path:
    """The rows of small_run, their images of different shapes; one is turned by its EXIF data."""
    for number in range(10):
        height, width = SIZES[number % len(SIZES)]
        noise = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        path = data.parent / f"{number}.png"
        if path.exists():
            exif = Image.Exif()
            exif[0x0112] = 6 if number == 1 else 1
            Image.fromarray(noise).save(path, exif=exif)
    return data


def build(config):
    rows = load(config)
    return build_objective(config, build_model(config, rows), rows, torch.device("cpu")), rows


@pytest.fixture(params=list(TILES))
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.mark.parametrize("packing", ["false", "true"])
def test_rows_together_have_the_loss_of_each_alone(mixed: Path, kind: str, packing: str) -> None:
    objective, rows = build(small_config(mixed, TILES[kind], f"data.packing={packing}"))
    samples = [objective.sample(row) for row in rows]
    batch = objective.collate(samples)
    assert batch.inputs["image_sizes"].shape == (8, 2)
    assert batch.inputs["image_sizes"][1].tolist() == [20, 90]  # turned
    assert [objective.num_tokens(row) for row in rows] == [len(sample.input_ids) for sample in samples]
    assert len({len(sample.pixel_values) for sample in samples if sample.num_images}) > 1
    with torch.no_grad():
        together, _ = objective(batch.inputs)
        alone = sum(objective(objective.collate([sample]).inputs)[0] for sample in samples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_a_run_trains_what_joins_tiles_and_its_output_answers(mixed: Path, tmp_path: Path, kind: str) -> None:
    config = small_config(mixed, TILES[kind], "train.engine=plain", "train.steps=2", "optim.kind=adamw")
    before = build_model(config, load(config))
    run(config, tmp_path / "run")
    after = cobra.load(tmp_path / "run")
    learned = dict(after.connector.named_parameters())
    for name, parameter in before.connector.named_parameters():
        assert not torch.equal(learned[name], parameter), name
    joins = {"anyres": {"unpad.newline"}, "native": set(), "uhd": {"separators.comma", "separators.newline"}}
    assert {name for name in learned if "unpad" in name or "separators" in name} == joins[kind]
    assert isinstance(after.answer("colour?", mixed.parent / "1.png", max_new_tokens=2), str)


def test_the_cost_of_a_row_goes_by_the_mean_of_tiles_and_tokens(mixed: Path, kind: str) -> None:
    objective, rows = build(small_config(mixed, TILES[kind]))
    of_tiles = TrainingCost(objective)
    cost = RowCost(of_tiles, objective, rows)
    layouts = [objective.model.config.layout(*size) for row in rows for size in row.read_sizes()]
    assert cost._tiles_per_image == of_tiles.count_tiles(layouts) / len(layouts)
    samples = [objective.sample(row) for row in rows]
    batch = objective.collate(samples)
    assert of_tiles.of_batch(batch) == of_tiles.of(of_tiles.count_tiles(layouts), batch.lengths, batch.num_supervised)
    if kind == "anyres":
        assert cost._tiles_per_image == np.mean([layout.num_tiles for layout in layouts])
    else:  # without attention, all that tower and connector do is in proportion to the cells
        flat = small_config(mixed, TILES[kind], "model.vision_encoder.depth=0")
        cells = sum(rows * columns for layout in layouts for rows, columns in layout.grids((2, 2)))
        assert TrainingCost(build(flat)[0]).count_tiles(layouts) == pytest.approx(cells / 4)
    assert cost._tokens_per_image == np.mean([layout.num_tokens for layout in layouts])
    assert cost.row_cost(20, 2) > cost.row_cost(20, 1) > cost.row_cost(20, 0)


def test_data_check_counts_the_tokens_of_each_layout(mixed: Path, tmp_path: Path, kind: str, capsys) -> None:
    config = small_config(mixed, TILES[kind])
    objective, rows = build(config)
    cobra.save(objective.model, tmp_path / "model")
    shards = tmp_path / "shards"
    assert main(["data", "shard", str(mixed), "--output", str(shards)]) == 0
    capsys.readouterr()
    for path in (mixed, shards):
        assert main(["data", "check", str(path), "--model", str(tmp_path / "model")]) == 0
        told = capsys.readouterr().out
        assert f"tokens by {tmp_path / 'model'}: {sum(map(objective.num_tokens, rows)):,}" in told
        assert f"at most {objective.model.config.largest_layout.num_tokens:,} for an image" in told


def test_sizes_of_embedded_images_are_read(mixed: Path) -> None:
    import base64

    data = base64.b64encode((mixed.parent / "1.png").read_bytes()).decode()
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    content = [url, {"type": "text", "text": "x"}]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "y"}]
    (mixed.parent / "messages.json").write_text(json.dumps([{"id": "a", "messages": messages}]))
    objective, rows = build(small_config(mixed.parent / "messages.json", TILES["anyres"]))
    assert list(rows[0].read_sizes()) == [(20, 90)]
    assert objective.num_tokens(rows[0]) == len(objective.sample(rows[0]).input_ids)


@pytest.mark.parametrize("name", ["regions", "naming"])
def test_objectives_on_regions_need_one_tile(mixed: Path, kind: str, name: str) -> None:
    config = small_config(mixed, TILES[kind], f"train.objective={name}", "data.skip_bad=true")
    rows = load(config)
    with pytest.raises(UserError, match=r"image\.tiles=none"):
        OBJECTIVES[name](build_model(config, rows), rows, None)


def test_a_plan_counts_with_the_largest_layout(mixed: Path, kind: str) -> None:
    config = small_config(mixed, TILES[kind], "train.batch_size=2")
    model = build_meta(config)
    one = activation_memory(model, config, 1, 100)
    assert activation_memory(model, config, 3, 100) > 2.5 * one
    plain = small_config(mixed, "train.batch_size=2")
    assert one > activation_memory(build_meta(plain), plain, 1, 100)


@pytest.mark.parametrize("sized", ["native", "uhd"])
def test_zero_3_refuses_towers_that_are_called_differently(mixed: Path, sized: str) -> None:
    config = small_config(mixed, TILES[sized], "optim.kind=adamw", "zero.stage=3")
    with pytest.raises(UserError, match=f"image.tiles={sized} .* use zero.stage=2"):
        run(config, mixed.parent / "run")
