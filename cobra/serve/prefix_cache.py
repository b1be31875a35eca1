"""States behind what has been read before, by the digest of all of it."""

from collections import OrderedDict
from dataclasses import dataclass

from torch import Tensor

from cobra.lm.state import State


@dataclass(frozen=True)
class Known:
    """What stands behind a prefix.

    Attributes:
        state: of one row; not to be changed.
        logits: (1, 1, vocab) behind its last token, where they are known.
    """

    state: State
    logits: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.state.nbytes + (0 if self.logits is None else self.logits.nbytes)


class PrefixCache:
    """Keeps what was used last, up to a number of bytes.

    Attributes:
        nbytes: what is kept.
        hits, misses: conversations that found a prefix, and that found none.
        evicted: states that had to go.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.nbytes = 0
        self.hits = self.misses = self.evicted = 0
        self._known: OrderedDict[bytes, Known] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._known

    def get(self, digest: bytes) -> Known | None:
        """What is known behind a prefix; it counts as used now."""
        found = self._known.get(digest)
        if found is not None:
            self._known.move_to_end(digest)
        return found

    def put(self, digest: bytes, known: Known) -> None:
        """Keeps it, if it fits at all; what was used longest ago goes."""
        if known.nbytes > self.budget:
            return
        self.drop(digest)
        while self.nbytes + known.nbytes > self.budget:
            _, gone = self._known.popitem(last=False)
            self.nbytes -= gone.nbytes
            self.evicted += 1
        self._known[digest] = known
        self.nbytes += known.nbytes

    def drop(self, digest: bytes) -> None:
        """Forgets a prefix, if it is there."""
        gone = self._known.pop(digest, None)
        if gone is not None:
            self.nbytes -= gone.nbytes
