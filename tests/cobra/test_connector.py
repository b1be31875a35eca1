from dataclasses import fields, replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vision_scan
from cobra.config import PRESETS
from cobra.connector import (
    CONNECTORS,
    FusedLDPConfig,
    FusedMLPConfig,
    LDPv2Config,
    LinearConfig,
    MLPConfig,
    MSCConfig,
    MSCConnector,
    VSSL2Config,
    VSSMLPConfig,
)
from cobra.lm.mamba2 import Mamba2Config
from tests.cobra.slow_scan import slow_mixer
from tests.tolerance import assert_close
from tests.vision_scan.modules.slow_ss2d import layer_norm, silu, slow_ss2d, visiting_lists
from train.optim import decays
from vision_scan.errors import UserError
from vision_scan.modules import SS2DConfig
from vision_scan.precision import Float32Parameters

D_VISION, D_MODEL = 12, 16
MIXER = Mamba2Config(d_state=5, headdim=8, chunk_size=7)
GRIDS = [(1, 1), (2, 3), (5, 7), (24, 24), (27, 27)]

# Mixers that a Config may have, and what keeps them small: another connector is tested by being in the table.
SMALL = {Mamba2Config: MIXER, SS2DConfig: SS2DConfig(d_state=5)}
SIZES = {"mqt": {"num_queries": 9, "num_heads": 2}}


def small(kind: str):
    config = CONNECTORS[kind].Config
    made = {field.name: field.default_factory for field in fields(config)}
    return config(**{name: SMALL[make] for name, make in made.items() if make in SMALL}, **SIZES.get(kind, {}))


CONFIGS = {
    **{kind: small(kind) for kind in CONNECTORS},
    "msc as released": MSCConfig(
        order="bi2", combine="mean", pre_norm=False, depth=2, projector="fused_mlp", mixer=MIXER
    ),
    "msc plain": MSCConfig(order="hilbert", swiglu=False, mixer=replace(MIXER, ngroups=2, d_conv=2)),
    "vss_l2 as chosen": VSSL2Config(order="bi2", mixer=SMALL[SS2DConfig]),
}


def build(config, dtype=torch.float64, seed=0):
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(seed)
        connector = CONNECTORS[config.kind](config, D_VISION, D_MODEL).double()
        for name, parameter in connector.named_parameters():
            if name.endswith(("dt_bias", "dt_projs_bias")):
                parameter.uniform_(-3, 1)
            else:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return connector.to(dtype)


RECURRENCE = ("A_log", "D", "dt_bias", "A_logs", "Ds", "dt_projs_bias")


