"""What this installation can do: `cobra doctor`."""

import platform
import re
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import torch

import vision_scan
from cobra.lm.precision import has_native_bf16

DISTRIBUTION = "cobra-vlm"
CORE = ("torch", "numpy", "pillow", "safetensors", "tokenizers")


def report() -> Iterator[str]:
    """The lines of the report: versions, devices, operators, optional packages, other `cobra`s."""
    yield f"cobra        {_version(DISTRIBUTION) or 'not installed, run from'} {_here()}"
    yield f"python       {platform.python_version()} on {platform.system()} {platform.machine()}"
    yield from (f"{name:<12} {_version(name) or 'missing: pip install ' + name}" for name in CORE)
    yield ""
    yield from _devices()
    yield ""
    yield from _operators()
    yield ""
    yield from _extras()
    others = list(shadows())
    yield ""
    yield "no other package named cobra" if not others else "other packages named cobra:"
    yield from (f"  {other}" for other in others)


def shadows() -> Iterator[str]:
    """Other packages and programs with the name `cobra`, which may be found instead of this one."""
    version = _version("cobra")
    if version:
        yield f"the distribution cobra {version} is another project: pip uninstall cobra"
    for folder in map(Path, dict.fromkeys(sys.path)):
        for other in (folder / "cobra" / "__init__.py", folder / "cobra.py"):
            if other.is_file() and other.resolve().parent != _here():
                yield f"{other} (on sys.path)"
    program, beside = shutil.which("cobra"), Path(sys.executable).parent
    if program and Path(program).parent.resolve() != beside.resolve():
        yield f"{program} is the program that the shell finds; this Python's own are in {beside}"


def _here() -> Path:
    return Path(__file__).resolve().parent


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> Iterator[str]:
    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    for name in names:
        what = f"{torch.get_num_threads()} threads" if name == "cpu" else torch.cuda.get_device_name(name)
        bf16 = "native bfloat16" if has_native_bf16(name) else "no native bfloat16, float32 is used"
        yield f"{name:<12} {what}, {bf16}"
    if len(names) == 1:
        yield "cuda         no GPU visible"


def _operators() -> Iterator[str]:
    yield f"{'operator':<24} {'cpu':<10} {'cuda':<10}"
    reasons = {}
    for name, entry in vision_scan.backend_report().items():
        yield f"{name:<24} {entry['cpu']:<10} {entry['cuda']:<10}"
        reasons.setdefault(entry["why"], []).append(name)
    for why, names in reasons.items():
        if why:
            yield f"{'all' if len(reasons) == 1 else ', '.join(names)}: {why}"


def _extras() -> Iterator[str]:
    """What is there of the packages that each extra asks for, by the installed project's own list."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        yield "optional packages: unknown, as cobra is not installed (pip install -e .)"
        return
    packages: dict[str, list[str]] = {}
    for requirement in requirements:
        parts = re.match(r"([\w.-]+)[^;\[]*;.*extra == ['\"]([\w-]+)", requirement)
        if parts:
            packages.setdefault(parts[2], []).append(parts[1])
    for extra, names in packages.items():
        present = [f"{name} {_version(name)}" for name in names if _version(name)]
        missing = [name for name in names if not _version(name)]
        if missing:
            present.append(f"missing: {' '.join(missing)} (pip install '{DISTRIBUTION}[{extra}]')")
        yield f"{extra:<12} {', '.join(present)}"
