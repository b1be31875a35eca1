"""One row of a data set: what it says, and its images, checked in form but not read.

LLaVA's form is `{"id", "image"?: path | [paths], "conversations": [{"from": "human" | "gpt", "value": text}]}`,
where each image has one `<image>` mark in a human turn. OpenAI's form is `{"messages": [{"role", "content"}]}`
with text or a list of parts as content. `"video"` names a folder of frames, or lists them, and has one `<video>`
mark. Rows for the vision tower carry `"regions": [{"box": [x0, y0, x1, y1], "labels": {kind: value}}]`, boxes in
0..1 of the image. Preference data has `"chosen"` and `"rejected"`, two answers to a conversation that ends with a human
turn; in TRL's form the conversation is called `"prompt"`.
"""

import base64
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from cobra.prompt import Turn, count_marks, mark_images
from cobra.tokenizer import IMAGE
from train.data.images import EmbeddedImage, ImageFile, ImageFinder, short
from vision_scan.errors import UserError

ROLES: dict[str, Literal["user", "assistant"]] = {"human": "user", "gpt": "assistant"}
VIDEO = "<video>"


class BadRowError(UserError):
    """A row that cannot be used; its text says which and why."""


@dataclass(frozen=True)
class Region:
    """A box of an image, (x0, y0, x1, y1) in 0..1, and what stands in it, as kind -> value."""

    box: tuple[float, float, float, float]
    labels: dict[str, str]


@dataclass(frozen=True)
class Row:
    """A checked row; the images in the order of their marks, or the frames of one video."""

    id: str
    images: tuple[ImageFile, ...]
    turns: tuple[Turn, ...]
    regions: tuple[Region, ...] | None
    is_video: bool = False
    answers: tuple[str, ...] = ()
    """Of preference data, the chosen and the rejected answer to the last turn."""

    @property
    def texts(self) -> list[str]:
        return [*(turn.text for turn in self.turns), *self.answers]

    @property
    def num_characters(self) -> int:
        return sum(map(len, self.texts))

    def read_sizes(self) -> Iterator[tuple[int, int]]:
        """Height and width of each image, read as they are asked for."""
        return (image.read_size() for image in self.images)


def parse_row(raw: Any, name: str, finder: ImageFinder, needs: str = "conversations") -> Row:
    """Checks one row's form: types, roles, marks against images, regions. Reads no image.

    Args:
        raw: the row as JSON gave it.
        name: what to call it.
        finder: finds its images.
        needs: what the row cannot do without, "conversations", "regions" or "chosen".
    Raises:
        UserError: with the reason.
    """
    if not isinstance(raw, dict):
        raise UserError(f"expected a mapping with 'conversations', got {short(raw)}")
    if needs not in raw and not (needs == "conversations" and "messages" in raw):
        raise UserError(f"has no {needs!r}; keys: {', '.join(map(str, raw)) or 'none'}")
    answers = _parse_answers(raw) if needs == "chosen" else ()
    if answers and not {"conversations", "messages"} & raw.keys():
        raw = {**raw, "messages": _prompt_messages(raw)}
    if "messages" in raw and "conversations" not in raw:
        turns, images = _parse_messages(raw, finder, bool(answers))
    else:
        turns, images = _parse_llava(raw, finder, bool(answers))
    marks = sum(count_marks(turn.text) for turn in turns if turn.role == "user")
    if turns and marks != len(images):
        raise UserError(
            f"{marks} {IMAGE} marks in the human turns for {len(images)} images; write one for each"
        )
    regions = _parse_regions(raw["regions"]) if "regions" in raw else None
    if needs == "regions" and len(images) != 1:
        raise UserError(f"'regions' need one image, got {len(images)}")
    is_video = "conversations" in raw and raw.get("video") is not None
    return Row(name, tuple(images), turns, regions, is_video, answers)


