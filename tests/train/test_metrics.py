"""Records, progress, Weights & Biases."""

import json
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.train.small_run import small_config
from train.metrics import METRICS, Metrics, ProgressBar, ProgressLines, read_metrics
from train.plot import plot_runs
from train.run import run
from vision_scan.errors import UserError

RECORD = {"step": 1, "loss": 2.5, "lr": 0.001, "grad_norm": 1.0, "supervised_tokens": 7}
COUNTS = {"num_tokens": 10, "num_supervised": 7, "num_images": 1, "num_padding": 0, "num_truncated": 0}


def test_every_step_is_recorded_with_loss_rate_norm_and_speed(data: Path, tmp_path: Path) -> None:
    assert run(small_config(data, "train.engine=plain"), tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, 7))
    wanted = {*RECORD, "tokens_per_s", "seconds", "seconds_per_step", "images", "pad_frac", "truncated"}
    wanted |= {"data_ms", "checkpoint_stall_s"}
    assert all(record.keys() == wanted for record in records)
    assert all(record["tokens_per_s"] > 0 and record["grad_norm"] > 0 for record in records)
    seconds = [record["seconds"] for record in records]
    assert seconds == sorted(seconds)


def test_records_can_be_fewer_and_the_last_is_always_there(data: Path, tmp_path: Path) -> None:
    assert run(small_config(data, "train.engine=plain", "log.every=4"), tmp_path / "run")
    assert [record["step"] for record in read_metrics(tmp_path / "run")] == [4, 6]


def test_resuming_drops_later_records_and_a_cut_line(data: Path, tmp_path: Path) -> None:
    lines = [json.dumps({**RECORD, "step": step, "seconds": 2.0 * step}) for step in (1, 2, 3)]
    (tmp_path / METRICS).write_text("\n".join(lines) + '\n{"step": 4, "lo')
    metrics = Metrics(tmp_path, small_config(data), num_steps=9, start=2)
    metrics.add({**RECORD, "step": 3}, counts=COUNTS)
    metrics.close()
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[-1]["seconds"] == pytest.approx(4.0, abs=1.0)


def test_progress_lines_say_where_the_run_is(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines(num_steps=10, start=0)
    for step in (1, 2, 10):
        lines.write({**RECORD, "step": step, "seconds_per_step": 0.5})
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in told] == ["1/10", "10/10"]  # 2 came too soon
    assert "loss 2.5" in told[0]
    assert told[1].endswith("left 0:00")


def test_progress_bar_draws(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    bar = ProgressBar(num_steps=10, start=4)
    bar.write({**RECORD, "step": 10})
    bar.close()
    assert "10/10" in capsys.readouterr().err


def fake_wandb(monkeypatch: pytest.MonkeyPatch, init, api_key: str | None = None) -> None:
    module = ModuleType("wandb")
    module.api = SimpleNamespace(api_key=api_key)
    module.Settings = lambda **settings: settings
    module.init = init
    monkeypatch.setitem(sys.modules, "wandb", module)


@pytest.mark.parametrize(
    ("environment", "api_key", "expected"),
    [(None, None, "offline"), (None, "key", None), ("offline", None, None)],
)
def test_wandb_gets_the_records_and_never_has_to_ask_for_a_key(
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    environment: str | None,
    api_key: str | None,
    expected: str | None,
) -> None:
    began, logged = [], []

    def init(**options):
        began.append(options)
        log = lambda record, step: logged.append(step)  # noqa: E731
        return SimpleNamespace(log=log, finish=lambda: logged.append("end"))

    fake_wandb(monkeypatch, init, api_key)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    assert run(small_config(data, "train.engine=plain", "log.wandb=true"), tmp_path / "run")
    assert began[0]["mode"] == expected
    assert began[0]["config"]["train"]["steps"] == 6
    assert logged == [1, 2, 3, 4, 5, 6, "end"]


def test_wandb_that_fails_does_not_end_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def init(**options):
        raise ConnectionError("no network")

    fake_wandb(monkeypatch, init)
    config = small_config(data, "train.engine=plain", "log.wandb=true")
    assert run(config, tmp_path / "one")
    assert "wandb is not used: no network" in caplog.text

    def log(record, step):
        raise ConnectionError("gone")

    fake_wandb(monkeypatch, lambda **options: SimpleNamespace(log=log, finish=log))
    assert run(config, tmp_path / "two")
    assert "wandb is no longer used: gone" in caplog.text
    assert len(read_metrics(tmp_path / "two")) == 6


def test_real_wandb_works_offline(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert run(small_config(data, "train.engine=plain", "log.wandb=true"), tmp_path / "run")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert os.environ["WANDB_MODE"] == "offline"


def test_plot_draws_runs_and_names_one_without_records(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    assert run(small_config(data, "train.engine=plain"), tmp_path / "run")
    plot_runs([tmp_path / "run"], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="none has no records"):
        plot_runs([tmp_path / "none"], tmp_path / "loss.png")
