"""Reading: text and images go into a state in chunks, so that memory does not grow with their number.

A conversation is a `State`: its `info` says how many images were read (`num_images`), whether a user turn stands open
(`turn`: open or closed), which model read it (`model`) and what (`content`); see cobra/content.py.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cobra.content import Content, fingerprint
from cobra.processor import Images, Source, Tiles, iter_images, list_images
from cobra.prompt import count_marks, open_turn, split_marks
from cobra.tokenizer import IMAGE
from vision_scan.errors import UserError

if TYPE_CHECKING:
    from cobra.lm.state import State
    from cobra.model import Cobra

CHUNK_SIZE = 2048  # tokens read at a time: bounds the memory of a prefill, whatever its length

Piece = list[int] | Tiles
"""Ids of a text that is encoded by itself, or an image or video."""


def own(model: "Cobra", state: "State | None", batch: int) -> "State | None":
    """A state for `batch` rows that may be overwritten.

    Raises:
        UserError: if another model made it, or it has other rows.
    """
    if state is None:
        return None
    made_by, this = state.info.get("model"), fingerprint(model)
    if made_by not in (None, this):
        raise UserError(
            f"the state is of another model ({made_by}, this one is {this}), or of this one with weights that were "
            "trained, merged or quantised since: take the model that made it, or read again"
        )
    if state.batch == batch:
        state = state.clone()
    elif state.batch == 1:
        state = state.select(torch.zeros(batch, dtype=torch.int64))
    else:
        raise UserError(f"a state of {state.batch} rows for {batch} prompts: give one with 1 or {batch}")
    return state.dequantize().to(model.device)


def opening(model: "Cobra", state: "State | None") -> list[int]:
    """The ids that the next words of the user need before them."""
    turn = None if state is None else state.info.get("turn")
    if turn == "open":
        return []
    return open_turn(model.processor.template, model.tokenizer, [], first=turn is None)


def pieces_of(model: "Cobra", text: str, images: Images) -> Iterator[Piece]:
    """A text with images as ids and tiles, in reading order, one image at a time."""
    encode, tiles, unfold = model.tokenizer.encode, model.processor.tiles, model.processor.unfold
    marks, template = count_marks(text), model.processor.template

    def write(text: str, sources: Sequence[Source]) -> Iterator[Piece]:
        text, sources = unfold(text, sources)
        remaining = iter(sources)
        for piece in split_marks(template.dress(text), template):
            yield tiles(next(remaining)) if piece == IMAGE else encode(piece)

    if not marks:
        for image in iter_images(images):
            yield from write(f"{IMAGE}\n", [image])
        yield encode(text)
        return
    sources = list_images(images, most=marks + 1)
    if len(sources) != marks:
        given = f"more than {marks}" if len(sources) > marks else len(sources)
        raise UserError(f"{marks} {IMAGE} marks for {given} images: the two must be equal")
    yield from write(text, sources)


def extend_turn(
    model: "Cobra", state: "State | None", text: str, images: Images, chunk_size: int = CHUNK_SIZE
) -> "State":
    """Appends to the open user turn of an own state, after opening one if there is none."""

    def pieces() -> Iterator[Piece]:
        yield begin
        yield from pieces_of(model, text, images)

    begin = opening(model, state)
    _, state = read(model, state, pieces(), chunk_size)
    state.info["turn"] = "open"
    return state


def read(
    model: "Cobra", state: "State | None", pieces: Iterable[Piece], chunk_size: int = CHUNK_SIZE
) -> "tuple[Tensor, State]":
    """Reads ids and images into an own state of one row: (logits after the last token, state)."""
    return last(read_by_chunks(model, state, pieces, chunk_size), state)


@torch.no_grad()
def read_by_chunks(
    model: "Cobra",
    state: "State | None",
    pieces: Iterable[Piece],
    chunk_size: int | Callable[[], int] = CHUNK_SIZE,
) -> "Iterator[tuple[Tensor, State]]":
    """The same, chunk by chunk: logits and state after each. In between other work can be done; no piece is taken, and
    no image decoded, before the chunk that needs it.

    A text of any length is cut, an image is not: all its tokens come at once from the tower.

    Args:
        chunk_size: how many tokens a chunk has at most; a function is asked anew for each.
    """
    size = chunk_size if callable(chunk_size) else lambda: chunk_size
    content = content_of(state)
    num_images = state.info.get("num_images", 0) if state else 0
    ids: list[int] = []
    tiles: list[Tiles] = []

    def flush() -> "Iterator[tuple[Tensor, State]]":
        nonlocal state
        row = torch.tensor([ids], dtype=torch.int64, device=model.device)
        embeds = model.embed(row, **model.processor.stack(tiles))
        ids.clear()
        tiles.clear()
        for logits, after in feed(model, embeds, None, state, size()):
            state = after
            note(model, state, content, num_images)
            yield logits, state

    for piece in _cut(pieces, size):
        if isinstance(piece, Tiles):
            num_images += 1
            tiles.append(piece)
            ids += [model.tokenizer.image_id] * piece.num_tokens
        else:
            ids += piece
        if content is not None:
            content.read(piece)
        if len(ids) >= size():
            yield from flush()
    if ids:
        yield from flush()


def _cut(pieces: Iterable[Piece], most: Callable[[], int]) -> Iterator[Piece]:
    """Texts in parts of about so many ids: their embeddings are not to be in memory all at once."""
    for piece in pieces:
        if isinstance(piece, Tiles):
            yield piece
            continue
        start = 0
        while start < len(piece):
            stop = start + most()
            yield piece[start:stop]
            start = stop


def feed(
    model: "Cobra", embeds: Tensor, mask: Tensor | None, state: "State | None", chunk_size: int = CHUNK_SIZE
) -> "Iterator[tuple[Tensor, State]]":
    """Runs embeddings (batch, seqlen, d_model) through the language model over an own state: after each chunk the
    logits (batch, 1, vocab) of its last token, and the state.

    Chunks are about equally long, at most `chunk_size`: a rest of few tokens would take as long as many.
    """
    count = math.ceil(embeds.shape[1] / chunk_size)
    masks = [None] * count if mask is None else mask.tensor_split(count, dim=1)
    for chunk, chunk_mask in zip(embeds.tensor_split(count, dim=1), masks, strict=True):
        logits, after = model.lm(
            inputs_embeds=chunk, state=state, attention_mask=chunk_mask, logits_to_keep=1, overwrite_state=True
        )
        yield logits, after
        state = after


def last(chunks: "Iterable[tuple[Tensor, State]]", state: "State | None" = None) -> "tuple[Tensor, State]":
    """What stands behind the last chunk; where there is none, no logits and the state before."""
    logits = torch.empty(0)
    for logits, state in chunks:  # noqa: B007 (the last ones)
        pass
    assert state is not None  # what starts with nothing has at least one token
    return logits, state


def content_of(state: "State | None") -> Content | None:
    """What a state of one row has read; None if it is not known, as when its tokens did not come this way."""
    if state is None:
        return Content()
    known = state.info.get("content")
    if known is None or state.batch != 1 or known["num_tokens"] != int(state.lengths[0]):
        return None
    return Content(bytes.fromhex(known["sha256"]))


def note(model: "Cobra", state: "State", content: Content | None, num_images: int | None = None) -> None:
    """Writes into a state who has read what."""
    state.info["model"] = fingerprint(model)
    if num_images is not None:
        state.info["num_images"] = num_images
    if content is None:
        state.info.pop("content", None)
    else:
        state.info["content"] = {"sha256": content.digest.hex(), "num_tokens": int(state.lengths[0])}
