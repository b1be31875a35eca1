"""Mamba and Mamba-2 as a GGUF file, for llama.cpp."""

import functools
import math
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from cobra.checkpoint import write_directory
from cobra.convert.layout import Layout
from cobra.lm import LMConfig
from cobra.lm.mamba1 import Mamba1Config
from cobra.lm.mamba2 import Mamba2Config
from cobra.tokenizer import Tokenizer
from vision_scan.errors import UserError

from .gguf_tokenizer import add_tokenizer, splitting
from .language import Language
from .output import Advance, Format, Output

# Weight format -> name of the type in gguf. Every matrix is of that type, embeddings and head included, as
# ours are; vectors, convolutions and what the recurrence is made of are float32, as llama.cpp wants them.
TYPES = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
MATRICES = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_out.weight")
CONTEXT_LENGTH = 1 << 20  # the state does not grow, and llama.cpp's own conversion says so too


class Place(NamedTuple):
    """Where a tensor of ours stands, and what it is made into."""

    name: str
    make: Callable[[Tensor], Tensor] = torch.Tensor.detach


class Architecture(NamedTuple):
    """A kind of model in llama.cpp.

    Attributes:
        name: llama.cpp's.
        places: of a block's tensors, by their names in a block of ours.
        settings: those that it has besides, as names of the writer's methods and values.
        refuse: raises UserError on what llama.cpp cannot say, though transformers can.
    """

    name: str
    places: Callable[[Any], Mapping[str, Place]]
    settings: Callable[[Any, int], Mapping[str, Any]]
    refuse: Callable[[LMConfig], None] = lambda config: None


class _Stored(NamedTuple):
    """A tensor to be written."""

    name: str
    kind: Any  # gguf's type
    shape: tuple[int, ...]
    nbytes: int
    read: Callable[[], Tensor]


def import_gguf() -> ModuleType:
    """The package that writes the format.

    Raises:
        UserError: if it is not installed.
    """
    try:
        import gguf
    except ImportError as error:
        raise UserError("the format gguf needs a package: pip install 'cobra-vlm[gguf]'") from error
    return gguf


def plan_gguf(language: Language, layout: Layout, dtype: str) -> Output:
    """The file, its matrices in `dtype`."""
    config = language.config
    if layout.block not in [(kind,) for kind in ARCHITECTURES]:
        raise UserError(
            f"{language.path}: lm.layers are {layout.name}'s; as gguf {' or '.join(ARCHITECTURES)} alone are written, "
            "give --format transformers, from which llama.cpp's own tools convert"
        )
    import_gguf()
    try:
        ARCHITECTURES[config.layers[0].kind].refuse(config)
        stored = list(_stored(config, language.tensors, dtype))
    except UserError as error:
        raise UserError(f"{language.path}: {error}") from error
    split = splitting(language.tokenizer)
    known = f"in the file, words cut as {split}" if split else "none in the file, as llama.cpp cuts words otherwise"

    def write(path: Path, advance: Advance) -> None:
        def write_file(file: Path) -> None:
            write_gguf(file, config, language.tensors, dtype, language.tokenizer, advance)

        if path.exists():
            raise UserError(f"{path}: exists already; give a new file")
        write_directory(path.parent, {path.name: write_file})

    return Output(nbytes=sum(tensor.nbytes for tensor in stored), tokenizer=known, write=write)


def write_gguf(
    file: Path,
    config: LMConfig,
    tensors: Mapping[str, Tensor],
    form: str,
    tokenizer: Tokenizer | None = None,
    advance: Advance = lambda nbytes: None,
) -> None:
    """Writes a file that llama.cpp loads; no more than one of its tensors is in memory at a time.

    Args:
        config: Mamba or Mamba-2 layers alone, all alike.
        tensors: by their names in the language model.
        form: a key of TYPES.
        tokenizer: None, or one that llama.cpp does not know how to follow: the file has none.
        advance: is told of each further number of bytes.
    """
    gguf = import_gguf()
    layer = config.layers[0]
    architecture = ARCHITECTURES[layer.kind]
    writer = gguf.GGUFWriter(file, architecture.name)
    settings = {
        "context_length": CONTEXT_LENGTH,
        "embedding_length": config.d_model,
        "feed_forward_length": 0,
        "head_count": 0,
        "block_count": len(config.layers),
        "vocab_size": config.vocab_size,
        "layer_norm_rms_eps": config.norm_eps,
        **architecture.settings(layer, config.d_model),
    }
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    if tokenizer is None or splitting(tokenizer) is None:
        writer.add_tokenizer_model("no_vocab")
    else:
        add_tokenizer(writer, tokenizer, config.vocab_size)
    stored = list(_stored(config, tensors, form))
    for tensor in stored:
        writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.nbytes, raw_dtype=tensor.kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in stored:
        values = np.ascontiguousarray(tensor.read().detach().float().numpy())
        writer.write_tensor_data(gguf.quants.quantize(values, tensor.kind))
        advance(tensor.nbytes)
    writer.close()


