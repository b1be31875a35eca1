"""Images of files, folders, PDFs and videos: in order, decoded one at a time."""

import contextlib
import copy
import importlib
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from PIL import Image

from cobra.image import IMAGE_SUFFIXES, ImageSource, check_image
from cobra.video import Video
from vision_scan.errors import UserError

if TYPE_CHECKING:
    from cobra.model import Cobra

PDF_SUFFIXES = (".pdf",)
VIDEO_SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts")
SUFFIXES = (*IMAGE_SUFFIXES, *PDF_SUFFIXES, *VIDEO_SUFFIXES)
PDF_DPI = 150  # small print stays readable, and a letter page has about 1,300 x 1,650 pixels
PDF_MOST_SIDE = 4096  # pixels: a poster is not drawn in full
MICROSECONDS = 10**6  # a container's unit of time
CLIP_FRAMES = 32  # that a model which drops what does not change is given together


@dataclass(frozen=True)
class Every:
    """Which frames of a video are taken: the first, and then one every so many seconds or frames."""

    seconds: Fraction | None = None
    frames: int | None = None

    @staticmethod
    def parse(text: str) -> "Every":
        """ "1s", "0.5s", "250ms" or "10f", every tenth frame.

        Raises:
            UserError: if it is none of these.
        """
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(s|ms|f)", text.strip())
        number = Fraction(match[1]) if match else Fraction(0)
        if not match or number <= 0 or (match[2] == "f" and number.denominator != 1):
            raise UserError(f"every {text!r}: give seconds (1s, 0.5s, 250ms) or a number of frames (10f), above 0")
        if match[2] == "f":
            return Every(frames=int(number))
        return Every(seconds=number / 1000 if match[2] == "ms" else number)


class Part(Protocol):
    """A file with images in it."""

    count: int
    """How many, or about how many."""

    def __iter__(self) -> Iterator[ImageSource]: ...


class Media(Iterable[ImageSource | Video]):
    """Images of files, folders of files (by name, numbers in it as numbers), PDFs and videos. Can be gone through more
    than once.

    Args:
        paths: files and folders.
        every: which frames of a video are taken; None: one a second.
    Attributes:
        count: how many images there are; of videos about how many.
    Raises:
        UserError: naming the path, if one is missing, is not of a known kind, or cannot be opened. Of images, headers
            are read, of the others what tells how long they are.
    """

    _clip_frames: int | None = None

    def __init__(self, paths: Sequence[str | Path], every: Every | None = None) -> None:
        self._parts = [_open(file, every or Every(seconds=Fraction(1))) for file in _files(paths)]

    def for_model(self, model: "Cobra") -> "Media":
        """The same, with frames together for a model that drops what does not change (`config.video`)."""
        made = copy.copy(self)
        made._clip_frames = None if model.config.video is None else CLIP_FRAMES
        return made

    @property
    def count(self) -> int:
        return sum(part.count for part in self._parts)

    def __iter__(self) -> Iterator[ImageSource | Video]:
        for part in self._parts:
            if self._clip_frames is None or not isinstance(part, _VideoFile):
                yield from part
                continue
            frames = iter(part)
            while clip := list(islice(frames, self._clip_frames)):
                yield Video(clip)


def _files(paths: Sequence[str | Path]) -> Iterator[Path]:
    for path in map(Path, paths):
        if not path.is_dir():
            yield path
            continue
        inside = sorted((file for file in path.iterdir() if file.suffix.lower() in SUFFIXES), key=_by_number)
        if not inside:
            raise UserError(f"{path}: no images, PDFs or videos in this folder ({' '.join(SUFFIXES)})")
        yield from inside


def _by_number(path: Path) -> list[tuple[int, int | str]]:
    """page-9 comes before page-10."""
    pieces = re.split(r"(\d+)", path.name)
    return [(0, int(piece)) if piece.isdecimal() else (1, piece) for piece in pieces if piece]


