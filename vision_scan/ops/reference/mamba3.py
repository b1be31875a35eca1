"""Mamba-3's recurrence, one token after another.

Per head, with alpha_t = exp(A_t dt_t), beta_t = (1 - lam_t) dt_t alpha_t, gamma_t = lam_t dt_t, and keys and queries
k_t = Rot(B_t, phi_t), q_t = Rot(C_t, phi_t) turned by the phases phi_t = phi_{t-1} + rate_t dt_t, the state S
(headdim, d_state) follows

    S_t = alpha_t S_{t-1} + beta_t v_{t-1} k_{t-1}^T + gamma_t v_t k_t^T,        y_t = S_t q_t + D v_t.

With a rank above 1 each token has as many keys, queries and values v_r = x * mimo_x[r]: both products with k become
sums over the ranks, and y_r = S q_r + D v_r. At the beginning of a segment S, v and the phases are zero.

Letters: b batch, l seqlen, r rank, h head, p headdim, n d_state.
Source: Lahoti et al. 2026, "Mamba-3" (arXiv:2603.15569).
"""

import math

import torch
from torch import Tensor

from .segments import real_and_runs

Mamba3State = dict[str, Tensor]


def empty_state(x: Tensor, B: Tensor, rate: Tensor) -> Mamba3State:
    """The state of rows that have read nothing; arguments as `vision_scan.mamba3`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    batch, _, rank, nheads, d_state = B.shape
    return {
        "ssm": x.new_zeros(batch, nheads, x.shape[-1], d_state, dtype=wide),
        "angle": x.new_zeros(batch, nheads, rate.shape[-1], dtype=wide),
        "k": x.new_zeros(batch, rank, nheads, d_state, dtype=wide),
        "v": x.new_zeros(batch, nheads, x.shape[-1]),
    }


def mamba3_recurrent(
    x, dt, A, lam, B, C, rate, D=None, mimo_x=None, initial_state=None, seq_idx=None
) -> tuple[Tensor, Mamba3State]:
    """The recurrence as above, in the dtype of x or float32; arguments as `vision_scan.mamba3`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    values, dt, A, lam, B, C, rate = (t.to(wide) for t in (x, dt, A, lam, B, C, rate))
    state = empty_state(x, B, rate) if initial_state is None else initial_state
    S, phi, k, v = (state[name].to(wide) for name in ("ssm", "angle", "k", "v"))
    ranks = torch.ones_like(values[0, :1]) if mimo_x is None else mimo_x.to(wide).transpose(0, 1)  # r h p
    real, run = _all_real(x) if seq_idx is None else real_and_runs(seq_idx)
    kept = torch.cat([run[:, :1] == 0, run[:, 1:] == run[:, :-1]], dim=1)
    outputs = []
    for t in range(x.shape[1]):
        on = kept[:, t].view(-1, 1, 1)
        here = real[:, t].view(-1, 1, 1)
        step, share = dt[:, t, :, None, None], lam[:, t, :, None, None]
        alpha = torch.exp(A[:, t] * dt[:, t])[..., None, None]
        phi_now = torch.remainder(phi * on + rate[:, t, None] * dt[:, t, :, None], 2 * math.pi)
        k_now, q = turn(B[:, t], phi_now), turn(C[:, t], phi_now)
        before = _outer(v * on, k, ranks)
        now = _outer(values[:, t], k_now, ranks)
        S_now = alpha * S * on[..., None] + (1 - share) * step * alpha * before + share * step * now
        S = torch.where(here[..., None], S_now, S)
        phi, v = torch.where(here, phi_now, phi), torch.where(here, values[:, t], v)
        k = torch.where(here[..., None], k_now, k)
        y = torch.einsum("bhpn,brhn->brhp", S, q)
        if D is not None:
            y = y + D.to(wide)[:, None] * values[:, t, None] * ranks
        outputs.append(torch.where(here[..., None], y, 0.0))
    return torch.stack(outputs, dim=1), {"ssm": S, "angle": phi, "k": k, "v": v.to(x.dtype)}


def turn(t: Tensor, phi: Tensor) -> Tensor:
    """Rotates pairs of states: (2i, 2i + 1) with a rank of 1, else (i, i + d_state // 2); those without a phase stay.

    Args:
        t: (..., rank, nheads, d_state).
        phi: (..., nheads, num_phases), radians; num_phases at most d_state // 2.
    """
    pairs, half = phi.shape[-1], t.shape[-1] // 2
    cos, sin = phi.cos().unsqueeze(-3), phi.sin().unsqueeze(-3)
    if t.shape[-3] == 1:
        first, second = t[..., 0 : 2 * pairs : 2], t[..., 1 : 2 * pairs : 2]
        turned = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
        return torch.cat([turned.flatten(-2), t[..., 2 * pairs :]], dim=-1)
    first, second = t[..., :pairs], t[..., half : half + pairs]
    turned = first * cos - second * sin, first * sin + second * cos
    return torch.cat([turned[0], t[..., pairs:half], turned[1], t[..., half + pairs :]], dim=-1)


def _outer(v: Tensor, k: Tensor, ranks: Tensor) -> Tensor:
    """The sum over ranks of (v * ranks[r]) k_r^T: v (b, h, p), k (b, r, h, n) -> (b, h, p, n)."""
    return torch.einsum("brhp,brhn->bhpn", v[:, None] * ranks, k)


def _all_real(x: Tensor) -> tuple[Tensor, Tensor]:
    run = torch.zeros(x.shape[:2], dtype=torch.int64, device=x.device)
    return run == 0, run
