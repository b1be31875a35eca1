"""Muon against torch's, which does the same in bfloat16, and against singular values."""

import copy

import pytest
import torch
from torch import nn

from tests.tolerance import rms_ratio
from train.muon import COEFFICIENTS, ITERATIONS, Muon, orthogonalize

SHAPES = [(24, 40), (40, 24), (24, 40), (1, 7), (33, 33)]


def matrices() -> list[nn.Parameter]:
    noise = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=noise)) for shape in SHAPES]


def test_steps_are_those_of_torch_to_its_precision():
    ours = matrices()
    start, theirs = copy.deepcopy(ours), copy.deepcopy(ours)
    settings = {"lr": 3e-2, "momentum": 0.9, "weight_decay": 0.2}
    pairs = [
        (ours, Muon(ours, **settings)),
        (theirs, torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **settings)),
    ]
    for parameters, optimizer in pairs:
        noise = torch.Generator().manual_seed(1)
        for _ in range(4):
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=noise)
            optimizer.step()
    for one, other, begun in zip(ours, theirs, start, strict=True):
        assert rms_ratio(one - begun, other - begun) < 2e-2


@pytest.mark.parametrize("shape", [(3, 24, 40), (2, 40, 24), (1, 16, 16), (2, 1, 9)])
def test_singular_values_come_near_one_and_vectors_stay(shape):
    noise = torch.Generator().manual_seed(2)
    given = torch.randn(shape, generator=noise)
    found = orthogonalize(given)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3
    u, _, v = torch.linalg.svd(given.double(), full_matrices=False)
    rotated = u.mT @ found.double() @ v.mT
    torch.testing.assert_close(rotated, torch.diag_embed(rotated.diagonal(dim1=1, dim2=2)), atol=1e-3, rtol=0)


@pytest.mark.parametrize("shape", [(24, 40), (20, 90), (90, 20)])
def test_small_singular_values_are_those_of_the_iteration(shape):
    """Down to a millionth of the largest, whichever way the products are taken."""
    noise = torch.Generator().manual_seed(4)
    u, _, v = torch.linalg.svd(torch.randn(1, *shape, generator=noise, dtype=torch.float64), full_matrices=False)
    values = torch.logspace(0, -6, min(shape), dtype=torch.float64)
    found = u.mT @ orthogonalize((u * values @ v).float()).double() @ v.mT
    expected = values / values.norm()
    for _ in range(ITERATIONS):
        expected = sum(k * expected**power for k, power in zip(COEFFICIENTS, (1, 3, 5), strict=True))
    torch.testing.assert_close(found[0], torch.diag(expected), atol=3e-3, rtol=0)


def test_a_matrix_alone_is_what_it_is_beside_others():
    together = torch.randn(3, 20, 30)
    torch.testing.assert_close(
        orthogonalize(together)[1:2], orthogonalize(together[1:2]), rtol=1e-4, atol=1e-5
    )


def test_a_kernel_steps_as_the_matrix_from_all_its_places():
    noise = torch.Generator().manual_seed(3)
    value, gradient = torch.randn(2, 6, 4, 3, 3, generator=noise)
    kernel, matrix = nn.Parameter(value.clone()), nn.Parameter(value.flatten(1).clone())
    kernel.grad, matrix.grad = gradient, gradient.flatten(1)
    Muon([kernel], lr=0.1).step()
    Muon([matrix], lr=0.1).step()
    assert kernel.shape == value.shape
    torch.testing.assert_close(kernel.flatten(1), matrix, rtol=1e-6, atol=1e-7)


def test_parameters_without_gradient_are_left_alone():
    parameters = matrices()
    before = copy.deepcopy(parameters)
    parameters[0].grad = torch.ones(SHAPES[0])
    Muon(parameters, lr=0.1).step()
    assert not torch.equal(parameters[0], before[0])
    assert all(torch.equal(a, b) for a, b in zip(parameters[1:], before[1:], strict=True))
