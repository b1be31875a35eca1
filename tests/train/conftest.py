"""Fixtures of the tests of training."""

from pathlib import Path

import pytest

from tests.train.small_preference import save_start
from tests.train.small_run import write_data, write_region_data


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A small data file of conversations."""
    return write_data(tmp_path / "data")


@pytest.fixture
def region_data(tmp_path: Path) -> Path:
    """A small data file of images with regions."""
    return write_region_data(tmp_path / "regions")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Preference data beside a model."""
    return save_start(tmp_path_factory.mktemp("pairs"))
