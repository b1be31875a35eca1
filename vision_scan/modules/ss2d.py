"""SS2D, Mamba's mixer on a grid, and the VSS block around it.

Source: Liu et al. 2024, "VMamba: Visual State Space Model" (arXiv:2401.10166); names and shapes of parameters
as in its released code (MzeroMiko/VMamba, vmamba.py). SS2DConfig() is its first form (v0, in Vanilla-VMamba);
`VMAMBA` is the form of the final models (there "v05_noz"), whose norms over channels (there "ln2d") are the
same numbers in another layout.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from vision_scan.errors import UserError
from vision_scan.ops import selective_scan_2d
from vision_scan.orders import order as get_order
from vision_scan.orders import sequential_order
from vision_scan.precision import Float32Parameters, LayerNorm
from vision_scan.step_bias import initial_dt_bias

from .released import Released


@dataclass(frozen=True, kw_only=True)
class SS2DConfig:
    """d_inner = expand * d_model channels, rounded down, of d_state states each, behind a convolution of d_conv x
    d_conv cells.

    dt comes through dt_rank channels (None: a sixteenth of d_model, rounded up); at the start it is
    log-uniform in [dt_min, dt_max]. Without a gate, in_proj makes the content alone and the scan's normed result
    goes straight to out_proj.
    """

    d_state: int = 16
    expand: float = 2.0
    d_conv: int = 3
    conv_bias: bool = True
    has_gate: bool = True
    dt_rank: int | None = None
    dt_min: float = 0.001
    dt_max: float = 0.1

    def __post_init__(self) -> None:
        for name in ("d_state", "d_conv", "dt_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"SS2D: {name} {value} must be 1 or more")
        if not self.expand > 0:
            raise UserError(f"SS2D: expand {self.expand} must be above 0")
        if self.d_conv % 2 == 0:
            raise UserError(f"SS2D: d_conv {self.d_conv} must be odd, to be centred on its cell")
        if not 0 < self.dt_min <= self.dt_max:
            raise UserError("SS2D: dt_min and dt_max must be above 0, dt_min at most dt_max")

    def inner(self, d_model: int) -> int:
        """d_inner; UserError if nothing is left of so few channels."""
        d_inner = int(self.expand * d_model)
        if d_inner < 1:
            raise UserError(f"SS2D: expand {self.expand} leaves no channel of d_model {d_model}")
        return d_inner

    def rank(self, d_model: int) -> int:
        return self.dt_rank or -(-d_model // 16)


VMAMBA = SS2DConfig(d_state=1, expand=1.0, conv_bias=False, has_gate=False)


class SS2D(Released, Float32Parameters):
    """Mamba's mixer on a grid: content and gate, a depthwise convolution over the content's neighbourhood, a
    selective scan along every visiting list of an order, norm, gate.

    Each list has a selection (`x_proj`, `dt_projs`), decay and skip of its own, stacked along the first axis;
    the lists' results are merged as the order says.

    Args:
        config: the sizes.
        d_model: channels in and out.
        order: name of a scan order, options in brackets included.
        depth: number of the layer, for orders whose lists take turns; None: all lists.
    Raises:
        UserError: on an order that is unknown or has no sequence.
    """

    float32_parameters = ("dt_projs_bias", "A_logs", "Ds")
    old_names: ClassVar[Mapping[str, str]] = {"x_proj_weight": "x_proj.weight", "dt_projs_weight": "dt_projs.weight"}

    def __init__(self, config: SS2DConfig, d_model: int, order: str = "cross4", depth: int | None = None) -> None:
        super().__init__()
        self.order, self.depth, self.d_state, self.dt_rank = order, depth, config.d_state, config.rank(d_model)
        self.num_orders = K = self.count_scans()
        self.d_inner = d_inner = config.inner(d_model)
        self.in_proj = nn.Linear(d_model, (1 + config.has_gate) * d_inner, bias=False)
        self.conv2d = nn.Conv2d(
            d_inner, d_inner, config.d_conv, padding=config.d_conv // 2, groups=d_inner, bias=config.conv_bias
        )
        self.x_proj = nn.Linear(d_inner, K * (self.dt_rank + 2 * config.d_state), bias=False)
        self.dt_projs = ListProjection(K, self.dt_rank, d_inner)
        self.dt_projs_bias = nn.Parameter(initial_dt_bias(K, d_inner, dt_min=config.dt_min, dt_max=config.dt_max))
        self.A_logs = nn.Parameter(torch.arange(1.0, config.d_state + 1).log().repeat(K * d_inner, 1))
        self.Ds = nn.Parameter(torch.ones(K * d_inner))
        self.out_norm = LayerNorm(d_inner)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        # An optimizer that goes by names knows A_log and D; these are VMamba's.
        for name in self.float32_parameters:
            getattr(self, name)._no_weight_decay = True

    def count_scans(self) -> int:
        """How many scans of the grid there are, each with parameters of its own."""
        return len(sequential_order(self.order, self.depth))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, d_model) -> the same shape and dtype, for any height and width."""
        content, *gate = self.in_proj(x).split(self.d_inner, dim=-1)
        y = self._scan(silu(self.conv2d(content.movedim(-1, 1)).movedim(1, -1)))
        y = self.out_norm(y)
        return self.out_proj(y * silu(gate[0]) if gate else y)

    def _scan(self, u: Tensor) -> Tensor:
        """The selective scan along every list, merged, of u (batch, height, width, d_inner)."""
        per_list = (self.num_orders, -1)
        return selective_scan_2d(
            u,
            *self._selection(u, -torch.exp(self.A_logs).unflatten(0, per_list)),
            self.Ds.unflatten(0, per_list),
            self.dt_projs_bias,
            dt_softplus=True,
            order=get_order(self.order, *u.shape[1:3], self.depth),
        )

    def _selection(self, u: Tensor, A: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dt before its bias, A, B and C of every list, for u (batch, height, width, d_inner). They depend on
        the cell alone, so that a list can read them like u."""
        per_list = self.x_proj(u).unflatten(-1, (self.num_orders, -1)).movedim(-2, 1)
        low, B, C = per_list.split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return self.dt_projs(low), A, B.unsqueeze(-2), C.unsqueeze(-2)


class ListProjection(nn.Linear):
    """A linear map for each of K visiting lists, stacked along the rows of one weight (K * d_out, d_in)."""

    def __init__(self, num_orders: int, d_in: int, d_out: int) -> None:
        self.num_orders = num_orders
        super().__init__(d_in, num_orders * d_out, bias=False)

    def reset_parameters(self) -> None:
        nn.init.uniform_(self.weight, -(self.in_features**-0.5), self.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(batch, K, height, width, d_in) -> (batch, K, height, width, d_out)."""
        weight = self.weight.unflatten(0, (self.num_orders, -1))
        return torch.einsum("bkyxr,kdr->bkyxd", x, weight)


class VSSBlock(Released):
    """x + SS2D(norm(x)), then x + MLP(norm(x)).

    Args:
        config, d_model, order, depth: as of SS2D.
        mlp_ratio: hidden channels of the MLP, in d_model; 0: there is none.
    """

    old_names: ClassVar[Mapping[str, str]] = {"ln_1.": "norm.", "self_attention.": "op."}

    def __init__(
        self,
        config: SS2DConfig,
        d_model: int,
        order: str = "cross4",
        mlp_ratio: float = 4.0,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(d_model)
        self.op = SS2D(config, d_model, order, depth)
        self.norm2, self.mlp = None, None
        if mlp_ratio > 0:
            self.norm2, self.mlp = LayerNorm(d_model), MLP(d_model, int(mlp_ratio * d_model))

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, d_model) -> the same shape and dtype."""
        x = x + self.op(self.norm(x))
        return x if self.mlp is None else x + self.mlp(self.norm2(x))


class MLP(nn.Module):
    """Linear, GELU, linear, over the last axis."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(d_model, d_ff), nn.Linear(d_ff, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))
