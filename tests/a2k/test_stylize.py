import copy
import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import TINY, noise, picture, tiny_model

from a2k import StyleTransfer
from a2k.checkpoint import WeightsError, find_weights, load_model
from a2k.images import ImageError, to_pil, to_tensor
from a2k.stylize import choose_device, choose_dtype, default_dtype

ORIENTATION = 0x0112


@pytest.fixture(scope="module")
def transfer():
    return StyleTransfer(tiny_model(), device="cpu")


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, int)


def difference(first: Image.Image, second: Image.Image) -> float:
    """Mean absolute difference in levels."""
    return np.abs(pixels(first) - pixels(second)).mean()


# --- the bundled model


def test_bundled_model(tmp_path):
    file = find_weights("a2k-lite")
    assert file.stat().st_size <= 6e6
    assert {x.dtype for x in load_file(file).values()} == {torch.float16}
    transfer = StyleTransfer(device="cpu")
    content = Image.fromarray(noise(65, 48))
    outputs = [transfer.stylize(content, Image.fromarray(noise(64, 64, seed=seed))) for seed in (1, 2)]
    assert {out.size for out in outputs} == {(65, 48)}
    assert difference(*outputs) > 5
    assert min(difference(out, content) for out in outputs) > 5


def test_bundled_model_in_bfloat16():
    """Not much further from float32 than the plain network, whose rounding faint channels multiply; in the mean of four
    pictures, as a match that flips made it 2.4 times as far in one of 30.
    """
    numbers = range(0, 8, 2)
    pairs = [(Image.fromarray(noise(65, 48, seed=i)), Image.fromarray(noise(64, 64, seed=i + 1))) for i in numbers]
    fast, plain = [], []
    for dtype in (torch.float32, torch.bfloat16):
        model = load_model(find_weights("a2k-lite")).to(dtype)
        with torch.inference_mode():
            results = [model(*(to_tensor(image).to(dtype) for image in pair)).float().clamp(0, 1) for pair in pairs]
        plain.append([to_pil(result) for result in results])
        transfer = StyleTransfer(device="cpu", dtype=str(dtype).removeprefix("torch."))
        fast.append([transfer.stylize(*pair) for pair in pairs])
    errors, plain_errors = ([difference(*pair) for pair in zip(*of, strict=True)] for of in (fast, plain))
    print(f"errors {errors}, of the plain network {plain_errors}")
    assert sum(errors) < 2 * sum(plain_errors)


# --- what goes in


def test_kinds_of_input_agree(transfer, photo, painting):
    array = noise(40, 34, seed=1)
    sources = (photo, str(photo), Image.fromarray(array), array, io.BytesIO(photo.read_bytes()))
    outputs = [transfer.stylize(source, painting) for source in sources]
    with open(photo, "rb") as file:
        outputs.append(transfer.stylize(file, painting))
    assert {(out.mode, out.size) for out in outputs} == {("RGB", (40, 34))}
    assert {out.tobytes() for out in outputs} == {outputs[0].tobytes()}
    style = noise(37, 50, seed=2)
    assert transfer.stylize(array, style).tobytes() == outputs[0].tobytes()


def test_is_the_network(transfer):
    content, style = noise(40, 33), noise(35, 50, seed=1)
    tensors = (torch.from_numpy(x.copy()).permute(2, 0, 1)[None] / 255 for x in (content, style))
    with torch.no_grad():
        expected = transfer.model(*tensors, 0.5).clamp(0, 1)[0].permute(1, 2, 0) * 255
    out = transfer.stylize(content, style, strength=0.5)
    np.testing.assert_allclose(np.asarray(out, float), expected, atol=0.51)


@pytest.mark.parametrize("source", (None, 3, b"bytes", ["a.png"]))
def test_other_kinds_of_input(transfer, source):
    with pytest.raises(TypeError):
        transfer.stylize(source, noise())


@pytest.mark.parametrize("array", (noise().astype(np.float32), noise()[..., 0], noise(channels=4), noise()[:0]))
def test_other_arrays(transfer, array):
    with pytest.raises(ImageError):
        transfer.stylize(array, noise())
    with pytest.raises(ImageError):
        transfer.stylize(noise(), array)


@pytest.mark.parametrize("orientation", (3, 6))
def test_orientation(transfer, tmp_path, painting, orientation):
    stored = Image.fromarray(noise(48, 33))
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    stored.save(tmp_path / "turned.png", exif=exif)
    upright = stored.transpose({3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_270}[orientation])
    out = transfer.stylize(tmp_path / "turned.png", painting)
    assert out.size == upright.size
    assert out.tobytes() == transfer.stylize(upright, painting).tobytes()
    assert ORIENTATION not in out.getexif()


