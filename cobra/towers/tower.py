"""What hierarchical backbones share: pixels in, the last stage's grid of features out; released weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from cobra.checkpoint import assign_tensors, read_state_dict
from cobra.image import ImageConfig
from vision_scan.errors import UserError
from vision_scan.modules import Released, adapt_released
from vision_scan.precision import BatchNorm2d

# All of them were trained on ImageNet pixels, normalised so.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True, kw_only=True)
class StagesConfig:
    """Channels and blocks of each stage, from the finest grid to the coarsest."""

    kind: str
    dims: tuple[int, ...]
    depths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.dims) == len(self.depths) > 0:
            raise UserError(
                f"{self.kind}: {len(self.dims)} dims for {len(self.depths)} depths: give one of each per stage"
            )
        if min(*self.dims, *self.depths, 1) < 1:
            raise UserError(f"{self.kind}: dims {self.dims} and depths {self.depths} must be 1 or more")

    @property
    def stride(self) -> int:
        """Height and width of a cell of the last stage in pixels."""
        return 2 ** (1 + len(self.dims))

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the last stage for an image of so many pixels."""
        raise NotImplementedError


class Tower(Released):
    """A backbone in stages, each on half as many rows and columns as the one before, as a vision encoder.

    It gives the last stage's features, without the norm and the rest of the head that released models have behind
    them. Batch norms use their stored statistics in training too: so a picture's features do not depend on its
    neighbours in the batch, and the statistics are weights like others. Drop path is left out.

    Args:
        config: the settings; RELEASED has those of the released models.
        image: unused; any size that config.grid accepts.
    """

    Config: ClassVar[type[StagesConfig]]
    RELEASED: ClassVar[Mapping[str, StagesConfig]]
    head_names: ClassVar[tuple[str, ...]]

    def __init__(self, config: StagesConfig, image: ImageConfig) -> None:
        super().__init__()
        self.config, self.d_model = config, config.dims[-1]
        self.build(config)
        self.train()

    def check_attention(self, what: str, blocks: Sequence[int]) -> None:
        raise UserError(f"{what} goes by a tower's attention, and {self.name} has none: take a ViT")

    def build(self, config: Any) -> None:
        """Makes the parts, under the names of the released weights."""
        raise NotImplementedError

    @property
    def name(self) -> str:
        """That of the released model with these settings, otherwise the kind."""
        return next((name for name, config in self.RELEASED.items() if config == self.config), self.config.kind)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(n, 3, height, width) in [0, 1] -> (n, *config.grid(height, width), d_model), in the model's dtype."""
        self.config.grid(*pixel_values.shape[-2:])  # fails where the image is too small
        mean, std = (pixel_values.new_tensor(t).view(3, 1, 1) for t in (MEAN, STD))
        dtype = next(module for module in self.modules() if isinstance(module, nn.Conv2d)).weight.dtype
        return self.features(((pixel_values - mean) / std).to(dtype))

    def features(self, pixels: Tensor) -> Tensor:
        """The last stage's features, channels last, of normalised pixels (n, 3, height, width)."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> "Tower":
        super().train(mode)
        for module in self.modules():
            if isinstance(module, BatchNorm2d):
                module.training = False
        return self

    def load_weights(self, path: str | Path) -> None:
        """Fills the tower with released weights, see `cobra.vision_encoder.load_tower_weights`.

        Raises:
            UserError: naming the file, and the tensors that are missing, unexpected or of another shape.
        """
        where = f"{path}, read as {self.name},"
        given = read_state_dict(path)
        while given and all(name.startswith("module.") for name in given):  # saved from a parallel wrapper
            given = {name.removeprefix("module."): tensor for name, tensor in given.items()}
        kept = {name: tensor for name, tensor in given.items() if name.partition(".")[0] not in self.head_names}
        others = [name for name, tensor in kept.items() if not isinstance(tensor, Tensor)]
        if others:
            raise UserError(f"{where} is not a state dict: {others[0]} is not a tensor")
        assign_tensors(self, adapt_released(self, kept), where)


def halved(size: int, times: int) -> int:
    """Rows or columns after strides of two that also take what is left over."""
    return -(-size // 2**times)


class ToChannelsLast(nn.Module):
    """(batch, channels, height, width) -> (batch, height, width, channels)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(1, -1)


class ToChannelsFirst(nn.Module):
    """(batch, height, width, channels) -> (batch, channels, height, width)."""

    def forward(self, x: Tensor) -> Tensor:
        return x.movedim(-1, 1)
