"""Runs a benchmark on a model: questions in, one JSON line per answer out, and a summary.

The lines hold all that scoring needs, so that `rescore` works without the model or the pictures. A
model is anything with `answer_batch([(question, images), ...], max_new_tokens=...) -> list of
texts`; one that is asked of an int8 state needs `prefill` and `answer` too.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from PIL import Image

from cobra.image import check_image
from eval.environment import describe_environment
from eval.files import read_lines, write_json, write_lines
from eval.tasks import TASKS, Sample
from vision_scan.errors import UserError, choose

MOST_PICTURES = 128  # of a batch, if it has more than a sample
Control = Literal["none", "blank"]
CONTROLS: dict[str, str] = {
    "none": "the pictures as they are",
    "blank": "a black picture of the same size: what can be guessed from the question alone",
}


class Model(Protocol):
    """What the runner asks of a model."""

    def answer_batch(
        self, requests: Sequence[tuple[str, Sequence[Any]]], *, max_new_tokens: int
    ) -> list[str]: ...


def answer_samples(
    model: Model,
    samples: Sequence[Sample],
    *,
    control: Control = "none",
    int8_state: bool = False,
    batch_size: int = 32,
    max_new_tokens: int = 24,
    advance: Callable[[int], None] = lambda count: None,
) -> list[str]:
    """The model's greedy answers, one per sample, in order; in float32 the same for every batch
    size.

    Args:
        control: a key of CONTROLS.
        int8_state: pictures are read into a state, which is rounded to 8 bits before the question is read, one sample
            at a time.
        batch_size: of samples, or fewer where these have more than MOST_PICTURES in all.
        advance: called with the number of samples just answered.
    Raises:
        UserError: for an unknown control, a batch size below 1, or a picture that cannot be read.
    """
    choose("control", control, CONTROLS)
    if batch_size < 1:
        raise UserError(f"batch size {batch_size}: give at least 1")
    answers: list[str] = []
    for batch in _batches(samples, 1 if int8_state else batch_size):
        requests = [
            (s.question, [_blank(i) for i in s.images] if control == "blank" else list(s.images))
            for s in batch
        ]
        if int8_state:
            answers += [_answer_from_int8(model, *request, max_new_tokens) for request in requests]
        else:
            answers += model.answer_batch(requests, max_new_tokens=max_new_tokens)
        advance(len(batch))
    return answers


def _answer_from_int8(model: Any, question: str, images: Sequence[Any], max_new_tokens: int) -> str:
    if "<image>" in question:
        raise UserError(f"an int8 state needs pictures that stand in front of the question, got {question!r}")
    return model.answer(question, state=model.prefill(images=images).quantize(), max_new_tokens=max_new_tokens)


def _batches(samples: Sequence[Sample], batch_size: int) -> Iterator[list[Sample]]:
    batch: list[Sample] = []
    for sample in samples:
        pictures = sum(len(each.images) for each in (*batch, sample))
        if batch and (len(batch) == batch_size or pictures > max(MOST_PICTURES, batch_size)):
            yield batch
            batch = []
        batch.append(sample)
    if batch:
        yield batch


def run_task(
    model: Model,
    name: str,
    samples: Sequence[Sample],
    *,
    model_name: str,
    control: Control = "none",
    int8_state: bool = False,
    **settings: Any,
) -> tuple[list[dict], dict]:
    """Answers and scores a benchmark.

    Args:
        model: what answers.
        name: a key of TASKS.
        samples: of that task.
        model_name: what to call the model in the records.
        control: a key of CONTROLS.
        int8_state: see `answer_samples`.
        settings: batch_size, max_new_tokens and advance of `answer_samples`.
    Returns:
        records: per sample id, group, question, truth, answer, score, control, model, task,
            task_version.
        result: JSON-able: task, task_version, model, control, seconds, environment, summary (the
            task's own).
    """
    task = choose("task", name, TASKS)
    start = time.perf_counter()
    answers = answer_samples(model, samples, control=control, int8_state=int8_state, **settings)
    seconds = time.perf_counter() - start
    records = [
        {
            "id": sample.id,
            "group": sample.group,
            "question": sample.question,
            "truth": sample.truth,
            "answer": answer,
            "score": task.score(sample, answer),
            "control": control,
            "model": model_name,
            "task": name,
            "task_version": task.VERSION,
        }
        for sample, answer in zip(samples, answers, strict=True)
    ]
    result = {
        "format": 1,
        "task": name,
        "task_version": task.VERSION,
        "model": model_name,
        "control": control,
        "int8_state": int8_state,
        "seconds": round(seconds, 3),
        "environment": describe_environment(str(getattr(model, "device", "cpu"))),
        "summary": task.summarise(records),
    }
    return records, result


def result_paths(output_dir: Path, name: str, control: Control) -> tuple[Path, Path]:
    """Where the records and the result of a task belong: NAME[.CONTROL].jsonl and .json."""
    stem = name if control == "none" else f"{name}.{control}"
    return output_dir / f"{stem}.jsonl", output_dir / f"{stem}.json"


def save(output_dir: Path, records: Iterable[Mapping], result: Mapping) -> None:
    """Writes both files of a task."""
    lines, summary = result_paths(output_dir, result["task"], result["control"])
    write_lines(lines, records)
    write_json(summary, result)


def rescore(path: Path) -> tuple[list[dict], dict]:
    """Scores the answers of a file of records again, with the task as it is now.

    Returns:
        records with new scores, and the task's summary of them.
    Raises:
        UserError: if the file is not one of this runner.
    """
    records = read_lines(path)
    missing = (
        {"id", "group", "question", "truth", "answer", "task"}.difference(*records) if records else {"id"}
    )
    if missing:
        raise UserError(f"{path} holds no records of `python -m eval tasks`: no {', '.join(sorted(missing))}")
    names = sorted({record["task"] for record in records})
    if len(names) > 1:
        raise UserError(f"{path} mixes tasks: {', '.join(names)}; give one file per task")
    task = choose("task", names[0], TASKS)
    rescored = []
    for record in records:
        sample = Sample(images=(), **{key: record[key] for key in ("id", "group", "question", "truth")})
        rescored.append(
            record | {"score": task.score(sample, record["answer"]), "task_version": task.VERSION}
        )
    return rescored, task.summarise(rescored)


def _blank(path: Path) -> Image.Image:
    height, width = check_image(path)
    return Image.new("RGB", (width, height))
