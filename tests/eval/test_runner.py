"""The runner on a fake model and on a real one, the blank control, and rescoring."""

import errno
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cobra
from cobra.lm.state import State
from eval import runner
from eval.__main__ import main
from eval.files import write_json
from eval.scenes import build
from eval.tasks import TASKS
from vision_scan.errors import UserError


class Oracle:
    """Knows the answers; looks them up by picture and question, and not at all if the picture is black."""

    def __init__(self, samples) -> None:
        self.truth = {(str(s.images[0]), s.question): s.truth for s in samples}
        self.batches: list[int] = []
        self.pictures: list = []

    def answer_batch(self, requests, *, max_new_tokens):
        self.batches.append(len(requests))
        self.pictures += [images[0] for _, images in requests]
        return [self.truth.get((str(images[0]), question), "nothing") for question, images in requests]


@pytest.fixture(scope="module")
def scenes(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "scenes"
    build(path, 2, 3, seed=0, canvas=(64, 80))
    return path


@pytest.fixture(scope="module")
def samples(scenes):
    return TASKS["digit_scenes"].load(scenes)


def test_run_task_gives_one_full_record_per_sample(samples):
    records, result = runner.run_task(Oracle(samples), "digit_scenes", samples, model_name="oracle")
    assert [record["id"] for record in records] == [sample.id for sample in samples]
    assert {record["score"] for record in records} == {1.0}
    assert records[0] == {
        "id": samples[0].id,
        "group": samples[0].group,
        "question": samples[0].question,
        "truth": samples[0].truth,
        "answer": samples[0].truth,
        "score": 1.0,
        "control": "none",
        "model": "oracle",
        "task": "digit_scenes",
        "task_version": TASKS["digit_scenes"].VERSION,
    }
    assert result["summary"]["accuracy"] == 1.0
    assert result["summary"]["count"] == len(samples)
    json.dumps(result)


def test_blank_control_shows_black_pictures_of_the_same_size(samples):
    oracle = Oracle(samples)
    _, result = runner.run_task(oracle, "digit_scenes", samples, model_name="oracle", control="blank")
    assert result["control"] == "blank"
    assert result["summary"]["accuracy"] == 0.0
    for picture, sample in zip(oracle.pictures, samples, strict=True):
        assert isinstance(picture, Image.Image)
        assert picture.size == Image.open(sample.images[0]).size == (80, 64)
        assert not np.asarray(picture).any()


def test_answers_do_not_depend_on_the_batch_size(samples):
    model = cobra.build("tiny", seed=3)
    settings = {"max_new_tokens": 4}
    alone = runner.answer_samples(model, samples, batch_size=1, **settings)
    together = runner.answer_samples(model, samples, batch_size=5, **settings)
    assert alone == together
    assert len(set(alone)) > 1, "all answers are the same: the comparison would prove nothing"


def test_an_int8_state_is_what_is_asked(samples, monkeypatch):
    model, rounded = cobra.build("tiny", seed=3), []
    quantize = State.quantize
    monkeypatch.setattr(State, "quantize", lambda state: rounded.append(state) or quantize(state))
    few = samples[:3]
    records, result = runner.run_task(model, "digit_scenes", few, model_name="tiny", int8_state=True, max_new_tokens=6)
    assert result["int8_state"] and len(rounded) == 3
    for record, sample, state in zip(records, few, rounded, strict=True):
        expected = model.answer(sample.question, state=quantize(state), max_new_tokens=6)
        assert record["answer"] == expected and state.info["num_images"] == 1
    within = replace(few[0], question="Is <image> red?")
    with pytest.raises(UserError, match="in front of the question"):
        runner.answer_samples(model, [within], int8_state=True)


def test_answer_samples_goes_through_in_batches_and_tells_its_progress(samples):
    oracle, told = Oracle(samples), []
    runner.answer_samples(oracle, samples, batch_size=4, advance=told.append)
    assert oracle.batches == told
    assert max(told) == 4 and sum(told) == len(samples)


def test_rescore_needs_only_the_records(samples, tmp_path):
    records, result = runner.run_task(Oracle(samples), "digit_scenes", samples, model_name="oracle")
    records[0] |= {"answer": "  wrong ", "score": 1.0}
    runner.save(tmp_path, records, result)
    rescored, summary = runner.rescore(tmp_path / "digit_scenes.jsonl")
    assert rescored[0]["score"] == 0.0
    assert summary["accuracy"] == pytest.approx(1 - 1 / len(samples))
    assert rescored[1:] == records[1:]


def test_commands_answer_and_rescore(scenes, tmp_path, capsys):
    cobra.save(cobra.build("tiny", seed=0), tmp_path / "model")
    common = ["tasks", "--model", str(tmp_path / "model"), "--data", str(scenes), "--limit", "3"]
    output = ["--output", str(tmp_path / "results"), "--max-new-tokens", "2"]
    assert main([*common, *output]) == 0
    assert main([*common, *output, "--control", "blank"]) == 0
    lines = (tmp_path / "results" / "digit_scenes.jsonl").read_text().splitlines()
    assert [json.loads(line)["control"] for line in lines] == ["none"] * 3
    assert json.loads((tmp_path / "results" / "digit_scenes.blank.json").read_text())["summary"]["count"] == 3
    capsys.readouterr()
    assert main(["tasks", "--rescore", str(tmp_path / "results" / "digit_scenes.jsonl")]) == 0
    assert "3 questions" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--control", "blnk"], "'blank'"),
        (["--task", "digit_scene"], "'digit_scenes'"),
        (["--data", "nowhere"], "nowhere"),
        (["--model", "nowhere"], "nowhere"),
        (["--batch-size", "0"], "batch size 0"),
        (["--rescore", "nowhere.jsonl"], "nowhere.jsonl"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(scenes, tmp_path, capsys, arguments, named):
    cobra.save(cobra.build("tiny", seed=0), tmp_path / "model")
    given = [
        "tasks",
        "--model",
        str(tmp_path / "model"),
        "--data",
        str(scenes),
        "--output",
        str(tmp_path / "results"),
    ]
    assert main([*given, *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert named in error
    assert not (tmp_path / "results").exists()


def test_rescore_names_what_is_no_record(tmp_path):
    path = tmp_path / "other.jsonl"
    path.write_text('{"id": "a"}\n')
    with pytest.raises(UserError, match="answer"):
        runner.rescore(path)
    path.write_text("{broken\n")
    with pytest.raises(UserError, match="line 1"):
        runner.rescore(path)


def test_a_full_disk_leaves_nothing_behind(tmp_path, monkeypatch):
    def write_a_part(path, text, encoding):
        with open(path, "w", encoding=encoding) as file:
            file.write(text[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", write_a_part)
    with pytest.raises(OSError, match="No space left"):
        write_json(tmp_path / "result.json", {"a": 1})
    assert not list(tmp_path.iterdir())
