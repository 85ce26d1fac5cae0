import io
import json
import os
import pickle
import re
import signal
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny import files, noise, picture, pictures, refusal, succeed, tiny_model

import a2k
from a2k import StyleTransfer
from a2k.checkpoint import save_model
from a2k.cli import main, memory_size

TITLE = "a2k: error: "


def png_of_size(width: int, height: int) -> bytes:
    """A PNG that says how large it is and holds next to nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    data = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + data


@pytest.fixture
def stylize(tiny_file, tmp_path):
    """(content, style, output, options) as a command line."""

    def command(content, style, output, *options):
        contents, styles = (x if isinstance(x, list) else [x] for x in (content, style))
        weights = () if "--weights" in options else ("--weights", tiny_file)
        return ["stylize", "--content", *contents, "--style", *styles, "-o", output, *weights, *options]

    return command


def in_process(*arguments: object, stdin: bytes = b"") -> subprocess.CompletedProcess:
    """Run `python -m a2k`."""
    command = [sys.executable, "-m", "a2k", *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(Path(a2k.__file__).parents[1]), "PYTHONWARNINGS": "default"}
    return subprocess.run(command, input=stdin, capture_output=True, env=environment, check=False)


# --- what comes out


def test_one_picture(capsys, tmp_path, stylize, photo, painting):
    out = tmp_path / "new" / "out.jpg"
    line = succeed(capsys, *stylize(photo, painting, out))
    assert re.fullmatch(re.escape(str(out)) + r"  40x34  \d+\.\d\d s\n", line)
    assert Image.open(out).size == (40, 34)
    assert files(tmp_path / "new") == ["out.jpg"]


def test_a_folder(capsys, tmp_path, stylize, photo, painting):
    succeed(capsys, *stylize(photo, painting, tmp_path / "out"))
    assert files(tmp_path / "out") == ["photo_stylized_painting.png"]


def test_all_pairs(capsys, tmp_path, stylize, painting):
    photos = [picture(tmp_path / name) for name in ("a.jpg", "b.JPEG", "c.gif", "d.webp")]
    lines = succeed(capsys, *stylize(photos, [painting, tmp_path / "a.jpg"], tmp_path / "out")).splitlines()
    names = [f"{name}_stylized_{style}" for style in ("painting", "a") for name in "abcd"]
    suffixes = {"a": ".jpg", "b": ".jpeg", "c": ".png", "d": ".webp"}
    expected = [name + suffixes[name[0]] for name in names]
    assert files(tmp_path / "out") == sorted(expected)
    assert [line.split("  ")[0] for line in lines] == [str(tmp_path / "out" / name) for name in expected]
    assert Image.open(tmp_path / "out" / expected[0]).format == "JPEG"


def test_a_phones_photo_becomes_a_jpeg(capsys, tmp_path, stylize, painting):
    photo = Path(__file__).parents[1] / "data" / "turned.heic"
    succeed(capsys, *stylize(photo, painting, tmp_path / "out"))
    assert Image.open(tmp_path / "out" / "turned_stylized_painting.jpg").size == (64, 96)


def test_repeated_options_add_up(capsys, tmp_path, stylize, photo, painting):
    more = ("--content", painting, "--style", photo)
    assert len(succeed(capsys, *stylize(photo, painting, tmp_path / "out", *more)).splitlines()) == 4


def test_a_painting_is_encoded_once(capsys, tmp_path, stylize, painting, monkeypatch):
    encoded, encode_style = [], StyleTransfer.encode_style

    def count(self, *arguments, **options):
        encoded.append(arguments)
        return encode_style(self, *arguments, **options)

    monkeypatch.setattr(StyleTransfer, "encode_style", count)
    photos = [picture(tmp_path / f"{name}.png", seed=seed) for seed, name in enumerate("abc")]
    succeed(capsys, *stylize(photos, [painting, photos[0]], tmp_path / "out"))
    assert len(encoded) == 2


@pytest.mark.parametrize(
    "memory, size",
    (("0", 0), ("1000", 1000), ("2k", 2048), ("1.5G", 3 << 29), ("6GB", 6 << 30), ("9" * 400, int("9" * 400))),
)
def test_max_memory(capsys, tmp_path, stylize, photo, painting, memory, size):
    assert memory_size(memory) == size
    outputs = []
    for number, options in enumerate(((), ("--max-memory", memory))):
        succeed(capsys, *stylize(photo, painting, tmp_path / f"{number}.png"), *options)
        outputs.append((tmp_path / f"{number}.png").read_bytes())
    assert outputs[0] == outputs[1]


@pytest.mark.parametrize("memory", ("-1", "much", "6 apples", ""))
def test_max_memory_that_is_none(capsys, tmp_path, stylize, photo, painting, memory):
    with pytest.raises(SystemExit):
        main([*map(str, stylize(photo, painting, tmp_path / "out.png")), f"--max-memory={memory}"])
    assert f"{memory!r} is no amount of memory; give bytes, or a number like 500M or 6G" in capsys.readouterr().err


def test_folders_as_input(capsys, tmp_path, stylize):
    pictures(tmp_path / "photos", 2)
    pictures(tmp_path / "paintings", 2)
    (tmp_path / "photos" / "notes.txt").write_text("not a picture")
    succeed(capsys, *stylize(tmp_path / "photos", tmp_path / "paintings", tmp_path / "out"))
    assert files(tmp_path / "out") == [f"{i}_stylized_{j}.png" for i in "01" for j in "01"]


def test_an_input_given_twice_is_redrawn_once(capsys, tmp_path, stylize, photo, painting):
    succeed(capsys, *stylize([photo, photo], [painting, painting.parent / ".." / "in" / "painting.png"], tmp_path))
    assert [name for name in files(tmp_path) if "stylized" in name] == ["photo_stylized_painting.png"]


def test_json(capsys, tmp_path, stylize, photo, painting):
    lines = succeed(capsys, *stylize([photo, painting], painting, tmp_path / "out", "--json")).splitlines()
    reports = [json.loads(line) for line in lines]
    assert [set(report) for report in reports] == [{"content", "style", "output", "width", "height", "seconds"}] * 2
    assert [report["content"] for report in reports] == [str(photo), str(painting)]
    assert [(report["width"], report["height"]) for report in reports] == [(40, 34), (37, 50)]
    for report in reports:
        assert report["seconds"] > 0
        assert Image.open(report["output"]).size == (report["width"], report["height"])


def test_is_the_python_call(capsys, tmp_path, stylize, photo, painting, tiny_file):
    options = ("--size", "30", "--style-size", "33", "--strength", "0.7", "--preserve-color", "--dtype", "bfloat16")
    succeed(capsys, *stylize(photo, painting, tmp_path / "out.png", *options))
    transfer = a2k.StyleTransfer(tiny_file, dtype="bfloat16")
    expected = transfer.stylize(photo, painting, size=30, style_size=33, strength=0.7, preserve_color=True)
    assert Image.open(tmp_path / "out.png").tobytes() == expected.tobytes()


@pytest.mark.parametrize(("suffix", "mode"), [(".png", "RGBA"), (".webp", "RGBA"), (".jpg", "RGB")])
def test_alpha(capsys, tmp_path, stylize, painting, suffix, mode):
    photo = picture(tmp_path / "photo.png", channels=4)
    out = tmp_path / f"out{suffix}"
    succeed(capsys, *stylize(photo, painting, out))
    assert Image.open(out).mode == mode
    if mode == "RGBA":
        np.testing.assert_array_equal(np.asarray(Image.open(out))[..., 3], noise(channels=4)[..., 3])


def test_orientation(capsys, tmp_path, stylize, painting):
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = picture(tmp_path / "photo.jpg", 48, 33, exif=exif)
    succeed(capsys, *stylize(photo, painting, tmp_path / "out.jpg"))
    out = Image.open(tmp_path / "out.jpg")
    assert out.size == (33, 48)
    assert out.getexif().get(0x0112, 1) == 1


def test_quality(capsys, tmp_path, stylize, photo, painting):
    sizes = []
    for quality in (5, 100):
        succeed(capsys, *stylize(photo, painting, tmp_path / "out.jpg", "--quality", quality))
        sizes.append((tmp_path / "out.jpg").stat().st_size)
    assert sizes[0] < sizes[1] / 2


def test_an_earlier_output_is_replaced(capsys, tmp_path, stylize, photo, painting):
    (tmp_path / "out.png").write_text("earlier")
    succeed(capsys, *stylize(photo, painting, tmp_path / "out.png"))
    assert Image.open(tmp_path / "out.png").size == (40, 34)


# --- pictures that cannot be read


@pytest.mark.parametrize("size", ((1, 1), (1, 50), (50, 1), (5, 3)))
def test_small_pictures_work(capsys, tmp_path, stylize, photo, size):
    small = picture(tmp_path / "small.png", *size)
    succeed(capsys, *stylize(small, photo, tmp_path / "content.png"))
    succeed(capsys, *stylize(photo, small, tmp_path / "style.png"))
    assert Image.open(tmp_path / "content.png").size == size
    assert Image.open(tmp_path / "style.png").size == (40, 34)


def bad_pictures(folder: Path) -> dict[str, Path]:
    whole = picture(folder / "whole.jpg", 200, 200).read_bytes()
    contents = {
        "empty.jpg": b"",
        "truncated.jpg": whole[: len(whole) // 2],
        "text.jpg": b"this is no picture\n",
        "huge.png": png_of_size(20000, 20000),
    }
    for name, data in contents.items():
        (folder / name).write_bytes(data)
    return {name: folder / name for name in (*contents, "missing.jpg")}


BAD_PICTURES = {
    "empty.jpg": "it is empty",
    "truncated.jpg": "truncated",
    "text.jpg": "not a picture of a known format",
    "huge.png": "20000x20000, 400000000 pixels, over the limit of 100000000; shrink it or raise the limit (max_",
    "missing.jpg": "does not exist",
}


@pytest.mark.parametrize("name", BAD_PICTURES)
def test_bad_pictures(capsys, tmp_path, stylize, photo, name):
    bad = bad_pictures(tmp_path / "bad")[name]
    for arguments in ((bad, photo), (photo, bad)):
        message = refusal(capsys, *stylize(*arguments, tmp_path / "out" / "out.png"))
        assert str(bad) in message
        assert BAD_PICTURES[name] in message
    assert not (tmp_path / "out").exists()


def test_max_pixels(capsys, tmp_path, stylize, photo, painting):
    message = refusal(capsys, *stylize(photo, painting, tmp_path / "out.png", "--max-pixels", 1500))
    assert "painting.png is 37x50, 1850 pixels, over the limit of 1500" in message
    assert "--max-pixels" in message
    succeed(capsys, *stylize(photo, painting, tmp_path / "out.png", "--max-pixels", 1850))
    message = refusal(capsys, *stylize(photo, painting, tmp_path / "out.png", "--max-pixels", 1850, "--size", 50))
    assert "size=50 makes a picture of 2941 pixels, over the limit of 1850" in message


def test_max_pixels_lets_a_large_header_through(capsys, tmp_path, stylize, photo):
    (tmp_path / "large.png").write_bytes(png_of_size(20000, 20000))
    arguments = stylize(photo, tmp_path / "large.png", tmp_path / "out.png", "--max-pixels", 500_000_000)
    load = Image.Image.load
    try:
        Image.Image.load = lambda image: (_ for _ in ()).throw(OSError("read as far as the pixels"))
        assert "cannot read" in refusal(capsys, *arguments)
    finally:
        Image.Image.load = load


def test_one_broken_photo_among_good_ones(capsys, tmp_path, stylize, painting):
    folder = pictures(tmp_path / "photos", 3)
    (folder / "1.png").write_bytes(b"broken")
    code = main([str(x) for x in stylize(folder, painting, tmp_path / "out")])
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.count("\n") == 1
    assert f"{TITLE}cannot read {folder / '1.png'}" in captured.err
    assert captured.out.count("\n") == 2
    assert files(tmp_path / "out") == ["0_stylized_painting.png", "2_stylized_painting.png"]


def test_one_photo_that_grows_too_large_among_good_ones(capsys, tmp_path, stylize, painting):
    photos = [picture(tmp_path / "thin.png", 300, 1), picture(tmp_path / "good.png", 40, 34)]
    options = ("--size", 40, "--max-pixels", 4000)
    assert main([str(x) for x in stylize(photos, painting, tmp_path / "out", *options)]) == 2
    assert "size=40 makes a picture of 480000 pixels" in capsys.readouterr().err
    assert files(tmp_path / "out") == ["good_stylized_painting.png"]


def test_denormal_numbers_are_zero(stylize, photo, painting, tmp_path):
    torch.set_flush_denormal(False)
    small = torch.tensor([2e-38])
    assert small / 4 > 0
    assert main([str(x) for x in stylize(photo, painting, tmp_path / "out.png")]) == 0
    assert small / 4 == 0
    torch.set_flush_denormal(False)


def test_sides_that_the_format_cannot_hold(capsys, tmp_path, stylize, painting, monkeypatch):
    """Told before anything is computed; the other pictures are made."""
    photos = [picture(tmp_path / "long.webp", 200, 2), picture(tmp_path / "good.webp", 40, 34)]
    sizes, compute = [], StyleTransfer.stylize
    monkeypatch.setattr(StyleTransfer, "stylize", lambda *x, **y: sizes.append(x[1].rgb.size) or compute(*x, **y))
    assert main([str(x) for x in stylize(photos, painting, tmp_path / "out", "--size", 164)]) == 2
    assert "WEBP holds sides of up to 16383 pixels, and the picture is 16400x164" in capsys.readouterr().err
    assert files(tmp_path / "out") == ["good_stylized_painting.webp"]
    assert sizes == [(40, 34)]


def test_folder_without_pictures(capsys, tmp_path, stylize, photo):
    (tmp_path / "empty").mkdir()
    message = refusal(capsys, *stylize(tmp_path / "empty", photo, tmp_path / "out.png"))
    assert f"{tmp_path / 'empty'} has no pictures" in message


# --- weights


def bad_weights(folder: Path, tiny_file: Path) -> dict[str, Path]:
    folder.mkdir()
    whole = tiny_file.read_bytes()
    (folder / "empty").touch()
    (folder / "truncated").write_bytes(whole[:-5])
    (folder / "text").write_text("these are no weights, whatever their name is")
    torch.save(load_file(tiny_file), folder / "pickle")
    save_file(load_file(tiny_file), folder / "bare")
    model = tiny_model()
    metadata = {"config": json.dumps({**model.config.__dict__, "channels": (8, 8, 32, 32, 32)})}
    save_file(load_file(tiny_file), folder / "other", metadata)
    torch.nn.init.constant_(model.a2k4.q.weight, float("nan"))
    save_model(model, folder / "nan")
    return {path.name: path for path in folder.iterdir()} | {"missing": folder / "missing"}


BAD_WEIGHTS = {
    "empty": "is not a whole safetensors file",
    "truncated": "is not a whole safetensors file",
    "text": "is not a whole safetensors file",
    "pickle": "is not a whole safetensors file",
    "bare": "is not an A2K checkpoint",
    "other": "does not fit a StyA2K: it has another shape of",
    "nan": "holds NaN or infinity in 'a2k4.q.weight'",
    "missing": "are neither a file nor a bundled model",
}


@pytest.mark.parametrize("name", BAD_WEIGHTS)
def test_bad_weights(capsys, tmp_path, stylize, photo, painting, tiny_file, name):
    path = bad_weights(tmp_path / "weights", tiny_file)[name]
    message = refusal(capsys, *stylize(photo, painting, tmp_path / "out" / "out.png", "--weights", path))
    assert str(path) in message
    assert BAD_WEIGHTS[name] in message
    assert not (tmp_path / "out").exists()


def test_encoder_file_as_weights(capsys, tmp_path, stylize, photo, painting, vgg16_file):
    message = refusal(capsys, *stylize(photo, painting, tmp_path / "out.png", "--weights", vgg16_file))
    assert "is not an A2K checkpoint: its metadata has no config" in message


def test_nan_in_a_tensor(capsys, tmp_path, stylize, photo, painting):
    model = tiny_model()
    torch.nn.init.constant_(model.decoder.merge.bias, 3e38)  # finite, but what follows overflows
    save_model(model, tmp_path / "w.safetensors")
    arguments = stylize(photo, painting, tmp_path / "out.png", "--weights", tmp_path / "w.safetensors")
    assert "the result contains NaN; check the weights" in refusal(capsys, *arguments)
    assert not (tmp_path / "out.png").exists()


# --- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--size", 0), "size is 0; give a whole number of pixels"),
        (("--size", -5), "size is -5; give"),
        (("--style-size", 0), "style_size is 0; give"),
        (("--strength", 2), "strength is 2.0; it must be from 0 to 1"),
        (("--strength", "nan"), "strength is nan; it must"),
        (("--strength", -0.5), "strength is -0.5; it must"),
        (("--quality", 0), "quality is 0; give a whole number from 1 to 100"),
        (("--quality", 101), "quality is 101; give"),
        (("--device", "nonsense"), "device 'nonsense' cannot be used"),
        (("--device", "meta"), "device 'meta' cannot be used"),
        (("--max-pixels", 0), "over the limit of 0"),
    ],
    ids=str,
)
def test_options_out_of_range(capsys, tmp_path, stylize, photo, painting, options, message):
    assert message in refusal(capsys, *stylize(photo, painting, tmp_path / "out" / "out.png", *options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("out.jpgg", (), "format '.jpgg' is not known"),
        ("out.png", ("--quality", 0), "quality is 0; give"),
        ("out.png", ("--strength", 1.5), "strength is 1.5; it must"),
        ("out.png", ("--size", 0), "size is 0; give"),
        ("out.png", ("--style-size", 0), "style_size is 0; give"),
    ],
)
def test_mistakes_are_told_before_the_network_is_loaded(
    capsys, tmp_path, stylize, photo, painting, name, options, message
):
    command = stylize(photo, painting, tmp_path / name, "--weights", "no such weights", *options)
    assert message in refusal(capsys, *command)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_device_cuda_without_a_gpu(capsys, tmp_path, stylize, photo, painting):
    message = refusal(capsys, *stylize(photo, painting, tmp_path / "out.png", "--device", "cuda"))
    assert re.search(r"device 'cuda' cannot be used \(.+\); choose 'auto' or 'cpu'", message)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_backend_triton_without_a_gpu(capsys, tmp_path, stylize, photo, painting, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = refusal(capsys, *stylize(photo, painting, tmp_path / "out.png", "--backend", "triton"))
    assert "'triton'" in message
    assert not (tmp_path / "out.png").exists()


def test_backend_of_the_environment(capsys, tmp_path, stylize, photo, painting, monkeypatch):
    monkeypatch.setenv("A2K_BACKEND", "nonsense")
    assert "A2K_BACKEND" in refusal(capsys, *stylize(photo, painting, tmp_path / "out.png"))
    monkeypatch.setenv("A2K_BACKEND", "reference")
    succeed(capsys, *stylize(photo, painting, tmp_path / "out.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--dtype", "int8"), "argument --dtype: invalid choice: 'int8'"),
        (("--backend", "cudnn"), "argument --backend: invalid choice: 'cudnn'"),
        (("--size", "large"), "argument --size: invalid int value: 'large'"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
    ],
)
def test_options_of_no_meaning(capsys, tmp_path, stylize, photo, painting, options, message):
    with pytest.raises(SystemExit) as caught:
        main([str(x) for x in stylize(photo, painting, tmp_path / "out.png", *options)])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out.png").exists()


def test_out_of_memory_is_one_line(capsys, tmp_path, stylize, photo, painting, monkeypatch):
    def fail(*_, **__):
        raise MemoryError

    monkeypatch.setattr("a2k.stylize.StyleTransfer.stylize", fail)
    message = f"{TITLE}cannot redraw {photo}: it does not fit in memory; make it smaller (--size) or set --max-memory\n"
    assert refusal(capsys, *stylize(photo, painting, tmp_path / "out.png")) == message


@pytest.mark.parametrize(
    "error", (MemoryError(), torch.OutOfMemoryError("CUDA"), RuntimeError("DefaultCPUAllocator: can't allocate memory"))
)
def test_one_picture_too_many_for_the_memory(capsys, tmp_path, stylize, painting, monkeypatch, error):
    """It is named, and the others are redrawn and reported."""
    photos, redraw = [picture(tmp_path / f"{name}.png", seed=seed) for seed, name in enumerate("abc")], []

    def stylize_most(self, *arguments, **options):
        redraw.append(arguments)
        if len(redraw) == 2:
            raise error
        return whole(self, *arguments, **options)

    whole = StyleTransfer.stylize
    monkeypatch.setattr(StyleTransfer, "stylize", stylize_most)
    assert main([str(x) for x in stylize(photos, painting, tmp_path / "out")]) == 2
    out, err = capsys.readouterr()
    assert err.splitlines()[-1].startswith(f"{TITLE}cannot redraw {photos[1]}: it does not fit")
    assert [Path(line.split("  ")[0]).name[0] for line in out.splitlines()] == ["a", "c"]
    assert [name[0] for name in files(tmp_path / "out")] == ["a", "c"]


def test_an_error_of_all_pictures_is_told_once(capsys, tmp_path, stylize, painting, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("a mistake")

    monkeypatch.setattr(StyleTransfer, "stylize", fail)
    photos = [picture(tmp_path / f"{name}.png", seed=seed) for seed, name in enumerate("abc")]
    assert refusal(capsys, *stylize(photos, painting, tmp_path / "out")) == f"{TITLE}a mistake\n"


def test_closed_stderr(tmp_path, stylize, photo, painting):
    command = [sys.executable, "-m", "a2k", *map(str, stylize([photo, painting], painting, tmp_path / "out"))]
    run = subprocess.run(["sh", "-c", 'exec "$@" 2>&-', "sh", *command], stdout=subprocess.PIPE, check=False)
    assert run.returncode == 0
    assert len(run.stdout.splitlines()) == len(files(tmp_path / "out")) == 2


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGHUP))
def test_a_signal_leaves_nothing_half_written(tmp_path, number):
    """It comes while a file is written."""
    code = f"""
