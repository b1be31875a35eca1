"""What a run begins with: the model, its tokenizer, the objective."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

import cobra
import cobra.checkpoint
from cobra.lm.sequence_parallel import check_shardable
from cobra.model import Cobra, chance_loss, fixed_sentence_loss
from cobra.tokenizer import Tokenizer
from cobra.vision_encoder import load_tower_weights
from train import lora, processes
from train.data.dataset import Dataset
from train.objectives import OBJECTIVES, Conversation, Objective
from train.resume import read_state
from train.settings import InitSettings, LoraSettings, RunConfig
from train.students import build_student, student_sections
from vision_scan.errors import UserError

MOST_LOSS = 0.8  # share of the loss by chance that a pretrained language model may have; one of 130 M has about 0.35


def build_model(config: RunConfig, rows: Dataset) -> Cobra:
    """The model that a run begins with, float32, on the CPU: at random, and from `init.path` what
    is asked for; with adapters, if `lora.rank` asks for them."""
    model = _build_base(config, rows)
    _inject(model, config, config.lora)
    return model.train()


def load_model(config: RunConfig, rows: Dataset, checkpoint: Path) -> Cobra:
    """The model as it was at a checkpoint, float32, on the CPU.

    Raises:
        UserError: if it has adapters and the model that they were put into is no longer what it was.
    """
    if not config.lora.rank:
        return cobra.load(checkpoint, device="cpu", dtype="float32").train()
    model = _build_base(config, rows)
    # Of the same scale; what the adapters are is read.
    _inject(model, config, replace(config.lora, init="default", alpha=config.lora.scale * config.lora.rank))
    merged = cobra.checkpoint.read_tensors(checkpoint)
    lora.restore(model, read_state(checkpoint, "adapter:model."), merged, checkpoint)
    return model.train()


def _build_base(config: RunConfig, rows: Dataset) -> Cobra:
    """What a run begins with, without adapters."""
    if config.makes_student:
        if config.init.towers or config.init.fresh:
            raise UserError(
                "init.towers and init.fresh change a model from init.path, and this run begins with a student of "
                f"distill.teacher={config.distill.teacher}: leave them out"
            )
        return build_student(config.distill, config.model.build_config(given_sections(config)), config.train.seed)
    source = config.init.path
    if source is not None and "lm" in config.init.parts:
        stored = cobra.checkpoint.read_config(source).weights
        if stored != "plain":
            raise UserError(
                f"--init-from {source}: its language model is stored in {stored}, which cannot learn; give "
                "the model that it was quantised from"
            )
    if source is not None and config.init.tokenizer:
        tokenizer = Tokenizer.from_file(Path(source) / cobra.checkpoint.TOKENIZER)
    else:
        tokenizer = build_tokenizer(config, rows)
    model_config = config.model.build_config(given_sections(config))
    vocab_size = max(model_config.lm.vocab_size, tokenizer.vocab_size)
    model_config = replace(model_config, lm=replace(model_config.lm, vocab_size=vocab_size))
    taken = config.init.parts if source is not None else ()
    keeps_lm = "lm" in taken and not config.init.fresh
    model = cobra.build(
        model_config, seed=config.train.seed, tokenizer=tokenizer, lm_device="meta" if keeps_lm else None
    )
    model.lm.scale_residual(config.init.residual)
    if source is not None:
        tensors = cobra.checkpoint.read_tensors(source, config.init.parts)
        tensors = _keep_fresh(model, tensors, config.init)
        cobra.checkpoint.assign_tensors(model, tensors, source, config.init.parts)
        model.float()  # whatever they are stored in
    if config.init.towers:
        load_tower_weights(model.vision_encoder, config.init.towers)
    return model


def _keep_fresh(model: Cobra, tensors: dict[str, Tensor], init: InitSettings) -> dict[str, Tensor]:
    """The tensors to be assigned, those of some modules replaced by the model's own random ones.

    Raises:
        UserError: if a module is not the model's, or not of a part that is taken.
    """
    for module in init.fresh:
        own = {
            name: tensor.detach().clone()
            for name, tensor in cobra.checkpoint.named_tensors(model).items()
            if name.startswith(f"{module}.")
        }
        if not own:
            raise UserError(f"init.fresh: the model has no module {module!r}; give names such as vision_encoder.scans")
        if module.partition(".")[0] not in init.parts:
            raise UserError(
                f"init.fresh: {module!r} begins at random anyway, since init.parts takes {', '.join(init.parts)} "
                "alone; leave it out"
            )
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{module}.")} | own
    return tensors


def _inject(model: Cobra, config: RunConfig, settings: LoraSettings) -> None:
    parts = lora.adapted_parts(config)
    if parts:
        lora.inject(model, settings, parts, config.train.seed, config.init.path)


def given_sections(config: RunConfig) -> dict[str, Any]:
    """The configuration of what comes from `init.path`, or from a student's teacher: the weights mean something else
    under another."""
    if config.makes_student:
        return student_sections(config.distill)
    if config.init.path is None:
        return {}
    stored = cobra.checkpoint.read_config(config.init.path)
    sections = {part: getattr(stored, part) for part in config.init.parts}
    return {**sections, "image": stored.image} if "vision_encoder" in sections else sections


def check_language_model(model: Cobra, config: RunConfig) -> str:
    """The line of the plan on what a language model from `init.path` knows.

    Raises:
        UserError: if it foretells a plain sentence hardly better than chance, and `init.check_lm` asks for more.
    """
    with torch.no_grad():
        loss, num_tokens = fixed_sentence_loss(model)
    chance = chance_loss(model)
    told = f"language model: loss {loss:.3f} a token on a fixed sentence of {num_tokens}, by chance {chance:.3f}"
    if config.init.check_lm and loss > MOST_LOSS * chance:
        raise UserError(
            f"{config.init.path}: {told}; its weights or its tokenizer are not those that it was trained with; "
            "convert it again, or set init.check_lm=false if it has never learned English"
        )
    return told


def build_tokenizer(config: RunConfig, rows: Dataset) -> Tokenizer:
    """The tokenizer of a new model, as `tokenizer.kind` asks."""
    settings = config.tokenizer
    if settings.kind == "bytes":
        return Tokenizer.bytes()
    if settings.kind == "file" and settings.path is not None:
        return Tokenizer.from_file(settings.path)
    return Tokenizer.train(rows.texts(), settings.vocab_size)


def share_sequences(objective: Objective, group: dist.ProcessGroup, config: RunConfig) -> None:
    """Has the processes of a group read each row together.

    Raises:
        UserError: if objective, layers or settings cannot be shared so.
    """
    count = config.train.sequence_parallel
    if not isinstance(objective, Conversation) or not objective.reads_shards:
        raise UserError(
            f"train.sequence_parallel={count} needs train.objective=conversation, got {config.train.objective}"
        )
    if config.train.recompute == "segment":
        raise UserError(
            f"train.sequence_parallel={count} cuts rows already; use train.recompute=layer or none, got segment"
        )
    check_shardable([block.mixer for block in objective.model.lm.layers])
    objective.group = group


def build_objective(config: RunConfig, model: Cobra, rows: Dataset, device: torch.device) -> Objective:
    """The objective on its device, with the frozen parts frozen; seeds torch for it and for
    dropout."""
    torch.manual_seed(config.train.seed)
    autocast = processes.autocast_dtype(config.train.dtype, device)
    objective = OBJECTIVES[config.train.objective].build(config, model, rows, autocast, device).to(device)
    model.lm.recompute_layers = config.train.recompute == "layer"
    model.lm.recompute_tokens = config.train.segment_tokens if config.train.recompute == "segment" else 0
    for part in config.train.freeze:
        getattr(model, part).requires_grad_(False).eval()
    objective.freeze_idle()
    return objective
