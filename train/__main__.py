"""The command line of training."""

import argparse
import logging
import os
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from train.processes import adopt_slurm, is_first, leave
from train.recipes import RECIPES
from train.settings import RunConfig, change
from vision_scan.errors import CommandParser, UserError, choose

DONE, FAILED, MISUSED, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130

EPILOG = """recipes:
{recipes}

example:
  python -m train --recipe tiny --set data.path=my.json --output runs/mine

also: python -m train plan --recipe NAME --ranks 1,8,64    says what a run takes
      python -m train data check | inspect | shard PATH     looks at data, and packs it
      python -m train plot RUN...                          draws loss, learning rate, speed, ...

exit status: 0 done; 75 stopped by a signal, all is saved, run again with --resume;
2 a mistake in the command, the settings or the data; 1 anything else"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    commands = {"data": _data, "plan": _plan, "plot": _plot}
    try:
        adopt_slurm()
        logging.basicConfig(level=logging.INFO if is_first() else logging.ERROR, format="%(message)s")
        if arguments and arguments[0] in commands:
            return commands[arguments[0]](arguments[1:])
        return _train(arguments)
    except UserError as error:
        # The same on all processes as a rule; but a bad row is known to one only, a missing file perhaps to one node.
        if is_first() or os.environ.get("LOCAL_RANK") == "0" or type(error) is not UserError:
            print(f"error: {error}", file=sys.stderr)
        return MISUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """The arguments of a training run; a test freezes their list, since all else is `--set`."""
    recipes = "\n".join(
        textwrap.fill(
            f"{name} {' '.join((make.__doc__ or '').split())}", 100, initial_indent="  ", subsequent_indent=" " * 8
        )
        for name, make in RECIPES.items()
    )
    parser = CommandParser(
        prog="python -m train",
        description="Trains a model.",
        epilog=EPILOG.format(recipes=recipes),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_run_arguments(parser)
    # The deepspeed launcher passes it; the environment says the same.
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    return parser


def add_run_arguments(parser: argparse.ArgumentParser, needs_output: bool = True) -> None:
    """The arguments that say which run is meant."""
    parser.add_argument("--recipe", metavar="NAME", help="one of the recipes; not needed with --resume")
    parser.add_argument("--output", metavar="DIR", required=needs_output, help="where everything is written")
    parser.add_argument(
        "--set",
        metavar="SECTION.FIELD=VALUE",
        action="append",
        default=[],
        help="change a setting of the recipe",
    )
    parser.add_argument(
        "--init-from", metavar="DIR", help="begin with the weights of a model directory (init.path)"
    )
    parser.add_argument(
        "--resume", action="store_true", help="continue the run in the output directory"
    )


def _train(arguments: Sequence[str]) -> int:
    from cobra.memory import keep_freed_memory
    from train.loop import NonFiniteError
    from train.processes import LostProcessError, choose_device, leave_processes, name_lost
    from train.resume import CheckpointError
    from train.run import run

    options = build_parser().parse_args(arguments)
    try:
        config = _config(options)
        if choose_device(config.train.device).type == "cpu":
            keep_freed_memory()
        with name_lost(f"in the run {options.output}"):
            finished = run(
                config, options.output, options.resume, report=lambda line: print(line, flush=True)
            )
    except (NonFiniteError, CheckpointError, LostProcessError) as error:
        print(f"failed: {error}", file=sys.stderr)
        return FAILED
    leave_processes()
    if not finished:
        if is_first():
            again = f"python -m train --resume --output {options.output}"
            print(f"stopped; continue with: {again}", file=sys.stderr)
        return STOPPED
    return DONE


def _config(options: argparse.Namespace) -> RunConfig:
    from train.run_directory import read_run

    if options.recipe is not None:
        config = choose("recipe", options.recipe, RECIPES)()
    elif options.resume:
        config = read_run(Path(options.output))
    else:
        raise UserError(f"no --recipe; allowed: {', '.join(RECIPES)}")
    init = [f"init.path={options.init_from}"] if options.init_from is not None else []
    return change(config, [*options.set, *init])


def _data(arguments: Sequence[str]) -> int:
    from train.data.commands import main

    return DONE if main(arguments) else MISUSED


def _plan(arguments: Sequence[str]) -> int:
    from train.plan import add_arguments, plan

    parser = CommandParser(
        prog="python -m train plan",
        description="Prints what a run takes: parameters, steps, memory of each process, hours. Loads no weights.",
    )
    add_run_arguments(parser, needs_output=False)
    add_arguments(parser)
    options = parser.parse_args(arguments)
    for line in plan(_config(options), options):
        print(line)
    return DONE


def _plot(arguments: Sequence[str]) -> int:
    from train.plot import plot_runs

    parser = CommandParser(
        prog="python -m train plot",
        description="Draws loss, validation loss, learning rate, gradient norm and speed of runs into one picture.",
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", help="an output directory; up to six")
    parser.add_argument(
        "--output", metavar="FILE", default="loss.png", help="the picture; default: loss.png"
    )
    options = parser.parse_args(arguments)
    plot_runs([Path(run) for run in options.runs], Path(options.output))
    print(options.output)
    return DONE


if __name__ == "__main__":
    leave(main())
