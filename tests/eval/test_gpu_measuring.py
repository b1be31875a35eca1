"""What `python -m eval gpu` measures, tiny, on the CPU: the same functions that run on a GPU."""

import json
import sys

import pytest
import torch

import vision_scan
from cobra.config import PRESETS
from cobra.cost import LMCost
from eval.gpu import decoding, operators, rivals, scans, small_shapes, training
from eval.gpu.stopwatch import Stopwatch, measure_ceilings, race, reason
from eval.gpu.targets import COMPACT, MAMBA, TRANSFORMER, decode_name, prefill_name, train_name
from eval.peers.contest import rms_ratio
from tests.vision_scan.cuda.loaded import EMULATED

CEILINGS = {"copy_bytes_per_s": 1e9, "matrix_flops_per_s": 1e10, "copy_bytes": 8, "gemm_size": 2}


def test_race_alternates_drops_what_fails_and_what_is_slow():
    order = []

    class Clock(Stopwatch):
        def seconds(self, work):
            order.append(work.__name__)
            return {"quick": 1.0, "slow": 5.0}[work.__name__], work()

    def quick():
        pass

    def slow():
        pass

    def fails():
        raise torch.OutOfMemoryError("CUDA out of memory")

    timings = race(Clock("cpu"), {"a": quick, "b": slow}, rounds=3, warm_up=1)
    assert order == ["quick", "slow", "quick", "slow", "slow", "quick", "slow", "quick"]
    assert timings["a"].seconds == {"median": 1.0, "q1": 1.0, "q3": 1.0, "n": 3}
    timings = race(Stopwatch("cpu"), {"a": quick, "b": fails}, rounds=2)
    assert timings["b"].failed == "out of memory" and timings["b"].seconds is None
    assert len(timings["a"].visits) == 2
    timings = race(Stopwatch("cpu"), {"a": quick}, rounds=5, budget_s=0.0)
    assert timings["a"].seconds is None or timings["a"].seconds["n"] == 1
    assert reason(ValueError("one\ntwo")) == "ValueError: one"


def test_ceilings_on_the_cpu():
    found = measure_ceilings(Stopwatch("cpu"), copy_bytes=1 << 16, gemm_size=16)
    assert found["copy_bytes_per_s"] > 0 and found["matrix_flops_per_s"] > 0


SMALL = scans.Settings(
    batch=3, grid=(4, 6), d_inner=8, d_states=(2,), ssd_batch=2, seqlen=40, nheads=2, headdim=4, d_state=8,
    dtype=torch.float32, rounds=2,
)  # fmt: skip


def recurrence_over_sequences(u, dt, A, B, C, D, z, dt_bias, dt_softplus):
    """Stands in for mamba_ssm's `selective_scan_fn`: the same arguments, B and C in groups of channels."""
    assert z is None
    return vision_scan.selective_scan(u, dt, A, B, C, D, None, dt_bias, dt_softplus)


def chunk_scan(x, dt, A, B, C, chunk_size, D, dt_bias, dt_softplus):
    """Stands in for `mamba_chunk_scan_combined`."""
    return vision_scan.ssd(x, dt, A, B, C, D, None, dt_bias, dt_softplus, chunk_size=chunk_size)


def delta_rule(q, k, v, g, beta):
    """Stands in for fla's `chunk_gated_delta_rule`."""
    return vision_scan.gated_delta_rule(q, k, v, g, beta, return_final_state=True)


