"""Convolution by minimal filtering (Winograd 1980; Lavin and Gray 2016), on processors: fewer multiplications.

The 4 x 4 outputs of a tile come from 6 x 6 inputs. As polynomials these are evaluated at 6 x 6 points, where a
convolution is one product, and the outputs are interpolated: 36 products instead of the 144 of a 3x3 kernel. Over all
tiles and channels the products at one point are a matrix product; all of them run as one grouped 1x1 convolution.
"""

from collections.abc import Iterator
from itertools import pairwise, product
from math import ceil

import numpy as np
import torch
from torch import Tensor

from a2k_kernels.products import processor

OUTPUTS = 4  # of a tile, in each direction
# Kernels meet tiles in multiples of this, the last ones being zero: for other numbers, 80 and 98 among them, oneDNN may
# lay out the kernels otherwise, anew in every call, which takes 30 times as long.
TILES = 64
# Of one point of the tiles that each thread computes at a time: enough to read the kernels seldom, and so few that the
# tiles stay in a cache.
TILE_BYTES = 1 << 17
# Where polynomials are evaluated, beside infinity, by number of taps: of small rounding errors in experiments.
# In bfloat16 it matters most that matrices are exact: then equal inputs, nearly what maps are made of, still cancel.
POINTS = {
    torch.float32: {2: (0, 1, -1 / 2, -2), 3: (0, 5 / 8, -5 / 8, 3 / 2, -3 / 2)},
    torch.bfloat16: {2: (0, 1, -1 / 2, -2), 3: (0, 1, -1, 1 / 2, -2)},
}
LEAST_WEIGHTS = 128 * 256 * 9  # of a layer where it pays
# It pays sooner where multiplications take longer, compared with all else.
LEAST_WEIGHTS_ON = {
    ("Intel", torch.float32): 128 * 128 * 9,
    ("Zen 4", torch.float32): 64 * 128 * 9,
    ("Zen 4", torch.bfloat16): 128 * 128 * 9,
}


