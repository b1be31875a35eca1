"""Our models beside others: the protocol, the files for llama.cpp, the tables."""

import json
import time

import pytest
import torch

import cobra
from cobra.export.gguf_file import TYPES, write_gguf
from eval import machine, peers
from eval.__main__ import main
from eval.peers import contest, limits, plot, scans, tables
from eval.peers.contest import Contestant, Settings, make_check, make_ratio, make_row, race
from eval.peers.llama_cpp import LlamaCppReader, rounding
from vision_scan.errors import UserError

SMALL = {
    "preset": "tiny", "rounds": 2, "threads": 1, "prompt_tokens": 8, "llama_contexts": (8, 24),
    "decode_tokens": 3, "warmup_tokens": 1, "check_tokens": 12, "batch": 3, "prefill_lengths": (40,),
    "ubatches": (16, 32), "train_tokens": 24, "grid": (3, 4), "d_inner": 4, "d_states": (2,),
    "short_context": 10, "long_context": 50, "context_chunk": 16, "read_bytes": 1 << 20, "gemm_size": 32,
}  # fmt: skip


@pytest.fixture(scope="module")
def result():
    pytest.importorskip("transformers")
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    patch = pytest.MonkeyPatch()
    patch.setattr(machine, "SECONDS", 0.01)
    patch.setattr(scans, "measure_peak", lambda *_: 12345)  # each starts a process; tested below
    before = torch.get_num_threads()
    found = peers.measure(Settings(**SMALL))
    patch.undo()
    assert torch.get_num_threads() == before
    return found


def fake(name: str, seconds: list[float], **facts) -> dict:
    one = Contestant(
        name=name, family=name.split()[0], form="float32", visit=lambda: (0.0, None), ideal_s=1.0
    )
    return make_row(one, contest.Record(seconds), **facts)


def test_every_contest_gives_rows_whose_answers_are_right(result):
    json.dumps(result)
    assert list(result["contests"]) == list(peers.CONTESTS)
    for name, found in result["contests"].items():
        assert found["rows"] and found["ratios"], name
        for row in found["rows"]:
            assert row["seconds"]["n"] == SMALL["rounds"] and row["warmed_up"] and row["failed"] is None
            assert 0 < row["seconds"]["q1"] <= row["seconds"]["median"] <= row["seconds"]["q3"]
            assert row["check"]["passed"], (row["name"], row["check"])
            assert name == "scan_2d" or row["roofline"] > 0
    assert result["passed"] and not tables.failed_checks(result)
    assert result["environment"]["versions"]["llama-cpp-python"] and result["llama_cpp"]


def test_every_rival_takes_part_in_every_form(result):
    def names(contest: str) -> set[str]:
        return {row["name"] for row in result["contests"][contest]["rows"]}

    theirs = {"llama.cpp bfloat16", "llama.cpp q8_0", "llama.cpp q4_0", "transformers Mamba-2 bfloat16"}
    assert names("decode") >= theirs | {
        "ours int4",
        "ours int4, batch 3",
        "transformers Llama float32, 24 tokens",
    }
    assert names("prefill") >= {"llama.cpp bfloat16, ubatch 16, 40 tokens", "ours float32, 40 tokens"}
    assert names("training") >= {"transformers Mamba-2 float32", "transformers Llama bfloat16"}
    states = [row["state_bytes"] for row in result["contests"]["context"]["rows"]]
    assert states[0] == states[1]
    assert {row["peak_bytes"] for row in result["contests"]["scan_2d"]["rows"]} == {12345}


def test_tables_and_plot(result, tmp_path):
    text = tables.to_markdown(result)
    for words in (
        "llama.cpp q4_0",
        "of roofline",
        "2 rounds",
        "GB/s",
        "transformers 5",
        "Every row's answers",
    ):
        assert words in text, words
    widths = [line.count("|") for line in text.splitlines() if line.startswith("|")]
    assert min(widths) > 3
    plot.draw(result, tmp_path / "peers.png")
    assert (tmp_path / "peers.png").read_bytes().startswith(b"\x89PNG")


