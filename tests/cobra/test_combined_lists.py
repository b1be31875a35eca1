"""How a scan block puts its lists together: against `OrderedMixer` around whole layers of Mamba-2."""

import pytest
import torch
from torch import Tensor, nn

from cobra.config import PRESETS
from cobra.cost import tile_work
from cobra.lm.mamba2 import Mamba2, Mamba2Config
from cobra.lm.mixer import Segments
from cobra.model import Cobra
from cobra.scan_block import ScanBlocksConfig, ScanMixer
from cobra.tokenizer import Tokenizer
from cobra.typed_config import override
from tests.tolerance import assert_close
from vision_scan import OrderedMixer
from vision_scan.errors import UserError

D_MODEL = 8
MIXER = Mamba2Config(d_state=4, headdim=4, ngroups=2, chunk_size=5)


class Layer(nn.Module):
    """A layer of Mamba-2 as a mixer of sequences."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Mamba2(MIXER, D_MODEL)

    def forward(self, x: Tensor, seq_idx: Tensor | None) -> Tensor:
        return self.layer(x, None, Segments(torch.zeros(len(x), dtype=torch.int64), seq_idx))[0]


def build(combine: str, order: str) -> ScanMixer:
    torch.manual_seed(0)
    mixer = ScanMixer(ScanBlocksConfig(order=order, combine=combine, mixer=MIXER), D_MODEL, 0).double()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return mixer


@torch.no_grad()
def wrapped(mixer: ScanMixer, combine: str, order: str) -> OrderedMixer:
    """The same map, as a layer of its own for each list."""
    twin = OrderedMixer(Layer, D_MODEL, order, merge=combine).double()
    projections = mixer.out_proj.weight.split(mixer.d_inner, dim=1)
    for k, one in enumerate(twin.mixers):
        layer = one.layer
        layer.in_proj.weight.copy_(mixer.in_proj.weight)
        layer.norm.weight.copy_(mixer.norm.weight)
        layer.conv1d.weight[:, 0].copy_(mixer.conv_weight[k])
        layer.conv1d.bias.copy_(mixer.conv_bias[k])
        for name in mixer.float32_parameters:
            getattr(layer, name).copy_(getattr(mixer, name)[k])
        layer.out_proj.weight.copy_(projections[k if combine == "concat" else 0])
    if twin.gate is not None:
        twin.gate.load_state_dict(mixer.gate.state_dict())
    if twin.proj is not None:  # what concat does is in the layers' projections
        twin.proj.weight.copy_(torch.eye(D_MODEL).repeat(1, len(twin.mixers)))
        twin.proj.bias.zero_()
    return twin


@pytest.mark.parametrize("order", ["raster", "bi2", "cross4"])
@pytest.mark.parametrize("combine", ["sum", "mean", "gated", "concat"])
def test_lists_are_combined_as_ordered_mixer_combines_them(combine, order):
    mixer, x = build(combine, order), torch.randn(2, 3, 5, D_MODEL).double()
    found = mixer(x)
    assert_close(combine, found, wrapped(mixer, combine, order)(x), 1e-10)
    found.sum().backward()
    for name, parameter in mixer.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


def test_lists_that_are_concatenated_begin_with_projections_of_their_own():
    torch.manual_seed(0)
    mixer = ScanMixer(ScanBlocksConfig(order="bi2", combine="concat", mixer=MIXER), D_MODEL, 0)
    first, second = mixer.out_proj.weight.split(mixer.d_inner, dim=1)
    assert not torch.equal(first, second)
    assert first.std().item() == pytest.approx(Mamba2(MIXER, D_MODEL).out_proj.weight.std().item(), rel=0.2)


@pytest.mark.parametrize("combine", ["gated", "concat"])
def test_a_share_of_the_channels_is_neither_weighed_nor_concatenated(combine):
    with pytest.raises(UserError, match="set lists=all, or combine=sum"):
        ScanBlocksConfig(lists="share", combine=combine)


def test_the_cost_of_combining_is_counted():
    work = {}
    for combine in ("sum", "mean", "gated", "concat"):
        with torch.device("meta"):
            model = Cobra(override(PRESETS["tiny"], "connector.combine", combine), Tokenizer.bytes())
        work[combine] = tile_work(model)["connector"]
    cells, d_model, d_inner, lists = 64, 128, 128, 4
    assert work["sum"] == work["mean"]
    assert work["gated"].weights - work["sum"].weights == cells * 2 * d_model * lists
    assert work["concat"].weights - work["sum"].weights == cells * 2 * d_model * d_inner * (lists - 1)
