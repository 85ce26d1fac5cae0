"""Colours taken from another picture, against numpy's covariance."""

import random

import numpy as np
import pytest
import torch

from a2k import colors
from a2k.colors import FROM_RGB, colors_of, match_colors

SEED = random.randrange(10**6)


def moments(image: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of RGB (3, H, W)."""
    points = image.double().flatten(1).numpy()
    return points.mean(1), np.cov(points, bias=True)


def test_result_has_the_colors_of_the_target():
    print("seed", SEED)
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(2, 3, 37, 50, generator=generator) * torch.tensor([9.0, 2.0, 0.5])[:, None, None] + 4
    style = torch.rand(2, 3, 23, 31, generator=generator) ** 2 * torch.tensor([1.0, 0.7, 0.4])[:, None, None]
    out = match_colors(x, colors_of(style))
    for result, target in zip(out, style, strict=True):
        for actual, expected in zip(moments(result), moments(target), strict=True):
            np.testing.assert_allclose(actual, expected, atol=2e-4)


def test_luminance_is_only_scaled():
    x = torch.randn(1, 3, 20, 30, generator=torch.Generator().manual_seed(SEED))
    out = match_colors(x, colors_of(torch.rand(1, 3, 9, 9)))
    luminance = (out * torch.tensor(FROM_RGB[0])[:, None, None]).sum(1)
    assert torch.corrcoef(torch.stack([luminance.flatten(), x[:, 0].flatten()]))[0, 1] > 0.9999


@pytest.mark.parametrize("dtype", (torch.uint8, torch.float32))
def test_colors_of_a_picture_in_bands(dtype, monkeypatch):
    """As of the whole, in any number of bands, also where the mean is large beside the deviation."""
    image = torch.randint(200, 210, (2, 3, 45, 33), generator=torch.Generator().manual_seed(SEED), dtype=torch.uint8)
    image = image if dtype == torch.uint8 else image / 255
    whole = colors_of(image)
    monkeypatch.setitem(colors.BAND_POINTS, "cpu", 100)
    for actual, expected in zip(colors_of(image), whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)
    points = np.array(FROM_RGB) @ (image[1].double() / (255 if dtype == torch.uint8 else 1)).flatten(1).numpy()
    covariance = np.cov(points, bias=True)
    covariance += np.diag(colors.LEAST_SHARE * covariance.diagonal() + colors.LEAST_VARIANCE)
    np.testing.assert_allclose(whole.mean[1], points.mean(1), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(whole.factor[1], np.linalg.cholesky(covariance), rtol=1e-3, atol=1e-6)


def test_gradient():
    generator = torch.Generator().manual_seed(SEED)
    x = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    target = colors.Colors(*(y.double() for y in colors_of(torch.rand(2, 3, 6, 6, generator=generator))))
    torch.autograd.gradcheck(lambda x: match_colors(x, target), x)


def test_pictures_of_one_color():
    """Stay finite, and take the mean."""
    one = torch.full((1, 3, 8, 8), 0.25)
    for x, style in ((torch.zeros(1, 3, 8, 8), torch.rand(1, 3, 8, 8)), (torch.randn(1, 3, 8, 8), one)):
        out = match_colors(x, colors_of(style))
        torch.testing.assert_close(out.mean((2, 3)), style.mean((2, 3)), rtol=1e-3, atol=1e-3)


def test_towards():
    own, other = colors_of(torch.rand(1, 3, 8, 8)), colors_of(torch.rand(1, 3, 8, 8))
    for actual, expected in ((own.towards(other, 0.0), own), (own.towards(other, 1.0), other)):
        torch.testing.assert_close(tuple(actual), tuple(expected))


def test_nan_stays_nan():
    x = torch.randn(1, 3, 8, 8)
    x[0, 1, 2, 3] = float("nan")
    assert match_colors(x, colors_of(torch.rand(1, 3, 8, 8))).isnan().any()


def test_autocast_rounds_nothing():
    x, target = torch.randn(1, 3, 20, 30), colors_of(torch.rand(1, 3, 9, 9))
    expected = match_colors(x, target)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(match_colors(x, target), expected)


def test_mean_of_many_points():
    points = 0.9 + 1e-3 * torch.randn(1, 3, 1 << 22)
    torch.testing.assert_close(colors.moments(points)[0].double(), points.double().mean(2), rtol=5e-7, atol=0)
