"""Exported language models: transformers reads them and computes what we do, and published ones come back as they
were. Nothing is downloaded."""

import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import cobra
from cobra.cli import main
from cobra.convert import LAYOUTS, convert
from cobra.export import plan
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from cobra.tokenizer import END, PAD, SPECIALS, Tokenizer
from tests.cobra.published import CASES, MERGES, TEXTS, as_published, llama
from tests.cobra.test_convert import anonymous_bytes
from tests.cobra.test_oracles import randomise, their_greedy, tokens
from tests.tolerance import assert_close
from vision_scan.errors import UserError

TINY = cobra.PRESETS["tiny"]
# State-spaces' checkpoints have other files, and the tensors of transformers'.
WRITTEN = {layout.name for layout in LAYOUTS if layout.write_config} | {"state-spaces Mamba"}
ROUND_TRIPS = [case for case, (*_, layout) in CASES.items() if layout in WRITTEN]


def export(path: Path, destination: Path, **options) -> Path:
    plan(path, **options).write(destination)
    return destination


def built(path: Path, lm, tokenizer: Tokenizer | None = None, **changes) -> Path:
    """A model directory with random weights, those of norms and biases too."""
    model = cobra.build(replace(TINY, lm=lm, **changes), seed=3, tokenizer=tokenizer)
    randomise(model.lm)
    cobra.save(model, path)
    return path


def read_by_transformers(path: Path, dtype=torch.float32):
    """The model as AutoModelForCausalLM reads it, which must neither lack a tensor nor find one too many."""
    transformers = pytest.importorskip("transformers")
    model, told = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    assert not any(told.values()), told
    return model.eval()


