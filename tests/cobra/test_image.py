import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from cobra.image import ImageConfig, check_image, open_image, to_pixels
from vision_scan.errors import UserError

RED = (200, 10, 10)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(width: int = 8, height: int = 6) -> Image.Image:
    values = np.arange(width * height * 3, dtype=np.uint8).reshape(height, width, 3)
    return Image.fromarray(values)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"])
def test_open_image_makes_every_mode_rgb(mode):
    white = Image.new("RGB", (5, 4), (255, 255, 255))
    grey = white.convert("L") if mode in ("LA", "La", "PA") else white
    image = grey.convert("LA").convert("La") if mode == "La" else grey.convert(mode)
    opened = open_image(image)
    assert (opened.mode, opened.size) == ("RGB", (5, 4))
    assert opened.getpixel((2, 2)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "HSV"])
def test_open_image_converts_colour_spaces(mode):
    opened = open_image(Image.new("RGB", (3, 3), RED).convert(mode))
    assert np.abs(np.subtract(opened.getpixel((1, 1)), RED)).max() <= 6


def test_open_image_brings_16_bits_to_8():
    values = np.array([[0, 257 * 100, 65535]], dtype=np.uint16)
    opened = open_image(encoded(Image.fromarray(values)))
    assert [opened.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (100,) * 3, (255,) * 3]


def test_open_image_keeps_a_dark_16_bit_image_dark():
    opened = open_image(Image.fromarray(np.full((2, 2), 200, dtype=np.uint16)))
    assert opened.getpixel((0, 0)) == (1, 1, 1)


def test_open_image_reads_integers_and_floats():
    integers = Image.fromarray(np.array([[0, 80]], dtype=np.int32))
    floats = Image.fromarray(np.array([[-5.0, 80.2, 300.0, np.nan]], dtype=np.float32))
    assert open_image(integers).getpixel((1, 0)) == (80, 80, 80)
    assert [open_image(floats).getpixel((x, 0))[0] for x in range(4)] == [0, 80, 255, 0]


def test_open_image_lays_transparency_over_white():
    half = Image.new("RGBA", (2, 1), (0, 0, 0, 0))
    half.putpixel((1, 0), (*RED, 255))
    opened = open_image(encoded(half))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), RED]


def test_open_image_sees_transparency_in_a_palette():
    image = Image.new("P", (2, 1))
    image.putpalette([0, 0, 0, *RED])
    image.putpixel((1, 0), 1)
    opened = open_image(encoded(image, transparency=0))
    assert [opened.getpixel((x, 0)) for x in range(2)] == [(255, 255, 255), RED]


def test_open_image_applies_the_exif_orientation_once():
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    data = encoded(gradient(), exif=exif)
    opened = open_image(open_image(data))
    assert opened.size == (6, 8)
    assert np.array_equal(np.asarray(opened), np.rot90(np.asarray(gradient()), -1))


def test_open_image_survives_broken_exif():
    assert open_image(encoded(gradient(), "JPEG", exif=b"Exif\0\0broken")).size == (8, 6)


def test_open_image_takes_the_first_frame(tmp_path):
    frames = [Image.new("RGB", (4, 4), colour) for colour in (RED, (0, 0, 0))]
    path = tmp_path / "two.gif"
    frames[0].save(path, save_all=True, append_images=frames[1:])
    assert open_image(path).getpixel((0, 0)) == RED


@pytest.mark.parametrize("kind", ["path", "str", "bytes", "image"])
def test_open_image_takes_paths_bytes_and_images(tmp_path, kind):
    path = tmp_path / "a.png"
    gradient().save(path)
    source = {"path": path, "str": str(path), "bytes": path.read_bytes(), "image": gradient()}
    assert open_image(source[kind]).tobytes() == gradient().tobytes()


def test_open_image_leaves_a_given_image_as_it_was():
    image = gradient().convert("RGBA")
    open_image(image)
    assert image.mode == "RGBA"
    image.load()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
def test_open_image_refuses_truncated_files(tmp_path, kind):
    path = tmp_path / "cut.img"
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), kind)
    path.write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"cut\.img"):
        open_image(path)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP"])
@pytest.mark.filterwarnings("ignore")
def test_open_image_raises_nothing_else_on_damaged_files(kind, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)  # damage to the size makes large images
    data = encoded(gradient(30, 20), kind)
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(100):
        damaged = bytearray(data)
        for place in rng.integers(0, min(len(data), 100), 4):
            damaged[place] = rng.integers(256)
        try:
            open_image(bytes(damaged))
        except UserError:
            refused += 1
    assert refused > 0


