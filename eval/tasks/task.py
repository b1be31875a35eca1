"""What a benchmark is: official files in, official score out."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One question about pictures. A `question` without image marks has its images in front of it."""

    id: str
    question: str
    images: tuple[Path, ...]
    truth: str
    group: str


class Task(Protocol):
    """A benchmark: reads a benchmark's files and scores answers as it does."""

    @property
    def VERSION(self) -> int:
        """Counts up whenever the same answers would score differently."""
        ...

    def load(self, data_dir: str | Path, limit: int | None = None) -> list[Sample]:
        """The samples, at most `limit` of them; raises UserError where the files are not right."""
        ...

    def score(self, sample: Sample, answer: str) -> float:
        """Score of one answer, in 0..1."""
        ...

    def summarise(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """The benchmark's figures from records that hold "group" and "score"."""
        ...
