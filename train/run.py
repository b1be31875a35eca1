"""A whole training run: settings in, model directory out."""

import contextlib
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

import cobra
import cobra.checkpoint
import vision_scan
from train import processes
from train import resume as resuming
from train import run_directory as directory
from train.cost import RowCost, TrainingCost
from train.data.batches import BatchSource, SampleOrder
from train.data.dataset import Dataset, open_dataset
from train.data.loader import load_steps
from train.engine import build_engine
from train.init import build_model, build_objective, check_language_model, load_model, share_sequences
from train.loop import Loop, train
from train.lora import adapted_parts, describe, is_adapter
from train.metrics import Metrics
from train.objectives import OBJECTIVES, Conversation, Objective
from train.optim import build_optimizer, describe_groups
from train.settings import PARTS, RunConfig
from train.ssm_statistics import SSMStatistics
from train.stop import StopRequest
from train.validation import open_validation
from vision_scan.errors import UserError


def run(
    config: RunConfig,
    output: str | Path,
    resume: bool = False,
    report: Callable[[str], None] = lambda line: None,
) -> bool:
    """Trains a model and leaves it in `output`, which is then a model directory.

    Args:
        config: the settings; on resuming, those of the run.
        output: a directory without a run; with `resume`, one whose run is to be continued. A run
            that was killed before its first checkpoint begins again.
        resume: whether to continue.
        report: takes the lines of the plan before the first step, on the first process.
    Returns:
        whether the run is finished; if not, it was asked to stop and can be resumed.
    Raises:
        UserError: for a mistake in settings or data; if found before the first step, nothing was
            written.
        NonFiniteError: if the loss or gradient is no longer finite.
    """
    output = Path(output)
    with StopRequest() as stop:
        _check_paths(config, output, resume)
        loop, plan = prepare(config, output, resume)
        is_first = loop.engine.rank == 0
        if is_first:
            for line in [*plan, f"output: {output}"]:
                report(line)
        processes.on_first(lambda: directory.write_run(output, config))  # nobody goes on before it is there
        metrics = _watch(loop, output) if is_first else None
        try:
            finished = train(loop, stop, metrics)
        finally:
            loop.batches.close()
            loop.checkpoints.close()
            if metrics is not None:
                metrics.close()
        if finished:
            resuming.save_model(loop.engine, output)
        return finished


def _watch(loop: Loop, output: Path) -> Metrics:
    """What looks on while the loop runs."""
    engine = loop.engine
    statistics = SSMStatistics(engine.objective) if loop.config.log.ssm else None
    return Metrics(output, loop.config, loop.num_steps, loop.start, engine.device, engine.world_size, statistics)


