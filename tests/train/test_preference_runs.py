"""Runs on preference data: resumed, learned from, in several processes; and what is refused."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

from tests.train.many_runs import run_many
from tests.train.small_preference import DPO, LORA, build, dpo_config, save_start
from tests.train.small_run import COLOURS, LAYERS, losses, small_config
from tests.train.test_cost import DENSE
from tests.train.test_resume import same_tensors, stop_after
from tests.train.test_zero import NOTHING_WHOLE, TOLERANCE
from train.__main__ import main
from train.cost import RowCost, TrainingCost
from train.init import share_sequences
from train.metrics import read_metrics
from train.objectives import Conversation
from train.run import prepare, run
from train.settings import change
from train.ssm_statistics import SSMStatistics
from vision_scan.errors import UserError


@pytest.mark.parametrize("changes", [(), LORA, ("lora.init=pissa", *LORA)], ids=["second model", "adapters", "pissa"])
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    pairs: Path, tmp_path: Path, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = dpo_config(pairs, *changes, "optim.lr=1e-3")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(config, whole)
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        assert run(config, parts) is False
    torch.manual_seed(123)
    assert run(config, parts, resume=True)
    assert losses(parts) == losses(whole)
    assert losses(whole)[-1] < math.log(2) - 0.01
    margins = [[record["reward_margin"] for record in read_metrics(output)] for output in (whole, parts)]
    assert margins[0] == margins[1]
    assert same_tensors(whole, parts)


def test_resuming_needs_the_reference(pairs: Path, tmp_path: Path) -> None:
    start = tmp_path / "start"
    shutil.copytree(pairs.parents[1] / "start", start)
    config = dpo_config(pairs, f"init.path={start}", "train.steps=2")
    assert run(config, tmp_path / "run")
    shutil.rmtree(start)
    with pytest.raises(UserError, match="start: no such model directory") as caught:
        prepare(config, tmp_path / "run", resume=True)
    assert "\n" not in str(caught.value)


def write_colours(folder: Path, num_rows: int, seed: int) -> Path:
    """Pictures of one colour; the chosen answer names it, the rejected one another."""
    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(seed)
    rows = []
    for index in range(num_rows):
        right, wrong = torch.randperm(len(COLOURS), generator=draw)[:2].tolist()
        shade = torch.randint(0, 40, (3,), generator=draw).tolist()
        names = sorted(COLOURS)
        pixel = tuple(min(255, value + more) for value, more in zip(COLOURS[names[right]], shade, strict=True))
        Image.new("RGB", (16, 16), pixel).save(folder / f"{index}.png")
        ask = {"from": "human", "value": "<image>\nColour?"}
        row = {"image": f"{index}.png", "conversations": [ask], "chosen": names[right], "rejected": names[wrong]}
        rows.append(row)
    (folder / "data.json").write_text(json.dumps(rows))
    return folder / "data.json"


def test_preferring_is_learned_and_held_out_rows_show_it(pairs: Path, tmp_path: Path) -> None:
    data, held_out = (write_colours(tmp_path / name, 48, seed) for seed, name in enumerate(("data", "held out")))
    config = dpo_config(
        pairs, f"data.path={data}", f"val.path={held_out}", "val.every=30", "val.samples=1", "train.steps=60",
        "train.batch_size=16", "optim.lr=4e-3", "preference.beta=0.5",
    )  # fmt: skip
    before, rows = build(change(config, [f"data.path={held_out}"]), moved=0.0)
    with torch.no_grad():
        _, stats = before(before.collate([before.sample(row) for row in rows]).inputs)
    log_probs = float((stats["log_prob_chosen"] - stats["log_prob_rejected"])[0] / len(rows))
    assert run(config, tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    held = [record for record in records if "val_loss" in record]
    assert [record["step"] for record in held] == [30, 60]
    assert held[-1]["val_reward_accuracy"] == 1.0
    assert held[-1]["val_loss"] < 0.3 < math.log(2)
    assert held[-1]["val_log_prob_chosen"] - held[-1]["val_log_prob_rejected"] > log_probs + 2
    assert held[-1]["val_reward_chosen"] - held[-1]["val_reward_rejected"] == pytest.approx(
        held[-1]["val_reward_margin"], abs=1e-5
    )
    assert {"dt_mean", "dt_max", "state_norm"} <= records[0].keys()
    (sample, _) = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert sample["reference"] in COLOURS


def test_recurrences_are_watched_while_they_read_prompts(pairs: Path) -> None:
    objective, rows = build(dpo_config(pairs, *LORA))
    batch = objective.collate([objective.sample(row) for row in rows])
    statistics = SSMStatistics(objective)
    statistics.begin()
    objective(batch.inputs)[0].backward()
    found = statistics.end()
    mixer = objective.model.lm.layers[0].mixer
    assert LAYERS[0]["kind"] == "mamba2"
    dt = []
    hook = mixer.in_proj.register_forward_hook(lambda module, given, made: dt.append(mixer.step_sizes(made.detach())))
    with torch.no_grad():
        for row in rows:  # alone, so without padding
            objective(objective.collate([objective.sample(row)]).inputs)
    hook.remove()
    prompts = torch.cat([sizes.flatten() for sizes in dt[::4]])  # then its answers, and both by the reference
    assert found["dt_mean"] == pytest.approx(prompts.mean().item(), rel=1e-5)
    assert found["dt_max"] == pytest.approx(prompts.max().item(), rel=1e-5)
    assert found["state_norm"] > 0


def test_operations_are_about_those_that_torch_counts(tmp_path: Path) -> None:
    """Of both models, without what is computed again in the backward pass: logits of all answers' tokens."""
    data = save_start(tmp_path, *DENSE)
    objective, rows = build(dpo_config(data, *DENSE))
    sample = objective.sample(rows[0])
    batch = objective.collate([replace(sample, answers=sample.answers[1:] * 2)] * 4)  # without padding
    with FlopCounterMode(display=False) as counter:
        objective(batch.inputs)[0].backward()
    again = 2 * objective.model.lm.lm_head.weight.numel() * batch.num_supervised
    expected = counter.get_total_flops() - again
    cost = TrainingCost(objective)
    assert cost.of_batch(batch) == pytest.approx(expected, rel=0.1)
    row_cost = RowCost(cost, objective, rows)
    for number, row in enumerate(rows):
        assert row_cost(number) == pytest.approx(cost.of_batch(objective.collate([objective.sample(row)])), rel=0.4)


