"""Preference data as a model gets it: a conversation that is read once, and two answers that go on from it."""

from collections.abc import Sequence
from dataclasses import dataclass

from cobra.processor import Processor, pad
from cobra.prompt import IGNORE, Rendered, encode_answer, render
from train.data.collate import Batch, Sample, pad_right, stack_images
from train.data.rows import Row


@dataclass(frozen=True)
class Pair:
    """The ids of a row.

    Attributes:
        prompt: up to where an answer begins.
        answers: the chosen and the rejected one, with their end tokens.
        num_images, num_turns: of the prompt.
    """

    prompt: list[int]
    answers: tuple[list[int], ...]
    num_images: int
    num_turns: int

    @property
    def num_tokens(self) -> int:
        return len(self.prompt) + sum(map(len, self.answers))

    @property
    def lengths(self) -> list[int]:
        """Tokens of the prompt with each of the answers."""
        return [len(self.prompt) + len(answer) for answer in self.answers]

    def conversations(self) -> list[Rendered]:
        """The prompt with each of the answers, which is what is learned from."""
        ignored = [IGNORE] * len(self.prompt)
        return [
            Rendered([*self.prompt, *answer], [*ignored, *answer], self.num_images, self.num_turns + 1)
            for answer in self.answers
        ]


@dataclass(frozen=True)
class PairSample:
    """The ids of a row: its prompt, with its images, and its answers."""

    prompt: Sample
    answers: tuple[list[int], ...]


def render_pair(row: Row, processor: Processor) -> Pair:
    """Renders a row of preference data; answers that stand within its conversation are part of the prompt.

    Raises:
        UserError: see `cobra.prompt.render`.
    """
    tokenizer, template = processor.tokenizer, processor.template
    image_tokens = processor.image_tokens(len(row.images), row.read_sizes(), row.is_video)
    prompt = render(row.turns, tokenizer, template, image_tokens, supervised=False)
    answers = tuple(encode_answer(template, tokenizer, answer) for answer in row.answers)
    return Pair(prompt.input_ids, answers, prompt.num_images, prompt.num_turns)


def collate_pairs(samples: Sequence[PairSample], pad_id: int) -> Batch:
    """Rows as one batch.

    Returns:
        A batch whose inputs are those of images that `collate_conversations` has; `input_ids` and `attention_mask` of
        the prompts, (batch, longest) int64, filled up on the right; `labels`, (2 batch, longest) int64, the ids of all
        chosen and then all rejected answers, filled up with -100. Its weight is the number of rows.
    """
    prompts = [sample.prompt for sample in samples]
    answers = [sample.answers[which] for which in range(2) for sample in samples]
    input_ids, attention_mask = pad([prompt.input_ids for prompt in prompts], pad_id, "right")
    labels = pad_right(answers, IGNORE)
    shared = [len(prompt.input_ids) for prompt in prompts]
    num_tokens, num_supervised = sum(shared) + sum(map(len, answers)), sum(map(len, answers))
    return Batch(
        inputs={
            **stack_images(prompts),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "labels": labels,
        },
        weight=float(len(samples)),
        num_tokens=num_tokens,
        num_supervised=num_supervised,
        num_images=sum(prompt.num_images for prompt in prompts),
        num_padding=input_ids.numel() + labels.numel() - num_tokens,
        ids=tuple(prompt.id for prompt in prompts),
        lengths=tuple(length + len(answer) for length, answer in zip(shared * 2, answers, strict=True)),
        shared_lengths=tuple(shared),
    )
