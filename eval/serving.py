"""How fast many conversations are answered at once, and how long they wait for one another."""

import io
import random
import string
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from cobra.cost import LMCost
from cobra.model import Cobra
from cobra.sampling import Sampler
from cobra.serve.answer import Outcome, Request
from cobra.serve.engine import Engine, percentile
from cobra.serve.prompt import Message, Picture, Prompt
from eval.environment import describe_environment
from eval.image_reading import pictures_of
from eval.machine import gemm_peak, measure_machine

FORMS = {torch.float32: "float32", torch.bfloat16: "bfloat16"}


@dataclass(frozen=True, kw_only=True)
class Load:
    """Conversations of random letters, none of which begins as another.

    Attributes:
        requests: how many, all at once or one after another.
        prompt_tokens: of each.
        new_tokens: of each answer, never fewer.
    """

    requests: int = 16
    prompt_tokens: int = 32
    new_tokens: int = 256


class _Told:
    """What one request was told."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.outcome: Outcome | None = None

    def end(self, outcome: Outcome) -> None:
        self.outcome = outcome


def measure(
    model: Cobra, load: Load, reading: Load, images: int, rounds: int, advance: Callable[[int], None]
) -> dict:
    """Answers a load one after another and all at once, in turn, and beside a long reading.

    Args:
        model: decoding is held against the roofline of this machine.
        load: of decoding.
        reading: of long conversations with short answers.
        images: of the one conversation that is read while others are answered.
        rounds: of each; medians are told. Prompts are others in each round.
        advance: told of each round.
    Returns:
        tokens a second of both, their ratio in each round, the roofline's share; seconds to the first token of a
        question in a conversation that is known; seconds between tokens beside a long reading; environment. JSON-able.
    """
    engine = Engine(model, slots=load.requests, cache_bytes=0, max_waiting=load.requests)
    draw = random.Random(0)
    records: dict[str, list[float]] = {"one after another": [], "at once": [], "long conversations": []}
    equal = total = 0
    _answer(engine, [_prompt(model, load.prompt_tokens, draw)], 8)  # warms up
    for _ in range(rounds):
        prompts = [_prompt(model, load.prompt_tokens, draw) for _ in range(load.requests)]
        seconds, alone = 0.0, []
        for prompt in prompts:
            taken, (text,) = _answer(engine, [prompt], load.new_tokens)
            seconds += taken
            alone.append(text)
        together_s, together = _answer(engine, prompts, load.new_tokens)
        equal += sum(a == b for a, b in zip(alone, together, strict=True))
        total += len(prompts)
        tokens = load.requests * load.new_tokens
        records["one after another"].append(tokens / seconds)
        records["at once"].append(tokens / together_s)
        longer = [_prompt(model, reading.prompt_tokens, draw) for _ in range(reading.requests)]
        taken, _ = _answer(engine, longer, reading.new_tokens)
        records["long conversations"].append(reading.requests * (reading.prompt_tokens + reading.new_tokens) / taken)
        advance(1)
    ratios = [b / a for a, b in zip(records["one after another"], records["at once"], strict=True)]
    machine = measure_machine()
    limits = {batch: _limit(model, load, batch, machine) for batch in (1, load.requests)}
    return {
        "load": vars(load),
        "reading": vars(reading),
        "tokens_per_s": {name: {"median": median(values), "all": values} for name, values in records.items()},
        "at_once_over_one_after_another": {"median": median(ratios), "all": ratios},
        "roofline_tokens_per_s": limits,
        "share_of_roofline": median(records["at once"]) / limits[load.requests],
        "equal_answers": [equal, total],
        "follow_up": _follow_up(model, draw),
        "gaps": _gaps_beside_reading(model, load, images, draw),
        "machine": machine,
        "environment": describe_environment(model.device.type),
    }


def _prompt(model: Cobra, num_tokens: int, draw: random.Random) -> Prompt:
    """A question of about so many tokens: as many letters as that takes."""
    letters = ""
    while (prompt := Prompt(model, [Message("user", (letters or "a",))])).num_tokens < num_tokens:
        letters += "".join(draw.choices(string.ascii_lowercase, k=max(1, num_tokens - prompt.num_tokens)))
    return prompt


def _submit(engine: Engine, prompt: Prompt, new_tokens: int) -> _Told:
    told = _Told()
    engine.submit(
        Request(
            prompt=prompt,
            sampler=Sampler(1),
            max_new_tokens=new_tokens,
            ignores_end=True,
            on_text=told.pieces.append,
            on_end=told.end,
        )
    )
    return told


def _answer(engine: Engine, prompts: Sequence[Prompt], new_tokens: int) -> tuple[float, list[str]]:
    """Seconds until the last of some answers is there, and the answers."""
    began = time.perf_counter()
    told = [_submit(engine, prompt, new_tokens) for prompt in prompts]
    while any(one.outcome is None for one in told):
        engine.step()
    seconds = time.perf_counter() - began
    while engine.step():  # what is read behind the answers
        pass
    for one in told:
        if one.outcome is not None and one.outcome.error is not None:
            raise one.outcome.error
    return seconds, ["".join(one.pieces) for one in told]


def _limit(model: Cobra, load: Load, batch: int, machine: dict) -> float:
    """Tokens a second that memory and arithmetic allow: weights are read once for all rows, states of each."""
    cost, form = LMCost(model.config.lm), FORMS[model.dtype]
    context = load.prompt_tokens + load.new_tokens // 2
    traffic = cost.parameters * model.dtype.itemsize + batch * cost.state_traffic_bytes(context, model.dtype.itemsize)
    flops = batch * cost.decode_flops(context)
    return batch / max(traffic / machine["read_bytes_per_s"], flops / gemm_peak(machine, form))


def _follow_up(model: Cobra, draw: random.Random, rounds: int = 15) -> dict:
    """Seconds to the first token of a question behind a known conversation, and those of reading its tokens alone."""
    engine = Engine(model, slots=1)
    known = [Message("user", ("Tell me a story. " * 20,)), Message("assistant", ("Once upon a time.",))]
    first, alone, new_tokens = [], [], 0
    for number in range(rounds + 1):
        question = "".join(draw.choices(string.ascii_lowercase, k=40))
        told = _submit(engine, Prompt(model, [*known, Message("user", (question,))]), 1)
        while engine.step():
            pass
        if number == 0 or told.outcome is None:
            continue  # the conversation itself was read
        first.append(engine.counters.first_tokens[-1])
        new_tokens = told.outcome.prompt_tokens - told.outcome.cached_tokens
        state = model.lm.allocate_state(1)
        ids = torch.randint(model.config.lm.vocab_size, (1, new_tokens), device=model.device)
        began = time.perf_counter()
        with torch.no_grad():
            int(model.lm(ids, state=state, logits_to_keep=1, overwrite_state=True)[0].argmax())
        alone.append(time.perf_counter() - began)
    ratio = median(a / b for a, b in zip(first, alone, strict=True))
    return {"new_tokens": new_tokens, "first_s": median(first), "alone_s": median(alone), "ratio": ratio}


def _gaps_beside_reading(model: Cobra, load: Load, images: int, draw: random.Random) -> dict:
    """Seconds between tokens of four answers, alone and while a conversation with many images is read."""
    engine = Engine(model, slots=8, cache_bytes=0)
    short = [_prompt(model, load.prompt_tokens, draw) for _ in range(4)]
    _answer(engine, short, load.new_tokens)
    engine.counters.gaps.clear()
    _answer(engine, short, load.new_tokens)
    alone = list(engine.counters.gaps)
    engine.counters.gaps.clear()
    long = _long_reading(model, images)
    told = [_submit(engine, prompt, load.new_tokens) for prompt in short]
    slow = _submit(engine, long, 1)
    began = time.perf_counter()
    while any(one.outcome is None for one in told):
        engine.step()
    beside, is_read = list(engine.counters.gaps), slow.outcome is not None
    while slow.outcome is None:
        engine.step()
    seconds = time.perf_counter() - began
    return {
        "alone": {"median": median(alone), "p99": percentile(alone, 0.99)},
        "beside": {"median": median(beside), "p99": percentile(beside, 0.99), "most": max(beside)},
        "images": images,
        "prompt_tokens": long.num_tokens,
        "was_read_before_the_answers_ended": is_read,
        "seconds_until_read": seconds,
    }


def _long_reading(model: Cobra, images: int) -> Prompt:
    pictures = []
    for image in pictures_of(images):
        buffer = io.BytesIO()
        image.save(buffer, "png")
        pictures.append(Picture.of(model, buffer.getvalue()))
    return Prompt(model, [Message("user", (*pictures, "What is it?"))])
