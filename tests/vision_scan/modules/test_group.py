import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tolerance import assert_close
from tests.vision_scan.modules.samples import gradients_are_those_of, pictures, randomised
from tests.vision_scan.modules.slow_ss2d import depthwise, layer_norm, slow_ss2d
from vision_scan.errors import UserError
from vision_scan.modules import DIRECTIONS, GroupMambaBlock, GroupMambaLayer, SS2DConfig

D_MODEL = 20  # not a multiple of 16: the gate's channels are rounded down


def slow_layer(layer: GroupMambaLayer, x: Tensor) -> Tensor:
    """x (batch, height, width, d_model) -> the same."""
    n = layer_norm(x, layer.norm)
    mean = n.flatten(1, 2).mean(1)
    low = (mean @ layer.fc1.weight.T + layer.fc1.bias).clamp(min=0)
    gate = 1 / (1 + torch.exp(-(low @ layer.fc2.weight.T + layer.fc2.bias)))
    mixers = (layer.mamba_g1, layer.mamba_g2, layer.mamba_g3, layer.mamba_g4)
    width = D_MODEL // 4
    chunks = [
        torch.stack([slow_ss2d(mixer, picture[..., k * width : (k + 1) * width]) for picture in n])
        for k, mixer in enumerate(mixers)
    ]
    y = torch.cat(chunks, dim=-1) * layer.skip_scale * n * gate[:, None, None]
    return layer_norm(y, layer.norm) @ layer.proj.weight.T + layer.proj.bias


def slow_block(block: GroupMambaBlock, x: Tensor) -> Tensor:
    x = x + slow_layer(block.attn, x)
    hidden = layer_norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias
    hidden = torch.stack([depthwise(picture, block.mlp.dwconv.dwconv) for picture in hidden])
    return x + F.gelu(hidden) @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


def test_each_chunk_has_a_direction_of_its_own():
    layer = GroupMambaLayer(D_MODEL)
    mixers = (layer.mamba_g1, layer.mamba_g2, layer.mamba_g3, layer.mamba_g4)
    assert tuple(mixer.order for mixer in mixers) == DIRECTIONS == ("raster", "column", "raster_rev", "column_rev")
    assert [mixer.num_orders for mixer in mixers] == [1, 1, 1, 1]


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 3)], ids=str)
@torch.no_grad()
def test_a_layer_and_a_block_are_their_formulas(grid):
    block, x = randomised(GroupMambaBlock(D_MODEL, mlp_ratio=2)), pictures(2, *grid, D_MODEL)
    assert_close("layer", block.attn(x), slow_layer(block.attn, x), 1e-10)
    assert_close("block", block(x), slow_block(block, x), 1e-10)


def test_gradients_of_a_block_are_those_of_the_formula():
    block = randomised(GroupMambaBlock(D_MODEL, SS2DConfig(d_state=2, expand=1.0), mlp_ratio=1))
    for name, (ours, theirs) in gradients_are_those_of(slow_block, block, pictures(2, 2, 3, D_MODEL)).items():
        assert_close(name, ours, theirs, 1e-9)
        assert ours.any() and ours.isfinite().all(), name


def test_parameters_are_the_authors():
    shapes = {name: tuple(p.shape) for name, p in GroupMambaBlock(348).named_parameters()}
    expected = {
        "attn.fc1.weight": (21, 348),
        "attn.fc2.weight": (348, 21),
        "attn.norm.weight": (348,),
        "attn.mamba_g3.in_proj.weight": (174, 87),
        "attn.mamba_g4.x_proj.weight": (6 + 2, 87),
        "attn.mamba_g1.A_logs": (87, 1),
        "attn.skip_scale": (1,),
        "attn.proj.bias": (348,),
        "norm2.bias": (348,),
        "mlp.fc1.weight": (1392, 348),
        "mlp.dwconv.dwconv.weight": (1392, 1, 3, 3),
    }
    assert expected.items() <= shapes.items()


def test_wrong_sizes_fail_at_construction():
    for d_model in (8, 18):
        with pytest.raises(UserError, match=f"d_model {d_model} must be a multiple of the 4 orders, and 16 or more"):
            GroupMambaLayer(d_model)
    with pytest.raises(UserError, match="multiple of the 0 orders"):
        GroupMambaLayer(32, orders=())
    with pytest.raises(UserError, match="'raster'"):
        GroupMambaLayer(32, orders=("rastr",))
