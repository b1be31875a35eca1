"""Who does what of a study: claims, folders, what is left, when to stop."""

import contextlib
import errno
import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest

from eval.__main__ import main
from eval.ablations import queue, trials
from eval.ablations.queue import claim, open_output, read_results, take_results
from eval.files import write_json, write_lines
from tests.eval.fake_study import make_result, make_study
from vision_scan.errors import UserError


@pytest.fixture
def process():
    """A live process that is not this one."""
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        yield child
        child.kill()


def write_claim(output, text: str, age: float = 0.0):
    path = output / "claims" / "x"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    os.utime(path, (time.time() - age,) * 2)
    return path


def taken(output) -> bool:
    """Whether a claim can be had; given back at once."""
    with claim(output, "x") as ours:
        return ours


def test_a_claim_is_one_s_own_until_it_is_given_back(tmp_path):
    with claim(tmp_path, "x") as ours, claim(tmp_path, "x") as again, claim(tmp_path, "y") as other:
        assert (ours, again, other) == (True, False, True)
        assert not taken(tmp_path)
    assert taken(tmp_path) and taken(tmp_path)


def test_a_claim_is_given_back_after_an_exception(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), claim(tmp_path, "x") as ours:
            assert ours
            raise error
    assert taken(tmp_path)


def test_a_claim_that_was_not_had_is_not_given_back(tmp_path):
    with claim(tmp_path, "x"):
        with pytest.raises(RuntimeError), claim(tmp_path, "x") as ours:
            assert not ours
            raise RuntimeError
        assert not taken(tmp_path)


def test_a_dead_process_s_claim_is_taken_over(tmp_path, process):
    code = "import pathlib, sys, time; from eval.ablations.queue import claim\n"
    code += "with claim(pathlib.Path(sys.argv[1]), 'x') as ours: print(ours, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "True\n"
        assert not taken(tmp_path)
        other.kill()
        other.wait()
    assert (tmp_path / "claims" / "x").exists() and taken(tmp_path)


def test_a_live_process_keeps_its_claim_however_old(tmp_path, process):
    path = write_claim(tmp_path, f"{socket.gethostname()} {process.pid} {queue._beginning(process.pid)}\n", age=1e6)
    assert not taken(tmp_path) and path.exists()
    write_claim(tmp_path, f"{socket.gethostname()} {process.pid}\n", age=1e6)  # where beginnings are not known
    assert not taken(tmp_path)


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="beginnings of processes are not known here")
def test_a_number_that_another_process_has_got_claims_nothing(tmp_path, process):
    write_claim(tmp_path, f"{socket.gethostname()} {process.pid} 1\n")
    assert taken(tmp_path)


@pytest.mark.parametrize("text", ["elsewhere 1 5\n", "", "elsewhere\n", "a b c d e"])
def test_a_claim_of_another_machine_grows_old(tmp_path, text):
    """And so does one that was being written."""
    write_claim(tmp_path, text, age=queue.STALE_SECONDS - 60)
    assert not taken(tmp_path)
    write_claim(tmp_path, text, age=queue.STALE_SECONDS + 60)
    assert taken(tmp_path)


def test_what_another_machine_took_over_is_left_to_it(tmp_path):
    with claim(tmp_path, "x"):
        path = write_claim(tmp_path, "elsewhere 1 5\n")
    assert path.read_text() == "elsewhere 1 5\n"


def slowly(function):
    """What it says may have changed when it is used."""

    def answer(*args):
        said = function(*args)
        time.sleep(random.uniform(0, 0.004))
        return said

    return answer


