"""Connectors: a grid of vision features to tokens of the language model.

A connector is a module `Connector(config, d_vision, d_model)` with `forward(features (n, height, width,
d_vision)) -> (n, num_tokens, d_model)` for any grid; its Config has `num_tokens(height, width)`.
"""

from typing import Union

from torch import nn

from .ldp import FusedLDPConfig, FusedLDPConnector, LDPv2Config, LDPv2Connector
from .msc import MSCConfig, MSCConnector
from .pointwise import (
    FusedMLPConfig,
    FusedMLPConnector,
    LinearConfig,
    LinearConnector,
    MLPConfig,
    MLPConnector,
)
from .vss import VSSL2Config, VSSL2Connector, VSSMLPConfig, VSSMLPConnector

CONNECTORS: dict[str, type[nn.Module]] = {
    "fused_ldp": FusedLDPConnector,
    "fused_mlp": FusedMLPConnector,
    "ldpv2": LDPv2Connector,
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "msc": MSCConnector,
    "vss_l2": VSSL2Connector,
    "vss_mlp": VSSMLPConnector,
}

ConnectorConfig = Union[tuple(connector.Config for connector in CONNECTORS.values())]  # noqa: UP007

__all__ = [
    "CONNECTORS",
    "ConnectorConfig",
    "FusedLDPConfig",
    "FusedMLPConfig",
    "LDPv2Config",
    "LinearConfig",
    "MLPConfig",
    "MSCConfig",
    "MSCConnector",
    "VSSL2Config",
    "VSSMLPConfig",
]
