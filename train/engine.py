"""How a step is carried out: by DeepSpeed, on one process or many, or by torch alone.

The loop hands an engine micro-batches whose loss is a sum over tokens, and one factor, 1 /
(supervised tokens of the whole step, over all processes). So every token counts the same, however
unevenly the tokens fall on micro-batches and processes.
"""

import logging
import math
import os
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from cobra.lm.precision import has_native_bf16
from train.collate import Batch
from train.objectives import Objective, Stats
from vision_scan.errors import UserError


class PlainEngine:
    """One process, torch only; what `DeepSpeedEngine` does in many."""

    rank = 0
    world_size = 1

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.device = device
        self.parameters = [
            parameter for parameter in objective.parameters() if parameter.requires_grad
        ]

    def backward(self, batch: Batch, scale: float, last: bool) -> tuple[Tensor, Stats]:
        """Adds the gradients of one micro-batch.

        Args:
            batch: the micro-batch of this process.
            scale: what a token's loss counts in the step.
            last: whether it is the last micro-batch of the step.
        Returns:
            the sum of the micro-batch's losses, detached, and the objective's stats.
        """
        loss, stats = self._forward(batch)
        (loss * scale).backward()
        return loss.detach(), stats

    def clip(self, max_norm: float) -> float:
        """Scales the step's gradients down to a norm of `max_norm` (0: never); returns their norm
        before."""
        for parameter in self.parameters:
            if parameter.grad is None:  # an unused part: a zero gradient, as DeepSpeed has it
                parameter.grad = torch.zeros_like(parameter)
        return torch.nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf).item()

    def step(self) -> None:
        """Updates the parameters and forgets the gradients."""
        self.optimizer.step()
        self.optimizer.zero_grad()

    def sum(self, values: list[float]) -> list[float]:
        """The sums of these numbers over all processes."""
        return values

    def gather(self, item: Any) -> list[Any]:
        """An object of each process, in the order of their ranks."""
        return [item]

    def _forward(self, batch: Batch) -> tuple[Tensor, Stats]:
        inputs = {
            name: value.to(self.device) if isinstance(value, Tensor) else value
            for name, value in batch.inputs.items()
        }
        loss, stats = self._call(inputs)
        if not loss.requires_grad:  # a text-only batch while only the tower learns
            loss = loss + 0.0 * self.parameters[0].sum()
        return loss, stats

    def _call(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        return self.objective(inputs)


class DeepSpeedEngine(PlainEngine):
    """DeepSpeed, data-parallel over the processes of torchrun or the deepspeed launcher, or one
    process alone."""

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, device: torch.device
    ) -> None:
        super().__init__(objective, optimizer, device)
        deepspeed = _import_deepspeed(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._engine, *_ = deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config=deepspeed_config(),
            dist_init_required=False,
        )

    def backward(self, batch: Batch, scale: float, last: bool) -> tuple[Tensor, Stats]:
        self._engine.set_gradient_accumulation_boundary(last)
        loss, stats = self._forward(batch)
        # DeepSpeed averages over the processes; a sum is wanted.
        self._engine.backward(loss * (scale * self.world_size), scale_wrt_gas=False)
        return loss.detach(), stats

    def step(self) -> None:
        self._engine.step()

    def sum(self, values: list[float]) -> list[float]:
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, item: Any) -> list[Any]:
        items = [None] * self.world_size
        dist.all_gather_object(items, item)
        return items

    def _call(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        return self._engine(inputs)


ENGINES: dict[str, type[PlainEngine]] = {"deepspeed": DeepSpeedEngine, "plain": PlainEngine}


def deepspeed_config() -> dict[str, Any]:
    """DeepSpeed's own configuration. Accumulation and clipping are the engine's, through the
    boundary that it announces; DeepSpeed only has to be told that each announced step is one."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": 0},
        "steps_per_print": None,
    }


def choose_device(name: Literal["auto", "cpu", "cuda"]) -> torch.device:
    """The device of this process."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("train.device=cuda, but torch sees no CUDA device; use auto or cpu")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    torch.cuda.set_device(device)
    return device


def autocast_dtype(
    name: Literal["auto", "float32", "bfloat16"], device: torch.device
) -> torch.dtype | None:
    """The dtype of the autocast forward pass, None for float32."""
    if name == "auto":
        name = "bfloat16" if has_native_bf16(device) else "float32"
    return torch.bfloat16 if name == "bfloat16" else None


def join_processes(engine: str, device: torch.device) -> tuple[int, int]:
    """Connects the processes that a launcher started: (rank, number of processes).

    A single process without a launcher needs no address or port: it talks to itself. Processes
    that are connected already stay so, for the next run.

    Raises:
        UserError: if there are several processes and the engine is plain.
    """
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    if engine == "plain":
        if world_size > 1:
            raise UserError(
                f"train.engine=plain runs 1 process, got {world_size}; use train.engine=deepspeed"
            )
        return 0, 1
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        if "RANK" in os.environ:
            dist.init_process_group(backend, timeout=timedelta(minutes=30))
        else:
            store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(backend, store=store, rank=0, world_size=1)
    return dist.get_rank(), dist.get_world_size()


def leave_processes() -> None:
    """Undoes `join_processes`, for good: DeepSpeed cannot begin again in the same process."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _import_deepspeed(device: torch.device) -> Any:
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", "0")
    try:
        import deepspeed
    except ImportError as error:
        raise UserError(
            "train.engine=deepspeed needs deepspeed: pip install 'cobra-vlm[train]', or set "
            "train.engine=plain"
        ) from error
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # Otherwise DeepSpeed compiles a shared-memory kernel at start, for inference only.
    deepspeed.ops.__compatible_ops__ = {}  # pyright: ignore[reportAttributeAccessIssue]
    return deepspeed
