"""Preference data: the loss against a plain computation, the reference, and runs."""

import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import cobra
from cobra.model import Cobra
from cobra.prompt import Turn
from cobra.video import Video
from tests.train.many_runs import run_many
from tests.train.small_run import COLOURS, LAYERS, load, losses, small_config, write_preference_data
from tests.train.test_cost import DENSE
from tests.train.test_resume import same_tensors, stop_after
from tests.train.test_zero import NOTHING_WHOLE, TOLERANCE
from train.__main__ import main
from train.cost import RowCost, TrainingCost
from train.init import share_sequences
from train.metrics import read_metrics
from train.objectives import Conversation, Preference
from train.run import build_model, build_objective, prepare, run
from train.settings import RunConfig, change
from train.ssm_statistics import SSMStatistics
from vision_scan.errors import UserError

DPO = ("train.engine=plain", "train.objective=preference", "init.check_lm=false", "optim.kind=adamw")
LORA = ("lora.rank=4", "train.freeze=vision_encoder")
RECURRENT = [
    {"kind": "mamba1", "d_state": 4},
    {"kind": "gated_deltanet", "num_k_heads": 1, "num_v_heads": 2, "head_k_dim": 8, "head_v_dim": 8, "chunk_size": 16},
    {"kind": "gated_conv"},
    {"kind": "mamba3", "d_state": 8, "headdim": 16, "chunk_size": 16},
]
WINDOW = [{**LAYERS[1], "window": 7}, LAYERS[2]]
MODELS = {
    "mixed": (),
    "recurrent": (f"model.lm.layers={json.dumps(RECURRENT)}",),
    "window": (f"model.lm.layers={json.dumps(WINDOW)}",),
    "anyres": ('model.image.tiles={"kind": "anyres"}',),
    "native": ('model.image.tiles={"kind": "native", "max_cells": 12}',),
    "video": ('model.video={"kind": "evs", "pruning_rate": 0.5}',),
}


