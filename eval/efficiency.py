"""Decoding against context length, for several models side by side: time to first token, time per
token, memory.

What is timed is `model.lm` on random token ids, batch 1: the vision encoder and the connector cost
the same for every context length, and the speed of a language model does not depend on which tokens
it reads.

The protocol. Every (model, context) pair is a cell. A round visits all cells once; every second
round runs backwards, and each pair of rounds starts at another cell (A B C, C B A, B C A, ...), so
that a machine that slows down or warms up touches all cells alike. A visit reads the context in one
forward call (time to first token), or decodes greedily from a clone of the state (time per token:
the median over the visit's tokens; a key-value cache gets its room for them during warm-up).
Reported are the median and the quartiles over the visits, and the share of the roofline: weights and
state at the speed at which this machine reads memory, measured first (what a cache holds can be read
faster). In the same run each model's token-by-token logits are compared with a single forward over
the whole sequence: no speed without a correct answer.
"""

import resource
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from math import exp, log
from typing import Any

import torch
from torch import Tensor

from cobra.cost import LMCost
from eval.environment import describe_environment
from eval.machine import measure_read
from vision_scan.errors import UserError

# max |decode - forward| / max |forward| over the logits of the checked tokens.
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 2e-2}
FORMAT = 2  # since 2: read_bytes_per_s, and roofline of each point
READ_BYTES = 1 << 28  # of the array that memory's speed is measured with
DECODE_VISIT_UNITS = 2048  # weight of a decode visit on the progress bar, in tokens of prefill


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """How decoding is measured.

    Attributes:
        contexts: numbers of tokens read before decoding starts.
        rounds: decode visits per cell.
        prefill_rounds: prefill visits per cell.
        decode_tokens: timed tokens of a decode visit, after `warmup_tokens` untimed ones.
        check_tokens: tokens decoded for the correctness check, at the shortest and the longest
            context.
        seed: of the random token ids.
    """

    contexts: tuple[int, ...] = (256, 512, 1024, 2048, 4096, 8192, 16384)
    rounds: int = 9
    prefill_rounds: int = 3
    decode_tokens: int = 24
    warmup_tokens: int = 4
    check_tokens: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.contexts or list(self.contexts) != sorted(set(self.contexts)) or self.contexts[0] < 1:
            raise UserError(f"contexts {self.contexts}: give positive numbers that increase, as 256, 1024")
        for name in ("rounds", "prefill_rounds", "decode_tokens", "warmup_tokens", "check_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}: give at least 1")


def measure(
    models: Mapping[str, Any],
    protocol: Protocol,
    advance: Callable[[int], None] = lambda units: None,
) -> dict:
    """Measures every model at every context length, interleaved.

    Args:
        models: name -> Cobra, all on the same device and in the same dtype. The crossovers are
            those of the first model against each of the others.
        protocol: lengths and repeats.
        advance: called with the units of work just done, `work_units(models, protocol)` in all.
    Returns:
        A JSON-able dict: protocol, environment, read_bytes_per_s (of memory), dtype, models (name ->
        lm_parameters, weight_bytes, check, points: one per context with ttft_s, decode_s, roofline,
        state_bytes), crossovers, peak_rss_bytes (of this process so far).
    Raises:
        UserError: if the models differ in device or dtype.
    """
    kinds = {(str(model.device), model.dtype) for model in models.values()}
    if len(kinds) != 1:
        raise UserError(
            f"models to compare differ in device or dtype: {sorted(map(str, kinds))}; load all alike"
        )
    ((device, dtype),) = kinds
    read_speed = measure_read(READ_BYTES, device)
    cells = [(name, context) for context in protocol.contexts for name in models]
    records = {cell: {"ttft_s": [], "decode_s": []} for cell in cells}
    states: dict[tuple[str, int], tuple[Tensor, Any]] = {}
    with torch.inference_mode():
        checks = {name: _check(model.lm, protocol, device, dtype, advance) for name, model in models.items()}
        for cell in interleaved(cells, protocol.prefill_rounds):
            lm, record = models[cell[0]].lm, records[cell]
            ids = _random_ids(lm, cell[1], protocol.seed, device)
            states.pop(cell, None)
            seconds, states[cell] = _timed(device, _prefill, lm, ids)
            record["ttft_s"].append(seconds)
            record["state_bytes"] = states[cell][1].nbytes
            advance(cell[1])
        for cell in interleaved(cells, protocol.rounds):
            token, state = states[cell]
            seconds = _decode_times(models[cell[0]].lm, token, state.clone(), protocol, device)
            records[cell]["decode_s"].append(statistics.median(seconds))
            advance(DECODE_VISIT_UNITS)
    return _result(models, protocol, records, checks, device, dtype, read_speed)


