"""Part bench-decode: decoding and reading with `mamba2-2.7b`, its transformer twin against context length.

Decoding goes through `LanguageModel.forward` with a state that may be overwritten, as `cobra.generate` does.
A model that replays CUDA graphs by itself is timed as it is; otherwise a step is captured here. What the
twin's cache holds is random: how fast it is read does not depend on that.
"""

import gc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cobra.config import PRESETS
from cobra.cost import LMCost
from cobra.lm.decode import decoder_for
from cobra.lm.stack import LanguageModel
from cobra.lm.state import State
from eval.gpu.results import attempt, make_row, other, per_step
from eval.gpu.stopwatch import ROUNDS, Stopwatch, race, reason
from eval.gpu.targets import COMPACT, CONTEXTS, MAMBA, PREFILLS, TRANSFORMER, decode_name, prefill_name
from eval.peers.contest import TOLERANCE, make_check, rms_ratio

MARGIN = 2e-3  # of the check: about one rounding of bfloat16
DRIFT = 0.05  # of logits, where states are kept in 8 bits


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is decoded.

    Attributes:
        mamba, transformer: presets; their language models alone.
        batches: rows decoded at once by the first.
        contexts: tokens in the cache of the second, batch 1.
        prompt: tokens read before the first decodes: its speed does not depend on them.
        steps: tokens of a visit.
        prefills: tokens read; piece: at most so many in a call.
        check_tokens: length of the prompt over which logits are compared.
        dtype: of the weights.
    """

    mamba: str = MAMBA
    transformer: str = TRANSFORMER
    batches: tuple[int, ...] = (1, 128)
    contexts: tuple[int, ...] = CONTEXTS
    prompt: int = 16
    steps: int = 16
    prefills: tuple[int, ...] = PREFILLS
    piece: int = 16384
    check_tokens: int = 24
    rounds: int = ROUNDS
    dtype: torch.dtype = torch.bfloat16
    seed: int = 0


def run(stopwatch: Stopwatch, ceilings: dict, settings: Settings, keep: Callable[[dict], None]) -> None:
    """Measures all, and hands over each row as it is there; one that fails is a row that says why."""
    with torch.no_grad():
        lm, check = build_checked(settings.mamba, stopwatch.device, settings)
        for batch in settings.batches:
            name = decode_name(MAMBA, batch)
            keep(
                attempt(
                    name,
                    lambda b=batch, n=name: _decode_mamba(stopwatch, ceilings, settings, lm, b, n, check),
                )
            )
        many = max(settings.batches)
        name = decode_name(MAMBA, many) + COMPACT
        keep(attempt(name, lambda: _decode_compact(stopwatch, settings, lm, many, name)))
        for seqlen in settings.prefills:
            name = prefill_name(seqlen)
            keep(
                attempt(
                    name, lambda s=seqlen, n=name: _prefill(stopwatch, ceilings, settings, lm, s, n, check)
                )
            )
        del lm
        gc.collect()
        lm, check = build_checked(settings.transformer, stopwatch.device, settings)
        for context in settings.contexts:
            name = decode_name(TRANSFORMER, context=context)
            keep(
                attempt(
                    name,
                    lambda c=context, n=name: _decode_twin(stopwatch, ceilings, settings, lm, c, n, check),
                )
            )


def build_lm(preset: str, device: torch.device, seed: int = 0) -> LanguageModel:
    """A preset's language model with random weights in float32, made where it is to stay."""
    torch.manual_seed(seed)
    with torch.device(device):
        return LanguageModel(PRESETS[preset].lm).eval().requires_grad_(False)


def build_checked(preset: str, device: torch.device, settings: Settings) -> tuple[LanguageModel, dict]:
    """The model in its dtype, and the check of its logits: those of one forward and of reading token by token
    against the same weights in float32. Token by token may be twice as far from them as one forward, which
    is how far the dtype itself is."""
    lm = build_lm(preset, device, settings.seed)
    ids = random_ids(lm, 1, settings.check_tokens, settings.seed)
    expected, _ = lm(ids)
    lm = lm.to(settings.dtype)
    whole = rms_ratio(lm(ids)[0], expected)
    logits, state = lm(ids[:, :1])
    steps = [logits]
    for t in range(1, ids.shape[1]):
        logits, state = lm(ids[:, t : t + 1], state=state, overwrite_state=True)
        steps.append(logits.clone())
    by_steps = rms_ratio(torch.cat(steps, 1), expected)
    check = make_check({"token by token against float32": by_steps}, 2 * whole + MARGIN)
    check["one forward against float32"] = whole
    return lm, check


