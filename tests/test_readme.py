"""README and docs: their code runs as written, and what they say of the tree is so."""

import contextlib
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
from PIL import Image

import cobra
import cobra.cli
import eval.__main__
import train.__main__
import vision_scan
from cobra.connector import CONNECTORS
from cobra.lm.stack import LAYERS
from cobra.typed_config import to_dict
from eval import readme
from eval.peers.tables import to_markdown
from tests.cobra.serve_ways import start_server
from tests.eval.fake_report import make_report
from train.settings import RunConfig
from vision_scan.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
DOCS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md"))
README = "README.md"
MEASURED = ROOT / "docs" / "demo-report.json"

# Not run: these set up environments, take many minutes, or start several processes.
SKIPPED = ("make ", "bash benchmarks/", "pip install ", "torchrun ", "deepspeed ")
# Appended, to end in a second what would take minutes; of an option given twice the last one counts.
SHORTER = {
    "python -m train --recipe": "--set train.steps=2 --set train.batch_size=2",
    "python -m eval scenes": "--scenes 2 --test-scenes 1",
    "python -m eval plane-scenes": "--train 2 --test 1",
    "python -m eval efficiency": "--shortest-context 32 --longest-context 64 --rounds 1 --prefill-rounds 1",
}
PROGRAMS = {"cobra": cobra.cli.main, "train": train.__main__.main, "eval": eval.__main__.main}


class Block(NamedTuple):
    """A fenced block: its language, text, line, and whether it stands right behind the one before."""

    language: str
    text: str
    line: int
    follows: bool


def blocks(page: str) -> Iterator[Block]:
    text, end = (ROOT / page).read_text(encoding="utf-8"), 0
    for found in re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        follows = not text[end : found.start()].strip()
        yield Block(found[1], found[2], text.count("\n", 0, found.start()) + 2, follows)
        end = found.end()


@pytest.fixture
def somewhere(tmp_path, monkeypatch) -> Iterator[Path]:
    """A folder with what a reader has at hand: the demo's output and a picture. Tables that the pages
    add to are put back."""
    monkeypatch.chdir(tmp_path)
    for name, preset in (("cobra", "tiny"), ("transformer", "transformer-tiny")):
        cobra.save(cobra.build(preset), f"runs/demo/{name}")
    Path("runs/demo/report.json").write_text(json.dumps(make_report()))
    Image.new("RGB", (90, 70), "orange").save("cat.png")
    with contextlib.ExitStack() as stack:
        for table in (vision_scan.SCAN_ORDERS, CONNECTORS, LAYERS):
            stack.enter_context(mock.patch.dict(table))
        yield tmp_path


@pytest.fixture
def servers() -> Iterator[list[subprocess.Popen]]:
    """Those that a page has started; they are ended with it."""
    started: list[subprocess.Popen] = []
    yield started
    for server in started:
        server.terminate()
        assert server.wait(30) in (0, -signal.SIGTERM)


@pytest.mark.parametrize("page", [README, *DOCS])
def test_page_runs(page, somewhere, servers, monkeypatch):
    namespace: dict = {"__name__": "__main__"}
    output, address = "", "http://127.0.0.1:8000"
    for block in blocks(page):
        if block.language == "python":
            text = block.text.replace("http://127.0.0.1:8000", address)
            exec(compile(text, f"{page}, block at line {block.line}", "exec"), namespace)
        elif block.language == "sh":
            for line in commands(block.text):
                if line.startswith("cobra serve"):
                    server, address = start_server(*shlex.split(line)[2:])
                    servers.append(server)
            others = (line for line in commands(block.text) if not line.startswith("cobra serve"))
            output = "".join(run(line, page == README, monkeypatch) for line in others)
        elif block.language == "bash":
            pass  # of a cluster: tests/test_cluster_guide.py dry-runs it
        elif block.language == "json":
            write_rows(json.loads(block.text))
        elif block.language == "text" and block.follows:
            assert output.endswith(block.text), f"{page}, line {block.line}: the output is\n{output}"
        else:
            assert block.language == "text", f"{page}, line {block.line}: {block.language!r} is not run"


