"""Language models of our model directories, for others to run: `plan`, and the formats that it knows."""

from .exporting import FORMATS, Export, plan

__all__ = ["FORMATS", "Export", "plan"]
