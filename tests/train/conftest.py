"""Fixtures of the tests of training."""

from pathlib import Path

import pytest

from tests.train.small_run import write_data, write_region_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small data file of conversations."""
    return write_data(tmp_path / "data")


@pytest.fixture
def region_data(tmp_path: Path) -> Path:
    """A small data file of images with regions."""
    return write_region_data(tmp_path / "regions")
