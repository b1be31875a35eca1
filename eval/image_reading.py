"""How many images a second a model reads, and in how much memory."""

import resource
import time
from collections.abc import Callable, Iterator, Sequence

import torch
from PIL import Image

from cobra.model import Cobra


def pictures_of(count: int, height: int = 96, width: int = 128) -> Iterator[Image.Image]:
    """Pictures of noise, each drawn when it is asked for."""
    for number in range(count):
        noise = torch.Generator().manual_seed(number)
        yield Image.fromarray(torch.randint(256, (height, width, 3), generator=noise, dtype=torch.uint8).numpy())


def measure(model: Cobra, counts: Sequence[int], advance: Callable[[int], None]) -> list[dict]:
    """Reads pictures in one go, for each count anew: seconds, images and tokens a second, and the peak of the process's
    memory. Counts ascend, so that a peak is that of the largest so far.

    Returns:
        for each count images, tokens, seconds, images_per_s, peak_bytes, state_bytes.
    """
    rows = []
    for count in sorted(counts):
        began = time.perf_counter()

        def told(count: int = count) -> Iterator[Image.Image]:
            for image in pictures_of(count):
                yield image
                advance(1)

        state = model.prefill(images=told())
        seconds = time.perf_counter() - began
        rows.append(
            {
                "images": count,
                "tokens": int(state.lengths),
                "seconds": seconds,
                "images_per_s": count / seconds,
                "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
                "state_bytes": state.nbytes,
            }
        )
    return rows