def test_what_could_not_be_measured_is_told():
    fine, slow, large = fake("fine", [1.0]), fake("slow", [1.0]), fake("large", [1.0])
    slow["warmed_up"], large["peak_bytes"] = False, None
    remarks = tables._remarks([fine | {"peak_bytes": 1}, slow, large])
    assert [remark.rpartition(": ")[2] for remark in remarks] == ["slow.", "large."]


def test_ratios_of_made_up_times():
    ours, other = fake("ours", [1.0, 2.0, 3.0]), fake("other", [8.0, 4.0, 6.0])
    (ratio,) = make_ratio("a", ours, other)
    assert ratio["times"] == 3.0 and (ratio["low"], ratio["high"]) == (5 / 2.5, 7 / 1.5)
    (batched,) = make_ratio("b", fake("ours, batch 8", [4.0]), ours, scale=8)
    assert batched["times"] == 4.0  # eight rows in twice the time
    assert make_ratio("c", ours, None) == make_ratio("d", ours, fake("none", [])) == []
    assert tables.ratio_line(ratio) == "a: 3.00 times (2.00 to 4.67)"


def test_traffic_of_decoding():
    cost = cobra.cost.LMCost(cobra.PRESETS["mamba2-130m"].lm)
    assert contest.decode_bytes(cost, 64, "bfloat16") == cost.decode_bytes(64, 2)
    assert contest.decode_bytes(cost, 64, "float32", 8) == cost.decode_bytes(64, 4, 8)
    state = cost.decode_bytes(64, 2) - 2 * cost.parameters
    assert contest.decode_bytes(cost, 64, "int4", 8) == 8 * state + cost.parameters * 4.5 / 8


def test_contestants_take_turns_and_the_slow_have_fewer_visits(monkeypatch):
    now, visited = [0.0], []
    settings = Settings(**SMALL | {"rounds": 4, "budget_s": 50.0, "limit_s": 200.0})
    monkeypatch.setattr(contest.time, "perf_counter", lambda: now[0])

    def contestant(name: str, seconds: float) -> Contestant:
        def visit():
            visited.append(name)
            now[0] += min(seconds, settings.limit_s)
            if seconds > settings.limit_s:
                raise limits.OutOfTimeError
            return seconds, name

        return Contestant(name=name, family=name, form="float32", visit=visit)

    def without_memory():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")

    units = []
    runners = [contestant(*one) for one in (("quick", 1.0), ("slow", 40.0), ("endless", 900.0))]
    runners.append(Contestant(name="greedy", family="", form="float32", visit=without_memory))
    hopeless = contestant("hopeless", 1.0)
    hopeless.least_s = 1000.0
    records = race([*runners, hopeless], settings, units.append)
    assert sum(units) == 5 * (settings.rounds + 1)
    assert len(records["quick"].seconds) == 4 and records["quick"].warmed_up
    assert records["slow"].seconds == [40.0] and not records["slow"].warmed_up
    assert records["endless"].failed == "not one visit within 200 s" and not records["endless"].seconds
    assert "not tried" in str(records["hopeless"].failed)
    assert records["greedy"].failed == "out of memory"
    assert visited == ["quick", "slow", "endless", "quick", "quick", "quick", "quick"]
    rows = [make_row(one, records[one.name]) for one in runners]
    assert contest.fastest(rows)["name"] == "quick"


def test_a_wrong_answer_is_marked():
    right, wrong = (
        fake(name, [1.0], check=make_check({"x": error}, 0.1)) for name, error in (("a", 0.0), ("b", 1.0))
    )
    assert peers.passed(right) and not peers.passed(wrong)
    assert not make_check({"x": float("nan")}, 0.1)["passed"]
    found = {"contests": {"training": {"rows": [right, wrong]}}}
    assert tables.failed_checks(found) == ["b: x 1 (allowed 0.1)"]
    assert "WRONG" in tables._check(wrong) and "WRONG" not in tables._check(right)


def test_the_scan_as_published_is_ours_on_a_grid_that_is_not_square():
    inputs = scans.make_inputs((3, 5), 4, 2)
    expected = scans.compiled(*inputs.grids)
    torch.testing.assert_close(scans.published(*inputs.sequences), expected)
    torch.testing.assert_close(scans.chunked(*inputs.grids), expected)