def doubling(shortest: int, longest: int) -> tuple[int, ...]:
    """Context lengths from shortest to longest, each twice the one before; the last may be less."""
    if not 1 <= shortest <= longest:
        raise UserError(f"contexts from {shortest} to {longest}: give 1 or more, and the shortest first")
    contexts = [shortest]
    while 2 * contexts[-1] < longest:
        contexts.append(2 * contexts[-1])
    return (*contexts, longest) if longest > shortest else (shortest,)


def work_units(models: Mapping[str, Any], protocol: Protocol) -> int:
    """Total units that `measure` reports to `advance`."""
    checked = sum(_checked_contexts(protocol))
    prefill = protocol.prefill_rounds * sum(protocol.contexts)
    return len(models) * (checked + prefill + protocol.rounds * len(protocol.contexts) * DECODE_VISIT_UNITS)


def interleaved(cells: list, rounds: int) -> Iterator:
    """All cells once a round: there, back, then the same from one cell later."""
    for i in range(rounds):
        shift = i // 2 % len(cells)
        order = cells[shift:] + cells[:shift]
        yield from reversed(order) if i % 2 else order


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles of repeated measurements: keys median, q1, q3, n."""
    median = statistics.median(values)
    q1, _, q3 = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else (median,) * 3
    return {"median": median, "q1": q1, "q3": q3, "n": len(values)}


def find_crossover(
    first: list[tuple[int, float]], second: list[tuple[int, float]]
) -> tuple[str, float | None]:
    """The context length from which on `first` is faster than `second`.

    Args:
        first, second: (context, seconds) at the same increasing contexts.
    Returns:
        ("always", None): faster at every measured length; ("never", None): not faster at the
        longest; ("at", length): the curves cross there for the last time (straight lines between
        measured points on log-log axes).
    """
    ahead = [a < b for (_, a), (_, b) in zip(first, second, strict=True)]
    if all(ahead):
        return "always", None
    if not ahead[-1]:
        return "never", None
    last_behind = max(i for i, value in enumerate(ahead) if not value)
    gap = [log(first[i][1] / second[i][1]) for i in (last_behind, last_behind + 1)]
    left, right = (log(first[i][0]) for i in (last_behind, last_behind + 1))
    return "at", exp(left + (right - left) * gap[0] / (gap[0] - gap[1]))


def crossover_sentence(crossover: dict) -> str:
    """One line that states a crossover of `measure`, or that there is none."""
    first, second = crossover["first"], crossover["second"]
    if crossover["kind"] == "always":
        where = f"at every measured length, from {crossover['shortest']:,} tokens on"
    elif crossover["kind"] == "at":
        where = f"from about {round(crossover['context']):,} tokens of context on"
    else:
        longest = f"{crossover['longest']:,} tokens"
        return f"no crossover up to {longest}: {first} does not decode faster than {second}"
    return f"{first} decodes faster than {second} {where}"


def _result(
    models, protocol, records, checks, device: str, dtype: torch.dtype, read_speed: float
) -> dict:
    weight_bytes = {name: _weight_bytes(model.lm) for name, model in models.items()}

    def point(name: str, context: int) -> dict:
        record = records[name, context]
        decode = spread(record["decode_s"])
        cost = LMCost(models[name].lm.config)
        traffic = weight_bytes[name] + cost.state_traffic_bytes(context, dtype.itemsize)
        return {
            "context": context,
            "ttft_s": spread(record["ttft_s"]),
            "decode_s": decode,
            "roofline": traffic / read_speed / decode["median"],
            "state_bytes": record["state_bytes"],
        }

    points = {name: [point(name, context) for context in protocol.contexts] for name in models}
    curves = {name: [(p["context"], p["decode_s"]["median"]) for p in points[name]] for name in models}
    first, *others = models
    crossovers = []
    for other in others:
        kind, length = find_crossover(curves[first], curves[other])
        ends = {"shortest": protocol.contexts[0], "longest": protocol.contexts[-1]}
        crossovers.append({"first": first, "second": other, "kind": kind, "context": length, **ends})
    return {
        "format": FORMAT,
        "measured": "model.lm on random token ids, batch 1, greedy decoding",
        "protocol": asdict(protocol),
        "environment": describe_environment(device),
        "read_bytes_per_s": read_speed,
        "dtype": str(dtype).removeprefix("torch."),
        "models": {
            name: {
                "lm_parameters": sum(p.numel() for p in model.lm.parameters()),
                "weight_bytes": weight_bytes[name],
                "check": checks[name],
                "points": points[name],
            }
            for name, model in models.items()
        },
        "crossovers": crossovers,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _weight_bytes(lm) -> int:
    """Bytes of the weights as they are stored, tied ones once."""
    tensors = {id(tensor): tensor for tensor in (*lm.parameters(), *lm.buffers())}
    return sum(tensor.nbytes for tensor in tensors.values())


def _prefill(lm, ids: Tensor) -> tuple[Tensor, Any]:
    """Reads ids (1, context); the greedy next token (1, 1) and the state."""
    logits, state = lm(ids, logits_to_keep=1)
    return logits.argmax(-1), state


def _decode_times(lm, token: Tensor, state, protocol: Protocol, device: str) -> list[float]:
    seconds = []
    for i in range(protocol.warmup_tokens + protocol.decode_tokens):
        elapsed, (token, state) = _timed(device, _step, lm, token, state)
        if i >= protocol.warmup_tokens:
            seconds.append(elapsed)
    return seconds


def _step(lm, token: Tensor, state) -> tuple[Tensor, Any]:
    logits, state = lm(token, state=state, overwrite_state=True)
    return logits.argmax(-1), state


def _check(lm, protocol: Protocol, device: str, dtype: torch.dtype, advance: Callable[[int], None]) -> dict:
    """Greedy decoding token by token from the state against one forward over the same tokens."""
    errors = {}
    for context in _checked_contexts(protocol):
        ids = _random_ids(lm, context, protocol.seed, device)
        token, state = _prefill(lm, ids)
        decoded, tokens = [], []
        for _ in range(protocol.check_tokens):
            tokens.append(token)
            logits, state = lm(token, state=state, overwrite_state=True)
            decoded.append(logits)
            token = logits.argmax(-1)
        expected, _ = lm(torch.cat([ids, *tokens], dim=1), logits_to_keep=protocol.check_tokens)
        difference = (torch.cat(decoded, dim=1).double() - expected.double()).abs().max()
        errors[str(context)] = (difference / expected.double().abs().max()).item()
        advance(context)
    worst = max(errors.values())
    return {
        "what": "max |token by token - one forward| / max |one forward| over the logits",
        "tokens": protocol.check_tokens,
        "errors": errors,
        "tolerance": TOLERANCE[dtype],
        "passed": worst <= TOLERANCE[dtype],
    }


def _checked_contexts(protocol: Protocol) -> list[int]:
    return sorted({protocol.contexts[0], protocol.contexts[-1]})


def _random_ids(lm, context: int, seed: int, device: str) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lm.config.vocab_size, (1, context), generator=generator).to(device)


def _timed(device: str, function: Callable, *arguments) -> tuple[float, Any]:
    """Seconds that a call took, work queued on a GPU included, and its result."""
    _synchronize(device)
    start = time.perf_counter()
    result = function(*arguments)
    _synchronize(device)
    return time.perf_counter() - start, result


def _synchronize(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
