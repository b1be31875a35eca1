"""Mamba-1: as transformers computes it, as its equations say, and the sizes of the released checkpoints."""

import copy

import pytest
import torch
from torch import Tensor, nn

from cobra.config import PRESETS
from cobra.cost import LMCost
from cobra.lm import LanguageModel, LMConfig
from cobra.lm.mamba1 import Mamba1, Mamba1Config
from tests.cobra.test_oracles import VOCAB, convert, randomise, tokens
from tests.tolerance import assert_as_good_as, assert_close
from train.optim import parameter_groups
from train.settings import OptimSettings
from vision_scan.errors import UserError

PUBLISHED = {
    "mamba-130m": 129_135_360,
    "mamba-370m": 371_516_416,
    "mamba-790m": 793_204_224,
    "mamba-1.4b": 1_372_178_432,
    "mamba-2.8b": 2_768_345_600,
}
D_MODEL, DEPTH = 18, 2
CONFIGS = {
    "plain": {},
    "tied": {"tie_word_embeddings": True},
    "odd sizes": {"state_size": 7, "time_step_rank": 5, "hidden_size": 13},
    "one state, rank one": {"state_size": 1, "time_step_rank": 1},
    "wide, long convolution": {"expand": 3, "conv_kernel": 5, "state_size": 17},
    "narrow, short convolution": {"expand": 1, "conv_kernel": 2, "time_step_rank": 3},
}
LENGTH = 29


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sizes here are too small for more, which on busy cores wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pair_of(options: dict) -> tuple[nn.Module, LanguageModel]:
    """transformers' model with random weights, and ours with the same."""
    from transformers import MambaConfig, MambaForCausalLM

    settings = {
        "hidden_size": D_MODEL, "state_size": 16, "expand": 2, "conv_kernel": 4, "num_hidden_layers": DEPTH,
        "time_step_rank": "auto", "vocab_size": VOCAB, "layer_norm_epsilon": 1e-3,
        "tie_word_embeddings": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **options,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(2)
        theirs = randomise(MambaForCausalLM(MambaConfig(**settings)))
        for block in theirs.backbone.layers:
            block.mixer.dt_proj.bias.sub_(2)  # small steps, so that many tokens are remembered
            block.mixer.in_proj.weight.mul_(0.7)  # or float32 has too few digits for a comparison
    rank = settings["time_step_rank"]
    layer = Mamba1Config(
        d_state=settings["state_size"],
        expand=settings["expand"],
        d_conv=settings["conv_kernel"],
        dt_rank=None if rank == "auto" else rank,
    )
    lm = LMConfig(
        d_model=settings["hidden_size"],
        vocab_size=VOCAB,
        layers=(layer,) * DEPTH,
        norm_eps=1e-3,
        tie_word_embeddings=settings["tie_word_embeddings"],
    )
    return theirs, convert(theirs, LanguageModel(lm), {"backbone.embeddings.": "embedding.", "backbone.": ""})


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    pytest.importorskip("transformers")
    return pair_of(CONFIGS[request.param])


def stepwise(model: LanguageModel, ids: Tensor, begun: int = 0) -> Tensor:
    """Logits of all tokens, read one by one behind the first `begun`."""
    state, parts = model.allocate_state(len(ids)), []
    if begun:
        logits, state = model(ids[:, :begun])
        parts.append(logits)
    for token in ids[:, begun:].split(1, dim=1):
        logits, state = model(token, state=state, overwrite_state=True)
        parts.append(logits)
    return torch.cat(parts, dim=1)


@torch.no_grad()
def test_logits_are_those_of_transformers(pair):
    theirs, ours = pair
    ids = tokens(3, LENGTH)
    expected = theirs(ids, use_cache=False).logits
    assert_close("a sequence", ours(ids)[0], expected)
    assert_close("token by token", stepwise(ours, ids), expected)
    assert_close("a prompt, then token by token", stepwise(ours, ids, begun=11), expected)


@torch.no_grad()
def test_steps_are_those_of_transformers(pair):
    """Their own cache is filled token by token too."""
    theirs, ours = pair
    ids, cache, parts = tokens(2, 9, seed=4), None, []
    for token in ids.split(1, dim=1):
        step = theirs(token, cache_params=cache, use_cache=True)
        cache = step.cache_params
        parts.append(step.logits)
    assert_close("token by token", stepwise(ours, ids), torch.cat(parts, dim=1))


@torch.no_grad()
def test_every_tensor_counts(pair):
    """The comparison of logits would notice any wrong tensor: each of them moves the logits."""
    _, ours = pair
    ids = tokens(1, LENGTH)
    before = ours(ids)[0]
    for name, parameter in ours.named_parameters():
        kept = parameter.clone()
        parameter.mul_(1.05)
        moved = ((ours(ids)[0] - before).norm() / before.norm()).item()
        parameter.copy_(kept)
        assert moved > 1e-4, (name, moved)


def slow_mixer(mixer: Mamba1, x: Tensor) -> Tensor:
    """Section 3.4 of the paper, token by token, channel by channel; x (batch, seqlen, d_model)."""
    config, rank = mixer.config, mixer.dt_rank
    u, z = (x @ mixer.in_proj.weight.T).chunk(2, dim=-1)
    padded = nn.functional.pad(u, (0, 0, config.d_conv - 1, 0))
    taps = [padded[:, k : k + u.shape[1]] * mixer.conv1d.weight[:, 0, k] for k in range(config.d_conv)]
    u = nn.functional.silu(sum(taps) + mixer.conv1d.bias)
    low, B, C = (u @ mixer.x_proj.weight.T).split([rank, config.d_state, config.d_state], dim=-1)
    dt = nn.functional.softplus(low @ mixer.dt_proj.weight.T + mixer.dt_proj.bias)
    h, outputs = torch.zeros(len(x), mixer.d_inner, config.d_state, dtype=x.dtype), []
    for t in range(x.shape[1]):
        step = dt[:, t, :, None]
        h = torch.exp(-step * mixer.A_log.exp()) * h + step * B[:, t, None] * u[:, t, :, None]
        outputs.append((h * C[:, t, None]).sum(-1) + mixer.D * u[:, t])
    return (torch.stack(outputs, 1) * nn.functional.silu(z)) @ mixer.out_proj.weight.T


def slow_logits(model: LanguageModel, ids: Tensor) -> Tensor:
    def norm(module, x):
        return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight

    x = model.embedding.weight[ids]
    for block in model.layers:
        x = x + slow_mixer(block.mixer, norm(block.norm, x))
    return norm(model.norm_f, x) @ model.lm_head.weight.T


@torch.no_grad()
def test_logits_are_those_of_the_equations(pair):
    """In float64, where transformers' own norms and scans stay float32."""
    ours, ids = copy.deepcopy(pair[1]).double(), tokens(2, LENGTH)
    expected = slow_logits(ours, ids)
    assert_close("a sequence", ours(ids)[0], expected)
    assert_close("token by token", stepwise(ours, ids), expected)


@torch.no_grad()
def test_bfloat16_decoding_is_as_good_as_the_equations_in_it(pair):
    ours, ids = copy.deepcopy(pair[1]).bfloat16(), tokens(2, LENGTH)
    truth = slow_logits(copy.deepcopy(ours).double(), ids)
    plain = ours(ids)[0].bfloat16()
    assert_as_good_as("token by token", stepwise(ours, ids).bfloat16(), plain, truth)


@pytest.mark.parametrize(("preset", "parameters"), PUBLISHED.items())
def test_presets_have_the_published_parameter_counts(preset, parameters):
    lm = PRESETS[preset].lm
    assert LMCost(lm).parameters == parameters
    with torch.device("meta"):
        model = LanguageModel(lm)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"d_state": 5, "dt_rank": 3}, {"expand": 3, "d_conv": 1}, {"expand": 1, "d_conv": 5, "d_state": 1}],
)
def test_cost_counts_the_parameters_and_the_state(options, is_tied):
    layers = (Mamba1Config(**options), Mamba1Config())
    for d_model in (15, 16, 17):
        lm = LMConfig(d_model=d_model, vocab_size=VOCAB, layers=layers, tie_word_embeddings=is_tied)
        model = LanguageModel(lm)
        assert LMCost(lm).parameters == sum(p.numel() for p in model.parameters())
        assert model.layers[1].mixer.dt_rank == {15: 1, 16: 1, 17: 2}[d_model]
        for dtype in (torch.float32, torch.bfloat16):
            expected = 3 * LMCost(lm).state_bytes(context=10, activation_bytes=dtype.itemsize)
            assert model.to(dtype).allocate_state(3).nbytes == expected


