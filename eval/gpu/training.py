"""Part bench-train: a training step of `mamba2-1.3b`: bfloat16 autocast, float32 weights, AdamW."""

import gc
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from cobra.cost import LMCost
from cobra.lm.stack import LanguageModel
from eval.gpu.decoding import build_lm, random_ids
from eval.gpu.results import make_row
from eval.gpu.stopwatch import ROUNDS, Stopwatch, race
from eval.gpu.targets import TRAINED, train_name
from eval.peers.contest import make_check, rms_ratio
from eval.peers.training import GRADIENT_TOLERANCE, LOSS_TOLERANCE


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is trained.

    Attributes:
        preset: its language model alone.
        batches: rows; the next is tried only if the memory does not hold this one.
        seqlen: tokens of a row.
        check_tokens: of the one row on which loss and gradients are compared with float32.
    """

    preset: str = TRAINED
    batches: tuple[int, ...] = (8, 4, 2)
    seqlen: int = 2048
    check_tokens: int = 256
    rounds: int = ROUNDS
    seed: int = 0


def run(stopwatch: Stopwatch, ceilings: dict, settings: Settings, keep: Callable[[dict], None]) -> None:
    """Measures the largest batch that fits; those that do not are rows that say so."""
    lm = build_lm(settings.preset, stopwatch.device, settings.seed).train().requires_grad_(True)
    check = check_gradients(lm, settings)
    is_cuda = stopwatch.device.type == "cuda"
    optimizer = torch.optim.AdamW(lm.parameters(), lr=1e-4, fused=is_cuda)
    for batch in settings.batches:
        ids = random_ids(lm, batch, settings.seqlen, settings.seed)

        def step(ids: Tensor = ids) -> Tensor:
            loss = backward(lm, ids, "bfloat16")
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        name = train_name(batch)
        timing = race(stopwatch, {name: step}, settings.rounds)[name]
        peak = stopwatch.added_bytes(step)[0] if timing.seconds else None
        keep(
            make_row(
                name,
                timing.seconds,
                failed=timing.failed,
                flops=batch * LMCost(lm.config).training_flops(settings.seqlen),
                ceilings=ceilings,
                check=check,
                tokens_per_s=batch * settings.seqlen / timing.seconds["median"] if timing.seconds else None,
                peak_bytes=peak,
            )
        )
        if timing.seconds or timing.failed != "out of memory":
            return
        optimizer.zero_grad(set_to_none=True)
        gc.collect()


def backward(lm: LanguageModel, ids: Tensor, form: str) -> Tensor:
    """The loss of ids (batch, seqlen), as `Cobra.loss` has it; its gradients are left in the parameters."""
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=form == "bfloat16"):
        hidden, _ = lm.read(ids)
        loss = lm.loss(hidden[:, :-1], ids[:, 1:]) / ids[:, 1:].numel()
    loss.backward()
    return loss.detach()


def check_gradients(lm: LanguageModel, settings: Settings) -> dict:
    """Loss, and gradients of the embedding and of the first layer, against float32."""
    ids = random_ids(lm, 1, settings.check_tokens, settings.seed)
    found = {}
    for form in ("float32", "bfloat16"):
        loss = backward(lm, ids, form).item()
        layer = lm.get_parameter("layers.0.mixer.in_proj.weight").grad
        found[form] = (loss, lm.embedding.weight.grad, layer)
        lm.zero_grad(set_to_none=True)
    (loss, *gradients), (exact, *expected) = found["bfloat16"], found["float32"]
    names = ("gradient of embeddings", "of layer 0")
    errors = {n: rms_ratio(a, b) for n, a, b in zip(names, gradients, expected, strict=True)}
    check = make_check(errors, GRADIENT_TOLERANCE["bfloat16"])
    error = abs(loss - exact) / abs(exact)
    return check | {
        "errors": errors | {"loss": error},
        "passed": check["passed"] and error <= LOSS_TOLERANCE["bfloat16"],
    }
