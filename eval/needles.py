"""Needles: a row of pictures of which one shows a digit, and the question which digit it was.

How much of what it has seen does a reader still know? The pictures around the needle are the same darkened photographs
with clutter as behind the digits (scenes.py), and only the digit is asked for, behind all of them. The answers are
exactly balanced, so that guessing scores a tenth. Picture and row `index` of a seed and split are always the same.
"""

import functools
from collections.abc import Callable, Sequence
from importlib.metadata import version as package_version
from pathlib import Path
from typing import Any

import numpy as np

from eval.scene_files import Drawn, Split, check_canvas, check_counts, write_set
from eval.scene_questions import Question
from eval.scenes import PACKAGES, draw_background, draw_digits, region, split_scans, to_bytes
from vision_scan.errors import UserError

VERSION = 1  # of the pictures and rows that a seed stands for
CANVAS, MIN_SIDE = (32, 32), 32
LENGTHS = (1, 3, 10, 30, 100, 300, 1000)
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SCALE = 1.5  # of the digits, which stand alone
QUESTION, COLOUR_QUESTION = "Which digit is shown?", "What colour is the digit?"
HAY = 2000  # pictures without a digit of a split, which its rows draw from


def name_group(length: int, depth: float) -> str:
    """Of a test row: "100@0.25" is a needle with a quarter of its 100 pictures in front of it."""
    return f"{length}@{depth:g}"


def split_group(group: str) -> tuple[int, float]:
    """The length and depth that make a group's name; ValueError if it is none."""
    length, _, depth = group.partition("@")
    return int(length), float(depth)


def num_pictures(
    train: int,
    test: int,
    *,
    longest: int = 1,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    hay: int = HAY,
) -> int:
    """How many `build` draws."""
    return train + test * len(lengths) * len(depths) + hay * ((longest > 1) + (max(lengths) > 1))


def build(
    output_dir: str | Path,
    train: int,
    test: int,
    seed: int,
    *,
    longest: int = 1,
    lengths: Sequence[int] = LENGTHS,
    depths: Sequence[float] = DEPTHS,
    hay: int = HAY,
    canvas: tuple[int, int] = CANVAS,
    on_progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> dict:
    """Writes a data set of needles; nothing is left behind if it does not end well.

    `output_dir` receives images/{train,test}/{needle,hay}/NNNNNN.png; train.json and test.json (LLaVA rows with a list
    of pictures each; those of train.json also ask for the digit's colour and, where the digit is alone, have "regions";
    those of test.json have a "kind", see `name_group`) and meta.json.

    Args:
        train: rows to train on; they have 1 to `longest` pictures, short rows as many as long ones by the logarithm.
        test: rows of each length and depth.
        lengths: numbers of pictures of test rows.
        depths: shares of the other pictures that stand in front of the needle, 0 to 1.
        hay: pictures without a digit of each split, which its rows draw from, one more than once if need be.
        canvas: height and width in pixels.
        on_progress: called with (done, total) after every picture.
        workers: processes that draw; what they draw does not depend on their number.
    Returns:
        The contents of meta.json.
    Raises:
        UserError: if `output_dir` is not empty, or a number is out of range.
    """
    check_counts(train, test, seed)
    check_canvas(canvas, MIN_SIDE)
    if min(longest, hay, *lengths, len(lengths)) < 1:
        raise UserError(f"lengths {list(lengths)}, longest {longest}, hay {hay}: all must be 1 or more")
    if not depths or not all(0 <= depth <= 1 for depth in depths):
        raise UserError(f"depths {list(depths)}: must be from 0 (the first picture) to 1 (the last)")
    groups = [(length, depth) for length in lengths for depth in depths]
    needles: dict[Split, int] = {"train": train, "test": test * len(groups)}
    most: dict[Split, int] = {"train": longest, "test": max(lengths)}
    plan = [(split, "needle", index) for split in needles for index in range(needles[split])]
    plan += [(split, "hay", index) for split in most if most[split] > 1 for index in range(hay)]

    def describe(asked: dict[str, list[Question]]) -> dict:
        return {
            "version": VERSION,
            "seed": seed,
            "canvas": list(canvas),
            "rows": {"train": train, "test": test},
            "longest": longest,
            "lengths": list(lengths),
            "depths": list(depths),
            "chance": {str(length): 0.1 for length in lengths},
            "packages": {name: package_version(name) for name in PACKAGES},
        }

    return write_set(
        output_dir,
        plan,
        functools.partial(_draw, seed, canvas, longest, groups, hay),
        describe,
        files=("train", "test"),
        on_progress=on_progress,
        workers=workers,
    )


def _draw(
    seed: int,
    canvas: tuple[int, int],
    longest: int,
    groups: Sequence[tuple[int, float]],
    hay: int,
    place: tuple[Split, str, int],
) -> Drawn:
    """A picture, and the row of a needle."""
    split, what, index = place
    stream = [seed, ("train", "test").index(split), ("needle", "hay").index(what)]
    rng = np.random.default_rng([*stream, index])
    pixels = draw_background(rng, canvas)
    name = f"{split}/{what}/{index:06d}"
    if what == "hay":
        return Drawn(name=name, image=to_bytes(pixels), questions=[], rows={})
    group = groups[index % len(groups)]
    turn = index // len(groups) if split == "test" else index  # in ten of which each digit comes once
    digits = np.random.default_rng([*stream, 2, turn // 10, index % len(groups) if split == "test" else 0])
    value = int(digits.permutation(10)[turn % 10])
    (digit,) = draw_digits(rng, pixels, split_scans(seed)[split], [value], SCALE)
    if split == "train":
        length = round(np.exp(rng.uniform(0, np.log(longest + 0.5))))
        position = int(rng.integers(length))
    else:
        length, depth = group
        position = round(depth * (length - 1))
    others = [f"{split}/hay/{i:06d}.png" for i in rng.integers(hay, size=length - 1)]
    images = [*others[:position], f"{name}.png", *others[position:]]
    asked = [Question(kind="digit", text=QUESTION, answer=str(value))]
    row: dict[str, Any] = {"id": name, "image": images}
    if split == "train":
        asked.insert(int(rng.integers(2)), Question(kind="colour", text=COLOUR_QUESTION, answer=digit.colour))
        if length == 1:
            row["regions"] = [region(digit, canvas, digit=str(value), colour=digit.colour)]
    else:
        row["kind"] = name_group(*group)
    marks = "<image>\n" * length
    row["conversations"] = [
        {"from": sender, "value": text}
        for number, question in enumerate(asked)
        for sender, text in (("human", (marks if number == 0 else "") + question.text), ("gpt", question.answer))
    ]
    return Drawn(name=name, image=to_bytes(pixels), questions=asked, rows={split: [row]})