@pytest.mark.parametrize("size", ((1, 1), (1, 60), (60, 1), (17, 33)))
def test_any_size(transfer, size):
    assert transfer.stylize(noise(*size), noise(37, 34)).size == size
    assert transfer.stylize(noise(37, 34), noise(*size)).size == (37, 34)


# --- options


def test_strength(transfer):
    content, styles = noise(), [noise(seed=1), noise(seed=2)]
    assert difference(*(transfer.stylize(content, style, strength=0) for style in styles)) == 0
    assert difference(*(transfer.stylize(content, style) for style in styles)) > 1
    default, full = transfer.stylize(content, styles[0]), transfer.stylize(content, styles[0], strength=1.0)
    assert default.tobytes() == full.tobytes()


@pytest.mark.parametrize("strength", (-0.1, 1.01, 2, float("nan"), float("inf")))
def test_strengths_out_of_range(transfer, strength):
    with pytest.raises(ValueError, match=f"strength is {strength}; it must be from 0 to 1"):
        transfer.stylize(noise(), noise(), strength=strength)


@pytest.mark.parametrize(("size", "expected"), [(None, (48, 36)), (18, (24, 18)), (72, (96, 72)), (1, (1, 1))])
def test_size(transfer, size, expected):
    assert transfer.stylize(noise(48, 36), noise(), size=size).size == expected


def test_style_size(transfer):
    content, style = noise(), noise(80, 64, seed=1)
    shrunk = Image.fromarray(style).resize((50, 40), Image.Resampling.LANCZOS)
    out = transfer.stylize(content, style, style_size=40)
    assert out.tobytes() == transfer.stylize(content, shrunk).tobytes()
    assert out.size == (40, 34)


@pytest.mark.parametrize("name", ("size", "style_size"))
@pytest.mark.parametrize("size", (0, -5, 1.5, "64", True))
def test_sizes_out_of_range(transfer, name, size):
    with pytest.raises(ValueError, match=f"^{name} is {size!r}; give a whole number of pixels"):
        transfer.stylize(noise(), noise(), **{name: size})


def test_preserve_color(transfer):
    content, style = Image.fromarray(noise()), noise(seed=1)
    plain, kept = (transfer.stylize(content, style, preserve_color=keep) for keep in (False, True))
    chroma = [pixels(image.convert("YCbCr"))[..., 1:] for image in (content, kept, plain)]
    clipped = (pixels(kept) % 255 == 0).any(-1)
    assert np.abs(chroma[0] - chroma[1])[~clipped].max() <= 2
    assert np.abs(chroma[0] - chroma[2]).mean() > 10
    luminance = [pixels(image.convert("L")) for image in (plain, kept)]
    assert np.abs(luminance[0] - luminance[1])[~clipped].max() <= 2


def test_alpha_is_carried_over(transfer):
    content = noise(40, 34, channels=4)
    content[..., 3] |= 1
    image, style = Image.fromarray(content), noise(seed=1)
    out = transfer.stylize(image, style)
    assert out.mode == "RGBA"
    np.testing.assert_array_equal(np.asarray(out.getchannel("A")), content[..., 3])
    assert transfer.stylize(image, style, size=20, preserve_color=True).getchannel("A").size == (24, 20)
    opaque = transfer.stylize(content[..., :3], style)
    assert out.convert("RGB").tobytes() == opaque.tobytes()


def test_alpha_of_the_style_is_ignored(transfer):
    assert transfer.stylize(noise(), Image.fromarray(noise(channels=4))).mode == "RGB"


def test_hidden_colours_do_not_matter(transfer):
    """Of photos and paintings, whose transparent borders are cut off."""
    content, style = noise(40, 34, channels=4), noise(50, 45, seed=1, channels=4)
    content[5:20, 4:30, 3] = style[:, 30:, 3] = style[:9, :, 3] = 0
    style[9:, :30, 3] = 255
    content[5:20, 4:30, :3] = style[:, 30:, :3] = 0
    expected = transfer.stylize(Image.fromarray(content), style[9:, :30, :3])
    for hidden in (0, 255):
        content[content[..., 3] == 0, :3] = style[style[..., 3] == 0, :3] = hidden
        out = transfer.stylize(Image.fromarray(content), Image.fromarray(style))
        assert out.tobytes() == expected.tobytes()


# --- several pictures


def test_encoded_style(transfer, painting):
    style = transfer.encode_style(painting, style_size=33)
    for content in (noise(), noise(50, 41, seed=3)):
        expected = transfer.stylize(content, painting, style_size=33)
        assert transfer.stylize(content, style).tobytes() == expected.tobytes()


