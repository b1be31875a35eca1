"""Reading a grid through an order and writing it back: identity, gradients, merges, pads."""

from __future__ import annotations

import pytest
import torch

from vision_scan.errors import UserError
from vision_scan.orders import SCAN_ORDERS, ScanOrder, order
from vision_scan.scan import merge_2d, scan_2d

GRIDS = [(1, 1), (1, 7), (5, 1), (3, 4), (2, 3), (14, 14), (27, 27), (5, 7)]
# Disjoint, uneven lists with a pad in the middle, and one without a single cell.
PATCHY = ScanOrder([[4, -1, 0], [5, 2], [1, 3], []], 2, 3, merge="scatter", name="patchy")

every_order = pytest.mark.parametrize("name", SCAN_ORDERS)
every_grid = pytest.mark.parametrize("size", GRIDS, ids=lambda size: f"{size[0]}x{size[1]}")


def _random(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=dtype)


@every_order
@every_grid
def test_scan_reads_and_merge_restores(name, size):
    x, o = _random(2, *size, 3, dtype=torch.float32), order(name, *size)
    y = scan_2d(x, name)
    for k, path in enumerate(o):
        read = x.flatten(1, 2)[:, path.clamp(min=0)]
        assert torch.equal(y[:, k, : len(path)], read.masked_fill((path < 0)[:, None], 0))
    kept = merge_2d(y, o, "concat")
    assert kept.shape == (2, len(o), *size, 3) and torch.equal(kept.sum(1), merge_2d(y, o, "sum"))
    torch.testing.assert_close(merge_2d(y, o, "mean"), x)


@every_order
@pytest.mark.parametrize("size", [(3, 4), (5, 1), (2, 3)])
def test_gradients_are_the_upstream_permuted(name, size):
    o = order(name, *size)
    x = _random(2, *size, 3).requires_grad_()
    upstream = _random(2, len(o), o.seqlen, 3)
    (grad,) = torch.autograd.grad(scan_2d(x, o), x, upstream)
    expected = torch.zeros_like(x).flatten(1, 2)
    for k, path in enumerate(o):
        real = path >= 0
        expected.index_add_(1, path[real], upstream[:, k, : len(path)][:, real])
    torch.testing.assert_close(grad, expected.view_as(x))

    y, upstream = upstream.requires_grad_(), x.detach()
    (grad,) = torch.autograd.grad(merge_2d(y, o, "sum"), y, upstream)
    assert torch.equal(grad, scan_2d(upstream, o))


@pytest.mark.parametrize("o", [order("cross4", 2, 3), PATCHY], ids=["cross4", "patchy"])
def test_gradgradcheck(o):
    def there_and_back(x, gate):
        return merge_2d(scan_2d(x, o) ** 3, o, "gated", gate)

    x = _random(1, 2, 3, 2).requires_grad_()
    gate = _random(1, len(o), 2, 3).requires_grad_()
    assert torch.autograd.gradcheck(there_and_back, (x, gate))
    assert torch.autograd.gradgradcheck(there_and_back, (x, gate))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rest", [(), (4,), (2, 3)], ids=str)
def test_any_dtype_and_further_axes(dtype, rest):
    x = _random(3, 5, 7, *rest, dtype=torch.float32).to(dtype)
    o = order("hilbert", 5, 7)
    y = scan_2d(x, o)
    assert y.dtype == dtype and y.shape == (3, 1, 35, *rest)
    for merge in ("sum", "mean", "scatter"):
        assert torch.equal(merge_2d(y, o, merge), x)
    gate = torch.ones(3, 1, 5, 7)
    assert torch.equal(merge_2d(y, o, "gated", gate), x)


def test_non_contiguous_input():
    x = _random(2, 4, 3, 5).permute(0, 2, 3, 1)
    assert torch.equal(scan_2d(x, "rot4"), scan_2d(x.contiguous(), "rot4"))


