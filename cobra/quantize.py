"""Weights in 8 or 4 bits for decoding, which goes at the speed at which weights are read.

Every projection of the language model and its head, with the token embeddings where these are tied to it, are
stored as integer codes with a scale for each row and group of columns, symmetric about zero; norms,
convolutions and what a recurrence is made of stay as they are. The kernels of csrc/cpu multiply codes with
inputs that are rounded to 8 bits group by group; everywhere else the weights are unpacked first.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from cobra.lm.precision import Projection, project
from vision_scan.errors import UserError, choose

if TYPE_CHECKING:
    from cobra.model import Cobra

WeightFormat = Literal["plain", "int8", "int4"]
GROUP_SIZES = {"int8": 64, "int4": 32}  # columns that share a scale
ROWS = 8  # of a block; the kernels keep a row in each lane of a vector
INT4_FRACTIONS = torch.linspace(0.7, 1.0, 10)  # of the largest weight, that the largest code may stand for


def quantize(model: "Cobra", weights: WeightFormat) -> "Cobra":
    """Changes a model in place: its language model keeps its weights in `weights` from here on.

    Args:
        weights: "int8", "int4", or "plain": leave the model as it is.
    Returns:
        the model.
    Raises:
        UserError: on another format, or if the model is quantised otherwise already.
    """
    if weights == model.config.weights:
        return model
    choose("weights", weights, {"plain": None, **GROUP_SIZES})
    if model.config.weights != "plain":
        raise UserError(
            f"the model's weights are {model.config.weights}, {weights} was asked for; start from plain ones"
        )
    replace_projections(model, weights, QuantizedLinear.of)
    model.config = replace(model.config, weights=weights)
    return model


def replace_projections(
    model: "Cobra", weights: WeightFormat, make: Callable[[Projection, WeightFormat], "QuantizedLinear"]
) -> None:
    """Puts quantised modules in the places of the plain ones; `make` turns one into the other."""
    lm = model.lm
    for module in list(lm.modules()):
        for name, child in module.named_children():
            if isinstance(child, Projection):
                setattr(module, name, make(child, weights))
    if lm.config.tie_word_embeddings:
        lm.embedding = QuantizedEmbedding(lm.lm_head)


class QuantizedLinear(nn.Module):
    """A projection whose weight (out_features, in_features) is stored as integers.

    Attributes:
        codes: int8: (blocks, columns / 4, 8, 4) int8; int4: (blocks, columns / 32, 4, 32) uint8, two codes a
            byte, each plus 8. Rows stand in blocks of 8, columns in fours; out_features and in_features are
            filled up with zeros.
        scales: (blocks, groups, 8) bfloat16.
        bias: (out_features,) in the dtype of the activations, or None.
        dtype: of the activations, follows the model's.
    """

    def __init__(
        self, in_features: int, out_features: int, weights: WeightFormat, dtype, device=None, bias=False
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.weights, self.dtype = (
            in_features, out_features, weights, dtype,
        )  # fmt: skip
        blocks, groups = -(-out_features // ROWS), -(-in_features // GROUP_SIZES[weights])
        columns = groups * GROUP_SIZES[weights]
        if weights == "int8":
            codes = torch.zeros(blocks, columns // 4, ROWS, 4, dtype=torch.int8, device=device)
        else:
            codes = torch.zeros(blocks, columns // 32, 4, 32, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.zeros(blocks, groups, ROWS, dtype=torch.bfloat16, device=device))
        zeros = torch.zeros(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if zeros is None else nn.Parameter(zeros)

    @staticmethod
    def like(linear: Projection, weights: WeightFormat) -> "QuantizedLinear":
        """One of the same size, with zeros."""
        weight = linear.weight
        has_bias = linear.bias is not None
        return QuantizedLinear(
            linear.in_features, linear.out_features, weights, weight.dtype, weight.device, has_bias
        )

    @staticmethod
    def of(linear: Projection, weights: WeightFormat) -> "QuantizedLinear":
        """The nearest to a plain projection."""
        weight = linear.weight.detach()
        result = QuantizedLinear.like(linear, weights)
        rows = ROWS * max(1, 2**22 // (ROWS * linear.in_features))  # bounds the memory for candidates
        for start in range(0, linear.out_features, rows):
            codes, scales = _quantize(weight[start : start + rows].float(), weights)
            blocks = slice(start // ROWS, start // ROWS + len(codes))
            result.codes[blocks], result.scales[blocks] = codes, scales
        result.bias = linear.bias
        return result

    @property
    def packed(self) -> list[Tensor]:
        return [self.codes, self.scales]

    @property
    def weight(self) -> Tensor:
        """(out_features, in_features), unpacked, in the dtype of the activations."""
        return self.rows(torch.arange(self.out_features, device=self.codes.device))

    def rows(self, index: Tensor) -> Tensor:
        """Some rows of the weight: (n,) -> (n, in_features)."""
        block, lane = index // ROWS, index % ROWS
        if self.weights == "int8":
            codes = self.codes[block, :, lane]
        else:
            pairs = self.codes.unflatten(-1, (ROWS, 4))[block, :, :, lane]
            codes = torch.cat([pairs & 15, pairs >> 4], dim=2).to(torch.int8) - 8
        scales = self.scales[block, :, lane].float()
        values = codes.reshape(*scales.shape, GROUP_SIZES[self.weights]) * scales[..., None]
        return values.flatten(1)[:, : self.in_features].to(self.dtype)

    def forward(self, x: Tensor) -> Tensor:
        return project(x, self.weight, self.bias)

    def _apply(self, fn, recurse=True):
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.codes.device)).dtype
        self.codes = fn(self.codes)
        self.scales = fn(self.scales.view(torch.int16)).view(torch.bfloat16)  # moved, never cast
        if self.bias is not None:
            self.bias = nn.Parameter(fn(self.bias.data), self.bias.requires_grad)
        return self

    def check(self, name: str, where: str) -> None:
        """Raises UserError if what was loaded into it are no codes and scales."""
        expected = {"codes": torch.int8 if self.weights == "int8" else torch.uint8, "scales": torch.bfloat16}
        for leaf, dtype in expected.items():
            found = getattr(self, leaf).dtype
            if found != dtype:
                raise UserError(f"{where}: {name}.{leaf} is {found}, must be {dtype}: the file is damaged")

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weights={self.weights}"


class QuantizedEmbedding(nn.Module):
    """Embeddings that are the rows of a quantised head; it stores nothing itself."""

    def __init__(self, head: QuantizedLinear) -> None:
        super().__init__()
        self._head = [head]  # in a list, so that it is no part of this module

    @property
    def dtype(self) -> torch.dtype:
        return self._head[0].dtype

    @property
    def weight(self) -> Tensor:
        return self._head[0].weight

    @property
    def device(self) -> torch.device:
        return self._head[0].codes.device

    def forward(self, ids: Tensor) -> Tensor:
        return self._head[0].rows(ids.flatten()).unflatten(0, ids.shape)


def _quantize(weight: Tensor, weights: WeightFormat) -> tuple[Tensor, Tensor]:
    """Rows in float32, as many as there are -> codes and scales of whole blocks."""
    group = GROUP_SIZES[weights]
    rows, columns = weight.shape
    weight = nn.functional.pad(weight, (0, -columns % group, 0, -rows % ROWS))
    groups = weight.unflatten(1, (-1, group))
    scale = _int8_scale(groups) if weights == "int8" else _int4_scale(groups)
    codes = _round(groups, scale, weights).flatten(1)
    scales = scale.unflatten(0, (-1, ROWS)).transpose(1, 2).contiguous()
    if weights == "int8":
        return codes.view(-1, ROWS, codes.shape[1] // 4, 4).transpose(1, 2).contiguous(), scales
    steps = (codes + 8).to(torch.uint8).view(-1, ROWS, codes.shape[1] // 32, 8, 4).permute(0, 2, 3, 1, 4)
    low, high = steps.flatten(3).chunk(2, dim=2)
    return low | high << 4, scales


def _round(groups: Tensor, scale: Tensor, weights: WeightFormat) -> Tensor:
    """The codes of (rows, groups, group) at these scales (rows, groups)."""
    scale = scale.float()[..., None]
    codes = torch.where(scale == 0, 0.0, groups / scale).round()
    return (codes.clamp(-127, 127) if weights == "int8" else codes.clamp(-8, 7)).to(torch.int8)


def _int8_scale(groups: Tensor) -> Tensor:
    return (groups.abs().amax(-1) / 127).bfloat16()


def _int4_scale(groups: Tensor) -> Tensor:
    """The scale with the least squared error; negative where the largest weight is positive, because there is
    a code more below zero than above."""
    index = groups.abs().argmax(-1, keepdim=True)
    extreme = groups.gather(-1, index)[..., 0]
    best, least = torch.zeros_like(extreme).bfloat16(), torch.full_like(extreme, torch.inf)
    for fraction in INT4_FRACTIONS.tolist():
        scale = (extreme * fraction / -8).bfloat16()
        error = (_round(groups, scale, "int4") * scale.float()[..., None] - groups).square().sum(-1)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    return best