def _parse_llava(raw: dict, finder: ImageFinder, is_open: bool) -> tuple[tuple[Turn, ...], list[ImageFile]]:
    images = [finder.image(name) for name in _image_names(raw)]
    turns = _parse_turns(raw["conversations"], is_open) if "conversations" in raw else ()
    if raw.get("video") is None:
        return turns, images
    if images:
        raise UserError("has both 'image' and 'video'; give one of them")
    frames = finder.video(raw["video"])
    marks = sum(turn.text.count(VIDEO) for turn in turns if turn.role == "user")
    if marks != 1:
        raise UserError(f"{marks} {VIDEO} marks in the human turns for 1 video; write one")
    expanded = IMAGE * len(frames)
    return tuple(Turn(t.role, t.text.replace(VIDEO, expanded)) if t.role == "user" else t for t in turns), frames


def _image_names(raw: dict) -> list[str]:
    """What a row has under `image` or `images`."""
    for key in ("image", "images"):
        images = raw.get(key) or []
        images = [images] if isinstance(images, str) else images
        if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
            raise UserError(f"{key!r} must be a path or a list of paths, got {short(raw[key])}")
        if images:
            return images
    return []


def _parse_turns(raw: Any, is_open: bool) -> tuple[Turn, ...]:
    if not isinstance(raw, list) or not raw:
        raise UserError(f"'conversations' must be a list of turns, got {short(raw)}")
    for turn in raw:
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise UserError(f"a turn must be {{'from': ..., 'value': text}}, got {short(turn)}")
        if turn.get("from") not in ROLES:
            raise UserError(f"turn from {turn.get('from')!r}, allowed: {', '.join(ROLES)}")
    turns = tuple(Turn(ROLES[turn["from"]], turn["value"]) for turn in raw)
    if turns[0].role == "assistant":  # some of LLaVA's text-only rows; it drops the turn too
        turns = turns[1:]
    return _check_turns(turns, "human and gpt", is_open)


def _check_turns(turns: tuple[Turn, ...], roles: str, is_open: bool) -> tuple[Turn, ...]:
    """Turns by turns, with an answer among them, or, if they are left open, behind them."""
    if any(turn.role != ("user", "assistant")[index % 2] for index, turn in enumerate(turns)):
        raise UserError(f"the turns do not alternate between {roles}")
    if is_open:
        if not turns or turns[-1].role != "user":
            asking, _, answering = roles.split()
            what = f"ends with a {answering} turn" if turns else f"has no {asking} turn"
            raise UserError(f"{what}; 'chosen' and 'rejected' answer a {asking} turn, which must be the last")
    elif not any(turn.role == "assistant" and turn.text.strip() for turn in turns):
        raise UserError(f"has no answer to learn from: no {roles.split()[-1]} turn with text")
    return turns


def _parse_messages(raw: dict, finder: ImageFinder, is_open: bool) -> tuple[tuple[Turn, ...], list[ImageFile]]:
    """OpenAI's form. A system message goes in front of the first user turn, since no template has a place for it;
    a part of type `image` without a path takes the next of the row's `images`."""
    if not isinstance(raw["messages"], list) or not raw["messages"]:
        raise UserError(f"'messages' must be a list of messages, got {short(raw['messages'])}")
    loose = iter(_image_names(raw))
    turns: list[Turn] = []
    images: list[ImageFile] = []
    system = ""
    for message in raw["messages"]:
        role = message.get("role") if isinstance(message, dict) else None
        if role not in ("system", "user", "assistant"):
            raise UserError(f"message of role {role!r}, allowed: system, user, assistant")
        pieces = [_read_part(part, finder, loose) for part in _parts(message.get("content"))]
        text = "".join(piece if isinstance(piece, str) else IMAGE for piece in pieces)
        images += [piece for piece in pieces if not isinstance(piece, str)]
        if role == "system":
            if turns:
                raise UserError("a system message stands behind another; it must be the first")
            system = f"{text}\n\n"
        else:
            turns.append(Turn(role, system + text))
            system = ""
    images += [finder.image(name) for name in loose]  # those of marks within the texts
    return _check_turns(tuple(turns), "user and assistant", is_open), images


def _parse_answers(raw: dict) -> tuple[str, str]:
    """The chosen and the rejected answer of preference data."""
    if "rejected" not in raw:
        raise UserError(f"has 'chosen' and no 'rejected'; keys: {', '.join(map(str, raw))}")
    chosen, rejected = (_parse_answer(raw[name], name) for name in ("chosen", "rejected"))
    if chosen.strip() == rejected.strip():
        raise UserError(f"'chosen' and 'rejected' are the same answer, {short(chosen)}")
    return chosen, rejected


