"""A model's configuration as transformers keeps one."""

import dataclasses
from typing import Any

from transformers import PreTrainedConfig

from cobra.checkpoint import CONFIG, FORMAT_VERSION, MODEL_TYPE, TRANSFORMERS_KEYS
from cobra.config import CobraConfig
from cobra.typed_config import from_dict, to_dict
from vision_scan.errors import UserError

FIELDS = tuple(field.name for field in dataclasses.fields(CobraConfig))


class CobraVLMConfig(PreTrainedConfig):
    """The fields of `CobraConfig` as plain data, which config.json of a model directory has at its top."""

    model_type = MODEL_TYPE

    @classmethod
    def of(cls, config: CobraConfig) -> "CobraVLMConfig":
        return cls(**{"format_version": FORMAT_VERSION, **to_dict(config)})

    @property
    def cobra(self) -> CobraConfig:
        """The same, typed and checked.

        Raises:
            UserError: if it is none of a model of ours, or of another format version.
        """
        version = getattr(self, "format_version", None)
        if version != FORMAT_VERSION:
            raise UserError(f"{CONFIG}: format_version is {version!r}, this release of cobra reads {FORMAT_VERSION}")
        given = {name: getattr(self, name) for name in FIELDS if hasattr(self, name)}
        return from_dict(CobraConfig, given, CONFIG)

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: no more than `cobra.load` reads, whatever a trainer has set on the object."""
        data = super().to_dict()
        return {name: data[name] for name in ("format_version", *TRANSFORMERS_KEYS, *FIELDS) if name in data}

    # What trainers, planners of memory and engines look for in any configuration.

    @property
    def auto_map(self) -> dict[str, str]:
        """No code comes with a model directory: importing `cobra.hf` has its classes known."""
        return {}

    @property
    def vocab_size(self) -> int:
        return self.lm["vocab_size"]

    @property
    def hidden_size(self) -> int:
        return self.lm["d_model"]

    @property
    def num_hidden_layers(self) -> int:
        return len(self.lm["layers"])

    @property
    def tie_word_embeddings(self) -> bool:
        return self.lm.get("tie_word_embeddings", True)
