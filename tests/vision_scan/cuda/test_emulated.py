"""Without a GPU: the CUDA kernels, built for the CPU (csrc/cuda/emulate.h), under the operators' tests."""

import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
BUILD = ROOT / "build" / "emulated"
HERE = "tests/vision_scan/cuda"
NOT_HERE = (Path(__file__).name, "test_on_gpu.py")
SUITES = (
    *sorted(
        f"{HERE}/{path.name}" for path in Path(__file__).parent.glob("test_*.py") if path.name not in NOT_HERE
    ),
    "tests/vision_scan/test_ops.py",
    "tests/vision_scan/test_ops_2d.py",
    "tests/vision_scan/test_ops_update.py",
    "tests/vision_scan/test_reference.py",
    "tests/cobra/test_decode_cuda.py",
)


@pytest.fixture(scope="module")
def library() -> Path:
    """The kernels as a library; built again only where a source has changed."""
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", BUILD, "--build-temp", BUILD / "temp"]
    environment = {**os.environ, "COBRA_CUDA": "emulate"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    (found,) = BUILD.glob("vision_scan/_cuda_emulated*.so")
    return found


@pytest.fixture(scope="module")
def outcomes(library: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Future]]:
    """The suites that are asked for, one on each core of ours: the emulator runs on one thread, and for minutes."""
    cores = len(os.sched_getaffinity(0)) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    chosen = [item.callspec.params["suite"] for item in request.session.items if item.path == Path(__file__)]
    with ThreadPoolExecutor(max(1, cores)) as pool:
        yield {suite: pool.submit(run_suite, suite, library) for suite in chosen}


def run_suite(suite: str, library: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "VISION_SCAN_EMULATE": str(library), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-x", suite]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.skipif(bool(os.environ.get("VISION_SCAN_EMULATE")), reason="they are emulated already")
@pytest.mark.parametrize("suite", SUITES)
def test_emulated_kernels_pass(suite, outcomes):
    done = outcomes[suite].result()
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout, done.stdout  # not all were skipped
