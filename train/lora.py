"""LoRA: matrices of low rank that learn beside projections which are frozen.

A projection with the weight W (out, in) is read as W + scale * B A with A (rank, in) and B (out, rank). At the start
B is zero; or, as PiSSA, B A is the part of W along its strongest directions, and what is frozen is the rest of W. The
library peft puts the adapters into the model, in place: the projection `NAME` becomes `NAME.base_layer`, beside
`NAME.lora_A.default` and `NAME.lora_B.default`.

What a run writes has W + scale * B A as the one weight `NAME`, so it is a model directory like any other.

Sources: Hu et al. 2021, "LoRA" (arXiv:2106.09685); Meng et al. 2024, "PiSSA" (arXiv:2404.02948).
"""

import contextlib
import copy
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cobra.checkpoint import check_match, named_tensors, write_directory
from cobra.lm.head import LMHead
from cobra.model import Cobra
from train.settings import PARTS, LoraSettings, Part, RunConfig
from vision_scan.errors import UserError, choose
from vision_scan.modules import ListProjection

ADAPTER = "default"  # the name that peft gives to the only adapter of a model
BASE = "base_layer"  # and to a projection that has one
INITIAL = ("initial_A", "initial_B")  # PiSSA's adapters as they were at the start, buffers of ours
MOST_EXACT = 1024  # shorter side of a projection whose singular vectors are computed exactly


def is_adapter(name: str) -> bool:
    """Whether a parameter or buffer belongs to an adapter, or to a part of it as it was at the start."""
    return not {"lora_A", "lora_B", *INITIAL}.isdisjoint(name.split("."))


def adapted_parts(config: RunConfig) -> tuple[Part, ...]:
    """The parts that get adapters: those of `lora.parts` that are not frozen.

    Raises:
        UserError: if adapters are asked for and no part is left for them.
    """
    if not config.lora.rank:
        return ()
    parts: list[Part] = [part for part in config.lora.parts if part not in config.train.freeze]
    if not parts:
        raise UserError(
            f"lora.parts={','.join(config.lora.parts)} are all in train.freeze={','.join(config.train.freeze)}, and "
            "frozen parts get no adapters; take one out of train.freeze, or set lora.rank=0"
        )
    return tuple(parts)