def transforms(taps: int, dtype: torch.dtype) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Matrices of one direction: to the points from inputs (n, n) and from taps (n, taps), to outputs (OUTPUTS, n).

    output = to_output @ ((from_taps @ taps) * (from_input @ input)), the n - taps + 1 inner products of the taps with
    the input (Cook and Toom's algorithm, transposed).
    """
    points = np.array(POINTS[dtype][taps])
    n = len(points) + 1
    differences = points[:, None] - points
    np.fill_diagonal(differences, 1)
    powers = points[:, None] ** np.arange(n)
    at_infinity = np.zeros(n)
    at_infinity[-1] = 1
    others = [np.poly(np.delete(points, i))[::-1] for i in range(n - 1)]
    from_input = np.vstack([*(np.append(x, 0) for x in others), np.poly(points)[::-1]])
    from_taps = np.vstack([powers[:, :taps] / differences.prod(1, keepdims=True), at_infinity[-taps:]])
    to_output = np.vstack([powers[:, :OUTPUTS], at_infinity[-OUTPUTS:]]).T
    return from_input, from_taps, to_output


def pays(weight: Tensor) -> bool:
    """Whether `Winograd` is faster than torch's convolution by that kernel, as measured."""
    outputs, inputs = weight.shape[:2]
    fits = weight.device.type == "cpu" and weight.dtype in POINTS and torch.backends.mkldnn.is_available()
    if not fits or outputs % 16 or inputs % 16:
        return False
    if weight.dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    return weight.numel() >= LEAST_WEIGHTS_ON.get((processor(), weight.dtype), LEAST_WEIGHTS)


class Winograd:
    """Convolution with a square kernel of two or three taps each way, of stride 1, without padding.

    Args:
        weight: (C_out, C_in, taps, taps), float32 or bfloat16, on the CPU; channels in sixteens.
        bias: (C_out).
    """

    def __init__(self, weight: Tensor, bias: Tensor) -> None:
        dtype, taps, (self.channels, inputs) = weight.dtype, weight.shape[-1], weight.shape[:2]
        self.side = OUTPUTS + taps - 1
        from_input, from_taps, to_output = (np.kron(x, x) for x in transforms(taps, dtype))
        self.from_input, self.to_output = (torch.from_numpy(x).to(dtype) for x in (from_input, to_output))
        self.points = self.side**2
        self.tiles = TILE_BYTES // dtype.itemsize // max(inputs, self.channels)  # for each thread
        # A bias at the points that becomes the bias of every output.
        ones = torch.from_numpy(np.linalg.pinv(to_output).sum(1, keepdims=True))
        kernels = torch.from_numpy(from_taps).float() @ weight.float().permute(2, 3, 0, 1).flatten(2).flatten(0, 1)
        kernels = kernels.to(dtype).view(-1, inputs, 1, 1)
        shape = [1, self.points * inputs, TILES, 1]
        kernels = torch.ops.mkldnn._reorder_convolution_weight(kernels, *self.geometry, shape)
        self.parameters = kernels, (ones * bias).flatten().to(dtype)

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Padding, stride, dilation and groups of the convolution at the points."""
        return [0, 0], [1, 1], [1, 1], self.points

    def __call__(self, x: Tensor, relu: bool, out: Tensor | None = None) -> Tensor:
        """(B, C_in, h, w) to (B, C_out, h - taps + 1, w - taps + 1), through ReLU if asked for; fills out if given."""
        height, width = (length - self.side + OUTPUTS for length in x.shape[2:])
        if out is None:
            out = x.new_empty(len(x), height, width, self.channels).permute(0, 3, 1, 2)
        rows, cols = self._tiles_of(*x.shape[2:])
        at_once = rows_at_once(rows, cols, self.tiles * torch.get_num_threads())
        edges = [*range(0, height, OUTPUTS * at_once), height]
        for source, target in zip(x, out, strict=True):
            for top, bottom in pairwise(edges):
                self._fill(target[:, top:bottom], source[:, top : bottom + self.side - OUTPUTS], relu)
        return out

    def _tiles_of(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tiles of an input of that size."""
        rows, cols = (ceil((length - self.side + OUTPUTS) / OUTPUTS) for length in (height, width))
        return rows, cols

    def _fill(self, out: Tensor, x: Tensor, relu: bool) -> None:
        """Some rows of tiles of one picture."""
        rows, cols = (ceil(length / OUTPUTS) for length in out.shape[1:])
        number = rows * cols
        buffer = x.new_empty(number, self.points, len(x))
        tiles = buffer.view(rows, cols, self.side, self.side, -1)
        for place, piece in pieces(x, self.side):
            tile, (height, width) = tiles[place], piece.shape[2:4]
            if (height, width) != (self.side, self.side):
                tile.zero_()
            tile[:, :, :height, :width] = piece
        count = next_multiple(number, TILES)
        values = x.new_empty(count, self.points, len(x))
        values[number:] = 0
        torch.bmm(self.from_input.expand(number, -1, -1), buffer, out=values[:number])
        values = values.view(1, count, 1, -1).permute(0, 3, 1, 2)
        values = torch.ops.mkldnn._convolution_pointwise(values, *self.parameters, *self.geometry, "none", [], "")
        values = values.permute(0, 2, 3, 1).reshape(count, self.points, -1)[:number]
        result = torch.bmm(self.to_output.expand(number, -1, -1), values)
        if relu:
            result.relu_()
        result = result.view(rows, cols, OUTPUTS, OUTPUTS, self.channels)
        for place, piece in pieces(out, OUTPUTS):
            piece.copy_(result[place][:, :, : piece.shape[2], : piece.shape[3]])


def next_multiple(count: int, unit: int) -> int:
    return ceil(count / unit) * unit


def rows_at_once(rows: int, cols: int, tiles: int) -> int:
    """Of how many rows of tiles bands are to consist, so that few tiles must be added to make multiples of TILES. Bands
    have half to four times the given number of tiles if they can.
    """

    def computed(at_once: int) -> int:
        whole, rest = divmod(rows, at_once)
        return whole * next_multiple(at_once * cols, TILES) + next_multiple(rest * cols, TILES)

    least, most = (min(rows, ceil(share * tiles / cols)) for share in (0.5, 4))
    return min(range(least, most + 1), key=lambda number: (computed(number), abs(number * cols - tiles)))


def pieces(x: Tensor, side: int) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """Windows of a map (C, h, w), OUTPUTS apart, as views (rows, cols, side, side, C), and their places among all.

    Those at the lower or right edge may be smaller.
    """
    for (rows, top, height), (cols, left, width) in product(*(steps(length, side) for length in x.shape[1:])):
        view = x[:, top:, left:].unfold(1, height, OUTPUTS).unfold(2, width, OUTPUTS)
        yield (rows, cols), view.permute(1, 2, 3, 4, 0)[: rows.stop - rows.start, : cols.stop - cols.start]


def steps(length: int, side: int) -> list[tuple[slice, int, int]]:
    """Windows, where the first starts, and how long they are: the whole ones and, if there is one, the last and cut."""
    whole = max(0, (length - side) // OUTPUTS + 1)
    rest = length - whole * OUTPUTS
    found = [(slice(0, whole), 0, side)] if whole else []
    if rest > side - OUTPUTS:
        found.append((slice(whole, whole + 1), whole * OUTPUTS, rest))
    return found
