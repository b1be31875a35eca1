import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vision_scan
from tests.tolerance import assert_close
from tests.vision_scan.slow_ss2d import layer_norm, slow_ss2d
from vision_scan.errors import UserError
from vision_scan.modules import SS2D, SS2DConfig, VSSBlock

D_MODEL = 6
SMALL = SS2DConfig(d_state=3, dt_rank=2)
GRIDS = [(1, 1), (2, 3), (5, 7), (4, 1)]


def randomised(module: torch.nn.Module) -> torch.nn.Module:
    """In float64, with weights far from their start, where norms are 1 and biases 0."""
    noise = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.double().parameters():
            parameter.add_(torch.randn(parameter.shape, generator=noise), alpha=0.3)
    return module


def ss2d(order: str = "cross4", config: SS2DConfig = SMALL) -> SS2D:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return randomised(SS2D(config, D_MODEL, order))


def pictures(batch: int, height: int, width: int) -> Tensor:
    noise = torch.Generator().manual_seed(1)
    return torch.randn(batch, height, width, D_MODEL, generator=noise, dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["raster", "bi2", "cross4"])
@torch.no_grad()
def test_ss2d_is_its_formula(order, grid):
    module, x = ss2d(order), pictures(2, *grid)
    assert_close(order, module(x), torch.stack([slow_ss2d(module, picture) for picture in x]), 1e-10)


@pytest.mark.parametrize(
    "config", [SS2DConfig(), SS2DConfig(d_conv=1, expand=1), SS2DConfig(d_conv=5, d_state=1)], ids=str
)
@torch.no_grad()
def test_ss2d_of_other_sizes(config):
    module, x = ss2d(config=config), pictures(1, 3, 2)
    assert_close("sizes", module(x)[0], slow_ss2d(module, x[0]), 1e-10)


@torch.no_grad()
def test_gradients_of_ss2d_are_those_of_the_formula():
    module, x = ss2d(), pictures(1, 2, 3)
    weights = torch.randn(x.shape[1:], generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = []
    for run in (lambda x: module(x)[0], lambda x: slow_ss2d(module, x[0])):
        with torch.enable_grad():
            own = x.clone().requires_grad_()
            loss = (run(own) * weights).sum()
            gradients.append(torch.autograd.grad(loss, [own, *module.parameters()]))
    names = ["x", *(name for name, _ in module.named_parameters())]
    for name, ours, theirs in zip(names, *gradients, strict=True):
        assert_close(name, ours, theirs, 1e-9)
        assert ours.any(), name


def test_parameters_are_vmambas():
    """Names and shapes in the released code, for K lists, rank R, N states, D channels inside."""
    shapes = {name: tuple(p.shape) for name, p in SS2D(SS2DConfig(d_state=16), 96).named_parameters()}
    K, R, N, D = 4, 6, 16, 192
    assert shapes == {
        "in_proj.weight": (2 * D, 96),
        "conv2d.weight": (D, 1, 3, 3),
        "conv2d.bias": (D,),
        "x_proj.weight": (K * (R + 2 * N), D),
        "dt_projs.weight": (K * D, R),
        "dt_projs_bias": (K, D),
        "A_logs": (K * D, N),
        "Ds": (K * D,),
        "out_norm.weight": (D,),
        "out_norm.bias": (D,),
        "out_proj.weight": (96, D),
    }
    block = {name.partition(".")[0] for name, _ in VSSBlock(SMALL, D_MODEL).named_parameters()}
    assert block == {"norm", "op", "norm2", "mlp"}


def test_the_recurrence_starts_as_mambas():
    torch.manual_seed(0)
    module = SS2D(SS2DConfig(dt_min=0.01, dt_max=0.05), 32)
    dt = F.softplus(module.dt_projs_bias.detach())
    assert 0.01 <= dt.min() < 0.015 and 0.04 < dt.max() <= 0.0501
    assert_close("A", module.A_logs.detach().exp(), torch.arange(1.0, 17).expand(4 * 64, -1), 1e-6)
    assert (module.Ds == 1).all()
    assert module.dt_projs.weight.abs().max() <= module.dt_rank**-0.5
    assert torch.pdist(module.dt_projs_bias.detach()).min() > 0  # each list its own


@torch.no_grad()
def test_ss2d_takes_every_order():
    x = pictures(1, 3, 4)
    results = {order: ss2d(order)(x) for order in [*vision_scan.SCAN_ORDERS, "random(seed=3)"] if order != "noncausal"}
    assert all(y.shape == x.shape and y.isfinite().all() for y in results.values())
    assert not torch.allclose(results["random"], results["random(seed=3)"])
    assert not torch.allclose(results["raster"], results["hilbert"])


@torch.no_grad()
def test_float32_stays_where_accuracy_needs_it():
    wide = {"dt_projs_bias", "A_logs", "Ds", "out_norm.weight", "out_norm.bias"}
    module, x = ss2d(), pictures(2, 3, 4)
    exact = module(x)
    half = module.float().to(torch.bfloat16)
    assert {name for name, p in half.named_parameters() if p.dtype == torch.float32} == wide
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close("bfloat16", y, exact, 0.05)


@pytest.mark.parametrize("mlp_ratio", [0, 4.0])
@torch.no_grad()
def test_vss_block_is_its_formula(mlp_ratio):
    block, x = randomised(VSSBlock(SMALL, D_MODEL, "bi2", mlp_ratio)), pictures(2, 3, 2)
    expected = x + torch.stack([slow_ss2d(block.op, picture) for picture in layer_norm(x, block.norm)])
    if mlp_ratio:
        assert block.mlp.fc1.out_features == 4 * D_MODEL
        hidden = F.gelu(layer_norm(expected, block.norm2) @ block.mlp.fc1.weight.T + block.mlp.fc1.bias)
        expected = expected + hidden @ block.mlp.fc2.weight.T + block.mlp.fc2.bias
    assert_close("block", block(x), expected, 1e-10)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("d_state 0", {"d_state": 0}),
        ("dt_rank -1", {"dt_rank": -1}),
        ("expand 0", {"expand": 0}),
        ("d_conv 4 must be odd", {"d_conv": 4}),
        ("d_conv 0", {"d_conv": 0}),
        ("dt_min", {"dt_min": 0.2}),
        ("dt_min", {"dt_min": 0.0}),
    ],
)
def test_wrong_sizes_fail_at_construction(message, settings):
    with pytest.raises(UserError, match=message):
        SS2DConfig(**settings)


def test_an_unknown_order_fails_at_construction():
    with pytest.raises(UserError, match="'hilbert'"):
        SS2D(SMALL, D_MODEL, "hilbrt")
