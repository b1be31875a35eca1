"""Models of transformers on our kernels compute what they compute on their own."""

import copy
import os
import subprocess
import sys

import pytest
import torch

import cobra
import vision_scan
from tests.cobra.test_oracles import VOCAB, mamba2_pair, randomise, tokens
from tests.tolerance import assert_as_good_as, assert_close
from vision_scan.errors import UserError


def mamba2(**options):
    return mamba2_pair({"n_groups": 2, "chunk_size": 4, **options})[0]


def mamba1(**options):
    from transformers import MambaConfig, MambaForCausalLM

    settings = {"hidden_size": 24, "num_hidden_layers": 2, "state_size": 5, "vocab_size": VOCAB, **options}
    return randomise(MambaForCausalLM(MambaConfig(**settings)))


def bamba():
    from transformers import BambaConfig, BambaForCausalLM

    settings = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "intermediate_size": 40, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 8,
        "mamba_n_groups": 2, "mamba_d_state": 6, "mamba_expand": 2, "mamba_chunk_size": 4,
        "vocab_size": VOCAB,
    }  # fmt: skip
    return randomise(BambaForCausalLM(BambaConfig(**settings)))


MODELS = {"mamba": mamba1, "mamba2": mamba2, "bamba": bamba, "relu": lambda: mamba1(hidden_act="relu")}


@pytest.fixture(params=MODELS)
def pair(request):
    theirs = MODELS[request.param]()
    return theirs, cobra.accelerate(copy.deepcopy(theirs))


@torch.no_grad()
def test_logits_are_the_same(pair):
    theirs, ours = pair
    ids = tokens(3, 19)
    assert_close("logits", ours(ids).logits, theirs(ids).logits)
    mask = torch.ones_like(ids)
    mask[1, :7] = mask[2, :18] = 0
    expected = theirs(ids, attention_mask=mask).logits[mask.bool()]
    assert_close("padded", ours(ids, attention_mask=mask).logits[mask.bool()], expected)


def test_generation_gives_the_same_tokens(pair):
    theirs, ours = pair
    options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    prompt = tokens(2, 9)
    assert torch.equal(ours.generate(prompt, **options), theirs.generate(prompt, **options))


def test_gradients_are_the_same(pair):
    ids = tokens(2, 11)
    gradients = []
    for model in pair:
        model.requires_grad_(True).train()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert_close(name, gradients[1][name], expected, 1e-4)  # through all layers and back


@torch.no_grad()
def test_bfloat16_is_as_good(pair):
    ids = tokens(2, 15)
    truth = pair[0](ids).logits.double()
    plain, found = (copy.deepcopy(model).bfloat16()(ids).logits for model in pair)
    assert_as_good_as("logits", found, plain, truth)


@pytest.mark.parametrize(("make", "scan"), [(mamba1, "selective_scan"), (mamba2, "ssd")])
@torch.no_grad()
def test_our_scans_run_in_the_model_given_and_in_no_other(make, scan, monkeypatch):
    theirs = make()
    ours, calls, run = cobra.accelerate(copy.deepcopy(theirs)), [], getattr(vision_scan, scan)
    monkeypatch.setattr(vision_scan, scan, lambda *args, **kwargs: calls.append(1) or run(*args, **kwargs))
    theirs(tokens(1, 5))
    assert not calls
    ours(tokens(1, 5))
    assert len(calls) == ours.config.num_hidden_layers


def test_a_model_without_scans_is_the_callers_mistake():
    with pytest.raises(UserError, match="Linear has no layer that scans"):
        cobra.accelerate(torch.nn.Linear(2, 2))


def test_a_missing_extra_is_told_in_a_line():
    code = (
        "import sys; sys.modules['transformers'] = None\nimport cobra\n"
        "try: cobra.accelerate\nexcept cobra.checkpoint.UserError as error: print(error)"
    )
    run = subprocess.run([sys.executable, "-c", code], env=dict(os.environ), capture_output=True, text=True, check=True)
    assert run.stdout == "cobra.hf needs transformers: pip install 'cobra-vlm[hf]'\n"