import os, sys, time
import a2k.cli, a2k.images

def write_half(path, data):
    with open(path, "wb") as file:
        file.write(data[:10])
    print("writing", flush=True)
    os.kill(os.getpid(), {int(number)})
    time.sleep(60)

def run_info(arguments):
    a2k.images.write_image(a2k.images.Image.new("RGB", (9, 9)), {str(tmp_path / "out.png")!r})

a2k.images.Path.write_bytes = write_half
a2k.cli.run_info = run_info
sys.argv = ["a2k", "info"]
sys.exit(a2k.cli.main())
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.stdout == "writing\n", run.stderr
    assert run.returncode == 128 + number
    assert files(tmp_path) == []


def test_interrupt(tmp_path, stylize, photo, painting, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupt)
    assert main([str(x) for x in stylize(photo, painting, tmp_path / "out" / "out.png")]) == 130
    assert files(tmp_path / "out") == []


# --- where it goes


@pytest.mark.parametrize("out", ("file/out.png", "file/deeper/out.png", "folder.png"))
def test_unwritable_output(capsys, tmp_path, stylize, photo, painting, out):
    (tmp_path / "file").write_text("earlier")
    (tmp_path / "folder.png" / "photo_stylized_painting.png").mkdir(parents=True)
    before = files(tmp_path)
    message = refusal(capsys, *stylize(photo, painting, tmp_path / out))
    assert f"cannot write {tmp_path / out}" in message
    assert files(tmp_path) == before
    assert (tmp_path / "file").read_text() == "earlier"


