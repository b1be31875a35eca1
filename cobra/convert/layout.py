"""What a published layout is, and how its config.json is read without overlooking a key."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cobra.lm import LMConfig
from vision_scan.errors import UserError

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
    """Where a tensor of ours stands in a published checkpoint.

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

    @property
    def is_as_published(self) -> bool:
        return not isinstance(self.factor, Tensor) and self.factor == 1.0 and self.shift == 0.0

    def take(self, published: Tensor) -> Tensor:
        """Our tensor, of the published one, in its dtype; scaled in float32 at least."""
        own = published if self.part is None else self.part(published)
        if self.is_as_published:
            return own
        wide = own.to(torch.promote_types(own.dtype, torch.float32))
        return (wide * self.factor + self.shift).to(own.dtype)


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
        derived: names of tensors that are computed from the configuration again, and not read.
        adapt: (our configuration, config.json, pieces by our names, shapes of ours) -> those of the pieces that are
            not whole tensors, or not as published; None: all are.
        block: kinds of the layers that a model repeats from the first to the last, of one that is written in this way.
        write_config: our configuration, of such blocks -> options of config.json that `read_config` reads as it, where
            the layout can say all of it; None: models are not written in this way, only read.
    """

    name: str
    detects: Callable[[Mapping[str, Any], Collection[str]], bool]
    read_config: Callable[[Options], LMConfig]
    prefixes: Callable[[LMConfig], Mapping[str, str]]
    derived: str | None = None
    adapt: Callable[[LMConfig, Mapping[str, Any], Mapping[str, Piece], Shapes], Mapping[str, Piece]] | None = None
    block: tuple[str, ...] = ()
    write_config: Callable[[LMConfig], dict[str, Any]] | None = None

    def locate(self, config: LMConfig, options: Mapping[str, Any], shapes: Shapes) -> dict[str, Piece]:
        """Where our tensors stand.

        Args:
            options: config.json.
            shapes: of our tensors.
        """
        prefixes = self.prefixes(config)

        def published(name: str) -> str:
            prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
            return prefixes[prefix] + name.removeprefix(prefix)

        pieces = {name: Piece(published(name)) for name in shapes}
        return pieces if self.adapt is None else {**pieces, **self.adapt(config, options, pieces, shapes)}

    def is_derived(self, name: str) -> bool:
        return self.derived is not None and re.fullmatch(self.derived, name) is not None