def test_peak_memory_is_measured_in_a_process_of_its_own():
    settings = Settings(**SMALL | {"grid": (32, 32), "d_inner": 64})
    found = scans.measure_peak(settings, scans.PUBLISHED, 8, "forward")
    decays = 4 * 32 * 32 * 64 * 8 * 4  # bytes; the inflows are as many
    assert 1.5 * decays < found < 20 * decays


def test_limits():
    with pytest.raises(limits.OutOfTimeError), limits.time_limit(0.01):
        time.sleep(5)
    with pytest.raises(RuntimeError) as caught, limits.memory_limit():
        torch.empty(1 << 50, dtype=torch.uint8)
    assert limits.is_out_of_memory(caught.value)
    torch.empty(1 << 20)


@pytest.mark.parametrize("form", TYPES)
def test_llama_cpp_reads_what_is_written(form, tmp_path):
    pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    model, settings = cobra.build("tiny", seed=1), Settings(**SMALL)
    write_gguf(tmp_path / "lm.gguf", model.lm.config, model.lm.state_dict(), form)
    reader = LlamaCppReader(tmp_path / "lm.gguf", form, 1, 64)
    expected = peers.ours.with_weights(model, rounding(form))
    ids = settings.ids(1, 10)
    error = contest.rms_ratio(reader.logits(ids), expected.logits(ids))
    assert error < (1e-5 if form == "float32" else 0.05)
    if form == "float32":
        assert greedy(reader, ids) == greedy(expected, ids)
    reader.close()


def greedy(reader, ids: torch.Tensor) -> list[int]:
    logits, kept = reader.read(ids)
    state, found = reader.resume(kept), [int(logits.argmax(-1))]
    with torch.inference_mode():
        for _ in range(12):
            logits, state = reader.step(torch.tensor(found[-1:]), state)
            found.append(int(logits.argmax(-1)))
    return found


def test_command_writes_numbers_tables_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(machine, "SECONDS", 0.01)
    monkeypatch.setattr(peers, "measure_machine", lambda *_: machine.measure_machine(1 << 20, 32))
    monkeypatch.setattr(peers, "PEERS", {**peers.PEERS, "transformers": ((), "hf")})
    output = tmp_path / "bench" / "peers.json"
    arguments = ["efficiency", "--peers", "transformers", "--preset", "tiny", "--only", "context"]
    arguments += ["--rounds", "1", "--threads", "1", "--longest-context", "1100", "--output", str(output)]
    assert main(arguments) == 0
    assert list(json.loads(output.read_text())["contests"]) == ["context"]
    assert output.with_suffix(".md").exists() and output.with_suffix(".png").exists()
    assert "time per token after 1,100 tokens" in capsys.readouterr().out
    monkeypatch.setitem(contest.TOLERANCE, "bfloat16", 0.0)
    assert main(arguments) == 1
    assert "failed: ours bfloat16, 1,000 tokens" in capsys.readouterr().err
    assert "**WRONG**" in output.with_suffix(".md").read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--peers", "vllm"], "transformers, llama.cpp"),
        (["--peers", "transformers", "--only", "decode,prefil"], "did you mean 'prefill'"),
        (["--peers", "transformers", "--preset", "transformer-130m"], "mamba2-130m"),
        (["--peers", "transformers", "--preset", "mamba2-131m"], "did you mean"),
        (["--peers", "transformers", "--rounds", "0"], "rounds is 0"),
        (["--peers", "transformers", "--model", "tiny"], "leave out --model"),
        ([], "--peers"),
    ],
)
def test_command_refuses_what_it_does_not_know(arguments, said, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(peers, "PEERS", {name: ((), extra) for name, (_, extra) in peers.PEERS.items()})
    assert main(["efficiency", *arguments, "--output", str(tmp_path / "peers.json")]) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_missing_rival_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(peers, "find_spec", lambda module: None)
    with pytest.raises(UserError, match=r"^llama.cpp is not installed: pip install 'cobra-vlm\[bench\]'$"):
        peers.check_names(["llama.cpp"], [])
