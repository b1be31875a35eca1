"""How a run goes: steps, processes, the optimizer, what is recorded."""

import re
from dataclasses import dataclass, field
from typing import Literal

from vision_scan.errors import UserError

from .model import PARTS, Part
from .objective import ObjectiveName
from .require import require


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The course of the run."""

    objective: ObjectiveName = "conversation"
    """conversation: the next token of the answers; naming: the words for what stands in each patch
    (connector and embeddings); regions: what stands in each patch (the tower alone); distill_mixer, distill_hidden,
    distill_logits: what a teacher's layers weigh, what they say, and what it answers (`distill`);
    preference: of two answers the better one."""
    freeze: tuple[Part, ...] = ()
    """Parts that do not learn."""
    steps: int = 1000
    """Optimizer steps, unless `epochs` is given."""
    epochs: float | None = None
    """Passes over the data; decides the number of steps if given."""
    batch_size: int = 32
    """Rows per optimizer step, over all processes."""
    micro_batch_size: int | None = None
    """Rows per forward pass and process (or, with sequence_parallel, group of them); None: no accumulation."""
    seed: int = 0
    """Of the initial weights, the order of the rows and dropout."""
    engine: Literal["deepspeed", "plain"] = "deepspeed"
    """deepspeed: one process or many; plain: one process, torch only. Their losses are the same."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the autocast forward pass (weights stay float32); auto: bfloat16 where the device has it
    natively."""
    save_every: int = 500
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints that are kept, the newest ones."""
    sequence_parallel: int = 1
    """Processes that read each row together, a piece each, for rows too long for one; the number of processes must be
    a multiple of it."""
    recompute: Literal["none", "layer", "segment"] = "none"
    """Save memory by computing activations of the language model again in the backward pass: layer by layer, or in
    pieces of `segment_tokens` of which only the state is kept."""
    segment_tokens: int = 1024
    """recompute=segment: tokens of a piece."""
    async_save: bool = True
    """Write checkpoints beside the training; costs memory for a copy of the state on the first process."""
    skip_nonfinite: int = 0
    """Steps in a row that may be left out because their loss or gradient is not finite; more end the run."""
    timeout: float = 30.0
    """Minutes that a process waits for the others before it gives up."""

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "save_every", "keep", "segment_tokens", "sequence_parallel"):
            require(
                getattr(self, name) >= 1,
                f"train.{name}: got {getattr(self, name)}, allowed: 1 or more",
            )
        require(
            self.micro_batch_size is None or self.micro_batch_size >= 1,
            f"train.micro_batch_size: got {self.micro_batch_size}, allowed: 1 or more, or none",
        )
        require(
            self.skip_nonfinite >= 0,
            f"train.skip_nonfinite: got {self.skip_nonfinite}, allowed: 0 or more",
        )
        require(self.timeout > 0, f"train.timeout: got {self.timeout}, allowed: more than 0 minutes")
        require(
            self.epochs is None or self.epochs > 0,
            f"train.epochs: got {self.epochs}, allowed: more than 0, or none",
        )
        require(
            len(set(self.freeze)) < len(PARTS),
            "train.freeze: every part is frozen, nothing would learn",
        )


@dataclass(frozen=True, kw_only=True)
class ZeroSettings:
    """What DeepSpeed shares out over the processes; none of it changes a number by more than rounding."""

    stage: int = 0
    """0: nothing; 1: optimizer states; 2: gradients too; 3: parameters too."""
    offload_optimizer: bool = False
    """Keep optimizer states in the memory of the CPU and update there (stages 1 to 3)."""
    hpz: int = 1
    """Stage 3: processes, those of a node, that keep a second copy of the parameters among them, so that the backward
    pass gathers them within the node."""
    persistence_threshold: int = 100_000
    """Stage 3: parameters of fewer elements stay whole on every process."""

    def __post_init__(self) -> None:
        require(self.stage in (0, 1, 2, 3), f"zero.stage: got {self.stage}, allowed: 0, 1, 2, 3")
        require(self.hpz >= 1, f"zero.hpz: got {self.hpz}, allowed: 1 or more")
        require(
            self.hpz == 1 or self.stage == 3, f"zero.hpz={self.hpz} needs zero.stage=3, got {self.stage}"
        )
        require(
            not self.offload_optimizer or self.stage > 0,
            "zero.offload_optimizer needs zero.stage=1, 2 or 3, got 0",
        )
        require(
            self.persistence_threshold >= 0,
            f"zero.persistence_threshold: got {self.persistence_threshold}, allowed: 0 or more",
        )


@dataclass(frozen=True, kw_only=True)
class LrScale:
    """Factors on `optim.lr` for each part."""

    vision_encoder: float = 1.0
    connector: float = 1.0
    lm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class OptimSettings:
    """The optimizer, under a cosine schedule with linear warm-up."""

    kind: Literal["adamw", "muon"] = "adamw"
    """muon: Muon for the matrices and kernels between features, AdamW for everything else."""
    lr: float = 1e-3
    """The peak learning rate."""
    lr_scale: LrScale = field(default_factory=LrScale)
    weight_decay: float = 0.05
    """Never applied to A_log, D, dt_bias, norms, biases and embeddings."""
    momentum: float = 0.95
    """Of Muon."""
    beta1: float = 0.9
    """AdamW's, as the two below."""
    beta2: float = 0.95
    eps: float = 1e-8
    warmup_ratio: float = 0.03
    """Share of the steps over which the learning rate rises."""
    decay_ratio: float = 1.0
    """Share of the steps, the last ones, over which it falls; 1: from the end of the rise on."""
    min_lr_ratio: float = 0.05
    """Learning rate of the last step, as a share of the peak."""
    clip: float = 1.0
    """Largest norm of the gradient; 0: no clipping."""

    def __post_init__(self) -> None:
        for name in ("lr", "weight_decay", "eps", "clip"):
            require(
                getattr(self, name) >= 0,
                f"optim.{name}: got {getattr(self, name)}, allowed: 0 or more",
            )
        for name in ("momentum", "beta1", "beta2", "warmup_ratio", "decay_ratio", "min_lr_ratio"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"optim.{name}: got {value}, allowed: 0 to 1")


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """Besides `metrics.jsonl` in the output directory, which is always written."""

    every: int = 1
    """Steps between records."""
    wandb: bool = False
    """Send the records to Weights & Biases too; WANDB_MODE=offline is honoured."""
    project: str = "cobra"
    ssm: bool = True
    """Record step sizes and states of recurrent layers."""
    peak_tflops: float | None = None
    """What a device could do at most, in 10^12 operations a second, for the share that is reached; None: what is known
    of the GPU by its name."""
    profile: str | None = None
    """START:COUNT, both in steps: have torch.profiler watch so many steps from START on."""

    def __post_init__(self) -> None:
        require(self.every >= 1, f"log.every: got {self.every}, allowed: 1 or more")
        require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"log.peak_tflops: got {self.peak_tflops}, allowed: more than 0, or none",
        )
        self.profiled_steps  # noqa: B018 (a text of another form fails here)

    @property
    def profiled_steps(self) -> range:
        """The steps to be profiled, counted from 1 as the records do."""
        if self.profile is None:
            return range(0)
        found = re.fullmatch(r"0*([1-9]\d*):0*([1-9]\d*)", self.profile)
        if found is None:
            raise UserError(f"log.profile: got {self.profile!r}, allowed: START:COUNT, both 1 or more, such as 10:3")
        return range(int(found[1]), int(found[1]) + int(found[2]))
