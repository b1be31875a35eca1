"""What the GPU side has to reach, and whether measurements do."""

from collections.abc import Mapping
from dataclasses import dataclass

PASSES = ("forward", "forward + backward")
D_STATES = (1, 16)
MAMBA, TRANSFORMER, TRAINED = "mamba2-2.7b", "transformer-2.7b", "mamba2-1.3b"
CONTEXTS = tuple(1024 << i for i in range(8))  # 1k to 128k
PREFILLS = (8192, 131072)


def scan_2d_name(d_state: int, passes: str) -> str:
    return f"2-D selective scan, d_state {d_state}, {passes}"


def ssd_name(passes: str) -> str:
    return f"ssd, {passes}"


def delta_name(passes: str) -> str:
    return f"gated_delta_rule, {passes}"


def decode_name(preset: str, batch: int = 1, context: int | None = None, state: str = "") -> str:
    more = f", {context:,} tokens of context" if context is not None else ""
    return f"decode {preset}, batch {batch}{more}{state}"


def prefill_name(seqlen: int) -> str:
    return f"prefill {MAMBA}, {seqlen:,} tokens"


def train_name(batch: int) -> str:
    return f"training step {TRAINED}, batch {batch} x 2,048"


COMPACT = ", compact state"  # int8, or written every few steps


@dataclass(frozen=True, kw_only=True)
class Target:
    """A number of a measurement and its bound.

    Attributes:
        row: the name of the measurement.
        value: times | of_copy | of_matrix | tokens_per_s | peak_of_rival: which of its numbers.
        what: that number in words.
        bound: it must be at least, or with `at_most` at most, this; None: it is only told.
        aim: what would be better still.
    """

    row: str
    value: str
    what: str
    bound: float | None = None
    at_most: bool = False
    aim: float | None = None

    def asked(self) -> str:
        if self.bound is None:
            return ""
        aim = f" (aim {self.shown(self.aim)})" if self.aim is not None else ""
        return f"{'at most' if self.at_most else 'at least'} {self.shown(self.bound)}{aim}"

    def shown(self, value: float) -> str:
        if self.value in ("of_copy", "of_matrix"):
            return f"{value:.0%}"
        return f"{value:,.0f} tokens/s" if self.value == "tokens_per_s" else f"{value:.2f} x"


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """A target beside what was measured.

    Attributes:
        measured: in words; what kept it from being measured if `reached` is None and `value` too.
        value: the number, None if there is none.
        reached: None: not known, or nothing to reach.
    """

    measured: str
    value: float | None = None
    reached: bool | None = None


def _targets() -> list[Target]:
    found = []
    for d_state in D_STATES:
        for passes in PASSES:
            row = scan_2d_name(d_state, passes)
            what = "times as fast as mamba_ssm with explicit cross-scan and merge"
            found.append(Target(row=row, value="times", what=what, bound=2.0, aim=2.7))
    for passes in PASSES:
        row = scan_2d_name(1, passes)
        found.append(Target(row=row, value="of_copy", what="of the copy bandwidth", bound=0.65))
    for d_state in D_STATES:
        row = scan_2d_name(d_state, PASSES[1])
        what = "peak memory above inputs and gradients, of mamba_ssm's"
        found.append(Target(row=row, value="peak_of_rival", what=what, bound=0.4, at_most=True))
    what = "times as fast as mamba_chunk_scan_combined"
    found.append(Target(row=ssd_name(PASSES[0]), value="times", what=what, bound=1.0, aim=1.5))
    found.append(Target(row=ssd_name(PASSES[1]), value="times", what=what, bound=0.95))
    alone, many = decode_name(MAMBA), decode_name(MAMBA, 128)
    found += [
        Target(row=alone, value="tokens_per_s", what="tokens a second", bound=600),
        Target(row=alone, value="of_copy", what="of the copy bandwidth over weights and state"),
        Target(row=many, value="of_copy", what="of the copy bandwidth over weights and state", bound=0.75),
        Target(row=many, value="tokens_per_s", what="tokens a second"),
        Target(
            row=many + COMPACT, value="times", what="times as fast as with float32, written at every step",
            bound=1.3,
        ),
    ]  # fmt: skip
    for context in CONTEXTS:
        row = decode_name(TRANSFORMER, context=context)
        found.append(Target(row=row, value="tokens_per_s", what="tokens a second"))
    for seqlen in PREFILLS:
        row = prefill_name(seqlen)
        found.append(Target(row=row, value="of_matrix", what="of the bf16 matrix rate", bound=0.45))
    row = train_name(8)
    found.append(Target(row=row, value="of_matrix", what="of the bf16 matrix rate", bound=0.38))
    return found


TARGETS = _targets()


def judge(target: Target, measurements: Mapping[str, dict]) -> Verdict:
    """What measurements (name -> row) say of a target."""
    row = measurements.get(target.row)
    if row is None:
        return Verdict(measured="not measured yet")
    if row["seconds"] is None:
        return Verdict(measured=f"not measured: {row['failed'] or 'no visit'}")
    if not is_right(row):
        return Verdict(measured="**wrong results**", reached=False)
    number = row.get(target.value)
    value = number["median"] if isinstance(number, dict) else number
    if value is None:
        return Verdict(measured=f"not measured: {_why_not(row)}")
    span = f" ({number['low']:.2f} to {number['high']:.2f})" if isinstance(number, dict) else ""
    reached = None
    if target.bound is not None:
        reached = value <= target.bound if target.at_most else value >= target.bound
    return Verdict(measured=target.shown(value) + span, value=value, reached=reached)


def is_right(row: dict) -> bool:
    """Whether a measurement comes with a check of its results, which it passes."""
    return row["check"] is not None and row["check"]["passed"]


def _why_not(row: dict) -> str:
    rivals = [one for one in row["others"] if one["is_rival"]]
    if not rivals:
        return "no rival"
    wrong = [f"{one['name']} gives other results" for one in rivals if one["seconds"]]
    return "; ".join(wrong or [f"{one['name']}: {one['failed']}" for one in rivals])