def test_no_room(capsys, tmp_path, stylize, photo, painting):
    picture(tmp_path / "out.png", seed=5)
    before = (tmp_path / "out.png").read_bytes()
    (tmp_path / "link.png").symlink_to("/dev/full")
    refusal(capsys, *stylize(photo, painting, tmp_path / "link.png"))
    assert (tmp_path / "out.png").read_bytes() == before


@pytest.mark.parametrize("which", ("content", "style", "output"))
def test_empty_paths(capsys, tmp_path, stylize, photo, painting, monkeypatch, which):
    """As of a variable that is not set: it does not mean the present folder."""
    picture(tmp_path / "here.png")
    monkeypatch.chdir(tmp_path)
    before, paths = files(tmp_path), {"content": photo, "style": painting, "output": tmp_path / "out.png", which: ""}
    assert "empty; give" in refusal(capsys, *stylize(*paths.values()))
    assert files(tmp_path) == before


def test_a_pipe_is_read_once_for_all_its_pairs(capsys, tmp_path, stylize, photo, painting, monkeypatch):
    """However many other pictures come in between."""
    monkeypatch.setattr(StyleTransfer, "encode_style", lambda *_, **__: None)
    monkeypatch.setattr(StyleTransfer, "stylize", lambda _self, picture, *_, **__: picture.rgb)
    pipe, photos = tmp_path / "pipe", [picture(tmp_path / f"{i}.png", 1, 1) for i in range(140)]
    os.mkfifo(pipe)
    threading.Thread(target=lambda: pipe.write_bytes(photo.read_bytes()), daemon=True).start()
    again = threading.Timer(10, lambda: pipe.write_bytes(b"read again"))  # else a second reader would wait for ever
    again.daemon = True
    again.start()
    succeed(capsys, *stylize([pipe, *photos], [painting, photo], tmp_path / "out"))
    again.cancel()
    assert len(files(tmp_path / "out")) == 2 * 141


