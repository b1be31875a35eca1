"""Files, folders, PDFs and videos: every kind is made here, and read back."""

from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cobra
from cobra.image import open_image
from cobra.media import CLIP_FRAMES, Every, Media
from cobra.video import EVSConfig, Video
from vision_scan.errors import UserError

av = pytest.importorskip("av")
pytest.importorskip("pypdfium2")
RATE = 10


def write_video(path: Path, num_frames: int, pts=None, codec: str = "mpeg4", rate: int = RATE) -> Path:
    """Frames with their number in black and white columns, a bit each."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.codec_context.time_base = Fraction(1, rate)
        for number in range(num_frames):
            frame = av.VideoFrame.from_ndarray(columns(number), format="rgb24")
            frame.pts = number if pts is None else pts[number]
            frame.time_base = Fraction(1, rate)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def columns(number: int) -> np.ndarray:
    bits = [255 * (number >> place & 1) for place in range(8)]
    return np.broadcast_to(np.repeat(np.array(bits, np.uint8), 8)[None, :, None], (48, 64, 3)).copy()


def numbers(media: Media) -> list[int]:
    """Which frames they are."""
    rows = [np.array(open_image(frame))[24, 4::8, 0] for frame in media]
    return [sum(int(value > 127) << place for place, value in enumerate(row)) for row in rows]


def write_pdf(path: Path, colours: list[str]) -> Path:
    pages = [Image.new("RGB", (200, 100 + 50 * place), colour) for place, colour in enumerate(colours)]
    pages[0].save(path, save_all=True, append_images=pages[1:], resolution=72)
    return path


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".avi"])
def test_a_frame_is_taken_every_so_often(tmp_path, suffix):
    film = write_video(tmp_path / f"film{suffix}", 35)
    assert numbers(Media([film])) == [0, 10, 20, 30]
    assert numbers(Media([film], Every.parse("0.5s"))) == list(range(0, 35, 5))
    assert numbers(Media([film], Every.parse("300ms"))) == list(range(0, 35, 3))
    assert numbers(Media([film], Every.parse("8f"))) == list(range(0, 35, 8))
    assert numbers(Media([film], Every.parse("1f"))) == list(range(35))
    assert numbers(Media([film], Every.parse("100s"))) == [0]
    counts = [Media([film], Every.parse(every)).count for every in ("1s", "0.5s", "8f", "100s")]
    assert all(abs(count - expected) <= 1 for count, expected in zip(counts, [4, 7, 5, 1], strict=True))


def test_frames_of_uneven_times_are_taken_by_their_times(tmp_path):
    times = [0, 1, 2, 9, 14, 15, 16, 29, 31, 40, 41]  # tenths of a second
    film = write_video(tmp_path / "uneven.mkv", len(times), pts=times)
    taken = [times[number] for number in numbers(Media([film]))]
    assert taken == [0, 14, 29, 31, 40]  # the first of each second, and none twice


def test_a_rate_that_does_not_fit_does_not_drift(tmp_path):
    film = write_video(tmp_path / "film.mkv", 49, rate=7)
    taken = numbers(Media([film], Every.parse("0.5s")))
    assert taken == [0, 4, 7, 11, 14, 18, 21, 25, 28, 32, 35, 39, 42, 46]
    assert max(b - a for a, b in pairwise(taken)) == 4


def test_a_video_is_read_frame_by_frame(tmp_path):
    film = write_video(tmp_path / "film.mp4", 30)
    frames = iter(Media([film], Every.parse("1f")))
    first = next(frames)
    film.unlink()  # what is open stays readable; nothing was read ahead of time into a list
    assert open_image(first).size == (64, 48) and sum(1 for _ in frames) == 29


def test_pages_of_a_pdf_come_in_order_and_in_shape(tmp_path):
    media = Media([write_pdf(tmp_path / "paper.pdf", ["red", "lime", "blue"])])
    pages = [open_image(page) for page in media]
    assert media.count == 3 == len(pages)
    colours = [np.array(page)[9, 9] for page in pages]
    np.testing.assert_allclose(colours, [(255, 0, 0), (0, 255, 0), (0, 0, 255)], atol=5)
    ratios = [page.height / page.width for page in pages]
    assert ratios == pytest.approx([0.5, 0.75, 1.0], abs=0.01)
    assert pages[0].width == pytest.approx(200 * 150 / 72, abs=2)


def test_a_poster_is_not_drawn_in_full(tmp_path):
    Image.new("RGB", (3000, 6000), "red").save(tmp_path / "poster.pdf", resolution=72)
    (page,) = Media([tmp_path / "poster.pdf"])
    assert page.size == (2048, 4096)


def test_folders_mix_and_count_as_people_do(tmp_path):
    folder = tmp_path / "album"
    folder.mkdir()
    for name in ("img10.png", "img9.JPG"):
        Image.new("RGB", (8, 8)).save(folder / name)
    write_pdf(folder / "b.pdf", ["red", "blue"])
    write_video(folder / "a.mp4", 15)
    (folder / "notes.txt").write_text("text")
    (folder / "below").mkdir()
    picture = tmp_path / "z.png"
    Image.new("RGB", (8, 8)).save(picture)
    media = Media([folder, picture])
    kinds = [item.name if isinstance(item, Path) else item.size for item in media]
    assert kinds == [(64, 48)] * 2 + [(417, 209), (417, 313), "img9.JPG", "img10.png", "z.png"]
    assert media.count == 7 == len(list(media))  # a second time, too


def test_a_model_that_prunes_videos_gets_clips(tmp_path):
    film = write_video(tmp_path / "film.mp4", 40)
    picture = tmp_path / "z.png"
    Image.new("RGB", (8, 8)).save(picture)
    media = Media([film, picture], Every.parse("1f"))
    plain = cobra.build("tiny")
    assert len(list(media.for_model(plain))) == 41
    config = cobra.PRESETS["tiny"]
    pruning = cobra.build(type(config)(**{**vars(config), "video": EVSConfig(pruning_rate=0.5)}))
    first, second, last = media.for_model(pruning)
    assert isinstance(first, Video) and [len(clip.frames) for clip in (first, second)] == [CLIP_FRAMES, 8]
    assert last == picture
    state = pruning.prefill(images=media.for_model(pruning))
    assert int(state.lengths) < 0.7 * int(plain.prefill(images=media).lengths)


@pytest.mark.parametrize("text", ["", "1", "s", "-1s", "0s", "1.5f", "1 minute", "1e3s"])
def test_every_is_refused_in_one_line(text):
    with pytest.raises(UserError, match="give seconds"):
        Every.parse(text)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.mp4", None, "no such file"),
        ("none.pdf", None, "no such file"),
        ("text.mp4", b"no video at all", "not a video"),
        ("empty.mkv", b"", "not a video"),
        ("text.pdf", b"no pdf at all", "not a PDF"),
        ("empty.pdf", b"", "not a PDF"),
        ("text.png", b"no image", "not an image"),
    ],
)
def test_what_cannot_be_opened_is_named_before_anything_is_read(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        Media([path])
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


def test_sound_without_pictures_is_refused(tmp_path):
    path = tmp_path / "sound.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(UserError, match="no pictures"):
        Media([path])


def test_a_missing_package_says_what_to_install(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "pypdfium2", None)
    for name in ("film.mp4", "paper.pdf"):
        with pytest.raises(UserError, match=r"pip install 'cobra-vlm\[media\]'"):
            Media([tmp_path / name])
