"""Texts and images to the tensors that a model takes: resizing, expansion of `<image>`, padding."""

from collections.abc import Iterable, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from cobra.image import ImageSource, open_image, to_patches, to_pixels
from cobra.prompt import TEMPLATES, Rendered, Turn, body, count_marks, render, render_caption
from cobra.tiles import Layout, SizedLayout
from cobra.tokenizer import IMAGE, Tokenizer
from vision_scan.errors import UserError, choose

if TYPE_CHECKING:
    from cobra.config import CobraConfig

Images = Iterable[ImageSource] | ImageSource | None


class Tiles(NamedTuple):
    """An image as a model gets it.

    Attributes:
        pixel_values: (num_tiles, 3, height, width), float32 in [0, 1]; of tiles of their own sizes their cells, (cells,
            3, stride, stride).
        size: height and width of the image before resizing.
        num_tokens: how many it becomes.
    """

    pixel_values: Tensor
    size: tuple[int, int]
    num_tokens: int


class Processor:
    """Prepares inputs for one model.

    Args:
        config: of the model; gives the tile size, the tokens of an image and the prompt template.
        tokenizer: of the model.
    """

    def __init__(self, config: "CobraConfig", tokenizer: Tokenizer) -> None:
        self.config = config
        self.tokenizer = tokenizer
        self.template = choose("template", config.template, TEMPLATES)

    def __call__(
        self,
        text: Sequence[str | Sequence[Turn]],
        images: Sequence[Images] | None = None,
        padding_side: Literal["left", "right"] = "left",
    ) -> dict[str, Tensor | None]:
        """A padded batch.

        Args:
            text: per row a raw prompt, whose special tokens are recognised, or a conversation, which
                is rendered by the model's template (a last user turn leaves the answer to the model).
            images: per row its images, in the order of the `<image>` marks in its text.
            padding_side: where short rows are filled up with `<pad>`.
        Returns:
            input_ids: (batch, seqlen), int64; each mark expanded to the image's number of tokens.
            attention_mask: (batch, seqlen), int64, 0 at pads.
            pixel_values: (num_tiles, 3, height, width), float32 in [0, 1]; None without images. Where tiles have sizes
                of their own (`image.tiles` native or uhd) an entry is not a tile but a cell of one, as many pixels
                each way as the tower's stride; the cells of a tile stand row by row.
            image_sizes: (num_images, 2), int64, height and width before resizing.
            tiles_per_image: (num_images,), int64, entries of pixel_values.
        Raises:
            UserError: naming the row, if its marks and images differ in number.
        """
        if isinstance(text, str):
            raise UserError("text must be a list with one prompt per row, got a single string")
        if padding_side not in ("left", "right"):
            raise UserError(f"padding_side={padding_side!r}: allowed are left, right")
        sources = [None] * len(text) if images is None else list(images)
        if len(sources) != len(text):
            raise UserError(f"{len(text)} texts, but images for {len(sources)} rows")
        rows: list[list[int]] = []
        tiles: list[Tiles] = []
        for index, (prompt, row_sources) in enumerate(zip(text, sources, strict=True)):
            pictures = [open_image(source) for source in list_images(row_sources)]
            try:
                lengths = self.image_tokens(len(pictures), ((picture.height, picture.width) for picture in pictures))
                rows.append(self._row(prompt, lengths))
            except UserError as error:
                raise UserError(f"row {index}: {error}") from error
            tiles += [self.tiles(picture) for picture in pictures]
        input_ids, attention_mask = pad(rows, self.tokenizer.pad_id, padding_side)
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pixel_values": torch.cat([tile.pixel_values for tile in tiles]) if tiles else None,
            "image_sizes": torch.tensor([tile.size for tile in tiles], dtype=torch.int64).view(-1, 2),
            "tiles_per_image": torch.tensor([len(tile.pixel_values) for tile in tiles], dtype=torch.int64),
        }

    def pixels(self, image: ImageSource) -> Tensor:
        """The pixel_values of one image, see `Tiles`."""
        return self.tiles(image).pixel_values

    def tiles(self, image: ImageSource) -> Tiles:
        """The tiles of one image, with its size and its number of tokens."""
        picture = open_image(image)
        size = picture.height, picture.width
        layout = self.config.layout(*size)
        is_sized = isinstance(layout, SizedLayout)
        pixels = to_patches(picture, layout) if is_sized else to_pixels(picture, self.config.image)
        return Tiles(pixels, size, layout.num_tokens)

    def image_tokens(self, num_images: int, sizes: Iterable[tuple[int, int]] = ()) -> list[int]:
        """How many tokens each of `num_images` images takes; see `layouts`."""
        return [layout.num_tokens for layout in self.layouts(num_images, sizes)]

    def layouts(self, num_images: int, sizes: Iterable[tuple[int, int]] = ()) -> list[Layout]:
        """The tiles and tokens of images.

        Args:
            sizes: height and width of at least so many, upright; looked at only if anything depends on them.
        Raises:
            UserError: if it does, and they are fewer.
        """
        if self.config.image.tiles is None:
            return [self.config.layout(0, 0)] * num_images
        layouts = [self.config.layout(*size) for size in islice(sizes, num_images)]
        if len(layouts) != num_images:
            raise UserError(
                f"{len(layouts)} sizes for {num_images} images: with image.tiles the tokens of an image depend on its "
                "height and width, so give those of each"
            )
        return layouts

    def render(
        self,
        turns: Sequence[Turn],
        num_images: int,
        captions: bool = False,
        sizes: Iterable[tuple[int, int]] = (),
    ) -> Rendered:
        """Ids and labels of a conversation to learn from; see `layouts` for the sizes, `cobra.prompt.render` and
        `render_caption` for the rest."""
        written = render_caption if captions else render
        return written(turns, self.tokenizer, self.template, self.image_tokens(num_images, sizes))

    def _row(self, prompt: str | Sequence[Turn], lengths: Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return render(prompt, self.tokenizer, self.template, lengths, supervised=False).input_ids
        marks = count_marks(prompt)
        if marks != len(lengths):
            raise UserError(f"{marks} {IMAGE} marks for {len(lengths)} images: the two must be equal")
        return body(prompt, self.tokenizer, iter(lengths), allow_special=True)


def list_images(images: Images, most: int | None = None) -> list[ImageSource]:
    """Images however given (none, one, or any iterable, of which at most `most` are taken)."""
    return list(islice(iter_images(images), most))


def iter_images(images: Images) -> Iterable[ImageSource]:
    """Images however given (none, one, or any iterable), one after the other."""
    if images is None:
        return iter(())
    if isinstance(images, ImageSource):
        return iter((images,))
    if not isinstance(images, Iterable):
        raise UserError(
            f"images must be a path, bytes, a PIL image or several of them, got {type(images).__name__}"
        )
    return iter(images)


def pad(rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"]) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor and its mask: two (batch, longest), int64, the mask 0 at pads."""
    longest = max(map(len, rows), default=0)
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        input_ids[index, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        attention_mask[index, start : start + len(row)] = 1
    return input_ids, attention_mask
