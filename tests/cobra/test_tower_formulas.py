import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cobra.towers.efficientvmamba import InvertedResidual, PatchMerging
from cobra.towers.groupmamba import Stem
from tests.cobra.tower_samples import SMALL, build, pixels
from tests.tolerance import assert_close
from tests.vision_scan.modules.samples import randomised


def normalised(x: Tensor) -> Tensor:
    mean, std = (x.new_tensor(t) for t in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return (x - mean[:, None, None]) / std[:, None, None]


def layer_norm(x: Tensor, norm: nn.Module) -> Tensor:
    """Over channels, of channels first."""
    mean = x.mean(1, keepdim=True)
    scale = ((x - mean) ** 2).mean(1, keepdim=True).add(norm.eps).rsqrt()
    return (x - mean) * scale * norm.weight[:, None, None] + norm.bias[:, None, None]


def batch_norm(x: Tensor, norm: nn.BatchNorm2d) -> Tensor:
    mean, var, weight, bias = (t[:, None, None] for t in (norm.running_mean, norm.running_var, norm.weight, norm.bias))
    return (x - mean) / (var + norm.eps).sqrt() * weight + bias


def blocked(blocks: nn.Module, x: Tensor) -> Tensor:
    for block in blocks:
        x = block(x.movedim(1, -1)).movedim(-1, 1)
    return x


@torch.no_grad()
def test_vmamba_is_its_formula():
    tower, x = randomised(build(SMALL["vmamba"])), pixels(2, 21, 30)

    def halve(x: Tensor, conv: nn.Conv2d, norm: nn.Module) -> Tensor:
        return layer_norm(F.conv2d(x, conv.weight, conv.bias, stride=2, padding=1), norm)

    embed = tower.patch_embed
    y = halve(F.gelu(halve(normalised(x), embed[0], embed[2])), embed[5], embed[7])
    first, second = tower.layers
    y = halve(blocked(first.blocks, y), first.downsample[1], first.downsample[3])
    assert_close("vmamba", tower(x), blocked(second.blocks, y).movedim(1, -1), 1e-10)


@torch.no_grad()
def test_efficientvmamba_is_its_formula():
    tower, x = randomised(build(SMALL["efficientvmamba"])), pixels(2, 22, 35)  # 5 x 8 patches, then 3 x 4, 2 x 2
    embed, (first, second, third) = tower.patch_embed, tower.layers
    y = layer_norm(F.conv2d(normalised(x), embed[0].weight, embed[0].bias, stride=4), embed[2])
    y = slow_merging(first.downsample, blocked(first.blocks, y))
    y = slow_merging(second.downsample, blocked(second.blocks, y))
    for block in third[1:3]:
        y = slow_residual(block, y)
    assert_close("efficientvmamba", tower(x), y.movedim(1, -1), 1e-10)


def slow_merging(merging: PatchMerging, x: Tensor) -> Tensor:
    """Channels first; the channels of the corners top left, bottom left, top right, bottom right, in this order."""
    batch, dim, height, width = x.shape
    result = x.new_zeros(batch, merging.reduction.out_features, (height + 1) // 2, (width + 1) // 2)
    for i in range(result.shape[2]):
        for j in range(result.shape[3]):
            cells = [(2 * i, 2 * j), (2 * i + 1, 2 * j), (2 * i, 2 * j + 1), (2 * i + 1, 2 * j + 1)]
            corners = [x[:, :, a, b] if a < height and b < width else x.new_zeros(batch, dim) for a, b in cells]
            normed = layer_norm(torch.cat(corners, dim=1)[..., None, None], merging.norm)
            result[:, :, i, j] = normed[..., 0, 0] @ merging.reduction.weight.T
    return result


def slow_residual(block: InvertedResidual, x: Tensor) -> Tensor:
    y = batch_norm(F.conv2d(x, block.conv_pw[0].weight), block.conv_pw[1]).relu()
    y = batch_norm(F.conv2d(y, block.conv_dw[0].weight, padding=1, groups=y.shape[1]), block.conv_dw[1]).relu()
    low = F.conv2d(y.mean((2, 3), keepdim=True), block.se.conv_reduce.weight, block.se.conv_reduce.bias).relu()
    y = y / (1 + torch.exp(-F.conv2d(low, block.se.conv_expand.weight, block.se.conv_expand.bias)))
    return x + batch_norm(F.conv2d(y, block.conv_pw2[0].weight), block.conv_pw2[1])


@torch.no_grad()
def test_groupmamba_is_its_formula():
    tower, x = randomised(build(SMALL["groupmamba"])).eval(), pixels(2, 21, 30)
    stem: Stem = tower.patch_embed1
    y = normalised(x)
    for index, stride, padding in ((0, 2, 3), (3, 1, 1), (6, 1, 1)):
        y = F.conv2d(y, stem.conv[index].weight, stride=stride, padding=padding)
        y = batch_norm(y, stem.conv[index + 1]).relu()
    y = layer_norm(F.conv2d(y, stem.proj.weight, stem.proj.bias, stride=2, padding=1), stem.norm)
    y = layer_norm(blocked(tower.block1, y), tower.norm1)
    down = tower.patch_embed2
    y = layer_norm(F.conv2d(y, down.proj.weight, down.proj.bias, stride=2, padding=1), down.norm)
    assert_close("groupmamba", tower(x), blocked(tower.block2, y).movedim(1, -1), 1e-10)
    assert (stem.norm.eps, tower.norm1.eps, tower.block1[0].norm2.eps) == (1e-5, 1e-6, 1e-6)
