"""What a run will take, before anything is loaded: parameters, steps, memory of each process, hours.

`python -m train plan --recipe cobra-3b --ranks 1,8,64 --rows 1231000`
"""

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cobra.lm import LanguageModel
from cobra.model import Cobra
from cobra.tokenizer import Tokenizer
from train import lora
from train.cost import TrainingCost
from train.data.dataset import Dataset, open_dataset
from train.engine import BUCKET_ELEMENTS
from train.init import given_sections
from train.objectives import OBJECTIVES, Objective
from train.settings import PARTS, DataSettings, RunConfig
from vision_scan.errors import CommandParser, UserError

FLOAT32 = 4  # bytes; weights, gradients and optimizer states are float32 in every stage
STAGES = (0, 1, 2, 3)
TEXT_TOKENS = 200  # of a row, where no data says better: about what LLaVA-1.5's instructions have
SHARE_LEARNED = 0.6  # of its text that is answers
GIGA = 1e9


@dataclass(frozen=True)
class StaticMemory:
    """Bytes of one process that do not depend on the batch.

    Attributes:
        weights: the parameters of the forward pass, whole or, at stage 3, its share.
        masters: DeepSpeed's second, flat copy of the parameters that this process updates (stages 1 to 3).
        gradients: of the parameters that learn, whole or its share.
        optimizer: AdamW's two averages.
        buckets: where gradients wait to be sent.
    """

    weights: int
    masters: int
    gradients: int
    optimizer: int
    buckets: int

    @property
    def total(self) -> int:
        return self.weights + self.masters + self.gradients + self.optimizer + self.buckets


