"""`python -m train data check | inspect | shard`."""

import argparse
import hashlib
import io
import json
import os
import tarfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cobra.checkpoint
from cobra.config import PRESETS, CobraConfig
from cobra.processor import Processor
from cobra.progress import track
from cobra.prompt import IGNORE, Rendered
from cobra.tokenizer import Tokenizer
from train.data.dataset import image_check, name_row, open_parts
from train.data.images import ImageFile, ImageFinder
from train.data.pairs import render_pair
from train.data.rows import Row, parse_row
from train.settings import DataSettings
from vision_scan.errors import CommandParser, UserError, choose

NUM_BARS, BAR_WIDTH = 12, 40
NUM_TOLD = 20  # lines of a report on rows of one kind


def main(arguments: Sequence[str]) -> bool:
    """Runs a command; False if `check` found rows that cannot be used."""
    options = _parser().parse_args(arguments)
    return options.run(options)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(prog="python -m train data", description="Looks at data, and packs it.")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], bool], does: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=does, description=f"{does[0].upper()}{does[1:]}.")
        command.set_defaults(run=run)
        command.add_argument("path", metavar="PATH", help="JSON, JSONL, tar shards, or a .yaml mixture")
        command.add_argument(
            "--image-root", metavar="DIR", help="the folder of the images; default: that of PATH"
        )
        return command

    check = add("check", run_check, "read every row and the header of every image, and report")
    check.add_argument("--full", action="store_true", help="decode every image")
    inspect = add("inspect", run_inspect, "print rows as a model reads them, what is learned in colour")
    inspect.add_argument(
        "--row", metavar="NUMBER|ID", action="append", default=[], help="which row; default: the first"
    )
    for command in (check, inspect):
        command.add_argument(
            "--model",
            metavar="DIR|PRESET",
            default="tiny",
            help="whose tokenizer, template and tokens per image count; default: tiny",
        )
        command.add_argument("--max-tokens", type=int, metavar="N", help="as data.max_tokens")
        command.add_argument("--captions", action="store_true", help="as data.captions=true")
    shard = add("shard", run_shard, "write the rows and their images as WebDataset shards")
    shard.add_argument("--output", metavar="DIR", required=True, help="a new folder")
    shard.add_argument("--max-mb", type=float, default=500.0, metavar="MB", help="size of a shard; default: 500")
    return parser


def build_processor(name: str) -> Processor:
    """The processor of a model directory, or of a preset with the tokenizer of bytes."""
    if os.path.isdir(name):
        tokenizer = Tokenizer.from_file(Path(name) / cobra.checkpoint.TOKENIZER)
        return Processor(cobra.checkpoint.read_config(name), tokenizer)
    return Processor(choose("preset or model directory", name, PRESETS), Tokenizer.bytes())


def _render(row: Row, processor: Processor, settings: DataSettings) -> list[Rendered]:
    """A conversation, or one with each of the answers of preference data."""
    if row.answers:
        return render_pair(row, processor).conversations()
    return [processor.render(row.turns, len(row.images), settings.captions, row.read_sizes(), row.is_video)]


@dataclass
class Report:
    """What `check` counts.

    Attributes:
        bad: one line for each row that cannot be used.
        doubtful: one line for each row that can, and hardly should.
        lengths: tokens of each usable row, of preference data with the longer answer.
        turns: how many rows have how many turns.
        images: how many rows have how many images.
        num_pairs: how many rows are preference data.
    """

    num_rows: int = 0
    bad: list[str] = field(default_factory=list)
    doubtful: list[str] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    num_supervised: int = 0
    turns: Counter[int] = field(default_factory=Counter)
    images: Counter[int] = field(default_factory=Counter)
    num_pairs: int = 0
    _seen: dict[bytes, str] = field(default_factory=dict)

    def add(self, row: Row, processor: Processor, settings: DataSettings) -> None:
        """Takes a row, unless it cannot be rendered."""
        rendered = _render(row, processor, settings) if row.turns else []
        content = repr((row.turns, row.answers, [str(image) for image in row.images])).encode()
        first = self._seen.setdefault(hashlib.sha256(content).digest(), row.id)
        if first is not row.id:
            self.doubtful.append(f"row {row.id}: the same as row {first}")
        empty = sum(turn.role == "assistant" and not turn.text.strip() for turn in row.turns)
        if empty:
            self.doubtful.append(f"row {row.id}: {empty} empty answers")
        self.turns[len(row.turns)] += 1
        self.images[len(row.images)] += 1
        self.num_pairs += bool(row.answers)
        if rendered:
            length = max(len(each.input_ids) for each in rendered)
            self.lengths.append(length)
            self.num_supervised += sum(label != IGNORE for each in rendered for label in each.labels)
            if settings.max_tokens is not None and length > settings.max_tokens:
                self.doubtful.append(f"row {row.id}: {length} tokens, more than {settings.max_tokens}")


