"""How much of a training run is forward and backward passes: whole runs of `tiny` beside bare passes over batches that
are there already, alternating.

python benchmarks/train_overhead.py [--steps 40] [--rounds 5] [--set SECTION.FIELD=VALUE]...
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image

from cobra.memory import keep_freed_memory
from train.recipes import RECIPES
from train.run import prepare, run
from train.settings import RunConfig, change

NUM_ROWS = 512


def write_rows(folder: Path) -> Path:
    """Rows like the demo's: a picture of 224 x 224 pixels, a question or two."""
    rows = []
    for index in range(NUM_ROWS):
        generator = torch.Generator().manual_seed(index)
        pixels = torch.randint(0, 256, (28, 28, 3), generator=generator, dtype=torch.uint8).numpy()
        Image.fromarray(pixels).resize((224, 224)).save(folder / f"{index}.jpg")
        turns = [{"from": "human", "value": "<image>\nWhat digit is left of the red seven?"}]
        turns += [{"from": "gpt", "value": f"a green {index % 10}"}]
        turns += [{"from": "human", "value": "And below it?"}, {"from": "gpt", "value": "nothing"}] * (index % 3)
        rows.append({"id": str(index), "image": f"{index}.jpg", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder / "rows.json"


def bare_seconds(config: RunConfig, output: Path) -> float:
    """Seconds of a step's forward and backward passes, on batches that are there already."""
    loop, _ = prepare(config, output)
    steps = [loop.source(step) for step in range(loop.num_steps)]
    for batches in (steps[0], *steps):
        if batches is steps[0]:
            began = time.perf_counter()
        for index, batch in enumerate(batches):
            loop.engine.backward(batch, 1.0, last=index == len(batches) - 1)
        loop.engine.discard()
    return (time.perf_counter() - began) / len(steps)


def run_seconds(config: RunConfig, output: Path) -> tuple[float, float]:
    """Seconds of a step of a whole run behind its first steps, and how long of it the step waited for data."""
    assert run(config, output)
    records = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()][5:-1]
    return tuple(statistics.mean(record[key] for record in records) / 1000 for key in ("step_ms", "data_ms"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", action="append", default=[])
    options = parser.parse_args()
    keep_freed_memory()
    shares, waits = [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = [f"data.path={write_rows(folder)}", f"train.steps={options.steps}", "train.engine=plain"]
        config = change(RECIPES["tiny"](), [*settings, "tokenizer.kind=bytes", *options.set])
        for number in range(options.rounds):
            bare = bare_seconds(config, folder / f"bare-{number}")
            whole, data = run_seconds(config, folder / f"run-{number}")
            shares.append(bare / whole)
            waits.append(data / whole)
            told = ", ".join(f"{1000 * value:.1f}" for value in (bare, whole, data))
            print(f"round {number + 1}: ms of bare passes, run, data: {told}")
    print(f"share of bare passes: median {statistics.median(shares):.1%} ({min(shares):.1%} to {max(shares):.1%})")
    print(f"share of waiting for data: median {statistics.median(waits):.1%}; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
