"""What a model costs, by formula: parameters, floating point operations, bytes of state.

The same formulas serve state-space and transformer stacks; `LayerCost` of each layer kind feeds them. A
multiply and an add are two operations. Norms, activations and the embedding look-up are not counted.
"""

import functools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import vision_scan
from vision_scan.modules import SS2D

from .config import CobraConfig
from .connector.ldp import PEG
from .connector.mqt import MQTConnector
from .image import ImageConfig
from .lm.mixer import LayerCost
from .lm.stack import LMConfig
from .model import Cobra
from .scan_block import ScanMixer
from .tokenizer import Tokenizer
from .towers import HIERARCHICAL, StagesConfig, Tower
from .vision_encoder import FusedEncoder, S2Encoder, SmallEncoder, TimmEncoder


@dataclass(frozen=True)
class Work:
    """Floating point operations of a forward pass.

    Attributes:
        weights: products of activations with weights.
        mixing: what is between activations: attention, scans.
    """

    weights: float = 0.0
    mixing: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(self.weights + other.weights, self.mixing + other.mixing)

    def training_flops(self, learning: float = 1.0, is_behind: bool = True) -> float:
        """A forward and a backward pass.

        A product with weights is done a second time for the gradient of the activations, if anything in the part or
        in front of it learns, and a third time for the gradient of the weights that learn themselves. Of a product
        between activations both factors need a gradient. A pass that is computed again does not count.

        Args:
            learning: the share of the weights that learn, 0 to 1.
            is_behind: whether anything in front of the part learns.
        """
        flows = learning > 0 or is_behind
        return self.weights * (1 + flows + learning) + self.mixing * (1 + 2 * flows)


@dataclass(frozen=True)
class LMCost:
    """Costs of a language model; sequence lengths in tokens, one row."""

    config: LMConfig

    @functools.cached_property
    def _layers(self) -> list[LayerCost]:
        return [layer.cost(self.config.d_model) for layer in self.config.layers]

    @functools.cached_property
    def _kinds(self) -> Counter[LayerCost]:
        """How many layers cost the same: a stack of many is asked about many rows."""
        return Counter(self._layers)

    @property
    def parameters(self) -> int:
        """Parameters; tied embeddings count once, and so do blocks that layers share."""
        d_model, vocab = self.config.d_model, self.config.vocab_size
        tables = 1 if self.config.tie_word_embeddings else 2
        norms = d_model * (len(self.config.layers) + 1)
        own = sum(layer.parameters - layer.shared_parameters for layer in self._layers)
        shared = sum(block.cost(d_model).parameters for block in self.config.shared)
        return tables * vocab * d_model + norms + own + shared

    @property
    def _head_flops(self) -> int:
        return 2 * self.config.d_model * self.config.vocab_size

    def prefill_flops(self, seqlen: int) -> int:
        """Reading seqlen tokens from nothing, logits of the last one only."""
        total = self._head_flops
        for layer, count in self._kinds.items():
            window = min(layer.window or seqlen, seqlen)
            seen = window * (window + 1) // 2 + (seqlen - window) * window
            total += count * (seqlen * layer.flops_per_token + seen * layer.flops_per_context_token)
        return total

    def work(self, seqlen: int, num_logits: int) -> Work:
        """Reading seqlen tokens from nothing, with the logits of `num_logits` of them."""
        head = num_logits * self._head_flops
        total = self.prefill_flops(seqlen) - self._head_flops
        weights = seqlen * sum(
            count * min(2 * layer.parameters, layer.flops_per_token) for layer, count in self._kinds.items()
        )
        return Work(weights + head, total - weights)

    def training_flops(self, seqlen: int) -> int:
        """A training step's forward with the logits of all tokens but the last, and twice that for the
        gradients; one row."""
        return 3 * (self.prefill_flops(seqlen) + (seqlen - 1) * self._head_flops)

    def decode_flops(self, context: int) -> int:
        """One token more after `context` tokens."""
        total = self._head_flops
        for layer in self._layers:
            seen = min(layer.window or math.inf, context + 1)
            total += layer.flops_per_token + int(seen) * layer.flops_per_context_token
        return total

    def state_bytes(self, context: int, activation_bytes: int = 2) -> int:
        """What a row keeps after `context` tokens: matrix states in float32, convolution tails, keys and
        values in activations of `activation_bytes` bytes."""
        return sum(layer.state_bytes(context, activation_bytes) for layer in self._layers)

    def decode_bytes(self, context: int, weight_bytes: int = 2, batch: int = 1) -> int:
        """Memory traffic of one decoding step, at least: every weight once that one token has to do with, matrix states
        read and written, caches read (tails are negligible)."""
        weights = self.parameters - sum(layer.idle_parameters for layer in self._layers)
        return weights * weight_bytes + batch * self.state_traffic_bytes(context, weight_bytes)

    def state_traffic_bytes(self, context: int, activation_bytes: int = 2) -> int:
        """What of it is states and caches, one row."""
        return sum(layer.traffic_bytes(context, activation_bytes) for layer in self._layers)


