"""Exact tiling: a chain of layers computed window by window, with the same result as on the whole map.

A window of the output needs a window of the input that is larger by the layers' receptive field; only where it touches
the border of the map is anything reflected. So tiles join without seams. Memory is bounded by the tile, and tiles that
fit a processor's cache are faster than whole maps.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from math import ceil, sqrt
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]  # height, width
TILE_ELEMENTS = {"cpu": 1 << 22, "cuda": 1 << 26}  # of a chain's largest intermediate map


class Window(NamedTuple):
    """Rows top .. bottom - 1 and columns left .. right - 1 of a map."""

    top: int
    bottom: int
    left: int
    right: int

    @property
    def size(self) -> Size:
        return self.bottom - self.top, self.right - self.left

    def of(self, x: Tensor) -> Tensor:
        """This window of a (B, C, H, W) map, a view."""
        return x[:, :, self.top : self.bottom, self.left : self.right]

    def within(self, other: "Window") -> "Window":
        """The same window, counted from the corner of another."""
        return Window(self.top - other.top, self.bottom - other.top, self.left - other.left, self.right - other.left)

    def grown(self, size: Size) -> "Window":
        """One point larger on each side, as far as a map of that size goes."""
        top, left = max(0, self.top - 1), max(0, self.left - 1)
        return Window(top, min(size[0], self.bottom + 1), left, min(size[1], self.right + 1))

    def doubled(self, size: Size) -> "Window":
        """What 2 x 2 pooling of a map of that size turns into this window."""
        return Window(2 * self.top, min(size[0], 2 * self.bottom), 2 * self.left, min(size[1], 2 * self.right))

    def halved(self) -> "Window":
        """The smallest window that covers this one when upsampled by two."""
        return Window(self.top // 2, ceil(self.bottom / 2), self.left // 2, ceil(self.right / 2))

    def borders(self, size: Size) -> tuple[int, int, int, int]:
        """1 for each side (top, bottom, left, right) on the border of a map of that size, else 0."""
        return int(self.top == 0), int(self.bottom == size[0]), int(self.left == 0), int(self.right == size[1])


class Conv:
    """3x3 convolution with reflection padding, and ReLU unless told otherwise."""

    def __init__(self, weight: Tensor, bias: Tensor, relu: bool = True) -> None:
        self.weight = weight.detach().contiguous(memory_format=torch.channels_last)
        self.bias, self.relu = bias.detach(), relu
        self.channels, self.flops = len(weight), 2 * weight.numel()

    def output_size(self, size: Size) -> Size:
        return size

    def source(self, window: Window, size: Size) -> Window:
        return window.grown(size)

    def margin(self, window: Window, size: Size) -> tuple[int, int, int, int]:
        """Sides on which the input needs a row or column of reflected points."""
        return window.borders(size)

    def __call__(self, x: Tensor, source: Window, window: Window) -> Tensor:
        return F.conv2d(x, self.weight, self.bias)


class Resample:
    """A layer without weights: as many channels out as in, no margin."""

    flops = 0

    def __init__(self, channels: int, relu: bool = False) -> None:
        self.channels, self.relu = channels, relu

    def margin(self, window: Window, size: Size) -> tuple[int, int, int, int]:
        return 0, 0, 0, 0


class MaxPool(Resample):
    """2x2 maximum; a last odd row or column is pooled alone."""

    def output_size(self, size: Size) -> Size:
        return ceil(size[0] / 2), ceil(size[1] / 2)

    def source(self, window: Window, size: Size) -> Window:
        return window.doubled(size)

    def __call__(self, x: Tensor, source: Window, window: Window) -> Tensor:
        return F.max_pool2d(x, 2, ceil_mode=True)


class Upsample(Resample):
    """Twice the height and width, nearest neighbour."""

    def output_size(self, size: Size) -> Size:
        return 2 * size[0], 2 * size[1]

    def source(self, window: Window, size: Size) -> Window:
        return window.halved()

    def __call__(self, x: Tensor, source: Window, window: Window) -> Tensor:
        doubled = Window(*(2 * side for side in source))
        return window.within(doubled).of(F.interpolate(x, scale_factor=2, mode="nearest"))


class Chain:
    """Layers that follow one another, computed tile by tile.

    Args:
        layers: Conv, MaxPool and Upsample.
        channels: of the input.
    """

    def __init__(self, layers: Sequence[Conv | MaxPool | Upsample], channels: int) -> None:
        self.layers, self.channels = list(layers), channels

    def sizes(self, size: Size) -> list[Size]:
        """Height and width of the input and of every layer's output."""
        sizes = [size]
        for layer in self.layers:
            sizes.append(layer.output_size(sizes[-1]))
        return sizes

    def work(self, size: Size) -> int:
        """Floating-point operations for an input of that size."""
        sizes = self.sizes(size)[1:]
        return sum(layer.flops * height * width for layer, (height, width) in zip(self.layers, sizes, strict=True))

    def run(
        self,
        size: Size,
        read: Callable[[Window, Tensor], None],
        write: Callable[[Window, Tensor], None],
        like: Tensor,
    ) -> Iterator[int]:
        """Compute the output for an input of that size; yields the flops of every tile once it is done.

        read(window, out) fills out with a window of the input; write(window, x) takes a window of the output.
        like: a tensor of the batch size, dtype and device to compute with.
        """
        sizes = self.sizes(size)
        for window in self.tiles(sizes, like.device.type, len(like)):
            windows = [window]
            for layer, layer_size in zip(reversed(self.layers), reversed(sizes[:-1]), strict=True):
                windows.insert(0, layer.source(windows[0], layer_size))
            margins = [layer.margin(w, s) for layer, w, s in zip(self.layers, windows[1:], sizes[1:], strict=True)]
            x = with_margin(like, self.channels, windows[0].size, margins[0], lambda out, w=windows[0]: read(w, out))
            for number, layer in enumerate(self.layers):
                x = layer(x, windows[number], windows[number + 1])
                x = activate(x, layer.relu, (*margins, (0, 0, 0, 0))[number + 1])
            write(window, x)
            yield sum(layer.flops * w.size[0] * w.size[1] for layer, w in zip(self.layers, windows[1:], strict=True))

    def tiles(self, sizes: list[Size], device: str, batch: int) -> list[Window]:
        """Windows that cover the output, nearly square, of about TILE_ELEMENTS elements at the widest layer."""
        height, width = sizes[-1]
        widest = max(layer.channels * h * w for layer, (h, w) in zip(self.layers, sizes[1:], strict=True)) * batch
        count = max(1, ceil(widest / TILE_ELEMENTS[device]))
        rows = min(height, max(1, round(sqrt(count * height / width))))
        cols = min(width, ceil(count / rows))
        row_edges = [height * i // rows for i in range(rows + 1)]
        col_edges = [width * i // cols for i in range(cols + 1)]
        return [
            Window(top, bottom, left, right)
            for top, bottom in pairwise(row_edges)
            for left, right in pairwise(col_edges)
        ]


def with_margin(
    like: Tensor, channels: int, size: Size, margin: tuple[int, int, int, int], fill: Callable[[Tensor], None]
) -> Tensor:
    """A channels_last tensor of that size filled by fill(inside), and around it a margin of reflected points."""
    (height, width), (top, bottom, left, right) = size, margin
    shape = (len(like), channels, top + height + bottom, left + width + right)
    x = torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)
    fill(x[:, :, top : top + height, left : left + width])
    if left:
        x[:, :, :, 0] = x[:, :, :, 2]
    if right:
        x[:, :, :, -1] = x[:, :, :, -3]
    if top:
        x[:, :, 0] = x[:, :, 2]
    if bottom:
        x[:, :, -1] = x[:, :, -3]
    return x


def activate(x: Tensor, relu: bool, margin: tuple[int, int, int, int]) -> Tensor:
    """ReLU, if asked for, and a margin of reflected points, in one pass."""
    if not any(margin):
        return x.relu_() if relu else x
    fill = (lambda out: torch.clamp_min(x, 0, out=out)) if relu else (lambda out: out.copy_(x))
    return with_margin(x, x.shape[1], x.shape[-2:], margin, fill)
