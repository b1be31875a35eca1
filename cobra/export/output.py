"""What a format of exported models is."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from cobra.convert.layout import Layout

from .language import Language

Advance = Callable[[int], object]


class Output(NamedTuple):
    """Files to be written.

    Attributes:
        nbytes: of the tensors.
        tokenizer: what becomes of it, in words.
        write: (where, is told of each further number of bytes) -> nothing.
    """

    nbytes: int
    tokenizer: str
    write: Callable[[Path, Advance], object]


class Format(NamedTuple):
    """A format.

    Attributes:
        dtypes: in which it can be written, the default first.
        plan: (what is exported, in which layout, one of the dtypes) -> what is written. It raises UserError on what
            the format cannot say.
    """

    dtypes: tuple[str, ...]
    plan: Callable[[Language, Layout, str], Output]