def random_ids(lm: LanguageModel, batch: int, seqlen: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(lm.config.vocab_size, (batch, seqlen), generator=generator).to(lm.device)


class Stepper:
    """Greedy decoding, a token of each row a call.

    Attributes:
        token: (batch, 1), read by the next call.
        state: before it.
    """

    def __init__(self, lm: LanguageModel, token: Tensor, state: State) -> None:
        self.lm, self.token, self.state = lm, token.clone(), state
        self._lengths = state.lengths.clone()

    def __call__(self) -> Tensor:
        logits, self.state = self.lm(self.token, state=self.state, overwrite_state=True, logits_to_keep=1)
        self.token = logits.argmax(-1)
        return logits

    def rewind(self) -> None:
        """Back to the length at the start, so that a cache does not grow from visit to visit."""
        self.state = State(self.state.layers, self._lengths.clone(), {})


class CompactStepper(Stepper):
    """The same with the states of 8 bits, which only the compiled step takes.

    Raises:
        RuntimeError: where there is none for this model.
    """

    def __init__(self, lm: LanguageModel, token: Tensor, state: State) -> None:
        decoder = decoder_for(lm, len(token), 1)
        if decoder is None:
            raise RuntimeError("no compiled step serves this model here")
        super().__init__(lm, token, State(list(map(compact, state.layers)), state.lengths, {}))
        self._decoder = decoder

    def __call__(self) -> Tensor:
        hidden = self.lm.embedding(self.token).float()
        logits, self.state = self._decoder.step(hidden, self.state, None, 1)
        self.token = logits.argmax(-1)
        return logits


def compact(layer: dict[str, Tensor]) -> dict[str, Tensor]:
    """A layer's state with `ssm` (batch, nheads, headdim, d_state) as int8, a scale for every row of it."""
    ssm = layer["ssm"]
    scale = ssm.abs().amax(-1) / 127
    codes = (ssm / scale.clamp(min=1e-30)[..., None]).round().to(torch.int8)
    return layer | {"ssm": codes, "ssm_scale": scale}


def stepping(stepper: Stepper) -> tuple[Callable[[], Any], str, float]:
    """What decodes a token a call, how (in words), and how far the logits of a graph that was captured here
    are from those of the same step without one (RMS, 0 where nothing was)."""
    if stepper.token.device.type != "cuda":
        return stepper, "a step at a time", 0.0
    captured, begin = [], torch.cuda.CUDAGraph.capture_begin

    def note(graph, *args, **kwargs) -> None:
        captured.append(graph)
        begin(graph, *args, **kwargs)

    with mock.patch.object(torch.cuda.CUDAGraph, "capture_begin", note):
        for _ in range(3):  # the state is a new one, so a model with graphs makes one now
            stepper()
    stepper.rewind()
    if captured:
        return stepper, "the model's own CUDA graph", 0.0
    try:
        return _capture(stepper)
    except RuntimeError as error:
        torch.cuda.synchronize()
        return stepper, f"no CUDA graph: {reason(error)}", 0.0


def _capture(stepper: Stepper) -> tuple[Callable[[], Any], str, float]:
    lm, token, state = stepper.lm, stepper.token.clone(), stepper.state
    before = state.clone()
    expected, _ = lm(token, state=state.clone(), overwrite_state=True, logits_to_keep=1)
    first = token.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, _ = lm(token, state=state, overwrite_state=True, logits_to_keep=1)
        token.copy_(logits.argmax(-1))
    for layer, old in zip(state.layers, before.layers, strict=True):
        for name, tensor in layer.items():
            tensor.copy_(old[name])
    token.copy_(first)
    graph.replay()
    return graph.replay, "CUDA graph of a step", rms_ratio(logits, expected)


def _visit(settings: Settings, stepper: Stepper) -> tuple[Callable[[], None], str, float]:
    """Some steps; how and how far off as `stepping` says."""
    step, how, graph_error = stepping(stepper)

    def visit() -> None:
        stepper.rewind()
        for _ in range(settings.steps):
            step()

    return visit, how, graph_error


def _time_steps(
    stopwatch: Stopwatch,
    ceilings: dict,
    settings: Settings,
    stepper: Stepper,
    name: str,
    check: dict,
    context: int,
) -> dict:
    visit, how, graph_error = _visit(settings, stepper)
    timing = race(stopwatch, {name: visit}, settings.rounds)[name]
    seconds = per_step(timing.seconds, settings.steps)
    batch, cost = len(stepper.token), LMCost(stepper.lm.config)
    graph_passed = graph_error <= check["tolerance"]
    errors = check["errors"] | ({"graph against a step without": graph_error} if graph_error else {})
    return make_row(
        name,
        seconds,
        failed=timing.failed,
        bytes_moved=cost.decode_bytes(context, settings.dtype.itemsize, batch),
        flops=batch * cost.decode_flops(context),
        ceilings=ceilings,
        check=check | {"errors": errors, "passed": check["passed"] and graph_passed},
        tokens_per_s=batch / seconds["median"] if seconds else None,
        batch=batch,
        context=context,
        state_bytes=stepper.state.nbytes,
        note=how,
    )


def _decode_mamba(stopwatch, ceilings, settings: Settings, lm, batch: int, name: str, check: dict) -> dict:
    ids = random_ids(lm, batch, settings.prompt, settings.seed)
    logits, state = lm(ids, logits_to_keep=1)
    if batch > 1:
        alone, _ = lm(ids[-1:], logits_to_keep=1)
        error = rms_ratio(logits[-1:], alone)
        passed = check["passed"] and error <= check["tolerance"]
        check = check | {"errors": check["errors"] | {"a row against itself alone": error}, "passed": passed}
    stepper = Stepper(lm, logits.argmax(-1), state)
    return _time_steps(stopwatch, ceilings, settings, stepper, name, check, settings.prompt)


def _decode_compact(stopwatch, settings: Settings, lm, batch: int, name: str) -> dict:
    """States of 8 bits beside those of float32; how far apart their logits are after the first steps is in
    the check. Bytes are not counted."""
    ids = random_ids(lm, batch, settings.prompt, settings.seed)
    logits, state = lm(ids, logits_to_keep=1)
    token = logits.argmax(-1)
    coarse, exact = CompactStepper(lm, token, state.clone()), Stepper(lm, token, state)
    for _ in range(4):
        found, expected = coarse(), exact()
        coarse.token = exact.token
    check = make_check({"logits against those of a float32 state": rms_ratio(found, expected)}, DRIFT)
    rival = decode_name(MAMBA, batch)
    visits = {key: _visit(settings, one) for key, one in ((name, coarse), (rival, exact))}
    timings = race(stopwatch, {key: visit for key, (visit, _, _) in visits.items()}, settings.rounds)
    seconds = {key: per_step(timing.seconds, settings.steps) for key, timing in timings.items()}
    return make_row(
        name,
        seconds[name],
        failed=timings[name].failed,
        check=check,
        others=[other(rival, True, timings[rival]) | {"seconds": seconds[rival]}],
        tokens_per_s=batch / seconds[name]["median"] if seconds[name] else None,
        batch=batch,
        state_bytes=coarse.state.nbytes,
        note=visits[name][1],
    )


def _decode_twin(stopwatch, ceilings, settings: Settings, lm, context: int, name: str, check: dict) -> dict:
    """One row with a cache of `context` tokens in a buffer of at most 1.25 times that length."""
    capacity = min(context + context // 4, context + 4 * settings.steps)
    state = lm.allocate_state(1, capacity)
    for layer in state.layers:
        for key, tensor in layer.items():
            if key == "position":
                tensor[:, :context] = torch.arange(context, device=tensor.device)
            else:
                tensor.normal_()
    state = State(state.layers, torch.full((1,), context), {})
    stepper = Stepper(lm, random_ids(lm, 1, 1, settings.seed), state)
    row = _time_steps(stopwatch, ceilings, settings, stepper, name, check, context)
    return row | {"cache_slots": capacity}


def read(lm: LanguageModel, ids: Tensor, piece: int) -> Tensor:
    """Reads ids, at most `piece` tokens a call: the logits after the last."""
    logits, state = torch.empty(0), None
    for part in ids.split(piece, dim=1):
        logits, state = lm(part, state=state, overwrite_state=state is not None, logits_to_keep=1)
    return logits


def _prefill(stopwatch, ceilings, settings: Settings, lm, seqlen: int, name: str, check: dict) -> dict:
    ids = random_ids(lm, 1, seqlen, settings.seed)
    error = rms_ratio(read(lm, ids, settings.piece // 4), read(lm, ids, settings.piece))
    allowed = max(check["tolerance"], TOLERANCE["bfloat16"])
    passed = check["passed"] and error <= allowed
    errors = check["errors"] | {"in other pieces": error}
    timing = race(stopwatch, {name: lambda: read(lm, ids, settings.piece)}, settings.rounds)[name]
    return make_row(
        name,
        timing.seconds,
        failed=timing.failed,
        flops=LMCost(lm.config).prefill_flops(seqlen),
        ceilings=ceilings,
        check=check | {"errors": errors, "passed": passed, "tolerance": allowed},
        tokens_per_s=seqlen / timing.seconds["median"] if timing.seconds else None,
    )
