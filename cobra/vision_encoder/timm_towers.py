"""Towers of timm, one or several fused, and their published weights."""

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cobra.checkpoint import assign_tensors, read_state_dict
from cobra.image import ImageConfig
from vision_scan.errors import UserError

from .patches import PatchAttention, check_blocks, patch_grid


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

    @property
    def stride(self) -> int:
        return self.patch_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        return patch_grid(height, width, self.patch_size)


class TimmEncoder(nn.Module):
    """The features of a timm ViT as a grid; class and register tokens are dropped, no final norm.

    Where tiles have sizes of their own, positions are resampled to each of them by timm's own function.
    """

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
        settings: dict[str, Any] = {"img_size": (image.height, image.width)}
        if image.tiles is not None and image.tiles.varies:
            settings["dynamic_img_size"] = True
        try:
            self.tower: Any = timm.create_model(config.name, pretrained=False, num_classes=0, **settings)
        except TypeError as error:
            if "dynamic_img_size" not in str(error):
                raise
            raise UserError(
                f"vision encoder {config.name} takes images of one size, and image.tiles={image.tiles.kind} makes "
                "tiles of many: take a ViT or EVA of timm, the small tower or a hierarchical one, or image.tiles=anyres"
            ) from None
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

    def check_attention(self, what: str, blocks: Sequence[int]) -> None:
        from timm.models.vision_transformer import Attention, Block

        check_blocks(what, blocks, len(self.tower.blocks), "take an earlier one")
        for number in blocks:
            block = self.tower.blocks[number]
            if type(block) is not Block or type(block.attn) is not Attention:
                raise UserError(
                    f"{what} goes by the attention of block {number % len(self.tower.blocks)} of {self.name}: it must "
                    "be a plain block of a ViT (CLIP, SigLIP, DINOv2)"
                )

    def forward(
        self, pixel_values: Tensor, attention_of: Sequence[int] = ()
    ) -> Tensor | tuple[Tensor, list[PatchAttention]]:
        mean, std = (pixel_values.new_tensor(t).view(3, 1, 1) for t in (self.mean, self.std))
        dtype = next(self.tower.parameters()).dtype
        blocks, entering = [self.tower.blocks[number] for number in attention_of], {}
        hooks = [
            block.register_forward_pre_hook(lambda block, inputs: entering.update({block: inputs[0]}))
            for block in blocks
        ]
        try:
            (features,) = self.tower.forward_intermediates(
                ((pixel_values - mean) / std).to(dtype),
                indices=[self.block],
                norm=False,
                output_fmt="NCHW",
                intermediates_only=True,
            )
        finally:
            for hook in hooks:
                hook.remove()
        features = features.movedim(1, -1)
        return (features, [self._attention(block, entering[block]) for block in blocks]) if blocks else features

    @torch.no_grad()
    def _attention(self, block: Any, tokens: Tensor) -> PatchAttention:
        """Of a block, on what enters it: (n, tokens, d_model)."""
        shape = 3, block.attn.num_heads, block.attn.head_dim
        q, k, _ = block.attn.qkv(block.norm1(tokens)).unflatten(-1, shape).permute(2, 0, 3, 1, 4)
        has_class_token = self.tower.cls_token is not None
        return PatchAttention.of(
            block.attn.q_norm(q), block.attn.k_norm(k), self.tower.num_prefix_tokens, has_class_token
        )

    def load_weights(self, path: str | Path) -> None:
        """Fills the tower from a file, see `cobra.vision_encoder.load_tower_weights`."""
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


@dataclass(frozen=True, kw_only=True)
class FusedEncoderConfig:
    """Several timm towers side by side, features concatenated by channel (Cobra: DINOv2, then SigLIP)."""

    kind: Literal["fused"] = "fused"
    towers: tuple[TimmEncoderConfig, ...]

    @property
    def stride(self) -> int:
        strides = sorted({tower.stride for tower in self.towers})
        if len(strides) != 1:
            raise UserError(
                f"fused towers have patches of {strides} pixels: for tiles of any size (image.tiles native, uhd) take "
                "towers with patches of one size"
            )
        return strides[0]

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

    def check_attention(self, what: str, blocks: Sequence[int]) -> None:
        names = ", ".join(tower.name for tower in self.towers)
        raise UserError(f"{what} goes by the attention of one tower, and there are {names}: take one of them")

    def forward(self, pixel_values: Tensor) -> Tensor:
        return torch.cat([tower(pixel_values) for tower in self.towers], dim=-1)
