"""The recurrence of the plane, against the sum over all cells above and to the left, path by path."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.tolerance import assert_close
from tests.vision_scan.modules.samples import gradients_are_those_of, pictures, randomised
from tests.vision_scan.modules.slow_ss2d import content_and_gate, projected
from vision_scan.errors import UserError
from vision_scan.modules import SS2D, PlaneScan, SS2DConfig

D_MODEL = 6
SMALL = SS2DConfig(d_state=3, dt_rank=2)
GRIDS = [(1, 1), (2, 3), (4, 3), (3, 1), (1, 5)]
TURNED = [(False, False), (False, True), (True, False), (True, True)]  # rows, columns


def plane(corners: int = 4, config: SS2DConfig = SMALL) -> PlaneScan:
    torch.manual_seed(0)
    return randomised(PlaneScan(config, D_MODEL, corners))


def by_paths(module: PlaneScan, x: Tensor) -> Tensor:
    """x (height, width, d_model): what a cell gives reaches another along its own row, then down the column."""
    u, z = content_and_gate(module, x)
    height, width, d = u.shape
    rank, n, results = module.dt_rank, module.d_state, []
    cells = [(i, j) for i in range(height) for j in range(width)]
    for k, (up, left) in enumerate(TURNED[: module.corners]):
        channels = slice(k * d, (k + 1) * d)
        A = -torch.exp(module.A_logs[channels])
        selection = module.x_proj.weight[k * (rank + 2 * n) : (k + 1) * (rank + 2 * n)]
        low, B, C = (u @ selection.T).split([rank, n, n], dim=-1)
        dt = F.softplus(low @ module.dt_projs.weight[channels].T + module.dt_projs_bias[k])
        for i, j in cells:
            state = torch.zeros(d, n, dtype=u.dtype)
            for a, b in cells:
                rows = range(i, a) if up else range(a + 1, i + 1)
                columns = range(j, b) if left else range(b + 1, j + 1)
                if (a < i if up else a > i) or (b < j if left else b > j):
                    continue
                steps = sum((dt[a, column] for column in columns), torch.zeros_like(dt[0, 0]))
                steps = steps + sum((dt[row, j] for row in rows), torch.zeros_like(dt[0, 0]))
                state = state + torch.exp(steps[:, None] * A) * (dt[a, b] * u[a, b])[:, None] * B[a, b]
            results.append(state @ C[i, j] + module.Ds[channels] * u[i, j])
    total = torch.stack(results).view(module.corners, height, width, d).sum(0)
    return projected(module, total, z)


def of_all(module: PlaneScan, x: Tensor) -> Tensor:
    return torch.stack([by_paths(module, picture) for picture in x])


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("corners", [1, 4])
@torch.no_grad()
def test_is_the_sum_over_paths(corners, grid):
    module, x = plane(corners), pictures(2, *grid, D_MODEL)
    assert_close("y", module(x), of_all(module, x), 1e-10)


def test_gradients_are_those_of_the_sum_over_paths():
    for name, (found, expected) in gradients_are_those_of(of_all, plane(), pictures(2, 2, 3, D_MODEL)).items():
        assert_close(name, found, expected, 1e-9)


@torch.no_grad()
def test_on_a_line_it_is_the_scan_of_the_line():
    module = plane(1)
    for order, grid in (("raster", (1, 7)), ("column", (7, 1))):
        line = randomised(SS2D(SMALL, D_MODEL, order))
        line.load_state_dict(module.state_dict())
        x = pictures(2, *grid, D_MODEL)
        assert_close(order, module(x), line(x), 1e-10)


@torch.no_grad()
def test_a_corner_sees_what_is_behind_it_alone():
    module = plane(1, SS2DConfig(d_state=3, d_conv=1))
    x = pictures(1, 4, 5, D_MODEL)
    changed = x.clone()
    changed[:, 2, 1] += 1.0
    differs = (module(x) != module(changed)).any(-1)[0]
    assert differs[2:, 1:].all() and not differs[:2].any() and not differs[:, 0].any()


@torch.no_grad()
def test_low_precision_keeps_the_state_wide():
    module, x = plane(), pictures(2, 3, 4, D_MODEL)
    exact = module(x)
    half = module.float().to(torch.bfloat16)
    assert half.A_logs.dtype == half.dt_projs_bias.dtype == torch.float32
    y = half(x.bfloat16())
    assert y.dtype == torch.bfloat16
    assert_close("bfloat16", y, exact, 0.05)
    with torch.autocast("cpu", torch.bfloat16):
        assert_close("autocast", plane().float()(x.float()), exact, 0.05)


def test_corners_are_one_or_four():
    with pytest.raises(UserError, match="corners 2 must be 1 or 4"):
        PlaneScan(SMALL, D_MODEL, corners=2)
