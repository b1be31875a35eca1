"""Preference data and a model that it is learned on, small."""

from pathlib import Path
from typing import Any

import torch

import cobra
from tests.train.small_run import load, small_config, write_preference_data
from train.objectives import Preference
from train.run import build_model, build_objective
from train.settings import RunConfig

DPO = ("train.engine=plain", "train.objective=preference", "init.check_lm=false", "optim.kind=adamw")
LORA = ("lora.rank=4", "train.freeze=vision_encoder")


def save_start(folder: Path, *changes: str) -> Path:
    """A model to begin with, beside preference data."""
    data = write_preference_data(folder / "data")
    config = small_config(data, *changes, "train.objective=preference")
    cobra.save(build_model(config, load(config)), folder / "start")
    return data


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
