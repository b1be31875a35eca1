"""What `cobra convert` refuses: each with one line that names it, and nothing is written."""

import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cobra.cli import main
from tests.cobra.published import as_published, change_config, mamba1, spoil
from vision_scan.errors import UserError


def refused(capsys, path: Path, destination: Path, *options) -> str:
    """The one line with which a conversion ends that has written nothing."""
    before = sorted(destination.parent.iterdir())
    capsys.readouterr()  # what transformers has printed before
    status = main(["convert", *map(str, (path, destination, *options))])
    out, error = capsys.readouterr()
    assert (status, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert sorted(destination.parent.iterdir()) == before
    return error


def test_a_destination_with_something_in_it_is_left_alone(capsys, published, tmp_path):
    _, path, _ = published("llama")
    before = {file: file.read_bytes() for file in path.iterdir()}
    assert "exists already and is not empty" in refused(capsys, path, path)
    assert "exists already and is not empty" in refused(capsys, path, path / "config.json", "--dry-run")
    assert {file: file.read_bytes() for file in path.iterdir()} == before
    (tmp_path / "empty").mkdir()
    assert main(["convert", str(path), str(tmp_path / "empty")]) == 0
    assert {file.name for file in (tmp_path / "empty").iterdir()} == {
        "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip


EMBEDDING, WORDS = "model.embed_tokens.weight", "backbone.embeddings.weight"
DAMAGED_TENSORS = {
    "missing": (
        lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
        r"missing model\.layers\.1\.mlp\.up_proj\.weight",
    ),
    "unexpected": (
        lambda t: t.update({"model.layers.2.mlp.up_proj.weight": torch.ones(2)}),
        r"unexpected model\.layers\.2\.mlp\.up_proj\.weight",
    ),
    "misshapen": (
        lambda t: t.update({"model.norm.weight": torch.ones(31)}),
        r"misshapen model\.norm\.weight \(31,\) instead of \(64,\)",
    ),
    "resized": (
        lambda t: t.update({EMBEDDING: torch.ones(290, 64), "lm_head.weight": torch.ones(290, 64)}),
        r"misshapen model\.embed_tokens\.weight \(290, 64\) instead of \(288, 64\)",
    ),
    "untied": (
        lambda t: t.update({"lm_head.weight": t[EMBEDDING] + 1}),
        r"lm_head\.weight differs from model\.embed_tokens\.weight, but config\.json says that they are tied",
    ),
    "of integers": (
        lambda t: t.update({"model.norm.weight": torch.ones(64, dtype=torch.int8)}),
        r"model\.norm\.weight is torch\.int8, allowed are torch\.float32",
    ),
    "not tensors": (
        lambda t: t.update(epoch=3),
        "must hold a mapping from names to tensors and nothing else",
    ),
    "nested": (lambda t: [t.update(model=dict(t)), t.pop(EMBEDDING)], "must hold a mapping from names"),
}


@pytest.mark.parametrize("damage", DAMAGED_TENSORS)
def test_damaged_tensors_are_named(capsys, damaged, tmp_path, damage):
    change, message = DAMAGED_TENSORS[damage]
    path = damaged("llama 3.2")
    spoil(path, change)
    error = refused(capsys, path, tmp_path / "model")
    assert re.search(message, error) and "pytorch_model.bin" in error


class Harmful:
    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


DAMAGED_FILES = {  # a case, what is done to its directory, the message
    "no config": ("llama", lambda d: (d / "config.json").unlink(), r"config\.json is missing"),
    "config of nothing": ("llama", lambda d: (d / "config.json").write_text(""), r"config\.json: not JSON"),
    "config of a list": ("llama", lambda d: (d / "config.json").write_text("[]"), "not a mapping"),
    "no settings beside it": (
        "mamba in llama", lambda d: (d / "mamba_config.json").unlink(), r"mamba_config\.json: d_xb is missing"
    ),
    "settings beside it of nothing": (
        "mamba-2 in llama", lambda d: (d / "mamba_config.json").write_text(""), r"mamba_config\.json: not JSON"
    ),
    "no projection": (
        "mamba in llama",
        lambda d: spoil(d, lambda t: t.pop("model.layers.0.mamba.B_proj.weight")),
        r"missing model\.layers\.0\.mamba\.B_proj\.weight",
    ),
    "half of a projection": (
        "llamba",
        lambda d: spoil(d, lambda t: t.update({(n := "backbone.layers.1.mixer.in_proj.weight"): t[n][:100]})),
        r"misshapen backbone\.layers\.1\.mixer\.in_proj\.weight \(100, 64\) instead of \(232, 64\)",
    ),
    "no weights": ("mamba", lambda d: (d / "model.safetensors").unlink(), r"no weights; looked for .*\.bin"),
    "truncated": ("mamba", lambda d: truncate(d / "model.safetensors"), r"model\.safetensors: damaged"),
    "truncated pickle": ("llama 3.2", lambda d: truncate(d / "pytorch_model.bin"), r"\.bin: damaged"),
    "empty pickle": ("llama 3.2", lambda d: (d / "pytorch_model.bin").write_bytes(b""), r"\.bin: damaged"),
    "a tensor alone": (
        "llama 3.2", lambda d: torch.save(torch.ones(3), d / "pytorch_model.bin"), "must hold a mapping"
    ),
    "no shard": ("llama", lambda d: next(iter(d.glob("model-*"))).unlink(), r"index\.json: the file model-"),
    "truncated shard": (
        "llama", lambda d: truncate(sorted(d.glob("model-*"))[1]), r"model-00002-of-\d+\.safetensors: damaged"
    ),
    "a shard twice": (
        "qwen2, sliding window",
        lambda d: shutil.copy(d / "pytorch_model-00000.bin", d / "pytorch_model-00001.bin"),
        "stands in another file too",
    ),
    "index of nothing": (
        "llama", lambda d: (d / "model.safetensors.index.json").write_text("{}"), "has no weight_map"
    ),
    "index of another folder": (
        "llama",
        lambda d: (d / "model.safetensors.index.json").write_text(
            json.dumps({"weight_map": {"x": "../published/model-00001-of-00002.safetensors"}})
        ),
        "is missing",
    ),
    "index of a tensor that is not there": (
        "qwen2, sliding window",
        lambda d: torch.save({}, d / "pytorch_model-00003.bin"),
        r"is not in pytorch_model-00003\.bin, where it should be",
    ),
    "another model": ("llama", lambda d: change_config(d, model_type="gemma"), "of no known layout .*gemma"),
    "another's names": ("mamba", lambda d: change_config(d, model_type="llama"), r"like backbone"),
    "no tokenizer": ("mamba", lambda d: (d / "tokenizer.json").unlink(), "has no tokenizer.json; give"),
    "no tokenizer at all": (
        "mamba", lambda d: (d / "tokenizer.json").write_text("{}"), "not a Hugging Face tokenizer"
    ),
    "vocabulary too large": (
        "mamba",
        lambda d: [
            (tensors := load_file(d / "model.safetensors")).update({WORDS: tensors[WORDS].repeat(2, 1)}),
            save_file(tensors, d / "model.safetensors"),
            change_config(d, vocab_size=576),
        ],
        "has 276 ids for 576 embeddings",
    ),
    "vocabulary too small": (
        "llama 3.2",
        lambda d: [
            change_config(d, vocab_size=275),
            spoil(d, lambda t: [t.pop("lm_head.weight"), t.update({EMBEDDING: t[EMBEDDING][:275].clone()})]),
        ],
        "has 276 ids for 275 embeddings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGED_FILES)
def test_damaged_directories_are_named(capsys, damaged, tmp_path, damage):
    case, change, message = DAMAGED_FILES[damage]
    path = damaged(case)
    change(path)
    assert re.search(message, refused(capsys, path, tmp_path / "model"))


def test_a_preset_that_does_not_fit_is_named(capsys, tmp_path, tokenizer_file):
    as_published(mamba1(hidden_size=48), tmp_path / "published")
    options = ("--tokenizer", tokenizer_file)
    error = refused(capsys, tmp_path / "published", tmp_path / "model", *options)
    assert "preset tiny does not fit a language model with d_model 48: mamba2: expand" in error


def test_what_is_no_directory_is_named(capsys, published, tmp_path):
    _, path, _ = published("llama")
    assert "no such directory" in refused(capsys, tmp_path / "none", tmp_path / "model")
    assert "is a file" in refused(capsys, path / "config.json", tmp_path / "model")
    error = refused(capsys, path, tmp_path / "model", "--tokenizer", tmp_path / "none.json")
    assert "none.json: no such file" in error
    assert "did you mean 'tiny'" in refused(capsys, path, tmp_path / "model", "--preset", "tinny")


@pytest.mark.parametrize("is_archive", [True, False])
def test_pickles_are_not_executed(capsys, damaged, tmp_path, is_archive):
    path = damaged("llama 3.2")
    touched = path / "touched"
    if is_archive:
        spoil(path, lambda t: t.update(harm=Harmful(touched)))
    else:
        (path / "pytorch_model.bin").write_bytes(pickle.dumps({"harm": Harmful(touched)}))
    assert "would execute code" in refused(capsys, path, tmp_path / "model")
    assert not touched.exists()


REFUSED_OPTIONS = [  # case, changes in config.json, what the message names
    ("mamba", {"use_bias": True}, "use_bias is True"),
    ("mamba", {"use_conv_bias": False}, "use_conv_bias is False"),
    ("mamba", {"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
    ("mamba", {"intermediate_size": 65}, "intermediate_size is 65.*allowed is 128"),
    ("mamba", {"mixer_rms_eps": 1e-6}, "unknown options mixer_rms_eps = 1e-06; remove"),
    ("mamba", {"hidden_size": None}, "hidden_size is missing"),
    ("mamba", {"hidden_size": "64"}, "hidden_size is '64', must be a whole number"),
    ("mamba", {"hidden_size": 32.5}, "hidden_size is 32.5"),
    ("mamba", {"num_hidden_layers": True}, "num_hidden_layers is True"),
    ("mamba", {"tie_word_embeddings": 1}, "tie_word_embeddings is 1, must be true or false"),
    ("mamba-2", {"num_heads": 4}, "num_heads is 4"),
    ("mamba-2", {"rms_norm": False}, "rms_norm is False"),
    ("mamba-2", {"time_step_limit": ["a", 1]}, "time_step_limit is"),
    ("mamba-2", {"time_step_limit": [0.5, 0.1]}, "dt_limit"),
    ("mamba as state-spaces", {"ssm_cfg": {"layer": "Mamba3"}}, "unknown layer in .*ssm_cfg 'Mamba3'"),
    ("mamba as state-spaces", {"ssm_cfg": {"bias": True}}, "ssm_cfg: bias is True"),
    ("mamba as state-spaces", {"ssm_cfg": {"layer": "Mamba2", "d_ssm": 16}}, "d_ssm is 16.*is nothing"),
    ("mamba as state-spaces", {"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim"),
    ("mamba as state-spaces", {"ssm_cfg": {"chunk_size": 256}}, "unknown options chunk_size = 256"),
    ("mamba as state-spaces", {"ssm_cfg": [1]}, "ssm_cfg is .*must be a mapping"),
    ("mamba as state-spaces", {"attn_layer_idx": [9, 18]}, r"attn_layer_idx is \[9, 18\]"),
    ("mamba as state-spaces", {"d_intermediate": 64}, "d_intermediate is 64"),
    ("mamba as state-spaces", {"rms_norm": False}, "rms_norm is False"),
    ("llamba", {"norm_epsilon": 1e-6}, "norm_epsilon is 1e-06.*allowed is 1e-05"),
    ("llamba", {"lm_head_bias": True}, "lm_head_bias is True"),
    ("llamba", {"ssm_cfg": {"n_v_heads": 7}}, "ssm_cfg: n_v_heads 7 must divide"),
    ("llamba", {"ssm_cfg": {"n_v_heads": 8, "n_qk_heads": 3}}, "ngroups 3"),
    ("llamba", {"ssm_cfg": {"activation": "gelu"}}, "unknown activation in .*ssm_cfg 'gelu'"),
    ("llamba", {"ssm_cfg": {"d_inner": 64}}, "ssm_cfg: unknown options d_inner = 64"),
    ("llamba", {"mlp_cfg": {"act_fn": "relu"}}, "mlp_cfg: act_fn is 'relu'"),
    ("llamba", {"quantization_kwargs": {"bits": 4}}, "unknown options quantization_kwargs"),
    ("mamba in llama", {"mamba_config.json": None}, "mamba_config.json: d_xb is missing"),
    ("mamba in llama", {"mamba_config.json": {"d_xb": 24}}, "d_xb 24 must be a multiple of d_state 16"),
    ("mamba in llama", {"num_hidden_layers": 4}, "mamba_config.json: n_layer is 3.*allowed is 4"),
    ("mamba in llama", {"rms_norm_eps": 1e-6}, "mamba_config.json: rms_norm_eps is 0.001"),
    ("mamba in llama", {"attention_bias": True}, "attention_bias is True"),
    ("mamba-2 in llama", {"mamba_config.json": {"d_xb": 16, "ssm_cfg": {"repeat_kv_before_conv": True}}}, "repeat_kv"),
    ("llama", {"mamba_config.json": {"d_xb": 16}}, "unknown options mamba_config.json"),
    ("llama", {"attention_bias": True}, "attention_bias is True"),
    ("llama", {"mlp_bias": True}, "mlp_bias is True"),
    ("llama", {"hidden_act": "relu"}, "hidden_act is 'relu'"),
    ("llama", {"rope_interleaved": True}, "rope_interleaved is True"),
    ("llama", {"sliding_window": 12}, "unknown options sliding_window = 12"),
    ("llama", {"quantization_config": {"bits": 4}}, "unknown options quantization_config"),
    ("llama", {"num_key_value_heads": 3}, "num_heads 4 must be a multiple"),
    ("llama", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "unknown rope_type in .* 'yarn'"),
    ("llama", {"rope_parameters": {"rope_type": "llama3", "factor": 4.0}}, "low_freq_factor is missing"),
    ("llama", {"rope_parameters": {"rope_type": "default", "factor": 4.0}}, "unknown options factor"),
    ("llama", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5"),
    ("llama", {"rope_parameters": None, "rope_scaling": {"type": "linear"}}, "unknown rope_type .*'linear'"),
    ("llama", {"rope_scaling": {"type": "linear"}}, "rope_scaling: unknown options type"),
    ("zamba2", {"use_long_context": True}, "use_long_context is True"),
    ("zamba2", {"layers_block_type": ["mamba", "hybrid"]}, "layers_block_type has 2 entries for 4 layers"),
    ("zamba2", {"layers_block_type": ["mamba", "moe"] * 2}, "kind of layer 'moe'"),
    ("zamba2", {"hybrid_layer_ids": [1, 2]}, r"hybrid_layer_ids is \[1, 2\].*allowed is \[1, 2, 3\]"),
    ("zamba2", {"num_mem_blocks": 0}, "num_mem_blocks 0 must be 1 or more"),
    ("zamba2", {"n_mamba_heads": 7}, "n_mamba_heads 7 must divide mamba_expand . hidden_size, which is 128"),
    ("zamba2", {"num_attention_heads": 3}, "num_attention_heads 3 must divide 2 . hidden_size, which is 128"),
    ("zamba2", {"use_shared_attention_lora": True}, "unknown options use_shared_attention_lora = True"),
    ("zamba2", {"hidden_act": "tanh"}, "activation"),
    ("qwen2", {"layer_types": ["full_attention"]}, "layer_types has 1 entries for 2 layers"),
    ("qwen2", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types .*'sliding_attention'"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("granite", {"embedding_multiplier": 0}, "embedding_multiplier is 0.0, must be a number other than 0"),
        ("granite", {"logits_scaling": "8"}, "logits_scaling is '8'"),
        ("falcon-h1", {"ssm_multipliers": [1.0, 2.0]}, r"ssm_multipliers is \[1.0, 2.0\], must be 5 numbers"),
        ("falcon-h1", {"mlp_multipliers": [1.0, 0]}, "mlp_multipliers"),
    ],
)
def test_multipliers_that_are_none_are_named(capsys, damaged, tmp_path, case, changes, message):
    path = damaged(case)
    change_config(path, **changes)
    assert re.search(message, refused(capsys, path, tmp_path / "model"))


def test_a_shared_block_that_is_not_whole_is_named(capsys, damaged, tmp_path):
    path = damaged("zamba2")
    tensors = load_file(path / "model.safetensors")
    block = "model.layers.1.shared_transformer.feed_forward."
    del tensors[f"{block}gate_up_proj.weight"]
    tensors[f"{block}gate_up_proj_adapter_list.1.0.weight"] = torch.zeros(5, 64)  # of the other block's use
    save_file(tensors, path / "model.safetensors")
    error = refused(capsys, path, tmp_path / "model")
    assert "missing model.layers.1.shared_transformer.feed_forward.gate_up_proj.weight" in error
    assert "unexpected model.layers.1.shared_transformer.feed_forward.gate_up_proj_adapter_list.1.0.weight" in error


@pytest.mark.parametrize(("case", "changes", "message"), REFUSED_OPTIONS)
def test_options_that_are_not_supported_are_named(read_config, case, changes, message):
    read_config(case)
    with pytest.raises(UserError, match=message) as caught:
        read_config(case, **changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes", [{"attention_bias": True}, {"num_key_value_heads": 3}, {"use_flash": 1}], ids=str
)
def test_an_option_is_named_with_its_file(capsys, damaged, tmp_path, changes):
    path = damaged("llama")
    change_config(path, **changes)
    error = refused(capsys, path, tmp_path / "model")
    assert error.startswith(f"error: {path / 'config.json'}: ")


def test_options_that_say_nothing_are_passed_over(published, read_config):
    plain = read_config("llama")
    whole = json.loads(published("llama")[0].config.to_json_string(use_diff=False))
    assert read_config("llama", **whole) == plain
    assert read_config("llama", quantization_config=None, use_mrope=False, _name_or_path="x") == plain
