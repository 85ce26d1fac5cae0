"""The decoders for inference, in tiles; what is convolved after upsampling is convolved before it."""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2k.decoder import Decoder, StyledConv, StyledDecoder, periodic_window
from a2k.statistics import Statistics
from a2k.storage import Storage
from a2k.tiling import Chain, Conv, JoinConv, Size, SmoothUpsampleConv, UpsampleConv, Window, layer_window, upsampled

BAND_ROWS = {"cpu": 32, "cuda": 1024}  # of a map that is scaled in place
NOISE_WINDOWS = 16  # that are kept, for maps of one size need the same ones

Read = Callable[[Window, Tensor], object]  # fills a tensor with a window of a map
Write = Callable[[Window, Tensor], object]  # takes a window of a map
Noise = Callable[[Window], Tensor]  # a window of a plane of noise, (h, w)


class Map(NamedTuple):
    """A feature map (B, C, H, W) and its statistics."""

    x: Tensor
    statistics: Statistics


class MapMaker:
    """Computes chains into new maps.

    Args:
        storage: of the maps. like: a tensor of the batch size, dtype and device to compute with. progress: takes the
        floating-point operations, per picture, done since the last call.
    """

    def __init__(self, storage: Storage, like: Tensor, progress: Callable[[int], object]) -> None:
        self.storage, self.like, self.progress = storage, like, progress

    def run(self, chain: Chain, size: Size, read: Read, add: Callable[[Tensor], object] = id) -> Tensor:
        """The chain's output, for an input of that size, as a new map; add takes its tiles too."""
        whole, made = chain.sizes(size)[-1], []

        def write(window: Window, tile: Tensor) -> None:
            add(tile)
            if window.size == whole and self.storage.keep(tile):
                made.append(tile)
                return
            if not made:
                made.append(self.storage.new_map(len(tile), tile.shape[1], whole, tile.dtype))
            window.of(made[0]).copy_(tile)

        self.run_into(chain, size, read, write)
        return made[0]

    def measure(self, chain: Chain, size: Size, read: Read) -> Map:
        """As `run`, with the statistics of the new map."""
        statistics = Statistics()
        return Map(self.run(chain, size, read, statistics.add), statistics)

    def run_into(self, chain: Chain, size: Size, read: Read, write: Write) -> None:
        """Hand every window of the chain's output to write."""
        for flops in chain.run(size, read, write, self.like):
            self.progress(flops)


def read_map(x: Tensor) -> Read:
    """How a chain reads its windows from a map."""
    return lambda window, out: out.copy_(window.of(x))


def read_sum(x: Tensor, coarse: Tensor) -> Read:
    """How a chain reads its windows from the sum of a map and another one upsampled by two."""
    return lambda window, out: out.copy_(window.of(x)).add_(upsampled(coarse, window).to(out.device))


