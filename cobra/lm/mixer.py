"""The contract between the stack and its layers.

A mixer is a module `Mixer(config, d_model)` with

    forward(x, state, segments) -> (y, state)     x, y (batch, seqlen, d_model), seqlen >= 1
    allocate(batch, capacity, device, dtype)      the state of a row that has read nothing
    Config                                        a frozen dataclass with a `kind`, and its costs
    residual_projection                           optional: the name of the projection at its end
    reads_shards                                  optional: True if it reads a piece of a row whose rest is in
                                                  other processes: a recurrence asks `segments.shard` for its
                                                  entering state (sequence_parallel.py)
    mix(x, values, segments)                      optional, of a layer that weighs values with a matrix of tokens by
                                                  tokens: what the matrix of each head makes of other values,
                                                  (batch, seqlen, width) -> (batch, seqlen, heads, width), in rows
                                                  that begin here; neither gate, norm nor projection out
    step_projection, step_sizes(projected)        optional, of a recurrence whose state is `ssm`: the name of the
                                                  projection that dt comes from, and dt, given its output

A layer that shares weights with others (shared_attention.py) reads the residual stream itself, and is handed the norm
that stands in front of others and the module that it shares: forward(x, state, segments, norm, shared).

`state` is a dict of tensors with batch first, or None for rows that have read nothing. It is never
changed, unless `segments.overwrite` says that it may be. The stack knows nothing else of a layer, so a new
kind is one file and one line in `KINDS` (kinds.py).

A kind that csrc/cpu/decode.h knows (or, on a GPU, decode_cuda.py) is decoded there, if it also has

    add_to(decoder, norm)      adds itself and the norm in front of it to a decoder (decode.py)
    step_states                names of the tensors of its state, in the order in which the decoder takes them
    most_step_tokens           optional: the most tokens of a row in one step, where that is fewer than elsewhere
    reserve(state, lengths)    optional: the state with room for one token more
"""

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from vision_scan import real_and_runs

from .sequence_parallel import SequenceShard

LayerState = dict[str, Tensor]
UPDATE_TOKENS = 16  # the most that an update operator takes at a time


@dataclass(frozen=True)
class LayerCost:
    """What one layer costs, for one row.

    Attributes:
        parameters: number of parameters, the norm in front of the layer not included.
        flops_per_token: floating point operations of a token whatever its context.
        flops_per_context_token: further operations for each token of context that it sees.
        state_elements: elements of the state in float32, read and written at each step.
        tail_elements: elements of other fixed memory, in the dtype of the activations.
        cache_elements: elements kept for each token of context, in the dtype of the activations.
        cache_index_bytes: bytes kept beside them for each token of context.
        window: the context that a token sees and that is kept at most; None: all of it.
        idle_parameters: of the parameters, those that a token has nothing to do with, such as other experts'.
        shared_parameters: of the parameters, those of the layer's `block`, which layers of the same one share.
    """

    parameters: int
    flops_per_token: int
    flops_per_context_token: int = 0
    state_elements: int = 0
    tail_elements: int = 0
    cache_elements: int = 0
    cache_index_bytes: int = 0
    window: int | None = None
    idle_parameters: int = 0
    shared_parameters: int = 0

    def __add__(self, other: "LayerCost") -> "LayerCost":
        """What two cost beside each other; if both keep a context, of one window."""
        sums = {each.name: getattr(self, each.name) + getattr(other, each.name) for each in fields(self)
                if each.name != "window"}  # fmt: skip
        return LayerCost(**sums, window=self.window if self.cache_elements else other.window)

    def state_bytes(self, context: int, activation_bytes: int) -> int:
        """What is kept after `context` tokens; a windowed cache is allocated whole."""
        kept = context if self.window is None else self.window
        per_token = self.cache_elements * activation_bytes + self.cache_index_bytes
        return 4 * self.state_elements + self.tail_elements * activation_bytes + kept * per_token

    def traffic_bytes(self, context: int, activation_bytes: int) -> int:
        """Bytes of state moved to decode one token: matrix states twice, caches once."""
        seen = context if self.window is None else min(context, self.window)
        return 8 * self.state_elements + seen * self.cache_elements * activation_bytes


@dataclass(frozen=True)
class Segments:
    """What a layer must know of its rows beside the tokens.

    Attributes:
        starts: (batch,) int64 on the CPU, tokens that each row's first segment has read before.
        seq_idx: (batch, seqlen) int64 or None: segments, below 0 is padding.
        overwrite: the state may be updated in place.
        shard: the rows go on in other processes: what enters comes from them, not from a state.
        embeddings: (batch, seqlen, d_model), what the stack got of these tokens, if a layer reads it.
    """

    starts: Tensor
    seq_idx: Tensor | None = None
    overwrite: bool = False
    shard: SequenceShard | None = None
    embeddings: Tensor | None = None

    @property
    def uniform_start(self) -> int | None:
        """The common start of all rows, if they have one and there is neither padding nor a reset."""
        first = int(self.starts[0])
        return first if self.seq_idx is None and bool((self.starts == first).all()) else None

    def positions_and_runs(self, seqlen: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Where each token stands in its segment, and which segment that is.

        Returns:
            positions: (batch, seqlen) int64, from 0 in each segment (`starts` in the first); -1 is padding.
            runs: (batch, seqlen) int64, 0 for the segment that the state belongs to.
        """
        first = self.uniform_start
        if first is None:
            starts = self.starts.to(device)[:, None]
        else:  # without a copy from the CPU, which would wait for a GPU and could not be part of a CUDA graph
            starts = torch.full((len(self.starts), 1), first, device=device)
        if self.seq_idx is None:
            positions = starts + torch.arange(seqlen, device=device)
            return positions, torch.zeros_like(positions)
        real, runs = real_and_runs(self.seq_idx)
        rank = real.long().cumsum(1) - 1
        reset = torch.nn.functional.pad(runs[:, 1:] != runs[:, :-1], (1, 0))
        segment_start = torch.where(reset, rank, 0).cummax(1).values
        positions = rank - segment_start + torch.where(runs == 0, starts, 0)
        return torch.where(real, positions, -1), runs

    def ends(self, seqlen: int) -> Tensor:
        """(batch,) int64 on the CPU: tokens that the last segment of each row has read afterwards."""
        if self.seq_idx is None:
            return self.starts + seqlen
        positions, runs = self.positions_and_runs(seqlen, self.seq_idx.device)
        last = torch.where(runs == runs[:, -1:], positions, -1).amax(1).cpu() + 1
        return torch.where((runs[:, -1] == 0).cpu(), last.maximum(self.starts), last)
