"""Records, progress, Weights & Biases."""

import json
import os
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from tests.train.small_run import small_config
from train.metrics import METRICS, SAMPLES, WANDB_NAMES, Metrics, read_metrics, wandb_name
from train.plot import PANELS, plot_runs, running_means, short_names
from train.progress import ProgressBar, ProgressLines, clock, describe, fit, short_count
from train.run import run
from train.settings import change
from vision_scan.errors import UserError

DOCS = Path(__file__).resolve().parents[2] / "docs" / "train.md"
RECORD = {"step": 1, "loss": 2.5, "lr": 0.001, "grad_norm": 1.0, "supervised_tokens": 7}
COUNTS = {
    "num_tokens": 30,
    "num_supervised": 7,
    "num_images": 1,
    "num_rows": 4,
    "num_padding": 10,
    "num_truncated": 2,
    "flops": 6e9,
}
SAMPLE = {"step": 1, "id": "a", "question": "<image>\nWhat?", "answer": "[b] é", "reference": "b"}


def test_every_step_is_recorded_with_loss_rate_norm_and_speed(data: Path, tmp_path: Path) -> None:
    assert run(small_config(data, "train.engine=plain"), tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    assert [record["step"] for record in records] == list(range(1, 7))
    wanted = WANDB_NAMES.keys() - {"val_loss", "val_s", "mfu"} | {"step"}
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
    sampled = [json.dumps({**SAMPLE, "step": step}) for step in (2, 2, 4)]
    (tmp_path / SAMPLES).write_text("\n".join(sampled) + '\n{"st')
    metrics = Metrics(tmp_path, small_config(data), num_steps=9, start=2)
    metrics.add({**RECORD, "step": 3}, counts=COUNTS)
    metrics.close()
    records = read_metrics(tmp_path)
    assert [record["step"] for record in records] == [1, 2, 3]
    assert records[-1]["seconds"] == pytest.approx(4.0, abs=1.0)
    kept = (tmp_path / SAMPLES).read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in kept] == [2, 2]


