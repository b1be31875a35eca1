"""The command line of evaluation: `python -m eval COMMAND`, see EXAMPLES and --help."""

import argparse
import errno
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from eval import demo_commands, scene_commands, serving_commands
from eval.ablations import commands as ablations
from vision_scan.errors import CommandParser, UserError

DONE, FAILED, MISUSED, INTERRUPTED = 0, 1, 2, 130
# What is wrong with a place or its disk, and not with the code.
PLACES = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR}

EXAMPLES = """examples:
  python -m eval scenes --output scenes --scenes 5000
  python -m eval tasks --model runs/demo/cobra --task digit_scenes --data scenes --output results
  python -m eval efficiency --model tiny --model transformer-tiny --output efficiency.json
  python -m eval efficiency --peers transformers,llama.cpp --only decode --output peers.json

exit status: 0 done; 2 a mistake in the command or its files; 1 anything else"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command; returns the exit status."""
    try:
        options = build_parser().parse_args(arguments)
        return options.run(options)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return MISUSED
    except OSError as error:
        if error.errno not in PLACES:
            raise
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror}; give an --output that can be written, on a disk with room",
              file=sys.stderr)  # fmt: skip
        return MISUSED
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED


def build_parser() -> argparse.ArgumentParser:
    """All commands with their options."""
    parser = CommandParser(
        prog="python -m eval",
        description="Evaluates models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    about = "draw digit scenes with questions, to train and to test on"
    scene_commands.add_scenes(_command(commands, "scenes", scene_commands.draw_scenes, about))
    about = "draw the pictures of the study of scan orders, with a question each"
    scene_commands.add_plane_scenes(_command(commands, "plane-scenes", scene_commands.draw_plane_scenes, about))
    about = "draw rows of pictures of which one shows a digit, to train and to test on"
    scene_commands.add_needles(_command(commands, "needles", scene_commands.draw_needles, about))

    _add_tasks(_command(commands, "tasks", _tasks, "answer and score a benchmark"))
    about = "time decoding against context length, or beside rivals"
    _add_efficiency(_command(commands, "efficiency", _efficiency, about))
    about = "time many conversations at once, beside one after another"
    serving_commands.add_serving(_command(commands, "serving", serving_commands.time_serving, about))
    about = "time reading images, and measure its memory"
    serving_commands.add_reading(_command(commands, "reading", serving_commands.time_reading, about))
    about = "train variants at matched cost, compare them, and say what can be concluded"
    ablations.add_arguments(_command(commands, "ablate", ablations.run, about))

    gpu = _command(commands, "gpu", _gpu, "build, test and time the CUDA kernels and the models on a GPU")
    gpu.add_argument("parts", nargs="*", metavar="PART", help="an unknown one lists them (default all)")
    gpu.add_argument(
        "--results", type=Path, metavar="DIR", help="where the results are kept (default benchmarks/results)"
    )
    gpu.add_argument(
        "--limit", type=float, default=480.0, metavar="S", help="seconds after which a part is stopped (480)"
    )

    cuda = _command(
        commands, "cuda", _cuda, "compile the CUDA kernels, which needs no GPU, and tell their registers"
    )
    cuda.add_argument("--archs", default="9.0a", metavar="LIST", help='as in "8.0;9.0;9.0a" (default 9.0a)')
    cuda.add_argument(
        "--output", type=Path, default=Path("build/cuda"), metavar="DIR", help="made anew (build/cuda)"
    )

    demo_commands.add_report(_command(commands, "report", demo_commands.write_report, "write the report of a demo"))
    demo_commands.add_readme(_command(commands, "readme", demo_commands.print_results, "print results as markdown"))
    about = "data, training, evaluation, comparison and report"
    demo_commands.add_demo(_command(commands, "demo", demo_commands.make_demo, about))
    about = "make state-space students of a demo's transformer, and compare them with it"
    demo_commands.add_distill(_command(commands, "distill", demo_commands.make_students, about))
    return parser


def _command(
    commands, name: str, run: Callable[[argparse.Namespace], int], about: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
    parser.set_defaults(run=run)
    return parser


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    """Options of `tasks`."""
    parser.add_argument("--model", metavar="DIR", help="a model directory")
    parser.add_argument(
        "--task",
        "--tasks",
        default="digit_scenes",
        metavar="NAME",
        help="the benchmark (default digit_scenes)",
    )
    parser.add_argument("--data", type=Path, metavar="DIR", help="the benchmark's files")
    parser.add_argument("--output", type=Path, metavar="DIR", help="for one line per answer, and the summary")
    parser.add_argument(
        "--control", default="none", metavar="NAME", help="blank: black pictures of the same size"
    )
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N questions")
    parser.add_argument(
        "--batch-size", type=int, default=32, metavar="N", help="questions at once (default 32)"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=24, metavar="N", help="longest answer (default 24)"
    )
    parser.add_argument("--weights", metavar="FORM", help="int8 or int4: quantise the language model")
    parser.add_argument(
        "--int8-state", action="store_true", help="round the state behind the pictures to 8 bits"
    )
    parser.add_argument(
        "--rescore",
        type=Path,
        metavar="FILE",
        help="score the answers of a .jsonl again; no model needed",
    )
    _add_device(parser)


def _add_efficiency(parser: argparse.ArgumentParser) -> None:
    """Options of `efficiency`."""
    parser.add_argument(
        "--model",
        action="append",
        metavar="[NAME=]DIR|PRESET",
        help="once per model; a preset has random weights",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="a .json; a page with the plots goes beside it, with --peers a .md and a .png",
    )
    parser.add_argument(
        "--shortest-context", type=int, default=256, metavar="N", help="then doubling (default 256)"
    )
    parser.add_argument(
        "--longest-context", type=int, metavar="N", help="(default 16384, with --peers a million)"
    )
    parser.add_argument(
        "--rounds", type=int, metavar="N", help="repeats of decoding (default 9), with --peers of all (7)"
    )
    parser.add_argument(
        "--prefill-rounds",
        type=int,
        default=3,
        metavar="N",
        help="repeats of the first token (default 3)",
    )
    parser.add_argument(
        "--peers",
        metavar="NAMES",
        help="measure beside these instead of --model, on the CPU: transformers,llama.cpp",
    )
    parser.add_argument(
        "--preset", default="mamba2-130m", metavar="NAME", help="with --peers: our model (mamba2-130m)"
    )
    parser.add_argument(
        "--only", metavar="NAMES", help="with --peers: decode,prefill,training,scan_2d,context (default all)"
    )
    parser.add_argument(
        "--budget", type=float, metavar="S", help="with --peers: seconds of a contestant in a contest (120)"
    )
    parser.add_argument(
        "--threads", type=int, metavar="N", help="with --peers: of every contestant (default torch's)"
    )
    _add_device(parser)


def _add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default cpu)")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or auto (default float32)")


