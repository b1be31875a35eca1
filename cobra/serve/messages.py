"""A request's messages to a conversation: texts, and images out of data URLs."""

import base64
import binascii
import io
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from cobra.image import upright_size
from cobra.serve import schemas
from cobra.serve.errors import ApiError
from cobra.serve.limits import Limits
from cobra.serve.prompt import Message, Part, Picture, Prompt
from vision_scan.errors import UserError

if TYPE_CHECKING:
    from cobra.model import Cobra

DATA_URL = re.compile(r"data:(?P<kind>[\w.+-]+/[\w.+-]+)?(?:;[\w.+-]+=[^;,]*)*;base64,", re.ASCII)


def read_messages(model: "Cobra", messages: Sequence[schemas.Message], limits: Limits) -> Prompt:
    """A request's conversation as the engine takes it.

    What a system says is put in front of the user's first words, as models here have no place for it.

    Raises:
        ApiError: if it is not one, or more than may be asked for.
    """
    count = sum(isinstance(part, schemas.ImagePart) for one in messages if isinstance(one.content, list)
                for part in one.content)  # fmt: skip
    if count > limits.images:
        raise ApiError(400, f"{count} images: at most {limits.images} in a request", "messages")
    turns: list[Message] = []
    said: list[Part] = []
    for number, message in enumerate(messages):
        where = f"messages.{number}.content"
        content = message.content
        parts = [content] if isinstance(content, str) else [_read_part(model, part, limits, where) for part in content]
        if message.role in ("system", "developer"):
            if turns or any(isinstance(part, Picture) for part in parts):
                raise ApiError(400, "a system message stands at the beginning, and has words alone", where)
            said += [*parts, "\n\n"]
        elif message.role == "user":
            turns.append(Message("user", (*said, *parts)))
            said = []
        elif any(isinstance(part, Picture) for part in parts):
            raise ApiError(400, "images are of the user; an assistant's message has words alone", where)
        else:
            turns.append(Message("assistant", tuple(parts)))
    try:
        prompt = Prompt(model, turns)
    except UserError as error:
        raise ApiError(400, str(error), "messages") from error
    if prompt.num_tokens > limits.prompt_tokens:
        raise ApiError(
            400,
            f"the conversation has {prompt.num_tokens} tokens: at most {limits.prompt_tokens} are read",
            "messages",
            "context_length_exceeded",
        )
    return prompt


def _read_part(model: "Cobra", part: schemas.TextPart | schemas.ImagePart, limits: Limits, where: str) -> Part:
    if isinstance(part, schemas.TextPart):
        return part.text
    data = read_data_url(part.image_url.url, where)
    try:
        height, width = upright_size(io.BytesIO(data))
        if height * width > limits.pixels:
            raise ApiError(400, f"an image of {width} x {height} pixels: at most {limits.pixels:,}", where)
        return Picture.of(model, data)
    except UserError as error:
        raise ApiError(400, f"not an image that can be read: {error}", where) from error


def read_data_url(url: str, where: str) -> bytes:
    """The bytes in a data URL.

    Raises:
        ApiError: if it is another URL, or not base64.
    """
    found = DATA_URL.match(url)
    if not found:
        scheme = url.partition(":")[0][:20] if ":" in url else "no"
        raise ApiError(400, f"{scheme} URLs are not fetched: send the image itself, data:image/png;base64,...", where)
    try:
        return base64.b64decode(url[found.end() :], validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(400, f"the image's data URL is not base64 ({error})", where) from error
