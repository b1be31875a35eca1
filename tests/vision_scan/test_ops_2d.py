"""The grid forms against an explicit gather, one scan of one dimension per list, and a scatter."""

import pytest
import torch

import vision_scan
from tests.tolerance import assert_as_good_as, assert_close
from tests.vision_scan.samples import (
    cotangents_of,
    sample_causal_conv1d_2d,
    sample_selective_scan_2d,
    sample_ssd_2d,
    with_gradients,
)
from vision_scan import ScanOrder, UserError

pytestmark = pytest.mark.usefixtures("poison", "registered")

ORDERS = [
    "raster",
    "raster_rev",
    "column",
    "cross4",
    "bi2",
    "snake_row_tl",
    "snake_col_br",
    "hilbert",
    "local",
]
GRIDS = [(2, 3), (3, 2), (1, 5), (5, 7)]
SAMPLERS = {"ssd": sample_ssd_2d, "selective_scan": sample_selective_scan_2d}
every_scan = pytest.mark.parametrize("name", SAMPLERS)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: f"{grid[0]}x{grid[1]}")


def ragged() -> ScanOrder:
    """Disjoint lists of unlike length on 2 x 3, with pads in front, between and behind."""
    return ScanOrder([[-1, 5, 0, -1, 3], [2, -1, 4, 1]], 2, 3, merge="scatter", name="ragged")


def padded() -> ScanOrder:
    """Two lists over all cells of 2 x 3, one of them with pads."""
    return ScanOrder([[0, 1, 2, 3, 4, 5], [5, -1, 4, 0, -1, -1, 3, 1, 2, -1]], 2, 3, name="padded")


def sequence(t, k, path, cells_axis, has_lists):
    """What list k reads of a grid, (batch, [K,] height, width, ...) -> (batch, seqlen, ...)."""
    t = t[:, k] if has_lists else t
    return t.flatten(cells_axis, cells_axis + 1).index_select(cells_axis, path)


def spread(y, path, order):
    """(batch, seqlen, ...) back to (batch, height, width, ...), zero where the list does not go."""
    grid = y.new_zeros((y.shape[0], order.height * order.width, *y.shape[2:])).index_copy(
        1, path, y
    )
    return grid.unflatten(1, (order.height, order.width))


def merged(grids, merge, order):
    if merge == "concat":
        return torch.stack(grids, dim=1)
    visits = torch.stack([(order.inverse[k] >= 0).sum() for k in range(len(order))]).sum()
    lists_per_cell = visits / (order.height * order.width)
    total = sum(grids)
    return total / lists_per_cell if merge == "mean" else total


def explicit_scan(name, order, merge, tensors, options):
    """A pad leaves the state as it is, so the explicit form leaves pads out."""
    grids = []
    for k, full_path in enumerate(order):
        path = full_path[full_path >= 0].to(torch.get_default_device())
        first, *rest = tensors
        per_list = tensors[first].dim() == tensors["dt"].dim() + (name == "ssd")
        part = {first: sequence(tensors[first], k, path, 1, per_list)}
        for key in rest:
            is_grid = key in ("dt", "B", "C")
            part[key] = sequence(tensors[key], k, path, 1, True) if is_grid else tensors[key][k]
        if name == "selective_scan":
            part = {
                key: t.movedim(1, -1) if key in ("u", "dt", "B", "C") else t
                for key, t in part.items()
            }
            y = vision_scan.selective_scan(**part, **options).movedim(-1, 1)
        else:
            y = vision_scan.ssd(**part, **options)
        grids.append(spread(y, path, order))
    return merged(grids, merge, order)


def check_scan(name, order, sample, merge=None):
    """Values and gradients of the operator under `merge`, None: the order's own."""
    grid_op = {"ssd": vision_scan.ssd_2d, "selective_scan": vision_scan.selective_scan_2d}[name]

    def run(**inputs):
        return (grid_op(**inputs, order=order, merge=merge),)

    def explicit(**inputs):
        tensors = {key: value for key, value in inputs.items() if isinstance(value, torch.Tensor)}
        flags = {key: value for key, value in inputs.items() if key not in tensors}
        return (explicit_scan(name, order, merge or order.merge, tensors, flags),)

    cotangents = cotangents_of(explicit(**sample[0], **sample[1]))
    expected, expected_grads = with_gradients(explicit, sample, cotangents)
    found, found_grads = with_gradients(run, sample, cotangents)
    assert_close("y", found[0], expected[0])
    for key, grad in expected_grads.items():
        assert_close(f"gradient of {key}", found_grads[key], grad)


@every_grid
@pytest.mark.parametrize("order_name", ORDERS)
@every_scan
def test_scan_equals_explicit_gather(name, order_name, grid):
    order = vision_scan.order(order_name, *grid)
    check_scan(name, order, SAMPLERS[name](grid=grid, lists=len(order)))


