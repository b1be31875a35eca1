"""Digit scenes: real handwritten digits over real photographs, with questions whose truth is known.

A scene holds one to six different digits (scikit-learn's 8 x 8 scans, enlarged), each in one of six
colours, over a darkened crop of a photograph that scikit-learn or scikit-image carries, sometimes
with clutter. Nothing is downloaded. Scene `index` of a seed and split is always the same picture
with the same questions, however many are made; scans of the test split never occur in training.

Centres are at least `ORDER_GAP` apart in x, so that the order of reading is plain, and none stands
near a border of the 3 x 3 cells that positions are named after; see scene_questions.py for what is
asked.
"""

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib.metadata import version as package_version
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from eval.scene_files import MIN_SIDE, Drawn, Split, check_canvas, check_counts, llava_row, question_row, write_set
from eval.scene_questions import KINDS, Digit, Question, ask, drill, guess_from_text, order_turns
from vision_scan.errors import UserError

VERSION = 3  # of the pictures and questions that a seed stands for
COLOURS = {
    "red": (240, 45, 45),
    "green": (50, 215, 70),
    "blue": (70, 120, 255),
    "yellow": (250, 225, 40),
    "magenta": (240, 75, 235),
    "white": (245, 245, 245),
}
PHOTOGRAPHS = (
    *("astronaut", "brick", "chelsea", "coffee", "grass", "gravel", "hubble_deep_field", "rocket"),
    *("china.jpg", "flower.jpg"),
)
PACKAGES = ("numpy", "pillow", "scikit-learn", "scikit-image")  # whose versions meta.json records
EASY_DIGITS = 3  # scenes of at most so many are drilled
MAX_DIGITS = 6
_MISSING = (
    "digit scenes need scikit-learn and scikit-image, which are not installed: "
    "pip install 'cobra-vlm[eval]'"
)
TEST_SHARE = 0.2  # of the scans

# Lengths in pixels of a canvas whose shorter side is 64; larger canvases scale them.
HEIGHTS = {1: (16, 26), 2: (16, 26), 3: (15, 24), 4: (15, 22), 5: (14, 20), 6: (14, 18)}
ORDER_GAP = 6.0
CELL_MARGIN = 2.0
BOX_GAP = 1.0


@dataclass(frozen=True, kw_only=True, eq=False)
class Scene:
    """A picture (height, width, 3) uint8, its digits from left to right, and its questions.

    The first question of each kind is the one that the test set asks.
    """

    image: np.ndarray
    digits: tuple[Digit, ...]
    questions: tuple[Question, ...]


def make_scene(
    seed: int, split: Split, index: int, canvas: tuple[int, int] = (MIN_SIDE, MIN_SIDE)
) -> Scene:
    """Draws scene `index` of `seed`; canvas is (height, width), each at least 64.

    Raises:
        UserError: if the canvas is too small, or scikit-learn or scikit-image is not installed.
    """
    check_canvas(canvas)
    rng = np.random.default_rng([seed, ("train", "test").index(split), index])
    pixels = draw_background(rng, canvas)
    values = rng.choice(10, int(rng.integers(1, MAX_DIGITS + 1)), replace=False).tolist()
    digits = draw_digits(rng, pixels, split_scans(seed)[split], values)
    image = to_bytes(pixels)
    questions = ask(rng, digits, canvas, first_truth=index % 2 == 0)
    return Scene(image=image, digits=digits, questions=questions)


@functools.lru_cache(maxsize=4)
def split_scans(seed: int) -> dict[Split, tuple[np.ndarray, ...]]:
    """The scans of each split: for every value 0..9 the indices into `load_digits()`."""
    rng = np.random.default_rng(seed)
    split: dict[Split, list[np.ndarray]] = {"train": [], "test": []}
    for value in range(10):
        indices = rng.permutation(np.flatnonzero(_scans()[1] == value))
        num_test = round(TEST_SHARE * len(indices))
        split["test"].append(np.sort(indices[:num_test]))
        split["train"].append(np.sort(indices[num_test:]))
    return {name: tuple(indices) for name, indices in split.items()}


