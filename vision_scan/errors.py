"""The error that callers are meant to read, and what raises it: look-ups and command lines."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Mapping
from typing import NoReturn, TypeVar

T = TypeVar("T")


class UserError(ValueError):
    """A mistake of the caller: one line that says what was given, what is allowed, what to do."""


class CommandParser(argparse.ArgumentParser):
    """Reports a mistake on the command line like any other mistake: in one line."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def choose(kind: str, name: str, table: Mapping[str, T]) -> T:
    """Look a name up in a table of choices.

    Args:
        kind: what the table lists, as it should read in the message: "scan order", "connector".
        name: the exact key.
        table: the choices.
    Returns:
        table[name].
    Raises:
        UserError: if the name is not in the table; names the nearest key and all keys.
    """
    if isinstance(name, str) and name in table:
        return table[name]
    nearest = difflib.get_close_matches(str(name).lower(), table, n=1)
    hint = f" did you mean {nearest[0]!r}?" if nearest else ""
    raise UserError(f"unknown {kind} {name!r};{hint} allowed: {', '.join(table)}")
