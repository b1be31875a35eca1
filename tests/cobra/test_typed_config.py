import json
from dataclasses import dataclass, field
from typing import Literal

import pytest

from cobra.config import PRESETS, CobraConfig
from cobra.connector import LinearConfig
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.typed_config import from_dict, override, to_dict
from vision_scan.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Cat:
    kind: Literal["cat"] = "cat"
    lives: int = 9


@dataclass(frozen=True, kw_only=True)
class Dog:
    kind: Literal["dog"] = "dog"
    name: str


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float = 1e-3
    betas: tuple[float, ...] = (0.9, 0.95)
    clip: float | None = 1.0

    def __post_init__(self) -> None:
        if self.lr < 0:
            raise UserError(f"lr {self.lr} must not be negative")


@dataclass(frozen=True, kw_only=True)
class Run:
    """One field of each type that configurations use."""

    steps: int
    name: str = "run"
    quiet: bool = False
    limit: int | None = None
    engine: Literal["plain", "deepspeed"] = "plain"
    parts: tuple[str, ...] = ("lm",)
    scale: dict[str, float] = field(default_factory=dict)
    path: str | None = None
    pet: Cat | Dog = field(default_factory=Cat)
    pets: tuple[Cat | Dog, ...] = ()
    spare: Cat | None = None
    optim: Optim = field(default_factory=Optim)


RUN = Run(steps=10, pets=(Dog(name="Rex"), Cat()))


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_survive_json(preset):
    config = PRESETS[preset]
    data = json.loads(json.dumps(to_dict(config)))
    assert from_dict(CobraConfig, data, "here") == config


def test_presets_are_json_that_any_reader_takes():
    """JSON has no infinity (RFC 8259, section 6); jq, browsers and most languages refuse it."""
    config = PRESETS["tiny"]
    data = json.loads(json.dumps(to_dict(config), allow_nan=False))
    assert from_dict(CobraConfig, data, "here") == config


def test_everything_survives_json():
    run = Run(
        steps=-3, name="none", quiet=True, limit=0, engine="deepspeed", parts=(), scale={"lm": 0.5},
        path="ä/b", pet=Dog(name="x"), pets=(Cat(lives=1), Dog(name="y")), spare=Cat(),
        optim=Optim(clip=None),
    )  # fmt: skip
    for config in (run, RUN):
        data = json.loads(json.dumps(to_dict(config)))
        assert from_dict(Run, data, "here") == config
        assert type(from_dict(Run, data, "here").pets) is tuple


def test_defaults_fill_what_is_missing_and_nested_kinds_pick_their_class():
    run = from_dict(Run, {"steps": 1, "pet": {"kind": "dog", "name": "a"}, "spare": {"kind": "cat"}})
    assert run.pet == Dog(name="a") and run.spare == Cat() and run.optim == Optim()


def test_integers_serve_as_floats_and_whole_floats_as_integers():
    run = from_dict(Run, {"steps": 3.0, "optim": {"lr": 1}})
    assert type(run.steps) is int and run.steps == 3
    assert type(run.optim.lr) is float


