"""What a published layout is, and how its config.json is read without overlooking a key."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from cobra.lm import LMConfig
from vision_scan.errors import UserError

if TYPE_CHECKING:
    from cobra.config import CobraConfig

_REQUIRED: Any = object()
_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}

# What transformers writes into every config.json and what does not change a model's logits.
TRANSFORMERS_KEYS = (
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "use_cache",
    "initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "max_position_embeddings",
    "id2label", "label2id", "return_dict", "max_length", "temperature", "top_k", "top_p", "typical_p",
    "num_beams", "num_beam_groups", "num_return_sequences", "length_penalty", "repetition_penalty",
    "chunk_size_feed_forward",
)  # fmt: skip


class Options:
    """The keys of a config.json. Whoever reads them accounts for each; `close` refuses what is left.

    Args:
        values: the parsed file, or a part of it.
        where: what to call it in messages.
    """

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._left = dict(values)
        self.where = where

    def __len__(self) -> int:
        return len(self._left)

    def take(self, name: str, kind: type, default: Any = _REQUIRED) -> Any:
        """The value of a key, of type `kind`; the default where it is absent or null.

        Raises:
            UserError: if there is neither a value nor a default, or the value is of another type.
        """
        value = self._left.pop(name, None)
        if value is None:
            if default is _REQUIRED:
                raise UserError(f"{self.where}: {name} is missing")
            return default
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if kind is float and is_number:
            return float(value)
        if kind is int and is_number and float(value).is_integer():
            return int(value)
        if not isinstance(value, kind) or kind is int:
            raise UserError(f"{self.where}: {name} is {value!r}, must be {_WORDS[kind]}")
        return value

    def section(self, name: str) -> "Options":
        """A mapping in the file; an empty one where it is absent or null."""
        value = self._left.pop(name, None) or {}
        if not isinstance(value, dict):
            raise UserError(f"{self.where}: {name} is {value!r}, must be a mapping")
        return Options(value, f"{self.where}: {name}")

    def demand(self, name: str, *allowed: Any) -> None:
        """Takes an option of which nothing but `allowed` (or its absence) is supported.

        Raises:
            UserError: naming it, if it has another value.
        """
        value = self._left.pop(name, None)
        if value is not None and value not in allowed:
            told = " or ".join(map(repr, allowed)) or "nothing"
            raise UserError(f"{self.where}: {name} is {value!r}, which is not supported; allowed is {told}")

    def ignore(self, *names: str) -> None:
        """Takes options that do not change what the model computes."""
        for name in names:
            self._left.pop(name, None)

    def is_set(self, name: str, value: Any) -> bool:
        return self._left.get(name) == value

    def close(self) -> None:
        """Raises UserError if an option is left that says something, as null, false and empty ones do not."""
        left = [
            f"{name} = {value!r}" for name, value in self._left.items() if value and not name.startswith("_")
        ]
        if left:
            raise UserError(
                f"{self.where}: unknown options {', '.join(left)}; remove them there if they do not change "
                "what the model computes"
            )


@dataclass(frozen=True)
class Piece:
    """Where a tensor of ours, or some of its rows, stand in a published checkpoint.

    Attributes:
        name: of the published tensor.
        shape: of the published tensor; None: as ours.
        part: ours, given the published one, as a view or a copy; None: all of it. The parts of a published tensor are
            all of it together, and none is in two.
        factor, shift: values are multiplied by the one, then the other is added.
    """

    name: str
    shape: tuple[int, ...] | None = None
    part: Callable[[Tensor], Tensor] | None = None
    factor: float | Tensor = 1.0
    shift: float = 0.0

    def take(self, published: Tensor, dtype: torch.dtype) -> Tensor:
        """Our tensor, of the published one; scaled in float32 at least."""
        own = published if self.part is None else self.part(published)
        if not isinstance(self.factor, Tensor) and self.factor == 1.0 and self.shift == 0.0:
            return own.to(dtype)
        wide = own.to(torch.promote_types(own.dtype, torch.float32))
        return (wide * self.factor + self.shift).to(dtype)


Pieces = Mapping[str, tuple[Piece, ...]]
"""Of each of our tensors, by its name, the pieces that it consists of, one below another."""
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A way in which language models are published.

    Attributes:
        name: what messages call it.
        detects: (config.json, names of the tensors) -> whether a checkpoint is written in this way.
        read_config: the options of config.json -> our configuration; its vocab_size is the number of rows of
            the embeddings. Options that it does not support it refuses by name.
        prefixes: our configuration -> how names of tensors begin, ours -> the published ones; the first that fits
            a name is taken.
        left_out: names of tensors that are not read: computed from the configuration again, or of parts that ours does
            not have.
        adapt: (our configuration, config.json, pieces as `prefixes` tells, our shapes) -> the pieces of those of our
            tensors that are not one published tensor, or not as published; None: all are.
        whole: of a vision-language model: (its language model, config.json) -> all of it.
        connector: of one: (all of it, shapes of the connector's tensors) -> their pieces.
        block: kinds of the layers that a model repeats from the first to the last, of one that is written in this way.
        write_config: our configuration, of such blocks -> options of config.json that `read_config` reads as it, where
            the layout can say all of it; None: models are not written in this way, only read.
    """

    name: str
    detects: Callable[[Mapping[str, Any], Collection[str]], bool]
    read_config: Callable[[Options], LMConfig]
    prefixes: Callable[[LMConfig], Mapping[str, str]]
    left_out: str | None = None
    adapt: Callable[[LMConfig, Mapping[str, Any], Pieces, Shapes], Pieces] | None = None
    block: tuple[str, ...] = ()
    write_config: Callable[[LMConfig], dict[str, Any]] | None = None
    whole: "Callable[[LMConfig, Mapping[str, Any]], CobraConfig] | None" = None
    connector: "Callable[[CobraConfig, Shapes], Pieces] | None" = None

    def locate(self, config: LMConfig, options: Mapping[str, Any], shapes: Shapes) -> Pieces:
        """Where the language model's tensors stand.

        Args:
            options: config.json.
            shapes: of our tensors.
        """
        pieces = renamed(self.prefixes(config), shapes)
        return pieces if self.adapt is None else {**pieces, **self.adapt(config, options, pieces, shapes)}

    def is_left_out(self, name: str) -> bool:
        return self.left_out is not None and re.fullmatch(self.left_out, name) is not None


def rows(start: int | None, stop: int | None = None) -> Callable[[Tensor], Tensor]:
    """A `Piece.part`: these rows of a published tensor."""
    return lambda tensor: tensor[start:stop]


def renamed(prefixes: Mapping[str, str], names: Collection[str]) -> Pieces:
    """Tensors that stand under names that begin otherwise: the first prefix that fits is exchanged."""

    def published(name: str) -> str:
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        return prefixes[prefix] + name.removeprefix(prefix)

    return {name: (Piece(published(name)),) for name in names}


def is_published_as(model_type: str, embedding: str) -> Callable[[Mapping[str, Any], Collection[str]], bool]:
    """What tells a layout of transformers: the type of the model, and the name of its embeddings."""
    return lambda config, names: config.get("model_type") == model_type and embedding in names
