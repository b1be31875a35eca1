"""Small backbones, released ones without memory, and files as their authors write them."""

import functools

import torch
from torch import Tensor, nn

from cobra.image import ImageConfig
from cobra.towers import HIERARCHICAL, TOWERS
from cobra.towers.efficientvmamba import EfficientVMambaConfig
from cobra.towers.groupmamba import GroupMambaConfig
from cobra.towers.tower import StagesConfig, Tower
from cobra.towers.vmamba import VMambaConfig
from vision_scan.modules import GroupMambaBlock, SS2DConfig

IMAGE = ImageConfig(height=32, width=32)
MIXER = SS2DConfig(d_state=2)
SMALL: dict[str, StagesConfig] = {
    "vmamba": VMambaConfig(dims=(8, 12), depths=(1, 2)),
    "efficientvmamba": EfficientVMambaConfig(dims=(8, 16, 24), depths=(1, 1, 2), mixer=MIXER),
    "groupmamba": GroupMambaConfig(dims=(16, 20), depths=(1, 2), mlp_ratios=(2, 1), d_stem=4),
}


def build(config: StagesConfig) -> Tower:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return HIERARCHICAL[config.kind](config, IMAGE)


@functools.cache
def on_meta(name: str) -> Tower:
    with torch.device("meta"):
        return build(TOWERS[name])


def pixels(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def head(tower: Tower, num_classes: int = 1000) -> dict[str, Tensor]:
    """What released classifiers have behind the last stage, without memory."""
    d = tower.d_model
    with torch.device("meta"):
        norm, linear = nn.LayerNorm(d), nn.Linear(d, num_classes)
        if tower.config.kind != "groupmamba":
            return nn.ModuleDict({"classifier": nn.ModuleDict({"norm": norm, "head": linear})}).state_dict()
        block = GroupMambaBlock(d)  # as the authors' ClassBlock, apart from one norm more and one convolution less
        block.mlp.dwconv = nn.Identity()
        block.norm1 = nn.LayerNorm(d)
        parts = {"norm4": norm, "post_network": nn.ModuleList([block]), "head": linear, "dist_head": linear}
        return nn.ModuleDict(parts).state_dict()


def published(tower: Tower) -> dict[str, Tensor]:
    """A released file: the tower with random values, and a head."""
    noise = torch.Generator().manual_seed(2)
    both = {**tower.state_dict(), **head(tower, num_classes=7)}
    return {
        name: torch.randn(t.shape, generator=noise) if t.is_floating_point() else torch.tensor(5)
        for name, t in both.items()
    }
