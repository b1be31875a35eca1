"""Published language models as model directories: `convert`, and the layouts that it knows."""

from .conversion import LAYOUTS, Conversion, convert, plan
from .layout import Layout, Options

__all__ = ["LAYOUTS", "Conversion", "Layout", "Options", "convert", "plan"]
