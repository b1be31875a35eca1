"""Recipes: functions that return all settings of a run, one docstring each."""

import dataclasses
from collections.abc import Callable
from typing import Any

from train.settings import (
    DataSettings,
    InitSettings,
    LrScale,
    ModelSettings,
    ObjectiveName,
    OptimSettings,
    Part,
    PreferenceSettings,
    RunConfig,
    TrainSettings,
    ZeroSettings,
)

# Of Muon in runs of a few hundred steps, where .95 and .9 learned more slowly.
SHORT_MOMENTUM = 0.8


def tiny_tower() -> RunConfig:
    """Pretrains the vision tower on what stands in each patch (rows with `regions`), as a stand-in
    for the pretrained towers of published models. Connector and language model are left as they
    are."""
    return RunConfig(
        recipe="tiny-tower",
        train=TrainSettings(
            objective="regions", freeze=("connector", "lm"), steps=300, batch_size=32, dtype="float32"
        ),
        optim=OptimSettings(kind="muon", lr=8e-3, momentum=SHORT_MOMENTUM),
    )


def tiny_naming() -> RunConfig:
    """Gives the connector's tokens the language model's words for what stands in each patch (rows
    with `regions`), so that a word in a question resembles what it asks for. Takes seconds."""
    return RunConfig(
        recipe="tiny-naming",
        init=InitSettings(parts=("vision_encoder",), residual=0.0),
        train=TrainSettings(
            objective="naming",
            freeze=("vision_encoder",),
            steps=60,
            batch_size=32,
            dtype="float32",
        ),
        optim=OptimSettings(
            kind="muon", lr=2e-3, momentum=SHORT_MOMENTUM, warmup_ratio=0.3, min_lr_ratio=1.0
        ),
    )


def tiny_align() -> RunConfig:
    """Teaches connector and language model to read what the frozen tower sees. Elsewhere only the
    connector learns at this stage; here the language model learns too, because nothing has
    pretrained it."""
    return RunConfig(
        recipe="tiny-align",
        init=InitSettings(residual=0.0, check_lm=False),
        train=TrainSettings(freeze=("vision_encoder",), steps=320, batch_size=16, dtype="float32"),
        optim=OptimSettings(kind="muon", lr=4e-3, momentum=SHORT_MOMENTUM),
    )


def tiny() -> RunConfig:
    """Finetunes everything on conversations. Its twins: `--set model.preset=transformer-tiny`, `window-tiny` or
    `hybrid-tiny`."""
    return RunConfig(
        recipe="tiny",
        data=DataSettings(length_group=4),
        init=InitSettings(residual=0.0, check_lm=False),
        train=TrainSettings(steps=560, batch_size=16, dtype="float32"),
        optim=OptimSettings(
            kind="muon",
            lr=2.5e-3,
            lr_scale=LrScale(vision_encoder=0.3),
            momentum=SHORT_MOMENTUM,
            warmup_ratio=0.01,
            decay_ratio=0.7,
        ),
    )


def _published(recipe: str, preset: str, freeze: tuple[Part, ...], optim: OptimSettings, **train: Any) -> RunConfig:
    """A stage of a published model: rows of at most 2,048 tokens of text, ZeRO and recomputed layers as far as the
    memory of devices of 80 GB asks for."""
    model = ModelSettings(preset=preset)
    return RunConfig(
        recipe=recipe,
        model=model,
        # What is stored with a language model is the language model; later stages take all of the stage before.
        init=InitSettings(parts=("lm",)),
        data=DataSettings(max_tokens=2048 + model.build_config().tokens_per_tile),
        train=TrainSettings(freeze=freeze, recompute="layer", **train),
        zero=ZeroSettings(stage=2 if "lm" in freeze else 3),
        optim=optim,
    )


def _cosine(lr: float, weight_decay: float) -> OptimSettings:
    """AdamW with torch's betas, 3 percent of warm-up, half a cosine down to nothing."""
    return OptimSettings(lr=lr, weight_decay=weight_decay, beta2=0.999, min_lr_ratio=0.0)


def cobra_3b() -> RunConfig:
    """Cobra's one stage: connector and Mamba-2.8b-zephyr on LLaVA-1.5's, LVIS-Instruct's and LRV's instructions. Needs
    init.path (the converted language model), init.towers (DINOv2, SigLIP) and data.path."""
    train = {"epochs": 2, "batch_size": 128, "micro_batch_size": 4, "seed": 7}
    return _published("cobra-3b", "cobra-3b", ("vision_encoder",), _cosine(2e-5, 0.1), **train)


def ml_mamba_3b() -> RunConfig:
    """ML-Mamba's one stage with the connector of its code: the numbers of Cobra on Mamba-2 2.7b. Its model table says 2
    epochs (this recipe), its bundled configuration 1."""
    train = {"epochs": 2, "batch_size": 128, "micro_batch_size": 4, "seed": 7}
    return _published("ml-mamba-3b", "ml-mamba-3b", ("vision_encoder",), _cosine(2e-5, 0.1), **train)


