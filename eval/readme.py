"""The measured results of a demo as markdown, and the part of a page that they stand in."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from eval.files import read_json, write_text
from eval.markup import count, duration, seconds, size
from eval.runner import CONTROLS
from vision_scan.errors import UserError

START, END = "<!-- demo results -->", "<!-- end -->"


def render(report: dict) -> str:
    """The results of a report, see `eval.report.collect` for its keys: a sentence on what was trained on
    what, accuracy per kind of question, decoding against context length, findings, time of each step."""
    names = {key: model["name"] for key, model in report["models"].items()}
    blocks = [
        *(["**This is the quick run: its models have learnt little.**"] if report["quick"] else []),
        _trained(report, names),
        _accuracy(report["accuracy"], names),
        _efficiency(report["efficiency"], names),
        _findings(report["verdict"]),
        _times(report["stages"]),
    ]
    return "\n\n".join(blocks) + "\n"


def read(path: Path) -> str:
    """`render` of a report.json.

    Raises:
        UserError: if the file is no demo's report.
    """
    report = read_json(path)
    if not isinstance(report, dict) or "verdict" not in report:
        raise UserError(f"{path} is not the report.json of a demo; give runs/demo/report.json")
    return render(report)


def replace_results(page: str, results: str, name: str = "the page") -> str:
    """A page with what stands between its markers replaced.

    Raises:
        UserError: naming the page, if it does not have both markers once, in order.
    """
    before, found, rest = page.partition(START)
    _, ended, after = rest.partition(END)
    if not (found and ended) or START in rest or END in before:
        raise UserError(f"{name} needs the line {START} once, and {END} once behind it")
    return f"{before}{START}\n\n{results}\n{END}{after}"


def write(path: Path, results: str) -> None:
    """Puts results between the markers of a file."""
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    write_text(path, replace_results(page, results, str(path)))


def _trained(report: dict, names: dict[str, str]) -> str:
    environment, settings = report["environment"], report["settings"]
    models = " and ".join(
        f"{names[key]} ({model['what']}, {sum(model['parameters'].values()):,} parameters)"
        for key, model in report["models"].items()
    )
    machine = environment["gpu"] or f"{count(environment['cores'], 'core')} of {environment['cpu']}"
    compiled = sum("compiled" in (op["cpu"], op["cuda"]) for op in environment["backend"].values())
    software = f"Python {environment['python']}, torch {environment['versions']['torch']}"
    return (
        f"{models}, trained from nothing on {settings['scenes']:,} scenes, "
        f"{settings['finetune_steps']:,} steps of finetuning, seed {settings['seed']}; asked about "
        f"{settings['test_scenes']:,} scenes whose digits they have never seen. "
        f"Measured {report['created']} on {machine}, {count(environment['threads'], 'thread')}, "
        f"{environment['system']}, {software}, commit {environment['commit'] or 'unknown'}, "
        f"{compiled} of {len(environment['backend'])} operators compiled. "
        f"The largest step took {size(report['peak_rss_bytes'])} of memory."
    )


def _accuracy(accuracy: dict, names: dict[str, str]) -> str:
    kinds = list(next(iter(accuracy.values()))["questions"]["groups"])
    rows = []
    for kind in (None, *kinds):
        parts = [
            result[part] if kind is None else result[part]["groups"][kind]
            for result in accuracy.values()
            for part in ("questions", "control")
        ]
        rows.append([kind or "all", f"{parts[0]['count']:,}", *map(_share, parts)])
    heads = ["kind", "questions"]
    heads += [head for key in accuracy for head in (names[key], f"{names[key]}, blank")]
    lead = f"Right answers in percent, with 95 percent intervals (blank: {CONTROLS['blank']})."
    return f"{lead}\n\n{_table(heads, rows)}"


def _share(part: dict) -> str:
    low, high = part["interval"]
    return f"{100 * part['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f})"


def _efficiency(efficiency: dict, names: dict[str, str]) -> str:
    protocol, models = efficiency["protocol"], efficiency["models"]
    lead = (
        f"Decoding, `model.lm` alone on random tokens, batch 1, {efficiency['dtype']}: time per token as "
        f"median (quartiles) of {count(protocol['rounds'], 'interleaved repeat')}, time to the first token, "
        "size of the state or cache."
    )
    heads = ["context"]
    for key in models:
        heads += [f"{names[key]}: ms per token", "first token", "state"]
    rows = []
    for index, context in enumerate(protocol["contexts"]):
        cells = [cell for model in models.values() for cell in _cells(model["points"][index])]
        rows.append([f"{context:,}", *cells])
    return f"{lead}\n\n{_table(heads, rows)}"


def _cells(point: dict) -> list[str]:
    q1, median, q3 = (f"{1e3 * point['decode_s'][key]:.2f}" for key in ("q1", "median", "q3"))
    return [f"{median} ({q1} to {q3})", seconds(point["ttft_s"]["median"]), size(point["state_bytes"])]


def _findings(verdict: list[dict]) -> str:
    """What the run found without a target, and the targets that it missed."""
    lines = [
        f"- {'Not reached: ' if row['reached'] is False else ''}{row['claim']}: {row['measured']}."
        for row in verdict
        if not row["reached"]
    ]
    return "\n".join(lines)


def _times(stages: Sequence[dict]) -> str:
    rows = [[stage["title"], duration(stage["seconds"])] for stage in stages]
    rows.append(["together", duration(sum(stage["seconds"] for stage in stages))])
    return _table(["step", "time"], rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))
