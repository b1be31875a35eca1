"""Benchmarks, by name."""

from eval import plane_scenes, scene_questions
from eval.tasks.drawn_scenes import DrawnScenes
from eval.tasks.needle import Needle
from eval.tasks.task import Sample, Task

__all__ = ["TASKS", "Sample", "Task"]

TASKS: dict[str, Task] = {
    "digit_scenes": DrawnScenes(kinds=scene_questions.KINDS, command="scenes"),
    "plane_scenes": DrawnScenes(kinds=tuple(plane_scenes.KINDS), command="plane-scenes"),
    "needle": Needle(),
}
