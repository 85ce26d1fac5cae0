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

PERIOD = 256  # points after which the texture repeats, in both directions
PATCH = 64  # side of a patch in points
CELL = 8  # side in points of the cells of a photo whose details are measured
SHARE = 0.3  # of the deviation of the painting's details that every part of a photo gets
LEAST_VARIANCE = 1e-6  # of intensities, that of the details of a painting of one colour
BAND_POINTS = {"cpu": 1 << 18, "cuda": 1 << 22}  # of a photo measured at a time


class Texture(NamedTuple):
    """tile: (B, 1, PERIOD, PERIOD), covers the plane. variance: (B, 1, 1, 1), of the details it is made of."""

    tile: Tensor
    variance: Tensor


def texture_of(style: Tensor) -> Texture:
    """The texture, at least float32, of paintings (B, 3, H, W) of any size, uint8 or floating point in [0, 1]. The same
    painting always has the same one.
    """
    style = mirrored(style)
    count = 2 * PERIOD // PATCH  # of patches in a row, each over half of the one before
    random = np.random.RandomState(7)  # numpy's old generator is frozen
    room = [side - PATCH + 1 for side in style.shape[2:]]
    corners = (random.random_sample((count, count, 2)) * room).astype(int).reshape(-1, 2).tolist()
    patches = torch.cat([style[:, :, top : top + PATCH, left : left + PATCH] for top, left in corners])
    details = intensity(patches).view(count, count, len(style), PATCH, PATCH)
    details = details - details.mean((3, 4), keepdim=True)
    variance = details.square().mean((0, 1, 3, 4))[:, None, None, None]
    # Squares of overlapping windows add up to one, as variances of unlike details do.
    window = torch.from_numpy(np.sin((np.arange(PATCH) + 0.5) * np.pi / PATCH)).to(details)
    details = details * window[:, None] * window
    halves = details.unflatten(4, (2, -1)).unflatten(3, (2, -1))
    cells = sum(halves[:, :, :, i, :, j].roll((i, j), (0, 1)) for i in (0, 1) for j in (0, 1))
    return Texture(cells.permute(2, 0, 3, 1, 4).reshape(len(style), 1, PERIOD, PERIOD), variance)


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
    tile = periodic_window(texture.tile, top, bottom, left, right)
    return (x + (rows.weights @ cells @ cols.weights.mT * tile).to(x.dtype)).clamp(0, 1)


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


def periodic_window(tile: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """(..., bottom - top, right - left) of the plane that is covered with the tile (..., h, w)."""
    rows, cols = (
        torch.arange(*ends, device=tile.device) % period
        for ends, period in zip(((top, bottom), (left, right)), tile.shape[-2:], strict=True)
    )
    return tile.index_select(-2, rows).index_select(-1, cols)
