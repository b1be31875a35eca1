"""The language model: a stack of layers of any kind, and its state."""

from .stack import LAYERS, LanguageModel, LayerConfig, LMConfig
from .state import State

__all__ = ["LAYERS", "LMConfig", "LanguageModel", "LayerConfig", "State"]
