"""What is minimised."""

import json
from pathlib import Path

import pytest
import torch

from cobra.config import CobraConfig
from tests.train.small_run import COLOURS, load, small_config
from train.data.rows import BadRowError, Region, Row
from train.objectives import Conversation, Naming, Regions
from train.run import build_model, build_objective
from train.settings import RunConfig
from vision_scan.errors import UserError


def build(config: RunConfig):
    rows = load(config)
    return build_objective(config, build_model(config, rows), rows, torch.device("cpu")), rows


def test_conversation_gives_the_models_own_loss(data: Path) -> None:
    objective, rows = build(small_config(data))
    batch = objective.collate([objective.sample(row) for row in rows])
    loss, stats = objective(batch.inputs)
    expected, count = objective.model.loss(batch.inputs)
    assert loss.item() == expected.item()
    assert count == batch.weight
    assert stats == {}
    assert batch.inputs["pixel_values"].shape == (8, 3, 16, 16)  # two of the ten rows have none
    assert sum(map(objective.num_tokens, rows)) == batch.num_tokens


def test_conversation_loss_is_the_same_in_a_batch_and_row_by_row(data: Path) -> None:
    objective, rows = build(small_config(data))
    samples = [objective.sample(row) for row in rows]
    with torch.no_grad():
        together, _ = objective(objective.collate(samples).inputs)
        alone = sum(objective(objective.collate([sample]).inputs)[0] for sample in samples)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


def test_autocast_keeps_weights_and_loss_in_float32(data: Path) -> None:
    objective, rows = build(small_config(data, "train.dtype=bfloat16"))
    full, _ = build(small_config(data))
    batch = objective.collate([objective.sample(row) for row in rows])
    loss, _ = objective(batch.inputs)
    exact, _ = full(batch.inputs)
    assert loss.dtype == torch.float32
    assert {parameter.dtype for parameter in objective.parameters()} == {torch.float32}
    assert loss.item() != exact.item()
    torch.testing.assert_close(loss, exact, rtol=0.02, atol=0)


def test_image_that_went_bad_names_the_row(data: Path) -> None:
    objective, rows = build(small_config(data))
    rows[0].images[0].path.write_bytes(b"gone")
    with pytest.raises(BadRowError, match=r"row 'row0': .*0.png"):
        objective.sample(rows[0])


def test_patch_target_is_the_box_over_its_centre(region_data: Path) -> None:
    objective, _ = build(small_config(region_data, recipe="tiny-tower"))
    assert objective.classes == {"colour": ["none", *sorted(COLOURS)]}
    assert (objective.height, objective.width) == (2, 2)  # centres at 1/4 and 3/4

    def targets(*regions: Region) -> list[list[int]]:
        return objective.targets(Row("r", (Path("x"),), (), regions))[..., 0].tolist()

    red, blue = {"colour": "red"}, {"colour": "blue"}
    assert targets() == [[0, 0], [0, 0]]
    assert targets(Region((0.5, 0.0, 1.0, 0.5), red)) == [[0, 3], [0, 0]]
    assert targets(Region((0.3, 0.0, 0.7, 1.0), red)) == [[0, 0], [0, 0]]  # between the centres
    assert targets(Region((0.0, 0.2, 0.3, 0.9), blue)) == [[1, 0], [1, 0]]
    over = Region((0.0, 0.0, 1.0, 1.0), red), Region((0.0, 0.0, 0.5, 0.5), blue)
    assert targets(*over) == [[1, 3], [3, 3]]
    assert targets(Region((0.0, 0.0, 1.0, 1.0), {"other": "kind"})) == [[0, 0], [0, 0]]


def test_background_weighs_as_much_as_what_stands_in_the_boxes(region_data: Path) -> None:
    rows = json.loads(region_data.read_text())
    for row in rows:
        row["regions"] = [{"box": [0, 0, 0.5, 0.5], "labels": {"colour": "red"}}]  # 1 of 4 patches
    region_data.write_text(json.dumps(rows))
    objective, loaded = build(small_config(region_data, recipe="tiny-tower"))
    assert objective.background_weight == pytest.approx(1 / 3)
    batch = objective.collate([objective.sample(row) for row in loaded])
    assert batch.weight == pytest.approx(2 * len(rows))
    assert batch.num_supervised == 4 * len(rows)
    _, stats = objective(batch.inputs)
    assert stats["patch_accuracy"][1] == pytest.approx(2 * len(rows))
    assert stats["colour_accuracy"][1] == len(rows)