def test_encoded_styles_stay_with_their_network(transfer, painting):
    other = StyleTransfer(tiny_model(seed=1), device="cpu")
    for given, options in ((other.encode_style(painting), {}), (transfer.encode_style(painting), {"style_size": 40})):
        with pytest.raises(ValueError, match="style was encoded at its own size by one StyleTransfer"):
            transfer.stylize(noise(), given, **options)


def test_batch(transfer, painting):
    """Each as if alone, whatever sizes they have."""
    contents = [noise(40, 34), noise(50, 34, seed=3), noise(40, 34, channels=4, seed=4), noise(40, 34, seed=5)]
    contents[2] = Image.fromarray(contents[2])
    outputs = transfer.stylize_batch(contents, painting, strength=0.7)
    assert [out.mode for out in outputs] == ["RGB", "RGB", "RGBA", "RGB"]
    for out, content in zip(outputs, contents, strict=True):
        alone = transfer.stylize(content, painting, strength=0.7)
        assert out.size == alone.size
        assert np.abs(pixels(out) - pixels(alone)).max() <= 1
    assert transfer.stylize_batch([], painting) == []


def test_progress(transfer, painting, capsys):
    transfer.stylize(noise(), painting, progress=True)
    shown = capsys.readouterr().err
    assert "style: " in shown
    assert "picture: " in shown
    transfer.stylize(noise(), painting)
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_compile(transfer, painting):
    compiled = StyleTransfer(transfer.model, device="cpu", compile=True)
    expected = transfer.stylize(noise(), painting, strength=0.7)
    assert np.abs(pixels(compiled.stylize(noise(), painting, strength=0.7)) - pixels(expected)).max() <= 1


# --- limits


def test_max_pixels(tmp_path, painting):
    transfer = StyleTransfer(tiny_model(), device="cpu", max_pixels=40 * 50)
    assert transfer.stylize(noise(40, 50), painting).size == (40, 50)
    with pytest.raises(ImageError, match=r"51x40, 2040 pixels, over the limit of 2000"):
        transfer.stylize(noise(51, 40), painting)
    with pytest.raises(ImageError, match="over the limit of 2000"):
        transfer.stylize(noise(), picture(tmp_path / "big.png", 51, 40))
    for name in ("size", "style_size"):
        with pytest.raises(ImageError, match=f"^{name}=60 makes a picture of .* over the limit of 2000"):
            transfer.stylize(noise(20, 20), noise(20, 20), **{name: 60})


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("max_memory", "2G", "a number of bytes of at least 0, or None"),
        ("max_memory", -1, "a number of bytes of at least 0, or None"),
        ("max_pixels", "100", "a number of at least 0"),
        ("max_pixels", None, "a number of at least 0"),
    ],
)
def test_limits_that_are_none(name, value, remedy):
    with pytest.raises(ValueError, match=f"^{name} is {value!r}; give {remedy}$"):
        StyleTransfer("no such weights", **{name: value})


@pytest.mark.parametrize("strength", ("0.5", None))
def test_strengths_that_are_no_numbers(transfer, strength):
    with pytest.raises(ValueError, match=f"^strength is {strength!r}; it must be from 0 to 1, as a number$"):
        transfer.stylize(noise(), noise(), strength=strength)


def test_numbers_and_dtypes_of_other_libraries(transfer):
    out = transfer.stylize(noise(), noise(), size=np.int64(20), style_size=np.uint8(33), strength=np.float32(0.5))
    assert out.tobytes() == transfer.stylize(noise(), noise(), size=20, style_size=33, strength=0.5).tobytes()
    assert choose_dtype(torch.bfloat16) == torch.bfloat16
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; choose one of float32"):
        choose_dtype(torch.int8)


def test_a_long_picture_is_not_blown_up(transfer):
    with pytest.raises(ImageError, match="size=400 makes a picture of 480000000 pixels"):
        transfer.stylize(noise(1, 3000), noise(), size=400)


# --- the network


@pytest.mark.parametrize(("dtype", "levels"), (("float16", 1), ("bfloat16", 8)))  # bfloat16 has three bits fewer
def test_dtype(dtype, levels, transfer):
    half = StyleTransfer(tiny_model(), device="cpu", dtype=dtype)
    assert {p.dtype for p in half.model.parameters()} == {getattr(torch, dtype)}
    content, style = noise(), noise(seed=1)
    assert difference(half.stylize(content, style), transfer.stylize(content, style)) < levels


@pytest.mark.parametrize("dtype", ("float64", "int8", "nonsense", ""))
def test_unknown_dtype(dtype):
    with pytest.raises(ValueError, match=f"dtype is {dtype!r}; choose one of float32, float16, bfloat16"):
        StyleTransfer(tiny_model(), dtype=dtype)


