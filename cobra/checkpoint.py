"""A model as a directory: `config.json`, `model.safetensors`, `tokenizer.json`; strict and atomic."""

import json
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from cobra.lm.precision import has_native_bf16
from cobra.prompt import TEMPLATES
from cobra.tokenizer import PAD, Tokenizer
from cobra.typed_config import from_dict, to_dict
from vision_scan.errors import UserError

if TYPE_CHECKING:
    from cobra.config import CobraConfig
    from cobra.model import Cobra

FORMAT_VERSION = 1
CONFIG, WEIGHTS, TOKENIZER = "config.json", "model.safetensors", "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"  # the same for transformers, which reads from it what its tokens are for
INDEX = f"{WEIGHTS}.index.json"  # says in which file each tensor stands, where transformers wrote several

MODEL_TYPE, ARCHITECTURE = "cobra_vlm", "CobraForConditionalGeneration"
# What transformers knows a directory by (cobra/hf); nothing here depends on it, and older directories have none of it.
TRANSFORMERS_KEYS = ("model_type", "architectures", "dtype", "transformers_version")
PARTS = ("vision_encoder", "connector", "lm")

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def save(model: "Cobra", path: str | Path, tensors: Mapping[str, Tensor] | None = None) -> None:
    """Writes a model directory that `load` reads.

    Everything is written under a temporary name, flushed to the disk and then renamed, so that a
    reader never meets a half-written file. In a directory that exists already, the model's files are
    replaced and others stay.

    Args:
        model: what to save.
        path: the directory.
        tensors: what to write instead of the model's own tensors, by the names that `load` will look for.
    """
    from safetensors.torch import save_file

    given = named_tensors(model) if tensors is None else tensors
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in given.items()}
    write_model(
        path,
        model.config,
        model.tokenizer,
        lambda file: save_file(tensors, file, metadata={"format": "pt"}),
        dtype=model.dtype,
    )


def write_model(
    path: str | Path,
    config: "CobraConfig",
    tokenizer: Tokenizer,
    write_weights: Callable[[Path], object],
    dtype: torch.dtype = torch.float32,
) -> None:
    """As `save`, of a model that need not be in memory: `write_weights` writes the safetensors file, in `dtype` but for
    what is always float32."""
    known = {"model_type": MODEL_TYPE, "architectures": [ARCHITECTURE], "dtype": str(dtype).removeprefix("torch.")}
    data = {"format_version": FORMAT_VERSION, **known, **to_dict(config)}
    writers: dict[str, Callable[[Path], object]] = {
        **tokenizer_files(tokenizer, TEMPLATES[config.template].end),
        WEIGHTS: write_weights,
        CONFIG: lambda file: file.write_text(json.dumps(data, indent=2) + "\n"),
    }
    write_directory(Path(path), writers)


def tokenizer_files(tokenizer: Tokenizer, end: str) -> dict[str, Callable[[Path], object]]:
    """What writes each file of a tokenizer.

    Args:
        end: the token that ends an answer.
    """
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",  # the file as it is, whatever the model's own class would make
        "eos_token": end,
        "pad_token": PAD,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
    }
    text = json.dumps(settings, indent=2) + "\n"
    return {TOKENIZER: tokenizer.save, TOKENIZER_CONFIG: lambda file: file.write_text(text, encoding="utf-8")}


