"""Parameter groups and the schedule."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import cobra
from train.muon import Muon
from train.optim import Together, build_optimizer, decays, lr_factor, parameter_groups, set_lr
from train.settings import LrScale, OptimSettings


class Holder(nn.Module):
    """Puts a model where an objective has it, beside a head of its own."""

    def __init__(self, preset: str) -> None:
        super().__init__()
        self.model = cobra.build(preset)
        self.heads = nn.ModuleList([nn.Linear(4, 2)])


@pytest.mark.parametrize("preset", ["tiny", "transformer-tiny", "hybrid-tiny"])
def test_decay_spares_the_recurrence_norms_biases_and_embeddings(preset: str) -> None:
    holder = Holder(preset)
    groups = parameter_groups(holder, OptimSettings(weight_decay=0.1))
    names = {id(parameter): name for name, parameter in holder.named_parameters()}
    decayed, spared = set(), set()
    for group in groups:
        chosen = decayed if group["weight_decay"] else spared
        assert group["weight_decay"] in (0.0, 0.1)
        chosen.update(names[id(parameter)] for parameter in group["params"])
    assert decayed | spared == set(names.values())
    assert not decayed & spared

    modules = dict(holder.named_modules())
    norms = {
        name
        for name in names.values()
        if "norm" in type(modules[name.rpartition(".")[0]]).__name__.lower()
    }
    leaves = {name: name.rpartition(".")[2] for name in names.values()}
    named = {name for name in names.values() if leaves[name] in ("A_log", "D", "dt_bias", "bias")}
    embeddings = {name for name in names.values() if "embedding" in name}
    assert norms and named and embeddings
    assert norms | named | embeddings <= spared
    matrices = {name for name in names.values() if leaves[name] == "weight"} - norms - embeddings
    assert matrices <= decayed


def test_decay_honours_the_mark_that_mamba_code_sets() -> None:
    owner = nn.Linear(2, 2)
    assert decays("x.weight", owner.weight, owner)
    owner.weight._no_weight_decay = True
    assert not decays("x.weight", owner.weight, owner)
    matrix = nn.Parameter(torch.zeros(2, 2))
    assert not decays("lm.A_log", matrix, nn.Module())  # Mamba-1 has a matrix there


def test_frozen_parameters_are_in_no_group_and_parts_have_their_own_rate() -> None:
    holder = Holder("tiny")
    holder.model.connector.requires_grad_(False)
    settings = OptimSettings(lr=0.1, lr_scale=LrScale(vision_encoder=0.5))
    optimizer = build_optimizer(holder, settings)
    names = {group["name"] for group in optimizer.param_groups}
    parts = ("vision_encoder", "lm", "heads")
    assert names == {f"{part}{decay}" for part in parts for decay in ("", ", no decay")}
    assert set_lr(optimizer, 50, 101, OptimSettings(lr=0.1, warmup_ratio=0, min_lr_ratio=0)) == (
        pytest.approx(0.05)
    )
    rates = {group["name"].split(",")[0]: group["lr"] for group in optimizer.param_groups}
    assert rates == pytest.approx({"vision_encoder": 0.025, "lm": 0.05, "heads": 0.05})


@pytest.mark.parametrize("preset", ["tiny", "transformer-tiny", "hybrid-tiny"])
def test_muon_takes_the_matrices_between_features(preset: str) -> None:
    holder = Holder(preset)
    names = {id(parameter): name for name, parameter in holder.named_parameters()}
    groups = parameter_groups(holder, OptimSettings(kind="muon", weight_decay=0.1))
    taken = {names[id(p)] for group in groups if group["muon"] for p in group["params"]}
    assert {"model.lm.embedding.weight", "model.lm.lm_head.weight"}.isdisjoint(taken)
    for name, parameter in holder.named_parameters():
        projects = name.endswith(("proj.weight", "qkv.weight")) or ".mlp." in name or "heads." in name
        if projects and parameter.ndim == 2:
            assert name in taken
        # Kernels of the tower, but for the first, which reads pixels.
        is_kernel = name.startswith("model.vision_encoder") and parameter.ndim == 4
        if parameter.ndim != 2:
            assert (name in taken) == (is_kernel and parameter.shape[1] > 3), name
    assert all(group["weight_decay"] == 0.1 for group in groups if group["muon"])
    everything = {names[id(p)] for group in groups for p in group["params"]}
    assert everything == set(names.values())


def small_problem() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3)), torch.randn(16, 6)


def take_steps(module: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, count: int) -> None:
    for _ in range(count):
        optimizer.zero_grad()
        module(x).square().mean().backward()
        optimizer.step()


def test_muon_and_adamw_step_as_each_would_alone() -> None:
    settings = OptimSettings(kind="muon", lr=1e-2, weight_decay=0.1)
    module, x = small_problem()
    optimizer = build_optimizer(module, settings)
    assert isinstance(optimizer, Together)
    take_steps(module, optimizer, x, 5)

    alone, _ = small_problem()
    matrices = [p for p in alone.parameters() if p.ndim == 2]
    muon = Muon(matrices, lr=1e-2, weight_decay=0.1)
    biases = [p for p in alone.parameters() if p.ndim == 1]
    adamw = torch.optim.AdamW(biases, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(5):
        alone.zero_grad()
        alone(x).square().mean().backward()
        muon.step()
        adamw.step()
    for one, other in zip(module.parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_muon_and_adamw_are_saved_and_loaded_as_one() -> None:
    settings = OptimSettings(kind="muon", lr=1e-2)
    module, x = small_problem()
    optimizer = build_optimizer(module, settings)
    take_steps(module, optimizer, x, 3)
    resumed, _ = small_problem()
    resumed.load_state_dict(module.state_dict())
    other = build_optimizer(resumed, settings)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_lr(optimizer, 3, 10, settings)
    set_lr(other, 3, 10, settings)
    take_steps(module, optimizer, x, 3)
    take_steps(resumed, other, x, 3)
    for one, two in zip(module.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, two)


def test_schedule_rises_falls_and_ends_at_its_floor() -> None:
    settings = OptimSettings(warmup_ratio=0.1, min_lr_ratio=0.2)
    factors = [lr_factor(step, 100, settings) for step in range(100)]
    assert factors[:10] == pytest.approx([(step + 1) / 10 for step in range(10)])
    assert factors[10] == pytest.approx(1.0)
    assert all(before > after for before, after in pairwise(factors[10:]))
    assert factors[-1] == pytest.approx(0.2)
    assert lr_factor(0, 1, settings) == pytest.approx(1.0)


def test_schedule_may_stay_at_its_peak_before_it_falls() -> None:
    settings = OptimSettings(warmup_ratio=0.1, decay_ratio=0.4, min_lr_ratio=0.2)
    factors = [lr_factor(step, 100, settings) for step in range(100)]
    assert factors[10:61] == pytest.approx([1.0] * 51)
    assert all(before > after for before, after in pairwise(factors[60:]))
    assert factors[-1] == pytest.approx(0.2)
    assert lr_factor(99, 100, OptimSettings(decay_ratio=0.0)) == 1.0
