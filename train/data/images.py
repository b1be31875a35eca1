"""Where the images of a data set are: files, bytes within a row, frames of a video; not read yet."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from cobra.image import IMAGE_SUFFIXES, check_image, open_image, upright_size
from vision_scan.errors import UserError


class ImageFile(Protocol):
    """An image that has not been read yet."""

    def __str__(self) -> str: ...

    def read(self) -> bytes:
        """The file as it is."""
        ...

    def check(self) -> None:
        """Reads the header only."""

    def read_size(self) -> tuple[int, int]:
        """Height and width as `open` gives them, without decoding where the format allows it."""
        ...

    def open(self) -> Image.Image:
        """Decodes it."""


@dataclass(frozen=True)
class PathImage:
    """An image in a file of its own."""

    path: Path

    def __str__(self) -> str:
        return str(self.path)

    def read(self) -> bytes:
        return self.path.read_bytes()

    def check(self) -> None:
        check_image(self.path)

    def read_size(self) -> tuple[int, int]:
        return upright_size(self.path)

    def open(self) -> Image.Image:
        return open_image(self.path)


@dataclass(frozen=True)
class EmbeddedImage:
    """The bytes of an image file within a row, as a data URL has them."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name

    def read(self) -> bytes:
        return self.data

    def check(self) -> None:
        with name_image(self):
            check_image(self.data)

    def read_size(self) -> tuple[int, int]:
        with name_image(self):
            return upright_size(self.data)

    def open(self) -> Image.Image:
        with name_image(self):
            return open_image(self.data)


@contextlib.contextmanager
def name_image(image: object) -> Iterator[None]:
    """Has an error about the bytes of an image name the image."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{image}: {str(error).partition(': ')[2]}") from error


class ImageFinder:
    """Where the images that a row names are.

    Args:
        root: the folder that paths start from.
        frames: how many frames are taken of a video, evenly spread.
    """

    def __init__(self, root: Path, frames: int) -> None:
        self.root = root
        self.frames = frames

    def image(self, name: str) -> ImageFile:
        return PathImage(self.root / name)

    def video(self, video: Any) -> list[ImageFile]:
        """The frames taken of a folder of them, or of a list."""
        if isinstance(video, list) and all(isinstance(frame, str) for frame in video):
            return [self.image(name) for name in spread(video, self.frames)]
        if not isinstance(video, str):
            raise UserError(f"'video' must be a folder of frames or a list of them, got {short(video)}")
        folder = self.root / video
        if folder.is_file():
            raise UserError(f"'video' {folder} is a file; extract its frames into a folder and give that")
        try:
            names = sorted(name for name in os.listdir(folder) if name.lower().endswith(IMAGE_SUFFIXES))
        except OSError as error:
            raise UserError(f"'video' {folder}: {error.strerror}; give a folder of frames") from error
        if not names:
            raise UserError(f"'video' {folder} has no frames (files that end in {', '.join(IMAGE_SUFFIXES)})")
        return [PathImage(folder / name) for name in spread(names, self.frames)]


def spread(items: Sequence[str], most: int) -> list[str]:
    """At most so many of the items, at even distances, each from the middle of its stretch."""
    if len(items) <= most:
        return list(items)
    return [items[(2 * index + 1) * len(items) // (2 * most)] for index in range(most)]


def short(value: Any) -> str:
    """A value for a message."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