class Scaling(NamedTuple):
    """scale * x + shift + grain * noise of maps x: per channel, (B, C) float32; the last two may be left out."""

    scale: Tensor
    shift: Tensor
    grain: Tensor | None = None
    noise: Noise | None = None

    def fill(self, out: Tensor, x: Tensor, window: Window) -> Tensor:
        """out, of the scaled window of the map x."""
        scale, shift = (parameter[:, :, None, None].to(out) for parameter in (self.scale, self.shift))
        torch.addcmul(shift, window.of(x).to(out.device), scale, out=out)
        if self.noise is not None:
            out.addcmul_(self.grain[:, :, None, None].to(out), self.noise(window).to(out))
        return out

    def bands(self, x: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Bands of rows of the scaled map x, and the same bands of out."""
        rows = BAND_ROWS[self.scale.device.type]
        for top in range(0, x.shape[2], rows):
            window = Window(top, min(x.shape[2], top + rows), 0, x.shape[3])
            target = window.of(out)
            yield self.fill(torch.empty_like(target), x, window), target


def read_scaled(x: Tensor, scaling: Scaling, relu: bool) -> Read:
    """How a chain reads its windows from a scaled map, through ReLU if asked for."""

    def read(window: Window, out: Tensor) -> None:
        scaling.fill(out, x, window)
        if relu:
            out.relu_()

    return read


class JoinedConv:
    """3x3 convolution of a coarse map, upsampled by two, beside a fine one."""

    def __init__(self, conv: nn.Conv2d, coarse_channels: int, relu: bool) -> None:
        coarse, fine = conv.weight.split([coarse_channels, conv.in_channels - coarse_channels], 1)
        self.coarse = UpsampleConv(coarse, torch.zeros_like(conv.bias), relu=False)
        self.fine = Conv(fine, conv.bias, relu)

    def work(self, size: Size) -> int:
        """Floating-point operations for a fine map of that size."""
        return (self.coarse.flops + self.fine.flops) * size[0] * size[1]

    def layer(self, coarse: Tensor, like: Tensor) -> JoinConv:
        """The convolution as a layer of the fine map."""
        layer = JoinConv(self.fine, lambda window: layer_window(self.coarse, coarse, window, like))
        layer.flops += self.coarse.flops
        return layer


class FusedDecoder:
    """The published decoder."""

    def __init__(self, decoder: Decoder) -> None:
        def convs(scale: int) -> list[nn.Conv2d]:
            return [getattr(decoder, f"conv{scale}_{number}") for number in range(decoder.depths[scale - 1], 0, -1)]

        def layers(scale: int) -> list[Conv]:
            first, *rest = convs(scale)
            last = convs(1)[-1]
            return [
                UpsampleConv(first.weight, first.bias, first is not last),
                *(Conv(x.weight, x.bias, x is not last) for x in rest),
            ]

        merge, conv4_1 = decoder.merge, decoder.conv4_1
        layers4 = [Conv(merge.weight, merge.bias, relu=False), Conv(conv4_1.weight, conv4_1.bias)]
        self.merge = Chain(layers4, merge.in_channels)
        joint, *rest = convs(3)
        self.join = JoinedConv(joint, decoder.conv4_1.out_channels, relu=True)
        self.rest = [Conv(x.weight, x.bias) for x in rest]
        self.paint = Chain([*layers(2), *layers(1)], rest[-1].out_channels)

    def work(self, size: Size) -> int:
        """Floating-point operations for a map of that size at scale 3."""
        half = size[0] // 2, size[1] // 2
        rest = sum(layer.flops for layer in self.rest) * size[0] * size[1]
        return self.merge.work(half) + self.join.work(size) + rest + self.paint.work(size)

    def run(
        self, maps: list[Map], _style: Sequence[Statistics], _strength: float, write: Write, maker: MapMaker
    ) -> None:
        """Paint a picture from the A2K outputs at scales 3, 4, 5, whose list is emptied."""
        x3, x4, x5 = (maps.pop(0).x for _ in range(3))
        x = maker.run(self.merge, tuple(x4.shape[-2:]), read_sum(x4, x5))
        join = Chain([self.join.layer(x, maker.like), *self.rest], x3.shape[1])
        x = maker.run(join, tuple(x3.shape[-2:]), read_map(x3))
        maker.run_into(self.paint, tuple(x.shape[-2:]), read_map(x), write)


def style_vector(statistics: Sequence[Statistics]) -> Tensor:
    """As `a2k.decoder.style_vector`: (B, D) float32."""
    return torch.cat([x for of_map in statistics for x in (of_map.center, of_map.deviation)], 1)


class Styling:
    """What a style makes of the output of a `StyledConv`'s convolution."""

    def __init__(self, conv: StyledConv) -> None:
        linears = conv.scale, conv.shift, conv.grain
        self.weight = torch.cat([linear.weight.detach() for linear in linears])
        self.bias = torch.cat([linear.bias.detach() for linear in linears])

    def scaling(self, statistics: Statistics, style: Tensor, noise: Noise) -> Scaling:
        """Of a map with these statistics; style: (B, STYLE_FEATURES)."""
        scale, shift, grain = F.linear(style.to(self.weight.dtype), self.weight, self.bias).float().chunk(3, 1)
        scale = scale / statistics.deviation
        return Scaling(scale, shift - scale * statistics.center, grain, noise)


def matched(own: Statistics, style: Statistics, strength: float) -> Scaling:
    """What makes x + strength * (match_statistics(x, style) - x) of x."""
    gain = style.deviation / own.deviation
    return Scaling(1 - strength + strength * gain, strength * (style.center - gain * own.center))


class FusedStyledDecoder:
    """The small network's decoder: every map is stored before its statistics are known, and scaled where it is read."""

    def __init__(self, decoder: StyledDecoder) -> None:
        self.decoder = decoder
        merge, conv4_1 = decoder.merge, decoder.conv4_1
        self.merge = Chain([Conv(merge.weight, merge.bias, relu=False)], merge.in_channels)
        self.blocks4 = FusedBlocks(decoder.blocks4)
        self.narrow = Chain([Conv(conv4_1.weight, conv4_1.bias)], conv4_1.in_channels)
        coarse_channels = conv4_1.out_channels
        self.join = JoinedConv(decoder.join.conv, coarse_channels, relu=False)
        self.join_styling = Styling(decoder.join)
        self.blocks3 = FusedBlocks(decoder.blocks3)
        self.edges = JoinedConv(decoder.conv3_1.conv, coarse_channels, relu=False)
        self.edges_styling = Styling(decoder.conv3_1)
        conv2_1, conv1_1 = decoder.conv2_1, decoder.conv1_1
        layers = [SmoothUpsampleConv(conv2_1.weight, conv2_1.bias), Conv(conv1_1.weight, conv1_1.bias, relu=False)]
        self.paint = Chain(layers, conv2_1.in_channels)

    def work(self, size: Size) -> int:
        """Floating-point operations for a map of that size at scale 3."""
        half, double = (size[0] // 2, size[1] // 2), (2 * size[0], 2 * size[1])
        at_half = self.merge.work(half) + self.blocks4.work(half) + self.narrow.work(half)
        at_full = self.join.work(size) + self.blocks3.work(size)
        return at_half + at_full + self.edges.work(double) + self.paint.work(double)

    def run(self, maps: list[Map], style: Sequence[Statistics], strength: float, write: Write, maker: MapMaker) -> None:
        """Luminance and colour differences from relu2_1 and the A2K outputs at scales 3, 4, 5, whose list is emptied.

        The statistics of maps are those of the content's features, those of the style come beside them.
        """
        own = style_vector([statistics for _, statistics in maps])
        vector = own + strength * (style_vector(style) - own)
        style_features = self.decoder.style_features(vector)
        noise = lru_cache(NOISE_WINDOWS)(lambda window: periodic_window(self.decoder.noise, *window))
        matching = matched(maps[0].statistics, style[0], strength)
        edges, x3, x4, x5 = (maps.pop(0).x for _ in range(4))
        half_size, size, fine_size = (tuple(x.shape[-2:]) for x in (x4, x3, edges))

        x = maker.run(self.merge, half_size, read_sum(x4, x5))
        del x4, x5
        self.blocks4.add(x, style_features, noise, maker)
        x = maker.run(self.narrow, half_size, read_map(x))
        x, statistics = maker.measure(Chain([self.join.layer(x, maker.like)], x3.shape[1]), size, read_map(x3))
        del x3
        for band, target in self.join_styling.scaling(statistics, style_features, noise).bands(x, x):
            target.copy_(band.relu_())
        self.blocks3.add(x, style_features, noise, maker)
        chain = Chain([self.edges.layer(x, maker.like)], edges.shape[1])
        x, statistics = maker.measure(chain, fine_size, read_scaled(edges, matching, relu=False))
        del edges
        scaling = self.edges_styling.scaling(statistics, style_features, noise)
        grain = self.decoder.grain(style_features)[:, :, None, None]

        def write_grained(window: Window, tile: Tensor) -> None:
            tile[:, :1] += (grain * noise(window)).to(tile.dtype)
            write(window, tile)

        maker.run_into(self.paint, fine_size, read_scaled(x, scaling, relu=True), write_grained)


class FusedBlocks:
    """Residual blocks of a styled decoder."""

    def __init__(self, blocks: Sequence[StyledConv]) -> None:
        self.stylings = [Styling(block) for block in blocks]
        self.convs = [Conv(block.conv.weight, block.conv.bias, relu=False) for block in blocks]

    def work(self, size: Size) -> int:
        """Floating-point operations for a map of that size."""
        return sum(conv.flops for conv in self.convs) * size[0] * size[1]

    def add(self, x: Tensor, style_features: Tensor, noise: Noise, maker: MapMaker) -> None:
        """Add to the map x what every block makes of it."""
        size, read = tuple(x.shape[-2:]), read_map(x)
        for number, (styling, conv) in enumerate(zip(self.stylings, self.convs, strict=True)):
            inner, statistics = maker.measure(Chain([conv], x.shape[1]), size, read)
            scaling = styling.scaling(statistics, style_features, noise)
            read = read_scaled(inner, scaling, relu=True)
            if number % 2:
                for band, target in scaling.bands(inner, x):
                    target.add_(band)
                read = read_map(x)
