"""Texts and images to the tensors that a model takes: resizing, expansion of `<image>`, padding."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from torch import Tensor

from cobra.image import ImageSource, open_image, to_patches, to_pixels
from cobra.prompt import IGNORE, TEMPLATES, Rendered, Turn, body, count_marks, render, render_caption
from cobra.tiles import Layout, SizedLayout
from cobra.tokenizer import IMAGE, Tokenizer
from cobra.video import Video
from vision_scan.errors import UserError, choose

if TYPE_CHECKING:
    from cobra.config import CobraConfig

Source = ImageSource | Video
Images = Iterable[Source] | Source | None


class Tiles(NamedTuple):
    """An image or a video as a model gets it.

    Attributes:
        pixel_values: (num_tiles, 3, height, width), float32 in [0, 1]; of tiles of their own sizes their cells, (cells,
            3, stride, stride).
        sizes: height and width of the image, or of each frame, before resizing.
        num_tokens: how many it becomes.
    """

    pixel_values: Tensor
    sizes: tuple[tuple[int, int], ...]
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
            images: per row its images and videos, in the order of the `<image>` marks in its text.
            padding_side: where short rows are filled up with `<pad>`.
        Returns:
            input_ids: (batch, seqlen), int64; each mark expanded to the image's number of tokens.
            attention_mask: (batch, seqlen), int64, 0 at pads.
            pixel_values: (num_tiles, 3, height, width), float32 in [0, 1]; None without images. Where tiles have sizes
                of their own (`image.tiles` native or uhd) an entry is not a tile but a cell of one, as many pixels
                each way as the tower's stride; the cells of a tile stand row by row.
            image_sizes: (num_images, 2), int64, height and width before resizing; a frame is an image.
            tiles_per_image: (num_images,), int64, entries of pixel_values.
            num_frames: (marks,), int64, how many frames each has, 1 of an image; with `config.video` only.
        Raises:
            UserError: naming the row, if its marks and images differ in number.
        """
        if padding_side not in ("left", "right"):
            raise UserError(f"padding_side={padding_side!r}: allowed are left, right")
        rows, tiles = self.rows(text, images)
        input_ids, attention_mask = pad([row.input_ids for row in rows], self.tokenizer.pad_id, padding_side)
        per_image = [self.config.layout(*size).num_entries for tile in tiles for size in tile.sizes]
        return {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            **self.stack(tiles),
            "tiles_per_image": torch.tensor(per_image, dtype=torch.int64),
        }

    def rows(
        self, text: Sequence[str | Sequence[Turn]], images: Sequence[Images] | None = None
    ) -> tuple[list[Rendered], list[Tiles]]:
        """The rows of a batch as they are, and the tiles of all their images in order; see `__call__`."""
        if isinstance(text, str):
            raise UserError("text must be a list with one prompt per row, got a single string")
        sources = [None] * len(text) if images is None else list(images)
        if len(sources) != len(text):
            raise UserError(f"{len(text)} texts, but images for {len(sources)} rows")
        rows: list[Rendered] = []
        tiles: list[Tiles] = []
        for index, (prompt, row_sources) in enumerate(zip(text, sources, strict=True)):
            prompt, given = self._unfold_row(prompt, list_images(row_sources))
            new = [self.tiles(source) for source in given]
            try:
                rows.append(self._row(prompt, [tile.num_tokens for tile in new]))
            except UserError as error:
                raise UserError(f"row {index}: {error}") from error
            tiles += new
        return rows, tiles

    def stack(self, tiles: Sequence[Tiles]) -> dict[str, Tensor | None]:
        """What a model takes of images and videos: pixel_values, image_sizes, and with `config.video` num_frames."""
        sizes = [size for tile in tiles for size in tile.sizes]
        inputs = {
            "pixel_values": torch.cat([tile.pixel_values for tile in tiles]) if tiles else None,
            "image_sizes": torch.tensor(sizes, dtype=torch.int64).view(-1, 2),
        }
        if self.config.video is not None:
            inputs["num_frames"] = torch.tensor([len(tile.sizes) for tile in tiles], dtype=torch.int64)
        return inputs

    def pixels(self, image: Source) -> Tensor:
        """The pixel_values of one image, see `Tiles`."""
        return self.tiles(image).pixel_values

    def tiles(self, image: Source) -> Tiles:
        """The tiles of one image or video, with sizes and number of tokens."""
        if isinstance(image, Video):
            frames = [self.tiles(frame) for frame in image.frames]
            sizes = [size for frame in frames for size in frame.sizes]
            lengths = self.image_tokens(len(sizes), sizes, is_video=True)
            return Tiles(torch.cat([frame.pixel_values for frame in frames]), tuple(sizes), sum(lengths))
        picture = open_image(image)
        size = picture.height, picture.width
        layout = self.config.layout(*size)
        is_sized = isinstance(layout, SizedLayout)
        pixels = to_patches(picture, layout) if is_sized else to_pixels(picture, self.config.image)
        return Tiles(pixels, (size,), layout.num_tokens)

    def image_tokens(self, num_images: int, sizes: Iterable[tuple[int, int]] = (), is_video: bool = False) -> list[int]:
        """How many tokens each of `num_images` images takes, a video's all at its first frame; see `layouts`."""
        lengths = [layout.num_tokens for layout in self.layouts(num_images, sizes, is_video)]
        return lengths + [0] * (num_images - len(lengths))

    def layouts(self, num_images: int, sizes: Iterable[tuple[int, int]] = (), is_video: bool = False) -> list[Layout]:
        """The tiles and tokens of images, or, with `config.video`, of the one video whose frames they are.

        Args:
            sizes: height and width of at least so many, upright; looked at only if anything depends on them.
            is_video: whether they are frames of a video.
        Raises:
            UserError: if sizes are needed, and they are fewer, or frames are of different shapes.
        """
        layouts = self._image_layouts(num_images, sizes)
        video = self.config.video
        return [video.layout(layouts)] if video and is_video and layouts else layouts

    def _image_layouts(self, num_images: int, sizes: Iterable[tuple[int, int]]) -> list[Layout]:
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
        is_video: bool = False,
    ) -> Rendered:
        """Ids and labels of a conversation to learn from; see `layouts` for the images, `cobra.prompt.render` and
        `render_caption` for the rest."""
        written = render_caption if captions else render
        return written(turns, self.tokenizer, self.template, self.image_tokens(num_images, sizes, is_video))

    def unfold(self, text: str, sources: Sequence[Source]) -> tuple[str, list[Source]]:
        """A user's text with a mark for each frame of its videos, which are images then, where the model's template
        tells frames apart and none of their tokens are dropped."""
        if self.template.video is None or self.config.video is not None:
            return text, list(sources)
        first, *rest = text.split(IMAGE)
        if len(rest) != len(sources):  # who knows which is which; it is reported where marks are counted
            return text, list(sources)
        unfolded: list[Source] = []
        for source, behind in zip(sources, rest, strict=True):
            frames = source.frames if isinstance(source, Video) else None
            first += (IMAGE if frames is None else self.template.video_marks(len(frames))) + behind
            unfolded += [source] if frames is None else frames
        return first, unfolded

    def _unfold_row(
        self, prompt: str | Sequence[Turn], sources: Sequence[Source]
    ) -> tuple[str | Sequence[Turn], list[Source]]:
        """A conversation and its sources, unfolded; a raw prompt stays as it is."""
        if isinstance(prompt, str):
            return prompt, list(sources)
        turns, unfolded, left = [], [], iter(sources)
        for turn in prompt:
            if turn.role == "user":
                text, own = self.unfold(turn.text, list(islice(left, count_marks(turn.text))))
                turn, unfolded = replace(turn, text=text), unfolded + own
            turns.append(turn)
        return turns, [*unfolded, *left]

    def _row(self, prompt: str | Sequence[Turn], lengths: Sequence[int]) -> Rendered:
        if not isinstance(prompt, str):
            return render(prompt, self.tokenizer, self.template, lengths, supervised=False)
        marks = count_marks(prompt)
        if marks != len(lengths):
            raise UserError(f"{marks} {IMAGE} marks for {len(lengths)} images: the two must be equal")
        ids = body(prompt, self.tokenizer, iter(lengths), allow_special=True)
        return Rendered(ids, [IGNORE] * len(ids), marks, 1)


