"""Benchmarks: one file each, listed here."""

from eval.tasks import digit_scenes, plane_scenes
from eval.tasks.task import Sample, Task

__all__ = ["TASKS", "Sample", "Task"]

TASKS: dict[str, Task] = {
    "digit_scenes": digit_scenes,
    "plane_scenes": plane_scenes,
}