def _tasks(options: argparse.Namespace) -> int:
    from eval import runner
    from eval.files import write_lines
    from eval.tasks import TASKS
    from vision_scan.errors import choose

    if options.rescore is not None:
        records, summary = runner.rescore(options.rescore)
        write_lines(options.rescore, records)
        print(_describe(summary))
        return DONE
    missing = [f"--{name}" for name in ("model", "data", "output") if getattr(options, name) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} missing: give --model, --data and --output, or --rescore FILE")
    import cobra
    from cobra.progress import progress

    choose("control", options.control, runner.CONTROLS)
    samples = choose("task", options.task, TASKS).load(options.data, options.limit)
    model = cobra.load(options.model, options.device, options.dtype, options.weights)
    with progress(f"{options.task}, control {options.control}", len(samples)) as advance:
        records, result = runner.run_task(
            model,
            options.task,
            samples,
            model_name=options.model,
            control=options.control,
            int8_state=options.int8_state,
            batch_size=options.batch_size,
            max_new_tokens=options.max_new_tokens,
            advance=advance,
        )
    runner.save(options.output, records, result)
    print(_describe(result["summary"]))
    return DONE


def _describe(summary: dict) -> str:
    """A task's summary as a line per group."""
    lines = []
    for name, row in {"all": summary, **summary["groups"]}.items():
        low, high = row["interval"]
        interval = f"{low:.1%} to {high:.1%}, {row['count']:,} questions"
        lines.append(f"  {name:<12}{row['accuracy']:6.1%}  ({interval})")
    return "\n".join(lines)


