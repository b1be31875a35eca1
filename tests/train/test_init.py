"""What a run begins with."""

import dataclasses
from pathlib import Path

import pytest
import torch

import cobra
from tests.train.small_run import load, small_config
from train.init import build_model, check_language_model
from train.run import run
from vision_scan.errors import UserError

ROTARY = 'model.lm.layers=[{"kind": "attention", "num_heads": 2, "num_kv_heads": 1, "headdim": 16, "rope_theta": 77.0}]'


def test_language_model_that_knows_nothing_ends_the_run(data: Path, tmp_path: Path) -> None:
    """ML-Mamba's weights were once not loaded, and nobody noticed."""
    config = small_config(data, "train.engine=plain", "init.check_lm=true")
    cobra.save(cobra.build(config.model.build_config(), seed=3), tmp_path / "random")
    config = dataclasses.replace(config, init=dataclasses.replace(config.init, path=str(tmp_path / "random")))
    with pytest.raises(UserError, match=r"loss \d\.\d+ a token on a fixed sentence of \d+, by chance 5\.") as caught:
        run(config, tmp_path / "run")
    assert "init.check_lm=false" in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_language_model_that_knows_english_is_told(data: Path, tmp_path: Path) -> None:
    config = small_config(data, "train.engine=plain", "init.check_lm=true", "train.steps=1")
    model = cobra.build(config.model.build_config(), seed=3)
    ids = torch.tensor([model.tokenizer.encode(cobra.model.FIXED_SENTENCE)])
    optimizer = torch.optim.AdamW(model.lm.train().parameters(), lr=1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        hidden, _ = model.lm.read(ids[:, :-1])
        (model.lm.loss(hidden, ids[:, 1:]) / ids.shape[1]).backward()
        optimizer.step()
    cobra.save(model, tmp_path / "taught")
    config = dataclasses.replace(config, init=dataclasses.replace(config.init, path=str(tmp_path / "taught")))
    told: list[str] = []
    assert run(config, tmp_path / "run", report=told.append)
    (line,) = [line for line in told if line.startswith("language model: loss ")]
    assert float(line.split()[3]) < 0.8 * 5.5
    assert check_language_model(model, config).startswith("language model: loss ")


def test_weights_bring_their_configuration(data: Path, tmp_path: Path) -> None:
    """The preset's rotation would read the same weights as something else."""
    stored = small_config(data, ROTARY).model.build_config()
    model = cobra.build(stored, seed=3)
    cobra.save(model, tmp_path / "model")
    config = small_config(data, f"init.path={tmp_path / 'model'}", "init.parts=lm", "model.vision_encoder.depth=2")
    others = tuple(change for change in config.model.changes if not change.startswith("lm."))
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, changes=others))
    begun = build_model(config, load(config))
    assert begun.config.lm.layers[0].rope_theta == 77.0
    assert begun.config.vision_encoder.depth == 2
    ids = torch.arange(9)[None]
    torch.testing.assert_close(begun.lm(ids)[0], model.lm(ids)[0])


def test_half_precision_weights_are_trained_in_float32(data: Path, tmp_path: Path) -> None:
    config = small_config(data)
    cobra.save(cobra.build(config.model.build_config(), seed=3).to(torch.bfloat16), tmp_path / "model")
    config = small_config(data, f"init.path={tmp_path / 'model'}")
    assert {parameter.dtype for parameter in build_model(config, load(config)).parameters()} == {torch.float32}


def test_towers_come_from_files(data: Path, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    from safetensors.torch import save_file

    tower = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=0)
    save_file(tower.state_dict(), tmp_path / "tower.safetensors")
    changes = ('model.vision_encoder={"kind": "timm", "name": "vit_tiny_patch16_224"}', "model.image.height=32")
    changes = (*changes, "model.image.width=32")
    config = small_config(data, *changes, f"init.towers={tmp_path / 'tower.safetensors'}")
    begun = build_model(config, load(config))
    found = begun.vision_encoder.tower.blocks[0].attn.qkv.weight
    assert torch.equal(found, tower.blocks[0].attn.qkv.weight)
    with pytest.raises(UserError, match="2 tower files for 1 pretrained towers"):
        config = small_config(data, *changes, "init.towers=a.safetensors,b.safetensors")
        build_model(config, load(config))
