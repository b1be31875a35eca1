"""Small tensors keep their intermediates for the backward; the numbers must be those of the operator."""

import pytest
import torch

import vision_scan
from tests.vision_scan.samples import cotangents_of
from tests.vision_scan.test_ops_register import SAMPLES
from vision_scan.ops import register

DIFFERENTIABLE = [name for name in SAMPLES if not name.endswith("_update")]


def outputs_and_gradients(name: str) -> tuple[list[torch.Tensor], list[torch.Tensor], str]:
    tensors, options = SAMPLES[name](torch.float64)
    tensors = {key: t.requires_grad_() if t.is_floating_point() else t for key, t in tensors.items()}
    result = getattr(vision_scan, name)(**tensors, **options)
    outputs = list(result) if isinstance(result, tuple) else [result]
    leaves = [t for t in tensors.values() if t.requires_grad]
    grads = torch.autograd.grad(outputs, leaves, cotangents_of(outputs), allow_unused=True)
    return outputs, list(grads), repr(outputs[0].grad_fn)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_direct_gradients_are_those_of_the_registered_backward(name, monkeypatch):
    direct = outputs_and_gradients(name)
    monkeypatch.setattr(register, "KEEP_INTERMEDIATES", -1)
    registered = outputs_and_gradients(name)
    assert "vision_scan" in registered[2] and "vision_scan" not in direct[2]
    for one, other in zip([*direct[0], *direct[1]], [*registered[0], *registered[1]], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
