"""Recipes and settings."""

import dataclasses
import json

import pytest

from cobra.config import TINY_ATTENTION
from cobra.typed_config import from_dict, to_dict
from train.recipes import RECIPES
from train.settings import RunConfig, change
from vision_scan.errors import UserError


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_is_complete_and_survives_json(name: str) -> None:
    config = RECIPES[name]()
    assert config.recipe == name
    assert RECIPES[name].__doc__
    assert from_dict(RunConfig, json.loads(json.dumps(to_dict(config))), "run.json") == config


def test_tower_recipe_trains_the_tower_alone() -> None:
    assert RECIPES["tiny-tower"]().train.objective == "regions"
    assert set(RECIPES["tiny-tower"]().train.freeze) == {"connector", "lm"}
    assert RECIPES["tiny-naming"]().train.objective == "naming"
    for name in ("tiny-naming", "tiny-align"):
        assert RECIPES[name]().train.freeze == ("vision_encoder",)
    assert RECIPES["tiny"]().train.freeze == ()


def test_change_sets_typed_fields_and_leaves_the_recipe_alone() -> None:
    config = change(
        RECIPES["tiny"](),
        ["optim.lr=3e-4", "train.epochs=2", "init.parts=vision_encoder,connector", "log.wandb=yes"],
    )
    assert config.optim.lr == 3e-4
    assert config.train.epochs == 2.0
    assert config.init.parts == ("vision_encoder", "connector")
    assert config.log.wandb is True
    assert RECIPES["tiny"]().log.wandb is False


def test_change_reaches_the_model_through_its_preset() -> None:
    config = change(RECIPES["tiny"](), ["model.connector.order=hilbert"])
    assert config.model.build_config().connector.order == "hilbert"
    twin = change(config, ["model.preset=transformer-tiny"])
    assert twin.model.build_config().connector.order == "hilbert"
    assert {layer.kind for layer in twin.model.build_config().lm.layers} == {"attention", "mlp"}


@pytest.mark.parametrize("twin", ["transformer", "window", "hybrid"])
def test_recipes_train_every_twin(twin) -> None:
    """The twins of `tiny` learn by the settings that were tuned with its attention, those of Cobra by Cobra's."""
    for recipe, size in (("tiny", "tiny"), ("tiny-align", "tiny"), ("cobra-3b", "3b")):
        config = change(RECIPES[recipe](), [f"model.preset={twin}-{size}"])
        built, own = config.model.build_config(), RECIPES[recipe]().model.build_config()
        assert dataclasses.replace(built, lm=own.lm) == own and built.lm != own.lm
        if size == "tiny":
            (attention,) = {layer for layer in built.lm.layers if layer.kind == "attention"}
            assert dataclasses.replace(attention, window=None) == TINY_ATTENTION


@pytest.mark.parametrize(
    ("assignment", "told"),
    [
        ("optim.lrr=1", "did you mean 'lr'"),
        ("optm.lr=1", "did you mean 'optim'"),
        ("optim.lr", "section.field=value"),
        ("optim.lr=fast", "'fast'"),
        ("optim.beta1=1.5", "0 to 1"),
        ("init.residual=-1", "0 or more"),
        ("train.batch_size=0", "1 or more"),
        ("train.dtype=fp16", "float32"),
        ("train.freeze=vision_encoder,connector,lm", "nothing would learn"),
        ("train.epochs=-1", "more than 0"),
        ("tokenizer.kind=file", "tokenizer.path"),
        ("model.preset=tny", "did you mean 'tiny'"),
        ("model.connector.order=hilbrt", "did you mean 'hilbert'"),
        ("model.conector.order=hilbert", "did you mean 'connector'"),
        ("init.parts=tower", "vision_encoder"),
    ],
)
def test_change_names_what_is_allowed(assignment: str, told: str) -> None:
    with pytest.raises(UserError, match=told) as caught:
        change(RECIPES["tiny"](), [assignment])
    assert "\n" not in str(caught.value)
