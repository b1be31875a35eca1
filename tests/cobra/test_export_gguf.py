"""GGUF files of Mamba and Mamba-2: gguf's own reader finds what was exported, and llama.cpp computes what we do."""

import re
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cobra
from cobra.export import plan
from cobra.export.gguf_file import TYPES
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.tokenizer import END, SPECIALS, Tokenizer
from tests.cobra.published import TEXTS, train_tokenizer
from tests.cobra.test_export import TINY, built, export, run
from tests.cobra.test_oracles import tokens
from tests.tolerance import assert_close, rms_ratio

MODELS = {
    "tiny": TINY.lm,
    "mamba-2, untied": replace(
        TINY.lm,
        layers=(Mamba2Config(d_state=16, headdim=32, d_conv=3, norm_eps=1e-3),) * 2,
        norm_eps=1e-3,
        tie_word_embeddings=False,
    ),
    "mamba": replace(TINY.lm, layers=(Mamba1Config(),) * 3),
    "mamba, untied": replace(
        TINY.lm, layers=(Mamba1Config(dt_rank=5, d_conv=3),) * 2, norm_eps=1e-3, tie_word_embeddings=False
    ),
    "falcon-mamba": replace(TINY.lm, layers=(Mamba1Config(inner_norms="plain", norm_eps=1e-5),) * 2),
}


def digits() -> Tokenizer:
    """One that cuts texts as SmolLM's does."""
    import tokenizers

    ours = tokenizers.Tokenizer.from_str(Tokenizer.train(TEXTS, 300).to_json())
    ours.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Digits(individual_digits=True),
            tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    return Tokenizer(ours)


TOKENIZERS = {
    "gpt-2": lambda folder: Tokenizer.from_file(train_tokenizer(folder / "given.json")),
    "smollm": lambda folder: digits(),
    "bytes": lambda folder: Tokenizer.bytes(),
}
WORDS = ("How many lighthouses are there?", "it's 1234, isn't  it ?\n\n", "Zoë 日本 \U0001f600", f"a{END}b")


def read_file(path: Path):
    """(fields, tensors) of a GGUF file, the tensors as numbers."""
    gguf = pytest.importorskip("gguf")
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    tensors = {
        tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        for tensor in reader.tensors
    }
    return fields, tensors, {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}


def load_native(path: Path, form: str = "float32"):
    """The file as llama.cpp reads it."""
    pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
    from eval.peers.llama_cpp import LlamaCppReader

    return LlamaCppReader(path, form, 1, 96)


@pytest.mark.parametrize("name", MODELS)
def test_the_file_holds_the_model(name, tmp_path):
    pytest.importorskip("gguf")
    lm = MODELS[name]
    path = built(tmp_path / "model", lm)
    chosen = plan(path, format="gguf")
    chosen.write(tmp_path / "lm.gguf")
    fields, tensors, types = read_file(tmp_path / "lm.gguf")
    own, layer = cobra.load(path, dtype="float32").lm, lm.layers[0]
    kind = "mamba" if layer.kind == "mamba1" else "mamba2"
    assert fields["general.architecture"] == kind
    steps = layer.rank(lm.d_model) if kind == "mamba" else layer.nheads(lm.d_model)
    for key, value in {
        "embedding_length": lm.d_model, "block_count": len(lm.layers), "vocab_size": lm.vocab_size,
        "ssm.conv_kernel": layer.d_conv, "ssm.inner_size": 2 * lm.d_model, "ssm.state_size": layer.d_state,
        "ssm.time_step_rank": steps, "attention.layer_norm_rms_epsilon": pytest.approx(lm.norm_eps),
    }.items():  # fmt: skip
        assert fields[f"{kind}.{key}"] == value, key
    assert set(types.values()) == {"F32"}
    assert sum(tensor.numel() for tensor in tensors.values()) == sum(p.numel() for p in own.parameters())
    assert chosen.output.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert torch.equal(tensors["token_embd.weight"], own.embedding.weight)
    assert ("output.weight" in tensors) is not lm.tie_word_embeddings
    mixer = own.layers[1].mixer
    assert torch.equal(tensors["blk.1.ssm_in.weight"], mixer.in_proj.weight)
    assert torch.equal(tensors["blk.1.ssm_conv1d.weight"], mixer.conv1d.weight[:, 0])
    assert torch.equal(tensors["blk.1.ssm_a"].flatten(), -mixer.A_log.exp().flatten())


