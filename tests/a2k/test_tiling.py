"""Chains of layers, tile by tile, against the same layers on whole maps."""

import random
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2k import tiling, winograd
from a2k.tiling import Chain, Conv, JoinConv, MaxPool, SmoothUpsampleConv, UpsampleConv, Window, layer_window, upsampled

SEEDS = [random.randrange(10**6) for _ in range(8)]


def conv(rng: torch.Generator, inputs: int, outputs: int) -> nn.Conv2d:
    module = nn.Conv2d(inputs, outputs, 3, padding=1, padding_mode="reflect")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=rng) * parameter[0].numel() ** -0.5)
    return module.requires_grad_(False)


def layer(kind: type, module: nn.Conv2d, relu: bool = True) -> Conv:
    return kind(module.weight, module.bias, relu)


def run(chain: Chain, x: Tensor) -> Tensor:
    out = torch.full((len(x), chain.layers[-1].channels, *chain.sizes(tuple(x.shape[-2:]))[-1]), float("nan"))
    written = torch.zeros(out.shape[-2:])

    def write(window: Window, tile: Tensor) -> None:
        window.of(out).copy_(tile)
        written[window.top : window.bottom, window.left : window.right] += 1

    flops = sum(chain.run(tuple(x.shape[-2:]), lambda w, tile: tile.copy_(w.of(x)), write, x.new_empty(len(x))))
    assert (written == 1).all()
    assert flops >= chain.work(tuple(x.shape[-2:]))
    return out


