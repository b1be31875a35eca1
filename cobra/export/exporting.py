"""From a model directory to files that others run: planned and checked in full, then written."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from cobra.convert.conversion import check_destination
from cobra.convert.layout import Layout
from cobra.progress import progress
from vision_scan.errors import UserError, choose

from .gguf_file import GGUF
from .language import Language, find_layout, read_language
from .output import Format, Output
from .transformers_files import TRANSFORMERS

FORMATS: dict[str, Format] = {"transformers": TRANSFORMERS, "gguf": GGUF}


@dataclass(frozen=True, kw_only=True)
class Export:
    """What an export will write. Everything is checked; nothing is in memory.

    Attributes:
        layout: the published one whose models compute the same.
        dtype: of the tensors, one of the format's `dtypes`.
    """

    language: Language
    layout: Layout
    format: str
    dtype: str
    output: Output

    def report(self) -> list[str]:
        """What is done, in lines to be read."""
        config = self.language.config
        layers = ", ".join(f"{n} {kind}" for kind, n in Counter(layer.kind for layer in config.layers).items())
        count = sum(tensor.numel() for tensor in self.language.tensors.values())
        return [
            f"layout      {self.layout.name}, as {self.format}",
            f"layers      {layers}; d_model {config.d_model}, vocabulary {config.vocab_size}",
            f"parameters  {count:,} of the language model",
            f"dtype       {self.dtype}",
            f"tokenizer   {self.output.tokenizer}",
            f"bytes       {self.output.nbytes:,}",
        ]

    def write(self, path: str | Path) -> None:
        """Writes the files, whole or not at all.

        Raises:
            UserError: if there is something at `path` already.
        """
        check_destination(path)
        with progress("writing", self.output.nbytes) as advance:
            self.output.write(Path(path), advance)


def plan(source: str | Path, *, format: str = "transformers", dtype: str | None = None) -> Export:  # noqa: A002
    """Finds out how the language model of a model directory is written; writes nothing.

    Args:
        source: a model directory.
        format: a key of FORMATS.
        dtype: one of the format's `dtypes`; None: the first of them.
    Raises:
        UserError: if the directory is damaged, or has a setting that the format cannot say; it is named.
    """
    chosen = choose("format", format, FORMATS)
    dtype = chosen.dtypes[0] if dtype is None else dtype
    if dtype not in chosen.dtypes:
        raise UserError(f"dtype {dtype!r} of the format {format}: allowed are {', '.join(chosen.dtypes)}")
    language = read_language(source)
    layout = find_layout(language)
    output = chosen.plan(language, layout, dtype)
    return Export(language=language, layout=layout, format=format, dtype=dtype, output=output)
