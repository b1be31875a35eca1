"""The contest of ours with itself: time per token after a short and after a very long context."""

from typing import Any

import torch
from torch import Tensor

from eval.peers import ours
from eval.peers.contest import (
    TOLERANCE,
    Contestant,
    Field,
    decode_bytes,
    make_check,
    make_ratio,
    make_row,
    race,
    rms_ratio,
    timed,
)
from eval.peers.reader import decode_visit

FORM = "bfloat16"
CHECKED = 8  # tokens that are read at once and one by one from the long context


def run(field: Field) -> dict:
    """Reads both contexts in chunks, then decodes from either in turn.

    Returns:
        title, unit, rows (with context, state_bytes, read_tokens_per_s), ratios.
    """
    settings, reader = field.settings, ours.OurReader(field.model, FORM)
    contexts = sorted({settings.short_context, settings.long_context})
    chunks = sum(len(_chunks(context, settings.context_chunk)) for context in contexts)
    contestants, checks = [], {}
    with field.progress("context", chunks + len(contexts) * (settings.rounds + 1)) as advance:
        for context in contexts:
            seconds, (logits, state) = timed(lambda context=context: _read(field, reader, context, advance))
            first = logits.argmax(-1)
            one = Contestant(
                name=f"ours {FORM}, {context:,} tokens",
                family="ours",
                form=FORM,
                visit=lambda first=first, state=state: decode_visit(
                    reader, first, state, settings.warmup_tokens, settings.decode_tokens
                ),
                ideal_s=decode_bytes(field.cost, context, FORM) / field.machine["read_bytes_per_s"],
                facts={
                    "context": context,
                    "state_bytes": state.nbytes,
                    "read_tokens_per_s": context / seconds,
                },
            )
            contestants.append(one)
            checks[one.name] = _check(field, reader, state)
        records = race(contestants, settings, advance)
    rows = [make_row(one, records[one.name], checks[one.name]) for one in contestants]
    title = f"Ours after a long context, {FORM}, read {settings.context_chunk:,} tokens at once"
    what = f"time per token after {contexts[-1]:,} tokens over that after {contexts[0]:,}"
    ratios = make_ratio(what, rows[0], rows[-1]) if len(rows) > 1 else []
    return {"title": title, "unit": "ms per token", "rows": rows, "ratios": ratios}


def _chunks(context: int, size: int) -> list[int]:
    """Lengths of the pieces of a context."""
    whole, rest = divmod(context, size)
    return [size] * whole + ([rest] if rest else [])


def _read(field: Field, reader: ours.OurReader, context: int, advance) -> tuple[Tensor, Any]:
    state, logits = None, torch.empty(0)
    for index, size in enumerate(_chunks(context, field.settings.context_chunk)):
        logits, state = reader.read(field.settings.ids(1, size, seed=index), state)
        advance(1)
    return logits, state


@torch.inference_mode()
def _check(field: Field, reader: ours.OurReader, kept: Any) -> dict:
    """A few tokens more from the state, one by one against all at once."""
    ids = field.settings.ids(1, CHECKED, seed=-1)
    whole = reader.go_on(ids, reader.resume(kept))
    state, rows = reader.resume(kept), []
    for token in ids[0]:
        row, state = reader.step(token[None], state)
        rows.append(row.clone())
    return make_check({"token by token": rms_ratio(torch.cat(rows), whole)}, TOLERANCE[FORM])