def list_images(images: Images, most: int | None = None) -> list[Source]:
    """Images and videos however given (none, one, or any iterable, of which at most `most` are taken)."""
    return list(islice(iter_images(images), most))


def iter_images(images: Images) -> Iterable[Source]:
    """Images and videos however given (none, one, or any iterable), one after the other."""
    if images is None:
        return iter(())
    if isinstance(images, Source):
        return iter((images,))
    if not isinstance(images, Iterable):
        raise UserError(
            f"images must be a path, bytes, a PIL image, a Video or several of them, got {type(images).__name__}"
        )
    return iter(images)


def pad(
    rows: Sequence[Sequence[int]], pad_id: int, side: Literal["left", "right"], multiple: int = 1
) -> tuple[Tensor, Tensor]:
    """Rows of ids as one tensor and its mask: two (batch, longest), int64, the mask 0 at pads; longest rounded up to a
    multiple of `multiple`."""
    longest = max(map(len, rows), default=0)
    longest += -longest % multiple
    input_ids = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for index, row in enumerate(rows):
        start = longest - len(row) if side == "left" else 0
        input_ids[index, start : start + len(row)] = torch.tensor(row, dtype=torch.int64)
        attention_mask[index, start : start + len(row)] = 1
    return input_ids, attention_mask
