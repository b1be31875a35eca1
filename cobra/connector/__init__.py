"""Connectors: a grid of vision features to tokens of the language model.

A connector is a module `Connector(config, d_vision, d_model)` with `forward(features (n, height, width,
d_vision)) -> (n, num_tokens, d_model)` for any grid; its Config has `num_tokens(height, width)`.
"""

from typing import Union

from torch import nn

from .ldp import FusedLDPConfig, FusedLDPConnector, LDPv2Config, LDPv2Connector
from .mqt import MQTConfig, MQTConnector
from .msc import MSCConfig, MSCConnector
from .pointwise import (
    FusedMLPConfig,
    FusedMLPConnector,
    KeepsGrid,
    LinearConfig,
    LinearConnector,
    MLPConfig,
    MLPConnector,
    PointwiseConfig,
)
from .pool import Pool2dConfig, Pool2dConnector
from .space_to_depth import ReshapeConfig, ReshapeConnector, SpaceToDepthConfig, SpaceToDepthConnector
from .vss import VSSL2Config, VSSL2Connector, VSSMLPConfig, VSSMLPConnector

CONNECTORS: dict[str, type[nn.Module]] = {
    "fused_ldp": FusedLDPConnector,
    "fused_mlp": FusedMLPConnector,
    "ldpv2": LDPv2Connector,
    "linear": LinearConnector,
    "mlp": MLPConnector,
    "mqt": MQTConnector,
    "msc": MSCConnector,
    "pool2d": Pool2dConnector,
    "reshape": ReshapeConnector,
    "space_to_depth": SpaceToDepthConnector,
    "vss_l2": VSSL2Connector,
    "vss_mlp": VSSMLPConnector,
}

ConnectorConfig = Union[tuple(connector.Config for connector in CONNECTORS.values())]  # noqa: UP007

__all__ = [
    "CONNECTORS",
    "ConnectorConfig",
    "FusedLDPConfig",
    "FusedMLPConfig",
    "KeepsGrid",
    "LDPv2Config",
    "LinearConfig",
    "MLPConfig",
    "MQTConfig",
    "MQTConnector",
    "MSCConfig",
    "MSCConnector",
    "PointwiseConfig",
    "Pool2dConfig",
    "ReshapeConfig",
    "SpaceToDepthConfig",
    "VSSL2Config",
    "VSSMLPConfig",
]