def ml_mamba_3b_drawn() -> RunConfig:
    """The same with the connector of ML-Mamba's figures: four directions, summed, a norm in front."""
    return dataclasses.replace(
        ml_mamba_3b(), recipe="ml-mamba-3b-drawn", model=ModelSettings(preset="ml-mamba-3b-drawn")
    )


def vl_mamba_align() -> RunConfig:
    """VL-Mamba's first stage: the connector alone, on 558k captions."""
    train = {"epochs": 1, "batch_size": 256, "micro_batch_size": 16}
    frozen: tuple[Part, ...] = ("vision_encoder", "lm")
    return _published("vl-mamba-align", "vl-mamba", frozen, _cosine(1e-3, 0.0), **train)


def vl_mamba() -> RunConfig:
    """VL-Mamba's second stage: connector and Mamba-2.8b-slimpj on LLaVA-1.5's 665k instructions, from the first."""
    train = {"epochs": 1, "batch_size": 128, "micro_batch_size": 4}
    config = _published("vl-mamba", "vl-mamba", ("vision_encoder",), _cosine(2e-5, 0.0), **train)
    return dataclasses.replace(config, init=InitSettings())


def llava_align() -> RunConfig:
    """LLaVA-1.5's first stage, the transformer to compare with: the connector alone, on 558k captions
    right behind their images."""
    train = {"epochs": 1, "batch_size": 256, "micro_batch_size": 16}
    frozen: tuple[Part, ...] = ("vision_encoder", "lm")
    config = _published("llava-1.5-align", "llava-1.5", frozen, _cosine(1e-3, 0.0), **train)
    return dataclasses.replace(config, data=dataclasses.replace(config.data, captions=True))


def llava() -> RunConfig:
    """LLaVA-1.5's second stage: connector and Vicuna 7B on 665k instructions, from the first."""
    train = {"epochs": 1, "batch_size": 128, "micro_batch_size": 4}
    config = _published("llava-1.5", "llava-1.5", ("vision_encoder",), _cosine(2e-5, 0.0), **train)
    return dataclasses.replace(config, init=InitSettings())


def _distilled(recipe: str, objective: ObjectiveName, steps: int, lr: float, clip: float) -> RunConfig:
    """A stage of making a student: what mmMamba trains 2.6b with, few steps in the first stage."""
    return RunConfig(
        recipe=recipe,
        init=InitSettings(check_lm=False),  # a student that has only its seeds foretells nothing yet
        train=TrainSettings(objective=objective, freeze=("vision_encoder", "connector"), steps=steps, batch_size=128),
        optim=OptimSettings(lr=lr, warmup_ratio=0.1, decay_ratio=0.1, min_lr_ratio=0.0, clip=clip),
    )


def distill_mixer() -> RunConfig:
    """First stage of making a state-space student of a transformer: the matrices that its new layers mix tokens with.
    Needs distill.teacher (a model directory) and data.path."""
    return _distilled("distill-mixer", "distill_mixer", steps=2_000, lr=1e-3, clip=0.0)


def distill_hidden() -> RunConfig:
    """Second stage: what the new layers say, each given what the teacher's reads. From the first (--init-from), or
    without it right from the seeds."""
    return _distilled("distill-hidden", "distill_hidden", steps=20_000, lr=5e-4, clip=0.0)


def distill_logits() -> RunConfig:
    """Third stage: what the student answers, all of its language model learning. From the second."""
    return _distilled("distill-logits", "distill_logits", steps=20_000, lr=5e-5, clip=1.0)


def dpo() -> RunConfig:
    """Direct preference optimisation of a finished model by rows with a chosen and a rejected answer, its tower frozen.
    Rate, decay, warm-up and beta are RLAIF-V's for LLaVA-1.5 (RLHF-V/RLAIF-V, script/train/llava15_train.sh); one
    epoch, 32 rows a step. Needs init.path, which is the reference too, and data.path; for another model than Cobra,
    model.preset."""
    optim = OptimSettings(lr=5e-7, weight_decay=0.01, beta2=0.999, warmup_ratio=0.05, min_lr_ratio=0.0)
    train = {"objective": "preference", "epochs": 1, "batch_size": 32, "micro_batch_size": 2}
    config = _published("dpo", "cobra-3b", ("vision_encoder",), optim, **train)
    return dataclasses.replace(config, init=InitSettings(), preference=PreferenceSettings(beta=0.1))


RECIPES: dict[str, Callable[[], RunConfig]] = {
    "tiny-tower": tiny_tower,
    "tiny-naming": tiny_naming,
    "tiny-align": tiny_align,
    "tiny": tiny,
    "cobra-3b": cobra_3b,
    "ml-mamba-3b": ml_mamba_3b,
    "ml-mamba-3b-drawn": ml_mamba_3b_drawn,
    "vl-mamba-align": vl_mamba_align,
    "vl-mamba": vl_mamba,
    "llava-1.5-align": llava_align,
    "llava-1.5": llava,
    "distill-mixer": distill_mixer,
    "distill-hidden": distill_hidden,
    "distill-logits": distill_logits,
    "dpo": dpo,
}
