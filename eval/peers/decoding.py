"""The contest of decoding: milliseconds a token, at batch 1 and, ours, in a batch."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from cobra.cost import LMCost
from cobra.export.gguf_file import write_gguf
from eval.peers import hugging_face, ours
from eval.peers.contest import (
    TOLERANCE,
    Contestant,
    Field,
    decode_bytes,
    fastest,
    make_check,
    make_ratio,
    make_row,
    race,
    rms_ratio,
)
from eval.peers.hugging_face import TheirReader
from eval.peers.llama_cpp import LlamaCppReader, rounding
from eval.peers.reader import Reader, decode_visit, logits_by_steps

LLAMA_CPP_FORMS = ("bfloat16", "q8_0", "q4_0")


def run(field: Field) -> dict:
    """Measures decoding.

    Returns:
        title, unit, rows (with context, batch, float32_distance), ratios.
    """
    settings = field.settings
    title = f"Decoding, after {settings.prompt_tokens} tokens"
    with readers(field) as (mamba, llama):
        checks = _check_all(field, mamba, llama)
        contestants, reader_of = _contestants(field, mamba, llama)
        with field.progress("decode", len(contestants) * (settings.rounds + 1)) as advance:
            records = race(contestants, settings, advance)
        rows = [
            make_row(one, records[one.name], **checks[reader_of[one.name], one.facts["batch"]])
            for one in contestants
        ]
    return {"title": title, "unit": "ms per token", "rows": rows, "ratios": _ratios(rows, settings.batch)}


@contextmanager
def readers(field: Field) -> Iterator[tuple[list[Reader], list[TheirReader]]]:
    """All Mamba-2 readers, ours first, and all of the Llama."""
    settings = field.settings
    mamba: list[Reader] = [ours.OurReader(field.model, form) for form in ours.FORMS]
    llama: list[TheirReader] = []
    native = []
    if "transformers" in field.peers:
        for form in hugging_face.FORMS:
            theirs = hugging_face.build_mamba2(field.model.lm)
            mamba.append(TheirReader(theirs, "transformers Mamba-2", form))
            twin = hugging_face.build_llama(settings.llama, settings.seed)
            llama.append(TheirReader(twin, "transformers Llama", form))
    if "llama.cpp" in field.peers:
        capacity = max(settings.prompt_tokens, settings.check_tokens) + 256
        for form in LLAMA_CPP_FORMS:
            path = field.folder / f"decode-{form}.gguf"
            write_gguf(path, field.model.lm.config, field.model.lm.state_dict(), form)
            native.append(LlamaCppReader(path, form, settings.threads, capacity))
    try:
        yield mamba + native, llama
    finally:
        for reader in native:
            reader.close()


def _contestants(
    field: Field, mamba: list[Reader], llama: list[TheirReader]
) -> tuple[list[Contestant], dict[str, Reader]]:
    settings, made, reader_of = field.settings, [], {}

    def add(reader: Reader, cost: LMCost, context: int, batch: int = 1, kept: Any = None) -> None:
        suffix = f", batch {batch}" if batch > 1 else ""
        suffix += f", {context:,} tokens" if context != settings.prompt_tokens else ""
        ids = settings.ids(batch, context)
        kept = reader.read(ids)[1] if kept is None else kept
        ideal = decode_bytes(cost, context, reader.form, batch) / field.machine["read_bytes_per_s"]
        one = Contestant(
            name=f"{reader.family} {reader.form}{suffix}",
            family=reader.family,
            form=reader.form,
            visit=_visit(field, reader, ids[:, -1], kept),
            ideal_s=ideal,
            facts={"context": context, "batch": batch},
        )
        made.append(one)
        reader_of[one.name] = reader

    for reader in mamba:
        add(reader, field.cost, settings.prompt_tokens)
    for reader in mamba[: len(ours.FORMS)]:
        add(reader, field.cost, settings.prompt_tokens, settings.batch)
    for context in settings.llama_contexts if llama else ():
        filled = llama[0].read(settings.ids(1, context))[1]
        for reader in llama:
            add(reader, LMCost(settings.llama), context, kept=reader.adopt(filled))
    return made, reader_of


def _visit(field: Field, reader: Reader, first: Tensor, kept: Any) -> Callable[[], tuple[float, None]]:
    settings = field.settings
    return lambda: decode_visit(reader, first, kept, settings.warmup_tokens, settings.decode_tokens)


def _check_all(field: Field, mamba: list[Reader], llama: list[TheirReader]) -> dict[tuple[Reader, int], dict]:
    """(reader, batch) -> entries of its rows: one forward and token by token against ours in float32 (for 8
    and 4 bits with the weights rounded likewise), the Llama's against its own float32; a batch against its
    rows alone."""
    settings = field.settings
    ids = settings.ids(1, settings.check_tokens)
    plain, found = mamba[0].logits(ids), {}
    for reader in mamba:
        reference = plain
        if reader.form not in hugging_face.FORMS:
            is_ours = reader.family == "ours"
            change = ours.rounding(field.model, reader.form) if is_ours else rounding(reader.form)
            reference = ours.with_weights(field.model, change).logits(ids)
        found[reader, 1] = _check(reader, ids, reference, plain)
    for reader in llama:
        found[reader, 1] = _check(reader, ids, llama[0].logits(ids), llama[0].logits(ids))
    rows = settings.ids(settings.batch, settings.check_tokens)
    for reader in mamba[: len(ours.FORMS)]:
        alone = torch.cat([logits_by_steps(reader, row[None]) for row in rows])
        error = rms_ratio(logits_by_steps(reader, rows), alone)
        check = make_check({"batch against its rows alone": error}, TOLERANCE[reader.form])
        found[reader, settings.batch] = found[reader, 1] | {"check": check}
    return found


def _check(reader: Reader, ids: Tensor, reference: Tensor, plain: Tensor) -> dict:
    whole, steps = reader.logits(ids), logits_by_steps(reader, ids)[0]
    errors = {
        "one forward": rms_ratio(whole, reference),
        "token by token": rms_ratio(steps, reference[-len(steps) :]),
    }
    return {
        "check": make_check(errors, TOLERANCE[reader.form]),
        "float32_distance": rms_ratio(steps, plain[-len(steps) :]),
    }


def _ratios(rows: list[dict], batch: int) -> list[dict]:
    def ours_in(form: str, batch: int = 1) -> dict | None:
        return fastest(rows, family="ours", form=form, batch=batch)

    found = []
    for form, theirs in (("bfloat16", "bfloat16"), ("int8", "q8_0"), ("int4", "q4_0")):
        other = fastest(rows, family="llama.cpp", form=theirs)
        found += make_ratio(f"decoding, {form} against llama.cpp's {theirs}", ours_in(form), other)
    for form in hugging_face.FORMS:
        other = fastest(rows, family="transformers Mamba-2", form=form)
        found += make_ratio(f"decoding, {form} against transformers' Mamba-2 in {form}", ours_in(form), other)
    best = min(
        (row for row in map(ours_in, hugging_face.FORMS) if row and row["seconds"]),
        key=lambda row: row["seconds"]["median"],
        default=None,
    )
    for family in ("transformers Mamba-2", "transformers Llama"):
        for context in sorted({row["context"] for row in rows if row["family"] == family}):
            other = fastest(rows, family=family, context=context)
            what = f"decoding, best plain dtype against {family}'s, {context:,} tokens of context"
            found += make_ratio(what, best, other)
    for form in ours.FORMS:
        what = f"tokens a second of ours in {form}, batch {batch} against batch 1"
        found += make_ratio(what, ours_in(form, batch), ours_in(form), batch)
    return found
