"""What is seen of recurrent layers."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import softplus

import vision_scan
from tests.train.small_run import LAYERS, load, small_config
from train.init import build_model, build_objective
from train.metrics import read_metrics
from train.objectives import Objective
from train.run import run
from train.ssm_statistics import SSMStatistics

MAMBA1 = {"kind": "mamba1", "d_state": 4, "dt_max": 2.0}
MAMBA2 = {**LAYERS[0], "dt_limit": [0.01, 0.3]}
MAMBA3 = {"kind": "mamba3", "d_state": 8, "headdim": 16, "rank": 2}
STACKS = {
    "mamba1": [MAMBA1, MAMBA1],
    "mamba2": [MAMBA2, MAMBA2],
    "mamba3": [MAMBA3, MAMBA3],
    "both": [MAMBA2, MAMBA1, *LAYERS[1:]],
}
KEYS = {"dt_mean", "dt_max", "state_norm"}


def stack(layers: list[dict]) -> str:
    return f"model.lm.layers={json.dumps(layers)}"


def objective(data: Path, *changes: str) -> tuple[Objective, list[Any]]:
    """An objective, and all rows as its samples."""
    config = small_config(data, *changes)
    rows = load(config)
    ours = build_objective(config, build_model(config, rows), rows, torch.device("cpu"))
    return ours, [ours.sample(row) for row in rows]


def watch(ours: Objective, *batches: Any) -> dict[str, float]:
    statistics = SSMStatistics(ours)
    statistics.begin()
    for batch in batches:
        ours(batch.inputs)[0].backward()
    return statistics.end()


def watch_scans(monkeypatch: pytest.MonkeyPatch) -> tuple[list[Tensor], list[Tensor]]:
    """Step sizes and final states of every scan from now on, as the operators get and give them."""
    steps: list[Tensor] = []
    states: list[Tensor] = []

    def spy(scan, axis: int):
        def spied(u, dt, *inputs, **options):
            bias = options["dt_bias"].view(*[-1, *[1] * (2 - axis)])
            steps.append(softplus(dt.detach() + bias).clamp(*options.get("dt_limit", (0.0, 1e9))).flatten())
            y, state = scan(u, dt, *inputs, **options)
            states.append(state.detach().flatten())
            return y, state

        return spied

    mamba3 = vision_scan.mamba3

    def spied_mamba3(**inputs):
        steps.append(inputs["dt"].detach().flatten())
        y, state = mamba3(**inputs)
        states.append(state["ssm"].detach().flatten())
        return y, state

    monkeypatch.setattr(vision_scan, "mamba3", spied_mamba3)
    monkeypatch.setattr(vision_scan, "ssd", spy(vision_scan.ssd, 2))
    monkeypatch.setattr(vision_scan, "selective_scan", spy(vision_scan.selective_scan, 1))
    return steps, states


@pytest.mark.parametrize("name", STACKS)
def test_numbers_are_those_that_the_scans_see(data: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of each row alone; then of rows together in a padded batch, whose padding is left out."""
    ours, samples = objective(data, stack(STACKS[name]))
    one, short = samples[0], samples[4]
    with monkeypatch.context() as patch:
        steps, states = watch_scans(patch)
        found = watch(ours, ours.collate([one]), ours.collate([short]))
    assert found.keys() == KEYS
    dt = torch.cat(steps)
    assert found["dt_mean"] == pytest.approx(dt.mean().item(), rel=1e-5)
    assert found["dt_max"] == pytest.approx(dt.max().item(), rel=1e-5)
    squares = torch.stack([state.square().mean() for state in states])  # of a layer and row each
    assert found["state_norm"] == pytest.approx(squares.mean().sqrt().item(), rel=1e-4)
    assert len(one.input_ids) > len(short.input_ids)
    together = watch(ours, ours.collate([one, short]))
    for key in ("dt_mean", "dt_max"):
        assert together[key] == pytest.approx(found[key], rel=1e-4)
    assert together["state_norm"] == pytest.approx(watch(ours, ours.collate([one]))["state_norm"], rel=1e-4)


def test_adapters_count(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("peft")
    ours, samples = objective(data, stack(STACKS["both"]), "lora.rank=2", "lora.parts=lm")
    for name, parameter in ours.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    steps, _ = watch_scans(monkeypatch)
    found = watch(ours, ours.collate(samples[:1]))
    assert found["dt_mean"] == pytest.approx(torch.cat(steps).mean().item(), rel=1e-5)
    assert found["dt_max"] == pytest.approx(torch.cat(steps).max().item(), rel=1e-5)


@pytest.mark.parametrize("change", ["train.recompute=layer", "train.recompute=segment"])
def test_numbers_do_not_depend_on_what_is_computed_again(data: Path, change: str) -> None:
    found = []
    for changes in ((), (change, "train.segment_tokens=7")):
        ours, samples = objective(data, stack(STACKS["both"]), *changes)
        found.append(watch(ours, ours.collate(samples[:2])))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_packed_rows_have_no_padding(data: Path) -> None:
    packed, samples = objective(data, "data.packing=true")
    padded, _ = objective(data)
    one, other = samples[0], samples[4]
    together = watch(packed, packed.collate([other, one]))
    apart = watch(padded, padded.collate([one, other]))
    assert together == pytest.approx(apart, rel=1e-4)


def test_looking_on_changes_no_number(data: Path, tmp_path: Path) -> None:
    for setting in ("true", "false"):
        assert run(small_config(data, "train.engine=plain", f"log.ssm={setting}"), tmp_path / setting)
    seen, unseen = read_metrics(tmp_path / "true"), read_metrics(tmp_path / "false")
    assert [record["loss"] for record in seen] == [record["loss"] for record in unseen]
    assert all(record.keys() >= KEYS for record in seen)
    assert not any(record.keys() & KEYS for record in unseen)
    weights = "model.safetensors"
    assert (tmp_path / "true" / weights).read_bytes() == (tmp_path / "false" / weights).read_bytes()


def test_only_recorded_steps_are_looked_at_and_no_hook_stays(data: Path) -> None:
    ours, samples = objective(data)
    batch = ours.collate(samples[:2])
    statistics = SSMStatistics(ours)
    statistics.begin()
    ours(batch.inputs)
    assert statistics.end().keys() == KEYS
    ours(batch.inputs)
    assert statistics.end() == {}
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in ours.modules())


def test_a_stack_without_recurrence_has_none(data: Path, tmp_path: Path) -> None:
    assert run(small_config(data, "train.engine=plain", stack(LAYERS[1:]), "train.steps=1"), tmp_path / "run")
    (record,) = read_metrics(tmp_path / "run")
    assert not record.keys() & KEYS
