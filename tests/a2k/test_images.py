import io
import os
import stat
import struct
import sys
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image, ImageCms, TiffImagePlugin
from tiny import files

from a2k import images
from a2k.images import (
    ImageError,
    check_sides,
    find_images,
    read_image,
    resize_short_side,
    to_pil,
    to_tensor,
    transfer_color,
    whole_number,
    write_image,
)

EXIF_ORIENTATION = 0x0112

# What the EXIF standard says has to be done to the stored pixels to see them upright.
UPRIGHT = {
    1: lambda stored: stored,
    2: lambda stored: stored[:, ::-1],
    3: lambda stored: stored[::-1, ::-1],
    4: lambda stored: stored[::-1],
    5: lambda stored: stored.swapaxes(0, 1),
    6: lambda stored: np.rot90(stored, -1),
    7: lambda stored: stored[::-1, ::-1].swapaxes(0, 1),
    8: lambda stored: np.rot90(stored),
}


@pytest.fixture
def rng():
    seed = np.random.SeedSequence().entropy
    print(f"seed {seed}")
    return np.random.default_rng(seed)


def noise(rng, *shape):
    return rng.integers(0, 256, shape, dtype=np.uint8)


def encoded(image, format, **options):
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def read_bytes(data, **options):
    return read_image(io.BytesIO(data), **options)


def opened(data):
    return Image.open(io.BytesIO(data))


def one_line(caught, *parts):
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert str(part) in message
    return message


