"""Conversion of published language models: they compute what transformers does, or where it has no class the published
formulas, and stand on the disk as they should. Nothing is downloaded."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import cobra
from cobra.checkpoint import named_tensors
from cobra.cli import main
from cobra.convert import LAYOUTS, Layout, Options, convert, plan
from cobra.convert.conversion import detect
from cobra.convert.source import read_source
from cobra.convert.writer import Entry, write_tensors
from cobra.cost import LMCost
from cobra.lm import LanguageModel, released
from cobra.lm.decode import Decoder
from cobra.tokenizer import SPECIALS
from tests.cobra.published import (
    CASES,
    LLAMA3_ROPE,
    MERGES,
    ROWS,
    as_published,
    change_config,
    llama,
    spoil,
    train_tokenizer,
)
from tests.cobra.released import RELEASED
from tests.cobra.test_oracles import their_greedy, tokens
from tests.tolerance import assert_close
from vision_scan.errors import UserError


def run(capsys, *arguments) -> tuple[int, str, str]:
    """(status, standard output, standard error) of `cobra convert`."""
    capsys.readouterr()  # what transformers has printed before
    status = main(["convert", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_logits_are_those_of_the_published_model(published, case):
    theirs, _, path = published(case)
    ours = cobra.load(path, dtype="float32")
    ids = tokens(2, 37)  # longer than a chunk, a window and the original context
    assert_close(case, ours.lm(ids)[0], theirs(ids, use_cache=False).logits, 1e-4)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_greedy_generation_is_that_of_the_published_model(published, case, monkeypatch):
    theirs, _, path = published(case)
    calls, step = [], Decoder.step
    monkeypatch.setattr(Decoder, "step", lambda *call: calls.append(0) or step(*call))
    ids = tokens(1, 11, seed=3)
    found = cobra.load(path, dtype="float32").generate(ids, max_new_tokens=20, stop_ids=[])
    assert found.tolist() == their_greedy(theirs, ids, torch.ones_like(ids), 20).tolist()
    assert len(set(found[0].tolist())) > 3  # not one token for ever
    if case == "qwen2":
        assert not calls  # its biases are not in the compiled decoder


@pytest.mark.parametrize("case", CASES)
def test_the_key_map_leads_there_and_back(published, case):
    """Every number of a published checkpoint is in one place of ours, and there are no others: numbered, and taken
    apart, they come back."""
    _, path, _ = published(case)
    source = read_source(path)
    layout = detect(source)
    config = layout.read_config(Options(source.config, "config.json"))
    with torch.device("meta"):
        own = named_tensors(LanguageModel(config))
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    pieces = layout.locate(config, source.config, shapes)
    assert pieces.keys() == own.keys()
    expected = {name: tuple(x.shape) for name, x in source.tensors.items() if not layout.is_left_out(name)}
    if config.tie_word_embeddings:
        expected.pop("lm_head.weight", None)
    told = {piece.name: piece.shape or shapes[name] for name, several in pieces.items() for piece in several}
    assert told == expected
    numbers = {name: torch.arange(math.prod(shape)).view(shape) for name, shape in expected.items()}
    taken: dict[str, list[int]] = {name: [] for name in expected}
    for name, several in pieces.items():
        parts = [replace(piece, factor=1.0, shift=0.0).take(numbers[piece.name], torch.int64) for piece in several]
        assert tuple(torch.cat(parts).shape) == shapes[name], name
        for piece, part in zip(several, parts, strict=True):
            taken[piece.name] += part.flatten().tolist()
    assert all(sorted(taken[name]) == list(range(numbers[name].numel())) for name in expected)


@pytest.mark.parametrize("case", CASES)
def test_the_layout_is_told_by_the_content(published, case):
    _, path, _ = published(case)
    source = read_source(path)
    assert [layout.name for layout in LAYOUTS if layout.detects(source.config, source.tensors)] == [
        CASES[case][3]
    ]


EMBEDDING, WORDS = "model.embed_tokens.weight", "backbone.embeddings.weight"
TELLING = {  # names of tensors that tell a layout, where there are others than the embeddings of most
    **{name: {"backbone.embedding.weight"} for name in ("state-spaces Mamba", "Llamba")},
    **{f"transformers {name}": {WORDS} for name in ("Mamba", "Mamba-2", "Falcon-Mamba", "Nemotron-H")},
    "MambaInLlama": {EMBEDDING, "model.layers.0.mamba.in_proj_x.weight"},
}


@pytest.mark.parametrize("name", RELEASED)
def test_configurations_of_released_models_are_read(name):
    expected, values, parameters = RELEASED[name]
    (layout,) = (layout for layout in LAYOUTS if layout.detects(values, TELLING.get(expected, {EMBEDDING})))
    assert layout.name == expected
    options = Options(values, name)
    config = layout.read_config(options)
    options.close()
    assert LMCost(config).parameters == parameters
    if name in cobra.PRESETS:
        assert config == cobra.PRESETS[name].lm


THEIRS = [name for name in RELEASED if name in released.RELEASED and "transformers" in RELEASED[name][0]]


@pytest.mark.parametrize("name", THEIRS)
def test_released_sizes_are_those_that_transformers_builds(name):
    from transformers import AutoConfig, AutoModelForCausalLM

    _, values, parameters = RELEASED[name]
    with torch.device("meta"):
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    assert sum(parameter.numel() for parameter in theirs.parameters()) == parameters


def test_layouts_have_different_names():
    assert len({layout.name for layout in LAYOUTS}) == len(LAYOUTS)


def test_a_new_layout_is_one_entry(damaged, tmp_path, monkeypatch):
    path = damaged("llama")
    change_config(path, model_type="lama")
    with pytest.raises(UserError, match="of no known layout"):
        plan(path)
    (known,) = (layout for layout in LAYOUTS if layout.name == "transformers Llama")
    new = Layout(
        name="lama",
        detects=lambda config, names: config.get("model_type") == "lama",
        read_config=known.read_config,
        prefixes=known.prefixes,
    )
    monkeypatch.setattr("cobra.convert.conversion.LAYOUTS", (*LAYOUTS, new))
    assert plan(path).layout is new


def test_the_rest_of_the_model_is_that_of_the_preset(published):
    _, path, converted = published("mamba-2")
    model = cobra.load(converted, dtype="float32")
    tiny = cobra.PRESETS["tiny"]
    assert model.config == cobra.CobraConfig(
        **{**{name: getattr(tiny, name) for name in vars(tiny)}, "lm": model.config.lm}
    )
    built = cobra.build(model.config, seed=0, tokenizer=model.tokenizer)
    for part in ("vision_encoder", "connector"):
        theirs = getattr(built, part).state_dict()
        for name, tensor in getattr(model, part).state_dict().items():
            assert torch.equal(tensor, theirs[name]), name
    other = plan(path, seed=1)
    first = next(entry for entry in other.vision if entry.name.endswith("proj.weight"))
    assert not torch.equal(first.read(), dict(built.named_parameters())[first.name])
    assert isinstance(model.answer("how many?", max_new_tokens=3), str)


def test_another_preset(published, tokenizer_file, monkeypatch, tmp_path):
    _, path, _ = published("mamba-2")
    small = cobra.CobraConfig(
        **{
            **vars(cobra.PRESETS["tiny"]),
            "image": cobra.PRESETS["tiny"].image.__class__(height=16, width=24),
            "template": "zephyr",
        }
    )
    monkeypatch.setitem(cobra.PRESETS, "small", small)
    convert(path, tmp_path / "model", preset="small")
    config = cobra.load(tmp_path / "model").config
    assert (config.image, config.template) == (small.image, "zephyr")
    other = train_tokenizer(tmp_path / "tokenizer.json", specials=())
    with pytest.raises(UserError, match=r"tokenizer\.json does not fit the template 'zephyr'.*endoftext"):
        plan(path, preset="small", tokenizer=other)
    with pytest.raises(UserError, match="unknown preset 'tinny'; did you mean 'tiny'"):
        plan(path, preset="tinny")


@pytest.mark.parametrize("case", ["mamba as state-spaces", "mamba-2", "qwen2"])
def test_dtypes_stay_as_stored_and_some_are_float32(damaged, tmp_path, case):
    path = damaged(case)
    source = read_source(path)
    tensors = {name: tensor.bfloat16() for name, tensor in source.tensors.items()}
    if source.weights.suffix == ".bin":
        torch.save(tensors, source.weights)
    else:
        save_file(tensors, source.weights)
    conversion = convert(path, tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {"lm.embedding.weight", "lm.norm_f.weight"} < stored.keys()
    for name, tensor in stored.items():
        leaf = name.rpartition(".")[2]
        is_wide = "norm" in name or leaf in ("A_log", "D", "dt_bias") or name.endswith("dt_proj.bias")
        expected = torch.float32 if is_wide or not name.startswith("lm.") else torch.bfloat16
        assert tensor.dtype == expected, name
    assert conversion.nbytes == sum(tensor.nbytes for tensor in stored.values())
    half = cobra.load(tmp_path / "model", dtype="bfloat16")
    assert torch.equal(half.lm.embedding.weight, stored["lm.embedding.weight"])


def test_special_tokens_take_unused_ids(published, tokenizer_file):
    theirs, path, converted = published("mamba as state-spaces")
    model = cobra.load(converted, dtype="float32")
    ids = [model.tokenizer.id_of(name) for name in SPECIALS]
    assert ids == list(range(256 + MERGES, 256 + MERGES + len(SPECIALS)))
    assert model.config.lm.vocab_size == ROWS
    assert torch.equal(model.lm.embedding.weight, theirs.get_input_embeddings().weight)
    assert "special tokens on unused ids: <pad> 276," in "\n".join(plan(path).report())


@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_embeddings_grow_where_no_ids_are_left(tmp_path, tokenizer_file, tied):
    rows = 256 + MERGES
    theirs = llama(vocab_size=rows, tie_word_embeddings=tied)
    as_published(theirs, tmp_path / "published")
    conversion = convert(tmp_path / "published", tmp_path / "model", tokenizer=tokenizer_file)
    model = cobra.load(tmp_path / "model", dtype="float32")
    assert model.config.lm.vocab_size == rows + len(SPECIALS)
    assert "5 new embeddings" in "\n".join(conversion.report())
    for ours, given in (
        (model.lm.embedding, theirs.get_input_embeddings()),
        (model.lm.lm_head, theirs.get_output_embeddings()),
    ):
        assert torch.equal(ours.weight[:rows], given.weight)
        assert torch.allclose(ours.weight[rows:], given.weight.mean(0).expand(5, -1), atol=1e-6)
    ids = tokens(1, 20)
    logits = model.lm(ids)[0]
    assert_close("logits", logits[..., :rows], theirs(ids).logits, 1e-4)
    assert (logits[..., rows:].amax(-1) < logits[..., :rows].amax(-1)).all()


def test_a_tokenizer_that_has_the_special_tokens_keeps_its_ids(published, tmp_path):
    own = train_tokenizer(tmp_path / "tokenizer.json", specials=("<|end|>", "<pad>"))
    conversion = plan(published("mamba")[1], tokenizer=own)
    assert (conversion.tokenizer.end_id, conversion.tokenizer.pad_id) == (0, 1)
    assert conversion.tokenizer.added.keys() == set(SPECIALS) - {"<|end|>", "<pad>"}
    complete = train_tokenizer(tmp_path / "tokenizer.json", specials=SPECIALS)
    assert "has all special tokens" in "\n".join(plan(published("mamba")[1], tokenizer=complete).report())


def test_tensors_computed_from_the_configuration_are_not_needed(damaged):
    path = damaged("llama 3.2")
    spoil(path, lambda t: t.update({"model.layers.1.self_attn.rotary_emb.inv_freq": torch.ones(6)}))
    assert len(plan(path).published) == 20


def test_files_of_transformers_4_are_read(damaged, read_config):
    path = damaged("llama 3.2")
    expected = plan(path).config
    rope = {name: value for name, value in LLAMA3_ROPE.items() if name != "rope_theta"}
    change_config(path, rope_parameters=None, rope_theta=300.0, rope_scaling=rope)
    assert plan(path).config == expected
    qwen = read_config("qwen2, sliding window", layer_types=None, rope_parameters=None)
    assert [layer.window for layer in qwen.layers[::2]] == [None, 7]


def test_limits_of_steps_are_read(read_config):
    limits = read_config("mamba-2", time_step_limit=[0.1, 0.5]), read_config("mamba-2")
    assert [config.layers[0].dt_limit for config in limits] == [(0.1, 0.5), (0.0, float("inf"))]


def test_a_dry_run_says_everything_and_writes_nothing(capsys, published, tmp_path):
    _, path, converted = published("llama")
    status, out, error = run(capsys, path, tmp_path / "model", "--dry-run")
    assert (status, error) == (0, "")
    assert not list(tmp_path.iterdir())
    model = cobra.load(converted)
    count = sum(p.numel() for p in model.lm.parameters())
    nbytes = sum(tensor.nbytes for tensor in load_file(converted / "model.safetensors").values())
    for said in (
        "transformers Llama, model.safetensors.index.json",
        "2 attention, 2 mlp; d_model 64, vocabulary 288",
        f"{count:,} of the language model",
        "dtype       float32",
        f"{path / 'tokenizer.json'}, 276 ids for 288 embeddings",
        "<pad> 276, <image> 277",
        f"bytes       {nbytes:,}",
        "dry run",
    ):
        assert said in out, said


def test_the_command_writes_what_the_function_writes(capsys, published, tmp_path):
    _, path, converted = published("llama")
    status, out, error = run(capsys, path, tmp_path / "model")
    assert (status, error) == (0, "")
    assert out.splitlines()[-1] == f"output      {tmp_path / 'model'}"
    for file in converted.iterdir():
        assert (tmp_path / "model" / file.name).read_bytes() == file.read_bytes()


def test_a_conversion_that_is_interrupted_leaves_no_trace(published, tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    conversion = plan(published("llama")[1])
    conversion.published[3] = conversion.published[3]._replace(read=interrupt)
    with pytest.raises(KeyboardInterrupt):
        conversion.write(tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_the_writer_writes_what_safetensors_reads(tmp_path):
    noise = torch.Generator().manual_seed(0)
    tensors = {
        "odd": torch.randn(3, generator=noise).half(),
        "a": torch.randn(5, 7, generator=noise),
        "transposed": torch.randn(5, 7, generator=noise).bfloat16().T,
        "b": torch.randn(2, 1, 3, generator=noise).double(),
        "scalar": torch.tensor(7),
        "none": torch.zeros(0, 4),
        "flags": torch.tensor([True, False, True]),
    }
    advanced = []
    write_tensors(
        tmp_path / "file",
        [Entry(name, t.dtype, tuple(t.shape), lambda t=t: t) for name, t in tensors.items()],
        advanced.append,
    )
    read = load_file(tmp_path / "file")
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor), name
    assert sum(advanced) == sum(tensor.nbytes for tensor in tensors.values())
    with safe_open(tmp_path / "file", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def anonymous_bytes() -> int:
    """Memory of this process that stands in no file, and has to be kept."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_no_more_than_a_tensor_is_in_memory(tmp_path, tokenizer_file, suffix):
    d_model, layers = 512, 8
    config = {"model_type": "mamba", "hidden_size": d_model, "num_hidden_layers": layers, "vocab_size": ROWS}
    tensors = {
        "backbone.embeddings.weight": torch.zeros(ROWS, d_model),
        "backbone.norm_f.weight": torch.ones(d_model),
    }
    for index in range(layers):
        shapes = {
            "mixer.A_log": (1024, 16), "mixer.D": (1024,), "mixer.conv1d.bias": (1024,),
            "mixer.conv1d.weight": (1024, 1, 4), "mixer.dt_proj.bias": (1024,),
            "mixer.dt_proj.weight": (1024, 32), "mixer.in_proj.weight": (2048, 512),
            "mixer.out_proj.weight": (512, 1024), "mixer.x_proj.weight": (64, 1024), "norm.weight": (512,),
        }  # fmt: skip
        tensors |= {f"backbone.layers.{index}.{name}": torch.ones(shape) for name, shape in shapes.items()}
    total, largest = sum(t.nbytes for t in tensors.values()), 2048 * 512 * 4
    assert total > 10 * largest
    (tmp_path / "published").mkdir()
    (tmp_path / "published" / "config.json").write_text(json.dumps(config))
    if suffix == ".bin":
        torch.save(tensors, tmp_path / "published" / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "published" / "model.safetensors")
    del tensors
    before, seen = anonymous_bytes(), []
    conversion = plan(tmp_path / "published", tokenizer=tokenizer_file)
    write_tensors(
        tmp_path / "file",
        [*conversion.published, *conversion.vision],
        lambda nbytes: seen.append(anonymous_bytes()),
    )
    assert max(seen) - before < total / 3
