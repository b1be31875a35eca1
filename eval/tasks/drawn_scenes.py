"""Benchmarks on pictures that commands of ours draw: their test rows, read strictly, and their score.

Files: test.json, LLaVA rows of one question each with its "kind", and images/ beside it. The picture stands in
front of the question, behind it or within it, on a line of its own; so does each of several.
Score: exact match but for case, spaces and a full stop; accuracy overall and per kind.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.scoring import accuracy, accuracy_by_group, exact_match
from eval.tasks.task import Sample
from vision_scan.errors import UserError

IMAGE_MARK = "<image>"


@dataclass(frozen=True, kw_only=True)
class DrawnScenes:
    """A benchmark on pictures that a command of ours draws.

    Attributes:
        kinds: of questions, in the order of the groups.
        command: of `python -m eval`, what makes the files.
        VERSION: counts up whenever the same answers would score differently.
    """

    kinds: tuple[str, ...]
    command: str
    VERSION: int = 1

    def load(self, data_dir: str | Path, limit: int | None = None) -> list[Sample]:
        """Reads and checks all of test.json; returns its first `limit` samples, kinds interleaved.

        Raises:
            UserError: if test.json or a picture is missing, or a row is not as described above.
        """
        if limit is not None and limit < 1:
            raise UserError(f"limit {limit}: must be 1 or more")
        path = Path(data_dir) / "test.json"
        try:
            rows = json.loads(path.read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"{path} does not exist: make it with `python -m eval {self.command} --output {data_dir}`"
            ) from None
        except ValueError as error:
            raise UserError(f"{path} is not JSON: {error}") from None
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{path}: expected a list of rows with at least one in it")
        samples, pictures = [], set()
        for i, row in enumerate(rows):
            where = f"{path}, row {i}"
            sample = _sample(row, where, path.parent)
            if not self.knows(sample.group):
                raise UserError(f"{where}: kind {sample.group!r} is not {self.known}")
            samples.append(sample)
            _check_pictures(sample, where, pictures)
        ids = set()
        for sample in samples:
            if sample.id in ids:
                raise UserError(f"{path}: id {sample.id!r} stands in more than one row")
            ids.add(sample.id)
        return samples[:limit]

    @property
    def known(self) -> str:
        """The kinds of questions that there are, for messages."""
        return f"one of {', '.join(self.kinds)}"

    def knows(self, kind: str) -> bool:
        """Whether there are questions of a kind."""
        return kind in self.kinds

    def score(self, sample: Sample, answer: str) -> float:
        """1.0 for the exact answer but for case, spaces and a full stop, else 0.0."""
        return exact_match(answer, sample.truth)

    def summarise(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Accuracy with interval and count over all records, and of each kind under "groups".

        Args:
            records: mappings with the "group" (kind) and "score" of an answer, at least one.
        """
        scores = [(record["group"], record["score"]) for record in records]
        by_kind = accuracy_by_group(scores)
        return {
            **accuracy(value for _, value in scores),
            "groups": {kind: by_kind[kind] for kind in self.kinds if kind in by_kind},
        }


def _check_pictures(sample: Sample, where: str, found: set[Path]) -> None:
    """Raises UserError if one is missing that was not found before."""
    for image in sample.images:
        if image not in found and not image.is_file():
            raise UserError(f"{where}: picture {image} does not exist")
        found.add(image)


def _sample(row: Any, where: str, data_dir: Path) -> Sample:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, got {type(row).__name__}")
    for key in ("id", "kind"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{where}: {key!r} must be a string, got {row.get(key)!r}")
    names = row.get("image")
    names = names if isinstance(names, list) else [names]
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{where}: 'image' must be a string or a list of them, got {row.get('image')!r}")
    question, truth = _turns(row.get("conversations"), len(names), where)
    images = tuple(data_dir / "images" / name for name in names)
    return Sample(id=row["id"], question=question, images=images, truth=truth, group=row["kind"])


def _turns(turns: Any, count: int, where: str) -> tuple[str, str]:
    """Question and answer of a conversation of just these two; the images' marks are left out where all come first, as
    everybody has them who is asked without."""
    is_pair = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    if not is_pair or [turn.get("from") for turn in turns] != ["human", "gpt"]:
        raise UserError(f"{where}: 'conversations' must be one human turn and one gpt turn")
    question, truth = (turn.get("value") for turn in turns)
    lines = question.split("\n") if isinstance(question, str) else []
    if not (lines.count(IMAGE_MARK) == question.count(IMAGE_MARK) == count and len(lines) > count):
        marks = f"one {IMAGE_MARK} mark" if count == 1 else f"{count} {IMAGE_MARK} marks"
        raise UserError(f"{where}: the question must have {marks}, on a line of its own{' each' if count > 1 else ''}")
    if not (isinstance(truth, str) and truth.strip()):
        raise UserError(f"{where}: the answer must be a string that is not empty")
    return question.removeprefix(f"{IMAGE_MARK}\n" * count), truth
