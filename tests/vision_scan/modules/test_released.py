import copy

import pytest
import torch
from torch import Tensor, nn

from vision_scan.modules import SS2DConfig, VSSBlock, adapt_released

SMALL = SS2DConfig(d_state=2, dt_rank=3)


def stack() -> nn.Module:
    return nn.Sequential(VSSBlock(SMALL, 6), nn.Sequential(VSSBlock(SMALL, 6, "bi2")))


def as_once(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Under the names and in the shapes of the first release: lists with an axis of their own."""
    old = {}
    for name, tensor in tensors.items():
        K = 2 if name.startswith("1.") else 4
        name = name.replace("norm.", "ln_1.") if ".norm." in name else name.replace(".op.", ".self_attention.")
        for part in ("x_proj", "dt_projs"):
            if name.endswith(f"{part}.weight"):
                name, tensor = name.replace(f"{part}.weight", f"{part}_weight"), tensor.unflatten(0, (K, -1))
        old[name] = tensor
    return old


def as_convolutions(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Matrices as convolutions of one cell."""
    return {
        name: t[:, :, None, None] if t.dim() == 2 and "A_logs" not in name and "bias" not in name else t
        for name, t in tensors.items()
    }


@pytest.mark.parametrize("change", [as_once, as_convolutions, dict], ids=lambda f: f.__name__)
def test_older_names_and_shapes_are_loaded(change):
    own, other = stack(), stack()
    given = change(other.state_dict())
    before = set(given)
    own.load_state_dict(given)
    assert all(torch.equal(own.state_dict()[name], t) for name, t in other.state_dict().items())
    assert set(given) == before  # the caller's mapping is left alone
    adapted = adapt_released(own, given)
    assert {name: t.shape for name, t in adapted.items()} == {n: t.shape for n, t in other.state_dict().items()}


def test_the_old_names_are_those_of_the_release():
    old = as_once(stack().state_dict())
    assert old["0.self_attention.x_proj_weight"].shape == (4, 3 + 2 * 2, 12)
    assert old["0.self_attention.dt_projs_weight"].shape == (4, 12, 3)
    assert "0.ln_1.weight" in old and "0.norm2.weight" in old


def test_a_copy_loads_like_its_original():
    own, other = stack(), stack()
    copied = copy.deepcopy(own)
    before = own[0].op.A_logs.clone()
    other[0].op.A_logs.data.add_(1)
    copied.load_state_dict(as_once(other.state_dict()))
    assert torch.equal(copied[0].op.A_logs, other[0].op.A_logs)
    assert torch.equal(own[0].op.A_logs, before)


@pytest.mark.parametrize(
    ("message", "name", "tensor"),
    [
        ("Missing key.*x_proj.weight", "0.self_attention.x_proj_weight", None),
        ("Unexpected key.*0.op.gate", "0.self_attention.gate", torch.ones(2)),
        ("size mismatch for 0.op.A_logs", "0.self_attention.A_logs", torch.ones(48, 3)),
        ("size mismatch for 0.op.x_proj", "0.self_attention.x_proj_weight", torch.ones(2, 7, 12)),
    ],
)
def test_what_does_not_fit_is_refused(message, name, tensor):
    old = as_once(stack().state_dict())
    changed = {key: t for key, t in {**old, name: tensor}.items() if t is not None}
    with pytest.raises(RuntimeError, match=f"(?s){message}"):
        stack().load_state_dict(changed)
