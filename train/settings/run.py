"""All of a run, and changes to it by name."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass, field

from cobra.typed_config import override

from .course import LogSettings, OptimSettings, TrainSettings, ZeroSettings
from .data import DataSettings, ValSettings
from .model import InitSettings, LoraSettings, ModelSettings, TokenizerSettings
from .objective import DistillSettings, PreferenceSettings
from .require import require


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of a run; saved as JSON beside its weights."""

    recipe: str
    model: ModelSettings = field(default_factory=ModelSettings)
    init: InitSettings = field(default_factory=InitSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    zero: ZeroSettings = field(default_factory=ZeroSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    val: ValSettings = field(default_factory=ValSettings)
    log: LogSettings = field(default_factory=LogSettings)
    preference: PreferenceSettings = field(default_factory=PreferenceSettings)

    @property
    def makes_student(self) -> bool:
        """Whether the run begins with a student made of its teacher."""
        return self.distill.teacher is not None and self.init.path is None


def change(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """Applies the texts of `--set`, "section.field=value", in order.

    Raises:
        UserError: on a text of another form, an unknown setting or a value that is not allowed.
    """
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        require(bool(equals), f"--set: got {assignment!r}, allowed: section.field=value")
        section, _, name = path.partition(".")
        if section == "model" and name.split(".")[0] not in ("preset", "changes", ""):
            changes = (*config.model.changes, f"{name}={value}")
            config = dataclasses.replace(
                config, model=dataclasses.replace(config.model, changes=changes)
            )
        else:
            config = override(config, path, value)
    return config
