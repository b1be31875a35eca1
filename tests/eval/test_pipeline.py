"""Steps in lanes: order, records, output, stopping. Commands are `python -m` of small modules made here."""

import json
import os
import resource
import signal
import threading

import pytest

from eval.pipeline import STOPPED, THREADS, Pipeline, Step, peak_memory

MODULES = {
    "note": "import sys; open(sys.argv[1], 'a').write(sys.argv[2] + ' ')",
    "wait_for": """
import pathlib, sys, time
pathlib.Path(sys.argv[1]).touch()
end = time.monotonic() + 60
while not pathlib.Path(sys.argv[2]).exists():
    assert time.monotonic() < end
    time.sleep(0.01)
""",
    "threads": "import os; print('threads', os.environ.get('OMP_NUM_THREADS'))",
    "fail": "import sys; sys.exit(3)",
    "large": "import sys; block = b'x' * (int(sys.argv[1]) << 20)",
    # As training does on SIGTERM.
    "patient": f"""
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({STOPPED}))
pathlib.Path(sys.argv[1]).touch()
time.sleep(60)
""",
}


@pytest.fixture
def make(tmp_path, monkeypatch):
    """Makes a pipeline of lanes of (module, *arguments), with what it says."""
    for name, code in MODULES.items():
        (tmp_path / f"{name}.py").write_text(code)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)

    def build(*stages: dict[str, list[tuple]], record: dict | None = None) -> tuple[Pipeline, list[str]]:
        said: list[str] = []

        def step(name: str, words: tuple) -> Step:
            return Step(name=name, title=words[0], arguments=tuple(map(str, words)), expected_s=1)

        numbered = [
            {lane: [step(f"{i}-{lane}-{j}", words) for j, words in enumerate(stage[lane])] for lane in stage}
            for i, stage in enumerate(stages)
        ]
        record = {"steps": {}, "seconds": 0.0} if record is None else record
        return Pipeline(numbered, record, tmp_path / "record.json", said.append), said

    return build


def test_stages_follow_each_other_and_are_recorded(make, tmp_path):
    notes = tmp_path / "notes"
    lanes = {"a": [("note", notes, "2a"), ("note", notes, "3a")], "b": [("note", notes, "2b")]}
    pipeline, said = make({"x": [("note", notes, "1")]}, lanes, {"x": [("note", notes, "4")]})
    assert pipeline.run() == 0
    order = notes.read_text().split()
    assert order[0] == "1" and order[-1] == "4" and sorted(order[1:-1]) == ["2a", "2b", "3a"]
    assert order.index("2a") < order.index("3a")
    assert next(line for line in said if line.startswith("$ ")) == f"$ python -m note {notes} 1"

    stored = json.loads((tmp_path / "record.json").read_text())
    assert stored == pipeline.record and all(step["done"] for step in stored["steps"].values())
    assert stored["steps"]["1-a-1"]["lane"] == "a" and stored["steps"]["1-a-1"]["stage"] == 1
    assert 0 < max(step["seconds"] for step in stored["steps"].values()) < stored["seconds"]

    again, said = make({"x": [("note", notes, "1")]}, lanes, {"x": [("note", notes, "4")]}, record=stored)
    assert again.run() == 0 and said == [] and notes.read_text().split() == order


def test_lanes_run_at_the_same_time_and_share_the_cores(make, tmp_path, monkeypatch):
    one, other = tmp_path / "one", tmp_path / "other"
    monkeypatch.setenv(THREADS, "6")
    lanes = {
        "long": [("wait_for", one, other), ("threads",)],
        "no": [("wait_for", other, one), ("threads",)],
    }
    pipeline, said = make(lanes, {"x": [("threads",)]})
    assert pipeline.run() == 0
    assert "long | threads 3" in said and "  no | threads 3" in said


def test_a_failing_step_stops_the_lanes_beside_it(make, tmp_path):
    started = tmp_path / "started"
    lanes = {
        "a": [("wait_for", tmp_path / "here", started), ("fail",), ("note", tmp_path / "notes", "no")],
        "b": [("patient", started), ("note", tmp_path / "notes", "no")],
    }
    pipeline, said = make(lanes, {"x": [("note", tmp_path / "notes", "no")]})
    assert pipeline.run() == 3
    assert not (tmp_path / "notes").exists()
    done = {name for name, step in pipeline.record["steps"].items() if step["done"]}
    assert done == {"0-a-0"}
    assert "Step 2/6 ended with status 3" in said[-2] and "goes on from here" in said[-1]


@pytest.mark.parametrize("num_lanes", [1, 2])
def test_sigterm_reaches_every_lane_and_stops_the_pipeline(make, tmp_path, num_lanes):
    started = [tmp_path / f"started{i}" for i in range(num_lanes)]
    lanes = {f"lane{i}": [("patient", path), ("fail",)] for i, path in enumerate(started)}
    pipeline, said = make(lanes)

    def stop_when_all_run() -> None:
        while not all(path.exists() for path in started):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    threading.Thread(target=stop_when_all_run, daemon=True).start()
    assert pipeline.run() == STOPPED
    assert signal.getsignal(signal.SIGTERM) == before
    assert said[-1] == "Stopped; the same command goes on from here."
    assert not any(step["done"] for step in pipeline.record["steps"].values())


def test_memory_is_that_of_each_command(make):
    floor = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # the system counts that in
    sizes = [(floor >> 20) + more for more in (200, 100)]
    pipeline, _ = make({"a": [("large", sizes[0])], "b": [("large", sizes[1])]})
    assert pipeline.run() == 0
    steps = pipeline.record["steps"]
    for name, size in zip(("0-a-0", "0-b-0"), sizes, strict=True):
        assert size <= steps[name]["peak_rss_bytes"] >> 20 < size + 80


def test_lanes_side_by_side_may_take_their_most_memory_at_a_time():
    sizes = [(0, "x", 9), (1, "a", 3), (1, "a", 7), (1, "b", 4), (1, "b", 1), (2, "x", 10)]
    steps = {
        str(number): {"stage": stage, "lane": lane, "peak_rss_bytes": size}
        for number, (stage, lane, size) in enumerate(sizes)
    }
    assert peak_memory({"steps": steps}) == 11


def test_an_output_that_cannot_be_gone_on_with_is_removed(make, tmp_path):
    half = tmp_path / "half"
    half.mkdir()
    step = Step(name="s", title="t", arguments=("note", str(half), "new"), output=half, expected_s=1)
    record = {"steps": {}, "seconds": 0.0}
    pipeline = Pipeline([{"x": [step]}], record, tmp_path / "record.json", lambda line: None)
    assert pipeline.run() == 0
    assert half.read_text() == "new "
