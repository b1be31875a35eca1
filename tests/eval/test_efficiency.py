"""Decoding against context length: the protocol, the correctness check, the crossover."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

import cobra
from cobra.quantize import quantize
from eval import efficiency
from eval.__main__ import main
from eval.efficiency import Protocol, doubling, find_crossover, interleaved, measure, spread, work_units
from vision_scan.errors import UserError

SMALL = Protocol(
    contexts=(16, 33), rounds=2, prefill_rounds=2, decode_tokens=3, warmup_tokens=1, check_tokens=3
)


@pytest.fixture(scope="module")
def models():
    return {"ssm": cobra.build("tiny", seed=0), "twin": cobra.build("transformer-tiny", seed=0)}


@pytest.fixture(scope="module")
def result(models):
    units = []
    result = measure(models, SMALL, units.append)
    assert sum(units) == work_units(models, SMALL)
    return result


def test_measure_reports_every_model_and_context(result, models):
    json.dumps(result)
    for name, model in models.items():
        points = result["models"][name]["points"]
        assert [point["context"] for point in points] == [16, 33]
        assert result["models"][name]["lm_parameters"] == sum(p.numel() for p in model.lm.parameters())
        for point in points:
            assert 0 < point["decode_s"]["q1"] <= point["decode_s"]["median"] <= point["decode_s"]["q3"]
            assert point["decode_s"]["n"] == SMALL.rounds
            assert point["ttft_s"]["n"] == SMALL.prefill_rounds
    assert result["dtype"] == "float32"
    assert result["environment"]["backend"].keys() >= {"ssd", "selective_scan"}
    assert result["peak_rss_bytes"] > 1 << 20


def test_roofline_counts_stored_weights_once_and_the_state_twice(models, monkeypatch):
    monkeypatch.setattr(efficiency, "measure_read", lambda *_: 1e9)
    small = quantize(cobra.build("tiny", seed=0), "int8")
    measured = measure({"ssm": models["ssm"], "int8": small}, replace(SMALL, prefill_rounds=1))
    for name, model in (("ssm", models["ssm"]), ("int8", small)):
        stored = model.lm.state_dict()
        weights = sum(tensor.nbytes for key, tensor in stored.items() if key != "lm_head.weight")
        heads = sum(layer.d_state * layer.expand * 128 * 4 for layer in model.config.lm.layers)
        point = measured["models"][name]["points"][0]
        ideal = (weights + 2 * heads) / 1e9
        assert point["roofline"] * point["decode_s"]["median"] == pytest.approx(ideal, rel=1e-9)
    sizes = [measured["models"][name]["weight_bytes"] for name in ("ssm", "int8")]
    assert 0.25 < sizes[1] / sizes[0] < 0.4


def test_state_is_constant_for_the_ssm_and_grows_for_the_twin(result):
    sizes = {
        name: [point["state_bytes"] for point in model["points"]] for name, model in result["models"].items()
    }
    assert sizes["ssm"][0] == sizes["ssm"][1]
    assert sizes["twin"][1] * 16 == sizes["twin"][0] * 33


def test_windows_and_hybrids_are_measured_right(models, monkeypatch):
    """On both sides of the window of 48: its cache is allocated whole, and read as far as it is filled."""
    monkeypatch.setattr(efficiency, "measure_read", lambda *_: 1e9)
    twins = {name: cobra.build(name, seed=0) for name in ("window-tiny", "hybrid-tiny")}
    contexts = (40, 47, 90)
    measured = measure({"ssm": models["ssm"], **twins}, replace(SMALL, contexts=contexts, prefill_rounds=1))["models"]
    assert all(model["check"]["passed"] for model in measured.values())
    token = 2 * 4 * 32 * 4  # keys and values of 4 heads of 32, float32
    states = {name: [point["state_bytes"] for point in model["points"]] for name, model in measured.items()}
    assert states["window-tiny"] == [3 * 48 * (token + 8)] * 3
    assert states["ssm"][0] - 3 * (token + 8) < states["window-tiny"][0] <= states["ssm"][0]
    assert states["hybrid-tiny"] == [3 / 4 * states["ssm"][0] + context * (token + 8) for context in contexts]
    matrices = 2 * 256 * 32 * 4  # of a layer, read and written
    traffic = {
        "window-tiny": [3 * min(context, 48) * token for context in contexts],
        "hybrid-tiny": [3 * matrices + context * token for context in contexts],
    }
    for name, expected in traffic.items():
        points = measured[name]["points"]
        found = [point["roofline"] * point["decode_s"]["median"] * 1e9 for point in points]
        assert found == pytest.approx([measured[name]["weight_bytes"] + moved for moved in expected], rel=1e-9)


def test_check_passes_for_both_models_and_fails_for_a_wrong_decoder(result, models, monkeypatch):
    assert all(model["check"]["passed"] for model in result["models"].values())
    assert set(result["models"]["ssm"]["check"]["errors"]) == {"16", "33"}
    lm = models["ssm"].lm
    right = lm.forward

    def forgets(*args, state=None, **kwargs):
        return right(*args, state=None, **kwargs)

    monkeypatch.setattr(lm, "forward", forgets)
    wrong = measure({"ssm": models["ssm"]}, SMALL)
    assert not wrong["models"]["ssm"]["check"]["passed"]


def test_a_visit_leaves_the_state_as_it_was(models):
    lm = models["ssm"].lm
    with torch.inference_mode():
        token, state = efficiency._prefill(lm, torch.arange(20)[None])
        before = state.clone()
        efficiency._decode_times(lm, token, state.clone(), SMALL, "cpu")
    for layer, kept in zip(state.layers, before.layers, strict=True):
        assert all(torch.equal(layer[name], kept[name]) for name in layer)


def test_interleaved_visits_all_cells_evenly_and_in_turn():
    cells = ["a", "b", "c"]
    order = list(interleaved(cells, 6))
    rounds = [order[i : i + 3] for i in range(0, 18, 3)]
    assert all(sorted(visit) == cells for visit in rounds)
    assert Counter(visit[0] for visit in rounds) == {"a": 2, "b": 2, "c": 2}
    for forth, back in zip(rounds[::2], rounds[1::2], strict=True):
        assert forth == back[::-1], "a steady drift must touch all cells alike"


def test_spread_is_median_and_quartiles():
    assert spread([3.0, 1.0, 2.0, 5.0, 4.0]) == {"median": 3.0, "q1": 2.0, "q3": 4.0, "n": 5}
    assert spread([2.0]) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 1}


@pytest.mark.parametrize(
    ("second", "expected"),
    [
        ([2.0, 2.0, 2.0, 2.0], ("always", None)),
        ([0.5, 0.6, 0.7, 0.9], ("never", None)),
        ([2.0, 2.0, 2.0, 0.9], ("never", None)),
        ([0.25, 0.5, 2.0, 4.0], ("at", 2000.0)),
        ([2.0, 0.5, 2.0, 4.0], ("at", 2000.0)),
    ],
    ids=["always", "never", "not-at-the-end", "once", "the-last-crossing-counts"],
)
def test_find_crossover(second, expected):
    contexts = [500, 1000, 4000, 8000]
    kind, length = find_crossover([(c, 1.0) for c in contexts], list(zip(contexts, second, strict=True)))
    assert (kind, length) == (expected[0], expected[1] and pytest.approx(expected[1]))


def test_doubling():
    assert doubling(256, 2048) == (256, 512, 1024, 2048)
    assert doubling(256, 1000) == (256, 512, 1000)
    assert doubling(64, 64) == (64,)
    with pytest.raises(UserError, match="300"):
        doubling(300, 200)


def test_protocol_refuses_what_cannot_be_measured():
    with pytest.raises(UserError, match="rounds is 0"):
        Protocol(rounds=0)
    with pytest.raises(UserError, match="increase"):
        Protocol(contexts=(512, 256))
    with pytest.raises(UserError, match="dtype"):
        half = cobra.build("tiny", dtype="bfloat16")
        measure({"a": cobra.build("tiny"), "b": half}, SMALL)


def test_command_writes_numbers_and_page(tmp_path, capsys):
    output = tmp_path / "speed" / "efficiency.json"
    contexts = ["--shortest-context", "16", "--longest-context", "32"]
    arguments = [
        "--model",
        "tiny",
        "--model",
        "twin=transformer-tiny",
        *contexts,
        "--rounds",
        "1",
        "--prefill-rounds",
        "1",
    ]
    assert main(["efficiency", *arguments, "--output", str(output)]) == 0
    assert list(json.loads(output.read_text())["models"]) == ["tiny", "twin"]
    page = output.with_suffix(".html").read_text()
    assert "time per token" in page and "twin" in page
    assert "tokens" in capsys.readouterr().out


def test_command_refuses_two_models_of_one_name(tmp_path, capsys):
    assert (
        main(["efficiency", "--model", "tiny", "--model", "tiny", "--output", str(tmp_path / "e.json")]) == 2
    )
    assert "NAME=tiny" in capsys.readouterr().err
