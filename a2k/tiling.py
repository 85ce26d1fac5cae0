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

from a2k.convolution import BY_OUTPUTS
from a2k.winograd import Winograd, pays

Size = tuple[int, int]  # height, width
Margin = tuple[int, int, int, int]  # 1 or 0 for each side: top, bottom, left, right
NO_MARGIN: Margin = (0, 0, 0, 0)
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

    def borders(self, size: Size) -> Margin:
        """1 for each side on the border of a map of that size, else 0."""
        return int(self.top == 0), int(self.bottom == size[0]), int(self.left == 0), int(self.right == size[1])


class Conv:
    """3x3 convolution with reflection padding, and ReLU unless told otherwise."""

    mirror = 2  # the padding repeats the row (or column) so far from it

    def __init__(self, weight: Tensor, bias: Tensor, relu: bool = True) -> None:
        weight, bias = weight.detach(), bias.detach()
        self.channels, self.flops, self.relu = len(weight), 2 * weight.numel(), relu
        self.convolve = convolution(weight, bias)

    def output_size(self, size: Size) -> Size:
        return size

    def source(self, window: Window, size: Size) -> Window:
        """The window of an input of that size that a window of the output needs."""
        return window.grown(size)

    def margin(self, window: Window, size: Size) -> Margin:
        """Sides on which the input must be padded, for a window of an output of that size."""
        return window.borders(size)

    def __call__(self, x: Tensor, window: Window, out: Tensor | None = None) -> Tensor:
        """The window of the output from its source with the margin; fills out if there is one."""
        return self.convolve(x, self.relu, out)


class Direct:
    """torch's convolution, by the interface of `Winograd`."""

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.weight, self.bias = weight.contiguous(memory_format=torch.channels_last), bias

    def __call__(self, x: Tensor, relu: bool, out: Tensor | None = None) -> Tensor:
        x = F.conv2d(x, self.weight, self.bias)
        if out is None:
            return x.relu_() if relu else x
        return torch.clamp_min(x, 0, out=out) if relu else out.copy_(x)


class FewOutputs:
    """A convolution to few channels, by the interface of `Winograd`: outputs of points in a row are channels of one.

    A processor computes 16 channels at a time: with 3 most go to waste, with 3 for each of 4 points few. The wider
    kernel's zeros cost less than that.
    """

    GROUP = 4  # points in a row

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        self.taps, self.single = weight.shape[3], Direct(weight, bias)
        grouped = weight.new_zeros(self.GROUP, *weight.shape[:3], self.taps + self.GROUP - 1)
        for place, kernel in enumerate(grouped):
            kernel[..., place : place + self.taps] = weight
        self.weight = grouped.flatten(0, 1).contiguous(memory_format=torch.channels_last)
        self.bias = bias.repeat(self.GROUP)

    def __call__(self, x: Tensor, relu: bool, out: Tensor | None = None) -> Tensor:
        height, width = (length - self.taps + 1 for length in x.shape[2:])
        out = new_map(x, len(self.single.weight), (height, width)) if out is None else out
        in_groups = width // self.GROUP * self.GROUP
        if in_groups:
            grouped = F.conv2d(x, self.weight, self.bias, stride=(1, self.GROUP)).permute(0, 2, 3, 1)
            points = grouped.reshape(len(x), height, in_groups, -1).permute(0, 3, 1, 2)
            target = out[..., :in_groups]
            torch.clamp_min(points, 0, out=target) if relu else target.copy_(points)
        if in_groups < width:
            self.single(x[..., in_groups:], relu, out[..., in_groups:])
        return out


def convolution(weight: Tensor, bias: Tensor) -> Winograd | FewOutputs | Direct:
    """The fastest on the weight's device: a function (x, relu, out or None) that fills and returns out or a new map."""
    if pays(weight):
        return Winograd(weight, bias)
    few = weight.device.type == "cpu" and len(weight) * FewOutputs.GROUP <= 16
    return FewOutputs(weight, bias) if few else Direct(weight, bias)


class JoinConv(Conv):
    """3x3 convolution whose sum, before ReLU, has another map added: what it makes of further input channels."""

    def __init__(self, conv: Conv, start: Callable[[Window], Tensor]) -> None:
        vars(self).update(vars(conv))
        self.start = start

    def __call__(self, x: Tensor, window: Window, out: Tensor | None = None) -> Tensor:
        x = self.convolve(x, False, out).add_(self.start(window))
        return x.relu_() if self.relu else x


