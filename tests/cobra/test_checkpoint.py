import json
import os
import stat
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

import cobra
from cobra.checkpoint import (
    PARTS,
    assign_tensors,
    has_native_bf16,
    read_config,
    read_tensors,
    resolve_dtype,
)
from cobra.connector import VSSMLPConfig
from cobra.tokenizer import Tokenizer
from vision_scan.errors import UserError

READ = {"config.json", "model.safetensors", "tokenizer.json"}
FILES = READ | {"tokenizer_config.json"}


@pytest.fixture(scope="module")
def model():
    return cobra.build(small(), seed=3)


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "saved"
    cobra.save(model, path)
    return path


@pytest.fixture
def directory(saved, tmp_path):
    """A model directory to spoil."""
    path = tmp_path / "model"
    path.mkdir()
    for file in saved.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


def small(name="tiny"):
    config = cobra.PRESETS[name]
    return replace(config, lm=replace(config.lm, layers=config.lm.layers[:2]))


def equal(one, other):
    """Whether two models have the same tensors, to the last bit and dtype."""
    mine, theirs = one.state_dict(), other.state_dict()
    return mine.keys() == theirs.keys() and all(
        torch.equal(mine[name], theirs[name]) and mine[name].dtype == theirs[name].dtype for name in mine
    )


@pytest.mark.parametrize("name", ["tiny", "transformer-tiny", "window-tiny", "hybrid-tiny"])
@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_give_the_same_model(tmp_path, name, tied):
    config = small(name)
    config = replace(config, lm=replace(config.lm, tie_word_embeddings=tied))
    model = cobra.build(config, seed=1, tokenizer=Tokenizer.train(["a b c a b c"], 280))
    cobra.save(model, tmp_path / "model")
    loaded = cobra.load(tmp_path / "model", dtype="float32")
    assert equal(model, loaded)
    assert loaded.config == config
    assert loaded.tokenizer.encode("a b c") == model.tokenizer.encode("a b c")
    assert (loaded.lm.lm_head.weight is loaded.lm.embedding.weight) == tied
    assert not loaded.training
    assert {name: p.requires_grad for name, p in loaded.named_parameters()} == {
        name: p.requires_grad for name, p in model.named_parameters()
    }
    assert loaded.answer("a?", max_new_tokens=4) == model.answer("a?", max_new_tokens=4)


def test_load_owns_its_memory(directory):
    model = cobra.load(directory, dtype="float32")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    again = cobra.load(directory, dtype="float32")
    assert not equal(model, again)


def test_tied_weights_are_stored_once(saved):
    names = load_file(saved / "model.safetensors").keys()
    assert "lm.embedding.weight" in names
    assert "lm.lm_head.weight" not in names


def test_load_in_bf16_keeps_float32_where_it_matters(saved, model):
    loaded = cobra.load(saved, dtype="bfloat16")
    assert loaded.dtype == torch.bfloat16
    mixer = loaded.lm.layers[0].mixer
    for name in ("A_log", "D", "dt_bias"):
        assert getattr(mixer, name).dtype == torch.float32
    assert torch.equal(mixer.A_log, model.lm.layers[0].mixer.A_log)
    assert mixer.in_proj.weight.dtype == torch.bfloat16


def test_a_bf16_model_survives_saving(saved, tmp_path):
    half = cobra.load(saved, dtype="bfloat16")
    cobra.save(half, tmp_path / "half")
    assert equal(half, cobra.load(tmp_path / "half", dtype="bfloat16"))
    assert cobra.load(tmp_path / "half", dtype="float32").dtype == torch.float32


def test_a_loaded_model_keeps_the_marks_for_the_optimizer(tmp_path):
    model = cobra.build(replace(small(), connector=VSSMLPConfig()))
    cobra.save(model, tmp_path / "model")
    marks = [
        {name for name, p in one.named_parameters() if getattr(p, "_no_weight_decay", False)}
        for one in (model, cobra.load(tmp_path / "model"))
    ]
    assert marks[0] == marks[1] and len(marks[0]) == 3


def test_save_writes_readable_files_and_leaves_nothing_else(saved):
    assert {file.name for file in saved.iterdir()} == FILES
    assert [file.name for file in saved.parent.iterdir()] == ["saved"]
    expected = stat.S_IMODE(saved.stat().st_mode) & 0o666
    assert {stat.S_IMODE(file.stat().st_mode) for file in saved.iterdir()} == {expected}


