"""Every study but that of scan orders: its models learn and are scored, and cost what it says that they cost."""

from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from cobra.cost import LMCost, tile_work
from cobra.model import Cobra
from cobra.tokenizer import Tokenizer
from eval.__main__ import main
from eval.ablations import connectors, merge, question_position, report
from eval.ablations.small_models import SHUFFLED
from eval.ablations.studies import ABLATIONS
from eval.ablations.trials import DATA, Study, Trial, pretrain, run_trial
from eval.plane_scenes import KINDS
from train.recipes import RECIPES
from train.settings import change

NAMES = [name for name in ABLATIONS if name != "scan_orders"]
QUICK = ("train.batch_size=4",)
FEW: dict[str, dict] = {"needle": {"lengths": (1, 3), "depths": (0.0, 1.0), "hay": 8}}  # pictures


def quick(name: str) -> Study:
    """A study of one seed and two steps; of the stages that differ in nothing else, the last."""
    study = ABLATIONS[name](seeds=1)
    course = study.course if name == "question_position" else study.course[-1:]
    return replace(
        study,
        pictures={key: {**given, "train": 4, "test": 2, **FEW.get(name, {})} for key, given in study.pictures.items()},
        tower_stage=replace(study.tower_stage, steps=2, settings=QUICK),
        course=tuple(replace(stage, steps=2, settings=QUICK) for stage in course),
    )


@pytest.fixture(scope="module")
def output(tmp_path_factory) -> Path:
    """A folder with the pictures and towers of all studies."""
    output = tmp_path_factory.mktemp("studies")
    for name in NAMES:
        study = quick(name)
        for key, given in study.pictures.items():
            if not (output / DATA / key).exists():
                study.benchmark.build(output / DATA / key, given, lambda *_: None)
        for tower in study.towers:
            pretrain(study, tower, output)
    return output


def make_model(trial: Trial) -> Cobra:
    """Without memory behind it."""
    config = change(RECIPES["tiny"](), trial.settings).model.build_config({})
    with torch.device("meta"):
        return Cobra(config, Tokenizer.bytes())


def models(name: str) -> dict[tuple[str, ...], Cobra]:
    """Of a study's first seed, by the levels of the factors."""
    return {tuple(trial.factors.values()): make_model(trial) for trial in ABLATIONS[name](seeds=1).trials}


@pytest.mark.parametrize("name", NAMES)
def test_every_trial_learns_and_is_scored(name, output):
    study, costs = quick(name), defaultdict(set)
    groups = ["1", "3"] if name == "needle" else list(KINDS)
    for trial in study.trials:
        result = run_trial(study, trial, output)
        assert result["factors"] == trial.factors and list(result["accuracy"]) == groups
        assert len(result["losses"]) == len(study.course) and all(0 < loss < 10 for loss in result["losses"])
        cell = tuple(level for factor, level in trial.factors.items() if factor != study.factor)
        costs[cell].add(result["parameters"])
    for found in costs.values():
        assert max(found) <= 1.005 * min(found)


def test_needles_are_scored_alike_whatever_was_learned_from():
    study = ABLATIONS["needle"]()
    last = {trial.factors["training"]: trial.set_for(study.course[-1].data) for trial in study.trials}
    assert last == {"long": "long", "short": "short"}
    assert {trial.set_for(study.benchmark.scored) for trial in study.trials} == {"long"}


@pytest.mark.parametrize("name", NAMES)
def test_report_knows_every_level(name, output):
    study = ABLATIONS[name](seeds=3)
    results = [
        {
            "factors": trial.factors, "seed": trial.seed, "parameters": 1, "flops": 1, "seconds": 1, "commit": "c",
            "accuracy": {"trace": 0.5 if SHUFFLED in trial.factors.values() else 0.9 + 0.01 * (trial.seed % 3)},
        }
        for trial in study.trials
    ]  # fmt: skip
    analysis = report.analyse(study, results, {"trace": 0.3})
    text = report.render(study, analysis, results, [])
    assert ("is detected wherever it was looked for" in text) == (study.control is not None)
    for trial in study.trials:
        assert f"| {trial.factors[study.factor]} |" in text


