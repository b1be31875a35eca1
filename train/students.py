"""Students: a teacher's model with recurrent layers in place of its attention, begun with the attention's weights.

A linear recurrence reads C_t . B_s where attention reads q_t . k_s: the projections of queries, keys and values become
those of C, B and x (or stay q, k and v), the projection out stays, and all else of the teacher is taken as it is.

Source: Wang et al. 2024, "The Mamba in the Llama" (arXiv:2408.15237); Liao et al. 2025, "Multimodal Mamba"
(arXiv:2502.13145), whose start is taken here: no activation behind the convolution, which begins as the identity, no
rotary positions, a decay that at first depends on no token.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import cobra
import cobra.checkpoint
from cobra.config import CobraConfig
from cobra.lm import LMConfig
from cobra.lm.attention import Attention, AttentionConfig
from cobra.lm.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from cobra.lm.mamba2 import Mamba2, Mamba2Config
from cobra.model import Cobra
from train.settings import DistillSettings
from vision_scan.errors import UserError

OPEN = 1.278465  # SiLU of it is 1: how a gate begins
GATE = 0.2  # what a gate's weights are scaled by at first, so that it is nearly open
# Heads that forget over 4 to 5,000 tokens: attention forgets nothing.
MEMORY: dict[str, Any] = {"dt_min": 0.02, "dt_max": 0.5, "A_init_range": (0.01, 0.5)}


def student_sections(settings: DistillSettings) -> dict[str, Any]:
    """The sections of a student's configuration: its teacher's, but for the language model."""
    if not Path(settings.teacher or "").is_dir():
        raise UserError(f"distill.teacher={settings.teacher}: no such model directory")
    teacher = cobra.checkpoint.read_config(settings.teacher)
    if teacher.weights != "plain":
        raise UserError(
            f"distill.teacher={settings.teacher}: its language model is stored in {teacher.weights}, which a student "
            "cannot begin with; give the model that it was quantised from"
        )
    sections = {field.name: getattr(teacher, field.name) for field in fields(teacher)}
    return {**sections, "lm": student_lm(teacher.lm, settings)}


def student_lm(teacher: LMConfig, settings: DistillSettings) -> LMConfig:
    """The language model of a student: that of the teacher with the layers that `settings` asks for.

    Raises:
        UserError: if nothing would be replaced, or something that is not there would be kept.
    """
    places = [index for index, layer in enumerate(teacher.layers) if isinstance(layer, AttentionConfig)]
    if not places:
        raise UserError(f"distill.teacher={settings.teacher} has no attention layers, so there is nothing to replace")
    wrong = [number for number in settings.keep if not 0 <= number < len(places)]
    if wrong:
        raise UserError(
            f"distill.keep: got {wrong[0]}, the teacher's attention layers are counted from 0 to {len(places) - 1}"
        )
    kept = {places[number] for number in settings.keep}
    if len(kept) == len(places):
        raise UserError(f"distill.keep: all {len(places)} attention layers are kept, nothing would be replaced")
    config_of = SEEDS[settings.student].config
    layers = tuple(
        config_of(layer) if index in places and index not in kept else layer
        for index, layer in enumerate(teacher.layers)
    )
    return replace(teacher, layers=layers)


def build_student(settings: DistillSettings, config: CobraConfig, seed: int) -> Cobra:
    """A student as it begins: the teacher's weights wherever the two have the same layer, seeds where they have not.

    Args:
        settings: names the teacher.
        config: of the student, see `student_lm`.
        seed: of what neither gives.
    Returns:
        the model, float32, on the CPU.
    """
    teacher = cobra.load(settings.teacher, device="cpu", dtype="float32")
    student = cobra.build(config, seed=seed, tokenizer=teacher.tokenizer)
    replaced = replaced_layers(student, teacher)
    prefixes = tuple(f"lm.layers.{index}.mixer." for index in replaced)
    tensors = cobra.checkpoint.named_tensors(student)
    given = cobra.checkpoint.named_tensors(teacher)
    tensors |= {name: tensor for name, tensor in given.items() if not name.startswith(prefixes)}
    cobra.checkpoint.assign_tensors(student, tensors, settings.teacher)
    for index in replaced:
        mixer, attention = student.lm.layers[index].mixer, teacher.lm.layers[index].mixer
        sown = SEEDS.get(mixer.config.kind)
        # Layers that `model.lm.layers` asks for instead begin at random.
        if sown is not None and isinstance(attention, Attention) and mixer.config == sown.config(attention.config):
            sown.sow(mixer, attention)
    return student


def replaced_layers(student: Cobra, teacher: Cobra) -> list[int]:
    """The layers in which two models of one depth differ.

    Raises:
        UserError: if they differ in width or depth, or not at all.
    """
    own, other = student.config.lm, teacher.config.lm
    if (own.d_model, len(own.layers)) != (other.d_model, len(other.layers)):
        raise UserError(
            f"the student has {len(own.layers)} layers of width {own.d_model}, the teacher {len(other.layers)} of "
            f"{other.d_model}: layers can only be held against each other in models of one shape"
        )
    replaced = [index for index, pair in enumerate(zip(own.layers, other.layers, strict=True)) if pair[0] != pair[1]]
    if not replaced:
        raise UserError("the student has the teacher's own layers, so there is nothing to learn from it layer by layer")
    return replaced


@dataclass(frozen=True)
class Seed:
    """How a kind of layer takes the place of attention.

    Attributes:
        config: of the layer that replaces one of attention.
        sow: gives it the weights of attention.
    """

    config: Callable[[AttentionConfig], Any]
    sow: Callable[[Any, Attention], None]


def _mamba2(attention: AttentionConfig) -> Mamba2Config:
    return Mamba2Config(
        d_state=attention.headdim,
        headdim=attention.headdim,
        d_inner=attention.num_heads * attention.headdim,
        ngroups=attention.num_heads,  # B and C of each head, as q is
        conv_activation=None,
        bias=True,
        **MEMORY,
    )


@torch.no_grad()
def _sow_mamba2(mixer: Mamba2, attention: Attention) -> None:
    q, k, v = _heads(attention)
    sizes = (mixer.d_ssm, len(v[0]), len(k[0]), len(q[0]), mixer.nheads)
    weights, biases = mixer.in_proj.weight.split(sizes), mixer.in_proj.bias.split(sizes)
    z, *rows, dt = zip(weights, biases, strict=True)
    for (weight, bias), given in zip(rows, (v, k, q), strict=True):
        weight.copy_(given[0])
        bias.copy_(given[1])
    z[0].mul_(GATE)
    z[1].fill_(OPEN)
    dt[0].zero_()
    mixer.D.zero_()
    _sow_ends(mixer, attention)


def _gated_deltanet(attention: AttentionConfig) -> GatedDeltaNetConfig:
    return GatedDeltaNetConfig(
        num_k_heads=attention.num_heads,
        num_v_heads=attention.num_heads,
        head_k_dim=attention.headdim,
        head_v_dim=attention.headdim,
        **MEMORY,
    )


@torch.no_grad()
def _sow_gated_deltanet(mixer: GatedDeltaNet, attention: Attention) -> None:
    config = mixer.config
    q, k, v, *_ = mixer.in_proj.weight.split([config.key_dim, config.key_dim, config.value_dim, *config.in_sizes[1:]])
    for rows, (weight, _) in zip((q, k, v), _heads(attention), strict=True):
        rows.copy_(weight)
    _sow_ends(mixer, attention)


def _heads(attention: Attention) -> list[tuple[Tensor, Tensor]]:
    """Weight (num_heads * headdim, d_model) and bias of queries, keys and values of each query head. What a norm of
    queries and keys multiplies them with is in them; the attention's scale is in the queries."""
    config = attention.config
    shared = config.num_heads // config.num_kv_heads
    heads = []
    for proj, norm, copies, scale in (
        (attention.q_proj, attention.q_norm, 1, config.headdim**-0.5),
        (attention.k_proj, attention.k_norm, shared, 1.0),
        (attention.v_proj, None, shared, 1.0),
    ):
        bias = proj.weight.new_zeros(len(proj.weight)) if proj.bias is None else proj.bias
        factor = getattr(norm, "weight", None)
        for_head = proj.weight.new_full((config.headdim,), scale) if factor is None else factor * scale
        pair = []
        for tensor in (proj.weight, bias[:, None]):
            by_head = tensor.unflatten(0, (-1, config.headdim)) * for_head[:, None]
            pair.append(by_head.repeat_interleave(copies, dim=0).flatten(0, 1))
        heads.append((pair[0], pair[1][:, 0]))
    return heads


def _sow_ends(mixer: Any, attention: Attention) -> None:
    """A convolution that leaves everything as it is, and the projection out of the attention."""
    for parameter in mixer.conv1d.parameters():
        parameter.zero_()
    mixer.conv1d.weight[:, 0, -1] = 1.0
    mixer.out_proj.weight.copy_(attention.o_proj.weight)
    if attention.o_proj.bias is not None and mixer.out_proj.bias is not None:
        mixer.out_proj.bias.copy_(attention.o_proj.bias)


SEEDS: dict[str, Seed] = {
    "gated_deltanet": Seed(_gated_deltanet, _sow_gated_deltanet),
    "mamba2": Seed(_mamba2, _sow_mamba2),
}