def features(batch: int, height: int, width: int, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, height, width, D_VISION, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_tokens_are_as_many_as_the_config_says(name, grid):
    config = CONFIGS[name]
    tokens = build(config)(features(2, *grid))
    assert tokens.shape == (2, config.num_tokens(*grid), D_MODEL)
    assert tokens.dtype == torch.float64
    assert tokens.isfinite().all()


@pytest.mark.parametrize("grid", GRIDS[:3], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_pictures_of_a_batch_are_as_if_alone(name, grid):
    connector, x = build(CONFIGS[name]), features(3, *grid)
    together = connector(x)
    alone = torch.cat([connector(picture) for picture in x.split(1)])
    assert_close(name, together, alone, 1e-12)
    assert_close(f"{name}, reversed", connector(x.flip(0)).flip(0), together, 1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_gradient_reaches_every_parameter_and_every_cell(name):
    connector = build(CONFIGS[name])
    x = features(2, 3, 4).requires_grad_()
    tokens = connector(x)
    (tokens * torch.randn(tokens.shape, generator=torch.Generator().manual_seed(2))).sum().backward()
    for parameter_name, parameter in connector.named_parameters():
        grad = parameter.grad
        assert grad is not None and grad.isfinite().all(), parameter_name
        # Each list of an order has a slice of its own.
        slices = grad if parameter_name.rpartition(".")[2] in RECURRENCE else grad[None]
        assert all(part.any() for part in slices), parameter_name
    assert x.grad.flatten(0, 2).any(-1).all()


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_float32_and_bfloat16_give_the_same_tokens_roughly(name):
    connector, x = build(CONFIGS[name]), features(1, 5, 4)
    exact = connector(x)
    for dtype, ratio in ((torch.float32, 1e-5), (torch.bfloat16, 0.05)):
        tokens = build(CONFIGS[name], dtype)(x.to(dtype))
        assert tokens.dtype == dtype
        assert_close(f"{name} in {dtype}", tokens, exact, ratio)


@pytest.mark.parametrize("name", CONFIGS)
def test_what_must_be_float32_stays_so_and_never_decays(name):
    connector = build(CONFIGS[name], torch.float32).to(torch.bfloat16)
    must = {"weight", "bias", *RECURRENCE}
    for prefix, owner in connector.named_modules():
        for leaf, parameter in owner.named_parameters(recurse=False):
            full = f"{prefix}.{leaf}"
            wide = isinstance(owner, Float32Parameters) and leaf in must
            assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), full
            if wide:
                assert not decays(full, parameter, owner), full


@pytest.mark.parametrize("name", ["linear", "mlp", "fused_mlp"])
@torch.no_grad()
def test_pointwise_connectors_look_at_one_cell_in_raster_order(name):
    connector, x = build(CONFIGS[name]), features(1, 2, 3)
    tokens = connector(x)
    for row in range(2):
        for column in range(3):
            cell = connector(x[:, row : row + 1, column : column + 1])
            assert_close(f"cell {row} {column}", tokens[:, 3 * row + column], cell[:, 0], 1e-12)


@torch.no_grad()
def test_pointwise_connectors_by_formula():
    x = features(1, 2, 3)
    flat = x.reshape(1, 6, D_VISION)
    p = {name: dict(build(CONFIGS[name]).named_parameters()) for name in ("linear", "mlp", "fused_mlp")}

    def linear(x, name, prefix):
        return x @ p[name][f"{prefix}.weight"].T + p[name][f"{prefix}.bias"]

    assert_close("linear", build(LinearConfig())(x), linear(flat, "linear", "proj"), 1e-12)
    y = linear(F.gelu(linear(flat, "mlp", "proj.0")), "mlp", "proj.2")
    assert_close("mlp", build(MLPConfig())(x), y, 1e-12)
    y = F.gelu(linear(flat, "fused_mlp", "proj.0"))
    assert y.shape[-1] == 4 * D_VISION
    y = linear(F.gelu(linear(y, "fused_mlp", "proj.2")), "fused_mlp", "proj.4")
    assert_close("fused_mlp", build(FusedMLPConfig())(x), y, 1e-12)


def slow_msc(connector: MSCConnector, config: MSCConfig, x: Tensor) -> Tensor:
    """The connector on one picture (height, width, d_vision), written again from the description."""
    height, width, _ = x.shape
    lists = visiting_lists(config.order, height, width)
    y = F.gelu(x.reshape(height * width, -1) @ connector.mlp[0].weight.T + connector.mlp[0].bias)
    for block in connector.blocks:
        entry = layer_norm(y, block.pre_norm) if config.pre_norm else y
        y = y + slow_mixer(block.mixer, entry, lists, config.combine)
        if config.swiglu:
            entry, mlp = layer_norm(y, block.norm), block.mlp
            first, second = (entry @ w.weight.T + w.bias for w in (mlp.w1, mlp.w2))
            y = y + (silu(first) * second) @ mlp.w3.weight.T + mlp.w3.bias
    y = layer_norm(y, connector.norm_f)
    if config.projector == "linear":
        return y @ connector.projector.weight.T + connector.projector.bias
    for index in (0, 2, 4):
        layer = connector.projector[index]
        y = y @ layer.weight.T + layer.bias
        y = F.gelu(y) if index < 4 else y
    return y


VARIANTS = {
    "default": MSCConfig(mixer=MIXER),
    "mean": MSCConfig(combine="mean", mixer=MIXER),
    "no pre_norm": MSCConfig(pre_norm=False, order="bi2", mixer=MIXER),
    "no swiglu": MSCConfig(swiglu=False, order="bi2", mixer=MIXER),
    "as released": CONFIGS["msc as released"],
    "groups, limits": MSCConfig(
        order="raster", mixer=Mamba2Config(d_state=3, headdim=4, ngroups=2, d_conv=2, dt_limit=(0.1, 0.4))
    ),
}


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (4, 3)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_msc_is_its_formula(name, grid):
    config = VARIANTS[name]
    connector, x = build(config), features(2, *grid)
    expected = torch.stack([slow_msc(connector, config, picture) for picture in x])
    assert_close(name, connector(x), expected, 1e-10)


def test_each_list_starts_with_weights_of_its_own():
    torch.manual_seed(0)
    mixer = MSCConnector(MSCConfig(mixer=MIXER), D_VISION, D_MODEL).blocks[0].mixer
    for name in ("conv_weight", "dt_bias", "A_log"):
        lists = getattr(mixer, name).flatten(1)
        assert len(lists) == 4 and torch.pdist(lists).min() > 0, name


@torch.no_grad()
def test_msc_takes_every_order():
    x = features(1, 3, 4)
    found = []
    for order in vision_scan.SCAN_ORDERS.keys() - {"noncausal"}:
        tokens = build(MSCConfig(order=order, mixer=MIXER))(x)
        assert tokens.shape == (1, 12, D_MODEL)
        found.append((order, tokens))
    lonely = {order: tokens for order, tokens in found if len(vision_scan.order(order, 2, 3, depth=0)) == 1}
    del lonely["nd_cycle"]  # whose first layer's list is the raster
    raster = lonely.pop("raster")
    for order, tokens in lonely.items():  # the same weights
        assert not torch.allclose(tokens, raster), order


@torch.no_grad()
def test_msc_with_options_in_the_name_of_the_order():
    x = features(1, 3, 4)
    first, second = (build(MSCConfig(order=f"random(seed={seed})", mixer=MIXER))(x) for seed in (1, 2))
    assert not torch.allclose(first, second)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("hilbert", {"order": "hilbrt"}),
        ("combine", {"combine": "max"}),
        ("projector", {"projector": "mlp"}),
        ("depth", {"depth": -1}),
    ],
)
def test_wrong_settings_fail_at_construction(message, settings):
    with pytest.raises(UserError, match=message):
        MSCConfig(**settings)