def _efficiency(options: argparse.Namespace) -> int:
    if options.peers is not None:
        return _peers(options)
    if not options.model:
        raise UserError("--model missing: give it once per model, or give --peers")
    import cobra
    from cobra.config import PRESETS
    from cobra.progress import progress
    from eval import page
    from eval.efficiency import Protocol, crossover_sentence, doubling, measure, work_units
    from eval.files import write_json, write_text

    protocol = Protocol(
        contexts=doubling(options.shortest_context, options.longest_context or 16384),
        rounds=9 if options.rounds is None else options.rounds,
        prefill_rounds=options.prefill_rounds,
    )
    models = {}
    for given in options.model:
        name, _, source = given.rpartition("=")
        name = name or Path(source).name
        if name in models:
            raise UserError(f"two models are called {name!r}; name them: --model NAME={source}")
        build = cobra.build if source in PRESETS else cobra.load
        models[name] = build(source, device=options.device, dtype=options.dtype)
    with progress("efficiency", work_units(models, protocol)) as advance:
        result = measure(models, protocol, advance)
    write_json(options.output, result)
    write_text(options.output.with_suffix(".html"), page.render_efficiency(result))
    for name, model in result["models"].items():
        print(name)
        for point in model["points"]:
            per_token, first = point["decode_s"], point["ttft_s"]["median"]
            low, middle, high = (f"{1e3 * per_token[key]:.3f}" for key in ("q1", "median", "q3"))
            print(
                f"  {point['context']:>9,} tokens  {middle:>8} ms per token ({low} to {high}; "
                f"{point['roofline']:.0%} of the roofline)"
                f"  first token {first:.3f} s  state {point['state_bytes']:,} bytes"
            )
    for crossover in result["crossovers"]:
        print(crossover_sentence(crossover))
    wrong = [name for name, model in result["models"].items() if not model["check"]["passed"]]
    if wrong:
        names = ", ".join(wrong)
        print(f"failed: decoding does not give the logits of one forward: {names}", file=sys.stderr)
    return FAILED if wrong else DONE


def _peers(options: argparse.Namespace) -> int:
    import torch

    from cobra.memory import keep_freed_memory
    from cobra.progress import progress
    from eval import peers
    from eval.files import write_json, write_text
    from eval.peers import plot, tables

    if options.model or options.device != "cpu":
        raise UserError("--peers measures --preset on the CPU: leave out --model and --device")
    given = {
        "rounds": options.rounds,
        "threads": torch.get_num_threads() if options.threads is None else options.threads,
        "long_context": options.longest_context,
        "budget_s": options.budget,
    }
    names = options.peers.split(",")
    contests = options.only.split(",") if options.only else list(peers.CONTESTS)
    peers.check_names(names, contests)
    settings = peers.Settings(
        preset=options.preset, **{name: value for name, value in given.items() if value is not None}
    )

    keep_freed_memory()  # for all contestants alike

    def keep(result: dict) -> None:
        write_json(options.output, result)
        write_text(options.output.with_suffix(".md"), tables.to_markdown(result))
        plot.draw(result, options.output.with_suffix(".png"))

    result = peers.measure(settings, names, contests, progress, keep)
    for contest in result["contests"].values():
        for ratio in contest["ratios"]:
            print(tables.ratio_line(ratio))
    for suffix in (".json", ".md", ".png"):
        print(options.output.with_suffix(suffix))
    for line in tables.failed_checks(result):
        print(f"failed: {line}", file=sys.stderr)
    return DONE if result["passed"] else FAILED


def _gpu(options: argparse.Namespace) -> int:
    from eval import gpu
    from eval.gpu.results import FOLDER
    from eval.gpu.tables import summary

    results = gpu.run_parts(options.parts, options.results or FOLDER, options.limit)
    print(summary(results.content))
    print(results.path)
    return DONE if gpu.passed(results) else FAILED


def _cuda(options: argparse.Namespace) -> int:
    from eval.gpu import compile_report

    return compile_report.run(options.output, options.archs)


if __name__ == "__main__":
    sys.exit(main())
