"""docs/train.md, from a fresh account to cobra-3b: every command, with small stand-ins for what it fetches."""

import contextlib
import io
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer

import cobra
import cobra.cli
import train.__main__
from tests.test_readme import ROOT, blocks
from tests.train.small_run import environment, write_data

NOT_HERE = ("git clone ", "make setup")


def commands() -> Iterator[str]:
    """The lines of the guide's blocks."""
    for block in blocks("docs/train.md"):
        if block.language == "bash":
            yield from (line for line in block.text.splitlines() if line.strip())


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the guide expects in /shared, at sizes for a test."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("shared")
    torch.manual_seed(0)
    config = transformers.MambaConfig(
        vocab_size=300, hidden_size=64, state_size=4, num_hidden_layers=2, pad_vocab_size_multiple=8
    )
    transformers.MambaForCausalLM(config).save_pretrained(folder / "hf" / "mamba-2.8b-zephyr")
    text = ["<|endoftext|> a red house stands by the sea"] * 9
    trained = cobra.tokenizer.Tokenizer.train(text, 290)
    trained.save(folder / "hf" / "mamba-2.8b-zephyr" / "tokenizer.json")
    assert Tokenizer.from_file(str(folder / "hf" / "mamba-2.8b-zephyr" / "tokenizer.json"))
    data = write_data(folder / "data" / "images")
    for name in ("mix1231k.json", "val.json"):
        (folder / "data" / name).write_text(json.dumps(json.loads(data.read_text())))
    run = folder / "runs" / "cobra-3b"
    cobra.save(cobra.build("tiny"), run)
    records = [{"step": step, "loss": 3.0 / step, "lr": 1e-3, "grad_norm": 1.0} for step in range(1, 9)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@pytest.mark.parametrize("line", commands())
def test_command(line: str, shared: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if line.startswith(NOT_HERE):
        return
    line = line.replace("/shared/", f"{shared}/").replace("photo.jpg", str(shared / "data" / "images" / "0.png"))
    words = shlex.split(line)
    if words[0] == "cobra":
        check(cobra.cli.main, words[1:], tmp_path, monkeypatch)
    elif words[:3] == ["python", "-m", "train"]:
        check(train.__main__.main, words[3:], tmp_path, monkeypatch)
    else:
        dry_run(words, shared)


def check(main, words: list[str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs a command of ours."""
    monkeypatch.chdir(folder)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as errors:
        assert main(words) == 0, errors.getvalue()


def dry_run(words: list[str], shared: Path) -> None:
    """Has a template plan, with the language model that the guide has converted by then."""
    settings = {"DRY_RUN": "1", "PYTHON": sys.executable, "USER": "me"}
    while "=" in words[0]:
        name, _, value = words.pop(0).partition("=")
        settings[name] = value
    if words[0] == "sbatch":
        assert words[1:3] == ["--nodes", "2"]
        words = ["bash", *words[3:]]
        settings |= {"SLURM_NTASKS": "16", "SLURM_JOB_NUM_NODES": "2"}
    if not (shared / "models").exists():
        cobra.cli.main(["convert", str(shared / "hf/mamba-2.8b-zephyr"), str(shared / "models/mamba-2.8b-zephyr")])
    path = Path(words[words.index("--output") - 3])
    assert (ROOT / path).is_file()
    # The stand-in for the shards, where the guide has not been run up to here.
    words = [word.replace("data/mix1231k", "data/mix1231k.json") if "data.path=" in word else word for word in words]
    words += ["--set", f"data.image_root={shared / 'data' / 'images'}"]
    done = subprocess.run(words, cwd=ROOT, env=environment(**settings), capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("recipe cobra-3b: preset cobra-3b")
    assert "-m train --resume --recipe cobra-3b" in done.stdout.splitlines()[-1].replace("--module train", "-m train")


def test_templates_are_as_executable_as_bash_needs() -> None:
    for template in (ROOT / "train" / "launch").glob("*.sh"):
        done = subprocess.run(["bash", "-n", str(template)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