def commands(text: str) -> Iterator[str]:
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip() and not line.startswith(SKIPPED):
            yield line


def run(line: str, with_deepspeed: bool, monkeypatch) -> str:
    """Runs a command to its successful end: what it printed.

    DeepSpeed begins only once in a process, so training with it gets a process of its own; without it,
    it is the plain engine that trains.
    """
    more = next((end for start, end in SHORTER.items() if line.startswith(start)), "")
    words = shlex.split(line, comments=True) + shlex.split(more)
    is_module = words[:2] == ["python", "-m"]
    program, *arguments = words[2:] if is_module else words
    assert program in PROGRAMS, f"{line}: neither run nor skipped"
    is_training = program == "train" and "--recipe" in arguments
    if is_training and with_deepspeed:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", program, *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"
        return done.stdout
    if is_training:
        arguments += ["--set", "train.engine=plain"]
    monkeypatch.setattr("sys.stdin", io.StringIO("What is it?\n/quit\n"))
    with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.redirect_stderr(io.StringIO()) as err:
        status = PROGRAMS[program](arguments)
    assert status == 0, f"{line}\n{out.getvalue()}{err.getvalue()}"
    return out.getvalue()


def write_rows(rows: list[dict]) -> None:
    """The rows that a page shows, as my.json, with a picture for each name in them."""
    Path("my.json").write_text(json.dumps(rows))
    Path("pics").mkdir()
    for row in rows:
        names = row["image"] if isinstance(row["image"], list) else [row["image"]]
        for name in names:
            Image.new("RGB", (50, 40), "brown").save(Path("pics", name))


def test_unknown_command_is_noticed(monkeypatch):
    with pytest.raises(AssertionError, match="neither run nor skipped"):
        run("cobbra info tiny", False, monkeypatch)
    with pytest.raises(AssertionError, match="unknown"):
        run("cobra info tinny", False, monkeypatch)


