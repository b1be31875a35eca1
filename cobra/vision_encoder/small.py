"""A small trainable tower, for any image size."""

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from cobra.image import ImageConfig
from cobra.scan_block import ScanBlock, ScanBlocksConfig
from cobra.typed_config import require_positive
from vision_scan.errors import UserError, choose

from .patches import PatchAttention, check_blocks, patch_grid


@dataclass(frozen=True, kw_only=True)
class SmallEncoderConfig:
    """A trainable tower of about a million parameters.

    Attributes:
        patch_size: a power of two.
        depth: blocks of attention.
        positions: whether features say which row and column they are of.
        stem: what makes features of pixels: convolutions that overlap, or linear maps of each patch alone.
        scan: blocks behind those of attention, which read the grid along a scan order; None: there are none.
    """

    kind: Literal["small"] = "small"
    patch_size: int = 8
    d_model: int = 128
    depth: int = 1
    num_heads: int = 4
    positions: bool = True
    stem: Literal["conv", "patch"] = "conv"
    scan: ScanBlocksConfig | None = None

    def __post_init__(self) -> None:
        require_positive(self, "d_model", "num_heads")
        choose("stem", self.stem, STEMS)
        if self.depth < 0:
            raise UserError(f"small encoder: depth {self.depth} must be 0 or more")
        if self.patch_size < 2 or self.patch_size & (self.patch_size - 1):
            raise UserError(f"small encoder: patch_size {self.patch_size} must be a power of two, at least 2")
        if self.d_model % self.num_heads or self.d_model % 4:
            raise UserError(
                f"small encoder: d_model {self.d_model} must be a multiple of 4 "
                f"and of num_heads {self.num_heads}"
            )

    @property
    def stride(self) -> int:
        return self.patch_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return patch_grid(height, width, self.patch_size)


class SmallEncoder(nn.Module):
    """From pixels to the patch grid, then a few global attention blocks and scan blocks; any image size.

    Convolutions in front of the attention blocks: Xiao et al. 2021 (arXiv:2106.14881). Without blocks, a feature of the
    stem "patch" is of its patch alone.
    """

    Config = SmallEncoderConfig

    def __init__(self, config: SmallEncoderConfig, image: ImageConfig) -> None:
        super().__init__()
        self.d_model = config.d_model
        self.patch_size = config.patch_size
        self.positions = config.positions
        self.stem = STEMS[config.stem](config)
        self.blocks = nn.ModuleList(
            EncoderBlock(config.d_model, config.num_heads) for _ in range(config.depth)
        )
        scan = config.scan
        self.scans = nn.ModuleList(
            ScanBlock(scan, config.d_model, depth) for depth in range(0 if scan is None else scan.depth)
        )
        self.norm = nn.LayerNorm(config.d_model)

    def check_attention(self, what: str, blocks: Sequence[int]) -> None:
        check_blocks(what, blocks, len(self.blocks), "raise vision_encoder.depth")

    def forward(
        self, pixel_values: Tensor, attention_of: Sequence[int] = ()
    ) -> Tensor | tuple[Tensor, list[PatchAttention]]:
        height, width = patch_grid(*pixel_values.shape[-2:], self.patch_size)
        pixels = pixel_values[..., : height * self.patch_size, : width * self.patch_size]
        x = self.stem((pixels.to(self.norm.weight.dtype) - 0.5) / 0.25).movedim(1, -1)
        positions = position_grid(height, width, self.d_model, x.device).to(x.dtype) if self.positions else 0.0
        tokens = (x + positions).flatten(1, 2)
        entering = []
        for block in self.blocks:
            entering.append(tokens)
            tokens = block(tokens)
        x = tokens.unflatten(1, (height, width))
        for scan in self.scans:
            x = scan(x)
        # Once more behind the norm: a tower that was trained on what stands in a patch need not keep where.
        features = self.norm(x) + positions
        if not attention_of:
            return features
        heads = (self.blocks[number].heads(entering[number].detach()) for number in attention_of)
        return features, [PatchAttention.of(q, k) for q, k, _ in heads]


def _convolutions(config: SmallEncoderConfig) -> nn.Sequential:
    """Halves the picture until a patch is a pixel."""
    steps = int(math.log2(config.patch_size))
    widths = [3, *(max(config.d_model >> (steps - step), 16) for step in range(1, steps + 1))]
    stem: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        stem += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(1, after), nn.GELU()]
        stem.append(ResidualConv(after))
    return nn.Sequential(*stem, nn.Conv2d(widths[-1], config.d_model, 1))


def _patch_maps(config: SmallEncoderConfig) -> nn.Sequential:
    """Three linear maps of each patch."""
    d, side = config.d_model, config.patch_size
    return nn.Sequential(
        nn.Conv2d(3, 2 * d, side, stride=side), nn.GELU(), nn.Conv2d(2 * d, 2 * d, 1), nn.GELU(), nn.Conv2d(2 * d, d, 1)
    )


STEMS: dict[str, Callable[[SmallEncoderConfig], nn.Sequential]] = {"conv": _convolutions, "patch": _patch_maps}


class ResidualConv(nn.Module):
    """x plus two convolutions of norm(x), of 3 x 3 and of 1 x 1 pixels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, channels)
        self.conv, self.proj = nn.Conv2d(channels, channels, 3, padding=1), nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.proj(nn.functional.gelu(self.conv(self.norm(x))))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, not causal."""

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1, self.norm2 = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.qkv, self.proj = nn.Linear(d_model, 3 * d_model), nn.Linear(d_model, d_model)
        self.mlp = nn.Sequential(nn.Linear(d_model, 4 * d_model), nn.GELU(), nn.Linear(4 * d_model, d_model))

    def heads(self, x: Tensor) -> Tensor:
        """Queries, keys and values: (3, n, heads, tokens, headdim)."""
        return self.qkv(self.norm1(x)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(y.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm2(x))


def position_grid(height: int, width: int, d_model: int, device: torch.device) -> Tensor:
    """Fixed sine and cosine positions of rows and columns, (height, width, d_model)."""
    quarter = d_model // 4
    frequency = 100.0 ** (-torch.arange(quarter, device=device) / quarter)

    def waves(count: int) -> Tensor:
        angle = torch.arange(count, device=device)[:, None] * frequency
        return torch.cat([angle.sin(), angle.cos()], dim=-1)

    rows = waves(height)[:, None].expand(-1, width, -1)
    columns = waves(width)[None].expand(height, -1, -1)
    return torch.cat([rows, columns], dim=-1)
