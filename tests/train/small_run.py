"""A data set and settings so small that a training step takes milliseconds."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from train.data.dataset import Dataset, open_dataset
from train.metrics import read_metrics
from train.objectives import OBJECTIVES
from train.recipes import RECIPES
from train.settings import RunConfig, change

ROOT = Path(__file__).resolve().parents[2]
COLOURS = {"red": (200, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 200)}
LAYERS = [
    {"kind": "mamba2", "d_state": 8, "headdim": 16, "chunk_size": 16},
    {"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "headdim": 16},
    {"kind": "mlp", "d_ff": 32},
]
MODEL = (
    "model.image.height=16",
    "model.image.width=16",
    "model.vision_encoder.d_model=16",
    "model.vision_encoder.depth=1",
    'model.connector={"kind": "mlp"}',
    "model.lm.d_model=32",
    f"model.lm.layers={json.dumps(LAYERS)}",
)
COURSE = (
    "init.residual=1",  # so that the layers count from the first step on
    "tokenizer.kind=bytes",
    "train.dtype=float32",
    "train.steps=6",
    "train.batch_size=4",
    "train.save_every=100",
)
SETTINGS = (*MODEL, *COURSE)


def write_data(folder: Path, num_rows: int = 10) -> Path:
    """LLaVA rows on images with one coloured half, of two lengths; every fifth has no image."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(num_rows):
        colour = draw.choice(sorted(COLOURS))
        left = draw.random() < 0.5
        turns = [
            {"from": "human", "value": "<image>\ncolour?"},
            {"from": "gpt", "value": colour},
            {"from": "human", "value": "left?"},
            {"from": "gpt", "value": "yes" if left else "no"},
        ]
        image = Image.new("RGB", (20, 16))
        image.paste(COLOURS[colour], (0, 0, 10, 16) if left else (10, 0, 20, 16))
        image.save(folder / f"{index}.png")
        box = [0.0, 0.0, 0.5, 1.0] if left else [0.5, 0.0, 1.0, 1.0]
        regions = [{"box": box, "labels": {"colour": colour}}]
        row = {"id": f"row{index}", "image": f"{index}.png", "regions": regions}
        row["conversations"] = turns[: draw.choice((2, 4))]
        if index % 5 == 4:
            del row["image"]
            row["conversations"] = [
                {"from": "human", "value": "2+2?"},
                {"from": "gpt", "value": "4"},
            ]
        rows.append(row)
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    return path


def write_region_data(folder: Path, num_rows: int = 10) -> Path:
    """The rows of `write_data` that have an image."""
    path = write_data(folder, num_rows)
    rows = [row for row in json.loads(path.read_text()) if "image" in row]
    path.write_text(json.dumps(rows))
    return path


def write_preference_data(folder: Path, num_rows: int = 10) -> Path:
    """Rows of preference data on such images: with one or two of them, a video of three frames, or none; with one
    question or a second one, and answers of many lengths."""
    draw = random.Random(1)
    path = write_data(folder, num_rows)
    rows = []
    for index, row in enumerate(json.loads(path.read_text())):
        names = [f"{index}.png", f"{(index + 1) % num_rows}.png", f"{(index + 2) % num_rows}.png"]
        question = {"from": "human", "value": "what" * draw.randint(1, 3)}
        new = {"id": row["id"], "conversations": [question], "chosen": row["conversations"][1]["value"]}
        new["rejected"] = {"from": "gpt", "value": "I do not know " * draw.randint(1, 4)}
        if index % 4 < 2:
            new["image"] = names[: 1 + index % 2]
        elif index % 4 == 2:
            new["video"] = names
        marks = {0: "<image>\n", 1: "<image> <image>", 2: "<video>"}.get(index % 4, "")
        question["value"] = marks + question["value"]
        if index % 3 == 1:
            new["conversations"] += [{"from": "gpt", "value": "Well."}, {"from": "human", "value": "So?"}]
        rows.append(new)
    path.write_text(json.dumps(rows))
    return path


def small_config(data: Path, *changes: str, recipe: str = "tiny") -> RunConfig:
    """A recipe at a size for tests."""
    return change(RECIPES[recipe](), [*SETTINGS, f"data.path={data}", *changes])


def load(config: RunConfig) -> Dataset:
    """The rows of a run."""
    return open_dataset(config.data, OBJECTIVES[config.train.objective].needs)


def losses(output: Path) -> list[float]:
    """The loss of every step of a run."""
    return [record["loss"] for record in read_metrics(output)]


def command(data: Path, output: Path, *changes: str) -> list[str]:
    """The command line of a small run."""
    settings = [*SETTINGS, f"data.path={data}", *changes]
    sets = [word for setting in settings for word in ("--set", setting)]
    return [sys.executable, "-m", "train", "--recipe", "tiny", "--output", str(output), *sets]


def environment(**extra: str) -> dict[str, str]:
    """The environment of a process that is started from the checkout, with as many threads as this one:
    another number would sum in another order."""
    threads = str(torch.get_num_threads())
    return {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": str(ROOT), **extra}


def call(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    """Runs a command line to its end."""
    return subprocess.run(
        arguments, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=1200
    )
