"""Images: a file, bytes or a PIL image to an upright RGB picture, and on to tiles of a fixed size."""

import io
import os
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from vision_scan.errors import UserError

from .tiles import SizedLayout, TilesConfig, fit

ImageSource = str | Path | bytes | Image.Image
# Files in a folder that are taken for images.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")

# What Pillow's readers raise on damaged files, by experience; the list is theirs, not ours.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    EOFError,
    ArithmeticError,
    RuntimeError,
    MemoryError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


@dataclass(frozen=True, kw_only=True)
class ImageConfig:
    """The pixels of a tile as the vision encoder gets them.

    Attributes:
        height: of a tile, in pixels.
        width: of a tile, in pixels.
        resize: how an image of another shape is fitted: "squash" ignores its aspect ratio, "letterbox"
            keeps it and fills up with `fill`, "crop" keeps it and cuts off what sticks out, equally on
            both sides.
        fill: a colour, red, green and blue from 0 to 255; grey is near every tower's mean.
        tiles: more tiles of an image than the one, or tiles in its own shape, where `resize` and `fill` do not matter;
            see cobra/tiles. None: one of this size.
    """

    height: int
    width: int
    resize: Literal["squash", "letterbox", "crop"] = "squash"
    fill: tuple[int, ...] = (127, 127, 127)
    tiles: TilesConfig | None = None

    def __post_init__(self) -> None:
        if self.height < 1 or self.width < 1:
            raise UserError(f"image size {self.height}x{self.width}: both must be 1 or more")
        if self.resize not in ("squash", "letterbox", "crop"):
            raise UserError(f"image.resize={self.resize!r}: allowed are squash, letterbox, crop")
        if len(self.fill) != 3 or not all(0 <= part <= 255 for part in self.fill):
            raise UserError(f"image.fill={self.fill}: give red, green and blue, each from 0 to 255")


def open_image(source: ImageSource) -> Image.Image:
    """Decodes an image completely, as a person would see it.

    The EXIF orientation is applied, transparency is laid over white, 16-bit depth is brought to 8
    bits, every colour mode becomes RGB, and an animation gives its current (for a file: first) frame.

    Args:
        source: a path, the bytes of an image file, or a PIL image (left as it was).
    Raises:
        UserError: naming the file, if it is missing, empty, truncated or not an image.
    """
    name = _name(source)
    opened = _identify(source, name)
    try:
        opened.load()
        image = _to_rgb(_upright(opened))
    except _DECODE_ERRORS as error:
        raise UserError(f"{name}: the image is damaged or not supported ({error})") from error
    finally:
        if opened is not source:
            opened.close()
    if not image.width or not image.height:
        raise UserError(f"{name}: the image has no pixels ({image.width}x{image.height})")
    return image


def check_image(source: str | Path | bytes | BinaryIO) -> tuple[int, int]:
    """Looks at an image's header only, without decoding it: (height, width) as stored.

    Args:
        source: a path, the bytes of an image file, or an open file, of which no more is read than needed.
    Raises:
        UserError: naming the file, if it is missing, empty or not an image.
    """
    with _identify(source, _name(source)) as image:
        return image.height, image.width


def upright_size(source: ImageSource | BinaryIO) -> tuple[int, int]:
    """Height and width of the picture that `open_image` gives, by the header alone where the format allows it.

    Args:
        source: as `check_image`, or a PIL image.
    Raises:
        UserError: naming the file, if it is missing, empty or not an image.
    """
    image = _identify(source, _name(source))
    try:
        # Of TIFF, Pillow turns the size itself. Of PNG, whose EXIF data may stand last, it decodes the pixels.
        is_turned = image.format != "TIFF" and image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
    except _DECODE_ERRORS:
        is_turned = False
    finally:
        if image is not source:
            image.close()
    return (image.width, image.height) if is_turned else (image.height, image.width)


def to_pixels(image: Image.Image, config: ImageConfig) -> Tensor:
    """Fits an RGB image to tiles of one size: (num_tiles, 3, height, width), float32 in [0, 1].

    The first shows the image as `config.resize` asks; those of `config.tiles` follow row by row.
    """
    pixels = _levels(image)
    tiles = _one_tile(pixels, config)
    if config.tiles is not None:
        tiles = torch.cat([tiles, _grid_of_tiles(pixels, config)])
    return _to_floats(tiles)


def to_patches(image: Image.Image, layout: SizedLayout) -> Tensor:
    """Fits an RGB image to tiles of their own sizes: (num_entries, 3, stride, stride), float32 in [0, 1].

    An entry is a cell of a tile. Those of the whole image stand in front, those of its slices follow slice by slice,
    each row by row.
    """
    pixels = _levels(image)
    (rows, columns), stride = layout.overview, layout.stride
    patches = [_cut(_resize(pixels, rows * stride, columns * stride), rows, columns)]
    if layout.num_slices:
        rows, columns = layout.slice
        whole = _resize(pixels, layout.rows * rows * stride, layout.columns * columns * stride)
        patches += [_cut(tile[None], rows, columns) for tile in _cut(whole, layout.rows, layout.columns)]
    return _to_floats(torch.cat(patches))