def count_parts(config: CobraConfig) -> dict[str, int]:
    """Parameters of each part of a model, counted on a model without memory behind it."""
    with torch.device("meta"):
        model = Cobra(config, Tokenizer.bytes())
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}


def tile_work(model: Cobra, grid: tuple[int, int] | None = None) -> dict[str, Work]:
    """What vision encoder and connector compute for one tile, by part; the model may be without memory behind it.

    A matrix or kernel acts once at each of its positions: pixels of a convolution's output, tokens of a tower, cells of
    a connector's grid or its tokens. An encoder of an unknown kind is counted as if all of it acted on the grid,
    without attention, and so is a connector. Choosing tokens, where a token_reduction does, is not counted.

    Args:
        grid: rows and columns of cells of a tile that has a size of its own; None: of one of `image.height` x
            `image.width` pixels.
    """
    height, width = grid or model.config.grid
    formula = TOWERS.get(model.config.vision_encoder.kind)
    encoder, connector = model.vision_encoder, model.connector
    tower = Work(height * width * _products(encoder)) if formula is None else formula(encoder, height, width)
    of_connector = CONNECTOR_WORK.get(model.config.connector.kind, _on_cells)
    cells = grid or model.config.connector_grid
    num_tokens = model.config.connector.num_tokens(*cells)
    return {"vision_encoder": tower, "connector": of_connector(connector, *cells, num_tokens)}


def _on_cells(connector: nn.Module, height: int, width: int, num_tokens: int) -> Work:
    """All of it on the cells, but for convolutions behind a pooling."""
    pooled = sum(_products(module) for module in connector.modules() if isinstance(module, PEG))
    weights = height * width * (_products(connector) - pooled) + num_tokens * pooled
    return Work(weights, sum(_scan_operations(module, height, width) for module in connector.modules()))


def _on_tokens(connector: nn.Module, height: int, width: int, num_tokens: int) -> Work:
    return Work(num_tokens * _products(connector))


def _of_queries(connector: MQTConnector, height: int, width: int, num_tokens: int) -> Work:
    """As if each picture came alone: those of a batch share queries, keys and their products."""
    cells = height * width
    on_cells = _products(connector.k_proj) + _products(connector.v_proj)
    on_tokens = _products(connector.q_proj) + _products(connector.out_proj) + _products(connector.proj)
    d_vision = connector.queries.shape[1]
    return Work(cells * on_cells + num_tokens * on_tokens, 4 * num_tokens * cells * d_vision)


