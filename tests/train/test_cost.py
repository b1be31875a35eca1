"""What steps and rows take."""

import json
from pathlib import Path

import pytest
from torch.utils.flop_counter import FlopCounterMode

from tests.train.small_run import load, small_config, write_data
from train.cost import RowCost, TrainingCost
from train.data.batches import BatchSource, SampleOrder
from train.init import build_model, build_objective
from train.objectives import Objective
from train.processes import choose_device

DENSE = (
    'model.lm.layers=[{"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "headdim": 16}, '
    '{"kind": "mlp", "d_ff": 96}]',
    "model.lm.d_model=64",
)


def objective(data: Path, *changes: str, recipe: str = "tiny") -> Objective:
    config = small_config(data, *changes, recipe=recipe)
    rows = load(config)
    return build_objective(config, build_model(config, rows), rows, choose_device("cpu"))


@pytest.mark.parametrize("frozen", ["[]", "vision_encoder", "vision_encoder,lm", "lm", "connector,lm"])
def test_operations_of_a_step_are_about_those_that_torch_counts(data: Path, frozen: str) -> None:
    """Dense parts, to 10 percent: torch leaves out the gradient of the pixels, counts the half of attention that a
    causal mask hides, and takes five products for its gradient instead of four."""
    ours = objective(data, *DENSE, f"train.freeze={frozen}")
    batch = ours.collate([ours.sample(load(small_config(data))[0])] * 4)  # without padding, which torch counts
    with FlopCounterMode(display=False) as counter:
        ours(batch.inputs)[0].backward()
    assert TrainingCost(ours).of_batch(batch) == pytest.approx(counter.get_total_flops(), rel=0.1)


@pytest.mark.parametrize(("recipe", "tolerance"), [("tiny-tower", 0.05), ("tiny-naming", 0.25)])
def test_operations_of_objectives_without_a_language_model(region_data: Path, recipe: str, tolerance: float) -> None:
    """But for their heads: of the naming of patches the words' vectors are a part that can be seen at this size."""
    ours = objective(region_data, recipe=recipe)
    rows = load(small_config(region_data, recipe=recipe))
    batch = ours.collate([ours.sample(rows[number]) for number in range(8)])
    with FlopCounterMode(display=False) as counter:
        ours(batch.inputs)[0].backward()
    assert TrainingCost(ours).of_batch(batch) == pytest.approx(counter.get_total_flops(), rel=tolerance)


def test_text_does_not_pay_for_the_gradients_of_images(data: Path) -> None:
    cost = TrainingCost(objective(data, "train.freeze=vision_encoder,lm"))
    forward = cost.of(0, [50], 10)
    with_image = cost.of(1, [50], 10) - cost.of(1, [], 0)
    assert 1.9 * forward < with_image < 3 * forward  # 2 of products with weights, 3 of the others
    full = TrainingCost(objective(data))
    assert full.of(0, [50], 10) == pytest.approx(3 * forward)


def test_padding_costs_nothing_and_logits_are_those_of_supervised_tokens(data: Path) -> None:
    cost = TrainingCost(objective(data))
    assert cost.of(0, [10, 40], 5) == pytest.approx(cost.of(0, [10], 2) + cost.of(0, [40], 3))
    head = cost.of(0, [10], 3) - cost.of(0, [10], 2)
    assert head == 3 * 2 * 32 * 384


def write_mixture(folder: Path) -> Path:
    """Long texts, short texts, and images with a word or a long text."""
    path = write_data(folder, 40)
    rows = json.loads(path.read_text())
    for index, row in enumerate(rows):
        if "image" not in row:
            row["conversations"][1]["value"] = "so it goes on and on " * (4 + 23 * index % 60)
        elif index % 7 == 0:
            row["conversations"][1]["value"] += ", it seems to me" * (index % 9)
    path.write_text(json.dumps(rows))
    return path


def test_rows_are_shared_out_by_what_they_cost(tmp_path: Path) -> None:
    """The operations of a step, as its batches have them, are more even over two and four processes than if rows of
    similar length were dealt in turns, and than if their lengths were made even."""
    data = write_mixture(tmp_path / "mixture")
    config = small_config(data)
    rows, ours = load(config), objective(data)
    cost = TrainingCost(ours)

    def spread(world: int, row_cost, in_turns: bool = False) -> float:
        """The largest share of a process over the mean, less 1, averaged over steps."""
        order = SampleOrder(rows.lengths, 16, seed=0, length_group=4)
        source = BatchSource(ours, rows, order, row_cost, world_size=world)
        found = []
        for step in range(8):
            numbers = order.batch(step)
            dealt = [numbers[rank::world] for rank in range(world)] if in_turns else source.deals(step)[0]
            batches = [ours.collate([ours.sample(rows[number]) for number in own]) for own in dealt]
            taken = [cost.of_batch(batch) for batch in batches]
            found.append(max(taken) * world / sum(taken) - 1)
        return sum(found) / len(found)

    row_cost = RowCost(cost, ours, rows)
    for world in (2, 4):
        assert spread(world, row_cost) < 0.7 * spread(world, row_cost, in_turns=True)
        assert spread(world, row_cost) < spread(world, None)


def test_cost_of_a_row_is_about_that_of_its_batch(tmp_path: Path) -> None:
    data = write_mixture(tmp_path / "mixture")
    rows, ours = load(small_config(data)), objective(data)
    cost = TrainingCost(ours)
    row_cost = RowCost(cost, ours, rows)
    for number in range(len(rows)):
        assert row_cost(number) == row_cost.row_cost(rows.num_characters[number], rows.num_images[number])
        assert row_cost(number) == pytest.approx(cost.of_batch(ours.collate([ours.sample(rows[number])])), rel=0.25)
    again = RowCost(cost, ours, rows)
    assert again.tokens_per_character == row_cost.tokens_per_character


def test_rows_that_cannot_be_used_are_left_to_the_step_that_reads_them(data: Path) -> None:
    ours, rows = objective(data), load(small_config(data))
    whole = RowCost(TrainingCost(ours), ours, rows)
    content = data.read_bytes()
    data.write_bytes(content.replace(b"human", b"HUMAN", 1))  # after the rows were indexed
    found = RowCost(TrainingCost(ours), ours, rows)
    assert found.tokens_per_character == pytest.approx(whole.tokens_per_character, rel=0.1)
    assert found.tokens_per_character != whole.tokens_per_character
