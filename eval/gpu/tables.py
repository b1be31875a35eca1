"""Results of a GPU as text: a short table behind a run, and the README's."""

from pathlib import Path

from eval.files import check_format, read_json
from eval.gpu.results import FORMAT
from eval.gpu.targets import TARGETS, judge
from eval.markup import seconds as duration
from eval.markup import size

REACHED = {True: "yes", False: "no", None: ""}


def read_cards(folder: Path) -> dict[str, list[dict]]:
    """The contents of the results files of a folder: card -> its files, the newest last."""
    cards: dict[str, list[dict]] = {}
    for path in sorted(folder.glob("*.json"), key=_age):
        content = read_json(path)
        check_format(content, FORMAT, path)
        cards.setdefault(content["card"], []).append(content)
    return dict(sorted(cards.items()))


def _age(path: Path) -> tuple[str, int]:
    """`h200-2026-11-30-2.json` is younger than `h200-2026-11-30.json`."""
    words = path.stem.split("-")
    number = int(words.pop()) if len(words[-1]) < 2 else 1
    return "-".join(words), number


def to_markdown(cards: dict[str, list[dict]]) -> str:
    """A table for each card: each target, and the newest measurement of it; without cards one that says that
    nothing has been measured."""
    if not cards:
        return f"No GPU has been at hand.\n\n{_targets_table([])}\n"
    parts = []
    for files in cards.values():
        parts += [_card(files), _targets_table(files)]
    return "\n\n".join(parts) + "\n"


def _card(files: list[dict]) -> str:
    newest = files[-1]
    versions = newest["environment"]["versions"]
    told = [f"torch {versions['torch']}"]
    told += [f"{package} {versions[package]}" for package in ("nvcc", "triton") if package in versions]
    gpu = newest["gpu"] or {}
    told += [f"driver {gpu['driver_version']}"] if "driver_version" in gpu else []
    ceilings = newest["ceilings"]
    if ceilings is not None:
        told.append(
            f"copies {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s (read and written), "
            f"multiplies {ceilings['matrix_flops_per_s'] / 1e12:.0f} TFLOP/s in bfloat16"
        )
    return f"{newest['card']}: {', '.join(told)}. Quartiles in brackets."


def _targets_table(files: list[dict]) -> str:
    lines = [["", "", "to reach", "measured", "reached", "commit"]]
    for target in TARGETS:
        holders = [content for content in files if target.row in content["measurements"]]
        measurements = holders[-1]["measurements"] if holders else {}
        commit = (holders[-1]["commit"] or "unknown") if holders else ""
        verdict = judge(target, measurements)
        cells = [target.row, target.what, target.asked(), verdict.measured, REACHED[verdict.reached], commit]
        lines.append(cells)
    head, *rest = lines
    rule = ["---", "---", *["---:"] * 4]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rest))


def summary(content: dict) -> str:
    """A run in lines short enough for a terminal: its parts, its measurements, its targets."""
    lines = [f"{content['card']}, {content['date']}, commit {content['commit'] or 'unknown'}"]
    for name, part in content["parts"].items():
        took = f" in {duration(part['seconds'])}" if "seconds" in part else ""
        note = f": {part['note']}" if part.get("note") else ""
        lines.append(f"  part {name}: {part['status']}{took}{note}")
    for row in content["measurements"].values():
        lines.append(f"  {row['name']}: {_row(row)}")
    for target in TARGETS:
        if target.row in content["measurements"] and target.bound is not None:
            verdict = judge(target, content["measurements"])
            mark = {True: "reached", False: "MISSED", None: "open"}[verdict.reached]
            lines.append(f"  {mark}: {target.row}, {target.what}: {verdict.measured}, asked {target.asked()}")
    return "\n".join(lines)


def _row(row: dict) -> str:
    if row["seconds"] is None:
        return row["failed"] or "no visit"
    told = [f"{duration(row['seconds']['median'])} ({row['seconds']['n']} visits)"]
    if row["of_copy"]:
        told.append(f"{row['of_copy']:.0%} of copying")
    if row["of_matrix"]:
        told.append(f"{row['of_matrix']:.0%} of multiplying")
    if row.get("tokens_per_s"):
        told.append(f"{row['tokens_per_s']:,.0f} tokens/s")
    if row.get("peak_bytes") is not None:
        told.append(f"{size(row['peak_bytes'])} added")
    if row["times"]:
        told.append(f"{row['times']['median']:.2f} x {row['times']['rival']}")
    for one in row["others"]:
        told.append(f"{one['name']} {one['failed'] or duration(one['seconds']['median'])}")
    if row.get("note"):
        told.append(row["note"])
    check = row["check"]
    if check is not None:
        worst = max(check["errors"].values())
        told.append(
            f"{'check' if check['passed'] else 'WRONG:'} {worst:.1e} (allowed {check['tolerance']:.1e})"
        )
    return ", ".join(told)
