"""Our `Processor` as a processor of transformers."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer as Backend
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin
from transformers.utils.chat_template_utils import render_jinja_template

from cobra.checkpoint import CONFIG, TOKENIZER, tokenizer_files
from cobra.config import CobraConfig
from cobra.processor import Processor, Source, list_images, pad
from cobra.prompt import IGNORE, Rendered, Turn, body, count_marks
from cobra.tokenizer import IMAGE, PAD, Tokenizer
from cobra.typed_config import from_dict, to_dict
from vision_scan.errors import UserError

from .chat import to_turns, write_template
from .configuration import CobraVLMConfig
from .modeling import find_file

PROCESSOR_CONFIG, CHAT_TEMPLATE = "processor_config.json", "chat_template.jinja"


class Written(str):
    """A conversation as a chat template has written it.

    Attributes:
        answers: where the assistant's words are: the first character of each stretch and the one behind it, in order.
    """

    answers: Sequence[tuple[int, int]] = ()

    @classmethod
    def of(cls, text: str, answers: Sequence[tuple[int, int]]) -> "Written":
        written = cls(text)
        written.answers = answers
        return written


@dataclass(frozen=True, kw_only=True)
class BatchOptions:
    """How rows become a batch; see `CobraProcessor.__call__`."""

    padding: bool | str = True
    padding_side: Literal["left", "right"] | None = None
    pad_to_multiple_of: int | None = None
    return_tensors: str | None = None
    truncation: bool = False
    max_length: int | None = None
    add_special_tokens: bool = False

    def __post_init__(self) -> None:
        if self.return_tensors not in (None, "pt"):
            raise UserError(f"return_tensors={self.return_tensors!r}: allowed are pt, and None for lists")
        if self.padding not in (True, False, "longest", "do_not_pad"):
            raise UserError(f"padding={self.padding!r}: allowed are True or 'longest', False or 'do_not_pad'")

    @property
    def pads(self) -> bool:
        return self.padding in (True, "longest")


class TextProcessor(Processor):
    """Takes prompts as `apply_chat_template` writes them: the template's own strings are told from what was said, so
    that they get the ids that a conversation has, where a tokenizer by itself might see other special tokens."""

    def _row(self, prompt: str | Sequence[Turn], lengths: Sequence[int]) -> Rendered:
        if not isinstance(prompt, str):
            return super()._row(prompt, lengths)
        marks = count_marks(prompt)
        if marks != len(lengths):
            raise UserError(f"{marks} {IMAGE} marks for {len(lengths)} images: the two must be equal")
        left = iter(lengths)
        ids: list[int] = []
        labels: list[int] = []
        answers = prompt.answers if isinstance(prompt, Written) else ()
        cuts = [0, *(place for answer in answers for place in answer), len(prompt)]
        for number, (start, end) in enumerate(pairwise(cuts)):  # what lies between answers, an answer, and so on
            piece = self._encode(prompt[start:end], left)
            ids += piece
            labels += piece if number % 2 else [IGNORE] * len(piece)
        return Rendered(ids, labels, marks, 1)

    def _encode(self, text: str, lengths: Iterator[int]) -> list[int]:
        template = self.template
        openings = {before + template.user_open for before in (template.begin + template.system, template.between)}
        strings = sorted(openings | {template.user_close, template.end}, key=len, reverse=True)
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, strings))})", text):
            is_own = piece in strings
            ids += template.encode(piece, self.tokenizer) if is_own else body(piece, self.tokenizer, lengths, template)
        return ids


class CobraProcessor(ProcessorMixin):
    """Texts, conversations and images to what the model takes.

    Attributes:
        tokenizer: a fast tokenizer of transformers with the ids of the model directory's.
        chat_template: Jinja; by default that of the model's prompt template.
    """

    def __init__(self, processor: Processor, chat_template_text: str | None = None) -> None:
        """A processor for the model that `processor` is of."""
        template = processor.template
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=Backend.from_str(processor.tokenizer.to_json()),
            pad_token=PAD,
            eos_token=template.end,
            extra_special_tokens={"image_token": IMAGE},
            padding_side="left",
            model_input_names=["input_ids", "attention_mask"],
        )
        super().__init__(tokenizer, chat_template=chat_template_text or write_template(template))
        self.tokenizer.chat_template = self.chat_template
        self.image_token, self.image_token_id = IMAGE, processor.tokenizer.image_id
        self._processor = TextProcessor(processor.config, processor.tokenizer)

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["tokenizer"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> "CobraProcessor":
        """Reads a model directory, or what `save_pretrained` has written.

        Raises:
            UserError: if it has neither.
        """

        def find(name: str) -> Path | None:
            try:
                file = find_file(pretrained_model_name_or_path, name, options)
            except OSError:  # of the Hub: there is none
                return None
            return file if file.is_file() else None

        saved, template = find(PROCESSOR_CONFIG), find(CHAT_TEMPLATE)
        if saved is not None:
            data = json.loads(saved.read_text(encoding="utf-8"))
            config = from_dict(CobraConfig, data["config"], str(saved))
        elif (file := find(CONFIG)) is not None:
            config = CobraVLMConfig.from_dict(json.loads(file.read_text(encoding="utf-8"))).cobra
        else:
            raise UserError(f"{pretrained_model_name_or_path}: has no {CONFIG}; give a model directory")
        tokenizer = Tokenizer.from_file(find_file(pretrained_model_name_or_path, TOKENIZER, options))
        text = None if template is None else template.read_text(encoding="utf-8")
        return cls(Processor(config, tokenizer), text)

    def save_pretrained(self, save_directory: str | Path, push_to_hub: bool = False) -> list[str]:
        """Writes tokenizer, chat template and all that this is made of, beside a model or alone."""
        if push_to_hub:
            raise UserError("push_to_hub: save into a directory, and push that with `hf upload`")
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        settings = json.dumps(self.to_dict(), indent=2) + "\n"
        writers = {
            **tokenizer_files(self._processor.tokenizer, self._processor.template.end),
            CHAT_TEMPLATE: lambda file: file.write_text(self.chat_template, encoding="utf-8"),
            PROCESSOR_CONFIG: lambda file: file.write_text(settings, encoding="utf-8"),
        }
        for name, write in writers.items():
            write(folder / name)
        return [str(folder / name) for name in writers]

    def to_dict(self) -> dict[str, Any]:
        return {"processor_class": type(self).__name__, "config": to_dict(self._processor.config)}

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "pixel_values", "image_sizes", "num_frames"]

    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        *,
        padding: bool | str = True,
        padding_side: Literal["left", "right"] | None = None,
        pad_to_multiple_of: int | None = None,
        return_tensors: str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = False,
    ) -> BatchFeature:
        """A batch.

        Args:
            images: of one text: one or several; of several: a list for each, or all of them in order.
            text: prompts, with an `<image>` for each image; special tokens are recognised.
            padding: False or "do_not_pad": rows that are lists keep their own lengths.
            pad_to_multiple_of: rows are padded to a multiple of it.
            return_tensors: "pt", or None: ids and mask are lists.
            truncation, max_length: whether rows end after `max_length` tokens; none may lose an image.
            add_special_tokens: changes nothing: a prompt is taken as it is.
        Returns:
            input_ids, attention_mask and, with images, pixel_values, image_sizes (and num_frames, see `Processor`).
        """
        if text is None:
            raise UserError("a prompt is missing: give text, with an <image> for each image")
        texts = [text] if isinstance(text, str) else list(text)
        options = BatchOptions(
            padding=padding,
            padding_side=padding_side,
            pad_to_multiple_of=pad_to_multiple_of,
            return_tensors=return_tensors,
            truncation=truncation,
            max_length=max_length,
            add_special_tokens=add_special_tokens,
        )
        return self._batch(texts, _by_row(texts, images), options)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        continue_final_message: bool = False,
        return_assistant_tokens_mask: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        processor_kwargs: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        """A conversation as text, or as the model takes it.

        As ids, what was said stays apart from special tokens: nobody ends a turn by writing `<|end|>`.

        Args:
            conversation: messages with a role and content, a text or parts of type text, image and video; or several.
            tokenize, continue_final_message, return_dict, return_tensors: see `ProcessorMixin`.
            return_assistant_tokens_mask: adds `assistant_masks`, as long as input_ids, 1 where `cobra.prompt.render`
                has labels: answers and the tokens that end them. Of another template, what is within its
                `{% generation %}`.
            processor_kwargs: of `__call__`, `padding` for instance.
            options: what a template of one's own asks for.
        """
        if not tokenize:
            return super().apply_chat_template(
                conversation, chat_template, continue_final_message=continue_final_message, **options
            )
        if return_assistant_tokens_mask and continue_final_message:
            raise UserError("return_assistant_tokens_mask is of answers that have ended: no continue_final_message")
        is_batch = not isinstance(conversation[0], dict)
        rows: list[Any] = list(conversation) if is_batch else [conversation]
        turns, sources = zip(*map(to_turns, rows), strict=True)
        taken = {name: options.pop(name) for name in ("padding", "padding_side") if name in options}
        how = BatchOptions(**{"return_tensors": return_tensors, **(processor_kwargs or {}), **taken})
        images = [*sources]
        if options.get("images") is not None:
            images = _by_row(["".join(turn.text for turn in row) for row in turns], options.pop("images"))
        prompts: Sequence[str | Sequence[Turn]] = turns
        text = chat_template or str(self.chat_template)
        is_own = text == write_template(self._processor.template)
        if return_assistant_tokens_mask and not is_own:
            prompts = self._with_answers(rows, text, options)
        elif continue_final_message or not is_own:
            prompts = super().apply_chat_template(rows, text, continue_final_message=continue_final_message, **options)
        batch = self._batch(prompts, images, how, return_assistant_tokens_mask)
        return batch if return_dict else batch["input_ids"]

    def _with_answers(self, rows: list[Any], text: str, options: dict[str, Any]) -> list[Written]:
        if not re.search(r"\{%-?\s*generation\s*-?%\}", text):
            raise UserError(
                "the chat template does not say what the assistant's words are: put them within {% generation %} and "
                "{% endgeneration %}"
            )
        given = {**self.tokenizer.special_tokens_map, **options}
        rendered = render_jinja_template(rows, chat_template=text, return_assistant_tokens_mask=True, **given)
        return [Written.of(*row) for row in zip(*rendered, strict=True)]

    def _batch(
        self,
        prompts: Sequence[str | Sequence[Turn]],
        images: Sequence[Any] | None,
        options: BatchOptions,
        has_answers: bool = False,
    ) -> BatchFeature:
        rows, tiles = self._processor.rows(prompts, images)
        if options.truncation and options.max_length is not None:
            rows = [self._cut(row, options.max_length, number) for number, row in enumerate(rows)]
        side, multiple = options.padding_side or self.tokenizer.padding_side, options.pad_to_multiple_of or 1
        input_ids, masks = pad([row.input_ids for row in rows], self.tokenizer.pad_token_id, side, multiple)
        data: dict[str, Any] = {"input_ids": input_ids, "attention_mask": masks}
        if has_answers:
            learned = [[int(label != IGNORE) for label in row.labels] for row in rows]
            data["assistant_masks"], _ = pad(learned, 0, side, multiple)
        if options.return_tensors is None:
            keep = torch.ones_like(masks) if options.pads else masks
            for name, table in data.items():
                data[name] = [row[kept.bool()].tolist() for row, kept in zip(table, keep, strict=True)]
        if tiles:
            data |= self._processor.stack(tiles)
        return BatchFeature(data)

    def _cut(self, row: Rendered, most: int, number: int) -> Rendered:
        if self.image_token_id in row.input_ids[most:]:
            needed = len(row.input_ids) - row.input_ids[::-1].index(self.image_token_id)
            raise UserError(
                f"row {number}: max_length={most} cuts off images, which end at token {needed}: make it larger, or "
                "None"
            )
        return replace(row, input_ids=row.input_ids[:most], labels=row.labels[:most])


def _by_row(texts: Sequence[str], images: Any) -> list[list[Source]] | None:
    """Images for each text, however they were given."""
    if images is None:
        return None
    given: list[Any] = list(images) if isinstance(images, list | tuple) else list_images(images)
    if any(isinstance(one, list | tuple) for one in given):
        if len(given) != len(texts):
            raise UserError(f"{len(texts)} texts, but images for {len(given)} rows")
        return [list(one) if isinstance(one, list | tuple) else list_images(one) for one in given]
    left = iter(given)
    rows = [list(islice(left, count_marks(text))) for text in texts]
    rows[-1] += left  # too many are reported with the row
    return rows