def static_memory(
    num_parameters: int, num_learning: int, stage: int, ranks: int, offload: bool = False
) -> StaticMemory:
    """What a process holds at a ZeRO stage; offloaded states lie in the CPU's memory and are not counted."""
    share = -(-num_learning // ranks)
    updated = share if stage else num_learning
    return StaticMemory(
        weights=FLOAT32 * (-(-num_parameters // ranks) if stage == 3 else num_parameters),
        masters=0 if not stage or offload else FLOAT32 * share,
        gradients=FLOAT32 * (share if stage >= 2 else num_learning),
        optimizer=0 if offload else 2 * FLOAT32 * updated,
        buckets=0 if not stage else FLOAT32 * min(BUCKET_ELEMENTS, num_learning),
    )


def kept_bytes(module: nn.Module, *inputs: Any) -> int:
    """Bytes that autograd keeps of a forward pass; module and inputs may be on the meta device, and modules among the
    inputs."""
    modules = [each for each in (module, *inputs) if isinstance(each, nn.Module)]
    own = {parameter.untyped_storage()._cdata for each in modules for parameter in each.parameters()}
    kept: dict[int, int] = {}
    alive = []  # else an address might be used twice

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()  # a weight is kept as a view of itself
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive.append(module(*inputs))
    return sum(kept.values())


def activation_memory(model: Cobra, config: RunConfig, rows: int, length: int) -> int:
    """Bytes that a micro-batch keeps between forward and backward pass, as float32; under bfloat16 it is less.

    Args:
        model: on the meta device, in training mode, its frozen parts frozen.
        config: says what is computed again.
        rows, length: of the micro-batch; one image a row, with as many tokens as an image may have.
    """
    learns = {part: any(p.requires_grad for p in getattr(model, part).parameters()) for part in PARTS}
    total = _tile_bytes(model, rows, learns)
    residual = FLOAT32 * rows * length * model.config.lm.d_model
    settings = config.train
    piece = min(length, settings.segment_tokens) if settings.recompute == "segment" else length
    kinds = model.config.lm.layers
    distinct = {kind: index for index, kind in enumerate(kinds)}
    layers = {kind: _layer_bytes(model.lm, index, rows, piece) for kind, index in distinct.items()}
    each = [layers[kind] for kind in kinds]
    if settings.recompute == "layer":
        total += residual * len(each) + max(each)
    else:
        total += sum(each)
    if settings.recompute == "segment":
        total += -(-length // piece) * sum(_state_bytes(model, rows))
    head = FLOAT32 * model.config.lm.vocab_size * model.config.lm.d_model  # its gradient, made in the forward pass
    return total + 2 * residual + head


def _tile_bytes(model: Cobra, rows: int, learns: dict[str, bool]) -> int:
    """What tower and connector keep of the tiles of so many images."""
    config, tower, total = model.config, model.vision_encoder, 0
    for grid, count in Counter(config.largest_layout.grids(config.grid)).items():
        is_sized = config.image.tiles is not None and config.image.tiles.varies
        size = [cells * config.tile_frame.stride for cells in grid] if is_sized else config.tile_frame.tile
        if learns["vision_encoder"]:
            total += kept_bytes(tower, torch.empty(rows * count, 3, *size, device="meta"))
        if learns["vision_encoder"] or learns["connector"]:
            cells = grid if is_sized else config.connector_grid
            shape = rows * count, *cells, tower.d_model
            features = torch.empty(shape, device="meta", requires_grad=learns["vision_encoder"])
            total += kept_bytes(model.connector, features)
    return total


def _layer_bytes(lm: LanguageModel, index: int, rows: int, length: int) -> int:
    from cobra.lm.mixer import Segments

    x = torch.empty(rows, length, lm.config.d_model, device="meta", requires_grad=True)
    segments = Segments(torch.zeros(rows, dtype=torch.int64), embeddings=x)
    return kept_bytes(lm.layers[index], x, None, segments, torch.float32, lm.shared_by(index))


def _state_bytes(model: Cobra, rows: int) -> Iterator[int]:
    for block in model.lm.layers:
        state = block.mixer.allocate(rows, 1, "meta", torch.float32)
        yield sum(tensor.numel() * tensor.element_size() for tensor in state.values())


@dataclass(frozen=True)
class Course:
    """The data of a run in numbers: rows of an epoch, and tokens and learned tokens of a row with one image."""

    num_rows: int
    length: int
    num_learned: int
    source: str


def describe(config: RunConfig, course: Course, ranks: Sequence[int], mfu: float, peak: float) -> Iterator[str]:
    """The plan, line by line."""
    model = build_meta(config)
    objective = build_meta_objective(config, model)
    counts = {part: [p.numel() for p in getattr(model, part).parameters()] for part in PARTS}
    learning = {part: _count(getattr(model, part), learning_only=True) for part in PARTS}
    yield f"recipe {config.recipe}: preset {config.model.preset}"
    for part in PARTS:
        yield f"  {part:<16}{sum(counts[part]):>16,} parameters, {learning[part]:>16,} of them learn"
    settings = config.train
    num_steps = settings.steps
    if settings.epochs is not None:
        num_steps = max(1, -(-int(settings.epochs * course.num_rows) // settings.batch_size))
    cost = TrainingCost(objective)
    num_tiles = cost.count_tiles([model.config.largest_layout])
    flops = settings.batch_size * cost.of(num_tiles, [course.length], course.num_learned)
    yield (
        f"steps: {num_steps:,} of {settings.batch_size} rows; {course.length:,} tokens a row ({course.source}), "
        f"{settings.batch_size * course.length:,} a step; {flops / 1e15:.3g} PFLOP a step"
    )
    yield (
        f"memory of a process in GB, by ZeRO stage (this run: {config.zero.stage}), and hours at {mfu:.0%} of "
        f"{peak:g} TFLOP/s:"
    )
    stages = "".join(f"{f'ZeRO {stage}':>9}" for stage in STAGES)
    yield f"  ranks  rows x accumulated  {stages}   activations     hours"
    total, learns = _count(model), _count(model, learning_only=True)
    for count in ranks:
        yield _describe_ranks(config, model, count, total, learns, course, num_steps * flops / (mfu * peak * 1e12))


def _describe_ranks(
    config: RunConfig, model: Cobra, ranks: int, total: int, learns: int, course: Course, seconds: float
) -> str:
    micro, accumulation = split_batch(config, ranks)
    if accumulation is None:
        share = config.train.batch_size * config.train.sequence_parallel // ranks
        advice = f"; set train.micro_batch_size={share}" if share else ""
        return f"  {ranks:>5}  {config.train.batch_size} rows cannot be shared out{advice}"
    cells = []
    for stage in STAGES:
        memory = static_memory(total, learns, stage, ranks, stage > 0 and config.zero.offload_optimizer)
        mark = "*" if stage == config.zero.stage else " "
        cells.append(f"{memory.total / GIGA:>8.1f}{mark}")
    length = -(-course.length // config.train.sequence_parallel)
    activations = activation_memory(model, config, micro, length)
    return (
        f"  {ranks:>5}  {micro:>6} x {accumulation:<11}{''.join(cells)}{activations / GIGA:>14.1f}"
        f"{seconds / 3600 / ranks:>10.1f}"
    )


def split_batch(config: RunConfig, ranks: int) -> tuple[int, int | None]:
    """Rows of a micro-batch, and how many a step has; None if it cannot be shared out."""
    settings = config.train
    readers, left = divmod(ranks, settings.sequence_parallel)
    if left or not readers:
        return 0, None
    micro = settings.micro_batch_size or max(1, settings.batch_size // readers)
    accumulation, left = divmod(settings.batch_size, micro * readers)
    return micro, None if left or not accumulation else accumulation


def build_meta(config: RunConfig) -> Cobra:
    """The model of a run without memory behind it, its frozen parts frozen."""
    with torch.device("meta"):
        model = Cobra(config.model.build_config(given_sections(config)), Tokenizer.bytes()).train()
    parts = lora.adapted_parts(config)
    if parts:  # where adapters begin does not matter here
        lora.inject(model, replace(config.lora, init="default", alpha=1.0), parts, seed=0)
    for part in config.train.freeze:
        getattr(model, part).requires_grad_(False)
    return model


def build_meta_objective(config: RunConfig, model: Cobra) -> Objective:
    """The objective of a run, for what it costs."""
    return OBJECTIVES["conversation"](model, Dataset(config.data, "conversations", []), None)


def _count(module: nn.Module, learning_only: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not learning_only)


def measure_course(config: RunConfig, options: argparse.Namespace) -> Course:
    """The numbers of the data: of what is at `data.path`, else as the options say."""
    tokens_per_image = config.model.build_config(given_sections(config)).largest_layout.num_tokens
    if options.rows is None and config.data.path is not None:
        rows = open_dataset(DataSettings(**{**vars(config.data), "check": "none", "skip_bad": True}))
        characters = int(rows.num_characters.mean())
        length = characters // 4 + round(tokens_per_image * float(rows.num_images.mean()))
        learned = round(SHARE_LEARNED * characters / 4)
        return Course(rows.epoch_size, length, learned, f"by {Path(config.data.path).name}")
    if options.rows is None and config.train.epochs is not None:
        raise UserError("plan: how many rows has an epoch? give --rows N, or the data (--set data.path=FILE)")
    text = options.text_tokens
    return Course(options.rows or 0, tokens_per_image + text, round(SHARE_LEARNED * text), "one image, --text-tokens")


def add_arguments(parser: CommandParser) -> None:
    """The options of `plan` beside those of a run."""
    parser.add_argument("--ranks", metavar="N,...", default="1,2,4,8,16,32,64", help="numbers of processes")
    parser.add_argument("--rows", type=int, metavar="N", help="rows of an epoch; default: those of data.path")
    parser.add_argument(
        "--text-tokens", type=int, metavar="N", default=TEXT_TOKENS, help=f"of a row; default: {TEXT_TOKENS}"
    )
    parser.add_argument("--mfu", type=float, default=0.35, metavar="SHARE", help="of the peak; default: 0.35")
    parser.add_argument(
        "--peak-tflops", type=float, default=989.4, metavar="N", help="of a device; default: 989.4, an H100's in bf16"
    )


def parse_ranks(text: str) -> list[int]:
    """The numbers of --ranks."""
    try:
        ranks = [int(word) for word in text.split(",")]
    except ValueError:
        ranks = []
    if not ranks or min(ranks) < 1:
        raise UserError(f"--ranks {text}: allowed: numbers of processes, 1 or more, as 1,8,64")
    return ranks


def plan(config: RunConfig, options: argparse.Namespace) -> Iterator[str]:
    """The lines of the plan that a command asks for.

    Raises:
        UserError: if one number of processes is asked for, and a step's rows cannot be shared out to it.
    """
    ranks = parse_ranks(options.ranks)
    if not 0 < options.mfu <= 1:
        raise UserError(f"--mfu {options.mfu:g}: allowed: above 0, at most 1")
    micro, accumulation = split_batch(config, ranks[0])
    if len(ranks) == 1 and accumulation is None:
        raise UserError(
            f"train.batch_size={config.train.batch_size} is not a multiple of train.micro_batch_size={micro or 1} x "
            f"{ranks[0]} processes / train.sequence_parallel={config.train.sequence_parallel}; change one of them"
        )
    if config.train.objective != "conversation":
        return iter([f"recipe {config.recipe}: objective {config.train.objective}, of which there is no plan"])
    return describe(config, measure_course(config, options), ranks, options.mfu, options.peak_tflops)
