"""What the pixels of a plane scene show, by flood filling, which knows nothing of how they were drawn."""

from typing import NamedTuple

import numpy as np

from eval.plane_shapes import COLOURS

WHITE = (250, 250, 250)


class Blob(NamedTuple):
    """Connected pixels: their colour, how many, rows and columns (num_pixels,)."""

    colour: str
    rows: np.ndarray
    columns: np.ndarray

    @property
    def box(self) -> tuple[int, int]:
        return int(np.ptp(self.rows)) + 1, int(np.ptp(self.columns)) + 1

    @property
    def middle(self) -> tuple[float, float]:
        return (self.rows.min() + self.rows.max()) / 2, (self.columns.min() + self.columns.max()) / 2

    @property
    def shape(self) -> str:
        """By the share of its box that it fills, and the box's proportions."""
        height, width = self.box
        fill = len(self.rows) / (height * width)
        if fill > 0.97:
            return "square" if width < 1.4 * height else "bar"
        inside = set(zip(self.rows - self.rows.min(), self.columns - self.columns.min(), strict=True))
        corners = [(y, x) in inside for y in (0, height - 1) for x in (0, width - 1)]
        if any(corners):
            return "triangle"
        return "circle" if (height // 4, width // 4) in inside else "cross"


def fill(mask: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of every group of pixels that touch, corners included."""
    left = set(zip(*map(np.ndarray.tolist, mask.nonzero()), strict=True))
    groups = []
    while left:
        edge = [left.pop()]
        group = list(edge)
        while edge:
            y, x = edge.pop()
            near = {(y + b, x + a) for b in (-1, 0, 1) for a in (-1, 0, 1)} & left
            left -= near
            edge += near
            group += near
        groups.append(tuple(np.array(group).T))
    return groups


def blobs(image: np.ndarray, colours=tuple(COLOURS)) -> list[Blob]:
    table = {**COLOURS, "white": WHITE}
    return [Blob(name, *group) for name in colours for group in fill((image == table[name]).all(2))]


def background(image: np.ndarray) -> np.ndarray:
    """The commonest colour."""
    _, firsts, counts = np.unique(
        image @ np.array([1, 256, 65536]), return_index=True, return_counts=True
    )
    return image.reshape(-1, 3)[firsts[counts.argmax()]]