def test_perfect_heads_have_perfect_accuracy_and_no_loss(region_data: Path) -> None:
    objective, loaded = build(small_config(region_data, recipe="tiny-tower"))
    batch = objective.collate([objective.sample(row) for row in loaded])
    classes = len(COLOURS) + 1
    sure = 50.0 * torch.nn.functional.one_hot(batch.inputs["targets"][..., 0], classes).float()
    objective.heads[0].forward = lambda features: sure
    loss, stats = objective(batch.inputs)
    assert loss.item() == pytest.approx(0.0, abs=1e-6)
    for right, out_of in stats.values():
        assert right == out_of > 0


def test_regions_refuse_what_moves_their_boxes(region_data: Path) -> None:
    crop = small_config(region_data, "model.image.resize=crop", recipe="tiny-tower")
    with pytest.raises(UserError, match=r"image.resize=squash"):
        build(crop)
    rows = json.loads(region_data.read_text())
    region_data.write_text(json.dumps([{**row, "regions": []} for row in rows]))
    with pytest.raises(UserError, match="at least one label"):
        build(small_config(region_data, recipe="tiny-tower"))


def test_extra_state_is_what_is_not_the_models(region_data: Path) -> None:
    objective, _ = build(small_config(region_data, recipe="tiny-tower"))
    state = objective.extra_state()
    assert set(state) == {"heads.0.weight", "heads.0.bias"}
    changed = {name: tensor + 1 for name, tensor in state.items()}
    objective.load_extra_state(changed)
    assert torch.equal(objective.heads[0].weight, changed["heads.0.weight"])
    with pytest.raises(UserError, match=r"heads.1"):
        objective.load_extra_state({**state, "heads.1.weight": torch.zeros(1)})


def test_naming_reads_labels_off_by_the_embeddings_of_their_words(region_data: Path) -> None:
    objective, loaded = build(small_config(region_data, recipe="tiny-naming"))
    batch = objective.collate([objective.sample(row) for row in loaded])
    targets = batch.inputs["targets"][..., 0]
    weights = torch.where(targets > 0, 1.0, objective.background_weight)
    assert batch.weight == pytest.approx(weights.sum().item())
    model, encode = objective.model, objective.model.tokenizer.encode
    tokens = model.lm.norm_f(model.encode_images(batch.inputs["pixel_values"]))
    tokens = tokens.unflatten(1, targets.shape[1:])
    expected = 0.0
    for space in ("", " "):
        words = [model.lm.embedding(torch.tensor(encode(space + name))).mean(0) for name in sorted(COLOURS)]
        words = torch.stack([torch.zeros_like(words[0]), *words])  # the background has no word
        log_shares = (tokens @ words.T).log_softmax(-1)
        expected -= (log_shares.gather(-1, targets[..., None])[..., 0] * weights).sum()
    loss, stats = objective(batch.inputs)
    torch.testing.assert_close(loss, expected / 2, rtol=1e-5, atol=1e-5)
    assert stats["colour_accuracy"][1] == (targets > 0).sum() > 0
    loss.backward()
    learned = {name.split(".")[1] for name, p in objective.named_parameters() if p.grad is not None}
    assert learned == {"connector", "lm"}
    grads = {name: p.grad for name, p in model.lm.named_parameters()}
    assert grads["embedding.weight"].abs().sum() > 0
    assert all(grad is None for name, grad in grads.items() if name.startswith("layers."))
    assert objective.extra_state() == {}


def test_naming_is_learned_in_a_few_steps(region_data: Path) -> None:
    objective, loaded = build(small_config(region_data, recipe="tiny-naming"))
    batch = objective.collate([objective.sample(row) for row in loaded])
    optimizer = torch.optim.Adam([p for p in objective.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(60):
        loss, stats = objective(batch.inputs)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    right, out_of = stats["colour_accuracy"]
    assert right == out_of


def test_naming_needs_a_token_for_each_patch(region_data: Path, monkeypatch) -> None:
    monkeypatch.setattr(CobraConfig, "tokens_per_tile", 1)
    with pytest.raises(UserError, match="makes 1 of 2 x 2"):
        build(small_config(region_data, recipe="tiny-naming"))


def test_objectives_say_what_a_row_needs() -> None:
    assert Conversation.needs == "conversations"
    assert Naming.needs == "regions"
    assert Regions.needs == "regions"
