"""Measured results as markdown, and the part of a page that they stand in: those of a demo, of a run beside
peers, and of GPUs."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.files import check_format, read_json, write_text
from eval.gpu.results import FORMAT as GPU_FORMAT
from eval.gpu.tables import read_cards
from eval.gpu.tables import to_markdown as to_gpu_tables
from eval.markup import count, duration, seconds, size
from eval.peers import FORMAT as PEERS_FORMAT
from eval.peers.tables import to_summary
from eval.report import FORMAT as REPORT_FORMAT
from eval.runner import CONTROLS
from vision_scan.errors import UserError

START, END = "<!-- demo results -->", "<!-- end -->"


@dataclass(frozen=True)
class Section:
    """A part of a page.

    Attributes:
        start, end: the lines that it stands between.
        key: what only results of its kind have.
        format: the version of such results that is understood.
        render: those results as markdown.
    """

    start: str
    end: str
    key: str
    format: int
    render: Callable[[dict], str]


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
        _times(report),
    ]
    return "\n\n".join(blocks) + "\n"


DEMO = Section(START, END, "verdict", REPORT_FORMAT, render)
PEERS = Section(
    "<!-- peers results -->", "<!-- end of peers results -->", "contests", PEERS_FORMAT, to_summary
)
GPU = Section(
    "<!-- gpu results -->", "<!-- end of gpu results -->", "measurements", GPU_FORMAT, to_gpu_tables
)


def read(path: Path) -> tuple[str, Section]:
    """Results as markdown, and where they belong. A folder is that of GPUs' results, which may be empty.

    Raises:
        UserError: if the file has no results of these kinds.
    """
    if path.is_dir():
        return GPU.render(read_cards(path)), GPU
    report = read_json(path)
    for section in (DEMO, PEERS):
        if isinstance(report, dict) and section.key in report:
            check_format(report, section.format, path)
            return section.render(report), section
    raise UserError(
        f"{path} is neither the report.json of a demo nor the result of a run beside peers; give "
        "runs/demo/report.json"
    )


def replace_results(page: str, results: str, name: str = "the page", section: Section = DEMO) -> str:
    """A page with what stands between a section's markers replaced.

    Raises:
        UserError: naming the page, if it does not have both markers once, in order.
    """
    start, end = section.start, section.end
    before, found, rest = page.partition(start)
    _, ended, after = rest.partition(end)
    if not (found and ended) or start in rest or end in before:
        raise UserError(f"{name} needs the line {start} once, and {end} once behind it")
    return f"{before}{start}\n\n{results}\n{end}{after}"


def write(path: Path, results: str, section: Section = DEMO) -> None:
    """Puts results between the markers of a file."""
    try:
        page = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    write_text(path, replace_results(page, results, str(path), section))


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
        f"At most {size(report['peak_rss_bytes'])} of memory were taken at a time."
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
        f"median (quartiles) of {count(protocol['rounds'], 'interleaved repeat')}, its share of the roofline "
        f"(weights and state at the {efficiency['read_bytes_per_s'] / 1e9:.0f} GB/s that this machine reads "
        "memory with; caches are faster), time to the first token, size of the state or cache."
    )
    heads = ["context"]
    for key in models:
        heads += [f"{names[key]}: ms per token", "of roofline", "first token", "state"]
    rows = []
    for index, context in enumerate(protocol["contexts"]):
        cells = [cell for model in models.values() for cell in _cells(model["points"][index])]
        rows.append([f"{context:,}", *cells])
    return f"{lead}\n\n{_table(heads, rows)}"


def _cells(point: dict) -> list[str]:
    q1, median, q3 = (f"{1e3 * point['decode_s'][key]:.2f}" for key in ("q1", "median", "q3"))
    first, state = seconds(point["ttft_s"]["median"]), size(point["state_bytes"])
    return [f"{median} ({q1} to {q3})", f"{point['roofline']:.0%}", first, state]


def _findings(verdict: list[dict]) -> str:
    """What the run found without a target, and the targets that it missed."""
    lines = [
        f"- {'Not reached: ' if row['reached'] is False else ''}{row['claim']}: {row['measured']}."
        for row in verdict
        if not row["reached"]
    ]
    return "\n".join(lines)


def _times(report: dict) -> str:
    rows = [[stage["title"], duration(stage["seconds"])] for stage in report["stages"]]
    rows.append(["all, the two models side by side", duration(report["seconds"])])
    return _table(["step", "time"], rows)


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table; all columns but the first are aligned to the right."""
    rule = ["---", *["---:"] * (len(heads) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (heads, rule, *rows))
