"""Any mixer of sequences on a grid: along the visiting lists of an order, and merged."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from .orders import order as get_order
from .orders import sequential_order
from .scan import merge_2d, scan_2d


class OrderedMixer(nn.Module):
    """Reads a grid along every visiting list of an order, has a mixer of sequences go over each, and merges.

    Args:
        make: makes a mixer: a module from x (n, seqlen, d_model) and seq_idx, (n, seqlen) int64 with -1 at pads or
            None where there are none, to y (n, seqlen, d_model).
        d_model: channels.
        order: name of a scan order, options in brackets included.
        merge: a key of vision_scan.orders.MERGES; None: the order's own. "gated" learns from a cell how much each
            list counts there, "concat" a linear map from all lists' channels.
        shared: one mixer reads all lists; else each list has its own.
        depth: number of the layer, for orders whose lists take turns; None: all lists.
    Raises:
        UserError: on an unknown order or merge, or an order without a sequence.
    """

    def __init__(
        self,
        make: Callable[[], nn.Module],
        d_model: int,
        order: str = "cross4",
        merge: str | None = None,
        shared: bool = False,
        depth: int | None = None,
    ) -> None:
        super().__init__()
        example = sequential_order(order, depth)
        self.order, self.depth, self.shared = order, depth, shared
        self.merge = merge or example.merge
        num_orders = len(example)
        self.mixers = nn.ModuleList(make() for _ in range(1 if shared else num_orders))
        self.gate = nn.Linear(d_model, num_orders) if self.merge == "gated" else None
        self.proj = nn.Linear(num_orders * d_model, d_model) if self.merge == "concat" else None
        gate = None if self.gate is None else torch.zeros(1, num_orders, 2, 3)
        merge_2d(torch.zeros(1, num_orders, example.seqlen, 1), example, self.merge, gate)  # refuses what does not fit

    def forward(self, x: Tensor) -> Tensor:
        """(batch, height, width, d_model) -> the same shape and dtype, for any height and width."""
        order = get_order(self.order, *x.shape[1:3], self.depth)
        sequences = scan_2d(x, order)
        index = order.to(x.device).index
        pads = None if bool((order.index >= 0).all()) else torch.where(index < 0, -1, 0)
        if self.shared:
            seq_idx = None if pads is None else pads.repeat(len(x), 1)
            y = self.mixers[0](sequences.flatten(0, 1), seq_idx).unflatten(0, sequences.shape[:2])
        else:
            rows = [None] * len(order) if pads is None else [row.expand(len(x), -1) for row in pads]
            parts = zip(self.mixers, sequences.unbind(1), rows, strict=True)
            y = torch.stack([mixer(part, row) for mixer, part, row in parts], dim=1)
        gate = None if self.gate is None else self.gate(x).sigmoid().movedim(-1, 1)
        y = merge_2d(y, order, self.merge, gate)
        return y if self.proj is None else self.proj(y.movedim(1, -2).flatten(-2))
