"""Redrawing pictures with a trained network: files, PIL images or arrays in, PIL images out."""

import math
import os
import secrets
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from a2k.checkpoint import bundled_names, find_weights, load_model
from a2k.images import MAX_PIXELS, ImageError, Picture, check_size, read_image, resize_short_side, transfer_color
from a2k.inference import CompiledStyA2K, FusedStyA2K
from a2k.model import StyA2K
from a2k_kernels.products import multiplies_bfloat16

ImageSource = str | os.PathLike | BinaryIO | Image.Image | np.ndarray | Picture
DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True)
class Style:
    """A style as `StyleTransfer.encode_style` prepares it, for use with that StyleTransfer."""

    keys: Sequence
    network_id: str = field(repr=False)


class StyleTransfer:
    """A network ready to redraw pictures.

    Args:
        weights: name of a bundled model ("a2k-lite"), path of a checkpoint, or a StyA2K network, which is copied.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "float32", "float16" or "bfloat16", of the computation; torch's own too. By default float32, but for
            bundled models bfloat16 on processors that multiply it, see `default_dtype`.
        backend: of the attention operations, see `a2k_kernels`; None is automatic, or what a given network has.
        max_pixels: pictures larger than this are refused.
        max_memory: bytes that feature maps may take in memory; what does not fit goes to temporary files. By default
            what is free.
        compile: run the network through torch.compile. Every new size of picture is then compiled first, and the
            picture must fit into memory as a whole.

    Raises:
        WeightsError: the weights are missing or damaged. ValueError: device, dtype or limit cannot be had.
    """

    def __init__(
        self,
        weights: str | os.PathLike | StyA2K = "a2k-lite",
        device: str = "auto",
        dtype: str | torch.dtype | None = None,
        backend: str | None = None,
        max_pixels: int = MAX_PIXELS,
        max_memory: int | None = None,
        compile: bool = False,
    ) -> None:
        self.device = choose_device(device)
        self.dtype = default_dtype(weights, self.device) if dtype is None else choose_dtype(dtype)
        if not in_range(max_pixels, math.inf):
            raise ValueError(f"max_pixels is {max_pixels!r}; give a number of at least 0")
        if max_memory is not None and not in_range(max_memory, math.inf):
            raise ValueError(f"max_memory is {max_memory!r}; give a number of bytes of at least 0, or None")
        self.max_pixels = max_pixels
        given = isinstance(weights, StyA2K)
        model = copy_model(weights, backend) if given else load_model(find_weights(weights), backend)
        self.model = model.to(self.device, self.dtype, memory_format=torch.channels_last).eval()
        self._prepare = CompiledStyA2K if compile else partial(FusedStyA2K, max_memory=max_memory)
        self._network = self._prepare(self.model)
        self._id = secrets.token_hex(16)  # copies, also in other processes, can use its styles

    def __getstate__(self) -> dict:
        """To be copied or pickled: without what is prepared of the weights, which oneDNN keeps to itself."""
        return {name: value for name, value in vars(self).items() if name != "_network"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._network = self._prepare(self.model)

    def encode_style(self, style: ImageSource, *, style_size: int | None = None, progress: bool = False) -> Style:
        """Prepare a style once for many contents. Arguments and errors as for `stylize`."""
        painting = self._resize(read_image(style, max_pixels=self.max_pixels).visible, style_size, "style_size")
        with self._bar("style", painting.size, None, progress) as bar, self._without_autocast():
            return Style(self._network.encode_style(self._tensor([painting]), bar.update), self._id)

    def stylize(
        self,
        content: ImageSource,
        style: ImageSource | Style,
        *,
        strength: float = 1.0,
        size: int | None = None,
        style_size: int | None = None,
        preserve_color: bool = False,
        progress: bool = False,
    ) -> Image.Image:
        """Redraw content in the manner of style.

        Args:
            content, style: path, binary stream, PIL image or HxWx3 uint8 array of any size and aspect; style also what
                `encode_style` returned. Transparent borders of a painting are cut off.
            strength: from 0 (the style has no influence) to 1.
            size, style_size: resize so that the short side has so many pixels; None leaves the picture as it is.
            preserve_color: keep the content's colours and take only the brightness of the result.
            progress: show a bar on stderr.

        Returns:
            A picture of the content's size (after `size`), RGB, or RGBA if the content has transparency.

        Raises:
            ImageError: a picture cannot be read or grows too large. ValueError: a number is out of range.
        """
        options = {"strength": strength, "size": size, "style_size": style_size}
        return self.stylize_batch([content], style, **options, preserve_color=preserve_color, progress=progress)[0]

    def stylize_batch(
        self,
        contents: Sequence[ImageSource],
        style: ImageSource | Style,
        *,
        strength: float = 1.0,
        size: int | None = None,
        style_size: int | None = None,
        preserve_color: bool = False,
        progress: bool = False,
    ) -> list[Image.Image]:
        """Redraw several contents in the manner of one style; those of equal size are computed together.

        Arguments, results and errors as for `stylize`. On a GPU small pictures are faster together.
        """
        check_strength(strength)
        if isinstance(style, Style) and (style_size is not None or style.network_id != self._id):
            raise ValueError("style was encoded at its own size by one StyleTransfer; give that one no style_size")
        pictures = [read_image(content, max_pixels=self.max_pixels) for content in contents]
        photos = [self._resize(picture.rgb, size, "size") for picture in pictures]
        if not isinstance(style, Style):
            style = self.encode_style(style, style_size=style_size, progress=progress)
        results = {}
        for equal in {photo.size for photo in photos}:
            numbers = [number for number, photo in enumerate(photos) if photo.size == equal]
            with self._bar("picture", equal, style, progress) as bar, self._without_autocast():
                batch = self._tensor([photos[number] for number in numbers])
                out = self._network.stylize(batch, style.keys, strength, bar.update)
            results |= zip(numbers, out.permute(0, 2, 3, 1).cpu().numpy(), strict=True)
        return [
            finish(Image.fromarray(results[number]), photo, picture.alpha, preserve_color)
            for number, (photo, picture) in enumerate(zip(photos, pictures, strict=True))
        ]

    def _resize(self, image: Image.Image, size: int | None, name: str) -> Image.Image:
        size = check_size(size, name)
        if size is not None:
            width, height = (side * size / min(image.size) for side in image.size)
            if width * height > self.max_pixels:
                raise ImageError(
                    f"{name}={size} makes a picture of {width * height:.0f} pixels, over the limit of "
                    f"{self.max_pixels}; lower it or raise the limit (max_pixels=, a2k stylize --max-pixels)"
                )
        return resize_short_side(image, size, name)

    def _tensor(self, images: list[Image.Image]) -> torch.Tensor:
        """uint8 (B, 3, H, W), channels_last."""
        return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).to(self.device)

    def _without_autocast(self) -> torch.autocast:
        """The dtype is this object's own."""
        return torch.autocast(self.device.type, enabled=False)

    def _bar(self, name: str, size: tuple[int, int], style: Style | None, progress: bool) -> tqdm:
        """Progress by the share of floating-point operations done."""
        work = self._network.work(size[::-1], style and style.keys)
        form = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"
        return tqdm(total=work, desc=name, bar_format=form, leave=False, disable=not progress)


