"""What a language model remembers of the tokens that it has read."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vision_scan.errors import UserError

FORMAT_VERSION = 1
SSM = "ssm"  # matrix states, the bulk of what a recurrence keeps
SSM_SCALE = "ssm_scale"  # (batch, ..., ) of one in 8 bits, what the codes along its last axis are multiplied by

LayerTensors = dict[str, Tensor]


@dataclass
class State:
    """The memory of a batch of rows: matrix states and convolution tails of state-space layers, keys and
    values of attention layers.

    Attributes:
        layers: per layer, name -> tensor (batch, ...); empty for layers without memory.
        lengths: (batch,) int64 on the CPU, how many tokens each row's current segment has read.
        info: what callers keep with it (JSON-able), for instance token and image counts.
    """

    layers: list[LayerTensors]
    lengths: Tensor
    info: dict[str, Any] = field(default_factory=dict)

    @property
    def batch(self) -> int:
        return self.lengths.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors, reserved capacity of caches included."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.values())

    def _map(self, change: Callable[[Tensor], Tensor], lengths: Tensor) -> "State":
        return self._map_layers(lambda layer: {name: change(tensor) for name, tensor in layer.items()}, lengths)

    def _map_layers(self, change: Callable[[LayerTensors], LayerTensors], lengths: Tensor) -> "State":
        return State(list(map(change, self.layers)), lengths, json.loads(json.dumps(self.info)))

    def clone(self) -> "State":
        """A copy that shares no memory."""
        return self._map(torch.clone, self.lengths.clone())

    def detach(self) -> "State":
        """The same values, cut off from autograd."""
        return self._map(torch.Tensor.detach, self.lengths)

    def to(self, device: torch.device | str) -> "State":
        return self._map(lambda tensor: tensor.to(device), self.lengths)

    def select(self, rows: Tensor) -> "State":
        """The state of some rows, as a copy; a row named several times is branched."""
        return self._map(
            lambda tensor: tensor.index_select(0, rows.to(tensor.device)), self.lengths[rows.cpu()]
        )

    def quantize(self) -> "State":
        """The same with matrix states in 8 bits, a float32 scale for each head and channel: about a quarter of their
        float32 bytes. To be kept: what reads on from it widens it again, and rounds no second time.

        Source: symmetric rounding to the largest of each row, as for weights in Dettmers et al. 2022
        (arXiv:2208.07339).
        """
        return self._map_layers(_quantize_layer, self.lengths.clone())

    def dequantize(self) -> "State":
        """The same with matrix states in float32; itself if they are."""
        if not any(name.endswith(SSM_SCALE) for layer in self.layers for name in layer):
            return self
        return self._map_layers(_dequantize_layer, self.lengths.clone())

    def forget(self, rows: Tensor) -> "State":
        """The same, but that some rows have read nothing.

        Args:
            rows: (batch,) bool.
        """

        def empty(tensor: Tensor) -> Tensor:
            nothing = 0 if tensor.is_floating_point() else -1  # positions in caches
            return torch.where(rows.to(tensor.device).view(-1, *[1] * (tensor.ndim - 1)), nothing, tensor)

        return self._map(empty, torch.where(rows.cpu(), 0, self.lengths))

    def save(self, path: str | Path) -> None:
        """Writes a safetensors file, whole or not at all; read it back with `State.load`."""
        from safetensors.torch import save

        tensors = {
            f"layers.{index}.{name}": tensor.detach().cpu().contiguous()
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.items()
        }
        header = {
            "format_version": FORMAT_VERSION,
            "num_layers": len(self.layers),
            "num_tokens": self.lengths.tolist(),
            "info": self.info,
        }
        path = Path(path)
        partial = path.with_name(f".{path.name}.partial")
        tensors["lengths"] = self.lengths
        try:
            partial.write_bytes(save(tensors, {"cobra_state": json.dumps(header)}))
            partial.replace(path)
        except BaseException:  # such as a full disk
            partial.unlink(missing_ok=True)
            raise

    @staticmethod
    def load(path: str | Path) -> "State":
        """Reads a state file.

        Raises:
            UserError: if the file is missing or is no state.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                header = (file.metadata() or {}).get("cobra_state")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not a readable state file ({error})") from None
        if header is None:
            raise UserError(f"{path}: a safetensors file, but not a state written by State.save")
        try:
            header = json.loads(header)
            version = header["format_version"]
            if version != FORMAT_VERSION:
                raise UserError(f"{path}: state format {version}, this version reads {FORMAT_VERSION}")
            layers: list[LayerTensors] = [{} for _ in range(header["num_layers"])]
            lengths = tensors.pop("lengths")
            for name, tensor in tensors.items():
                _, index, key = name.split(".", 2)
                layers[int(index)][key] = tensor
            return State(layers, lengths, header["info"])
        except (json.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            raise UserError(f"{path}: a damaged state file ({error!r})") from None


def _scale_of(name: str) -> str | None:
    """The name of a matrix state's scale; None of other tensors. Those of mixers side by side have a prefix."""
    prefix, point, last = name.rpartition(".")
    return f"{prefix}{point}{SSM_SCALE}" if last == SSM else None


def _quantize_layer(layer: LayerTensors) -> LayerTensors:
    quantized = dict(layer)
    for name, wide in layer.items():
        scale_name = _scale_of(name)
        if scale_name is not None and scale_name not in layer:
            scale = wide.abs().amax(-1) / 127
            codes = wide / scale.clamp(min=torch.finfo(scale.dtype).tiny)[..., None]
            quantized |= {name: codes.round().to(torch.int8), scale_name: scale}
    return quantized


def _dequantize_layer(layer: LayerTensors) -> LayerTensors:
    scales = {scale_name: name for name in layer if (scale_name := _scale_of(name)) in layer}
    wide = {name: layer[name] * layer[scale_name][..., None] for scale_name, name in scales.items()}
    return {name: wide.get(name, tensor) for name, tensor in layer.items() if name not in scales}
