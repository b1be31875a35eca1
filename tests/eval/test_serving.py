"""What `python -m eval serving | reading` measure, on few tokens."""

import json
import subprocess
import sys

import pytest

import eval.__main__
from eval.image_reading import pictures_of


def test_serving_tells_of_both_ways_and_of_the_roofline(tmp_path, capsys, monkeypatch):
    machine = {"read_bytes_per_s": 1e10, "gemm_flops_per_s": {"float32": 1e11, "bfloat16": 1e11}}
    monkeypatch.setattr("eval.serving.measure_machine", lambda: machine)
    numbers = ("--requests", "3", "--prompt-tokens", "12", "--new-tokens", "16", "--images", "4", "--rounds", "2")
    output = tmp_path / "serving.json"
    assert eval.__main__.main(["serving", "--model", "tiny", *numbers, "--output", str(output)]) == 0
    told, result = capsys.readouterr().out, json.loads(output.read_text())
    assert result["equal_answers"] == [6, 6] and "equal answers: 6 of 6" in told
    rates = result["tokens_per_s"]
    assert all(len(rates[name]["all"]) == 2 and rates[name]["median"] > 0 for name in rates)
    ratio = [b / a for a, b in zip(rates["one after another"]["all"], rates["at once"]["all"], strict=True)]
    assert result["at_once_over_one_after_another"]["all"] == pytest.approx(ratio)
    limits = result["roofline_tokens_per_s"]
    assert limits["1"] < limits["3"] < 3 * limits["1"]  # weights are read once for all rows
    assert result["share_of_roofline"] == pytest.approx(rates["at once"]["median"] / limits["3"])
    follow_up = result["follow_up"]
    assert 40 <= follow_up["new_tokens"] < 60 and follow_up["first_s"] > 0 < follow_up["ratio"]
    assert result["gaps"]["images"] == 4 and result["gaps"]["prompt_tokens"] > 4 * 64
    assert 0 < result["gaps"]["beside"]["median"] <= result["gaps"]["beside"]["most"]


def test_reading_tells_images_tokens_and_memory(tmp_path, capsys):
    output = tmp_path / "reading.json"
    command = ["reading", "--model", "tiny", "--images", "5,2", "--output", str(output)]
    assert eval.__main__.main(command) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [row["images"] for row in rows] == [2, 5]
    assert rows[1]["tokens"] - rows[0]["tokens"] == 3 * 65 and rows[0]["state_bytes"] == rows[1]["state_bytes"]
    assert rows[0]["peak_bytes"] <= rows[1]["peak_bytes"] and len(capsys.readouterr().out.splitlines()) == 3


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    output = tmp_path / "reading.json"  # in a process that has done nothing else; 40 images fill the first chunk
    command = [sys.executable, "-m", "eval", "reading", "--model", "tiny", "--images", "40,160", "--output", output]
    subprocess.run(command, check=True, capture_output=True)
    few, many = json.loads(output.read_text())["rows"]
    assert many["tokens"] > 10_000 and many["peak_bytes"] <= 1.05 * few["peak_bytes"]


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["reading", "--model", "tiny", "--images", "0"], "--images '0'"),
        (["reading", "--model", "tiny", "--images", "ten"], "--images 'ten'"),
        (["reading", "--model", "nowhere"], "nowhere"),
        (["serving", "--model", "tiny", "--rounds", "0"], "--rounds 0"),
    ],
)
def test_mistakes_are_one_line(command, message, capsys):
    assert eval.__main__.main(command) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_pictures_are_the_same_each_time_and_all_different():
    first, second = [[image.tobytes() for image in pictures_of(4, 7, 5)] for _ in range(2)]
    assert first == second and len(set(first)) == 4
