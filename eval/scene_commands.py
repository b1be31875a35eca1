"""The commands that draw data sets: `python -m eval scenes | plane-scenes | needles`."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from cobra.progress import progress
from vision_scan.errors import UserError


def add_scenes(parser: argparse.ArgumentParser) -> None:
    """Options of `scenes`."""
    parser.add_argument(
        "--scenes", type=int, default=5000, metavar="N", help="scenes to train on (default 5000)"
    )
    parser.add_argument(
        "--test-scenes", type=int, default=400, metavar="N", help="scenes to test on (default 400)"
    )
    _add_common(parser)


def draw_scenes(options: argparse.Namespace) -> int:
    """Draws digit scenes; returns the exit status."""
    from eval.scenes import build

    with progress("scenes", max(1, options.scenes + options.test_scenes)) as advance:
        build(
            options.output,
            options.scenes,
            options.test_scenes,
            options.seed,
            tuple(options.size),
            on_progress=lambda done, total: advance(1),
            workers=_workers(options),
        )
    print(f"{options.output}: {options.scenes:,} scenes to train on, {options.test_scenes:,} to test on")
    return 0


def add_plane_scenes(parser: argparse.ArgumentParser) -> None:
    """Options of `plane-scenes`."""
    parser.add_argument(
        "--train", type=int, default=5000, metavar="N", help="pictures of each kind to train on (default 5000)"
    )
    parser.add_argument(
        "--test", type=int, default=400, metavar="N", help="pictures of each kind to test on (default 400)"
    )
    parser.add_argument(
        "--kinds", metavar="NAMES", help="of questions: colour,relation,count,trace (default all)"
    )
    parser.add_argument("--curves", type=int, default=3, metavar="N", help="of a picture: 2 to 4 (default 3)")
    parser.add_argument(
        "--wiggle", type=float, default=0.4, metavar="P", help="how often curves turn, 0 to 1 (default 0.4)"
    )
    parser.add_argument(
        "--cells", type=int, nargs=2, metavar=("LO", "HI"), help="of a curve (default: as many as fill the grid)"
    )
    parser.add_argument("--crossing", action="store_true", help="curves may cross, which is harder")
    parser.add_argument(
        "--question", default="last", metavar="PLACE",
        help="where it stands: last, behind the picture; first, in front of it; both (default last)",
    )  # fmt: skip
    _add_common(parser)


def draw_plane_scenes(options: argparse.Namespace) -> int:
    """Draws plane scenes; returns the exit status."""
    from eval.plane_curves import Difficulty
    from eval.plane_scenes import KINDS, build

    kinds = list(KINDS) if options.kinds is None else options.kinds.split(",")
    with progress("plane scenes", max(1, (options.train + options.test) * len(kinds))) as advance:
        build(
            options.output,
            options.train,
            options.test,
            options.seed,
            kinds=kinds,
            canvas=tuple(options.size),
            difficulty=Difficulty(
                num_curves=options.curves,
                wiggle=options.wiggle,
                crossing=options.crossing,
                cells=None if options.cells is None else tuple(options.cells),
            ),
            question=options.question,
            on_progress=lambda done, total: advance(1),
            workers=_workers(options),
        )
    counts = f"{options.train:,} pictures to train on, {options.test:,} to test on"
    print(f"{options.output}: {counts}, of each kind: {', '.join(kinds)}")
    return 0


def add_needles(parser: argparse.ArgumentParser) -> None:
    """Options of `needles`."""
    parser.add_argument("--train", type=int, default=5000, metavar="N", help="rows to train on (default 5000)")
    parser.add_argument(
        "--test", type=int, default=20, metavar="N", help="rows of each length and depth to test on (default 20)"
    )
    parser.add_argument(
        "--longest", type=int, default=1, metavar="N", help="pictures of a row to train on (default 1: the digit alone)"
    )
    parser.add_argument("--lengths", metavar="N,N", help="pictures of a test row (default 1,3,10,30,100,300,1000)")
    parser.add_argument(
        "--depths", metavar="D,D", help="shares of them in front of the digit (default 0,0.25,0.5,0.75,1)"
    )
    _add_common(parser, size=32)


def draw_needles(options: argparse.Namespace) -> int:
    """Draws needles; returns the exit status."""
    from eval.needles import DEPTHS, LENGTHS, build, num_pictures

    lengths = _numbers("lengths", options.lengths, int, LENGTHS)
    depths = _numbers("depths", options.depths, float, DEPTHS)
    total = num_pictures(options.train, options.test, longest=options.longest, lengths=lengths, depths=depths)
    with progress("pictures", max(1, total)) as advance:
        build(
            options.output,
            options.train,
            options.test,
            options.seed,
            longest=options.longest,
            lengths=lengths,
            depths=depths,
            canvas=tuple(options.size),
            on_progress=lambda done, total: advance(1),
            workers=_workers(options),
        )
    tests = options.test * len(lengths) * len(depths)
    print(f"{options.output}: {options.train:,} rows to train on, {tests:,} to test on")
    return 0


def _numbers(name: str, given: str | None, kind: Callable, default: Sequence) -> Sequence:
    """Numbers joined by commas."""
    if given is None:
        return default
    try:
        return [kind(part) for part in given.split(",")]
    except ValueError:
        example = ",".join(f"{number:g}" for number in default[:2])
        raise UserError(f"--{name} {given!r}: give numbers joined by commas, such as {example}") from None


def _add_common(parser: argparse.ArgumentParser, size: int = 64) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that draw the same scenes (default: one a core)"
    )
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other scenes (default 0)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(size, size), metavar=("H", "W"),
        help=f"of a picture (default {size} {size})",
    )


def _workers(options: argparse.Namespace) -> int:
    from eval.environment import num_cores  # with torch, which --help need not wait for

    return num_cores() if options.workers is None else options.workers
