"""The command line: `cobra answer | read | chat | serve | convert | export | info | doctor | scan`."""

import argparse
import os
import sys
from collections.abc import Sequence

from cobra.ask_commands import add_ask_commands
from cobra.scan_commands import add_scan_commands
from cobra.serve.commands import add_serve_command
from vision_scan.errors import CommandParser, UserError


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 2 the caller's mistake, 130 interrupted, 141 where nobody
    reads its output any more."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # as of `cobra info tiny | head -1`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains once more at its end
        return 141
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="cobra",
        description="State-space vision-language models: images in, answers out.",
        epilog='example: cobra answer --model runs/demo/cobra --image cat.png "What is it?"',
    )
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run, does: str, example: str, inside=commands) -> argparse.ArgumentParser:
        description, epilog = f"{does[0].upper()}{does[1:]}.", f"example: {example}"
        command = inside.add_parser(name, help=does, description=description, epilog=epilog)
        command.set_defaults(run=run)
        return command

    add_ask_commands(add)
    add_serve_command(add)

    convert = add(
        "convert",
        run_convert,
        "make a model directory of a published language model",
        "cobra convert state-spaces/mamba2-130m start --tokenizer gpt-neox-20b/tokenizer.json",
    )
    _add_convert_options(convert)

    export = add(
        "export",
        run_export,
        "write the language model of a model directory for others to run",
        "cobra export runs/demo/cobra out --format transformers",
    )
    _add_export_options(export)

    info = add("info", run_info, "print what a model consists of and costs", "cobra info mamba2-130m")
    about = "a model directory, or the name of a preset; several are compared"
    info.add_argument("models", nargs="+", metavar="DIR|PRESET", help=about)

    add("doctor", run_doctor, "print what this installation can do", "cobra doctor")

    add_scan_commands(commands, add)
    return parser


def _add_convert_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("source", metavar="SRC", help="directory of a published checkpoint, see docs/checkpoints.md")
    add("destination", metavar="DST", help="the model directory to write")
    add(
        "--preset",
        default="tiny",
        metavar="NAME",
        help="whose image, vision encoder, connector and template a language model gets (default: tiny)",
    )
    add(
        "--tower",
        action="append",
        default=[],
        metavar="FILE",
        help="weights of a tower, of a checkpoint that has none; once for each, in order",
    )
    add("--tokenizer", default=None, metavar="FILE", help="a tokenizer.json (default: SRC/tokenizer.json)")
    add("--dry-run", action="store_true", help="print what would be done, and write nothing")


def run_convert(arguments: argparse.Namespace) -> None:
    """`cobra convert`"""
    from cobra.convert.conversion import check_destination, plan

    check_destination(arguments.destination)
    conversion = plan(arguments.source, preset=arguments.preset, tokenizer=arguments.tokenizer, towers=arguments.tower)
    print("\n".join(conversion.report()))
    if arguments.dry_run:
        print("output      nothing, as this is a dry run")
        return
    conversion.write(arguments.destination)
    print(f"output      {arguments.destination}")


def _add_export_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("source", metavar="SRC", help="a model directory")
    add("destination", metavar="DST", help="what to write: a directory for transformers, a file for gguf")
    add(
        "--format",
        default="transformers",
        metavar="NAME",
        help="transformers, or gguf for llama.cpp, Mamba and Mamba-2 only (default: transformers)",
    )
    dtypes = "transformers: stored, float32, bfloat16; gguf: float32, bfloat16, q8_0, q4_0; the first is the default"
    add("--dtype", default=None, metavar="NAME", help=dtypes)
    add("--dry-run", action="store_true", help="print what would be done, and write nothing")


def run_export(arguments: argparse.Namespace) -> None:
    """`cobra export`"""
    from cobra.convert.conversion import check_destination
    from cobra.export import plan

    check_destination(arguments.destination)
    export = plan(arguments.source, format=arguments.format, dtype=arguments.dtype)
    print("\n".join(export.report()))
    if not arguments.dry_run:
        export.write(arguments.destination)
    written = "nothing, as this is a dry run" if arguments.dry_run else arguments.destination
    print(f"output      {written}; vision encoder and connector are not exported")


def run_info(arguments: argparse.Namespace) -> None:
    """`cobra info`"""
    from cobra.info import compare, describe, read

    configs = {name: read(name) for name in arguments.models}
    print("\n".join(compare(configs) if len(configs) > 1 else describe(*configs.values())))


def run_doctor(arguments: argparse.Namespace) -> None:
    """`cobra doctor`"""
    from cobra.doctor import report

    print("\n".join(report()))


if __name__ == "__main__":
    sys.exit(main())
