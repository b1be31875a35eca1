"""A conversation as a server gets it: segments of text and images, each recognised by all that stands before it.

A segment ends where another question may part from this one: behind the images of a turn, behind a question, behind an
answer, and within long rows of images every so often. The digest there is that of all ids and all image files up to it,
so that two conversations share a state if and only if everything in front of it is the same.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from cobra.content import Content
from cobra.image import upright_size
from cobra.prompt import open_turn, split_marks
from vision_scan.errors import UserError

if TYPE_CHECKING:
    from cobra.model import Cobra
    from cobra.reading import Piece

IMAGES_PER_SEGMENT = 32  # a state is kept behind so many, lest one more image mean reading all of them again


@dataclass(frozen=True)
class Picture:
    """An image that is decoded when it is read.

    Attributes:
        source: the bytes of an image file.
        digest: SHA-256 of them.
        num_tokens: of a model.
    """

    source: bytes
    digest: bytes
    num_tokens: int

    @staticmethod
    def of(model: "Cobra", source: bytes) -> "Picture":
        """Looks at the header only.

        Raises:
            UserError: if it is no image.
        """
        (num_tokens,) = model.processor.image_tokens(1, [upright_size(source)])
        return Picture(source, hashlib.sha256(source).digest(), num_tokens)


Part = str | Picture


@dataclass(frozen=True)
class Message:
    """What one side says, text and images in order."""

    role: Literal["user", "assistant"]
    parts: tuple[Part, ...]


@dataclass
class Segment:
    """A piece of a prompt, and what is known behind it.

    Attributes:
        pieces: ids and images in order.
        digest: of everything up to its end.
        num_tokens: of this segment.
    """

    pieces: list[list[int] | Picture] = field(default_factory=list)
    digest: bytes = b""
    num_tokens: int = 0

    def open(self, model: "Cobra") -> "Iterator[Piece]":
        """The pieces as a model reads them, each image decoded when it is its turn."""
        for piece in self.pieces:
            yield model.processor.tiles(piece.source) if isinstance(piece, Picture) else piece


class Prompt:
    """A conversation whose last turn is a user's.

    Attributes:
        segments: in order; what follows the last is the answer.
        num_tokens, num_images: of all of them.
    Raises:
        UserError: if turns do not alternate, or the last is not a user's.
    """

    def __init__(self, model: "Cobra", messages: Sequence[Message]) -> None:
        self.segments: list[Segment] = []
        self._content = Content()
        self._segment = Segment()
        self.num_images = 0
        tokenizer, template = model.tokenizer, model.processor.template
        if not messages or messages[-1].role != "user":
            raise UserError("the last message must be a user's")
        for index, message in enumerate(messages):
            expected = ("user", "assistant")[index % 2]
            if message.role != expected:
                raise UserError(f"message {index + 1} is of role {message.role}, expected {expected}: they take turns")
            if message.role == "assistant":
                text = "".join(part for part in message.parts if isinstance(part, str))
                self._add([*tokenizer.encode(text or template.empty_answer), template.end_id(tokenizer)])
                self._end()
                continue
            self._add(open_turn(template, tokenizer, [], first=index == 0))
            self._add_parts(model, arrange(message.parts))
            self._add(list(template.encode(template.user_close, tokenizer)))
            self._end()
        self.num_tokens = sum(segment.num_tokens for segment in self.segments)

    @property
    def content(self) -> Content:
        """What has been read behind all of it."""
        return self._content.copy()

    def _add_parts(self, model: "Cobra", parts: Sequence[Part]) -> None:
        last = max((place for place, part in enumerate(parts) if isinstance(part, Picture)), default=-1)
        if last >= 0 and parts[last + 1 : last + 2] == ["\n"]:
            last += 1
        template, encode = model.processor.template, model.tokenizer.encode
        for place, part in enumerate(parts):
            if isinstance(part, Picture):
                self.num_images += 1
                opening, closing = map(encode, template.image)
                self._add(opening)
                self._add(part)
                self._add(closing)
            else:
                for text in split_marks(part):  # a new line behind an image is encoded by itself
                    self._add(encode(text))
            is_full = self._num_pictures() >= IMAGES_PER_SEGMENT and not isinstance(part, Picture)
            if place == last or is_full:
                self._end()

    def _num_pictures(self) -> int:
        return sum(isinstance(piece, Picture) for piece in self._segment.pieces)

    def _add(self, piece: list[int] | Picture) -> None:
        if not piece:
            return
        if isinstance(piece, Picture):
            self._content.link(b"file", piece.digest)
            self._segment.num_tokens += piece.num_tokens
        else:
            self._content.read(piece)
            self._segment.num_tokens += len(piece)
        self._segment.pieces.append(piece)

    def _end(self) -> None:
        if self._segment.num_tokens:
            self._segment.digest = self._content.digest
            self.segments.append(self._segment)
        self._segment = Segment()


def arrange(parts: Sequence[Part]) -> list[Part]:
    """Where images stand in a turn: all in front of the words, or all behind them, they are read first, a line each, as
    models learn it; between words they stay where they are."""
    parts = [part for part in parts if part]
    kinds = [isinstance(part, Picture) for part in parts]
    if kinds not in (sorted(kinds), sorted(kinds, reverse=True)):
        return parts
    images = [part for part in parts if isinstance(part, Picture)]
    words = "".join(part for part in parts if isinstance(part, str))
    return [piece for image in images for piece in (image, "\n")] + [words] * bool(words)
