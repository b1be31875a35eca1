"""What a model costs, by formula: parameters, floating point operations, bytes of state.

The same formulas serve state-space and transformer stacks; `LayerCost` of each layer kind feeds them. A
multiply and an add are two operations. Norms, activations and the embedding look-up are not counted.
"""

import math
from dataclasses import dataclass

import torch

from .config import CobraConfig
from .lm.stack import LMConfig
from .model import Cobra
from .tokenizer import Tokenizer


@dataclass(frozen=True)
class LMCost:
    """Costs of a language model; sequence lengths in tokens, one row."""

    config: LMConfig

    @property
    def _layers(self):
        return [layer.cost(self.config.d_model) for layer in self.config.layers]

    @property
    def parameters(self) -> int:
        """Parameters; tied embeddings count once."""
        d_model, vocab = self.config.d_model, self.config.vocab_size
        tables = 1 if self.config.tie_word_embeddings else 2
        norms = d_model * (len(self.config.layers) + 1)
        return tables * vocab * d_model + norms + sum(layer.parameters for layer in self._layers)

    @property
    def _head_flops(self) -> int:
        return 2 * self.config.d_model * self.config.vocab_size

    def prefill_flops(self, seqlen: int) -> int:
        """Reading seqlen tokens from nothing, logits of the last one only."""
        total = self._head_flops
        for layer in self._layers:
            window = min(layer.window or seqlen, seqlen)
            seen = window * (window + 1) // 2 + (seqlen - window) * window
            total += seqlen * layer.flops_per_token + seen * layer.flops_per_context_token
        return total

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
        """Memory traffic of one decoding step: every weight once, matrix states read and written, caches
        read (tails are negligible)."""
        return self.parameters * weight_bytes + batch * self.state_traffic_bytes(context, weight_bytes)

    def state_traffic_bytes(self, context: int, activation_bytes: int = 2) -> int:
        """What of it is states and caches, one row."""
        return sum(layer.traffic_bytes(context, activation_bytes) for layer in self._layers)


def count_parts(config: CobraConfig) -> dict[str, int]:
    """Parameters of each part of a model, counted on a model without memory behind it."""
    with torch.device("meta"):
        model = Cobra(config, Tokenizer.bytes())
    return {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
