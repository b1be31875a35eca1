"""Our Mamba-2 weights as a GGUF file, for llama.cpp."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cobra.lm import LanguageModel
from cobra.lm.mamba2 import Mamba2Config

# Weight format -> name of the type in gguf. Every matrix is of that type, embeddings and head included, as
# ours are; vectors, convolutions and what the recurrence is made of are float32, as llama.cpp wants them.
TYPES = {"float32": "F32", "bfloat16": "BF16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
MATRICES = ("token_embd.weight", "output.weight", "ssm_in.weight", "ssm_out.weight")


def write_gguf(lm: LanguageModel, path: Path, form: str) -> None:
    """Writes a file that llama.cpp loads; it has no tokenizer.

    Args:
        lm: Mamba-2 layers alone, all alike, float32.
        form: a key of TYPES.
    """
    import gguf

    config, layer = lm.config, lm.config.layers[0]
    assert isinstance(layer, Mamba2Config)
    writer = gguf.GGUFWriter(path, "mamba2")
    writer.add_context_length(1 << 20)
    writer.add_embedding_length(config.d_model)
    writer.add_feed_forward_length(0)
    writer.add_head_count(0)
    writer.add_block_count(len(config.layers))
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_ssm_conv_kernel(layer.d_conv)
    writer.add_ssm_inner_size(layer.expand * config.d_model)
    writer.add_ssm_state_size(layer.d_state)
    writer.add_ssm_time_step_rank(layer.nheads(config.d_model))
    writer.add_ssm_group_count(layer.ngroups)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[TYPES[form]]
    for name, tensor in _tensors(lm, layer).items():
        values = np.ascontiguousarray(tensor.detach().float().numpy())
        if form != "float32" and name.endswith(MATRICES):
            writer.add_tensor(name, gguf.quants.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def rounding(form: str) -> Callable[[str, Tensor], Tensor]:
    """What the file makes of a matrix: (name of its module, weight) -> weight, float32."""
    import gguf

    kind = gguf.GGMLQuantizationType[TYPES[form]]

    def change(name: str, weight: Tensor) -> Tensor:
        codes = gguf.quants.quantize(np.ascontiguousarray(weight.detach().float().numpy()), kind)
        return torch.from_numpy(gguf.quants.dequantize(codes, kind))

    return change


def _tensors(lm: LanguageModel, layer: Mamba2Config) -> dict[str, Tensor]:
    tensors = {"token_embd.weight": lm.embedding.weight, "output_norm.weight": lm.norm_f.weight}
    if not lm.config.tie_word_embeddings:
        tensors["output.weight"] = lm.lm_head.weight
    for index, block in enumerate(lm.layers):
        mixer: Any = block.mixer
        norm: Any = block.norm
        tensors |= {
            f"blk.{index}.{name}": tensor
            for name, tensor in {
                "attn_norm.weight": norm.weight,
                "ssm_in.weight": mixer.in_proj.weight,
                "ssm_conv1d.weight": mixer.conv1d.weight[:, 0],
                "ssm_conv1d.bias": mixer.conv1d.bias,
                "ssm_dt.bias": mixer.dt_bias,
                "ssm_a": -torch.exp(mixer.A_log)[:, None],
                "ssm_d": mixer.D[:, None],
                "ssm_norm.weight": mixer.norm.weight.unflatten(0, (layer.ngroups, -1)),
                "ssm_out.weight": mixer.out_proj.weight,
            }.items()
        }
    return tensors