@pytest.mark.parametrize("per_list", [False, True], ids=["one-x", "x-per-list"])
@pytest.mark.parametrize("merge", ["sum", "mean", "concat"])
@every_scan
def test_merges_and_input_per_list(name, merge, per_list):
    order = vision_scan.order("cross4", 3, 2)
    check_scan(name, order, SAMPLERS[name](grid=(3, 2), per_list=per_list), merge)


OPTIONS = {
    "groups": {"batch": 3, "ngroups": 2},
    "bare": {"batch": 1, "D": False, "dt_bias": False, "dt_softplus": False},
    "slices": {"layout": "slice"},
    "transposed": {"layout": "transposed", "per_list": True},
}


@pytest.mark.parametrize("sizes", OPTIONS.values(), ids=OPTIONS)
@every_scan
def test_options_and_layouts(name, sizes):
    check_scan(name, vision_scan.order("cross4", 2, 3), SAMPLERS[name](**sizes))


def test_ssd_limits():
    check_scan("ssd", vision_scan.order("bi2", 2, 3), sample_ssd_2d(lists=2, dt_limit=(0.3, 0.5)))


@pytest.mark.parametrize("per_list", [False, True], ids=["one-x", "x-per-list"])
@pytest.mark.parametrize("merge", [None, "sum", "concat"])
@pytest.mark.parametrize("order", [ragged(), padded()], ids=lambda order: order.name)
@every_scan
def test_orders_with_pads(name, order, merge, per_list):
    check_scan(name, order, SAMPLERS[name](lists=2, per_list=per_list), merge)


