"""A result of `eval.peers.measure` as Markdown."""

from collections.abc import Callable, Iterable

from eval.markup import count, size

HEADS = {
    "decode": ("ms per step", "tokens per s", "RMS from float32"),
    "prefill": ("s", "tokens per s"),
    "training": ("s per step",),
    "scan_2d": ("ms", "memory added"),
    "context": ("ms per token", "state"),
}


def to_markdown(result: dict) -> str:
    """The whole result: a table and the ratios of each contest, then what it was measured on and how."""
    parts = ["# Measured beside others", _summary(result)]
    for name, contest in result["contests"].items():
        parts += [f"## {contest['title']}", _table(name, contest["rows"])]
        if contest["ratios"]:
            parts.append(_ratio_table(contest["ratios"]))
        parts += _remarks(contest["rows"])
    parts += ["## How", _protocol(result), "## Measured on", _machine(result)]
    return "\n\n".join(parts) + "\n"


def to_summary(result: dict) -> str:
    """The ratios of each contest, and what they were measured on."""
    environment, settings = result["environment"], result["settings"]
    machine = f"{count(environment['cores'], 'core')} of {environment['cpu']}"
    intro = (
        f"Preset {settings['preset']}, {count(settings['threads'], 'thread')} for every contestant, on "
        f"{machine} that reads {result['machine']['read_bytes_per_s'] / 1e9:.1f} GB/s and multiplies "
        + ", ".join(
            f"{value / 1e9:.0f} GFLOP/s in {name}"
            for name, value in result["machine"]["gemm_flops_per_s"].items()
        )
        + f"; commit {environment['commit'] or 'unknown'}. {_summary(result)}"
    )
    parts = [intro]
    for contest in result["contests"].values():
        if contest["ratios"]:
            parts += [f"{contest['title']}:", _ratio_table(contest["ratios"])]
    return "\n\n".join(parts) + "\n"


def ratio_line(ratio: dict) -> str:
    """One line that states a ratio."""
    low, times, high = (short(ratio[key]) for key in ("low", "times", "high"))
    return f"{ratio['what']}: {times} times ({low} to {high})"


def failed_checks(result: dict) -> list[str]:
    """A line for each row whose answers are not those of the reference."""
    lines = []
    for contest in result["contests"].values():
        for row in contest["rows"]:
            if row["check"] and not row["check"]["passed"]:
                errors = ", ".join(f"{what} {error:.2g}" for what, error in row["check"]["errors"].items())
                lines.append(f"{row['name']}: {errors} (allowed {row['check']['tolerance']:g})")
    return lines


def _summary(result: dict) -> str:
    wrong = failed_checks(result)
    if wrong:
        return "**These rows give wrong answers, their speeds mean nothing:** " + "; ".join(wrong)
    return "Every row's answers agree with the reference, as said in its last column."


def _table(name: str, rows: list[dict]) -> str:
    columns: dict[str, Callable[[dict], str]] = {
        "ms": lambda row: _time(row, 1e3),
        "s": lambda row: _time(row, 1.0),
        "ms per step": lambda row: _time(row, 1e3),
        "ms per token": lambda row: _time(row, 1e3),
        "s per step": lambda row: _time(row, 1.0),
        "tokens per s": _rate,
        "RMS from float32": lambda row: _number(row.get("float32_distance")),
        "memory added": lambda row: _size(row.get("peak_bytes")),
        "state": lambda row: _size(row.get("state_bytes")),
    }
    heads = HEADS[name]
    cells = [
        [
            row["name"],
            *(columns[head](row) for head in heads),
            f"{row['roofline']:.0%}" if row["roofline"] else "",
            _visits(row),
            _check(row),
        ]
        for row in rows
    ]
    table = [["", *heads, "of roofline", "visits", "check"], *cells]
    if not any(row["roofline"] for row in rows):
        table = [line[: len(heads) + 1] + line[len(heads) + 2 :] for line in table]
    return _markdown(table)


def _ratio_table(ratios: list[dict]) -> str:
    lines = [["times as fast", "median", "from quartiles", "ours", "other"]]
    for ratio in ratios:
        span = f"{short(ratio['low'])} to {short(ratio['high'])}"
        lines.append([ratio["what"], short(ratio["times"]), span, ratio["ours"], ratio["other"]])
    return _markdown(lines)


