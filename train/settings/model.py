"""Which model, and where its weights begin."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from cobra.config import PRESETS, CobraConfig
from cobra.typed_config import override
from vision_scan.errors import choose

from .require import require

Part = Literal["vision_encoder", "connector", "lm"]
PARTS: tuple[Part, ...] = ("vision_encoder", "connector", "lm")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model: a preset, and changes to its configuration."""

    preset: str = "tiny"
    changes: tuple[str, ...] = ()
    """Overrides of the preset, "connector.depth=2"; `--set model.connector.depth=2` appends one."""

    def __post_init__(self) -> None:
        self.build_config()

    def build_config(self, given: Mapping[str, Any] | None = None) -> CobraConfig:
        """The preset with the changes applied.

        Args:
            given: sections that stand in for the preset's own, those of weights that the run begins with.
        """
        config = choose("preset", self.preset, PRESETS)
        config = dataclasses.replace(config, **(given or {}))
        for change in self.changes:
            path, equals, value = change.partition("=")
            require(bool(equals), f"model.changes: got {change!r}, allowed: field=value")
            config = override(config, path, value)
        require(
            config.weights == "plain",
            f"model.weights: got {config.weights}, allowed in training: plain; quantise the trained model",
        )
        return config


@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """Where the weights begin; `--init-from DIR` sets `path`."""

    path: str | None = None
    """A model directory; None: random weights."""
    parts: tuple[Part, ...] = PARTS
    """The parts taken from `path`, each whole; the others begin at random."""
    fresh: tuple[str, ...] = ()
    """Modules of those parts that begin at random all the same, "vision_encoder.scans": what the model at `path` has
    not, or what it should learn anew."""
    tokenizer: bool = True
    """Whether the tokenizer of `path` is taken too; the settings under `tokenizer` are then not
    used."""
    towers: tuple[str, ...] = ()
    """Files with the weights of the timm towers, one for each, in their order."""
    check_lm: bool = True
    """Stop before the first step if a language model from `path` foretells plain English hardly better than
    chance."""
    residual: float = 1.0
    """Factor on what each layer of a language model with random weights adds to the residual stream; 0: at
    first every layer leaves it as it is."""

    def __post_init__(self) -> None:
        require(self.residual >= 0, f"init.residual: got {self.residual}, allowed: 0 or more")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The tokenizer of a new model."""

    kind: Literal["bytes", "file", "train"] = "train"
    """bytes: one token per byte; file: a Hugging Face tokenizer.json; train: a byte-level BPE
    trained on the text of the data."""
    path: str | None = None
    """kind=file: the tokenizer.json."""
    vocab_size: int = 384
    """kind=train: number of tokens, specials included."""

    def __post_init__(self) -> None:
        require(
            self.kind != "file" or self.path is not None,
            "tokenizer.kind=file needs a file: set tokenizer.path first",
        )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters of low rank, which learn in place of the parts that have them (lora.py)."""

    rank: int = 0
    """Of an adapter, at most the shorter side of its projection; 0: no adapters."""
    alpha: float | None = None
    """What an adapter adds counts alpha / rank; None: twice the rank, and with pissa the rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are left out in training."""
    init: Literal["default", "pissa"] = "default"
    """default: an adapter begins with adding nothing; pissa: with the strongest directions of its projection, which
    keeps the rest."""
    targets: tuple[str, ...] = ()
    """Names of projections, "in_proj"; none: all of them."""
    parts: tuple[Literal["connector", "lm"], ...] = ("connector", "lm")
    """The parts that get adapters and are frozen but for them; those in `train.freeze` get none. The other parts learn
    as they do without adapters."""

    def __post_init__(self) -> None:
        require(self.rank >= 0, f"lora.rank: got {self.rank}, allowed: 0 or more")
        require(self.alpha is None or self.alpha > 0, f"lora.alpha: got {self.alpha}, allowed: more than 0, or none")
        require(0 <= self.dropout < 1, f"lora.dropout: got {self.dropout}, allowed: 0 to below 1")
        require(len(self.parts) > 0, "lora.parts: got none, allowed: connector, lm; for no adapters set lora.rank=0")
        require(
            self.init == "default" or self.dropout == 0,
            f"lora.dropout: got {self.dropout}, allowed with lora.init=pissa: 0, since its adapters hold what the "
            "projections do most",
        )

    @property
    def scale(self) -> float:
        """How much what an adapter adds counts."""
        if self.alpha is None:
            return 1.0 if self.init == "pissa" else 2.0
        return self.alpha / self.rank