@pytest.mark.parametrize("multiplies", (False, True))
def test_default_dtype(multiplies, tiny_file, monkeypatch):
    monkeypatch.setattr("a2k.stylize.multiplies_bfloat16", lambda: multiplies)
    default = torch.bfloat16 if multiplies else torch.float32
    assert StyleTransfer(device="cpu").dtype == default
    assert default_dtype("a2k-lite", torch.device("cuda")) == torch.float32
    for weights in (tiny_model(), tiny_file, find_weights("a2k-lite")):
        assert StyleTransfer(weights, device="cpu").dtype == torch.float32
    assert StyleTransfer(device="cpu", dtype="float32").dtype == torch.float32


@pytest.mark.parametrize("device", ("nonsense", "", "cpu:x", "meta", "mps", "hpu", "privateuseone"))
def test_devices_that_cannot_be_had(device):
    with pytest.raises(ValueError) as caught:
        StyleTransfer(tiny_model(), device=device)
    message = str(caught.value)
    assert message.startswith(f"device {device!r} cannot be used (")
    assert message.endswith("); choose 'auto' or 'cpu'")
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("device", ("mps", "meta"))
def test_other_devices(device):
    with pytest.raises(ValueError, match="only cpu and cuda are supported"):
        choose_device(device)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu():
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda:1' cannot be used"):
        choose_device("cuda:1")


def test_backend(tiny_file):
    for backend in ("torch", "reference", None):
        assert StyleTransfer(tiny_file, device="cpu", backend=backend).model.a2k4.backend == backend
    with pytest.raises(ValueError, match="backend is 'nonsense'"):
        StyleTransfer(tiny_file, device="cpu", backend="nonsense").stylize(noise(), noise())


def test_backend_of_a_given_network():
    given = tiny_model(backend="reference")
    assert StyleTransfer(given, device="cpu").model.a2k4.backend == "reference"
    assert StyleTransfer(given, device="cpu", backend="torch").model.a2k4.backend == "torch"
    assert given.a2k4.backend == "reference"
    with pytest.raises(ValueError, match="backend is 'nonsense'; choose one of"):
        StyleTransfer(given, device="cpu", backend="nonsense").stylize(noise(), noise())


def test_a_given_network_stays_as_it_is(photo, painting):
    given = tiny_model().train()
    before = {name: x.clone() for name, x in given.state_dict().items()}
    StyleTransfer(given, device="cpu", dtype="bfloat16").stylize(photo, painting)
    assert given.training
    assert given.decoder.merge.weight.is_contiguous()
    for name, x in given.state_dict().items():
        torch.testing.assert_close(x, before[name], rtol=0, atol=0)


def test_network_is_ready_for_inference(tiny_file):
    model = StyleTransfer(tiny_file).model
    assert not model.training
    assert model.config == TINY
    assert model.decoder.merge.weight.is_contiguous(memory_format=torch.channels_last)


def test_missing_weights(tmp_path):
    with pytest.raises(WeightsError, match="neither a file nor a bundled model"):
        StyleTransfer(tmp_path / "none.safetensors")


def test_nan_in_the_weights(photo, painting):
    model = tiny_model()
    torch.nn.init.constant_(model.decoder.merge.bias, float("nan"))
    with pytest.raises(ImageError, match="the result contains NaN"):
        StyleTransfer(model).stylize(photo, painting)


# --- copies and surroundings


@pytest.mark.parametrize("copied", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))))
def test_copies_redraw_the_same(painting, copied):
    """With a style of the original, too: both can go to other processes."""
    transfer = StyleTransfer(tiny_model(), device="cpu", max_memory=10**6)
    content, style = Image.fromarray(noise(40, 50)), transfer.encode_style(painting)
    expected = transfer.stylize(content, style)
    other = copied(transfer)
    assert difference(other.stylize(content, copied(style)), expected) == 0
    assert difference(other.stylize(content, painting), expected) == 0
    assert (other.max_pixels, other._network.max_memory) == (transfer.max_pixels, 10**6)


def test_bundled_model_can_be_copied():
    """Whose kernels are prepared in a form that nothing can read."""
    transfer, content = StyleTransfer(device="cpu"), Image.fromarray(noise(65, 48))
    assert difference(copy.deepcopy(transfer).stylize(content, content), transfer.stylize(content, content)) == 0


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_autocast_changes_nothing(transfer, painting, dtype):
    content = Image.fromarray(noise(40, 50))
    expected = transfer.stylize(content, painting)
    with torch.autocast("cpu", dtype):
        assert difference(transfer.stylize(content, painting), expected) == 0
