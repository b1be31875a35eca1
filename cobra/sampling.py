"""From logits to the next token: greedy, temperature, top-k, top-p; a generator for each row."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vision_scan.errors import UserError


def greedy(logits: Tensor) -> Tensor:
    """The most likely token of each row: (batch, vocab) -> (batch,), int64."""
    return logits.argmax(-1)


def probabilities(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """The distribution to draw from: (batch, vocab) -> (batch, vocab), float32, rows sum to 1.

    Args:
        logits: (batch, vocab), any floating dtype; -inf excludes a token.
        temperature: above 0; below 1 favours likely tokens, above 1 flattens.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: then keep the fewest of the most likely tokens that together have this probability.
    Source: top-p is nucleus sampling, Holtzman et al. 2020 (arXiv:1904.09751), section 3.1.
    """
    scaled = logits.float() / temperature
    if not top_k and top_p >= 1:
        return scaled.softmax(-1)
    ordered, tokens = scaled.sort(dim=-1, descending=True, stable=True)
    if top_k:
        ordered[..., top_k:] = -torch.inf
    chances = ordered.softmax(-1)
    # A token stays if those before it do not reach top_p yet, so that the first one always stays.
    chances = chances.where(chances.cumsum(-1) - chances < top_p, 0)
    chances = chances / chances.sum(-1, keepdim=True)
    return torch.zeros_like(chances).scatter(-1, tokens, chances)


def draw(chances: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
    """Draws a token per row by inverting the cumulative distribution: (batch, vocab) -> (batch,), int64.

    Args:
        chances: (batch, vocab), each row sums to 1.
        generators: one per row, on the CPU, so that a seed means the same on every device.
    """
    uniform = [torch.rand(1, generator=generator) for generator in generators]
    # Float64, as 50,000 terms in float32 would leave the tail of the distribution unreachable.
    cumulative = chances.double().cumsum(-1)
    points = torch.stack(uniform).to(cumulative) * cumulative[..., -1:]
    return torch.searchsorted(cumulative, points, right=True).squeeze(-1)


class Sampler:
    """Picks the next token of each row of a batch.

    Args:
        batch: the number of rows.
        do_sample: draw; otherwise the most likely token is taken and the rest is ignored.
        temperature, top_k, top_p: see `probabilities`; None means no change. Temperature 0 is greedy.
        seed: of row i: `seed + i`, or `seed[i]`, so that a row's draws do not depend on its
            neighbours. None takes one from torch's global generator.
    Raises:
        UserError: naming the option that is out of range.
    """

    def __init__(
        self,
        batch: int,
        do_sample: bool = False,
        temperature: float | None = 1.0,
        top_k: int | None = 0,
        top_p: float | None = 1.0,
        seed: int | Sequence[int] | None = None,
    ) -> None:
        self.temperature = 1.0 if temperature is None else float(temperature)
        self.top_k = top_k or 0
        self.top_p = 1.0 if top_p is None else float(top_p)
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature={temperature}: must be a number of 0 or more")
        if self.top_k < 0:
            raise UserError(f"top_k={top_k}: must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={top_p}: must be above 0 and at most 1")
        self.is_greedy = not do_sample or self.temperature == 0
        if self.is_greedy:
            return
        if seed is None:
            seed = int(torch.randint(2**62, ()))
        seeds = [seed + row for row in range(batch)] if isinstance(seed, int) else list(seed)
        if len(seeds) != batch:
            raise UserError(f"{len(seeds)} seeds for {batch} rows: give one for each, or a number")
        self.generators = [torch.Generator().manual_seed(row_seed) for row_seed in seeds]

    def __call__(self, logits: Tensor) -> Tensor:
        """The next token of each row: (batch, vocab) -> (batch,), int64."""
        if self.is_greedy:
            return greedy(logits)
        chances = probabilities(logits, self.temperature, self.top_k, self.top_p)
        return draw(chances, self.generators)
