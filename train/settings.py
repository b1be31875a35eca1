"""What a training run is made of: typed settings, each with what it means and what it allows.

Every setting can be changed from the command line: `--set optim.lr=3e-4`. The fields of the model's
own configuration follow `model.`: `--set model.connector.order=hilbert`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from cobra.config import PRESETS, CobraConfig
from cobra.typed_config import override
from vision_scan.errors import UserError, choose

Part = Literal["vision_encoder", "connector", "lm"]
Objective = Literal[
    "conversation", "naming", "regions", "distill_mixer", "distill_hidden", "distill_logits", "preference"
]
PARTS: tuple[Part, ...] = ("vision_encoder", "connector", "lm")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """Which model: a preset, and changes to its configuration."""

    preset: str = "tiny"
    changes: tuple[str, ...] = ()
    """Overrides of the preset, "connector.depth=2"; `--set model.connector.depth=2` appends one."""

    def __post_init__(self) -> None:
        self.build_config()

    def build_config(self, given: Mapping[str, Any] | None = None) -> CobraConfig:
        """The preset with the changes applied.

        Args:
            given: sections that stand in for the preset's own, those of weights that the run begins with.
        """
        config = choose("preset", self.preset, PRESETS)
        config = dataclasses.replace(config, **(given or {}))
        for change in self.changes:
            path, equals, value = change.partition("=")
            _require(bool(equals), f"model.changes: got {change!r}, allowed: field=value")
            config = override(config, path, value)
        _require(
            config.weights == "plain",
            f"model.weights: got {config.weights}, allowed in training: plain; quantise the trained model",
        )
        return config


@dataclass(frozen=True, kw_only=True)
class InitSettings:
    """Where the weights begin; `--init-from DIR` sets `path`."""

    path: str | None = None
    """A model directory; None: random weights."""
    parts: tuple[Part, ...] = PARTS
    """The parts taken from `path`, each whole; the others begin at random."""
    fresh: tuple[str, ...] = ()
    """Modules of those parts that begin at random all the same, "vision_encoder.scans": what the model at `path` has
    not, or what it should learn anew."""
    tokenizer: bool = True
    """Whether the tokenizer of `path` is taken too; the settings under `tokenizer` are then not
    used."""
    towers: tuple[str, ...] = ()
    """Files with the weights of the timm towers, one for each, in their order."""
    check_lm: bool = True
    """Stop before the first step if a language model from `path` foretells plain English hardly better than
    chance."""
    residual: float = 1.0
    """Factor on what each layer of a language model with random weights adds to the residual stream; 0: at
    first every layer leaves it as it is."""

    def __post_init__(self) -> None:
        _require(self.residual >= 0, f"init.residual: got {self.residual}, allowed: 0 or more")


@dataclass(frozen=True, kw_only=True)
class TokenizerSettings:
    """The tokenizer of a new model."""

    kind: Literal["bytes", "file", "train"] = "train"
    """bytes: one token per byte; file: a Hugging Face tokenizer.json; train: a byte-level BPE
    trained on the text of the data."""
    path: str | None = None
    """kind=file: the tokenizer.json."""
    vocab_size: int = 384
    """kind=train: number of tokens, specials included."""

    def __post_init__(self) -> None:
        _require(
            self.kind != "file" or self.path is not None,
            "tokenizer.kind=file needs a file: set tokenizer.path first",
        )


@dataclass(frozen=True, kw_only=True)
class DataSettings:
    """Rows and the folder of their images."""

    path: str | None = None
    """A .json list or a .jsonl file of rows, tar shards (a file, a folder, a pattern), or a .yaml mixture; has to be
    set."""
    image_root: str | None = None
    """The folder that image paths start from; None: the folder of `path`."""
    check: Literal["headers", "full", "none"] = "headers"
    """What is read of every image before the first step: its header, all of it, or nothing."""
    skip_bad: bool = False
    """Leave out rows that cannot be used, and count them, rather than stop."""
    max_tokens: int | None = None
    """Longer rows lose their last exchanges, images included; None: rows of any length."""
    captions: bool = False
    """Each row is images and a text, learned right behind them: no question, no chat template (LLaVA's "plain")."""
    packing: bool = False
    """Put the rows of a micro-batch one behind the other, the state reset between them, rather than pad them."""
    length_group: int = 16
    """Batches whose rows are sorted by length together, so that rows of a batch are of similar
    length."""
    frames: int = 8
    """Frames taken of a video, evenly spread."""
    workers: int | None = None
    """Processes that make batches ahead; None: none on a CPU, 4 with a GPU."""

    def __post_init__(self) -> None:
        for name in ("length_group", "frames"):
            _require(getattr(self, name) >= 1, f"data.{name}: got {getattr(self, name)}, allowed: 1 or more")
        _require(
            self.max_tokens is None or self.max_tokens >= 2,
            f"data.max_tokens: got {self.max_tokens}, allowed: 2 or more, or none",
        )
        _require(
            self.workers is None or self.workers >= 0,
            f"data.workers: got {self.workers}, allowed: 0 or more, or none",
        )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """The course of the run."""

    objective: Objective = "conversation"
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
            _require(
                getattr(self, name) >= 1,
                f"train.{name}: got {getattr(self, name)}, allowed: 1 or more",
            )
        _require(
            self.micro_batch_size is None or self.micro_batch_size >= 1,
            f"train.micro_batch_size: got {self.micro_batch_size}, allowed: 1 or more, or none",
        )
        _require(
            self.skip_nonfinite >= 0,
            f"train.skip_nonfinite: got {self.skip_nonfinite}, allowed: 0 or more",
        )
        _require(self.timeout > 0, f"train.timeout: got {self.timeout}, allowed: more than 0 minutes")
        _require(
            self.epochs is None or self.epochs > 0,
            f"train.epochs: got {self.epochs}, allowed: more than 0, or none",
        )
        _require(
            len(set(self.freeze)) < len(PARTS),
            "train.freeze: every part is frozen, nothing would learn",
        )


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """A student with recurrent layers, and the transformer that it learns from (students.py)."""

    teacher: str | None = None
    """The model directory of the teacher, for the objectives `distill_*`; without `init.path` the student is made of
    it."""
    student: Literal["mamba2", "gated_deltanet"] = "mamba2"
    """The layers in place of attention, where the student is made of the teacher."""
    keep: tuple[int, ...] = ()
    """Attention layers, counted from 0, that stay where the student is made of the teacher; none: all are replaced."""
    label_share: float = 0.0
    """Of the probabilities that distill_logits teaches, the share that the row's own answer has; the teacher has the
    rest."""

    def __post_init__(self) -> None:
        _require(len(set(self.keep)) == len(self.keep), f"distill.keep: got {self.keep}, allowed: each layer once")
        _require(
            0 <= self.label_share < 1, f"distill.label_share: got {self.label_share}, allowed: 0 to below 1"
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
        _require(self.stage in (0, 1, 2, 3), f"zero.stage: got {self.stage}, allowed: 0, 1, 2, 3")
        _require(self.hpz >= 1, f"zero.hpz: got {self.hpz}, allowed: 1 or more")
        _require(
            self.hpz == 1 or self.stage == 3, f"zero.hpz={self.hpz} needs zero.stage=3, got {self.stage}"
        )
        _require(
            not self.offload_optimizer or self.stage > 0,
            "zero.offload_optimizer needs zero.stage=1, 2 or 3, got 0",
        )
        _require(
            self.persistence_threshold >= 0,
            f"zero.persistence_threshold: got {self.persistence_threshold}, allowed: 0 or more",
        )


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Adapters of low rank, which learn in place of the parts that have them (lora.py)."""

    rank: int = 0
    """Of an adapter, at most the shorter side of its projection; 0: no adapters."""
    alpha: float | None = None
    """What an adapter adds counts alpha / rank; None: twice the rank, and with pissa the rank."""
    dropout: float = 0.0
    """Share of an adapter's inputs that are left out in training."""
    init: Literal["default", "pissa"] = "default"
    """default: an adapter begins with adding nothing; pissa: with the strongest directions of its projection, which
    keeps the rest."""
    targets: tuple[str, ...] = ()
    """Names of projections, "in_proj"; none: all of them."""
    parts: tuple[Literal["connector", "lm"], ...] = ("connector", "lm")
    """The parts that get adapters and are frozen but for them; those in `train.freeze` get none. The other parts learn
    as they do without adapters."""

    def __post_init__(self) -> None:
        _require(self.rank >= 0, f"lora.rank: got {self.rank}, allowed: 0 or more")
        _require(self.alpha is None or self.alpha > 0, f"lora.alpha: got {self.alpha}, allowed: more than 0, or none")
        _require(0 <= self.dropout < 1, f"lora.dropout: got {self.dropout}, allowed: 0 to below 1")
        _require(len(self.parts) > 0, "lora.parts: got none, allowed: connector, lm; for no adapters set lora.rank=0")
        _require(
            self.init == "default" or self.dropout == 0,
            f"lora.dropout: got {self.dropout}, allowed with lora.init=pissa: 0, since its adapters hold what the "
            "projections do most",
        )

    @property
    def scale(self) -> float:
        """How much what an adapter adds counts."""
        if self.alpha is None:
            return 1.0 if self.init == "pissa" else 2.0
        return self.alpha / self.rank


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
            _require(
                getattr(self, name) >= 0,
                f"optim.{name}: got {getattr(self, name)}, allowed: 0 or more",
            )
        for name in ("momentum", "beta1", "beta2", "warmup_ratio", "decay_ratio", "min_lr_ratio"):
            value = getattr(self, name)
            _require(0 <= value <= 1, f"optim.{name}: got {value}, allowed: 0 to 1")


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
        _require(self.every >= 1, f"log.every: got {self.every}, allowed: 1 or more")
        _require(
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


@dataclass(frozen=True, kw_only=True)
class ValSettings:
    """Held-out rows, on which nothing is learned."""

    path: str | None = None
    """A file of rows as `data.path`; None: no validation."""
    image_root: str | None = None
    """The folder that their image paths start from; None: the folder of `path`."""
    every: int = 500
    """Steps between validations; the last step is always followed by one."""
    rows: int | None = 1000
    """Rows at most, chosen once and for all; None: all of them."""
    samples: int = 0
    """Rows whose first question is answered each time."""

    def __post_init__(self) -> None:
        _require(self.every >= 1, f"val.every: got {self.every}, allowed: 1 or more")
        _require(self.rows is None or self.rows >= 1, f"val.rows: got {self.rows}, allowed: 1 or more, or none")
        _require(self.samples >= 0, f"val.samples: got {self.samples}, allowed: 0 or more")


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """How an answer is to be preferred to another (objectives/preference.py)."""

    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """sigmoid: DPO's; ipo: a squared distance, of log-probabilities per token; hinge: SLiC's."""
    beta: float = 0.1
    """How dear it is to move away from the reference."""
    label_smoothing: float = 0.0
    """loss=sigmoid: the share of rows whose answers are taken to be the wrong way round (conservative DPO)."""
    sft: float = 0.0
    """Weight of the chosen answer's own loss per token, which is added (RPO)."""
    reference: str | None = None
    """The directory of the model that is held against; None: that of init.path, as the run begins with it."""

    def __post_init__(self) -> None:
        _require(self.beta > 0, f"preference.beta: got {self.beta}, allowed: more than 0")
        _require(self.sft >= 0, f"preference.sft: got {self.sft}, allowed: 0 or more")
        _require(
            0 <= self.label_smoothing < 0.5,
            f"preference.label_smoothing: got {self.label_smoothing}, allowed: 0 to below 0.5",
        )
        _require(
            self.loss == "sigmoid" or self.label_smoothing == 0,
            f"preference.label_smoothing: got {self.label_smoothing}, allowed with preference.loss={self.loss}: 0",
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All of a run; saved as JSON beside its weights."""

    recipe: str
    model: ModelSettings = field(default_factory=ModelSettings)
    init: InitSettings = field(default_factory=InitSettings)
    tokenizer: TokenizerSettings = field(default_factory=TokenizerSettings)
    data: DataSettings = field(default_factory=DataSettings)
    train: TrainSettings = field(default_factory=TrainSettings)
    lora: LoraSettings = field(default_factory=LoraSettings)
    distill: DistillSettings = field(default_factory=DistillSettings)
    zero: ZeroSettings = field(default_factory=ZeroSettings)
    optim: OptimSettings = field(default_factory=OptimSettings)
    val: ValSettings = field(default_factory=ValSettings)
    log: LogSettings = field(default_factory=LogSettings)
    preference: PreferenceSettings = field(default_factory=PreferenceSettings)

    @property
    def makes_student(self) -> bool:
        """Whether the run begins with a student made of its teacher."""
        return self.distill.teacher is not None and self.init.path is None


def change(config: RunConfig, assignments: Iterable[str]) -> RunConfig:
    """Applies the texts of `--set`, "section.field=value", in order.

    Raises:
        UserError: on a text of another form, an unknown setting or a value that is not allowed.
    """
    for assignment in assignments:
        path, equals, value = assignment.partition("=")
        _require(bool(equals), f"--set: got {assignment!r}, allowed: section.field=value")
        section, _, name = path.partition(".")
        if section == "model" and name.split(".")[0] not in ("preset", "changes", ""):
            changes = (*config.model.changes, f"{name}={value}")
            config = dataclasses.replace(
                config, model=dataclasses.replace(config.model, changes=changes)
            )
        else:
            config = override(config, path, value)
    return config
