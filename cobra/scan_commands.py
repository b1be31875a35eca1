"""`cobra scan`: list, print and draw scan orders."""

import argparse
from collections.abc import Callable

from vision_scan.errors import UserError


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
    for command in (show, compare):
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


def _or_dash(measure: float) -> str:
    return f"{measure:.2f}" if measure else "-"  # no two neighbours are in one list


def _read_grid(text: str) -> tuple[int, int]:
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise UserError(f"--grid {text}: give rows x columns, for instance 6x9")
    return int(height), int(width)
