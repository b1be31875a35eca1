"""The grid of patches of an image, and what a tower's attention says about them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vision_scan.errors import UserError


def patch_grid(height: int, width: int, patch_size: int) -> tuple[int, int]:
    """Rows and columns of patches; what does not fill a patch at the right and bottom is not seen."""
    grid = height // patch_size, width // patch_size
    if 0 in grid:
        raise UserError(f"image {height} x {width} is smaller than a patch of {patch_size} pixels")
    return grid


def check_blocks(what: str, blocks: Sequence[int], depth: int, hint: str) -> None:
    """Raises UserError, in which `what` asks for the attention of blocks, if one of them is not there."""
    missing = [number for number in blocks if not -depth <= number < depth]
    if missing:
        raise UserError(
            f"{what} goes by the attention of block {missing[0]}, and the tower has {depth} up to its features: {hint}"
        )


@dataclass(frozen=True)
class PatchAttention:
    """What the attention of a tower's block says about its patches; float32 at least, without gradients.

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