@pytest.mark.parametrize("page", [README, "CONTRIBUTING.md", *DOCS])
def test_links_resolve(page):
    text = re.sub(r"<!--.*?-->", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    targets = [target for target in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in target]
    missing = [target for target in targets if not (ROOT / page).parent.joinpath(target).exists()]
    assert not missing


def file_map() -> list[str]:
    """The paths of the README's file map, relative to the root."""
    (text,) = (block.text for block in blocks(README) if "cobra/   " in block.text)
    paths, folders = [], [""]
    for line in filter(str.strip, text.splitlines()):
        names = re.split(r"\s{2,}", line.strip())[0].split()
        depth = (len(line) - len(line.lstrip())) // 2
        folders = folders[: depth + 1]
        paths += ["".join(folders) + name for name in names]
        folders.append(names[0] if names[0].endswith("/") else "")
    return paths


def test_file_map_is_true():
    listed = file_map()
    assert len(listed) == len(set(listed)) > 50
    assert [path for path in listed if not (ROOT / path).exists()] == []
    assert [path for path in listed if path.endswith("/") != (ROOT / path).is_dir()] == []


def test_file_map_is_complete():
    folders = (
        "cobra", "cobra/connector", "cobra/lm", "cobra/towers", "vision_scan", "vision_scan/modules", "train", "eval",
    )  # fmt: skip
    there = {path.relative_to(ROOT).as_posix() for name in folders for path in (ROOT / name).glob("*.py")}
    there = {path for path in there if not path.endswith("__init__.py")}
    assert there - set(file_map()) == set()
    assert set(DOCS) - set(file_map()) == set()


def test_contributing_names_what_there_is():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    paths = re.findall(r"`([\w/]+/(?:[\w.]+\.py)?)`", text)
    assert len(paths) > 10
    assert [path for path in paths if not (ROOT / path).exists()] == []


def test_settings_are_documented():
    text = (ROOT / "docs" / "train.md").read_text(encoding="utf-8")
    documented = dict(re.findall(r"^\| `(\w+\.[\w.]+)` \| (\S+) \|", text, re.MULTILINE))
    assert documented == dict(flatten(to_dict(RunConfig(recipe="any")), ""))


def flatten(node: dict, prefix: str) -> Iterator[tuple[str, str]]:
    """Settings and defaults as the table writes them."""
    for name, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{name}.")
        elif prefix:
            text = ",".join(value) if isinstance(value, list) else str(value)
            yield (
                prefix + name,
                {"None": "none", "": "none", "True": "true", "False": "false"}.get(text, text),
            )


def test_results_have_every_number():
    report = make_report()
    text = readme.render(report)
    for result in report["accuracy"].values():
        for part in result.values():
            for row in (part, *part["groups"].values()):
                low, high = row["interval"]
                assert f"| {100 * row['accuracy']:.1f} ({100 * low:.1f} to {100 * high:.1f}) |" in text
    for kind in report["accuracy"]["cobra"]["questions"]["groups"]:
        assert len(re.findall(rf"^\| {kind} \| 380 \|(?: [\d.]+ \(.*?\) \|){{4}}$", text, re.MULTILINE)) == 1
    for context in report["efficiency"]["protocol"]["contexts"]:
        row = rf"^\| {context:,} \|(?:[^|]+\| 30% \|(?:[^|]+\|){{2}}){{2}}$"  # for each model
        assert len(re.findall(row, text, re.MULTILINE)) == 1
    for stage in report["stages"]:
        assert f"| {stage['title']} |" in text
    for said in ("Some CPU @ 2.0GHz", "2 cores", "2 threads", "0123456789ab", "6,000 scenes", "2,310 tokens"):
        assert said in text
    assert "Not reached" not in text and "quick" not in text


def test_results_say_what_was_missed():
    text = readme.render(make_report(quick=True, shift=-0.2))
    assert text.startswith("**This is the quick run")
    assert "- Not reached: Cobra answers at least 85%" in text


def test_results_are_written_between_the_markers(tmp_path, capsys):
    report, page = tmp_path / "report.json", tmp_path / "page.md"
    report.write_text(json.dumps(make_report()))
    page.write_text(f"before\n{readme.START}\nold\n{readme.END}\nafter\n")
    assert eval.__main__.main(["readme", str(report)]) == 0
    printed = capsys.readouterr().out
    for _ in range(2):  # the second time, over its own
        assert eval.__main__.main(["readme", str(report), "--write", str(page)]) == 0
        text = page.read_text()
        assert text == f"before\n{readme.START}\n\n{printed}\n{readme.END}\nafter\n"


@pytest.mark.parametrize("text", ["", "{start}", "{end}{start}", "{start}{start}{end}"])
def test_results_need_both_markers(text):
    page = text.format(start=readme.START, end=readme.END)
    with pytest.raises(UserError, match=r"page\.md needs the line"):
        readme.replace_results(page, "new\n", "page.md")


@pytest.mark.parametrize("command", ["readme", "report"])
@pytest.mark.parametrize("content", ["[]", "{}", "no JSON", '{"verdict": [], "format": 1}'])
def test_results_of_something_else(tmp_path, capsys, content, command):
    path = tmp_path / "other.json"
    path.write_text(content)
    assert eval.__main__.main([command, str(path)]) == 2
    told = capsys.readouterr().err
    assert str(path) in told and told.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_readme_shows_the_measured_results():
    page = (ROOT / README).read_text(encoding="utf-8")
    if not MEASURED.exists():
        assert readme.replace_results(page, "") != page  # the markers are there
        pytest.skip("no measured run is committed")
    assert readme.replace_results(page, readme.read(MEASURED)[0]) == page


def test_readme_shows_the_results_beside_peers():
    page, peers = (ROOT / README).read_text(encoding="utf-8"), ROOT / "docs" / "peers.json"
    results, section = readme.read(peers)
    assert readme.replace_results(page, results, section=section) == page
    assert peers.with_suffix(".md").read_text(encoding="utf-8") == to_markdown(json.loads(peers.read_text()))


def test_readme_shows_the_results_of_gpus():
    page = (ROOT / README).read_text(encoding="utf-8")
    results, section = readme.read(ROOT / "benchmarks" / "results")
    assert readme.replace_results(page, results, section=section) == page