def example(seed: int) -> tuple[random.Random, torch.Generator, Tensor]:
    """Random choices, random numbers, and a map of odd size and 3 channels."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    size = rng.randint(5, 40), rng.randint(5, 40)
    return rng, generator, torch.randn(rng.choice((1, 2)), 3, *size, generator=generator)


def set_tile_elements(monkeypatch, elements: int) -> None:
    monkeypatch.setattr(tiling, "tile_elements", lambda layers, device: elements)


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """What nobody writes is NaN."""
    for place, name in ((torch, "empty"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(place, name, poisoned(getattr(place, name)))


def poisoned(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *args, **options: empty(*args, **options).fill_(float("nan"))


@pytest.fixture(params=(1, 16), ids=("direct", "winograd"))
def times(request, monkeypatch) -> int:
    """Channels come so many times; by `Winograd` where their number allows it."""
    if request.param == 16:
        monkeypatch.setattr(tiling, "pays", lambda weight: weight.shape[0] % 16 == weight.shape[1] % 16 == 0)
        monkeypatch.setattr(winograd, "TILES", 1)
    return request.param


@pytest.mark.parametrize("seed", SEEDS)
def test_encoder_chain(seed, times, monkeypatch):
    rng, generator, x = example(seed)
    set_tile_elements(monkeypatch, times * rng.choice((100, 400, 1000, 1 << 22)))
    widths = (3, 5 * times, 4 * times, 6 * times)
    first, second, third = (conv(generator, *pair) for pair in pairwise(widths))
    layers = [layer(Conv, first), layer(Conv, second, False), MaxPool(4 * times, relu=True), layer(Conv, third)]
    expected = third(F.max_pool2d(second(first(x).relu()).relu(), 2, ceil_mode=True)).relu()
    torch.testing.assert_close(run(Chain(layers, 3), x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_decoder_chain(seed, times, monkeypatch):
    rng, generator, x = example(seed)
    set_tile_elements(monkeypatch, times * rng.choice((100, 400, 1000, 1 << 22)))
    widths = (3, 5 * times, 4 * times, 3 * times)
    first, second, third = (conv(generator, *pair) for pair in pairwise(widths))
    layers = [layer(UpsampleConv, first), layer(Conv, second), layer(UpsampleConv, third, False)]
    up = nn.Upsample(scale_factor=2)
    expected = third(up(second(first(up(x)).relu()).relu()))
    torch.testing.assert_close(run(Chain(layers, 3), x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_smooth_upsample(seed, times, monkeypatch):
    rng, generator, x = example(seed)
    set_tile_elements(monkeypatch, times * rng.choice((100, 400, 1000, 1 << 22)))
    first, second = conv(generator, 3, 5 * times), conv(generator, 5 * times, 4)
    first.padding_mode = "replicate"
    expected = second(first(F.interpolate(x, scale_factor=2, mode="bilinear")).relu()).relu()
    layers = [layer(SmoothUpsampleConv, first), layer(Conv, second)]
    torch.testing.assert_close(run(Chain(layers, 3), x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("taps", (2, 3))
@pytest.mark.parametrize("width", (1, 3, 4, 6, 8, 13))
def test_few_outputs(width, taps):
    """Into a part of a map: whole groups of points in a row, and what is left of them."""
    x = torch.randn(2, 5, 7, width + taps - 1).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(3, 5, taps, taps), torch.randn(3)
    assert isinstance(tiling.convolution(weight, bias), tiling.FewOutputs)
    assert not isinstance(tiling.convolution(weight.repeat(2, 1, 1, 1), bias.repeat(2)), tiling.FewOutputs)
    expected, whole = F.conv2d(x, weight, bias), torch.zeros(2, 3, 20, 20).contiguous(memory_format=torch.channels_last)
    part = whole[:, :, 2 : 2 + expected.shape[2], 5 : 5 + width]
    for relu, out in ((False, None), (True, None), (True, part)):
        actual = tiling.FewOutputs(weight, bias)(x, relu, out)
        torch.testing.assert_close(actual, expected.relu() if relu else expected, rtol=1e-5, atol=1e-5)
    assert (whole != 0).sum() == (expected > 0).sum()


@pytest.mark.parametrize("seed", SEEDS)
def test_join(seed, times, monkeypatch):
    """The convolution of an upsampled map beside another."""
    rng, generator, coarse = example(seed)
    set_tile_elements(monkeypatch, times * rng.choice((60, 500, 1 << 22)))
    fine = torch.randn(len(coarse), 2 * times, 2 * coarse.shape[2], 2 * coarse.shape[3], generator=generator)
    both = conv(generator, 3 + 2 * times, 4 * times)
    left, right = both.weight.split([3, 2 * times], 1)
    upsampling = UpsampleConv(left, torch.zeros(4 * times), relu=False)
    start = JoinConv(Conv(right, both.bias), lambda w: layer_window(upsampling, coarse, w, fine))
    expected = both(torch.cat([F.interpolate(coarse, scale_factor=2), fine], 1)).relu()
    torch.testing.assert_close(run(Chain([start], 2 * times), fine), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS[:2])
def test_layer_window(seed):
    _, generator, x = example(seed)
    whole = F.interpolate(x, scale_factor=2)
    module = conv(generator, 3, 4)
    expected = module(whole)
    for window in (Window(0, 1, 0, 1), Window(1, 2, 3, 9), Window(2, 5, 1, 10), Window(7, 10, 0, whole.shape[3])):
        actual = layer_window(layer(UpsampleConv, module, False), x, window, x)
        torch.testing.assert_close(actual, window.of(expected), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(upsampled(x, window), window.of(whole), rtol=0, atol=0)


def test_smallest_maps():
    """Reflection needs two points."""
    generator = torch.Generator().manual_seed(0)
    x, module = torch.randn(1, 3, 2, 2, generator=generator), conv(generator, 3, 2)
    torch.testing.assert_close(run(Chain([layer(Conv, module)], 3), x), module(x).relu())
    one = torch.randn(1, 3, 1, 1, generator=generator)
    expected = module(F.interpolate(one, scale_factor=2)).relu()
    torch.testing.assert_close(run(Chain([layer(UpsampleConv, module)], 3), one), expected)


def test_upsampling_takes_four_ninths_of_the_operations():
    module = nn.Conv2d(6, 4, 3)
    assert layer(UpsampleConv, module).flops * 9 == layer(Conv, module).flops * 4
    assert layer(SmoothUpsampleConv, module).flops == layer(Conv, module).flops


@pytest.mark.parametrize("size", ((1, 1), (7, 1), (100, 3), (33, 65)))
def test_tiles_are_of_the_size_asked_for(size, monkeypatch):
    set_tile_elements(monkeypatch, 400)
    chain = Chain([layer(Conv, nn.Conv2d(3, 4, 3))], 3)
    tiles = chain.tiles(chain.sizes(size), "cpu", 1)
    assert sum(tile.size[0] * tile.size[1] for tile in tiles) == size[0] * size[1]
    assert max(tile.size[0] * tile.size[1] for tile in tiles) <= 130  # 100 points, rounded