def test_a_record_is_of_all_steps_since_the_last(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four steps of half a second on two devices that could do 20 GFLOP/s each."""
    clock_s = [100.0]
    monkeypatch.setattr("time.perf_counter", lambda: clock_s[0])
    config = small_config(data, "log.every=4", "log.peak_tflops=0.02")
    metrics = Metrics(tmp_path, config, num_steps=8, start=0, world_size=2)
    for step in range(1, 5):
        metrics.begin(step)
        clock_s[0] += 0.5
        metrics.add({**RECORD, "step": step}, COUNTS, data_seconds=0.1, stall_seconds=0.25)
    metrics.close()
    (record,) = read_metrics(tmp_path)
    assert record["step"] == 4
    assert record["tokens_per_s"] == 60.0
    assert record["step_ms"] == 500.0
    assert record["data_ms"] == 100.0
    assert record["checkpoint_stall_s"] == 1.0
    assert record["tflops"] == 0.006  # 24 GFLOP in 2 seconds on 2 devices
    assert record["mfu"] == 0.3
    assert record["images_per_sample"] == 0.25
    assert record["pad_frac"] == 0.25
    assert (record["supervised_tokens"], record["truncated"]) == (28, 8)
    assert record["mem_gb"] > 0.01


def test_without_a_known_peak_there_is_no_utilisation(data: Path, tmp_path: Path) -> None:
    metrics = Metrics(tmp_path, small_config(data), num_steps=1, start=0)
    metrics.add(RECORD, COUNTS)
    metrics.close()
    (record,) = read_metrics(tmp_path)
    assert "mfu" not in record and record["tflops"] > 0


def test_docs_name_every_key_and_what_wandb_calls_it() -> None:
    rows = re.findall(r"^\| `(\w+)` \| `(\w+/\w+)` \|", DOCS.read_text(encoding="utf-8"), re.MULTILINE)
    assert dict(rows) == WANDB_NAMES
    assert wandb_name("patch_accuracy") == "train/patch_accuracy"
    assert wandb_name("val_patch_accuracy") == "val/patch_accuracy"


def test_progress_lines_say_where_the_run_is(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines(num_steps=10, start=0)
    for step in (1, 2, 10):
        lines.write({**RECORD, "step": step, "step_ms": 500.0})
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in told] == ["1/10", "10/10"]  # 2 came too soon
    assert "loss 2.5" in told[0]
    assert told[1].endswith("0.5 s/step  left 0:00")


def test_progress_says_what_there_is_in_one_line() -> None:
    speed = {"tokens_per_s": 12345.0, "step_ms": 400.0, "data_ms": 20.0, "mem_gb": 3.21, "tflops": 12.3}
    told = describe({**RECORD, **speed, "mfu": 0.412, "val_loss": 2.0})
    assert told == "loss 2.5000  val 2.0000  12.3k tokens/s  MFU 41.2%  3.21 GB  data 5%  lr 0.001"
    assert "12.3 TFLOP/s" in describe({**RECORD, **speed})
    assert [short_count(number) for number in (7, 999, 1e4, 2.5e6)] == ["7", "999", "10k", "2.5M"]
    assert [clock(seconds) for seconds in (5, 65, 3723)] == ["0:05", "1:05", "1:02:03"]


def test_what_does_not_fit_into_the_bar_is_left_out() -> None:
    text = "loss 2.5000  lr 0.001  3.21 GB"
    assert [fit(text, room) for room in (30, 29, 22, 21, 11, 5)] == [
        text, "loss 2.5000  lr 0.001", "loss 2.5000  lr 0.001", "loss 2.5000  lr 0.001", "loss 2.5000", ""
    ]  # fmt: skip


def test_validations_and_samples_are_told_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    lines = ProgressLines(num_steps=10, start=0)
    for step, extra in ((1, {}), (2, {}), (3, {"val_loss": 1.5})):
        lines.write({**RECORD, "step": step, "step_ms": 500.0, **extra})
    lines.write_samples([SAMPLE])
    told = capsys.readouterr().err.splitlines()
    assert [line.split()[1] for line in told] == ["1/10", "3/10", "1,"]
    assert "<image>\\nWhat?" in told[2]


def test_progress_bar_draws(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    bar = ProgressBar(num_steps=10, start=4)
    speed = {"tokens_per_s": 12345.0, "step_ms": 400.0, "data_ms": 20.0, "mem_gb": 3.21, "tflops": 12.3}
    bar.write({**RECORD, **speed, "step": 10})
    bar.write_samples([SAMPLE])
    bar.close()
    told = capsys.readouterr().err
    (line,) = [line for line in told.splitlines() if "10/10" in line]
    assert "loss 2.5" in line and "tokens/s" in line and "0:00:00" in line
    assert "'[b] é'" in told.replace("\n", "")  # no mark-up of rich's


def fake_wandb(monkeypatch: pytest.MonkeyPatch, init, api_key: str | None = None) -> None:
    module = ModuleType("wandb")
    module.api = SimpleNamespace(api_key=api_key)
    module.Settings = lambda **settings: settings
    module.Table = lambda columns, data: (columns, data)
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
        log = lambda record, step: logged.append((step, record))  # noqa: E731
        return SimpleNamespace(id="abc", log=log, finish=lambda: logged.append("end"))

    fake_wandb(monkeypatch, init, api_key)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    if environment is not None:
        monkeypatch.setenv("WANDB_MODE", environment)
    config = small_config(data, "train.engine=plain", "log.wandb=true", f"val.path={data}", "val.samples=2")
    assert run(config, tmp_path / "run")
    assert began[0]["mode"] == expected
    assert began[0]["config"]["train"]["steps"] == 6
    assert logged[-1] == "end"
    assert [step for step, _ in logged[:-1]] == [1, 2, 3, 4, 5, 6, 6]
    assert {"train/loss", "train/lr", "train/grad_norm", "perf/step_ms", "ssm/dt_mean"} <= logged[0][1].keys()
    assert logged[5][1].keys() == set(WANDB_NAMES.values()) - {"perf/mfu"}
    columns, rows = logged[6][1]["val/samples"]
    assert columns == list(SAMPLE) and len(rows) == 2
    # A second life goes on with the first one's curves.
    assert run(change(config, ["val.samples=1"]), tmp_path / "run", resume=True)
    assert [(options["id"], options["resume"]) for options in began] == [(None, "allow"), ("abc", "allow")]


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

    fake_wandb(monkeypatch, lambda **options: SimpleNamespace(id="abc", log=log, finish=log))
    assert run(config, tmp_path / "two")
    assert "wandb is no longer used: gone" in caplog.text
    assert len(read_metrics(tmp_path / "two")) == 6


def test_wandb_that_is_not_installed_is_one_warning(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(small_config(data, "train.engine=plain", "log.wandb=true"), tmp_path / "run")
    assert [text for text in caplog.messages if "wandb" in text] == [
        "wandb is not used: it is not installed; pip install 'cobra-vlm[train]'"
    ]
    assert len(read_metrics(tmp_path / "run")) == 6


def test_real_wandb_works_offline(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    config = small_config(data, "train.engine=plain", "log.wandb=true", f"val.path={data}", "val.samples=1")
    assert run(config, tmp_path / "run")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*"))
    assert os.environ["WANDB_MODE"] == "offline"


def test_profile_is_written_and_training_goes_on(
    data: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    config = small_config(data, "train.engine=plain", "train.steps=4", "log.profile=2:2")
    assert run(config, tmp_path / "run")
    trace, table = sorted((tmp_path / "run" / "profile").iterdir())
    assert trace.name == "steps-000002-000003.json"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert any("aten::mm" in str(name) for name in names)
    assert "Self CPU" in table.read_text()
    (told,) = [text for text in caplog.messages if "profile" in text]
    assert str(trace) in told and str(table) in told
    assert len(read_metrics(tmp_path / "run")) == 4


def test_profile_beyond_the_last_step_is_what_there_was(data: Path, tmp_path: Path) -> None:
    config = small_config(data, "train.engine=plain", "train.steps=2", "log.profile=2:50")
    assert run(config, tmp_path / "run")
    assert (tmp_path / "run" / "profile" / "steps-000002-000002.json").exists()


def test_profile_that_cannot_be_written_does_not_end_the_run(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(self, path):
        raise OSError("No space left on device")

    monkeypatch.setattr("torch.profiler.profile.export_chrome_trace", fail)
    config = small_config(data, "train.engine=plain", "train.steps=3", "log.profile=1:1")
    assert run(config, tmp_path / "run")
    assert "no profile: No space left on device" in caplog.text


@pytest.mark.parametrize("text", ["3", "0:2", "2:0", "a:b", "1:2:3", "-1:2"])
def test_profile_is_start_and_count(data: Path, text: str) -> None:
    with pytest.raises(UserError, match=rf"log.profile: got '{text}', allowed: START:COUNT"):
        small_config(data, f"log.profile={text}")
    assert small_config(data, "log.profile=10:3").log.profiled_steps == range(10, 13)
    assert not change(small_config(data, "log.profile=10:3"), ["log.profile=none"]).log.profiled_steps


def test_plot_draws_runs_and_names_one_without_records(data: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        assert run(small_config(data, "train.engine=plain", f"val.path={data}", "val.every=2"), tmp_path / name)
    plot_runs([tmp_path / "one", tmp_path / "two"], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="none has no records"):
        plot_runs([tmp_path / "none"], tmp_path / "loss.png")
    with pytest.raises(UserError, match="7 runs to plot, allowed: 1 to 6"):
        plot_runs([tmp_path / "one"] * 7, tmp_path / "loss.png")


def test_plot_has_a_panel_for_what_was_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    monkeypatch.setattr(figure_module.Figure, "savefig", lambda self, path, **options: drawn.append(self))
    for name, extra in (("old", {}), ("new", {"val_loss": 2.0, "tokens_per_s": 9.0, "grad_norm": float("nan")})):
        records = [{"step": step, "loss": 1000.0 / step**3, **extra} for step in range(1, 12)]
        (tmp_path / name).mkdir()
        (tmp_path / name / METRICS).write_text("".join(json.dumps(record) + "\n" for record in records))
    plot_runs([tmp_path / "old", tmp_path / "new"], tmp_path / "loss.svg")
    (figure,) = drawn
    panels = {axes.get_title(loc="left"): axes for axes in figure.axes}
    wanted = [panel.title for panel in PANELS if panel.key in ("loss", "val_loss", "tokens_per_s", "grad_norm")]
    assert list(panels) == wanted
    assert panels["training loss"].get_yscale() == "log" and panels["validation loss"].get_yscale() == "linear"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["old", "new"]
    assert len(panels["training loss"].get_lines()) == 4  # each faintly, and its running mean


def test_running_mean_is_of_the_last_so_many() -> None:
    assert running_means([2.0, 4.0, 6.0, 8.0], 2) == [2.0, 3.0, 5.0, 7.0]


def test_names_in_a_legend_are_short_and_differ() -> None:
    runs = [Path(f"/data/runs/{folder}/" + "x" * 50 + name) for folder, name in (("a", "one"), ("b", "two"))]
    names = short_names(runs)
    assert all(len(name) <= 36 for name in names)
    assert names[0].startswith("a/xx") and names[0].endswith("one") and names[1].startswith("b/xx")
    assert short_names([Path("runs/mine")]) == ["mine"]
