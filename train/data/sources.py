"""Files of rows, of which only an index is kept in memory: JSON, JSONL and WebDataset tar shards.

A source lists its rows once, when it is opened, and reads any of them later by where it stands. So a sample order
is a function of the step alone, and a run resumes to the exact sample in every worker, however many there are.
"""

import glob
import io
import json
import os
import tarfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from cobra.image import IMAGE_SUFFIXES, check_image, open_image, upright_size
from train.data.images import ImageFile, ImageFinder, name_image, short
from vision_scan.errors import UserError

CHUNK = 1 << 24  # characters of a JSON list that are looked at at once


class Source(Protocol):
    """Rows by number, as JSON gave them, with what finds their images."""

    path: Path

    def scan(self) -> Iterator[tuple[Any, ImageFinder, bytes]]:
        """Goes through the file once, which makes `read` know every row: rows, their finders, and what identifies
        their content."""
        ...

    def read(self, index: int) -> tuple[Any, ImageFinder]:
        """One row of those that `scan` went through."""
        ...


class JsonSource:
    """A .json list of rows, or a .jsonl file with one row a line.

    Args:
        path: the file.
        finder: for all its rows.
    """

    def __init__(self, path: Path, finder: ImageFinder) -> None:
        self.path = path
        self.finder = finder
        self._starts, self._ends = array("q"), array("q")

    def scan(self) -> Iterator[tuple[Any, ImageFinder, bytes]]:
        rows = self._lines() if self.path.suffix == ".jsonl" else self._items()
        for raw, start, data in rows:
            self._starts.append(start)
            self._ends.append(start + len(data))
            yield raw, self.finder, data

    def read(self, index: int) -> tuple[Any, ImageFinder]:
        start, end = self._starts[index], self._ends[index]
        return json.loads(_read_at(self.path, start, end - start)), self.finder

    def _lines(self) -> Iterator[tuple[Any, int, bytes]]:
        start = 0
        with _open(self.path) as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    yield _loads(line, f"{self.path} line {number}"), start, line
                start += len(line)
        if not start:
            raise UserError(f"{self.path} is empty; data.path must hold rows")

    def _items(self) -> Iterator[tuple[Any, int, bytes]]:
        """The rows of a list, decoded a piece of the file at a time."""
        with _open(self.path) as file:
            text = _Text(file, self.path)
            text.skip(" \t\r\n")
            if not text.next():
                raise UserError(f"{self.path} is empty; data.path must hold rows")
            if text.next() != "[":
                raise UserError(f"{self.path}: expected a list of rows, got {short(text.value()[0])}")
            text.skip("[")
            while True:
                text.skip(" \t\r\n,")
                if text.next() == "]":
                    return
                yield text.value()


class _Text:
    """The text of a JSON file, of which a piece is in memory.

    Args:
        file: open.
        path: its name, for messages.
    """

    def __init__(self, file: io.BufferedReader, path: Path) -> None:
        self.path = path
        self._text = io.TextIOWrapper(file, encoding="utf-8", newline="")
        self._decoder = json.JSONDecoder()
        self._buffer, self._place, self._byte = "", 0, 0

    def next(self) -> str:
        """The next character, none at the end."""
        while self._place >= len(self._buffer) and self._read():
            pass
        return self._buffer[self._place : self._place + 1]

    def skip(self, characters: str) -> None:
        """Goes on behind all of these (ASCII)."""
        while (found := self.next()) and found in characters:
            self._place += 1
            self._byte += 1

    def value(self) -> tuple[Any, int, bytes]:
        """The next value, the byte where it starts, and its bytes."""
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._place)
                if end < len(self._buffer) or not self._read():  # a number might go on
                    break
                continue
            except json.JSONDecodeError as error:
                if not self._read():
                    raise UserError(
                        f"{self.path} is not JSON: {error.msg} at byte {self._byte} (one row a line needs the suffix "
                        ".jsonl)"
                    ) from error
        data = self._buffer[self._place : end].encode()
        start = self._byte
        self._place, self._byte = end, start + len(data)
        return value, start, data

    def _read(self) -> bool:
        """Forgets what is done and reads a piece more; False at the end."""
        try:
            more = self._text.read(CHUNK)
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} is not text; data.path must hold rows of JSON") from error
        self._buffer, self._place = self._buffer[self._place :] + more, 0
        return bool(more)


