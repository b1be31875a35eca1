"""The command line: `cobra answer | chat | convert | info | doctor | scan`."""

import argparse
import contextlib
import functools
import os
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from cobra.scan_commands import add_scan_commands
from vision_scan.errors import CommandParser, UserError, choose

if TYPE_CHECKING:
    from cobra.config import CobraConfig
    from cobra.lm.state import State

_NOT_YET = {
    "PDF": (".pdf",),
    "video": (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg"),
}
INFO_CONTEXTS = (256, 4096, 65536)
CHAT_HELP = "commands: /image PATH reads images, /reset forgets all, /quit or Ctrl-D ends"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0 done, 2 the caller's mistake, 130 interrupted."""
    try:
        arguments = _parser().parse_args(argv)
        arguments.run(arguments)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
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

    answer = add(
        "answer",
        run_answer,
        "print the answer to a question about images, and nothing else",
        'cobra answer --model runs/demo/cobra --image cat.png "What is it?"',
    )
    _add_model_options(answer)
    answer.add_argument("question", nargs="?", help="may hold <image> marks, as many as images")

    chat = add(
        "chat",
        run_chat,
        f"talk with a model; {CHAT_HELP}",
        "cobra chat --model runs/demo/cobra --image cat.png",
    )
    _add_model_options(chat)

    convert = add(
        "convert",
        run_convert,
        "make a model directory of a published language model",
        "cobra convert state-spaces/mamba2-130m start --tokenizer gpt-neox-20b/tokenizer.json",
    )
    _add_convert_options(convert)

    info = add("info", run_info, "print what a model consists of and costs", "cobra info mamba2-130m")
    about = "a model directory, or the name of a preset; several are compared"
    info.add_argument("models", nargs="+", metavar="DIR|PRESET", help=about)

    add("doctor", run_doctor, "print what this installation can do", "cobra doctor")

    add_scan_commands(commands, add)
    return parser


def _add_model_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--model", required=True, metavar="DIR", help="the model directory")
    add(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="image files, or folders of them",
    )
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most likely tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from this much probability")
    add("--seed", type=int, default=None, metavar="S", help="repeat a draw")
    add("--device", default=None, help="default: a GPU if there is one, else cpu")
    add("--dtype", default="auto", help="auto (the default), float32, bfloat16")
    add("--weights", default=None, help="int8 or int4: quantise the language model (default: as stored)")


def _add_convert_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("source", metavar="SRC", help="directory of a published checkpoint: Mamba, Mamba-2, Llama or Qwen2")
    add("destination", metavar="DST", help="the model directory to write")
    add(
        "--preset",
        default="tiny",
        metavar="NAME",
        help="whose image, vision encoder, connector and template it gets (default: tiny)",
    )
    add("--tokenizer", default=None, metavar="FILE", help="a tokenizer.json (default: SRC/tokenizer.json)")
    add("--dry-run", action="store_true", help="print what would be done, and write nothing")


def run_answer(arguments: argparse.Namespace) -> None:
    """`cobra answer`"""
    if arguments.question is None and arguments.image:
        # `--image a.png "question"`: argparse takes all that follows an option of many values for it.
        arguments.question = arguments.image.pop()
    if arguments.question is None or _is_file_name(arguments.question):
        raise UserError("no question: give it as the last argument, in quotes")
    images = find_images(arguments.image)
    model = _load(arguments)
    print(model.answer(arguments.question, images, **_sampling(arguments)))


def run_chat(arguments: argparse.Namespace) -> None:
    """`cobra chat`"""
    from cobra.streaming import TextStreamer

    images = find_images(arguments.image)
    model = _load(arguments)
    state = model.prefill(images=images) if images else None
    show = functools.partial(print, end="", flush=True)
    is_terminal = sys.stdin.isatty()
    if is_terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (gives input() editing and a history)
        print(CHAT_HELP)
    for line in _lines("> " if is_terminal else ""):
        command, _, rest = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/reset":
                state = None
            elif command == "/image":
                if not rest:
                    raise UserError("/image: give a path")
                state = model.prefill(images=find_images([rest]), state=state)
            elif command.startswith("/"):
                raise UserError(f"unknown command {command}; {CHAT_HELP}")
            else:
                streamer = TextStreamer(model.tokenizer, show)
                answer = model.answer(
                    line, state=state, streamer=streamer, return_state=True, **_sampling(arguments)
                )
                state = cast("State", answer[1])
                print()
        except UserError as error:  # a slip in a conversation does not end it
            print(f"error: {error}", file=sys.stderr)


def run_convert(arguments: argparse.Namespace) -> None:
    """`cobra convert`"""
    from cobra.convert.conversion import check_destination, plan

    check_destination(arguments.destination)
    conversion = plan(arguments.source, preset=arguments.preset, tokenizer=arguments.tokenizer)
    print("\n".join(conversion.report()))
    if arguments.dry_run:
        print("output      nothing, as this is a dry run")
        return
    conversion.write(arguments.destination)
    print(f"output      {arguments.destination}")


def run_info(arguments: argparse.Namespace) -> None:
    """`cobra info`"""
    configs = {name: _read_config(name) for name in arguments.models}
    if len(configs) > 1:
        _compare_language_models(configs)
    else:
        _describe(*configs.values())


def _read_config(name: str) -> "CobraConfig":
    """Of a preset or of a model directory."""
    from cobra.checkpoint import read_config
    from cobra.config import PRESETS

    if name not in PRESETS and not Path(name).exists():
        choose("preset or model directory", name, PRESETS)
    return PRESETS[name] if name in PRESETS else read_config(name)


def _describe(config: "CobraConfig") -> None:
    from cobra.cost import LMCost, count_parts

    size, most = f"{config.image.height} x {config.image.width}", config.largest_layout
    tokens = f"{config.tokens_per_tile} tokens"
    print(f"image    {size}, {tokens}")
    tiles = config.image.tiles
    if tiles is not None:
        of_size = "in the shape of an image" if tiles.varies else "of that size"
        print(f"tiles    {of_size}, at most {most.num_tiles} and {most.num_tokens} tokens of an image")
    if config.video is not None:
        print(f"video    {config.video.kind}, of all tokens of its frames {config.video.pruning_rate:.0%} are dropped")
    print(f"layers   {_layers(config)}; d_model {config.lm.d_model}, vocabulary {config.lm.vocab_size}")
    print("\npart               parameters")
    parts = count_parts(config)
    for name, count in {**parts, "total": sum(parts.values())}.items():
        print(f"{name:<16}{count:>13,}")
    print("\ncontext   state bytes (16-bit)   FLOPs to read it   FLOPs of the next token")
    cost = LMCost(config.lm)
    for context in INFO_CONTEXTS:
        read, step = cost.prefill_flops(context), cost.decode_flops(context)
        print(f"{context:>7}{cost.state_bytes(context):>23,}{read:>19.3g}{step:>26.3g}")


def _compare_language_models(configs: Mapping[str, "CobraConfig"]) -> None:
    """Twins below one another: what is alike, and what a row keeps at a few lengths of context."""
    from cobra.cost import LMCost

    width = max(map(len, ["state bytes, bfloat16", *configs]))
    print(f"{'language model':<{width}}     parameters  layers")
    for name, config in configs.items():
        print(f"{name:<{width}}  {LMCost(config.lm).parameters:>13,}  {_layers(config)}")
    for dtype, size in (("bfloat16", 2), ("float32", 4)):
        lengths = "".join(f"{context:>15,}" for context in INFO_CONTEXTS)
        print(f"\n{f'state bytes, {dtype}':<{width}}{lengths} tokens")
        for name, config in configs.items():
            cost = LMCost(config.lm)
            states = "".join(f"{cost.state_bytes(context, size):>15,}" for context in INFO_CONTEXTS)
            print(f"{name:<{width}}{states}")


def _layers(config: "CobraConfig") -> str:
    """How many there are of each kind: "18 mamba2, 6 attention, 6 mlp"."""
    kinds = Counter((layer.kind, getattr(layer, "window", None)) for layer in config.lm.layers)
    return ", ".join(
        f"{count} {kind}" + (f" (window {window})" if window else "") for (kind, window), count in kinds.items()
    )


def run_doctor(arguments: argparse.Namespace) -> None:
    """`cobra doctor`"""
    from cobra.doctor import report

    print("\n".join(report()))


def find_images(paths: Sequence[str]) -> list[Path]:
    """Image files among files and folders, the files of a folder by name; headers are checked.

    Raises:
        UserError: naming the path that holds no image.
    """
    from cobra.image import IMAGE_SUFFIXES, check_image

    found: list[Path] = []
    for path in map(Path, paths):
        for kind, suffixes in _NOT_YET.items():
            if path.suffix.lower() in suffixes:
                raise UserError(f"{path}: {kind} cannot be read; give image files or folders of them")
        if path.is_dir():
            inside = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
            if not inside:
                raise UserError(f"{path}: no images in this folder ({' '.join(IMAGE_SUFFIXES)})")
            found += inside
        else:
            found.append(path)
    for file in found:
        check_image(file)
    return found


def _is_file_name(text: str) -> bool:
    from cobra.image import IMAGE_SUFFIXES

    # os.path, as pathlib raises an error for a text that is too long for a file name.
    return os.path.exists(text) or (text.lower().endswith(IMAGE_SUFFIXES) and " " not in text)


def _lines(prompt: str) -> Iterator[str]:
    """What is typed, without empty lines, until the end of the input."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def _load(arguments: argparse.Namespace):
    import torch

    from cobra.checkpoint import load

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load(arguments.model, device, arguments.dtype, arguments.weights)


def _sampling(arguments: argparse.Namespace) -> dict:
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": arguments.temperature != 0,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }


if __name__ == "__main__":
    sys.exit(main())
