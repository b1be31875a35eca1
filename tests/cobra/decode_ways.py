"""Models to decode with, and both ways to do it: in one compiled call, and layer by layer."""

import contextlib
import copy
import functools
import os

import pytest
import torch
from torch import Tensor

from cobra.lm import LanguageModel, LMConfig, State
from cobra.lm.attention import AttentionConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mlp import MLPConfig
from tests.cobra.lm_ways import STACKS, build
from tests.cobra.test_oracles import randomise
from tests.tolerance import RATIO, assert_close

ODD_MAMBA2 = Mamba2Config(d_state=7, headdim=5, expand=1)
GROUPED = Mamba2Config(d_state=9, headdim=3, expand=4, ngroups=2, norm_before_gate=True, dt_limit=(0.1, 0.4))
ODD_MAMBA1 = Mamba1Config(d_state=17, expand=3, dt_rank=3)
ODD_HEADS = AttentionConfig(num_heads=3, num_kv_heads=1, headdim=10)
ODD_WINDOW = AttentionConfig(num_heads=5, num_kv_heads=5, headdim=3, rope_theta=None, window=3)
# Sizes behind no power of two: (d_model, vocabulary, layers, tied).
ODD = {
    "odd mamba2": (15, 31, (ODD_MAMBA2,) * 2, True),
    "odd mamba2 untied": (35, 6, (Mamba2Config(d_state=33, headdim=7, expand=1),) * 2, False),
    "odd groups": (9, 17, (GROUPED,) * 2, True),
    "odd mamba1": (13, 41, (ODD_MAMBA1,) * 2, True),
    "rank one": (7, 1, (Mamba1Config(d_state=1, expand=1),) * 2, False),
    "odd attention": (19, 23, (ODD_HEADS, MLPConfig(d_ff=21), ODD_WINDOW, MLPConfig(d_ff=1)), False),
    "wide mlp": (71, 37, (MLPConfig(d_ff=139),) * 2, True),
    "wide": (69, 50, (Mamba2Config(d_state=40, headdim=23, ngroups=3), Mamba1Config()), False),
}  # fmt: skip
for taps in (1, 2, 3, 4, 5):
    both = (Mamba2Config(d_state=4, headdim=6, d_conv=taps), Mamba1Config(d_conv=taps))
    ODD[f"d_conv {taps}"] = (12, 13, both, True)
    ODD[f"mamba2, d_conv {taps}"] = (24, 13, both[:1], True)
# The other way of giving out work of the CUDA kernels: sizes that are multiples of 8, and of many steps.
ODD["even mamba2"] = (136, 40, (Mamba2Config(d_state=12, headdim=8, ngroups=2),) * 2, True)
ODD["even, norm first"] = (48, 24, (Mamba2Config(d_state=128, headdim=96, norm_before_gate=True),), False)
EMULATED = bool(os.environ.get("VISION_SCAN_EMULATE"))  # the CUDA kernels, on the CPU


# What the compiled steps know of each kind: settings that have to be what they usually are.
USUAL = {
    "attention": {"qkv_bias": False, "o_bias": False, "rope_scaling": None, "rotary_dim": None, "qk_norm": False,
                  "gated": False},
    "mamba1": {"inner_norms": "none", "d_xb": None, "bias": False, "conv_bias": True},
    "mamba2": {"d_ssm": None, "d_xb": None, "rmsnorm": True, "bias": False, "conv_bias": True,
               "conv_activation": "silu", "z_bias": False, "D_has_hdim": False, "discrete": False},
    "mlp": {"gated": True, "activation": "silu", "bias": False},
}  # fmt: skip


def is_served(layer) -> bool:
    """Whether there are compiled steps for a layer; emulated CUDA kernels know Mamba-2 alone."""
    kinds = {"mamba2"} if EMULATED else USUAL
    return layer.kind in kinds and all(getattr(layer, name) == value for name, value in USUAL[layer.kind].items())


def served(names) -> list[str]:
    layers = {**STACKS, **{name: sizes[2] for name, sizes in ODD.items()}}
    return [name for name in names if all(map(is_served, layers[name]))]


NAMES = served([*STACKS, *ODD])
MIXED = served(["hybrid", "mamba2 ngroups 2"])[0]
BATCHES = [1, 2, 3, 5, 8, 13]


@functools.cache
def model_of(name: str, dtype=torch.float32) -> LanguageModel:
    """A model to be left as it is; `fresh` is one to change."""
    if dtype is not torch.float32:
        return copy.deepcopy(model_of(name)).to(dtype)
    if name in STACKS:
        return build(name)
    d_model, vocab, layers, is_tied = ODD[name]
    config = LMConfig(d_model=d_model, vocab_size=vocab, layers=layers, tie_word_embeddings=is_tied)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(3)
        model = randomise(LanguageModel(config))
    for parameter_name, parameter in model.named_parameters():
        if "proj.weight" in parameter_name:
            parameter.mul_(0.6)  # or float32 has too few digits for a comparison
    return model


def fresh(name: str, dtype=torch.float32) -> LanguageModel:
    return copy.deepcopy(model_of(name, dtype))


def has_attention(model: LanguageModel) -> bool:
    return any(layer.kind == "attention" for layer in model.config.layers)


def random_ids(model: LanguageModel, *shape: int, seed: int = 0) -> Tensor:
    return torch.randint(model.config.vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@contextlib.contextmanager
def layer_by_layer():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("cobra.lm.stack.decoder_for", lambda *call: None)
        yield


Run = tuple[list[Tensor], State]


@torch.no_grad()
def decode(model, chunks, state=None, **options) -> Run:
    state = model.allocate_state(len(chunks[0])) if state is None else state
    parts = []
    for chunk in chunks:
        logits, state = model(chunk, state=state, overwrite_state=True, **options)
        parts.append(logits)
    return parts, state


def plain_decode(model, chunks, state=None, **options) -> Run:
    with layer_by_layer():
        return decode(model, chunks, state, **options)


def tensors_of(state: State) -> dict[str, Tensor]:
    return {f"{i} {name}": t for i, layer in enumerate(state.layers) for name, t in layer.items()}


def assert_same_state(state: State, expected: State, ratio=RATIO[torch.float32]) -> None:
    assert state.lengths.tolist() == expected.lengths.tolist()
    wanted = tensors_of(expected)
    assert tensors_of(state).keys() == wanted.keys()
    for name, tensor in tensors_of(state).items():
        assert tensor.dtype == wanted[name].dtype
        if tensor.is_floating_point():
            assert_close(name, tensor, wanted[name], ratio)
        else:
            assert torch.equal(tensor, wanted[name]), name


def assert_same_bits(state: State, kept: State) -> None:
    for name, tensor in tensors_of(state).items():
        assert torch.equal(tensor, tensors_of(kept)[name]), name
