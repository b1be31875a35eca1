"""What a layer weighs values with, `mix`, against its matrix written out."""

import pytest
import torch
from torch import Tensor

from cobra.lm.attention import AttentionConfig, rotate
from cobra.lm.gated_deltanet import GatedDeltaNetConfig
from cobra.lm.mamba2 import Mamba2Config
from cobra.lm.mixer import Segments
from cobra.lm.stack import LAYERS

D_MODEL, SEQLEN = 24, 13
CONFIGS = {
    "attention": AttentionConfig(num_heads=4, num_kv_heads=2, headdim=6),
    "attention, window": AttentionConfig(num_heads=4, num_kv_heads=1, headdim=6, window=4, qk_norm=True),
    "mamba2": Mamba2Config(d_state=5, headdim=6, d_inner=24, ngroups=2, chunk_size=4),
    "mamba2, forms": Mamba2Config(
        d_state=5, headdim=6, d_inner=36, d_ssm=24, ngroups=4, bias=True, rmsnorm=False, conv_activation=None
    ),
    "mamba2, discrete": Mamba2Config(
        d_state=5, headdim=6, d_inner=24, ngroups=4, discrete=True, z_bias=True, D_has_hdim=True, conv_activation=None
    ),
    "mamba2, shared": Mamba2Config(d_state=6, headdim=6, d_inner=24, ngroups=4, d_xb=12),
    "gated_deltanet": GatedDeltaNetConfig(
        num_k_heads=2, num_v_heads=4, head_k_dim=5, head_v_dim=6, chunk_size=4, A_init_range=(0.1, 1.0)
    ),
}


def build(name: str):
    torch.manual_seed(0)
    config = CONFIGS[name]
    mixer = LAYERS[config.kind](config, D_MODEL).double()
    for parameter in mixer.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)
    return mixer


def segments_of(seq_idx: Tensor | None, batch: int = 2) -> Segments:
    return Segments(torch.zeros(batch, dtype=torch.int64), seq_idx)


def matrix_of(mixer, x: Tensor) -> Tensor:
    """(batch, heads, seqlen, seqlen) by the layer's definition, token by token."""
    config = mixer.config
    batch, seqlen, _ = x.shape
    if config.kind == "attention":
        q, k = (proj(x).unflatten(-1, (-1, config.headdim)).transpose(1, 2) for proj in (mixer.q_proj, mixer.k_proj))
        places = torch.arange(seqlen).expand(batch, seqlen)
        q, k = (rotate(norm(t), places, config.rope_theta) for norm, t in ((mixer.q_norm, q), (mixer.k_norm, k)))
        k = k.repeat_interleave(config.num_heads // config.num_kv_heads, dim=1)
        scores = q @ k.transpose(-1, -2) / config.headdim**0.5
        gap = torch.arange(seqlen)[:, None] - torch.arange(seqlen)
        seen = (gap >= 0) & (gap < (config.window or seqlen))
        return scores.masked_fill(~seen, -torch.inf).softmax(-1)
    if config.kind == "mamba2":
        *_, xBC, dt = mixer.in_proj(x).split(mixer.projected, dim=-1)
        xBC, _ = mixer.conv1d.scan(xBC.transpose(1, 2), None, segments_of(None, batch))
        shared, states = config.d_xb or mixer.d_ssm, config.ngroups * config.d_state
        _, B, C = xBC.transpose(1, 2).split([shared, config.d_xb or states, states], dim=-1)
        B, C = (t.unflatten(-1, (-1, config.d_state)) for t in (B, C))
        B, C = (t.repeat_interleave(mixer.nheads // t.shape[2], dim=2) for t in (B, C))
        if config.discrete:
            decay, weight = -torch.nn.functional.softplus(dt), torch.ones_like(dt)
        else:
            weight = torch.nn.functional.softplus(dt + mixer.dt_bias)
            decay = -mixer.A_log.exp() * weight
        total = decay.cumsum(1).transpose(1, 2)  # batch, heads, seqlen
        faded = (total[..., :, None] - total[..., None, :]).tril().exp().tril()
        skip = torch.diag_embed(mixer.D.view(1, mixer.nheads, -1).mean(-1)[..., None].expand(batch, -1, seqlen))
        return torch.einsum("blhn,bshn->bhls", C, B) * faded * weight.transpose(1, 2)[:, :, None] + skip
    # The delta rule: S_t = S_{t-1} (a_t (1 - beta_t k_t k_t^T)) + beta_t v_t k_t^T, read by q_t / sqrt(head_k_dim).
    qkv, _, b, a = mixer.in_proj(x).split(config.in_sizes, dim=-1)
    qkv, _ = mixer.conv1d.scan(qkv.transpose(1, 2), None, segments_of(None, batch))
    q, k, _ = qkv.transpose(1, 2).split([config.key_dim, config.key_dim, config.value_dim], dim=-1)
    q, k = (t.unflatten(-1, (config.num_k_heads, -1)).repeat_interleave(2, dim=2) for t in (q, k))
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    beta = b.sigmoid()
    decay = (-mixer.A_log.exp() * torch.nn.functional.softplus(a + mixer.dt_bias)).exp()
    matrix = x.new_zeros(batch, config.num_v_heads, seqlen, seqlen)
    for row in range(batch):
        for head in range(config.num_v_heads):
            written = x.new_zeros(seqlen, config.head_k_dim)  # what the state holds of each token's value
            for t in range(seqlen):
                key = k[row, t, head]
                written = decay[row, t, head] * (written - beta[row, t, head] * torch.outer(written @ key, key))
                written[t] += beta[row, t, head] * key
                matrix[row, head, t] = written @ q[row, t, head] / config.head_k_dim**0.5
    return matrix


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_mix_multiplies_with_the_layers_matrix(name: str) -> None:
    mixer = build(name)
    x = torch.randn(2, SEQLEN, D_MODEL, dtype=torch.float64)
    values = torch.randn(2, SEQLEN, 7, dtype=torch.float64)
    expected = torch.einsum("bhls,bsw->blhw", matrix_of(mixer, x), values)
    torch.testing.assert_close(mixer.mix(x, values, segments_of(None)), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_mix_keeps_segments_apart_and_passes_over_padding(name: str) -> None:
    mixer = build(name)
    x = torch.randn(1, SEQLEN, D_MODEL, dtype=torch.float64)
    values = torch.randn(1, SEQLEN, 7, dtype=torch.float64)
    seq_idx = torch.tensor([[0] * 5 + [-1] * 2 + [1] * 6])
    found = mixer.mix(x, values, segments_of(seq_idx, 1))
    for part in (slice(0, 5), slice(7, 13)):
        alone = mixer.mix(x[:, part], values[:, part], segments_of(None, 1))
        torch.testing.assert_close(found[:, part], alone, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_random_values_measure_the_distance_of_two_matrices() -> None:
    """E |(T - A) g|^2 = |T - A|^2 for independent values of unit size (Hutchinson)."""
    one, two = build("attention"), build("mamba2")
    x = torch.randn(1, SEQLEN, D_MODEL, dtype=torch.float64)
    exact = (matrix_of(one, x) - matrix_of(two, x)).square().sum()
    values = torch.randn(1, SEQLEN, 20_000, dtype=torch.float64)
    mixed = one.mix(x, values, segments_of(None, 1)) - two.mix(x, values, segments_of(None, 1))
    assert abs(mixed.square().sum() / 20_000 / exact - 1) < 0.03
