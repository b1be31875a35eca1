"""The contest of training: forward and backward over one row, cross entropy at every place, no optimiser."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from cobra.cost import LMCost
from eval.machine import gemm_peak
from eval.peers import hugging_face
from eval.peers.contest import (
    Contestant,
    Field,
    fastest,
    make_check,
    make_ratio,
    make_row,
    race,
    rms_ratio,
    timed,
)

# Of the loss and of gradients; the deep random model amplifies the rounding of bfloat16.
LOSS_TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 2e-1}
# Which gradients are compared: the embeddings' and those of the first layer's input.
COMPARED = {
    "ours": ("embedding.weight", "layers.0.mixer.in_proj.weight"),
    "transformers Mamba-2": ("backbone.embeddings.weight", "backbone.layers.0.mixer.in_proj.weight"),
    "transformers Llama": ("model.embed_tokens.weight", "model.layers.0.self_attn.q_proj.weight"),
}


def run(field: Field) -> dict:
    """Measures a step in float32, and in bfloat16 by autocast with float32 weights.

    Returns:
        title, unit, rows, ratios.
    """
    settings = field.settings
    ids = settings.ids(1, settings.train_tokens)
    models: dict[str, tuple[nn.Module, LMCost]] = {"ours": (field.model.lm, field.cost)}
    if "transformers" in field.peers:
        models["transformers Mamba-2"] = hugging_face.build_mamba2(field.model.lm), field.cost
        twin = hugging_face.build_llama(settings.llama, settings.seed)
        models["transformers Llama"] = twin, LMCost(settings.llama)
    contestants = []
    for family, (model, cost) in models.items():
        for form in hugging_face.FORMS:
            one = Contestant(
                name=f"{family} {form}",
                family=family,
                form=form,
                visit=lambda family=family, model=model, form=form: _visit(family, model, form, ids),
                least_s=cost.training_flops(settings.train_tokens) / field.machine["gemm_flops_per_s"][form]
                if family != "ours"
                else 0.0,
                ideal_s=cost.training_flops(settings.train_tokens) / gemm_peak(field.machine, form),
            )
            contestants.append(one)
    try:
        with field.progress("training", len(contestants) * (settings.rounds + 1)) as advance:
            records = race(contestants, settings, advance)
    finally:
        field.model.eval().zero_grad(set_to_none=True)
    reference = {
        family: records[f"{'transformers Llama' if family.endswith('Llama') else 'ours'} float32"].result
        for family in models
    }
    rows = []
    for one in contestants:
        record = records[one.name]
        rows.append(make_row(one, record, _check(one.form, record.result, reference[one.family])))
    title = f"One training step, {settings.train_tokens:,} tokens"
    return {"title": title, "unit": "s per step", "rows": rows, "ratios": _ratios(rows)}


def _visit(family: str, model: nn.Module, form: str, ids: Tensor) -> tuple[float, Any]:
    """One step: seconds; the loss and the compared gradients."""
    model.train().zero_grad(set_to_none=True)
    seconds, loss = timed(lambda: _step(family, model, form, ids))
    gradients = [model.get_parameter(name).grad for name in COMPARED[family]]
    model.zero_grad(set_to_none=True)
    return seconds, (loss.item(), gradients)


def _step(family: str, model: nn.Module, form: str, ids: Tensor) -> Tensor:
    is_bfloat16 = form == "bfloat16"
    with torch.autocast("cpu", torch.bfloat16) if is_bfloat16 else nullcontext():
        if family == "ours":  # as `Cobra.loss` does it
            loss = model.loss(model.read(ids)[0][:, :-1], ids[:, 1:]) / (ids.shape[1] - 1)
        else:
            logits = model(input_ids=ids, use_cache=False).logits
            loss = nn.functional.cross_entropy(logits[0, :-1].float(), ids[0, 1:])
    loss.backward()
    return loss.detach()


def _check(form: str, result: Any, reference: Any) -> dict | None:
    if result is None or reference is None:
        return None
    loss = abs(result[0] - reference[0]) / abs(reference[0])
    first = rms_ratio(result[1][0], reference[1][0])
    layer = rms_ratio(result[1][1], reference[1][1])
    check = make_check({"gradient of embeddings": first, "of layer 0": layer}, GRADIENT_TOLERANCE[form])
    check["passed"] &= loss <= LOSS_TOLERANCE[form]
    check["errors"]["loss"] = loss
    return check


def _ratios(rows: list[dict]) -> list[dict]:
    best, found = fastest(rows, family="ours"), []
    own = fastest(rows, family="ours", form="float32")
    for family in ("transformers Mamba-2", "transformers Llama"):
        what = f"training, best dtype against {family} in its best"
        found += make_ratio(what, best, fastest(rows, family=family))
        theirs = fastest(rows, family=family, form="float32")
        found += make_ratio(f"training, best dtype against {family} in float32", best, theirs)
        found += make_ratio(f"training, float32 against {family} in float32", own, theirs)
    return found