def png_chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, height, depth, color, rows, extra=b""):
    header = struct.pack(">IIBBBBB", width, height, depth, color, 0, 0, 0)
    chunks = (
        png_chunk(b"IHDR", header),
        extra,
        png_chunk(b"IDAT", zlib.compress(rows)),
        png_chunk(b"IEND", b""),
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def png_16_bit_grey(values, extra=b""):
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png(values.shape[1], values.shape[0], 16, 0, rows, extra)


def icc_profile(kind, space, connection, tags):
    """A minimal ICC version 2 profile: header, tag table, tags."""
    offset = 128 + 4 + 12 * len(tags)
    table, body = struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        table += name + struct.pack(">II", offset + len(body), len(data))
        body += data
    header = struct.pack(">I4sI4s4s4s", offset + len(body), b"lcms", 0x02100000, kind, space, connection)
    header += struct.pack(">6H4s", 2020, 1, 1, 0, 0, 0, b"acsp")
    header = header.ljust(68, b"\0") + struct.pack(">3i", 63190, 65536, 54061)
    return header.ljust(128, b"\0") + table + body


def xyz(x, y, z):
    return struct.pack(">4sI3i", b"XYZ ", 0, *(round(value * 65536) for value in (x, y, z)))


WHITE = xyz(0.9642, 1.0, 0.8249)
LINEAR = struct.pack(">4sIIHxx", b"curv", 0, 1, 0x0100)


def linear_grey_profile():
    return icc_profile(b"mntr", b"GRAY", b"XYZ ", {b"wtpt": WHITE, b"kTRC": LINEAR})


def linear_rgb_profile():
    colorants = {b"rXYZ": xyz(0.4361, 0.2225, 0.0139), b"gXYZ": xyz(0.3851, 0.7169, 0.0971)}
    colorants |= {b"bXYZ": xyz(0.1430, 0.0606, 0.7139)}
    curves = dict.fromkeys([b"rTRC", b"gTRC", b"bTRC"], LINEAR)
    return icc_profile(b"mntr", b"RGB ", b"XYZ ", {b"wtpt": WHITE} | colorants | curves)


def colorless_cmyk_profile():
    """A CMYK profile in which the black ink alone counts: its share is the lack of CIE lightness."""
    identity = bytes(range(256))
    table = struct.pack(">4sIBBBx9i", b"mft1", 0, 4, 3, 2, *(65536 * (i % 4 == 0) for i in range(9)))
    table += identity * 4 + bytes([255, 128, 128, 0, 128, 128]) * 8 + identity * 3
    return icc_profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": table})


def srgb_profile():
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def red_blue_swapped_profile():
    return srgb_profile().replace(b"rXYZ", b"????").replace(b"bXYZ", b"rXYZ").replace(b"????", b"bXYZ")


# --- sources


def test_every_kind_of_source_gives_the_same_picture(rng, tmp_path):
    pixels = noise(rng, 5, 7, 3)
    image = Image.fromarray(pixels)
    path = tmp_path / "in.png"
    image.save(path)
    with open(path, "rb") as file:
        sources = [
            path,
            str(path),
            file,
            io.BytesIO(path.read_bytes()),
            image,
            pixels,
            pixels[:, ::-1][:, ::-1],
        ]
        for source in sources:
            picture = read_image(source)
            assert picture.rgb.mode == "RGB"
            assert picture.alpha is None
            np.testing.assert_array_equal(np.asarray(picture.rgb), pixels)


def test_a_jpeg_may_be_read_smaller(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (640, 480), (200, 100, 50)).save(path, quality=95)
    for short_side, size in (
        (None, (640, 480)),
        (480, (640, 480)),
        (240, (320, 240)),
        (130, (320, 240)),
        (1, (80, 60)),
    ):
        rgb = read_image(path, short_side=short_side).rgb
        assert rgb.size == size
        assert rgb.getpixel((40, 30)) == pytest.approx((200, 100, 50), abs=2)
    Image.new("RGB", (640, 480)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", short_side=1).rgb.size == (640, 480)


def read_pipe(data):
    reader, writer = os.pipe()
    with open(writer, "wb") as file:
        file.write(data)
    with open(reader, "rb") as file:
        return read_image(file)


def test_a_pipe_is_read(rng):
    pixels = noise(rng, 5, 7, 3)
    np.testing.assert_array_equal(np.asarray(read_pipe(encoded(Image.fromarray(pixels), "PNG")).rgb), pixels)


@pytest.mark.parametrize(("data", "reason"), [(b"", "empty"), (b"words" * 50, "not a picture")])
def test_a_pipe_without_a_picture(data, reason):
    with pytest.raises(ImageError) as caught:
        read_pipe(data)
    one_line(caught, reason)


def test_a_given_image_is_neither_changed_nor_shared(rng):
    image = Image.fromarray(noise(rng, 4, 4, 3))
    image.info["icc_profile"] = srgb_profile()
    before = image.tobytes()
    picture = read_image(image)
    picture.rgb.paste((1, 2, 3), (0, 0, 4, 4))
    assert image.tobytes() == before
    assert "icc_profile" in image.info


@pytest.mark.parametrize(
    "array",
    [np.zeros((4, 5), np.uint8), np.zeros((4, 5, 4), np.uint8), np.zeros((4, 5, 3), np.float32)],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(ImageError) as caught:
        read_image(array)
    one_line(caught, array.shape, array.dtype, "uint8", "(H, W, 3)")


@pytest.mark.parametrize("source", [None, 3, io.StringIO("text"), b"bytes", [[1]]])
def test_other_sources_are_refused(source):
    with pytest.raises(TypeError) as caught:
        read_image(source)
    one_line(caught, type(source).__name__, "give a path")


def test_an_array_without_pixels_is_refused():
    with pytest.raises(ImageError) as caught:
        read_image(np.zeros((0, 5, 3), np.uint8))
    one_line(caught, "5x0", "no pixels")


# --- orientation


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_turns_the_pixels_and_the_alpha(rng, orientation, format):
    stored = noise(rng, 6, 9, 4)
    stored[..., 3] |= 1  # WebP does not keep the colour below alpha 0
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    picture = read_bytes(encoded(Image.fromarray(stored), format, exif=exif, **options))
    upright = UPRIGHT[orientation](stored)
    np.testing.assert_array_equal(np.asarray(picture.rgb), upright[..., :3])
    np.testing.assert_array_equal(np.asarray(picture.alpha), upright[..., 3])


@pytest.mark.parametrize("orientation", UPRIGHT)
def test_orientation_of_a_jpeg(rng, orientation):
    image = Image.fromarray(noise(rng, 6, 9, 3))
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    upright = UPRIGHT[orientation](np.asarray(opened(encoded(image, "JPEG"))))
    np.testing.assert_array_equal(np.asarray(read_bytes(encoded(image, "JPEG", exif=exif)).rgb), upright)


@pytest.mark.parametrize("orientation", [6, 8])
def test_orientation_is_not_applied_twice(rng, orientation):
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    once = read_bytes(encoded(Image.fromarray(noise(rng, 6, 9, 3)), "PNG", exif=exif)).rgb
    assert read_image(once).rgb.tobytes() == once.tobytes()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("exif", [b"Exif\0\0junk", b"Exif\0\0", b"Exif\0\0MM\0*\xff\xff\xff\xff"])
def test_damaged_exif_is_ignored(rng, format, exif):
    assert read_bytes(encoded(Image.fromarray(noise(rng, 6, 9, 3)), format, exif=exif)).rgb.size == (9, 6)


def test_orientation_counts_beside_a_damaged_field(rng):
    fields = struct.pack(">HHHIHH", 2, EXIF_ORIENTATION, 3, 1, 6, 0)
    fields += struct.pack(">HHI4s", 0x0128, 2, 1, b"x\0\0\0")  # the resolution unit as text, not as a number
    exif = b"Exif\0\0MM\0*\0\0\0\x08" + fields + bytes(4)
    assert read_bytes(encoded(Image.fromarray(noise(rng, 6, 9, 3)), "JPEG", exif=exif)).rgb.size == (6, 9)


# --- colour profiles


@pytest.mark.parametrize("format", ["PNG", "TIFF", "JPEG"])
def test_an_rgb_profile_is_converted(format):
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    picture = read_bytes(encoded(red, format, icc_profile=red_blue_swapped_profile()))
    np.testing.assert_allclose(picture.rgb.getpixel((3, 3)), (0, 0, 255), atol=6)


def test_an_rgb_profile_is_converted_below_alpha_and_in_palettes():
    profile = red_blue_swapped_profile()
    clear_red = Image.new("RGBA", (4, 4), (255, 0, 0, 90))
    picture = read_bytes(encoded(clear_red, "PNG", icc_profile=profile))
    np.testing.assert_allclose(picture.rgb.getpixel((1, 1)), (0, 0, 255), atol=6)
    assert picture.alpha.getpixel((1, 1)) == 90
    palette_red = Image.new("RGB", (4, 4), (255, 0, 0)).quantize(4)
    picture = read_bytes(encoded(palette_red, "PNG", icc_profile=profile))
    np.testing.assert_allclose(picture.rgb.getpixel((1, 1)), (0, 0, 255), atol=6)


@pytest.mark.parametrize("profile", [linear_grey_profile(), linear_rgb_profile()], ids=["grey", "rgb"])
@pytest.mark.parametrize("mode", ["L", "LA", "I;16"])
def test_a_profile_of_a_grey_picture_is_converted(mode, profile):
    color = {"L": 55, "LA": (55, 90), "I;16": 55 * 257}[mode]
    picture = read_bytes(encoded(Image.new(mode, (4, 4), color), "PNG", icc_profile=profile))
    linear = 55 / 255
    expected = 255 * (1.055 * linear ** (1 / 2.4) - 0.055)
    np.testing.assert_allclose(picture.rgb.getpixel((1, 1)), [expected] * 3, atol=2)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_a_cmyk_profile_is_converted(format):
    inks = Image.new("CMYK", (8, 8), (200, 30, 90, 127))
    picture = read_bytes(encoded(inks, format, icc_profile=colorless_cmyk_profile()))
    np.testing.assert_allclose(picture.rgb.getpixel((3, 3)), (119, 119, 119), atol=4)


@pytest.mark.parametrize(
    "profile", [b"junk" * 50, b"\0", srgb_profile()[:200], linear_grey_profile(), colorless_cmyk_profile()]
)
def test_a_broken_or_unfit_profile_is_ignored(rng, profile):
    pixels = noise(rng, 5, 7, 3)
    picture = read_bytes(encoded(Image.fromarray(pixels), "PNG", icc_profile=profile))
    np.testing.assert_array_equal(np.asarray(picture.rgb), pixels)


def test_a_profile_is_not_carried_into_what_is_written(tmp_path):
    red = Image.new("RGB", (4, 4), (255, 0, 0))
    rgb = read_bytes(encoded(red, "PNG", icc_profile=red_blue_swapped_profile())).rgb
    write_image(resize_short_side(rgb, 8), tmp_path / "out.png")
    assert "icc_profile" not in opened((tmp_path / "out.png").read_bytes()).info


# --- modes


def test_16_bit_grey_png(rng):
    values = rng.integers(0, 65536, (5, 7), dtype=np.uint16)
    values.flat[:4] = [0, 65535, 257, 256]
    expected = np.rint(values / 257).astype(np.uint8)
    for source in [io.BytesIO(png_16_bit_grey(values)), Image.fromarray(values.astype(np.int32))]:
        rgb = np.asarray(read_image(source).rgb)
        for channel in range(3):
            np.testing.assert_array_equal(rgb[..., channel], expected)


@pytest.mark.parametrize("order", ["I;16", "I;16B"])
def test_16_bit_grey_tiff_of_either_byte_order(rng, order):
    values = rng.integers(0, 65536, (5, 7), dtype=np.uint16)
    data = values.astype(">u2" if order == "I;16B" else "<u2").tobytes()
    stored = encoded(Image.frombytes(order, (7, 5), data), "TIFF")
    rgb = np.asarray(read_bytes(stored).rgb)
    np.testing.assert_array_equal(rgb[..., 0], np.rint(values / 257))


def test_float_grey(rng):
    values = rng.random((5, 7), dtype=np.float32)
    rgb = np.asarray(read_bytes(encoded(Image.fromarray(values), "TIFF")).rgb)
    np.testing.assert_allclose(rgb[..., 1], values * 255, atol=0.51)


@pytest.mark.parametrize("value", [-0.1, 1.5, float("nan")])
def test_float_grey_out_of_range_is_refused(value):
    values = np.full((3, 3), 0.5, np.float32)
    values[1, 1] = value
    with pytest.raises(ImageError) as caught:
        read_bytes(encoded(Image.fromarray(values), "TIFF"))
    one_line(caught, "outside 0 to 1", "8-bit")


def test_32_bit_grey_out_of_range_is_refused():
    with pytest.raises(ImageError) as caught:
        read_bytes(encoded(Image.fromarray(np.full((3, 3), 70000, np.int32)), "TIFF"))
    one_line(caught, "70000", "outside 0 to 65535")


def test_1_bit(rng):
    bits = rng.random((5, 11)) < 0.5
    rgb = np.asarray(read_bytes(encoded(Image.fromarray(bits), "PNG")).rgb)
    np.testing.assert_array_equal(rgb, np.where(bits, 255, 0)[..., None].repeat(3, 2))


def test_grey_with_and_without_alpha(rng):
    grey, alpha = noise(rng, 5, 7), noise(rng, 5, 7) | 1
    plain = read_bytes(encoded(Image.fromarray(grey), "PNG"))
    clear = read_bytes(encoded(Image.merge("LA", (Image.fromarray(grey), Image.fromarray(alpha))), "PNG"))
    for picture in [plain, clear]:
        np.testing.assert_array_equal(np.asarray(picture.rgb), grey[..., None].repeat(3, 2))
    assert plain.alpha is None
    np.testing.assert_array_equal(np.asarray(clear.alpha), alpha)


def test_rgba(rng):
    pixels = noise(rng, 5, 7, 4)
    pixels[..., 3] |= 1
    picture = read_bytes(encoded(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(np.asarray(picture.rgb), pixels[..., :3])
    np.testing.assert_array_equal(np.asarray(picture.alpha), pixels[..., 3])
    assert picture.alpha.mode == "L"


def test_palette_with_transparency(rng):
    palette, index = noise(rng, 4, 3), rng.integers(0, 4, (5, 7), dtype=np.uint8)
    image = Image.fromarray(index)
    image.putpalette(palette.tobytes())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opaque = read_bytes(encoded(image, "PNG"))
        several = read_bytes(encoded(image, "PNG", transparency=bytes([0, 80, 255, 9])))
        single = read_bytes(encoded(image, "GIF", transparency=2))
    np.testing.assert_array_equal(np.asarray(opaque.rgb), palette[index])
    np.testing.assert_array_equal(np.asarray(several.rgb)[index > 0], palette[index[index > 0]])
    assert opaque.alpha is None
    np.testing.assert_array_equal(np.asarray(several.alpha), np.array([0, 80, 255, 9])[index])
    np.testing.assert_array_equal(np.asarray(single.alpha), np.where(index == 2, 0, 255))


@pytest.mark.parametrize("size", [(40, 30), (1, 90), (700, 5), (513, 600)])
def test_hidden_colours_do_not_matter(rng, size):
    """Neither does what is visible change."""
    alpha = np.where(rng.random(size) < 0.5, 0, noise(rng, *size))
    alpha[: size[0] // 2 + 1] *= rng.random(size)[: size[0] // 2 + 1] < 0.01
    alpha[-1, -1] = 200
    colors, results = noise(rng, *size, 3), []
    for hidden in (0, 255, noise(rng, *size, 3)):
        pixels = np.dstack([np.where(alpha[..., None] > 0, colors, hidden), alpha]).astype(np.uint8)
        results.append(np.asarray(read_image(Image.fromarray(pixels)).rgb))
        np.testing.assert_array_equal(results[-1][alpha > 0], colors[alpha > 0])
    np.testing.assert_array_equal(results[0], results[1])
    np.testing.assert_array_equal(results[0], results[2])


def test_hidden_parts_take_the_colours_of_what_is_near(rng):
    pixels = np.zeros((300, 400, 4), np.uint8)
    pixels[100:200, :40] = 250, 30, 20, 255
    pixels[100:200, -40:] = 10, 60, 240, 255
    rgb = np.asarray(read_image(Image.fromarray(pixels)).rgb).astype(int)
    assert np.abs(rgb[98:202, :45] - (250, 30, 20)).max() < 30
    assert np.abs(rgb[98:202, -45:] - (10, 60, 240)).max() < 30
    assert (np.diff(rgb[150, :, 0]) <= 0).all()  # from red to blue without a step back


def test_without_a_visible_pixel():
    hidden = Image.new("RGBA", (4, 3), (10, 20, 30, 0))
    picture = read_image(hidden)
    assert picture.visible.size == (4, 3)
    assert picture.rgb.getpixel((2, 1)) == (10, 20, 30)


def test_visible_part():
    pixels = np.zeros((9, 8, 4), np.uint8)
    pixels[2:5, 3:7] = 50, 60, 70, 1
    assert np.asarray(read_image(Image.fromarray(pixels)).visible).tolist() == np.full((3, 4, 3), (50, 60, 70)).tolist()
    assert read_image(pixels[..., :3]).visible.size == (8, 9)


def test_palette_with_alpha_channel():
    image = Image.new("PA", (2, 1))
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.putpixel((0, 0), (1, 77))
    picture = read_image(image)
    assert picture.rgb.getpixel((0, 0)) == (40, 50, 60)
    assert picture.alpha.getpixel((0, 0)) == 77


@pytest.mark.parametrize("mode", ["1", "L", "RGB"])
def test_transparent_colour(mode):
    image = Image.new(mode, (2, 1), 255 if mode != "RGB" else (9, 8, 7))
    image.putpixel((0, 0), 0 if mode != "RGB" else (1, 2, 3))
    stored = encoded(image, "PNG", transparency=0 if mode != "RGB" else (1, 2, 3))
    picture = read_bytes(stored)
    assert list(picture.alpha.tobytes()) == [0, 255]
    assert picture.rgb.getpixel((1, 0)) == ((9, 8, 7) if mode == "RGB" else (255, 255, 255))


@pytest.mark.parametrize(("dtype", "top"), [(np.uint8, 255), (np.uint16, 65535)])
def test_grey_tiff_in_which_zero_is_white(rng, dtype, top):
    """Turned by its EXIF orientation, too, where what the file said of it is easily lost."""
    values, file = (top * rng.random((5, 7))).astype(dtype), io.BytesIO()
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[TiffImagePlugin.PHOTOMETRIC_INTERPRETATION] = 0
    tags[ExifTags.Base.Orientation] = 3
    data = top - values if dtype == np.uint8 else values  # Pillow turns those of 8 bit itself
    Image.fromarray(data).save(file, "TIFF", tiffinfo=tags)
    expected = np.rint((top - values) * (255 / top))[::-1, ::-1]
    actual = np.asarray(read_image(file).rgb, int)[..., 0]
    assert np.abs(actual - expected).max() <= 1


def test_borders_of_a_large_painting_are_cut_off(monkeypatch):
    """Pillow's limit is not ours."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    image = Image.new("RGBA", (60, 60), (1, 2, 3, 255))
    image.paste((0, 0, 0, 0), (0, 0, 5, 60))
    assert read_image(image).visible.size == (55, 60)


def test_transparent_level_of_16_bit_grey():
    values = np.array([[1000, 1001, 65535]])
    picture = read_bytes(png_16_bit_grey(values, png_chunk(b"tRNS", struct.pack(">H", 1000))))
    assert list(picture.alpha.tobytes()) == [0, 255, 255]
    assert picture.rgb.getpixel((1, 0)) == (4, 4, 4)


@pytest.mark.parametrize("format", ["JPEG", "TIFF"])
def test_cmyk(format):
    stored = encoded(Image.new("CMYK", (8, 8), (255, 0, 0, 51)), format)
    np.testing.assert_allclose(read_bytes(stored).rgb.getpixel((3, 3)), (0, 204, 204), atol=2)


def test_ycbcr(rng):
    pixels = noise(rng, 5, 7, 3)
    picture = read_image(Image.fromarray(pixels).convert("YCbCr"))
    np.testing.assert_allclose(np.asarray(picture.rgb, int), pixels, atol=3)


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF"])
def test_an_animation_gives_its_first_frame(format):
    frames = [Image.new("RGB", (6, 4), color) for color in [(250, 10, 10), (10, 250, 10), (10, 10, 250)]]
    stored = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert opened(stored).n_frames == 3
    np.testing.assert_allclose(read_bytes(stored).rgb.getpixel((2, 2)), (250, 10, 10), atol=6)


@pytest.mark.parametrize("size", [(1, 1), (1, 50), (50, 1)])
def test_tiny_pictures(rng, size):
    pixels = noise(rng, *size, 3)
    picture = read_bytes(encoded(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(np.asarray(picture.rgb), pixels)


# --- HEIC

HEIC = Path(__file__).parents[1] / "data" / "turned.heic"  # 96 x 64 before it is turned clockwise


def test_heic_is_read_upright():
    picture = read_image(HEIC)
    assert picture.rgb.size == (64, 96) and picture.alpha is None
    corners = [picture.rgb.getpixel(place) for place in [(8, 8), (56, 8), (8, 88), (56, 88)]]
    expected = [(20, 60, 200), (200, 30, 30), (220, 210, 60), (30, 160, 40)]
    np.testing.assert_allclose(corners, expected, atol=8)


def test_heic_counts_as_a_picture_of_a_folder(tmp_path):
    (tmp_path / "IMG_1.HEIC").write_bytes(HEIC.read_bytes())
    assert find_images([tmp_path]) == [tmp_path / "IMG_1.HEIC"]


def test_limit_on_pixels_of_heic():
    with pytest.raises(ImageError) as caught:
        read_image(HEIC, max_pixels=64 * 96 - 1)
    one_line(caught, HEIC, "64x96")


def test_heic_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "pi_heif", None)
    with pytest.raises(ImageError) as caught:
        read_image(HEIC)
    one_line(caught, HEIC, "HEIC", "pip install pi-heif")


@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_truncated_heic(tmp_path, kept):
    path, data = tmp_path / "photo.heic", HEIC.read_bytes()
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    one_line(caught, path)


# --- bad files


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (None, "No such file"),
        (b"", "it is empty"),
        (b"a few words\n" * 40, "not a picture of a known format"),
    ],
)
def test_bad_file(tmp_path, content, reason):
    path = tmp_path / "photo.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ImageError) as caught:
        read_image(path)
    one_line(caught, path, reason, "; give")


def test_empty_stream():
    with pytest.raises(ImageError) as caught:
        read_bytes(b"")
    one_line(caught, "the stream", "empty")


def test_a_folder_is_no_picture(tmp_path):
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path)
    one_line(caught, tmp_path, "Is a directory")


def test_a_path_with_nul_is_no_picture():
    with pytest.raises(ImageError) as caught:
        read_image("a\0b.png")
    one_line(caught, "null byte")


def test_permission_denied(monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(images, "open", denied, raising=False)
    with pytest.raises(ImageError) as caught:
        read_image("photo.jpg")
    one_line(caught, "photo.jpg", "Permission denied")


@pytest.mark.parametrize("format", ["JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_truncated_file(rng, tmp_path, format, kept):
    path = tmp_path / "photo"
    data = encoded(Image.fromarray(noise(rng, 64, 64, 3)), format)
    path.write_bytes(data[: int(len(data) * kept)])
    with pytest.raises(ImageError) as caught:
        read_image(path)
    one_line(caught, path)


def test_message_of_an_odd_name_is_one_line(tmp_path):
    with pytest.raises(ImageError) as caught:
        read_image(tmp_path / "two\nlines.png")
    one_line(caught)


# --- limit on pixels


def test_too_many_pixels_are_refused_from_the_header(tmp_path):
    path = tmp_path / "bomb.png"
    path.write_bytes(png(20000, 20000, 8, 2, b"nothing to decode"))
    with pytest.raises(ImageError) as caught:
        read_image(path)
    one_line(caught, path, "20000x20000", "400000000", "100000000", "--max-pixels", "max_pixels=")


def test_the_limit_is_exact(rng):
    pixels = noise(rng, 5, 7, 3)
    for source in [pixels, Image.fromarray(pixels), io.BytesIO(encoded(Image.fromarray(pixels), "PNG"))]:
        assert read_image(source, max_pixels=35).rgb.size == (7, 5)
        with pytest.raises(ImageError) as caught:
            read_image(source, max_pixels=34)
        one_line(caught, "7x5", "35", "34")


def test_pillows_own_limit_does_not_count_and_is_kept(rng, monkeypatch):
    open_image = Image.open

    def open_slowly(*arguments, **options):
        time.sleep(0.002)  # so that the threads meet
        return open_image(*arguments, **options)

    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    monkeypatch.setattr(Image, "open", open_slowly)
    data = [encoded(Image.fromarray(noise(rng, 50, 50, 3)), format) for format in ["PNG", "WEBP", "GIF"]]
    with warnings.catch_warnings(), ThreadPoolExecutor(4) as pool:
        warnings.simplefilter("error")
        sizes = {picture.rgb.size for picture in pool.map(read_bytes, data * 10)}
    assert sizes == {(50, 50)}
    with pytest.raises(ImageError):
        read_bytes(b"not a picture")
    assert Image.MAX_IMAGE_PIXELS == 10


# --- tensors


def test_to_tensor(rng):
    pixels = noise(rng, 5, 7, 3)
    tensor = to_tensor(Image.fromarray(pixels))
    assert tensor.dtype == torch.float32
    assert tensor.is_contiguous()
    np.testing.assert_array_equal(tensor.numpy(), (pixels.transpose(2, 0, 1)[None] / np.float32(255)))


def test_to_tensor_refuses_other_modes():
    with pytest.raises(ValueError) as caught:
        to_tensor(Image.new("L", (2, 2)))
    one_line(caught, "mode L", "RGB")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_all_levels_survive_the_round_trip(dtype):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)[..., None].repeat(3, 2)
    np.testing.assert_array_equal(np.asarray(to_pil(to_tensor(Image.fromarray(pixels)).to(dtype))), pixels)


def test_to_pil_takes_any_strides_and_three_dimensions(rng):
    pixels = noise(rng, 5, 7, 3)
    tensor = to_tensor(Image.fromarray(pixels))
    strided = tensor.repeat_interleave(2, -1)[..., ::2]
    for variant in [
        tensor[0],
        tensor.to(memory_format=torch.channels_last),
        strided,
        tensor.clone().requires_grad_(),
    ]:
        np.testing.assert_array_equal(np.asarray(to_pil(variant)), pixels)
    np.testing.assert_array_equal(np.asarray(to_pil(tensor.transpose(2, 3))), pixels.swapaxes(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_to_pil_rounds_half_precision_to_nearest(rng, dtype):
    tensor = torch.from_numpy(rng.random((3, 100, 100))).to(dtype)
    expected = np.rint(tensor.double().numpy() * 255).transpose(1, 2, 0)
    np.testing.assert_array_equal(np.asarray(to_pil(tensor)), expected)


def test_to_pil_clamps_and_rounds():
    values = [-3.0, 1.7, float("inf"), -float("inf"), 100.4 / 255, 100.6 / 255]
    row = np.asarray(to_pil(torch.tensor(values).repeat(3, 1, 1)))[0, :, 0]
    assert row.tolist() == [0, 255, 255, 0, 100, 101]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_to_pil_refuses_nan(rng, dtype):
    tensor = torch.rand(1, 3, 5, 7, dtype=dtype)
    tensor.view(-1)[rng.integers(tensor.numel())] = float("nan")
    with pytest.raises(ImageError) as caught:
        to_pil(tensor)
    one_line(caught, "NaN")


@pytest.mark.parametrize(
    "tensor",
    [
        torch.zeros(2, 3, 4, 4),
        torch.zeros(1, 4, 4, 4),
        torch.zeros(4, 4),
        torch.zeros(3, 4, 4, dtype=torch.uint8),
    ],
)
def test_to_pil_refuses_other_tensors(tensor):
    with pytest.raises(ValueError) as caught:
        to_pil(tensor)
    one_line(caught, tuple(tensor.shape), tensor.dtype)


# --- resizing and colour


@pytest.mark.parametrize(
    ("size", "short", "expected"),
    [
        ((40, 20), 10, (20, 10)),
        ((20, 40), 10, (10, 20)),
        ((33, 20), 13, (21, 13)),
        ((35, 20), 13, (23, 13)),
        ((7, 7), 20, (20, 20)),
        ((1, 1), 3, (3, 3)),
        ((1, 50), 2, (2, 100)),
        ((500, 1), 1, (500, 1)),
        ((40, 20), None, (40, 20)),
    ],
)
def test_resize_short_side(size, short, expected):
    assert resize_short_side(Image.new("RGB", size), short).size == expected


def test_resize_averages_detail_and_keeps_edges_sharp():
    checkers = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)).convert("RGB")
    np.testing.assert_allclose(np.asarray(resize_short_side(checkers, 8), int), 127, atol=12)
    edge = Image.fromarray(np.repeat([64, 192], 8).astype(np.uint8)[None].repeat(16, 0)).convert("RGB")
    low, high = resize_short_side(edge, 64).getchannel("R").getextrema()
    assert low < 60  # the ringing of Lanczos
    assert high > 196


@pytest.mark.parametrize("size", [0, -3, 2.5, "512", True])
def test_resize_refuses_other_sizes(size):
    with pytest.raises(ValueError) as caught:
        resize_short_side(Image.new("RGB", (4, 4)), size)
    one_line(caught, repr(size), "give a whole number")


def test_whole_numbers():
    assert whole_number(np.int64(7), "n", "") == 7
    for value in (True, 1.0, "1", None, 0, 11):
        with pytest.raises(ValueError, match=f"^n is {value!r}; give a whole number up to 10$"):
            whole_number(value, "n", "up to 10", highest=10)


def test_transfer_color_takes_luminance_and_chroma(rng):
    # Muted colours, for which no mixture of luminance and chroma falls outside RGB.
    stylized, content = (Image.fromarray(rng.integers(100, 156, (9, 8, 3), dtype=np.uint8)) for _ in range(2))
    mixed = np.asarray(transfer_color(stylized, content).convert("YCbCr"), int)
    np.testing.assert_allclose(mixed[..., 0], np.asarray(stylized.convert("YCbCr"), int)[..., 0], atol=2)
    np.testing.assert_allclose(mixed[..., 1:], np.asarray(content.convert("YCbCr"), int)[..., 1:], atol=2)


def test_transfer_color_onto_grey_gives_the_luminance():
    mixed = transfer_color(Image.new("RGB", (2, 2), (255, 0, 0)), Image.new("RGB", (2, 2), (9, 9, 9)))
    np.testing.assert_allclose(mixed.getpixel((0, 0)), [0.299 * 255] * 3, atol=1)


def test_transfer_color_refuses_other_sizes():
    with pytest.raises(ValueError) as caught:
        transfer_color(Image.new("RGB", (4, 5)), Image.new("RGB", (5, 4)))
    one_line(caught, "(4, 5)", "(5, 4)")


# --- writing


@pytest.mark.parametrize("suffix", [".png", ".PNG", ".tiff", ".tif", ".bmp", ".ppm"])
def test_lossless_formats_round_trip(rng, tmp_path, suffix):
    pixels = noise(rng, 5, 7, 3)
    write_image(Image.fromarray(pixels), tmp_path / f"out{suffix}")
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / f"out{suffix}").rgb), pixels)
    assert os.listdir(tmp_path) == [f"out{suffix}"]


@pytest.mark.parametrize("suffix", [".jpg", ".jpeg", ".webp", ".avif", ".jp2"])
def test_lossy_formats_come_close(tmp_path, suffix):
    ramp = Image.linear_gradient("L").convert("RGB")
    write_image(ramp, tmp_path / f"out{suffix}")
    np.testing.assert_allclose(np.asarray(read_image(tmp_path / f"out{suffix}").rgb, int), np.asarray(ramp), atol=8)


@pytest.mark.parametrize("suffix", [".png", ".tiff", ".webp"])
def test_alpha_is_kept_where_the_format_has_it(rng, tmp_path, suffix):
    alpha = Image.fromarray(noise(rng, 16, 16))
    write_image(Image.new("RGB", (16, 16), (90, 90, 90)), tmp_path / f"out{suffix}", alpha=alpha)
    assert read_image(tmp_path / f"out{suffix}").alpha.tobytes() == alpha.tobytes()


@pytest.mark.parametrize("suffix", [".jpg", ".bmp", ".ppm", ".gif"])
def test_alpha_is_dropped_elsewhere(tmp_path, suffix):
    write_image(Image.new("RGB", (16, 16), (90, 90, 90)), tmp_path / f"out{suffix}", alpha=Image.new("L", (16, 16)))
    picture = read_image(tmp_path / f"out{suffix}")
    assert picture.alpha is None
    np.testing.assert_allclose(picture.rgb.getpixel((5, 5)), (90, 90, 90), atol=2)


def test_alpha_of_another_size_is_refused(tmp_path):
    with pytest.raises(ImageError):
        write_image(Image.new("RGB", (4, 4)), tmp_path / "out.png", alpha=Image.new("L", (3, 3)))
    assert os.listdir(tmp_path) == []


def test_jpeg_keeps_full_chroma(tmp_path):
    write_image(Image.new("RGB", (16, 16)), tmp_path / "out.jpg")
    layers = opened((tmp_path / "out.jpg").read_bytes()).layer
    assert {layer[1:3] for layer in layers} == {(1, 1)}


@pytest.mark.parametrize("format", ["jpg", "webp", "avif"])
def test_quality_counts(rng, format):
    image = Image.fromarray(noise(rng, 64, 64, 3))
    sizes = []
    for quality in [1, 50, 100]:
        stream = io.BytesIO()
        write_image(image, stream, format=format, quality=quality)
        sizes.append(len(stream.getvalue()))
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[2] / 2


@pytest.mark.parametrize("quality", [0, 101, -1, 9.5, "95"])
def test_other_qualities_are_refused(tmp_path, quality):
    with pytest.raises(ValueError) as caught:
        write_image(Image.new("RGB", (4, 4)), tmp_path / "out.png", quality=quality)
    one_line(caught, repr(quality), "1 to 100")


@pytest.mark.parametrize(("format", "name"), [("png", "PNG"), ("JPG", "JPEG"), ("jpeg", "JPEG"), ("WebP", "WEBP")])
def test_format_of_a_stream(format, name):
    stream = io.BytesIO()
    write_image(Image.new("RGB", (4, 4)), stream, format=format)
    assert Image.open(stream).format == name


def test_format_goes_before_the_suffix(tmp_path):
    write_image(Image.new("RGB", (4, 4)), tmp_path / "out.jpg", format="png")
    assert opened((tmp_path / "out.jpg").read_bytes()).format == "PNG"


@pytest.mark.parametrize("name", ["out.xyz", "out", "out.pdf"])
def test_unknown_suffix(tmp_path, name):
    with pytest.raises(ImageError) as caught:
        write_image(Image.new("RGB", (4, 4)), tmp_path / name)
    one_line(caught, name, ".png", ".jpg")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("format", [None, "xyz"])
def test_unknown_format_of_a_stream(format):
    stream = io.BytesIO()
    with pytest.raises(ImageError) as caught:
        write_image(Image.new("RGB", (4, 4)), stream, format=format)
    one_line(caught, "the stream", ".png")
    assert stream.getvalue() == b""


def test_a_stream_is_flushed(tmp_path):
    with open(tmp_path / "out", "wb") as file:
        write_image(Image.new("RGB", (4, 4)), file, format="png")
        assert read_image(tmp_path / "out").rgb.size == (4, 4)


def test_closed_pipe():
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "wb", buffering=0) as file, pytest.raises(ImageError) as caught:
        write_image(Image.new("RGB", (4, 4)), file, format="png")
    one_line(caught, "Broken pipe")


def test_missing_folders_are_made(tmp_path):
    write_image(Image.new("RGB", (4, 4)), str(tmp_path / "a" / "b" / "out.png"))
    assert opened((tmp_path / "a" / "b" / "out.png").read_bytes()).size == (4, 4)


@pytest.mark.parametrize("below", ["out.png", "deeper/out.png"])
def test_a_file_in_place_of_the_folder(tmp_path, below):
    (tmp_path / "file").write_bytes(b"earlier")
    target = tmp_path / "file" / below
    with pytest.raises(ImageError) as caught:
        write_image(Image.new("RGB", (4, 4)), target)
    one_line(caught, target, "a file stands where its folder should be")
    assert (tmp_path / "file").read_bytes() == b"earlier"


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_what_is_not_a_file_is_not_replaced(tmp_path, make):
    target = tmp_path / "out.png"
    make(target)
    kind = stat.S_IFMT(target.stat().st_mode)
    with pytest.raises(ImageError) as caught:
        write_image(Image.new("RGB", (4, 4)), target)
    one_line(caught, target, "not a file")
    assert stat.S_IFMT(target.stat().st_mode) == kind
    assert os.listdir(tmp_path) == ["out.png"]


def test_a_failing_encoder_keeps_the_earlier_file(tmp_path):
    target = tmp_path / "out.jpg"
    target.write_bytes(b"earlier")
    with pytest.raises(ImageError) as caught:
        write_image(Image.new("RGB", (65536, 1)), target)  # JPEG ends at 65500
    one_line(caught, target)
    assert target.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["out.jpg"]


@pytest.mark.parametrize("earlier", [None, b"earlier"])
@pytest.mark.parametrize(("module", "step"), [(os, "replace"), (Path, "write_bytes")])
def test_a_failing_disk_keeps_the_earlier_file(tmp_path, monkeypatch, earlier, module, step):
    target = tmp_path / "out.png"
    if earlier:
        target.write_bytes(earlier)

    def full(temporary, _):
        temporary.touch()
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, step, full)
        with pytest.raises(ImageError) as caught:
            write_image(Image.new("RGB", (4, 4)), target)
    one_line(caught, target, "No space left on device")
    assert os.listdir(tmp_path) == (["out.png"] if earlier else [])
    assert not earlier or target.read_bytes() == earlier


def test_an_interrupt_leaves_no_temporary_file(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_image(Image.new("RGB", (4, 4)), tmp_path / "out.png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("suffix", [".pbm", ".pgm", ".pfm", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx"])
def test_formats_for_which_pillow_would_write_another(tmp_path, suffix):
    with pytest.raises(ImageError) as caught:
        write_image(Image.new("RGB", (4, 4)), tmp_path / f"out{suffix}")
    one_line(caught, suffix, "use .png")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_new_file_follows_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        write_image(Image.new("RGB", (4, 4)), tmp_path / "out.png")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out.png").stat().st_mode) == mode


def test_a_replaced_file_keeps_its_permissions(tmp_path):
    target = tmp_path / "out.png"
    target.touch(0o640)
    target.chmod(0o640)
    write_image(Image.new("RGB", (4, 4)), target)
    assert stat.S_IMODE(target.stat().st_mode) == 0o640
    assert opened(target.read_bytes()).size == (4, 4)


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real.png").touch()
    (tmp_path / "link.png").symlink_to("real.png")
    write_image(Image.new("RGB", (4, 4)), tmp_path / "link.png")
    assert (tmp_path / "link.png").is_symlink()
    assert opened((tmp_path / "real.png").read_bytes()).size == (4, 4)


# --- finding


def test_find_images(tmp_path):
    folder = tmp_path / "in"
    (folder / "sub.png").mkdir(parents=True)
    for name in ["c.JPG", "b.png", "a.webp", ".hidden.png", "notes.txt", "sub.png/deep.png"]:
        (folder / name).touch()
    (tmp_path / "photo").touch()
    found = find_images([tmp_path / "photo", str(folder), folder / "b.png", tmp_path / "in" / ".." / "photo"])
    assert found == [tmp_path / "photo", folder / "a.webp", folder / "b.png", folder / "c.JPG"]


def test_find_images_keeps_the_given_order(tmp_path):
    paths = [tmp_path / name for name in ["b.png", "a.png", "c.png"]]
    for path in paths:
        path.touch()
    assert find_images([*paths, *reversed(paths)]) == paths


def test_find_images_names_what_is_missing(tmp_path):
    with pytest.raises(ImageError) as caught:
        find_images([tmp_path / "missing.png"])
    one_line(caught, tmp_path / "missing.png", "does not exist")


def test_find_images_names_a_folder_without_pictures(tmp_path):
    (tmp_path / "notes.txt").touch()
    (tmp_path / ".hidden.png").touch()
    with pytest.raises(ImageError) as caught:
        find_images([tmp_path])
    one_line(caught, tmp_path, "no pictures", ".png")


@pytest.mark.parametrize(("suffix", "largest"), [(".jpg", 65500), (".webp", 16383), (".avif", 65536), (".gif", 65535)])
def test_sides_that_a_format_holds(tmp_path, suffix, largest):
    write_image(Image.new("RGB", (largest, 2)), tmp_path / f"at{suffix}")
    check_sides((2, largest), f"x{suffix}")
    message = f"sides of up to {largest} pixels, and the picture is 2x{largest + 1}; write a .png"
    with pytest.raises(ImageError, match=message):
        check_sides((2, largest + 1), f"x{suffix}")
    with pytest.raises(ImageError, match=message):
        write_image(Image.new("RGB", (2, largest + 1)), tmp_path / f"over{suffix}")
    assert files(tmp_path) == [f"at{suffix}"]