@pytest.mark.parametrize("stale", [False, True])
def test_of_many_at_once_one_gets_a_claim(tmp_path, stale, monkeypatch):
    """A killed job's processes come back together, and all find the same dead claims."""
    monkeypatch.setattr(queue, "_is_stale", slowly(queue._is_stale))
    for _ in range(5):
        if stale:
            write_claim(tmp_path, "elsewhere 1 5\n", age=queue.STALE_SECONDS + 60)
        barrier, end, found = threading.Barrier(8), threading.Barrier(8), []

        def try_it(barrier=barrier, end=end, found=found) -> None:
            barrier.wait()
            with claim(tmp_path, "x") as ours:
                found.append(ours)
                end.wait()

        threads = [threading.Thread(target=try_it) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(found) == [False] * 7 + [True]


def test_a_study_finds_its_folder_again(tmp_path):
    study = make_study()
    for _ in range(2):
        open_output(study, tmp_path / "new" / "study")
    assert json.loads((tmp_path / "new" / "study" / "study.json").read_text()) == {"study": "orders", "version": 3}
    (tmp_path / "empty").mkdir()
    open_output(study, tmp_path / "empty")


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("notes.txt", "", "exists and is no study"),
        ("study.json", '{"study": "orders", "version": 2}', "orders in version 2, not orders in version 3"),
        ("study.json", '{"study": "merges", "version": 3}', "merges in version 3"),
        ("study.json", "{", "is not JSON"),
        ("study.json", "[]", "is no study"),
    ],
)
def test_a_folder_of_something_else_is_refused_in_one_line(tmp_path, file, text, message):
    (tmp_path / file).write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        open_output(make_study(), tmp_path)
    assert "\n" not in str(caught.value) and os.listdir(tmp_path) == [file]


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="exists and is no study"):
        open_output(make_study(), tmp_path / "file")


