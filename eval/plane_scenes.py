"""Plane scenes: what the study of scan orders asks, from a control that needs no plane to curves.

Each picture has one question with a short answer. Nothing is downloaded. Picture `index` of a kind,
seed and split is always the same, however many are drawn, and the answers are exactly balanced: every
answer once in each run of as many pictures as there are answers.
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version as package_version
from pathlib import Path

import numpy as np

from eval.plane_curves import Difficulty, draw_trace
from eval.plane_shapes import COLOURS, MIN_SIDE, RELATIONS, Grid, Picture, draw_colour, draw_count, draw_relation
from eval.scene_files import Drawn, Split, check_canvas, check_counts, llava_row, question_row, write_set
from eval.scene_questions import Question, guess_from_text
from vision_scan.errors import UserError, choose

VERSION = 2  # of the pictures and questions that a seed stands for
PACKAGES = ("numpy", "pillow")  # whose versions meta.json records
DEFAULT = Difficulty()
CANVAS = 64, 64


@dataclass(frozen=True)
class Kind:
    """A kind of question: its answers, and what draws picture and question for one of them."""

    answers: Callable[[Difficulty], Sequence[str]]
    draw: Callable[[np.random.Generator, tuple[int, int], str, Difficulty], Picture]


KINDS: Mapping[str, Kind] = {
    "colour": Kind(lambda _: tuple(COLOURS), lambda *drawn: draw_colour(*drawn[:3])),
    "relation": Kind(lambda _: tuple(RELATIONS), lambda *drawn: draw_relation(*drawn[:3])),
    "count": Kind(lambda _: ("1", "2", "3", "4", "5"), lambda *drawn: draw_count(*drawn[:3])),
    "trace": Kind(lambda difficulty: difficulty.colours, draw_trace),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class PlaneScene:
    """A picture (height, width, 3) uint8, its question, and what stands where (see Picture)."""

    image: np.ndarray
    question: Question
    regions: list[dict]


def make_scene(
    seed: int,
    split: Split,
    kind: str,
    index: int,
    canvas: tuple[int, int] = CANVAS,
    difficulty: Difficulty = DEFAULT,
) -> PlaneScene:
    """Draws picture `index` of a kind; canvas is (height, width) in pixels, each at least 48.

    Raises:
        UserError: if the canvas is too small or the kind unknown.
    """
    check_canvas(canvas, MIN_SIDE)
    chosen = choose("kind", kind, KINDS)
    stream = [seed, ("train", "test").index(split), list(KINDS).index(kind)]
    answers = chosen.answers(difficulty)
    run, place = divmod(index, len(answers))
    answer = str(np.random.default_rng([*stream, 0, run]).permutation(answers)[place])
    picture = chosen.draw(np.random.default_rng([*stream, 1, index]), canvas, answer, difficulty)
    question = Question(kind=kind, text=picture.question, answer=answer)
    return PlaneScene(image=picture.pixels, question=question, regions=picture.regions)


def build(
    output_dir: str | Path,
    train: int,
    test: int,
    seed: int,
    *,
    kinds: Sequence[str] = tuple(KINDS),
    canvas: tuple[int, int] = CANVAS,
    difficulty: Difficulty = DEFAULT,
    on_progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> dict:
    """Writes a data set of plane scenes; nothing is left behind if it does not end well.

    `output_dir` receives images/{train,test}/KIND/NNNNNN.png; train.json and test.json (LLaVA rows of one
    question, kinds interleaved; those of train.json with "regions", of test.json with their "kind") and meta.json.

    Args:
        train, test: pictures of each kind, each at least 1.
        kinds: keys of KINDS.
        canvas: height and width in pixels.
        difficulty: of the curves.
        on_progress: called with (done, total) after every picture.
        workers: processes that draw; what they draw does not depend on their number. With more than
            one, a script needs the usual `if __name__ == "__main__":`.
    Returns:
        The contents of meta.json.
    Raises:
        UserError: if `output_dir` is not empty, a kind is unknown or named twice, or a number is out of range.
    """
    check_counts(train, test, seed)
    check_canvas(canvas, MIN_SIDE)
    if "trace" in kinds:
        difficulty.check_room(Grid(canvas))
    for kind in kinds:
        choose("kind", kind, KINDS)
    if not kinds or len(set(kinds)) < len(kinds):
        raise UserError(f"kinds {','.join(kinds)!r}: name each once, and at least one of {', '.join(KINDS)}")

    def describe(asked: dict[str, list[Question]]) -> dict:
        return {
            "version": VERSION,
            "seed": seed,
            "canvas": list(canvas),
            "kinds": list(kinds),
            "difficulty": asdict(difficulty),
            "questions": {split: Counter(q.kind for q in asked[split]) for split in asked},
            "answers": {kind: list(KINDS[kind].answers(difficulty)) for kind in kinds},
            "chance": guess_from_text(asked["train"], asked["test"], kinds),
            "packages": {name: package_version(name) for name in PACKAGES},
        }

    counts: dict[Split, int] = {"train": train, "test": test}
    return write_set(
        output_dir,
        [(split, kind, index) for split in counts for index in range(counts[split]) for kind in kinds],
        functools.partial(_draw_scene, seed, canvas, difficulty),
        describe,
        files=("train", "test"),
        on_progress=on_progress,
        workers=workers,
    )


def _draw_scene(
    seed: int, canvas: tuple[int, int], difficulty: Difficulty, place: tuple[Split, str, int]
) -> Drawn:
    split, kind, index = place
    scene = make_scene(seed, split, kind, index, canvas, difficulty)
    question = scene.question
    name = f"{split}/{kind}/{index:06d}"
    if split == "test":
        row = question_row(name, question)
    else:
        row = {**llava_row(name, [(question.text, question.answer)]), "regions": scene.regions}
    return Drawn(name=name, image=scene.image, questions=[question], rows={split: [row]})
