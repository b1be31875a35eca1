"""ZeRO stages, rows shared by processes, checkpoints handed from one way of running to another: the same numbers."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest

import cobra
from tests.train.many_runs import run_many, spoiling
from tests.train.small_run import losses, small_config, write_data
from train.run import run
from train.run_directory import list_checkpoints

ADAMW = ("optim.kind=adamw", "train.micro_batch_size=1", "train.save_every=3", "tokenizer.kind=bytes")
RECURRENT = 'model.lm.layers=[{"kind": "mamba2", "d_state": 8, "headdim": 16}, {"kind": "mamba1", "d_state": 4}]'
SCANS = 'model.connector={"kind": "msc", "mixer": {"kind": "mamba2", "d_state": 8, "headdim": 16}}'
NOTHING_WHOLE = "zero.persistence_threshold=0"  # at stage 3 every parameter is taken apart
TILES = (
    'model.image.tiles={"kind": "anyres"}',
    'model.vision_encoder={"kind": "s2", "tower": {"kind": "small", "d_model": 16, "num_heads": 2}}',
)
SIZED = 'model.image.tiles={"kind": "uhd"}'
STUDENT = (
    'model.lm.layers=[{"kind": "mamba2", "d_state": 8, "headdim": 16, "chunk_size": 16}, '
    '{"kind": "mamba2", "d_state": 16, "headdim": 16}, {"kind": "mlp", "d_ff": 32}]'
)
PIECES = ("train.recompute=segment", "train.segment_tokens=9")
# Two processes; float32 sums in another order, and nothing else, is what may differ.
WAYS: dict[str, tuple[str, ...]] = {
    "stage 0": ("zero.stage=0",),
    "stage 1": ("zero.stage=1",),
    "stage 2": ("zero.stage=2", "data.workers=1"),
    "stage 2, offload": ("zero.stage=2", "zero.offload_optimizer=true"),
    "stage 2, segments": ("zero.stage=2", *PIECES),
    "stage 3": ("zero.stage=3", NOTHING_WHOLE),
    "stage 3, offload": ("zero.stage=3", "zero.offload_optimizer=true"),
    "stage 3, hpz": ("zero.stage=3", "zero.hpz=2", NOTHING_WHOLE),
    "stage 3, layers": ("zero.stage=3", NOTHING_WHOLE, "train.recompute=layer"),
}
SPOILED = (NOTHING_WHOLE, "train.skip_nonfinite=1")
TOLERANCE = 5e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of every way in two processes, and what they are held against in one."""
    folder = tmp_path_factory.mktemp("zero")
    data = write_data(folder / "data")  # a fifth of the rows is without image: one process sees none at times

    def entry(name: str, *changes: str, **more: Any) -> dict[str, Any]:
        return {"data": str(data), "output": str(folder / name), "changes": [*ADAMW, *changes], **more}

    plain = ("train.engine=plain",)
    references = {
        "plain": plain,
        "plain, scans": (*plain, SCANS, "data.packing=true"),
        "plain, recurrent": (*plain, RECURRENT),
        "plain, tiles": (*plain, *TILES),
        "plain, sized": (*plain, SIZED),
        "plain, frozen": (*plain, "train.freeze=vision_encoder"),
    }
    for name, changes in references.items():
        assert run(small_config(data, *ADAMW, *changes), folder / name)
    with spoiling({6, 7}):
        assert run(small_config(data, *ADAMW, *plain, *SPOILED), folder / "plain, spoiled")
    students = {
        stage: (f"train.objective={stage}", f"distill.teacher={folder / 'plain'}", STUDENT)
        for stage in ("distill_hidden", "distill_logits")
    }
    for name, changes in students.items():
        assert run(small_config(data, *ADAMW, *plain, *changes), folder / f"plain, {name}")
    plan = [entry(name, *changes) for name, changes in WAYS.items()]
    plan += [entry(name, "zero.stage=3", NOTHING_WHOLE, *changes) for name, changes in students.items()]
    plan += [
        entry("scans", "zero.stage=3", NOTHING_WHOLE, SCANS, "data.packing=true"),
        entry("tiles", "zero.stage=3", NOTHING_WHOLE, *TILES),
        entry("sized", "zero.stage=2", SIZED),
        entry("frozen", "zero.stage=3", NOTHING_WHOLE, "train.freeze=vision_encoder"),
        *(entry(f"bfloat16 {n}", f"zero.stage={n}", NOTHING_WHOLE, "train.dtype=bfloat16") for n in range(4)),
        # Of the second step, the second micro-batch of both processes.
        *(entry(f"spoiled {n}", f"zero.stage={n}", *SPOILED, spoil=[3]) for n in range(4)),
        entry("spoiled offload", "zero.stage=2", "zero.offload_optimizer=true", *SPOILED, spoil=[3]),
        entry("shared", "zero.stage=1", RECURRENT, "train.sequence_parallel=2", "train.micro_batch_size=2"),
        entry("muon", "zero.stage=2", "optim.kind=muon"),
        entry("segments", "zero.stage=3", *PIECES),
        entry("attention", "train.sequence_parallel=2"),
    ]
    run_many(plan, 2, folder)
    for name in ("stage 3", "stage 1"):  # back to their checkpoints at step 3
        parts = folder / f"{name}, part"
        shutil.copytree(folder / name, parts)
        shutil.rmtree(parts / "checkpoints" / "step-000006")
    run_many([entry("stage 1, part", "zero.stage=3", NOTHING_WHOLE, resume=True)], 2, folder)
    run_many([entry("stage 3, part", "zero.stage=1", resume=True)], 4, folder)
    shutil.copytree(folder / "stage 2", folder / "stage 2, part")
    shutil.rmtree(folder / "stage 2, part" / "checkpoints" / "step-000006")
    config = small_config(data, *ADAMW, *plain)
    assert run(config, folder / "stage 2, part", resume=True)
    return folder


