"""Videos: frames that are read together, without the places that hardly change from one to the next."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vision_scan.errors import UserError

from .image import ImageSource
from .tiles import Layout


@dataclass(frozen=True)
class Video:
    """Frames in order, given wherever an image can be given, with one `<image>` mark for all of them."""

    frames: Sequence[ImageSource]

    def __post_init__(self) -> None:
        if isinstance(self.frames, str | bytes) or not len(self.frames):
            raise UserError(f"a video must be a list of one or more frames, got {self.frames!r:.60}")


@dataclass(frozen=True)
class VideoLayout(Layout):
    """The frames of a video, one behind another, and how many of their tokens are left.

    Attributes:
        frames: the layout of each.
        kept: tokens of all of them that are kept.
    """

    frames: tuple[Layout, ...]
    kept: int

    @property
    def images(self) -> tuple[Layout, ...]:
        return self.frames

    @property
    def num_tiles(self) -> int:
        return sum(frame.num_tiles for frame in self.frames)

    @property
    def num_entries(self) -> int:
        return sum(frame.num_entries for frame in self.frames)

    @property
    def num_tokens(self) -> int:
        return self.kept

    def grids(self, cells: tuple[int, int]) -> list[tuple[int, int]]:
        return [grid for frame in self.frames for grid in frame.grids(cells)]


@dataclass(frozen=True, kw_only=True)
class EVSConfig:
    """Efficient video sampling: of a video's tokens, those are dropped that are most like the token at the same place
    of the frame before, by the cosine.

    A fixed share of the tokens of all frames is dropped, wherever they stand, but none of the first frame's. So the
    number of tokens follows from that of the frames, and a frame in which much happens keeps more than one in which
    nothing does. What is left stays in order.

    Source: Bagrov et al. 2025, "Efficient Video Sampling" (arXiv:2510.14624), as in the code of Nemotron Nano VL: on
    the tokens behind the connector. Different here: likeness is computed in float32 at least.

    Attributes:
        pruning_rate: the share that is dropped, from 0 to below 1.
    """

    kind: Literal["evs"] = "evs"
    pruning_rate: float = 0.75

    def __post_init__(self) -> None:
        if not 0 <= self.pruning_rate < 1:
            raise UserError(f"video.pruning_rate={self.pruning_rate}: give the share to be dropped, from 0 to below 1")

    def num_tokens(self, num_frames: int, tokens_per_frame: int) -> int:
        """How many tokens of a video are kept."""
        return max(tokens_per_frame, int(num_frames * tokens_per_frame * (1 - self.pruning_rate)))

    def layout(self, frames: Sequence[Layout]) -> VideoLayout:
        """That of a video with such frames.

        Raises:
            UserError: if they are not of the same rows and columns of tokens.
        """
        first = frames[0]
        other = next((frame for frame in frames if frame != first), None)
        if other is not None:
            raise UserError(
                f"frames of a video become {first.num_tokens} and {other.num_tokens} tokens, of tiles of different "
                "shapes: give frames of one height and width, or set image.tiles=none"
            )
        return VideoLayout(tuple(frames), self.num_tokens(len(frames), first.num_tokens))

    def prune(self, tokens: Tensor, layouts: Sequence[Layout]) -> Tensor:
        """Drops tokens of videos, and of nothing else.

        Args:
            tokens: of all frames of all layouts, (tokens, d_model).
            layouts: of images and videos.
        Returns:
            what is left, as many as `layouts` say, in order.
        """
        pieces = tokens.split([sum(image.num_tokens for image in layout.images) for layout in layouts])
        return torch.cat([self._kept(*each) for each in zip(pieces, layouts, strict=True)])

    def _kept(self, tokens: Tensor, layout: Layout) -> Tensor:
        if len(tokens) == layout.num_tokens:
            return tokens
        return tokens[changed_most(tokens.unflatten(0, (len(layout.images), -1)), layout.num_tokens)]


@torch.no_grad()
def changed_most(frames: Tensor, count: int) -> Tensor:
    """The places of a video that are least like those before, all of the first frame among them.

    Args:
        frames: (num_frames, tokens_per_frame, d_model).
        count: how many, at least those of a frame.
    Returns:
        (count,) int64: ascending places in the flattened frames; of equal ones the first.
    """
    wide = frames.to(torch.promote_types(frames.dtype, torch.float32))
    change = 1 - cosine_similarity(wide[1:], wide[:-1], dim=-1)
    first = change.new_full((1, frames.shape[1]), torch.inf)
    ranked = torch.cat([first, change]).flatten().argsort(descending=True, stable=True)
    return ranked[:count].sort().values