@pytest.mark.parametrize("name", NAMES)
def test_unknown_level_is_refused_in_one_line(name, tmp_path, capsys):
    output = tmp_path / "out"
    assert main(["ablate", name, "--levels", "nonsense", "--output", str(output)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and "'nonsense'" in message and message.count("\n") == 1
    assert not output.exists()


@pytest.mark.parametrize("name", NAMES)
def test_trials_have_names_of_their_own_and_the_baseline_is_among_them(name):
    study = ABLATIONS[name]()
    names = [trial.name for trial in study.trials]
    assert len(set(names)) == len(names)
    assert len({trial.seed for trial in study.trials}) >= 3
    for seed in {trial.seed for trial in study.trials}:
        levels = [trial.factors[study.factor] for trial in study.trials if trial.seed == seed]
        assert study.baseline in levels and (study.control is None or study.control[0] in levels)


@pytest.mark.parametrize("name", NAMES)
def test_a_task_is_judged_where_one_level_solves_it(name):
    study = ABLATIONS[name](seeds=3)
    results = [
        {
            "factors": trial.factors, "seed": trial.seed,
            "accuracy": {
                "trace": 0.9 + 0.01 * trial.seed if trial.factors[study.factor] == study.baseline else 0.5,
                "count": 0.5 + 0.01 * trial.seed,
            },
        }
        for trial in study.trials
    ]  # fmt: skip
    analysis = report.analyse(study, results, {"trace": 0.5, "count": 0.5})
    assert {one.task for one in (*analysis.main, *analysis.others)} == {"trace"}


def test_levels_that_are_named_come_with_baseline_and_control():
    study = connectors.study(levels=["reshape"], seeds=1)
    assert [trial.factors["connector"] for trial in study.trials] == ["mlp", "reshape"] * 2
    study = merge.study(levels=["share"], seeds=1)
    assert [trial.factors["merge"] for trial in study.trials] == ["sum", SHUFFLED, "share"]


def test_all_connectors_leave_the_reader_as_much_as_they_save():
    made = [make_model(connectors.make_trial(name, 0)) for name in connectors.CONNECTORS]
    sizes = [sum(parameter.numel() for parameter in model.parameters()) for model in made]
    assert max(sizes) <= 1.005 * min(sizes)


def test_as_many_passes_whatever_the_number_of_directions():
    work = {levels[-1]: tile_work(model)["connector"] for levels, model in models("directions_vs_depth").items()}
    assert len(work) == 4 and len({one.mixing for one in work.values()}) == 1


def test_lists_that_share_channels_cost_what_one_does():
    work = {levels[-1]: tile_work(model)["connector"].mixing for levels, model in models("merge").items()}
    assert work["share"] == work[SHUFFLED] == work["sum"] / 4
    assert work.keys() == {*merge.MERGES, SHUFFLED}


def test_number_of_tokens_is_that_of_the_level():
    found = models("num_tokens")
    assert all(model.config.tokens_per_tile == int(count) for (_, count), model in found.items())
    assert {count for name, count in found if name == "mqt"} == {"36", "18", "9", "4", "1"}


def test_a_window_keeps_no_more_than_the_recurrent_state():
    costs = {levels[-1]: LMCost(model.config.lm) for levels, model in models("backbones").items()}
    state = costs["mamba2"].state_bytes(200, activation_bytes=4)
    assert 0.95 * state <= costs["window"].state_bytes(200, activation_bytes=4) <= state
    assert costs["transformer"].state_bytes(200, activation_bytes=4) > 2 * state


def test_question_is_moved_in_training_and_in_scoring_alike():
    study = question_position.study(seeds=1)
    for trial in study.trials:
        place = trial.factors["position"]
        for stage in study.course:
            assert study.pictures[trial.set_for(stage.data)].get("question", "last") == (
                "last" if place == SHUFFLED else place
            )
