"""A language model as a directory that `transformers` reads: config.json, model.safetensors and a tokenizer."""

import functools
import json
from pathlib import Path
from typing import Any

import torch

from cobra.checkpoint import CONFIG, TOKENIZER, WEIGHTS, tokenizer_files, write_directory
from cobra.convert.layout import Layout, Piece
from cobra.convert.writer import Entry, write_tensors
from cobra.tokenizer import END

from .language import Language
from .output import Advance, Format, Output

STORED = "stored"


def plan_transformers(language: Language, layout: Layout, dtype: str) -> Output:
    """The files, in `dtype` but for what always is float32, or with dtypes as they are stored."""
    entries = _entries(language, layout, dtype)
    config = _config(language, layout, dtype)
    return Output(
        nbytes=sum(entry.nbytes for entry in entries),
        tokenizer=f"{TOKENIZER} of {language.tokenizer.vocab_size} ids, texts end with {END}",
        write=lambda path, advance: _write(path, advance, language, entries, config),
    )


def _entries(language: Language, layout: Layout, dtype: str) -> list[Entry]:
    shapes = {name: tuple(tensor.shape) for name, tensor in language.tensors.items()}
    pieces = layout.locate(language.config, {}, shapes)
    # Layouts that are written have whole tensors, with our numbers.
    assert all(several == (Piece(several[0].name),) for several in pieces.values())

    def kept(name: str) -> torch.dtype:
        if dtype == STORED:
            return language.tensors[name].dtype
        return torch.float32 if name in language.wide else getattr(torch, dtype)

    return [
        Entry(pieces[name][0].name, kept(name), shapes[name], functools.partial(language.tensors.__getitem__, name))
        for name in shapes
    ]


def _config(language: Language, layout: Layout, dtype: str) -> dict[str, Any]:
    assert layout.write_config is not None
    stored = language.tensors["embedding.weight"].dtype
    return {
        **layout.write_config(language.config),
        "dtype": str(stored).removeprefix("torch.") if dtype == STORED else dtype,
        # No token begins a text here.
        "bos_token_id": None,
        "eos_token_id": language.tokenizer.end_id,
        "pad_token_id": language.tokenizer.pad_id,
    }


def _write(path: Path, advance: Advance, language: Language, entries: list[Entry], config: dict[str, Any]) -> None:
    write_directory(
        path,
        {
            **tokenizer_files(language.tokenizer, END),
            WEIGHTS: functools.partial(write_tensors, entries=entries, advance=advance),
            CONFIG: lambda file: file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8"),
        },
    )


TRANSFORMERS = Format(dtypes=(STORED, "float32", "bfloat16"), plan=plan_transformers)
