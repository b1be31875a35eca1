"""Vision encoders: pixels in [0, 1] to a grid of features. Each normalises with the mean and standard
deviation that it was trained with, so callers never do.

An encoder is a module `Encoder(config, image)` with `forward(pixel_values (n, 3, height, width)) -> (n,
grid_height, grid_width, d_model)`, the attribute `d_model`, and a Config with `grid(height, width)`. One that serves
token reductions has `check_attention()` too, which raises a UserError if it cannot, and returns features and
`PatchAttention` if called with `return_attention=True`.
"""

import itertools
import math
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union

import torch
from torch import Tensor, nn

from vision_scan.errors import UserError

from .checkpoint import assign_tensors, read_state_dict
from .image import ImageConfig
from .towers import HIERARCHICAL, Tower
from .typed_config import require_positive


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches; what does not fill a patch at the right and bottom is not seen."""
    grid = height // patch_size, width // patch_size
    if 0 in grid:
        raise UserError(f"image {height} x {width} is smaller than a patch of {patch_size} pixels")
    return grid


@dataclass(frozen=True)
class PatchAttention:
    """What a tower's last attention says about its patches; float32 at least, without gradients.

    Attributes:
        received: (n, patches): how much attention a patch gets, mean over the heads: from the class token, or
            where there is none, from all tokens on average.
        keys: (n, patches, headdim): mean over the heads.
    """

    received: Tensor
    keys: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, num_prefix_tokens: int = 0, has_class_token: bool = False) -> "PatchAttention":
        """Of queries and keys (n, heads, tokens, headdim), the class token first, the patches last."""
        wide = torch.promote_types(q.dtype, torch.float32)
        asking = q[:, :, :1] if has_class_token else q
        with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
            heads = zip(asking.to(wide).unbind(1), k.to(wide).unbind(1), strict=True)  # one at a time, to save memory
            received = sum((a @ b.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1) for a, b in heads) / q.shape[1]
            keys = k.to(wide).mean(1)
        return cls(received[:, num_prefix_tokens:], keys[:, num_prefix_tokens:])


@dataclass(frozen=True, kw_only=True)
class SmallEncoderConfig:
    """A trainable tower of about a million parameters; patch_size is a power of two."""

    kind: Literal["small"] = "small"
    patch_size: int = 8
    d_model: int = 128
    depth: int = 1
    num_heads: int = 4

    def __post_init__(self) -> None:
        require_positive(self, "d_model", "num_heads")
        if self.depth < 0:
            raise UserError(f"small encoder: depth {self.depth} must be 0 or more")
        if self.patch_size < 2 or self.patch_size & (self.patch_size - 1):
            raise UserError(f"small encoder: patch_size {self.patch_size} must be a power of two, at least 2")
        if self.d_model % self.num_heads or self.d_model % 4:
            raise UserError(
                f"small encoder: d_model {self.d_model} must be a multiple of 4 "
                f"and of num_heads {self.num_heads}"
            )

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return patch_grid(height, width, self.patch_size)


class SmallEncoder(nn.Module):
    """Convolutions to the patch grid, then a few global attention blocks; any image size.

    Convolutions in front of the attention blocks: Xiao et al. 2021 (arXiv:2106.14881).
    """

    Config = SmallEncoderConfig

    def __init__(self, config: SmallEncoderConfig, image: ImageConfig) -> None:
        super().__init__()
        self.d_model = config.d_model
        self.patch_size = config.patch_size
        steps = int(math.log2(config.patch_size))
        widths = [3, *(max(config.d_model >> (steps - step), 16) for step in range(1, steps + 1))]
        stem: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            stem += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.GroupNorm(1, after), nn.GELU()]
            stem.append(ResidualConv(after))
        self.stem = nn.Sequential(*stem, nn.Conv2d(widths[-1], config.d_model, 1))
        self.blocks = nn.ModuleList(
            EncoderBlock(config.d_model, config.num_heads) for _ in range(config.depth)
        )
        self.norm = nn.LayerNorm(config.d_model)

    def check_attention(self) -> None:
        if not self.blocks:
            raise UserError("token_reduction goes by a tower's attention: set vision_encoder.depth to 1 or more")

    def forward(
        self, pixel_values: Tensor, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, PatchAttention]:
        height, width = patch_grid(*pixel_values.shape[-2:], self.patch_size)
        pixels = pixel_values[..., : height * self.patch_size, : width * self.patch_size]
        x = self.stem((pixels.to(self.norm.weight.dtype) - 0.5) / 0.25).movedim(1, -1)
        positions = position_grid(height, width, self.d_model, x.device).to(x.dtype)
        tokens = (x + positions).flatten(1, 2)
        before = tokens
        for block in self.blocks:
            before, tokens = tokens, block(tokens)
        # Once more behind the norm: a tower that was trained on what stands in a patch need not keep where.
        features = self.norm(tokens).unflatten(1, (height, width)) + positions
        if not return_attention:
            return features
        with torch.no_grad():
            q, k, _ = self.blocks[-1].heads(before)
        return features, PatchAttention.of(q, k)


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


@dataclass(frozen=True, kw_only=True)
class TimmEncoderConfig:
    """A ViT of timm by name; features of one block, -2 is the last but one, as LLaVA and Cobra take."""

    kind: Literal["timm"] = "timm"
    name: str
    block: int = -2

    @property
    def patch_size(self) -> int:
        found = re.search(r"patch(\d+)", self.name)
        if found is None:
            raise UserError(f"timm encoder {self.name!r}: only ViTs whose name says patchNN are supported")
        return int(found[1])

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return patch_grid(height, width, self.patch_size)


class TimmEncoder(nn.Module):
    """The features of a timm ViT as a grid; class and register tokens are dropped, no final norm."""

    Config = TimmEncoderConfig

    def __init__(self, config: TimmEncoderConfig, image: ImageConfig) -> None:
        super().__init__()
        try:
            import timm
        except ImportError:
            raise UserError(
                f"vision encoder {config.name!r} needs timm: pip install 'cobra-vlm[vision]'"
            ) from None
        if not timm.is_model(config.name.split(".")[0]):
            raise UserError(f"timm has no model {config.name!r}; timm.list_models() names what it has")
        size = {"img_size": (image.height, image.width)}
        self.tower: Any = timm.create_model(config.name, pretrained=False, num_classes=0, **size)
        depth = len(self.tower.blocks)
        if not -depth <= config.block < depth:
            raise UserError(f"{config.name} has {depth} blocks; block {config.block} is not one of them")
        self.name, self.depth, self.block = config.name, depth, config.block % depth
        self.d_model = self.tower.embed_dim
        # Blocks behind the one whose features are taken would only cost memory.
        self.tower.blocks = self.tower.blocks[: self.block + 1]
        self.tower.norm, self.tower.attn_pool = nn.Identity(), None
        self.mean = tuple(self.tower.pretrained_cfg["mean"])
        self.std = tuple(self.tower.pretrained_cfg["std"])

    def check_attention(self) -> None:
        from timm.models.vision_transformer import Attention, Block

        last = self.tower.blocks[-1]
        if self.block == 0 or type(last) is not Block or type(last.attn) is not Attention:
            raise UserError(
                f"token_reduction reads the attention of block {self.block} of {self.name}: it must be a plain block "
                "of a ViT (CLIP, SigLIP, DINOv2), and not the first"
            )

    def forward(
        self, pixel_values: Tensor, return_attention: bool = False
    ) -> Tensor | tuple[Tensor, PatchAttention]:
        mean, std = (pixel_values.new_tensor(t).view(3, 1, 1) for t in (self.mean, self.std))
        dtype = next(self.tower.parameters()).dtype
        *before, features = self.tower.forward_intermediates(
            ((pixel_values - mean) / std).to(dtype),
            indices=[self.block - 1, self.block] if return_attention else [self.block],
            return_prefix_tokens=return_attention,
            norm=False,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        if not return_attention:
            return features.movedim(1, -1)
        if self.tower.num_prefix_tokens:  # timm pairs patches with them only where there are any
            ((patches, prefix),), (features, _) = before, features
        else:
            (patches,), prefix = before, None
        return features.movedim(1, -1), self._attention(patches.flatten(2).mT, prefix)

    @torch.no_grad()
    def _attention(self, patches: Tensor, prefix: Tensor | None) -> PatchAttention:
        """Of the last block, on what enters it: (n, patches, d_model), and the tokens in front of them."""
        tokens = patches if prefix is None else torch.cat([prefix, patches], dim=1)
        block = self.tower.blocks[-1]
        shape = 3, block.attn.num_heads, block.attn.head_dim
        q, k, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, shape).permute(2, 0, 3, 1, 4)
        has_class_token = self.tower.cls_token is not None
        return PatchAttention.of(
            block.attn.q_norm(q), block.attn.k_norm(k), self.tower.num_prefix_tokens, has_class_token
        )

    def load_weights(self, path: str | Path) -> None:
        """Fills the tower from a file, see `load_tower_weights`."""
        where = f"{path}, read as {self.name},"
        given = self._as_timm_would(read_state_dict(path), where)
        assign_tensors(self.tower, {k: t for k, t in given.items() if not self._drops(k)}, where)

    def _as_timm_would(self, tensors: dict[str, Any], where: str) -> Mapping[str, Tensor]:
        """The tensors under timm's names, positions resampled to this image size by timm's own function."""
        if "radio" in self.name:
            raise UserError(f"{where} is refused: RADIO's positions are resampled in a way of their own")
        kernel = tensors.get("patch_embed.proj.weight")
        adapt = getattr(sys.modules[type(self.tower).__module__], "checkpoint_filter_fn", None)
        try:
            adapted = dict(adapt(tensors, self.tower) if adapt else tensors)
        except Exception as error:  # whatever timm meets in a file that is of no model it knows
            reason = str(error).partition("\n")[0]
            raise UserError(f"{where} is not a state dict that timm can adapt ({reason})") from error
        if isinstance(kernel, Tensor) and kernel.dim() == 4:
            adapted["patch_embed.proj.weight"] = kernel  # a tower of another patch size is another tower
        others = [name for name, tensor in adapted.items() if not isinstance(tensor, Tensor)]
        if others:
            raise UserError(f"{where} is not a state dict: {others[0]} is not a tensor")
        return adapted

    def _drops(self, name: str) -> bool:
        """Whether a tensor of the published model has no place here: it comes behind the features."""
        part, _, rest = name.partition(".")
        if part != "blocks":
            return part in BEHIND_BLOCKS and name not in self.tower.state_dict()
        index = rest.partition(".")[0]
        return index.isdecimal() and self.block < int(index) < self.depth


BEHIND_BLOCKS = ("norm", "fc_norm", "attn_pool", "head")  # timm's names of what follows a ViT's blocks


def load_tower_weights(encoder: nn.Module, paths: Sequence[str | Path]) -> None:
    """Fills the towers of a vision encoder with pretrained weights of local files.

    Position embeddings of another image size are resampled as timm does it. What the published model has
    behind the features that the encoder takes is left out: later blocks, final norm, pooling, head. All else
    has to be there, and nothing but it.

    Args:
        encoder: a TimmEncoder, FusedEncoder or one of cobra/towers, of any image size, dtype and device.
        paths: a file for each tower, in order: the state dict of the timm model, or of the classifier that the
            authors released, as .safetensors or as a pickle of plain tensors (.bin, .pth, .pt).
    Raises:
        UserError: naming the file, if it is missing or damaged, or the tensors that are missing, unexpected
            or of another shape; or if files and towers differ in number.
    """
    towers = [module for module in encoder.modules() if isinstance(module, TimmEncoder | Tower)]
    if len(towers) != len(paths):
        names = ", ".join(tower.name for tower in towers) or "none"
        raise UserError(
            f"{len(paths)} tower files for {len(towers)} pretrained towers ({names}): give one for each, in order"
        )
    for tower, path in zip(towers, paths, strict=True):
        tower.load_weights(path)


@dataclass(frozen=True, kw_only=True)
class FusedEncoderConfig:
    """Several timm towers side by side, features concatenated by channel (Cobra: DINOv2, then SigLIP)."""

    kind: Literal["fused"] = "fused"
    towers: tuple[TimmEncoderConfig, ...]

    def grid(self, height: int, width: int) -> tuple[int, int]:
        grids = {tower.grid(height, width) for tower in self.towers}
        if len(grids) != 1:
            raise UserError(f"fused towers must give the same grid, got {sorted(grids)}")
        return grids.pop()


class FusedEncoder(nn.Module):
    Config = FusedEncoderConfig

    def __init__(self, config: FusedEncoderConfig, image: ImageConfig) -> None:
        super().__init__()
        config.grid(image.height, image.width)
        self.towers = nn.ModuleList(TimmEncoder(tower, image) for tower in config.towers)
        self.d_model = sum(tower.d_model for tower in self.towers)

    def check_attention(self) -> None:
        names = ", ".join(tower.name for tower in self.towers)
        raise UserError(f"token_reduction goes by the attention of one tower, and there are {names}: take one of them")

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.cat([tower(pixel_values) for tower in self.towers], dim=-1)


VISION_ENCODERS: dict[str, type[nn.Module]] = {
    "fused": FusedEncoder,
    "small": SmallEncoder,
    "timm": TimmEncoder,
    **HIERARCHICAL,
}

VisionEncoderConfig = Union[tuple(encoder.Config for encoder in VISION_ENCODERS.values())]  # noqa: UP007
