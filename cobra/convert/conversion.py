"""From a published language model to a model directory: planned and checked in full, then written."""

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from cobra.checkpoint import TOKENIZER, check_match, named_tensors, write_model
from cobra.config import PRESETS, CobraConfig
from cobra.lm import LanguageModel, LMConfig
from cobra.lm.precision import Float32Parameters
from cobra.model import make_vision_parts
from cobra.progress import progress
from cobra.prompt import TEMPLATES
from cobra.tokenizer import Tokenizer
from cobra.vision_encoder import load_tower_weights
from vision_scan.errors import UserError, choose

from .falcon_h1 import FALCON_H1
from .granite import GRANITE
from .hybrid import BAMBA
from .jamba import JAMBA, JAMBA_FIRST
from .layout import Layout, Options, Piece, Pieces
from .lfm2 import LFM2
from .llamba import LLAMBA
from .llava import LLAVA, MOBILEVLM
from .longllava import LONGLLAVA, LONGLLAVA_FIRST
from .mamba import FALCON_MAMBA, MAMBA1, MAMBA2, STATE_SPACES
from .mamba_in_llama import MAMBA1_IN_LLAMA, MAMBA2_IN_LLAMA
from .nemotron_h import NEMOTRON_H
from .prismatic import COBRA, ML_MAMBA
from .qwen3 import QWEN3_5, QWEN3_5_VL, QWEN3_NEXT
from .source import CONFIG, Source, read_source
from .transformer import LLAMA, QWEN2
from .writer import Entry, write_tensors
from .zamba2 import ZAMBA2

LAYOUTS = (
    STATE_SPACES, MAMBA1, MAMBA2, FALCON_MAMBA, LLAMA, QWEN2, GRANITE, BAMBA, NEMOTRON_H, FALCON_H1, JAMBA,
    JAMBA_FIRST, LFM2, QWEN3_NEXT, QWEN3_5, QWEN3_5_VL, LLAMBA, MAMBA1_IN_LLAMA, MAMBA2_IN_LLAMA, COBRA, ML_MAMBA,
    LLAVA, MOBILEVLM, LONGLLAVA, LONGLLAVA_FIRST, ZAMBA2,
)  # fmt: skip

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
TABLES = ("embedding.weight", "lm_head.weight")  # a row for each token
LEAST_USED = 0.9  # of published embeddings; with fewer ids a tokenizer is that of another model


