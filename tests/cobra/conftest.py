"""Fixtures of the tests of decoding."""

import pytest
import torch

from cobra.lm.decode import Decoder


@pytest.fixture(scope="module")
def one_thread():
    """Sizes here are too small for more, which on busy cores wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def taken(monkeypatch) -> list[int]:
    """The number of rows of each call that was compiled."""
    calls, step = [], Decoder.step

    def spy(self, hidden, *args):
        calls.append(len(hidden))
        return step(self, hidden, *args)

    monkeypatch.setattr(Decoder, "step", spy)
    return calls