def test_merges_of_results_that_differ_between_lists():
    o = order("bi2", 1, 3)
    y = torch.tensor([[[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]])
    assert merge_2d(y, o).tolist() == [[[31.0, 22.0, 13.0]]]
    assert merge_2d(y, o, "mean").tolist() == [[[15.5, 11.0, 6.5]]]
    assert merge_2d(y, o, "concat").tolist() == [[[[1.0, 2.0, 3.0]], [[30.0, 20.0, 10.0]]]]
    per_list = torch.tensor([1.0, 0.5]).view(2, 1, 1)
    assert merge_2d(y, o, "gated", per_list).tolist() == [[[16.0, 12.0, 8.0]]]
    per_cell = torch.tensor([[[[1.0, 0.0, 0.0]], [[0.0, 1.0, 2.0]]]])
    assert merge_2d(y, o, "gated", per_cell).tolist() == [[[1.0, 20.0, 20.0]]]


def test_gate_may_weigh_channels():
    o = order("cross4", 2, 3)
    y, gate = _random(2, 4, 6, 5), _random(2, 4, 2, 3, 5)
    expected = (merge_2d(y, o, "concat") * gate).sum(1)
    assert torch.equal(merge_2d(y, o, "gated", gate), expected)
    per_cell = merge_2d(y, o, "gated", gate[..., 0])
    assert torch.equal(per_cell, merge_2d(y, o, "gated", gate[..., :1]))


def test_order_names_its_merge():
    o = ScanOrder([[0, 1], [1, 0]], 1, 2, merge="mean")
    x = _random(1, 1, 2)
    assert torch.equal(merge_2d(scan_2d(x, o), o), x)


def test_pads_read_zeros_and_write_nowhere():
    x = _random(2, 2, 3, 4)
    x[:, 0, 0] = torch.inf  # pads gather cell 0 before they are blanked: it must not leak
    y = scan_2d(x, PATCHY)
    assert y.shape == (2, 4, 3, 4)
    pads = PATCHY.index < 0
    assert (y[:, pads] == 0).all()
    y = y.masked_fill(pads[None, :, :, None], torch.nan).requires_grad_()
    for merge in ("scatter", "sum", "mean"):
        assert torch.equal(merge_2d(y, PATCHY, merge), x)
    merge_2d(y, PATCHY).backward(torch.ones_like(x))
    assert torch.equal(y.grad, (~pads)[None, :, :, None].expand_as(y).double())
    kept = merge_2d(y, PATCHY, "concat")
    assert (kept.flatten(2, 3)[:, PATCHY.inverse < 0] == 0).all()


def test_pads_inside_permutations():
    o = ScanOrder([[0, -1, 1, 2], [2, 1, -1, 0]], 1, 3)
    x = _random(2, 1, 3, 2)
    assert torch.equal(merge_2d(scan_2d(x, o), o), 2 * x)


def test_compiles_whole_with_an_order_made_outside():
    o = order("cross4", 3, 4)

    def double(x):
        return merge_2d(scan_2d(x, o) * 2, o, "mean")

    x = _random(2, 3, 4, 5).requires_grad_()
    y = torch.compile(double, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, 2 * x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.full_like(x, 2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y, o: scan_2d(x[0, 0, 0], o), r"takes \(batch, height, width, \.\.\.\)"),
        (lambda x, y, o: scan_2d(x.transpose(1, 2), o), "its own grid .* not 3x2"),
        (lambda x, y, o: scan_2d(x, "crss4"), "did you mean 'cross4'"),
        (lambda x, y, o: merge_2d(y, "cross4"), "takes a ScanOrder, not 'cross4'"),
        (lambda x, y, o: merge_2d(y[:, :3], o), r"merges \(batch, 4, 6, .*not \(2, 3, 6, 5\)"),
        (lambda x, y, o: merge_2d(y, o, "max"), "unknown merge 'max'"),
        (lambda x, y, o: merge_2d(y, o, "scatter"), "needs disjoint lists"),
        (lambda x, y, o: merge_2d(y, o, "gated"), "needs a gate"),
        (lambda x, y, o: merge_2d(y, o, "sum", torch.ones(4, 1, 1)), "takes no gate"),
        (lambda x, y, o: merge_2d(y, o, "gated", torch.ones(2, 4, 3, 2)), "does not broadcast"),
        (lambda x, y, o: merge_2d(y[:1], o, "gated", torch.ones(2, 4, 2, 3)), "not broadcast"),
    ],
)
def test_bad_input_is_refused(call, message):
    x, o = _random(2, 2, 3, 5), order("cross4", 2, 3)
    with pytest.raises(UserError, match=message):
        call(x, scan_2d(x, o), o)
