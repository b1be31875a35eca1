"""A published checkpoint on disk: its config.json, and its tensors as the system maps them into memory."""

import json
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_scan.errors import UserError

CONFIG = "config.json"
BESIDE = "mamba_config.json"  # what MambaInLlama publishes beside it, read as one of its keys
INDEX_SUFFIX = ".index.json"  # a file with this name lists the parts of another


@dataclass(frozen=True)
class Source:
    """A checkpoint.

    Attributes:
        path: its directory.
        config: config.json, and `mamba_config.json` as one of its keys if there is one.
        tensors: by published name, read from the disk when they are used.
        weights: the file that they stand in, or the index of several.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    weights: Path


def read_source(path: str | Path) -> Source:
    """Opens a checkpoint; nothing that a pickle in it asks for is executed.

    Raises:
        UserError: if a file is missing or damaged, or holds something else than tensors.
    """
    path = Path(path)
    if not path.is_dir():
        kind = "is a file; give the directory that it stands in" if path.exists() else "no such directory"
        raise UserError(f"{path}: {kind}")
    config = _read_json(path / CONFIG)
    if (path / BESIDE).is_file():
        config[BESIDE] = _read_json(path / BESIDE)
    for name, open_file in _OPENERS.items():
        if (index := path / (name + INDEX_SUFFIX)).is_file():
            return Source(path, config, _open_parts(index, open_file), index)
        if (file := path / name).is_file():
            return Source(path, config, open_file(file), file)
    raise UserError(f"{path}: no weights; looked for {', '.join(_OPENERS)} and their {INDEX_SUFFIX}")


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise UserError(f"{file} is missing; give the directory of a published checkpoint")

    def infinity(
        found: dict,
    ) -> Any:  # transformers 5 writes what JSON cannot hold as {"__float__": "Infinity"}
        return float(found["__float__"]) if found.keys() == {"__float__"} else found

    try:
        data = json.loads(file.read_text(encoding="utf-8"), object_hook=infinity)
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    if not isinstance(data, dict):
        raise UserError(f"{file}: not a mapping")
    return data


def _open_parts(index: Path, open_file: Callable[[Path], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors of all files that an index names."""
    places = _read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise UserError(f"{index}: has no weight_map from tensors to files")
    tensors: dict[str, Tensor] = {}
    for name in sorted(set(places.values())):
        file = index.parent / name
        if Path(name).name != name or not file.is_file():
            raise UserError(f"{index}: the file {name} is missing")
        for key, tensor in open_file(file).items():
            if key in tensors:
                raise UserError(f"{file}: {key} stands in another file too")
            tensors[key] = tensor
    lost = [name for name in places if name not in tensors]
    if lost:
        raise UserError(f"{index}: {lost[0]} is not in {places[lost[0]]}, where it should be")
    return tensors


def _open_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file}: damaged or not a safetensors file ({error})") from error


def _open_pickle(file: Path) -> dict[str, Tensor]:
    try:
        # Files from before PyTorch 1.6 are no archives, and cannot be mapped.
        data = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # damage shows as anything that an unpickler may stumble over
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"{file}: damaged, or more than tensors, which is not read as that would execute code ({reason})"
        ) from error
    tensors = data
    parts = data.get("model") if isinstance(data, dict) else None
    if isinstance(parts, dict) and all(isinstance(part, dict) for part in parts.values()):  # as Cobra's and ML-Mamba's
        tensors = {f"{part}.{name}": tensor for part, own in parts.items() for name, tensor in own.items()}
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        raise UserError(f"{file}: must hold a mapping from names to tensors and nothing else")
    return tensors


_OPENERS: dict[str, Callable[[Path], dict[str, Tensor]]] = {
    "model.safetensors": _open_safetensors,
    "pytorch_model.bin": _open_pickle,
    "checkpoints/latest-checkpoint.pt": _open_pickle,
    "latest-checkpoint.pt": _open_pickle,
}