@torch.no_grad()
def check_same_answers(name: str, path: Path, exported: Path) -> list[int]:
    """Compares logits and the tokens of greedy decoding of a model directory and what it was exported to; returns the
    tokens."""
    ours, theirs = cobra.load(path, dtype="float32"), read_by_transformers(exported)
    ids = tokens(2, 37)
    assert_close(name, theirs(ids, use_cache=False).logits, ours.lm(ids)[0], 1e-4)
    ids = tokens(1, 11, seed=3)
    found = their_greedy(theirs, ids, torch.ones_like(ids), 20)
    assert found.tolist() == ours.generate(ids, max_new_tokens=20, stop_ids=[]).tolist()
    return found[0].tolist()


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_published_models_come_back_bit_for_bit(published, case, tmp_path):
    from transformers import AutoConfig

    theirs, _, converted = published(case)
    exported = export(converted, tmp_path / "out")
    expected = dict(theirs.state_dict())
    if theirs.config.tie_word_embeddings:
        del expected["lm_head.weight"]
    found = load_file(exported / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name
    before, after = theirs.config.to_dict(), AutoConfig.from_pretrained(exported).to_dict()
    # Ids of special tokens are those of the tokenizer that is written too. The others change nothing that is computed:
    # notes of who wrote the file, the length that was trained, and windows of a model that uses none.
    ids, notes = {"bos_token_id", "eos_token_id", "pad_token_id"}, {"architectures", "dtype", "transformers_version"}
    unused = set() if before.get("use_sliding_window") else {"sliding_window"}
    skipped = {*ids, *notes, *unused, "max_position_embeddings", "max_window_layers", "_name_or_path"}
    different = {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
    assert different <= skipped, {name: (before.get(name), after.get(name)) for name in different - skipped}
    assert after["eos_token_id"] == Tokenizer.from_file(converted / "tokenizer.json").end_id


@pytest.mark.parametrize("case", ROUND_TRIPS)
def test_transformers_answers_alike(published, case, tmp_path):
    _, _, converted = published(case)
    found = check_same_answers(case, converted, export(converted, tmp_path / "out"))
    assert len(set(found)) > 3  # not one token for ever


ATTENTION = AttentionConfig(num_heads=4, num_kv_heads=2, headdim=12, rope_theta=500.0)
WINDOWS = [replace(ATTENTION, qkv_bias=True, window=window) for window in (None, 7)]
OWN = {
    "tiny": TINY.lm,
    "transformer-tiny": cobra.PRESETS["transformer-tiny"].lm,
    "mamba": replace(TINY.lm, layers=(Mamba1Config(d_state=6, dt_rank=5, d_conv=3),) * 2, norm_eps=1e-3),
    "mamba, d_inner": replace(TINY.lm, layers=(Mamba1Config(d_inner=384),) * 2),
    "falcon-mamba": replace(TINY.lm, layers=(Mamba1Config(d_inner=96, inner_norms="plain", norm_eps=1e-3),) * 2),
    "untied": replace(TINY.lm, layers=TINY.lm.layers[:1], tie_word_embeddings=False),
    "windows": replace(TINY.lm, layers=(WINDOWS[0], MLPConfig(d_ff=20), WINDOWS[1], MLPConfig(d_ff=20))),
}


@pytest.mark.parametrize("name", OWN)
def test_models_of_our_own_are_read_by_transformers(name, tmp_path):
    path = built(tmp_path / "model", OWN[name])
    check_same_answers(name, path, export(path, tmp_path / "out"))


def test_a_grown_vocabulary_is_exported(tmp_path, tokenizer_file):
    pytest.importorskip("transformers")
    rows = 256 + MERGES
    as_published(llama(vocab_size=rows), tmp_path / "published")
    convert(tmp_path / "published", tmp_path / "model", tokenizer=tokenizer_file)
    exported = export(tmp_path / "model", tmp_path / "out")
    assert read_by_transformers(exported).config.vocab_size == rows + len(SPECIALS)
    check_same_answers("grown", tmp_path / "model", exported)


TOKENIZERS = {"bytes": Tokenizer.bytes, "trained": lambda: Tokenizer.train(TEXTS, 300)}


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("lm", ["tiny", "transformer-tiny"])
def test_the_tokenizer_is_read_by_transformers(tmp_path, kind, lm):
    transformers = pytest.importorskip("transformers")
    ours = TOKENIZERS[kind]()
    exported = export(built(tmp_path / "model", OWN[lm], ours), tmp_path / "out")
    theirs = transformers.AutoTokenizer.from_pretrained(exported)
    for text in ("How many lighthouses?", "  it's 1234 , isn't it ?\n\n", "Zoë 日本 \U0001f600", f"a{END}b"):
        ids = ours.encode(text, allow_special=True)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text
    assert (theirs.eos_token, theirs.eos_token_id) == (END, ours.end_id)
    assert (theirs.pad_token, theirs.pad_token_id) == (PAD, ours.pad_id)
    assert read_by_transformers(exported).generation_config.eos_token_id == ours.end_id


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "stored"])
def test_dtypes(tmp_path, dtype):
    path = built(tmp_path / "model", TINY.lm)
    half = cobra.load(path, dtype="bfloat16")
    cobra.save(half, path)
    chosen = plan(path, dtype=dtype)
    chosen.write(tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    narrow = torch.float32 if dtype == "float32" else torch.bfloat16
    for name, tensor in found.items():
        is_wide = "norm" in name or name.rpartition(".")[2] in ("A_log", "D", "dt_bias")
        assert tensor.dtype == (torch.float32 if is_wide else narrow), name
    assert torch.equal(found["backbone.embeddings.weight"].bfloat16(), half.lm.embedding.weight)
    assert chosen.output.nbytes == sum(tensor.nbytes for tensor in found.values())
    assert read_by_transformers(tmp_path / "out", "auto").dtype == narrow


def run(capsys, *arguments) -> tuple[int, str, str]:
    """(status, standard output, standard error) of `cobra export`."""
    capsys.readouterr()  # what transformers has printed before
    status = main(["export", *map(str, arguments)])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_the_command_says_what_it_does(capsys, tmp_path):
    path = built(tmp_path / "model", TINY.lm)
    before = sorted(tmp_path.iterdir())
    status, out, error = run(capsys, path, tmp_path / "out", "--dry-run")
    assert (status, error) == (0, "") and sorted(tmp_path.iterdir()) == before
    count = sum(p.numel() for p in cobra.load(path).lm.parameters())
    for said in ("transformers Mamba-2, as transformers", "4 mamba2; d_model 128, vocabulary 384", f"{count:,}",
                 "261 ids", f"{4 * count:,}", "nothing, as this is a dry run"):  # fmt: skip
        assert said in out, said
    (tmp_path / "out").mkdir()  # an empty one is taken
    status, out, error = run(capsys, path, tmp_path / "out", "--format", "transformers")
    assert (status, error) == (0, "")
    last = out.splitlines()[-1]
    assert str(tmp_path / "out") in last and "vision encoder and connector are not exported" in last
    names = {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
    assert {file.name for file in (tmp_path / "out").iterdir()} == names


def test_an_export_that_is_interrupted_leaves_no_trace(tmp_path, monkeypatch):
    path = built(tmp_path / "model", TINY.lm)
    before, writes = sorted(tmp_path.iterdir()), []

    def stop(nbytes: int) -> None:
        writes.append(nbytes)
        if len(writes) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        plan(path).output.write(tmp_path / "out", stop)
    assert len(writes) == 3 and sorted(tmp_path.iterdir()) == before


MLP = MLPConfig(d_ff=20)
REFUSED = {
    "a hybrid": (cobra.PRESETS["hybrid-tiny"].lm, r"lm\.layers are of the kinds mamba2, attention, mlp"),
    "half a block": (replace(TINY.lm, layers=(ATTENTION, MLP, ATTENTION)), "of the kinds attention, mlp"),
    "a window": (cobra.PRESETS["window-tiny"].lm, r"Llama cannot say lm\.layers\.0\.window = 48 \(only None\)"),
    "two windows": (
        replace(TINY.lm, layers=(WINDOWS[1], MLP, replace(WINDOWS[1], window=9), MLP)),
        r"Qwen2 cannot say lm\.layers\.2\.window = 9 \(only 7\)",
    ),
    "norms of heads": (replace(TINY.lm, layers=(replace(ATTENTION, qk_norm=True), MLP)), r"\.qk_norm = True"),
    "no positions": (replace(TINY.lm, layers=(replace(ATTENTION, rope_theta=None), MLP)), r"\.rope_theta = None"),
    "biases": (replace(TINY.lm, layers=(replace(ATTENTION, o_bias=True), MLP)), r"Llama cannot say .*\.o_bias = True"),
    "another activation": (replace(TINY.lm, layers=(ATTENTION, replace(MLP, activation="gelu"))), r"'gelu'"),
    "learned norms": (replace(TINY.lm, layers=(Mamba1Config(inner_norms="learned"),)), r"inner_norms = 'learned'"),
    "unlike layers": (
        replace(TINY.lm, layers=(Mamba1Config(), Mamba1Config(d_state=5))), r"lm\.layers\.1\.d_state = 5 \(only 16\)"
    ),
    "another epsilon": (replace(TINY.lm, norm_eps=1e-3), r"lm\.layers\.0\.norm_eps = 1e-05 \(only 0\.001\)"),
}  # fmt: skip
MAMBA2 = {
    "D_has_hdim": True, "norm_before_gate": True, "rmsnorm": False, "bias": True, "conv_bias": False,
    "conv_activation": None, "z_bias": True, "discrete": True, "d_ssm": 64, "d_inner": 192, "dt_limit": (0.1, 0.5),
}  # fmt: skip
for name, value in MAMBA2.items():
    layer = replace(Mamba2Config(d_state=8, headdim=32), **{name: value})
    REFUSED[name] = (replace(TINY.lm, layers=(layer,)), rf"Mamba-2 cannot say .*lm\.layers\.0\.{name} = ")


@pytest.mark.parametrize("form", ["transformers", "gguf"])
@pytest.mark.parametrize("name", REFUSED)
def test_what_no_layout_says_is_named(capsys, tmp_path, name, form):
    lm, message = REFUSED[name]
    path = built(tmp_path / "model", lm)
    before = sorted(tmp_path.iterdir())
    status, out, error = run(capsys, path, tmp_path / "out", "--format", form)
    assert (status, out, sorted(tmp_path.iterdir())) == (2, "", before)
    assert error.startswith(f"error: {path}: ") and error.count("\n") == 1
    with pytest.raises(UserError, match=message):
        plan(path, format=form)


def test_settings_that_are_spelt_out_or_of_the_start_are_no_reason_to_refuse(tmp_path):
    lm = TINY.lm
    layers = tuple(replace(layer, expand=7, d_inner=256, d_ssm=256, dt_min=0.5, dt_max=0.6) for layer in lm.layers)
    path = built(tmp_path / "model", replace(lm, layers=layers))
    check_same_answers("spelt out", path, export(path, tmp_path / "out"))


def test_bad_input_is_one_line(capsys, tmp_path):
    path = built(tmp_path / "model", TINY.lm)
    quantised = tmp_path / "int8"
    cobra.save(cobra.load(path, weights="int8"), quantised)
    changed = built(tmp_path / "hilbert", TINY.lm)
    config = json.loads((changed / "config.json").read_text())
    config.update(reading_order="hilbert")
    (changed / "config.json").write_text(json.dumps(config))
    damaged = built(tmp_path / "damaged", TINY.lm)
    tensors = load_file(damaged / "model.safetensors")
    del tensors["lm.norm_f.weight"]
    from safetensors.torch import save_file

    save_file(tensors, damaged / "model.safetensors")
    before = sorted(tmp_path.iterdir())
    for arguments, message in (
        ((quantised, tmp_path / "out"), "weights is 'int8'"),
        ((changed, tmp_path / "out"), "reading_order is 'hilbert'"),
        ((damaged, tmp_path / "out"), "missing lm.norm_f.weight"),
        ((tmp_path / "nowhere", tmp_path / "out"), "no such model directory"),
        ((path, damaged), "exists already and is not empty"),
        ((path, tmp_path / "out", "--format", "onnx"), "unknown format 'onnx'"),
        ((path, tmp_path / "out", "--dtype", "q8_0"), "allowed are stored, float32, bfloat16"),
    ):
        status, out, error = run(capsys, *arguments)
        assert (status, out) == (2, "") and message in error and error.count("\n") == 1, error
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux")
@pytest.mark.parametrize("form", ["transformers", "gguf"])
def test_no_more_than_a_tensor_is_in_memory(tmp_path, form):
    if form == "gguf":
        pytest.importorskip("gguf")
    lm = replace(TINY.lm, d_model=512, layers=(Mamba1Config(),) * 8)
    cobra.save(cobra.build(replace(TINY, lm=lm)), tmp_path / "model")
    gc.collect()
    before, seen = anonymous_bytes(), []
    chosen = plan(tmp_path / "model", format=form)
    chosen.output.write(tmp_path / "out", lambda nbytes: seen.append(anonymous_bytes()))
    assert max(seen) - before < chosen.output.nbytes / 3


def test_layouts_that_are_written_are_whole_tensors():
    """What the import scales or cuts could not be written back."""
    assert all(layout.adapt is None and layout.block for layout in LAYOUTS if layout.write_config)
