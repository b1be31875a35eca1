"""What a run minimises. An objective owns the model and turns a batch into a sum of losses."""

from .conversation import Conversation
from .distillation import Answers, HiddenStates, Mixers
from .objective import Objective, Stats
from .patches import Naming, Regions
from .preference import Preference

__all__ = ["OBJECTIVES", "Conversation", "Naming", "Objective", "Preference", "Regions", "Stats"]

OBJECTIVES: dict[str, type[Objective]] = {
    "conversation": Conversation,
    "distill_hidden": HiddenStates,
    "distill_logits": Answers,
    "distill_mixer": Mixers,
    "naming": Naming,
    "regions": Regions,
    "preference": Preference,
}
