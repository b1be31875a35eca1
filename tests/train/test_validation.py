"""Held-out rows: their loss on any engine, and that nobody notices."""

import json
import socket
import subprocess
from pathlib import Path

import pytest
import torch

import cobra
from tests.train.small_run import LAYERS, command, environment, losses, small_config, write_data, write_region_data
from train.metrics import SAMPLES, read_metrics
from train.run import prepare, run
from train.run_directory import latest_checkpoint
from train.settings import change
from train.validation import MAX_NEW_TOKENS, HeldOutBatches, evaluating
from vision_scan.errors import UserError

PLAIN = "train.engine=plain"


@pytest.fixture
def held_out(tmp_path: Path) -> Path:
    """Seven rows that the training does not see."""
    return write_data(tmp_path / "held-out", 7)


def samples(output: Path) -> list[dict]:
    path = output / SAMPLES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def val_losses(output: Path) -> dict[int, float]:
    return {record["step"]: record["val_loss"] for record in read_metrics(output) if "val_loss" in record}


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_a_run_with_validation_is_the_run_without_bit_for_bit(
    data: Path, held_out: Path, tmp_path: Path, engine: str
) -> None:
    config = small_config(data, f"train.engine={engine}", "train.freeze=vision_encoder")
    watched = change(config, [f"val.path={held_out}", "val.every=2", "val.samples=2", "log.profile=3:1"])
    assert run(config, tmp_path / "without")
    assert run(watched, tmp_path / "with")
    assert losses(tmp_path / "with") == losses(tmp_path / "without")
    for path in ("model.safetensors", "checkpoints/step-000006/train_state.safetensors"):
        assert (tmp_path / "with" / path).read_bytes() == (tmp_path / "without" / path).read_bytes(), path
    assert list(val_losses(tmp_path / "with")) == [2, 4, 6]
    assert len(samples(tmp_path / "with")) == 6
    assert not (tmp_path / "without" / SAMPLES).exists()


def test_the_loss_is_that_of_a_token_over_all_rows(data: Path, held_out: Path, tmp_path: Path) -> None:
    """Not a mean of batches' means; of the model as it is then, in evaluation mode."""
    config = small_config(data, PLAIN, f"val.path={held_out}", "train.micro_batch_size=2", "val.every=3")
    assert run(config, tmp_path / "run")
    loop, _ = prepare(change(config, [f"init.path={tmp_path / 'run'}", "init.check_lm=false"]), tmp_path / "other")
    objective, rows = loop.engine.objective, loop.validation.rows
    total = weight = 0.0
    with torch.no_grad():
        for row in rows:
            batch = objective.collate([objective.sample(row)])
            total += objective(batch.inputs)[0].item()
            weight += batch.weight
    assert val_losses(tmp_path / "run")[6] == pytest.approx(total / weight, rel=1e-5)


@pytest.mark.parametrize(("every", "steps"), [(4, [4, 6]), (5, [5, 6]), (100, [6])])
def test_it_is_recorded_when_it_is_due_and_at_the_end(
    data: Path, held_out: Path, tmp_path: Path, every: int, steps: list[int]
) -> None:
    changes = (PLAIN, f"val.path={held_out}", f"val.every={every}", "log.every=100")
    assert run(small_config(data, *changes), tmp_path / "run")
    assert list(val_losses(tmp_path / "run")) == steps
    assert all(record["val_s"] > 0 for record in read_metrics(tmp_path / "run"))


