"""What models consist of and cost, as lines of text: `cobra info`."""

from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path

from cobra.checkpoint import read_config
from cobra.config import PRESETS, CobraConfig
from cobra.cost import LMCost, count_parts
from cobra.lm import LayerConfig
from vision_scan.errors import choose

CONTEXTS = (256, 4096, 65536)


def read(name: str) -> CobraConfig:
    """Of a preset or of a model directory."""
    if name not in PRESETS and not Path(name).exists():
        choose("preset or model directory", name, PRESETS)
    return PRESETS[name] if name in PRESETS else read_config(name)


def describe(config: CobraConfig) -> Iterator[str]:
    """One model: its image, its layers, parameters of its parts, costs at a few lengths of context."""
    size, most = f"{config.image.height} x {config.image.width}", config.largest_layout
    tokens = f"{config.tokens_per_tile} tokens"
    yield f"image    {size}, {tokens}"
    tiles = config.image.tiles
    if tiles is not None:
        of_size = "in the shape of an image" if tiles.varies else "of that size"
        yield f"tiles    {of_size}, at most {most.num_tiles} and {most.num_tokens} tokens of an image"
    if config.video is not None:
        yield f"video    {config.video.kind}, of all tokens of its frames {config.video.pruning_rate:.0%} are dropped"
    yield f"layers   {_layers(config)}; d_model {config.lm.d_model}, vocabulary {config.lm.vocab_size}"
    yield "\npart               parameters"
    parts = count_parts(config)
    for name, count in {**parts, "total": sum(parts.values())}.items():
        yield f"{name:<16}{count:>13,}"
    yield "\ncontext   state bytes (16-bit)   FLOPs to read it   of the next token: FLOPs     bytes moved (16-bit)"
    cost = LMCost(config.lm)
    for context in CONTEXTS:
        flops, step = cost.prefill_flops(context), cost.decode_flops(context)
        moved = cost.decode_bytes(context)
        yield f"{context:>7}{cost.state_bytes(context):>23,}{flops:>19.3g}{step:>27.3g}{moved:>25,}"


def compare(configs: Mapping[str, CobraConfig]) -> Iterator[str]:
    """Twins below one another: what is alike, and what a row keeps at a few lengths of context."""
    width = max(map(len, ["state bytes, bfloat16", *configs]))
    yield f"{'language model':<{width}}     parameters  layers"
    for name, config in configs.items():
        yield f"{name:<{width}}  {LMCost(config.lm).parameters:>13,}  {_layers(config)}"
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        lengths = "".join(f"{context:>15,}" for context in CONTEXTS)
        yield f"\n{f'state bytes, {dtype}':<{width}}{lengths} tokens"
        for name, config in configs.items():
            cost = LMCost(config.lm)
            states = "".join(f"{cost.state_bytes(context, size):>15,}" for context in CONTEXTS)
            yield f"{name:<{width}}{states}"


def _kind(layer: LayerConfig) -> str:
    return f"({' + '.join(map(_kind, layer.mixers))})" if layer.kind == "parallel" else layer.kind


def _layers(config: CobraConfig) -> str:
    """How many there are of each kind: "18 mamba2, 6 attention, 6 mlp"."""
    kinds = Counter((_kind(layer), getattr(layer, "window", None)) for layer in config.lm.layers)
    return ", ".join(
        f"{count} {kind}" + (f" (window {window})" if window else "") for (kind, window), count in kinds.items()
    )
