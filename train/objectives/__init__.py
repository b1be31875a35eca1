"""What a run minimises. An objective owns the model and turns a batch into a sum of losses."""

from .conversation import Conversation
from .objective import Objective, Stats
from .patches import Naming, Regions

__all__ = ["OBJECTIVES", "Conversation", "Naming", "Objective", "Regions", "Stats"]

OBJECTIVES: dict[str, type[Objective]] = {
    "conversation": Conversation,
    "naming": Naming,
    "regions": Regions,
}