def load(
    path: str | Path,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    weights: str | None = None,
) -> "Cobra":
    """Reads a model directory.

    Args:
        path: the directory.
        device: where to put the model.
        dtype: "auto" (bfloat16 where the device has it natively, else float32), another name or a
            torch dtype. What has to stay float32 in a Mamba-2 model stays so.
        weights: "int8" or "int4": the language model's projections are quantised (see quantize.py); None:
            they are kept as they are stored.
    Returns:
        the model, in evaluation mode.
    Raises:
        UserError: if a file is missing or damaged, or the tensors are not exactly those of the
            configuration; it names them.
    """
    from cobra.model import Cobra
    from cobra.quantize import QuantizedLinear, quantize

    path, device = Path(path), _device(device)
    dtype = resolve_dtype(dtype, device)
    config = read_config(path)
    tokenizer = Tokenizer.from_file(_file(path, TOKENIZER))
    with torch.device("meta"):  # neither memory nor time for weights that are replaced anyway
        model = Cobra(config, tokenizer)
    assign_tensors(model, read_tensors(path), str(path / WEIGHTS))
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            module.check(name, str(path / WEIGHTS))
    if weights is not None:
        quantize(model, weights)
    return model.to(device=device, dtype=dtype).eval()


def read_config(path: str | Path) -> "CobraConfig":
    """The configuration of a model directory.

    Raises:
        UserError: if the file is missing, damaged, or of another format version.
    """
    from cobra.config import CobraConfig

    file = _file(Path(path), CONFIG)
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{file}: not JSON ({error})") from error
    version = data.pop("format_version", None) if isinstance(data, dict) else None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{file}: format_version is {version!r}, this release of cobra reads {FORMAT_VERSION}"
        )
    own = {key: value for key, value in data.items() if key not in TRANSFORMERS_KEYS}
    return from_dict(CobraConfig, own, str(file))


def read_tensors(path: str | Path, parts: Iterable[str] = PARTS) -> dict[str, Tensor]:
    """The tensors of a model directory by their full names, on the CPU, in their stored dtypes.

    Args:
        path: the directory.
        parts: which parts of the model to read: vision_encoder, connector, lm.
    Raises:
        UserError: if the file is missing or damaged, or it has nothing of a part.
    """
    from safetensors import SafetensorError, safe_open

    path, parts = Path(path), tuple(parts)
    read: dict[str, Tensor] = {}
    names: list[str] = []
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as tensors:
                here = list(tensors.keys())
                wanted = here if parts == PARTS else [name for name in here if _part(name) in parts]
                read |= {name: tensors.get_tensor(name) for name in wanted}
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file}: damaged or not a safetensors file ({error})") from error
        names += here
    for part in parts:
        if parts != PARTS and part not in map(_part, read):
            found = ", ".join(sorted(set(map(_part, names))))
            raise UserError(f"{path / WEIGHTS}: has no part {part!r}; it has {found}")
    return read


def _weight_files(path: Path) -> list[Path]:
    """The one file of a directory's weights, or those that an index names."""
    index = path / INDEX
    if (path / WEIGHTS).is_file() or not index.is_file():
        return [_file(path, WEIGHTS)]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, LookupError, AttributeError, TypeError) as error:
        raise UserError(f"{index}: names no files of weights ({error!r})") from error
    return [_file(path, Path(str(name)).name) for name in sorted(names)]


def read_state_dict(path: str | Path) -> dict[str, Any]:
    """The state dict that others published as a file: .safetensors, or a pickle of plain tensors, where it may
    stand under "state_dict", "model" or "model_ema" (of several the first).

    Raises:
        UserError: naming the file, if it is missing or damaged, or holds anything that would have to be executed.
    """
    from safetensors.torch import load_file

    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file; give a model's .safetensors, .bin or .pth file")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle fails in any way
        reason = str(error).partition("\n")[0]
        raise UserError(f"{path}: damaged, or holds more than plain tensors ({reason})") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: holds a {type(data).__name__}, not a state dict of names and tensors")
    for wrapper in ("state_dict", "model", "model_ema"):
        data = data[wrapper] if isinstance(data.get(wrapper), dict) else data
    return data


