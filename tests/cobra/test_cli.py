import io
import os
import re
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

import cobra
from cobra import doctor
from cobra.cli import main
from cobra.typed_config import override


@pytest.fixture(scope="module")
def model():
    config = cobra.PRESETS["tiny"]
    config = replace(config, lm=replace(config.lm, layers=config.lm.layers[:1]))
    return cobra.build(config, seed=2)


@pytest.fixture(scope="module")
def directory(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "model"
    cobra.save(model, path)
    return str(path)


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "red.png"
    Image.new("RGB", (20, 20), (255, 0, 0)).save(path)
    return str(path)


def run(capsys, *arguments, typed=None, monkeypatch=None):
    """(status, standard output, standard error) of a command."""
    if typed is not None:
        monkeypatch.setattr(sys, "stdin", io.StringIO(typed))
    try:
        status = main(arguments)
    except SystemExit as leaving:  # argparse's own, after --help
        status = leaving.code
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def fails(capsys, *arguments):
    """The one line of a command that fails."""
    status, out, error = run(capsys, *arguments)
    assert (status, out) == (2, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


OPTIONS = ("--max-new-tokens", "6", "--dtype", "float32")


@pytest.mark.parametrize("first", ["image", "question"])
def test_answer_prints_the_answer_alone(capsys, model, directory, picture, first):
    images, question = ["--image", picture, picture], ["What is it?"]
    arguments = images + question if first == "image" else question + images
    status, out, error = run(capsys, "answer", "--model", directory, *OPTIONS, *arguments)
    assert (status, error) == (0, "")
    assert out == model.answer("What is it?", [picture, picture], max_new_tokens=6) + "\n"


def test_answer_without_an_image_and_with_sampling(capsys, model, directory):
    sampling = ("--temperature", "2", "--top-k", "50", "--top-p", "0.9", "--seed", "4")
    _, out, _ = run(capsys, "answer", "--model", directory, *OPTIONS, *sampling, "What?")
    options = {"do_sample": True, "temperature": 2, "top_k": 50, "top_p": 0.9, "seed": 4}
    assert out == model.answer("What?", max_new_tokens=6, **options) + "\n"


def test_output_that_nobody_reads_is_no_mistake():
    reader, writer = os.pipe()
    os.close(reader)
    told = subprocess.run([sys.executable, "-m", "cobra.cli", "info", "tiny"], stdout=writer, stderr=subprocess.PIPE)
    os.close(writer)
    assert (told.returncode, told.stderr) == (141, b"")


def test_answer_takes_a_question_that_ends_like_a_file(capsys, directory):
    for question in ("Is it on cat.png", "Why? " * 100):
        assert run(capsys, "answer", "--model", directory, *OPTIONS, question)[0] == 0


def test_answer_names_the_mistake(capsys, directory, picture, tmp_path):
    answer = ("answer", "--model", directory)
    assert "no question" in fails(capsys, *answer)
    assert "no question" in fails(capsys, *answer, "--image", picture)
    assert "no question" in fails(capsys, *answer, "--image", picture, "none.png")
    assert "--image has no path" in fails(capsys, *answer, "--image", "What?")  # as of a pattern that no file fits
    assert "no such file" in fails(capsys, *answer, "--image", str(tmp_path / "none.png"), "What?")
    assert "no such file" in fails(capsys, *answer, "--image", "paper.pdf", "What?")
    assert "every '1x'" in fails(capsys, *answer, "--image", picture, "--every", "1x", "What?")
    assert "none.state" in fails(capsys, *answer, "--state", "none.state", "What?")
    assert "--temperature" in fails(capsys, *answer, "--temperature", "hot", "What?")
    assert "temperature=-1" in fails(capsys, *answer, "--temperature", "-1", "What?")
    assert "1 <image> marks for 0" in fails(capsys, *answer, "Is <image> red?")
    assert "no such model" in fails(capsys, "answer", "--model", str(tmp_path / "x"), "What?")
    assert "--model" in fails(capsys, "answer", "What?")
    assert "invalid choice" in fails(capsys, "answr")


def test_read_keeps_what_answers_go_on_from(capsys, model, directory, picture, tmp_path):
    album, state = tmp_path / "album", str(tmp_path / "album.state")
    album.mkdir()
    for name in ("10.png", "9.png"):
        Image.new("RGB", (30, 20), "red" if name == "9.png" else "blue").save(album / name)
    base = ("--model", directory, "--dtype", "float32")
    status, out, error = run(capsys, "read", str(album), picture, *base, "-o", state)
    assert (status, error) == (0, "")
    images = [album / "9.png", album / "10.png", picture]
    kept = model.prefill(images=images)
    about = f"3 images, {int(kept.lengths):,} tokens, {kept.nbytes / 1e6:,.1f} MB"
    assert out.startswith(f"{state}: {about}; 3 images read")
    ask = ("answer", *base, "--max-new-tokens", "6", "--state", state)
    assert run(capsys, *ask, "What is it?")[1] == model.answer("What is it?", images, max_new_tokens=6) + "\n"
    # It is prolonged in place, and nowhere else overwritten; what is kept in 8 bits is smaller.
    assert "go on with it" in fails(capsys, "read", picture, *base, "-o", state)
    assert run(capsys, "read", picture, *base, "--text", "These?", "--state", state, "-o", state)[0] == 0
    longer = model.prefill("These?", picture, state=kept)
    assert run(capsys, *ask, "What?")[1] == model.answer("What?", state=longer, max_new_tokens=6) + "\n"
    small = str(tmp_path / "small.state")
    assert run(capsys, "read", picture, *base, "--int8", "-o", small)[0] == 0
    assert Path(small).stat().st_size < 0.5 * Path(state).stat().st_size
    assert run(capsys, *ask[:-1], small, "What?")[0] == 0


def test_read_names_the_mistake_and_leaves_nothing(capsys, directory, picture, tmp_path):
    output = tmp_path / "album.state"
    read = ("read", "--model", directory, "-o", str(output))
    (tmp_path / "bad.png").write_bytes(Path(picture).read_bytes()[:50])
    assert "bad.png: the image is damaged" in fails(capsys, *read, picture, str(tmp_path / "bad.png"))
    assert "no images, PDFs or videos" in fails(capsys, *read, str((tmp_path / "empty").mkdir() or tmp_path / "empty"))
    nowhere = ("read", picture, "--model", directory, "-o", str(tmp_path / "no" / "album.state"))
    assert "no directory" in fails(capsys, *nowhere)
    other = cobra.build("tiny", seed=5)
    other.prefill("Hello").save(tmp_path / "other.state")
    assert "another model" in fails(capsys, *read, picture, "--state", str(tmp_path / "other.state"))
    assert not output.exists() and not list(tmp_path.glob(".*"))


def test_serve_names_the_mistake_before_the_model_is_loaded(capsys, directory):
    pytest.importorskip("fastapi")
    assert "--port 65536: must be from 1 to 65535" in fails(capsys, "serve", "--model", directory, "--port", "65536")
    assert "--slots 0: must be above 0" in fails(capsys, "serve", "--model", directory, "--slots", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        assert f"cannot listen at 127.0.0.1 port {port}" in fails(capsys, "serve", "--model", "nowhere", "--port", port)


def test_chat_saves_what_was_read(capsys, monkeypatch, model, directory, picture, tmp_path):
    state = tmp_path / "talk.state"
    chat = ("chat", "--model", directory, *OPTIONS, "--image", picture)
    typed = f"What?\n/save {state}\n/save\n/reset\n/save x"
    status, out, error = run(capsys, *chat, typed=typed, monkeypatch=monkeypatch)
    first, kept = model.answer("What?", picture, max_new_tokens=6, return_state=True)
    assert status == 0 and out.splitlines()[0] == first and str(state) in out
    assert ["give a path" in line or "nothing has been read" in line for line in error.splitlines()] == [True, True]
    again = ("chat", "--model", directory, *OPTIONS, "--state", str(state))
    _, out, _ = run(capsys, *again, typed="And?", monkeypatch=monkeypatch)
    assert out == model.answer("And?", state=kept, max_new_tokens=6) + "\n"


def test_chat_is_a_conversation(capsys, monkeypatch, model, directory, picture):
    typed = f"Hi\n\n/image {picture}\nAnd now?\n/reset\nHi\n/quit\nnever read\n"
    status, out, error = run(
        capsys, "chat", "--model", directory, *OPTIONS, typed=typed, monkeypatch=monkeypatch
    )
    first, state = model.answer("Hi", max_new_tokens=6, return_state=True)
    state = model.prefill(images=picture, state=state)
    second = model.answer("And now?", state=state, max_new_tokens=6)
    assert (status, error) == (0, "")
    assert out == f"{first}\n{second}\n{first}\n"


def test_chat_reads_paths_with_spaces(capsys, monkeypatch, directory, picture, tmp_path):
    spaced = tmp_path / "my picture.png"
    spaced.write_bytes(Path(picture).read_bytes())
    typed = f"/image {spaced}\n/image"
    chat = ("chat", "--model", directory)
    status, out, error = run(capsys, *chat, typed=typed, monkeypatch=monkeypatch)
    assert (status, out) == (0, "")
    assert error == "error: /image: give a path\n"


def test_chat_starts_with_images_and_survives_mistakes(capsys, monkeypatch, model, directory, picture):
    status, out, error = run(
        capsys,
        *("chat", "--model", directory, *OPTIONS, "--image", picture),
        typed="/image none.png\n/what\nIs <image> red?\nWhat?",
        monkeypatch=monkeypatch,
    )
    assert status == 0
    assert out == model.answer("What?", picture, max_new_tokens=6) + "\n"
    lines = error.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["error"] * 3
    assert "none.png" in lines[0] and "/what" in lines[1] and "marks" in lines[2]


def test_interrupt_has_its_own_status(capsys, monkeypatch):
    def interrupt():
        raise KeyboardInterrupt

    monkeypatch.setattr(doctor, "report", interrupt)
    assert run(capsys, "doctor") == (130, "", "interrupted\n")


@pytest.mark.parametrize("name", ["tiny", "transformer-tiny"])
def test_info_counts_parameters(capsys, name):
    status, out, _ = run(capsys, "info", name)
    model = cobra.build(name)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert status == 0
    assert f"{total:,}" in out
    assert "attention" in out if name == "transformer-tiny" else "4 mamba2" in out


def test_info_compares_twins(capsys, directory):
    names = ["tiny", "transformer-tiny", "window-tiny", "hybrid-tiny", directory]
    status, out, _ = run(capsys, "info", *names)
    table = [line.split() for line in out.splitlines()]
    assert status == 0 and [line[0] for line in table if line and line[0] in names] == names * 3
    counts = {line[0]: line[1] for line in table[1:6]}
    for name in names[:-1]:
        assert counts[name] == f"{sum(p.numel() for p in cobra.build(name).lm.parameters()):,}"
    assert "3 attention (window 48), 3 mlp" in out and "3 mamba2, 1 attention, 1 mlp" in out
    (wide,) = (index for index, line in enumerate(table) if line[:3] == ["state", "bytes,", "float32"])
    tiny, full, window, hybrid, _ = table[wide + 1 :]
    assert int(window[3].replace(",", "")) == cobra.build("window-tiny").lm.allocate_state(1).nbytes
    assert window[1:] == [window[1]] * 3 and tiny[1:] == [tiny[1]] * 3
    assert full[1] != full[2] and hybrid[1] != hybrid[2]
    assert "did you mean 'tiny'" in fails(capsys, "info", "tiny", "tinny")


def test_info_reads_directories_and_names_mistakes(capsys, directory, tmp_path):
    assert "1 mamba2" in run(capsys, "info", directory)[1]
    assert "did you mean 'tiny'" in fails(capsys, "info", "tinny")
    assert "config.json is missing" in fails(capsys, "info", str(tmp_path))


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (("image.tiles", '{"kind": "anyres"}'), "tiles    of that size, at most 5 and "),
        (("image.tiles", '{"kind": "native", "max_cells": 99}'), "in the shape of an image, at most 1 and 99 tokens"),
        (("image.tiles", '{"kind": "uhd"}'), "in the shape of an image, at most 8 and 519 tokens"),
        (("video", '{"kind": "evs"}'), "video    evs, of all tokens of its frames 75% are dropped"),
    ],
)
def test_info_tells_of_tiles_and_videos(capsys, tmp_path, change, told):
    cobra.save(cobra.build(override(cobra.PRESETS["tiny"], *change)), tmp_path / "model")
    assert told in run(capsys, "info", str(tmp_path / "model"))[1]


def test_scan_list_names_every_order(capsys):
    import vision_scan

    _, out, _ = run(capsys, "scan", "list")
    assert [line.split()[0] for line in out.splitlines()] == list(vision_scan.SCAN_ORDERS)


def test_scan_show_prints_positions(capsys):
    _, out, _ = run(capsys, "scan", "show", "snake_row_tl", "--grid", "4x3")
    assert out.splitlines()[1:] == [" 0  1  2", " 5  4  3", " 6  7  8", "11 10  9"]


def test_scan_show_draws(capsys, tmp_path):
    path = tmp_path / "hilbert.png"
    assert run(capsys, "scan", "show", "hilbert", "--grid", "3x5", "--png", str(path))[0] == 0
    assert Image.open(path).format == "PNG"


def test_scan_compare_prints_measures_and_draws(capsys, tmp_path):
    import vision_scan

    _, out, _ = run(capsys, "scan", "compare", "--grid", "4x5")
    names = [line.split("  ")[0].strip() for line in out.splitlines()]
    assert names == ["order", *vision_scan.SCAN_ORDERS]
    _, out, _ = run(capsys, "scan", "compare", "raster", "local(window=2)", "--grid", "2x3")
    raster = vision_scan.order("raster", 2, 3)
    assert out.splitlines()[1].split() == [
        "raster", "1", f"{raster.mean_step:.2f}", "3", f"{raster.mean_gap:.2f}", f"{raster.distortion:.1f}", "5.00",
    ]  # fmt: skip
    path = tmp_path / "orders.png"
    assert run(capsys, "scan", "compare", "raster", "cross4", "--grid", "3x5", "--png", str(path))[0] == 0
    assert Image.open(path).format == "PNG"
    assert "did you mean 'hilbert'" in fails(capsys, "scan", "compare", "raster", "hilbrt")


def test_scan_receptive_prints_shares_and_draws(capsys, tmp_path):
    options = ["--grid", "3x5", "--samples", "2"]
    _, out, _ = run(capsys, "scan", "receptive", "raster", "cross4", "es2d", *options, "--cell", "0,4")
    rows = [line.split() for line in out.splitlines()]
    assert [row[0] for row in rows] == ["order", "raster", "cross4", "es2d"]
    assert [row[1] for row in rows[1:]] == ["33%", "100%", "20%"]  # a row of three, all, three of fifteen
    assert run(capsys, "scan", "receptive", "raster", "cross4", "es2d", *options, "--cell", "0,4")[1] == out
    _, turns, _ = run(capsys, "scan", "receptive", "nd_cycle", *options, "--cell", "0,0", "--layers", "2")
    assert turns.split()[4] == "100%"
    path = tmp_path / "fields.png"
    assert run(capsys, "scan", "receptive", "raster", "column", *options, "--png", str(path))[1] == f"{path}\n"
    assert Image.open(path).format == "PNG"
    for arguments, told in (
        (["hilbrt"], "did you mean 'hilbert'"),
        (["noncausal"], "no sequence"),
        (["raster", "--cell", "3,0"], "from 0,0 to 2,4"),
        (["raster", "--cell", "1x1"], "--cell 1x1"),
        (["raster", "--layers", "0"], "--layers 0"),
        (["raster", "--samples", "0"], "samples"),
    ):
        assert told in fails(capsys, "scan", "receptive", *options, *arguments)


def test_scan_show_names_the_mistake(capsys):
    assert "did you mean 'hilbert'" in fails(capsys, "scan", "show", "hilbrt")
    for grid in ("3", "0x4", "axb", "3x4x5"):
        assert grid in fails(capsys, "scan", "show", "raster", "--grid", grid)


@pytest.mark.parametrize(
    "command",
    [
        *([], ["answer"], ["chat"], ["convert"], ["info"], ["doctor"]),
        *(["scan"], ["scan", "list"], ["scan", "show"], ["scan", "compare"]),
    ],
)
def test_help_fits_a_screen_and_has_an_example(capsys, command):
    status, out, _ = run(capsys, *command, "--help")
    assert status == 0
    assert "example: cobra" in out
    assert len(out.splitlines()) <= 30


def test_doctor_reports_versions_operators_and_extras(capsys, monkeypatch):
    requirements = [
        "torch>=2.11",
        'pillow>=10; extra == "vision"',
        'no-such-package; extra == "vision"',
        'cobra-vlm[vision]; extra == "all"',
    ]
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: requirements)
    status, out, _ = run(capsys, "doctor")
    assert status == 0
    for word in ("torch", "tokenizers", "ssd", "selective_scan", "bfloat16"):
        assert word in out
    assert re.search(
        r"vision +pillow [\d.]+, missing: no-such-package \(pip install 'cobra-vlm\[vision\]'\)", out
    )
    assert "\nall " not in out


def test_doctor_says_when_the_project_is_not_installed(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "DISTRIBUTION", "cobra-vlm-of-nowhere")
    out = run(capsys, "doctor")[1]
    assert "not installed, run from" in out
    assert "optional packages: unknown" in out


def test_doctor_finds_other_cobras(tmp_path, monkeypatch):
    (tmp_path / "cobra").mkdir()
    (tmp_path / "cobra" / "__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert any(str(tmp_path) in other for other in doctor.shadows())


def python(code):
    """A run of Python in the checkout."""
    root = Path(cobra.__file__).parents[1]
    command = [sys.executable, "-c", code]
    return subprocess.run(command, check=False, capture_output=True, text=True, cwd=root)


def test_import_needs_only_the_core_and_prints_nothing():
    code = """
import sys
for name in ("tokenizers", "timm", "transformers", "deepspeed", "wandb", "matplotlib", "sklearn"):
    sys.modules[name] = None
import cobra, vision_scan, cobra.cli
"""
    done = python(code)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_program_exits_with_the_status():
    code = "import sys; from cobra.cli import main; sys.exit(main(['info', 'tinny']))"
    done = python(code)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown preset")
