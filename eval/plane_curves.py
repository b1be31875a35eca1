"""Curves across a canvas, to be followed from a star to a coloured mark.

Every curve is a self-avoiding walk over the cells of a grid, made smooth. The curve from the star is
one of them drawn like the others, all with equal lengths' distribution, and its end is as often the
nearest to the star as it is the second or the last, so that where the marks stand tells nothing; but for short
curves to practise on, whose ends are near.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image, ImageDraw

from eval.plane_shapes import CELL, COLOURS, Grid, Picture, empty, paint
from vision_scan.errors import UserError

Cell = tuple[int, int]
STEPS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
COVER = 0.6  # of the cells are on some curve, about, unless its length is given
LENGTH_SPREAD = 0.2  # of a curve's length, up and down
JITTER = 0.6  # pixels by which a walk leaves the middle of a cell, but at its ends
WIDTH = 3.0  # of a curve, in pixels, as the next
FEWEST_RANKED = 4  # cells of a curve whose end can be farther from its beginning than another's
DOT, MARK = 3.6, 5.6  # sides of squares of the same area
STAR = 4.3  # radius
GREYS = (110, 190)
WHITE = (250, 250, 250)
MOST_COVER = 0.7  # of the cells that curves may be asked to take
FINENESS = 4  # samples a pixel and direction


@dataclass(frozen=True, kw_only=True)
class Difficulty:
    """How hard curves are to follow.

    Attributes:
        num_curves: 2 to 4; the more, the shorter each is and the more answers there are.
        wiggle: in 0..1, how often a curve turns where it could go on.
        crossing: whether a curve may go straight across another.
        cells: the fewest and the most cells of a curve; None: all together cover about 0.6 of the grid. Of at most 3,
            the right mark is mostly the nearest to the star.
    Raises:
        UserError: if a value is out of range.
    """

    num_curves: int = 3
    wiggle: float = 0.4
    crossing: bool = False
    cells: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not 2 <= self.num_curves <= len(COLOURS):
            raise UserError(f"{self.num_curves} curves: must be 2 to {len(COLOURS)}")
        if not 0 <= self.wiggle <= 1:
            raise UserError(f"wiggle {self.wiggle}: must be 0 to 1")
        if self.cells is not None and not 2 <= self.cells[0] <= self.cells[1]:
            raise UserError(f"curves of {self.cells[0]} to {self.cells[1]} cells: must be 2 or more, the lower first")

    def check_room(self, grid: Grid) -> None:
        """Raises UserError if curves of so many cells hardly fit a grid."""
        most = int(MOST_COVER * len(grid.cells())) // self.num_curves
        if self.cells is not None and self.cells[1] > most:
            raise UserError(
                f"{self.num_curves} curves of up to {self.cells[1]} cells: on this canvas, up to {most} fit; ask for "
                "fewer, or a larger picture"
            )

    @property
    def colours(self) -> tuple[str, ...]:
        """Of the end marks: the answers."""
        return tuple(COLOURS)[: self.num_curves]


def draw_trace(
    rng: np.random.Generator, canvas: tuple[int, int], answer: str, difficulty: Difficulty
) -> Picture:
    """Grey curves, each from a white mark to a coloured one; that from the star reaches `answer`."""
    grid = Grid(canvas)
    difficulty.check_room(grid)  # else room would be sought for ever
    walks = _walks(rng, grid, difficulty)
    others = [colour for colour in difficulty.colours if colour != answer]
    colours = [answer, *rng.permutation(others)]
    pixels = empty(rng, canvas)
    grey = int(rng.integers(*GREYS))
    ends = {cell for walk in walks for cell in (walk[0], walk[-1])}
    bends = {cell: (cell not in ends) * rng.uniform(-JITTER, JITTER, 2) * grid.unit for cell in grid.cells()}
    nodes = [np.array([grid.centre(cell) + bends[cell] for cell in walk]) for walk in walks]
    pixels[_ink(canvas, [_smooth(points) for points in nodes], WIDTH * grid.unit)] = grey
    for number, (points, colour) in enumerate(zip(nodes, colours, strict=True)):
        (top, left), (y, x) = points[[0, -1]].round()
        if number == 0:
            _paint_star(pixels, (top, left), STAR * grid.unit)
        else:
            paint(pixels, "circle", WHITE, (top, left), DOT * grid.unit)
        paint(pixels, "circle", COLOURS[str(colour)], (y, x), MARK * grid.unit)
    labels: dict[Cell, dict[str, str]] = {}
    for number, (walk, colour) in enumerate(zip(walks, colours, strict=True)):
        for cell, found in _labels(walk, str(colour), "dot" if number else "star"):
            labels[cell] = {**labels.get(cell, {}), **found}  # two lines may cross there
    regions = [grid.region(grid.centre(cell), (CELL * grid.unit / 2,) * 2, found) for cell, found in labels.items()]
    return Picture(pixels, "Which colour does the line from the star reach?", regions)


def _labels(walk: list[Cell], colour: str, beginning: str) -> list[tuple[Cell, dict[str, str]]]:
    """The cells of a walk: to which sides its line goes on from each, and what marks its ends."""
    labels: list[dict[str, str]] = [{} for _ in walk]
    for place, cell in enumerate(walk):
        for other in (*walk[max(place - 1, 0) : place], *walk[place + 1 : place + 2]):
            side = next(name for name, step in STEPS.items() if (cell[0] + step[0], cell[1] + step[1]) == other)
            labels[place][side] = "line"
    labels[0]["shape"], labels[-1]["colour"] = beginning, colour
    return list(zip(walk, labels, strict=True))


def _walks(rng: np.random.Generator, grid: Grid, difficulty: Difficulty) -> list[list[Cell]]:
    """Walks without common cells but for crossings, that from the star first; no two ends side by side.

    Its end has a rank that is drawn first, in the order of the ends' distances from the star.
    """
    wanted = rng.integers(difficulty.num_curves)
    is_ranked = difficulty.cells is None or difficulty.cells[1] >= FEWEST_RANKED
    while True:
        walks = _grow_all(rng, grid, difficulty)
        if walks is None or _have_near_ends(walks):
            continue
        walks = [walks[i] for i in rng.permutation(len(walks))]
        ends = np.array([walk[-1] for walk in walks])
        ties = rng.uniform(0, 1e-3, len(ends))
        distances = np.hypot(*(ends - walks[0][0]).T) + ties
        if not is_ranked or (distances < distances[0]).sum() == wanted:
            return walks


def _have_near_ends(walks: Sequence[list[Cell]]) -> bool:
    """Whether two ends are side by side, other than those of one line of two cells."""
    ends = [(number, cell) for number, walk in enumerate(walks) for cell in (walk[0], walk[-1])]
    return any(
        abs(y - b) + abs(x - a) == 1 and not (one == other and len(walks[one]) == 2)
        for (one, (y, x)), (other, (b, a)) in combinations(ends, 2)
    )


def _grow_all(rng: np.random.Generator, grid: Grid, difficulty: Difficulty) -> list[list[Cell]] | None:
    """One walk after the other, in what those before left free; None if there is no room."""
    free = set(grid.cells())
    mean = COVER * len(free) / difficulty.num_curves
    longest = len(free) if difficulty.cells is None else difficulty.cells[1]  # a walk may be one cell longer than asked
    straight: dict[Cell, int] = {}  # cells that a walk goes straight through -> axis, 0 along a column
    walks: list[list[Cell]] = []
    for _ in range(difficulty.num_curves):
        if difficulty.cells is None:
            length = round(mean * rng.uniform(1 - LENGTH_SPREAD, 1 + LENGTH_SPREAD))
        else:
            length = int(rng.integers(difficulty.cells[0], difficulty.cells[1], endpoint=True))
        crossable = straight if difficulty.crossing else {}
        tries = (_grow(rng, free, crossable, length, difficulty.wiggle) for _ in range(10))
        walk = next((walk for walk in tries if walk and len(walk) <= longest), None)
        if walk is None:
            return None
        for before, cell, after in zip(walk, walk[1:], walk[2:], strict=False):
            if cell in free and 0 in (before[0] - after[0], before[1] - after[1]):
                straight[cell] = int(before[0] == after[0])
            else:
                straight.pop(cell, None)
        free -= set(walk)
        walks.append(walk)
    return walks


def _grow(
    rng: np.random.Generator, free: set[Cell], crossable: dict[Cell, int], length: int, wiggle: float
) -> list[Cell] | None:
    """A self-avoiding walk of `length` cells or one more, from anywhere; None at a dead end."""
    cells = sorted(free)
    walk = [cells[rng.integers(len(cells))]]
    heading: Cell | None = None
    while len(walk) < length:
        ways: dict[Cell, list[Cell]] = {}
        for step in STEPS.values():
            cell, beyond = ((walk[-1][0] + n * step[0], walk[-1][1] + n * step[1]) for n in (1, 2))
            if cell in free and cell not in walk:
                ways[step] = [cell]
            elif crossable.get(cell) == int(step[0] != 0) and beyond in free and beyond not in walk:
                ways[step] = [cell, beyond]
        turns = [step for step in ways if step != heading]
        if not ways:
            return None
        if heading not in ways or (turns and rng.random() < wiggle):
            heading = turns[rng.integers(len(turns))]
        walk += ways[heading]
    return walk


def _smooth(points: np.ndarray) -> np.ndarray:
    """Cuts the corners of a line (num_points, 2), which keeps its ends and stays inside its bends.

    Source: Chaikin 1974, "An algorithm for high-speed curve generation".
    """
    for _ in range(3):
        before, after = points[:-1], points[1:]
        cut = np.stack([0.75 * before + 0.25 * after, 0.25 * before + 0.75 * after], axis=1)
        points = np.concatenate([points[:1], cut.reshape(-1, 2), points[-1:]])
    return points


def _ink(canvas: tuple[int, int], curves: Sequence[np.ndarray], width: float) -> np.ndarray:
    """Which pixels lines through (y, x) points cover by half or more: (height, width) bool."""
    height, columns = canvas
    fine = Image.new("L", (FINENESS * columns, FINENESS * height))
    draw = ImageDraw.Draw(fine)
    for points in curves:
        line = [(float(x), float(y)) for y, x in FINENESS * points]
        draw.line(line, fill=255, width=round(FINENESS * width))
    return np.asarray(fine.reduce(FINENESS)) >= 128


def _paint_star(pixels: np.ndarray, centre: tuple[float, float], radius: float) -> None:
    """A white star of five points around `centre` (y, x)."""
    angles = np.pi * (np.arange(10) / 5 - 0.5)
    radii = radius * np.where(np.arange(10) % 2, 0.45, 1.0)
    star = Image.new("L", (FINENESS * pixels.shape[1], FINENESS * pixels.shape[0]))
    points = np.stack([centre[1] + radii * np.cos(angles), centre[0] + radii * np.sin(angles)], axis=1)
    ImageDraw.Draw(star).polygon([tuple(p) for p in (FINENESS * points).tolist()], fill=255)
    pixels[np.asarray(star.reduce(FINENESS)) >= 128] = WHITE
