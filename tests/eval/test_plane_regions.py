"""What stands in each cell of a plane scene, as towers are taught it, beside what its pixels show; and short curves."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from eval.plane_curves import Difficulty, _walks
from eval.plane_scenes import PlaneScene, make_scene
from eval.plane_shapes import COLOURS, Grid
from tests.eval.plane_pixels import WHITE, background, blobs
from vision_scan.errors import UserError

CELL = 8
STEPS = {"right": (0, 1), "down": (1, 0), "left": (0, -1), "up": (-1, 0)}
CANVASES = [(48, 48), (64, 64), (48, 80)]
SHORT = Difficulty(num_curves=2, cells=(2, 6))
CURVES = [SHORT, Difficulty(num_curves=2, cells=(2, 2)), Difficulty(), Difficulty(crossing=True, num_curves=2)]


def boxes(scene: PlaneScene) -> list[tuple[list[int], dict]]:
    """(left, top, right, bottom) in pixels, and the labels."""
    height, width = scene.image.shape[:2]
    found = []
    for region in scene.regions:
        box = np.array(region["box"]) * [width, height, width, height]
        found.append((box.tolist(), region["labels"]))
    return found


def cells(scene: PlaneScene) -> dict[tuple[int, int], dict]:
    """Labels of the regions that are cells, by row and column; each once."""
    found = {}
    for box, labels in boxes(scene):
        left, top, right, bottom = (round(edge) for edge in box)
        assert (right - left, bottom - top) == (CELL, CELL) and left % CELL == top % CELL == 0
        assert np.allclose(box, (left, top, right, bottom), atol=0.01)
        cell = top // CELL, left // CELL
        assert cell not in found, "two regions of one cell: a tower would be taught the last one"
        found[cell] = labels
    return found


def crosses(ink: np.ndarray, cell: tuple[int, int], side: str) -> bool:
    """Whether ink goes on from a cell (row, column) across one of its sides."""
    (y, x), (down, right) = (CELL * cell[0], CELL * cell[1]), STEPS[side]
    inside = ink[y : y + CELL, x : x + CELL]
    y, x = y + CELL * down, x + CELL * right
    if min(y, x) < 0 or y >= ink.shape[0] or x >= ink.shape[1]:
        return False
    beyond = ink[y : y + CELL, x : x + CELL]
    edge, other = {
        "right": (inside[:, -1], beyond[:, 0]),
        "left": (inside[:, 0], beyond[:, -1]),
        "down": (inside[-1], beyond[0]),
        "up": (inside[0], beyond[-1]),
    }[side]
    return bool((edge & other).any())


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
@pytest.mark.parametrize("difficulty", CURVES, ids=lambda one: f"{one.num_curves} {one.cells} {one.crossing}")
def test_lines_go_on_where_the_ink_does(difficulty, canvas):
    for index in range(12):
        scene = make_scene(0, "train", "trace", index, canvas, difficulty)
        ink = (scene.image != background(scene.image)).any(2)
        found = cells(scene)
        for cell in Grid(canvas).cells():
            sides = {side for side in STEPS if found.get(cell, {}).get(side) == "line"}
            assert sides == {side for side in STEPS if crosses(ink, cell, side)}, (index, cell)
            has_ink = ink[CELL * cell[0] : CELL * (cell[0] + 1), CELL * cell[1] : CELL * (cell[1] + 1)].sum() > 4
            assert has_ink == (cell in found), (index, cell)


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
@pytest.mark.parametrize("difficulty", CURVES, ids=lambda one: f"{one.num_curves} {one.cells} {one.crossing}")
def test_marks_are_where_the_labels_say(difficulty, canvas):
    for index in range(12):
        scene = make_scene(0, "train", "trace", index, canvas, difficulty)
        seen, kinds = {}, Counter()
        for cell in Grid(canvas).cells():
            middle = tuple(scene.image[CELL * cell[0] + CELL // 2, CELL * cell[1] + CELL // 2].tolist())
            name = next((name for name, colour in COLOURS.items() if colour == middle), None)
            if name or middle == WHITE:
                seen[cell] = name
        for cell, labels in cells(scene).items():
            assert labels.get("colour") == seen.get(cell), (index, cell)
            assert ("shape" in labels) == (cell in seen and seen[cell] is None), (index, cell)
            kinds[labels.get("shape")] += 1
            kinds[labels.get("colour")] += 1
        assert kinds["star"] == 1 and kinds["dot"] == difficulty.num_curves - 1
        assert all(kinds[colour] == 1 for colour in difficulty.colours)
        star = max(blobs(scene.image, ["white"]), key=lambda blob: len(blob.rows))
        (cell,) = (cell for cell, labels in cells(scene).items() if labels.get("shape") == "star")
        assert cell == tuple(int(place // CELL) for place in star.middle)


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
@pytest.mark.parametrize("kind", ["colour", "relation", "count"])
def test_every_shape_stands_in_its_region(kind, canvas):
    for index in range(15):
        scene = make_scene(0, "train", kind, index, canvas)
        left = boxes(scene)
        assert kind == "count" or len(cells(scene)) == len(left)
        for blob in blobs(scene.image):
            around = [
                (box, labels) for box, labels in left
                if box[0] - 1 <= blob.columns.min() and blob.columns.max() <= box[2]
                and box[1] - 1 <= blob.rows.min() and blob.rows.max() <= box[3]
            ]  # fmt: skip
            assert len(around) == 1 and around[0][1] == {"shape": blob.shape, "colour": blob.colour}, index
            left.remove(around[0])
        assert not left


@pytest.mark.parametrize("crossing", [False, True])
@pytest.mark.parametrize(("num_curves", "lengths"), [(2, (2, 6)), (2, (4, 4)), (3, (2, 8)), (4, (2, 2))])
def test_curves_have_the_lengths_asked_for(num_curves, lengths, crossing):
    difficulty = Difficulty(num_curves=num_curves, cells=lengths, crossing=crossing)
    seen = Counter()
    for index in range(60):
        walks = _walks(np.random.default_rng(index), Grid((48, 48)), difficulty)
        assert len(walks) == num_curves
        for walk in walks:
            assert len(set(walk)) == len(walk)
            assert all(abs(y - b) + abs(x - a) == 1 for (y, x), (b, a) in pairwise(walk))
        seen.update(map(len, walks))
    assert seen.keys() == set(range(lengths[0], lengths[1] + 1))


def test_the_end_of_the_line_from_the_star_has_every_rank():
    """Of 2 curves of up to 6 cells it is the nearer one in half of the pictures; of up to 3, in nearly all."""
    share = {}
    for longest in (3, 6):
        nearest = 0
        for index in range(200):
            walks = _walks(np.random.default_rng(index), Grid((48, 48)), Difficulty(num_curves=2, cells=(2, longest)))
            away = [np.hypot(*np.subtract(walk[-1], walks[0][0])) for walk in walks]
            nearest += away[0] <= away[1]
        share[longest] = nearest / 200
    assert 0.4 < share[6] < 0.6 and share[3] > 0.8


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("1 to 4 cells: must be 2 or more", {"cells": (1, 4)}),
        ("5 to 4 cells: must be 2 or more, the lower first", {"cells": (5, 4)}),
    ],
)
def test_lengths_that_are_none_are_refused_in_one_line(message, settings):
    with pytest.raises(UserError, match=message) as caught:
        Difficulty(**settings)
    assert "\n" not in str(caught.value)


def test_curves_that_do_not_fit_are_refused_and_not_tried_for_ever():
    with pytest.raises(UserError, match="up to 12 fit; ask for fewer, or a larger picture"):
        make_scene(0, "train", "trace", 0, (48, 48), Difficulty(num_curves=2, cells=(30, 40)))
    make_scene(0, "train", "colour", 0, (48, 48), Difficulty(num_curves=2, cells=(30, 40)))  # has no curves
