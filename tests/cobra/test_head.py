"""The loss of the head in pieces against torch's cross entropy of all logits."""

import pytest
import torch
from torch import nn

from cobra.lm import head
from cobra.lm.head import LMHead

VOCAB = 97


def gradients(loss, *leaves):
    return torch.autograd.grad(loss, leaves)


def plain(lm_head, hidden, targets):
    logits = nn.functional.linear(hidden, lm_head.weight).flatten(0, -2)
    return nn.functional.cross_entropy(logits, targets.flatten(), reduction="sum")


@pytest.fixture
def case():
    torch.manual_seed(0)
    lm_head = LMHead(24, VOCAB).double()
    hidden = torch.randn(3, 17, 24, dtype=torch.float64, requires_grad=True)
    return lm_head, hidden, torch.randint(VOCAB, (3, 17))


@pytest.mark.parametrize("rows", [1, 5, 16, 51, 1000])
def test_pieces_of_any_size_give_the_loss_and_its_gradients(case, rows, monkeypatch):
    lm_head, hidden, targets = case
    monkeypatch.setattr(head, "PIECE_ELEMENTS", rows * VOCAB + 1)
    ours, expected = lm_head(hidden, targets), plain(lm_head, hidden, targets)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for one, other in zip(
        gradients(0.3 * ours, hidden, lm_head.weight),
        gradients(0.3 * expected, hidden, lm_head.weight),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [1, 16, 1000])
def test_losses_one_by_one_may_count_differently(case, rows, monkeypatch):
    lm_head, hidden, targets = case
    monkeypatch.setattr(head, "PIECE_ELEMENTS", rows * VOCAB + 1)
    counts = torch.randn(3, 17, dtype=torch.float64)
    ours = lm_head(hidden, targets, each=True)
    logits = nn.functional.linear(hidden, lm_head.weight)
    expected = nn.functional.cross_entropy(logits.movedim(-1, 1), targets, reduction="none")
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for one, other in zip(
        gradients((counts * ours).sum(), hidden, lm_head.weight),
        gradients((counts * expected).sum(), hidden, lm_head.weight),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)
    assert lm_head(hidden[:, :0], targets[:, :0], each=True).shape == (3, 0)


def test_logits_that_would_overflow(case):
    lm_head, hidden, targets = case
    ours = lm_head(1e4 * hidden, targets)
    torch.testing.assert_close(ours, plain(lm_head, 1e4 * hidden, targets), rtol=1e-12, atol=0)


def test_nothing_supervised(case):
    lm_head, hidden, targets = case
    loss = lm_head(hidden[:, :0], targets[:, :0])
    assert loss == 0
    assert not gradients(loss, lm_head.weight)[0].any()


def test_without_gradients_none_are_made(case, monkeypatch):
    lm_head, hidden, targets = case
    expected = plain(lm_head, hidden, targets).detach()
    monkeypatch.setattr(torch.Tensor, "addmm_", None)
    with torch.no_grad():
        torch.testing.assert_close(lm_head(hidden, targets), expected)
    lm_head.weight.requires_grad_(False)
    lm_head(hidden, targets).backward()
    assert lm_head.weight.grad is None and hidden.grad.any()


def test_a_second_backward_pass_is_refused(case):
    lm_head, hidden, targets = case
    loss = lm_head(hidden, targets)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_within_twice_the_error_of_plain_torch(case, dtype):
    lm_head, hidden, targets = case
    exact = gradients(plain(lm_head, hidden, targets), hidden, lm_head.weight)
    half, inputs = LMHead(24, VOCAB).to(dtype), hidden.detach().to(dtype).requires_grad_()
    half.weight.data.copy_(lm_head.weight)
    theirs = gradients(plain(half, inputs, targets).float(), inputs, half.weight)
    ours = gradients(half(inputs, targets), inputs, half.weight)
    for one, other, right in zip(ours, theirs, exact, strict=True):
        assert one.dtype == dtype
        assert (one - right).norm() <= 2 * (other - right).norm()


def test_autocast_keeps_float32_gradients(case):
    lm_head, hidden, targets = case
    exact = plain(lm_head, hidden, targets)
    wide = LMHead(24, VOCAB)
    wide.weight.data.copy_(lm_head.weight)
    with torch.autocast("cpu", torch.bfloat16):
        loss = wide(hidden.float(), targets)
    loss.backward()
    assert loss.dtype == wide.weight.grad.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=2e-2, atol=0)


@pytest.fixture
def teacher():
    return 3 * torch.randn(51, VOCAB, dtype=torch.float64)


@pytest.mark.parametrize("rows", [1, 5, 51, 1000])
def test_divergence_from_a_teacher_in_pieces_of_any_size(case, teacher, rows, monkeypatch):
    lm_head, hidden, _ = case
    monkeypatch.setattr(head, "PIECE_ELEMENTS", rows * VOCAB + 1)
    flat = hidden.flatten(0, 1)
    ours = lm_head(flat, lambda taken: teacher[taken])
    own = nn.functional.linear(flat, lm_head.weight).log_softmax(-1)
    expected = nn.functional.kl_div(own, teacher.log_softmax(-1), reduction="sum", log_target=True)
    torch.testing.assert_close(ours, expected, rtol=1e-12, atol=0)
    for one, other in zip(
        gradients(0.3 * ours, hidden, lm_head.weight),
        gradients(0.3 * expected, hidden, lm_head.weight),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def test_no_divergence_from_a_teacher_that_says_the_same(case):
    lm_head, hidden, _ = case
    flat = hidden.flatten(0, 1)
    logits = nn.functional.linear(flat, lm_head.weight).detach()
    loss = lm_head(flat, lambda taken: logits[taken])
    assert abs(loss.item()) < 1e-10
    assert all(gradient.abs().max() < 1e-13 for gradient in gradients(loss, hidden, lm_head.weight))
