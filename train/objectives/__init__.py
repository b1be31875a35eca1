"""What a run minimises. An objective owns the model and turns a batch into a sum of losses."""

from .conversation import Conversation
from .objective import Objective, Stats
from .patches import Naming, Regions
from .preference import Preference

__all__ = ["OBJECTIVES", "Conversation", "Naming", "Objective", "Preference", "Regions", "Stats"]

OBJECTIVES: dict[str, type[Objective]] = {
    "conversation": Conversation,
    "naming": Naming,
    "regions": Regions,
    "preference": Preference,
}
