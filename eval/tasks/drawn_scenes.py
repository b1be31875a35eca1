"""Benchmarks on pictures that commands of ours draw: their test rows, read strictly, and their score.

Files: test.json, LLaVA rows of one question each with its "kind", and images/ beside it. The picture may stand in front
of the question, behind it or within it, on a line of its own.
Score: exact match but for case, spaces and a full stop; accuracy overall and per kind.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
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
        samples = [_sample(row, f"{path}, row {i}", path.parent, self.kinds) for i, row in enumerate(rows)]
        ids = set()
        for sample in samples:
            if sample.id in ids:
                raise UserError(f"{path}: id {sample.id!r} stands in more than one row")
            ids.add(sample.id)
        return samples[:limit]

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


def _sample(row: Any, where: str, data_dir: Path, kinds: Sequence[str]) -> Sample:
    if not isinstance(row, dict):
        raise UserError(f"{where}: expected an object, got {type(row).__name__}")
    for key in ("id", "image", "kind"):
        if not isinstance(row.get(key), str):
            raise UserError(f"{where}: {key!r} must be a string, got {row.get(key)!r}")
    if row["kind"] not in kinds:
        raise UserError(f"{where}: kind {row['kind']!r} is not one of {', '.join(kinds)}")
    question, truth = _turns(row.get("conversations"), where)
    image = data_dir / "images" / row["image"]
    if not image.is_file():
        raise UserError(f"{where}: picture {image} does not exist")
    return Sample(id=row["id"], question=question, images=(image,), truth=truth, group=row["kind"])


def _turns(turns: Any, where: str) -> tuple[str, str]:
    """Question and answer of a conversation of just these two; the image's mark is left out where it comes first, as
    everybody has it who is asked without one."""
    is_pair = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    if not is_pair or [turn.get("from") for turn in turns] != ["human", "gpt"]:
        raise UserError(f"{where}: 'conversations' must be one human turn and one gpt turn")
    question, truth = (turn.get("value") for turn in turns)
    lines = question.split("\n") if isinstance(question, str) else []
    if not (IMAGE_MARK in lines and question.count(IMAGE_MARK) == 1 and len(lines) > 1):
        raise UserError(f"{where}: the question must have one {IMAGE_MARK} mark, on a line of its own")
    if not (isinstance(truth, str) and truth.strip()):
        raise UserError(f"{where}: the answer must be a string that is not empty")
    return question.removeprefix(f"{IMAGE_MARK}\n"), truth
