"""Answers as they are made."""

from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Protocol

from torch import Tensor

from cobra.tokenizer import Tokenizer
from vision_scan.errors import UserError

if TYPE_CHECKING:
    from cobra.lm.state import State


class Streamer(Protocol):
    """Gets tokens as they are made; the text streamers of `transformers` fit."""

    def put(self, value: Tensor, /) -> None:
        """Takes the new token of each row: (batch,), int64, on the CPU."""

    def end(self) -> None:
        """Is told that nothing follows."""


class TextStreamer:
    """Hands on text as soon as its characters are complete; the pieces join to the whole answer.

    Args:
        tokenizer: of the model.
        write: called with every piece of text.
    """

    def __init__(self, tokenizer: Tokenizer, write: Callable[[str], object]) -> None:
        self._tokenizer = tokenizer
        self._write = write
        self._reset()

    def put(self, value: Tensor, /) -> None:
        """Takes the next token or tokens of the one row that is streamed."""
        if value.dim() and len(value) != 1:
            raise UserError(f"a TextStreamer serves one row, got {len(value)}")
        self._ids += value.flatten().tolist()
        self._flush(is_end=False)

    def end(self) -> None:
        """Writes what is left, even half a character; the next answer may follow."""
        self._flush(is_end=True)
        self._reset()

    def _reset(self) -> None:
        self._ids: list[int] = []
        self._context = 0  # decoding starts here: some tokenizers write a token by what precedes it
        self._written = 0  # the text of the ids before this one is out

    def _flush(self, is_end: bool) -> None:
        before = self._tokenizer.decode(self._ids[self._context : self._written])
        text = self._tokenizer.decode(self._ids[self._context :])
        if len(text) > len(before) and (is_end or not text.endswith("\ufffd")):
            self._write(text[len(before) :])
            self._context, self._written = self._written, len(self._ids)


class AnswerStream(Iterator[str]):
    """An answer piece by piece, as it is made; each is made when it is asked for.

    Args:
        tokenizer: of the model.
        tokens: gives the new tokens, and in the end all of them and the state.
    Attributes:
        state: behind the whole answer, for the next question; None as long as it is not complete.
    """

    def __init__(self, tokenizer: Tokenizer, tokens: "Generator[Tensor, None, tuple[Tensor, State]]") -> None:
        self.state: State | None = None
        self._tokens = tokens
        self._pieces: list[str] = []
        self._streamer = TextStreamer(tokenizer, self._pieces.append)

    def __next__(self) -> str:
        while not self._pieces:
            if self.state is not None:
                raise StopIteration
            try:
                self._streamer.put(next(self._tokens).cpu())
            except StopIteration as end:
                _, self.state = end.value
                self._streamer.end()
        return self._pieces.pop(0)

    def close(self) -> None:
        """Ends it early; there is no state then."""
        self._tokens.close()


class StopTexts:
    """Ends a text in front of the first of some strings; holds back what may be the beginning of one.

    Args:
        stops: none of them empty.
        write: called with every piece of text that is certain to stay.
    Attributes:
        is_hit: whether one was found. Nothing is written after it.
    """

    def __init__(self, stops: Sequence[str], write: Callable[[str], object]) -> None:
        self.is_hit = False
        self._stops = tuple(stops)
        self._write = write
        self._held = ""

    def put(self, piece: str) -> None:
        """Takes the next piece."""
        if self.is_hit:
            return
        text = self._held + piece
        found = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.is_hit = True
            self._held, text = "", text[: min(found)]
        else:
            kept = max((_overlap(text, stop) for stop in self._stops), default=0)
            self._held = text[len(text) - kept :]
            text = text[: len(text) - kept]
        if text:
            self._write(text)

    def end(self) -> None:
        """Nothing follows: what was held back is no stop."""
        if self._held:
            self._write(self._held)
        self._held = ""


def _overlap(text: str, stop: str) -> int:
    """How many letters at the end of a text begin `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