@functools.cache
def _scans() -> tuple[np.ndarray, np.ndarray]:
    """Scans (1797, 10, 10) float32 in 0..1, with an empty border, and their values (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UserError(_MISSING) from None
    scans, values = load_digits(return_X_y=True)
    scans = np.pad(scans.reshape(-1, 8, 8) / 16, ((0, 0), (1, 1), (1, 1)))
    return scans.astype(np.float32), values


@functools.cache
def _photographs() -> tuple[Image.Image, ...]:
    try:
        from skimage import data
        from sklearn.datasets import load_sample_image
    except ImportError:
        raise UserError(_MISSING) from None
    arrays = (
        load_sample_image(name) if name.endswith(".jpg") else getattr(data, name)()
        for name in PHOTOGRAPHS
    )
    return tuple(Image.fromarray(array).convert("RGB") for array in arrays)


def draw_background(rng: np.random.Generator, canvas: tuple[int, int]) -> np.ndarray:
    """A dark, half-grey crop of a photograph, maybe with clutter: (height, width, 3) float32."""
    height, width = canvas
    photograph = _photographs()[rng.integers(len(PHOTOGRAPHS))]
    largest = min(photograph.width / width, photograph.height / height)
    zoom = largest * rng.uniform(0.2, 1.0)
    left = rng.uniform(0, photograph.width - zoom * width)
    top = rng.uniform(0, photograph.height - zoom * height)
    box = (left, top, left + zoom * width, top + zoom * height)
    image = photograph.resize((width, height), Image.Resampling.BILINEAR, box, reducing_gap=1.5)
    if rng.random() < 0.5:
        _clutter(rng, image)
    pixels = np.asarray(image, dtype=np.float32)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    grey = pixels.mean(axis=2, keepdims=True)
    return (0.5 * pixels + 0.5 * grey) * rng.uniform(0.25, 0.45)


def _clutter(rng: np.random.Generator, image: Image.Image) -> None:
    """Long strokes and specks, which nobody takes for a digit; the background dims them later."""
    draw = ImageDraw.Draw(image)
    unit = min(image.size) / MIN_SIDE
    for _ in range(rng.integers(1, 6)):
        shade = tuple(rng.integers(60, 256, 3).tolist())
        x, y = rng.uniform(0, 1, 2) * image.size
        if rng.random() < 0.5:
            angle, length = rng.uniform(0, 2 * np.pi), rng.uniform(25, 60) * unit
            end = (x + length * np.cos(angle), y + length * np.sin(angle))
            draw.line([(x, y), end], fill=shade, width=max(1, round(unit * rng.uniform(0.6, 2))))
        else:
            radius = unit * rng.uniform(1, 3)
            draw.ellipse([x - radius, y - radius, x + radius, y + radius], fill=shade)


def to_bytes(pixels: np.ndarray) -> np.ndarray:
    """A picture as it is saved."""
    return np.clip(pixels + 0.5, 0, 255).astype(np.uint8)


def draw_digits(
    rng: np.random.Generator, pixels: np.ndarray, scans: tuple[np.ndarray, ...], values: Sequence[int], scale: float = 1
) -> tuple[Digit, ...]:
    """Paints one to six different digits into `pixels`; returns them from left to right.

    Args:
        scans: to choose from, by value.
        scale: of the digits, beside their usual height.
    """
    unit = min(pixels.shape[:2]) / MIN_SIDE
    chosen = [int(rng.choice(scans[value])) for value in values]
    inks = [_ink(scan, unit * scale * rng.uniform(*HEIGHTS[len(values)])) for scan in chosen]
    boxes = _place(rng, [ink.shape for ink in inks], pixels.shape[:2])
    digits = []
    for value, scan, ink, (x0, y0, x1, y1) in zip(values, chosen, inks, boxes, strict=True):
        colour = str(rng.choice(list(COLOURS)))
        shade = np.array(COLOURS[colour]) * rng.uniform(0.9, 1.0) + rng.uniform(-12, 12, 3)
        patch = pixels[y0:y1, x0:x1]
        patch += ink[..., None] * (shade.clip(0, 255).astype(np.float32) - patch)
        digits.append(Digit(value=value, colour=colour, box=(x0, y0, x1, y1), scan=scan))
    return tuple(sorted(digits, key=lambda digit: digit.x))


def _ink(scan: int, height: float) -> np.ndarray:
    """Opacity of a scan enlarged to about `height` rows and cut to its ink: (rows, columns)."""
    small = Image.fromarray(_scans()[0][scan])
    side = round(height * small.height / 8)
    opacity = np.asarray(small.resize((side, side), Image.Resampling.BICUBIC))
    opacity = np.clip(1.7 * opacity - 0.3, 0, 1)
    rows, columns = np.flatnonzero(opacity.max(1) > 0.2), np.flatnonzero(opacity.max(0) > 0.2)
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    rng: np.random.Generator, sizes: list[tuple[int, ...]], canvas: tuple[int, int]
) -> list[tuple[int, int, int, int]]:
    """Boxes for inks of (rows, columns) `sizes`: apart, in reading order, inside their cells.

    The cell of each is drawn first, so that all nine are about equally frequent.
    """
    unit = min(canvas) / MIN_SIDE
    while True:  # a full canvas can paint itself into a corner: begin again
        boxes: list[tuple[int, int, int, int]] = []
        for rows, columns in sizes:
            for _ in range(30):
                y0 = _in_third(rng, rows, canvas[0], unit)
                x0 = _in_third(rng, columns, canvas[1], unit)
                box = (x0, y0, x0 + columns, y0 + rows)
                if all(_are_apart(box, other, unit) for other in boxes):
                    boxes.append(box)
                    break
            else:
                break
        if len(boxes) == len(sizes):
            return boxes


def _in_third(rng: np.random.Generator, size: int, length: int, unit: float) -> int:
    """Start of a span of `size` within `length` whose centre is clear of the borders of thirds."""
    third = int(3 * rng.random())
    low = max(third * length / 3 + CELL_MARGIN * unit, size / 2 + 1)
    high = min((third + 1) * length / 3 - CELL_MARGIN * unit, length - size / 2 - 1)
    return round(low + (high - low) * rng.random() - size / 2)


def _are_apart(a: tuple[int, ...], b: tuple[int, ...], unit: float) -> bool:
    is_clear = max(a[0] - b[2], b[0] - a[2], a[1] - b[3], b[1] - a[3]) >= BOX_GAP * unit
    return is_clear and abs(a[0] + a[2] - b[0] - b[2]) / 2 >= ORDER_GAP * unit


def build(
    output_dir: str | Path,
    scenes: int,
    test_scenes: int,
    seed: int,
    canvas: tuple[int, int] = (MIN_SIDE, MIN_SIDE),
    on_progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> dict:
    """Writes a data set of digit scenes; nothing is left behind if it does not end well.

    `output_dir` receives images/{train,test}/NNNNNN.png; train.json (LLaVA rows, one per training
    scene, with "regions" and all questions in one conversation), align.json (a drill for each of
    those of at most `EASY_DIGITS` digits), test.json (one question a row, with its "kind") and
    meta.json.

    Args:
        scenes, test_scenes: how many scenes to train on and to test on, each at least 1.
        canvas: height and width in pixels.
        on_progress: called with (done, total) after every scene.
        workers: processes that draw; what they draw does not depend on their number. With more than
            one, a script needs the usual `if __name__ == "__main__":`.
    Returns:
        The contents of meta.json.
    Raises:
        UserError: if `output_dir` is not empty, or a number is out of range.
    """
    check_counts(scenes, test_scenes, seed)
    check_canvas(canvas)
    counts: dict[Split, int] = {"train": scenes, "test": test_scenes}

    def describe(asked: dict[str, list[Question]]) -> dict:
        return {
            "version": VERSION,
            "seed": seed,
            "canvas": list(canvas),
            "scenes": counts,
            "questions": {split: Counter(q.kind for q in asked[split]) for split in asked},
            "kinds": list(KINDS),
            "colours": list(COLOURS),
            "chance": guess_from_text(asked["train"], asked["test"]),
            "packages": {name: package_version(name) for name in PACKAGES},
        }

    return write_set(
        output_dir,
        [(split, index) for split in counts for index in range(counts[split])],
        functools.partial(_draw_scene, seed, canvas),
        describe,
        files=("align", "train", "test"),
        on_progress=on_progress,
        workers=workers,
    )


def _draw_scene(seed: int, canvas: tuple[int, int], place: tuple[Split, int]) -> Drawn:
    split, index = place
    scene = make_scene(seed, split, index, canvas)
    name = f"{split}/{index:06d}"
    if split == "test":
        questions = _first_of_each_kind(scene.questions)
        rows = {"test": [question_row(name, question) for question in questions]}
        return Drawn(name=name, image=scene.image, questions=questions, rows=rows)
    rng = np.random.default_rng([seed, 2, index])
    rows = {"train": [_train_row(name, scene, rng)]}
    if len(scene.digits) <= EASY_DIGITS:
        rows["align"] = [llava_row(name, drill(rng, scene.digits, canvas))]
    return Drawn(name=name, image=scene.image, questions=list(scene.questions), rows=rows)


def _first_of_each_kind(questions: Iterable[Question]) -> list[Question]:
    first: dict[str, Question] = {}
    for question in questions:
        first.setdefault(question.kind, question)
    return list(first.values())


def _train_row(name: str, scene: Scene, rng: np.random.Generator) -> dict:
    turns = [(question.text, question.answer) for question in order_turns(rng, scene.questions)]
    canvas = scene.image.shape[:2]
    regions = [
        region(digit, canvas, digit=str(digit.value), colour=digit.colour, place=digit.cell(canvas))
        for digit in scene.digits
    ]
    return {**llava_row(name, turns), "regions": regions}


def region(digit: Digit, canvas: tuple[int, ...], /, **labels: str) -> dict:
    """What stands where, for a tower to learn."""
    (height, width), (x0, y0, x1, y1) = canvas, digit.box
    box = [round(v, 4) for v in (x0 / width, y0 / height, x1 / width, y1 / height)]
    return {"box": box, "labels": labels}
