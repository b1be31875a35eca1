"""Our `Processor` as a processor of transformers."""

import json
import re
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from tokenizers import Tokenizer as Backend
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from cobra.checkpoint import CONFIG, TOKENIZER
from cobra.config import CobraConfig
from cobra.processor import Processor, Source, list_images
from cobra.prompt import Turn, body, count_marks
from cobra.tokenizer import IMAGE, PAD, Tokenizer
from cobra.typed_config import from_dict, to_dict
from vision_scan.errors import UserError

from .chat import chat_template, to_turns
from .configuration import CobraVLMConfig
from .modeling import find_file

PROCESSOR_CONFIG, CHAT_TEMPLATE = "processor_config.json", "chat_template.jinja"


class TextProcessor(Processor):
    """Takes prompts as `apply_chat_template` writes them: the template's own strings are told from what was said, so
    that they get the ids that a conversation has, where a tokenizer by itself might see other special tokens."""

    def _row(self, prompt: str | Sequence[Turn], lengths: Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return super()._row(prompt, lengths)
        marks = count_marks(prompt)
        if marks != len(lengths):
            raise UserError(f"{marks} {IMAGE} marks for {len(lengths)} images: the two must be equal")
        template, left = self.template, iter(lengths)
        openings = {before + template.user_open for before in (template.begin + template.system, template.between)}
        strings = sorted(openings | {template.user_close, template.end}, key=len, reverse=True)
        ids: list[int] = []
        for piece in re.split(f"({'|'.join(map(re.escape, strings))})", prompt):
            is_own = piece in strings
            ids += template.encode(piece, self.tokenizer) if is_own else body(piece, self.tokenizer, left, template)
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
        super().__init__(tokenizer, chat_template=chat_template_text or chat_template(template))
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
        self._processor.tokenizer.save(folder / TOKENIZER)
        (folder / CHAT_TEMPLATE).write_text(self.chat_template, encoding="utf-8")
        (folder / PROCESSOR_CONFIG).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")
        return [str(folder / name) for name in (TOKENIZER, CHAT_TEMPLATE, PROCESSOR_CONFIG)]

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
        return_tensors: str | None = None,
        truncation: bool = False,
        max_length: int | None = None,
        add_special_tokens: bool = False,
    ) -> BatchFeature:
        """A batch.

        Args:
            images: of one text: one or several; of several: a list for each, or all of them in order.
            text: prompts, with an `<image>` for each image; special tokens are recognised.
            padding: False: rows are lists of their own lengths.
            return_tensors: "pt", or None: ids and mask are lists.
            truncation, max_length: refused, as they might cut through an image.
            add_special_tokens: changes nothing: a prompt is taken as it is.
        Returns:
            input_ids, attention_mask and, with images, pixel_values, image_sizes (and num_frames, see `Processor`).
        """
        if text is None:
            raise UserError("a prompt is missing: give text, with an <image> for each image")
        if truncation:
            raise UserError(f"truncation to {max_length} tokens might cut through an image: shorten the text instead")
        texts = [text] if isinstance(text, str) else list(text)
        return self._batch(texts, _by_row(texts, images), padding, padding_side, return_tensors)

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        tokenize: bool = False,
        continue_final_message: bool = False,
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
            processor_kwargs: of `__call__`, `padding` for instance.
            options: what a template of one's own asks for.
        """
        if not tokenize:
            return super().apply_chat_template(
                conversation, chat_template, continue_final_message=continue_final_message, **options
            )
        is_batch = not isinstance(conversation[0], dict)
        rows: list[Any] = list(conversation) if is_batch else [conversation]
        turns, sources = zip(*map(to_turns, rows), strict=True)
        given = {"padding": True, "padding_side": None, "return_tensors": return_tensors, **(processor_kwargs or {})}
        taken = {name: options.pop(name) for name in ("padding", "padding_side") if name in options}
        images = [*sources]
        if options.get("images") is not None:
            images = _by_row(["".join(turn.text for turn in row) for row in turns], options.pop("images"))
        prompts = turns
        if chat_template is not None or continue_final_message or self.chat_template != self.tokenizer.chat_template:
            prompts = super().apply_chat_template(
                rows, chat_template, continue_final_message=continue_final_message, **options
            )
        batch = self._batch(list(prompts), images, **{**given, **taken})
        return batch if return_dict else batch["input_ids"]

    def _batch(
        self,
        rows: Sequence[str | Sequence[Turn]],
        images: Sequence[Any] | None,
        padding: bool | str,
        padding_side: Literal["left", "right"] | None,
        return_tensors: str | None,
    ) -> BatchFeature:
        if return_tensors not in (None, "pt"):
            raise UserError(f"return_tensors={return_tensors!r}: allowed are pt, and None for lists")
        side = padding_side or self.tokenizer.padding_side
        data: dict[str, Any] = self._processor(rows, images, side)
        if data["pixel_values"] is None:
            data = {name: data[name] for name in ("input_ids", "attention_mask")}
        data.pop("tiles_per_image", None)
        if return_tensors is None:
            masks = data["attention_mask"].bool()
            for name in ("input_ids", "attention_mask"):
                data[name] = [
                    (row if padding else row[mask]).tolist() for row, mask in zip(data[name], masks, strict=True)
                ]
        return BatchFeature(data)


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
