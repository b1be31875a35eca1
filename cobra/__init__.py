"""State-space vision-language models: `load` a directory or `build` a preset, then `model.answer`."""

from typing import TYPE_CHECKING, Any

from .checkpoint import load, save
from .config import PRESETS, CobraConfig
from .lm import State
from .model import Cobra, build
from .video import Video

if TYPE_CHECKING:
    from .hf import accelerate

__all__ = ["PRESETS", "Cobra", "CobraConfig", "State", "Video", "accelerate", "build", "load", "save"]


def __getattr__(name: str) -> Any:
    """`accelerate` is found when it is asked for: with cobra.hf comes transformers, which takes seconds to import."""
    if name == "accelerate":
        from .hf import accelerate

        return accelerate
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
