"""Compiles and links csrc/cuda, which needs nvcc and no GPU, and tells what each kernel takes for each
target: registers, spilled bytes, stack and shared memory. The compiler's output stays beside what it made.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from eval.files import write_json
from vision_scan.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
LOG = "compile.log"
_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(\w+)'")
_PROPERTIES = re.compile(r"Function properties for (\w+)")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


def run(build: Path, archs: str) -> int:
    """Compiles, and prints the table: 0 done, 1 if it does not compile or link.

    Raises:
        UserError: without nvcc.
    """
    try:
        log = compile_kernels(build, archs)
    except subprocess.CalledProcessError as error:
        sys.stderr.write(f"{error.stderr}failed: csrc/cuda does not compile or link\n")
        return 1
    kernels = parse(log.splitlines())
    write_json(build / "kernels.json", kernels)
    sys.stdout.write(f"{table(kernels)}\n{build / LOG}\n")
    return 0


def compile_kernels(build: Path, archs: str) -> str:
    """Compiles everything anew, so that the log has every kernel: that log.

    Raises:
        UserError: if there is no nvcc; CalledProcessError: if it fails, with the log as `stderr`.
    """
    if shutil.which("nvcc") is None and "CUDA_HOME" not in os.environ:
        raise UserError("nvcc is not here: install the CUDA toolkit, or set CUDA_HOME to where it is")
    shutil.rmtree(build, ignore_errors=True)
    build.mkdir(parents=True)
    command = [sys.executable, "setup.py", "build_ext"]
    command += ["--build-lib", str(build.resolve()), "--build-temp", str(build.resolve() / "temp")]
    environment = os.environ | {"COBRA_CUDA": "only", "COBRA_CUDA_ARCHS": archs}
    path = build / LOG
    with path.open("w") as log:
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=log, stderr=log, check=False)
    text = path.read_text(errors="replace")
    if done.returncode:
        raise subprocess.CalledProcessError(done.returncode, command, stderr=text)
    return text


def parse(lines: Iterable[str]) -> list[dict]:
    """Kernels in the output of `nvcc -Xptxas -v`: dicts of kernel, target, registers, spill_bytes (stored and
    loaded), stack_bytes, shared_bytes (static; what a launch asks for is not in it)."""
    kernels: list[dict] = []
    function = ""
    for line in lines:
        if found := _ENTRY.search(line):
            kernels.append(
                {"kernel": found[1], "target": found[2], "registers": 0, "spill_bytes": 0, "stack_bytes": 0}
                | {"shared_bytes": 0}
            )
            function = found[1]
        elif found := _PROPERTIES.search(line):
            function = found[1]
        elif not kernels or function != kernels[-1]["kernel"]:
            continue  # a function that a kernel calls
        elif found := _STACK.search(line):
            kernels[-1]["stack_bytes"] = int(found[1])
            kernels[-1]["spill_bytes"] = int(found[2]) + int(found[3])
        elif found := _USED.search(line):
            kernels[-1]["registers"] = int(found[1])
            shared = _SHARED.search(line)
            kernels[-1]["shared_bytes"] = int(shared[1]) if shared else 0
    names = demangle([kernel["kernel"] for kernel in kernels])
    for kernel, name in zip(kernels, names, strict=True):
        kernel["kernel"] = name
    return sorted(kernels, key=lambda kernel: (kernel["kernel"], kernel["target"]))


def demangle(names: list[str]) -> list[str]:
    """C++ names without their arguments and our namespace; as they are where c++filt is missing."""
    if not names or shutil.which("c++filt") is None:
        return names
    told = subprocess.run(["c++filt", "-p", *names], capture_output=True, text=True, check=True).stdout
    return [re.sub(r"^void |vision_scan::", "", name) for name in told.splitlines()]


def table(kernels: list[dict]) -> str:
    """A line for each kernel and target, spills marked."""
    if not kernels:
        return "no kernels"
    width = max(len(kernel["kernel"]) for kernel in kernels)
    lines = [f"{'kernel':<{width}}  target   registers  spilled  stack  shared"]
    for kernel in kernels:
        mark = "  <- spills" if kernel["spill_bytes"] else ""
        lines.append(
            f"{kernel['kernel']:<{width}}  {kernel['target']:<7}  {kernel['registers']:>9}  "
            f"{kernel['spill_bytes']:>7}  {kernel['stack_bytes']:>5}  {kernel['shared_bytes']:>6}{mark}"
        )
    spilling = sum(bool(kernel["spill_bytes"]) for kernel in kernels)
    return "\n".join([*lines, f"{len(kernels)} kernels, {spilling} of them spill"])
