"""The operators once more, from their papers alone: loops over numpy arrays, one token at a time.

Nothing here is shared with the package. Arrays are float64, or complex128: the functions are
analytic in their inputs, so the derivative along v is Im f(x + i h v) / h, exact for a tiny h.

Recurrences: Gu & Dao 2023 (arXiv:2312.00752), Dao & Gu 2024 (arXiv:2405.21060), Yang et al. 2024 (arXiv:2412.06464),
Lahoti et al. 2026 (arXiv:2603.15569).
"""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np

STEP = 1e-30


def along(truth: Callable, arrays: Mapping, directions: Mapping, **options) -> list[np.ndarray]:
    """The derivative of each output of `truth(**arrays, **options)` along a direction."""
    moved = {name: arrays[name] + 1j * STEP * directions[name] for name in directions}
    outputs = truth(**{**arrays, **moved}, **options)
    return [np.imag(out) / STEP for out in outputs]


def softplus(a):
    return np.log1p(np.exp(a))


def silu(a):
    return a / (1 + np.exp(-a))


def clamp(a, low: float, high: float):
    """Between low and high by the real part; a bound does not move with the input."""
    return np.where(a.real < low, low, np.where(a.real > high, high, a))


def tokens(seq_idx: np.ndarray | None, row: int, seqlen: int) -> Iterator[tuple[int, bool]]:
    """The real tokens of a row in their order: (position, whether a new segment begins here)."""
    last = None
    for t in range(seqlen):
        index = 0 if seq_idx is None else int(seq_idx[row, t])
        if index < 0:
            continue
        yield t, last is not None and index != last
        last = index


def by_segment(
    truth: Callable,
    cu_seqlens: Sequence[int],
    along_tokens: Mapping[str, int],
    arrays: Mapping,
    **options,
):
    """A packed row as separate calls: (outputs put together again, one state per segment).

    Args:
        along_tokens: name of an argument with tokens -> its token axis; the first is the output's.
    """
    outputs, states = [], []
    for i, (start, stop) in enumerate(itertools.pairwise(cu_seqlens)):
        part = dict(arrays)
        for name, axis in along_tokens.items():
            if arrays.get(name) is not None:
                part[name] = np.take(arrays[name], range(start, stop), axis=axis)
        if arrays.get("initial_state") is not None:
            part["initial_state"] = arrays["initial_state"][i : i + 1]
        y, state = truth(**part, **options)
        outputs.append(y)
        states.append(state)
    return np.concatenate(outputs, axis=next(iter(along_tokens.values()))), np.concatenate(states)


def ssd(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False, dt_limit=(0.0, np.inf),
    initial_state=None, seq_idx=None,
):  # fmt: skip
    """S_t = exp(dt_t A) S_{t-1} + dt_t x_t B_t^T, y_t = (S_t C_t + D x_t) SiLU(z_t), by head."""
    batch, seqlen, nheads, headdim = x.shape
    ngroups, d_state = B.shape[2:]
    given = [a for a in (x, dt, A, B, C, D, z, dt_bias, initial_state) if a is not None]
    dtype = np.result_type(*given)
    y = np.zeros(x.shape, dtype)
    final = np.zeros((batch, nheads, headdim, d_state), dtype)
    for b in range(batch):
        for h in range(nheads):
            g = h // (nheads // ngroups)
            S = (
                np.zeros((headdim, d_state), dtype)
                if initial_state is None
                else initial_state[b, h]
            )
            for t, is_new in tokens(seq_idx, b, seqlen):
                step = dt[b, t, h] if dt_bias is None else dt[b, t, h] + dt_bias[h]
                step = clamp(softplus(step) if dt_softplus else step, *dt_limit)
                S = np.exp(step * A[h]) * (0 * S if is_new else S)
                S = S + step * np.outer(x[b, t, h], B[b, t, g])
                out = S @ C[b, t, g]
                if D is not None:
                    out = out + D[h] * x[b, t, h]
                y[b, t, h] = out if z is None else out * silu(z[b, t, h])
            final[b, h] = S
    return y, final


