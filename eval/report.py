"""The demo's report: gathers a demo directory into report.json and writes report.html from it."""

import base64
import time
from pathlib import Path

import cobra
from cobra.model import Cobra
from eval.demo import FORMAT as STATE_FORMAT
from eval.demo import MODELS, STATE_FILE
from eval.efficiency import FORMAT as EFFICIENCY_FORMAT
from eval.environment import describe_environment
from eval.files import check_format, read_json, read_lines, write_json, write_text
from eval.page import render
from eval.pipeline import peak_memory
from eval.runner import result_paths
from eval.scoring import paired_difference
from eval.verdict import verdict
from vision_scan.errors import UserError

TASK = "digit_scenes"
NUM_EXAMPLES = 6
MAX_POINTS = 400  # of a loss curve
FORMAT = 3  # of report.json


def write(path: Path) -> tuple[Path, Path]:
    """Writes the report of a demo directory, or only the page of a report.json.

    Returns:
        paths of report.json and report.html.
    Raises:
        UserError: if `path` is neither, or a step of the demo is missing.
    """
    if path.is_dir():
        numbers = path / "report.json"
        write_json(numbers, collect(path))
    else:
        numbers = path
    report = read_json(numbers)
    if not isinstance(report, dict) or "verdict" not in report:
        raise UserError(
            f"{numbers} is not a report of this command; give a demo's directory or its report.json"
        )
    check_format(report, FORMAT, numbers)
    page = numbers.with_suffix(".html")
    write_text(page, render(report))
    return numbers, page


def collect(root: Path) -> dict:
    """Everything that the page shows, from the files of a demo.

    Returns:
        A JSON-able dict: quick, created, settings, environment, models (name, what, constant_state,
        parameters per part), training (loss curves per stage), accuracy (the task's summaries, with
        and without pictures), comparison (paired difference of the models), efficiency, scan,
        examples, peak_rss_bytes (of what runs at the same time), seconds (by the clock), stages (title,
        command, seconds), verdict.
    """
    state = read_json(root / STATE_FILE)
    check_format(state, STATE_FORMAT, root / STATE_FILE)
    models = {key: cobra.load(root / key) for key in MODELS}
    scanned = models["cobra"].config
    efficiency = read_json(root / "efficiency.json")
    check_format(efficiency, EFFICIENCY_FORMAT, root / "efficiency.json")
    results = {key: {part: _result(root, key, part) for part in ("questions", "control")} for key in MODELS}
    report = {
        "format": FORMAT,
        "quick": state["quick"],
        "created": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "settings": state["settings"],
        "environment": describe_environment(),
        "models": {key: _model(models[key], about) for key, about in MODELS.items()},
        "training": {
            key: [_curve(root, f"{key}-align", "align"), _curve(root, key, "finetune")] for key in MODELS
        },
        "accuracy": {
            key: {part: result["summary"] for part, result in parts.items()} for key, parts in results.items()
        },
        "comparison": _compare({key: _records(root, key) for key in MODELS}),
        "efficiency": efficiency,
        "scan": {
            "order": scanned.connector.order,
            "height": scanned.grid[0],
            "width": scanned.grid[1],
        },
        "examples": _examples(root),
        "peak_rss_bytes": peak_memory(state),
        "seconds": state["seconds"],
        "stages": [
            {key: step[key] for key in ("title", "command", "seconds")}
            for step in sorted(state["steps"].values(), key=lambda step: (step["stage"], step["lane"]))
        ],
    }
    report["verdict"] = verdict(report)
    return report


def _result(root: Path, key: str, part: str) -> dict:
    return read_json(result_paths(root / "tasks" / key, TASK, "blank" if part == "control" else "none")[1])


def _records(root: Path, key: str) -> list[dict]:
    return read_lines(result_paths(root / "tasks" / key, TASK, "none")[0])


def _model(model: Cobra, about: dict) -> dict:
    parts = ("vision_encoder", "connector", "lm")
    parameters = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in parts}
    return {**about, "parameters": parameters}


def _curve(root: Path, run: str, stage: str) -> dict:
    points = [[record["step"], record["loss"]] for record in read_lines(root / run / "metrics.jsonl")]
    stride = -(-len(points) // MAX_POINTS)
    return {"stage": stage, "points": points[::stride] if points else []}


def _compare(records: dict[str, list[dict]]) -> dict:
    """Mean difference of the two models' scores over the same questions, with its 95 percent
    interval."""
    (first, a), (second, b) = records.items()
    if [record["id"] for record in a] != [record["id"] for record in b]:
        raise UserError(
            f"{first} and {second} were asked different questions; run both through "
            "`python -m eval tasks` again"
        )
    scores = ([record["score"] for record in records] for records in (a, b))
    return {"first": first, "second": second, **paired_difference(*scores)}


def _examples(root: Path) -> list[dict]:
    """The first scenes of the test set, with every question, its truth and the answers."""
    answers = {key: {record["id"]: record for record in _records(root, key)} for key in MODELS}
    scenes: dict[str, list[dict]] = {}
    for record in next(iter(answers.values())).values():
        scenes.setdefault(record["id"].rpartition("/")[0], []).append(record)
    examples = []
    for scene, records in list(scenes.items())[:NUM_EXAMPLES]:
        rows = []
        for record in records:
            given = {key: answers[key][record["id"]] for key in MODELS}
            marked = {key: {"answer": r["answer"], "right": r["score"] == 1} for key, r in given.items()}
            rows.append(
                {
                    "kind": record["group"],
                    "question": record["question"],
                    "truth": record["truth"],
                    "answers": marked,
                }
            )
        png = (root / "scenes" / "images" / f"{scene}.png").read_bytes()
        examples.append({"image": "data:image/png;base64," + base64.b64encode(png).decode(), "rows": rows})
    return examples
