"""State-space vision-language models: `load` a directory or `build` a preset, then `model.answer`."""

from .checkpoint import load, save
from .config import PRESETS, CobraConfig
from .hf import accelerate
from .lm import State
from .model import Cobra, build
from .video import Video

__all__ = ["PRESETS", "Cobra", "CobraConfig", "State", "Video", "accelerate", "build", "load", "save"]
