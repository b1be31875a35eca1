"""AdamW, or Muon with it, over parameter groups, and the learning-rate schedule."""

import math
from typing import Any

import torch
from torch import nn

from train.lora import is_adapter
from train.muon import Muon
from train.settings import OptimSettings

# The recurrence's own parameters (decay rate, skip, step-size bias) and what only shifts or
# locates. Weight decay would drag each towards a value that means something else: A_log = 0 is a
# decay rate of one.
NO_DECAY_NAMES = frozenset({"A_log", "A_logs", "D", "Ds", "pos_embed", "cls_token", "reg_token"})
PIXEL_CHANNELS = 3


def decays(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Whether weight decay applies: to matrices and convolution kernels, unless they are marked.

    Args:
        name: the parameter's full name.
        parameter: honoured: an attribute `_no_weight_decay`, which Mamba code puts on what must not
            decay.
        owner: the module that holds it.
    """
    marked = getattr(parameter, "_no_weight_decay", False)
    leaf = name.rpartition(".")[2]
    named = leaf in NO_DECAY_NAMES or leaf.endswith("bias")  # dt_bias, and stacked biases too
    return parameter.ndim >= 2 and not marked and not named and not isinstance(owner, nn.Embedding)


def is_hidden_matrix(name: str, parameter: nn.Parameter, owner: nn.Module) -> bool:
    """Whether Muon can serve: matrices and kernels from features to features, not those from or to tokens or
    pixels. Not the factors of an adapter either: what maps features is their product, whose update is not made
    orthogonal by making theirs so."""
    if is_adapter(name):
        return False
    if isinstance(owner, nn.Conv2d):
        return owner.groups == 1 and owner.in_channels > PIXEL_CHANNELS and decays(name, parameter, owner)
    return parameter.ndim == 2 and decays(name, parameter, owner) and "lm_head" not in name.split(".")


def part_of(name: str) -> str:
    """The part a parameter of an objective belongs to: "model.lm.layers.0.A_log" -> "lm"."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == "model" else first


def parameter_groups(module: nn.Module, settings: OptimSettings) -> list[dict[str, Any]]:
    """Groups of the parameters that learn, one for each part, with and without decay, of matrices that Muon
    takes, and of adapters.

    Returns:
        Optimizer groups with more keys: `name`, `lr_scale`, the factor on the learning rate, and
        `muon`, whether Muon is to take the group.
    """
    groups: dict[str, dict[str, Any]] = {}
    owners = dict(module.named_modules())
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        owner = owners[name.rpartition(".")[0]]
        decay = decays(name, parameter, owner)
        muon = settings.kind == "muon" and is_hidden_matrix(name, parameter, owner)
        kind = "LoRA" if is_adapter(name) else "Muon" if muon else "" if decay else "no decay"
        key = f"{part}, {kind}" if kind else part
        group = groups.setdefault(
            key,
            {
                "name": key,
                "params": [],
                "lr_scale": getattr(settings.lr_scale, part, 1.0),
                "weight_decay": settings.weight_decay if decay else 0.0,
                "muon": muon,
            },
        )
        group["params"].append(parameter)
    return list(groups.values())


def build_optimizer(module: nn.Module, settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer that `settings.kind` asks for, over `parameter_groups`."""
    groups = parameter_groups(module, settings)
    if settings.kind == "adamw":
        return _adamw(groups, settings)
    matrices = [group for group in groups if group["muon"]]
    others = [group for group in groups if not group["muon"]]
    parts: list[torch.optim.Optimizer] = []
    if matrices:
        parts.append(Muon(matrices, lr=settings.lr, momentum=settings.momentum))
    if others:
        parts.append(_adamw(others, settings))
    return Together(parts)


def _adamw(groups: list[dict[str, Any]], settings: OptimSettings) -> torch.optim.AdamW:
    """In its fused form where the parameters' device has one."""
    options = {"lr": settings.lr, "betas": (settings.beta1, settings.beta2), "eps": settings.eps}
    try:
        return torch.optim.AdamW(groups, fused=True, **options)
    except RuntimeError:
        return torch.optim.AdamW(groups, **options)


class Together(torch.optim.Optimizer):
    """Several optimizers, each with groups of its own, that are stepped, saved and loaded as one."""

    def __init__(self, parts: list[torch.optim.Optimizer]) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._link()

    def _link(self) -> None:
        """The parts work on this optimizer's groups and state."""
        start = 0
        for part in self.parts:
            end = start + len(part.param_groups)
            part.param_groups, part.state = self.param_groups[start:end], self.state
            start = end

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._link()

    def step(self, closure=None) -> None:
        for part in self.parts:
            part.step()


def lr_factor(step: int, num_steps: int, settings: OptimSettings) -> float:
    """Share of the peak learning rate at a step: a linear rise, the peak, and half a cosine down to
    `min_lr_ratio` over `decay_ratio` of the steps."""
    warmup = round(settings.warmup_ratio * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    start = max(warmup, num_steps - round(settings.decay_ratio * num_steps))
    progress = max(0, step - start) / max(1, num_steps - 1 - start)
    return settings.min_lr_ratio + (1 - settings.min_lr_ratio) * 0.5 * (
        1 + math.cos(math.pi * progress)
    )


def set_lr(
    optimizer: torch.optim.Optimizer, step: int, num_steps: int, settings: OptimSettings
) -> float:
    """Sets every group's learning rate for a step; returns that of a part with factor 1."""
    lr = settings.lr * lr_factor(step, num_steps, settings)
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]
    return lr


def describe_groups(optimizer: torch.optim.Optimizer) -> list[str]:
    """One line for each group: name, tensors, parameters, peak learning rate, weight decay."""
    return [
        f"  {group['name']:<26} {len(group['params']):>4} tensors  "
        f"{sum(parameter.numel() for parameter in group['params']):>12,} parameters  "
        f"lr x {group['lr_scale']:g}  decay {group['weight_decay']:g}"
        for group in optimizer.param_groups
    ]