def gated_delta_rule(q, k, v, g, beta, scale=None, initial_state=None, seq_idx=None):
    """S_t = exp(g_t) S_{t-1} (1 - beta_t k_t k_t^T) + beta_t v_t k_t^T, y_t = scale S_t q_t, by head of v."""
    batch, seqlen, num_v_heads, head_v_dim = v.shape
    num_k_heads, head_k_dim = k.shape[2:]
    scale = 1 / np.sqrt(head_k_dim) if scale is None else scale
    dtype = np.result_type(*(a for a in (q, k, v, g, beta, initial_state) if a is not None))
    y = np.zeros(v.shape, dtype)
    final = np.zeros((batch, num_v_heads, head_v_dim, head_k_dim), dtype)
    for b in range(batch):
        for h in range(num_v_heads):
            j = h // (num_v_heads // num_k_heads)
            S = np.zeros((head_v_dim, head_k_dim), dtype) if initial_state is None else initial_state[b, h]
            for t, is_new in tokens(seq_idx, b, seqlen):
                key, share = k[b, t, j], beta[b, t, h]
                erase = np.eye(head_k_dim) - share * np.outer(key, key)
                S = np.exp(g[b, t, h]) * (0 * S if is_new else S) @ erase
                S = S + share * np.outer(v[b, t, h], key)
                y[b, t, h] = scale * (S @ q[b, t, j])
            final[b, h] = S
    return y, final


def mamba3(
    x, dt, A, lam, B, C, rate, D=None, mimo_x=None, ssm=None, angle=None, k=None, v=None, seq_idx=None
):  # fmt: skip
    """S_t = alpha S_{t-1} + beta sum_r v_{t-1,r} k_{t-1,r}^T + gamma sum_r v_{t,r} k_{t,r}^T, y_r = S_t q_r + D v_r,

    by head; the state as four arrays, and four behind y. The final angle is not reduced modulo 2 pi.
    """
    batch, seqlen, nheads, headdim = x.shape
    rank, d_state = B.shape[2], B.shape[4]
    given = [a for a in (x, dt, A, lam, B, C, rate, D, mimo_x, ssm, angle, k, v) if a is not None]
    dtype = np.result_type(*given)
    factors = np.ones((nheads, 1, headdim)) if mimo_x is None else mimo_x
    y = np.zeros((batch, seqlen, rank, nheads, headdim), dtype)
    final = [
        np.zeros(shape, dtype) if start is None else start.astype(dtype)
        for start, shape in (
            (ssm, (batch, nheads, headdim, d_state)),
            (angle, (batch, nheads, rate.shape[-1])),
            (k, (batch, rank, nheads, d_state)),
            (v, (batch, nheads, headdim)),
        )
    ]
    for b in range(batch):
        for h in range(nheads):
            S, phi, keys, value = final[0][b, h], final[1][b, h], final[2][b, :, h], final[3][b, h]
            for t, is_new in tokens(seq_idx, b, seqlen):
                if is_new:
                    S, phi, keys, value = 0 * S, 0 * phi, 0 * keys, 0 * value
                step, share = dt[b, t, h], lam[b, t, h]
                phi = phi + rate[b, t] * step
                S = np.exp(A[b, t, h] * step) * S
                for r in range(rank):
                    beta = (1 - share) * step * np.exp(A[b, t, h] * step)
                    S = S + beta * np.outer(value * factors[h, r], keys[r])
                keys = np.stack([rotate(B[b, t, r, h], phi, rank == 1) for r in range(rank)])
                value = x[b, t, h]
                for r in range(rank):
                    S = S + share * step * np.outer(value * factors[h, r], keys[r])
                for r in range(rank):
                    y[b, t, r, h] = S @ rotate(C[b, t, r, h], phi, rank == 1)
                    if D is not None:
                        y[b, t, r, h] += D[h] * value * factors[h, r]
            final[0][b, h], final[1][b, h], final[2][b, :, h], final[3][b, h] = S, phi, keys, value
    return (y, *final)


