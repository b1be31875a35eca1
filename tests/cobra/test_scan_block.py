"""Blocks that scan a grid: what sharing the channels out between the lists of an order means and costs."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import vision_scan
from cobra.config import PRESETS
from cobra.connector import MSCConfig
from cobra.cost import tile_work
from cobra.lm.mamba2 import Mamba2Config
from cobra.model import Cobra
from cobra.scan_block import ScanBlock, ScanBlocksConfig, ScanMixer
from cobra.tokenizer import Tokenizer
from cobra.typed_config import from_dict
from eval.ablations.scan_orders import D_MODEL as STUDY_WIDTH
from eval.ablations.scan_orders import MIXER as STUDY_MIXER
from tests.cobra.slow_scan import slow_shared_mixer
from tests.tolerance import assert_close
from vision_scan.errors import UserError

D_MODEL = 16
MIXER = Mamba2Config(d_state=5, headdim=4, chunk_size=7)  # 8 heads
GRIDS = [(1, 1), (2, 3), (5, 2)]


def blocks(order: str, lists: str = "share", mixer: Mamba2Config = MIXER, **changes) -> ScanBlocksConfig:
    return ScanBlocksConfig(order=order, lists=lists, mixer=mixer, **changes)


def build(kind, config: ScanBlocksConfig, d_model: int = D_MODEL, depth: int = 0, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return kind(config, d_model, depth)


def shaken(config: ScanBlocksConfig, depth: int = 0) -> ScanMixer:
    """A mixer whose lists, heads and channels all differ."""
    mixer = build(ScanMixer, config, depth=depth).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64), alpha=0.3)
    return mixer


def grid_of(batch: int, height: int, width: int, d_model: int = D_MODEL) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch, height, width, d_model, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("order", ["cross4", "bi2", "plain4", "rot4", "hilbert", "local(window=2)"])
@torch.no_grad()
def test_lists_with_a_share_each_are_their_recurrences(order, grid):
    mixer, x = shaken(blocks(order)), grid_of(2, *grid)
    lists = [cells[cells >= 0].tolist() for cells in vision_scan.order(order, *grid)]
    expected = torch.stack([slow_shared_mixer(mixer, picture.flatten(0, 1), lists) for picture in x])
    assert_close(order, mixer(x).flatten(1, 2), expected, 1e-10)


@torch.no_grad()
def test_a_block_of_an_order_that_takes_turns_has_all_channels_in_its_one_list():
    x = grid_of(1, 3, 4)
    for depth in (0, 1, 7, 8):
        mixer = shaken(blocks("zigma8"), depth)
        (cells,) = vision_scan.order("zigma8", 3, 4, depth)
        assert mixer.shares == 1
        assert_close(f"block {depth}", mixer(x)[0].flatten(0, 1), slow_shared_mixer(mixer, x[0].flatten(0, 1), [cells]))


@pytest.mark.parametrize("order", ["raster", "hilbert", "random(seed=4)"])
def test_one_list_shares_with_nobody(order):
    """Bit for bit, gradients included."""
    x = grid_of(2, 3, 5).float()
    found = []
    for lists in ("all", "share"):
        block = build(ScanBlock, blocks(order, lists))
        y = block(x)
        y.square().sum().backward()
        found.append((y, block))
    (one, block), (other, twin) = found
    assert torch.equal(one, other)
    for (name, own), (same, its) in zip(block.named_parameters(), twin.named_parameters(), strict=True):
        assert name == same and torch.equal(own, its) and torch.equal(own.grad, its.grad), name


@pytest.mark.parametrize("order", ["cross4", "bi2", "hilbert", "zigma8"])
def test_first_weights_are_those_of_a_single_list(order):
    """A study pairs orders by seed: what an order does not change begins the same."""
    for depth in (0, 1):
        raster, other = (build(ScanBlock, blocks(name), depth=depth) for name in ("raster", order))
        K, own, its = len(vision_scan.order(order, 2, 3, depth)), raster.mixer, other.mixer
        inner = own.d_inner
        for name, parameter in raster.named_parameters():
            twin = other.get_parameter(name)
            leaf = name.removeprefix("mixer.")
            if leaf in ("dt_bias", "A_log", "D"):
                assert twin.shape == (K, parameter.numel() // K) and torch.equal(twin.flatten(), parameter[0]), name
            elif leaf not in ("conv_weight", "conv_bias"):
                assert torch.equal(twin, parameter), name
        for leaf in ("conv_weight", "conv_bias"):
            single, shared = own.get_parameter(leaf)[0], its.get_parameter(leaf)
            assert torch.equal(torch.cat([share[: inner // K] for share in shared]), single[:inner]), leaf
            assert all(torch.equal(share[inner // K :], single[inner:]) for share in shared), leaf


@pytest.mark.parametrize("order", ["cross4", "bi2", "rot4"])
def test_several_lists_cost_what_one_does(order):
    """As in the study: within 2 percent, in parameters and in operations."""
    mixer = from_dict(Mamba2Config, STUDY_MIXER)

    def cost(name: str, lists: str) -> tuple[int, float]:
        tiny = PRESETS["tiny"]
        connector = MSCConfig(order=name, lists=lists, mixer=mixer)
        with torch.device("meta"):
            lm = replace(tiny.lm, d_model=STUDY_WIDTH)
            model = Cobra(replace(tiny, connector=connector, lm=lm), Tokenizer.bytes())
            block = ScanBlock(blocks(name, lists, mixer), STUDY_WIDTH, 0)
        work = tile_work(model)["connector"]
        return sum(parameter.numel() for parameter in block.parameters()), work.weights + work.mixing

    single, shared, whole = cost("raster", "share"), cost(order, "share"), cost(order, "all")
    for one, several, each_all in zip(single, shared, whole, strict=True):
        assert 0.98 < several / one < 1.02 and several < each_all


def test_gradient_reaches_every_share_and_every_cell():
    block, x = build(ScanBlock, blocks("cross4")).double(), grid_of(2, 3, 4).requires_grad_()
    weights = torch.randn(2, 3, 4, D_MODEL, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    (block(x) * weights).sum().backward()
    for name, parameter in block.named_parameters():
        grad = parameter.grad
        assert grad is not None and grad.isfinite().all(), name
        is_of_lists = name.startswith("mixer.") and parameter.shape[0] == 4
        assert all(part.any() for part in (grad if is_of_lists else grad[None])), name
    assert block.mixer.A_log.grad.all() and block.mixer.D.grad.all()
    assert x.grad.flatten(0, 2).any(-1).all()


@torch.no_grad()
def test_a_share_hears_its_own_list_alone():
    """A cell moves channels of each list only from there on."""
    mixer, x = shaken(blocks("bi2")), grid_of(1, 2, 4)
    mixer.out_proj = torch.nn.Identity()
    mixer.norm.weight.fill_(1.0)
    moved = x.clone()
    moved[0, 1, 1] += 1.0  # cell 5

    def scanned(picture: Tensor) -> Tensor:
        """Channels (cells, lists, d) but for the norm, which all of them share."""
        y = mixer(picture)[0].flatten(0, 1).unflatten(-1, (2, -1))
        return y / y.norm(dim=-1, keepdim=True)

    changed = (scanned(moved) - scanned(x)).norm(dim=-1) > 1e-9
    assert changed[:, 0].tolist() == [False] * 5 + [True] * 3
    assert changed[:, 1].tolist() == [True] * 6 + [False] * 2


@pytest.mark.parametrize(
    ("order", "mixer", "d_model"),
    [
        ("cross4", Mamba2Config(d_state=5, headdim=16), 16),  # 2 heads
        ("cross4", Mamba2Config(d_state=5, headdim=16, expand=3), 32),  # 6
        ("bi2", Mamba2Config(d_state=5, headdim=4, ngroups=2), 16),
    ],
)
def test_heads_that_cannot_be_shared_are_refused_in_one_line(order, mixer, d_model):
    with pytest.raises(UserError, match=r"cannot share .* set lists=all") as caught:
        build(ScanMixer, blocks(order, mixer=mixer), d_model)
    assert "\n" not in str(caught.value)
    build(ScanMixer, blocks(order, "all", mixer), d_model)


@pytest.mark.parametrize(
    ("message", "settings"),
    [
        ("lists 'half' must be one of all, share", {"lists": "half"}),
        ("lists of 'es2d' hold different cells", {"order": "es2d", "lists": "share"}),
        ("has no sequence", {"order": "noncausal"}),
        ("did you mean 'hilbert'", {"order": "hilbrt"}),
    ],
)
def test_wrong_settings_are_refused_in_one_line(message, settings):
    with pytest.raises(UserError, match=message) as caught:
        ScanBlocksConfig(**settings)
    assert "\n" not in str(caught.value)
