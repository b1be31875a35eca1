"""The commands that ask a model: `cobra answer | read | chat`."""

import argparse
import contextlib
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from vision_scan.errors import UserError

if TYPE_CHECKING:
    from cobra.lm.state import State
    from cobra.media import Media
    from cobra.model import Cobra

CHAT_HELP = (
    "commands: /image PATH reads images, /save FILE keeps what was read, /reset forgets all, /quit or Ctrl-D ends"
)


def add_ask_commands(add) -> None:
    """Adds them; `add` is that of the command line."""
    answer = add(
        "answer",
        run_answer,
        "print the answer to a question about images, and nothing else",
        'cobra answer --model runs/demo/cobra --image cat.png "What is it?"',
    )
    add_model_options(answer)
    _add_state(answer)
    _add_image_options(answer)
    _add_sampling_options(answer)
    answer.add_argument("question", nargs="?", help="may hold <image> marks, as many as images")

    read = add(
        "read",
        run_read,
        "read images once and keep what the model remembers, for any number of answers",
        "cobra read album/ talk.mp4 --model runs/demo/cobra --output album.state",
    )
    read.add_argument("paths", nargs="+", metavar="PATH", help="images, PDFs and videos, or folders of them")
    read.add_argument("-o", "--output", required=True, type=Path, metavar="FILE", help="the state file to write")
    read.add_argument("--text", default="", help="read behind the images, or around them by <image> marks")
    read.add_argument("--int8", action="store_true", help="keep matrix states in 8 bits: about a quarter of the bytes")
    _add_every(read)
    add_model_options(read)
    _add_state(read)

    example = "cobra chat --model runs/demo/cobra --image cat.png"
    chat = add("chat", run_chat, f"talk with a model; {CHAT_HELP}", example)
    add_model_options(chat)
    _add_state(chat)
    _add_image_options(chat)
    _add_sampling_options(chat)


def add_model_options(command: argparse.ArgumentParser) -> None:
    """What `load_model` takes."""
    add = command.add_argument
    add("--model", required=True, metavar="DIR", help="the model directory")
    add("--device", default=None, help="default: a GPU if there is one, else cpu")
    add("--dtype", default="auto", help="auto (the default), float32, bfloat16")
    add("--weights", default=None, help="int8 or int4: quantise the language model (default: as stored)")


def _add_state(command: argparse.ArgumentParser) -> None:
    command.add_argument("--state", type=Path, metavar="FILE", help="go on from what `cobra read` has kept")


def _add_image_options(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--image",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="images, PDFs and videos, or folders of them",
    )
    _add_every(command)


def _add_every(command: argparse.ArgumentParser) -> None:
    command.add_argument("--every", default="1s", metavar="T", help="of a video a frame each 1s (default), 250ms, 10f")


