"""Both engines, accumulation, frozen parts, several processes."""

import json
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from tests.train.small_run import command, environment, losses, small_config, write_data
from train.loop import Loop
from train.processes import autocast_dtype, choose_device, join_processes
from train.run import prepare, run
from vision_scan.errors import UserError


def prepared(data: Path, *changes: str) -> Loop:
    config = small_config(data, *changes)
    return prepare(config, data.parent / "out")[0]


def gradients(loop: Loop, step: int = 0) -> dict[str, torch.Tensor]:
    """The gradients that the engine would step with."""
    batches = loop.source(step)
    scale = 1 / sum(batch.weight for batch in batches)
    for index, batch in enumerate(batches):
        loop.engine.backward(batch, scale, last=index == len(batches) - 1)
    return {
        name: torch.zeros_like(parameter) if parameter.grad is None else parameter.grad.clone()
        for name, parameter in loop.engine.named.items()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_engines_have_the_same_losses(data: Path, tmp_path: Path, kind: str) -> None:
    for engine in ("plain", "deepspeed"):
        changes = ("train.micro_batch_size=2", f"train.engine={engine}", f"optim.kind={kind}")
        assert run(small_config(data, *changes), tmp_path / engine)
    plain, deepspeed = losses(tmp_path / "plain"), losses(tmp_path / "deepspeed")
    assert len(plain) == 6
    assert deepspeed == pytest.approx(plain, abs=1e-6)


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_accumulation_weighs_every_token_the_same(data: Path, engine: str) -> None:
    setting = f"train.engine={engine}"
    whole = prepared(data, "train.batch_size=8", setting)
    counts = {batch.weight for batch in prepared(data, "train.micro_batch_size=1").source(0)}
    assert len(counts) > 1  # otherwise a mean of means would pass too
    expected = gradients(whole)
    for micro in (1, 2):
        split = prepared(data, "train.batch_size=8", f"train.micro_batch_size={micro}", setting)
        assert split.source.accumulation == 8 // micro
        found = gradients(split)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_frozen_part_has_no_gradient_and_does_not_move(data: Path, engine: str) -> None:
    loop = prepared(data, f"train.engine={engine}", "train.freeze=vision_encoder,lm")
    assert {name.split(".")[1] for name in gradients(loop)} == {"connector"}
    before = {name: t.clone() for name, t in loop.engine.objective.model.state_dict().items()}
    loop.engine.step(0)
    for name, tensor in loop.engine.objective.model.state_dict().items():
        if name.startswith(("vision_encoder", "lm")):
            assert torch.equal(tensor, before[name]), name
    assert not torch.equal(
        loop.engine.objective.model.connector.proj[0].weight, before["connector.proj.0.weight"]
    )


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_text_only_batch_gives_unused_parts_a_zero_gradient(tmp_path: Path, engine: str) -> None:
    data = write_data(tmp_path / "data")
    rows = [row for row in json.loads(data.read_text()) if "image" not in row]
    data.write_text(json.dumps(rows))
    loop = prepared(data, f"train.engine={engine}", "train.freeze=lm")
    found = gradients(loop)
    assert {name.split(".")[1] for name in found} == {"vision_encoder", "connector"}
    assert all(gradient.abs().max() == 0 for gradient in found.values())


def test_clip_reports_the_norm_before_and_leaves_the_norm_after(data: Path) -> None:
    loop = prepared(data, "train.engine=plain")
    engine = loop.engine
    norm = torch.stack([gradient.norm() for gradient in gradients(loop).values()]).norm().item()
    before = {name: parameter.detach().clone() for name, parameter in engine.named.items()}
    engine.optimizer = torch.optim.SGD(engine.parameters, lr=1.0)
    assert engine.step(norm / 2) == pytest.approx(norm)
    moved = [parameter.detach() - before[name] for name, parameter in engine.named.items()]
    assert torch.stack([change.norm() for change in moved]).norm().item() == pytest.approx(norm / 2, rel=1e-3)


def test_two_processes_have_the_losses_of_one(data: Path, tmp_path: Path) -> None:
    changes = ("train.batch_size=8", "train.micro_batch_size=2", "train.save_every=3")
    assert run(small_config(data, *changes), tmp_path / "one")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    workers = [
        subprocess.Popen(
            command(data, tmp_path / "two", *changes),
            env=environment(
                RANK=rank,
                LOCAL_RANK=rank,
                WORLD_SIZE="2",
                MASTER_ADDR="127.0.0.1",
                MASTER_PORT=port,
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    output = [worker.communicate(timeout=1200)[0] for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], output
    assert "2 rows x 2 accumulated x 2 processes" in output[0]
    assert output[1] == ""
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)
    assert (tmp_path / "two" / "model.safetensors").exists()


def test_plain_engine_refuses_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"train.engine=deepspeed"):
        join_processes("plain", torch.device("cpu"))


def test_device_and_dtype_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert choose_device("cpu") == cpu
    assert autocast_dtype("float32", cpu) is None
    assert autocast_dtype("bfloat16", cpu) == torch.bfloat16
    for native, expected in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr("train.processes.has_native_bf16", lambda device, native=native: native)
        assert autocast_dtype("auto", cpu) == expected
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == cpu
    with pytest.raises(UserError, match=r"train.device=cuda"):
        choose_device("cuda")
