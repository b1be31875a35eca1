"""Every form of data: lists, lines, messages, videos, shards, mixtures; read by index, as from memory."""

import base64
import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from train.data import sources
from train.data.dataset import Dataset, choose_rows, open_dataset
from train.data.images import ImageFinder, spread
from train.data.sources import JsonSource
from train.settings import DataSettings
from vision_scan.errors import UserError

PAIR = [{"from": "human", "value": "<image>\nwhat?"}, {"from": "gpt", "value": "this ü 语"}]


def png(level: int) -> bytes:
    """A small image that is told by its grey."""
    file = io.BytesIO()
    Image.new("L", (6, 4), level).save(file, "PNG")
    return file.getvalue()


def greys(dataset: Dataset) -> list[list[int]]:
    """The grey of every image of every row."""
    return [[np.asarray(image.open())[0, 0, 0] for image in row.images] for row in dataset]


def load(path: Path, **settings: Any) -> Dataset:
    return open_dataset(DataSettings(path=str(path), **settings))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for level in range(8):
        (tmp_path / f"{level}.png").write_bytes(png(level))
    return tmp_path


def rows_of(count: int) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "image": f"{i % 8}.png", "conversations": PAIR} for i in range(count)]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1 << 20])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_of_a_list_are_found_however_the_file_is_cut(
    folder: Path, chunk: int, indent: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sources, "CHUNK", chunk)
    rows = [*rows_of(5), {"id": "ünï", "a": [1, {"b": "]},"}], "conversations": []}]
    path = folder / "data.json"
    path.write_text("\n  " + json.dumps(rows, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
    source = JsonSource(path, ImageFinder(folder, 8))
    assert [raw for raw, _, _ in source.scan()] == rows
    assert [source.read(index)[0] for index in (5, 0, 3)] == [rows[5], rows[0], rows[3]]


def test_messages_may_hold_paths_data_urls_parts_and_a_system_text(folder: Path) -> None:
    url = "data:image/png;base64," + base64.b64encode(png(200)).decode()
    rows = [
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": url}},
                        {"type": "text", "text": "and "},
                        {"type": "image", "image": "3.png"},
                        {"type": "image"},
                        {"type": "text", "text": ": which?"},
                    ],
                },
                {"role": "assistant", "content": "the first"},
            ],
            "images": ["5.png"],
        },
        {
            "messages": [{"role": "user", "content": "<image> hi"}, {"role": "assistant", "content": "ho"}],
            "images": ["6.png"],
        },
    ]
    (folder / "data.json").write_text(json.dumps(rows))
    found = load(folder / "data.json")
    assert greys(found) == [[200, 3, 5], [6]]
    assert found[0].turns[0].text == "Be brief.\n\n<image>and <image><image>: which?"
    assert [turn.role for turn in found[0].turns] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("message", "told"),
    [
        ({"role": "tool", "content": "x"}, "role 'tool', allowed: system, user, assistant"),
        ({"role": "user", "content": 7}, "'content' must be text or a list of parts"),
        ({"role": "user", "content": [{"type": "audio"}]}, "a part of type 'audio'"),
        ({"role": "user", "content": [{"type": "image"}]}, "more parts of type 'image'"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "https://x/a.png"}}]}, "download"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": "data:image/png;base64,é"}]}, "base64"),
    ],
)
def test_bad_message_is_named(folder: Path, message: dict[str, Any], told: str) -> None:
    rows = [{"id": "m", "messages": [message, {"role": "assistant", "content": "a"}]}]
    (folder / "data.json").write_text(json.dumps(rows))
    with pytest.raises(UserError, match="row 'm': ") as caught:
        load(folder / "data.json")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_video_is_a_folder_or_a_list_of_frames_evenly_taken(folder: Path) -> None:
    (folder / "clip").mkdir()
    for level in range(10):
        (folder / "clip" / f"{level:03d}.png").write_bytes(png(10 * level))
    turns = [{"from": "human", "value": "<video>\nwhat?"}, PAIR[1]]
    rows = [
        {"video": "clip", "conversations": turns},
        {"video": ["clip/001.png", "clip/002.png"], "conversations": turns},
    ]
    path = folder / "data.json"
    path.write_text(json.dumps(rows))
    found = load(path, frames=3)
    assert greys(found) == [[10, 50, 80], [10, 20]]
    assert found[0].turns[0].text == "<image><image><image>\nwhat?"
    for video, told in (("0.png", "is a file"), ("none", "No such file"), (".", "frames"), (7, "folder of frames")):
        (folder / "empty").mkdir(exist_ok=True)
        path.write_text(json.dumps([{"video": "empty" if video == "." else video, "conversations": turns}]))
        with pytest.raises(UserError, match=told):
            load(path)
    assert spread("abcdefgh", 4) == ["b", "d", "f", "h"]