def test_unknown_format(capsys, tmp_path, stylize, photo, painting):
    message = refusal(capsys, *stylize(photo, painting, tmp_path / "out.xyz"))
    assert "format '.xyz' is not known; use .png, .jpg" in message
    assert files(tmp_path) == ["in/painting.png", "in/photo.png"]


@pytest.mark.parametrize("which", ("photo.png", "painting.png"))
@pytest.mark.parametrize("kind", ("same", "relative", "link", "parent link"))
def test_output_equal_to_an_input(capsys, tmp_path, stylize, photo, painting, monkeypatch, which, kind):
    monkeypatch.chdir(tmp_path)
    before = {path: path.read_bytes() for path in (photo, painting)}
    Path("link.png").symlink_to(photo.parent / which)
    Path("folder").symlink_to(photo.parent, target_is_directory=True)
    out = {
        "same": photo.parent / which,
        "relative": f"in/../in/{which}",
        "link": "link.png",
        "parent link": f"folder/{which}",
    }[kind]
    message = refusal(capsys, *stylize(photo, painting, out))
    assert f"output {out} is one of the inputs; choose another -o" in message
    assert {path: path.read_bytes() for path in (photo, painting)} == before


def test_output_in_a_folder_equal_to_an_input(capsys, tmp_path, stylize, photo, painting):
    earlier = picture(tmp_path / "photo_stylized_painting.png")
    before = earlier.read_bytes()
    message = refusal(capsys, *stylize([photo, earlier], painting, tmp_path))
    assert f"output {earlier} is one of the inputs" in message
    assert earlier.read_bytes() == before