def test_save_into_a_run_keeps_its_other_files(model, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text("{}")
    (run / "model.safetensors").write_text("an older one")
    cobra.save(model, run)
    assert {file.name for file in run.iterdir()} == FILES | {"metrics.jsonl"}
    assert equal(cobra.load(run, dtype="float32"), model)


@pytest.mark.parametrize("exists", [False, True])
def test_a_save_that_fails_leaves_no_trace(model, saved, tmp_path, monkeypatch, exists):
    path = tmp_path / "model"
    if exists:
        cobra.save(model, path)
    before = {file: file.read_bytes() for file in path.iterdir()} if exists else {}

    def full_disk(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="no space"):
        cobra.save(model, path)
    assert path.exists() == exists
    assert {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()} == before


def test_save_refuses_a_file(model, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a file"):
        cobra.save(model, tmp_path / "file")


def spoil(directory, change):
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors")


def test_load_names_every_kind_of_misfit(directory):
    def change(tensors):
        for name in [name for name in tensors if name.startswith("connector.")]:
            del tensors[name]
        tensors["lm.extra"] = torch.zeros(1)
        tensors["lm.norm_f.weight"] = torch.zeros(7)

    spoil(directory, change)
    with pytest.raises(UserError) as caught:
        cobra.load(directory)
    told = str(caught.value)
    assert "\n" not in told
    assert "model.safetensors" in told
    assert "missing connector." in told and "more" in told
    assert "unexpected lm.extra" in told
    assert "misshapen lm.norm_f.weight (7,) instead of (128,)" in told


@pytest.mark.parametrize("name", sorted(READ))
def test_load_names_a_missing_file(directory, name):
    (directory / name).unlink()
    with pytest.raises(UserError, match=name):
        cobra.load(directory)


@pytest.mark.parametrize("name", sorted(READ))
@pytest.mark.parametrize("content", [b"", b"{", b"\x80\x02}q\x00.", b"[1]"])
def test_load_names_a_damaged_file(directory, name, content):
    (directory / name).write_bytes(content)
    with pytest.raises(UserError, match=name):
        cobra.load(directory)


def test_load_names_a_truncated_file(directory):
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(UserError, match=r"model\.safetensors"):
        cobra.load(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda config: config.update(format_version=99), "format_version is 99"),
        (lambda config: config.pop("format_version"), "format_version is None"),
        (lambda config: config.update(templat="compact"), "template"),
        (lambda config: config["lm"].update(vocab_size=200), "vocab_size"),
        (lambda config: config["connector"].update(order="hilbrt"), "hilbert"),
    ],
)
def test_load_names_a_bad_setting(directory, change, message):
    config = json.loads((directory / "config.json").read_text())
    change(config)
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        cobra.load(directory)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "float31"}, "float31"),
        ({"device": "cpux"}, "cpux"),
        ({"device": "cuda:99"}, "cuda:99"),
    ],
)
def test_load_names_a_bad_option(saved, options, message):
    with pytest.raises(UserError, match=message):
        cobra.load(saved, **options)


def test_load_names_a_missing_directory(tmp_path):
    with pytest.raises(UserError, match="no such model directory"):
        cobra.load(tmp_path / "none")


def test_read_config_needs_no_weights(directory, model):
    (directory / "model.safetensors").unlink()
    assert read_config(directory) == model.config


def test_parts_can_be_read_and_assigned(saved, model):
    other = cobra.build(small("transformer-tiny"), seed=9)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    parts = ("vision_encoder", "connector")
    tensors = read_tensors(saved, parts)
    assert {name.partition(".")[0] for name in tensors} == set(parts)
    assign_tensors(other, tensors, "saved", parts)
    for name, tensor in other.state_dict().items():
        source = before if name.startswith("lm.") else model.state_dict()
        assert torch.equal(tensor, source[name])
    with pytest.raises(UserError, match=r"saved does not fit .* missing lm"):
        assign_tensors(other, read_tensors(saved, ["lm"]), "saved", ["lm"])


def test_read_tensors_names_a_part_that_is_not_there(saved):
    assert read_tensors(saved).keys() == read_tensors(saved, reversed(PARTS)).keys()
    with pytest.raises(UserError, match="has no part 'tower'; it has connector, lm, vision"):
        read_tensors(saved, ["tower"])


def test_resolve_dtype():
    assert resolve_dtype("float64", "cpu") == torch.float64
    assert resolve_dtype(torch.float16, "cpu") == torch.float16
    expected = torch.bfloat16 if has_native_bf16("cpu") else torch.float32
    assert resolve_dtype("auto", "cpu") == expected


def test_auto_is_float32_where_bf16_is_not_native(monkeypatch):
    monkeypatch.delattr(torch.cpu, "_is_avx512_bf16_supported", raising=False)
    assert resolve_dtype("auto", "cpu") == torch.float32