def _add_sampling_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    add("--temperature", type=float, default=0.0, metavar="T", help="0, the default, is greedy")
    add("--top-k", type=int, default=0, metavar="K", help="draw from the K most likely tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="draw from this much probability")
    add("--seed", type=int, default=None, metavar="S", help="repeat a draw")


def run_answer(arguments: argparse.Namespace) -> None:
    """`cobra answer`"""
    if arguments.question is None and arguments.image:
        # `--image a.png "question"`: argparse takes all that follows an option of many values for it.
        arguments.question = arguments.image.pop()
        if not arguments.image and not _is_file_name(arguments.question):  # such as a pattern that no file fits
            raise UserError("--image has no path: give images and then the question, or leave --image out")
    if arguments.question is None or _is_file_name(arguments.question):
        raise UserError("no question: give it as the last argument, in quotes")
    state = _load_state(arguments)
    media = _media(arguments.image, arguments)
    model = load_model(arguments)
    images = media.for_model(model) if media else None
    print(model.answer(arguments.question, images, state=state, **_sampling(arguments)))


def run_read(arguments: argparse.Namespace) -> None:
    """`cobra read`"""
    from cobra.progress import progress

    output = arguments.output
    is_continued = arguments.state is not None and output.exists() and output.samefile(arguments.state)
    if output.exists() and not is_continued:
        raise UserError(f"--output {output} is there already: name another, or go on with it by --state {output}")
    if not output.parent.is_dir():
        raise UserError(f"--output {output}: no directory {output.parent}; make it first")
    state = _load_state(arguments)
    media = _media(arguments.paths, arguments)
    assert media is not None  # the parser asks for paths
    model = load_model(arguments)
    began = time.monotonic()
    with progress("reading", media.count) as advance:

        def images() -> Iterator:
            for image in media.for_model(model):
                yield image
                advance(1)

        before = 0 if state is None else state.info.get("num_images", 0)
        state = model.prefill(arguments.text, images(), state=state)
    seconds = time.monotonic() - began
    state = state.quantize() if arguments.int8 else state
    _save(state, output)
    new = state.info["num_images"] - before
    print(f"{output}: {describe_state(state)}; {new} images read in {seconds:.1f} s, {new / seconds:.3g} a second")


def run_chat(arguments: argparse.Namespace) -> None:
    """`cobra chat`"""
    state = _load_state(arguments)
    media = _media(arguments.image, arguments)
    model = load_model(arguments)
    if media:
        state = model.prefill(images=media.for_model(model), state=state)
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
            if command.startswith("/"):
                state = _obey(command, rest, model, state, arguments)
                continue
            stream = model.stream(line, state=state, **_sampling(arguments))
            for piece in stream:
                show(piece)
            state = stream.state
            print()
        except UserError as error:  # a slip in a conversation does not end it
            print(f"error: {error}", file=sys.stderr)


def _obey(
    command: str, rest: str, model: "Cobra", state: "State | None", arguments: argparse.Namespace
) -> "State | None":
    """A command of the chat: the state behind it."""
    if command == "/reset":
        return None
    if command not in ("/image", "/save"):
        raise UserError(f"unknown command {command}; {CHAT_HELP}")
    if not rest:
        raise UserError(f"{command}: give a path")
    if command == "/image":
        media = _media([rest], arguments)
        assert media is not None
        return model.prefill(images=media.for_model(model), state=state)
    if state is None:
        raise UserError("/save: nothing has been read yet")
    _save(state, Path(rest))
    print(f"{rest}: {describe_state(state)}")
    return state


def describe_state(state: "State") -> str:
    """What it has read and what it takes: "37 images, 2,410 tokens, 18.9 MB"."""
    count = state.info.get("num_images", 0)
    return f"{count:,} image{'s' * (count != 1)}, {int(state.lengths.sum()):,} tokens, {state.nbytes / 1e6:,.1f} MB"


def load_model(arguments: argparse.Namespace) -> "Cobra":
    """The model that the options name."""
    import torch

    from cobra.checkpoint import load

    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return load(arguments.model, device, arguments.dtype, arguments.weights)


def _load_state(arguments: argparse.Namespace) -> "State | None":
    from cobra.lm.state import State

    return None if arguments.state is None else State.load(arguments.state)


def _save(state: "State", path: Path) -> None:
    try:
        state.save(path)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}); name another file") from error


def _media(paths: list[str], arguments: argparse.Namespace) -> "Media | None":
    """What `paths` hold, looked at before the model is loaded."""
    from cobra.media import Every, Media

    return Media(paths, Every.parse(arguments.every)) if paths else None


def _is_file_name(text: str) -> bool:
    from cobra.media import SUFFIXES

    # os.path, as pathlib raises an error for a text that is too long for a file name.
    return os.path.exists(text) or (text.lower().endswith(SUFFIXES) and " " not in text)


def _lines(prompt: str) -> Iterator[str]:
    """What is typed, without empty lines, until the end of the input."""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line


def _sampling(arguments: argparse.Namespace) -> dict:
    return {
        "max_new_tokens": arguments.max_new_tokens,
        "do_sample": arguments.temperature != 0,
        "temperature": arguments.temperature,
        "top_k": arguments.top_k,
        "top_p": arguments.top_p,
        "seed": arguments.seed,
    }