def finish(out: Image.Image, photo: Image.Image, alpha: Image.Image | None, preserve_color: bool) -> Image.Image:
    """The result with the photo's colours, if asked for, and its transparency."""
    if preserve_color:
        out = transfer_color(out, photo)
    if alpha is not None:
        out.putalpha(alpha.resize(out.size, Image.Resampling.LANCZOS))
    return out


def check_strength(strength: float) -> None:
    """Raises ValueError if `StyleTransfer.stylize` would not take that strength."""
    if not in_range(strength, 1):
        raise ValueError(f"strength is {strength!r}; it must be from 0 to 1, as a number")


def in_range(value: object, highest: float) -> bool:
    """Whether it is a number from 0 to `highest`."""
    try:
        return bool(0 <= value <= highest)
    except TypeError:
        return False


def copy_model(model: StyA2K, backend: str | None) -> StyA2K:
    """A network that shares nothing with the model, which may be in training; backend, if given, takes its place."""
    model = deepcopy(model)
    if backend is not None:
        for module in (model.a2k3, model.a2k4, model.a2k5):
            module.backend = backend
    return model


def choose_device(device: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one. Raises ValueError if it cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        if chosen.type not in ("cpu", "cuda"):
            raise ValueError("only cpu and cuda are supported")
        torch.empty(1, device=chosen).cpu()
    except Exception as error:  # PyTorch raises errors of many kinds, some of a thousand words
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {device!r} cannot be used ({reason}); choose 'auto' or 'cpu'") from None
    return chosen


def choose_dtype(dtype: str | torch.dtype) -> torch.dtype:
    """The dtype of that name. Raises ValueError if it is not one of DTYPES."""
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    return getattr(torch, name)


def default_dtype(weights: str | os.PathLike | StyA2K, device: torch.device) -> torch.dtype:
    """bfloat16 for bundled networks on a processor that multiplies it, float32 otherwise.

    There it takes about two thirds of the time, and pictures hardly change: see the model card.
    """
    bundled = not isinstance(weights, StyA2K) and str(weights) in bundled_names()
    return torch.bfloat16 if bundled and device.type == "cpu" and multiplies_bfloat16() else torch.float32
