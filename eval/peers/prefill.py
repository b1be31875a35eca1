"""The contest of reading a prompt: all of it at once, logits of the last token only."""

import torch

from cobra.cost import LMCost
from cobra.export.gguf_file import write_gguf
from eval.machine import gemm_peak
from eval.peers import hugging_face, ours
from eval.peers.contest import (
    TOLERANCE,
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
from eval.peers.llama_cpp import LlamaCppReader
from eval.peers.reader import Reader


def run(field: Field) -> dict:
    """Measures reading at each of `prefill_lengths`.

    Returns:
        title, unit, rows (with tokens), ratios.
    """
    lengths = field.settings.prefill_lengths
    rows = [row for seqlen in lengths for row in _run_length(field, seqlen)]
    ratios = [ratio for seqlen in lengths for ratio in _ratios(rows, seqlen)]
    return {"title": "Reading a prompt", "unit": "tokens per s", "rows": rows, "ratios": ratios}


def _run_length(field: Field, seqlen: int) -> list[dict]:
    settings = field.settings
    readers = _readers(field, seqlen)
    ids = settings.ids(1, seqlen)
    contestants = []
    for label, (reader, cost) in readers.items():
        one = Contestant(
            name=f"{label}, {seqlen:,} tokens",
            family=reader.family,
            form=reader.form,
            visit=lambda reader=reader: _visit(reader, ids),
            least_s=_least_s(field, reader, cost.prefill_flops(seqlen)),
            ideal_s=cost.prefill_flops(seqlen) / gemm_peak(field.machine, reader.form),
            facts={"tokens": seqlen},
        )
        contestants.append(one)
    try:
        with field.progress(f"prefill {seqlen:,}", len(contestants) * (settings.rounds + 1)) as advance:
            records = race(contestants, settings, advance)
    finally:
        for reader, _ in readers.values():
            if isinstance(reader, LlamaCppReader):
                reader.close()
    rows = []
    for one in contestants:
        record = records[one.name]
        first = next(c for c in contestants if c.family.endswith("Llama") == one.family.endswith("Llama"))
        reference, check = records[first.name].result, None
        if record.result is not None and reference is not None:
            error = rms_ratio(record.result, reference)
            check = make_check({f"last logits, {first.name}": error}, TOLERANCE[one.form])
        rows.append(make_row(one, record, check))
    return rows


def _least_s(field: Field, reader: Reader, flops: float) -> float:
    """What transformers' matrix products take at torch's speed in that dtype."""
    is_theirs = reader.family.startswith("transformers")
    return flops / field.machine["gemm_flops_per_s"][reader.form] if is_theirs else 0.0


def _visit(reader: Reader, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
    seconds, (logits, _) = timed(lambda: reader.read(ids))
    return seconds, logits


def _readers(field: Field, seqlen: int) -> dict[str, tuple[Reader, LMCost]]:
    """Name -> reader and costs; the first Mamba-2 and the first Llama are what others are checked with."""
    settings, found = field.settings, {}
    for form in hugging_face.FORMS:
        found[f"ours {form}"] = ours.OurReader(field.model, form), field.cost
    if "transformers" in field.peers:
        for form in hugging_face.FORMS:
            theirs = hugging_face.build_mamba2(field.model.lm)
            reader = hugging_face.TheirReader(theirs, "transformers Mamba-2", form)
            found[f"transformers Mamba-2 {form}"] = reader, field.cost
        for form in hugging_face.FORMS:
            twin = hugging_face.build_llama(settings.llama, settings.seed)
            reader = hugging_face.TheirReader(twin, "transformers Llama", form)
            found[f"transformers Llama {form}"] = reader, LMCost(settings.llama)
    if "llama.cpp" in field.peers:
        path = field.folder / "prefill.gguf"
        write_gguf(path, field.model.lm.config, field.model.lm.state_dict(), "bfloat16")
        for ubatch in settings.ubatches:
            reader = LlamaCppReader(path, "bfloat16", settings.threads, seqlen + 16, ubatch)
            found[f"llama.cpp bfloat16, ubatch {ubatch}"] = reader, field.cost
    return found


def _ratios(rows: list[dict], seqlen: int) -> list[dict]:
    at = [row for row in rows if row["tokens"] == seqlen]
    found = []
    theirs = fastest(at, family="llama.cpp")
    own = fastest(at, family="ours", form="bfloat16")
    found += make_ratio(f"reading {seqlen:,} tokens, bfloat16 against llama.cpp's best ubatch", own, theirs)
    best = fastest(at, family="ours")
    found += make_ratio(f"reading {seqlen:,} tokens, best dtype against llama.cpp's best", best, theirs)
    for family in ("transformers Mamba-2", "transformers Llama"):
        theirs = fastest(at, family=family)
        found += make_ratio(f"reading {seqlen:,} tokens, best dtype against {family}'s best", best, theirs)
    return found
