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


SCAN = '{"order": "bi2", "lists": "share", "mixer": {"d_state": 4, "headdim": 8, "expand": 1, "chunk_size": 16}}'


def tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def begin(data: Path, *changes: str) -> dict[str, torch.Tensor]:
    config = small_config(data, *changes)
    return tensors(build_model(config, load(config)))


def store(data: Path, path: Path, *changes: str) -> dict[str, torch.Tensor]:
    """A model directory of another seed than runs have, and its tensors."""
    model = cobra.build(small_config(data, *changes).model.build_config(), seed=31)
    with torch.no_grad():  # biases and norms too
        for parameter in model.parameters():
            parameter.add_(0.01)
    cobra.save(model, path)
    return tensors(model)


def assert_origins(begun: dict, stored: dict, random: dict, fresh: str) -> None:
    """Every tensor of a module is the random model's, every other one the file's; both occur."""
    names = {name for name in begun if name.startswith(f"{fresh}.")}
    assert names and names != begun.keys()
    for name, tensor in begun.items():
        origin = random if name in names else stored
        assert torch.equal(tensor, origin[name]), name


def test_a_module_that_the_stored_tower_lacks_begins_at_random(data: Path, tmp_path: Path) -> None:
    """As a study does: a tower that has learned without scans gets some, in front of an untrained model."""
    stored = store(data, tmp_path / "model")
    with_scan = f'model.vision_encoder={{"kind": "small", "d_model": 16, "num_heads": 4, "scan": {SCAN}}}'
    taken = ("init.parts=vision_encoder", f"init.path={tmp_path / 'model'}")
    with pytest.raises(UserError, match=r"missing.*vision_encoder\.scans|vision_encoder\.scans.*missing"):
        begin(data, with_scan, *taken, "model.image.height=16")
    begun = begin(data, with_scan, *taken, "init.fresh=vision_encoder.scans")
    random = begin(data, with_scan)
    kept = {name for name in begun if name.startswith("vision_encoder.") and ".scans." not in name}
    assert kept and any(".scans." in name for name in begun)
    for name, tensor in begun.items():
        assert torch.equal(tensor, (stored if name in kept else random)[name]), name
    again = begin(data, with_scan, *taken, "init.fresh=vision_encoder.scans", "train.seed=5")
    for name in begun:
        if name.startswith("vision_encoder.scans.") and name.endswith("in_proj.weight"):
            assert not torch.equal(begun[name], again[name])


@pytest.mark.parametrize("module", ["vision_encoder.stem.0", "connector", "lm.layers.0", "lm.layers.1.mixer.q_proj"])
def test_modules_that_learn_anew_begin_at_random(data: Path, tmp_path: Path, module: str) -> None:
    stored = store(data, tmp_path / "model")
    begun = begin(data, f"init.path={tmp_path / 'model'}", f"init.fresh={module}")
    assert_origins(begun, stored, begin(data), module)


def test_fresh_modules_are_named_whole(data: Path, tmp_path: Path) -> None:
    """lm.layers.1 is not the beginning of lm.layers.10, and several can be given."""
    stored = store(data, tmp_path / "model")
    begun = begin(data, f"init.path={tmp_path / 'model'}", "init.fresh=connector,lm.layers.0.norm")
    random = begin(data)
    for name, tensor in begun.items():
        is_fresh = name.startswith(("connector.", "lm.layers.0.norm."))
        assert torch.equal(tensor, (random if is_fresh else stored)[name]), name


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        (r"init\.fresh: the model has no module 'vision_encoder\.scan'", ("init.fresh=vision_encoder.scan",)),
        (r"init\.fresh: .*'connector\.proj\.0'.*init\.parts", ("init.fresh=connector.proj.0", "init.parts=lm")),
        (r"init\.fresh: the model has no module ''", ('init.fresh=[""]',)),
    ],
)
def test_modules_that_cannot_be_fresh_are_refused_in_one_line(data, tmp_path, message, changes) -> None:
    store(data, tmp_path / "model")
    with pytest.raises(UserError, match=message) as caught:
        begin(data, f"init.path={tmp_path / 'model'}", *changes)
    assert "\n" not in str(caught.value)