def _loads(text: str | bytes, where: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{where} is not JSON: {error} (one row a line needs the suffix .jsonl)") from error


@dataclass(frozen=True)
class ShardImage:
    """An image within a tar file."""

    shard: Path
    name: str
    offset: int
    size: int

    def __str__(self) -> str:
        return f"{self.shard}:{self.name}"

    def read(self) -> bytes:
        return _read_at(self.shard, self.offset, self.size)

    def check(self) -> None:
        with name_image(self):
            check_image(self._stream())

    def read_size(self) -> tuple[int, int]:
        with name_image(self):
            return upright_size(self._stream())

    def open(self) -> Image.Image:
        with name_image(self):
            return open_image(self.read())

    def _stream(self) -> io.BufferedReader:
        return io.BufferedReader(_Slice(self.shard, self.offset, self.size))


class TarSource:
    """WebDataset shards: files that share a name up to its first dot are a sample, `key.json` with the row and
    `key.jpg`, `key.1.png`, ... with its images. A row's `image` names them by file name or by what follows the key;
    without it all of them are meant, in their order. `key.txt` instead of `key.json` is a caption.

    Args:
        path: what was asked for, for messages.
        shards: the tar files.
        frames: how many frames are taken of a video.
    """

    def __init__(self, path: Path, shards: list[Path], frames: int) -> None:
        self.path = path
        self.shards = shards
        self.frames = frames
        self._shard, self._start = array("l"), array("q")

    def scan(self) -> Iterator[tuple[Any, ImageFinder, bytes]]:
        for number, shard in enumerate(self.shards):
            for sample in _samples(shard, 0):
                self._shard.append(number)
                self._start.append(sample.start)
                raw, finder = self._row(sample)
                yield raw, finder, repr((raw, sample.images)).encode()

    def read(self, index: int) -> tuple[Any, ImageFinder]:
        sample = next(_samples(self.shards[self._shard[index]], self._start[index]))
        return self._row(sample)

    def _row(self, sample: "Sample") -> tuple[Any, ImageFinder]:
        names = [image.name for image in sample.images]
        if sample.text is None:
            return {"id": sample.key}, _MemberFinder(sample, self.frames)
        if sample.is_caption:
            raw: Any = {
                "conversations": [
                    {"from": "human", "value": "<image>" * len(names)},
                    {"from": "gpt", "value": sample.text.decode("utf-8", "replace").strip()},
                ]
            }
        else:
            raw = _loads(sample.text, f"{sample.shard}:{sample.key}.json")
        if isinstance(raw, dict):
            raw.setdefault("id", sample.key)
            if not any(raw.get(key) for key in ("image", "images", "video")):
                raw["image"] = names
        return raw, _MemberFinder(sample, self.frames)


@dataclass
class Sample:
    """The members of a shard that belong together."""

    shard: Path
    key: str
    start: int
    """Where its first header begins."""
    images: list[ShardImage]
    text: bytes | None = None
    is_caption: bool = False


class _MemberFinder(ImageFinder):
    """Finds images among the members of a sample."""

    def __init__(self, sample: Sample, frames: int) -> None:
        super().__init__(sample.shard, frames)
        self._sample = sample

    def image(self, name: str) -> ImageFile:
        for image in self._sample.images:
            if name in (image.name, os.path.basename(image.name), image.name[len(self._sample.key) + 1 :]):
                return image
        found = ", ".join(image.name for image in self._sample.images) or "none"
        raise UserError(f"{self.root}: no image {name!r} beside {self._sample.key}.json; it has {found}")


def _samples(shard: Path, start: int) -> Iterator[Sample]:
    """The samples of a shard from the one whose first header is at `start`; no image is read."""
    try:
        with shard.open("rb") as file:
            file.seek(start)
            with tarfile.open(fileobj=file, mode="r:") as members:
                sample = None
                for member in members:
                    if not member.isfile():
                        continue
                    key = _key(member.name)
                    if sample is None or key != sample.key:
                        if sample is not None:
                            yield sample
                        sample = Sample(shard, key, member.offset, [])
                    _add(sample, member, members)
                if sample is not None:
                    yield sample
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"{shard}: damaged or not a tar file ({error})") from error


def _add(sample: Sample, member: tarfile.TarInfo, members: tarfile.TarFile) -> None:
    suffix = os.path.splitext(member.name)[1].lower()
    if suffix in IMAGE_SUFFIXES:
        sample.images.append(ShardImage(sample.shard, member.name, member.offset_data, member.size))
    elif suffix in (".json", ".txt") and (sample.text is None or suffix == ".json"):
        file = members.extractfile(member)
        sample.text = b"" if file is None else file.read()
        sample.is_caption = suffix == ".txt"


def _key(name: str) -> str:
    """A member's name up to the first dot behind its folder."""
    folder, slash, file = name.rpartition("/")
    return folder + slash + file.partition(".")[0]


def open_source(path: str | Path, image_root: str | Path | None, frames: int) -> Source:
    """The rows of a file, a tar shard, a folder of shards, or a pattern of them (`data/*.tar`).

    Raises:
        UserError: if there is nothing of the kind.
    """
    shards = _find_shards(str(path))
    path = Path(path)
    if shards:
        return TarSource(path, shards, frames)
    root = Path(image_root) if image_root is not None else path.parent
    if not root.is_dir():
        raise UserError(
            f"data.image_root {root} is not a folder; give the folder that image paths start from"
        )
    return JsonSource(path, ImageFinder(root, frames))


def _find_shards(path: str) -> list[Path]:
    if os.path.isdir(path):
        shards = sorted(Path(path).glob("*.tar"))
        if not shards:
            raise UserError(f"cannot read {path}: a folder without .tar shards; give a JSON or JSONL file")
        return shards
    if path.endswith(".tar"):
        shards = [Path(name) for name in sorted(glob.glob(path))] or [Path(glob.escape(path))]
        if not shards[0].is_file():
            raise UserError(f"cannot read {path}: no such shards")
        return shards
    return []


def _open(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise UserError(
            f"cannot read {path}: {error.strerror}; data.path must be JSON, JSONL, tar shards or a .yaml mixture"
        ) from error


def _read_at(path: Path, offset: int, size: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(size)


class _Slice(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._path, self._offset, self._size = path, offset, size
        self._place = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._size}[whence]
        return self._place

    def readinto(self, buffer: Any) -> int:
        size = max(0, min(len(buffer), self._size - self._place))
        data = _read_at(self._path, self._offset + self._place, size)
        buffer[: len(data)] = data
        self._place += len(data)
        return len(data)