def test_row_that_is_too_long_is_bad_and_never_cut(pairs: Path) -> None:
    objective, rows = build(dpo_config(pairs))
    lengths = [max(objective.render_pair(row).lengths) for row in rows]
    limit = sorted(lengths)[5]
    config = dpo_config(pairs, f"data.max_tokens={limit}")
    objective, rows = build(config)
    for row, length in zip(rows, lengths, strict=True):
        if length <= limit:
            objective.sample(row)
            continue
        told = rf"row {row.id}: it has {length} tokens with the longer answer, data.max_tokens is {limit}"
        with pytest.raises(UserError, match=told) as caught:
            objective.sample(row)
        assert "\n" not in str(caught.value)


def test_rows_that_are_too_long_are_left_out(pairs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert run(dpo_config(pairs, "data.max_tokens=60", "data.skip_bad=true"), tmp_path / "run")
    assert "skipped row" in caplog.text
    with pytest.raises(UserError, match="neither answers nor questions are cut"):
        run(dpo_config(pairs, "data.max_tokens=60"), tmp_path / "other")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (("data.packing=true",), "set data.packing=false"),
        (("data.captions=true",), "set data.captions=false"),
        (("init.path=none",), "give --init-from DIR, or preference.reference"),
        (("init.parts=lm",), "give the reference by preference.reference"),
        (("init.fresh=lm.norm_f",), "give the reference by preference.reference"),
        (("preference.reference=nowhere",), "nowhere"),
        (("init.tokenizer=false", "tokenizer.kind=train"), "init.path=.* has another tokenizer"),
        (("model.template=in_out",), "has template 'compact', the model that learns 'in_out'.*model.preset"),
        (("model.image.resize=crop",), "has image .*both must read the same rows"),
        (('model.connector={"kind": "pool2d"}', "init.parts=lm", "preference.reference=START"), "has tokens_per_tile"),
    ],
)
def test_what_does_not_fit_is_one_line(pairs: Path, changes: tuple[str, ...], told: str) -> None:
    start = str(pairs.parents[1] / "start")
    with pytest.raises(UserError, match=told) as caught:
        build(dpo_config(pairs, *(one.replace("START", start) for one in changes)))
    assert "\n" not in str(caught.value)


