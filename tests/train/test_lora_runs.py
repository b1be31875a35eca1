"""Runs with adapters: resumed, merged, loaded by peft, on several processes."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import cobra
import cobra.hf
from tests.tolerance import assert_close
from tests.train.many_runs import run_many
from tests.train.small_run import losses, small_config, write_data
from tests.train.test_lora import INITS, logits
from tests.train.test_resume import same_tensors, stop_after
from tests.train.test_zero import NOTHING_WHOLE, TOLERANCE
from train.resume import read_state
from train.run import prepare, run
from train.run_directory import latest_checkpoint
from train.settings import RunConfig
from vision_scan.errors import UserError


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model to begin with, beside the data."""
    folder = tmp_path_factory.mktemp("lora")
    data = write_data(folder / "data")
    assert run(small_config(data, "train.engine=plain", "train.steps=2", "optim.kind=adamw"), folder / "base")
    return folder / "base"


RUN = ("init.check_lm=false", "lora.rank=4", "optim.kind=adamw", "train.freeze=vision_encoder", "train.save_every=3")


def lora_config(base: Path, *changes: str) -> RunConfig:
    data = base.parent / "data" / "data.json"
    return small_config(data, "train.engine=plain", f"init.path={base}", *RUN, *changes)


@pytest.mark.parametrize(
    "changes",
    [("lora.dropout=0.3",), ("lora.init=pissa",), ("lora.init=pissa", "lora.parts=lm", "train.engine=deepspeed")],
)
def test_resumed_run_is_the_uninterrupted_one_bit_for_bit(
    base: Path, tmp_path: Path, changes: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = lora_config(base, *changes)
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(config, whole)
    with monkeypatch.context() as patch:
        stop_after(4, patch)
        assert run(config, parts) is False
    torch.manual_seed(123)
    assert run(config, parts, resume=True)
    assert losses(parts) == losses(whole)
    assert same_tensors(whole, parts)
    names = ("model.safetensors", "train_state.safetensors")
    for name in names:
        assert (latest_checkpoint(whole) / name).read_bytes() == (latest_checkpoint(parts) / name).read_bytes()
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (whole / "adapter" / name).read_bytes() == (parts / "adapter" / name).read_bytes()


@pytest.mark.parametrize("init", INITS)
def test_run_writes_a_model_without_adapters(base: Path, tmp_path: Path, init: str) -> None:
    lines: list[str] = []
    assert run(lora_config(base, f"lora.init={init}"), tmp_path / "run", report=lines.append)
    assert any(line.startswith("LoRA: rank 4") and "adapters on 100.0% of" in line for line in lines)
    before = cobra.load(base, dtype="float32").state_dict()
    for path in (tmp_path / "run", latest_checkpoint(tmp_path / "run")):
        after = cobra.load(path, dtype="float32").state_dict()
        assert after.keys() == before.keys()
        moved = {name for name, tensor in after.items() if (tensor - before[name]).abs().max() > 1e-6}
        assert moved == {name for name in before if name.startswith("connector.proj") and name.endswith("weight")} | {
            name for name in before if name.endswith("_proj.weight") and name.startswith("lm.")
        }
    kept = read_state(latest_checkpoint(tmp_path / "run"), "adapter:model.")
    leaves = {name.rpartition("proj")[2] for name in kept if name.startswith("lm.")}
    initial = {".initial_A", ".initial_B"} if init == "pissa" else set()
    assert leaves == {".lora_A.default.weight", ".lora_B.default.weight", *initial}


def test_resuming_needs_the_model_that_the_run_began_with(base: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    shutil.copytree(base, mine)
    config = lora_config(base, f"init.path={mine}")
    assert run(config, tmp_path / "run")
    model = cobra.load(mine, dtype="float32")
    with torch.no_grad():
        model.lm.layers[0].mixer.in_proj.weight.add_(0.01)
    cobra.save(model, mine)
    with pytest.raises(UserError, match=r"began with other weights .*in_proj.weight differs\).*--init-from"):
        prepare(config, tmp_path / "run", resume=True)
    shutil.rmtree(mine)
    with pytest.raises(UserError, match="mine: no such model directory"):
        prepare(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize("changes", [("lora.rank=40",), ("lora.init=pissa",), ("lora.parts=lm", "train.freeze=")])
def test_peft_loads_the_adapters_of_a_run(base: Path, tmp_path: Path, changes: tuple[str, ...]) -> None:
    import peft

    output = tmp_path / "run"
    assert run(lora_config(base, *changes), output)
    trained, plain = (cobra.load(path, dtype="float32") for path in (output, base))
    before = logits(plain)
    loaded = peft.PeftModel.from_pretrained(plain, str(output / "adapter"))
    assert (logits(trained) - before).abs().max() > 1e-3
    assert_close("logits", logits(loaded.base_model.model), logits(trained), ratio=1e-5)
    theirs = cobra.hf.CobraForConditionalGeneration.from_pretrained(base, dtype="float32")
    loaded = peft.PeftModel.from_pretrained(theirs, str(output / "adapter"))
    assert_close("logits of transformers", logits(loaded.get_base_model().model), logits(trained), ratio=1e-5)
    config = json.loads((output / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["modules_to_save"] == (["vision_encoder", "connector"] if "lora.parts=lm" in changes else None)


WAYS = {
    "stage 0": ("zero.stage=0", "train.micro_batch_size=1"),
    "stage 2": ("zero.stage=2", "train.recompute=layer"),
    "stage 3": ("zero.stage=3", NOTHING_WHOLE),
}


@pytest.fixture(scope="module")
def folder(base: Path) -> Path:
    """Runs in two processes, on from the first one's checkpoint in others, and one process to hold them against."""
    folder = base.parent

    def entry(name: str, *changes: str, **more: Any) -> dict[str, Any]:
        data = str(folder / "data" / "data.json")
        started = (f"init.path={base}", *RUN, "lora.init=pissa", *changes)
        return {"data": data, "output": str(folder / name), "changes": started, **more}

    assert run(lora_config(base, "lora.init=pissa"), folder / "plain")
    shutil.copytree(folder / "plain", folder / "resumed")
    shutil.rmtree(folder / "resumed" / "checkpoints" / "step-000006")
    plan = [entry(name, *changes) for name, changes in WAYS.items()]
    run_many([*plan, entry("resumed", *WAYS["stage 3"], resume=True)], 2, folder)
    return folder


@pytest.mark.parametrize("way", [*WAYS, "resumed"])
def test_several_processes_have_the_numbers_of_one(folder: Path, way: str) -> None:
    assert losses(folder / way) == pytest.approx(losses(folder / "plain"), abs=TOLERANCE)
    expected = cobra.load(folder / "plain").state_dict()
    for path in (folder / way, latest_checkpoint(folder / way)):
        found = cobra.load(path).state_dict()
        assert found.keys() == expected.keys()
        for name, tensor in found.items():
            assert (tensor - expected[name]).abs().max() < 2e-4, name
    assert (folder / way / "adapter" / "adapter_model.safetensors").exists()
