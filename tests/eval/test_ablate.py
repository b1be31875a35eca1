"""`python -m eval ablate` to its end, on a study that is tiny: with an order of one's own, in pieces."""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch

import vision_scan
from eval.__main__ import main
from eval.ablations import orders, queue, scan_orders, small_models
from eval.ablations.studies import ABLATIONS
from eval.ablations.trials import Stage
from vision_scan.errors import UserError

PAGE = Path(__file__).parents[2] / "docs" / "ablate.md"


@pytest.fixture
def rings(tmp_path):
    """The file that docs/ablate.md shows; what it registers is forgotten again."""
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    assert sum(bool(line.strip()) for line in code.splitlines()) <= 12
    file = tmp_path / "rings.py"
    file.write_text(code)
    with mock.patch.dict(vision_scan.SCAN_ORDERS), mock.patch.dict(sys.modules):
        yield file


def tiny(levels=None, seeds=None):
    """The real study of these levels with few pictures, steps and trials: the connectors of the main cell."""
    study = scan_orders.study(levels, seeds)
    pictures = {"train": 8, "test": 2, "seed": 0, "canvas": (48, 48), "difficulty": {"num_curves": 2, "cells": (2, 4)}}
    batch = ("train.batch_size=4",)
    return replace(
        study,
        pictures={"plane": pictures},
        towers={"patch_nowhere": study.towers["patch_nowhere"]},
        tower_stage=Stage(data="plane", steps=1, settings=batch),
        course=(Stage(data="plane", steps=2, settings=batch), Stage(data="plane", steps=1, settings=batch)),
        trials=[
            trial for trial in study.trials
            if trial.tower == "patch_nowhere" and trial.factors["place"] == "connector"
            and not trial.factors["order"].startswith("random")
        ],
    )  # fmt: skip


def test_a_study_of_one_s_own_order_runs_to_its_report(rings, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(ABLATIONS, "scan_orders", tiny)
    monkeypatch.setattr(small_models, "num_cores", lambda: 1)
    output = tmp_path / "study"
    command = ["ablate", "scan_orders", "--output", str(output), "--jobs", "1", "--seeds", "1"]
    own = [*command, "--orders", str(rings), "--levels", "rings"]
    assert main([*command, "--levels", "rings"]) == 2
    assert "unknown scan order 'rings'" in capsys.readouterr().err and not output.exists()

    assert main([*own, "--minutes", "1e-9"]) == 0  # pictures and tower alone
    told = capsys.readouterr().out
    assert "0 of 2 trials done; the same command goes on" in told
    assert "0 of 2 trials are done" in (output / "report.md").read_text()
    assert (output / "towers" / "patch_nowhere" / "config.json").exists() and not (output / "results").exists()

    assert main(own) == 0
    told = capsys.readouterr().out.splitlines()
    assert told[-1] == "2 of 2 trials done"
    assert {str(output / name) for name in ("report.md", "cost.png", "fields.png")} <= {*told}
    results = [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]
    assert [result["factors"]["order"] for result in results] == ["raster", "rings"]
    for result in results:
        assert result["accuracy"].keys() == {"colour", "relation", "count", "trace"}
        assert set(result["questions"].values()) == {2} and len(result["losses"]) == 2
        assert result["parameters"] == results[0]["parameters"] and result["flops"] == results[0]["flops"]
    report = (output / "report.md").read_text()
    assert all(f"({picture.name})" in report for picture in output.glob("*.png"))
    scores = report.partition("## Accuracy")[2]
    assert scores.count("| place connector") == 4 + 2  # four tasks, costs of two levels
    assert {path.name for path in output.iterdir()} - {"work", "effects.png"} == {
        "study.json", "orders.py", "claims", "data", "towers", "results", "results.jsonl", "report.md", "cost.png",
        "fields.png",
    }  # fmt: skip
    assert [path.name for path in (output / "claims").iterdir()] == [".lock"]

    monkeypatch.setattr(queue, "_try", lambda *_: pytest.fail("everything is done"))
    assert main(own) == 0
    rings.write_text(rings.read_text() + "\n# changed\n")
    assert main(own) == 2
    assert "holds results of other orders" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["scan_order"], "did you mean 'scan_orders'"),
        (["scan_orders", "--seeds", "0"], "--seeds 0: must be above 0"),
        (["scan_orders", "--minutes", "nan"], "--minutes nan: must be above 0"),
        (["scan_orders", "--jobs", "-1"], "--jobs -1: must be above 0"),
        (["scan_orders", "--levels", ","], "names none"),
        (["scan_orders", "--levels", "raster,hilbrt"], "did you mean 'hilbert'"),
        (["scan_orders", "--levels", "es2d"], "hold different cells"),
        (["scan_orders", "--levels", "random(seed=3)"], "differ in their seed alone"),
        (["scan_orders", "--orders", "nowhere.py"], "--orders nowhere.py: no such file"),
        (["scan_orders", "--begin-with", "nowhere.jsonl"], "nowhere.jsonl cannot be read"),
    ],
)
def test_command_refuses_in_one_line(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["ablate", *options, "--output", "out"]) == 2
    told = capsys.readouterr().err
    assert message in told and told.count("\n") == 1
    assert not any((tmp_path / "out").rglob("data"))


def test_the_order_of_the_page_reads_rings(rings):
    orders.load(rings)
    orders.load(rings)  # once
    with torch.device("meta"):  # as when the parameters of a model are counted
        assert vision_scan.order("rings", 3, 4)[0].device.type == "cpu"
    assert vision_scan.order("rings", 3, 4)[0].tolist() == [0, 1, 2, 3, 4, 7, 8, 9, 10, 11, 5, 6]
    assert vision_scan.order("rings(outwards=true)", 3, 3)[0][0] == 4
    study = scan_orders.study(["rings"], 1)
    assert {trial.factors["place"] for trial in study.trials if trial.factors["order"] == "rings"} == {
        "tower", "connector", "reading"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("import nowhere_at_all", "ModuleNotFoundError"),
        ("def (", "SyntaxError"),
        ("from vision_scan import SCAN_ORDERS as S\nS['raster'] = S['hilbert']", "raster is an order already"),
        ("from vision_scan import SCAN_ORDERS as S\ndel S['random']", "random is an order already"),
    ],
)
def test_a_file_of_orders_that_fails_is_named(tmp_path, code, message):
    file = tmp_path / "own.py"
    file.write_text(code)
    before = dict(vision_scan.SCAN_ORDERS)
    with mock.patch.dict(sys.modules), pytest.raises(UserError, match=message) as caught:
        orders.load(file)
    assert "own.py" in str(caught.value) and "\n" not in str(caught.value)
    assert before == vision_scan.SCAN_ORDERS


def test_the_study_is_paired_and_balanced():
    study = scan_orders.study()
    names = [trial.name for trial in study.trials]
    assert len(set(names)) == len(names)
    main_cell = [t for t in study.trials if all(t.factors[name] == level for name, level in study.main.items())]
    assert len(main_cell) == 8 * (6 + 6 + 5)
    for place in ("connector", "tower", "reading"):
        of_place = [t for t in main_cell if t.factors["place"] == place]
        assert len({t.tower for t in of_place}) == 1
        for seed in range(8):
            levels = [t.factors["order"] for t in of_place if t.seed == seed]
            assert f"random(seed={seed})" in levels and "raster" in levels
    assert all(trial.tower in study.towers for trial in study.trials)
    assert [trial.seed for trial in main_cell] == sorted(trial.seed for trial in main_cell)