def prepare(config: RunConfig, output: Path, resume: bool = False) -> tuple[Loop, list[str]]:
    """Everything that the loop works with, as at the start or as it was at a checkpoint, and the lines of the plan."""
    settings, data = config.train, config.data
    device = processes.choose_device(settings.device)
    rank, world_size = processes.join_processes(settings.engine, device, settings.timeout)
    rows = open_dataset(data, OBJECTIVES[settings.objective].needs, rank, world_size, processes.gather)
    # The first one looks through the files.
    checkpoint = processes.on_first(lambda: directory.choose_checkpoint(output)) if resume else None
    model = build_model(config, rows) if checkpoint is None else load_model(config, rows, checkpoint)
    objective = build_objective(config, model, rows, device)
    torch.manual_seed(settings.seed + rank // settings.sequence_parallel)  # of dropout, which differs with the rows
    if checkpoint is not None:
        objective.load_extra_state(resuming.read_state(checkpoint, "objective:"))
    group = processes.share_rows(settings.sequence_parallel)
    if group is not None:
        share_sequences(objective, group, config)
    cost = TrainingCost(objective)  # before DeepSpeed takes the parameters apart, as the plan
    readers = settings.sequence_parallel
    source = build_source(config, objective, rows, cost, rank // readers, world_size // readers)
    num_steps = count_steps(config, rows)
    workers = (4 if device.type == "cuda" else 0) if data.workers is None else data.workers
    validation = open_validation(config, objective, source, num_steps, workers)
    optimizer = build_optimizer(objective, config.optim)
    plan = list(describe_model(config, objective, optimizer))
    if checkpoint is None and config.init.path is not None and "lm" in config.init.parts:
        plan.append(check_language_model(model, config))
    engine = build_engine(settings.engine, objective, optimizer, device, config.zero)
    processes.limit_waiting(settings.timeout)
    checkpoints = resuming.Checkpoints(output, config, rows.fingerprint)
    start = 0 if checkpoint is None else checkpoints.restore(engine, checkpoint)
    loop = Loop(
        config=config,
        num_steps=num_steps,
        start=start,
        engine=engine,
        source=source,
        batches=load_steps(source, start, num_steps, workers, pin_memory=device.type == "cuda"),
        checkpoints=checkpoints,
        cost=cost,
        validation=validation,
    )
    return loop, [*plan, *describe_course(loop, rows)]


def build_source(
    config: RunConfig, objective: Objective, rows: Dataset, cost: TrainingCost, rank: int, world_size: int
) -> BatchSource:
    """The batches of this process, of conversations shared out by what they cost."""
    settings, data = config.train, config.data
    order = SampleOrder(rows.lengths, settings.batch_size, settings.seed, data.length_group, rows.shares)
    is_uneven = isinstance(objective, Conversation) and world_size > 1
    return BatchSource(
        objective,
        rows,
        order,
        RowCost(cost, objective, rows) if is_uneven else None,
        micro_batch_size=settings.micro_batch_size,
        rank=rank,
        world_size=world_size,
        skip_bad=data.skip_bad,
    )


def count_steps(config: RunConfig, rows: Dataset) -> int:
    """Optimizer steps of the run: as set, or as many as the epochs take."""
    if config.train.epochs is None:
        return config.train.steps
    return max(1, math.ceil(config.train.epochs * rows.epoch_size / config.train.batch_size))


def describe_model(config: RunConfig, objective: Objective, optimizer: torch.optim.Optimizer) -> Iterator[str]:
    """What learns, and how, line by line."""
    settings, optim, model, adapted = config.train, config.optim, objective.model, adapted_parts(config)
    origin = f"a student of {config.distill.teacher}" if config.makes_student else f"preset {config.model.preset}"
    yield f"recipe {config.recipe}: {origin}, objective {settings.objective}"
    for part in PARTS:
        own = [value for name, value in getattr(model, part).named_parameters() if not is_adapter(name)]
        count = sum(parameter.numel() for parameter in own)
        learning = sum(parameter.numel() for parameter in own if parameter.requires_grad)
        fate = "frozen but for adapters" if part in adapted else "trained" if learning else "frozen"
        fate = f"{learning:,} of them trained" if 0 < learning < count and part not in adapted else fate
        taken = config.init.path is not None and part in config.init.parts
        origin = f", from {config.init.path}" if taken else ""
        yield f"  {part:<16}{count:>14,} parameters, {fate}{origin}"
    if adapted:
        yield from describe(model, config.lora, adapted)
    yield from objective.describe()
    yield f"optimizer: {optim.kind}, learning rate {optim.lr:g} falling to {optim.min_lr_ratio:.0%} of it"
    yield from describe_groups(optimizer)


def describe_course(loop: Loop, rows: Dataset) -> Iterator[str]:
    """What it learns from, and where it runs, line by line."""
    config, engine, source = loop.config, loop.engine, loop.source
    settings = config.train
    yield f"data: {rows.path}, {len(rows):,} rows, images checked: {config.data.check}"
    if rows.bad:
        yield f"  {len(rows.bad):,} rows left out: {'; '.join(rows.bad[:3])}, ..."
    if loop.validation is not None:
        yield loop.validation.describe()
    numbers = source.order.batch(loop.start)
    num_tokens = 0
    for number in numbers:
        with contextlib.suppress(UserError):  # a bad row: the step says so, or takes another
            num_tokens += engine.objective.num_tokens(rows[number])
    epochs = loop.num_steps * settings.batch_size / rows.epoch_size
    yield (
        f"steps: {loop.num_steps:,} of {settings.batch_size} rows ({epochs:.1f} epochs), "
        f"{loop.start:,} of them done"
    )
    yield (
        f"  {source.micro_batch_size} rows x {source.accumulation} accumulated x "
        f"{engine.world_size} processes, about {num_tokens:,} tokens a step"
    )
    dtype = "float32" if engine.objective.autocast is None else "bfloat16 autocast"
    zero = f", ZeRO {config.zero.stage}" if config.zero.stage else ""
    yield f"engine: {settings.engine}{zero}, {engine.device}, {dtype}, {torch.get_num_threads()} threads"
    kernels = vision_scan.backend_report()
    kinds = ", ".join(f"{name} {report[engine.device.type]}" for name, report in kernels.items())
    yield f"kernels: {kinds}"


def _check_paths(config: RunConfig, output: Path, resume: bool) -> None:
    """Whether what was asked for can be done in the output directory.

    Raises:
        UserError: if not.
    """
    if output.exists() and not output.is_dir():
        raise UserError(f"--output {output} is a file; give a directory")
    if not resume:
        if config.init.path is not None and not Path(config.init.path).is_dir():
            raise UserError(
                f"--init-from {config.init.path}: no such directory; give a model directory"
            )
        if directory.holds_run(output):
            raise UserError(
                f"{output} already holds a run or a model; use --resume, or another --output"
            )
    elif (output / directory.RUN).exists():
        directory.check_same(directory.read_run(output), config, output)
    elif (output / cobra.checkpoint.CONFIG).exists():
        raise UserError(f"{output} holds a model but no run to resume; use another --output")
