"""Twins: language models that stand beside a recurrent one of the same width and as many parameters, so that what is
compared is the layers.

Three are asked for. The transformer, whose cache grows with every token; a transformer with a sliding window, whose
cache is as large as the recurrent model's state; and a hybrid of three recurrent layers to one of attention.
"""

from dataclasses import replace

from vision_scan.errors import UserError

from .lm.attention import AttentionConfig
from .lm.mlp import MLPConfig
from .lm.stack import LMConfig

HYBRID_PERIOD = 4  # of so many layers the last is attention


def transformer_twin(
    lm: LMConfig, attention: AttentionConfig | None = None, pairs: int | None = None
) -> LMConfig:
    """The transformer of the same width and parameter count as a stack of layers: pairs of attention and a
    gated feed-forward layer that takes up the remaining parameters, to within two per mille.

    Args:
        attention: None: a query head per 64 channels, a third as many for keys and values.
        pairs: None: one for every two layers.
    """
    attention = attention or _attention(lm.d_model)
    pairs = pairs or len(lm.layers) // 2
    budget = sum(layer.cost(lm.d_model).parameters for layer in lm.layers) / pairs
    return replace(lm, layers=(attention, _feed_forward(attention, budget, lm.d_model)) * pairs)


def window_twin(
    lm: LMConfig,
    attention: AttentionConfig | None = None,
    pairs: int | None = None,
    activation_bytes: int = 2,
) -> LMConfig:
    """The transformer twin with a sliding window: its full caches hold as many bytes as the state of the recurrent
    model, or less by not quite one token.

    Bytes are those that `State.nbytes` counts: matrix states in float32 whatever the model's dtype, convolution
    tails, keys and values in the model's dtype, the position of each slot. A window can therefore be matched for one
    width of the model's dtype only: in a wider one the twin keeps more than the state, in a narrower one less.

    Args:
        lm: of recurrent layers, and feed-forward ones if any.
        attention, pairs: as of `transformer_twin`; its window is not looked at.
        activation_bytes: of an element of the model's dtype: 2 for bfloat16, 4 for float32.
    Raises:
        UserError: if `activation_bytes` is another, the model has no state of a fixed size, or not even one token fits
            into it.
    """
    if activation_bytes not in (2, 4):
        raise UserError(f"activation_bytes {activation_bytes} must be 2 (bfloat16) or 4 (float32)")
    costs = [layer.cost(lm.d_model) for layer in lm.layers]
    if any(cost.cache_elements and cost.window is None for cost in costs):
        raise UserError("a window can only be matched with a state of one size; this model's grows with the context")
    twin = transformer_twin(lm, attention, pairs)
    attention = next(layer for layer in twin.layers if isinstance(layer, AttentionConfig))
    state = sum(cost.state_bytes(0, activation_bytes) for cost in costs)
    one_token = replace(attention, window=1).cost(lm.d_model).state_bytes(1, activation_bytes)
    window = state // (one_token * (len(twin.layers) // 2))
    if window < 1:
        raise UserError(f"a state of {state} bytes holds no token's keys and values; give fewer pairs or key heads")
    layers = tuple(replace(layer, window=window) if layer == attention else layer for layer in twin.layers)
    return replace(twin, layers=layers)


def hybrid_twin(lm: LMConfig, attention: AttentionConfig | None = None) -> LMConfig:
    """The hybrid of three recurrent layers to one of attention: in place of every fourth layer stands a pair of
    attention and a gated feed-forward layer with its parameters, to within two per mille of all four.

    Three to one, attention behind the recurrent layers, is the arrangement of Qwen3-Next and of Kimi Linear
    (arXiv:2510.26692).

    Args:
        lm: of recurrent layers, at least four; those behind the last whole four stay as they are.
        attention: None: as in `transformer_twin`.
    Raises:
        UserError: on fewer layers, or if the attention alone has more parameters than the layer that it replaces.
    """
    if len(lm.layers) < HYBRID_PERIOD:
        raise UserError(
            f"a hybrid replaces every {HYBRID_PERIOD}th layer, and this model has {len(lm.layers)}; "
            f"give one of {HYBRID_PERIOD} layers or more"
        )
    attention = attention or _attention(lm.d_model)
    layers = []
    for index, layer in enumerate(lm.layers, start=1):
        if index % HYBRID_PERIOD:
            layers.append(layer)
        else:
            budget = layer.cost(lm.d_model).parameters - lm.d_model  # there is a norm in front of each of the two
            layers += [attention, _feed_forward(attention, budget, lm.d_model)]
    return replace(lm, layers=tuple(layers))


def _attention(d_model: int) -> AttentionConfig:
    """A query head per 64 channels, a third as many for keys and values."""
    num_heads = d_model // 64
    num_kv_heads = max(count for count in range(1, num_heads // 3 + 2) if num_heads % count == 0)
    return AttentionConfig(num_heads=num_heads, num_kv_heads=num_kv_heads)


def _feed_forward(attention: AttentionConfig, budget: float, d_model: int) -> MLPConfig:
    """The gated feed-forward layer that has what attention leaves of a budget of parameters."""
    own = attention.cost(d_model).parameters
    d_ff = round((budget - own) / (3 * d_model))
    d_ff -= d_ff % 8 if d_model >= 512 else d_ff % 2
    if d_ff < 1:
        raise UserError(
            f"attention of {attention.num_heads} heads of {attention.headdim} has {own:,} parameters and leaves none "
            f"of {budget:,.0f} for a feed-forward layer; give fewer or smaller heads"
        )
    return MLPConfig(d_ff=d_ff)
