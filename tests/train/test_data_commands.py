"""`python -m train data check | inspect | shard`."""

import json
import re
from pathlib import Path

import pytest

import cobra
from tests.train.small_run import write_data, write_preference_data
from train.__main__ import main
from train.data.commands import histogram


def check(*arguments: str) -> int:
    return main(["data", *arguments])


def test_check_reports_what_there_is(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check("check", str(data), "--max-tokens", "70") == 0
    told = capsys.readouterr().out
    assert "10 usable rows, 8 images" in told
    assert "images per row: 0: 2, 1: 8" in told
    assert "64 for an image" in told and "are learned" in told
    assert "row 'row9': the same as row 'row4'" in told
    assert "tokens, more than 70" in told
    assert "█" in told


def test_check_names_bad_rows_and_exits_2(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = json.loads(data.read_text())
    (data.parent / "0.png").write_bytes(b"")
    rows[1]["conversations"][0]["value"] = "no mark"
    rows[2]["conversations"] = [*rows[4]["conversations"], {"from": "human", "value": "<image> x"}]
    rows[2]["conversations"].append({"from": "gpt", "value": " "})
    del rows[3]["conversations"]
    rows[3].pop("regions")
    data.write_text(json.dumps(rows))
    assert check("check", str(data), "--full") == 2
    told = capsys.readouterr().out
    assert "3 rows that cannot be used:" in told
    for reason in ("'row0': .*empty", "'row1': 0 <image> marks", "'row3': has no 'conversations'"):
        assert any(re.search(reason, line) for line in told.splitlines()), reason
    assert "row 'row2': 1 empty answers" in told


def test_inspect_shows_a_row_as_the_model_reads_it(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    cobra.save(cobra.build("tiny"), tmp_path / "model")
    assert check("inspect", str(data), "--model", str(tmp_path / "model"), "--row", "row1", "--row", "4") == 0
    told = capsys.readouterr().out
    assert "[64 image tokens]" in told and "20 x 16" in told
    assert "row 'row1'" in told and "row 'row4'" in told and "row 'row0'" not in told
    assert "\x1b[1;32m" in told  # what is learned is green
    assert check("inspect", str(data), "--row", "nobody") == 2
    assert "has no row nobody" in capsys.readouterr().err


def test_preference_data_is_checked_and_shown(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    data = write_preference_data(tmp_path / "data")
    assert check("check", str(data)) == 0
    told = capsys.readouterr().out
    assert "preference data: 10 rows with a chosen and a rejected answer" in told
    monkeypatch.setenv("FORCE_COLOR", "1")
    row = json.loads(data.read_text())[0]
    assert check("inspect", str(data), "--row", "0", "--max-tokens", "9") == 0
    told = capsys.readouterr().out
    assert "longer than 9: cannot be used" in told
    assert told.count("[64 image tokens]") == 2  # with either answer
    assert f"\x1b[1;32m{row['chosen']}" in told and f"\x1b[1;31m{row['rejected']['value']}" in told
    rows = json.loads(data.read_text())
    del rows[3]["rejected"], rows[4]["chosen"]
    data.write_text(json.dumps([*rows[:5], rows[0], *rows[5:]]))
    assert check("check", str(data)) == 2
    told = capsys.readouterr().out
    assert "has 'chosen' and no 'rejected'" in told and "has no 'chosen'" in told
    assert "row 'row0': the same as row 'row0'" in told


def test_shards_are_whole_or_absent(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "shards"
    (data.parent / "3.png").unlink()
    assert check("shard", str(data), "--output", str(output)) == 2
    assert "row 'row3'" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [data.parent]
    data = write_data(data.parent)
    assert check("shard", str(data), "--output", str(output)) == 0
    assert [path.name for path in output.iterdir()] == ["shard-000000.tar"]
    first = (output / "shard-000000.tar").read_bytes()
    assert check("shard", str(data), "--output", str(output)) == 2
    assert check("shard", str(data), "--output", str(tmp_path / "again")) == 0
    assert (tmp_path / "again" / "shard-000000.tar").read_bytes() == first
    assert check("check", str(output)) == 0
    assert "10 usable rows, 8 images" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["check"], "PATH"),
        (["check", "none.json"], "cannot read none.json"),
        (["chek", "x"], "chek"),
        (["check", "x.json", "--model", "tinny"], "unknown preset or model directory 'tinny'; did you mean 'tiny'"),
    ],
)
def test_mistake_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(*arguments) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_histogram_has_every_value_once() -> None:
    lines = list(histogram([3, 3, 3, 50, 100]))
    assert sum(int(line.split()[3].replace(",", "")) for line in lines) == 5
    assert len(list(histogram([7]))) == 1
