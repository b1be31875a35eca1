"""The command `python -m eval ablate`."""

import argparse
import signal
import time
from pathlib import Path

from vision_scan.errors import UserError, choose

EXAMPLES = """examples:
  python -m eval ablate scan_orders --output runs/scan_orders --minutes 9      again and again, until it is done
  python -m eval ablate scan_orders --output runs/two --seeds 3 --levels spiral,hilbert
  python -m eval ablate scan_orders --output runs/mine --orders my_orders.py --levels rings
  python -m eval ablate connectors --levels msc,ldpv2

What is done is skipped, so a study can be run in pieces, or by many processes that share the folder (a Slurm array
of one command). The report is written anew each time: OUTPUT/report.md with its pictures, and OUTPUT/results.jsonl."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `ablate`."""
    parser.epilog, parser.formatter_class = EXAMPLES, argparse.RawDescriptionHelpFormatter
    parser.add_argument("study", metavar="STUDY", help="an unknown one lists them")
    parser.add_argument("--output", type=Path, metavar="DIR", help="the study's folder (default runs/STUDY)")
    parser.add_argument("--seeds", type=int, metavar="N", help="of the main cells (default: the study's)")
    parser.add_argument("--levels", metavar="NAMES", help="compared, such as raster,hilbert (default: the study's)")
    parser.add_argument("--jobs", type=int, metavar="N", help="trials at a time, one thread each (default: one a core)")
    parser.add_argument("--minutes", type=float, metavar="M", help="begin no trial after so long (default: no limit)")
    parser.add_argument("--orders", type=Path, metavar="FILE", help="a .py that adds scan orders: docs/ablate.md")
    parser.add_argument("--begin-with", type=Path, metavar="FILE", help="a results.jsonl whose trials are done")


def run(options: argparse.Namespace) -> int:
    """Runs what is left of a study, and writes its report; returns the exit status."""
    begun = time.monotonic()
    from cobra.progress import progress
    from eval.ablations import orders, queue, report
    from eval.ablations.studies import ABLATIONS
    from eval.environment import num_cores

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as an interrupt: nothing is left running
    make = choose("study", options.study, ABLATIONS)
    for name in ("seeds", "jobs", "minutes"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            raise UserError(f"--{name} {value}: must be above 0")
    if options.orders is not None:
        orders.load(options.orders)
    levels = None if options.levels is None else _split(options.levels)
    study = make(levels=levels, seeds=options.seeds)
    output = options.output or Path("runs") / study.name
    taken = [] if options.begin_with is None else queue.read_results(study, options.begin_with)
    queue.open_output(study, output)
    if options.orders is not None:
        orders.keep(options.orders, output)
    if options.begin_with is not None:
        print(f"{queue.take_results(study, output, taken)} trials taken from {options.begin_with}")
    queue.prepare(study, output, progress)
    until = None if options.minutes is None else begun + 60 * options.minutes
    left = queue.run(study, output, options.jobs or num_cores(), until, progress)
    results = queue.results(study, output)
    for path in report.write(study, results, output):
        print(path)
    print(f"{len(results)} of {len(study.trials)} trials done" + ("; the same command goes on" if left else ""))
    return 0


def _split(names: str) -> list[str]:
    """Names joined by commas, none of them within brackets.

    Raises:
        UserError: if there is none.
    """
    found, depth = [""], 0
    for letter in names:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            found.append("")
        else:
            found[-1] += letter
    split = [name.strip() for name in found if name.strip()]
    if not split:
        raise UserError(f"--levels {names!r} names none; leave it out for all")
    return split