def _settings(options: argparse.Namespace) -> DataSettings:
    return DataSettings(
        path=options.path, image_root=options.image_root, max_tokens=options.max_tokens, captions=options.captions
    )


def run_check(options: argparse.Namespace) -> bool:
    """Prints the report; False if there are rows that cannot be used."""
    settings, processor = _settings(options), build_processor(options.model)
    report, check = Report(), image_check("full" if options.full else "headers")
    for raw, name, finder in _raw_rows(settings):
        report.num_rows += 1
        try:
            row = _parse(raw, name, finder)
            for image in row.images:
                check(image)
            report.add(row, processor, settings)
        except UserError as error:
            report.bad.append(f"row {name}: {error}")
    if not report.num_rows:
        raise UserError(f"{options.path} has no rows")
    print("\n".join(describe(report, options, processor)))
    return not report.bad


def _raw_rows(settings: DataSettings) -> Iterator[tuple[Any, str, ImageFinder]]:
    for part in open_parts(Path(str(settings.path)), settings):
        rows = track(part.source.scan(), f"reading {part.source.path.name}")
        for index, (raw, finder, _) in enumerate(rows):
            yield raw, name_row(raw, index), finder


def _parse(raw: Any, name: str, finder: ImageFinder) -> Row:
    keys = raw.keys() if isinstance(raw, dict) else set()
    if {"chosen", "rejected"} & keys:
        needs = "chosen"
    else:
        needs = "regions" if "regions" in keys and not {"conversations", "messages"} & keys else "conversations"
    return parse_row(raw, name, finder, needs)


def describe(report: Report, options: argparse.Namespace, processor: Processor) -> Iterator[str]:
    """The report, line by line."""
    usable = report.num_rows - len(report.bad)
    images = sum(number * count for number, count in report.images.items())
    yield f"{options.path}: {usable:,} usable rows, {images:,} images"
    yield f"  images per row: {_tally(report.images)}"
    yield f"  turns per row:  {_tally(report.turns)}"
    if report.num_pairs:
        yield f"  preference data: {report.num_pairs:,} rows with a chosen and a rejected answer"
    if report.lengths:
        tokens = sum(report.lengths)
        yield (
            f"  tokens by {options.model}: {tokens:,}, of which {report.num_supervised:,} are learned; "
            f"{_most(processor.config)} for an image"
        )
        yield "  tokens per row:"
        yield from histogram(report.lengths)
    for lines, what in ((report.doubtful, "rows to look at"), (report.bad, "rows that cannot be used")):
        if lines:
            yield f"{len(lines):,} {what}:"
            yield from (f"  {line}" for line in lines[:NUM_TOLD])
            if len(lines) > NUM_TOLD:
                yield f"  ... and {len(lines) - NUM_TOLD:,} more"


def _most(config: CobraConfig) -> str:
    most = f"{config.largest_layout.num_tokens:,}"
    return most if config.image.tiles is None else f"at most {most}"


def _tally(counts: Counter[int]) -> str:
    shown = ", ".join(f"{number}: {counts[number]:,}" for number in sorted(counts)[:8])
    return shown + (", ..." if len(counts) > 8 else "")


