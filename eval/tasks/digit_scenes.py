"""Digit scenes: look-up, counting and reading on pictures that `python -m eval scenes` draws.

Files and score: see scene_rows.py.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from eval.scene_questions import KINDS
from eval.tasks import scene_rows
from eval.tasks.scene_rows import score
from eval.tasks.task import Sample

__all__ = ["VERSION", "load", "score", "summarise"]

VERSION = 1


def load(data_dir: str | Path, limit: int | None = None) -> list[Sample]:
    """Reads and checks all of test.json; returns its first `limit` samples, kinds interleaved.

    Raises:
        UserError: if test.json or a picture is missing, or a row is not as scene_rows.py describes.
    """
    return scene_rows.load(data_dir, limit, KINDS, "scenes")


def summarise(records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Accuracy with interval and count over all records, and of each kind under "groups"."""
    return scene_rows.summarise(records, KINDS)
