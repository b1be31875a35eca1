"""Connectors that make fewer tokens than cells, against loops over cells that were written from the papers."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import cobra
from cobra.config import PRESETS, TINY_ATTENTION
from cobra.connector import CONNECTORS, MQTConfig, Pool2dConfig, ReshapeConfig, SpaceToDepthConfig
from cobra.model import Cobra
from tests.cobra.test_connector import D_VISION, affine, build, count, features
from tests.tolerance import assert_close
from tests.vision_scan.modules.slow_ss2d import layer_norm
from vision_scan.errors import UserError

pytestmark = pytest.mark.usefixtures("one_thread")

GRIDS = [(1, 1), (2, 3), (5, 7), (9, 6), (7, 1)]
MQT = MQTConfig(num_queries=9, num_heads=2)


def slow_mlp(x: Tensor, mlp) -> Tensor:
    return affine(F.gelu(affine(x, mlp[0])), mlp[2])


def place(index: int, outputs: int, inputs: int) -> list[tuple[int, float]]:
    """Inputs and weights of an output between them, centres on centres, without going past the ends."""
    centre = max((index + 0.5) * inputs / outputs - 0.5, 0.0)
    low = min(math.floor(centre), inputs - 1)
    share = min(centre - low, 1.0)
    return [(low, 1 - share), (min(low + 1, inputs - 1), share)]


@pytest.mark.parametrize(
    ("config", "grid", "tokens"),
    [
        (Pool2dConfig(), (24, 24), 144),  # LongLLaVA
        (Pool2dConfig(mode="1d"), (24, 24), 144),
        (Pool2dConfig(), (5, 7), 12),
        (Pool2dConfig(factor=3), (4, 10), 8),
        (Pool2dConfig(factor=1), (4, 10), 40),
        (SpaceToDepthConfig(), (27, 27), 81),  # OmniVLM
        (ReshapeConfig(), (27, 27), 81),
        (SpaceToDepthConfig(), (4, 10), 8),
        (ReshapeConfig(), (4, 10), 5),
        (MQTConfig(), (24, 24), 256),  # MQT-LLaVA
        (MQTConfig(keep=2), (3, 50), 2),
    ],
    ids=str,
)
def test_tokens_are_as_many_as_published(config, grid, tokens):
    assert config.num_tokens(*grid) == tokens


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("factor", [1, 2, 3])
@torch.no_grad()
def test_pool2d_interpolates_the_map(factor, grid):
    config = Pool2dConfig(factor=factor)
    connector, x = build(config), features(3, *grid)
    rows, columns = config.size(*grid)
    tokens = []
    for i in range(rows):
        for j in range(columns):
            near = [(a, b) for a in place(i, rows, grid[0]) for b in place(j, columns, grid[1])]
            tokens.append(sum(p * q * x[:, row, column] for (row, p), (column, q) in near))
    assert_close(str(grid), connector(x), slow_mlp(torch.stack(tokens, 1), connector.mlp), 1e-12)


@torch.no_grad()
def test_pool2d_halves_even_sides_by_means_of_four():
    connector, x = build(Pool2dConfig()), features(2, 6, 10)
    means = x.unflatten(2, (5, 2)).unflatten(1, (3, 2)).mean((2, 4)).flatten(1, 2)
    assert_close("means", connector(x), slow_mlp(means, connector.mlp), 1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@torch.no_grad()
def test_pool2d_interpolates_the_sequence(grid):
    config = Pool2dConfig(mode="1d")
    connector, x = build(config), features(3, *grid)
    cells, outputs = x.flatten(1, 2), config.num_tokens(*grid)
    tokens = [sum(p * cells[:, t] for t, p in place(i, outputs, cells.shape[1])) for i in range(outputs)]
    assert_close(str(grid), connector(x), slow_mlp(torch.stack(tokens, 1), connector.mlp), 1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("factor", [1, 2, 3])
@torch.no_grad()
def test_space_to_depth_puts_windows_side_by_side(factor, grid):
    connector, x = build(SpaceToDepthConfig(factor=factor)), features(3, *grid)
    nothing = torch.zeros(3, D_VISION, dtype=x.dtype)
    tokens = []
    for top in range(0, grid[0], factor):
        for left in range(0, grid[1], factor):
            window = [
                x[:, top + a, left + b] if top + a < grid[0] and left + b < grid[1] else nothing
                for a in range(factor)
                for b in range(factor)
            ]
            tokens.append(torch.cat(window, -1))
    assert_close(str(grid), connector(x), slow_mlp(torch.stack(tokens, 1), connector.mlp), 1e-12)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("factor", [1, 2, 3])
@torch.no_grad()
def test_reshape_puts_neighbours_in_the_sequence_side_by_side(factor, grid):
    connector, x = build(ReshapeConfig(factor=factor)), features(3, *grid)
    cells = list(x.flatten(1, 2).unbind(1))
    while len(cells) % factor**2:
        cells.append(torch.zeros_like(cells[0]))
    tokens = [torch.cat(cells[t : t + factor**2], -1) for t in range(0, len(cells), factor**2)]
    assert_close(str(grid), connector(x), slow_mlp(torch.stack(tokens, 1), connector.mlp), 1e-12)


def test_the_readings_of_omnivlm_differ_in_order_only_where_rows_are_longer_than_windows():
    x = features(1, 3, 3)
    assert_close("one window", build(SpaceToDepthConfig())(x), build(ReshapeConfig())(x), 1e-12)
    x = features(1, 3, 6)
    assert not torch.allclose(build(SpaceToDepthConfig())(x), build(ReshapeConfig())(x))


def slow_position(row: float, column: float, d: int) -> Tensor:
    parts = []
    for at in (column, row):
        angles = [at / 10000 ** (i / (d // 4)) for i in range(d // 4)]
        parts += [math.sin(a) for a in angles] + [math.cos(a) for a in angles]
    return torch.tensor(parts, dtype=torch.float64)


def cubic(distance: float) -> float:
    """Keys' convolution kernel with the parameter -3/4, as torch has it."""
    a, t = -0.75, abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0


