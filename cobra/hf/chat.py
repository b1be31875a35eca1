"""Conversations as transformers writes them down: a chat template for each prompt template, and messages to turns."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cobra.processor import Source
from cobra.prompt import Template, Turn, count_marks
from cobra.serve.prompt import Picture, arrange
from cobra.tokenizer import IMAGE
from cobra.video import Video
from vision_scan.errors import UserError

Message = Mapping[str, Any]
_ROLES = {"human": "user", "gpt": "assistant"}  # of LLaVA's rows

# Where images stand, `arrange` of cobra/serve/prompt.py says; a system's words go in front of the user's first ones.
_JINJA = """\
{%- set ns = namespace(system='', opening=OPENING, role='assistant') -%}
{%- for message in messages -%}
{%- set turn = namespace(words='', marked='', images=0, changes=0, last='') -%}
{%- if message['content'] is string -%}
{%- set turn.words = message['content'] -%}
{%- else -%}
{%- for part in message['content'] -%}
{%- set kind = 'words' if part['type'] == 'text' else 'images' -%}
{%- if kind == 'images' or part['text'] -%}
{%- if turn.last and turn.last != kind -%}{%- set turn.changes = turn.changes + 1 -%}{%- endif -%}
{%- set turn.last = kind -%}
{%- if kind == 'images' -%}
{%- set turn.images = turn.images + 1 -%}
{%- set turn.marked = turn.marked + IMAGE -%}
{%- else -%}
{%- set turn.words = turn.words + part['text'] -%}
{%- set turn.marked = turn.marked + part['text'] -%}
{%- endif -%}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{%- set text = turn.marked if turn.changes > 1 else LINE * turn.images + turn.words -%}
{%- if message['role'] == 'system' or message['role'] == 'developer' -%}
{%- set ns.system = ns.system + text + '\\n\\n' -%}
{%- elif message['role'] == ns.role -%}
{{- raise_exception('user and assistant take turns, the user first') -}}
{%- elif message['role'] == 'user' -%}
{{- ns.opening + ns.system + text + CLOSING -}}
{%- set ns.system = '' -%}
{%- set ns.opening = NEXT -%}
{%- set ns.role = 'user' -%}
{%- elif message['role'] == 'assistant' -%}
{%- generation -%}{{- (text or EMPTY) + END -}}{%- endgeneration -%}
{%- set ns.role = 'assistant' -%}
{%- else -%}
{{- raise_exception('allowed roles are system, user, assistant') -}}
{%- endif -%}
{%- endfor -%}
"""


def write_template(template: Template) -> str:
    """The Jinja text that writes a conversation as `cobra.prompt.render` does.

    A user's turn always ends with the opening of the answer, whatever `add_generation_prompt` says: the two are one
    string of a template.
    """
    strings = {
        "OPENING": template.begin + template.system + template.user_open,
        "NEXT": template.between + template.user_open,
        "CLOSING": template.user_close,
        "EMPTY": template.empty_answer,
        "END": template.end,
        "IMAGE": template.dress(IMAGE),
        "LINE": template.dress(f"{IMAGE}\n"),
    }
    return re.sub(rf"\b({'|'.join(strings)})\b", lambda found: json.dumps(strings[found[0]]), _JINJA)


def to_turns(messages: Sequence[Message]) -> tuple[list[Turn], list[Source]]:
    """Messages as a conversation, with the images and videos in order.

    Raises:
        UserError: on a role or a kind of content that there is not.
    """
    turns: list[Turn] = []
    sources: list[Source] = []
    system = ""
    for number, message in enumerate(messages):
        role, content = message["role"], message["content"]
        parts = [content] if isinstance(content, str) else list(_read_parts(content, sources, number))
        text = "".join(IMAGE if isinstance(part, Picture) else part for part in arrange(parts))
        if role in ("system", "developer"):
            system += f"{text}\n\n"
        elif role in ("user", "assistant"):
            turns.append(Turn(role, system + text if role == "user" else text))
            system = "" if role == "user" else system
        else:
            raise UserError(f"message {number} is of role {role!r}: allowed are system, user, assistant")
    return turns, sources


def to_trl(row: Mapping[str, Any], image_root: str | Path = ".") -> dict[str, Any]:
    """A row in LLaVA's form as trl's trainers take it.

    Args:
        row: `conversations`, and `image` or `images`, a path or several, with an `<image>` each in human turns; of
            preferences also `chosen` and `rejected`, answers to the last turn, each a text or a turn of gpt.
        image_root: the folder that paths start from.
    Returns:
        images, paths; messages, or prompt, chosen and rejected.
    Raises:
        UserError: if it has another form.
    """
    names = row.get("image") or row.get("images") or []
    images = [str(Path(image_root, name)) for name in ([names] if isinstance(names, str) else names)]
    messages = [_to_message(turn) for turn in row.get("conversations", ())]
    num_marks = sum(part["type"] == "image" for message in messages for part in message["content"])
    if num_marks != len(images):
        raise UserError(f"{num_marks} {IMAGE} marks in the human turns for {len(images)} images; write one for each")
    if "chosen" not in row and "rejected" not in row:
        return {"images": images, "messages": messages}
    if not messages or messages[-1]["role"] != "user":
        raise UserError("chosen and rejected answer the last of conversations, which must be a human turn")
    answers = {}
    for name in ("chosen", "rejected"):
        answer = row.get(name)
        answers[name] = [_to_message({"from": "gpt", "value": answer} if isinstance(answer, str) else answer)]
        if answers[name][0]["role"] != "assistant":
            raise UserError(f"{name} is no answer of gpt: {answer!r:.60}")
    return {"images": images, "prompt": messages, **answers}


def _to_message(turn: Any) -> dict[str, Any]:
    if not isinstance(turn, Mapping) or turn.get("from") not in _ROLES or not isinstance(turn.get("value"), str):
        raise UserError(f"a turn must be {{'from': 'human' or 'gpt', 'value': text}}, got {turn!r:.60}")
    role, text = _ROLES[turn["from"]], turn["value"]
    marks = count_marks(text) if role == "user" else 0
    if not marks:
        return {"role": role, "content": [{"type": "text", "text": text}]}
    lines = f"{IMAGE}\n" * marks  # as `arrange` writes images that are in front of the words
    pieces = [IMAGE] * marks + [text.removeprefix(lines)] if text.startswith(lines) else re.split(f"({IMAGE})", text)
    parts = [{"type": "image"} if piece == IMAGE else {"type": "text", "text": piece} for piece in pieces if piece]
    return {"role": role, "content": parts}


def _read_parts(content: Sequence[Message], sources: list[Source], number: int) -> Iterator[str | Picture]:
    for part in content:
        kind = part.get("type")
        if kind == "text":
            yield part["text"]
            continue
        if kind not in ("image", "image_url", "video"):
            raise UserError(f"message {number} has content of type {kind!r}: allowed are text, image, video")
        # Without one it only marks the place of an image that is given beside the conversation.
        keys = (kind, "image", "url", "path", "base64")
        given = next((part[key] for key in keys if part.get(key) is not None), None)  # tables fill up with None
        if given is not None:
            sources.append(Video(given) if kind == "video" else _open(given))
        yield Picture(b"", b"", 0)


def _open(given: Any) -> Source:
    """An image as `cobra` takes them; addresses and base64 are read as transformers reads them."""
    from transformers.image_utils import load_image

    if isinstance(given, Mapping):  # OpenAI's {"url": ...}
        given = given["url"]
    if isinstance(given, str) and not Path(given[:255]).is_file():
        try:
            return load_image(given)
        except ValueError as error:
            raise UserError(f"{given[:60]}: neither an image file, an address nor base64") from error
    return given
