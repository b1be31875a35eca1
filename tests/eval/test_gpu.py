"""`python -m eval gpu` as far as it goes without a GPU; its measurements, tiny, on the CPU."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import eval.__main__
from eval import gpu, readme
from eval.gpu import commands, compile_report, decoding, rivals, scans, training
from eval.gpu.results import Results, make_row, open_results, per_step, slug
from eval.gpu.tables import read_cards, summary, to_markdown
from eval.gpu.targets import (
    COMPACT,
    MAMBA,
    TARGETS,
    Target,
    decode_name,
    judge,
    prefill_name,
    scan_2d_name,
    ssd_name,
    train_name,
)
from eval.peers.contest import make_check
from vision_scan.errors import UserError

CEILINGS = {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e10, "copy_bytes": 8, "gemm_size": 2}
NOT_BUILT = "not measured: rival: not built"
RIGHT = make_check({"y": 0.0}, 1e-2)


def seconds(median: float) -> dict:
    return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median, "n": 5}


def rival(median: float | None, check: dict | None = None, **facts) -> dict:
    return {
        "name": "rival", "is_rival": True, "seconds": seconds(median) if median else None,
        "failed": "" if median else "not built", "check": check, **facts,
    }  # fmt: skip


# ---- the command ---------------------------------------------------------------------------------


def test_without_a_gpu_it_says_so_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    results = tmp_path / "results"
    assert eval.__main__.main(["gpu", "bench-scan", "--results", str(results)]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: no GPU is visible to torch; ") and told.count("\n") == 1
    assert not results.exists()


@pytest.mark.parametrize(
    "arguments, told",
    [
        (["bench-scn"], "did you mean 'bench-scan'"),
        (["build", "--limit", "0"], "the limit is 0 s"),
        (["build", "--limit", "soon"], "soon"),
    ],
)
def test_mistakes_are_one_line(arguments, told, capsys):
    assert eval.__main__.main(["gpu", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_the_script_runs_the_same_command(tmp_path):
    script = Path(gpu.__file__).parents[2] / "benchmarks" / "gpu.sh"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        ["bash", str(script), "test"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 2 and done.stderr.startswith("error: no GPU is visible"), done.stderr


ROW = make_row("row", seconds(1.0), check=RIGHT)
FAKE = f"""import json, sys, time
part, path, row = sys.argv[1], sys.argv[2], json.loads({json.dumps(json.dumps(ROW))})
content = json.load(open(path))
content["measurements"]["row of " + part] = row | {{"name": "row of " + part, "part": part}}
json.dump(content, open(path, "w"))
"""


def run_parts(tmp_path, parts, body, **more):
    """Each part is a process that saves a row and then runs `body`."""
    fake = lambda part, path: [sys.executable, "-c", FAKE + body, part, str(path)]  # noqa: E731
    return gpu.run_parts(parts, tmp_path, device="cpu", command=fake, **more)


def test_a_part_that_runs_out_of_time_is_stopped_and_the_next_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: True)
    body = "time.sleep(60 if part == 'test' else 0)"
    results = run_parts(tmp_path, ["test", "sanitize"], body, limit_s=3)
    parts = results.content["parts"]
    assert parts["test"]["status"] == "out of time after 3 s" and 3 <= parts["test"]["seconds"] < 20
    assert parts["sanitize"]["status"] == "done"
    assert set(results.content["measurements"]) == {
        "row of test",
        "row of sanitize",
    }  # both saved as they came
    assert not gpu.passed(results)
    assert Results.load(results.path).content == results.content
    assert "part test: out of time after 3 s" in summary(results.content)


def test_a_part_that_fails_is_noted_and_kernels_are_built_first(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    results = run_parts(tmp_path, ["test"], "sys.exit(part == 'test')")
    status = {name: part["status"] for name, part in results.content["parts"].items()}
    assert status == {"build": "done", "test": "failed"}
    assert not gpu.passed(results)


def test_the_process_of_a_part_notes_why_it_failed(tmp_path, monkeypatch):
    path = new_results(tmp_path).path

    def fails(results, logs):
        raise commands.FailedPartError("the compiler is gone")

    monkeypatch.setitem(gpu.PARTS, "build", fails)
    assert gpu.run_part("build", path) == 1
    assert Results.load(path).content["parts"]["build"]["note"] == "the compiler is gone"
    monkeypatch.setitem(gpu.PARTS, "build", lambda results, logs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gpu.run_part("build", path)
    assert "division by zero" in Results.load(path).content["parts"]["build"]["note"]


# ---- results -------------------------------------------------------------------------------------


def new_results(folder: Path, commit="abc", date="2026-11-22") -> Results:
    head = {"environment": {"versions": {"torch": "2.11.0"}}, "gpu": {"driver_version": "580"}}
    results = open_results(folder, "NVIDIA H200", commit, date, head)
    results.begin("build")
    return results


def test_parts_merge_into_the_file_of_their_card_date_and_commit(tmp_path):
    first = new_results(tmp_path)
    assert first.path.name == "h200-2026-11-22.json"
    first.keep("bench-scan", make_row("a", seconds(1.0)))
    first.keep("bench-scan", make_row("b", seconds(1.0)))
    first.keep("bench-train", make_row("c", seconds(1.0)))
    again = open_results(tmp_path, "NVIDIA H200", "abc", "2026-11-22", {"gpu": None})
    assert again.path == first.path and set(again.content["measurements"]) == {"a", "b", "c"}
    again.begin("bench-scan")  # what it measured before is forgotten, the rest stays
    again.keep("bench-scan", make_row("a", seconds(2.0)))
    stored = Results.load(first.path).content["measurements"]
    assert set(stored) == {"a", "c"} and stored["a"]["seconds"]["median"] == 2.0
    other = new_results(tmp_path, commit="def")
    assert other.path.name == "h200-2026-11-22-2.json"
    assert open_results(tmp_path, "NVIDIA H200", "def", "2026-11-22", {}).path == other.path
    assert (
        new_results(tmp_path, commit="abc").path.name == "h200-2026-11-22-3.json"
    )  # the newest is another's
    assert new_results(tmp_path, date="2026-11-23").path.name == "h200-2026-11-23.json"


def test_results_are_whole_at_any_time(tmp_path, monkeypatch):
    results = new_results(tmp_path)
    before = results.path.read_text()
    monkeypatch.setattr("os.replace", lambda *paths: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        results.keep("build", make_row("a", seconds(1.0)))
    assert results.path.read_text() == before
    results.path.write_text('{"format": 0}')
    with pytest.raises(UserError, match="format 0"):
        Results.load(results.path)


def test_names_of_cards():
    assert slug("NVIDIA H200") == "h200"
    assert slug("NVIDIA H100 80GB HBM3") == "h100-80gb-hbm3"


def test_row_has_fractions_and_ratio_to_the_fastest_rival():
    wrong = make_check({"y": 1.0}, 1e-2)
    others = [
        rival(3.0, RIGHT),
        rival(4.0, RIGHT) | {"name": "slow"},
        rival(0.1, wrong) | {"name": "wrong"},
        rival(0.2, RIGHT) | {"name": "ours", "is_rival": False},
        rival(None) | {"name": "missing"},
    ]
    row = make_row("a", seconds(2.0), bytes_moved=10**9, flops=10**9, ceilings=CEILINGS, others=others)
    assert row["of_copy"] == pytest.approx(0.5) and row["of_matrix"] == pytest.approx(0.05)
    assert row["times"] == pytest.approx(
        {"median": 1.5, "low": 2.7 / 2.2, "high": 3.3 / 1.8, "rival": "rival"}
    )
    failed = make_row("a", None, failed="out of memory", bytes_moved=1, ceilings=CEILINGS, others=others)
    assert failed["of_copy"] is None and failed["times"] is None
    assert per_step(seconds(2.0), 4) == pytest.approx({"median": 0.5, "q1": 0.45, "q3": 0.55, "n": 5})


# ---- targets and tables --------------------------------------------------------------------------


def test_every_target_is_of_a_measurement_that_a_part_makes():
    decode = decoding.Settings()
    names = {scan_2d_name(n, p) for n in scans.Settings().d_states for p in ("forward", "forward + backward")}
    names |= {ssd_name(p) for p in ("forward", "forward + backward")}
    names |= {decode_name(MAMBA, batch) for batch in decode.batches}
    names |= {decode_name(decode.transformer, context=context) for context in decode.contexts}
    names |= {prefill_name(seqlen) for seqlen in decode.prefills}
    names |= {train_name(batch) for batch in training.Settings().batches}
    assert {target.row for target in TARGETS} - names == {decode_name(MAMBA, 128) + COMPACT}


@pytest.mark.parametrize(
    "row, measured, reached",
    [
        (None, "not measured yet", None),
        (make_row("a", None, failed="out of memory"), "not measured: out of memory", None),
        (make_row("a", seconds(1.0), check=make_check({"y": 1.0}, 0.1)), "**wrong results**", False),
        (make_row("a", seconds(1.0), others=[rival(2.0)]), "**wrong results**", False),  # nothing was checked
        (make_row("a", seconds(1.0), check=RIGHT, others=[rival(None)]), NOT_BUILT, None),
        (
            make_row("a", seconds(1.0), check=RIGHT, others=[rival(2.0, make_check({"y": 1.0}, 0.1))]),
            "not measured: rival gives other results", None,
        ),
        (make_row("a", seconds(1.0), check=RIGHT), "not measured: no rival", None),
        (make_row("a", seconds(1.0), check=RIGHT, others=[rival(2.1)]), "2.10 x (1.72 to 2.57)", True),
        (make_row("a", seconds(1.0), check=RIGHT, others=[rival(1.9)]), "1.90 x (1.55 to 2.32)", False),
    ],
)  # fmt: skip
def test_target_is_reached_or_not_or_not_known(row, measured, reached):
    target = Target(row="a", value="times", what="", bound=2.0)
    verdict = judge(target, {} if row is None else {"a": row})
    assert (verdict.measured, verdict.reached) == (measured, reached)


def test_targets_in_other_units():
    row = make_row(
        "a", seconds(1.0), bytes_moved=7 * 10**8, ceilings=CEILINGS, check=RIGHT, tokens_per_s=599.0
    )
    row["peak_of_rival"] = 0.41
    rows = {"a": row}
    assert judge(Target(row="a", value="of_copy", what="", bound=0.65), rows).reached
    slow = judge(Target(row="a", value="tokens_per_s", what="", bound=600), rows)
    assert not slow.reached and slow.measured == "599 tokens/s"
    assert not judge(Target(row="a", value="peak_of_rival", what="", bound=0.4, at_most=True), rows).reached
    assert judge(Target(row="a", value="of_copy", what=""), rows).reached is None
    assert (
        Target(row="a", value="times", what="", bound=1.0, aim=1.5).asked() == "at least 1.00 x (aim 1.50 x)"
    )


def test_table_without_results_has_every_target_and_no_number(tmp_path):
    text = to_markdown(read_cards(tmp_path))
    assert text.count("| not measured yet |") == len(TARGETS)
    assert text.startswith("No GPU")


def test_table_takes_the_newest_measurement_of_each_target(tmp_path):
    name, late = ssd_name("forward"), ssd_name("forward + backward")
    for commit, median in (("old", 1.0), ("new", 2.0)):
        results = new_results(tmp_path, commit=commit)
        results.keep("bench-scan", make_row(name, seconds(median), check=RIGHT, others=[rival(3.0, RIGHT)]))
        if commit == "old":
            results.keep("bench-scan", make_row(late, seconds(1.0), check=RIGHT, others=[rival(0.5, RIGHT)]))
    results.content["ceilings"] = CEILINGS
    results.save()
    text = to_markdown(read_cards(tmp_path))
    assert "NVIDIA H200: torch 2.11.0, driver 580, copies 0.00 TB/s" in text
    assert "| at least 1.00 x (aim 1.50 x) | 1.50 x (1.23 to 1.83) | yes | new |" in text
    assert "| at least 0.95 x | 0.50 x (0.41 to 0.61) | no | old |" in text
    assert text.count("not measured yet") == len(TARGETS) - 2
    told = summary(results.content)
    assert f"reached: {name}" in told and "1.50 x rival" in told and "check 0.0e+00" in told


def test_readme_is_written_from_the_folder_of_results(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{readme.GPU.start}\nold\n{readme.GPU.end}\nafter\n")
    folder = tmp_path / "results"
    folder.mkdir()
    assert eval.__main__.main(["readme", str(folder), "--write", str(page)]) == 0
    text = page.read_text()
    assert "not measured yet" in text and "old" not in text and text.endswith("after\n")


# ---- other programs ------------------------------------------------------------------------------

FORWARD = "_ZN11vision_scan9selective7forwardIfEEvNS_9SelectiveIT_EE"
PTXAS = f"""ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_90a'
ptxas info    : Function properties for {FORWARD}
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 188 registers, used 1 barriers
ptxas info    : Compile time = 289.977 ms
ptxas info    : Compiling entry function '{FORWARD}' for 'sm_80'
ptxas info    : Function properties for {FORWARD}
    48 bytes stack frame, 12 bytes spill stores, 20 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 48 bytes cumulative stack, 4096 bytes smem
