"""Model directories as models of transformers, and transformers' own Mamba models on our scans.

Importing it registers ours with the Auto classes; nothing else here imports transformers with cobra.
"""

from vision_scan.errors import UserError

try:
    import transformers
except ImportError as error:
    raise UserError("cobra.hf needs transformers: pip install 'cobra-vlm[hf]'") from error

from cobra.checkpoint import MODEL_TYPE

from .cache import StateCache
from .chat import to_trl
from .configuration import CobraVLMConfig
from .modeling import CobraForConditionalGeneration
from .processing import CobraProcessor
from .scans import accelerate

transformers.AutoConfig.register(MODEL_TYPE, CobraVLMConfig, exist_ok=True)
transformers.AutoModelForImageTextToText.register(CobraVLMConfig, CobraForConditionalGeneration, exist_ok=True)
# What trainers take that are given a directory of a model type that is none of transformers' own.
transformers.AutoModelForCausalLM.register(CobraVLMConfig, CobraForConditionalGeneration, exist_ok=True)
transformers.AutoProcessor.register(CobraVLMConfig, CobraProcessor, exist_ok=True)

__all__ = ["CobraForConditionalGeneration", "CobraProcessor", "CobraVLMConfig", "StateCache", "accelerate", "to_trl"]
