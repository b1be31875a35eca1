"""The page and the verdict, from made-up numbers."""

import json
import re
from html.parser import HTMLParser

import pytest

from eval import report as reports
from eval.markup import count, duration, join, seconds, size, tag
from eval.page import render
from eval.verdict import verdict
from tests.eval.fake_report import make_report
from vision_scan.errors import UserError


class Balance(HTMLParser):
    """Checks that every element is closed, in order; collects the text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []

    def handle_starttag(self, tag_name, attrs):
        if tag_name not in ("meta", "br", "img"):
            self.open.append(tag_name)

    def handle_endtag(self, tag_name):
        assert self.open.pop() == tag_name

    def handle_startendtag(self, tag_name, attrs):
        pass

    def handle_data(self, data):
        self.text.append(data)


def read(page: str) -> str:
    parser = Balance()
    parser.feed(page)
    assert not parser.open
    return " ".join(parser.text)


def by_claim(rows: list[dict], start: str) -> dict:
    (row,) = [row for row in rows if row["claim"].startswith(start)]
    return row


def test_page_is_complete_and_self_contained():
    page = render(make_report())
    text = read(page)
    for word in (
        "Answers",
        "Examples",
        "Decoding against context length",
        "Training",
        "How a picture is read",
    ):
        assert word in text
    assert "Which digit is left of the 7?" in text
    assert "3 7 1 <4>" in text, "answers are shown as they are, escaped"
    links = re.findall(r'(?:src|href|url)\s*[=(]\s*"?([^"\s>)]{0,40})', page)
    assert all(link.startswith(("data:", "#")) for link in links), links
    assert "<script" not in page
    assert page.count("<svg") == 5
    assert "#05050" not in page and "var(--series-0)" in page, "placeholder colours became variables"


def test_only_the_quick_run_says_that_it_is_the_quick_run():
    assert "quick run" in read(render(make_report(quick=True)))
    assert "quick run" not in read(render(make_report()))


def test_verdict_says_what_was_reached():
    rows = make_report()["verdict"]
    assert all(row["reached"] for row in rows if row["reached"] is not None)
    assert by_claim(rows, "Cobra answers")["measured"].startswith("92.5% of 2,280")
    assert "no difference" in by_claim(rows, "Which of these")["measured"]
    assert "2,310" in by_claim(rows, "Where the decode")["measured"]


def test_verdict_says_what_was_missed():
    report = make_report(shift=-0.4)
    rows = report["verdict"]
    assert by_claim(rows, "Cobra answers")["reached"] is False
    assert by_claim(rows, "Cobra is at least")["reached"] is False
    kinds = by_claim(rows, "Cobra: every kind")
    assert kinds["reached"] is False and "relation" in kinds["measured"] and "read" not in kinds["measured"]
    assert by_claim(rows, "Transformer answers")["reached"] is True
    assert "not reached" in read(render(report))


def test_verdict_names_the_better_model_only_when_the_interval_excludes_zero():
    report = make_report()
    report["comparison"] |= {"difference": -0.03, "low": -0.05, "high": -0.01}
    assert "Transformer is better than Cobra by 3.0" in by_claim(verdict(report), "Which of these")["measured"]
    report["comparison"] |= {"high": 0.001}
    assert "no difference" in by_claim(verdict(report), "Which of these")["measured"]


def test_verdict_on_decoding_follows_the_numbers():
    report = make_report()
    points = report["efficiency"]["models"]["cobra"]["points"]
    points[-1]["decode_s"]["median"] = 1.2 * points[0]["decode_s"]["median"]
    points[-1]["state_bytes"] += 1
    report["efficiency"]["models"]["transformer"]["check"]["passed"] = False
    report["efficiency"]["crossovers"][0] |= {"kind": "never", "context": None}
    rows = verdict(report)
    assert by_claim(rows, "Cobra: time per token")["reached"] is False
    assert "+20.0%" in by_claim(rows, "Cobra: time per token")["measured"]
    assert by_claim(rows, "Cobra: the state")["reached"] is False
    assert by_claim(rows, "Transformer: decoding")["reached"] is False
    assert "no crossover up to 16,384 tokens" in by_claim(rows, "Where the decode")["measured"]


def test_compare_is_paired():
    def records(scores):
        return [{"id": str(i), "score": score} for i, score in enumerate(scores)]

    result = reports._compare({"a": records([1, 1, 0, 1]), "b": records([1, 0, 0, 0])})
    assert result["difference"] == 0.5 and result["n"] == 4
    assert result["low"] < 0.5 < result["high"]
    same = reports._compare({"a": records([1, 0]), "b": records([1, 0])})
    assert (same["low"], same["difference"], same["high"]) == (0, 0, 0)
    with pytest.raises(UserError, match="different questions"):
        reports._compare({"a": records([1, 0]), "b": records([1])})


def test_write_draws_a_report_again(tmp_path):
    numbers = tmp_path / "report.json"
    numbers.write_text(json.dumps(make_report()))
    assert reports.write(numbers) == (numbers, tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == render(make_report())


def test_write_names_what_is_no_report(tmp_path):
    with pytest.raises(UserError, match=r"demo\.json"):
        reports.write(tmp_path)
    (tmp_path / "x.json").write_text("[1]")
    with pytest.raises(UserError, match=r"x\.json is not a report"):
        reports.write(tmp_path / "x.json")


def test_markup_escapes_all_but_markup():
    assert tag("p", "a < b & ", tag("b", '"'), class_='x"y') == (
        '<p class="x&quot;y">a &lt; b &amp; <b>&quot;</b></p>'
    )
    assert join(["<", tag("br")]) == "&lt;<br>"


def test_numbers_read_well():
    assert [seconds(v) for v in (2.5, 0.0123, 4.56e-5)] == ["2.5 s", "12.3 ms", "45.6 µs"]
    assert [size(v) for v in (12, 420_864, 999_999, 3.2e9)] == ["12 B", "421 kB", "1 MB", "3.2 GB"]
    assert [duration(v) for v in (59.4, 60, 3671)] == ["59 s", "1 min 00 s", "61 min 11 s"]
    assert [count(v, "token") for v in (1, 16384)] == ["1 token", "16,384 tokens"]
