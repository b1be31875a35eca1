"""Many clients of a server that come and go: answers stay right, memory flat, no slot is lost.

`python -m tests.cobra.serve_soak --clients 200 --seconds 120 --output FILE.json` does it at length and writes down what
happened.
"""

import argparse
import asyncio
import json
import random
import re
import tempfile
import time
from pathlib import Path
from typing import Any

import httpx

import cobra
from cobra.progress import progress
from cobra.serve.engine import percentile
from tests.cobra.serve_ways import NAME, fresh, image, lively, png, prompt, start_server, user, wait_until

KINDS = 12  # of conversations, whose answers are known
NEW_TOKENS = 64


def soak(clients: int, seconds: float, seed: int = 0) -> dict[str, Any]:
    """Lets clients ask a server, as a stream or not, and hang up at random. Memory may grow in the first third of the
    time.

    Returns:
        how many answers were right, were hung up on and were refused; memory, times and the server's counters.
    Raises:
        AssertionError: if an answer is wrong, a slot is lost, or memory grows by more than 5 percent.
    """
    model = lively(layers=cobra.PRESETS["tiny"].lm.layers[:2])
    conversations = [_conversation(number) for number in range(KINDS)]
    expected = [fresh(model, prompt(model, *turns), NEW_TOKENS) for turns in conversations]
    told = {"right": 0, "hung_up": 0, "refused": 0}
    taken: list[float] = []
    memory: list[int] = []
    with tempfile.TemporaryDirectory() as folder:
        cobra.save(model, Path(folder) / NAME)
        options = ("--slots", "8", "--max-waiting", str(clients // 2), "--cache-mb", "2", "--dtype", "float32")
        server, url = start_server("--model", str(Path(folder) / NAME), *options)
        try:
            asyncio.run(_all(url, server.pid, clients, seconds, seed, conversations, expected, told, taken, memory))
            wait_until(lambda: _metrics(url)["cobra_running"] == _metrics(url)["cobra_waiting"] == 0)
            metrics = _metrics(url)
        finally:
            server.terminate()
            server.wait(30)
    settled = memory[len(memory) // 3 :]
    growth = max(settled[-3:]) / max(settled[:3]) - 1
    assert metrics["cobra_requests_failed_total"] == 0
    assert metrics["cobra_cache_bytes"] <= metrics["cobra_cache_budget_bytes"]
    assert told["right"] > clients and metrics["cobra_requests_cancelled_total"] > 0
    assert growth < 0.05, f"memory grew by {growth:.1%}: {memory}"
    return {
        "clients": clients,
        "seconds": seconds,
        **told,
        "memory_mb": [round(nbytes / 1e6, 1) for nbytes in memory],
        "memory_growth": round(growth, 4),
        "seconds_to_answer": {"median": percentile(taken, 0.5), "p99": percentile(taken, 0.99)},
        "metrics": metrics,
    }


def _metrics(url: str) -> dict[str, float]:
    text = httpx.get(f"{url}/metrics").text
    return {name: float(value) for name, value in re.findall(r"^(\w+(?:\{.*\})?) (\S+)$", text, re.MULTILINE)}


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


async def _all(url, pid, clients, seconds, seed, conversations, expected, told, taken, memory) -> None:
    end, interval = time.monotonic() + seconds, min(1.0, seconds / 20)
    with progress("soak", int(seconds / interval)) as advance:
        async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=clients)) as client:

            async def watch() -> None:
                while time.monotonic() < end:
                    await asyncio.sleep(interval)
                    memory.append(_resident_bytes(pid))
                    advance(1)

            async def one(number: int) -> None:
                draw = random.Random(f"{seed} {number}")
                while time.monotonic() < end:
                    kind = draw.randrange(KINDS)
                    messages, is_stream = _messages(conversations[kind]), draw.random() < 0.5
                    body = {"model": NAME, "messages": messages, "max_tokens": NEW_TOKENS, "temperature": 0}
                    body["stream"] = is_stream
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


def _resident_bytes(pid: int) -> int:
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
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