@pytest.mark.parametrize("form", TYPES)
def test_matrices_are_of_the_type_asked_for(tmp_path, form):
    pytest.importorskip("gguf")
    path = built(tmp_path / "model", MODELS["mamba"])
    chosen = plan(path, format="gguf", dtype=form)
    chosen.write(tmp_path / "lm.gguf")
    _, tensors, types = read_file(tmp_path / "lm.gguf")
    wide = {"ssm_x.weight", "ssm_dt.weight", "ssm_conv1d.weight", "attn_norm.weight", "ssm_a", "ssm_d"}
    for name, kind in types.items():
        is_matrix = name == "token_embd.weight" or name.endswith(("ssm_in.weight", "ssm_out.weight"))
        assert kind == (TYPES[form] if is_matrix else "F32"), name
    assert {f"blk.0.{name}" for name in wide} < types.keys()
    assert chosen.output.nbytes < (tmp_path / "lm.gguf").stat().st_size < chosen.output.nbytes + 20_000
    exact = cobra.load(path, dtype="float32").lm.embedding.weight
    least = {"float32": 0, "bfloat16": 0.004, "q8_0": 0.01, "q4_0": 0.2}  # half a step of each, and a little more
    assert rms_ratio(tensors["token_embd.weight"], exact) <= least[form]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_llama_cpp_answers_alike(name, tmp_path):
    pytest.importorskip("gguf")
    path = built(tmp_path / "model", MODELS[name])
    theirs = load_native(export(path, tmp_path / "lm.gguf", format="gguf"))
    ours = cobra.load(path, dtype="float32")
    ids = tokens(1, 37)
    assert_close(name, theirs.logits(ids)[None], ours.lm(ids)[0])
    ids, found = tokens(1, 11, seed=3), []
    logits, state = theirs.read(ids)
    for _ in range(20):
        found.append(int(logits.argmax(-1)))
        logits, state = theirs.step(torch.tensor(found[-1:]), state)
    theirs.close()
    assert found == ours.generate(ids, max_new_tokens=20, stop_ids=[])[0].tolist()


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_tokenizer_stands_in_the_file(kind, tmp_path):
    pytest.importorskip("gguf")
    ours = TOKENIZERS[kind](tmp_path)
    path = built(tmp_path / "model", MODELS["mamba"], ours)
    fields, _, _ = read_file(export(path, tmp_path / "lm.gguf", format="gguf"))
    told, rows = fields["tokenizer.ggml.tokens"], TINY.lm.vocab_size
    assert (fields["tokenizer.ggml.model"], len(told), len(set(told))) == ("gpt2", rows, rows)
    assert fields["tokenizer.ggml.pre"] == ("gpt-2" if kind == "bytes" else kind)
    assert [told[ours.id_of(name)] for name in SPECIALS] == list(SPECIALS)
    kinds = fields["tokenizer.ggml.token_type"]
    assert all(kinds[ours.id_of(name)] == 3 for name in SPECIALS) and set(kinds[ours.vocab_size :]) == {5}
    assert fields["tokenizer.ggml.eos_token_id"] == ours.end_id and not fields["tokenizer.ggml.add_bos_token"]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_llama_cpp_cuts_texts_alike(kind, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp", reason="llama.cpp is not installed")
    ours = TOKENIZERS[kind](tmp_path)
    path = built(tmp_path / "model", MODELS["mamba"], ours)
    export(path, tmp_path / "lm.gguf", format="gguf")
    theirs = llama_cpp.Llama(str(tmp_path / "lm.gguf"), vocab_only=True, verbose=False)
    for text in WORDS:
        ids = ours.encode(text, allow_special=True)
        assert theirs.tokenize(text.encode(), add_bos=False, special=True) == ids
        assert theirs.detokenize(ids, special=True).decode() == text
    assert theirs.token_eos() == ours.end_id


def test_a_tokenizer_that_llama_cpp_cannot_follow_is_left_out_and_that_is_said(tmp_path, capsys):
    pytest.importorskip("gguf")
    path = built(tmp_path / "model", MODELS["mamba"], Tokenizer.train(TEXTS, 300))
    status, out, error = run(capsys, path, tmp_path / "lm.gguf", "--format", "gguf")
    assert (status, error) == (0, "")
    assert "tokenizer   none in the file, as llama.cpp cuts words otherwise" in out
    fields, _, _ = read_file(tmp_path / "lm.gguf")
    assert fields["tokenizer.ggml.model"] == "no_vocab" and "tokenizer.ggml.tokens" not in fields


REFUSED = {
    "a transformer": (cobra.PRESETS["transformer-tiny"].lm, (), "as gguf mamba1 or mamba2 alone are written"),
    "another width": (replace(TINY.lm, layers=(Mamba1Config(d_inner=384),)), (), r"d_inner is 384; llama\.cpp reads"),
    "another epsilon": (
        replace(TINY.lm, layers=(Mamba1Config(inner_norms="plain", norm_eps=1e-3),)), (), "norm_eps is 0.001"
    ),
    "columns": (
        replace(TINY.lm, d_model=72, layers=(Mamba1Config(),)),
        ("--dtype", "q8_0"),
        r"embedding\.weight has 72 columns, and q8_0 needs a multiple of 32",
    ),
    "a dtype": (TINY.lm, ("--dtype", "stored"), "allowed are float32, bfloat16, q8_0, q4_0"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_does_not_read_is_named(capsys, tmp_path, name):
    pytest.importorskip("gguf")
    lm, options, message = REFUSED[name]
    model = cobra.build(TINY)
    model.lm, model.config = cobra.lm.LanguageModel(lm), replace(TINY, lm=lm)
    cobra.save(model, tmp_path / "model")
    status, out, error = run(capsys, tmp_path / "model", tmp_path / "lm.gguf", "--format", "gguf", *options)
    assert (status, out) == (2, "") and error.count("\n") == 1
    assert re.search(message, error), error
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_files_are_written_whole_or_not_at_all(capsys, tmp_path):
    pytest.importorskip("gguf")
    path = built(tmp_path / "model", MODELS["mamba"])
    file = tmp_path / "new" / "lm.gguf"

    def stop(nbytes: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(path, format="gguf").output.write(file, stop)
    assert list(tmp_path.iterdir()) == [path]
    status, out, _ = run(capsys, path, file, "--format", "gguf", "--dry-run")
    assert status == 0 and "nothing" in out and list(tmp_path.iterdir()) == [path]
    export(path, file, format="gguf")
    first = file.read_bytes()
    status, out, error = run(capsys, path, file, "--format", "gguf")
    assert (status, out) == (2, "") and "exists already" in error and error.count("\n") == 1
    assert file.read_bytes() == first and list(file.parent.iterdir()) == [file]
    (tmp_path / "empty").mkdir()
    status, _, error = run(capsys, path, tmp_path / "empty", "--format", "gguf")
    assert status == 2 and "exists already; give a new file" in error and (tmp_path / "empty").is_dir()


def test_a_missing_package_is_named(capsys, tmp_path, monkeypatch):
    path = built(tmp_path / "model", MODELS["mamba"])
    monkeypatch.setitem(sys.modules, "gguf", None)
    status, out, error = run(capsys, path, tmp_path / "lm.gguf", "--format", "gguf")
    assert (status, out) == (2, "")
    assert error == "error: the format gguf needs a package: pip install 'cobra-vlm[gguf]'\n"
    assert list(tmp_path.iterdir()) == [path]
