"""Packed, truncated, shared out, made ahead: the same rows, the same numbers."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
import torch

from cobra.image import open_image
from tests.train.small_run import load, losses, small_config, write_data
from train.__main__ import main
from train.data.batches import deal
from train.data.collate import Sample, collate_conversations
from train.data.loader import load_steps
from train.init import build_model
from train.loop import Loop
from train.objectives import Conversation
from train.run import prepare, run
from vision_scan.errors import UserError


def prepared(data: Path, *changes: str) -> Loop:
    return prepare(small_config(data, "train.engine=plain", *changes), data.parent / "out")[0]


def test_pack_has_every_row_as_a_segment_and_no_padding() -> None:
    samples = [Sample("a", [5, 6, 7], [-100, 6, 7], None), Sample("b", [8, 9], [8, 9], None)]
    batch = collate_conversations(samples, pad_id=0, packing=True)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9]]
    assert batch.inputs["labels"].tolist() == [[-100, 6, 7, -100, 9]]  # b's first token follows nothing
    assert batch.inputs["seq_idx"].tolist() == [[0, 0, 0, 1, 1]]
    assert (batch.weight, batch.num_padding) == (3.0, 0)
    assert collate_conversations(samples, pad_id=0).num_padding == 1


@pytest.mark.parametrize("micro", ["none", "2"])
def test_packed_run_has_the_losses_of_a_padded_one(data: Path, tmp_path: Path, micro: str) -> None:
    for packing in ("true", "false"):
        changes = ("train.engine=plain", f"data.packing={packing}", f"train.micro_batch_size={micro}")
        assert run(small_config(data, *changes), tmp_path / packing)
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), abs=1e-5)


def test_nothing_leaks_from_row_to_row_of_a_pack(data: Path) -> None:
    """Bit for bit: whatever stands in front, a row's hidden states and the gradients of its tokens are the same."""
    loop = prepared(data, "data.packing=true")
    model = loop.engine.objective.model
    generator = torch.Generator().manual_seed(0)
    seq_idx = torch.tensor([[0] * 23 + [1] * 30])

    def read(first: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeds = torch.cat([first, second], 1).requires_grad_()
        hidden, _ = model.lm.read(inputs_embeds=embeds, seq_idx=seq_idx)
        hidden[:, 23:].square().sum().backward()
        return hidden[:, 23:].detach(), embeds.grad

    second = torch.randn(1, 30, 32, generator=generator)
    one, other = (read(torch.randn(1, 23, 32, generator=generator) * scale) for scale in (1.0, 100.0))
    assert torch.equal(one[0], other[0])
    assert torch.equal(one[1][:, 23:], other[1][:, 23:])
    assert one[1][:, :23].abs().max() == 0


def long_rows(folder: Path) -> Path:
    """A conversation of four exchanges with an image in the first and in the third."""
    folder.mkdir()
    open_image(write_data(folder.parent / "pics", 1).parent / "0.png").save(folder / "x.png")
    turns = []
    for number in range(4):
        mark = "<image>" if number in (0, 2) else ""
        turns += [{"from": "human", "value": f"{mark}question {number}"}, {"from": "gpt", "value": f"answer {number}"}]
    rows = [{"id": "long", "image": ["x.png", "x.png"], "conversations": turns}]
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def test_truncation_drops_whole_exchanges_with_their_images(tmp_path: Path) -> None:
    data = long_rows(tmp_path / "long")
    config = small_config(data)
    rows = load(config)
    model = build_model(config, rows)
    whole = Conversation(model, rows).sample(rows[0])
    assert whole.num_images == 2 and not whole.is_truncated
    sizes = {}
    for most in range(len(whole.input_ids), 0, -1):
        rows = load(small_config(data, f"data.max_tokens={max(2, most)}"))
        objective = Conversation(model, rows)
        try:
            sample = objective.sample(rows[0])
        except UserError as error:
            assert "its first exchange has" in str(error) and "'long'" in str(error)
            break
        assert len(sample.input_ids) <= most
        assert list(sample.input_ids) == list(whole.input_ids[: len(sample.input_ids)])
        tiles = 0 if sample.pixel_values is None else len(sample.pixel_values)
        marks = list(sample.input_ids).count(model.tokenizer.image_id)
        assert marks == tiles * model.config.tokens_per_tile
        sizes[len(sample.input_ids)] = sample.num_images
    assert list(sizes.values()) == [2, 2, 1, 1]


def test_captions_are_learned_right_behind_their_images(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = json.loads(data.read_text())
    captions = [{**row, "conversations": row["conversations"][:2]} for row in rows if "image" in row]
    data.write_text(json.dumps(captions))
    config = small_config(data, "data.captions=true", "train.engine=plain")
    loaded = load(config)
    model = build_model(config, loaded)
    sample = Conversation(model, loaded).sample(loaded[0])
    tiles = [model.tokenizer.image_id] * model.config.tokens_per_tile
    answer = captions[0]["conversations"][1]["value"]
    assert list(sample.input_ids) == tiles + model.tokenizer.encode(answer + "\n")
    assert run(config, tmp_path / "run")
    arguments = ["data", "check", str(data), "--captions"]
    assert main(arguments) == 0
    data.write_text(json.dumps(rows))
    assert main(arguments) == 2
    assert "4 turns with 1 images are no caption" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"6 of 10 rows cannot be used: row 'row0': 4 turns with 1 images are no cap"):
        run(config, tmp_path / "refused")


def test_rows_are_dealt_out_equally_many_and_about_equally_dear() -> None:
    costs = [1.0] * 12 + [9.0, 10.0, 11.0, 12.0]
    dealt = deal(list(range(16)), 4, costs.__getitem__)
    assert [len(rows) for rows in dealt] == [4] * 4
    assert sorted(row for rows in dealt for row in rows) == list(range(16))
    loads = [sum(costs[row] for row in rows) for rows in dealt]
    assert max(loads) - min(loads) <= 3.0
    in_turn = [sum(costs[row] for row in range(rank, 16, 4)) for rank in range(4)]
    assert max(loads) <= max(in_turn)
    assert deal([3, 1, 2], 1, costs.__getitem__) == [[3, 1, 2]]


@pytest.mark.parametrize("workers", [1, 3])
def test_workers_make_the_same_batches_from_any_step_on(data: Path, workers: int) -> None:
    loop = prepared(data, "train.steps=20")
    torch.manual_seed(5)
    expected = list(load_steps(loop.source, 7, 20, 0))
    found = list(load_steps(loop.source, 7, 20, workers))
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())  # however batches are made, the run's random state is its own
    for one, other in zip(expected, found, strict=True):
        assert [batch.ids for batch in one] == [batch.ids for batch in other]
        for mine, theirs in zip(one, other, strict=True):
            for name, value in mine.inputs.items():
                assert (value is None) == (theirs.inputs[name] is None)
                assert value is None or torch.equal(value, theirs.inputs[name])


