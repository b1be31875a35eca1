"""llama.cpp as a contestant, through its C functions, so that nothing of Python stands between its tokens."""

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cobra.export.gguf_file import TYPES

_LOG: list[str] = []  # what llama.cpp has said, to be told if it fails
_KEPT: list[Any] = []  # the callback must live as long as the library


def system_info() -> str:
    """What the installed llama.cpp was compiled for."""
    import llama_cpp

    return " ".join(llama_cpp.llama_print_system_info().decode().split())


def rounding(form: str) -> Callable[[str, Tensor], Tensor]:
    """What a file in a form of `TYPES` makes of a matrix: (name of its module, weight) -> weight, float32."""
    import gguf

    kind = gguf.GGMLQuantizationType[TYPES[form]]

    def change(name: str, weight: Tensor) -> Tensor:
        codes = gguf.quants.quantize(np.ascontiguousarray(weight.detach().float().numpy()), kind)
        return torch.from_numpy(gguf.quants.dequantize(codes, kind))

    return change


class LlamaCppReader:
    """A GGUF file loaded by llama.cpp, one sequence. Its state lives in the context: what `read` gives as the
    state is the prompt, which `resume` reads again."""

    family = "llama.cpp"

    def __init__(self, path: Path, form: str, threads: int, capacity: int, ubatch: int = 512) -> None:
        """Loads a file.

        Args:
            capacity: the most tokens of a prompt and its answer.
            ubatch: tokens that it computes at once.
        """
        import llama_cpp

        self.form = form
        self._api = llama_cpp
        _be_quiet()
        self._model: Any = llama_cpp.llama_model_load_from_file(
            str(path).encode(), llama_cpp.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path.name}: {''.join(_LOG[-8:]).strip()}")
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = settings.n_batch = capacity
        settings.n_ubatch = min(ubatch, capacity)
        settings.n_seq_max = 1
        settings.n_threads = settings.n_threads_batch = threads
        settings.no_perf = True
        self._context: Any = llama_cpp.llama_init_from_model(self._model, settings)
        if not self._context:
            raise RuntimeError(f"llama.cpp makes no context for {path.name}: {''.join(_LOG[-8:]).strip()}")
        self._memory: Any = llama_cpp.llama_get_memory(self._context)
        vocab: Any = llama_cpp.llama_model_get_vocab(self._model)
        self._vocab = llama_cpp.llama_vocab_n_tokens(vocab)
        self._token = (ctypes.c_int32 * 1)()

    def logits(self, ids: Tensor) -> Tensor:
        api, seqlen = self._api, ids.shape[1]
        api.llama_memory_clear(self._memory, True)
        batch = api.llama_batch_init(seqlen, 0, 1)
        batch.n_tokens = seqlen
        for position, token in enumerate(ids[0].tolist()):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0] = 1, 0
            batch.logits[position] = 1
        self._decode(batch)
        api.llama_batch_free(batch)
        return torch.stack([self._logits(position) for position in range(seqlen)])

    def read(self, ids: Tensor) -> tuple[Tensor, Any]:
        self._api.llama_memory_clear(self._memory, True)
        tokens = (ctypes.c_int32 * ids.shape[1])(*ids[0].tolist())
        self._decode(self._api.llama_batch_get_one(tokens, len(tokens)))
        return self._logits(-1)[None], ids

    def resume(self, state: Any) -> Any:
        return self.read(state)[1]

    def step(self, tokens: Tensor, state: Any) -> tuple[Tensor, Any]:
        self._token[0] = int(tokens[0])
        self._decode(self._api.llama_batch_get_one(self._token, 1))
        return self._logits(-1)[None], state

    def close(self) -> None:
        """Frees the model; the reader is of no use afterwards."""
        self._api.llama_free(self._context)
        self._api.llama_model_free(self._model)

    def _decode(self, batch: Any) -> None:
        status = self._api.llama_decode(self._context, batch)
        if status:
            raise RuntimeError(f"llama_decode gave {status}: {''.join(_LOG[-8:]).strip()}")

    def _logits(self, position: int) -> Tensor:
        """A copy of (vocab,)."""
        pointer = self._api.llama_get_logits_ith(self._context, position)
        return torch.from_numpy(np.ctypeslib.as_array(pointer, (self._vocab,)).copy())


def _be_quiet() -> None:
    import llama_cpp

    if _KEPT:
        return

    @llama_cpp.llama_log_callback
    def note(level, text, user_data) -> None:
        _LOG.append(text.decode(errors="replace"))
        del _LOG[:-100]

    llama_cpp.llama_log_set(note, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    _KEPT.append(note)