@pytest.mark.parametrize("name", ("out.png", "out.JPG", "existing"))
def test_several_pictures_to_one_file(capsys, tmp_path, stylize, photo, painting, name):
    (tmp_path / "existing").write_text("earlier")
    message = refusal(capsys, *stylize([photo, painting], painting, tmp_path / name))
    assert f"-o {tmp_path / name} is a file but 2 pictures would be made; give a folder" in message
    assert files(tmp_path) == ["existing", "in/painting.png", "in/photo.png"]


def test_several_pictures_to_a_folder_with_a_dot(capsys, tmp_path, stylize, photo, painting):
    (tmp_path / "out.png").mkdir()
    for name in ("out.png", "v1.2"):
        succeed(capsys, *stylize([photo, painting], painting, tmp_path / name))
        assert len(files(tmp_path / name)) == 2


def test_a_trailing_slash_means_a_folder(capsys, tmp_path, stylize, photo, painting):
    for photos, name in ((photo, "results.v2"), ([photo, painting], "out.png")):
        succeed(capsys, *stylize(photos, painting, f"{tmp_path / name}/"))
        assert "photo_stylized_painting.png" in files(tmp_path / name)


@pytest.mark.parametrize("end", ("", "/"))
def test_one_picture_to_an_existing_file_without_suffix(capsys, tmp_path, stylize, photo, painting, end):
    (tmp_path / "result").write_text("earlier")
    message = refusal(capsys, *stylize(photo, painting, f"{tmp_path / 'result'}{end}"))
    assert f"{tmp_path / 'result'}{end} is a file; give a folder, or a file name with a picture's extension" in message
    assert (tmp_path / "result").read_text() == "earlier"