def save_start(folder: Path, *changes: str) -> Path:
    """A model to begin with, beside preference data."""
    data = write_preference_data(folder / "data")
    config = small_config(data, *changes, "train.objective=preference")
    cobra.save(build_model(config, load(config)), folder / "start")
    return data


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preference data beside a model."""
    return save_start(tmp_path_factory.mktemp("pairs"))


def dpo_config(data: Path, *changes: str) -> RunConfig:
    return small_config(data, f"init.path={data.parents[1] / 'start'}", *DPO, *changes)


def build(config: RunConfig, moved: float = 0.05) -> tuple[Preference, Any]:
    """The objective, whose model has moved away from the reference, and its rows."""
    rows = load(config)
    objective = build_objective(config, build_model(config, rows), rows, torch.device("cpu"))
    noise = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in objective.model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=moved)
    return objective, rows


def plain_log_prob(model: Cobra, row: Any, answer: str) -> tuple[Tensor, int]:
    """Of one answer, read alone as a conversation by the logits of all of its tokens; and how many tokens it has."""
    images: list[Any] = [image.open() for image in row.images]
    turns = list(row.turns)
    if row.is_video and model.config.video is not None:
        mark = "<image>" * len(images)
        turns = [Turn(turn.role, turn.text.replace(mark, "<image>")) for turn in turns]
        images = [Video(images)]
    whole = model.processor([[*turns, Turn("assistant", answer)]], [images])
    count = whole["input_ids"].shape[1] - model.processor([turns], [images])["input_ids"].shape[1]
    pixels = [whole.get(name) for name in ("pixel_values", "image_sizes", "num_frames")]
    logits, _ = model.lm(inputs_embeds=model.embed(whole["input_ids"], *pixels))
    log_probs = logits[0, :-1].log_softmax(-1)
    return log_probs[-count:].gather(1, whole["input_ids"][0, -count:, None]).sum(), count


def plain_loss(
    model: Cobra, reference: Cobra, rows: Sequence[Any], kind: str, beta: float, smoothing: float, sft: float
) -> tuple[Tensor, dict[str, float]]:
    """Sum of the losses and means of what is reported, one answer after the other."""
    total, found = torch.zeros(()), []
    for row in rows:
        own, base, lengths = [], [], []
        for answer in row.answers:
            log_prob, length = plain_log_prob(model, row, answer)
            with torch.no_grad():
                base.append(plain_log_prob(reference, row, answer)[0])
            own.append(log_prob)
            lengths.append(length)
        ratios = [mine - theirs for mine, theirs in zip(own, base, strict=True)]
        if kind == "ipo":
            total = total + (ratios[0] / lengths[0] - ratios[1] / lengths[1] - 0.5 / beta) ** 2
        elif kind == "hinge":
            total = total + max(1 - beta * (ratios[0] - ratios[1]), torch.zeros(()))
        else:
            better = 1 / (1 + (-beta * (ratios[0] - ratios[1])).exp())
            total = total - (1 - smoothing) * better.log() - smoothing * (1 - better).log()
        total = total - sft * own[0] / lengths[0]
        rewards = [beta * ratio.item() for ratio in ratios]
        found.append([float(rewards[0] > rewards[1]), rewards[0] - rewards[1], *rewards, *(o.item() for o in own)])
    means = torch.tensor(found).mean(0).tolist()
    names = [f"reward_{what}" for what in ("accuracy", "margin", "chosen", "rejected")]
    return total, dict(zip([*names, "log_prob_chosen", "log_prob_rejected"], means, strict=True))


def gradients(model: Cobra) -> dict[str, Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """To float32 rounding, of each as a share of its largest: some parameters hardly matter."""
    assert found.keys() == expected.keys()
    size = max(float(grad.norm()) for grad in expected.values())
    for name, grad in expected.items():
        assert (found[name] - grad).norm() <= 1e-5 * max(grad.norm(), 0.01 * size), name


LOSSES = {
    "sigmoid": ("sigmoid", 0.1, 0.0, 0.0),
    "sharp": ("sigmoid", 2.0, 0.0, 0.0),
    "smoothed": ("sigmoid", 0.3, 0.2, 0.0),
    "ipo": ("ipo", 0.5, 0.0, 0.0),
    "hinge": ("hinge", 0.3, 0.0, 0.0),
    "sft": ("sigmoid", 0.1, 0.0, 0.7),
}


def preference(kind: str, beta: float, smoothing: float, sft: float) -> list[str]:
    names = ("loss", "beta", "label_smoothing", "sft")
    return [f"preference.{name}={value}" for name, value in zip(names, (kind, beta, smoothing, sft), strict=True)]


@pytest.mark.parametrize("name", LOSSES)
def test_loss_rewards_and_gradients_are_the_plain_ones(pairs: Path, name: str) -> None:
    check_against_plain(dpo_config(pairs, *preference(*LOSSES[name])), *LOSSES[name])


@pytest.mark.parametrize("name", MODELS)
def test_every_model_and_form_of_image_gives_the_plain_ones(tmp_path: Path, name: str) -> None:
    data = save_start(tmp_path, *MODELS[name])
    check_against_plain(dpo_config(data, *MODELS[name]), *LOSSES["sigmoid"])


@pytest.mark.parametrize("way", [("layer",), ("segment", "train.segment_tokens=9")])
def test_recomputing_changes_nothing(pairs: Path, way: tuple[str, ...]) -> None:
    check_against_plain(dpo_config(pairs, f"train.recompute={way[0]}", *way[1:]), *LOSSES["sigmoid"])


def check_against_plain(config: RunConfig, *settings: Any) -> None:
    objective, rows = build(config)
    model = objective.model
    batch = objective.collate([objective.sample(row) for row in rows])
    assert batch.weight == len(rows) == 10
    loss, stats = objective(batch.inputs)
    loss.backward()
    found = gradients(model)
    model.zero_grad()
    model.lm.recompute_layers, model.lm.recompute_tokens = False, 0
    expected, means = plain_loss(model, objective.reference.model, list(rows), *settings)
    expected.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    assert_same_gradients(found, gradients(model))
    assert stats.keys() == means.keys()
    for name, value in means.items():
        assert float(stats[name][0] / stats[name][1]) == pytest.approx(value, rel=1e-4, abs=1e-4), name


def test_batching_and_padding_change_nothing(pairs: Path) -> None:
    objective, rows = build(dpo_config(pairs))
    samples = [objective.sample(row) for row in rows]
    together, _ = objective(objective.collate(samples).inputs)
    together.backward()
    expected = gradients(objective.model)
    objective.model.zero_grad()
    alone = [objective(objective.collate([sample]).inputs)[0] for sample in samples]
    sum(alone).backward()
    torch.testing.assert_close(together, sum(alone), rtol=1e-5, atol=1e-5)
    assert_same_gradients(gradients(objective.model), expected)
    for sample, row, loss in zip(samples, rows, alone, strict=True):
        batch = objective.collate([sample])
        assert objective.num_tokens(row) == batch.num_tokens and batch.num_padding == abs(
            len(sample.answers[0]) - len(sample.answers[1])
        )
        assert loss > 0


def test_accumulated_micro_batches_are_one_batch(pairs: Path, tmp_path: Path) -> None:
    for name, size in (("one", 4), ("two", 2), ("four", 1)):
        assert run(dpo_config(pairs, f"train.micro_batch_size={size}", "optim.lr=1e-3"), tmp_path / name)
    for name in ("two", "four"):
        assert losses(tmp_path / name) == pytest.approx(losses(tmp_path / "one"), abs=TOLERANCE)
        one, other = (read_metrics(tmp_path / each) for each in ("one", name))
        for key in ("reward_accuracy", "reward_margin", "log_prob_chosen", "grad_norm"):
            assert [r[key] for r in other] == pytest.approx([r[key] for r in one], rel=1e-3, abs=1e-4), key


def test_first_loss_is_log_2_where_the_model_is_the_reference(pairs: Path) -> None:
    objective, rows = build(dpo_config(pairs), moved=0.0)
    loss, stats = objective(objective.collate([objective.sample(row) for row in rows]).inputs)
    assert loss.item() / len(rows) == pytest.approx(math.log(2), abs=1e-6)
    assert stats["reward_margin"][0].abs() < 1e-5


def test_images_of_a_row_are_encoded_once_for_both_answers(pairs: Path) -> None:
    objective, rows = build(dpo_config(pairs))
    batch = objective.collate([objective.sample(row) for row in rows])
    count = sum(len(row.images) for row in rows)
    assert count == batch.num_images == len(batch.inputs["pixel_values"]) > len(rows)
    for model in (objective.model, objective.reference.model):
        with mock.patch.object(model, "encode_images", wraps=model.encode_images) as encode:
            objective(batch.inputs)
        assert [len(call.args[0]) for call in encode.call_args_list] == [count]


def test_prompt_is_read_once_for_both_answers(pairs: Path) -> None:
    objective, rows = build(dpo_config(pairs))
    batch = objective.collate([objective.sample(row) for row in rows])
    read, layer = [], objective.model.lm.layers[0]
    hook = layer.register_forward_hook(lambda module, given, made: read.append(given[0].shape[:2]))
    objective(batch.inputs)
    hook.remove()
    prompts, answers = batch.inputs["input_ids"].shape, batch.inputs["labels"].shape
    assert read == [prompts, (answers[0], answers[1] - 1)]  # an answer's end is foretold, and not read


def test_second_model_is_seen_by_neither_optimizer_nor_checkpoint(pairs: Path) -> None:
    objective, _ = build(dpo_config(pairs))
    assert objective.extra_state() == {}
    assert {name.split(".")[0] for name, _ in objective.named_parameters()} == {"model"}
    assert not any(parameter.requires_grad for parameter in objective.reference.model.parameters())
    assert not objective.reference.model.training


def test_adapters_switched_off_are_the_reference(pairs: Path) -> None:
    start = pairs.parents[1] / "start"
    objective, rows = build(dpo_config(pairs, *LORA))
    other, _ = build(dpo_config(pairs, *LORA, f"preference.reference={start}"))
    assert objective.reference is None and objective.frozen_readers == (objective.model,)
    assert other.reference is not None
    batch = objective.collate([objective.sample(row) for row in rows])
    found = {}
    for each in (objective, other):
        loss, stats = each(batch.inputs)
        loss.backward()
        found[each] = loss, stats["reward_margin"], gradients(each.model)
    assert abs(float(found[other][1][0])) > 0.1  # the adapters have moved
    torch.testing.assert_close(found[objective][:2], found[other][:2], rtol=1e-5, atol=1e-5)
    assert_same_gradients(found[objective][2], found[other][2])
    assert any("lora_A" in name for name in found[other][2])
    assert "without its adapters" in next(objective.describe())


@pytest.mark.parametrize(
    "changes",
    [("lora.init=pissa", *LORA), ("lora.rank=4",), ("lora.parts=lm", *LORA)],
    ids=["pissa", "tower", "connector"],
)
def test_model_without_adapters_that_is_another_is_no_reference(pairs: Path, changes: tuple[str, ...]) -> None:
    """PiSSA's is less its strongest directions, and a part that learns as a whole moves away."""
    objective, rows = build(dpo_config(pairs, *changes), moved=0.0)
    assert objective.reference is not None
    loss, _ = objective(objective.collate([objective.sample(row) for row in rows]).inputs)
    assert loss.item() / len(rows) == pytest.approx(math.log(2), abs=1e-4)


def test_reference_is_held_in_the_dtype_of_the_forward_pass(pairs: Path) -> None:
    objective, rows = build(dpo_config(pairs, "train.dtype=bfloat16"), moved=0.0)
    assert objective.reference.model.dtype == torch.bfloat16
    assert "bfloat16" in next(objective.describe())
    loss, _ = objective(objective.collate([objective.sample(row) for row in rows]).inputs)
    assert loss.dtype == torch.float32
    assert loss.item() / len(rows) == pytest.approx(math.log(2), abs=0.05)


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
