"""mamba_ssm's public entry points, from the archive in benchmarks/peers that `build_peers` has built.

Its package as a whole imports much that these two functions do not need (tilelang, transformers), so their
modules are imported alone, under a package of the same name.
"""

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path

ARCHIVES = Path("benchmarks/peers")  # filled by `make gpu-peers`
BUILT = Path("build/peers-gpu")
ENTRIES = {
    "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
}


class MissingRivalError(Exception):
    """A rival cannot be measured; the message says why."""


def entry(name: str) -> Callable:
    """A function of ENTRIES.

    Raises:
        MissingRivalError: if it is neither built nor installed, or does not import here.
    """
    try:
        _make_importable()
        return getattr(importlib.import_module(ENTRIES[name]), name)
    except MissingRivalError:
        raise
    except Exception as error:  # of any kind: another version of torch or triton, an unresolved symbol
        raise MissingRivalError(f"{name} does not import: {type(error).__name__}: {error}"[:300]) from error


def _make_importable() -> None:
    if "mamba_ssm" in sys.modules:
        return
    sources = sorted(BUILT.glob("mamba_ssm-*/mamba_ssm"))
    if not sources:
        try:
            import mamba_ssm  # noqa: F401 (installed)
        except ImportError:
            raise MissingRivalError("mamba_ssm is neither built (part peers) nor installed") from None
        return
    extra = [str(folder.parent.resolve()) for folder in sources[-1:]]  # the compiled module lies beside it
    extra += [str(folder.resolve()) for folder in BUILT.glob("causal_conv1d-*")]
    extra += [str(wheel.resolve()) for wheel in ARCHIVES.glob("einops-*.whl")]
    sys.path += extra
    package = types.ModuleType("mamba_ssm")
    package.__path__ = [str(sources[-1].resolve())]
    sys.modules["mamba_ssm"] = package
