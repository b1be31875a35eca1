"""Conversations as transformers writes them down: a chat template for each prompt template, and messages to turns."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cobra.processor import Source
from cobra.prompt import Template, Turn
from cobra.serve.prompt import Picture, arrange
from cobra.tokenizer import IMAGE
from cobra.video import Video
from vision_scan.errors import UserError

Message = Mapping[str, Any]

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
{{- (text or EMPTY) + END -}}
{%- set ns.role = 'assistant' -%}
{%- else -%}
{{- raise_exception('allowed roles are system, user, assistant') -}}
{%- endif -%}
{%- endfor -%}
"""


def chat_template(template: Template) -> str:
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


def _read_parts(content: Sequence[Message], sources: list[Source], number: int) -> Iterator[str | Picture]:
    for part in content:
        kind = part.get("type")
        if kind == "text":
            yield part["text"]
            continue
        if kind not in ("image", "image_url", "video"):
            raise UserError(f"message {number} has content of type {kind!r}: allowed are text, image, video")
        # Without one it only marks the place of an image that is given beside the conversation.
        given = next((part[key] for key in (kind, "image", "url", "path", "base64") if key in part), None)
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
