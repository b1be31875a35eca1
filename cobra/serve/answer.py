"""An answer on its way: what was asked, what has been made of it, who is told."""

import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from cobra.sampling import Sampler
from cobra.serve.prefix_cache import Known
from cobra.serve.prompt import Prompt
from cobra.streaming import StopTexts, TextStreamer
from cobra.tokenizer import Tokenizer
from vision_scan.errors import UserError

if TYPE_CHECKING:
    from cobra.content import Content

log = logging.getLogger(__name__)
Reason = Literal["stop", "length"]


class BusyError(UserError):
    """There are as many requests as may wait."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a request ended.

    Attributes:
        reason: "stop" at the end of the answer or a stop text, "length" at its last allowed token.
        error: why there is no (whole) answer; None: there is.
        prompt_tokens, cached_tokens, new_tokens: of the conversation, of it those not read again, and of the answer.
        seconds_to_first: from the request to its first token.
    """

    reason: Reason = "stop"
    error: Exception | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    new_tokens: int = 0
    seconds_to_first: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """An answer to be made.

    Attributes:
        prompt: the conversation.
        sampler: of one row.
        max_new_tokens: where the answer ends at the latest, at least 1.
        stop: texts in front of which it ends.
        ignores_end: go on behind the end token, as speeds are measured.
        on_text: told of each piece of text, from the engine's thread.
        on_end: told once, and nothing afterwards: how it ended, or why it failed.
    """

    prompt: Prompt
    sampler: Sampler
    max_new_tokens: int
    stop: Sequence[str] = ()
    ignores_end: bool = False
    on_text: Callable[[str], object]
    on_end: Callable[[Outcome], object]


class Answer:
    """A request that an engine has taken: first read by `reader`, then decoded in slot `place`.

    Args:
        request: what is asked.
        tokenizer: of the model.
        end_id: the token at the end of an answer.
    Attributes:
        is_cancelled: nobody waits for it any more.
        reason: why it has ended; None: it has not.
        content: what has been read when the answer begins; None: what is made is not to be gone on from.
        closing: tokens to be read behind an answer that has ended, so that the next turn can follow.
    """

    def __init__(self, request: Request, tokenizer: Tokenizer, end_id: int) -> None:
        self.request = request
        self.is_cancelled = False
        self.cached_tokens = 0
        self.reader: Iterator[int | Known] | None = None
        self.place: int | None = None
        self.reason: Reason | None = None
        self.content: Content | None = None
        self.closing: deque[int] = deque()
        self.seconds_to_first = 0.0
        self._end_id = end_id
        self._ids: list[int] = []
        self._told_at = time.monotonic()
        self._stops = StopTexts(request.stop, request.on_text)
        self._text = TextStreamer(tokenizer, self._stops.put)

    @property
    def has_begun(self) -> bool:
        """Whether it has a token."""
        return bool(self._ids)

    @property
    def is_over(self) -> bool:
        """Whether nothing is left to be read of it."""
        return self.reason is not None and not self.closing

    def take(self, token: int) -> float:
        """Adds a token, tells of its text, and if it is the last of the end; gives the seconds since the one before, of
        the first since the request."""
        now, before = time.monotonic(), self._told_at
        self._told_at = now
        if not self._ids:
            self.seconds_to_first = now - before
        self._ids.append(token)
        try:
            self._tell(token)
        except Exception as error:  # of who is told, such as an event loop that is closed
            self.is_cancelled, self.content = True, None
            log.debug("nobody hears an answer: %s", error)
            return now - before
        if self.reason is not None:
            self.finish()
            if self._stops.is_hit:
                self.content = None  # what was made is not what the conversation goes on with
            if self.content is not None:
                self.closing.extend(self._ids[-1:] if token == self._end_id else [token, self._end_id])
        return now - before

    def _tell(self, token: int) -> None:
        if token != self._end_id:
            self._text.put(torch.tensor([token]))
        if (token == self._end_id and not self.request.ignores_end) or self._stops.is_hit:
            self.reason = "stop"
        elif len(self._ids) >= self.request.max_new_tokens:
            self.reason = "length"
        if self.reason is not None:
            self._text.end()
            self._stops.end()

    def next_to_read(self) -> int:
        """The token that the model reads next."""
        return self.closing.popleft() if self.closing else self._ids[-1]

    def turn_digest(self) -> bytes | None:
        """Of all that stands in front of the next turn, when this one is over; None: it is not to be gone on from."""
        if self.content is None:
            return None
        content = self.content.copy()
        content.read(self._ids if self._ids[-1] == self._end_id else [*self._ids, self._end_id])
        return content.digest

    def finish(self, error: Exception | None = None) -> None:
        """Tells how it ended, unless nobody waits."""
        if self.is_cancelled:
            return
        outcome = Outcome(
            reason=self.reason or "stop",
            error=error,
            prompt_tokens=self.request.prompt.num_tokens,
            cached_tokens=self.cached_tokens,
            new_tokens=len(self._ids),
            seconds_to_first=self.seconds_to_first,
        )
        try:
            self.request.on_end(outcome)
        except Exception as told:  # the server's event loop may be gone
            log.debug("nobody hears the end of an answer: %s", told)