@pytest.mark.parametrize(
    ("message", "data"),
    [
        (r"file\.json: unknown setting 'stebs'; did you mean 'steps'", {"stebs": 1}),
        (r"unknown setting 'zzz' \(allowed: steps, ", {"steps": 1, "zzz": 1}),
        (r"file\.json: missing steps", {"name": "a"}),
        (r"optim: unknown setting 'lrr'; did you mean 'lr'", {"steps": 1, "optim": {"lrr": 1}}),
        (r"pet: unknown kind 'dgo'; did you mean 'dog'", {"steps": 1, "pet": {"kind": "dgo"}}),
        (r"pet: unknown kind None", {"steps": 1, "pet": {"lives": 3}}),
        (r"pet: unknown kind", {"steps": 1, "pet": {"kind": ["cat"]}}),
        (r"pet: missing name", {"steps": 1, "pet": {"kind": "dog"}}),
        (r"pet: unknown setting 'lives'", {"steps": 1, "pet": {"kind": "dog", "name": "a", "lives": 3}}),
        (r"spare: kind: got 'dog', allowed: cat", {"steps": 1, "spare": {"kind": "dog"}}),
        (r"pets: .*kind 'cow'", {"steps": 1, "pets": [{"kind": "cat"}, {"kind": "cow"}]}),
        (r"steps: got 'many', allowed: int", {"steps": "many"}),
        (r"steps: got 1\.5", {"steps": 1.5}),
        (r"steps: got True", {"steps": True}),
        (r"steps: got None", {"steps": None}),
        (r"steps: got '--5'", {"steps": "--5"}),
        (r"steps: got nan", {"steps": float("nan")}),
        (r"steps: got inf", {"steps": float("inf")}),
        (r"quiet: got 1, allowed: bool", {"steps": 1, "quiet": 1}),
        (r"quiet: got 'yes'", {"steps": 1, "quiet": "yes"}),
        (r"name: got 3, allowed: str", {"steps": 1, "name": 3}),
        (r"engine: got 'plane', allowed: plain \| deepspeed", {"steps": 1, "engine": "plane"}),
        (r"parts: got 3, allowed: a list of str", {"steps": 1, "parts": 3}),
        (r"parts: got 'lm'", {"steps": 1, "parts": "lm"}),
        (r"parts: got 3, allowed: str", {"steps": 1, "parts": ["lm", 3]}),
        (r"scale: got 'x', allowed: float", {"steps": 1, "scale": {"lm": "x"}}),
        (r"betas: got True", {"steps": 1, "optim": {"betas": [True]}}),
        (r"optim: got 3", {"steps": 1, "optim": 3}),
        (r"pets: got 'cat'", {"steps": 1, "pets": ["cat"]}),
        (r"lr -1", {"steps": 1, "optim": {"lr": -1}}),
        (r"file\.json: expected a mapping.*got \[\]", []),
        (r"expected a mapping.*got None", None),
    ],
)
def test_wrong_data_is_one_line_that_names_the_place(message, data):
    with pytest.raises(UserError, match=message) as caught:
        from_dict(Run, data, "file.json")
    assert "\n" not in str(caught.value)
    assert "file.json" in str(caught.value) or "lr -1" in message


