"""A scan mixer of one picture, step by step, written from the description: one loop over lists, one over cells."""

import torch
from torch import Tensor

from cobra.scan_block import ScanMixer
from tests.vision_scan.modules.slow_ss2d import silu


def slow_mixer(mixer: ScanMixer, x: Tensor, lists: list[list[int]], combine: str) -> Tensor:
    """All channels in every list: x (cells, d_model) -> (cells, d_model)."""
    z, inner, states, dt = project(mixer, x)
    heads = range(dt.shape[1])
    content = torch.cat([inner, states], dim=-1)
    scanned = [slow_list(mixer, k, content, dt, heads, cells) for k, cells in enumerate(lists)]
    total = sum(gated_norm(mixer, y, z) for y in scanned)
    return (total / len(lists) if combine == "mean" else total) @ mixer.out_proj.weight.T


def slow_shared_mixer(mixer: ScanMixer, x: Tensor, lists: list[list[int]]) -> Tensor:
    """List k has the k-th share of the heads and of their channels; B and C are everybody's."""
    z, inner, states, dt = project(mixer, x)
    y = torch.zeros_like(inner)
    width, count = inner.shape[1] // len(lists), dt.shape[1] // len(lists)
    for k, cells in enumerate(lists):
        own = slice(k * width, (k + 1) * width)
        content = torch.cat([inner[:, own], states], dim=-1)
        y[:, own] = slow_list(mixer, k, content, dt, range(k * count, (k + 1) * count), cells)
    return gated_norm(mixer, y, z) @ mixer.out_proj.weight.T


def project(mixer: ScanMixer, x: Tensor) -> tuple[Tensor, ...]:
    """z, inner channels, B and C in one, dt: (cells, ...) each."""
    config = mixer.config
    d_inner = config.expand * x.shape[-1]
    sizes = [d_inner, d_inner, 2 * config.ngroups * config.d_state, d_inner // config.headdim]
    return (x @ mixer.in_proj.weight.T).split(sizes, dim=-1)


def slow_list(mixer: ScanMixer, k: int, content: Tensor, dt: Tensor, heads: range, cells: list[int]) -> Tensor:
    """Convolution and recurrence along one list, for some heads: (cells, channels of the heads)."""
    config = mixer.config
    groups, channels = config.ngroups * config.d_state, len(heads) * config.headdim
    state = content.new_zeros(len(heads), config.headdim, config.d_state)
    result = content.new_zeros(len(content), channels)
    for t, cell in enumerate(cells):
        mixed = mixer.conv_bias[k].clone()
        for tap in range(config.d_conv):  # the last tap weighs the cell itself
            before = t - (config.d_conv - 1) + tap
            if before >= 0:
                mixed = mixed + mixer.conv_weight[k, :, tap] * content[cells[before]]
        u, B, C = silu(mixed).split([channels, groups, groups])
        u = u.view(len(heads), config.headdim)
        output = torch.zeros_like(u)
        for h, head in enumerate(heads):
            g = h // (len(heads) // config.ngroups)
            b, c = (part.view(config.ngroups, -1)[g] for part in (B, C))
            step = torch.log1p(torch.exp(dt[cell, head] + mixer.dt_bias[k, h])).clamp(*config.dt_limit)
            state[h] = torch.exp(-step * torch.exp(mixer.A_log[k, h])) * state[h] + step * torch.outer(u[h], b)
            output[h] = state[h] @ c + mixer.D[k, h] * u[h]
        result[cell] = output.view(-1)
    return result


def gated_norm(mixer: ScanMixer, y: Tensor, z: Tensor) -> Tensor:
    """Gate, then the norm of each group of channels."""
    config = mixer.config
    gated = (y * silu(z)).unflatten(-1, (config.ngroups, -1))
    gated = gated / ((gated**2).mean(-1, keepdim=True) + config.norm_eps) ** 0.5
    return gated.flatten(-2) * mixer.norm.weight