def write_shards(folder: Path, per_shard: int = 3, count: int = 7) -> None:
    """WebDataset shards: rows with one image, two images named by the row, a caption, text alone."""
    folder.mkdir()
    for start in range(0, count, per_shard):
        with tarfile.open(folder / f"s-{start:04d}.tar", "w") as tar:
            for index in range(start, min(count, start + per_shard)):
                text = {"conversations": [{"from": "human", "value": "q"}, PAIR[1]]}
                files: dict[str, bytes] = {
                    0: {"json": json.dumps({"conversations": PAIR}).encode(), "png": png(index)},
                    1: {"a.png": png(100), "b.png": png(index), "json": json.dumps(
                        {"image": ["b.png"], "conversations": PAIR}).encode()},
                    2: {"jpg": png(index), "txt": b"a caption\n"},
                    3: {"json": json.dumps(text).encode()},
                }[index % 4]  # fmt: skip
                for suffix, data in files.items():
                    member = tarfile.TarInfo(f"deep/x{index}.{suffix}")
                    member.size = len(data)
                    tar.addfile(member, io.BytesIO(data))


@pytest.mark.parametrize("name", ["shards", "shards/s-*.tar"])
@pytest.mark.parametrize("check", ["none", "headers", "full"])
def test_shards_of_all_forms(folder: Path, name: str, check: str) -> None:
    write_shards(folder / "shards")
    found = load(folder / name, check=check)
    assert greys(found) == [[0], [1], [2], [], [4], [5], [6]]
    assert found[2].turns[1].text == "a caption"
    assert found[6].id == "'deep/x6'"
    assert len(load(folder / "shards" / "s-0000.tar")) == 3


