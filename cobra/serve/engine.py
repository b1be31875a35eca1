"""Continuous batching: many conversations are read and answered in turn, a few tokens of each at a time.

Each call of `Engine.step` decodes one token of every answer that is being made, and then reads one chunk of one
conversation that is not yet read, no longer than answers may stall. So one that has a thousand images to read delays
the others by that chunk, and nobody by its length. A conversation comes in when a slot is free and goes out when its
answer ends; what stands behind its segments is kept for others that begin alike (prefix_cache.py).
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cobra.reading import CHUNK_SIZE, read_by_chunks
from cobra.sampling import greedy
from cobra.serve.answer import Answer, BusyError, Request
from cobra.serve.prefix_cache import Known, PrefixCache
from cobra.serve.slots import Slots
from vision_scan.errors import UserError

if TYPE_CHECKING:
    from cobra.lm.state import State
    from cobra.model import Cobra

log = logging.getLogger(__name__)
LEAST_CHUNK = 16  # tokens: fewer take the compiled decoder hardly less time
ALONE = 8  # times as long as others may be delayed, a chunk may take where there are none: one may come meanwhile


@dataclass
class Counters:
    """What an engine has done since it began; read from other threads."""

    requests: int = 0
    refused: int = 0
    cancelled: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    images: int = 0
    gaps: deque[float] = field(default_factory=lambda: deque(maxlen=4096))
    """Seconds between one token and the next of the same answer."""
    first_tokens: deque[float] = field(default_factory=lambda: deque(maxlen=1024))
    """Seconds from a request to its first token."""


class Engine:
    """Answers many conversations with one model.

    Args:
        model: not to be used elsewhere meanwhile.
        slots: answers made at a time.
        cache_bytes: for states behind what was read before.
        max_waiting: requests that may wait for a slot; others are refused.
        stall: seconds by which reading a chunk may delay answers that are being made, as far as chunks can be cut: not
            below a few tokens, nor within an image's passage through the tower.
    """

    def __init__(
        self, model: "Cobra", *, slots: int = 16, cache_bytes: int = 2**30, max_waiting: int = 64, stall: float = 0.1
    ) -> None:
        if min(slots, max_waiting + 1, cache_bytes + 1) < 1 or not stall > 0:
            raise UserError("slots and stall must be above 0, max_waiting and cache_bytes 0 or more")
        self.model = model
        self.cache = PrefixCache(cache_bytes)
        self.counters = Counters()
        self.slots = Slots(model.lm, slots)
        self._max_waiting, self._stall = max_waiting, stall
        self._end_id = model.processor.template.end_id(model.tokenizer)
        self._chunk = LEAST_CHUNK  # tokens that are read while others wait; follows what they take
        self._waiting: deque[Answer] = deque()
        self._reading: deque[Answer] = deque()
        self._decoding: list[Answer] = []  # in the order of their slots
        self._lock = threading.Condition()
        self._is_closed = False
        self._thread: threading.Thread | None = None

    def submit(self, request: Request) -> Callable[[], None]:
        """Takes a request; what it gives cancels it, which is then told of nothing more.

        Raises:
            BusyError: if as many as may wait are waiting, or the engine is closed.
        """
        answer = Answer(request, self.model.tokenizer, self._end_id)
        with self._lock:
            if self._is_closed or len(self._waiting) >= self._max_waiting + self._num_free():
                self.counters.refused += 1
                why = "the server is stopping" if self._is_closed else f"{len(self._waiting)} requests are waiting"
                raise BusyError(f"{why}; try again later")
            self.counters.requests += 1
            self._waiting.append(answer)
            self._lock.notify_all()

        def cancel() -> None:
            with self._lock:
                answer.is_cancelled |= answer.reason is None  # one that has ended is still kept for the next turn
                self._lock.notify_all()

        return cancel

    @property
    def is_running(self) -> bool:
        """Whether its thread is there."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Answers that have a slot, or will have the one that is kept for them."""
        return len(self._reading) + len(self._decoding)

    def _num_free(self) -> int:
        return self.slots.count - self.num_running

    def start(self) -> None:
        """Steps in a thread of its own, until `close`."""
        self._thread = threading.Thread(target=self._run, name="cobra-engine", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends every request with an error, and the thread."""
        with self._lock:
            self._is_closed = True
            self._lock.notify_all()
        if self._thread is not None:
            self._thread.join()
        self._reading.extend(self._waiting)
        self._waiting.clear()
        self._fail_running(BusyError("the server is stopping"))

    def _run(self) -> None:
        while True:
            with self._lock:
                self._lock.wait_for(lambda: self._is_closed or self._waiting or self.num_running)
                if self._is_closed:
                    return
            try:
                self.step()
            except Exception as error:  # such as no memory: those that run fail, others go on
                log.exception("a step failed")
                self._fail_running(error)

    def _fail(self, answer: Answer, error: Exception) -> None:
        self.counters.failed += not answer.is_cancelled
        answer.finish(error)

    def _fail_running(self, error: Exception) -> None:
        for answer in [*self._reading, *self._decoding]:
            if answer.reason is None:
                self._fail(answer, error)
        self._reading.clear()
        self._decoding.clear()
        self.slots.used = 0

    @torch.no_grad()
    def step(self) -> bool:
        """Makes the next token of every answer and reads a chunk; whether there was anything to do."""
        self._drop_cancelled()
        self._admit()
        if not self.num_running:
            return False
        if self._decoding:
            self._decode()
        if self._reading:
            self._read_chunk()
        return True

    def _drop_cancelled(self) -> None:
        for answer in [each for each in self._decoding if each.is_cancelled]:
            self._leave_slot(answer)
            self.counters.cancelled += 1
        with self._lock:
            for queue in (self._waiting, self._reading):
                for answer in [each for each in queue if each.is_cancelled]:
                    queue.remove(answer)
                    self.counters.cancelled += 1

    def _admit(self) -> None:
        while self._num_free() > 0:
            with self._lock:
                if not self._waiting:
                    return
                answer = self._waiting.popleft()
                answer.reader = self._reader(answer)
                self._reading.append(answer)

    def _reader(self, answer: Answer) -> Iterator[int | Known]:
        """Reads a conversation: how many tokens each chunk had, and in the end what stands behind all of it."""
        segments = answer.request.prompt.segments
        known, first = self._find(answer)
        if first == len(segments):
            assert known is not None
            yield known
            return
        state, logits = None if known is None else known.state.clone(), None
        left = answer.request.prompt.num_tokens - answer.cached_tokens
        for segment in segments[first:]:
            before = 0 if state is None else int(state.lengths)
            chunks = read_by_chunks(self.model, state, segment.open(self.model), self._chunk_size)
            for logits, state in chunks:  # noqa: B007 (the last ones)
                read, before = int(state.lengths) - before, int(state.lengths)
                left -= read
                if left:  # else what stands behind it is told at once
                    yield read
            assert state is not None  # no segment is empty
            if segment is segments[-1]:  # nothing overwrites this one
                self._keep(segment.digest, state, logits)
            else:
                self._keep(segment.digest, state, is_read_on=True)
            self.counters.images += sum(not isinstance(piece, list) for piece in segment.pieces)
        assert state is not None
        yield Known(state, logits)

    def _keep(
        self, digest: bytes, state: "State", logits: Tensor | None = None, *, is_read_on: bool = False
    ) -> None:
        """Keeps a state for others, if it has room at all; a copy of one that is overwritten by what comes next."""
        trimmed = self.model.lm.trim_state(state)
        if trimmed.nbytes <= self.cache.budget:
            self.cache.put(digest, Known(trimmed.clone() if is_read_on else trimmed, logits))

    def _find(self, answer: Answer) -> tuple[Known | None, int]:
        """The longest beginning of a conversation that is known, and the number of the first segment behind it."""
        segments = answer.request.prompt.segments
        for number in range(len(segments), 0, -1):
            known = self.cache.get(segments[number - 1].digest)
            if known is not None and (number < len(segments) or known.logits is not None):
                answer.cached_tokens = sum(segment.num_tokens for segment in segments[:number])
                self.cache.hits += 1
                return known, number
        self.cache.misses += 1
        return None, 0

    def _times(self) -> int:
        """How many times as long as usual a chunk may be."""
        return ALONE if self.num_running == 1 else 1

    def _chunk_size(self) -> int:
        return min(CHUNK_SIZE, self._times() * self._chunk)

    def _adapt(self, tokens: int, seconds: float, times: int) -> None:
        """Halves the chunks that take longer than others may wait, and doubles those that take less than half of it.
        What a chunk takes is not in proportion to its tokens, least of all where few go another way than many."""
        if seconds > times * self._stall:
            self._chunk = max(LEAST_CHUNK, self._chunk // 2)
        elif seconds < times * self._stall / 2 and tokens > times * self._chunk // 2:
            self._chunk = min(CHUNK_SIZE, 2 * self._chunk)

    def _read_chunk(self) -> None:
        times, answer = self._times(), self._reading[0]
        assert answer.reader is not None
        began, request = time.monotonic(), answer.request
        try:
            read = next(answer.reader)
            if isinstance(read, Known):
                most = request.prompt.num_tokens + request.max_new_tokens + 2  # the end token, and one to spare
                answer.place = self.slots.put(read.state, most)
        except Exception as error:  # of one conversation, such as an image that turns out to be damaged
            self._reading.popleft()
            if not isinstance(error, UserError):
                log.exception("a request failed")
            self._fail(answer, error)
            return
        self._reading.popleft()
        if isinstance(read, int):
            self._adapt(read, time.monotonic() - began, times)
            self._reading.append(answer)  # the others first
        else:
            self._begin_answer(answer, read)

    def _begin_answer(self, answer: Answer, read: Known) -> None:
        prompt = answer.request.prompt
        answer.content = prompt.content if self.cache.budget else None
        answer.reader = None  # it holds a state
        self._decoding.append(answer)
        self.counters.prompt_tokens += prompt.num_tokens
        self.counters.cached_tokens += answer.cached_tokens
        assert read.logits is not None
        self._take(answer, int(answer.request.sampler(read.logits[:, -1])))

    def _take(self, answer: Answer, token: int) -> None:
        is_first = not answer.has_begun
        seconds = answer.take(token)
        (self.counters.first_tokens if is_first else self.counters.gaps).append(seconds)
        self.counters.new_tokens += 1

    def _decode(self) -> None:
        answers = list(self._decoding)
        tokens = torch.tensor([answer.next_to_read() for answer in answers], device=self.model.device)
        logits = self.slots.step(tokens)
        best = greedy(logits).tolist()
        for row, answer in enumerate(answers):
            if answer.reason is None:
                sampler = answer.request.sampler
                self._take(answer, best[row] if sampler.is_greedy else int(sampler(logits[row : row + 1])))
            elif answer.is_over:
                self._keep_turn(answer)
        for answer in [each for each in answers if each.is_over]:
            self._leave_slot(answer)

    def _keep_turn(self, answer: Answer) -> None:
        """Keeps the state behind an answer, from which the next turn goes on."""
        digest = answer.turn_digest()
        if digest is not None and answer.place is not None:
            self._keep(digest, self.slots.take(answer.place))

    def _leave_slot(self, answer: Answer) -> None:
        assert answer.place is not None
        moved_from = self.slots.free(answer.place)
        last = self._decoding.pop()
        if moved_from is not None:
            last.place = answer.place
            self._decoding[answer.place] = last
        answer.place = None


def percentile(values: Sequence[float], share: float) -> float:
    """The value below which `share` of them are; 0 of none."""
    ordered = sorted(tuple(values))
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0
