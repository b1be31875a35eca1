"""Answers: prompts are read once (reading.py), then tokens are decoded one by one from the state.

These are the bodies of the methods of `Cobra` with the same names.
"""

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from cobra.processor import Images, Tiles, list_images, pad
from cobra.prompt import body, count_marks, mark_images
from cobra.reading import CHUNK_SIZE, content_of, extend_turn, feed, last, note, opening, own, pieces_of, read
from cobra.sampling import Sampler
from cobra.streaming import AnswerStream, Streamer
from vision_scan.errors import UserError

if TYPE_CHECKING:
    from cobra.lm.state import State
    from cobra.model import Cobra

    Decoding = Generator[Tensor, None, tuple[Tensor, State]]


@torch.no_grad()
def generate(
    model: "Cobra",
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    pixel_values: Tensor | None = None,
    image_sizes: Tensor | None = None,
    tiles_per_image: Tensor | None = None,
    num_frames: Tensor | None = None,
    *,
    max_new_tokens: int,
    do_sample: bool = False,
    temperature: float | None = 1.0,
    top_k: int | None = 0,
    top_p: float | None = 1.0,
    seed: int | Sequence[int] | None = None,
    stop_ids: Sequence[int] | None = None,
    streamer: Streamer | None = None,
    state: "State | None" = None,
    return_state: bool = False,
) -> "Tensor | tuple[Tensor, State]":
    """Continues a batch of prompts, as a `Processor` makes them; every row as if it were alone.

    Args:
        input_ids: (batch, seqlen), int64.
        attention_mask: (batch, seqlen), 0 at pads, on either side; None: there are none.
        pixel_values: (num_tiles, 3, height, width) in [0, 1], in the order of the image tokens.
        image_sizes: (num_images, 2), height and width; needed where the tokens of an image depend on them.
        tiles_per_image: (num_images,); must add up to `num_tiles` if given.
        num_frames: (marks,), how many images each mark stands for; None: one. Needed where videos have fewer tokens
            than their frames.
        max_new_tokens: where a row ends at the latest.
        do_sample, temperature, top_k, top_p, seed: see `cobra.sampling.Sampler`; greedy by default.
        stop_ids: a row ends after any of these; by default the end token of the model's template.
        streamer: gets every new token.
        state: what was read before, left as it is; with one row it serves every row of the batch.
        return_state: also return the state after every returned token.
    Returns:
        ids: (batch, num_new), int64, rows filled up with `<pad>` after their stop token.
        state: if asked for.
    """
    batch = len(input_ids)
    _check_length(max_new_tokens)
    sampler = Sampler(batch, do_sample, temperature, top_k, top_p, seed)
    if tiles_per_image is not None:
        _check_tiles(pixel_values, int(tiles_per_image.sum()))
    ids, mask = _align_left(input_ids.to(model.device), attention_mask, model.tokenizer.pad_id)
    state = own(model, state, batch)
    pixels = None if pixel_values is None else pixel_values.to(model.device)
    embeds = model.embed(ids, pixels, image_sizes, num_frames)
    logits, state = last(feed(model, embeds, mask, state, CHUNK_SIZE))
    stop = [model.processor.template.end_id(model.tokenizer)] if stop_ids is None else stop_ids
    tokens = _decode(model, logits, state, sampler, max_new_tokens, stop, return_state)
    ids, state = _collect(tokens, streamer)
    note(model, state, content=None)
    state.info["turn"] = "closed"
    return (ids, state) if return_state else ids


@torch.no_grad()
def prefill(
    model: "Cobra",
    text: str = "",
    images: Images = None,
    *,
    state: "State | None" = None,
    chunk_size: int = CHUNK_SIZE,
) -> "State":
    """Reads text and images into a user turn and leaves the turn open, for any number of `answer`s.

    Args:
        text: may hold `<image>` marks; without any, the images come first, a line each.
        images: one or several; an iterator is consumed as it is read, so that memory stays bounded.
        state: a conversation to continue, left as it is; an open turn is prolonged.
        chunk_size: tokens read at a time.
    """
    return extend_turn(model, own(model, state, 1), text, images, chunk_size)