def inject(
    model: Cobra, settings: LoraSettings, parts: Sequence[Part], seed: int, base_path: str | None = None
) -> None:
    """Puts adapters beside the projections of some parts, in place, and freezes all else in these parts.

    Args:
        model: float32, on the CPU.
        settings: which adapters.
        parts: the parts that get them.
        seed: of what is random in them; the global random state is left as it was.
        base_path: where the model's weights come from, for those who load the adapters.
    Raises:
        UserError: if peft is missing, the parts have no projections, or none of a name in `targets`.
    """
    targets = _choose_targets(model, settings, parts)
    peft = _import_peft(settings)
    ranks = {name: min(settings.rank, *projection.weight.shape) for name, projection in targets.items()}
    shorter = {name: rank for name, rank in ranks.items() if rank < settings.rank}
    config = peft.LoraConfig(
        r=settings.rank,
        lora_alpha=settings.scale * settings.rank,  # pyright: ignore[reportArgumentType] (a factor, no count)
        lora_dropout=settings.dropout,
        target_modules=list(targets),
        rank_pattern=shorter,
        alpha_pattern={name: settings.scale * rank for name, rank in shorter.items()},
        init_lora_weights=_initialisation(settings, targets),  # pyright: ignore[reportArgumentType] (any niter)
        base_model_name_or_path=base_path,
    )
    others = [module for part, module in model.named_children() if part not in parts]
    learning = [tensor for module in others for tensor in module.parameters() if tensor.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(config, model, ADAPTER)
    for parameter in learning:  # peft freezes the whole model
        parameter.requires_grad_(True)
    if settings.init == "pissa":
        for _, layer in _adapted(model):
            _keep_initial(layer, *(factor.detach().clone() for factor in _factors(layer)))


def _initialisation(settings: LoraSettings, targets: Mapping[str, nn.Linear]) -> bool | str:
    """As peft calls it. Exact singular vectors of a projection of Mamba 2.8b take a core of a CPU 13 seconds, the power
    iterations of PiSSA's authors one."""
    if settings.init == "default":
        return True
    return "pissa" if max(min(linear.weight.shape) for linear in targets.values()) <= MOST_EXACT else "pissa_niter_16"


def _choose_targets(model: Cobra, settings: LoraSettings, parts: Sequence[Part]) -> dict[str, nn.Linear]:
    """The projections that get an adapter, by their names in the model."""
    every = {name: linear for part in parts for name, linear in _projections(model, part).items() if _serves(linear)}
    if not every:
        raise UserError(
            f"lora.parts={','.join(parts)} have no projection for an adapter; choose another, or lora.rank=0"
        )
    kinds = {_kind(name): None for name in every}
    for target in settings.targets:
        choose("projection in lora.targets", target, kinds)
    return {name: linear for name, linear in every.items() if not settings.targets or _kind(name) in settings.targets}


def _projections(model: Cobra, part: str) -> dict[str, nn.Linear]:
    """The linear maps of a part by the names that they have without adapters. The head is none of them: it belongs to
    the embeddings, with which it is tied in most models."""
    return {
        name.removesuffix(f".{BASE}"): module
        for name, module in getattr(model, part).named_modules(prefix=part)
        if isinstance(module, nn.Linear) and not isinstance(module, LMHead) and not is_adapter(name)
    }


def _serves(linear: nn.Linear) -> bool:
    """Whether it is one map: peft has no adapters for several that are stacked in one weight."""
    return not isinstance(linear, ListProjection)


def _kind(name: str) -> str:
    """What a projection is called: "lm.layers.3.mixer.in_proj" -> "in_proj", "connector.proj.2" -> "proj"."""
    return next(word for word in reversed(name.split(".")) if not word.isdigit())


def _adapted(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """The layers of peft within a module, by name."""
    return ((name, child) for name, child in module.named_modules() if hasattr(child, "lora_A"))


def _factors(layer: Any) -> tuple[nn.Parameter, nn.Parameter]:
    """A (rank, in) and B (out, rank) of a layer."""
    return layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight


def _keep_initial(layer: Any, A: Tensor, B: Tensor) -> None:
    """Remembers PiSSA's adapters as they were at the start, and has weight decay spare them: it would shrink the
    model's own strongest directions, not what was learned."""
    for name, factor in zip(INITIAL, (A, B), strict=True):
        layer.register_buffer(name, factor)
    for factor in _factors(layer):
        factor._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue] (train/optim.py)


@contextlib.contextmanager
def without_adapters(model: Cobra) -> Iterator[None]:
    """A model as if it had no adapters: with those of the default initialisation, as it was when they were put in."""
    layers = [layer for _, layer in _adapted(model)]
    for layer in layers:  # not by peft's own `enable_adapters`, which also changes what learns
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def merged_tensors(module: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The tensors of a model with its adapters merged in, W + scale * B A, under the names that it has without
    adapters; those of a model without adapters as they are.

    Args:
        module: the model, or what holds it.
        tensors: values by the module's own names; None: the module's.
    """
    tensors = named_tensors(module) if tensors is None else tensors
    scales = {name: layer.scaling[ADAPTER] for name, layer in _adapted(module)}
    merged = {}
    for name, tensor in tensors.items():
        owner, is_base, leaf = name.rpartition(f".{BASE}.")
        if is_base and leaf == "weight":
            A, B = (tensors[f"{owner}.{factor}.{ADAPTER}.weight"] for factor in ("lora_A", "lora_B"))
            tensor = torch.addmm(tensor, B, A, alpha=scales[owner])
        if not is_adapter(name):
            merged[f"{owner}.{leaf}" if is_base else name] = tensor
    return merged


@torch.no_grad()
def restore(model: Cobra, adapters: Mapping[str, Tensor], merged: Mapping[str, Tensor], checkpoint: Path) -> None:
    """Gives a model the weights of a checkpoint, but for the projections that have an adapter: these are as the run
    began with them, since rounding would not give them back from the merged ones.

    Args:
        model: as the run began with it, with new adapters of the default initialisation.
        adapters: the adapters of the checkpoint by their names in the model; with PiSSA, as at the start too.
        merged: the checkpoint's tensors, as `merged_tensors` gives them.
        checkpoint: where they come from, for messages.
    Raises:
        UserError: if the run did not begin with such a model.
    """
    layers = dict(_adapted(model))
    for name, layer in layers.items():
        if f"{name}.{INITIAL[0]}" in adapters:
            A, B = (adapters[f"{name}.{factor}"] for factor in INITIAL)
            weight = layer.base_layer.weight
            weight.copy_(weight - layer.scaling[ADAPTER] * B @ A)  # as peft does at the start, to the last bit
            _keep_initial(layer, A.clone(), B.clone())
    own = named_tensors(model)
    kept = {f"{name}.{BASE}.weight" for name in layers}
    check_match({name: tensor for name, tensor in own.items() if is_adapter(name)}, adapters, str(checkpoint))
    check_match(merged_tensors(model), merged, str(checkpoint))
    for name, tensor in own.items():
        if name not in kept:
            tensor.copy_(adapters[name] if is_adapter(name) else merged[name.replace(f".{BASE}.", ".")])
    for name, tensor in merged_tensors(model).items():
        if not torch.allclose(tensor, merged[name], rtol=0, atol=1e-4 * float(merged[name].abs().max())):
            raise UserError(
                f"{checkpoint}: the run began with other weights than those there are now ({name} differs); put "
                f"init.path back as it was, or start a new run with --init-from {checkpoint} --output OTHER"
            )


def describe(model: Cobra, settings: LoraSettings, parts: Sequence[Part]) -> Iterator[str]:
    """How much of the projections has adapters and how much learns, line by line: first of all, then of each kind of
    projection."""
    layers = dict(_adapted(model))
    lines, total, covered = [], 0, 0
    for part in parts:
        kinds: dict[str, list[str]] = defaultdict(list)
        projections = _projections(model, part)
        for name in projections:
            kinds[_kind(name)].append(name)
        for kind, names in kinds.items():
            adapted = [layers[name] for name in names if name in layers]
            size = sum(projections[name].weight.numel() for name in names)
            added = sum(factor.numel() for layer in adapted for factor in _factors(layer))
            total += size
            covered += sum(layer.base_layer.weight.numel() for layer in adapted)
            told = f"{added:>12,} in adapters" if added else "without adapters"
            lines.append(f"  {part + ' ' + kind:<26} {len(names):>4} projections  {size:>12,} parameters  {told}")
    numbers = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    learns, everything = sum(number for number, learns in numbers if learns), sum(number for number, _ in numbers)
    yield (
        f"LoRA: rank {settings.rank}, scale {settings.scale:g}, init {settings.init}: adapters on "
        f"{covered / total:.1%} of the projections' parameters; {learns:,} of {everything:,} parameters learn "
        f"({learns / everything:.2%})"
    )
    yield from lines


def save_adapters(model: Cobra, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes the adapters as peft loads them onto the model that the run began with: `adapter_config.json` and
    `adapter_model.safetensors`. Parts that learned as a whole are in it as a whole.

    PiSSA's adapters B A, of which B0 A0 had been taken out of W, are written as adapters of W: B A - B0 A0 is
    [B, -B0] [A; A0], of twice the rank.

    Args:
        model: has adapters; its weights are not looked at.
        path: the directory.
        tensors: the model's tensors by its own names.
    """
    from safetensors.torch import save_file

    layers = dict(_adapted(model))
    config: Any = copy.deepcopy(model.peft_config[ADAPTER])  # pyright: ignore (peft leaves it there)
    whole = [part for part in PARTS if not _has(layers, part) and _learns(getattr(model, part))]
    is_pissa = any(name.endswith(INITIAL) for name in tensors)
    config.init_lora_weights, config.inference_mode = True, True
    config.modules_to_save = whole or None
    if is_pissa:
        config.r, config.lora_alpha = 2 * config.r, 2 * config.lora_alpha
        for pattern in (config.rank_pattern, config.alpha_pattern):
            pattern.update({name: 2 * value for name, value in pattern.items()})
    written = {name: tensor for name, tensor in tensors.items() if name.partition(".")[0] in whole}
    for name in layers:
        A, B = (tensors[f"{name}.{factor}.{ADAPTER}.weight"] for factor in ("lora_A", "lora_B"))
        if is_pissa:
            A0, B0 = (tensors[f"{name}.{factor}"] for factor in INITIAL)
            A, B = torch.cat([A, A0]), torch.cat([B, -B0], dim=1)
        written |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
    weights = {f"base_model.model.{name}": tensor.contiguous() for name, tensor in written.items()}
    settings = json.dumps(config.to_dict(), indent=2, sort_keys=True, default=sorted)  # sets have no order
    write_directory(
        path,
        {
            "adapter_model.safetensors": lambda file: save_file(weights, file, metadata={"format": "pt"}),
            "adapter_config.json": lambda file: file.write_text(settings + "\n"),
        },
    )


def _has(layers: Mapping[str, Any], part: str) -> bool:
    return any(name.startswith(f"{part}.") for name in layers)


def _learns(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _import_peft(settings: LoraSettings) -> Any:
    try:
        import peft
    except ImportError as error:
        raise UserError(
            f"lora.rank={settings.rank} needs peft: pip install 'cobra-vlm[train]', or set lora.rank=0"
        ) from error
    return peft