PUBLISHED_TOKENS = [((24, 24), 144), ((27, 27), 196)]  # MobileVLM V2; Cobra's fused-ldpnet


@pytest.mark.parametrize("config", [LDPv2Config(), FusedLDPConfig()], ids=str)
def test_pooling_makes_half_as_many_rows_and_columns_rounded_up(config):
    for grid, tokens in [*PUBLISHED_TOKENS, ((5, 7), 12), ((1, 1), 1), ((1, 6), 3)]:
        assert config.num_tokens(*grid) == tokens


def slow_ldp(x: Tensor, p: dict[str, Tensor]) -> Tensor:
    """An LDP on one picture (height, width, d_vision), cell by cell, from its description."""
    hidden = F.gelu(x @ p["mlp.0.weight"].T + p["mlp.0.bias"])
    y = hidden @ p["mlp.2.weight"].T + p["mlp.2.bias"]
    height, width, _ = y.shape
    rows, columns = (height + 1) // 2, (width + 1) // 2

    def span(index: int, outputs: int, inputs: int) -> slice:
        """The inputs that adaptive pooling takes the mean of: from the floor to the ceiling of its share."""
        return slice(index * inputs // outputs, -(-(index + 1) * inputs // outputs))

    means = torch.zeros(rows + 2, columns + 2, y.shape[-1], dtype=y.dtype)  # with a border of zeros
    for i in range(rows):
        for j in range(columns):
            means[i + 1, j + 1] = y[span(i, rows, height), span(j, columns, width)].mean((0, 1))
    tokens = []
    for i in range(rows):
        for j in range(columns):
            around = means[i : i + 3, j : j + 3]
            kernel = p["peg.conv.weight"][:, 0].movedim(0, -1)
            tokens.append(means[i + 1, j + 1] + (around * kernel).sum((0, 1)) + p["peg.conv.bias"])
    return torch.stack(tokens)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 7), (24, 24), (27, 27)], ids=str)
