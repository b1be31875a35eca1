"""The plan of a run, held against what a run takes."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cobra.lm.precision import Projection
from cobra.typed_config import to_dict
from tests.cobra.lm_ways import STACKS
from tests.train.many_runs import run_many
from tests.train.small_run import small_config, write_data
from train.__main__ import main
from train.cost import TrainingCost
from train.plan import activation_memory, build_meta, build_meta_objective, kept_bytes, static_memory
from train.recipes import RECIPES
from train.settings import change

# Large enough for the model's memory to stand out.
SIZES = ("model.lm.d_model=256", "model.vision_encoder.d_model=128", "optim.kind=adamw", "train.micro_batch_size=1")


@pytest.mark.parametrize("name", [name for name in RECIPES if not name.startswith(("tiny", "dpo", "distill"))])
def test_published_recipes_are_planned_for_any_number_of_processes(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--recipe", name, "--rows", "665298", "--ranks", "1,8,64"]) == 0
    told = capsys.readouterr().out
    frozen = "align" in name
    assert told.startswith(f"recipe {name}: preset ")
    batch = 256 if frozen else 128
    assert f"steps: {-(-665298 * (2 if name[0] in 'cm' else 1) // batch):,} of {batch} rows" in told
    lm_line = next(line for line in told.splitlines() if line.startswith("  lm "))
    assert lm_line.split()[3] == ("0" if frozen else lm_line.split()[1])
    assert len(told.splitlines()) == 10


def test_memory_by_formula_for_one_and_64_processes() -> None:
    """3.5 G parameters, 2.8 G of them learning, as `cobra-3b`."""
    total, learns = 3_505_000_000, 2_816_000_000
    one = static_memory(total, learns, 0, 1)
    assert one.total == 4 * total + 12 * learns
    whole = static_memory(total, learns, 0, 64)
    assert whole == one
    by_stage = [static_memory(total, learns, stage, 64).total for stage in range(4)]
    assert by_stage == sorted(by_stage, reverse=True)
    last = static_memory(total, learns, 3, 64)
    assert last.weights == pytest.approx(4 * total / 64, rel=1e-6)
    assert static_memory(total, learns, 2, 8, offload=True).optimizer == 0


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes hold at each stage."""
    folder = tmp_path_factory.mktemp("plan")
    data = write_data(folder / "data")
    plan = [
        {
            "data": str(data),
            "output": str(folder / f"stage{stage}"),
            "changes": [*SIZES, f"zero.stage={stage}", "train.steps=3", "zero.persistence_threshold=0"],
            "measure": True,
        }
        for stage in range(4)
    ]
    run_many(plan, 2, folder)
    found = {stage: json.loads((folder / f"stage{stage}.memory.json").read_text()) for stage in range(4)}
    return {"data": data, **{str(stage): value for stage, value in found.items()}}


@pytest.mark.parametrize("stage", range(4))
def test_memory_is_what_two_processes_use(measured: dict[str, Any], stage: int) -> None:
    model = build_meta(small_config(measured["data"], *SIZES))
    count = sum(parameter.numel() for parameter in model.parameters())
    planned = static_memory(count, count, stage, 2)
    used = measured[str(stage)]
    lasting = planned.weights + planned.masters + planned.optimizer + (planned.gradients if stage == 3 else 0)
    assert used["after the step"] == pytest.approx(lasting, rel=0.05)
    # Gradients beside it; what DeepSpeed copies them into on the way is within the margin.
    assert used["before the step"] == pytest.approx(planned.total - planned.buckets, rel=0.25)


def test_recomputing_is_planned(data: Path) -> None:
    def planned(*changes: str) -> int:
        config = small_config(data, "model.lm.d_model=256", *changes)
        return activation_memory(build_meta(config), config, rows=2, length=2048)

    nothing = planned()
    layer = planned("train.recompute=layer")
    segment = planned("train.recompute=segment", "train.segment_tokens=128")
    assert segment < layer < nothing
    assert planned("train.freeze=vision_encoder,connector") < nothing


def test_cost_of_a_step_is_that_of_its_tokens(data: Path) -> None:
    config = small_config(data)
    model = build_meta(config)
    cost = TrainingCost(build_meta_objective(config, model))
    assert cost.of(2, [50, 50], 40) == pytest.approx(2 * cost.of(1, [50], 20))
    assert cost.of(1, [100], 20) > cost.of(1, [50], 20)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--recipe", "cobra-3b"], "how many rows has an epoch? give --rows N"),
        (["--recipe", "cobra-3b", "--rows", "9", "--ranks", "0"], "--ranks 0: allowed"),
        (["--recipe", "cobra-3b", "--rows", "9", "--ranks", "x"], "--ranks x: allowed"),
        (["--recipe", "cobra-3b", "--rows", "9", "--ranks", "64"], "train.batch_size=128 is not a multiple"),
        (["--recipe", "cobra-3b", "--rows", "9", "--mfu", "2"], "--mfu 2: allowed"),
    ],
)
def test_mistake_is_one_line(arguments: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", *arguments]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


def test_data_tells_rows_and_tokens(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = change(RECIPES["tiny"](), ["train.epochs=2"])
    assert config.train.epochs == 2
    words = ["--set", f"data.path={data}", "--set", "train.epochs=8", "--set", "train.batch_size=4"]
    assert main(["plan", "--recipe", "tiny", *words, "--ranks", "2"]) == 0
    assert "steps: 20 of 4 rows" in capsys.readouterr().out


def test_adapters_alone_learn(data: Path) -> None:
    config = small_config(data, "lora.rank=2", "lora.init=pissa", "lora.parts=lm", "train.freeze=vision_encoder")
    model = build_meta(config)
    learns = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name.split(".")[0] for name in learns} == {"lm", "connector"}
    assert all("lora" in name for name in learns if name.startswith("lm"))


def test_weights_are_not_what_a_forward_pass_keeps() -> None:
    with torch.device("meta"):
        layers = torch.nn.Sequential(Projection(64, 96), torch.nn.SiLU(), Projection(96, 64))
        x = torch.empty(2, 10, 64, requires_grad=True)
    assert kept_bytes(layers, x) == 4 * 2 * 10 * (64 + 96 + 96)


def test_layers_that_share_a_block_keep_what_each_of_them_computes() -> None:
    use = STACKS["two shared blocks"][0]

    def kept(*layers: Any) -> int:
        config = small_config(Path("data"), f"model.lm.layers={json.dumps([to_dict(layer) for layer in layers])}")
        return activation_memory(build_meta(config), config, rows=2, length=64)

    one, two, three = kept(use), kept(use, use), kept(use, use, use)
    assert three - two == two - one > kept(use.mamba, use.mamba) - kept(use.mamba)