@dataclass(frozen=True, kw_only=True)
class Conversion:
    """What a conversion will write. Everything is checked; nothing is in memory but the small parts.

    Attributes:
        source, layout: what was found.
        config, tokenizer: of the model that it becomes.
        preset: where its image, vision encoder, connector and template come from; None: the checkpoint has them.
        rows: of the published embeddings.
        published: the tensors that the checkpoint holds, the language model's first.
        vision: those of the vision encoder, and of a connector that the checkpoint does not have.
    """

    source: Source
    layout: Layout
    config: CobraConfig
    tokenizer: Tokenizer
    tokenizer_file: Path
    preset: str | None
    rows: int
    published: list[Entry]
    vision: list[Entry]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensors to be written."""
        return sum(entry.nbytes for entry in (*self.published, *self.vision))

    def report(self) -> list[str]:
        """What is done, in lines to be read."""
        lm = self.config.lm
        layers = ", ".join(f"{n} {kind}" for kind, n in Counter(layer.kind for layer in lm.layers).items())
        size = Counter[str]()
        for entry in self.published:
            size[str(entry.dtype).removeprefix("torch.")] += entry.nbytes
        return [
            f"layout      {self.layout.name}, {self.source.weights.name}",
            f"layers      {layers}; d_model {lm.d_model}, vocabulary {lm.vocab_size}",
            *self._parameters(),
            f"dtype       {', '.join(name for name, _ in size.most_common())}",
            f"tokenizer   {self.tokenizer_file}, {self.tokenizer.given_size} ids for {self.rows} embeddings",
            f"            {self._special_tokens()}",
            f"bytes       {self.nbytes:,}",
        ]

    def _parameters(self) -> list[str]:
        if self.preset is None:
            return [
                f"parameters  {_count(self.published):,} of language model and connector, {self.config.connector.kind}",
                f"            {_count(self.vision):,} of the towers, from their own files",
            ]
        return [
            f"parameters  {_count(self.published):,} of the language model",
            f"            {_count(self.vision):,} of {self.preset}'s vision encoder and connector, random",
        ]

    def _special_tokens(self) -> str:
        added, vocab = self.tokenizer.added, self.config.lm.vocab_size
        if not added:
            return "has all special tokens"
        told = ", ".join(f"{name} {index}" for name, index in added.items())
        if vocab == self.rows:
            return f"special tokens on unused ids: {told}"
        return (
            f"special tokens added: {told}; {vocab - self.rows} new embeddings, each the mean of the others"
        )

    def write(self, path: str | Path) -> None:
        """Writes the model directory, whole or not at all.

        Raises:
            UserError: if there is something at `path` already.
        """
        check_destination(path)
        with progress("writing", self.nbytes) as advance:
            entries = [*self.published, *self.vision]
            write = functools.partial(write_tensors, entries=entries, advance=advance)
            write_model(path, self.config, self.tokenizer, write)


def convert(
    source: str | Path,
    destination: str | Path,
    *,
    preset: str = "tiny",
    tokenizer: str | Path | None = None,
    towers: Sequence[str | Path] = (),
    seed: int = 0,
) -> Conversion:
    """Makes a model directory of a published model, see `plan`.

    Args:
        destination: the directory to write; it must not exist, or be empty.
    Raises:
        UserError: as `plan`, or if there is something at the destination already.
    """
    check_destination(destination)
    conversion = plan(source, preset=preset, tokenizer=tokenizer, towers=towers, seed=seed)
    conversion.write(destination)
    return conversion


def plan(
    source: str | Path,
    *,
    preset: str = "tiny",
    tokenizer: str | Path | None = None,
    towers: Sequence[str | Path] = (),
    seed: int = 0,
) -> Conversion:
    """Finds out what a checkpoint is and what it becomes; writes nothing.

    Args:
        source: the directory of a published checkpoint.
        preset: whose image, vision encoder, connector and template a language model gets; a vision-language model has
            its own.
        tokenizer: a Hugging Face tokenizer.json; None: the one beside the checkpoint.
        towers: the weights of a vision-language model's towers, a file of timm for each, in order.
        seed: of the weights of vision encoder and connector of a language model.
    Raises:
        UserError: if the checkpoint is of no known layout, an option of its configuration is not supported,
            a tensor is missing, unexpected or of another shape or dtype, or tokenizer or preset do not fit.
    """
    given = choose("preset", preset, PRESETS)
    checkpoint = read_source(source)
    layout = detect(checkpoint)
    lm = _read_config(layout, checkpoint)
    file = _find_tokenizer(checkpoint.path, tokenizer)
    tokens = Tokenizer.from_file(file)
    vocab = _vocab_size(tokens, file, lm.vocab_size)
    whole = replace(given, lm=lm) if layout.whole is None else layout.whole(lm, checkpoint.config)
    config = replace(whole, lm=replace(lm, vocab_size=vocab))
    _check_template(config.template, tokens, file)
    return Conversion(
        source=checkpoint,
        layout=layout,
        config=config,
        tokenizer=tokens,
        tokenizer_file=file,
        preset=preset if layout.whole is None else None,
        rows=lm.vocab_size,
        published=_published_entries(layout, whole, checkpoint, vocab),
        vision=_vision_entries(preset, config, seed) if layout.whole is None else _tower_entries(config, towers),
    )


def detect(source: Source) -> Layout:
    """The layout of a checkpoint, by its configuration and the names of its tensors."""
    for layout in LAYOUTS:
        if layout.detects(source.config, source.tensors):
            return layout
    raise UserError(
        f"{source.path}: of no known layout (model_type {source.config.get('model_type')!r}, tensors like "
        f"{', '.join(sorted(source.tensors)[:2]) or 'none'}); known are "
        f"{', '.join(layout.name for layout in LAYOUTS)}"
    )


def check_destination(path: str | Path) -> None:
    """Raises UserError unless a new directory can be made at `path`, or an empty one is there."""
    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists already and is not empty; give a new directory")


def _read_config(layout: Layout, source: Source) -> LMConfig:
    options = Options(source.config, str(source.path / CONFIG))
    try:
        config = layout.read_config(options)
        options.close()
    except UserError as error:  # of a layer, which does not know the file
        told = str(error)
        raise UserError(told if options.where in told else f"{options.where}: {told}") from error
    return config


def _find_tokenizer(path: Path, given: str | Path | None) -> Path:
    if given is not None:
        return Path(given)
    if not (path / TOKENIZER).is_file():
        raise UserError(
            f"{path}: has no {TOKENIZER}; give the one that the model was trained with by --tokenizer FILE "
            f"(for state-spaces models the {TOKENIZER} of EleutherAI/gpt-neox-20b)"
        )
    return path / TOKENIZER


def _vocab_size(tokenizer: Tokenizer, file: Path, rows: int) -> int:
    """Rows of the embeddings with which all tokens have one."""
    if not LEAST_USED * rows <= tokenizer.given_size <= rows:
        raise UserError(
            f"{file}: has {tokenizer.given_size} ids for {rows} embeddings; give the tokenizer that the "
            "model was trained with"
        )
    return max(rows, tokenizer.vocab_size)  # as training enlarges a preset


def _check_template(template: str, tokenizer: Tokenizer, file: Path) -> None:
    for token in TEMPLATES[template].tokens:
        try:
            tokenizer.id_of(token)
        except UserError as error:
            raise UserError(f"{file} does not fit the template {template!r}: {error}") from error


def _published_entries(layout: Layout, config: CobraConfig, source: Source, vocab: int) -> list[Entry]:
    """The tensors of the language model, and of the connector if the layout has it, the source's being exactly those of
    `config`.

    Args:
        vocab: rows that the embeddings get.
    """
    with torch.device("meta"):
        parts = {"lm": LanguageModel(config.lm)}
        if layout.connector is not None:
            _, parts["connector"] = make_vision_parts(config)
    shapes = {part: {name: tuple(x.shape) for name, x in named_tensors(parts[part]).items()} for part in parts}
    head = {TABLES[1]: shapes["lm"][TABLES[0]]}  # has a place, whether or not it is the embeddings
    located = {"lm": layout.locate(config.lm, source.config, {**shapes["lm"], **head})}
    if layout.connector is not None:
        located["connector"] = layout.connector(config, shapes["connector"])
    given = {name: tensor for name, tensor in source.tensors.items() if not layout.is_left_out(name)}
    if config.lm.tie_word_embeddings:
        _drop_tied_head(given, located["lm"], source)
    expected = {
        piece.name: piece.shape or shape
        for part, own in shapes.items()
        for name, shape in own.items()
        for piece in located[part][name]
    }
    meta = {name: torch.empty(shape, device="meta") for name, shape in expected.items()}
    check_match(meta, given, str(source.weights))
    wide = {part: float32_names(module) for part, module in parts.items()}
    rows = {("lm", table): vocab for table in TABLES}
    return [
        _entry(f"{part}.{name}", shape, located[part][name], given, name in wide[part], rows.get((part, name)), source)
        for part, own in shapes.items()
        for name, shape in own.items()
    ]


def _drop_tied_head(given: dict[str, Tensor], pieces: Pieces, source: Source) -> None:
    """Takes out a head that is stored beside the embeddings although they are one."""
    names = [pieces[name][0].name for name in TABLES]
    table, head = (given.get(name) for name in names)
    if table is None or head is None:
        return
    if not torch.equal(table, head):
        raise UserError(f"{source.weights}: {names[1]} differs from {names[0]}, but {CONFIG} says that they are tied")
    del given[names[1]]


def _entry(
    name: str,
    shape: tuple[int, ...],
    pieces: Sequence[Piece],
    given: Mapping[str, Tensor],
    is_wide: bool,
    rows: int | None,
    source: Source,
) -> Entry:
    dtypes = {piece.name: given[piece.name].dtype for piece in pieces}
    for published, dtype in dtypes.items():
        if dtype not in WEIGHT_DTYPES:
            raise UserError(
                f"{source.weights}: {published} is {dtype}, allowed are {', '.join(map(str, WEIGHT_DTYPES))}"
            )
    dtype = functools.reduce(torch.promote_types, dtypes.values())
    dtype = torch.promote_types(dtype, torch.float32) if is_wide else dtype

    def read() -> Tensor:
        parts = [piece.take(given[piece.name], dtype) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    if rows is None or rows == shape[0]:
        return Entry(name, dtype, shape, read)
    return Entry(name, dtype, (rows, *shape[1:]), lambda: _grown(read(), rows))


def _grown(table: Tensor, rows: int) -> Tensor:
    """With rows that are the mean of those there: a new token is then never the likeliest."""
    mean = table.mean(0, keepdim=True, dtype=torch.promote_types(table.dtype, torch.float32))
    return torch.cat([table, mean.to(table.dtype).expand(rows - len(table), -1)])


def float32_names(model: nn.Module) -> set[str]:
    """The names of parameters that are never stored in half precision."""
    return {
        f"{name}.{leaf}"
        for name, module in model.named_modules()
        if isinstance(module, Float32Parameters)
        for leaf in module.float32_parameters
    }


def _tower_entries(config: CobraConfig, towers: Sequence[str | Path]) -> list[Entry]:
    """The vision encoder with the weights of these files."""
    encoder, _ = make_vision_parts(config)
    load_tower_weights(encoder, towers)
    return _entries_of("vision_encoder", encoder)


def _vision_entries(preset: str, config: CobraConfig, seed: int) -> list[Entry]:
    """Vision encoder and connector as `build` makes them from this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        try:
            made = make_vision_parts(config)
        except UserError as error:  # of a part, which knows nothing of the language model
            raise UserError(
                f"preset {preset} does not fit a language model with d_model {config.lm.d_model}: {error}"
            ) from error
    encoder, connector = made
    return [*_entries_of("vision_encoder", encoder), *_entries_of("connector", connector)]


def _entries_of(part: str, module: nn.Module) -> list[Entry]:
    return [
        Entry(f"{part}.{name}", tensor.dtype, tuple(tensor.shape), functools.partial(torch.clone, tensor))
        for name, tensor in named_tensors(module).items()
    ]


def _count(entries: list[Entry]) -> int:
    return sum(entry.nbytes // entry.dtype.itemsize for entry in entries)
