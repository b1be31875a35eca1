"""Fixtures of the whole suite, and the device that it runs on.

`COBRA_TEST_DEVICE=cuda` runs the tests of operators and language models on a GPU: tensors are made there
unless a test says where, random ones drawn on the CPU first, so that both devices see the same numbers. Tests
marked `cuda` need a GPU whatever the device.
"""

import os
from collections.abc import Iterator

import pytest
import torch
from torch.overrides import TorchFunctionMode

from vision_scan.ops import register

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported; trl tells of each use
DEVICE = os.environ.get("COBRA_TEST_DEVICE", "cpu")
LONG = ("test_emulated.py", "test_zero.py", "test_demo.py")


class DrawnOnTheCpu(TorchFunctionMode):
    """Numbers of a CPU generator are drawn there, then moved to where tensors are made."""

    DRAWS = (torch.rand, torch.randn, torch.randint, torch.randperm)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        generator = kwargs.get("generator")
        if func not in self.DRAWS or generator is None or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        return func(*args, **{**kwargs, "device": generator.device}).to(torch.get_default_device())


def pytest_configure() -> None:
    """Before the test files are read: they make tensors too."""
    if DEVICE != "cpu":
        torch.set_default_device(DEVICE)
        torch.backends.cudnn.allow_tf32 = False  # convolutions of the other implementations, held to float32
        DrawnOnTheCpu().__enter__()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The files that take minutes come first, so that no process is left with one at the end.
    items.sort(key=lambda item: item.path.name not in LONG)
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(pytest.mark.skip(reason="no GPU"))


def pytest_terminal_summary(terminalreporter) -> None:
    """How many tests of the GPU side did not run."""
    skipped = terminalreporter.stats.get("skipped", [])
    count = sum("cuda" in report.keywords for report in skipped)  # the marker, or the folder's name
    if count:
        terminalreporter.write_line(f"{count} GPU tests skipped: no GPU is visible")


@pytest.fixture(autouse=True)
def same_numbers() -> None:
    """A test draws what it draws alone, whichever others ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients come from the registered backward, whatever the size of the tensors."""
    monkeypatch.setattr(register, "KEEP_INTERMEDIATES", -1)


@pytest.fixture
def poison() -> Iterator[None]:
    """Memory from torch.empty and its kin starts as NaN (integers: the maximum), in kernels too.

    An operator that forgets to write part of an output then fails loudly. PyTorch does the filling
    in its deterministic mode, for every allocation through the dispatcher, Python's or C++'s.
    """
    mode = torch.get_deterministic_debug_mode()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.utils.deterministic.fill_uninitialized_memory = fill
    torch.set_deterministic_debug_mode(mode)