@torch.no_grad()
def answer(
    model: "Cobra",
    question: str,
    images: Images = None,
    *,
    state: "State | None" = None,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float | None = 1.0,
    top_k: int | None = 0,
    top_p: float | None = 1.0,
    seed: int | None = None,
    streamer: Streamer | None = None,
    return_state: bool = False,
) -> "str | tuple[str, State]":
    """Answers a question about images, about what a state has read, or both.

    Args:
        question: may hold `<image>` marks, as many as images; without any, the images come first.
        images: one or several, or videos, of which only a chunk is in memory at a time.
        state: from `prefill` (the open turn is completed) or from an earlier `answer` (a new turn is
            opened); left as it is.
        return_state: also return the state after the answer, for the next question.
    """
    sampler = Sampler(1, do_sample, temperature, top_k, top_p, seed)
    tokens = _answer(model, question, images, state, sampler, max_new_tokens, return_state)
    new, state = _collect(tokens, streamer)
    text = model.tokenizer.decode(new[0].tolist())
    return (text, state) if return_state else text


def stream(
    model: "Cobra",
    question: str,
    images: Images = None,
    *,
    state: "State | None" = None,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float | None = 1.0,
    top_k: int | None = 0,
    top_p: float | None = 1.0,
    seed: int | None = None,
) -> AnswerStream:
    """Answers as `answer` does, piece by piece: an iterator over text, each piece made when it is asked for.

    Its pieces join to the answer; behind the last, its `state` is the one for the next question.
    """
    sampler = Sampler(1, do_sample, temperature, top_k, top_p, seed)
    return AnswerStream(model.tokenizer, _answer(model, question, images, state, sampler, max_new_tokens, True))


def answer_batch(
    model: "Cobra",
    requests: Sequence[tuple[str, Images]],
    *,
    state: "State | None" = None,
    max_new_tokens: int = 128,
    do_sample: bool = False,
    temperature: float | None = 1.0,
    top_k: int | None = 0,
    top_p: float | None = 1.0,
    seed: int | Sequence[int] | None = None,
) -> list[str]:
    """Answers several questions at once; in float32 the same as `answer` for each alone.

    Args:
        requests: pairs of a question and its images (or None).
        state: what all of them are asked about, read once and left as it is.
    Raises:
        UserError: naming the request, where there are several, if its marks and images differ in number.
    """
    if not requests:
        return []
    if len(requests) == 1:  # in chunks: its images need not be in memory all at once
        ((question, images),) = requests
        sampler = Sampler(1, do_sample, temperature, top_k, top_p, seed)
        new, _ = _collect(_answer(model, question, images, state, sampler, max_new_tokens, False), None)
        return [model.tokenizer.decode(new[0].tolist())]
    tokenizer, template = model.tokenizer, model.processor.template
    begin = opening(model, state)
    closing = template.encode(template.user_close, tokenizer)
    rows: list[list[int]] = []
    tiles: list[Tiles] = []
    for index, (question, images) in enumerate(requests):
        sources = list_images(images)
        try:
            marked = mark_images(question, len(sources))
        except UserError as error:
            raise UserError(f"request {index}: {error}") from error
        marked, sources = model.processor.unfold(marked, sources)
        new = [model.processor.tiles(image) for image in sources]
        lengths = (tile.num_tokens for tile in new)
        rows.append([*begin, *body(template.dress(marked), tokenizer, lengths, template), *closing])
        tiles += new
    input_ids, attention_mask = pad(rows, tokenizer.pad_id, "left")
    ids = generate(
        model,
        input_ids,
        attention_mask,
        **model.processor.stack(tiles),
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        state=state,
    )
    assert isinstance(ids, Tensor)
    return [tokenizer.decode(row) for row in ids.tolist()]


def _check_length(max_new_tokens: int) -> None:
    if max_new_tokens < 0:
        raise UserError(f"max_new_tokens={max_new_tokens}: must be 0 or more")


def _check_tiles(pixel_values: Tensor | None, expected: int) -> None:
    num_tiles = 0 if pixel_values is None else len(pixel_values)
    if num_tiles != expected:
        raise UserError(f"{num_tiles} tiles in pixel_values, but tiles_per_image says {expected}")