def histogram(values: Sequence[int]) -> Iterator[str]:
    """Bars of how many values lie in each of some equal ranges."""
    low, high = min(values), max(values)
    width = max(1, -(-(high - low + 1) // NUM_BARS))
    counts = Counter((value - low) // width for value in values)
    most = max(counts.values())
    for bar in range((high - low) // width + 1):
        start = low + bar * width
        blocks = "█" * -(-counts[bar] * BAR_WIDTH // most)
        yield f"  {start:>8,} - {start + width - 1:>8,}  {counts[bar]:>9,}  {blocks}".rstrip()


def run_inspect(options: argparse.Namespace) -> bool:
    """Prints rows as the model reads them."""
    from rich.console import Console

    settings, processor = _settings(options), build_processor(options.model)
    wanted = set(options.row or ["0"])
    console = Console(highlight=False, soft_wrap=True)
    for number, (raw, name, finder) in enumerate(_raw_rows(settings)):
        found = {str(number), name, name.strip("'\"")} & wanted
        if not found:
            continue
        wanted -= found
        try:
            row = _parse(raw, name, finder)
            console.print(*_inspect(row, processor, settings), sep="\n")
        except UserError as error:
            raise UserError(f"row {name}: {error}") from error
        if not wanted:
            return True
    raise UserError(f"{options.path} has no row {', '.join(sorted(wanted))}; give its number, from 0, or its id")


def _inspect(row: Row, processor: Processor, settings: DataSettings) -> Iterator[Any]:
    from rich.text import Text

    rendered = _render(row, processor, settings)
    learned = sum(label != IGNORE for each in rendered for label in each.labels)
    size = max(len(each.input_ids) for each in rendered)
    yield Text(f"row {row.id}: {size:,} tokens, {learned:,} learned (green), {len(row.images)} images", "bold")
    if settings.max_tokens is not None and size > settings.max_tokens:
        fate = "cannot be used" if row.answers else "loses its last exchanges"
        yield Text(f"longer than {settings.max_tokens}: {fate}", "yellow")
    for image in row.images:
        picture = image.open()
        yield Text(f"  {image}: {picture.width} x {picture.height}", "cyan")
    for title, style, each in zip(("chosen:", "rejected:"), ("bold green", "bold red"), rendered, strict=False):
        if row.answers:
            yield Text(title, style)
        yield Text.assemble(*_pieces(each.input_ids, each.labels, processor, style))


def _pieces(
    ids: Sequence[int], labels: Sequence[int], processor: Processor, learned: str
) -> Iterator[tuple[str, str]]:
    """Runs of tokens with their style: image tokens in one, what is learned in its own."""
    start = 0
    image_id = processor.tokenizer.image_id

    def kind(place: int) -> tuple[bool, bool]:
        return ids[place] == image_id, labels[place] != IGNORE

    for place in range(1, len(ids) + 1):
        if place < len(ids) and kind(place) == kind(start):
            continue
        is_image, is_learned = kind(start)
        text = f"[{place - start} image tokens]" if is_image else processor.tokenizer.decode(ids[start:place], False)
        yield text, "cyan" if is_image else learned if is_learned else "dim"
        start = place


def run_shard(options: argparse.Namespace) -> bool:
    """Writes shards into a folder that appears when all are written."""
    output = Path(options.output)
    if output.exists():
        raise UserError(f"--output {output} exists; give a new folder")
    if options.max_mb <= 0:
        raise UserError(f"--max-mb {options.max_mb:g}: must be above 0")
    settings = DataSettings(path=options.path, image_root=options.image_root)
    staging = output.with_name(f".{output.name}.writing")
    staging.mkdir(parents=True, exist_ok=True)
    for left in staging.iterdir():
        left.unlink()
    writer = ShardWriter(staging, int(options.max_mb * 1e6))
    try:
        for raw, name, finder in _raw_rows(settings):
            try:
                writer.add(raw, _parse(raw, name, finder).images)
            except (UserError, OSError) as error:
                raise UserError(f"row {name}: {error}; see python -m train data check") from error
        writer.close()
        staging.rename(output)
    except BaseException:
        writer.close()
        for left in staging.iterdir():
            left.unlink()
        staging.rmdir()
        raise
    print(f"{output}: {writer.num_rows:,} rows in {writer.num_shards} shards")
    return True


class ShardWriter:
    """Rows and the files of their images as tar files: `000000012.json`, `000000012.0.jpg`, ...

    Args:
        folder: gets `shard-000000.tar`, ...
        max_bytes: after which a new shard begins.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self.num_rows = self.num_shards = 0
        self._tar: tarfile.TarFile | None = None

    def add(self, raw: dict[str, Any], images: Sequence[ImageFile]) -> None:
        """Writes a row with its images; `image` then names them as they are called in the shard."""
        key = f"{self.num_rows:09d}"
        names = [f"{index}{_suffix(image)}" for index, image in enumerate(images)]
        row = _with_images(raw, names)
        if self._tar is not None and self._tar.offset > self.max_bytes:
            self.close()
        if self._tar is None:
            self._tar = tarfile.open(  # noqa: SIM115 (closed by `close`)
                self.folder / f"shard-{self.num_shards:06d}.tar", "w"
            )
            self.num_shards += 1
        self._write(f"{key}.json", json.dumps(row, ensure_ascii=False).encode())
        for name, image in zip(names, images, strict=True):
            self._write(f"{key}.{name}", image.read())
        self.num_rows += 1

    def _write(self, name: str, data: bytes) -> None:
        member = tarfile.TarInfo(name)  # without owner and time: the same rows give the same bytes
        member.size = len(data)
        assert self._tar is not None
        self._tar.addfile(member, io.BytesIO(data))

    def close(self) -> None:
        if self._tar is not None:
            self._tar.close()
        self._tar = None


def _suffix(image: ImageFile) -> str:
    suffix = os.path.splitext(str(image))[1].lower()
    return suffix if suffix.isascii() and suffix[1:].isalnum() and len(suffix) <= 5 else ".png"


def _with_images(raw: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The row with other names for its images, in the same places: parts of messages take them in turn."""
    row = {key: value for key, value in raw.items() if key not in ("image", "images")}
    key = "messages" if "messages" in row else "prompt"
    if isinstance(row.get(key), list) and "conversations" not in row:
        row[key] = [
            {**message, "content": [_without_name(part) for part in message["content"]]}
            if isinstance(message.get("content"), list)
            else message
            for message in row[key]
        ]
    is_video = "conversations" in row and row.get("video") is not None
    row["video" if is_video else "image" if "conversations" in row or "regions" in row else "images"] = names
    return {key: value for key, value in row.items() if value != [] or key == "conversations"}


def _without_name(part: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image"} if part.get("type") in ("image", "image_url") else part
