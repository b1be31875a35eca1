"""Gated DeltaNet: as transformers computes it in Qwen3-Next and Qwen3.5, and what is particular to the layer. That all
ways of reading agree is in test_lm_laws.py, what the recurrence computes in tests/vision_scan."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from cobra.cost import LMCost
from cobra.lm import LanguageModel, LMConfig
from cobra.lm.gated_deltanet import GatedDeltaNet, GatedDeltaNetConfig
from cobra.lm.mixer import Segments
from cobra.lm.sequence_parallel import check_shardable
from tests.cobra.test_oracles import randomise
from tests.tolerance import assert_as_good_as, assert_close
from vision_scan.errors import UserError

D_MODEL = 24
SIZES = {
    "grouped": GatedDeltaNetConfig(num_k_heads=2, num_v_heads=6, head_k_dim=8, head_v_dim=5, chunk_size=16),
    "as many keys as values": GatedDeltaNetConfig(num_k_heads=3, num_v_heads=3, head_k_dim=4, head_v_dim=8, d_conv=3),
    "one key head": GatedDeltaNetConfig(num_k_heads=1, num_v_heads=4, head_k_dim=16, head_v_dim=16, norm_eps=1e-3),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sizes here are too small for more."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def their_settings(config: GatedDeltaNetConfig) -> dict:
    return {
        "hidden_size": D_MODEL, "num_hidden_layers": 1, "layer_types": ["linear_attention"], "vocab_size": 32,
        "linear_num_key_heads": config.num_k_heads, "linear_num_value_heads": config.num_v_heads,
        "linear_key_head_dim": config.head_k_dim, "linear_value_head_dim": config.head_v_dim,
        "linear_conv_kernel_dim": config.d_conv, "rms_norm_eps": config.norm_eps,
    }  # fmt: skip


def qwen3_next(config: GatedDeltaNetConfig):
    from transformers import Qwen3NextConfig
    from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

    settings = Qwen3NextConfig(**their_settings(config))
    theirs = randomise(Qwen3NextGatedDeltaNet(settings, 0))
    per_key = config.num_v_heads // config.num_k_heads
    keys, values = config.head_k_dim, per_key * config.head_v_dim
    dealt = theirs.in_proj_qkvz.weight.unflatten(0, (config.num_k_heads, -1)).split([keys, keys, values, values], 1)
    dealt += theirs.in_proj_ba.weight.unflatten(0, (config.num_k_heads, -1)).split([per_key, per_key], 1)
    return settings, theirs, torch.cat([part.flatten(0, 1) for part in dealt])


def qwen3_5(config: GatedDeltaNetConfig):
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet

    settings = Qwen3_5TextConfig(**their_settings(config))
    theirs = randomise(Qwen3_5GatedDeltaNet(settings, 0))
    parts = theirs.in_proj_qkv, theirs.in_proj_z, theirs.in_proj_b, theirs.in_proj_a
    return settings, theirs, torch.cat([part.weight for part in parts])


@pytest.fixture(
    scope="module",
    params=[(who, name) for who in (qwen3_next, qwen3_5) for name in SIZES],
    ids=lambda param: f"{param[0].__name__} {param[1]}",
)
def pair(request) -> tuple:
    """(their configuration, their layer with random weights, ours with the same)."""
    make, name = request.param
    config = SIZES[name]
    settings, theirs, in_proj = make(config)
    ours = GatedDeltaNet(config, D_MODEL)
    same = {key: value for key, value in theirs.state_dict().items() if not key.startswith("in_proj")}
    ours.load_state_dict({**same, "in_proj.weight": in_proj}, strict=True)
    return settings, theirs, ours.requires_grad_(False)


def inputs(seqlen: int) -> Tensor:
    return torch.randn(3, seqlen, D_MODEL, generator=torch.Generator().manual_seed(5))


def beginning(batch: int = 3, overwrite: bool = False) -> Segments:
    return Segments(torch.zeros(batch, dtype=torch.int64), overwrite=overwrite)


@pytest.mark.parametrize("seqlen", [1, 7, 64, 150])
def test_computes_what_transformers_computes(pair, seqlen):
    _, theirs, ours = pair
    x = inputs(seqlen)
    assert_close("y", ours(x, None, beginning())[0], theirs(x), 1e-5)


def test_decodes_what_transformers_decodes(pair):
    """A prompt, then token by token on our state, overwritten or not, and on their cache; the states agree too."""
    from transformers import DynamicCache

    settings, theirs, ours = pair
    x, cache = inputs(40), DynamicCache(config=settings)
    expected = [theirs(x[:, :21], cache_params=cache)]
    expected += [theirs(x[:, t : t + 1], cache_params=cache) for t in range(21, 40)]
    for overwrite in (False, True):
        segments = beginning(overwrite=overwrite)
        y, state = ours(x[:, :21], None, segments)
        found = [y]
        for t in range(21, 40):
            y, state = ours(x[:, t : t + 1], state, segments)
            found.append(y)
        assert_close("y", torch.cat(found, 1), torch.cat(expected, 1), 1e-5)
        assert_close("ssm", state["ssm"], cache.layers[0].recurrent_states[0].mT, 1e-5)


def test_an_update_is_in_place_and_a_scan_is_not():
    layer = GatedDeltaNet(SIZES["grouped"], D_MODEL).requires_grad_(False)
    kept = layer.allocate(3, 0, "cpu", torch.float32)
    pointers = {name: tensor.data_ptr() for name, tensor in kept.items()}
    for seqlen, overwrite in ((16, True), (16, False), (17, True)):
        _, state = layer(inputs(seqlen), kept, beginning(overwrite=overwrite))
        moved = {name for name, tensor in state.items() if tensor.data_ptr() != pointers[name]}
        assert moved == (set() if (seqlen, overwrite) == (16, True) else {"conv", "ssm"})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_decays_and_states_in_float32(pair, dtype):
    """And is as good as the other implementation in the same dtype, against float64."""
    _, theirs, ours = pair
    half, their_half = (copy.deepcopy(layer).to(dtype) for layer in (ours, theirs))
    kept = {name for name, parameter in half.named_parameters() if parameter.dtype == torch.float32}
    assert kept == {"A_log", "dt_bias", "norm.weight"}
    x = inputs(70).to(dtype)
    y, state = half(x, None, beginning())
    assert (y.dtype, state["conv"].dtype, state["ssm"].dtype) == (dtype, dtype, torch.float32)
    exact = copy.deepcopy(half).double()(x.double(), None, beginning())[0]
    assert_as_good_as("y", y, their_half(x), exact)


def test_starts_with_equal_queries_and_keys_and_steps_within_the_bounds():
    torch.manual_seed(0)
    config = replace(SIZES["grouped"], dt_min=0.01, dt_max=0.02, A_init_range=(2.0, 3.0))
    layer = GatedDeltaNet(config, D_MODEL)
    q, k = layer.in_proj.weight[: 2 * config.key_dim].chunk(2)
    assert torch.equal(q, k) and layer.conv1d.bias is None
    dt = nn.functional.softplus(layer.dt_bias)
    assert ((dt > 0.0099) & (dt < 0.0201)).all() and dt.unique().numel() == 6
    assert ((layer.A_log.exp() >= 2.0) & (layer.A_log.exp() <= 3.0001)).all()


def test_step_sizes_are_those_of_the_decay():
    """A state that nothing is written to fades by exp(-A dt)."""
    layer = GatedDeltaNet(SIZES["grouped"], D_MODEL).double().requires_grad_(False)
    rows = list(layer.config.in_sizes)
    layer.in_proj.weight.split(rows)[2].fill_(-1e3)  # b, so that with x above 0 beta is 0
    x, start = inputs(9).double().abs(), layer.allocate(3, 0, "cpu", torch.float64)
    start["ssm"].normal_(generator=torch.Generator().manual_seed(1))
    dt = layer.step_sizes(layer.in_proj(x))
    _, state = layer(x, start, beginning())
    fading = torch.exp(-(dt.sum(1) * layer.A_log.exp()))[..., None, None]
    assert_close("ssm", state["ssm"], start["ssm"] * fading, 1e-10)


def test_sizes_of_the_released_layers():
    """Of Qwen3-Next-80B-A3B: 36 such layers of d_model 2048, with a state of 2 MiB each."""
    layer = GatedDeltaNetConfig(num_k_heads=16, num_v_heads=32)
    lm = LMConfig(d_model=2048, vocab_size=8, layers=(layer,))
    with torch.device("meta"):
        mixer = LanguageModel(lm).layers[0].mixer
        kept = mixer.allocate(1, 0, "meta", torch.bfloat16)
    assert mixer.in_proj.weight.shape == (2 * 2048 + 2 * 4096 + 2 * 32, 2048)
    assert kept["ssm"].nbytes == 2 * 2**20 and kept["conv"].shape == (1, 8192, 3)
    assert LMCost(lm).state_bytes(10**6, 2) == 2 * 2**20 + 8192 * 3 * 2


@torch.no_grad()
def test_a_state_kept_in_8_bits_reads_on_nearly_the_same():
    torch.manual_seed(0)
    lm = LanguageModel(LMConfig(d_model=D_MODEL, vocab_size=32, layers=(SIZES["one key head"],) * 2))
    ids = torch.randint(32, (2, 30), generator=torch.Generator().manual_seed(2))
    expected, _ = lm(ids)
    _, state = lm(ids[:, :20])
    small = state.quantize()
    assert small.layers[0]["ssm"].dtype == torch.int8 and small.layers[0]["ssm_scale"].shape == (2, 4, 16)
    assert small.nbytes < 0.6 * state.nbytes
    found, _ = lm(ids[:, 20:], state=small.dequantize())
    assert_close("logits", found, expected[:, 20:], 0.02)


def test_a_shard_of_a_row_is_refused():
    with pytest.raises(UserError, match=r"layer 0 \(gated_deltanet\) needs whole rows"):
        check_shardable([GatedDeltaNet(SIZES["grouped"], D_MODEL)])


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("num_v_heads 5 must be a multiple of num_k_heads 2", {"num_v_heads": 5}),
        ("head_k_dim 0 must be 1 or more", {"head_k_dim": 0}),
        ("A_init_range", {"A_init_range": (0.0, 1.0)}),
        ("A_init_range", {"A_init_range": (2.0, 1.0)}),
        ("dt_min", {"dt_min": 0.2}),
    ],
)
def test_settings_that_do_not_fit_are_refused(message, changes):
    with pytest.raises(UserError, match=message):
        replace(SIZES["grouped"], **changes)
