"""The parts that run other programs: building, the rivals' archives, the tests, the sanitizer."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch

from eval.gpu import rivals
from eval.gpu.compile_report import parse, table
from eval.gpu.results import Results

ROOT = Path(__file__).resolve().parents[2]
TESTS = (
    "tests/vision_scan/cuda",
    "tests/vision_scan/test_ops.py",
    "tests/vision_scan/test_ops_2d.py",
    "tests/vision_scan/test_ops_update.py",
    "tests/vision_scan/test_ops_register.py",
    "tests/vision_scan/test_reference.py",
    "tests/vision_scan/test_compiled.py",
    "tests/cobra/test_lm_laws.py",
    "tests/cobra/test_decode.py",
    "tests/cobra/test_oracles.py",
)
TOOLS = ("memcheck", "racecheck")
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|errors?)\b")


class FailedPartError(Exception):
    """A part that ended badly; the message is its note."""


def run(
    command: list[str], log: Path, environment: Mapping[str, str] | None = None, cwd: Path = ROOT
) -> tuple[int, str]:
    """Runs a program with its output in a file: exit status and output. It ends with this process group."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        done = subprocess.run(
            command,
            cwd=cwd,
            env=os.environ | dict(environment or {}),
            stdout=out,
            stderr=subprocess.STDOUT,
            check=False,
        )
    return done.returncode, log.read_text(errors="replace")


def last_lines(text: str, count: int = 5) -> str:
    return " | ".join(line.strip() for line in text.strip().splitlines()[-count:])[-600:]


def jobs() -> dict[str, str]:
    return {"MAX_JOBS": os.environ.get("MAX_JOBS", str(min(16, os.cpu_count() or 1)))}


def build(results: Results, logs: Path) -> None:
    """Both kernel sets, for the card at hand, beside the sources."""
    command = [sys.executable, "setup.py", "build_ext", "--inplace"]
    status, text = run(command, logs / "build.log", jobs() | {"COBRA_CUDA": "1"})
    kernels = parse(text.splitlines())
    if kernels:
        sys.stdout.write(table(kernels) + "\n")
        results.note("build", kernels=kernels)
    if status:
        raise FailedPartError(f"setup.py build_ext: {last_lines(text)}")


def build_peers(results: Results, logs: Path) -> None:
    """mamba_ssm and causal_conv1d out of their archives, for the card at hand; what is built already stays,
    and a build that was stopped goes on. fla is unpacked alone: Triton compiles it as it runs."""
    for wheel in sorted(rivals.ARCHIVES.glob("fla_core-*.whl")):
        unpack_wheel(wheel, rivals.BUILT)
    archives = sorted(rivals.ARCHIVES.glob("*.tar.gz"))
    if not archives:
        raise FailedPartError(
            f"no archives in {rivals.ARCHIVES}: make gpu-peers fetches them where there is a network"
        )
    major, minor = torch.cuda.get_device_capability()
    environment = jobs() | {
        "TORCH_CUDA_ARCH_LIST": f"{major}.{minor}",
        "MAMBA_FORCE_BUILD": "TRUE",
        "CAUSAL_CONV1D_FORCE_BUILD": "TRUE",
    }
    failed = []
    for archive in reversed(archives):  # mamba_ssm first
        folder = unpack(archive, rivals.BUILT)
        start = time.perf_counter()
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        status, text = run(command, logs / f"{folder.name}.log", environment, cwd=folder)
        results.note("peers", **{folder.name: {"status": status, "seconds": time.perf_counter() - start}})
        if status:
            failed.append(f"{folder.name}: {last_lines(text)}")
    if failed:
        raise FailedPartError("; ".join(failed))


def unpack(archive: Path, into: Path) -> Path:
    """The archive's folder, unpacked if it is not there yet.

    Their setup.py names every GPU that the compiler knows; without those names it is TORCH_CUDA_ARCH_LIST
    that counts, and a build takes a tenth of the time.
    """
    folder = into / archive.name.removesuffix(".tar.gz")
    if not folder.exists():
        partial = into / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with tarfile.open(archive) as tar:
            tar.extractall(partial, filter="data")
        setup = partial / folder.name / "setup.py"
        setup.write_text(without_targets(setup.read_text()))
        (partial / folder.name).rename(folder)
        shutil.rmtree(partial)
    return folder


