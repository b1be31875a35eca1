"""The commands `python -m eval demo | report | readme | distill`."""

import argparse
from pathlib import Path


def add_demo(parser: argparse.ArgumentParser) -> None:
    """Options of `demo`."""
    parser.add_argument("--output", type=Path, metavar="DIR", help="default runs/demo, with --quick runs/quick")
    parser.add_argument("--quick", action="store_true", help="the whole path with few steps, in minutes")


def add_report(parser: argparse.ArgumentParser) -> None:
    """Options of `report`."""
    parser.add_argument("path", type=Path, metavar="PATH", help="a demo's directory, or a report.json to draw again")


def add_readme(parser: argparse.ArgumentParser) -> None:
    """Options of `readme`."""
    parser.add_argument(
        "path",
        type=Path,
        metavar="REPORT",
        help="a demo's report.json, a peers.json, or the folder of gpu's results",
    )
    parser.add_argument("--write", type=Path, metavar="FILE", help="replace them between FILE's markers")


def add_distill(parser: argparse.ArgumentParser) -> None:
    """Options of `distill`."""
    parser.add_argument("--demo", type=Path, default=Path("runs/demo"), metavar="DIR", help="finished (runs/demo)")
    parser.add_argument("--output", type=Path, default=Path("runs/distill"), metavar="DIR", help="(runs/distill)")


def write_report(options: argparse.Namespace) -> int:
    """`report`"""
    from eval.report import write

    for path in write(options.path):
        print(path)
    return 0


def print_results(options: argparse.Namespace) -> int:
    """`readme`"""
    from eval import readme

    results, section = readme.read(options.path)
    if options.write is None:
        print(results, end="")
    else:
        readme.write(options.write, results, section)
    return 0


def make_demo(options: argparse.Namespace) -> int:
    """`demo`"""
    from eval.demo import Settings, run

    output = options.output or Path("runs/quick" if options.quick else "runs/demo")
    return run(output, Settings.quick() if options.quick else Settings.full(), options.quick)


def make_students(options: argparse.Namespace) -> int:
    """`distill`"""
    from eval.distillation import run

    return run(options.demo, options.output)