def test_the_time_of_a_validation_is_not_that_of_a_step(
    data: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import time

    call = HeldOutBatches.__call__
    monkeypatch.setattr(HeldOutBatches, "__call__", lambda self, index: (time.sleep(0.7), call(self, index))[1])
    assert run(small_config(data, PLAIN, f"val.path={held_out}", "train.steps=2"), tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert last["val_s"] > 0.7
    assert last["step_ms"] < 600


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_row_is_on_one_process_and_all_have_equally_many_batches(
    data: Path, held_out: Path, tmp_path: Path, world_size: int
) -> None:
    loop, _ = prepare(small_config(data, PLAIN, f"val.path={held_out}"), tmp_path / "run")
    objective, rows = loop.engine.objective, loop.validation.rows
    parts = [HeldOutBatches(objective, rows, list(range(7)), 2, rank, world_size) for rank in range(world_size)]
    assert len({len(part) for part in parts}) == 1
    batches = [batch for part in parts for index in range(len(part)) for batch in part(index)]
    assert sorted(name for batch in batches if batch.weight for name in batch.ids) == [f"'row{i}'" for i in range(7)]
    assert [batch.weight for batch in batches].count(0.0) == (2 if world_size == 3 else 0)


def test_rows_are_chosen_once_and_a_bad_one_is_left_out(
    data: Path, held_out: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = (PLAIN, f"val.path={held_out}", "val.rows=4")
    loop, plan = prepare(small_config(data, *changes), tmp_path / "run")
    again, _ = prepare(small_config(data, *changes), tmp_path / "run")
    numbers = loop.validation.batches.numbers
    assert len(numbers) == 4 and numbers == again.validation.batches.numbers
    assert any("validation: " in line and "4 of 7 rows every 500 steps" in line for line in plan)
    broken = next(image.path for number in numbers for image in loop.validation.rows[number].images)
    broken.write_bytes(broken.read_bytes()[:-30])  # the header stays whole
    assert run(small_config(data, *changes, "train.steps=1"), tmp_path / "run")
    assert "not validated on: row" in caplog.text
    assert list(val_losses(tmp_path / "run")) == [1]


def test_samples_are_answers_of_the_model_as_it_is(data: Path, held_out: Path, tmp_path: Path, capsys) -> None:
    config = small_config(data, PLAIN, f"val.path={held_out}", "val.samples=3", "val.every=3")
    assert run(config, tmp_path / "run")
    found = samples(tmp_path / "run")
    assert [sample["step"] for sample in found] == [3] * 3 + [6] * 3
    assert [sample["id"] for sample in found[:3]] == [sample["id"] for sample in found[3:]]
    model, raw = cobra.load(tmp_path / "run"), {row["id"]: row for row in json.loads(held_out.read_text())}
    for sample in found[3:]:
        row = raw[sample["id"]]
        assert sample["question"] == row["conversations"][0]["value"]
        assert sample["reference"] == row["conversations"][1]["value"]
        images = [str(held_out.parent / row["image"])] if "image" in row else None
        assert sample["answer"] == model.answer(sample["question"], images, max_new_tokens=MAX_NEW_TOKENS)
    told = capsys.readouterr().err.splitlines()
    assert sum("should be" in line for line in told) == 6
    assert any("val " in line for line in told if line.startswith("step 3/6"))


def test_resuming_drops_later_samples(
    data: Path, held_out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changes = (PLAIN, f"val.path={held_out}", "val.samples=1", "val.every=2", "train.save_every=3")
    assert run(small_config(data, *changes), tmp_path / "run")
    expected, losses_before = samples(tmp_path / "run"), val_losses(tmp_path / "run")
    folder = tmp_path / "run" / "checkpoints"
    (folder / "step-000006").rename(tmp_path / "gone")  # as if it was killed before the last checkpoint
    (folder / "latest").write_text("step-000003\n")
    assert run(small_config(data, *changes), tmp_path / "run", resume=True)
    assert samples(tmp_path / "run") == expected
    assert val_losses(tmp_path / "run") == losses_before
    # Other held-out rows, or none, are no other run.
    assert run(small_config(data, PLAIN, "train.save_every=3"), tmp_path / "run", resume=True)
    assert latest_checkpoint(tmp_path / "run").name == "step-000006"


def test_objectives_on_regions_are_validated_with_their_accuracies(region_data: Path, tmp_path: Path) -> None:
    held_out = write_region_data(tmp_path / "held-out", 5)
    config = small_config(region_data, PLAIN, f"val.path={held_out}", recipe="tiny-tower")
    assert run(config, tmp_path / "run")
    last = read_metrics(tmp_path / "run")[-1]
    assert 0 <= last["val_patch_accuracy"] <= 1 and "val_colour_accuracy" in last
    for colour in ("red", "green", "blue"):
        held_out.write_text(held_out.read_text().replace(f'"{colour}"', '"mauve"'))
    with pytest.raises(UserError, match=r"no row of .* can be used any more"):
        run(config, tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (["val.samples=2"], "val.samples=2 needs held-out rows: set val.path"),
        (["val.samples=2", "val.path={data}", "zero.stage=3"], "val.samples=2 needs zero.stage=0, 1 or 2, got 3"),
        (["val.path=/nowhere.json"], "/nowhere.json"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    data: Path, tmp_path: Path, changes: list[str], told: str
) -> None:
    config = small_config(data, *(text.format(data=data) for text in changes))
    with pytest.raises(UserError, match=told):
        run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_samples_need_conversations(region_data: Path, tmp_path: Path) -> None:
    changes = (PLAIN, f"val.path={region_data}", "val.samples=1")
    with pytest.raises(UserError, match=r"needs train.objective=conversation, got regions"):
        run(small_config(region_data, *changes, recipe="tiny-tower"), tmp_path / "run")


def test_modes_and_random_states_are_as_they_were(data: Path, tmp_path: Path) -> None:
    loop, _ = prepare(small_config(data, PLAIN, "train.freeze=connector"), tmp_path / "run")
    objective = loop.engine.objective
    modes, state = [module.training for module in objective.modules()], torch.get_rng_state()
    assert True in modes and False in modes
    with pytest.raises(ZeroDivisionError), evaluating(objective):
        assert not any(module.training for module in objective.modules())
        torch.rand(3)
        raise ZeroDivisionError
    assert [module.training for module in objective.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("setting", ["zero.stage=3", "train.sequence_parallel=2"])
def test_two_processes_find_the_loss_of_one(data: Path, tmp_path: Path, setting: str) -> None:
    """Of nine rows, the last of which is a batch of its own: the other process has none to go with it."""
    held_out = write_data(tmp_path / "held-out", 9)
    changes = ["train.batch_size=4", "train.micro_batch_size=2", "train.steps=4", "optim.kind=adamw"]
    changes += [f"val.path={held_out}", "val.every=2", f"model.lm.layers={json.dumps([LAYERS[0], LAYERS[2]])}"]
    assert run(small_config(data, *changes, PLAIN), tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    num_samples = int(setting != "zero.stage=3")
    options = [*changes, setting, "zero.persistence_threshold=0", f"val.samples={num_samples}"]
    address = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    workers = [
        subprocess.Popen(
            command(data, tmp_path / "two", *options),
            env=environment(RANK=rank, LOCAL_RANK=rank, **address),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    told = [worker.communicate(timeout=1200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], told
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-4)
    assert val_losses(tmp_path / "two") == pytest.approx(val_losses(tmp_path / "one"), abs=1e-4)
    assert len(samples(tmp_path / "two")) == 2 * num_samples
