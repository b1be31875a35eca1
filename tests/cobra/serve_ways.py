"""Requests to an engine, made and waited for."""

import base64
import io
import os
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

import cobra
from cobra.sampling import Sampler
from cobra.serve.answer import Outcome, Request
from cobra.serve.engine import Engine
from cobra.serve.prompt import Message, Picture, Prompt

NAME = "a-model"  # of one that is served


def lively(layers, tiles=None) -> cobra.Cobra:
    """A small model whose random weights are large enough that its answers depend on the prompt."""
    config = cobra.PRESETS["tiny"]
    lm = replace(config.lm, layers=layers, vocab_size=261, tie_word_embeddings=False)
    model = cobra.build(replace(config, lm=lm, image=replace(config.image, tiles=tiles)), seed=1)
    for name, parameter in model.lm.named_parameters():
        if parameter.dim() == 2 and "layers" in name:
            parameter.data *= 4
    # Letters only: what it writes is read again as the same tokens.
    model.lm.lm_head.weight.data[:32] = 0
    model.lm.lm_head.weight.data[127:260] = 0
    return model


def png(value: int, size: tuple[int, int] = (24, 16), exif: Image.Exif | None = None) -> bytes:
    """Pictures that look alike: one pixel differs."""
    image = Image.new("RGB", size, "teal")
    image.putpixel((size[0] // 2, size[1] // 2), (value % 256, value // 256 % 256, value // 65536))
    buffer = io.BytesIO()
    image.save(buffer, "png", exif=exif or Image.Exif())
    return buffer.getvalue()


def prompt(model, *turns) -> Prompt:
    """Turns of texts and image files, the user's first."""
    messages = []
    for place, turn in enumerate(turns):
        parts = [turn] if isinstance(turn, str | bytes) else turn
        opened = tuple(Picture.of(model, part) if isinstance(part, bytes) else part for part in parts)
        messages.append(Message(("user", "assistant")[place % 2], opened))
    return Prompt(model, messages)


@dataclass
class Told:
    """What a request was told."""

    pieces: list[str] = field(default_factory=list)
    outcome: Outcome | None = None
    cancel: object = None

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def end(self, outcome: Outcome) -> None:
        assert self.outcome is None, "told of two ends"
        self.outcome = outcome


def ask(engine: Engine, conversation: Prompt, max_new_tokens: int = 8, stop: Sequence[str] = (), **sampling) -> Told:
    told = Told()
    told.cancel = engine.submit(
        Request(
            prompt=conversation,
            sampler=Sampler(1, **sampling),
            max_new_tokens=max_new_tokens,
            stop=stop,
            on_text=told.pieces.append,
            on_end=told.end,
        )
    )
    return told


def run(engine: Engine, most: int = 100_000) -> int:
    """Steps until there is nothing to do; how many."""
    for count in range(most):
        if not engine.step():
            return count
    raise AssertionError(f"still busy after {most} steps")


def fresh(model, conversation: Prompt, max_new_tokens: int = 8) -> str:
    """The greedy answer of a model that reads everything at once, in one call, without any state."""
    ids, inputs = whole(model, conversation)
    new = model.generate(ids, **inputs, max_new_tokens=max_new_tokens)
    return model.tokenizer.decode(new[0].tolist())


@torch.no_grad()
def behind(model, conversation: Prompt) -> torch.Tensor:
    """The logits (vocab,) behind a conversation that is read at once."""
    ids, inputs = whole(model, conversation)
    logits, _ = model.lm(inputs_embeds=model.embed(ids, **inputs), logits_to_keep=1)
    return logits[0, -1]


def whole(model, conversation: Prompt) -> tuple[torch.Tensor, dict]:
    """A conversation as the model's tensors."""
    ids, tiles = [], []
    for segment in conversation.segments:
        for piece in segment.open(model):
            if isinstance(piece, list):
                ids += piece
            else:
                ids += [model.tokenizer.image_id] * piece.num_tokens
                tiles.append(piece)
    return torch.tensor([ids]), model.processor.stack(tiles)


def start_server(*arguments: str) -> tuple[subprocess.Popen, str]:
    """`cobra serve` in a process of its own, at a free port: the process, and the address at which it is ready."""
    command = [sys.executable, "-m", "cobra.cli", "serve", *arguments, "--port", "0"]
    environment = os.environ | {"PYTHONPATH": str(Path(cobra.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    server = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
    assert server.stdout is not None
    line = server.stdout.readline()
    found = re.search(r"http://[\w.:]+\d", line)
    assert found, f"no server: {line}"
    end = time.monotonic() + 60
    while True:
        try:
            urllib.request.urlopen(f"{found[0]}/health", timeout=5).close()
            return server, found[0]
        except OSError:
            assert time.monotonic() < end and server.poll() is None, "no server"
            time.sleep(0.1)


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def linked(url: str) -> dict:
    return {"type": "image_url", "image_url": {"url": url}}


def image(data: bytes) -> dict:
    return linked(data_url(data))


def user(*parts) -> dict:
    content = [{"type": "text", "text": part} if isinstance(part, str) else part for part in parts]
    return {"role": "user", "content": content}


def wait_until(is_done, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not is_done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)
