"""What a training run is made of: typed settings, each with what it means and what it allows.

Every setting can be changed from the command line: `--set optim.lr=3e-4`. The fields of the model's
own configuration follow `model.`: `--set model.connector.order=hilbert`.
"""

from .course import LogSettings, LrScale, OptimSettings, TrainSettings, ZeroSettings
from .data import DataSettings, ValSettings
from .model import PARTS, InitSettings, LoraSettings, ModelSettings, Part, TokenizerSettings
from .objective import DistillSettings, ObjectiveName, PreferenceSettings
from .run import RunConfig, change

__all__ = [
    "PARTS",
    "DataSettings",
    "DistillSettings",
    "InitSettings",
    "LogSettings",
    "LoraSettings",
    "LrScale",
    "ModelSettings",
    "ObjectiveName",
    "OptimSettings",
    "Part",
    "PreferenceSettings",
    "RunConfig",
    "TokenizerSettings",
    "TrainSettings",
    "ValSettings",
    "ZeroSettings",
    "change",
]