STAND_INS = {
    "selective_scan_fn": recurrence_over_sequences, "mamba_chunk_scan_combined": chunk_scan,
    "chunk_gated_delta_rule": delta_rule,
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scans_are_measured_and_checked_beside_rivals(monkeypatch, dtype):
    monkeypatch.setattr(rivals, "entry", STAND_INS.__getitem__)
    rows = {}
    settings = scans.Settings(**{**vars(SMALL), "dtype": dtype})
    scans.run(Stopwatch("cpu"), CEILINGS, settings, lambda row: rows.update({row["name"]: row}))
    assert len(rows) == 6
    for name, row in rows.items():
        assert row["check"]["passed"], (name, row["check"])
        assert row["seconds"]["n"] == 2 and row["of_copy"] > 0 and row["flops"] > 0
        assert row["times"]["median"] > 0 and not any(one["failed"] for one in row["others"])
        for one in row["others"]:
            assert one["check"]["passed"], (name, one)
        compared, last = set(row["check"]["errors"]), "beta" if "delta" in name else "dt_bias"
        assert {"y", "y, rows alone"} <= compared and (f"d{last}, rows alone" in compared) == ("backward" in name)
    json.dumps(rows)


def test_scans_without_a_rival_say_why(monkeypatch, tmp_path):
    monkeypatch.setattr(rivals, "BUILT", tmp_path)
    for package in rivals.SOURCES:
        monkeypatch.setitem(sys.modules, package, None)
        del sys.modules[package]
    rows = []
    scans.run(Stopwatch("cpu"), CEILINGS, SMALL, rows.append)
    assert len(rows) == 6
    for row in rows:
        assert row["times"] is None and row["seconds"] is not None
        missing = [one for one in row["others"] if one["is_rival"]]
        assert missing and all("neither built (part peers) nor installed" in one["failed"] for one in missing)


def test_a_wrong_operator_is_found_and_one_that_fails_is_noted(monkeypatch):
    right = scans.compiled
    monkeypatch.setattr(scans, "compiled", lambda *leaves: right(*leaves) * 1.1)
    rows = []
    contest = scans.scan_2d_contest(torch.device("cpu"), SMALL, 2)
    rows.append(operators.measure(Stopwatch("cpu"), CEILINGS, "a", "forward + backward", contest, 2))
    monkeypatch.setattr(scans, "compiled", lambda *leaves: 1 / 0)
    contest = scans.scan_2d_contest(torch.device("cpu"), SMALL, 2)
    with pytest.raises(AssertionError):
        assert rows[0]["check"]["passed"]
    row = operators.measure(Stopwatch("cpu"), CEILINGS, "a", "forward", contest, 2)
    assert row["seconds"] is None and "division by zero" in row["failed"]
    assert row["others"][-1]["seconds"]["n"] == 2


def test_cross_scan_and_merge_undo_each_other():
    grid = torch.randn(2, 3, 4, 5)
    assert torch.equal(scans.cross_merge(scans.cross_scan(grid), 4, 5), 4 * grid)


DECODING = decoding.Settings(
    mamba="tiny", transformer="transformer-tiny", batches=(1, 3), contexts=(16, 64), prompt=8, steps=4,
    prefills=(48,), piece=20, check_tokens=8, rounds=2,
)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding_is_measured_and_checked(dtype):
    rows = {}
    settings = decoding.Settings(**{**vars(DECODING), "dtype": dtype})
    decoding.run(Stopwatch("cpu"), CEILINGS, settings, lambda row: rows.update({row["name"]: row}))
    compact = rows.pop(decode_name(MAMBA, 3) + COMPACT)
    if EMULATED:
        assert compact["check"]["passed"] and compact["times"]["rival"] == decode_name(MAMBA, 3), compact
    else:  # the CPU's compiled step has no states of 8 bits
        assert "ssm" in compact["failed"]
    expected = [decode_name(MAMBA, 1), decode_name(MAMBA, 3), prefill_name(48)]
    expected += [decode_name(TRANSFORMER, context=context) for context in (16, 64)]
    assert list(rows) == expected
    for name, row in rows.items():
        assert row["failed"] == "" and row["check"]["passed"], (name, row)
        assert row["tokens_per_s"] > 0 and row["of_matrix" if "prefill" in name else "of_copy"] > 0
    assert "a row against itself alone" in rows[decode_name(MAMBA, 3)]["check"]["errors"]
    for context in (16, 64):
        assert rows[decode_name(TRANSFORMER, context=context)]["cache_slots"] <= 1.25 * context
    json.dumps(rows)


def test_a_decoder_that_forgets_its_state_is_found(monkeypatch):
    forward = decoding.LanguageModel.forward

    def forgets(self, ids, state=None, **more):
        return forward(self, ids, state=None if state is None else self.allocate_state(len(ids)), **more)

    monkeypatch.setattr(decoding.LanguageModel, "forward", forgets)
    with torch.no_grad():
        _, check = decoding.build_checked("tiny", torch.device("cpu"), DECODING)
    assert not check["passed"]


def test_steps_rewind_to_where_they_began():
    with torch.no_grad():
        lm = decoding.build_lm("transformer-tiny", torch.device("cpu"))
        logits, state = lm(decoding.random_ids(lm, 1, 8, 0), logits_to_keep=1)
        stepper = decoding.Stepper(lm, logits.argmax(-1), state)
        token = stepper.token.clone()
        first = stepper()
        stepper()
        assert stepper.state.lengths.tolist() == [10]
        stepper.rewind()
        stepper.token = token
        assert stepper.state.lengths.tolist() == [8]
        assert rms_ratio(stepper(), first) < 1e-6
        step, how, error = decoding.stepping(stepper)
    assert step is stepper and how == "a step at a time" and error == 0.0


def test_training_is_measured_at_the_largest_batch_that_fits(monkeypatch):
    backward, rows = training.backward, []

    def small_memory(lm, ids, form):
        if len(ids) > 2:
            raise torch.OutOfMemoryError
        return backward(lm, ids, form)

    monkeypatch.setattr(training, "backward", small_memory)
    settings = training.Settings(preset="tiny", batches=(4, 2, 1), seqlen=32, check_tokens=16, rounds=2)
    training.run(Stopwatch("cpu"), CEILINGS, settings, rows.append)
    assert [row["failed"] for row in rows] == ["out of memory", ""]
    assert rows[1]["name"] == train_name(2) and rows[1]["check"]["passed"] and rows[1]["of_matrix"] > 0


def test_training_flops_are_three_forwards_with_all_logits():
    cost = LMCost(PRESETS["tiny"].lm)
    head = 2 * 128 * 384
    assert cost.training_flops(10) == 3 * (cost.prefill_flops(10) + 9 * head)


def test_small_shapes_run_on_the_cpu(capsys):
    assert small_shapes.main("cpu", (torch.float32,)) == 0
    assert "all shapes ran" in capsys.readouterr().out
