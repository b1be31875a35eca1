"""Every operator once, forward and backward, at small odd shapes, for compute-sanitizer to look at."""

import sys

import torch
from torch import Tensor

import vision_scan


def main(device: str = "cuda", dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> int:
    generator = torch.Generator(device).manual_seed(0)
    for dtype in dtypes:

        def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            t = torch.randn(shape, generator=generator, device=device).to(dtype)
            return t.requires_grad_()

        for outputs in calls(normal, device):
            torch.autograd.backward(outputs, [torch.ones_like(y) for y in outputs])
        with torch.no_grad():
            update(lambda *shape, **more: normal(*shape, **more).detach(), device)
    if device != "cpu":
        torch.cuda.synchronize()
    sys.stdout.write("all shapes ran\n")
    return 0


def calls(normal, device: str):
    """The outputs of each differentiable operator, one after the other."""

    def decay(*shape: int) -> Tensor:
        return normal(*shape, dtype=torch.float32).detach().abs().neg().requires_grad_()

    def wide(*shape: int) -> Tensor:
        return normal(*shape, dtype=torch.float32)

    packed = torch.tensor([[0] * 37 + [-1] * 5 + [1] * 91] * 2, device=device)
    for seqlen, seq_idx in ((300, None), (133, packed)):
        for d_state in (1, 16):
            u, dt, B, C = (
                normal(2, 40, seqlen),
                normal(2, 40, seqlen),
                normal(2, d_state, seqlen),
                normal(2, d_state, seqlen),
            )
            scan = vision_scan.selective_scan(
                u, dt, decay(40, d_state), B, C, wide(40), normal(2, 40, seqlen), wide(40), True,
                wide(2, 40, d_state), True, seq_idx,
            )  # fmt: skip
            yield list(scan)
        for headdim, d_state, groups in ((64, 128, 1), (32, 16, 2)):
            x, dt = normal(2, seqlen, 4, headdim), normal(2, seqlen, 4)
            B, C = (normal(2, seqlen, groups, d_state) for _ in range(2))
            scan = vision_scan.ssd(
                x, dt, decay(4), B, C, wide(4), None, wide(4), True,
                initial_state=wide(2, 4, headdim, d_state), return_final_state=True, seq_idx=seq_idx,
                chunk_size=64,
            )  # fmt: skip
            yield list(scan)
        x = normal(2, 48, seqlen)
        yield list(
            vision_scan.causal_conv1d(x, normal(48, 4), normal(48), "silu", normal(2, 48, 3), True, seq_idx)
        )
    for order in ("cross4", "hilbert"):
        lists = len(vision_scan.order(order, 7, 9))
        u, dt = normal(2, 7, 9, 24), normal(2, lists, 7, 9, 24)
        B, C = (normal(2, lists, 7, 9, 1, 8) for _ in range(2))
        yield [vision_scan.selective_scan_2d(u, dt, decay(lists, 24, 8), B, C, wide(lists, 24), order=order)]
        x, dt = normal(2, 7, 9, 2, 32), normal(2, lists, 7, 9, 2)
        B, C = (normal(2, lists, 7, 9, 1, 16) for _ in range(2))
        yield [
            vision_scan.ssd_2d(x, dt, decay(lists, 2), B, C, wide(lists, 2), order=order, dt_softplus=True)
        ]
        yield [vision_scan.causal_conv1d_2d(u, normal(24, 3), normal(24), order=order)]
    yield [vision_scan.gated_rmsnorm(normal(5, 7, 96), wide(96), normal(5, 7, 96), 1e-5, 48)]


def update(normal, device: str) -> None:
    """The operators that decode, into slots, one of them skipped."""
    slots = torch.tensor([3, -1, 0], device=device)
    for tokens in (1, 5):
        state = normal(4, 4, 64, 128, dtype=torch.float32)
        x, dt = normal(3, tokens, 4, 64), normal(3, tokens, 4)
        A = -normal(4, dtype=torch.float32).abs()
        B, C = (normal(3, tokens, 1, 128) for _ in range(2))
        vision_scan.ssd_update(state, x, dt, A, B, C, dt_softplus=True, state_indices=slots)
        state, u, dt = normal(4, 40, 16, dtype=torch.float32), normal(3, 40, tokens), normal(3, 40, tokens)
        A = -normal(40, 16, dtype=torch.float32).abs()
        B, C = (normal(3, 16, tokens) for _ in range(2))
        vision_scan.selective_scan_update(state, u, dt, A, B, C, dt_softplus=True, state_indices=slots)
        state = normal(4, 48, 3)
        x, weight = normal(3, 48, tokens), normal(48, 4)
        vision_scan.causal_conv1d_update(state, x, weight, normal(48), "silu", state_indices=slots)


if __name__ == "__main__":
    sys.exit(main())