def _levels(image: Image.Image) -> Tensor:
    """(1, 3, height, width), uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]


def _to_floats(levels: Tensor) -> Tensor:
    return levels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)


def _name(source: ImageSource | BinaryIO) -> str:
    if isinstance(source, (str, Path)):
        return str(source)
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    return str(getattr(source, "filename", "") or "<image in memory>")


def _identify(source: ImageSource | BinaryIO, name: str) -> Image.Image:
    """Opens `source` as far as its header."""
    if isinstance(source, Image.Image):
        return source
    if not isinstance(source, (str, Path, bytes, io.IOBase)):
        raise UserError(f"an image must be a path, bytes or a PIL image, got {type(source).__name__}")
    if isinstance(source, (str, Path)):
        # os.path, as pathlib raises an error for a name that no file can have.
        if not os.path.exists(source):
            raise UserError(f"{name}: no such file")
        if not os.path.isfile(source):
            raise UserError(f"{name}: not a file; give an image file")
    if isinstance(source, bytes):
        size, source = len(source), io.BytesIO(source)
    elif isinstance(source, io.IOBase):
        size = source.seek(0, io.SEEK_END)
        source.seek(0)
    else:
        size = Path(source).stat().st_size
    if not size:
        raise UserError(f"{name}: the file is empty (0 bytes)")
    try:
        return Image.open(source)
    except PermissionError as error:
        raise UserError(f"{name}: no permission to read it") from error
    except _DECODE_ERRORS as error:
        raise UserError(f"{name}: not an image that Pillow can read") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except _DECODE_ERRORS:  # every viewer shows a picture with broken EXIF data; so do we
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "La":
        image = image.convert("LA")
    if image.mode[0] in "IF":
        # Pillow clips these modes to 0..255, which turns a 16-bit image white.
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        if image.mode.startswith("I;16") or (image.mode == "I" and values.max(initial=0) > 255):
            values = values / 257
        image = Image.fromarray(values.clip(0, 255).round().astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _resize(pixels: Tensor, height: int, width: int) -> Tensor:
    """Bicubic with anti-aliasing, on levels of 8 bits: Pillow's to within a level, and several times as fast."""
    if pixels.shape[2:] == (height, width):
        return pixels
    return F.interpolate(pixels, size=(height, width), mode="bicubic", antialias=True)


def _crop(pixels: Tensor, ratio: float) -> Tensor:
    """The largest middle part of a height that is `ratio` times its width."""
    height, width = pixels.shape[2:]
    inner = (max(1, min(height, round(width * ratio))), max(1, min(width, round(height / ratio))))
    top, left = (height - inner[0]) // 2, (width - inner[1]) // 2
    return pixels[:, :, top : top + inner[0], left : left + inner[1]]


def _one_tile(pixels: Tensor, config: ImageConfig) -> Tensor:
    height, width = config.height, config.width
    if config.resize == "letterbox":
        scale = min(height / pixels.shape[2], width / pixels.shape[3])
        # A very long image must keep at least one pixel across.
        inner = (max(1, round(pixels.shape[2] * scale)), max(1, round(pixels.shape[3] * scale)))
        return _centre(_resize(pixels, *inner), (height, width), config.fill)
    if config.resize == "crop":
        pixels = _crop(pixels, height / width)
    return _resize(pixels, height, width)


def _grid_of_tiles(pixels: Tensor, config: ImageConfig) -> Tensor:
    height, width = pixels.shape[2:]
    tile = config.height, config.width
    rows, columns = config.tiles.choose(height, width, tile)
    full = rows * tile[0], columns * tile[1]
    return _cut(_centre(_resize(pixels, *fit(height, width, full)), full, config.fill), rows, columns)


def _cut(pixels: Tensor, rows: int, columns: int) -> Tensor:
    """An image (1, 3, height, width) as a grid of equal pieces, row by row: (rows * columns, 3, height / rows,
    width / columns)."""
    grid = pixels[0].unflatten(2, (columns, -1)).unflatten(1, (rows, -1))
    return grid.permute(1, 3, 0, 2, 4).flatten(0, 1)


def _centre(pixels: Tensor, size: tuple[int, int], fill: tuple[int, ...]) -> Tensor:
    """An image in the middle of a canvas of a size."""
    height, width = pixels.shape[2:]
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas = torch.tensor(fill, dtype=torch.uint8).view(1, 3, 1, 1).repeat(1, 1, *size)
    canvas[:, :, top : top + height, left : left + width] = pixels
    return canvas
