"""Redrawing pictures with a trained network: files, PIL images or arrays in, PIL images out."""

import os
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from a2k.checkpoint import find_weights, load_model
from a2k.images import MAX_PIXELS, ImageError, read_image, resize_short_side, to_pil, to_tensor, transfer_color
from a2k.model import StyA2K

ImageSource = str | os.PathLike | BinaryIO | Image.Image | np.ndarray
DTYPES = ("float32", "float16", "bfloat16")


class StyleTransfer:
    """A network ready to redraw pictures.

    Args:
        weights: name of a bundled model ("a2k-lite"), path of a checkpoint, or a StyA2K network.
        device: "auto" (a GPU if there is one), "cpu", "cuda", "cuda:1", ...
        dtype: "float32" (default), "float16" or "bfloat16", of the computation.
        backend: of the attention operations, see `a2k_kernels`.
        max_pixels: pictures larger than this are refused.

    Raises:
        WeightsError: the weights are missing or damaged. ValueError: device or dtype cannot be had.
    """

    def __init__(
        self,
        weights: str | os.PathLike | StyA2K = "a2k-lite",
        device: str = "auto",
        dtype: str | None = None,
        backend: str | None = None,
        max_pixels: int = MAX_PIXELS,
    ) -> None:
        self.device = choose_device(device)
        self.dtype = choose_dtype(dtype)
        self.max_pixels = max_pixels
        model = weights if isinstance(weights, StyA2K) else load_model(find_weights(weights), backend=backend)
        self.model = model.to(self.device, self.dtype, memory_format=torch.channels_last).eval()

    def stylize(
        self,
        content: ImageSource,
        style: ImageSource,
        *,
        strength: float = 1.0,
        size: int | None = None,
        style_size: int | None = None,
        preserve_color: bool = False,
    ) -> Image.Image:
        """Redraw content in the manner of style.

        Args:
            content, style: path, binary stream, PIL image or HxWx3 uint8 array of any size and aspect.
            strength: from 0 (the style has no influence) to 1.
            size, style_size: resize so that the short side has so many pixels; None leaves the picture as it is.
            preserve_color: keep the content's colours and take only the brightness of the result.

        Returns:
            A picture of the content's size (after `size`), RGB, or RGBA if the content has transparency.

        Raises:
            ImageError: a picture cannot be read or grows too large. ValueError: a number is out of range.
        """
        if not 0 <= strength <= 1:
            raise ValueError(f"strength is {strength}; it must be from 0 to 1")
        content = read_image(content, max_pixels=self.max_pixels)
        photo = self._resize(content.rgb, size, "size")
        painting = self._resize(read_image(style, max_pixels=self.max_pixels).rgb, style_size, "style_size")
        with torch.inference_mode():
            out = to_pil(self.model(self._tensor(photo), self._tensor(painting), strength))
        if preserve_color:
            out = transfer_color(out, photo)
        if content.alpha is not None:
            out.putalpha(content.alpha.resize(out.size, Image.Resampling.LANCZOS))
        return out

    def _resize(self, image: Image.Image, size: int | None, name: str) -> Image.Image:
        if isinstance(size, int) and size > 0:
            width, height = (side * size / min(image.size) for side in image.size)
            if width * height > self.max_pixels:
                raise ImageError(
                    f"{name}={size} makes a picture of {width * height:.0f} pixels, over the limit of "
                    f"{self.max_pixels}; lower it or raise the limit (--max-pixels, max_pixels=)"
                )
        return resize_short_side(image, size, name)

    def _tensor(self, image: Image.Image) -> torch.Tensor:
        return to_tensor(image).to(self.device, self.dtype, memory_format=torch.channels_last)


def choose_device(device: str) -> torch.device:
    """The device of that name; "auto" is a GPU if there is one. Raises ValueError if it cannot be used."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen).cpu()
    except Exception as error:  # PyTorch raises errors of many kinds, some of a thousand words
        reason = str(error).splitlines()[0].split(". ")[0]
        raise ValueError(f"device {device!r} cannot be used ({reason}); choose 'auto' or 'cpu'") from None
    return chosen


def choose_dtype(dtype: str | None) -> torch.dtype:
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
    return getattr(torch, dtype or "float32")
