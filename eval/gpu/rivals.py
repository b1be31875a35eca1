"""Public entry points of mamba_ssm and fla, from what `build_peers` has made of the archives in benchmarks/peers.

mamba_ssm as a whole imports much that its two functions do not need (tilelang, transformers), so their modules are
imported alone, under a package of the same name.
"""

import importlib
import importlib.util
import sys
import types
from collections.abc import Callable
from pathlib import Path

ARCHIVES = Path("benchmarks/peers")  # filled by `make gpu-peers`
BUILT = Path("build/peers-gpu")
ENTRIES = {
    "selective_scan_fn": "mamba_ssm.ops.selective_scan_interface",
    "mamba_chunk_scan_combined": "mamba_ssm.ops.triton.ssd_combined",
    "chunk_gated_delta_rule": "fla.ops.gated_delta_rule",
}
SOURCES = {"mamba_ssm": "mamba_ssm-*/mamba_ssm", "fla": "fla_core-*/fla"}  # of packages, in BUILT


class MissingRivalError(Exception):
    """A rival cannot be measured; the message says why."""


def entry(name: str) -> Callable:
    """A function of ENTRIES.

    Raises:
        MissingRivalError: if it is neither built nor installed, or does not import here.
    """
    try:
        _make_importable(ENTRIES[name].split(".")[0])
        return getattr(importlib.import_module(ENTRIES[name]), name)
    except MissingRivalError:
        raise
    except Exception as error:  # of any kind: another version of torch or triton, an unresolved symbol
        raise MissingRivalError(f"{name} does not import: {type(error).__name__}: {error}"[:300]) from error


def _make_importable(package: str) -> None:
    if package in sys.modules:
        return
    sources = sorted(BUILT.glob(SOURCES[package]))
    if not sources:
        if importlib.util.find_spec(package) is None:
            raise MissingRivalError(f"{package} is neither built (part peers) nor installed")
        return
    extra = [str(folder.parent.resolve()) for folder in sources[-1:]]  # the compiled module lies beside it
    extra += [str(folder.resolve()) for folder in BUILT.glob("causal_conv1d-*")]
    extra += [str(wheel.resolve()) for wheel in ARCHIVES.glob("einops-*.whl")]
    sys.path += extra
    if package == "mamba_ssm":
        module = types.ModuleType(package)
        module.__path__ = [str(sources[-1].resolve())]
        sys.modules[package] = module
