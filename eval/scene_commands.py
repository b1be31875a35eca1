"""The commands that draw data sets: `python -m eval scenes` and `python -m eval plane-scenes`."""

import argparse
from pathlib import Path

from cobra.progress import progress


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


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="a new or empty directory")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="processes that draw the same scenes (default: one a core)"
    )
    parser.add_argument("--seed", type=int, default=0, help="other seeds give other scenes (default 0)")
    parser.add_argument(
        "--size", type=int, nargs=2, default=(64, 64), metavar=("H", "W"), help="of a picture (default 64 64)"
    )


def _workers(options: argparse.Namespace) -> int:
    from eval.environment import num_cores  # with torch, which --help need not wait for

    return num_cores() if options.workers is None else options.workers
