"""Shapes on a canvas: pictures to ask after a colour, a relation or a count.

Edges are not smoothed, and shapes that are counted cover the same number of pixels on average, so
that neither ink nor a histogram of colours tells which shapes are there.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

MIN_SIDE = 48  # of a canvas, in pixels: 6 cells
COLOURS = {
    "red": (240, 45, 45),
    "green": (50, 215, 70),
    "blue": (70, 120, 255),
    "yellow": (250, 225, 40),
}
CELL = 8.0  # a cell's side on a canvas whose shorter side is at most 64; larger canvases scale it
SCALED_FROM = 64
NUM_SHAPES = 8  # of a picture for colour and for count; half of them for colour where there is no room for all apart
ROOMY = 64  # cells
NUM_BYSTANDERS = 2  # of a picture for a relation, besides the two that it speaks of
FARTHEST = 5 / 8  # of the canvas, along the axis asked after: beyond, one shape's place tells the relation
FREE_AREA = (60.0, 76.0)  # pixels that a shape that stands anywhere covers
BOX_GAP = 1.5


@dataclass(frozen=True)
class Shape:
    """A shape of area 1 around the middle of its box: half its width and height, and its inside."""

    half_width: float
    half_height: float
    inside: Callable[[np.ndarray, np.ndarray], np.ndarray]


def _in_cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Two bars, each a third as thick as long: five ninths of the box."""
    near, far = np.minimum(abs(x), abs(y)), np.maximum(abs(x), abs(y))
    return (far <= 0.6708) & (near <= 0.6708 / 3)


SHAPES = {
    "circle": Shape(0.5642, 0.5642, lambda x, y: x * x + y * y <= 0.5642**2),
    "square": Shape(0.5, 0.5, lambda x, y: np.maximum(abs(x), abs(y)) <= 0.5),
    "triangle": Shape(0.7071, 0.7071, lambda x, y: (y <= 0.7071) & (2 * abs(x) <= y + 0.7071)),
    "cross": Shape(0.6708, 0.6708, _in_cross),
    "bar": Shape(0.7071, 0.3536, lambda x, y: np.maximum(abs(x), 2 * abs(y)) <= 0.7071),
}
# The side of a square of the same area, for shapes that fill a cell. A square of 36 pixels has the mean
# ink of the others (52, 32, 28 and 32), so that its colour is not the one with most ink.
CELL_SIDES = {"circle": 6.92, "square": 6.0, "triangle": 5.65, "cross": 5.96, "bar": 5.65}
SUBJECT, OTHER = "circle", "cross"  # of a relation
RELATIONS = {  # axis (0: rows), and the sign of subject minus other along it
    "left": (1, -1),
    "right": (1, 1),
    "above": (0, -1),
    "below": (0, 1),
}
ALTERNATIVES = {1: "left or right of", 0: "above or below"}


class Picture(NamedTuple):
    """A picture (height, width, 3) uint8, the question about it, and what stands where: boxes in fractions of the
    picture with their labels, as rows for a vision tower have them."""

    pixels: np.ndarray
    question: str
    regions: list[dict]