ptxas info    : Function properties for __internal_helper
    0 bytes stack frame, 99 bytes spill stores, 99 bytes spill loads
"""


def test_log_of_the_compiler_is_read():
    old, new = compile_report.parse(PTXAS.splitlines())
    assert (old["target"], old["registers"], old["spill_bytes"], old["stack_bytes"], old["shared_bytes"]) == (
        "sm_80", 255, 32, 48, 4096,
    )  # fmt: skip
    assert (new["target"], new["registers"], new["spill_bytes"], new["shared_bytes"]) == ("sm_90a", 188, 0, 0)
    assert "selective" in old["kernel"] and "forward" in old["kernel"]
    text = compile_report.table([old, new])
    assert text.count("<- spills") == 1 and "2 kernels, 1 of them spill" in text


def test_without_nvcc_it_says_so(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert eval.__main__.main(["cuda", "--output", str(tmp_path / "cuda")]) == 2
    told = capsys.readouterr().err
    assert told.startswith("error: nvcc is not here") and told.count("\n") == 1
    assert not (tmp_path / "cuda").exists()


def test_rivals_are_built_for_the_card_at_hand_alone(tmp_path):
    setup = 'if a:\n    cc_flag.append("-gencode")\n    cc_flag.append("arch=compute_90,code=sm_90")\nx = 1\n'
    changed = commands.without_targets(setup)
    assert "gencode" not in changed and "arch" not in changed
    compile(changed, "setup.py", "exec")


def test_a_rival_of_python_alone_is_unpacked_once(tmp_path, monkeypatch):
    wheel = tmp_path / "some_rival-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("some_rival/__init__.py", "def answer(): return 42\n")
    monkeypatch.setattr(rivals, "BUILT", tmp_path / "built")
    monkeypatch.setattr(rivals, "ENTRIES", {"answer": "some_rival"})
    monkeypatch.setattr(rivals, "SOURCES", {"some_rival": "some_rival-*/some_rival"})
    monkeypatch.setattr(sys, "path", list(sys.path))
    with pytest.raises(rivals.MissingRivalError, match=r"some_rival is neither built \(part peers\) nor installed"):
        rivals.entry("answer")
    for _ in range(2):
        folder = commands.unpack_wheel(wheel, rivals.BUILT)
        assert folder.name == "some_rival-1.2" and [path.name for path in rivals.BUILT.iterdir()] == [folder.name]
    assert rivals.entry("answer")() == 42
    del sys.modules["some_rival"]


def test_counts_of_pytest():
    assert commands.count_tests("...\n3 failed, 20 passed, 1 skipped, 2 errors in 3.2s\n") == {
        "failed": 3, "passed": 20, "skipped": 1, "error": 2,
    }  # fmt: skip
    assert commands.count_tests("no tests ran in 0.1s") == {}


@pytest.mark.parametrize(
    "output, verdict",
    [
        ("all shapes ran\n========= ERROR SUMMARY: 0 errors\n", "no errors"),
        (
            "all shapes ran\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n",
            "no errors",
        ),
        ("========= Error: Device not supported\n", "not available: Error: Device not supported"),
        (
            "========= Invalid __global__ read of size 4\n========= ERROR SUMMARY: 2 errors\n",
            "2 errors: Invalid",
        ),
        ("Traceback\nValueError: u\n========= ERROR SUMMARY: 0 errors\n", "the program did not end: "),
    ],
)
def test_verdict_of_the_sanitizer(output, verdict):
    assert commands.sanitizer_verdict(output).startswith(verdict)


def test_sanitizer_that_is_missing_is_no_failure(monkeypatch, tmp_path):
    results = new_results(tmp_path)
    results.begin("sanitize")
    monkeypatch.setattr("shutil.which", lambda name: None)
    commands.sanitize(results, tmp_path)
    assert results.content["parts"]["sanitize"]["note"].startswith("not available")


def test_tests_are_counted_file_by_file(tmp_path, monkeypatch):
    (tmp_path / "test_a.py").write_text("def test_x(): pass\ndef test_y(): assert 0\n")
    (tmp_path / "test_b.py").write_text(
        "import os\ndef test_z(): assert os.environ['COBRA_TEST_DEVICE'] == 'cuda'\n"
    )
    results = new_results(tmp_path)
    results.begin("test")
    monkeypatch.setattr(commands, "ROOT", tmp_path)
    run = commands.run
    monkeypatch.setattr(
        commands, "run", lambda command, log, environment: run(command, log, environment, cwd=tmp_path)
    )
    with pytest.raises(commands.FailedPartError, match=r"test_a.py \(1 failed"):
        commands.test(results, tmp_path / "logs", ["test_a.py", "test_b.py"])
    part = results.content["parts"]["test"]
    assert (part["passed"], part["failed"]) == (2, 1) and "test_y" in part["failures"][0]
    assert part["files"]["test_b.py"] == {"passed": 1}
