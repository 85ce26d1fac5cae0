"""Colours of pictures: mean and covariance of luminance and colour differences, which one can take from another.

To match two moments by a linear map of colours is an old idea (Reinhard et al. 2001). Here it is the last layer of a
network and trained with it: what is known exactly need not be learnt.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from a2k.attention import at_least_float32
from a2k.images import from_levels

# Luminance and two differences of colour from RGB (BT.601, as in JPEG).
FROM_RGB = ((0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312))
TO_RGB = np.linalg.inv(FROM_RGB).tolist()
# Are added to variances, relative to them and as squares of intensities: else what little a colour differs from its
# prediction, rounding in 16 bit perhaps, could be divided by itself.
LEAST_SHARE, LEAST_VARIANCE = 1e-3, 1e-6
BAND_POINTS = {"cpu": 1 << 18, "cuda": 1 << 22}  # taken at a time, so that they stay in the cache for all passes


class Colors(NamedTuple):
    """Of luminance and colour differences: mean (B, 3), and the lower Cholesky factor of the covariance (B, 3, 3)."""

    mean: Tensor
    factor: Tensor

    def towards(self, other: "Colors", share: float) -> "Colors":
        """Colours between these (share 0) and others (share 1)."""
        return Colors(*(own + share * (to - own) for own, to in zip(self, other, strict=True)))


def colors_of(image: Tensor) -> Colors:
    """Colours, at least float32, of RGB (B, 3, H, W) of any size, uint8 or floating point in [0, 1]."""
    dtype = torch.float64 if image.dtype == torch.float64 else torch.float32
    matrix = constant(FROM_RGB, torch.empty(0, dtype=dtype, device=image.device))
    floats = (from_levels(band, torch.empty(band.shape, dtype=dtype, device=image.device)) for band in bands(image))
    with torch.autocast(image.device.type, enabled=False):
        return colors_of_parts(matrix @ planes_of(band) for band in floats)


def constant(matrix: Sequence[Sequence[float]], like: Tensor) -> Tensor:
    """The matrix in the dtype and on the device of another tensor; the host does not wait for a GPU's earlier work."""
    return torch.tensor(matrix, dtype=like.dtype).to(like.device, non_blocking=True)


@torch.no_grad()
def colors_of_parts(parts: Iterable[Tensor]) -> Colors:
    """Colours of luminance and colour differences (B, 3, n) that come in parts, of their dtype (Chan et al. 1983)."""
    count, mean, products = 0, 0.0, 0.0
    for planes in parts:
        own_mean, own_products = (moment.double() for moment in moments(planes))
        difference, points = own_mean - mean, planes.shape[2]
        shift = difference[:, :, None] * difference[:, None] * (count * points / (count + points))
        products, mean = products + own_products + shift, mean + difference * (points / (count + points))
        count += points
    return Colors(*(x.to(planes.dtype) for x in colors_from(mean, products / count)))


def moments(planes: Tensor) -> tuple[Tensor, Tensor]:
    """Mean (B, C), and sums of products of differences from it (B, C, C), of points (B, C, n)."""
    mean = planes.mean(2)
    planes = planes - mean[..., None]
    return mean, planes @ planes.mT


def colors_from(mean: Tensor, covariance: Tensor) -> Colors:
    least = LEAST_SHARE * covariance.diagonal(dim1=1, dim2=2) + LEAST_VARIANCE
    return Colors(mean, torch.linalg.cholesky_ex(covariance + least.diag_embed()).L)  # of NaN it is NaN, no error


def bands(x: Tensor) -> tuple[Tensor, ...]:
    """(B, C, H, W) in bands of rows."""
    return x.split(max(1, BAND_POINTS[x.device.type] // x[:, 0, 0].numel()), 2)


def planes_of(x: Tensor) -> Tensor:
    """(B, C, H, W) as (B, C, H * W), contiguous: products of matrices with only three columns would be slow."""
    return x.contiguous().flatten(2)


def matching(own: Colors, target: Colors) -> tuple[Tensor, Tensor]:
    """Matrix (B, 3, 3) and shift (B, 3, 1) for matrix @ planes + shift: RGB of the target's colours from luminance and
    colour differences of the given ones.

    Luminance is only scaled. What it explains of the first difference is taken out and put back as in the target, then
    likewise what both explain of the second.
    """
    to_rgb = constant(TO_RGB, own.factor)
    matrix = to_rgb @ torch.linalg.solve_triangular(own.factor, target.factor, upper=False, left=False)
    return matrix, to_rgb @ target.mean[..., None] - matrix @ own.mean[..., None]


def match_colors(x: Tensor, target: Colors) -> Tensor:
    """RGB (B, 3, H, W) of the target's colours, at least float32, from luminance and colour differences of any."""
    with torch.autocast(x.device.type, enabled=False):
        planes = planes_of(at_least_float32(x))
        mean, products = moments(planes)
        matrix, shift = matching(colors_from(mean, products / planes.shape[2]), target)
        return (matrix @ planes + shift).unflatten(2, x.shape[2:]).contiguous(memory_format=torch.channels_last)