def test_names_that_collide(capsys, tmp_path, stylize, photo, painting):
    twin = picture(tmp_path / "other" / "painting.jpg")
    message = refusal(capsys, *stylize(photo, [painting, twin], tmp_path / "out"))
    target = tmp_path / "out" / "photo_stylized_painting.png"
    assert f"{photo} with {painting} and {photo} with {twin} would both be written to {target}; rename one" in message
    twin = picture(tmp_path / "other" / "photo.png")
    message = refusal(capsys, *stylize([photo, twin], painting, tmp_path / "out"))
    assert f"{photo} with {painting} and {twin} with {painting} would both be" in message
    assert not (tmp_path / "out").exists()


# --- standard input and output


@pytest.fixture
def stdin(monkeypatch):
    def feed(data: bytes):
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(data)))

    return feed


def test_standard_input(capsys, tmp_path, stylize, photo, painting, stdin):
    for content, style, name in (("-", painting, "stdin_stylized_painting"), (photo, "-", "photo_stylized_stdin")):
        stdin((photo if content == "-" else painting).read_bytes())
        succeed(capsys, *stylize(content, style, tmp_path / "out"))
        out = Image.open(tmp_path / "out" / f"{name}.png")
        succeed(capsys, *stylize(photo, painting, tmp_path / "expected.png"))
        assert out.tobytes() == Image.open(tmp_path / "expected.png").tobytes()


