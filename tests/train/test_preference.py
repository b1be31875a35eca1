"""Preference data: the loss against a plain computation, and the reference."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from cobra.model import Cobra
from cobra.prompt import Turn
from cobra.video import Video
from tests.train.small_preference import LORA, build, dpo_config, save_start
from tests.train.small_run import LAYERS, losses
from tests.train.test_zero import TOLERANCE
from train.metrics import read_metrics
from train.run import run
from train.settings import RunConfig

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
