"""Many clients of a server that come and go: answers stay right, memory flat, no slot is lost.

`python -m tests.cobra.serve_soak --clients 200 --seconds 120 --output FILE.json` does it at length and writes down what
happened.
"""

import argparse
import asyncio
import gc
import json
import random
import time
from pathlib import Path
from typing import Any

import httpx

import cobra
from cobra.progress import progress
from cobra.serve.app import Limits
from cobra.serve.engine import percentile
from tests.cobra.serve_ways import fresh, lively, png, prompt
from tests.cobra.test_serve import NAME, image, serving, user, wait_until

KINDS = 12  # of conversations, whose answers are known
NEW_TOKENS = 24


def soak(clients: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Lets clients ask, as a stream or not, and hang up at random. Memory may grow in the first third of the time.

    Returns:
        how many answers were right, were hung up on and were refused; memory, times and the server's counters.
    Raises:
        AssertionError: if an answer is wrong, a slot is lost, or memory grows by more than 5 percent.
    """
    model = lively(layers=cobra.PRESETS["tiny"].lm.layers[:2])
    conversations = [_conversation(number) for number in range(KINDS)]
    expected = [fresh(model, prompt(model, *turns), NEW_TOKENS) for turns in conversations]
    told = {"right": 0, "hung_up": 0, "refused": 0}
    seconds_taken: list[float] = []
    memory: list[int] = []
    limits = Limits(new_tokens=NEW_TOKENS)
    with serving(model, limits, slots=8, max_waiting=max(4, clients // 2), cache_bytes=2 * 2**20) as (url, engine):
        asyncio.run(_all(url, clients, seconds, seed, conversations, expected, told, seconds_taken, memory))
        wait_until(lambda: engine.num_running == engine.num_waiting == 0)
        assert engine.slots.used == 0 and not engine._decoding and engine.cache.nbytes <= engine.cache.budget
        counters = {name: value for name, value in vars(engine.counters).items() if isinstance(value, int)}
        ended = counters["cancelled"] + counters["failed"] + told["right"]
        assert counters["failed"] == 0 and counters["requests"] >= ended - told["hung_up"]
        gap = percentile(engine.counters.gaps, 0.99)
    settled = memory[len(memory) // 3 :]
    growth = max(settled[-3:]) / max(settled[:3]) - 1
    assert told["right"] > clients and told["hung_up"] > 0
    assert growth < 0.05, f"memory grew by {growth:.1%}: {memory}"
    return {
        "clients": clients,
        "seconds": seconds,
        **told,
        "memory_mb": [round(nbytes / 1e6, 1) for nbytes in memory],
        "memory_growth": round(growth, 4),
        "seconds_to_answer": {"median": percentile(seconds_taken, 0.5), "p99": percentile(seconds_taken, 0.99)},
        "seconds_between_tokens_p99": gap,
        "counters": counters,
    }


def _conversation(number: int) -> list:
    turns: list = [[*[png(number * 10 + place) for place in range(number % 3)], f"Question {number}"]]
    return [*turns, "An answer", "And now?"] if number % 4 == 3 else turns


def _messages(turns: list) -> list[dict]:
    return [
        user(*[image(part) if isinstance(part, bytes) else part for part in turn])
        if isinstance(turn, list)
        else {"role": ("user", "assistant")[place % 2], "content": turn}
        for place, turn in enumerate(turns)
    ]


async def _all(url, clients, seconds, seed, conversations, expected, told, taken, memory) -> None:
    end = time.monotonic() + seconds
    with progress("soak", max(1, int(seconds))) as advance:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=clients)) as client:

            async def watch() -> None:
                while time.monotonic() < end:
                    await asyncio.sleep(min(1.0, seconds / 20))
                    gc.collect()
                    memory.append(_resident_bytes())
                    advance(1)

            async def one(number: int) -> None:
                draw = random.Random(f"{seed} {number}")
                while time.monotonic() < end:
                    kind = draw.randrange(KINDS)
                    body = {"model": NAME, "messages": _messages(conversations[kind]), "temperature": 0}
                    body["stream"] = draw.random() < 0.5
                    began = time.monotonic()
                    text = await _ask(client, url, body, draw.random() * 0.5 if draw.random() < 0.3 else None)
                    if text is None or isinstance(text, int):
                        told["hung_up" if text is None else "refused"] += 1
                        await asyncio.sleep(draw.random() * 0.2)
                        continue
                    assert text == expected[kind], (kind, text, expected[kind])
                    told["right"] += 1
                    taken.append(time.monotonic() - began)

            await asyncio.gather(watch(), *(one(number) for number in range(clients)))


async def _ask(client: httpx.AsyncClient, url: str, body: dict, patience: float | None) -> str | int | None:
    """The answer; the status of a refusal; None where the client hung up."""
    try:
        return await asyncio.wait_for(_wait(client, url, body), patience)
    except asyncio.TimeoutError:
        return None


async def _wait(client: httpx.AsyncClient, url: str, body: dict) -> str | int:
    async with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        if response.status_code == 503:
            return 503
        assert response.status_code == 200, await response.aread()
        if not body["stream"]:
            return json.loads(await response.aread())["choices"][0]["message"]["content"]
        events = [line[6:] async for line in response.aiter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    return "".join(json.loads(event)["choices"][0]["delta"].get("content") or "" for event in events[:-1])


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    result = soak(options.clients, options.seconds)
    print(json.dumps({name: value for name, value in result.items() if name != "memory_mb"}, indent=2))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
