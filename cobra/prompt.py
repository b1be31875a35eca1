"""Conversations to token ids and labels: the one place that training, evaluation and chat share.

Every piece of text between two special things (template strings, images, the cut of a prefill) is
encoded on its own. So a prompt that is read in two parts has the same ids as one read at once, and
labels come from the pieces themselves, never from a second tokenisation.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from cobra.tokenizer import ASSISTANT, END, IMAGE, USER, Tokenizer
from vision_scan.errors import UserError

IGNORE = -100  # the label of a token without loss, torch's own default


@dataclass(frozen=True)
class Turn:
    """What one side says. `<image>` in a user turn marks the place of an image."""

    role: Literal["user", "assistant"]
    text: str


@dataclass(frozen=True, kw_only=True)
class Template:
    """The strings around the turns of a conversation.

    Attributes:
        user_open: before the text of a user turn.
        user_close: after it; also opens the turn of the assistant.
        end: after the text of an assistant turn; a single token, at which generation stops.
        between: between an assistant turn and the next user turn.
        tokens: which substrings of the above are special tokens; the rest is plain text.
        empty_answer: stands for an assistant turn without text.
        system: before the first user turn.
        begin: a token in front of everything.
        image: what stands before and behind each image, as plain text.
        video: what stands before the first frame of a video, between two and behind the last, as plain text; None: the
            frames stand where one image would.
    """

    user_open: str
    user_close: str
    end: str
    between: str = ""
    tokens: tuple[str, ...]
    empty_answer: str = ""
    system: str = ""
    begin: str = ""
    image: tuple[str, str] = ("", "")
    video: tuple[str, str, str] | None = None

    @functools.lru_cache(maxsize=64)  # noqa: B019 (templates are few, and never go)
    def encode(self, text: str, tokenizer: Tokenizer) -> tuple[int, ...]:
        """Encodes one of the template's own strings."""
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, self.tokens))})", text):
            ids += [tokenizer.id_of(piece)] if piece in self.tokens else tokenizer.encode(piece)
        return tuple(ids)

    def dress(self, text: str) -> str:
        """A text with what stands around an image around each of its marks, where it does not stand yet."""
        opening, closing = self.image
        return re.sub(f"(?:{re.escape(opening)})?{IMAGE}(?:{re.escape(closing)})?", opening + IMAGE + closing, text)

    def video_marks(self, num_frames: int) -> str:
        """A text with a mark for each frame of a video."""
        opening, between, closing = self.video or ("", "", "")
        return opening + between.join([IMAGE] * num_frames) + closing

    def end_id(self, tokenizer: Tokenizer) -> int:
        """The id of the token that ends an answer."""
        return tokenizer.id_of(self.end)


TEMPLATES = {
    "compact": Template(
        user_open=USER,
        user_close=END + ASSISTANT,
        end=END,
        tokens=(USER, END, ASSISTANT),
    ),
    # Source: the prompt builder of Cobra (h-zhao1997/cobra, prompting/zephyr_prompter.py). Its role
    # marks are plain text for the tokenizer; only the end of text is a token.
    "zephyr": Template(
        user_open="<|user|>\n",
        user_close="<|endoftext|>\n<|assistant|>\n",
        end="<|endoftext|>",
        between="\n",
        tokens=("<|endoftext|>",),
        empty_answer=" ",
    ),
    # Source: the same repository's prompt builder for language models that are not tuned to chat.
    "in_out": Template(
        user_open="In: ",
        user_close="\nOut: ",
        end="<|endoftext|>",
        tokens=("<|endoftext|>",),
        empty_answer=" ",
    ),
    # Source: ChatML as Qwen2.5's tokenizers write it, with the system message that they put where there is none.
    "chatml": Template(
        system="<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n",
        user_open="<|im_start|>user\n",
        user_close="<|im_end|>\n<|im_start|>assistant\n",
        end="<|im_end|>",
        between="\n",
        tokens=("<|im_start|>", "<|im_end|>"),
    ),
    # Source: `conv_vicuna_v1` of LLaVA (haotian-liu/LLaVA, conversation.py), whose tokenizer puts <s> in
    # front. The space before an answer is part of what is given, not of what is learned.
    "vicuna_v1": Template(
        begin="<s>",
        system="A chat between a curious user and an artificial intelligence assistant. "
        "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
        user_open="USER: ",
        user_close=" ASSISTANT: ",
        end="</s>",
        tokens=("<s>", "</s>"),
    ),
    # Source: `conv_jambaLabel` of LongLLaVA (FreedomIntelligence/LongLLaVA, llava/conversation.py), and the marks of
    # its cli.py, which loses the > of a video's last </img>: here it is written as it was meant.
    "longllava": Template(
        user_open="<|startoftext|><|User|>\n",
        user_close="\n<|startoftext|><|Assistant|>\n",
        end="<|endoftext|>",
        tokens=("<|startoftext|>", "<|endoftext|>"),
        image=("<img>", "</img>"),
        video=("<vid>", "<t>", "</vid>"),
    ),
}


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model gets it.

    Attributes:
        input_ids: the token ids.
        labels: as long as `input_ids`: the id itself where it is to be learned, else -100.
        num_images: how many images stand in it.
        num_turns: how many turns it has.
    """

    input_ids: list[int]
    labels: list[int]
    num_images: int
    num_turns: int


def render(
    turns: Sequence[Turn],
    tokenizer: Tokenizer,
    template: Template,
    image_tokens: Sequence[int],
    supervised: bool = True,
) -> Rendered:
    """Renders a conversation; the assistant's texts and their end tokens are what is learned.

    Args:
        turns: user and assistant in turn, the user first.
        image_tokens: the number of tokens of each image, in the order of the `<image>` marks.
        supervised: whether a conversation without an answer is an error. A prompt has none: it ends
            with a user turn, and its ids with the opening of the assistant's.
    Raises:
        UserError: if marks and images differ in number, the roles do not alternate, or there is
            nothing to learn.
    """
    marks = sum(count_marks(turn.text) for turn in turns if turn.role == "user")
    if marks != len(image_tokens):
        raise UserError(f"{marks} {IMAGE} marks for {len(image_tokens)} images: the two must be equal")
    lengths = iter(image_tokens)
    ids: list[int] = []
    labels: list[int] = []
    for index, turn in enumerate(turns):
        expected = ("user", "assistant")[index % 2]
        if turn.role != expected:
            raise UserError(f"turn {index + 1} has role {turn.role!r}, expected {expected!r}")
        if turn.role == "user":
            ids += _open(template, tokenizer, first=index == 0)
            ids += body(template.dress(turn.text), tokenizer, lengths, template)
            ids += template.encode(template.user_close, tokenizer)
            labels += [IGNORE] * (len(ids) - len(labels))
        else:
            answer = encode_answer(template, tokenizer, turn.text)
            ids += answer
            labels += answer
    if supervised and not any(label != IGNORE for label in labels):
        raise UserError("the conversation has no answer to learn from (no supervised token)")
    return Rendered(ids, labels, marks, len(turns))


def encode_answer(template: Template, tokenizer: Tokenizer, text: str) -> list[int]:
    """The ids of an assistant's text and its end token."""
    return [*tokenizer.encode(text or template.empty_answer), template.end_id(tokenizer)]