def _markdown(lines: Iterable[list[str]]) -> str:
    head, *rest = lines
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, rule, *rest))


def _remarks(rows: list[dict]) -> list[str]:
    told = {
        "Without warm-up, too slow for a visit that does not count": lambda row: not row["warmed_up"],
        "Memory not known, too slow or too large in a process of its own": lambda row: (
            "peak_bytes" in row and row["peak_bytes"] is None
        ),
    }
    remarks = []
    for remark, holds in told.items():
        names = [row["name"] for row in rows if row["seconds"] and holds(row)]
        remarks += [f"{remark}: {'; '.join(names)}."] if names else []
    return remarks


def _time(row: dict, scale: float) -> str:
    if not row["seconds"]:
        return row["failed"] or ""
    q1, median, q3 = (short(scale * row["seconds"][key]) for key in ("q1", "median", "q3"))
    return f"{median} ({q1} to {q3})" if row["seconds"]["n"] > 1 else median


def _rate(row: dict) -> str:
    """Tokens a second: of a batch when decoding, of a prompt when reading."""
    work = row.get("tokens") or row.get("batch", 1)
    return short(work / row["seconds"]["median"]) if row["seconds"] else ""


def _visits(row: dict) -> str:
    visits = row["seconds"]["n"] if row["seconds"] else 0
    return f"{visits}, then {row['failed']}" if visits and row["failed"] else str(visits)


def _check(row: dict) -> str:
    check = row["check"]
    if check is None:
        return ""
    worst = max(check["errors"].values())
    return f"{'' if check['passed'] else '**WRONG** '}{worst:.1e}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _size(value: int | None) -> str:
    return "" if value is None else size(value)


def short(value: float) -> str:
    """Three digits, as many decimals as that takes."""
    if value < 0.1:
        return f"{value:.3g}"
    decimals = 0 if value >= 100 else 1 if value >= 10 else 2 if value >= 1 else 3
    return f"{value:,.{decimals}f}"


def _protocol(result: dict) -> str:
    settings = result["settings"]
    parameters = "; ".join(f"{name} {number:,}" for name, number in result["parameters"].items())
    return (
        f"Random weights of the preset {settings['preset']}, the same for every Mamba-2; parameters: "
        f"{parameters}. {count(settings['threads'], 'thread')} for every contestant. After a visit that "
        f"warms up, {count(settings['rounds'], 'round')} in which all take turns; medians, quartiles in "
        f"brackets. A decoding visit is the median of {settings['decode_tokens']} greedy tokens after "
        f"{settings['warmup_tokens']} of warm-up. A contestant has {settings['budget_s']:.0f} s in each "
        "contest, so the slow have fewer visits. The process keeps freed memory (glibc), for all alike. "
        "transformers runs its own torch code, as it does without a GPU, with its default cache; llama.cpp's "
        "q8_0 and q4_0 are of every matrix, the head too, as ours. "
        "The roofline of decoding is weights and state over the read bandwidth (over 100% where they stay in "
        "caches), of the rest operations over the fastest matrix product in that dtype or in float32. The "
        "check is the RMS of the difference from ours in float32, for 8 and 4 bits with the weights rounded "
        "likewise; of the Llama, from its own float32; of the scan, from the published recurrence."
    )


def _machine(result: dict) -> str:
    environment, machine = result["environment"], result["machine"]
    flops = machine["gemm_flops_per_s"]
    versions = ", ".join(f"{package} {version}" for package, version in environment["versions"].items())
    compiled = [op for op, how in environment["backend"].items() if how["cpu"] == "compiled"]
    lines = [
        f"{count(environment['cores'], 'core')} of {environment['cpu']}, {size(environment['memory_bytes'])} "
        f"of memory; {environment['system']}, Python {environment['python']}, {versions}; "
        f"commit {environment['commit'] or 'unknown'}",
        f"reads {machine['read_bytes_per_s'] / 1e9:.1f} GB/s; products of matrices "
        + ", ".join(f"{name} {short(value / 1e9)} GFLOP/s" for name, value in flops.items()),
        f"load average before the run: {result['load_before']:.1f} (another process slows everything)",
        f"our compiled operators: {', '.join(compiled) or 'none'}",
    ]
    if result["llama_cpp"]:
        lines.append(f"llama.cpp was compiled for: {result['llama_cpp']}")
    return "\n".join(f"- {line}" for line in lines)
