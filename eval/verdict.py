"""What the demo set out to show, and whether its numbers show it: claims computed from report.json,
never typed in."""

from eval.efficiency import crossover_sentence
from eval.markup import size

OVERALL_TARGET = 0.85  # of all questions on unseen scans
ABOVE_CONTROL = 0.30  # overall, over the blank-image control
MEMORY = 8 << 30  # bytes, for every step of the demo
FLAT_DECODE = 0.10  # time per token at the longest context against the shortest


def verdict(report: dict) -> list[dict]:
    """Judges a report.

    Args:
        report: with accuracy, comparison, efficiency and models as `eval.report.collect` makes
            them.
    Returns:
        Rows {"claim", "measured", "reached"}; reached is True, False, or None for a finding that
        has no target.
    """
    names = {key: model["name"] for key, model in report["models"].items()}
    rows = []
    for key, result in report["accuracy"].items():
        rows += _accuracy_claims(names[key], result)
    rows.append(_comparison(names, report["comparison"]))
    rows += _efficiency_claims(names, report["models"], report["efficiency"])
    peak = report["peak_rss_bytes"]
    rows.append(
        _row(
            "8 GiB of memory are enough for the demo",
            f"at most {size(peak)} were taken at a time",
            peak <= MEMORY,
        )
    )
    return rows


def _row(claim: str, measured: str, reached: bool | None) -> dict:
    return {"claim": claim, "measured": measured, "reached": reached}


def _accuracy_claims(name: str, result: dict) -> list[dict]:
    seen, blank = result["questions"], result["control"]
    gain = seen["accuracy"] - blank["accuracy"]
    low, high = seen["interval"]
    kinds = seen["groups"]
    overlapping = [
        kind for kind in kinds if kinds[kind]["interval"][0] <= blank["groups"][kind]["interval"][1]
    ]
    separate = f"not so: {', '.join(overlapping)}" if overlapping else f"all {len(kinds)} kinds"
    return [
        _row(
            f"{name} answers at least {OVERALL_TARGET:.0%} of all questions on unseen scans",
            f"{seen['accuracy']:.1%} of {seen['count']:,} ({low:.1%} to {high:.1%})",
            seen["accuracy"] >= OVERALL_TARGET,
        ),
        _row(
            f"{name} is at least {100 * ABOVE_CONTROL:.0f} points above its blank-image control",
            f"{100 * gain:+.1f} points ({blank['accuracy']:.1%} with a black image)",
            gain >= ABOVE_CONTROL,
        ),
        _row(
            f"{name}: every kind of question above its own control, 95 percent intervals apart",
            separate,
            not overlapping,
        ),
    ]


CLAIM = "Which of these two models answers better (one seed of training each; other seeds move both by some points)"


def _comparison(names: dict[str, str], comparison: dict) -> dict:
    """Which model answers better: the paired difference over the same questions. Its interval is of the questions, for
    these two models; it does not know how other seeds of training would have come out."""
    first, second = names[comparison["first"]], names[comparison["second"]]
    difference, low, high = (100 * comparison[key] for key in ("difference", "low", "high"))
    interval = (
        f"{abs(difference):.1f} points "
        f"(95 percent interval of the paired difference {low:+.1f} to {high:+.1f})"
    )
    if low > 0 or high < 0:
        better, worse = (first, second) if difference > 0 else (second, first)
        return _row(CLAIM, f"{better} is better than {worse} by {interval}", None)
    return _row(
        CLAIM,
        f"no difference that {comparison['n']:,} questions can tell: {interval}",
        None,
    )


def _efficiency_claims(names: dict[str, str], models: dict, efficiency: dict) -> list[dict]:
    rows = []
    for key, result in efficiency["models"].items():
        first, last = result["points"][0], result["points"][-1]
        if models[key]["constant_state"]:
            ratio = last["decode_s"]["median"] / first["decode_s"]["median"] - 1
            same = len({point["state_bytes"] for point in result["points"]}) == 1
            span = f"{first['context']:,} to {last['context']:,} tokens of context"
            times = f"{_ms(first)} to {_ms(last)} ms per token"
            claim = f"{names[key]}: time per token within {FLAT_DECODE:.0%} from {span}"
            rows.append(_row(claim, f"{ratio:+.1%} ({times})", abs(ratio) <= FLAT_DECODE))
            sizes = " and ".join(f"{size:,}" for size in sorted({first["state_bytes"], last["state_bytes"]}))
            rows.append(
                _row(
                    f"{names[key]}: the state has the same size at every length",
                    f"{sizes} bytes",
                    same,
                )
            )
        check = result["check"]
        worst = max(check["errors"].values())
        claim = f"{names[key]}: decoding gives the logits of one forward over the whole sequence"
        rows.append(
            _row(
                claim,
                f"largest error {worst:.1e}, allowed {check['tolerance']:.0e}",
                check["passed"],
            )
        )
    for crossover in efficiency["crossovers"]:
        named = crossover | {
            "first": names[crossover["first"]],
            "second": names[crossover["second"]],
        }
        rows.append(_row("Where the decode curves cross", crossover_sentence(named), None))
    return rows


def _ms(point: dict) -> str:
    time = point["decode_s"]
    return f"{1e3 * time['median']:.2f} (quartiles {1e3 * time['q1']:.2f}, {1e3 * time['q3']:.2f})"
