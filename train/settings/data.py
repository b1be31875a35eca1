"""Which rows are learned, and which are held out."""

from dataclasses import dataclass
from typing import Literal

from .require import require


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Rows and the folder of their images."""

    path: str | None = None
    """A .json list or a .jsonl file of rows, tar shards (a file, a folder, a pattern), or a .yaml mixture; has to be
    set."""
    image_root: str | None = None
    """The folder that image paths start from; None: the folder of `path`."""
    check: Literal["headers", "full", "none"] = "headers"
    """What is read of every image before the first step: its header, all of it, or nothing."""
    skip_bad: bool = False
    """Leave out rows that cannot be used, and count them, rather than stop."""
    max_tokens: int | None = None
    """Longer rows lose their last exchanges, images included; None: rows of any length."""
    captions: bool = False
    """Each row is images and a text, learned right behind them: no question, no chat template (LLaVA's "plain")."""
    packing: bool = False
    """Put the rows of a micro-batch one behind the other, the state reset between them, rather than pad them."""
    length_group: int = 16
    """Batches whose rows are sorted by length together, so that rows of a batch are of similar
    length."""
    frames: int = 8
    """Frames taken of a video, evenly spread."""
    workers: int | None = None
    """Processes that make batches ahead; None: none on a CPU, 4 with a GPU."""

    def __post_init__(self) -> None:
        for name in ("length_group", "frames"):
            require(getattr(self, name) >= 1, f"data.{name}: got {getattr(self, name)}, allowed: 1 or more")
        require(
            self.max_tokens is None or self.max_tokens >= 2,
            f"data.max_tokens: got {self.max_tokens}, allowed: 2 or more, or none",
        )
        require(
            self.workers is None or self.workers >= 0,
            f"data.workers: got {self.workers}, allowed: 0 or more, or none",
        )


@dataclass(frozen=True, kw_only=True)
class ValSettings:
    """Held-out rows, on which nothing is learned."""

    path: str | None = None
    """A file of rows as `data.path`; None: no validation."""
    image_root: str | None = None
    """The folder that their image paths start from; None: the folder of `path`."""
    every: int = 500
    """Steps between validations; the last step is always followed by one."""
    rows: int | None = 1000
    """Rows at most, chosen once and for all; None: all of them."""
    samples: int = 0
    """Rows whose first question is answered each time."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"val.every: got {self.every}, allowed: 1 or more")
        require(self.rows is None or self.rows >= 1, f"val.rows: got {self.rows}, allowed: 1 or more, or none")
        require(self.samples >= 0, f"val.samples: got {self.samples}, allowed: 0 or more")