class UpsampleConv(Conv):
    """Nearest upsampling by two, then a 3x3 convolution with reflection padding: 2x2 convolutions of the small map.

    An upsampled row and its two neighbours are copies of only two rows of the small map, so rows of the kernel add
    up: for even rows to (k_0, k_1 + k_2) on the rows above and here, for odd ones to (k_0 + k_1, k_2) on the rows here
    and below. Likewise columns. The four kernels are computed as one convolution, with 4/9 of the operations.
    """

    mirror = 1
    # Places come in pairs, of one position of the kernels in the small map: the taps of both, and the first place.
    taps, first = BY_OUTPUTS[::-1], 1

    def __init__(self, weight: Tensor, bias: Tensor, relu: bool = True) -> None:
        weight, channels = weight.detach().float(), len(weight)
        taps = weight.new_tensor(self.taps)
        kernels = torch.einsum("oijk,ryj,cxk->rcoiyx", weight, taps, taps)
        super().__init__(kernels.flatten(0, 2).to(bias.dtype), bias.repeat(4), relu)
        self.channels, self.flops = channels, self.flops // 4

    def output_size(self, size: Size) -> Size:
        return 2 * size[0], 2 * size[1]

    def source(self, window: Window, size: Size) -> Window:
        top, left = max(0, (window.top - 1) // 2), max(0, (window.left - 1) // 2)
        return Window(top, min(size[0], window.bottom // 2 + 1), left, min(size[1], window.right // 2 + 1))

    def __call__(self, x: Tensor, window: Window, out: Tensor | None = None) -> Tensor:
        quarters = super().__call__(x, window).permute(0, 2, 3, 1).unflatten(3, (2, 2, -1))  # rows, columns of pairs
        out = new_map(x, self.channels, window.size) if out is None else out
        for row in self.pairs(window.top, window.bottom):
            for col in self.pairs(window.left, window.right):
                part = out[:, :, row.places, col.places].permute(0, 2, 3, 1)
                pairs = part.unflatten(2, (-1, col.count)).unflatten(1, (-1, row.count))
                pairs.copy_(quarters[:, row.positions, col.positions, row.of_pair, col.of_pair].transpose(2, 3))
        return out

    def pairs(self, start: int, end: int) -> Iterator["Pairs"]:
        """Places start .. end - 1: the second of a pair whose first is before them, whole pairs, a first alone."""
        lone = (start - self.first) % 2
        whole = (end - start - lone) // 2
        if lone:
            yield Pairs(slice(0, 1), slice(0, 1), slice(1, 2), 1)
        if whole:
            yield Pairs(slice(lone, lone + 2 * whole), slice(lone, lone + whole), slice(0, 2), 2)
        if lone + 2 * whole < end - start:
            yield Pairs(slice(lone + 2 * whole, None), slice(lone + whole, lone + whole + 1), slice(0, 1), 1)


class Pairs(NamedTuple):
    """Places in a window, positions of the kernels for them, and which of every pair they are: so many of two."""

    places: slice
    positions: slice
    of_pair: slice
    count: int


class SmoothUpsampleConv(UpsampleConv):
    """Bilinear upsampling by two, then a 3x3 convolution whose padding repeats the border: 3x3 convolutions of the
    small map, one for each of the four places that an upsampled point can have.
    """

    # Even points are 1/4 of the one above and 3/4 of the one here, odd ones 3/4 of that and 1/4 of the one below.
    taps = (
        ((3 / 4, 1 / 4, 0), (1 / 4, 3 / 4, 3 / 4), (0, 0, 1 / 4)),
        ((1 / 4, 0, 0), (3 / 4, 3 / 4, 1 / 4), (0, 1 / 4, 3 / 4)),
    )
    first = 0

    def source(self, window: Window, size: Size) -> Window:
        return window.halved().grown(size)

    def margin(self, window: Window, size: Size) -> Margin:
        return window.halved().borders((size[0] // 2, size[1] // 2))


class MaxPool:
    """2x2 maximum; a last odd row or column is pooled alone."""

    mirror, flops = 0, 0

    def __init__(self, channels: int, relu: bool) -> None:
        self.channels, self.relu = channels, relu

    def output_size(self, size: Size) -> Size:
        return ceil(size[0] / 2), ceil(size[1] / 2)

    def source(self, window: Window, size: Size) -> Window:
        return window.doubled(size)

    def margin(self, window: Window, size: Size) -> Margin:
        return NO_MARGIN

    def __call__(self, x: Tensor, window: Window, out: Tensor | None = None) -> Tensor:
        x = max_pool(x)
        if out is None:
            return x.relu_() if self.relu else x
        return torch.clamp_min(x, 0, out=out) if self.relu else out.copy_(x)


def max_pool(x: Tensor) -> Tensor:
    """2x2 maximum. On a processor two maxima of every other row and column are faster than torch's pooling, which finds
    the places of the maxima too.
    """
    if x.device.type == "cuda" or any(length % 2 for length in x.shape[2:]):
        return F.max_pool2d(x, 2, ceil_mode=True)
    rows = torch.maximum(x[:, :, ::2], x[:, :, 1::2])
    return torch.maximum(rows[..., ::2], rows[..., 1::2])


def tile_elements(layers: Sequence[Conv | MaxPool], device: str) -> int:
    """Of the largest map within a tile; more where the weights are many, as they are read anew for every tile."""
    return max(TILE_ELEMENTS[device], sum(layer.flops for layer in layers))


class Chain:
    """Layers that follow one another, computed tile by tile.

    Args:
        layers: convolutions (Conv and its subclasses) and MaxPool.
        channels: of the input.
    """

    def __init__(self, layers: Sequence[Conv | MaxPool], channels: int) -> None:
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
            outputs = windows[1:]
            margins = [layer.margin(*to) for layer, *to in zip(self.layers, outputs, sizes[1:], strict=True)]
            frame = Frame(like, self.channels, windows[0].size, margins[0], self.layers[0].mirror)
            read(windows[0], frame.inside)
            x = frame.reflected()
            for number, layer in enumerate(self.layers, 1):
                if number < len(self.layers) and any(margins[number]):
                    after = self.layers[number]
                    frame = Frame(like, layer.channels, windows[number].size, margins[number], after.mirror)
                    layer(x, windows[number], frame.inside)
                    x = frame.reflected()
                else:
                    x = layer(x, windows[number])
            write(window, x)
            yield sum(layer.flops * w.size[0] * w.size[1] for layer, w in zip(self.layers, outputs, strict=True))

    def tiles(self, sizes: list[Size], device: str, batch: int) -> list[Window]:
        """Windows that cover the output, nearly square, of about tile_elements elements at the widest layer."""
        height, width = sizes[-1]
        widest = max(layer.channels * h * w for layer, (h, w) in zip(self.layers, sizes[1:], strict=True)) * batch
        count = ceil(widest / tile_elements(self.layers, device))
        rows = min(height, max(1, round(sqrt(count * height / width))))
        cols = min(width, ceil(count / rows))
        row_edges = [height * i // rows for i in range(rows + 1)]
        col_edges = [width * i // cols for i in range(cols + 1)]
        return [
            Window(top, bottom, left, right)
            for top, bottom in pairwise(row_edges)
            for left, right in pairwise(col_edges)
        ]


class Frame:
    """A channels_last map with room for a margin.

    mirror: how far from a row or column of the margin the one is that it repeats.
    """

    def __init__(self, like: Tensor, channels: int, size: Size, margin: Margin, mirror: int) -> None:
        (height, width), (top, bottom, left, right) = size, margin
        self.margin, self.mirror = margin, mirror
        self.whole = new_map(like, channels, (top + height + bottom, left + width + right))
        self.inside = self.whole[:, :, top : top + height, left : left + width]

    def reflected(self) -> Tensor:
        """The map, its inside reflected into the margin."""
        (top, bottom, left, right), x, mirror = self.margin, self.whole, self.mirror
        reflect_into(x, left, right, mirror)
        reflect_into(x.mT, top, bottom, mirror)
        return x


def reflect_into(x: Tensor, left: int, right: int, mirror: int) -> None:
    """Fill those of the first and the last column of x that are margin (1 or 0), by one copy if possible."""
    last = x.shape[-1] - 1
    between = last - 2 * mirror
    if left and right and between > 0:
        x[..., ::last] = x[..., mirror : last - mirror + 1 : between]
        return
    if left:
        x[..., 0] = x[..., mirror]
    if right:
        x[..., -1] = x[..., -1 - mirror]


def new_map(like: Tensor, channels: int, size: Size) -> Tensor:
    """An uninitialised channels_last map, of like's batch size, dtype and device."""
    shape = (len(like), channels, *size)
    return torch.empty(shape, dtype=like.dtype, device=like.device, memory_format=torch.channels_last)


def upsampled(x: Tensor, window: Window) -> Tensor:
    """A window of a map upsampled by two, nearest neighbour."""
    source = window.halved()
    doubled = Window(*(2 * edge for edge in source))
    return window.within(doubled).of(F.interpolate(source.of(x), scale_factor=2, mode="nearest"))


def layer_window(layer: Conv, x: Tensor, window: Window, like: Tensor) -> Tensor:
    """A window of the output of one layer; x: its whole input."""
    size = tuple(x.shape[-2:])
    source, margin = layer.source(window, size), layer.margin(window, layer.output_size(size))
    frame = Frame(like, x.shape[1], source.size, margin, layer.mirror)
    frame.inside.copy_(source.of(x))
    return layer(frame.reflected(), window)
