"""LLaVA rows: read, and checked before the first step.

A row is `{"id", "image"?: path | [paths], "conversations": [{"from": "human" | "gpt", "value":
text}]}`, where each image has one `<image>` mark in a human turn; rows for the vision tower also
carry `"regions": [{"box": [x0, y0, x1, y1], "labels": {kind: value}}]`, boxes in 0..1 of the image.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from cobra.image import check_image, open_image
from cobra.prompt import Turn, count_marks
from cobra.tokenizer import IMAGE
from train.recipes import DataSettings
from vision_scan.errors import UserError

ROLES: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
# An image's share of a row's length; the same for every model, so that twins see one order.
CHARACTERS_PER_IMAGE = 256
NUM_REPORTED = 5


class BadRowError(UserError):
    """A row that cannot be used; its text says which and why."""


@dataclass(frozen=True)
class Region:
    """A box of an image, (x0, y0, x1, y1) in 0..1, and what stands in it, as kind -> value."""

    box: tuple[float, float, float, float]
    labels: dict[str, str]


@dataclass(frozen=True)
class Row:
    """A checked row. Image paths are joined with the image root."""

    id: str
    images: tuple[Path, ...]
    turns: tuple[Turn, ...]
    regions: tuple[Region, ...] | None

    @property
    def length(self) -> int:
        """How long the row is, for sorting only."""
        return sum(len(turn.text) for turn in self.turns) + CHARACTERS_PER_IMAGE * len(self.images)


@dataclass(frozen=True)
class Rows:
    """The usable rows of a file."""

    path: Path
    rows: list[Row]
    bad: list[str]
    """One line for each row that was left out."""
    fingerprint: str
    """Changes when the file or the choice of its rows does."""

    def texts(self) -> Iterator[str]:
        """All text, for training a tokenizer."""
        for row in self.rows:
            for turn in row.turns:
                yield turn.text.replace(IMAGE, "")


def load_rows(settings: DataSettings, needs: str = "conversations") -> Rows:
    """Reads and checks a data file.

    Args:
        settings: path, image root, and how much to check.
        needs: the key that a row cannot do without, "conversations" or "regions".
    Raises:
        UserError: one line that names the file and, if rows are bad, their number and the first of
            them.
    """
    if settings.path is None:
        raise UserError(
            "no data: set data.path to a LLaVA JSON or JSONL file (--set data.path=FILE)"
        )
    path = Path(settings.path)
    root = Path(settings.image_root) if settings.image_root is not None else path.parent
    text = _read(path)
    if not root.is_dir():
        raise UserError(
            f"data.image_root {root} is not a folder; give the folder that image paths start from"
        )
    check = _image_check(settings.check)
    rows, bad = [], []
    for index, raw in enumerate(_parse(path, text)):
        name = _name(raw, index)
        try:
            row = parse_row(raw, name, root, needs)
            for image in row.images:
                check(image)
            rows.append(row)
        except UserError as error:
            bad.append(f"row {name}: {error}")
    if bad and not (settings.skip_bad and rows):
        raise UserError(describe_bad(path, bad, len(bad) + len(rows)))
    if not rows:
        raise UserError(f"{path} has no rows")
    digest = hashlib.sha256(text.encode())
    digest.update(json.dumps([row.id for row in rows]).encode())
    return Rows(path=path, rows=rows, bad=bad, fingerprint=digest.hexdigest())


def describe_bad(path: Path, bad: Sequence[str], num_rows: int) -> str:
    """The one line about bad rows: how many, the first few, what to do."""
    shown = "; ".join(bad[:NUM_REPORTED]) + ("; ..." if len(bad) > NUM_REPORTED else "")
    rest = num_rows - len(bad)
    advice = "check data.path and data.image_root"
    if rest:
        advice = f"set data.skip_bad=true to train on the other {rest}"
    return f"{path}: {len(bad)} of {num_rows} rows cannot be used: {shown}; {advice}"


def parse_row(raw: Any, name: str, root: Path, needs: str) -> Row:
    """Checks one row's form: types, roles, marks against images, regions. Reads no image.

    Raises:
        UserError: with the reason.
    """
    if not isinstance(raw, dict):
        raise UserError(f"expected a mapping with 'conversations', got {_short(raw)}")
    if needs not in raw:
        raise UserError(f"has no {needs!r}; keys: {', '.join(map(str, raw)) or 'none'}")
    images = raw.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise UserError(f"'image' must be a path or a list of paths, got {_short(raw['image'])}")
    turns = _parse_turns(raw["conversations"]) if "conversations" in raw else ()
    marks = sum(count_marks(turn.text) for turn in turns if turn.role == "user")
    if turns and marks != len(images):
        raise UserError(
            f"{marks} {IMAGE} marks in the human turns for {len(images)} images; write one for each"
        )
    regions = _parse_regions(raw["regions"]) if "regions" in raw else None
    if needs == "regions" and len(images) != 1:
        raise UserError(f"'regions' need one image, got {len(images)}")
    return Row(name, tuple(root / image for image in images), turns, regions)


def _parse_turns(raw: Any) -> tuple[Turn, ...]:
    if not isinstance(raw, list) or not raw:
        raise UserError(f"'conversations' must be a list of turns, got {_short(raw)}")
    for turn in raw:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise UserError(f"a turn must be {{'from': ..., 'value': text}}, got {_short(turn)}")
        if turn.get("from") not in ROLES:
            raise UserError(f"turn from {turn.get('from')!r}, allowed: {', '.join(ROLES)}")
    turns = tuple(Turn(ROLES[turn["from"]], turn["value"]) for turn in raw)
    if turns[0].role == "assistant":  # some of LLaVA's text-only rows; it drops the turn too
        turns = turns[1:]
    if any(turn.role != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)):
        raise UserError("the turns do not alternate between human and gpt")
    if not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
        raise UserError("has no answer to learn from: no gpt turn with text")
    return turns


def _parse_regions(raw: Any) -> tuple[Region, ...]:
    if not isinstance(raw, list):
        raise UserError(f"'regions' must be a list, got {_short(raw)}")
    regions = []
    for region in raw:
        box = region.get("box") if isinstance(region, dict) else None
        labels = region.get("labels") if isinstance(region, dict) else None
        if not (
            isinstance(box, list)
            and len(box) == 4
            and all(isinstance(x, (int, float)) for x in box)
        ):
            raise UserError(f"a region's 'box' must be [x0, y0, x1, y1], got {_short(box)}")
        if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise UserError(f"box {box} is not x0 < x1, y0 < y1 within 0 to 1")
        if not isinstance(labels, dict):
            raise UserError(f"a region's 'labels' must be {{kind: value}}, got {_short(labels)}")
        regions.append(
            Region(tuple(box), {str(kind): str(value) for kind, value in labels.items()})
        )
    return tuple(regions)


def _image_check(level: str) -> Callable[[Path], None]:
    def check(path: Path) -> None:
        if level == "headers":
            check_image(path)
        elif level == "full":
            open_image(path)

    return functools.cache(check)


def _read(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; data.path must be a JSON or JSONL file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not text; data.path must be a JSON or JSONL file") from error
    if not text.strip():
        raise UserError(f"{path} is empty; data.path must hold LLaVA rows")
    return text


def _parse(path: Path, text: str) -> list:
    """The rows of a .json list, or of a .jsonl file with one row a line."""
    where = path
    try:
        if path.suffix == ".jsonl":
            rows = []
            for number, line in enumerate(text.split("\n"), start=1):
                where = f"{path} line {number}"
                if line.strip():
                    rows.append(json.loads(line))
            return rows
        data = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not JSON: {error} (one row a line needs the suffix .jsonl)"
        ) from error
    if not isinstance(data, list):
        raise UserError(f"{path} is not LLaVA's: expected a list of rows, got {_short(data)}")
    return data


def _name(raw: Any, index: int) -> str:
    return repr(raw["id"]) if isinstance(raw, dict) and "id" in raw else f"number {index}"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
