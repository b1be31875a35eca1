"""Any mixer along any order: against a loop over lists and cells, for mixers of every kind of layer."""

import pytest
import torch
from torch import Tensor, nn

import vision_scan
from cobra.lm.mixer import Segments
from cobra.lm.stack import LAYERS
from tests.tolerance import assert_close
from vision_scan import OrderedMixer
from vision_scan.errors import UserError
from vision_scan.orders import SCAN_ORDERS

D_MODEL = 8
KINDS = {
    "mamba1": {"d_state": 4},
    "mamba2": {"d_state": 4, "headdim": 4},
    "gated_deltanet": {"num_k_heads": 1, "num_v_heads": 2, "head_k_dim": 4, "head_v_dim": 4},
    "mamba3": {"d_state": 4, "headdim": 4},
    "attention": {"num_heads": 2, "num_kv_heads": 1, "headdim": 4},
}


class LayerOfKind(nn.Module):
    """A layer of the language model as a mixer of sequences."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        layer = LAYERS[kind]
        self.layer = layer(layer.Config(**KINDS[kind]), D_MODEL)

    def forward(self, x: Tensor, seq_idx: Tensor | None) -> Tensor:
        return self.layer(x, None, Segments(torch.zeros(len(x), dtype=torch.int64), seq_idx))[0]


def build(kind: str, **options) -> OrderedMixer:
    torch.manual_seed(0)
    return OrderedMixer(lambda: LayerOfKind(kind), D_MODEL, **options).double()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("order", ["cross4", "hilbert", "es2d", "local(window=2)"])
@torch.no_grad()
def test_is_a_loop_over_lists_and_pictures(kind, order, shared):
    mixer, x = build(kind, order=order, shared=shared), torch.randn(3, 3, 5, D_MODEL).double()
    found = mixer(x)
    expected = torch.zeros(3, 15, D_MODEL).double()
    for k, path in enumerate(vision_scan.order(order, 3, 5)):
        cells = path[path >= 0]
        one = mixer.mixers[0 if shared else k]
        for row, picture in enumerate(x.flatten(1, 2)):
            expected[row, cells] += one(picture[cells][None], None)[0]
    assert_close(order, found.flatten(1, 2), expected, 1e-10)


@pytest.mark.parametrize("merge", ["sum", "mean", "gated", "concat"])
def test_merges(merge):
    mixer, x = build("mamba2", order="bi2", merge=merge), torch.randn(2, 2, 3, D_MODEL).double()
    both = torch.stack([
        mixer.mixers[0](x.flatten(1, 2), None),
        mixer.mixers[1](x.flatten(1, 2).flip(1), None).flip(1),
    ])
    expected = {
        "sum": lambda: both.sum(0),
        "mean": lambda: both.mean(0),
        "gated": lambda: (mixer.gate(x).sigmoid().flatten(1, 2).movedim(-1, 0)[..., None] * both).sum(0),
        "concat": lambda: mixer.proj(torch.cat(list(both), dim=-1)),
    }[merge]()
    found = mixer(x)
    assert_close(merge, found, expected.unflatten(1, (2, 3)), 1e-10)
    found.sum().backward()
    assert all(parameter.grad is not None for parameter in mixer.parameters())


def test_layers_take_turns():
    x = torch.randn(1, 3, 3, D_MODEL).double()
    for depth in range(5):
        turn = build("mamba2", order="nd_cycle", depth=depth)
        assert len(turn.mixers) == 1
        plain = build("mamba2", order=("raster", "raster_rev", "column", "column_rev")[depth % 4])
        plain.load_state_dict(turn.state_dict())
        assert torch.equal(turn(x), plain(x))


@pytest.mark.parametrize("order", [name for name in SCAN_ORDERS if name != "noncausal"])
@torch.no_grad()
def test_every_order_on_every_rectangle(order):
    mixer = build("mamba2", order=order, shared=True)
    for size in ((1, 1), (1, 4), (3, 2)):
        x = torch.randn(2, *size, D_MODEL).double()
        assert mixer(x).shape == x.shape and torch.isfinite(mixer(x)).all()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"order": "cros4"}, "did you mean 'cross4'"),
        ({"merge": "scatter"}, "disjoint"),
        ({"merge": "some"}, "unknown merge"),
        ({"order": "noncausal"}, "has no sequence"),
    ],
)
def test_mistakes_are_named(options, told):
    with pytest.raises(UserError, match=told):
        build("mamba2", **options)