def render_caption(
    turns: Sequence[Turn], tokenizer: Tokenizer, template: Template, image_tokens: Sequence[int]
) -> Rendered:
    """Renders images and the text that goes with them, without question or chat: what a connector is aligned on.

    Source: `preprocess_plain` of LLaVA (haotian-liu/LLaVA, train/train.py): the token that everything begins with, the
    images, the text and a new line, of which the last two are learned.

    Args:
        turns: a user's with the images' marks, whose words are left out, and an assistant's.
        image_tokens: the number of tokens of each image, at least one.
    Raises:
        UserError: if it is another conversation.
    """
    check_caption(turns, len(image_tokens))
    marks = count_marks(turns[0].text)
    if marks != len(image_tokens):
        raise UserError(f"{marks} {IMAGE} marks for {len(image_tokens)} images: the two must be equal")
    given = [*template.encode(template.begin, tokenizer), *[tokenizer.image_id] * sum(image_tokens)]
    caption = tokenizer.encode(turns[1].text + "\n")
    return Rendered([*given, *caption], [IGNORE] * len(given) + caption, marks, 2)


def check_caption(turns: Sequence[Turn], num_images: int) -> None:
    """Whether a conversation is what `render_caption` takes.

    Raises:
        UserError: if not.
    """
    if [turn.role for turn in turns] != ["user", "assistant"] or not num_images:
        told = f"{len(turns)} turns with {num_images} images are no caption"
        raise UserError(f"{told}: data.captions=true takes one question with images, and its answer")


def open_turn(
    template: Template,
    tokenizer: Tokenizer,
    image_tokens: Sequence[int],
    text: str = "",
    first: bool = True,
) -> list[int]:
    """Ids that open a user turn and leave it open: `render`'s, up to where a question may follow.

    Args:
        image_tokens: the number of tokens of each image.
        text: with a mark for each image, or with none: then the images come first, a line each.
        first: whether this is the first turn of the conversation.
    """
    opening = _open(template, tokenizer, first)
    marked = template.dress(mark_images(text, len(image_tokens)))
    return [*opening, *body(marked, tokenizer, iter(image_tokens), template)]


def close_turn(template: Template, tokenizer: Tokenizer, question: str) -> list[int]:
    """Ids that end an open user turn with `question` and open the assistant's."""
    return [*tokenizer.encode(question), *template.encode(template.user_close, tokenizer)]


def body(
    text: str,
    tokenizer: Tokenizer,
    image_tokens: Iterator[int],
    template: Template | None = None,
    allow_special: bool = False,
) -> list[int]:
    """Ids of a text with `<image>` marks, each as many image tokens as `image_tokens` says next; what the template has
    around images is encoded by itself."""
    ids: list[int] = []
    for piece in split_marks(text, template):
        if piece == IMAGE:
            ids += [tokenizer.image_id] * next(image_tokens)
        else:
            ids += tokenizer.encode(piece, allow_special)
    return ids


def split_marks(text: str, template: Template | None = None) -> list[str]:
    """Cuts a text into the pieces that are encoded on their own: `<image>`, what a template has around it, a newline
    right after it, and the texts between."""
    opening, closing = ("", "") if template is None else template.image
    dressed = opening + IMAGE + closing
    pieces: list[str] = []
    for piece in re.split(f"({re.escape(dressed)}|{IMAGE})(\n)?", text):
        pieces += [opening, IMAGE, closing] if piece == dressed else [piece]
    return [piece for piece in pieces if piece]


def count_marks(text: str) -> int:
    """The number of `<image>` marks in a text."""
    return text.count(IMAGE)


def mark_images(text: str, num_images: int) -> str:
    """The text with a mark for each image: its own, or if it has none, a line each before it.

    Raises:
        UserError: if the text has marks, and their number is not that of the images.
    """
    marks = count_marks(text)
    if not marks:
        return f"{IMAGE}\n" * num_images + text
    if marks != num_images:
        raise UserError(f"{marks} {IMAGE} marks for {num_images} images: the two must be equal")
    return text


def _open(template: Template, tokenizer: Tokenizer, first: bool) -> tuple[int, ...]:
    before = template.begin + template.system if first else template.between
    return template.encode(before + template.user_open, tokenizer)