@pytest.mark.parametrize(
    ("path", "text", "expected"),
    [
        ("steps", "12", 12),
        ("steps", "1e3", 1000),
        ("steps", "-5", -5),
        ("name", "some text, with = and 1", "some text, with = and 1"),
        ("name", "12", "12"),
        ("name", "none", "none"),
        ("name", "[a]", "[a]"),
        ("path", "none", None),
        ("path", "null", None),
        ("path", "a/b.json", "a/b.json"),
        ("limit", "7", 7),
        ("limit", "None", None),
        ("engine", "deepspeed", "deepspeed"),
        ("parts", "lm,connector", ("lm", "connector")),
        ("parts", "lm", ("lm",)),
        ("parts", " lm , connector ", ("lm", "connector")),
        ("parts", '["lm", "connector"]', ("lm", "connector")),
        ("parts", "[]", ()),
        ("scale", '{"lm": 2}', {"lm": 2.0}),
        ("spare", "none", None),
        ("spare", '{"kind": "cat", "lives": 3}', Cat(lives=3)),
        ("pet", '{"kind": "dog", "name": "a"}', Dog(name="a")),
        ("pet.lives", "3", Cat(lives=3)),
        ("pets", '[{"kind": "cat"}]', (Cat(),)),
        ("pets.0.name", "Bello", (Dog(name="Bello"), Cat())),
        ("pets.1.lives", "3", (Dog(name="Rex"), Cat(lives=3))),
        ("optim.lr", "3e-4", Optim(lr=3e-4)),
        ("optim.lr", "1", Optim(lr=1.0)),
        ("optim.clip", "none", Optim(clip=None)),
        ("optim.betas", "0.5,0.6", Optim(betas=(0.5, 0.6))),
        ("optim.betas", "[0.5, 1]", Optim(betas=(0.5, 1.0))),
        ("optim.betas", "0.5", Optim(betas=(0.5,))),
        *(("quiet", word, True) for word in ("true", "True", "yes", "on")),
        *(("quiet", word, False) for word in ("false", "FALSE", "no", "off")),
    ],
)
def test_override_parses_by_the_type_of_the_field(path, text, expected):
    new = override(RUN, path, text)
    top = path.split(".")[0]
    assert getattr(new, top) == expected
    assert type(getattr(new, top)) is type(expected)
    assert to_dict(new) == to_dict(RUN) | {top: to_dict(expected)}  # nothing else moved
    assert Run(steps=10, pets=(Dog(name="Rex"), Cat())) == RUN


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("stepz", "1", "stepz: unknown setting 'stepz'; did you mean 'steps'"),
        ("optim.lrr", "1", r"optim\.lrr: unknown setting 'lrr'; did you mean 'lr'"),
        ("optimm.lr", "1", "did you mean 'optim'"),
        ("steps", "ten", "steps: got 'ten', allowed: int"),
        ("steps", "1.5", "steps: got 1.5"),
        ("steps", "", "steps: got ''"),
        ("steps", "none", "steps: got"),
        ("steps", "--5", "steps: got '--5'"),
        ("steps", "[1]", r"steps: got \[1\]"),
        ("quiet", "maybe", "quiet: got 'maybe', allowed: bool"),
        ("quiet", "1", "quiet: got 1"),
        ("limit", "x", "limit: got 'x', allowed: int or none"),
        ("engine", "plane", r"engine: got 'plane', allowed: plain \| deepspeed"),
        ("optim.betas", "a,b", r"optim\.betas: got 'a', allowed: float"),
        ("optim.betas", "[0.5", r"optim\.betas: got '\[0\.5'"),
        ("optim.lr", "-1", "lr -1"),
        ("optim.lr.x", "1", r"optim\.lr\.x: .* has no field 'x'"),
        ("path.x", "1", "path.x: None has no field 'x'"),
        ("pets.2.name", "a", "'2' must be an index below 2"),
        ("pets.-1.name", "a", "must be an index below 2"),
        ("pets.first.name", "a", "must be an index below 2"),
        ("pets.0.lives", "3", "unknown setting 'lives'"),
        ("pets.0", "x", r"pets\.0: name a field"),
        ("pet", "dog", "pet: got 'dog'"),
        ("pet", '{"kind": "cow"}', "pet: unknown kind 'cow'"),
        ("pet.kind", "dog", "pet.kind: got 'dog', allowed: cat"),
        ("", "1", "unknown setting ''"),
        ("optim.", "1", "unknown setting ''"),
    ],
)
def test_a_wrong_override_is_one_line_that_names_the_path(path, text, message):
    with pytest.raises(UserError, match=message) as caught:
        override(RUN, path, text)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "text", "read"),
    [
        ("connector.order", "hilbert", lambda c: c.connector.order == "hilbert"),
        ("connector.order", "random(seed=3)", lambda c: c.connector.order == "random(seed=3)"),
        ("connector", '{"kind": "linear"}', lambda c: c.connector == LinearConfig()),
        ("connector.pre_norm", "false", lambda c: c.connector.pre_norm is False),
        ("connector.mixer.d_state", "8", lambda c: c.connector.mixer.d_state == 8),
        ("lm.layers.0.d_state", "8",
         lambda c: [layer.d_state == 8 for layer in c.lm.layers[:2]] == [True, False]),
        ("lm.layers.3.dt_limit", "0.01,0.5", lambda c: c.lm.layers[3].dt_limit == (0.01, 0.5)),
        ("lm.layers", '[{"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "window": 9}]',
         lambda c: c.lm.layers == (AttentionConfig(num_heads=4, num_kv_heads=2, window=9),)),
        ("lm.layers", '[{"kind": "mamba2"}, {"kind": "mamba2", "ngroups": 2}]',
         lambda c: c.lm.layers == (Mamba2Config(), Mamba2Config(ngroups=2))),
        ("image.resize", "letterbox", lambda c: c.image.resize == "letterbox"),
        ("lm.tie_word_embeddings", "off", lambda c: c.lm.tie_word_embeddings is False),
    ],
)  # fmt: skip
def test_overrides_of_a_preset(path, text, read):
    assert read(override(PRESETS["tiny"], path, text))


@pytest.mark.parametrize(
    ("path", "text", "message"),
    [
        ("connector.order", "hilbrt", "hilbert"),
        ("connector.combine", "max", "sum"),
        ("connector.projector", "mlp", "fused_mlp"),
        ("image.height", "4", "smaller than a patch"),
        ("template", "compct", "compact"),
        ("lm.layers", "[]", "number of layers"),
        ("lm.layers.0.num_heads", "3", "num_heads"),
    ],
)
def test_wrong_overrides_of_a_preset(path, text, message):
    with pytest.raises(UserError, match=message):
        override(PRESETS["tiny"], path, text)


def test_override_of_a_window_and_of_no_positions():
    config = PRESETS["transformer-tiny"]
    windowed = override(config, "lm.layers.2.window", "16")
    assert windowed.lm.layers[2].window == 16 and windowed.lm.layers[0].window is None
    assert override(config, "lm.layers.2.rope_theta", "none").lm.layers[2].rope_theta is None
    assert override(config, "lm.layers.2.window", "none") == config