def slow_mqt(connector, config: MQTConfig, x: Tensor, num_tokens: int) -> Tensor:
    """The connector on one picture (height, width, d_vision), query by query."""
    height, width, d = x.shape
    side, heads = math.isqrt(config.num_queries), config.num_heads
    table = [[slow_position(i, j, d) for j in range(side)] for i in range(side)]

    def position(row: int, column: int) -> Tensor:
        y, z = (row + 0.5) * side / height - 0.5, (column + 0.5) * side / width - 0.5
        total = torch.zeros(d, dtype=x.dtype)
        for i in range(math.floor(y) - 1, math.floor(y) + 3):
            for j in range(math.floor(z) - 1, math.floor(z) + 3):
                near = table[min(max(i, 0), side - 1)][min(max(j, 0), side - 1)]
                total += cubic(y - i) * cubic(z - j) * near
        return total

    keys, values = [], []
    for i in range(height):
        for j in range(width):
            at = position(i, j)
            normed = (at - at.mean()) / (at.var(correction=0) + 1e-6) ** 0.5 * connector.norm_k.weight
            keys.append(normed @ connector.k_proj.weight.T)
            values.append(affine(layer_norm(x[i, j], connector.norm_v), connector.v_proj))
    tokens = []
    for index in range(num_tokens):
        learnt = connector.queries[index] + table[index // side][index % side]
        query = affine(layer_norm(learnt, connector.norm_q), connector.q_proj)
        mixed = []
        for part in torch.arange(d).chunk(heads):
            scores = torch.stack([query[part] @ key[part] for key in keys]) / math.sqrt(d / heads)
            weights = scores.exp() / scores.exp().sum()
            mixed.append(sum(w * value[part] for w, value in zip(weights, values, strict=True)))
        tokens.append(affine(torch.cat(mixed), connector.out_proj) @ connector.proj.weight.T)
    return torch.stack(tokens)


@pytest.mark.parametrize("grid", [(1, 1), (2, 3), (5, 4), (3, 3)], ids=str)
@torch.no_grad()
def test_mqt_is_its_formula(grid):
    connector, x = build(MQT), features(2, *grid)
    expected = torch.stack([slow_mqt(connector, MQT, picture, 9) for picture in x])
    assert_close(str(grid), connector(x), expected, 1e-10)


@torch.no_grad()
def test_mqt_with_fewer_tokens_makes_the_first_of_them():
    x = features(3, 4, 5)
    every = build(MQT)(x)
    for keep in range(1, 10):
        assert_close(str(keep), build(MQTConfig(num_queries=9, num_heads=2, keep=keep))(x), every[:, :keep], 1e-12)


@torch.no_grad()
def test_mqt_looks_at_the_same_places_whatever_is_there():
    """Content never enters the keys, so without the norm of the values the tokens are linear in the features."""
    connector, x, y = build(MQT), features(1, 3, 4), features(1, 3, 4, seed=2)
    connector.norm_v = torch.nn.Identity()
    assert_close("linear", connector((x + y) / 2), (connector(x) + connector(y)) / 2, 1e-12)


@torch.no_grad()
def test_mqt_tells_rows_from_columns():
    x = features(1, 3, 3)
    assert not torch.allclose(build(MQT)(x), build(MQT)(x.transpose(1, 2)))


def test_compressing_connectors_have_their_published_sizes():
    with torch.device("meta"):
        made = {kind: CONNECTORS[kind](CONNECTORS[kind].Config(), 1024, 4096) for kind in ("pool2d", "mqt")}
        omni = CONNECTORS["reshape"](ReshapeConfig(), 1152, 896)
    assert count(made["pool2d"]) == 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    # Queries, three norms and an attention, both without the bias of the keys, the last map.
    assert count(made["mqt"]) == 256 * 1024 + 5 * 1024 + 4 * 1024**2 + 3 * 1024 + 1024 * 4096
    assert count(omni) == 9 * 1152 * 896 + 896 + 896 * 896 + 896


@pytest.mark.parametrize("config", [Pool2dConfig(), SpaceToDepthConfig(), ReshapeConfig(), MQT], ids=str)
def test_compressing_connectors_under_autocast(config):
    connector, x = build(config, torch.float32), features(3, 5, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        tokens = connector(x.float())
    tokens.float().square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in connector.parameters())
    assert_close(config.kind, tokens.detach().double(), build(config)(x).detach(), 0.05)


@pytest.mark.parametrize(
    ("message", "config", "settings"),
    [
        ("factor 0", Pool2dConfig, {"factor": 0}),
        ("mode '3d' must be one of 2d, 1d", Pool2dConfig, {"mode": "3d"}),
        ("factor -1", SpaceToDepthConfig, {"factor": -1}),
        ("factor 0", ReshapeConfig, {"factor": 0}),
        ("num_queries 10 must be a square", MQTConfig, {"num_queries": 10}),
        ("keep 0 must be from 1 to num_queries, 256", MQTConfig, {"keep": 0}),
        ("keep 257", MQTConfig, {"keep": 257}),
        ("num_heads 0", MQTConfig, {"num_heads": 0}),
        ("even numbers of tokens, up to 9", MQTConfig, {"num_queries": 9, "nested": True}),
    ],
)
def test_wrong_settings_fail_at_construction(message, config, settings):
    with pytest.raises(UserError, match=message):
        config(**settings)


def test_mqt_refuses_features_that_its_heads_do_not_divide():
    with pytest.raises(UserError, match="width 12 do not suit num_heads 16"):
        build(MQTConfig(num_queries=9))


def nested_model(**settings) -> Cobra:
    tiny = PRESETS["tiny"]
    config = replace(
        tiny,
        vision_encoder=replace(tiny.vision_encoder, d_model=16),
        connector=MQTConfig(num_queries=16, num_heads=2, **settings),
        lm=replace(tiny.lm, layers=(*tiny.lm.layers[:1], TINY_ATTENTION)),
    )
    return cobra.build(config, dtype="float64")


def rows(model: Cobra, packed: bool) -> dict[str, Tensor]:
    """Two pictures in a row, labels right behind one of them, and one picture: padded, or in one row."""
    tile, noise = [model.tokenizer.image_id] * model.config.tokens_per_tile, torch.Generator().manual_seed(0)
    words = torch.randint(200, (9,), generator=noise).tolist()
    ids = [[*words[:2], *tile, *words[2:4], *tile, *words[4:7]], [*tile, *words[7:]]]
    labels = [[token if token in words[2:] else -100 for token in row] for row in ids]
    pixels = torch.rand(3, 3, 64, 64, generator=noise, dtype=torch.float64)
    if packed:
        seq_idx = [number for number, row in enumerate(ids) for _ in row]
        columns = {"input_ids": [ids[0] + ids[1]], "labels": [labels[0] + labels[1]], "seq_idx": [seq_idx]}
    else:
        missing = len(ids[0]) - len(ids[1])
        columns = {"input_ids": [ids[0], ids[1] + [0] * missing], "labels": [labels[0], labels[1] + [-100] * missing]}
    return {**{name: torch.tensor(column) for name, column in columns.items()}, "pixel_values": pixels}


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("drawn", [2, 6, 16])
def test_a_nested_step_is_one_of_a_model_with_as_many_tokens(monkeypatch, drawn, packed):
    nested = nested_model(nested=True).train()
    monkeypatch.setattr(nested.connector, "draw", lambda: drawn)
    plain = nested_model(keep=drawn).train()
    for model in (nested, plain):
        loss, supervised = model.loss(rows(model, packed))
        loss.backward()
        model.found = loss.detach(), supervised
    assert_close("loss", nested.found[0], plain.found[0], 1e-10)
    assert nested.found[1] == plain.found[1] > 0
    for (name, a), b in zip(nested.named_parameters(), plain.parameters(), strict=True):
        assert_close(name, a.grad, b.grad, 1e-8)


@torch.no_grad()
def test_nested_draws_are_those_of_torch_and_of_training_alone():
    model = nested_model(nested=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        state = torch.get_rng_state()
        drawn = [model.connector.draw() for _ in range(200)]
        assert set(drawn) == set(range(2, 17, 2))
        torch.set_rng_state(state)
        assert [model.connector.draw() for _ in range(200)] == drawn
        state = torch.get_rng_state()
        plain = nested_model()
        assert_close("evaluation", model.loss(rows(model, True))[0], plain.loss(rows(plain, True))[0], 1e-12)
        assert torch.equal(torch.get_rng_state(), state)


def test_nested_is_refused_where_processes_share_a_row():
    model = nested_model(nested=True).train()
    with pytest.raises(UserError, match=r"connector\.nested"):
        model.loss(rows(model, False), group=object())
