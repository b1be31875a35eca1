"""A `State` where transformers expects a cache."""

from torch import Tensor
from transformers import Cache

from cobra.lm import State
from vision_scan.errors import UserError


class StateCache(Cache):
    """What the rows of a batch have read, for `past_key_values`.

    Args:
        state: what they have read before, from `Cobra.prefill` for instance; it is left as it is. The ids given to
            `generate` are what follows it, so its tokens do not count in `get_seq_length`.

    Attributes:
        state: what they have read by now; None: nothing.
    """

    def __init__(self, state: State | None = None) -> None:
        super().__init__(layers=[])
        self.state = state
        self._num_read = 0
        self._is_own = False

    def __len__(self) -> int:
        return 0 if self.state is None else len(self.state.layers)

    def __repr__(self) -> str:
        return f"StateCache({self._num_read} tokens)"

    @property
    def may_overwrite(self) -> bool:
        """Whether nobody else holds the state."""
        return self._is_own

    def advance(self, state: State, num_read: int) -> None:
        """Takes the state behind `num_read` more tokens of each row, padding included."""
        self.state, self._is_own = state, True
        self._num_read += num_read

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of each row that were read through this object, padding included."""
        return self._num_read

    @property
    def batch_size(self) -> int:
        return -1 if self.state is None else self.state.batch

    @property
    def is_croppable(self) -> bool:
        return False

    def reset(self) -> None:
        self.state, self._num_read = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps these rows; one that is named several times is branched."""
        if self.state is not None:
            self.state, self._is_own = self.state.select(indices), True

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = self.state.lengths.new_tensor(range(self.state.batch))
            self.batch_select_indices(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """
        Raises:
            UserError: always, as a recurrence has no way back.
        """
        raise UserError(
            f"crop({tokens_to_remove}): a state cannot forget its last tokens; keep a copy from before them "
            "(StateCache(state.clone())), or generate without an assistant model"
        )
