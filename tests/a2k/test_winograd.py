"""Winograd's convolution against torch's in float64."""

import random

import pytest
import torch
import torch.nn.functional as F

from a2k import winograd
from a2k.winograd import Winograd, pays

DTYPES = (torch.float32, torch.bfloat16)
LARGEST_ERROR = {torch.float32: 2e-5, torch.bfloat16: 0.5}  # of outputs near 1, from inputs that are noise
SIZES = ((1, 1), (4, 4), (3, 41), (5, 9), (37, 50), (64, 6), (70, 67))


def example(channels: int, outputs: int, taps: int, size: tuple[int, int], batch: int = 1):
    seed = random.randrange(10**6)
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, channels, *(n + taps - 1 for n in size), generator=generator)
    weight = torch.randn(outputs, channels, taps, taps, generator=generator) * (channels * taps**2) ** -0.5
    return x.contiguous(memory_format=torch.channels_last), weight, torch.randn(outputs, generator=generator)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What nobody writes is NaN."""
    new_empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args: new_empty(*args).fill_(float("nan")))


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("taps", (2, 3))
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_convolution(dtype, taps, size, monkeypatch):
    """At whole and cut tiles, in one band of tiles and in several; rounding a few times that of a convolution."""
    monkeypatch.setattr(winograd, "TILES", random.choice((1, 64)))
    monkeypatch.setattr(winograd, "TILE_BYTES", random.choice((128, 4000, 1 << 15)))
    x, weight, bias = (y.to(dtype) for y in example(16, 32, taps, size, batch=2))
    expected = F.conv2d(x.double(), weight.double(), bias.double())
    convolve = Winograd(weight, bias)
    for relu in (False, True):
        out = convolve(x, relu)
        assert out.shape == expected.shape
        assert out.is_contiguous(memory_format=torch.channels_last)
        error = out.double() - (expected.relu() if relu else expected)
        assert error.abs().max() < LARGEST_ERROR[dtype]


def test_windows_of_maps():
    """From a part of one map into a part of another."""
    x, weight, bias = example(64, 64, 3, (23, 30))
    whole = torch.full((1, 64, 40, 40), float("nan")).contiguous(memory_format=torch.channels_last)
    out = Winograd(weight, bias)(x[:, :, 3:, 5:], False, whole[:, :, 7:27, 9:34])
    torch.testing.assert_close(out, F.conv2d(x[:, :, 3:, 5:], weight, bias), rtol=0, atol=2e-5)
    assert whole.isnan().sum() == 64 * (40 * 40 - 20 * 25)


@pytest.mark.parametrize("channels", (64, 512))
def test_rounding(channels):
    """At most four times that of a plain convolution, over all outputs: 1.8 to 2.9 times were seen."""
    x, weight, bias = example(channels, 64, 3, (32, 32))
    exact = F.conv2d(x.double(), weight.double(), bias.double())
    error, plain = (
        (y - exact).square().mean().sqrt() for y in (Winograd(weight, bias)(x, False), F.conv2d(x, weight, bias))
    )
    assert error < 4 * plain


@pytest.mark.parametrize("taps", (2, 3))
def test_bfloat16_keeps_what_maps_are_made_of(taps):
    """Neighbours are alike in feature maps; for such maps rounding is near that of a plain convolution."""
    x, weight, bias = example(64, 64, taps, (32, 32))
    x = (4 * x[:, :, :1, :1] + 0.1 * x).relu().contiguous(memory_format=torch.channels_last)
    x, weight, bias = (y.bfloat16() for y in (x, weight, bias))
    exact = F.conv2d(x.double(), weight.double(), bias.double())
    error, plain = (
        (y - exact).square().mean().sqrt() for y in (Winograd(weight, bias)(x, False), F.conv2d(x, weight, bias))
    )
    assert error < 3 * plain


@pytest.mark.parametrize("processor", ("Intel", "Zen 4", "other"))
def test_where_it_pays(processor, monkeypatch):
    monkeypatch.setattr(winograd, "processor", lambda: processor)
    has_bfloat16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    assert pays(torch.empty(128, 256, 3, 3))
    assert pays(torch.empty(256, 128, 3, 3, dtype=torch.bfloat16)) == has_bfloat16
    assert pays(torch.empty(128, 128, 3, 3, dtype=torch.bfloat16)) == (has_bfloat16 and processor == "Zen 4")
    assert pays(torch.empty(128, 128, 3, 3)) == (processor != "other")
    assert pays(torch.empty(128, 64, 3, 3)) == (processor == "Zen 4")
    assert not pays(torch.empty(64, 64, 3, 3))
    assert not pays(torch.empty(64, 128, 3, 3, dtype=torch.bfloat16))
    assert not pays(torch.empty(512, 512, 3, 3, dtype=torch.float64))
    assert not pays(torch.empty(512, 512, 3, 3, device="meta"))
    assert not pays(torch.empty(3, 32768, 3, 3))
    assert not pays(torch.empty(200, 200, 3, 3))


@pytest.mark.parametrize(
    ("rows", "cols", "tiles", "at_once"),
    (
        (16, 16, 32, 4),  # whole units of 64
        (32, 33, 64, 7),  # 231 of 256 tiles; 3 at a time would be 99 of 128
        (1, 500, 64, 1),  # never less than a row
    ),
)
def test_bands(rows, cols, tiles, at_once):
    assert winograd.rows_at_once(rows, cols, tiles) == at_once
