"""What every language model looks like to the contests, whoever wrote it."""

import statistics
import time
from typing import Any, Protocol

import torch
from torch import Tensor


class Reader(Protocol):
    """A language model with its weights, behind one way to run it; logits are float32."""

    family: str
    form: str

    def logits(self, ids: Tensor) -> Tensor:
        """One forward over a prompt (1, seqlen): (seqlen, vocab)."""
        ...

    def read(self, ids: Tensor) -> tuple[Tensor, Any]:
        """Reads prompts (batch, seqlen): logits of the last token (batch, vocab), and the state."""
        ...

    def resume(self, state: Any) -> Any:
        """The state as `read` left it, to be overwritten by `step`."""
        ...

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Reads one token in each row, (batch,) int64: logits (batch, vocab), and the state."""
        ...


def step_times(reader: Reader, first: Tensor, kept: Any, warmup: int, count: int) -> list[float]:
    """Seconds of each of `count` greedy tokens from a kept state, after `warmup` others.

    Args:
        first: (batch,) the tokens to begin with.
    """
    tokens, state, seconds = first, reader.resume(kept), []
    with torch.inference_mode():
        for _ in range(warmup + count):
            start = time.perf_counter()
            logits, state = reader.step(tokens, state)
            tokens = logits.argmax(-1)
            seconds.append(time.perf_counter() - start)
    return seconds[warmup:]


def decode_visit(reader: Reader, first: Tensor, kept: Any, warmup: int, count: int) -> tuple[float, None]:
    """Median seconds of a token over `step_times`, as a visit."""
    return statistics.median(step_times(reader, first, kept, warmup, count)), None


@torch.inference_mode()
def logits_by_steps(reader: Reader, ids: Tensor) -> Tensor:
    """Reads half of prompts (batch, seqlen) at once, the rest token by token: logits of the rest, (batch,
    seqlen / 2, vocab)."""
    half = ids.shape[1] // 2
    _, kept = reader.read(ids[:, :half])
    state, logits = reader.resume(kept), []
    for tokens in ids[:, half:].T:
        row, state = reader.step(tokens, state)
        logits.append(row.clone())
    return torch.stack(logits, dim=1)
