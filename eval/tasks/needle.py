"""One digit among many pictures: how much of what it has read a model still knows.

Files: those of `python -m eval needles` (needles.py). Score: exact match, as of all drawn scenes; accuracy overall, by
number of pictures, and for each number by the needle's depth.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from eval.needles import split_group
from eval.scoring import accuracy, accuracy_by_group
from eval.tasks.drawn_scenes import DrawnScenes


@dataclass(frozen=True, kw_only=True)
class Needle(DrawnScenes):
    """The benchmark; a kind is a number of pictures and a depth, such as 100@0.25."""

    kinds: tuple[str, ...] = ()
    command: str = "needles"

    @property
    def known(self) -> str:
        return "PICTURES@DEPTH, such as 100@0.25"

    def knows(self, kind: str) -> bool:
        try:
            split_group(kind)
        except ValueError:
            return False
        return True

    def summarise(self, records: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
        """Accuracy with interval and count over all records; of each number of pictures under "groups"; of each number
        and depth under "depths"."""
        scores: dict[int, list[tuple[str, float]]] = defaultdict(list)
        for record in records:
            length, depth = split_group(record["group"])
            scores[length].append((f"{depth:g}", record["score"]))
        return {
            **accuracy(score for some in scores.values() for _, score in some),
            "groups": {str(length): accuracy(score for _, score in scores[length]) for length in sorted(scores)},
            "depths": {str(length): _in_order(accuracy_by_group(scores[length])) for length in sorted(scores)},
        }


def _in_order(depths: Mapping[str, Any]) -> dict[str, Any]:
    return {depth: depths[depth] for depth in sorted(depths, key=float)}
