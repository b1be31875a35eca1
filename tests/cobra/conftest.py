"""Fixtures of the tests of decoding and of conversion."""

import shutil
from pathlib import Path

import pytest
import torch

from cobra.convert import LAYOUTS, Options, convert
from cobra.convert.source import read_source
from cobra.lm.decode import Decoder
from tests.cobra.published import CASES, train_tokenizer


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


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory) -> Path:
    return train_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json")


@pytest.fixture(scope="session")
def published(tmp_path_factory, tokenizer_file):
    """Case -> (the published model, its directory, the converted directory), each made once."""
    pytest.importorskip("transformers")
    folder, made = tmp_path_factory.mktemp("published"), {}

    def get(case: str):
        if case not in made:
            build, options, save, _ = CASES[case]
            model, path = build(**options), folder / f"case-{list(CASES).index(case)}"
            save(model, path)
            shutil.copy(tokenizer_file, path)
            converted = path.with_name(f"{path.name}-converted")
            convert(path, converted)
            made[case] = model, path, converted
        return made[case]

    return get


@pytest.fixture
def damaged(published, tmp_path):
    """Case -> a copy of its directory, to be spoilt."""
    return lambda case: Path(shutil.copytree(published(case)[1], tmp_path / "published"))


@pytest.fixture
def read_config(published):
    """The configuration that a case's config.json gives after some changes; no tensors are looked at."""

    def read(case: str, **changes):
        (layout,) = (layout for layout in LAYOUTS if layout.name == CASES[case][3])
        options = Options({**read_source(published(case)[1]).config, **changes}, "config.json")
        config = layout.read_config(options)
        options.close()
        return config

    return read