@pytest.mark.parametrize("check", [open_image, check_image])
def test_bad_files_are_named(tmp_path, check):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    for name, reason in {
        "none.png": "no such file",
        "empty.png": "0 bytes",
        "text.png": "not an image",
        "": "not a file",
    }.items():
        with pytest.raises(UserError, match=reason) as caught:
            check(tmp_path / name)
        assert str(tmp_path / name) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", [b"", b"text", "x" * 9999, 7, None, Image.new("RGB", (0, 3))])
def test_open_image_refuses_what_is_no_image(source):
    with pytest.raises(UserError):
        open_image(source)


def test_check_image_reads_the_header_only(tmp_path):
    path = tmp_path / "cut.png"
    path.write_bytes(encoded(gradient(80, 60))[:60])
    assert check_image(path) == (60, 80)


@pytest.mark.parametrize("resize", ["squash", "letterbox", "crop"])
@pytest.mark.parametrize("size", [(16, 12), (1, 500), (500, 1), (7, 9)])
def test_to_pixels_fits_every_shape(resize, size):
    config = ImageConfig(height=12, width=16, resize=resize)
    pixels = to_pixels(Image.new("RGB", size, RED), config)
    assert pixels.shape == (1, 3, 12, 16)
    assert pixels.dtype == torch.float32
    assert pixels.min() >= 0 and pixels.max() <= 1
    red = torch.tensor(RED) / 255
    assert torch.isclose(pixels[0], red.view(3, 1, 1)).all(0).any()


@pytest.mark.parametrize("size", [(224, 224), (640, 480), (60, 900), (2000, 30), (10, 7)])
@pytest.mark.parametrize("resize", ["squash", "letterbox", "crop"])
def test_to_pixels_is_pillows_to_a_level(resize, size):
    # Not black and white: between its two passes Pillow cuts off what overshoots.
    noise = np.random.default_rng(0).integers(80, 176, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(noise)
    found = to_pixels(image, ImageConfig(height=48, width=64, resize=resize, fill=(1, 2, 3)))[0]
    if resize == "squash":
        expected = image.resize((64, 48), Image.Resampling.BICUBIC)
    elif resize == "crop":
        inner = (min(size[0], round(size[1] * 64 / 48)), min(size[1], round(size[0] * 48 / 64)))
        left, top = (size[0] - inner[0]) // 2, (size[1] - inner[1]) // 2
        box = (left, top, left + inner[0], top + inner[1])
        expected = image.crop(box).resize((64, 48), Image.Resampling.BICUBIC)
    else:
        inner = ImageOps.contain(image, (64, 48), Image.Resampling.BICUBIC)
        expected = Image.new("RGB", (64, 48), (1, 2, 3))
        expected.paste(inner, ((64 - inner.width) // 2, (48 - inner.height) // 2))
    difference = found * 255 - torch.from_numpy(np.array(expected)).permute(2, 0, 1)
    assert difference.abs().max() < 1.01


@pytest.mark.parametrize("resize", ["squash", "letterbox", "crop"])
def test_to_pixels_keeps_pixels_that_fit(resize):
    pixels = to_pixels(gradient(), ImageConfig(height=6, width=8, resize=resize))
    expected = torch.from_numpy(np.array(gradient())).permute(2, 0, 1) / 255
    assert torch.equal(pixels[0], expected)


def test_letterbox_fills_with_grey_and_crop_cuts():
    wide = Image.new("RGB", (40, 10), RED)
    wide.paste((0, 0, 0), (0, 0, 10, 10))
    boxed = to_pixels(wide, ImageConfig(height=20, width=20, resize="letterbox"))
    cropped = to_pixels(wide, ImageConfig(height=20, width=20, resize="crop"))
    torch.testing.assert_close(boxed[0, :, 0, 0], torch.full((3,), 127 / 255))
    torch.testing.assert_close(cropped[0, :, 0, 0], torch.tensor(RED) / 255)


def test_letterbox_fills_with_the_colour_of_the_config():
    config = ImageConfig(height=20, width=20, resize="letterbox", fill=(122, 116, 104))
    boxed = to_pixels(Image.new("RGB", (40, 10), RED), config)
    fill = torch.tensor([122, 116, 104]) / 255
    for row, colour in ((0, fill), (6, fill), (10, torch.tensor(RED) / 255), (19, fill)):
        torch.testing.assert_close(boxed[0, :, row, 5], colour)


def test_image_config_names_the_bad_value():
    with pytest.raises(UserError, match="0x4"):
        ImageConfig(height=0, width=4)
    with pytest.raises(UserError, match="stretch"):
        ImageConfig(height=4, width=4, resize="stretch")
    for fill in ((1, 2), (0, 0, 256), (-1, 0, 0)):
        with pytest.raises(UserError, match=r"image\.fill"):
            ImageConfig(height=4, width=4, fill=fill)
