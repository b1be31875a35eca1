import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tolerance import assert_close
from tests.vision_scan.modules.samples import gradients_are_those_of, pictures, randomised
from tests.vision_scan.modules.slow_ss2d import content_and_gate, depthwise, layer_norm, projected, slow_scan
from vision_scan.errors import UserError
from vision_scan.modules import ES2D, ChannelGate, EVSSBlock, SS2DConfig

D_MODEL = 10
SMALL = SS2DConfig(d_state=2, dt_rank=2, expand=1.2)
# Of the grid after padding: rows 0, 2, ... and columns 0, 2, ... by rows, rows 1, 3, ... and the same columns by
# columns, then both for columns 1, 3, ...
LISTS = {
    (4, 4): [[0, 2, 8, 10], [4, 12, 6, 14], [1, 3, 9, 11], [5, 13, 7, 15]],
    (3, 5): [  # as 4 x 6
        [0, 2, 4, 12, 14, 16], [6, 18, 8, 20, 10, 22], [1, 3, 5, 13, 15, 17], [7, 19, 9, 21, 11, 23],
    ],
    (1, 3): [[0, 2], [4, 6], [1, 3], [5, 7]],  # as 2 x 4
    (2, 1): [[0], [2], [1], [3]],  # as 2 x 2
}  # fmt: skip


def slow_es2d(module: ES2D, x: Tensor) -> Tensor:
    """x (height, width, d_model) -> the same; cells that only fill up the grid hold zeros and let the state decay."""
    height, width, _ = x.shape
    u, z = content_and_gate(module, x)
    padded = torch.zeros(height + height % 2, width + width % 2, u.shape[-1], dtype=u.dtype)
    padded = torch.cat([torch.cat([u, padded[:height, width:]], dim=1), padded[height:]])
    y = slow_scan(module, padded.flatten(0, 1), LISTS[height, width]).view(padded.shape)
    return projected(module, y[:height, :width], z)


def slow_gate(gate: ChannelGate, x: Tensor) -> Tensor:
    mean = layer_norm(x, gate.norm).flatten(0, 1).mean(0)
    low = F.gelu(gate.global_reduce.weight @ mean + gate.global_reduce.bias)
    return x / (1 + torch.exp(-(gate.channel_select.weight @ low + gate.channel_select.bias)))


def slow_block(block: EVSSBlock, x: Tensor) -> Tensor:
    """x (batch, height, width, d_model) -> the same."""
    n = layer_norm(x, block.norm)
    first, norm, _, last = block.conv_branch
    hidden = torch.stack([depthwise(picture, first) for picture in n])
    mean, variance = norm.running_mean, norm.running_var
    if block.training:
        cells = hidden.flatten(0, 2)
        mean, variance = cells.mean(0), ((cells - cells.mean(0)) ** 2).mean(0)
    hidden = F.gelu((hidden - mean) / (variance + norm.eps).sqrt() * norm.weight + norm.bias)
    convolved = hidden @ last.weight[:, :, 0, 0].T + last.bias
    parts = zip(n, convolved, strict=True)
    x = x + torch.stack([slow_gate(block.se, slow_es2d(block.op, p)) + slow_gate(block.se, c) for p, c in parts])
    if block.mlp is None:
        return x
    wide = F.gelu(layer_norm(x, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
    return x + wide @ block.mlp.fc2.weight.T + block.mlp.fc2.bias


@pytest.mark.parametrize("grid", LISTS, ids=str)
@torch.no_grad()
def test_es2d_is_its_formula(grid):
    module, x = randomised(ES2D(SMALL, D_MODEL)), pictures(2, *grid, D_MODEL)
    assert_close("es2d", module(x), torch.stack([slow_es2d(module, picture) for picture in x]), 1e-10)


@pytest.mark.parametrize("mlp_ratio", [0, 2.0])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_evss_block_is_its_formula(training, mlp_ratio):
    block = randomised(EVSSBlock(SMALL, D_MODEL, mlp_ratio=mlp_ratio)).train(training)
    x = pictures(2, 3, 5, D_MODEL)
    expected = slow_block(block, x)  # first: in training, statistics move
    assert_close("block", block(x), expected, 1e-10)


def test_gradients_of_an_evss_block_are_those_of_the_formula():
    block = randomised(EVSSBlock(SMALL, D_MODEL)).eval()
    for name, (ours, theirs) in gradients_are_those_of(slow_block, block, pictures(2, 3, 5, D_MODEL)).items():
        assert_close(name, ours, theirs, 1e-9)
        assert ours.any() and ours.isfinite().all(), name


def test_parameters_are_the_authors():
    shapes = {name: tuple(t.shape) for name, t in EVSSBlock(SS2DConfig(), 48).state_dict().items()}
    expected = {
        "norm.weight": (48,),
        "op.x_proj.weight": (4 * (3 + 32), 96),
        "op.in_proj.weight": (192, 48),
        "conv_branch.0.weight": (48, 1, 3, 3),
        "conv_branch.1.running_var": (48,),
        "conv_branch.3.bias": (48,),
        "se.norm.bias": (48,),
        "se.global_reduce.weight": (6, 48),
        "se.channel_select.weight": (48, 6),
    }
    assert expected.items() <= shapes.items()
    assert {name.partition(".")[0] for name in shapes} == {"norm", "op", "conv_branch", "se"}


@torch.no_grad()
def test_float32_stays_where_accuracy_needs_it():
    block, x = randomised(EVSSBlock(SMALL, D_MODEL)).eval(), pictures(2, 3, 5, D_MODEL)
    exact = block(x)
    half = block.float().to(torch.bfloat16)
    wide = {name for name, tensor in half.state_dict().items() if tensor.dtype == torch.float32}
    assert {"op.A_logs", "op.Ds", "op.dt_projs_bias", "conv_branch.1.running_mean", "se.norm.weight"} <= wide
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close("bfloat16", y, exact, 0.05)


def test_wrong_sizes_fail_at_construction():
    with pytest.raises(UserError, match="step 0 must be"):
        ES2D(SMALL, D_MODEL, step=0)
    with pytest.raises(UserError, match="d_model 7 must be 8 or more"):
        EVSSBlock(SMALL, 7)