FLOAT32 = {"A_log", "D", "dt_proj.bias"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_recurrence_stays_float32_in_half_precision(dtype):
    mixer = Mamba1(Mamba1Config(), D_MODEL)
    before = {name: parameter.detach().clone() for name, parameter in mixer.named_parameters()}
    mixer.to(dtype)
    for name, parameter in mixer.named_parameters():
        assert parameter.dtype == (torch.float32 if name in FLOAT32 else dtype), name
        assert name not in FLOAT32 or torch.equal(parameter, before[name])
    state = mixer.allocate(2, 0, "cpu", dtype)
    assert (state["conv"].dtype, state["ssm"].dtype) == (dtype, torch.float32)
    assert {parameter.dtype for parameter in mixer.double().parameters()} == {torch.float64}


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_the_recurrence_gets_no_weight_decay(kind):
    lm = LMConfig(d_model=D_MODEL, vocab_size=VOCAB, layers=(Mamba1Config(),))
    model = nn.ModuleDict({"lm": LanguageModel(lm)})
    groups = parameter_groups(model, OptimSettings(kind=kind, weight_decay=0.1))
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    for name, parameter in model["lm"].layers[0].mixer.named_parameters():
        group, is_spared = group_of[id(parameter)], name in FLOAT32 | {"conv1d.bias"}
        assert group["weight_decay"] == (0.0 if is_spared else 0.1), name
        assert not (is_spared and group["muon"]), name


def test_steps_at_the_start_are_those_of_the_configuration():
    mixer = Mamba1(Mamba1Config(dt_min=0.01, dt_max=0.02), 64)
    dt = nn.functional.softplus(mixer.dt_proj.bias)
    assert dt.min() >= 0.0099 and dt.max() <= 0.0201 and dt.std() > 0.001
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 17).expand(128, 16))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_state": 0}, "d_state"),
        ({"dt_rank": 0}, "dt_rank"),
        ({"d_conv": -1}, "d_conv"),
        ({"dt_min": 0.2, "dt_max": 0.1}, "dt_min"),
    ],
)
def test_impossible_sizes_are_the_callers_mistake(options, message):
    with pytest.raises(UserError, match=message):
        Mamba1Config(**options)