def test_many_may_begin_a_study_at_once(tmp_path, monkeypatch):
    study, errors = make_study(), []
    monkeypatch.setattr(Path, "exists", slowly(Path.exists))
    for number in range(5):
        output, barrier = tmp_path / str(number), threading.Barrier(6)

        def begin(output=output, barrier=barrier) -> None:
            barrier.wait()
            try:
                open_output(study, output)
                (output / "data").mkdir(exist_ok=True)
            except Exception as error:
                errors.append(error)

        threads = [threading.Thread(target=begin) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not errors


@pytest.fixture
def here(monkeypatch):
    """Trials run in this process, one after the other, in no time; the names of those that were trained."""
    trained: list[str] = []

    class Pool:
        def submit(self, function, *args) -> Future:
            future: Future = Future()
            try:
                future.set_result(function(*args))
            except BaseException as error:
                future.set_exception(error)
            return future

    def train(study, trial, output) -> dict:
        trained.append(trial.name)
        result = make_result(study, trial, {"trace": 0.5})
        write_json(output / "results" / f"{trial.name}.json", result)
        return result

    monkeypatch.setattr(queue, "_pool", lambda output, jobs: contextlib.nullcontext(Pool()))
    monkeypatch.setattr(trials, "run_trial", train)
    return trained


@contextlib.contextmanager
def silent(title, total):
    yield lambda units: None


def names(study) -> list[str]:
    return [trial.name for trial in study.trials]


def test_trials_run_in_their_order_and_once(here, tmp_path):
    study = make_study(seeds=2)
    assert len(set(names(study))) == len(study.trials)
    assert queue.run(study, tmp_path, 1, None, silent) == 0
    assert here == names(study)
    assert queue.run(study, tmp_path, 3, None, silent) == 0 and here == names(study)
    assert [result["name"] for result in queue.results(study, tmp_path)] == names(study)
    more = make_study(seeds=3)
    assert queue.run(more, tmp_path, 2, None, silent) == 0
    assert sorted(here) == sorted(names(more))  # what a larger study shares with a smaller one is done
    assert len(queue.results(study, tmp_path)) == len(study.trials)


def test_a_study_goes_on_where_it_was_interrupted(here, tmp_path, monkeypatch):
    study, train = make_study(seeds=2), trials.run_trial

    def interrupted(study, trial, output) -> dict:
        if len(here) == 3:
            raise KeyboardInterrupt
        return train(study, trial, output)

    monkeypatch.setattr(trials, "run_trial", interrupted)
    with pytest.raises(KeyboardInterrupt):
        queue.run(study, tmp_path, 1, None, silent)
    assert len(queue.results(study, tmp_path)) == 3 and os.listdir(tmp_path / "claims") == [".lock"]
    monkeypatch.setattr(trials, "run_trial", train)
    assert queue.run(study, tmp_path, 1, None, silent) == 0
    assert here == names(study)


def test_what_somebody_else_is_at_is_left_to_them(here, tmp_path):
    study = make_study(seeds=1)
    with claim(tmp_path, study.trials[1].name):
        assert queue.run(study, tmp_path, 2, None, silent) == 1
    assert study.trials[1].name not in here and len(here) == len(study.trials) - 1
    assert queue.run(study, tmp_path, 2, None, silent) == 0


def test_no_trial_begins_late(here, tmp_path, monkeypatch):
    study, train = make_study(seeds=2), trials.run_trial
    assert queue.run(study, tmp_path, 2, time.monotonic(), silent) == len(study.trials)
    assert here == []
    clock = [0.0]
    monkeypatch.setattr(queue.time, "monotonic", lambda: clock[0])

    def slow(study, trial, output) -> dict:
        clock[0] += 60
        return train(study, trial, output)

    monkeypatch.setattr(trials, "run_trial", slow)
    assert queue.run(study, tmp_path, 1, 200.0, silent) == len(study.trials) - 4  # the fourth begins at 180 seconds
    assert here == names(study)[:4]


def test_results_of_elsewhere_are_taken_as_done(here, tmp_path):
    study = make_study(seeds=2)
    done = [make_result(study, trial, {"trace": 0.9}) for trial in study.trials[:3]]
    own = make_result(study, study.trials[0], {"trace": 0.1})
    write_json(tmp_path / "out" / "results" / f"{own['name']}.json", own)
    foreign = make_result(make_study(seeds=9), make_study(seeds=9).trials[-1], {"trace": 0.9}, name="other_seed8")
    write_lines(tmp_path / "results.jsonl", [*done, foreign])
    assert take_results(study, tmp_path / "out", read_results(study, tmp_path / "results.jsonl")) == 2
    found = queue.results(study, tmp_path / "out")
    assert found == [own, *done[1:]]  # one's own stay; those that are no trials of the study do not come
    queue.run(study, tmp_path / "out", 1, None, silent)
    assert here == names(study)[3:]


@pytest.mark.parametrize("change", [{"version": 2}, {"study": "merges"}, {"version": None}])
def test_results_of_another_study_or_version_are_refused_whole(tmp_path, change):
    study = make_study(seeds=2)
    done = [make_result(study, trial, {"trace": 0.9}) for trial in study.trials[:3]]
    write_lines(tmp_path / "results.jsonl", [*done, {**done[2], **change}])
    with pytest.raises(UserError, match=r"cannot be mixed; leave --begin-with out") as caught:
        read_results(study, tmp_path / "results.jsonl")
    assert "\n" not in str(caught.value)


def test_a_study_is_not_begun_with_results_of_another(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text('{"study": "merge", "version": 1, "name": "x"}\n')
    options = ["--output", str(tmp_path / "out"), "--begin-with", str(tmp_path / "results.jsonl")]
    assert main(["ablate", "scan_orders", *options]) == 2
    assert "cannot be mixed" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_disk_that_takes_no_more_is_said_in_a_line(tmp_path, capsys, monkeypatch, number):
    def fail(*arguments):
        raise OSError(number, os.strerror(number), "somewhere")

    monkeypatch.setattr(queue, "prepare", fail)
    assert main(["ablate", "merge", "--output", str(tmp_path / "out")]) == 2
    told = capsys.readouterr().err
    assert "somewhere" in told and os.strerror(number) in told and told.count("\n") == 1


def test_half_a_tower_is_none(tmp_path, monkeypatch):
    """Training that is told to stop leaves a checkpoint, which the trials must not take for the tower."""
    study = make_study()
    (tmp_path / "data" / "plane").mkdir(parents=True)
    monkeypatch.setattr(trials, "run", lambda config, folder: folder.mkdir(parents=True) or False)
    with pytest.raises(KeyboardInterrupt):
        trials.pretrain(study, "patch", tmp_path)
    assert not (tmp_path / "towers" / "patch").exists()
    monkeypatch.setattr(trials, "run", lambda config, folder: folder.mkdir(parents=True) or True)
    trials.pretrain(study, "patch", tmp_path)
    assert (tmp_path / "towers" / "patch").is_dir()