def test_standard_input_for_several_pictures(capsys, tmp_path, stylize, photo, painting, stdin):
    stdin(photo.read_bytes())
    succeed(capsys, *stylize("-", [painting, photo], tmp_path / "out"))
    assert files(tmp_path / "out") == ["stdin_stylized_painting.png", "stdin_stylized_photo.png"]
    succeed(capsys, *stylize(photo, photo, tmp_path / "expected.png"))
    out = Image.open(tmp_path / "out" / "stdin_stylized_photo.png")
    assert out.tobytes() == Image.open(tmp_path / "expected.png").tobytes()


@pytest.mark.parametrize("name", ("stdin", "stdout"))
def test_closed_streams(capsys, tmp_path, stylize, photo, painting, monkeypatch, name):
    photo, out = ("-", tmp_path / "out.png") if name == "stdin" else (photo, "-")
    monkeypatch.setattr(sys, name, None)  # as Python does where it is closed
    assert main([str(x) for x in stylize(photo, painting, out, "--weights", "no such weights")]) == 2
    message = f"{TITLE}- is standard {name[3:]}put, which is closed; give a file\n"
    assert capsys.readouterr().err == message


@pytest.mark.parametrize(("data", "message"), [(b"", "it is empty"), (b"no picture", "not a picture")])
def test_bad_standard_input(capsys, tmp_path, stylize, painting, stdin, data, message):
    stdin(data)
    line = refusal(capsys, *stylize("-", painting, tmp_path / "out.png"))
    assert f"cannot read standard input: it is {message.removeprefix('it is ')}" in line
    assert not (tmp_path / "out.png").exists()