def rotate(a, phi, adjacent: bool):
    """Pair i of a turned by phi[i]: (2i, 2i + 1) if adjacent, else (i, i + len(a) // 2)."""
    a = a + 0 * phi.sum()  # a copy, complex if phi is
    for i, angle in enumerate(phi):
        one, other = (2 * i, 2 * i + 1) if adjacent else (i, i + len(a) // 2)
        a[one], a[other] = (
            a[one] * np.cos(angle) - a[other] * np.sin(angle),
            a[one] * np.sin(angle) + a[other] * np.cos(angle),
        )
    return a


def selective_scan(
    u,
    dt,
    A,
    B,
    C,
    D=None,
    z=None,
    dt_bias=None,
    dt_softplus=False,
    initial_state=None,
    seq_idx=None,
):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t u_t, y_t = (C_t . h_t + D u_t) SiLU(z_t), by channel."""
    batch, d, seqlen = u.shape
    if B.ndim == 3:
        B, C = B[:, None], C[:, None]
    ngroups, d_state = B.shape[1:3]
    given = [a for a in (u, dt, A, B, C, D, z, dt_bias, initial_state) if a is not None]
    dtype = np.result_type(*given)
    y = np.zeros(u.shape, dtype)
    final = np.zeros((batch, d, d_state), dtype)
    for b in range(batch):
        for c in range(d):
            g = c // (d // ngroups)
            h = np.zeros(d_state, dtype) if initial_state is None else initial_state[b, c]
            for t, is_new in tokens(seq_idx, b, seqlen):
                step = dt[b, c, t] if dt_bias is None else dt[b, c, t] + dt_bias[c]
                step = softplus(step) if dt_softplus else step
                h = (
                    np.exp(step * A[c]) * (0 * h if is_new else h)
                    + step * B[b, g, :, t] * u[b, c, t]
                )
                out = C[b, g, :, t] @ h
                if D is not None:
                    out = out + D[c] * u[b, c, t]
                y[b, c, t] = out if z is None else out * silu(z[b, c, t])
            final[b, c] = h
    return y, final


def causal_conv1d(x, weight, bias=None, activation=None, initial_state=None, seq_idx=None):
    """y_t = act(bias + sum_k weight_k x_{t - width + 1 + k}) over the real tokens of a segment."""
    batch, d, seqlen = x.shape
    width = weight.shape[1]
    dtype = np.result_type(*(a for a in (x, weight, bias, initial_state) if a is not None))
    y = np.zeros(x.shape, dtype)
    final = np.zeros((batch, d, width - 1), dtype)
    for b in range(batch):
        window = np.zeros((d, width - 1), dtype) if initial_state is None else initial_state[b]
        for t, is_new in tokens(seq_idx, b, seqlen):
            window = np.concatenate([0 * window if is_new else window, x[b, :, t, None]], axis=1)
            out = (window * weight).sum(1)
            out = out if bias is None else out + bias
            y[b, :, t] = silu(out) if activation == "silu" else out
            window = window[:, 1:]
        final[b] = window
    return y, final


def gated_rmsnorm(x, weight, z=None, eps=1e-5, group_size=None, norm_before_gate=False):
    """x / sqrt(mean(x^2) + eps) weight over groups of channels, gated before or after."""
    d = x.shape[-1]
    gate = 1.0 if z is None else silu(z)
    y = x if norm_before_gate else x * gate
    parts = [
        part / np.sqrt((part * part).mean(-1, keepdims=True) + eps)
        for part in np.split(y, d // (group_size or d), axis=-1)
    ]
    y = np.concatenate(parts, axis=-1) * weight
    return (y * gate if norm_before_gate else y,)
