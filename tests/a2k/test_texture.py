"""The painting's details, laid over what of a photo is smooth."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny import TINY, tiny_model

from a2k import texture
from a2k.colors import colors_of, match_colors
from a2k.texture import CELL, ORDER, PATCH, PATCHES, SHARE, add_texture, gaps, texture_of, textured_window

SEED = random.randrange(10**6)


@pytest.fixture(autouse=True)
def seed():
    print("seed", SEED)
    torch.manual_seed(SEED)


def painting(height: int, width: int, batch: int = 1) -> torch.Tensor:
    """Details all over, none of them stronger than a tenth of the range, so that nothing need be clamped."""
    return 0.45 + 0.1 * torch.rand(batch, 3, height, width)


def photo(height: int, width: int, batch: int = 1) -> torch.Tensor:
    """Smooth on the left, noise on the right."""
    x = torch.rand(batch, 3, height, width) / 2 + 0.25
    x[..., : width // 2] = torch.linspace(0.498, 0.502, height)[:, None]
    return x


# ---- the texture


def test_is_the_sum_of_windowed_patches():
    style, (height, width) = painting(75, 90).double(), (230, 200)
    corners = np.random.RandomState(7).random_sample((PATCHES, 2)) * (75 - PATCH + 1, 90 - PATCH + 1)
    patches = [style[0, :, y : y + PATCH, x : x + PATCH].mean(0).numpy() for y, x in corners.astype(int)]
    window = np.sin((np.arange(PATCH) + 0.5) * np.pi / PATCH)
    half, plane = PATCH // 2, np.zeros((height + 2 * PATCH, width + 2 * PATCH))
    for row in range(-1, height // half + 1):
        for col in range(-1, width // half + 1):
            patch, top, left = patches[ORDER[row % 256, col % 256]], (row + 1) * half, (col + 1) * half
            plane[top : top + PATCH, left : left + PATCH] += (patch - patch.mean()) * np.outer(window, window)
    texture = texture_of(style)
    result = texture.window(0, height, 0, width)[0, 0]
    np.testing.assert_allclose(result, plane[half : half + height, half : half + width], atol=1e-12)
    np.testing.assert_allclose(texture.variance, np.mean([patch.var() for patch in patches]), rtol=1e-12)


def test_has_the_variance_of_the_details():
    texture = texture_of(painting(100, 90))
    plane = texture.window(5, 400, 9, 390)
    assert plane.dtype == torch.float32
    assert abs(plane.mean()) < 0.05 * texture.variance.sqrt()
    assert plane.var().item() == pytest.approx(texture.variance.item(), rel=0.1)


@pytest.mark.parametrize("corner", ((0, 0), (8100, 8150)))
def test_does_not_repeat(corner):
    """At no distance in a photo of 1,400 points are windows alike, as they were when 256 points repeated."""
    (top, left), side = corner, 1400
    plane = texture_of(painting(100, 90)).window(top, top + side, left, left + side)[0, 0]
    spectrum = torch.fft.rfft2(plane - plane.mean(), s=(2 * side, 2 * side))
    products = torch.fft.irfft2(spectrum.abs().square())[: side // 2, : side // 2]
    likeness = products / products[0, 0]
    assert likeness[PATCH:].abs().max() < 0.1
    assert likeness[:, PATCH:].abs().max() < 0.1


@pytest.mark.parametrize(("size", "padded"), (((1, 1), (64, 64)), ((32, 90), (64, 90)), ((64, 63), (64, 64))))
def test_small_paintings_are_mirrored(size, padded):
    style = painting(*size)
    added = [(0, 0), (0, 0), *((0, to - side) for side, to in zip(size, padded, strict=True))]
    larger = torch.from_numpy(np.pad(style, added, "symmetric"))
    torch.testing.assert_close(texture_of(style), texture_of(larger), rtol=0, atol=0)


@pytest.mark.parametrize("size", ((PATCH, PATCH), (33, 300)))
def test_levels_and_layouts_make_the_same_texture(size):
    levels = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
    expected = texture_of(levels / 255)
    for same in (levels, levels.contiguous(memory_format=torch.channels_last), levels.mT.contiguous().mT):
        torch.testing.assert_close(texture_of(same), expected, rtol=1e-6, atol=1e-7)
    for i in range(2):
        torch.testing.assert_close(texture_of(levels[i : i + 1]), [x[i : i + 1] for x in expected])


# ---- how much of it


def test_gaps():
    """All of its share where the photo is flat, none where its details are as strong; exact at odd sizes."""
    style, content = texture_of(painting(64, 64)), photo(61, 83).double()
    content[..., 30:35] += 0.01 * torch.randn(61, 5)  # weak details
    amount = gaps(content, style)
    assert amount.shape == (1, 1, 8, 11)
    assert amount.dtype == torch.float64
    gray = content[0].mean(0).numpy()
    for row in range(8):
        for col in range(11):
            near = [
                gray[max(0, y) * CELL :, max(0, x) * CELL :][:CELL, :CELL]
                for y in np.clip(range(row - 1, row + 2), 0, 7)
                for x in np.clip(range(col - 1, col + 2), 0, 10)
            ]
            variance = np.mean([(x**2).mean() for x in near]) - np.mean([x.mean() for x in near]) ** 2
            expected = max(0, SHARE**2 - variance / style.variance.item()) ** 0.5
            assert amount[0, 0, row, col].item() == pytest.approx(expected, abs=1e-6)
    assert amount[..., :2].min() > 0.8 * SHARE
    assert 0 < amount[..., 2].min() <= amount[..., 2].max() < 0.98 * SHARE
    assert not amount[..., 6:].any()


def test_gaps_in_bands(monkeypatch):
    content, style = (255 * photo(61, 83, batch=2)).byte(), texture_of(painting(64, 64, batch=2))
    expected = gaps(content, style)
    torch.testing.assert_close(gaps(content / 255, style), expected, rtol=1e-5, atol=1e-5)
    monkeypatch.setitem(texture.BAND_POINTS, "cpu", 1)
    torch.testing.assert_close(gaps(content, style), expected, rtol=0, atol=0)


@pytest.mark.parametrize("size", ((64, 96), (300, 40)))
def test_amount_changes_linearly_between_cells(size):
    cells = [-(-side // CELL) for side in size]
    amount, x = torch.rand(2, 1, *cells), torch.full((2, 3, *size), 0.5)
    quarters = torch.full((2, 4 * PATCHES, PATCH**2 // 4), 0.0625)  # of which every point has four
    style = texture.Texture(quarters, torch.ones(2, 1, 1, 1))
    expected = 0.5 + 0.25 * F.interpolate(amount, scale_factor=CELL, mode="bilinear")[:, :, : size[0], : size[1]]
    torch.testing.assert_close(textured_window(x, amount, style), expected.expand_as(x))


def test_windows_join():
    rng = random.Random(SEED)
    content, style = photo(289, 301), texture_of(painting(40, 50))
    whole, amount = add_texture(content, style), gaps(content, style)
    for _ in range(10):
        (top, bottom), (left, right) = (sorted(rng.sample(range(side + 1), 2)) for side in content.shape[2:])
        window = textured_window(content[:, :, top:bottom, left:right], amount, style, top, left)
        torch.testing.assert_close(window, whole[:, :, top:bottom, left:right], rtol=0, atol=1e-6)


# ---- the result


def test_fills_what_is_smooth():
    content, style = photo(128, 256), painting(128, 128)
    added = add_texture(content, texture_of(style)) - content
    assert added[..., :100].std().item() == pytest.approx(SHARE * style.mean(1).std().item(), rel=0.25)
    assert not added[..., 160:].any()
    torch.testing.assert_close(added[:, 0], added[:, 1], rtol=0, atol=1e-6)


def test_stays_within_the_range():
    content = torch.cat([torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)], 3)
    out = add_texture(content, texture_of(torch.rand(1, 3, 64, 64)))
    assert out.min() == 0
    assert out.max() == 1
    assert (out != content).any()


def test_strength():
    content, style = photo(64, 64), texture_of(painting(64, 64))
    assert add_texture(content, style, strength=0.0) is add_texture(content, None) is content
    half, full = (add_texture(content, style, strength) - content for strength in (0.5, 1.0))
    torch.testing.assert_close(half, full / 2, rtol=1e-3, atol=1e-6)


def test_a_painting_of_one_colour_has_no_texture():
    content = photo(64, 64)
    for level in (0.3, 0.5):  # rounding gives the first a tiny variance, the second has none
        out = add_texture(content, texture_of(torch.full((1, 3, 40, 40), level)))
        torch.testing.assert_close(out, content, rtol=0, atol=1e-6)


def test_one_colour_in_the_manner_of_one_colour():
    gray = torch.full((1, 3, 64, 64), 0.5)
    assert torch.equal(add_texture(gray, texture_of(gray)), gray)


def test_gradients_pass():
    content, style = photo(64, 64).requires_grad_(), painting(64, 64).requires_grad_()
    add_texture(content, texture_of(style)).sum().backward()
    torch.testing.assert_close(content.grad, torch.ones_like(content))
    assert style.grad.any()


def test_autocast_does_not_round_it():
    content, style = photo(64, 64), painting(64, 64)
    expected = add_texture(content, texture_of(style))
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(add_texture(content, texture_of(style)), expected, rtol=0, atol=1e-6)


def test_network_takes_it():
    """A smooth photo is redrawn as the photo filled with texture."""
    model, style, content = tiny_model().double(), painting(48, 40).double(), torch.full((1, 3, 32, 48), 0.5).double()

    def redrawn(photo: torch.Tensor) -> torch.Tensor:
        maps = model.transform(model.encoder(photo), model.encoder(style))
        return match_colors(model.decoder(*maps), colors_of(style))

    out = model(content, style)
    torch.testing.assert_close(out, redrawn(add_texture(content, texture_of(style))))
    assert (out - redrawn(content)).abs().max() > 1e-3


def test_only_styled_networks_have_it():
    assert tiny_model(replace(TINY, encoder="lite")).encode_style(painting(32, 32)).texture is None
