"""Reading, writing and colour of pictures: files and arrays in, sRGB pictures and tensors out."""

import io
import math
import operator
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, SupportsIndex

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, ImageChops, ImageCms, TiffImagePlugin, UnidentifiedImageError

from a2k.files import replace_file

MAX_PIXELS = 100_000_000
FILLED_SIDE = 256  # largest of the picture from which colours spread to transparent parts

# A fixed list: others of Pillow's readers run outside programs (EPS) or accept nearly any bytes (TGA).
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "BMP", "GIF", "PPM", "AVIF", "JPEG2000")
_SUFFIXES = {suffix: name for suffix, name in Image.registered_extensions().items() if name in _FORMATS}
# Of files in which Pillow would write another format of the same family: PPM, JP2.
_NOT_WRITTEN = (".pbm", ".pgm", ".pfm", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx")
# Of phones. Pillow needs another package to read it, which need not be there; it is not written.
_HEIC_SUFFIXES = (".heic", ".heif")
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis")  # one of them is named in the first bytes of a file
_ALPHA_FORMATS = ("PNG", "WEBP", "TIFF", "AVIF", "JPEG2000")
_LARGEST_SIDES = {"JPEG": 65500, "WEBP": 16383, "AVIF": 65536, "GIF": 65535}  # pixels that they can hold
_SOME_SUFFIXES = ".png, .jpg, .webp or .tiff"
_DAMAGED_REMEDY = "convert it to 8-bit PNG, or get an undamaged copy"

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

_WHITE_IS_ZERO = "a2k white is zero"  # in the info of a picture, which turning keeps

_pillow_limit_lock = threading.Lock()


class ImageError(ValueError):
    """A picture cannot be read or written; the message is one line."""

    def __init__(self, message: str):
        super().__init__(" ".join(message.splitlines()))


@dataclass(frozen=True)
class Picture:
    """An upright picture: `rgb` in mode RGB and sRGB; `alpha` in mode L and of the same size, or None.

    Where alpha is 0, rgb has colours of what is near.
    """

    rgb: Image.Image
    alpha: Image.Image | None

    @property
    def visible(self) -> Image.Image:
        """rgb without borders that are wholly transparent."""
        if self.alpha is None:
            return self.rgb
        with _without_pillow_limit():
            return self.rgb.crop(self.alpha.getbbox())


def read_image(
    source: "str | os.PathLike | BinaryIO | Image.Image | np.ndarray | Picture",
    *,
    max_pixels: int = MAX_PIXELS,
    short_side: int | None = None,
) -> Picture:
    """Read a picture upright (EXIF) and in sRGB (ICC), with its alpha if it has one.

    `source` is a path, a binary stream, a PIL image, a uint8 array of shape (H, W, 3) in sRGB, or a Picture, which is
    returned as it is. An animation gives its first frame. 16-bit grey is scaled to 8 bits, and so are floats in [0, 1].
    With `short_side`, a JPEG file may come out at a half, a quarter or an eighth of its size, which decodes faster and
    in less memory, but with a short side of no less than that.

    Raises ImageError if the picture is missing, unreadable, damaged, or has more than `max_pixels` pixels
    (found from the header, before anything is decoded), and TypeError if `source` is none of the above.
    """
    if isinstance(source, Picture):
        return source
    if isinstance(source, Image.Image):
        return _to_picture(source, "the image", max_pixels)
    if isinstance(source, np.ndarray):
        return _to_picture(_from_array(source), "the array", max_pixels)
    if isinstance(source, (str, os.PathLike)):
        with _open_file(source) as file:
            return _to_picture(_open_image(file, source), source, max_pixels, short_side)
    if hasattr(source, "read") and not isinstance(source, io.TextIOBase):
        name = getattr(source, "name", "the stream")
        return _to_picture(_open_image(source, name), name, max_pixels, short_side)
    raise TypeError(f"source is a {type(source).__name__}; give a path, a binary stream, a PIL image or a numpy array")


def to_tensor(image: Image.Image) -> torch.Tensor:
    """Image to a contiguous float32 tensor of shape (1, 3, H, W) in [0, 1]; ValueError if it is not RGB."""
    if image.mode != "RGB":
        raise ValueError(f"image has mode {image.mode}, not RGB; convert it with read_image")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).unsqueeze(0).contiguous()
    return pixels.float().div_(255)


