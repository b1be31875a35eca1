"""The short causal convolution, mostly in front of a recurrence: each channel sees its own last few inputs."""

from typing import Literal

import torch
from torch import Tensor, nn

import vision_scan

from .mixer import Segments
from .sequence_parallel import shift, window_map


class ShortConvolution(nn.Conv1d):
    """Followed by SiLU, or by nothing; parameters as in the released state-spaces checkpoints: weight (channels, 1,
    d_conv) and, if it has one, bias (channels,). Its state is the last inputs, (batch, channels, d_conv - 1)."""

    def __init__(
        self, channels: int, d_conv: int, bias: bool = True, activation: Literal["silu"] | None = "silu"
    ) -> None:
        super().__init__(channels, channels, d_conv, groups=channels, bias=bias)
        self.activation = activation

    @torch.no_grad()
    def start_near_identity(self) -> None:
        """Most of a token's own input and a little of those before it, in place of random sums of all."""
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        self.weight.mul_(0.3)
        self.weight[:, 0, -1] += 1.0

    def scan(self, x: Tensor, state: Tensor | None, segments: Segments) -> tuple[Tensor, Tensor]:
        """x (batch, channels, seqlen) -> the same, and the new state."""
        taps = self.weight.shape[2] - 1
        if segments.shard is not None and taps > 0:
            final, transition = window_map(x, taps, segments.seq_idx)
            state = segments.shard.entering_state(final, transition, shift).to(x.dtype)
        return vision_scan.causal_conv1d(
            x, self.weight[:, 0], self.bias, self.activation, state, return_final_state=True, seq_idx=segments.seq_idx
        )

    def update(self, x: Tensor, state: Tensor, segments: Segments) -> Tensor:
        """A few tokens onto a state that is overwritten."""
        return vision_scan.causal_conv1d_update(
            state, x, self.weight[:, 0], self.bias, self.activation, segments.seq_idx
        )