def test_bad_row_in_a_worker_is_named_as_without(data: Path) -> None:
    loop = prepared(data, "data.check=none")
    for image in data.parent.glob("*.png"):
        image.write_bytes(b"gone")
    for workers in (0, 2):
        error = next(load_steps(loop.source, 0, 6, workers))
        assert "not an image" in str(error) and str(error).startswith("row ")


def test_run_with_workers_is_the_run_without_bit_for_bit(data: Path, tmp_path: Path) -> None:
    for workers in ("0", "2"):
        assert run(small_config(data, "train.engine=plain", f"data.workers={workers}"), tmp_path / workers)
    assert losses(tmp_path / "0") == losses(tmp_path / "2")


def test_workers_do_not_hear_signals(data: Path) -> None:
    loop = prepared(data, "train.steps=200")
    batches = load_steps(loop.source, 0, 200, 1)
    next(batches)
    (worker,) = multiprocessing.active_children()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        os.kill(worker.pid, number)
    assert len(list(batches)) == 199


def test_mixture_is_seen_by_its_weights(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data")
    rows = [row for row in json.loads(data.read_text()) if "image" in row]
    for name in ("half", "twice"):
        (data.parent / f"{name}.json").write_text(json.dumps([{**row, "id": name} for row in rows[:4]]))
    mixture = data.parent / "mix.yaml"
    mixture.write_text("datasets: [{path: half.json, weight: 0.5}, {path: twice.json, weight: 2}]")
    loop = prepared(mixture, "train.batch_size=10", "data.length_group=1", "train.steps=4")
    dataset = loop.source.rows
    for epoch in range(4):
        names = [dataset[number].id for number in loop.source.order.batch(epoch)]
        assert (names.count("'half'"), names.count("'twice'")) == (2, 8)
    seen = [number for epoch in range(2) for number in loop.source.order.batch(epoch) if number < 4]
    assert sorted(seen) == [0, 1, 2, 3]  # two epochs see each row of weight 0.5 once
