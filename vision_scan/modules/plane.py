"""A recurrence of the plane itself: a state spreads along the row and down the columns, and there is no list.

Source: Zhang et al. 2024, "2DMamba: Efficient State Space Model for Image Representation" (arXiv:2412.00678). The
recurrence is the paper's; around it stands VMamba's mixer, and the four corners, each with parameters of its own, take
the place of VMamba's four lists.
"""

import torch
from torch import Tensor
from torch.nn.functional import softplus

from vision_scan.errors import UserError

from .ss2d import SS2D, SS2DConfig

# From which corner a scan begins: the axes (height, width) that are turned round in front of it and behind it.
CORNERS = ((), (2,), (1,), (1, 2))


class PlaneScan(SS2D):
    """SS2D with scans that begin in a corner and spread over the plane, in place of visiting lists.

    Args:
        config, d_model: as of SS2D.
        corners: 4: from every corner, the results added; 1: from the top left alone.
    Raises:
        UserError: on another number of corners.
    """

    def __init__(self, config: SS2DConfig, d_model: int, corners: int = 4) -> None:
        if corners not in (1, 4):
            raise UserError(f"PlaneScan: corners {corners} must be 1 or 4")
        self.corners = corners
        super().__init__(config, d_model)

    def count_scans(self) -> int:
        return self.corners

    def _scan(self, u: Tensor) -> Tensor:
        dt, A, B, C = self._selection(u, -torch.exp(self.A_logs).unflatten(0, (self.corners, -1)))
        D = self.Ds.unflatten(0, (self.corners, -1))
        with torch.autocast(u.device.type, enabled=False):
            wide = torch.promote_types(u.dtype, torch.float32)
            total = D.sum(0).to(wide) * u.to(wide)
            for k, axes in enumerate(CORNERS[: self.corners]):
                steps = softplus(dt[:, k].to(wide) + self.dt_projs_bias[k].to(wide))
                inputs = (u.to(wide), steps, B[:, k, ..., 0, :].to(wide), C[:, k, ..., 0, :].to(wide))
                y = plane_scan(*(t.flip(axes) for t in inputs), A[k].to(wide))
                total = total + y.flip(axes)
        return total.to(u.dtype)


def plane_scan(u: Tensor, dt: Tensor, B: Tensor, C: Tensor, A: Tensor) -> Tensor:
    """The recurrence, from the top left corner, row by row:

        r_ij = exp(dt_ij A) r_i,j-1 + dt_ij B_ij u_ij       along a row
        h_ij = exp(dt_ij A) h_i-1,j + r_ij                  down the columns
        y_ij = C_ij h_ij

    Args:
        u, dt: (batch, height, width, d), dt after its bias and softplus.
        B, C: (batch, height, width, d_state).
        A: (d, d_state).
    Returns:
        y (batch, height, width, d). Memory goes with batch x height x width x d x d_state.
    """
    decay = torch.exp(dt[..., None] * A)
    inflow = (dt * u)[..., None] * B[..., None, :]
    across, columns = torch.zeros_like(inflow[:, :, 0]), []
    for j in range(u.shape[2]):
        across = decay[:, :, j] * across + inflow[:, :, j]
        columns.append(across)
    rows = torch.stack(columns, dim=2)
    state, read = torch.zeros_like(rows[:, 0]), []
    for i in range(u.shape[1]):
        state = decay[:, i] * state + rows[:, i]
        read.append(torch.einsum("bxdn,bxn->bxd", state, C[:, i]))
    return torch.stack(read, dim=1)
