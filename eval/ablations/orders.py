"""Scan orders of one's own: a Python file that is run in every process of a study."""

import importlib.util
import sys
from pathlib import Path

from eval.files import write_text
from vision_scan import SCAN_ORDERS
from vision_scan.errors import UserError

KEPT = "orders.py"  # of a study's output


def load(file: Path) -> None:
    """Runs a file that adds lines to SCAN_ORDERS, unless this process has run it already.

    Raises:
        UserError: if it cannot be read, fails, or changes an order that there is.
    """
    name = f"scan orders of {file.resolve()}"
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None or not file.is_file():
        raise UserError(f"--orders {file}: no such file, or no .py; give one that adds to vision_scan.SCAN_ORDERS")
    before = dict(SCAN_ORDERS)
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise UserError(f"--orders {file}: {type(error).__name__}: {error}".replace("\n", " ")) from error
    changed = [name for name, make in before.items() if SCAN_ORDERS.get(name) is not make]
    if changed:
        SCAN_ORDERS.update(before)
        raise UserError(f"--orders {file}: {', '.join(changed)} is an order already; take another name")


def keep(file: Path, output: Path) -> None:
    """Copies a file of orders into a study's folder, where its processes find it.

    Raises:
        UserError: if the folder has results of another file.
    """
    text, kept = file.read_text(encoding="utf-8"), output / KEPT
    if kept.exists() and kept.read_text(encoding="utf-8") != text:
        raise UserError(f"{output} holds results of other orders than those of {file} ({kept}); name another --output")
    write_text(kept, text)


def load_kept(output: Path) -> None:
    """Runs the file of a study's folder, if it has one."""
    if (output / KEPT).exists():
        load(output / KEPT)