def _products(module: nn.Module) -> int:
    """Operations at one position: 2 for each weight of a matrix or kernel. Norms and biases are left out, and so are
    A, D and dt_bias, which belong to a scan."""
    scan = getattr(module, "float32_parameters", ())
    own = [
        parameter.numel()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 1 and name not in scan and not name.endswith("bias")  # biases of several lists are a table
    ]
    return 2 * sum(own) + sum(_products(child) for child in module.children())


def _scan_operations(module: nn.Module, height: int, width: int) -> int:
    """Of the scan in a module, over all its visiting lists; per element of the state 5 in Mamba-2, 7 in Mamba."""
    if isinstance(module, ScanMixer):
        elements = 5 * module.d_inner // module.shares * module.config.d_state
    elif isinstance(module, SS2D):
        elements = 7 * module.conv2d.out_channels * module.d_state
    else:
        return 0
    visits = sum(int((cells >= 0).sum()) for cells in vision_scan.order(module.order, height, width))
    return visits * elements


def _small_tower(encoder: SmallEncoder, height: int, width: int) -> Work:
    positions = height * width * encoder.patch_size**2
    weights = 0
    for conv in encoder.stem.modules():
        if isinstance(conv, nn.Conv2d):
            positions //= conv.stride[0] * conv.stride[1]
            weights += positions * _products(conv)
    tokens = height * width
    attention = 4 * tokens**2 * encoder.d_model * len(encoder.blocks)
    scans = sum(_scan_operations(module, height, width) for module in encoder.scans.modules())
    return Work(weights + tokens * (_products(encoder.blocks) + _products(encoder.scans)), attention + scans)


def _timm_tower(encoder: TimmEncoder, height: int, width: int) -> Work:
    tower: Any = encoder.tower
    tokens = height * width + tower.num_prefix_tokens
    weights = height * width * _products(tower.patch_embed) + tokens * _products(tower.blocks)
    return Work(weights, 4 * tokens**2 * encoder.d_model * len(tower.blocks))


def _fused_tower(encoder: FusedEncoder, height: int, width: int) -> Work:
    towers: Any = encoder.towers
    return sum((_timm_tower(tower, height, width) for tower in towers), Work())


def _staged_tower(encoder: Tower, height: int, width: int) -> Work:
    """What acts once per picture, and what is in proportion to the cells: the line through one cell and two."""
    one, two = (_staged_work(type(encoder), encoder.config, cells) for cells in (1, 2))
    behind = height * width - 1
    return Work(
        one.weights + behind * (two.weights - one.weights), one.mixing + behind * (two.mixing - one.mixing)
    )


@functools.cache
def _staged_work(kind: type[Tower], config: StagesConfig, cells: int) -> Work:
    """By running a tower without memory on an image of so many cells side by side."""
    with torch.device("meta"):
        twin, scans = kind(config, ImageConfig(height=1, width=1)), []
    for module in twin.modules():
        if isinstance(module, SS2D):
            module.register_forward_hook(
                lambda mixer, args, _: scans.append(_scan_operations(mixer, *args[0].shape[1:3]))
            )
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        twin(torch.zeros(1, 3, config.stride, cells * config.stride, device="meta"))
    return Work(counter.get_total_flops(), sum(scans))


def _s2_tower(encoder: S2Encoder, height: int, width: int) -> Work:
    """The tower on the tiles of all scales; height and width are cells of the first."""
    config = encoder.config
    first = config.scales[0]
    tile = TOWERS[config.tower.kind](encoder.tower, height // first, width // first)
    return sum((tile for scale in config.scales for _ in range(scale**2)), Work())


TOWERS: dict[str, Callable[..., Work]] = {
    "fused": _fused_tower,
    "s2": _s2_tower,
    "small": _small_tower,
    "timm": _timm_tower,
    **dict.fromkeys(HIERARCHICAL, _staged_tower),
}

CONNECTOR_WORK: dict[str, Callable[..., Work]] = {
    "mqt": _of_queries,
    "pool2d": _on_tokens,
    "reshape": _on_tokens,
    "space_to_depth": _on_tokens,
}