def assign_tensors(
    model: nn.Module, tensors: Mapping[str, Tensor], where: str, parts: Iterable[str] = PARTS
) -> None:
    """Makes `tensors` the parameters and buffers of `model`, or of some of its parts.

    A module on the meta device takes the tensors themselves; any other gets their values, in its own
    dtypes and on its own device.

    Args:
        where: the tensors' origin, for messages.
        parts: the parts to fill, to which the tensors must correspond exactly.
    Raises:
        UserError: naming the tensors that are missing, unexpected or of another shape.
    """
    parts = tuple(parts)
    own = named_tensors(model)
    if parts != PARTS:
        own = {name: tensor for name, tensor in own.items() if _part(name) in parts}
    check_match(own, tensors, where)
    with torch.no_grad():
        for name, target in own.items():
            if not target.is_meta:
                target.copy_(tensors[name])
                continue
            value = tensors[name]
            if isinstance(target, nn.Parameter):
                value = nn.Parameter(value, requires_grad=target.requires_grad)
                value.__dict__.update(target.__dict__)  # marks for the optimizer
            for module, leaf in _owners(model, target):
                setattr(module, leaf, value)


def resolve_dtype(dtype: str | torch.dtype, device: str | torch.device) -> torch.dtype:
    """The torch dtype for a name; "auto" is bfloat16 where `device` computes in it natively."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype == "auto":
        return torch.bfloat16 if has_native_bf16(device) else torch.float32
    if dtype not in _DTYPES:
        raise UserError(f"dtype={dtype!r}: allowed are auto, {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def _device(device: str | torch.device) -> torch.device:
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise UserError(f"device={device!r}: give cpu, cuda or cuda:0") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={str(device)!r}: {torch.cuda.device_count()} GPUs are visible here")
    return device


def named_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name; of tied ones the first name only."""
    named: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            named[name] = tensor
            seen.add(id(tensor))
    return named


def _owners(model: nn.Module, tensor: Tensor) -> list[tuple[nn.Module, str]]:
    """Every place in the model that holds `tensor`."""
    return [
        (module, leaf)
        for module in model.modules()
        for table in (module._parameters, module._buffers)
        for leaf, held in table.items()
        if held is tensor
    ]


def _part(name: str) -> str:
    return name.partition(".")[0]


def check_match(own: Mapping[str, Tensor], given: Mapping[str, Tensor], where: str) -> None:
    """Raises UserError unless `given`, from `where`, has the names and shapes of `own`; it names what is
    missing, unexpected or misshapen."""
    faults = {
        "missing": [name for name in own if name not in given],
        "unexpected": [name for name in given if name not in own],
        "misshapen": [
            f"{name} {tuple(given[name].shape)} instead of {tuple(tensor.shape)}"
            for name, tensor in own.items()
            if name in given and given[name].shape != tensor.shape
        ],
    }
    if any(faults.values()):
        told = "; ".join(f"{kind} {_first(names)}" for kind, names in faults.items() if names)
        raise UserError(f"{where} does not fit the model's configuration: {told}")


def _first(names: list[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _file(path: Path, name: str) -> Path:
    if not path.is_dir():
        raise UserError(f"{path}: no such model directory")
    if not (path / name).is_file():
        raise UserError(f"{path} is not a model directory: {name} is missing")
    return path / name


def write_directory(path: Path, writers: Mapping[str, Callable[[Path], object]]) -> None:
    """Writes files into `path` through a staging directory on the same file system; `writers` has a function for
    each name."""
    if path.exists() and not path.is_dir():
        raise UserError(f"{path}: is a file; give a directory to save the model in")
    is_new = not path.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    token = secrets.token_hex(4)
    stage = path.parent / f".{path.name}.{token}" if is_new else path / f".saving.{token}"
    stage.mkdir()
    try:
        for name, write in writers.items():
            write(stage / name)
            # As any new file here; safetensors makes its own readable for the owner alone.
            (stage / name).chmod(stage.stat().st_mode & 0o666)
            _flush(stage / name)
        if is_new:
            _flush(stage)
            stage.rename(path)
            _flush(path.parent)
        else:
            for name in writers:
                (stage / name).replace(path / name)
            _flush(path)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _flush(path: Path) -> None:
    """Has the operating system write a file or directory to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