def _stored(config: LMConfig, tensors: Mapping[str, Tensor], form: str) -> Iterator[_Stored]:
    gguf = import_gguf()
    places = {"embedding.weight": Place("token_embd.weight"), "norm_f.weight": Place("output_norm.weight")}
    if not config.tie_word_embeddings:
        places["lm_head.weight"] = Place("output.weight")
    for index, layer in enumerate(config.layers):
        block = ARCHITECTURES[layer.kind].places(layer)
        for own, place in block.items():
            places[f"layers.{index}.{own}"] = place._replace(name=f"blk.{index}.{place.name}")
    for own, (name, make) in places.items():
        kind = gguf.GGMLQuantizationType[TYPES[form] if name.endswith(MATRICES) else "F32"]
        shape = tuple(make(torch.empty_like(tensors[own], device="meta")).shape)
        together, nbytes = gguf.GGML_QUANT_SIZES[kind]
        if shape[-1] % together:
            raise UserError(f"{own} has {shape[-1]} columns, and {form} needs a multiple of {together}; give float32")
        size = math.prod(shape) // together * nbytes
        yield _Stored(name, kind, shape, size, functools.partial(_made, make, tensors, own))


def _made(make: Callable[[Tensor], Tensor], tensors: Mapping[str, Tensor], name: str) -> Tensor:
    return make(tensors[name])


_BOTH = {
    "norm.weight": Place("attn_norm.weight"),
    "mixer.in_proj.weight": Place("ssm_in.weight"),
    "mixer.conv1d.weight": Place("ssm_conv1d.weight", lambda weight: weight[:, 0]),
    "mixer.conv1d.bias": Place("ssm_conv1d.bias"),
    "mixer.out_proj.weight": Place("ssm_out.weight"),
}


def _decay(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log.float())


def _mamba1_places(layer: Mamba1Config) -> dict[str, Place]:
    return {
        **_BOTH,
        "mixer.x_proj.weight": Place("ssm_x.weight"),
        "mixer.dt_proj.weight": Place("ssm_dt.weight"),
        "mixer.dt_proj.bias": Place("ssm_dt.bias"),
        "mixer.A_log": Place("ssm_a", _decay),
        "mixer.D": Place("ssm_d"),
    }


def _mamba2_places(layer: Mamba2Config) -> dict[str, Place]:
    return {
        **_BOTH,
        "mixer.dt_bias": Place("ssm_dt.bias"),
        "mixer.A_log": Place("ssm_a", lambda A_log: _decay(A_log)[:, None]),
        "mixer.D": Place("ssm_d", lambda D: D[:, None]),
        "mixer.norm.weight": Place("ssm_norm.weight", lambda weight: weight.unflatten(0, (layer.ngroups, -1))),
    }


def _mamba1_settings(layer: Mamba1Config, d_model: int) -> dict[str, Any]:
    return {
        "ssm_conv_kernel": layer.d_conv,
        "ssm_inner_size": layer.inner(d_model),
        "ssm_state_size": layer.d_state,
        "ssm_time_step_rank": layer.rank(d_model),
        "ssm_dt_b_c_rms": layer.inner_norms == "plain",
    }


def _mamba2_settings(layer: Mamba2Config, d_model: int) -> dict[str, Any]:
    return {
        "ssm_conv_kernel": layer.d_conv,
        "ssm_inner_size": layer.nheads(d_model) * layer.headdim,
        "ssm_state_size": layer.d_state,
        "ssm_time_step_rank": layer.nheads(d_model),
        "ssm_group_count": layer.ngroups,
    }


def _refuse_mamba1(config: LMConfig) -> None:
    layer: Any = config.layers[0]
    if layer.inner(config.d_model) != 2 * config.d_model:
        raise UserError(
            f"lm.layers.0.d_inner is {layer.inner(config.d_model)}; llama.cpp reads Mamba of 2 * d_model = "
            f"{2 * config.d_model} alone; give --format transformers"
        )
    if layer.inner_norms == "plain" and layer.norm_eps != config.norm_eps:
        raise UserError(
            f"lm.layers.0.norm_eps is {layer.norm_eps}; llama.cpp has one for all norms, lm.norm_eps = "
            f"{config.norm_eps}; give --format transformers"
        )


# Kind of layer -> how llama.cpp calls models of it.
ARCHITECTURES = {
    "mamba1": Architecture("mamba", _mamba1_places, _mamba1_settings, _refuse_mamba1),
    "mamba2": Architecture("mamba2", _mamba2_places, _mamba2_settings),
}
GGUF = Format(dtypes=tuple(TYPES), plan=plan_gguf)
