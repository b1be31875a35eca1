"""The loop: it learns, it stops when asked, and it never steps on what is not a number."""

import os
import signal
from pathlib import Path

import pytest
import torch

import cobra
from tests.train.small_run import load, losses, small_config, write_data, write_region_data
from train.data.rows import BadRowError
from train.init import build_model
from train.loop import NonFiniteError
from train.metrics import read_metrics
from train.objectives import Conversation
from train.run import run
from train.run_directory import latest_checkpoint


def test_conversation_loss_drops(tmp_path: Path) -> None:
    data = write_data(tmp_path / "data", num_rows=24)
    changes = ("train.steps=30", "train.batch_size=8", "optim.lr=1e-2", "train.engine=plain")
    assert run(small_config(data, *changes), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert found[0] > 5.0  # 261 tokens, all alike
    assert sum(found[-5:]) / 5 < 2.0


def test_regions_loss_drops_and_accuracy_rises(tmp_path: Path) -> None:
    data = write_region_data(tmp_path / "data", num_rows=24)
    changes = ("train.steps=60", "train.batch_size=8", "optim.lr=1e-2", "train.engine=plain")
    assert run(small_config(data, *changes, recipe="tiny-tower"), tmp_path / "run")
    records = read_metrics(tmp_path / "run")
    assert records[0]["loss"] > 1.0
    assert records[-1]["loss"] < 0.3
    assert records[-1]["patch_accuracy"] > 0.9
    assert records[-1]["colour_accuracy"] > 0.9


def test_layers_of_a_new_model_may_begin_without_effect(data: Path) -> None:
    def build(*changes: str) -> cobra.Cobra:
        config = small_config(data, *changes)
        return build_model(config, load(config))

    ids = torch.arange(12)[None]
    for scale in (0.0, 0.5):
        model, usual = build(f"init.residual={scale}"), build("init.residual=1")
        for block, other in zip(model.lm.layers, usual.lm.layers, strict=True):
            name = block.mixer.residual_projection
            ours, theirs = getattr(block.mixer, name).weight, getattr(other.mixer, name).weight
            torch.testing.assert_close(ours, scale * theirs)
            assert theirs.std() > 0.01
    silent = build("init.residual=0")
    expected = silent.lm.lm_head(silent.lm.norm_f(silent.lm.embedding(ids)))
    torch.testing.assert_close(silent.lm(ids)[0], expected)


def test_a_model_that_is_gone_on_with_keeps_its_layers(data: Path, tmp_path: Path) -> None:
    cobra.save(cobra.build(small_config(data).model.build_config(), seed=7), tmp_path / "model")
    config = small_config(data, f"init.path={tmp_path / 'model'}", "init.residual=0")
    model, stored = build_model(config, load(config)), cobra.load(tmp_path / "model")
    for name, tensor in stored.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_finished_run_is_a_model_directory(data: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert run(small_config(data, "train.engine=plain"), output)
    model = cobra.load(output)
    last = cobra.load(latest_checkpoint(output))
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, last.state_dict()[name]), name
    assert isinstance(model.answer("colour?", max_new_tokens=2), str)


def test_stages_hand_on_their_parts_and_the_tokenizer(data: Path, tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    plain = ("train.engine=plain", "train.steps=2")
    trained = (*plain, "tokenizer.kind=train", "tokenizer.vocab_size=270")
    assert run(small_config(data, *trained), one)
    changes = (*plain, f"init.path={one}", "init.parts=vision_encoder", "train.seed=5")
    assert run(small_config(data, *changes, recipe="tiny-align"), two)
    before, after = cobra.load(one), cobra.load(two)
    assert after.tokenizer.vocab_size == before.tokenizer.vocab_size > 261
    for name, tensor in after.vision_encoder.state_dict().items():
        assert torch.equal(tensor, before.vision_encoder.state_dict()[name]), name
    assert not torch.allclose(after.lm.embedding.weight, before.lm.embedding.weight, atol=0.01)


@pytest.mark.parametrize("engine", ["plain", "deepspeed"])
def test_non_finite_loss_stops_before_the_step(
    data: Path, tmp_path: Path, engine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Conversation.compute
    calls = []

    def poisoned(self: Conversation, inputs: dict):
        calls.append(inputs)
        loss, stats = compute(self, inputs)
        return (loss * float("nan") if len(calls) == 4 else loss), stats

    monkeypatch.setattr(Conversation, "compute", poisoned)
    output = tmp_path / "run"
    with pytest.raises(NonFiniteError, match=r"step 4: loss nan.*gradients of.*Rows: 'row"):
        run(small_config(data, f"train.engine={engine}", "train.save_every=3"), output)
    assert latest_checkpoint(output).name == "step-000003"
    assert len(losses(output)) == 3
    saved = cobra.load(latest_checkpoint(output)).state_dict()
    assert all(tensor.isfinite().all() for tensor in saved.values())


def test_non_finite_gradient_stops_too(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Conversation.compute

    def poisoned(self: Conversation, inputs: dict):
        loss, stats = compute(self, inputs)
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, stats

    monkeypatch.setattr(Conversation, "compute", poisoned)
    with pytest.raises(NonFiniteError, match=r"step 1: loss \d.*gradient norm (nan|inf)"):
        run(small_config(data, "train.engine=plain"), tmp_path / "run")
    assert latest_checkpoint(tmp_path / "run").name == "step-000000"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_signal_finishes_the_step_and_saves(
    data: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = Conversation.compute
    calls = []

    def interrupted(self: Conversation, inputs: dict):
        calls.append(inputs)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return compute(self, inputs)

    monkeypatch.setattr(Conversation, "compute", interrupted)
    handlers = signal.getsignal(number)
    assert run(small_config(data, "train.engine=plain"), tmp_path / "run") is False
    assert latest_checkpoint(tmp_path / "run").name == "step-000002"
    assert len(losses(tmp_path / "run")) == 2
    assert not (tmp_path / "run" / "config.json").exists()
    assert signal.getsignal(number) == handlers


def test_image_that_goes_bad_stops_or_is_skipped(data: Path, tmp_path: Path) -> None:
    broken = load(small_config(data))[0].images[0].path
    broken.write_bytes(broken.read_bytes()[:-30])  # the header stays whole
    changes = ("train.engine=plain", "train.save_every=1", "train.steps=10")
    with pytest.raises(BadRowError, match=r"row 'row0': .*0.png"):
        run(small_config(data, *changes), tmp_path / "stops")
    done = len(losses(tmp_path / "stops"))
    assert latest_checkpoint(tmp_path / "stops") is None or done > 0
    assert run(small_config(data, *changes, "data.skip_bad=true"), tmp_path / "skips")
    assert len(losses(tmp_path / "skips")) == 10
    assert losses(tmp_path / "skips")[:done] == losses(tmp_path / "stops")
