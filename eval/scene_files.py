"""A data set of drawn pictures on the disk: pictures, LLaVA rows and meta.json, whole or not there."""

import contextlib
import functools
import json
import math
import multiprocessing
import signal
import tempfile
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image

from eval.scene_questions import Question
from vision_scan.errors import UserError

Split = Literal["train", "test"]
MIN_SIDE = 64  # of a canvas, in pixels
SCENES_PER_TASK = 64  # of a process

# Where the first question of a conversation stands: a model that reads once, from left to right, knows what it is asked
# as it reads the picture only if the question stands in front.
QUESTION_PLACES = {"last": "<image>\n{0}", "first": "{0}\n<image>", "both": "{0}\n<image>\n{0}"}


@dataclass(frozen=True, kw_only=True, eq=False)
class Drawn:
    """What one place of a plan becomes: a picture, its questions, and its rows for each file of rows.

    `name` is the picture's path below images/, without its ending; `image` (height, width, 3) uint8.
    """

    name: str
    image: np.ndarray
    questions: Sequence[Question]
    rows: dict[str, list[dict]]


def check_counts(scenes: int, test_scenes: int, seed: int) -> None:
    """Raises UserError if a number of pictures is below 1 or the seed below 0."""
    if scenes < 1 or test_scenes < 1:
        raise UserError(f"{scenes} scenes and {test_scenes} test scenes: each must be 1 or more")
    if seed < 0:
        raise UserError(f"seed {seed}: must be 0 or more")


def check_canvas(canvas: tuple[int, int], least: int = MIN_SIDE) -> None:
    """Raises UserError if a side of the canvas (height, width) is below `least` pixels."""
    if min(canvas) < least:
        raise UserError(f"canvas {canvas[0]}x{canvas[1]}: both sides must be {least} or more")


def write_set(
    output_dir: str | Path,
    plan: Sequence[tuple],
    draw: Callable[[Any], Drawn],
    describe: Callable[[dict[str, list[Question]]], dict],
    *,
    files: Sequence[str],
    on_progress: Callable[[int, int], None] | None,
    workers: int,
) -> dict:
    """Draws all places of a plan into a new directory; nothing is left behind if it does not end well.

    `output_dir` receives images/NAME.png of every picture, FILE.json for every one of `files`, and meta.json.

    Args:
        plan: one tuple for each picture, its split first.
        draw: makes the picture of a place; sent to other processes if there are several.
        describe: contents of meta.json from the questions of each split.
        files: the files of rows, which are there even if empty.
        on_progress: called with (done, total) after every picture.
        workers: processes that draw.
    Returns:
        The contents of meta.json.
    Raises:
        UserError: if `output_dir` is not empty, or workers is below 1.
    """
    if workers < 1:
        raise UserError(f"{workers} workers: must be 1 or more")
    output = Path(output_dir).resolve()
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output_dir} exists and is not an empty directory: name another")
    output.parent.mkdir(parents=True, exist_ok=True)
    rows: dict[str, list[dict]] = {file: [] for file in files}
    asked: dict[str, list[Question]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as temporary:
        draft = Path(temporary) / "scenes"
        draft.mkdir()
        with _pool(min(workers, math.ceil(len(plan) / SCENES_PER_TASK))) as draw_all:
            drawn = draw_all(functools.partial(_save, draft / "images", draw), plan)
            for done, (place, (questions, more)) in enumerate(zip(plan, drawn, strict=True), start=1):
                asked[place[0]] += questions
                for file, some in more.items():
                    rows[file] += some
                if on_progress is not None:
                    on_progress(done, len(plan))
        meta = describe(asked)
        for file, content in rows.items():
            (draft / f"{file}.json").write_text(json.dumps(content), encoding="utf-8")
        (draft / "meta.json").write_text(json.dumps(meta, indent=2) + "\n", encoding="utf-8")
        draft.replace(output)
    return meta


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[Callable]:
    """A `map` over that many processes; what has not begun when the block fails is dropped."""
    if workers == 1:
        yield map
        return
    interrupts_are_for_us = signal.signal, (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), *interrupts_are_for_us)
    try:
        yield functools.partial(pool.map, chunksize=SCENES_PER_TASK)
    finally:
        # A second interrupt does not hurry it: what is being drawn would be written into a folder that is removed.
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.signal(signal.SIGINT, signal.SIG_IGN) if is_main else None
        pool.shutdown(cancel_futures=True)
        if is_main:
            signal.signal(signal.SIGINT, before)


def _save(
    images: Path, draw: Callable[[Any], Drawn], place: tuple
) -> tuple[Sequence[Question], dict[str, list[dict]]]:
    """Draws a picture into its file, so that no pixels travel between processes."""
    drawn = draw(place)
    path = images / f"{drawn.name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(drawn.image).save(path, compress_level=1)
    return drawn.questions, drawn.rows


def llava_row(name: str, turns: Iterable[tuple[str, str]], place: str = "last") -> dict:
    """A LLaVA row of (question, answer) turns; the picture stands beside the first question, as a key of
    QUESTION_PLACES says."""
    (question, answer), *others = turns
    pairs = [(QUESTION_PLACES[place].format(question), answer), *others]
    conversations = [
        {"from": sender, "value": text}
        for pair in pairs
        for sender, text in zip(("human", "gpt"), pair, strict=True)
    ]
    return {"id": name, "image": f"{name}.png", "conversations": conversations}


def question_row(name: str, question: Question, place: str = "last") -> dict:
    """A row of the test set: one question, with its "kind"."""
    row = llava_row(name, [(question.text, question.answer)], place)
    return {**row, "id": f"{name}/{question.kind}", "kind": question.kind}