@pytest.mark.parametrize("way", WAYS)
def test_every_way_has_the_losses_of_one_process(folder: Path, way: str) -> None:
    assert losses(folder / way) == pytest.approx(losses(folder / "plain"), abs=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("scans", "plain, scans"),
        ("frozen", "plain, frozen"),
        ("shared", "plain, recurrent"),
        ("tiles", "plain, tiles"),
        ("sized", "plain, sized"),
        ("distill_hidden", "plain, distill_hidden"),
        ("distill_logits", "plain, distill_logits"),
    ],
)
def test_other_models_too(folder: Path, name: str, reference: str) -> None:
    assert losses(folder / name) == pytest.approx(losses(folder / reference), abs=TOLERANCE)


@pytest.mark.parametrize("name", ["stage 1, part", "stage 2, part", "stage 3, part"])
def test_a_run_goes_on_at_another_stage_and_with_another_number_of_processes(folder: Path, name: str) -> None:
    assert losses(folder / name) == pytest.approx(losses(folder / "plain"), abs=TOLERANCE)


@pytest.mark.parametrize("way", ["stage 1", "stage 2", "stage 3"])
def test_every_checkpoint_is_a_model_directory(folder: Path, way: str) -> None:
    expected = cobra.load(folder / "plain").state_dict()
    checkpoints = list_checkpoints(folder / way / "checkpoints")
    assert len(checkpoints) == 2
    for path in (folder / way, checkpoints[-1]):
        found = cobra.load(path).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert (tensor - expected[name]).abs().max() < 2e-4, name  # AdamW's first steps are all of size lr
    lm = cobra.load(folder / way).lm
    assert lm.lm_head.weight is lm.embedding.weight


@pytest.mark.parametrize("stage", range(4))
def test_parameters_of_the_recurrence_are_float32_in_the_forward_pass(folder: Path, stage: int) -> None:
    found = json.loads((folder / f"bfloat16 {stage}.dtypes.json").read_text())
    assert {found[name] for name in ("A_log", "D", "dt_bias", "norm.weight")} == {"torch.float32"}


@pytest.mark.parametrize("name", ["spoiled 0", "spoiled 1", "spoiled 2", "spoiled 3", "spoiled offload"])
def test_step_that_is_not_finite_spoils_no_other(folder: Path, name: str) -> None:
    found, expected = losses(folder / name), losses(folder / "plain, spoiled")
    assert not math.isfinite(found[1]) and not math.isfinite(expected[1])
    assert found[:1] + found[2:] == pytest.approx(expected[:1] + expected[2:], abs=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("muon", "optim.kind=muon needs whole matrices"),
        ("segments", "train.recompute=segment calls layers as often"),
        ("attention", "attention"),
    ],
)
def test_what_does_not_fit_is_refused_on_every_process(folder: Path, name: str, told: str) -> None:
    for rank in range(2):
        assert told in (folder / f"{name}.error-{rank}").read_text()
    assert not (folder / name).exists()