def _parse_answer(answer: Any, name: str) -> str:
    """A text, a turn, a message, or a list of one of them."""
    (text,) = answer if isinstance(answer, list) and len(answer) == 1 else (answer,)
    if isinstance(text, dict) and "assistant" in (text.get("role"), ROLES.get(str(text.get("from")))):
        text = text.get("content", text.get("value"))
    if isinstance(text, list):
        parts = [part for part in text if isinstance(part, dict) and part.get("type") == "text"]
        texts = [part["text"] for part in parts if isinstance(part.get("text"), str)]
        text = "".join(texts) if len(texts) == len(text) else None
    if not isinstance(text, str):
        allowed = "text, {'from': 'gpt', 'value': text} or {'role': 'assistant', 'content': text}"
        raise UserError(f"{name!r} must be {allowed}, got {short(answer)}")
    if not text.strip():
        raise UserError(f"{name!r} has no text")
    for mark in (IMAGE, VIDEO):
        if mark in text:
            raise UserError(f"{name!r} has an {mark} mark; images stand in human turns, which both answers share")
    return text


def _prompt_messages(raw: dict) -> Any:
    """TRL's `prompt` as messages; in front of a text without marks stand those of its images."""
    if "prompt" not in raw:
        keys = ", ".join(map(str, raw))
        raise UserError(f"has 'chosen' and no 'conversations', 'messages' or 'prompt' in front of it; keys: {keys}")
    if not isinstance(raw["prompt"], str):
        return raw["prompt"]
    return [{"role": "user", "content": mark_images(raw["prompt"], len(_image_names(raw)))}]


def _parts(content: Any) -> Iterator[dict]:
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        raise UserError(f"'content' must be text or a list of parts, got {short(content)}")
    return iter(content)


def _read_part(part: dict, finder: ImageFinder, loose: Iterator[str]) -> str | ImageFile:
    kind = part.get("type")
    if kind == "text" and isinstance(part.get("text"), str):
        return part["text"]
    if kind == "image":
        name = part.get("image") or part.get("path") or next(loose, None)
        if name is None:
            raise UserError("more parts of type 'image' than the row has 'images'")
        return _locate(name, finder)
    if kind == "image_url":
        url = part.get("image_url")
        return _locate(url.get("url") if isinstance(url, dict) else url, finder)
    raise UserError(f"a part of type {kind!r}, allowed: text, image, image_url; got {short(part)}")


def _locate(url: Any, finder: ImageFinder) -> ImageFile:
    """A path, a file URL, or a data URL; nothing is fetched from the network."""
    if not isinstance(url, str) or not url:
        raise UserError(f"an image must be a path or a data URL, got {short(url)}")
    if url.startswith("data:"):
        try:
            return EmbeddedImage(short(url), base64.b64decode(url.partition(",")[2], validate=True))
        except ValueError as error:
            raise UserError(f"{short(url)} is not base64: {error}") from error
    if url.startswith(("http://", "https://")):
        raise UserError(f"{short(url)} is not on this machine; download it and give its path")
    return finder.image(url.removeprefix("file://"))


def _parse_regions(raw: Any) -> tuple[Region, ...]:
    if not isinstance(raw, list):
        raise UserError(f"'regions' must be a list, got {short(raw)}")
    regions = []
    for region in raw:
        box = region.get("box") if isinstance(region, dict) else None
        labels = region.get("labels") if isinstance(region, dict) else None
        if not (
            isinstance(box, list)
            and len(box) == 4
            and all(isinstance(x, (int, float)) for x in box)
        ):
            raise UserError(f"a region's 'box' must be [x0, y0, x1, y1], got {short(box)}")
        if not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
            raise UserError(f"box {box} is not x0 < x1, y0 < y1 within 0 to 1")
        if not isinstance(labels, dict):
            raise UserError(f"a region's 'labels' must be {{kind: value}}, got {short(labels)}")
        regions.append(
            Region(tuple(box), {str(kind): str(value) for kind, value in labels.items()})
        )
    return tuple(regions)
