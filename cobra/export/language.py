"""The language model of a model directory, and which published layout can hold it."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cobra.checkpoint import TOKENIZER, WEIGHTS, check_match, named_tensors, read_config, read_tensors
from cobra.convert.conversion import LAYOUTS, float32_names
from cobra.convert.layout import Layout, Options
from cobra.lm import LanguageModel, LMConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.tokenizer import Tokenizer
from cobra.typed_config import to_dict
from vision_scan.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Language:
    """The language model of a model directory.

    Attributes:
        path: the directory.
        tensors: by their names in the language model, read from the disk when they are used.
        wide: names of those that are never stored in half precision.
    """

    path: Path
    config: LMConfig
    tokenizer: Tokenizer
    tensors: Mapping[str, Tensor]
    wide: Collection[str]


def read_language(path: str | Path) -> Language:
    """Opens the language model of a model directory.

    Raises:
        UserError: if a file is missing, damaged or does not fit the configuration, or if that has a setting outside of
            the language model's own that decides what it reads or how its weights are stored.
    """
    path = Path(path)
    config = read_config(path)
    if config.weights != "plain":
        raise UserError(
            f"{path}: weights is {config.weights!r}, in codes that others do not read; allowed is 'plain': export the "
            "model that was quantised"
        )
    if config.reading_order != "raster":
        raise UserError(
            f"{path}: reading_order is {config.reading_order!r}, of which an exported model says nothing to whoever "
            "gives it images; allowed is 'raster'"
        )
    with torch.device("meta"):
        model = LanguageModel(config.lm)
    own, given = named_tensors(model), read_tensors(path, ("lm",))
    check_match({f"lm.{name}": tensor for name, tensor in own.items()}, given, str(path / WEIGHTS))
    return Language(
        path=path,
        config=config.lm,
        tokenizer=Tokenizer.from_file(path / TOKENIZER),
        tensors={name: given[f"lm.{name}"] for name in own},
        wide=float32_names(model),
    )


def find_layout(language: Language) -> Layout:
    """The published layout that says all that the configuration does.

    What a layout makes of it is read again as if it had been published: a setting that it cannot say comes back as
    another.

    Raises:
        UserError: naming the layers or the settings for which there is no layout.
    """
    config, kinds = language.config, tuple(layer.kind for layer in language.config.layers)
    written = [layout for layout in LAYOUTS if layout.write_config is not None]
    fitting = [layout for layout in written if kinds == layout.block * (len(kinds) // len(layout.block))]
    if not fitting:
        known = "; ".join(f"{' and '.join(layout.block)} ({layout.name})" for layout in written)
        raise UserError(
            f"{language.path}: lm.layers are of the kinds {', '.join(dict.fromkeys(kinds))}, in an order that no "
            f"layout has; allowed is one block repeated: {known}"
        )
    lost = {layout.name: _lost(layout, config) for layout in fitting}
    layout = min(fitting, key=lambda layout: len(lost[layout.name]))
    if lost[layout.name]:
        raise UserError(f"{language.path}: {layout.name} cannot say {_told(lost[layout.name])}; export a model without")
    return layout


def _told(lost: Mapping[str, tuple[Any, Any]], most: int = 3) -> str:
    told = [f"{name} = {ours!r} (only {theirs!r})" for name, (ours, theirs) in lost.items()]
    return ", ".join(told[:most]) + (f" and {len(told) - most} more settings" if len(told) > most else "")


def _lost(layout: Layout, config: LMConfig) -> dict[str, tuple[Any, Any]]:
    """Settings that come back as others: name -> (ours, what it would become)."""
    assert layout.write_config is not None
    options = Options(layout.write_config(config), layout.name)
    again = layout.read_config(options)
    options.close()
    ours, theirs = _settings(config), _settings(again)
    names = dict.fromkeys((*ours, *theirs))
    return {name: (ours.get(name), theirs.get(name)) for name in names if ours.get(name) != theirs.get(name)}


def _settings(config: LMConfig) -> dict[str, Any]:
    """What a model computes, setting by setting: sizes that follow from others are spelt out, and settings of how
    weights begin, or of a part that is not there, are those by default."""
    layers = tuple(_SPELT_OUT.get(layer.kind, _as_it_is)(layer, config.d_model) for layer in config.layers)
    return dict(_flat(to_dict(replace(config, layers=layers)), "lm"))


def _flat(node: Any, name: str):
    if isinstance(node, dict):
        pairs = node.items()
    elif isinstance(node, list | tuple) and any(isinstance(each, dict) for each in node):
        pairs = enumerate(node)
    else:
        yield name, node
        return
    for key, value in pairs:
        yield from _flat(value, f"{name}.{key}")


def _as_it_is(layer: Any, d_model: int) -> Any:
    return layer


def _mamba1(layer: Mamba1Config, d_model: int) -> Mamba1Config:
    normed = {} if layer.inner_norms != "none" else {"norm_eps": Mamba1Config.norm_eps}
    return replace(
        layer, expand=Mamba1Config.expand, d_inner=layer.inner(d_model), dt_rank=layer.rank(d_model),
        dt_min=Mamba1Config.dt_min, dt_max=Mamba1Config.dt_max, **normed,
    )  # fmt: skip


def _mamba2(layer: Mamba2Config, d_model: int) -> Mamba2Config:
    d_mlp, d_ssm = layer.widths(d_model)
    normed = {} if layer.rmsnorm else {"norm_eps": Mamba2Config.norm_eps}
    return replace(
        layer, expand=Mamba2Config.expand, d_inner=d_mlp + d_ssm, d_ssm=d_ssm, dt_min=Mamba2Config.dt_min,
        dt_max=Mamba2Config.dt_max, A_init_range=Mamba2Config.A_init_range, **normed,
    )  # fmt: skip


def _attention(layer: AttentionConfig, d_model: int) -> AttentionConfig:
    normed = {} if layer.qk_norm else {"norm_eps": AttentionConfig.norm_eps}
    rotary_dim = None if layer.rotary_dim == layer.headdim else layer.rotary_dim
    return replace(layer, rotary_dim=rotary_dim, **normed)


_SPELT_OUT: dict[str, Callable[[Any, int], Any]] = {"mamba1": _mamba1, "mamba2": _mamba2, "attention": _attention}