@pytest.mark.parametrize("merge", ["sum", "mean", "scatter", "concat"])
@pytest.mark.parametrize("order", [ragged(), padded()], ids=lambda order: order.name)
@every_scan
def test_merge_means_what_it_means_in_merge_2d(name, order, merge):
    """The operator's merge = its concat, read and merged by merge_2d; or both refuse."""
    tensors, options = SAMPLERS[name](lists=2)
    op = {"ssd": vision_scan.ssd_2d, "selective_scan": vision_scan.selective_scan_2d}[name]
    apart = op(**tensors, **options, order=order, merge="concat").flatten(2, 3)
    lists = torch.arange(2)[:, None]
    read = apart[:, lists, order.index.clamp(min=0)]
    try:
        expected = vision_scan.merge_2d(read, order, merge)
    except UserError:
        with pytest.raises(UserError):
            op(**tensors, **options, order=order, merge=merge)
        return
    assert_close(merge, op(**tensors, **options, order=order, merge=merge), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_scan
def test_low_precision_is_as_good_as_one_dimension(name, dtype):
    order = vision_scan.order("cross4", 5, 7)
    tensors, options = SAMPLERS[name](grid=(5, 7), dtype=dtype)
    op = {"ssd": vision_scan.ssd_2d, "selective_scan": vision_scan.selective_scan_2d}[name]
    exact = {key: t.double() for key, t in tensors.items()}
    true = explicit_scan(name, order, "concat", exact, options)
    plain = explicit_scan(name, order, "concat", tensors, options)
    found = op(**tensors, **options, order=order, merge="concat")
    assert_as_good_as("apart", found, plain, true)
    summed, plain_sum = op(**tensors, **options, order=order), plain.sum(1)
    assert_as_good_as("sum", summed, plain_sum, true.sum(1))


@pytest.mark.parametrize("sizes", [{}, *OPTIONS.values()], ids=["plain", *OPTIONS])
def test_noncausal_ssd_is_one_sum_that_every_cell_reads(sizes):
    tensors, options = sample_ssd_2d(**{**sizes, "lists": 1, "dt_limit": (0.05, 2.0)})
    tensors = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    found = vision_scan.ssd_2d(**tensors, **options, order="noncausal")
    dt = tensors["dt"][:, 0]
    if "dt_bias" in tensors:
        dt = dt + tensors["dt_bias"][0]
    dt = (torch.nn.functional.softplus(dt) if options["dt_softplus"] else dt).clamp(0.05, 2.0)
    x, B, C = (tensors[name] if tensors[name].dim() == 5 else tensors[name][:, 0] for name in ("x", "B", "C"))
    heads_per_group = x.shape[-2] // B.shape[-2]
    for head in range(x.shape[-2]):
        group = head // heads_per_group
        weighted = (dt[..., head] * -tensors["A"][0, head])[..., None] * x[..., head, :]
        state = torch.einsum("byxp,byxn->bpn", weighted, B[..., group, :])
        y = torch.einsum("bpn,byxn->byxp", state, C[..., group, :])
        if "D" in tensors:
            y = y + tensors["D"][0, head] * x[..., head, :]
        assert_close(f"head {head}", found[..., head, :], y)
    found.sum().backward()
    assert all(tensor.grad is not None for tensor in tensors.values())
    whole = vision_scan.ssd_2d(**tensors, **options, order="noncausal", merge="concat")
    assert torch.equal(whole[:, 0], found)


def test_noncausal_ssd_does_not_know_where_a_cell_stands():
    tensors, options = sample_ssd_2d(lists=1, grid=(3, 4))
    turned = {name: t.flip(-3) if name in ("B", "C") else t for name, t in tensors.items()}
    turned["x"], turned["dt"] = tensors["x"].flip(-3), tensors["dt"].flip(-2)
    found = vision_scan.ssd_2d(**turned, **options, order="noncausal")
    assert_close("flipped", found.flip(-3), vision_scan.ssd_2d(**tensors, **options, order="noncausal"))


def test_other_operators_refuse_an_order_without_a_sequence():
    tensors, options = sample_selective_scan_2d(lists=1)
    with pytest.raises(UserError, match=r"selective_scan_2d reads cells one after the other.* take ssd_2d"):
        vision_scan.selective_scan_2d(**tensors, **options, order="noncausal")
    with pytest.raises(UserError, match="causal_conv1d_2d reads cells"):
        vision_scan.causal_conv1d_2d(torch.randn(1, 2, 3, 4), torch.randn(4, 3), order="noncausal")


def explicit_conv(order, tensors, activation):
    x, weight, bias = tensors["x"], tensors["weight"], tensors.get("bias")
    grids = []
    for k, full_path in enumerate(order):
        path = full_path[full_path >= 0].to(torch.get_default_device())
        y = vision_scan.causal_conv1d(
            sequence(x, k, path, 1, x.dim() == 5).movedim(1, -1),
            weight[k] if weight.dim() == 3 else weight,
            bias[k] if bias is not None and bias.dim() == 2 else bias,
            activation,
        )
        grids.append(spread(y.movedim(-1, 1), path, order))
    return torch.stack(grids, dim=1)


def check_conv(order, sample):
    def run(**inputs):
        return (vision_scan.causal_conv1d_2d(**inputs, order=order),)

    def explicit(activation, **tensors):
        return (explicit_conv(order, tensors, activation),)

    cotangents = cotangents_of(explicit(**sample[0], **sample[1]))
    expected, expected_grads = with_gradients(explicit, sample, cotangents)
    found, found_grads = with_gradients(run, sample, cotangents)
    assert_close("y", found[0], expected[0])
    for key, grad in expected_grads.items():
        assert_close(f"gradient of {key}", found_grads[key], grad)


@every_grid
@pytest.mark.parametrize("order_name", ORDERS)
def test_conv_equals_explicit_gather(order_name, grid):
    order = vision_scan.order(order_name, *grid)
    check_conv(order, sample_causal_conv1d_2d(grid=grid, lists=len(order)))


CONV_OPTIONS = {
    "x-per-list": {"per_list": True},
    "weight-per-list": {"per_list_weight": True, "per_list": True, "activation": None},
    "no-bias": {"batch": 3, "bias": False, "kernel": 1},
    "slices": {"layout": "slice", "per_list_weight": True},
    "transposed": {"layout": "transposed", "per_list": True},
}


@pytest.mark.parametrize(
    "order", ["cross4", ragged(), padded()], ids=["cross4", "ragged", "padded"]
)
@pytest.mark.parametrize("sizes", CONV_OPTIONS.values(), ids=CONV_OPTIONS)
def test_conv_options_layouts_and_pads(sizes, order):
    order = vision_scan.order(order, 2, 3) if isinstance(order, str) else order
    check_conv(order, sample_causal_conv1d_2d(lists=len(order), **sizes))


def test_an_order_by_name_or_as_an_object():
    tensors, options = sample_ssd_2d()
    by_name = vision_scan.ssd_2d(**tensors, **options, order="cross4")
    by_object = vision_scan.ssd_2d(**tensors, **options, order=vision_scan.order("cross4", 2, 3))
    assert torch.equal(by_name, by_object) and torch.equal(
        by_name, vision_scan.ssd_2d(**tensors, **options)
    )


def test_refusals():
    tensors, options = sample_ssd_2d()
    with pytest.raises(UserError, match="gated"):
        vision_scan.ssd_2d(**tensors, **options, merge="gated")
    with pytest.raises(UserError, match=r"cros4.*cross4"):
        vision_scan.ssd_2d(**tensors, **options, order="cros4")
    with pytest.raises(ValueError, match=r"3 x 2 grid.*2 x 3"):
        vision_scan.ssd_2d(**tensors, **options, order=vision_scan.order("cross4", 3, 2))
    with pytest.raises(ValueError, match=r"\(2, 1, 2, 3, 2\).*\(2, 4, 2, 3, 2\)"):
        vision_scan.ssd_2d(**tensors, **options, order="raster")
