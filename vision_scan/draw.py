"""Pictures of scan orders: the path of every visiting list, and when it reaches each cell; and of what a module that
reads a grid along them sees."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from vision_scan.errors import UserError
from vision_scan.orders import ScanOrder
from vision_scan.receptive import effective_share, reached_share

# Early to late. Sampled from matplotlib's "viridis" (CC0), which stays ordered in grey and for
# colour-blind readers; the two palest steps are left out, so that lines show on white.
COLOURS = ("#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59")
INK, FAINT, LINE, EMPTY = "#1c2230", "#6b7385", "#d9dde5", "#f4f5f8"
DECADES = 3  # of a receptive field that colours tell apart
SCALE = 3  # drawn this much larger, then reduced: Pillow's lines have no smooth edges


def draw_order(order: ScanOrder, path: str | Path | None = None, cell: int = 40) -> Image.Image:
    """Draw a scan order: per list its path as arrows and, beside it, a map of when cells are read.

    The path runs from a filled dot to a ring and changes colour from early to late. Steps to one of
    the eight cells around are bold; longer jumps are thin. The map shows the position of every cell
    in the list; cells that the list does not hold stay blank. One list gives two panels side by
    side, several lists a row of paths above a row of maps.

    Args:
        order: what to draw; a picture serves up to some 40 cells a side.
        path: where to save it (the suffix names the format); None saves nothing.
        cell: side of a cell in pixels, at least 8; below 22 the map has colours and no numbers.
    Returns:
        RGB image.
    Raises:
        UserError: if the cell is too small, or the file's format is unknown.
    """
    _check_cell(cell)
    sheet = _Sheet(order, cell)
    for k in range(len(order)):
        sheet.draw_list(k)
    image = sheet.image.reduce(SCALE)
    _save(image, path)
    return image


def draw_orders(orders: Sequence[ScanOrder], path: str | Path | None = None, cell: int = 24) -> Image.Image:
    """Several orders below one another, each as `draw_order` draws it."""
    images = [draw_order(order, cell=cell) for order in orders]
    sheet = Image.new("RGB", (max(image.width for image in images), sum(image.height for image in images)), "white")
    top = 0
    for image in images:
        sheet.paste(image, (0, top))
        top += image.height
    _save(sheet, path)
    return sheet


def draw_receptive_fields(
    fields: Mapping[str, Tensor],
    path: str | Path | None = None,
    cell: int = 24,
    at: tuple[int, int] | None = None,
    columns: int = 4,
) -> Image.Image:
    """Draw effective receptive fields side by side, each over its own largest value.

    One logarithmic scale of colours serves all, down to a thousandth; what is less has the last colour, and a cell that
    is not seen at all stays blank.

    Args:
        fields: title -> (height, width) as `vision_scan.receptive.receptive_field` returns it.
        path, cell: as of `draw_order`.
        at: row and column of the cell whose fields these are, marked by a ring; None: the centre of each.
        columns: most pictures in a row.
    Returns:
        RGB image.
    Raises:
        UserError: without a field, if the cell is too small or outside, or the file's format is unknown.
    """
    _check_cell(cell)
    if not fields or columns < 1:
        raise UserError(f"{len(fields)} receptive fields in {columns} columns cannot be drawn; give 1 or more of both")
    panels = [_FieldPanel(title, field, cell * SCALE, at) for title, field in fields.items()]
    margin, foot = 24 * SCALE, 62 * SCALE
    columns = min(columns, len(panels))
    rows = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    pitch = max(panel.width for panel in panels) + margin
    heights = [max(panel.height for panel in row) + margin for row in rows]
    width = max(columns * pitch + margin, 420 * SCALE)
    sheet = Image.new("RGB", (width, margin + sum(heights) + foot), "white")
    pen = ImageDraw.Draw(sheet)
    top = margin
    for row, height in zip(rows, heights, strict=True):
        for place, panel in enumerate(row):
            panel.draw(pen, margin + place * pitch, top)
        top += height
    _colour_bar(pen, margin, top)
    image = sheet.reduce(SCALE)
    _save(image, path)
    return image


def _check_cell(cell: int) -> None:
    if cell < 8:
        raise UserError(f"a cell of {cell} pixels is too small to draw; give at least 8")


def _save(image: Image.Image, path: str | Path | None) -> None:
    if path is None:
        return
    try:
        image.save(path)
    except (ValueError, OSError) as error:
        raise UserError(f"cannot save a picture as {str(path)!r}: {error}; "
                        "give a writable path that ends in .png") from error


class _Sheet:
    """The picture while it is drawn; all lengths in enlarged pixels."""

    def __init__(self, order: ScanOrder, cell: int) -> None:
        self.order, self.cell = order, cell * SCALE
        self.margin, self.head, self.title = 24 * SCALE, 72 * SCALE, 23 * SCALE
        self.grid = (order.width * self.cell, order.height * self.cell)
        beside = len(order) == 1
        columns, rows = (2, 1) if beside else (len(order), 2)
        self.pitch = (self.grid[0] + self.margin, self.grid[1] + self.title + self.margin)
        self.map_shift = (self.pitch[0], 0) if beside else (0, self.pitch[1])
        width = max(columns * self.pitch[0] + self.margin, 480 * SCALE)
        height = self.head + rows * self.pitch[1]
        # The reduced size must be whole, and both are multiples of SCALE.
        self.image = Image.new("RGB", (width, height), "white")
        self.pen = ImageDraw.Draw(self.image)
        self._heading()

    def _heading(self) -> None:
        order = self.order
        lists = "1 list" if len(order) == 1 else f"{len(order)} lists, merge {order.merge}"
        grid = f"{order.height} x {order.width}"
        about = f"{grid} cells, {lists}.  Step: mean {order.mean_step:.2f}, max {order.max_step}."
        if order.mean_gap:
            about += f"  Gap of neighbours: mean {order.mean_gap:.2f}."
        _text(self.pen, (self.margin, 16 * SCALE), order.name, 17, INK, "lt")
        _text(self.pen, (self.margin, 41 * SCALE), about, 12, FAINT, "lt")

    def draw_list(self, k: int) -> None:
        cells = [cell for cell in self.order[k].tolist() if cell >= 0]
        x, y = self.margin + k * self.pitch[0], self.head
        label = f"list {k}: " if len(self.order) > 1 else ""
        shift_x, shift_y = self.map_shift
        _text(self.pen, (x, y), f"{label}path", 12, INK, "lt")
        self._path(cells, x, y + self.title)
        _text(self.pen, (x + shift_x, y + shift_y), f"{label}positions", 12, INK, "lt")
        self._map(cells, x + shift_x, y + shift_y + self.title)

    def _path(self, cells: list[int], x: int, y: int) -> None:
        width = self.order.width
        self.pen.rectangle((x, y, x + self.grid[0], y + self.grid[1]), EMPTY)
        _lattice(self.pen, x, y, *self.grid, self.cell)
        spots = [(x + (c % width + 0.5) * self.cell, y + (c // width + 0.5) * self.cell)
                 for c in cells]
        steps = list(enumerate(pairwise(spots)))
        is_jump = [max(abs(a[0] - b[0]), abs(a[1] - b[1])) > 1.5 * self.cell for _, (a, b) in steps]
        for jumps in (True, False):  # jumps below, steps on top
            for (t, (a, b)), jump in zip(steps, is_jump, strict=True):
                if jump == jumps:
                    self._arrow(a, b, _colour((t + 0.5) / len(steps)), jump)
        dot = 0.17 * self.cell
        for (a, b), t, fill in ((spots[0], 0.0, True), (spots[-1], 1.0, False)) if spots else ():
            box = (a - dot, b - dot, a + dot, b + dot)
            colour = _colour(t)
            self.pen.ellipse(box, colour if fill else "white", colour, round(0.08 * self.cell))

    def _arrow(self, a: tuple, b: tuple, colour: str, is_jump: bool) -> None:
        """A line from a to b with its head at the middle."""
        thick = max(SCALE, round((0.025 if is_jump else 0.08) * self.cell))
        self.pen.line((a, b), _mix(colour, EMPTY, 0.45) if is_jump else colour, thick)
        # Rounds the corners of steps, marks the ends of jumps.
        dot = 0.055 * self.cell if is_jump else max(0.04 * self.cell - 1, 0)
        for px, py in (a, b):
            self.pen.ellipse((px - dot, py - dot, px + dot, py + dot), colour)
        angle = math.atan2(b[1] - a[1], b[0] - a[0])
        size = (0.11 if is_jump else 0.17) * self.cell
        middle = ((a[0] + b[0]) / 2, (a[1] + b[1]) / 2)
        corners = [(middle[0] + size * math.cos(angle + turn),
                    middle[1] + size * math.sin(angle + turn)) for turn in (0, 2.3, -2.3)]
        self.pen.polygon(corners, colour)

    def _map(self, cells: list[int], x: int, y: int) -> None:
        self.pen.rectangle((x, y, x + self.grid[0], y + self.grid[1]), EMPTY)
        digits = len(str(max(len(cells) - 1, 1)))
        size = min(0.36, 0.8 / digits) * self.cell / SCALE
        for t, cell in enumerate(cells):
            left = x + cell % self.order.width * self.cell
            top = y + cell // self.order.width * self.cell
            colour = _colour(t / max(len(cells) - 1, 1))
            self.pen.rectangle((left, top, left + self.cell, top + self.cell), colour)
            if self.cell >= 22 * SCALE:
                centre = (left + self.cell / 2, top + self.cell / 2)
                _text(self.pen, centre, str(t), size, _ink_on(colour), "mm")
        _lattice(self.pen, x, y, *self.grid, self.cell)


class _FieldPanel:
    """A receptive field with its title; all lengths in enlarged pixels."""

    head = 42 * SCALE

    def __init__(self, title: str, field: Tensor, cell: int, at: tuple[int, int] | None) -> None:
        rows, columns = field.shape
        self.title, self.field, self.cell = title, field, cell
        self.at = (rows // 2, columns // 2) if at is None else at
        if not (0 <= self.at[0] < rows and 0 <= self.at[1] < columns):
            raise UserError(f"cell {at} is outside of a field of {rows}x{columns}; count rows and columns from 0")
        self.grid = (columns * cell, rows * cell)
        self.about = f"{reached_share(field):.0%} seen, {effective_share(field):.0%} effective"
        texts = [ImageFont.load_default(size * SCALE).getlength(text) for text, size in self._lines()]
        self.width, self.height = max(self.grid[0], *map(math.ceil, texts)), self.head + self.grid[1]

    def _lines(self) -> tuple[tuple[str, int], ...]:
        return (self.title, 14), (self.about, 11)

    def draw(self, pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
        for (text, size), shift, colour in zip(self._lines(), (0, 20), (INK, FAINT), strict=True):
            _text(pen, (x, y + shift * SCALE), text, size, colour, "lt")
        y += self.head
        pen.rectangle((x, y, x + self.grid[0], y + self.grid[1]), EMPTY)
        largest = float(self.field.max())
        for row, values in enumerate(self.field.tolist()):
            for column, value in enumerate(values):
                if value > 0:
                    left, top = x + column * self.cell, y + row * self.cell
                    colour = _colour(min(-math.log10(value / largest) / DECADES, 1.0))
                    pen.rectangle((left, top, left + self.cell, top + self.cell), colour)
        _lattice(pen, x, y, *self.grid, self.cell)
        centre = x + (self.at[1] + 0.5) * self.cell, y + (self.at[0] + 0.5) * self.cell
        ring = 0.24 * self.cell
        box = (centre[0] - ring, centre[1] - ring, centre[0] + ring, centre[1] + ring)
        pen.ellipse(box, outline="white", width=max(round(0.09 * self.cell), SCALE))


def _colour_bar(pen: ImageDraw.ImageDraw, x: int, y: int) -> None:
    """The colours of receptive fields, from the largest value to the least that they tell apart."""
    width, height = 240 * SCALE, 12 * SCALE
    for step in range(width):
        pen.line((x + step, y, x + step, y + height), _colour(step / (width - 1)))
    for k in range(DECADES + 1):
        anchor = "lt" if k == 0 else "rt" if k == DECADES else "mt"
        tick = f"1/{10**k}" if k else "1"
        _text(pen, (x + k * width // DECADES, y + height + 5 * SCALE), tick, 11, FAINT, anchor)
    blank = x + width + 24 * SCALE
    pen.rectangle((blank, y, blank + height, y + height), EMPTY, LINE, SCALE)
    _text(pen, (blank + height + 7 * SCALE, y + height / 2), "not seen", 11, FAINT, "lm")
    _text(pen, (x, y + height + 22 * SCALE), "gradient, over the largest", 11, FAINT, "lt")


def _text(
    pen: ImageDraw.ImageDraw, at: tuple[float, float], text: str, size: float, colour: str, anchor: str
) -> None:
    pen.text(at, text, fill=colour, font=ImageFont.load_default(size * SCALE), anchor=anchor)


def _lattice(pen: ImageDraw.ImageDraw, x: int, y: int, width: int, height: int, cell: int) -> None:
    for column in range(x, x + width + 1, cell):
        pen.line((column, y, column, y + height), LINE, SCALE)
    for row in range(y, y + height + 1, cell):
        pen.line((x, row, x + width, row), LINE, SCALE)


def _mix(a: str, b: str, share: float) -> str:
    """The colour that has this share of b and the rest of a; both are "#rrggbb"."""
    parts = [(int(a[i : i + 2], 16), int(b[i : i + 2], 16)) for i in (1, 3, 5)]
    return "#" + "".join(f"{round(p + (q - p) * share):02x}" for p, q in parts)


def _ink_on(colour: str) -> str:
    """White or dark, whichever reads better on a colour."""
    red, green, blue = (int(colour[i : i + 2], 16) for i in (1, 3, 5))
    return INK if 0.3 * red + 0.6 * green + 0.1 * blue > 135 else "white"


def _colour(t: float) -> str:
    """Colour of a moment, 0 first to 1 last."""
    place = t * (len(COLOURS) - 1)
    k = min(int(place), len(COLOURS) - 2)
    return _mix(COLOURS[k], COLOURS[k + 1], place - k)
