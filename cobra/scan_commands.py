"""`cobra scan`: list, print and draw scan orders."""

import argparse
from collections.abc import Callable
from typing import TYPE_CHECKING

from vision_scan.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

D_MODEL = 32  # channels of the blocks whose receptive fields are looked at


def add_scan_commands(commands, add: Callable[..., argparse.ArgumentParser]) -> None:
    """Adds `scan` to the commands of a parser.

    Args:
        commands: the subparsers action of the parser.
        add: (name, run, does, example, inside) -> the parser of a command, see cli.py.
    """
    scan = commands.add_parser("scan", help="list and draw scan orders", epilog="example: cobra scan list")
    orders = scan.add_subparsers(title="commands", required=True, metavar="COMMAND")
    add("list", run_scan_list, "list the scan orders", "cobra scan list", orders)
    show = add(
        "show",
        run_scan_show,
        "print in which order the cells of a grid are read, or draw it",
        "cobra scan show hilbert --grid 6x9 --png hilbert.png",
        orders,
    )
    show.add_argument("order", metavar="ORDER", help="its name, options in brackets: random(seed=1)")
    compare = add(
        "compare",
        run_scan_compare,
        "print how far orders take neighbours apart, or draw orders below one another",
        "cobra scan compare raster hilbert 'local(window=3)' --grid 9x9",
        orders,
    )
    compare.add_argument("orders", metavar="ORDER", nargs="*", help="default: all")
    receptive = add(
        "receptive",
        run_scan_receptive,
        "print how much of a grid a cell sees through scans along orders, or draw it",
        "cobra scan receptive raster cross4 hilbert --grid 6x9 --png fields.png",
        orders,
    )
    receptive.add_argument("orders", metavar="ORDER", nargs="+", help="as of show; those with a sequence")
    receptive.add_argument("--cell", metavar="R,C", help="row and column, from 0 (default: the centre)")
    about = "blocks behind one another, each with its turn of an order (default: 1)"
    receptive.add_argument("--layers", type=int, default=1, metavar="N", help=about)
    receptive.add_argument("--samples", type=int, default=32, metavar="N", help="random inputs (default: 32)")
    receptive.add_argument("--seed", type=int, default=0, metavar="S", help="of weights and inputs (default: 0)")
    for command in (show, compare, receptive):
        command.add_argument("--grid", default="8x8", metavar="HxW", help="rows x columns (default: 8x8)")
        command.add_argument("--png", metavar="FILE", help="draw into this file")


def run_scan_list(arguments: argparse.Namespace) -> None:
    """`cobra scan list`"""
    from vision_scan import SCAN_ORDERS

    for name, order in SCAN_ORDERS.items():
        about = (order.__doc__ or "").strip().partition("\n")[0]
        print(f"{name:<16} {about}".rstrip())


def run_scan_show(arguments: argparse.Namespace) -> None:
    """`cobra scan show`"""
    import vision_scan

    order = vision_scan.order(arguments.order, *_read_grid(arguments.grid))
    if arguments.png:
        from vision_scan.draw import draw_order

        draw_order(order, arguments.png)
        print(arguments.png)
        return
    digits = len(str(order.height * order.width - 1))
    for index, ranks in enumerate(order.inverse.unflatten(1, (order.height, order.width)).tolist()):
        print(f"list {index}: the position of each cell in the sequence")
        for row in ranks:
            print(" ".join(f"{rank if rank >= 0 else '.':>{digits}}" for rank in row))


def run_scan_compare(arguments: argparse.Namespace) -> None:
    """`cobra scan compare`"""
    import vision_scan

    grid = _read_grid(arguments.grid)
    orders = [vision_scan.order(name, *grid) for name in arguments.orders or vision_scan.SCAN_ORDERS]
    if arguments.png:
        from vision_scan.draw import draw_orders

        draw_orders(orders, arguments.png)
        print(arguments.png)
        return
    width = max(len(order.name) for order in orders)
    print(f"{'order':<{width}}  lists  mean step  max step  mean gap  distortion  dilation")
    for order in orders:
        print(
            f"{order.name:<{width}}  {len(order):>5}  {order.mean_step:>9.2f}  {order.max_step:>8}  "
            f"{_or_dash(order.mean_gap):>8}  {order.distortion:>10.1f}  {order.dilation:>8.2f}"
        )


def run_scan_receptive(arguments: argparse.Namespace) -> None:
    """`cobra scan receptive`"""
    from vision_scan.receptive import effective_share, reached_share

    grid = _read_grid(arguments.grid)
    cell = (grid[0] // 2, grid[1] // 2) if arguments.cell is None else _read_cell(arguments.cell, *grid)
    fields = {name: _field_of_scans(name, *grid, cell, arguments) for name in arguments.orders}
    if arguments.png:
        from vision_scan.draw import draw_receptive_fields

        draw_receptive_fields(fields, arguments.png, at=cell)
        print(arguments.png)
        return
    width = max(map(len, ["order", *fields]))
    print(f"{'order':<{width}}  seen  effective")
    for name, field in fields.items():
        print(f"{name:<{width}}  {reached_share(field):>4.0%}  {effective_share(field):>9.0%}")


def _field_of_scans(
    order: str, height: int, width: int, cell: tuple[int, int], arguments: argparse.Namespace
) -> "Tensor":
    """The receptive field of VMamba's blocks with random weights, x + scan(norm(x)): without the convolution, which
    sees the cells around whatever the order, and without skip, gate and MLP, which see the cell itself."""
    import torch

    from vision_scan import SS2DConfig, VSSBlock
    from vision_scan.receptive import receptive_field

    if arguments.layers < 1:
        raise UserError(f"--layers {arguments.layers}: give 1 or more")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(arguments.seed)
        config = SS2DConfig(d_conv=1, has_gate=False)
        blocks = [VSSBlock(config, D_MODEL, order, mlp_ratio=0, depth=depth) for depth in range(arguments.layers)]
    for block in blocks:
        torch.nn.init.zeros_(block.op.Ds)
    return receptive_field(
        torch.nn.Sequential(*blocks), height, width, D_MODEL, cell, arguments.samples, arguments.seed
    )


def _or_dash(measure: float) -> str:
    return f"{measure:.2f}" if measure else "-"  # no two neighbours are in one list


def _read_grid(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UserError(f"--grid {text}: give rows x columns, for instance 6x9")
    return int(height), int(width)


def _read_cell(text: str, height: int, width: int) -> tuple[int, int]:
    row, _, column = text.partition(",")
    if not (row.isdecimal() and column.isdecimal() and int(row) < height and int(column) < width):
        raise UserError(f"--cell {text}: give row,column from 0,0 to {height - 1},{width - 1}")
    return int(row), int(column)
