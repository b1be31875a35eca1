"""What a row has read and by which model, as digests: so that a state is never taken for another's."""

import hashlib
import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from cobra.processor import Tiles
from cobra.typed_config import to_dict

if TYPE_CHECKING:
    from cobra.model import Cobra

SAMPLES = 1024  # of each tensor, evenly spread: another training run changes all of them


class Content:
    """A rolling SHA-256 with a link for each token of text and for each image or video.

    Rows of equal digests have read the same tokens and the same pixels in the same order, however that was cut into
    calls. Pixels are those that the model gets: what is the same behind the resizing is the same image.
    """

    def __init__(self, digest: bytes = b"") -> None:
        self.digest = digest

    def copy(self) -> "Content":
        return Content(self.digest)

    def read(self, piece: Iterable[int] | Tiles) -> None:
        """Adds ids, or an image or video."""
        if isinstance(piece, Tiles):
            shape = json.dumps([piece.pixel_values.shape, piece.sizes]).encode()
            pixels = piece.pixel_values.contiguous().numpy().data
            self.link(b"image", shape, hashlib.sha256(pixels).digest())
            return
        for token in piece:
            self.link(b"token", token.to_bytes(4, "little"))

    def link(self, *parts: bytes) -> None:
        """Adds what these bytes stand for, the first of which say of what kind it is."""
        self.digest = hashlib.sha256(b"".join((self.digest, *parts))).digest()


def fingerprint(model: "Cobra") -> str:
    """A digest of configuration, tokenizer and a sample of the weights, the same in float32 and bfloat16.

    Weights that were trained on, merged or quantised give another one.
    """
    tensors = model.state_dict()
    objects = tuple((id(tensor), _version(tensor)) for tensor in model.parameters())
    known = model.__dict__.get("_fingerprint")
    if known is not None and known[0] == objects:
        return known[1]
    digest = hashlib.sha256(json.dumps(to_dict(model.config), sort_keys=True).encode())
    digest.update(model.tokenizer.to_json().encode())
    for name, tensor in tensors.items():
        digest.update(f"{name} {tuple(tensor.shape)} ".encode())
        flat = tensor.detach().flatten()
        places = torch.linspace(0, max(len(flat) - 1, 0), min(len(flat), SAMPLES), dtype=torch.float64).long()
        digest.update(flat[places.to(flat.device)].to(torch.bfloat16).view(torch.int16).cpu().numpy().tobytes())
    model.__dict__["_fingerprint"] = objects, digest.hexdigest()[:16]
    return digest.hexdigest()[:16]


def _version(tensor: torch.Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors do not count their changes