def test_other_programs_shards_are_read_and_ours_by_them(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    webdataset = pytest.importorskip("webdataset")
    from train.data.commands import main

    with webdataset.TarWriter(str(folder / "theirs.tar")) as writer:
        for index in range(4):
            writer.write({"__key__": f"k{index}", "json": {"conversations": PAIR}, "png": png(index)})
    assert greys(load(folder / "theirs.tar")) == [[0], [1], [2], [3]]
    (folder / "data.json").write_text(json.dumps(rows_of(5)))
    assert main(["shard", str(folder / "data.json"), "--output", str(folder / "out"), "--max-mb", "0.004"])
    shards = sorted(map(str, (folder / "out").glob("*.tar")))
    assert len(shards) > 1
    samples = [sample for shard in shards for sample in webdataset.WebDataset(shard, shardshuffle=False)]
    assert [json.loads(sample["json"])["id"] for sample in samples] == [f"r{i}" for i in range(5)]
    assert [sample["0.png"] for sample in samples] == [png(i) for i in range(5)]
    ours, given = load(folder / "out"), load(folder / "data.json")
    assert [row.turns for row in ours] == [row.turns for row in given]
    assert greys(ours) == greys(given)


def preference_rows() -> list[dict[str, Any]]:
    """The same pair of answers in every form: LLaMA-Factory's, OpenAI's, and TRL's with a text and with messages."""
    ask = [{"type": "image"}, {"type": "text", "text": "\nwhat?"}]
    said = [[{"role": "assistant", "content": [{"type": "text", "text": text}]}] for text in ("this", "that")]
    question = "<image>\nwhat?"
    turns = [{"from": "human", "value": question}]
    texts = {"chosen": "this", "rejected": "that"}
    answers = {name: {"from": "gpt", "value": text} for name, text in texts.items()}
    return [
        {"image": "0.png", "conversations": turns, **answers},
        {"images": ["1.png"], "messages": [{"role": "user", "content": question}], **texts},
        {"image": "2.png", "prompt": "what?", **texts},
        {"images": ["3.png"], "prompt": [{"role": "user", "content": ask}], "chosen": said[0], "rejected": said[1]},
    ]


def test_shards_of_messages_have_the_same_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train.data.commands import main

    parts = [{"type": "image", "image": "3.png"}, {"type": "text", "text": " and <image>"}, {"type": "image"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "this"}]
    rows = [{"messages": messages, "image": ["4.png", "5.png"]}]
    (folder / "data.json").write_text(json.dumps(rows))
    assert main(["shard", str(folder / "data.json"), "--output", str(folder / "out")])
    given, ours = load(folder / "data.json"), load(folder / "out")
    assert greys(given) == greys(ours) == [[3, 4, 5]]
    assert given[0].turns == ours[0].turns


def test_preference_data_of_all_forms_and_its_shards(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from train.data.commands import main

    (folder / "data.json").write_text(json.dumps(preference_rows()))
    assert main(["shard", str(folder / "data.json"), "--output", str(folder / "out")])
    for path in (folder / "data.json", folder / "out"):
        found = open_dataset(DataSettings(path=str(path)), "chosen")
        assert greys(found) == [[0], [1], [2], [3]]
        assert {(row.turns[0].text, len(row.turns), row.answers) for row in found} == {
            ("<image>\nwhat?", 1, ("this", "that"))
        }


def test_damaged_shards_and_images_in_them_are_named(folder: Path) -> None:
    write_shards(folder / "shards")
    shard = folder / "shards" / "s-0000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole.replace(png(0), b"x" * len(png(0))))
    with pytest.raises(UserError, match=r"row 'deep/x0': .*s-0000.tar:deep/x0.png: not an image"):
        load(folder / "shards")
    shard.write_bytes(whole[:100])
    with pytest.raises(UserError, match=r"s-0000.tar: damaged or not a tar file"):
        load(folder / "shards")
    with pytest.raises(UserError, match="no such shards"):
        load(folder / "none-*.tar")
    (folder / "shards" / "bad.tar").write_bytes(b"")
    with tarfile.open(folder / "lost.tar", "w") as tar:
        data = json.dumps({"image": "z.png", "conversations": PAIR}).encode()
        member = tarfile.TarInfo("a.json")
        member.size = len(data)
        tar.addfile(member, io.BytesIO(data))
    with pytest.raises(UserError, match=r"no image 'z.png' beside a.json; it has none"):
        load(folder / "lost.tar")


def test_mixture_has_shares_roots_and_samplings(folder: Path) -> None:
    (folder / "a.json").write_text(json.dumps(rows_of(4)))
    write_shards(folder / "shards")
    (folder / "b").mkdir()
    (folder / "b" / "pics").mkdir()
    (folder / "b" / "pics" / "0.png").write_bytes(png(77))
    (folder / "b" / "b.jsonl").write_text("\n".join(json.dumps({**row, "image": "0.png"}) for row in rows_of(6)))
    path = folder / "mix.yaml"
    path.write_text(
        "datasets:\n"
        "  - {path: a.json, weight: 2}\n"
        "  - {json_path: b/b.jsonl, image_root: b/pics, sampling_strategy: 'first:50%', weight: 0.34}\n"
        "  - {path: shards, sampling_strategy: 'end:2'}\n"
    )
    found = load(path)
    assert [(share.start, share.count, share.per_epoch) for share in found.shares] == [(0, 4, 8), (4, 3, 1), (7, 2, 2)]
    assert greys(found) == [[0], [1], [2], [3], [77], [77], [77], [5], [6]]
    assert found.epoch_size == 11
    assert load(path).fingerprint == found.fingerprint
    path.write_text(path.read_text().replace("weight: 2", "weight: 3"))
    assert load(path).fingerprint != found.fingerprint


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("datasets: []", "expected `datasets:`"),
        ("a: [", "is not YAML"),
        ("datasets: [{weight: 1}]", "must have a path"),
        ("datasets: [{path: a.json, wieght: 1}]", "unknown key 'wieght'"),
        ("datasets: [{path: a.json, weight: 0}]", "weight 0"),
        ("datasets: [{path: a.json, sampling_strategy: 'some:3'}]", "'some:3', allowed: all, first:N"),
    ],
)
def test_bad_mixture_is_one_line(folder: Path, text: str, told: str) -> None:
    (folder / "a.json").write_text(json.dumps(rows_of(2)))
    (folder / "mix.yaml").write_text(text)
    with pytest.raises(UserError) as caught:
        load(folder / "mix.yaml")
    assert told in str(caught.value) and "\n" not in str(caught.value)


def test_random_sampling_is_the_same_every_time() -> None:
    one, other = (choose_rows("random:30%", 20, "x").tolist() for _ in range(2))
    assert one == other == sorted(set(one)) and len(one) == 6
    assert choose_rows("end:3", 5, "x").tolist() == [2, 3, 4]


def test_processes_look_at_their_share_of_the_images_and_hear_of_all(folder: Path) -> None:
    rows = rows_of(6)
    rows[2]["image"] = rows[5]["image"] = "none.png"
    (folder / "data.json").write_text(json.dumps(rows))
    settings = DataSettings(path=str(folder / "data.json"), skip_bad=True)
    told: list[Any] = []
    for rank in range(2):
        open_dataset(settings, "conversations", rank, 2, lambda item: [told.append(item) or item])
    assert [sorted(bad) for (bad,) in told] == [[2], [5]]
    both = [open_dataset(settings, "conversations", rank, 2, lambda item: told) for rank in range(2)]
    assert [dataset.index.tolist() for dataset in both] == [[0, 1, 3, 4]] * 2
    assert both[0].fingerprint == both[1].fingerprint
