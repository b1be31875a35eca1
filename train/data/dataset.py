"""A data set: the usable rows of a file or of a mixture of files, checked before the first step, read when needed."""

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cobra.progress import track
from cobra.prompt import check_caption
from cobra.tokenizer import IMAGE
from train.data.images import ImageFile, short
from train.data.rows import BadRowError, Row, parse_row
from train.data.sources import Source, open_source
from train.settings import DataSettings
from vision_scan.errors import UserError

# An image's share of a row's length; the same for every model, so that twins see one order.
CHARACTERS_PER_IMAGE = 256
NUM_REPORTED = 5


@dataclass
class Part:
    """One source of a mixture.

    Attributes:
        weight: how often each of its rows is seen in an epoch; 0.5: every other epoch.
        sampling: which rows are taken: "all", "first:N", "end:N" or "random:N", N a number or a percentage.
    """

    source: Source
    weight: float = 1.0
    sampling: str = "all"


@dataclass(frozen=True)
class Share:
    """The rows of a data set that come from one part."""

    start: int
    count: int
    weight: float

    @property
    def per_epoch(self) -> int:
        """Rows of it that an epoch has."""
        return max(1, round(self.count * self.weight))


@dataclass
class Dataset:
    """The usable rows, by number; see `open_dataset`."""

    settings: DataSettings
    needs: str
    parts: list[Part]
    shares: list[Share] = field(default_factory=list)
    part: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int16))
    index: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    num_characters: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Of the text of each row."""
    num_images: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int32))
    """Of each row."""
    bad: list[str] = field(default_factory=list)
    """One line for each row that was left out."""
    fingerprint: str = ""
    """Changes when the rows or their choice do."""

    @property
    def path(self) -> Path:
        return Path(str(self.settings.path))

    def __len__(self) -> int:
        return len(self.index)

    def __getitem__(self, number: int) -> Row:
        """A row.

        Raises:
            BadRowError: if it can no longer be read.
        """
        index = int(self.index[number])
        try:
            raw, finder = self.parts[self.part[number]].source.read(index)
            return parse_row(raw, name_row(raw, index), finder, self.needs)
        except (UserError, OSError, ValueError) as error:
            raise BadRowError(f"row number {index} of {self.path}: {error}") from error

    def __iter__(self) -> Iterator[Row]:
        return (self[number] for number in range(len(self)))

    @property
    def lengths(self) -> np.ndarray:
        """How long each row is, for sorting only."""
        return self.num_characters + CHARACTERS_PER_IMAGE * self.num_images

    @property
    def epoch_size(self) -> int:
        """Rows of an epoch."""
        return sum(share.per_epoch for share in self.shares)

    def texts(self) -> Iterator[str]:
        """All text, for training a tokenizer."""
        for row in self:
            for text in row.texts:
                yield text.replace(IMAGE, "")


def open_dataset(
    settings: DataSettings,
    needs: str = "conversations",
    rank: int = 0,
    world_size: int = 1,
    gather: Callable[[Any], list[Any]] = lambda item: [item],
) -> Dataset:
    """Goes through a data set once: every row's form, and as much of every image as `settings.check` says.

    Args:
        settings: path, image root, and how much to check.
        needs: the key that a row cannot do without, see `parse_row`.
        rank, world_size: each process looks at its share of the images only.
        gather: brings together what the processes found.
    Raises:
        UserError: one line that names the file and, if rows are bad, their number and the first of them.
    """
    if settings.path is None:
        raise UserError(
            "no data: set data.path to a JSON or JSONL file of rows, tar shards or a .yaml mixture "
            "(--set data.path=FILE)"
        )
    path = Path(settings.path)
    parts = open_parts(path, settings)
    scanned = [_scan(part, settings, needs, rank, world_size) for part in parts]
    for found in gather([rows.bad for rows in scanned]):  # what other processes have found beside ours
        for rows, bad in zip(scanned, found, strict=True):
            rows.bad.update(bad)
    dataset = Dataset(settings, needs, parts)
    digest = hashlib.sha256()
    for number, (part, rows) in enumerate(zip(parts, scanned, strict=True)):
        good = np.array([index for index in range(rows.count) if index not in rows.bad], dtype=np.int64)
        _append(dataset, number, part, rows, good)
        digest.update(rows.digest)
        digest.update(good.tobytes() + repr((part.weight, part.sampling)).encode())
    dataset.fingerprint = digest.hexdigest()
    num_rows = len(dataset) + len(dataset.bad)
    if dataset.bad and not (settings.skip_bad and len(dataset)):
        raise UserError(describe_bad(path, dataset.bad, num_rows))
    if not len(dataset):
        raise UserError(f"{path} has no rows")
    return dataset


def describe_bad(path: Path, bad: Sequence[str], num_rows: int) -> str:
    """The one line about bad rows: how many, the first few, what to do."""
    shown = "; ".join(bad[:NUM_REPORTED]) + ("; ..." if len(bad) > NUM_REPORTED else "")
    rest = num_rows - len(bad)
    advice = "check data.path and data.image_root"
    if rest:
        advice = f"set data.skip_bad=true to train on the other {rest}"
    return f"{path}: {len(bad)} of {num_rows} rows cannot be used: {shown}; {advice}"


def name_row(raw: Any, index: int) -> str:
    """What messages call a row."""
    return repr(raw["id"]) if isinstance(raw, dict) and "id" in raw else f"number {index}"


def image_check(level: str) -> Callable[[ImageFile], None]:
    """What is read of an image before the first step."""
    if level == "headers":
        return lambda image: image.check()
    if level == "full":
        return lambda image: image.open().close()
    return lambda image: None


@dataclass
class _Scanned:
    """What is known of a source after one pass over it."""

    count: int = 0
    num_characters: list[int] = field(default_factory=list)
    num_images: list[int] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    """Row -> why it cannot be used."""
    digest: bytes = b""


def _scan(part: Part, settings: DataSettings, needs: str, rank: int, world_size: int) -> _Scanned:
    found, digest, check = _Scanned(), hashlib.sha256(), image_check(settings.check)
    rows = track(part.source.scan(), f"reading {part.source.path.name}", show=rank == 0)
    for index, (raw, finder, content) in enumerate(rows):
        digest.update(content)
        name = name_row(raw, index)
        num_characters = num_images = 0
        try:
            row = parse_row(raw, name, finder, needs)
            num_characters, num_images = row.num_characters, len(row.images)
            if settings.captions and needs == "conversations":
                check_caption(row.turns, num_images)
            if index % world_size == rank:
                for image in row.images:
                    check(image)
        except UserError as error:
            found.bad[index] = f"row {name}: {error}"
        found.num_characters.append(num_characters)
        found.num_images.append(num_images)
        found.count += 1
    found.digest = digest.digest()
    return found


def _append(dataset: Dataset, number: int, part: Part, rows: _Scanned, good: np.ndarray) -> None:
    """Adds the rows of a source that are good and asked for."""
    good = good[choose_rows(part.sampling, len(good), str(part.source.path))]
    dataset.bad += [rows.bad[index] for index in sorted(rows.bad)]
    if not len(good):
        return
    dataset.shares.append(Share(len(dataset), len(good), part.weight))
    for name, values in (
        ("part", np.full(len(good), number)),
        ("index", good),
        ("num_characters", np.array(rows.num_characters)[good]),
        ("num_images", np.array(rows.num_images)[good]),
    ):
        own = getattr(dataset, name)
        setattr(dataset, name, np.concatenate([own, values.astype(own.dtype)]))


def choose_rows(sampling: str, count: int, where: str) -> np.ndarray:
    """Which of `count` rows a mixture takes, ascending.

    Raises:
        UserError: if `sampling` is not "all", "first:N", "end:N" or "random:N", N a number or a percentage.
    """
    found = re.fullmatch(r"(all|(first|end|random):(\d+(?:\.\d+)?)(%?))", sampling)
    if found is None:
        raise UserError(
            f"{where}: sampling_strategy {sampling!r}, allowed: all, first:N, end:N, random:N, N a number or N%"
        )
    if found[2] is None:
        return np.arange(count)
    wanted = min(count, round(float(found[3]) * (count / 100 if found[4] else 1)))
    if found[2] == "first":
        return np.arange(wanted)
    if found[2] == "end":
        return np.arange(count - wanted, count)
    return np.sort(torch.randperm(count, generator=torch.Generator().manual_seed(0))[:wanted].numpy())


MIXTURE_KEYS = ("path", "json_path", "image_root", "weight", "sampling_strategy")


def open_parts(path: Path, settings: DataSettings) -> list[Part]:
    """The sources that `data.path` stands for: itself, or those that a .yaml mixture lists under `datasets`."""
    if path.suffix not in (".yaml", ".yml"):
        return [Part(open_source(path, settings.image_root, settings.frames))]
    entries = _read_mixture(path)
    parts = []
    for entry in entries:
        unknown = [str(key) for key in entry if key not in MIXTURE_KEYS]
        if unknown:
            raise UserError(f"{path}: unknown key {unknown[0]!r}, allowed: {', '.join(MIXTURE_KEYS)}")
        name = entry.get("path") or entry.get("json_path")
        if not isinstance(name, str):
            raise UserError(f"{path}: a data set must have a path, got {short(entry)}")
        weight = entry.get("weight", 1.0)
        if not isinstance(weight, (int, float)) or not 0 < weight <= 1000:
            raise UserError(f"{path}: weight {weight!r} of {name}, allowed: above 0, how often each row is seen")
        root = entry.get("image_root", settings.image_root)
        source = open_source(path.parent / name, path.parent / root if root else None, settings.frames)
        parts.append(Part(source, float(weight), str(entry.get("sampling_strategy", "all"))))
    return parts


def _read_mixture(path: Path) -> list[dict]:
    try:
        import yaml
    except ImportError as error:
        raise UserError("a .yaml mixture needs pyyaml: pip install 'cobra-vlm[train]'") from error
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    entries = content.get("datasets") if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
        raise UserError(f"{path}: expected `datasets:` with a list of path, weight, ...; got {short(content)}")
    return entries