def _open(path: Path, every: Every) -> Part:
    suffix = path.suffix.lower()
    if suffix in PDF_SUFFIXES:
        return _PdfFile(path)
    if suffix in VIDEO_SUFFIXES:
        return _VideoFile(path, every)
    return _ImageFile(path)


class _ImageFile(Part):
    def __init__(self, path: Path) -> None:
        check_image(path)
        self.path, self.count = path, 1

    def __iter__(self) -> Iterator[ImageSource]:
        yield self.path


class _PdfFile(Part):
    """A PDF's pages, as a screen shows them."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._document() as document:
            self.count = len(document)
        if not self.count:
            raise UserError(f"{path}: a PDF without pages")

    @contextlib.contextmanager
    def _document(self) -> Iterator[Any]:
        pypdfium2 = _import("pypdfium2", "a PDF", self.path)
        _require_file(self.path)
        try:
            document = pypdfium2.PdfDocument(self.path)
        except pypdfium2.PdfiumError as error:
            raise UserError(f"{self.path}: not a PDF that can be opened ({error})") from error
        with contextlib.closing(document):
            yield document

    def __iter__(self) -> Iterator[ImageSource]:
        with self._document() as document:
            document.init_forms()
            for number in range(len(document)):
                yield self._draw(document, number)

    def _draw(self, document: Any, number: int) -> Image.Image:
        import pypdfium2

        try:
            with contextlib.closing(document[number]) as page:
                longest = max(page.get_size())
                return page.render(scale=min(PDF_DPI / 72, PDF_MOST_SIDE / max(longest, 1))).to_pil().convert("RGB")
        except pypdfium2.PdfiumError as error:
            raise UserError(f"{self.path}: page {number + 1} cannot be drawn ({error})") from error


class _VideoFile(Part):
    """Frames of a video, upright and with square pixels."""

    def __init__(self, path: Path, every: Every) -> None:
        self.path, self.every = path, every
        with self._opened() as (container, stream):
            of_stream = stream.duration * stream.time_base if stream.duration else None
            seconds = of_stream or Fraction(container.duration or 0, MICROSECONDS)
            if every.seconds is not None:
                estimate = seconds / every.seconds
            else:
                frames = stream.frames or seconds * (stream.average_rate or 0)
                estimate = Fraction(frames) / (every.frames or 1)
            self.count = max(1, math.ceil(estimate))

    @contextlib.contextmanager
    def _opened(self) -> Iterator[tuple[Any, Any]]:
        av = _import("av", "a video", self.path)
        _require_file(self.path)
        try:
            with av.open(str(self.path)) as container:
                if not container.streams.video:
                    raise UserError(f"{self.path}: no pictures in this file; give a video")
                stream = container.streams.video[0]
                stream.thread_type = "AUTO"
                yield container, stream
        except av.FFmpegError as error:
            raise UserError(f"{self.path}: not a video that can be read ({error.strerror or error})") from error

    def __iter__(self) -> Iterator[ImageSource]:
        with self._opened() as (container, stream):
            for frame in self._chosen(container.decode(stream)):
                yield _upright_frame(frame, stream.codec_context.sample_aspect_ratio)

    def _chosen(self, frames: Iterable[Any]) -> Iterator[Any]:
        if self.every.seconds is None:
            yield from islice(frames, 0, None, self.every.frames)
            return
        first = Fraction(0)
        next_number = 0
        for number, frame in enumerate(frames):
            time = (number if frame.pts is None else frame.pts) * (frame.time_base or Fraction(1, 25))
            first = first if number else time
            due = (time - first) / self.every.seconds
            if due >= next_number:
                yield frame
                next_number = int(due) + 1  # from the first frame on, however late this one is: no drift over hours


def _upright_frame(frame: Any, aspect: Fraction | None) -> Image.Image:
    image = frame.to_image()
    if aspect and aspect != 1:
        image = image.resize((max(1, round(image.width * aspect)), image.height))
    return image.rotate(frame.rotation, expand=True) if frame.rotation else image


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file")


def _import(package: str, what: str, path: Path) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(f"{path}: {what} needs {package}: pip install 'cobra-vlm[media]'") from error