def _align_left(ids: Tensor, mask: Tensor | None, pad_id: int) -> tuple[Tensor, Tensor | None]:
    """Moves pads to the left and drops columns of nothing but pads, so that every row ends with its
    last token; the mask is None if no pad is left."""
    if mask is None:
        mask = torch.ones_like(ids)
    if mask.shape != ids.shape:
        raise UserError(
            f"attention_mask has shape {tuple(mask.shape)}, input_ids {tuple(ids.shape)}: "
            "it must have that of the new tokens"
        )
    mask = mask.to(ids.device).bool()
    lengths = mask.sum(1)
    if not ids.numel() or not lengths.min():
        raise UserError("a prompt is empty: each row needs at least one token")
    order = mask.byte().argsort(dim=1, stable=True)
    longest = int(lengths.max())
    ids = ids.masked_fill(~mask, pad_id).gather(1, order)[:, -longest:]
    mask = mask.gather(1, order)[:, -longest:]
    return ids, None if mask.all() else mask.long()


@torch.no_grad()
def _answer(
    model: "Cobra",
    question: str,
    images: Images,
    state: "State | None",
    sampler: Sampler,
    max_new_tokens: int,
    needs_state: bool,
) -> "Decoding":
    """The tokens of an answer; in the end all of them, and the state for the next question, if it is needed."""
    _check_length(max_new_tokens)
    tokenizer, template = model.tokenizer, model.processor.template
    # Images ahead of the question are read exactly as prefill() reads them, which makes an answer
    # from a state the same as a fresh one to the last bit.
    inline = images if count_marks(question) else None
    opened = extend_turn(model, own(model, state, 1), "", None if count_marks(question) else images)
    pieces = [*pieces_of(model, question, inline), list(template.encode(template.user_close, tokenizer))]
    logits, asked = read(model, opened, pieces)
    end, content = template.end_id(tokenizer), content_of(asked)
    new, answered = yield from _decode(model, logits, asked, sampler, max_new_tokens, [end], needs_state)
    if not needs_state:
        return new, answered
    ids = new[0].tolist()
    if content is not None:
        content.read(ids)
    note(model, answered, content)
    if end not in ids:  # cut off: close the turn, so that the next one can open
        _, answered = read(model, answered, [[end]])
    answered.info["turn"] = "closed"
    return new, answered


@torch.no_grad()
def _decode(
    model: "Cobra",
    logits: Tensor,
    state: "State",
    sampler: Sampler,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    needs_state: bool,
) -> "Decoding":
    """Makes tokens, (batch,) each, from the logits (batch, 1, vocab) after a prompt and an own state of it; rows that
    have ended get pads. In the end all of them, (batch, num_new), and the state, which has read the last token only if
    it is needed."""
    pad_id = model.tokenizer.pad_id
    stop = torch.tensor(list(stop_ids), dtype=torch.int64, device=logits.device)
    running = torch.ones(len(logits), dtype=torch.bool, device=logits.device)
    new: list[Tensor] = []
    while len(new) < max_new_tokens:
        token = sampler(logits[:, -1]).where(running, pad_id)
        new.append(token)
        yield token
        fed = running
        running = running & ~torch.isin(token, stop)
        is_last = len(new) == max_new_tokens or not running.any()
        if is_last and not needs_state:
            break
        logits, state = model.lm(
            input_ids=token.unsqueeze(1),
            state=state,
            attention_mask=None if fed.all() else fed.long().unsqueeze(1),
            logits_to_keep=1,
            overwrite_state=True,
        )
        if is_last:
            break
    return torch.stack(new, 1) if new else stop.new_empty(len(logits), 0), state


def _collect(tokens: "Decoding", streamer: Streamer | None) -> "tuple[Tensor, State]":
    """What stands in the end, with tokens handed to the streamer as they come."""
    while True:
        try:
            token = next(tokens)
        except StopIteration as end:
            if streamer is not None:
                streamer.end()
            return end.value
        if streamer is not None:
            streamer.put(token.cpu())