@pytest.mark.parametrize("inputs", (("-", "-"), (["-", "-"], "in"), (["-", "in"], "-")))
def test_standard_input_twice(capsys, tmp_path, stylize, photo, monkeypatch, inputs):
    monkeypatch.chdir(tmp_path)
    assert "- is given more than once; standard input holds one picture" in refusal(capsys, *stylize(*inputs, "out"))


def test_several_pictures_to_standard_output(capsys, stylize, photo, painting):
    message = refusal(capsys, *stylize([photo, painting], painting, "-"))
    assert "-o - takes one picture but 2 would be made; give a folder" in message


def test_a_pipe(stylize, photo, painting, tmp_path, capsys):
    result = in_process(*stylize("-", painting, "-"), stdin=photo.read_bytes())
    assert result.returncode == 0, result.stderr
    assert re.fullmatch(rb"-  40x34  \d+\.\d\d s\n", result.stderr)
    succeed(capsys, *stylize(photo, painting, tmp_path / "expected.png"))
    out = Image.open(io.BytesIO(result.stdout))
    assert out.format == "PNG"
    assert out.tobytes() == Image.open(tmp_path / "expected.png").tobytes()


def test_errors_of_the_process(stylize, tmp_path, painting):
    result = in_process(*stylize("-", painting, "-"), stdin=b"no picture")
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.startswith(TITLE.encode())
    assert result.stderr.count(b"\n") == 1, result.stderr


def test_a_pickle_given_to_the_process(tmp_path):
    (tmp_path / "vgg.pth").write_bytes(pickle.dumps(["something else", Path("unsafe")]))
    result = in_process("convert", "--vgg", tmp_path / "vgg.pth", "-o", tmp_path / "out.safetensors")
    assert (result.returncode, result.stdout) == (2, b"")
    assert result.stderr.count(b"\n") == 1, result.stderr
    assert files(tmp_path) == ["vgg.pth"]


@pytest.mark.parametrize("encoding", ("utf-8:strict", "cp1252:strict"))
def test_names_that_standard_output_cannot_encode(stylize, painting, tmp_path, monkeypatch, encoding):
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    names = ("caf\udce9", "\u753b", "plain")
    photos = [picture(tmp_path / "plain.png").rename(tmp_path / f"{name}.png") for name in names[:2]]
    result = in_process(*stylize([*photos, picture(tmp_path / "plain.png")], painting, tmp_path / "out"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(b"\n") == 3
    assert files(tmp_path / "out") == sorted(f"{name}_stylized_painting.png" for name in names)


# --- the rest


def test_help_and_version(capsys):
    for arguments in (["--help"], *([name, "--help"] for name in ("stylize", "train", "evaluate", "convert", "info"))):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 0
        assert "usage: a2k" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"a2k {a2k.__version__}\n"


@pytest.mark.parametrize("command", ([], ["train"], ["evaluate"]))
def test_help_does_not_wait_for_torch(command):
    script = "import sys; from a2k.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    arguments = [sys.executable, "-c", script, *command, "--help"]
    run = subprocess.run(arguments, capture_output=True, text=True, timeout=60)
    assert run.stdout.startswith("usage: "), run.stderr
    assert run.stdout.endswith("False\n")


def test_classes_are_listed():
    assert set(dir(a2k)) >= {"A2K", "StyA2K", "StyA2KConfig", "StyleTransfer"}
    assert not hasattr(a2k, "Sty2K")


def test_no_command(capsys):
    with pytest.raises(SystemExit) as caught:
        main([])
    assert caught.value.code == 2
    assert "COMMAND" in capsys.readouterr().err


def test_info(capsys):
    lines = dict(line.split(maxsplit=1) for line in succeed(capsys, "info").splitlines())
    assert lines["a2k"] == a2k.__version__
    assert lines["torch"] == torch.__version__
    assert re.match(r"cpu \(\d+ threads(, bfloat16)?\)", lines["devices"])
    assert "reference" in lines["backends"]
    assert lines["weights"]
