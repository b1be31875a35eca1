"""The order in which the language model gets a tile's tokens: everywhere the same one, and part of the model."""

from dataclasses import replace

import pytest
import torch
from PIL import Image
from torch import Tensor

import cobra
import vision_scan
from cobra.config import PRESETS, CobraConfig
from cobra.connector import LDPv2Config, MLPConfig, MSCConfig, VSSL2Config
from cobra.image import ImageConfig
from cobra.model import Cobra
from cobra.tiles import AnyResConfig
from cobra.token_reduction import ToMeConfig
from cobra.vision_encoder import SmallEncoderConfig
from tests.tolerance import assert_close
from vision_scan.errors import UserError

HEIGHT, WIDTH = 3, 4  # so that windows of 2 cells stick out
ORDERS = ["raster_rev", "column", "hilbert", "snake_row_tl", "random(seed=3)", "local(window=2)"]


def small(order: str = "raster", **changes) -> CobraConfig:
    tiny = PRESETS["tiny"]
    parts = {
        "image": ImageConfig(height=8 * HEIGHT, width=8 * WIDTH),
        "vision_encoder": SmallEncoderConfig(patch_size=8, d_model=32, depth=1, num_heads=2),
        "connector": MLPConfig(),
        "lm": replace(tiny.lm, layers=tiny.lm.layers[:1]),
    }
    return replace(tiny, **{**parts, "reading_order": order, **changes})


def build(order: str = "raster", **changes) -> Cobra:
    """Of one seed: models of two orders have the same weights."""
    return cobra.build(small(order, **changes), seed=3)


def cells(order: str) -> list[int]:
    return [cell for cell in vision_scan.order(order, HEIGHT, WIDTH)[0].tolist() if cell >= 0]


def pixels(count: int) -> Tensor:
    return torch.rand(count, 3, 8 * HEIGHT, 8 * WIDTH, generator=torch.Generator().manual_seed(0))


def pictures(count: int) -> list[Image.Image]:
    return [Image.fromarray((255 * x).byte().movedim(0, -1).numpy()) for x in pixels(count)]


class Rearranged(torch.nn.Module):
    """A connector whose tokens come in another order: what a reading order has to equal."""

    def __init__(self, connector: torch.nn.Module, cells: list[int]) -> None:
        super().__init__()
        self.connector, self.cells = connector, cells

    def forward(self, features: Tensor) -> Tensor:
        return self.connector(features)[:, self.cells]


def oracle(order: str, **changes) -> Cobra:
    model = build(**changes)
    model.connector = Rearranged(model.connector, cells(order))
    return model


@pytest.mark.parametrize(
    ("order", "connector"),
    [*((order, MLPConfig()) for order in ORDERS), ("hilbert", MSCConfig()), ("column", VSSL2Config())],
    ids=str,
)
@torch.no_grad()
def test_tokens_arrive_in_that_order(order, connector):
    given, raster = (build(name, connector=connector).encode_images(pixels(2)) for name in (order, "raster"))
    assert given.shape == raster.shape == (2, HEIGHT * WIDTH, 128)
    for place, cell in enumerate(cells(order)):
        assert torch.equal(given[:, place], raster[:, cell])
    assert not torch.equal(given, raster)


@torch.no_grad()
def test_answers_are_those_of_a_model_whose_tokens_come_so():
    model, other, raster = build("hilbert"), oracle("hilbert"), build()
    requests = [("What?", pictures(2)), ("Where is it, then?", pictures(1)), ("No picture.", None)]
    ways = [
        lambda m: m.answer("What?", images=pictures(2), max_new_tokens=5),
        lambda m: m.answer_batch(requests, max_new_tokens=5),
        lambda m: m.answer("And?", state=m.prefill("Look.", images=pictures(1)), max_new_tokens=5),
        lambda m: m.generate(
            **m.processor(text=["<image>a", "<image>"], images=[[p] for p in pictures(2)]), max_new_tokens=5
        ).tolist(),
    ]
    for number, way in enumerate(ways):
        assert way(model) == way(other), number
    assert any(way(model) != way(raster) for way in ways)
    assert model.answer_batch(requests, max_new_tokens=5) == [
        model.answer(text, images=images, max_new_tokens=5) for text, images in requests
    ]


def test_loss_and_gradients_are_those_of_a_model_whose_tokens_come_so():
    batch = build().processor(text=["<image>a cat", "<image>dog!!"], images=[[p] for p in pictures(2)])
    ids = batch["input_ids"]
    row = {"input_ids": ids, "labels": torch.where(ids < 256, ids, -100), "pixel_values": batch["pixel_values"]}
    found = {}
    for name, model in (("given", build("hilbert")), ("oracle", oracle("hilbert")), ("raster", build())):
        model.train()
        total, count = model.loss(row)
        total.backward()
        found[name] = total.detach(), {n.replace("connector.connector", "connector"): p.grad
                                       for n, p in model.named_parameters()}  # fmt: skip
        assert count == 2 * 5
    assert_close("loss", found["given"][0], found["oracle"][0])
    assert abs(found["given"][0] - found["raster"][0]) > 1e-5
    for name, grad in found["oracle"][1].items():
        assert_close(name, found["given"][1][name], grad, 1e-4)


def test_a_reading_order_survives_the_file(tmp_path):
    model = build("random(seed=3)")
    cobra.save(model, tmp_path)
    again = cobra.load(tmp_path, dtype="float32")
    assert again.config.reading_order == "random(seed=3)"
    assert torch.equal(again.encode_images(pixels(1)), model.encode_images(pixels(1)))


@pytest.mark.parametrize(
    ("message", "changes"),
    [
        ("'cross4' has 4 lists.*take an order of one list", {"reading_order": "cross4"}),
        ("'zigma8' has 8 lists", {"reading_order": "zigma8"}),
        ("'es2d' has 4 lists", {"reading_order": "es2d"}),
        ("has no sequence", {"reading_order": "noncausal"}),
        ("did you mean 'hilbert'", {"reading_order": "hilbrt"}),
        ("one token of each cell", {"connector": LDPv2Config()}),
        ("one token of each cell", {"image": ImageConfig(height=24, width=32, tiles=AnyResConfig())}),
        ("one token of each cell", {"token_reduction": ToMeConfig(num_tokens=6)}),
    ],
)
def test_what_cannot_be_read_in_an_order_is_refused_in_one_line(message, changes):
    with pytest.raises(UserError, match=message) as caught:
        replace(small("hilbert"), **changes)
    assert "\n" not in str(caught.value)