def to_pil(tensor: torch.Tensor) -> Image.Image:
    """Floating-point tensor of shape (1, 3, H, W) or (3, H, W) to an RGB image.

    Values are clamped to [0, 1] and rounded to the nearest of the 256 levels. Raises ValueError for another
    shape or dtype, and ImageError if a value is NaN.
    """
    shape = tuple(tensor.shape)
    if shape[:-2] not in ((1, 3), (3,)) or not tensor.is_floating_point():
        raise ValueError(f"tensor is {tensor.dtype} {shape}; give floats of shape (1, 3, H, W) or (3, H, W)")
    levels = to_levels(tensor.reshape(shape[-3:]))
    return Image.fromarray(levels.permute(1, 2, 0).contiguous().cpu().numpy())


def from_levels(pixels: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Fill out with pixels as numbers in [0, 1]: uint8 ones are divided by 255, others taken as they are."""
    return out.copy_(pixels) if pixels.is_floating_point() else out.copy_(pixels).div_(255)


def to_levels(x: torch.Tensor) -> torch.Tensor:
    """Floating-point values, clamped to [0, 1], to the nearest of the 256 levels, uint8; ImageError if one is NaN."""
    if x.isnan().any():
        raise ImageError("the result contains NaN; check the weights and the inputs, or use float32")
    return x.float().clamp(0, 1).mul_(255).round_().to(torch.uint8)


def resize_short_side(image: Image.Image, size: int | None, name: str = "size") -> Image.Image:
    """Image with its short side at `size` pixels (Lanczos), its shape kept; unchanged if `size` is None.

    Raises ValueError, which calls it `name`, if `size` is neither None nor a positive int.
    """
    size = check_size(size, name)
    return image if size is None else image.resize(with_short_side(image.size, size), Image.Resampling.LANCZOS)


def with_short_side(sides: tuple[int, int], size: int) -> tuple[int, int]:
    """Width and height of a picture once its short side is at `size` pixels."""
    width, height = (round(side * size / min(sides)) for side in sides)
    return width, height


def transfer_color(stylized: Image.Image, content: Image.Image) -> Image.Image:
    """RGB image with the luminance of `stylized` and the chroma of `content`.

    This is the luminance-only transfer of Gatys et al. 2016 (arXiv 1606.05897), in YCbCr. Raises ValueError
    if the two differ in size.
    """
    if stylized.size != content.size:
        raise ValueError(f"stylized is {stylized.size} and content {content.size}; resize one to the other")
    luminance = stylized.convert("YCbCr").getchannel("Y")
    _, blue, red = content.convert("YCbCr").split()
    return Image.merge("YCbCr", (luminance, blue, red)).convert("RGB")


def write_image(
    image: Image.Image,
    target: str | os.PathLike | BinaryIO,
    *,
    alpha: Image.Image | None = None,
    quality: int = 95,
    format: str | None = None,
) -> None:
    """Write an RGB image to a path, whose missing folders are made, or to a binary stream.

    `format` is a suffix without its dot, such as "png"; it defaults to the suffix of the path, and a stream
    needs it. `alpha` (mode L, the image's size) is left out where the format cannot hold it, as in JPEG.
    `quality` (1 to 100) counts for JPEG, WebP and AVIF. A file appears whole or not at all: if writing fails,
    an earlier file of that name is kept.

    Raises ImageError if the format is unknown or cannot hold so large a picture, or if writing fails, ValueError if
    `quality` is out of range.
    """
    quality = check_quality(quality)
    is_path = isinstance(target, (str, os.PathLike))
    name = target if is_path else getattr(target, "name", "the stream")
    encoder = _format_of(target if is_path else "", format, name)
    _check_sides(image.size, encoder, name)
    try:
        data = _encode(image, alpha if encoder in _ALPHA_FORMATS else None, encoder, quality)
        if is_path:
            replace_file(target, lambda path: Path(path).write_bytes(data))
        else:
            target.write(data)
            target.flush()
    except (FileExistsError, NotADirectoryError) as error:
        raise ImageError(
            f"cannot write {name}: a file stands where its folder should be; choose another path"
        ) from error
    except Exception as error:  # Pillow's encoders raise errors of many kinds
        raise ImageError(f"cannot write {name}: {_reason(error)}; choose another path or format") from error


def whole_number(value: SupportsIndex, name: str, remedy: str, highest: float = math.inf) -> int:
    """The value, of whatever type of whole numbers, as an int. Raises ValueError unless it is from 1 to `highest`."""
    try:
        number = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = 0
    if not 1 <= number <= highest:
        raise ValueError(f"{name} is {value!r}; give a whole number {remedy}")
    return number


def check_size(size: SupportsIndex | None, name: str = "size") -> int | None:
    """The size as an int. Raises ValueError, which calls it `name`, if it is neither None nor a positive int."""
    return None if size is None else whole_number(size, name, "of pixels of at least 1, or None")


def check_quality(quality: SupportsIndex) -> int:
    """The quality as an int. Raises ValueError if `write_image` would not take it."""
    return whole_number(quality, "quality", "from 1 to 100", highest=100)


def check_suffix(path: str | os.PathLike) -> None:
    """Raises ImageError if `write_image` knows no format for a file of that name."""
    _format_of(path, None, path)


def check_sides(sides: tuple[int, int], path: str | os.PathLike) -> None:
    """Raises ImageError if the format of a file of that name cannot hold a picture of that width and height."""
    _check_sides(sides, _format_of(path, None, path), path)


def result_stem(photo: str, painting: str) -> str:
    """Name, without extension, of a photo redrawn in the manner of a painting, from both their names."""
    return f"{photo}_stylized_{painting}"


def find_images(paths: Iterable[str | os.PathLike]) -> list[Path]:
    """The files among `paths` as they are, and for each folder its pictures, sorted by name, each once.

    Folders are not searched deeper, and their hidden files are left out. Raises ImageError for a path that
    is empty or does not exist and for a folder that cannot be listed or has no pictures.
    """
    found: dict[str, Path] = {}
    for path in paths:
        if not os.fspath(path):
            raise ImageError("the path of a picture or folder is empty; give one")
        path = Path(path)
        if not os.path.exists(path):
            raise ImageError(f"{path} does not exist; check the path")
        for file in _images_in(path) if path.is_dir() else [path]:
            found.setdefault(os.path.abspath(file), file)
    return list(found.values())


def _images_in(folder: Path) -> list[Path]:
    try:
        files = sorted(file for file in folder.iterdir() if file.is_file())
    except OSError as error:
        raise ImageError(f"cannot list {folder}: {_reason(error)}") from error
    suffixes = (*_SUFFIXES, *_HEIC_SUFFIXES)
    images = [file for file in files if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    if not images:
        raise ImageError(f"{folder} has no pictures in it; name a folder with {_SOME_SUFFIXES} files")
    return images


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _open_file(path: str | os.PathLike) -> BinaryIO:
    try:
        return open(path, "rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise ImageError(f"cannot read {path}: {_reason(error)}; give the path of a picture") from error


@contextmanager
def _without_pillow_limit() -> Iterator[None]:
    """Switch off Pillow's own limit on pixels, which is global, while a header is read or a picture cropped."""
    with _pillow_limit_lock:
        limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            yield
        finally:
            Image.MAX_IMAGE_PIXELS = limit


def _open_image(file: BinaryIO, name: object) -> Image.Image:
    """Read the header of a picture."""
    try:
        if not file.seekable():
            file = io.BytesIO(file.read())
        file.seek(0)
        start = file.read(32)
        file.seek(0)
        if start[4:8] == b"ftyp" and any(brand in start for brand in _HEIC_BRANDS):
            from pi_heif import HeifImageFile

            return HeifImageFile(file)
        with _without_pillow_limit():
            return Image.open(file, formats=tuple(set(_SUFFIXES.values())))
    except UnidentifiedImageError as error:
        found = "not a picture of a known format" if start else "empty"
        raise ImageError(f"cannot read {name}: it is {found}; give a {_SOME_SUFFIXES} file") from error
    except ImportError as error:
        raise ImageError(f"cannot read {name}: it is HEIC; pip install pi-heif, or convert it to JPEG") from error
    except Exception as error:  # Pillow's readers raise errors of many kinds for damaged files
        raise ImageError(f"cannot read {name}: {_reason(error)}; {_DAMAGED_REMEDY}") from error


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3:
        raise ImageError(f"the array is {array.dtype} of shape {array.shape}; give uint8 of shape (H, W, 3)")
    return Image.fromarray(array)


def _to_picture(image: Image.Image, name: object, max_pixels: int, short_side: int | None = None) -> Picture:
    width, height = image.size
    if width * height > max_pixels:
        raise ImageError(
            f"{name} is {width}x{height}, {width * height} pixels, over the limit of {max_pixels}; "
            "shrink it or raise the limit (max_pixels=, a2k stylize --max-pixels)"
        )
    if width * height == 0:
        raise ImageError(f"{name} is {width}x{height} and so has no pixels; give another")
    try:
        if short_side is not None and image.format == "JPEG":
            image.draft(None, (short_side, short_side))
        image.load()
        if _is_white_zero(image):
            image.info[_WHITE_IS_ZERO] = True
        image = _to_upright(image)
        rgb, alpha = _to_srgb(image), _alpha_of(image)
        return Picture(rgb if alpha is None else fill_hidden(rgb, alpha), alpha)
    except Exception as error:  # Pillow's decoders raise errors of many kinds for damaged files
        raise ImageError(f"cannot read {name}: {_reason(error)}; {_DAMAGED_REMEDY}") from error


def _is_white_zero(image: Image.Image) -> bool:
    """Whether the values of a TIFF's 16-bit grey or floats go from white to black, which Pillow passes over."""
    tags = getattr(image, "tag_v2", {})
    return image.mode.startswith(("I", "F")) and tags.get(TiffImagePlugin.PHOTOMETRIC_INTERPRETATION) == 0


def _to_upright(image: Image.Image) -> Image.Image:
    """Image turned as its EXIF orientation says; damaged EXIF data is ignored.

    ImageOps.exif_transpose is no help here: it fails where any other field is damaged.
    """
    try:
        turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:  # as for the decoders
        turn = None
    return image if turn is None else image.transpose(turn)


def _alpha_of(image: Image.Image) -> Image.Image | None:
    if not image.has_transparency_data:
        return None
    if image.mode.startswith("I"):  # Pillow has no conversion from 16-bit grey with a transparent level
        opaque = np.asarray(image) != image.info["transparency"]
        return Image.fromarray(opaque.astype(np.uint8) * 255)
    return image.convert("RGBA").getchannel("A")


def fill_hidden(rgb: Image.Image, alpha: Image.Image) -> Image.Image:
    """rgb with colours of what is near where alpha is 0.

    What programs leave there, black or white mostly, would else count for a photo's contrast and a painting's colours.
    """
    least, most = alpha.getextrema()
    if least > 0 or most == 0:
        return rgb
    factor = math.ceil(max(rgb.size) / FILLED_SIDE)
    channels = [*(ImageChops.multiply(channel, alpha) for channel in rgb.split()), alpha]
    small = [torch.from_numpy(np.array(channel.convert("F").reduce(factor))) for channel in channels]
    colors, weight = torch.stack(small)[None].split((3, 1), 1)
    filling = to_pil(spread(colors, weight)).resize(rgb.size, Image.Resampling.BILINEAR)
    return Image.composite(rgb, filling, alpha.point(lambda level: 255 * (level > 0)))


def spread(colors: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean colours, those of larger and larger surroundings where nothing has weight (pull and push, Gortler et al.
    1996, section 3.4). colors: (B, C, H, W), each times its weight; weight: (B, 1, H, W), not zero everywhere.
    """
    if weight.min() > 0:
        return colors / weight
    surroundings = spread(*(F.avg_pool2d(x, 2, ceil_mode=True) for x in (colors, weight)))
    surroundings = F.interpolate(surroundings, size=weight.shape[2:], mode="bilinear")
    return torch.where(weight > 0, colors / weight, surroundings)


def _to_srgb(image: Image.Image) -> Image.Image:
    """RGB copy in sRGB, without metadata, which would otherwise be written out again."""
    base = _to_base_mode(image)
    rgb = _apply_profile(base, image.info.get("icc_profile")) or base.convert("RGB")
    rgb.info = {}
    return rgb


def _to_base_mode(image: Image.Image) -> Image.Image:
    """8-bit L, CMYK or RGB: the modes that colour profiles describe."""
    if image.mode.startswith(("I", "F")):
        return _to_8_bit(image)
    if image.mode in ("1", "L", "LA"):
        return image.convert("L")
    if image.mode == "P":
        return image.convert("RGBA").convert("RGB")  # straight to RGB, Pillow warns of the lost transparency
    return image if image.mode == "CMYK" else image.convert("RGB")


def _to_8_bit(image: Image.Image) -> Image.Image:
    """Grey of 16 bits, or of floats in [0, 1], to L; Pillow's own conversion clips at 255."""
    top = 1 if image.mode == "F" else 65535
    values = np.asarray(image)
    low, high = values.min(), values.max()
    if not (low >= 0 and high <= top):
        raise ImageError(f"its values go from {low} to {high}, outside 0 to {top}")
    levels = np.rint(values * np.float32(255 / top)).astype(np.uint8)
    return Image.fromarray(255 - levels if image.info.get(_WHITE_IS_ZERO) else levels)


def _apply_profile(image: Image.Image, icc: bytes | None) -> Image.Image | None:
    """RGB image in sRGB, or None if there is no profile or it is broken or made for other modes."""
    if not icc:
        return None
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        if image.mode == "L" and profile.profile.xcolor_space == "RGB ":
            image = image.convert("RGB")
        return ImageCms.profileToProfile(image, profile, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (OSError, ImageCms.PyCMSError):
        return None


def _format_of(target: str | os.PathLike, format: str | None, name: object) -> str:
    suffix = f".{format}" if format else Path(target).suffix
    if suffix.lower() not in _SUFFIXES or suffix.lower() in _NOT_WRITTEN:
        raise ImageError(f"cannot write {name}: format {suffix!r} is not known; use {_SOME_SUFFIXES}")
    return _SUFFIXES[suffix.lower()]


def _check_sides(sides: tuple[int, int], encoder: str, name: object) -> None:
    largest = _LARGEST_SIDES.get(encoder, math.inf)
    if max(sides) > largest:
        raise ImageError(
            f"cannot write {name}: {encoder} holds sides of up to {largest} pixels, and the picture is "
            f"{sides[0]}x{sides[1]}; write a .png or .tiff, or make it smaller (--size, size=)"
        )


def _encode(image: Image.Image, alpha: Image.Image | None, encoder: str, quality: int) -> bytes:
    options = {
        "JPEG": {"quality": quality, "subsampling": "4:4:4"},
        "WEBP": {"quality": quality},
        "AVIF": {"quality": quality},
    }
    if alpha is not None:
        image = Image.merge("RGBA", (*image.split(), alpha))
    data = io.BytesIO()
    image.save(data, encoder, **options.get(encoder, {}))
    return data.getvalue()
