"""What a process has to do beyond its own piece of a row under sequence parallelism.

    PYTHONPATH=. python benchmarks/sequence_parallel.py [--tokens 4096] [--d-model 768] [--device cpu]
        [--threads 1]

A layer reads the same tokens as a whole row and as the shard of a group of one process, in turn: the same
work as among many processes, but nothing is sent. Both must give the same outputs. Time is forward and
backward in float32, the median of the rounds behind a warm-up, with their range.
"""
# ruff: noqa: T201

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cobra.lm.mamba1 import Mamba1, Mamba1Config
from cobra.lm.mamba2 import Mamba2, Mamba2Config
from cobra.lm.mixer import Segments
from cobra.lm.sequence_parallel import SequenceShard
from eval.environment import describe_environment

ROUNDS = 5


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--d-model", type=int, default=768)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    backend = "nccl" if options.device == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    made_on = describe_environment(options.device)
    kernels = {name: made_on["backend"][name][options.device] for name in ("ssd", "selective_scan")}
    print(
        f"{made_on['gpu'] or made_on['cpu']}, {options.threads} threads, torch {torch.__version__}, {kernels}"
    )
    for mixer in (Mamba2(Mamba2Config(), options.d_model), Mamba1(Mamba1Config(), options.d_model)):
        compare(mixer.to(options.device), options.tokens)
    dist.destroy_process_group()


def compare(mixer: nn.Module, tokens: int) -> None:
    """Prints what a layer takes for a whole row, and for the same as a shard."""
    weight = mixer.out_proj.weight
    x = torch.randn(1, tokens, len(weight), device=weight.device, requires_grad=True)
    shard = SequenceShard.cut(1, tokens, dist.group.WORLD)
    ways = {"whole": Segments(shard.starts), "shard": Segments(shard.starts, shard=shard)}
    outputs, seconds = {}, {way: [] for way in ways}
    for index in range(ROUNDS + 1):
        for way, segments in ways.items():
            outputs[way], taken = timed(lambda segments=segments: mixer(x, None, segments)[0])
            seconds[way] += [taken] if index else []
    torch.testing.assert_close(outputs["shard"], outputs["whole"])
    name, plain = type(mixer).__name__, statistics.median(seconds["whole"])
    for way, found in seconds.items():
        middle = statistics.median(found)
        spread = f"{min(found):.4f} to {max(found):.4f}"
        print(f"{name} {way}: {middle:.4f} s ({spread}), {100 * (middle / plain - 1):+.0f}%")


def timed(read: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """The output, and the seconds of a forward and a backward pass."""
    start = time.perf_counter()
    y = read()
    y.sum().backward()
    if y.is_cuda:
        torch.cuda.synchronize()
    return y.detach(), time.perf_counter() - start


if __name__ == "__main__":
    main()