def test_any_start_will_do_where_a_reference_is_given(pairs: Path) -> None:
    objective, rows = build(dpo_config(pairs, "init.path=none", f"preference.reference={pairs.parents[1] / 'start'}"))
    loss, _ = objective(objective.collate([objective.sample(rows[0])]).inputs)
    assert loss.isfinite()


def test_nested_connector_is_refused(tmp_path: Path) -> None:
    nested = 'model.connector={"kind": "mqt", "num_queries": 16, "num_heads": 2, "nested": true}'
    data = save_start(tmp_path, nested)
    with pytest.raises(UserError, match=r"set model.connector.nested=false"):
        build(dpo_config(data, nested))
    objective, rows = build(dpo_config(data, nested, "model.connector.nested=false"), moved=0.0)
    loss, _ = objective(objective.collate([objective.sample(rows[0])]).inputs)
    assert loss.item() == pytest.approx(math.log(2), abs=1e-6)


def test_rows_are_not_shared_by_processes(pairs: Path) -> None:
    config = dpo_config(pairs, "train.sequence_parallel=2")
    objective, _ = build(config)
    assert isinstance(objective, Conversation)
    with pytest.raises(UserError, match=r"needs train.objective=conversation, got preference"):
        share_sequences(objective, None, config)


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("preference.beta=0", "more than 0"),
        ("preference.loss=kto", "sigmoid"),
        ("preference.label_smoothing=0.5", "0 to below 0.5"),
        ("preference.sft=-1", "0 or more"),
    ],
)
def test_settings_say_what_is_allowed(pairs: Path, assignment: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        dpo_config(pairs, assignment)


def test_smoothing_is_of_one_loss(pairs: Path) -> None:
    with pytest.raises(UserError, match=r"label_smoothing: got 0.1, allowed with preference.loss=ipo: 0"):
        dpo_config(pairs, "preference.label_smoothing=0.1", "preference.loss=ipo")


def test_there_is_no_plan_and_that_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--recipe", "dpo", "--rows", "100"]) == 0
    assert capsys.readouterr().out == "recipe dpo: objective preference, of which there is no plan\n"


# Two processes, each with rows of its own; float32 sums in another order is what may differ.
WAYS = {
    "stage 0": ("zero.stage=0",),
    "stage 2": ("zero.stage=2",),
    "stage 3": ("zero.stage=3", NOTHING_WHOLE),
    "adapters, stage 2": ("zero.stage=2", *LORA),
    "adapters, stage 3": ("zero.stage=3", NOTHING_WHOLE, *LORA),
}


@pytest.fixture(scope="module")
def folder(pairs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs in two processes, and in one to hold them against."""
    folder = tmp_path_factory.mktemp("processes")
    common = [f"init.path={pairs.parents[1] / 'start'}", *DPO[1:], "optim.lr=1e-3", "train.micro_batch_size=1"]
    common += [f"val.path={pairs}", "val.every=3"]
    for name, changes in (("plain", ()), ("adapters", LORA)):
        assert run(small_config(pairs, *common, "train.engine=plain", *changes), folder / name)
    plan = [
        {"data": str(pairs), "output": str(folder / name), "changes": [*common, *changes]}
        for name, changes in WAYS.items()
    ]
    shared = [*common, "train.sequence_parallel=2", "train.micro_batch_size=2"]
    run_many([*plan, {"data": str(pairs), "output": str(folder / "shared"), "changes": shared}], 2, folder)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_several_processes_have_the_numbers_of_one(folder: Path, way: str) -> None:
    expected = folder / ("adapters" if "adapters" in way else "plain")
    assert losses(folder / way) == pytest.approx(losses(expected), abs=TOLERANCE)
    for found, record in zip(read_metrics(folder / way), read_metrics(expected), strict=True):
        for key in [key for key in record if key.startswith(("reward_", "log_prob_", "val_")) and key != "val_s"]:
            assert found[key] == pytest.approx(record[key], rel=1e-3, abs=1e-3), key


def test_sequence_parallel_is_refused_on_every_process(folder: Path) -> None:
    for rank in range(2):
        assert "needs train.objective=conversation, got preference" in (folder / f"shared.error-{rank}").read_text()
