"""HTML out of nested calls, escaped by construction, and numbers as people read them."""

from collections.abc import Iterable
from html import escape

VOID = ("br", "img", "meta")


class Markup(str):
    """Text that is HTML already; any other text is escaped where it enters a tag."""


def tag(name: str, /, *content: str, **attributes: str) -> Markup:
    """An element: tag("p", "a < b", class_="muted") is <p class="muted">a &lt; b</p>."""
    written = "".join(f' {key.rstrip("_")}="{escape(text)}"' for key, text in attributes.items())
    end = "" if name in VOID else f"</{name}>"
    return Markup(f"<{name}{written}>{join(content)}{end}")


def join(content: Iterable[str]) -> Markup:
    """Pieces one after the other, those that are not Markup escaped."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in content))


def section(title: str, lead: str, *content: str) -> Markup:
    """A titled part of the page with a sentence that introduces it."""
    intro = tag("p", lead, class_="muted") if lead else Markup()
    return tag("section", tag("h2", title), intro, *content)


def figure(drawing: str, caption: str = "") -> Markup:
    """An SVG drawing with its caption."""
    below = tag("figcaption", caption) if caption else Markup()
    return tag("figure", Markup(drawing), below)


def table(heads: list[str], rows: Iterable[list[str]]) -> Markup:
    """A table that scrolls sideways where the screen is narrow."""
    head = tag("tr", *(tag("th", cell) for cell in heads))
    body = (tag("tr", *(tag("td", cell) for cell in row)) for row in rows)
    return tag("div", tag("table", tag("thead", head), tag("tbody", *body)), class_="scroll")


def details(summary: str, *content: str, is_open: bool = False) -> Markup:
    """A part that folds."""
    attributes = {"open": ""} if is_open else {}
    return tag("details", tag("summary", summary), *content, **attributes)


def definitions(rows: Iterable[tuple[str, str]]) -> Markup:
    """A list of names and what they stand for."""
    return tag(
        "dl",
        *(tag(name, text) for row in rows for name, text in zip(("dt", "dd"), row, strict=True)),
    )


def seconds(value: float) -> str:
    """0.00123 -> 1.23 ms."""
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if value * factor >= 1:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e6:.3g} µs"


def size(num_bytes: float) -> str:
    """1234567 -> 1.23 MB."""
    for unit in ("B", "kB", "MB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} GB"


def duration(value: float) -> str:
    """131.2 -> 2 min 11 s."""
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def count(number: int, what: str) -> str:
    """3 rounds, 1 round, 16,384 tokens."""
    return f"{number:,} {what}{'' if number == 1 else 's'}"
