"""The kinds of layers that there are, see the contract in mixer.py."""

from typing import Union

from torch import nn

from .attention import Attention
from .gated_conv import GatedConv
from .gated_deltanet import GatedDeltaNet
from .mamba1 import Mamba1
from .mamba2 import Mamba2
from .mamba3 import Mamba3
from .mlp import MLP
from .moe import MoE

KINDS: dict[str, type[nn.Module]] = {
    "attention": Attention,
    "gated_conv": GatedConv,
    "gated_deltanet": GatedDeltaNet,
    "mamba1": Mamba1,
    "mamba2": Mamba2,
    "mamba3": Mamba3,
    "mlp": MLP,
    "moe": MoE,
}

KindConfig = Union[tuple(kind.Config for kind in KINDS.values())]  # noqa: UP007 (built from KINDS)
