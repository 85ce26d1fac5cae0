"""Texture: details of the painting in random order, laid over what of the photo is smooth, before it is encoded.

Attention has nothing to tell the points of a smooth block apart, so that all get the same of the painting, and the
result is as smooth as the photo. Patches whose windows overlap and whose order means nothing are the simplest texture
synthesis (after Efros & Freeman 2001, without their seams); objects of the painting do not survive it, its strokes do.
"""

from math import ceil
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from a2k.images import from_levels

PATCH = 64  # side of a patch in points
PATCHES = 64  # cut out of a painting
# Which patch begins at every half of a patch. The order repeats after 256 of them, 8192 points: repeated after 256
# points, a sky was seen to be papered. numpy's old generator is frozen.
ORDER = torch.from_numpy(np.random.RandomState(7).randint(PATCHES, size=(256, 256)))
CELL = 8  # side in points of the cells of a photo whose details are measured
SHARE = 0.3  # of the deviation of the painting's details that every part of a photo gets
LEAST_VARIANCE = 1e-6  # of intensities, that of the details of a painting of one colour
BAND_POINTS = {"cpu": 1 << 18, "cuda": 1 << 22}  # of a photo measured at a time


class Texture(NamedTuple):
    """quarters: (B, 4 PATCHES, (PATCH / 2)^2), of every patch the upper left, upper right, lower left and lower right
    one. variance: (B, 1, 1, 1), of the details they are made of.
    """

    quarters: Tensor
    variance: Tensor

    def window(self, top: int, bottom: int, left: int, right: int) -> Tensor:
        """(B, 1, bottom - top, right - left) of the plane that patches cover, each over half of the ones beside it."""
        half, batch = PATCH // 2, len(self.quarters)
        rows, cols = (
            torch.arange(start // half - 1, ceil(end / half)) % len(ORDER)
            for start, end in ((top, bottom), (left, right))
        )
        numbers, count = 4 * ORDER[rows[:, None], cols], (len(rows) - 1, len(cols) - 1)
        # A patch that begins in a cell of half its side has its upper left quarter there.
        over = [numbers[1:, 1:], numbers[1:, :-1] + 1, numbers[:-1, 1:] + 2, numbers[:-1, :-1] + 3]
        over = torch.stack(over, 2).view(-1, 4).to(self.quarters.device)
        cells = F.embedding_bag(over, self.quarters.transpose(0, 1).flatten(1), mode="sum")
        plane = (
            cells.view(*count, batch, half, half).permute(2, 0, 3, 1, 4).reshape(batch, 1, *(half * n for n in count))
        )
        return plane[:, :, top % half :, left % half :][:, :, : bottom - top, : right - left]


def texture_of(style: Tensor) -> Texture:
    """The texture, at least float32, of paintings (B, 3, H, W) of any size, uint8 or floating point in [0, 1]. The same
    painting always has the same one.
    """
    style = mirrored(style)
    random = np.random.RandomState(7)
    room = [side - PATCH + 1 for side in style.shape[2:]]
    corners = (random.random_sample((PATCHES, 2)) * room).astype(int).tolist()
    patches = torch.cat([style[:, :, top : top + PATCH, left : left + PATCH] for top, left in corners])
    details = intensity(patches).view(PATCHES, len(style), PATCH, PATCH)
    details = details - details.mean((2, 3), keepdim=True)
    variance = details.square().mean((0, 2, 3))[:, None, None, None]
    # Squares of overlapping windows add up to one, as variances of unlike details do.
    window = torch.from_numpy(np.sin((np.arange(PATCH) + 0.5) * np.pi / PATCH)).to(details)
    details = details * window[:, None] * window
    quarters = details.unflatten(3, (2, -1)).unflatten(2, (2, -1)).permute(1, 0, 2, 4, 3, 5)
    return Texture(quarters.reshape(len(style), 4 * PATCHES, -1), variance)


def mirrored(image: Tensor) -> Tensor:
    """Sides of at least PATCH points, by mirror images beyond the lower and the right border."""
    for dim, side in enumerate(image.shape[2:], 2):
        if side < PATCH:
            places = torch.arange(PATCH, device=image.device) % (2 * side)
            image = image.index_select(dim, torch.minimum(places, 2 * side - 1 - places))
    return image


def intensity(image: Tensor) -> Tensor:
    """Mean (B, 1, ...) of the channels, in [0, 1] and at least float32, of an image (B, 3, ...)."""
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    return from_levels(image, torch.empty(image.shape, dtype=dtype, device=image.device)).mean(1, keepdim=True)


@torch.no_grad()
def gaps(image: Tensor, texture: Texture) -> Tensor:
    """How much of the texture each cell of a photo takes so that its details have SHARE of the painting's deviation.

    image: (B, 3, H, W), uint8 or floating point in [0, 1]. Returns (B, 1, ceil(H / CELL), ceil(W / CELL)), from 0 to
    SHARE.
    """
    rows = CELL * max(1, BAND_POINTS[image.device.type] // (CELL * image.shape[3]))
    moments = [cell_moments(intensity(band)) for band in image.split(rows, 2)]
    mean, square = (around(torch.cat(parts, 2)) for parts in zip(*moments, strict=True))
    own = (square - mean.square()).clamp_min(0)
    return (SHARE**2 - own / texture.variance.clamp_min(LEAST_VARIANCE)).clamp_min(0).sqrt()


def cell_moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Means of x and of its square over cells, of which those at the border may be smaller."""
    return F.avg_pool2d(x, CELL, ceil_mode=True), F.avg_pool2d(x.square(), CELL, ceil_mode=True)


def around(cells: Tensor) -> Tensor:
    """Means over every cell and its neighbours; those beyond the border are as the ones at it."""
    return F.avg_pool2d(F.pad(cells, (1, 1, 1, 1), mode="replicate"), 3, 1)


def textured_window(x: Tensor, amount: Tensor, texture: Texture, top: int = 0, left: int = 0) -> Tensor:
    """x and as much of the texture as amount says, kept within [0, 1].

    x: (B, 3, h, w) in [0, 1], the window of a photo whose upper left corner is at (top, left). amount: of the whole
    photo, as from `gaps`, for CELL points each; between their middles it changes linearly.
    """
    bottom, right = top + x.shape[2], left + x.shape[3]
    rows = between_cells(top, bottom, amount.shape[2], amount)
    cols = between_cells(left, right, amount.shape[3], amount)
    cells = amount[:, :, rows.cells, cols.cells]
    details = texture.window(top, bottom, left, right)
    return (x + (rows.weights @ cells @ cols.weights.mT * details).to(x.dtype)).clamp(0, 1)


class Interpolation(NamedTuple):
    """weights: (points, cells), of those cells which a row of points lies between."""

    weights: Tensor
    cells: slice


def between_cells(start: int, end: int, count: int, like: Tensor) -> Interpolation:
    """Of points start .. end - 1 in a row of count cells."""
    cells = slice(max(0, start // CELL - 1), min(count, ceil(end / CELL) + 1))
    points = (torch.arange(start, end, device=like.device) + 0.5) / CELL - 0.5
    middles = torch.arange(cells.start, cells.stop, device=like.device)
    distances = (points.clamp(0, count - 1)[:, None] - middles).abs()
    return Interpolation((1 - distances).clamp_min(0).to(like.dtype), cells)


def add_texture(image: Tensor, texture: Texture | None, strength: float = 1.0) -> Tensor:
    """Photos (B, 3, H, W) in [0, 1], what is smooth of them filled with the texture, if there is one. Its amount has no
    gradient.
    """
    if texture is None or strength == 0:
        return image
    with torch.autocast(image.device.type, enabled=False):
        return textured_window(image, strength * gaps(image, texture), texture)
