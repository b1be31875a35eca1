"""Fixtures of the whole suite."""

from collections.abc import Iterator

import pytest
import torch

from vision_scan.ops import register


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
