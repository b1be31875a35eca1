"""The language model: embedding, a stack of layers of any kind, final norm, head."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Union

import torch
from torch import Tensor, nn

from vision_scan.errors import UserError

from .decode import decoder_for
from .head import LMHead
from .kinds import KINDS
from .mixer import Segments
from .parallel import Parallel
from .precision import RMSNorm
from .recompute import read_by_segments, recompute
from .sequence_parallel import SequenceShard, check_shardable
from .shared_attention import SharedAttention, SharedAttentionConfig, SharedBlock, SharedBlockConfig
from .state import State

LAYERS: dict[str, type[nn.Module]] = {**KINDS, "parallel": Parallel, "shared_attention": SharedAttention}

PIECE_TOKENS = 1024  # of all rows, see `LanguageModel._reads_in_pieces`
LEAST_PIECE = 64  # of a row

LayerConfig = Union[tuple(layer.Config for layer in LAYERS.values())]  # noqa: UP007 (built from LAYERS)


@dataclass(frozen=True, kw_only=True)
class LMConfig:
    """A language model: `layers` from the first to the last, each with a norm in front and a residual
    connection around it."""

    d_model: int
    vocab_size: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float = 1e-5
    tie_word_embeddings: bool = True

    def __post_init__(self) -> None:
        if min(self.d_model, self.vocab_size, len(self.layers)) < 1:
            raise UserError("lm: d_model, vocab_size and the number of layers must be 1 or more")
        blocks = {(layer.block, layer.shared) for layer in self._sharing}
        numbers = sorted(number for number, _ in blocks)
        if numbers != list(range(len(numbers))):
            raise UserError(
                f"lm: shared blocks are numbered {', '.join(map(str, numbers))}; `block` of shared_attention layers "
                "must count from 0, and layers of one number must have the same `shared`"
            )

    @property
    def _sharing(self) -> list[SharedAttentionConfig]:
        return [layer for layer in self.layers if isinstance(layer, SharedAttentionConfig)]

    @property
    def shared(self) -> list[SharedBlockConfig]:
        """The blocks that layers share, by number."""
        blocks = {layer.block: layer.shared for layer in self._sharing}
        return [blocks[number] for number in sorted(blocks)]


class Block(nn.Module):
    """x + mixer(norm(x)); the residual stream stays float32 (or wider)."""

    def __init__(self, config: LayerConfig, lm: LMConfig) -> None:
        super().__init__()
        self.norm = RMSNorm(lm.d_model, lm.norm_eps)
        self.mixer = LAYERS[config.kind](config, lm.d_model)

    def forward(
        self, x: Tensor, state: dict | None, segments: Segments, dtype: torch.dtype, shared: SharedBlock | None = None
    ):
        """shared: what the mixer shares with those of other layers."""
        if shared is None:
            y, state = self.mixer(self.norm(x).to(dtype), state, segments)
        else:
            y, state = self.mixer(x, state, segments, self.norm, shared)
        return x + y, state


class LanguageModel(nn.Module):
    """Token ids or embeddings in, logits and state out.

    Attributes:
        recompute_layers: in training, compute the activations within layers again for the backward pass.
        recompute_tokens: in training, read rows in pieces of so many tokens, of which only the state is kept; 0: as a
            whole.
    """

    recompute_layers = False
    recompute_tokens = 0

    def __init__(self, config: LMConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.d_model**-0.5)
        self.layers = nn.ModuleList(Block(layer, config) for layer in config.layers)
        self.shared = nn.ModuleList(SharedBlock(block, config.d_model) for block in config.shared)
        self.norm_f = RMSNorm(config.d_model, config.norm_eps)
        self.lm_head = LMHead(config.d_model, config.vocab_size)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.embedding.weight
        # Keeps the variance of the residual stream at the start independent of depth (as GPT-2).
        self.scale_residual(len(self.layers) ** -0.5)

    @torch.no_grad()
    def scale_residual(self, factor: float) -> None:
        """Multiplies what the layers add to the residual stream, as far as they say how (mixer.py)."""
        for module in self.layers.modules():
            name = getattr(module, "residual_projection", None)
            if name is not None:
                getattr(module, name).weight.mul_(factor)

    @property
    def dtype(self) -> torch.dtype:
        return getattr(self.embedding, "dtype", None) or self.embedding.weight.dtype

    @property
    def device(self) -> torch.device:
        return getattr(self.embedding, "device", None) or self.embedding.weight.device

    def shared_by(self, index: int) -> SharedBlock | None:
        """What a layer shares with others."""
        layer = self.config.layers[index]
        return self.shared[layer.block] if isinstance(layer, SharedAttentionConfig) else None

    def allocate_state(self, batch: int, capacity: int = 0) -> State:
        """The state of rows that have read nothing.

        Args:
            batch: number of rows.
            capacity: tokens that full attention caches reserve room for; they grow when it is exceeded.
        """
        layers = [block.mixer.allocate(batch, capacity, self.device, self.dtype) for block in self.layers]
        return State(layers, torch.zeros(batch, dtype=torch.int64, device="cpu"))

    def trim_state(self, state: State) -> State:
        """The same without room for tokens that have not been read, as a view where nothing is cut."""
        longest = max(1, int(state.lengths.max()))

        def trim(tensor: Tensor, shape: tuple[int | None, ...]) -> Tensor:
            for axis, size in enumerate(shape, start=1):
                if size is None and tensor.shape[axis] > longest:
                    tensor = tensor.narrow(axis, 0, longest).contiguous()
            return tensor

        layers = [
            {name: trim(tensor, shapes[name]) for name, tensor in layer.items()}
            for layer, shapes in zip(state.layers, self._state_shapes, strict=True)
        ]
        return State(layers, state.lengths, dict(state.info))

    def forward(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        state: State | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        logits_to_keep: int = 0,
        overwrite_state: bool = False,
    ) -> tuple[Tensor, State]:
        """Reads tokens.

        Args:
            input_ids: (batch, seqlen), or
            inputs_embeds: (batch, seqlen, d_model); seqlen >= 1.
            state: what the rows have read before; never changed unless `overwrite_state`.
            attention_mask: (batch, seqlen), 0 or False at padding on any side: state unchanged, the logits
                there mean nothing.
            seq_idx: (batch, seqlen) integer, packed segments: a change starts a new one; below 0 is padding.
            logits_to_keep: logits of the last so many positions only; 0: of all.
            overwrite_state: the state given may be updated in place (decoding).
        Returns:
            logits: (batch, kept, vocab_size), float32 or wider; the state after the last real token.
        Raises:
            UserError: on inputs that do not fit together.
        """
        if overwrite_state and seq_idx is None:
            decoded = self._decode(input_ids, inputs_embeds, state, attention_mask, logits_to_keep)
            if decoded is not None:
                return decoded
        hidden, state = self.read(
            input_ids,
            inputs_embeds=inputs_embeds,
            state=state,
            attention_mask=attention_mask,
            seq_idx=seq_idx,
            overwrite_state=overwrite_state,
        )
        return self.logits(hidden[:, -logits_to_keep:]), state

    def _decode(self, input_ids, inputs_embeds, state, attention_mask, keep) -> tuple[Tensor, State] | None:
        """`forward` in one compiled call, or None if that does not serve these inputs."""
        given = inputs_embeds if input_ids is None else input_ids
        if given is None or (input_ids is not None and inputs_embeds is not None):
            return None
        batch, seqlen = given.shape[:2]
        mask = None
        if attention_mask is not None:
            if attention_mask.shape != (batch, 1) or seqlen > 1:
                return None
            mask = attention_mask[:, 0].bool().contiguous()
        decoder = decoder_for(self, batch, seqlen)
        if decoder is None:
            return None
        state = self.allocate_state(batch) if state is None else state
        self._check_state(state, batch)
        hidden = self.embedding(given).float() if inputs_embeds is None else inputs_embeds.float().clone()
        try:
            return decoder.step(hidden.contiguous(), state, mask, min(keep, seqlen) or seqlen)
        except ValueError:  # a layout or dtype that is not served
            return None

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d_model) -> (..., vocab_size), float32 or wider."""
        logits = self.lm_head(hidden)
        return logits.to(torch.promote_types(logits.dtype, torch.float32))

    def divergence(self, hidden: Tensor, teacher: Callable[[slice], Tensor]) -> Tensor:
        """Sum of KL(teacher || own) of the tokens that follow hidden states (rows, d_model); `teacher` gives its logits
        of some of the rows, (those, vocab_size)."""
        return self.lm_head(hidden, teacher)

    def loss(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """Sum of the cross entropies of targets (...), int64, given hidden states (..., d_model)."""
        if isinstance(self.lm_head, LMHead):
            return self.lm_head(hidden, targets)
        logits = self.logits(hidden).flatten(0, -2)  # of quantised weights
        return nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")

    def losses(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """The cross entropies of targets (...), int64, one by one: (...)."""
        if isinstance(self.lm_head, LMHead):
            return self.lm_head(hidden, targets, each=True)
        logits = self.logits(hidden).flatten(0, -2)
        return nn.functional.cross_entropy(logits, targets.flatten(), reduction="none").view(targets.shape)

    def read(
        self,
        input_ids: Tensor | None = None,
        *,
        inputs_embeds: Tensor | None = None,
        state: State | None = None,
        attention_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        overwrite_state: bool = False,
        shard: SequenceShard | None = None,
    ) -> tuple[Tensor, State]:
        """As `forward`, but the normed hidden states (batch, seqlen, d_model) instead of logits.

        Args:
            shard: the tokens given are this process's piece of rows that begin without a state; `seq_idx` is
                the shard's. All processes of its group must call, and each must go backward if one does. The
                state is that behind the piece: of the whole rows in the last process.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise UserError("the language model takes either input_ids or inputs_embeds, exactly one of them")
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        batch, seqlen = x.shape[:2]
        if shard is not None:
            if not (state is None and attention_mask is None and seq_idx is None):
                raise UserError(
                    "a shard is read without a state, and its padding and segments are its own: give seq_idx "
                    "of the whole rows to SequenceShard.cut"
                )
            return self._read_shard(x, shard)
        in_pieces = seq_idx is None and self._reads_in_pieces(x)
        seq_idx = self._segment_index(batch, seqlen, attention_mask, seq_idx)
        if state is not None:
            self._check_state(state, batch)
        if self.training and torch.is_grad_enabled() and 0 < self.recompute_tokens < seqlen:
            return read_by_segments(self._read, x, state, seq_idx, self.recompute_tokens)
        if not in_pieces:
            return self._read(x, state, seq_idx, overwrite_state)
        hidden = []
        piece = max(LEAST_PIECE, PIECE_TOKENS // batch)
        for start in range(0, seqlen, piece):
            tokens = slice(start, start + piece)
            index = None if seq_idx is None else seq_idx[:, tokens]
            part, state = self._read(x[:, tokens], state, index, overwrite_state or start > 0)
            hidden.append(part)
        return torch.cat(hidden, 1), state

    def _reads_in_pieces(self, x: Tensor) -> bool:
        """Whether reading in pieces, each going on from the state behind the last, is faster: on a CPU, whose
        caches then hold what a layer hands to the next. Gradients would need all of it anyway, and layers
        whose state grows would copy it."""
        return (
            x.device.type == "cpu"
            and not torch.is_grad_enabled()
            and x.shape[0] * x.shape[1] >= 2 * PIECE_TOKENS
            and all(None not in shape for layer in self._state_shapes for shape in layer.values())
        )

    def _read_shard(self, x: Tensor, shard: SequenceShard) -> tuple[Tensor, State]:
        check_shardable([block.mixer for block in self.layers])
        if x.shape[:2] != (len(shard.starts), shard.stop - shard.start):
            raise UserError(
                f"this process's shard has {len(shard.starts)} rows of {shard.stop - shard.start} tokens, "
                f"got {tuple(x.shape[:2])}: cut the rows with SequenceShard.take"
            )
        if torch.is_grad_enabled() and not x.requires_grad:
            # Gradients of later shards pass through here, whether or not something in this one learns.
            x = x.detach().requires_grad_()
        return self._read_segments(x, None, Segments(shard.starts, shard.seq_idx, shard=shard))

    def _read(self, x: Tensor, state: State | None, seq_idx: Tensor | None, overwrite: bool):
        starts = torch.zeros(len(x), dtype=torch.int64, device="cpu") if state is None else state.lengths
        return self._read_segments(x, state, Segments(starts, seq_idx, overwrite))

    def _read_segments(self, x: Tensor, state: State | None, segments: Segments) -> tuple[Tensor, State]:
        dtype = x.dtype
        if self.shared:
            segments = replace(segments, embeddings=x)
        x = x.to(torch.promote_types(dtype, torch.float32))
        layers = []
        for index, block in enumerate(self.layers):
            inputs = x, state.layers[index] if state else None, segments, dtype, self.shared_by(index)
            again = self.recompute_layers and self.training and torch.is_grad_enabled()
            x, layer = recompute(block, *inputs) if again else block(*inputs)
            layers.append(layer)
        info = state.info if state else {}
        return self.norm_f(x).to(dtype), State(layers, segments.ends(x.shape[1]), dict(info))

    @functools.cached_property
    def _state_shapes(self) -> list[dict[str, tuple[int | None, ...]]]:
        """Shapes of each layer's state behind the batch axis, None where they follow the capacity."""

        def shapes(mixer: nn.Module, capacity: int) -> dict[str, tuple[int, ...]]:
            layer = mixer.allocate(1, capacity, "meta", self.dtype)
            return {name: tuple(tensor.shape[1:]) for name, tensor in layer.items()}

        pairs = [(shapes(block.mixer, 1), shapes(block.mixer, 2)) for block in self.layers]
        return [
            {
                name: tuple(a if a == b else None for a, b in zip(one[name], two[name], strict=True))
                for name in one
            }
            for one, two in pairs
        ]

    def _check_state(self, state: State, batch: int) -> None:
        if state.batch != batch:
            raise UserError(f"the state has {state.batch} rows, the input {batch}; select or batch the state")
        expected = self._state_shapes
        if len(state.layers) != len(expected):
            raise UserError(
                f"the state is of a model with {len(state.layers)} layers, this one has {len(expected)}"
            )
        for index, (layer, shapes) in enumerate(zip(state.layers, expected, strict=True)):
            fits = layer.keys() == shapes.keys() and all(
                _fits(tensor.shape[1:], shapes[name]) for name, tensor in layer.items()
            )
            if not fits:
                given = {name: tuple(tensor.shape[1:]) for name, tensor in layer.items()}
                raise UserError(
                    f"the state is of another model: layer {index} keeps {given}, here it is {shapes}"
                )

    def _segment_index(self, batch, seqlen, attention_mask, seq_idx) -> Tensor | None:
        for name, given in (("attention_mask", attention_mask), ("seq_idx", seq_idx)):
            if given is not None and tuple(given.shape) != (batch, seqlen):
                raise UserError(
                    f"{name} must have the shape of the new tokens {(batch, seqlen)}, "
                    f"got {tuple(given.shape)}"
                )
        if attention_mask is None or bool(attention_mask.all()):
            return None if seq_idx is None else seq_idx.long()
        inside = torch.zeros_like(attention_mask, dtype=torch.int64) if seq_idx is None else seq_idx.long()
        return torch.where(attention_mask.bool(), inside, -1)


def _fits(shape: tuple[int, ...], expected: tuple[int | None, ...]) -> bool:
    """Whether two shapes agree where one is expected."""
    return shape == expected or (
        len(shape) == len(expected) and all(b in (None, a) for a, b in zip(shape, expected, strict=True))
    )
