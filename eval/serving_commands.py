"""The commands `python -m eval serving | reading`."""

import argparse
from pathlib import Path

from vision_scan.errors import UserError


def add_serving(parser: argparse.ArgumentParser) -> None:
    """Options of `serving`."""
    _add_one_model(parser)
    parser.add_argument("--requests", type=int, default=16, metavar="N", help="at once (default 16)")
    parser.add_argument("--prompt-tokens", type=int, default=32, metavar="N", help="of each (default 32)")
    parser.add_argument("--new-tokens", type=int, default=256, metavar="N", help="of each answer (default 256)")
    parser.add_argument("--images", type=int, default=1000, metavar="N", help="read beside answers (default 1000)")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="of each way, in turn (default 3)")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Options of `reading`."""
    _add_one_model(parser)
    parser.add_argument("--images", default="10,100,1000", metavar="N,N", help="how many (default 10,100,1000)")


def _add_one_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", required=True, metavar="DIR|PRESET", help="a model directory, or a preset's weights")
    parser.add_argument("--device", default="cpu", help="default cpu")
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--output", type=Path, metavar="FILE", help="also write the numbers as JSON")


def _one_model(options: argparse.Namespace):
    import cobra
    from cobra.config import PRESETS

    build = cobra.build if options.model in PRESETS else cobra.load
    return build(options.model, device=options.device, dtype=options.dtype)


def time_serving(options: argparse.Namespace) -> int:
    """`serving`"""
    from cobra.progress import progress
    from eval.files import write_json
    from eval.serving import Load, measure

    for name in ("requests", "prompt_tokens", "new_tokens", "images", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be 1 or more")
    model = _one_model(options)
    load = Load(requests=options.requests, prompt_tokens=options.prompt_tokens, new_tokens=options.new_tokens)
    reading = Load(requests=options.requests, prompt_tokens=16 * options.prompt_tokens, new_tokens=load.new_tokens // 8)
    with progress("serving", options.rounds) as advance:
        result = measure(model, load, reading, options.images, options.rounds, advance)
    if options.output:
        write_json(options.output, result)
    for name, values in result["tokens_per_s"].items():
        print(f"{name:<20}{values['median']:>9.1f} tokens/s")
    ratio, (equal, total) = result["at_once_over_one_after_another"], result["equal_answers"]
    low, high = min(ratio["all"]), max(ratio["all"])
    print(f"at once against one after another: {ratio['median']:.2f} ({low:.2f} to {high:.2f})")
    print(f"of the roofline at once: {result['share_of_roofline']:.0%}; equal answers: {equal} of {total}")
    asked = result["follow_up"]
    print(
        f"a question of {asked['new_tokens']} tokens in a known conversation: {1e3 * asked['first_s']:.1f} ms to the "
        f"first token, {asked['ratio']:.2f} times what its tokens take alone"
    )
    gaps = result["gaps"]
    print(
        f"between tokens: {1e3 * gaps['alone']['median']:.1f} ms (p99 {1e3 * gaps['alone']['p99']:.1f}), while "
        f"{gaps['images']} images are read {1e3 * gaps['beside']['median']:.1f} (p99 {1e3 * gaps['beside']['p99']:.1f})"
    )
    return 0


def time_reading(options: argparse.Namespace) -> int:
    """`reading`"""
    from cobra.progress import progress
    from eval.environment import describe_environment
    from eval.files import write_json
    from eval.image_reading import measure

    try:
        counts = [int(count) for count in options.images.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        raise UserError(f"--images {options.images!r}: give numbers of 1 or more, as in 10,100,1000")
    model = _one_model(options)
    with progress("reading", sum(counts)) as advance:
        rows = measure(model, counts, advance)
    if options.output:
        write_json(options.output, {"rows": rows, "environment": describe_environment(options.device)})
    print("   images      tokens  images/s   tokens/s   peak MB   state MB")
    for row in rows:
        print(
            f"{row['images']:>9,}{row['tokens']:>12,}{row['images_per_s']:>10.1f}"
            f"{row['tokens'] / row['seconds']:>11,.0f}{row['peak_bytes'] / 1e6:>10.1f}{row['state_bytes'] / 1e6:>11.2f}"
        )
    return 0