@dataclass(frozen=True)
class Grid:
    """Square cells over a canvas (height, width), whole ones only: 8 along its shorter side, or fewer of 8 pixels."""

    canvas: tuple[int, int]

    @property
    def unit(self) -> float:
        """Pixels for each pixel of a canvas whose shorter side is at most 64."""
        return max(1.0, min(self.canvas) / SCALED_FROM)

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns."""
        height, width = (int(side / (CELL * self.unit)) for side in self.canvas)
        return height, width

    def cells(self) -> list[tuple[int, int]]:
        rows, columns = self.size
        return [(row, column) for row in range(rows) for column in range(columns)]

    def centre(self, cell: tuple[float, float]) -> tuple[float, float]:
        """(y, x) of the middle of a cell (row, column), in pixels."""
        side = CELL * self.unit
        return (cell[0] + 0.5) * side, (cell[1] + 0.5) * side

    def region(self, centre: tuple[float, float], half: tuple[float, float], labels: dict[str, str]) -> dict:
        """The box of half a height and half a width around a centre (y, x), in pixels, and what stands in it."""
        height, width = self.canvas
        (y, x), (b, a) = centre, half
        box = [(x - a) / width, (y - b) / height, (x + a) / width, (y + b) / height]
        return {"box": [round(min(max(float(edge), 0.0), 1.0), 4) for edge in box], "labels": labels}


def empty(rng: np.random.Generator, canvas: tuple[int, int]) -> np.ndarray:
    """A canvas of one dark grey: (height, width, 3) uint8."""
    return np.full((*canvas, 3), rng.integers(8, 48), np.uint8)


def paint(
    pixels: np.ndarray, name: str, colour: tuple[int, int, int], centre: tuple[float, float], side: float
) -> None:
    """Paints a shape of area side * side pixels around `centre` (y, x) into `pixels`."""
    height, width = pixels.shape[:2]
    y = (np.arange(height) + 0.5 - centre[0])[:, None] / side
    x = (np.arange(width) + 0.5 - centre[1])[None, :] / side
    pixels[SHAPES[name].inside(x, y)] = colour


def draw_colour(rng: np.random.Generator, canvas: tuple[int, int], answer: str) -> Picture:
    """One square of colour `answer` among other shapes, each within a cell; every colour equally often.

    Cells are patches for a model whose patch is an eighth of the shorter side: one patch shows what
    is asked after, and no two have to be joined.
    """
    grid = Grid(canvas)
    num_shapes = NUM_SHAPES if len(grid.cells()) >= ROOMY else NUM_SHAPES // 2
    names = ["square", *_others(rng, "square")][:num_shapes]
    colours = [colour for colour in COLOURS for _ in range(num_shapes // len(COLOURS))]
    colours.remove(answer)
    places = _free_cells(rng, grid, [], num_shapes)
    pixels = empty(rng, canvas)
    regions = _paint_cells(rng, pixels, grid, names, [answer, *rng.permutation(colours)], places)
    return Picture(pixels, "What colour is the square?", regions)


def draw_relation(rng: np.random.Generator, canvas: tuple[int, int], answer: str) -> Picture:
    """Different shapes, each within a cell: two of them stand as the answer says.

    Their places are independent, but that they differ along the axis asked after, by `FARTHEST` of
    the canvas at most, and do not touch.
    """
    bystanders = [name for name in SHAPES if name not in (SUBJECT, OTHER)]
    names = [SUBJECT, OTHER, *map(str, rng.permutation(bystanders)[:NUM_BYSTANDERS])]
    axis, sign = RELATIONS[answer]
    grid = Grid(canvas)
    while True:
        pair = _free_cells(rng, grid, [], 2)
        if 1 <= abs(pair[0][axis] - pair[1][axis]) <= FARTHEST * grid.size[axis]:
            break
    pair.sort(key=lambda cell: cell[axis], reverse=sign > 0)
    places = pair + _free_cells(rng, grid, pair, NUM_BYSTANDERS)
    pixels = empty(rng, canvas)
    regions = _paint_cells(rng, pixels, grid, names, rng.choice(list(COLOURS), len(names)), places)
    return Picture(pixels, f"Is the {SUBJECT} {ALTERNATIVES[axis]} the {OTHER}?", regions)


def draw_count(rng: np.random.Generator, canvas: tuple[int, int], answer: str) -> Picture:
    """`answer` circles among other shapes, together always `NUM_SHAPES`, anywhere but apart."""
    names = (["circle"] * int(answer) + _others(rng, "circle"))[:NUM_SHAPES]
    grid = Grid(canvas)
    unit = grid.unit
    sides = unit * np.sqrt(rng.uniform(*FREE_AREA, NUM_SHAPES))
    halves = [
        (side * SHAPES[name].half_height, side * SHAPES[name].half_width)
        for name, side in zip(names, sides, strict=True)
    ]
    centres = _place(rng, halves, canvas, BOX_GAP * unit)
    pixels, regions = empty(rng, canvas), []
    for name, side, centre, half in zip(names, sides, centres, halves, strict=True):
        colour = str(rng.choice(list(COLOURS)))
        paint(pixels, name, COLOURS[colour], centre, side)
        regions.append(grid.region(centre, half, {"shape": name, "colour": colour}))
    return Picture(pixels, "How many circles are there?", regions)


def _others(rng: np.random.Generator, name: str) -> list[str]:
    """As many shapes as a picture needs besides one of `name`, none of them such a one."""
    others = [other for other in SHAPES if other != name]
    return [str(other) for other in rng.choice(others, NUM_SHAPES - 1)]


def _free_cells(
    rng: np.random.Generator, grid: Grid, taken: list[tuple[int, int]], count: int
) -> list[tuple[int, int]]:
    """Cells that neither touch one another nor those taken."""
    while True:  # the first ones may leave no room for the last
        chosen: list[tuple[int, int]] = []
        free = grid.cells()
        for _ in range(count):
            used = taken + chosen
            free = [(y, x) for y, x in free if all(max(abs(y - b), abs(x - a)) > 1 for b, a in used)]
            if not free:
                break
            chosen.append(free[rng.integers(len(free))])
        if len(chosen) == count:
            return chosen


def _paint_cells(
    rng: np.random.Generator,
    pixels: np.ndarray,
    grid: Grid,
    names: Iterable[str],
    colours: Iterable[str],
    places: Iterable[tuple[int, int]],
) -> list[dict]:
    """Paints each shape somewhere within its cell (row, column), symmetric in whole pixels. Returns their regions."""
    regions = []
    for name, colour, cell in zip(names, colours, places, strict=True):
        side = grid.unit * CELL_SIDES[name]
        halves = SHAPES[name].half_height, SHAPES[name].half_width
        slack = [CELL * grid.unit / 2 - side * half for half in halves]
        y, x = (round(c + rng.uniform(-s, s)) for c, s in zip(grid.centre(cell), slack, strict=True))
        paint(pixels, name, COLOURS[colour], (y, x), side)
        half = (CELL * grid.unit / 2,) * 2
        regions.append(grid.region(grid.centre(cell), half, {"shape": name, "colour": str(colour)}))
    return regions


def _place(
    rng: np.random.Generator, halves: list[tuple[float, float]], canvas: tuple[int, int], gap: float
) -> list[tuple[float, float]]:
    """Centres (y, x) for boxes of (half height, half width), `gap` or more apart, uniform else."""
    while True:  # a full canvas can paint itself into a corner: begin again
        centres: list[tuple[float, float]] = []
        for half in halves:
            for _ in range(50):
                y, x = (rng.uniform(h, side - h) for h, side in zip(half, canvas, strict=True))
                if all(
                    abs(y - b) >= half[0] + other[0] + gap or abs(x - a) >= half[1] + other[1] + gap
                    for (b, a), other in zip(centres, halves, strict=False)
                ):
                    centres.append((y, x))
                    break
            else:
                break
        if len(centres) == len(halves):
            return centres