@pytest.mark.parametrize("config", [LDPv2Config(), FusedLDPConfig()], ids=str)
@torch.no_grad()
def test_ldp_is_its_formula(config, grid):
    connector, x = build(config), features(2, *grid)
    p = dict(connector.named_parameters())
    assert len(p["mlp.0.bias"]) == (4 * D_VISION if config.kind == "fused_ldp" else D_MODEL)
    assert_close(str(grid), connector(x), torch.stack([slow_ldp(picture, p) for picture in x]), 1e-12)


def affine(x: Tensor, layer) -> Tensor:
    return x @ layer.weight.T + layer.bias


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 7)], ids=str)
@pytest.mark.parametrize("order", ["bi2", "cross4"])
@torch.no_grad()
def test_vss_connectors_are_the_formulas_of_the_paper(order, grid):
    x = features(1, *grid)
    one = build(VSSMLPConfig(order=order, mixer=SMALL[SS2DConfig]))
    scanned = slow_ss2d(one.block.op, layer_norm(x[0], one.block.norm))
    expected = affine(F.gelu(affine(layer_norm(scanned + x[0], one.norm), one.mlp[0])), one.mlp[2])
    assert_close("vss_mlp", one(x)[0], expected.flatten(0, 1), 1e-10)

    two = build(VSSL2Config(order=order, mixer=SMALL[SS2DConfig]))
    V = affine(x[0], two.in_proj)
    scanned = slow_ss2d(two.scan[2], layer_norm(F.gelu(V), two.scan[1]))
    expected = affine(layer_norm(scanned + V, two.norm), two.out_proj)
    assert_close("vss_l2", two(x)[0], expected.flatten(0, 1), 1e-10)


@pytest.mark.parametrize("config", [VSSMLPConfig, VSSL2Config])
def test_vss_connectors_refuse_an_unknown_order_at_construction(config):
    with pytest.raises(UserError, match="hilbert"):
        config(order="hilbrt")


def count(module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def msc_on_meta(name: str) -> MSCConnector:
    config = PRESETS[name].connector
    with torch.device("meta"):
        return MSCConnector(config, 2176, 2560)


def block_parameters(lists: int, pre_norm: bool) -> int:
    """Per block of ML-Mamba, from its description: Mamba-2 2.7b sizes, one more scan per direction."""
    d, d_inner, channels, heads = 2560, 5120, 5376, 80
    mixer = d * (d_inner + channels + heads) + d_inner + d_inner * d
    mixer += lists * (channels * 4 + channels + 3 * heads)
    swiglu = 3 * (d * d + d)
    return mixer + swiglu + 2 * d * (2 if pre_norm else 1)


def test_ml_mamba_has_its_published_sizes_as_released():
    connector = msc_on_meta("ml-mamba-3b")
    assert count(connector.mlp) == 5_573_120
    assert block_parameters(2, False) == 59_914_720
    assert [count(block) for block in connector.blocks] == [59_914_720] * 2
    assert count(connector.blocks) + count(connector.norm_f) == 119_834_560
    assert count(connector.projector) == 58_997_760
    assert count(connector) == 5_573_120 + 119_834_560 + 58_997_760
    mixer = connector.blocks[0].mixer
    assert mixer.in_proj.weight.shape == (10576, 2560) and mixer.out_proj.weight.shape == (2560, 5120)
    assert mixer.conv_weight.shape == (2, 5376, 4) and mixer.A_log.shape == (2, 80)


def test_ml_mamba_as_drawn_has_four_scans_and_a_norm_more():
    connector = msc_on_meta("ml-mamba-3b-drawn")
    assert [count(block) for block in connector.blocks] == [block_parameters(4, True)] * 2


@pytest.mark.parametrize(
    ("config", "d_vision", "d_model", "parameters"),
    [
        (FusedMLPConfig(), 2176, 2560, 47_789_568),  # Cobra
        (FusedLDPConfig(), 2176, 2560, 41_259_008),  # Cobra's fused-ldpnet
        (MLPConfig(), 1024, 4096, 20_979_712),  # LLaVA 1.5 7B
        (LDPv2Config(), 1024, 2048, 6_316_032),  # MobileVLM V2 1.7B
    ],
    ids=str,
)
def test_connectors_have_their_published_sizes(config, d_vision, d_model, parameters):
    with torch.device("meta"):
        connector = CONNECTORS[config.kind](config, d_vision, d_model)
    assert count(connector) == parameters
