"""How a step is carried out: by DeepSpeed, on one process or many, or by torch alone.

The loop hands an engine micro-batches whose loss is a sum over tokens, and one factor, 1 /
(supervised tokens of the whole step, over all processes). So every token counts the same, however
unevenly the tokens fall on micro-batches and processes.

Weights are float32 in every engine and stage; the forward pass runs under autocast. So what a state-space model needs
in float32 is float32 in the forward pass itself, and a checkpoint has one form: full tensors by name, whoever wrote it.
"""

import logging
import math
import os
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from train.data.collate import Batch
from train.objectives import Objective, Stats
from train.settings import ZeroSettings
from vision_scan.errors import UserError

# Inputs that the model itself brings to the device, as far as it needs them.
STAY = ("pixel_values", "image_sizes", "num_frames")
BUCKET_ELEMENTS = 50_000_000  # that DeepSpeed sends at once

OptimizerState = dict[str, Tensor]
"""What an optimizer keeps of one parameter: arrays of its shape, and `step`."""


class PlainEngine:
    """One process, torch only; what `DeepSpeedEngine` does in many."""

    rank = 0
    world_size = 1

    def __init__(self, objective: Objective, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self.objective = objective
        self.optimizer = optimizer
        self.device = device
        self.named = dict(objective.named_parameters())
        self.parameters = [
            parameter for parameter in self.named.values() if parameter.requires_grad
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

    def evaluate(self, batch: Batch) -> tuple[Tensor, Stats]:
        """What `backward` returns, without any gradient; to be called by all processes equally often."""
        with torch.no_grad():
            return self._call(self._move(batch))

    def step(self, max_norm: float) -> float:
        """Scales the step's gradients down to a norm of `max_norm` (0: never), updates the parameters and forgets the
        gradients. If the norm is not finite, nothing is updated.

        Returns:
            the norm before.
        """
        for parameter in self.parameters:
            if parameter.grad is None:  # an unused part: a zero gradient, as DeepSpeed has it
                parameter.grad = torch.zeros_like(parameter)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_norm or math.inf).item()
        if math.isfinite(norm):
            self._update()
            self.optimizer.zero_grad()
        return norm

    def discard(self) -> None:
        """Forgets the gradients of a step that was not taken."""
        self.optimizer.zero_grad()

    def bad_gradients(self) -> list[str]:
        """The parameters whose gradients are not finite, as far as they can be looked at."""
        return [
            name
            for name, parameter in self.named.items()
            if parameter.grad is not None and not parameter.grad.isfinite().all()
        ]

    def sum(self, values: list[float]) -> list[float]:
        """The sums of these numbers over all processes."""
        return values

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """The full parameters by name, one after the other; on every process, or, where they have to be brought
        together, with values on the first only. To be gone through by all processes."""
        for name, parameter in self.named.items():
            yield name, parameter.detach()

    def optimizer_state(self) -> Iterator[tuple[str, OptimizerState]]:
        """What the optimizer keeps of each parameter that learns; to be gone through by all processes."""
        for name, parameter in self.named.items():
            state = self.optimizer.state.get(parameter)
            if state:
                yield name, state

    def load_optimizer_state(self, read: Callable[[str], OptimizerState]) -> None:
        """Undoes `optimizer_state`; `read` gives the full state of a parameter, empty if there is none."""
        for name, parameter in self.named.items():
            state = read(name) if parameter.requires_grad else {}
            if state:
                self.optimizer.state[parameter] = {
                    key: self._place_step(value, parameter) if key == "step" else value.to(parameter.device)
                    for key, value in state.items()
                }

    def _place_step(self, count: Tensor, parameter: Tensor) -> Tensor:
        """The number of steps, where the optimizer reads it: its fused form beside the parameter, others on the CPU."""
        is_fused = any(group.get("fused") for group in self.optimizer.param_groups)
        return count.to(parameter.device if is_fused else "cpu", copy=True)

    def _update(self) -> None:
        self.optimizer.step()

    def _move(self, batch: Batch) -> dict[str, Any]:
        # Pixels go where they are encoded: of rows that are shared, not all are. Sizes are read on the CPU.
        return {
            name: value.to(self.device, non_blocking=True) if isinstance(value, Tensor) and name not in STAY else value
            for name, value in batch.inputs.items()
        }

    def _forward(self, batch: Batch) -> tuple[Tensor, Stats]:
        loss, stats = self._call(self._move(batch))
        if not loss.requires_grad:  # a text-only batch while only the tower learns
            loss = loss + 0.0 * self.parameters[0].sum()
        return loss, stats

    def _call(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        return self.objective(inputs)


class DeepSpeedEngine(PlainEngine):
    """DeepSpeed at ZeRO stage 0, data-parallel over the processes of a launcher, or one process alone."""

    def __init__(
        self, objective: Objective, optimizer: torch.optim.Optimizer, device: torch.device, zero: ZeroSettings
    ) -> None:
        super().__init__(objective, optimizer, device)
        self.zero = zero
        self.deepspeed = _import_deepspeed(device)
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        objective.model.encodes_always = self.world_size > 1
        self._check()
        if device.type == "cuda":  # a launcher may show each process its own device only; DeepSpeed counts them anew
            os.environ["LOCAL_RANK"] = str(device.index)
        self._engine, *_ = self.deepspeed.initialize(
            model=objective,
            optimizer=optimizer,
            config=deepspeed_config(self.zero, self.world_size),
            dist_init_required=False,
        )
        self._attach()

    def _attach(self) -> None:
        """What is to be done to the model once DeepSpeed has it."""

    def _check(self) -> None:
        """Whether DeepSpeed can take model and optimizer.

        Raises:
            UserError: if not.
        """

    def backward(self, batch: Batch, scale: float, last: bool) -> tuple[Tensor, Stats]:
        self._engine.set_gradient_accumulation_boundary(last)
        loss, stats = self._forward(batch)
        # DeepSpeed averages over the processes; a sum is wanted.
        self._engine.backward(loss * (scale * self.world_size), scale_wrt_gas=False)
        return loss.detach(), stats

    def sum(self, values: list[float]) -> list[float]:
        if self.world_size == 1:
            return values
        total = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return total.tolist()

    def _update(self) -> None:
        self._engine.step()

    def _call(self, inputs: dict[str, Any]) -> tuple[Tensor, Stats]:
        return self._engine(inputs)


class ZeroEngine(DeepSpeedEngine):
    """DeepSpeed at ZeRO stage 1, 2 or 3: optimizer states, gradients and parameters shared out over the processes."""

    def _check(self) -> None:
        if not isinstance(self.optimizer, torch.optim.AdamW):
            raise UserError(
                f"zero.stage={self.zero.stage} cuts parameters in pieces, and optim.kind=muon needs whole matrices; "
                "use optim.kind=adamw, or zero.stage=0"
            )
        most = self.objective.most_zero_stage
        if self.zero.stage > most:
            raise UserError(f"this objective runs at zero.stage 0 to {most}, got {self.zero.stage}; use {most}")
        tiles = self.objective.model.config.image.tiles
        if self.zero.stage == 3 and tiles is not None and tiles.varies:
            raise UserError(
                f"image.tiles={tiles.kind} has each process call the tower as often as its tiles have sizes, and "
                "zero.stage=3 needs the same calls on all; use zero.stage=2, or image.tiles=anyres"
            )
        if self.zero.stage == 3 and self.objective.model.lm.recompute_tokens:
            raise UserError(
                "train.recompute=segment calls layers as often as rows are long, which differs between processes, and "
                "zero.stage=3 needs the same calls on all; use train.recompute=layer, or zero.stage=2"
            )
        hpz = self.zero.hpz
        if self.world_size % hpz:
            raise UserError(f"zero.hpz={hpz} does not divide the {self.world_size} processes")

    def _attach(self) -> None:
        """Has layers, connector and towers bring together all their parameters before they run, and not child by child:
        they read parameters of their children themselves."""
        if self.zero.stage < 3:
            return
        model = self.objective.model
        towers = getattr(model.vision_encoder, "towers", [model.vision_encoder])
        for module in [*model.lm.layers, *model.lm.shared, model.connector, *towers]:
            for child in module.children():
                for parameter in child.parameters():
                    self.deepspeed.zero.register_external_parameter(module, parameter)

    @property
    def _partitions(self) -> list[Tensor]:
        """The flat pieces of parameters that this process updates."""
        wrapped = self._engine.optimizer
        if self.zero.stage == 3:
            return wrapped.fp32_partitioned_groups_flat
        return wrapped.single_partition_of_fp32_groups

    def step(self, max_norm: float) -> float:
        self._engine.optimizer.clip_grad = max_norm
        self._engine.step()  # leaves everything as it is if the norm is not finite
        norm = self._engine.get_global_grad_norm()
        return float("nan") if norm is None else float(norm)

    def discard(self) -> None:
        """DeepSpeed has forgotten them already."""

    def bad_gradients(self) -> list[str]:
        return []

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        if self.zero.stage < 3:
            yield from super().weights()
            return
        for name, parameter in self.named.items():
            with self.deepspeed.zero.GatheredParameters([parameter]):
                yield name, parameter.detach()

    def optimizer_state(self) -> Iterator[tuple[str, OptimizerState]]:
        states = [self.optimizer.state[partition] for partition in self._partitions]
        if not states or not states[0]:
            return
        self._link_states()
        for name, parameter in self.named.items():
            if parameter.requires_grad:
                arrays = {key: self._full(parameter, key) for key, value in states[0].items() if value.ndim}
                yield name, {"step": states[0]["step"], **arrays}

    def _link_states(self) -> None:
        """Has the parameters know their pieces of the optimizer's state. DeepSpeed does so once, within its first step
        and before torch has made them."""
        if self.zero.stage < 3:
            self._engine.optimizer._hp_optimizer_states_linked = False
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()

    def _full(self, parameter: nn.Parameter, key: str) -> Tensor:
        state = self.deepspeed.utils.safe_get_full_optimizer_state(parameter, key)
        return state.view(parameter.ds_shape if self.zero.stage == 3 else parameter.shape)

    def load_optimizer_state(self, read: Callable[[str], OptimizerState]) -> None:
        wanted = {name: p for name, p in self.named.items() if p.requires_grad}
        first = read(next(iter(wanted)))
        if not first:
            return
        for partition in self._partitions:  # as the first step of the optimizer would make it
            arrays = {key: torch.zeros_like(partition) for key in first if key != "step"}
            self.optimizer.state[partition] = {"step": self._place_step(first["step"], partition), **arrays}
        self._link_states()
        for name, parameter in wanted.items():
            for key, value in read(name).items():
                if key != "step":
                    self._set(parameter, key, value)

    def _set(self, parameter: nn.Parameter, key: str, value: Tensor) -> None:
        utils = self.deepspeed.utils
        if self.zero.stage < 3:
            utils.safe_set_full_optimizer_state(parameter, value.to(self.device), key)
            return
        size = parameter.ds_tensor.ds_numel
        rank = self._engine.optimizer._get_param_partition_rank(parameter)
        flat = value.flatten()[size * rank : size * (rank + 1)]
        flat = nn.functional.pad(flat, (0, size - len(flat)))
        utils.safe_set_local_optimizer_state(parameter, flat.to(self.device), key)


def build_engine(
    kind: str, objective: Objective, optimizer: torch.optim.Optimizer, device: torch.device, zero: ZeroSettings
) -> PlainEngine:
    """The engine that `train.engine` and `zero.stage` ask for."""
    if kind == "plain":
        if zero.stage:
            raise UserError(f"zero.stage={zero.stage} needs train.engine=deepspeed")
        return PlainEngine(objective, optimizer, device)
    engine = ZeroEngine if zero.stage else DeepSpeedEngine
    return engine(objective, optimizer, device, zero)


def deepspeed_config(zero: ZeroSettings, world_size: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. Accumulation is the engine's, through the boundary that it announces; DeepSpeed
    only has to be told that each announced step is one."""
    stage: dict[str, Any] = {"stage": zero.stage}
    if zero.stage:
        # Torch's AdamW runs on a CPU too; DeepSpeed's own would be compiled first.
        stage["offload_optimizer"] = {"device": "cpu" if zero.offload_optimizer else "none"}
        stage["overlap_comm"] = torch.cuda.is_available()
        stage["reduce_bucket_size"] = stage["allgather_bucket_size"] = BUCKET_ELEMENTS
    if zero.stage == 3:
        stage["stage3_prefetch_bucket_size"] = BUCKET_ELEMENTS
        stage["zero_hpz_partition_size"] = zero.hpz
        stage["stage3_param_persistence_threshold"] = zero.persistence_threshold
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": stage,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
    }


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