def unpack_wheel(wheel: Path, into: Path) -> Path:
    """The folder of a wheel without compiled parts, unpacked if it is not there yet."""
    folder = into / wheel.name.removesuffix("-py3-none-any.whl")
    if not folder.exists():
        partial = into / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(partial)
        partial.rename(folder)
    return folder


def without_targets(setup: str) -> str:
    """A setup.py without its own `-gencode` flags."""
    return re.sub(r'cc_flag\.append\("(?:-gencode|arch=[^"]*)"\)', "pass", setup)


def test(results: Results, logs: Path, files: Iterable[str] = TESTS) -> None:
    """The operators' and the models' tests on the GPU, a file at a time, so that those count which are done
    when the time is up."""
    counts: dict[str, dict[str, int]] = {}
    wrong = []
    for file in files:
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short", "-rf", file]
        status, text = run(command, logs / f"test-{Path(file).stem}.log", {"COBRA_TEST_DEVICE": "cuda"})
        counts[file] = count_tests(text)
        failures = [
            line.removeprefix("FAILED ")[:200] for line in text.splitlines() if line.startswith("FAILED ")
        ]
        results.note(
            "test", files=counts, failures=[*results.content["parts"]["test"].get("failures", []), *failures]
        )
        sys.stdout.write(f"{file}: {counts[file]}\n")
        if status not in (0, 5):  # 5: nothing in it to run
            wrong.append(f"{file} ({counts[file].get('failed', 0)} failed, status {status})")
    total = {
        kind: sum(one.get(kind, 0) for one in counts.values()) for kind in ("passed", "failed", "skipped")
    }
    results.note("test", **total)
    if wrong:
        raise FailedPartError("; ".join(wrong))


def count_tests(text: str) -> dict[str, int]:
    """passed, failed, skipped and errors in the last line of pytest."""
    last = [line for line in text.splitlines() if _COUNT.search(line)][-1:]
    return {
        kind.rstrip("s") if kind == "errors" else kind: int(n) for n, kind in _COUNT.findall("".join(last))
    }


def sanitize(results: Results, logs: Path) -> None:
    """compute-sanitizer over `eval.gpu.small_shapes`."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        results.note("sanitize", note="not available: compute-sanitizer is not here")
        return
    wrong = []
    for name in TOOLS:
        command = [
            tool,
            "--tool",
            name,
            "--error-exitcode",
            "9",
            sys.executable,
            "-m",
            "eval.gpu.small_shapes",
        ]
        # With torch's cache an access behind a tensor would still hit memory of the process.
        _, text = run(command, logs / f"{name}.log", {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        found = sanitizer_verdict(text)
        results.note("sanitize", **{name: found})
        sys.stdout.write(f"{name}: {found}\n")
        if not found.startswith(("no errors", "not available")):
            wrong.append(f"{name}: {found}")
    if wrong:
        raise FailedPartError("; ".join(wrong))


def sanitizer_verdict(text: str) -> str:
    """What the output of compute-sanitizer says: no errors, how many, or why it could not work."""
    lines = [line.strip("= ") for line in text.splitlines()]
    if any("not supported" in line or "Unable to" in line for line in lines):
        return (
            f"not available: {next(line for line in lines if 'not supported' in line or 'Unable to' in line)}"
        )
    summaries = [re.search(r"SUMMARY: (\d+)", line) for line in lines]
    errors = sum(int(found[1]) for found in summaries if found)
    if errors:
        first = next((line for line in lines if "Invalid" in line or "hazard" in line or "Error" in line), "")
        return f"{errors} errors: {first}"[:300]
    finished = any("all shapes ran" in line for line in lines)
    return "no errors" if finished and any(summaries) else f"the program did not end: {last_lines(text)}"


def stop(process: subprocess.Popen) -> None:
    """Ends a process and all that it has started: it leads a group of its own."""
    with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(10)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
