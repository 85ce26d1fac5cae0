"""StyA2K prepared for inference: norm() folded into weights, projections fused, everything in tiles and bands.

Same results as `StyA2K.forward` to rounding, in memory bounded by the feature maps of three scales.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2k.aggregates import Projection, projected_aggregates
from a2k.attention import A2K
from a2k.colors import Colors, bands, colors_of, colors_of_parts, matching, planes_of
from a2k.decoder import StyledDecoder
from a2k.fused_decoder import FusedDecoder, FusedStyledDecoder, Map, MapMaker, Read, read_map
from a2k.images import from_levels, to_levels
from a2k.model import EncodedStyle, StyA2K, pad_content, pad_style, padded_size
from a2k.statistics import Statistics
from a2k.storage import Storage
from a2k.texture import Texture, gaps, texture_of, textured_window
from a2k.tiling import Chain, Conv, MaxPool, Size, Window
from a2k_kernels import attend_aggregates, progressive_attention

BAND_ELEMENTS = {"cpu": 1 << 24, "cuda": 1 << 27}  # of a feature map, per band of rows that attention takes at once


@dataclass(frozen=True)
class StyleKeys:
    """What an A2K module needs of a style; all tensors have its batch size.

    key_agg, value_agg: of distributed attention, (B, heads, n, d). key, value: of progressive attention, (B, C, H, W).
    center, deviation: of the style's channels, (B, C).
    """

    key_agg: Tensor
    value_agg: Tensor
    key: Tensor
    value: Tensor
    center: Tensor
    deviation: Tensor

    def expand(self, batch: int) -> "StyleKeys":
        """One style for a batch of contents, without copies."""
        return StyleKeys(*(x.expand(batch, *x.shape[1:]) for x in vars(self).values()))


def parameters_of(conv: nn.Conv2d) -> Projection:
    """Weight (C_out, C_in) and bias (C_out) of a 1x1 convolution, float32."""
    return conv.weight.detach().flatten(1).float(), conv.bias.detach().float()


def of_norm(projection: Projection, center: Tensor, deviation: Tensor, dtype: torch.dtype) -> Projection:
    """The projections of x that equal the given one of (x - center) / deviation, for a batch of those: (B, C_in).

    The bias makes up for the rounding of the weight to dtype.
    """
    weight, bias = projection
    weight = (weight / deviation[:, None]).to(dtype)
    return weight, bias - (weight.float() @ center[..., None])[..., 0]


def for_batch(projection: Projection, batch: int) -> Projection:
    """The same projection for each of a batch."""
    weight, bias = (x.expand(batch, *x.shape) for x in projection)
    return weight, bias


def side_by_side(*projections: Projection) -> Projection:
    """One projection to the outputs of all."""
    weights, biases = zip(*projections, strict=True)
    return torch.cat(weights, -2), torch.cat(biases, -1)


def project(x: Tensor, projections: Projection) -> Tensor:
    """x: (B, C_in, H, W) by a batch of B projections."""
    weight, bias = (parameter.to(x.dtype) for parameter in projections)
    return join([F.conv2d(x[i : i + 1], weight[i, :, :, None, None], bias[i]) for i in range(len(x))], 0)


def add_projected(x: Tensor, projections: Projection, out: Tensor) -> None:
    """Add to out, (B, C_out, H, W), what `project` makes of x."""
    weight, bias = (parameter.to(x.dtype) for parameter in projections)
    for i in range(len(x)):
        target, arguments = out[i : i + 1], (x[i : i + 1], weight[i, :, :, None, None], bias[i])
        if adds_to_output(x):
            geometry = [0, 0], [1, 1], [1, 1], 1  # padding, stride, dilation, groups
            torch.ops.mkldnn._convolution_pointwise_.binary(target, *arguments, *geometry, "add", None, None, [], None)
        else:
            target.add_(F.conv2d(*arguments))


def adds_to_output(x: Tensor) -> bool:
    """Whether there is a convolution that adds to its output, for tensors like x."""
    fits = x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return x.device.type == "cpu" and torch.backends.mkldnn.is_available() and fits


def join(parts: list[Tensor] | tuple[Tensor, ...], dim: int) -> Tensor:
    """torch.cat, which would copy a single part."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


class FusedA2K:
    """An A2K module, its norm() folded into the 1x1 convolutions and those of the same input computed as one."""

    def __init__(self, module: A2K) -> None:
        self.blocks = {"block_size": module.block_size, "num_heads": module.num_heads}
        self.gate = {"alpha": module.sim_alpha.detach(), "beta": module.sim_beta.detach()}
        self.backend, self.residual = module.backend, module.residual
        self.queries = side_by_side(parameters_of(module.q), parameters_of(module.q2))
        self.keys = parameters_of(module.k), parameters_of(module.k2)
        self.values = parameters_of(module.v), parameters_of(module.v2)
        self.fusions = parameters_of(module.fusion1), parameters_of(module.fusion2)

    def style_keys(self, style: Tensor, statistics: Statistics) -> StyleKeys:
        """style: (B, C, H, W) and its statistics."""
        batch, channels = style.shape[:2]
        norm = statistics.center, statistics.deviation
        key, value = of_norm(self.keys[0], *norm, torch.float32), for_batch(self.values[0], batch)
        bands = (band.of(style) for band in self._bands(style))
        aggregates = [projected_aggregates(band, key, value, **self.blocks, **self.gate) for band in bands]
        key, value = of_norm(self.keys[1], *norm, style.dtype), for_batch(self.values[1], batch)
        maps = project(style, side_by_side(key, value)).split(channels, 1)
        return StyleKeys(*(join(x, 2) for x in zip(*aggregates, strict=True)), *maps, *norm)

    def redraw(self, content: Tensor, statistics: Statistics, style: StyleKeys, strength: float) -> Iterator[int]:
        """Replace content (B, C, H, W) by x + strength * (A2K(content, style) - x); yields the flops of every band."""
        channels = content.shape[1]
        queries = of_norm(self.queries, statistics.center, statistics.deviation, content.dtype)
        gain = style.deviation / statistics.deviation
        shift = strength * (style.center - gain * statistics.center)
        scale, shift = (y[..., None, None].to(content.dtype) for y in (1 - strength + strength * gain, shift))
        fusions = [for_batch((strength * weight, strength * bias), len(content)) for weight, bias in self.fusions]
        for band in self._bands(content):
            x = band.of(content)
            q, q2 = project(x, queries).split(channels, 1)
            distributed = attend_aggregates(q, style.key_agg, style.value_agg, backend=self.backend)
            progressive = progressive_attention(q2, style.key, style.value, **self.blocks, backend=self.backend)
            if self.residual == "adain":
                torch.addcmul(shift, x, scale, out=x)
            for attended, projection in zip((distributed, progressive), fusions, strict=True):
                add_projected(attended, projection, x)
            yield self.flops(x.shape[-2:], style)

    def flops(self, size: Size, style: StyleKeys) -> int:
        """Of `redraw`, for one picture: projections, distributed attention, matching, block attention."""
        channels, keys, points = style.key.shape[1], style.key_agg.shape[2], self.blocks["block_size"] ** 2
        return size[0] * size[1] * channels * (8 * channels + 4 * keys + 2 * keys + 4 * points)

    def _bands(self, x: Tensor) -> list[Window]:
        """Whole rows of blocks, of about BAND_ELEMENTS elements."""
        _, _, height, width = x.shape
        block_size = self.blocks["block_size"]
        elements = x[:, :, :block_size].numel()
        rows = block_size * max(1, BAND_ELEMENTS[x.device.type] // elements)
        return [Window(top, min(height, top + rows), 0, width) for top in range(0, height, rows)]


@dataclass(frozen=True)
class Style:
    """Of one or several paintings: keys for the A2K modules at scales 3, 4, 5, the statistics of the maps that the
    decoder asks for, and, for a styled network, colours and texture.
    """

    keys: tuple[StyleKeys, ...]
    statistics: tuple[Statistics, ...]
    colors: Colors | None
    texture: Texture | None


Progress = Callable[[int], object]  # takes the floating-point operations, per picture, done since the last call


class FusedStyA2K:
    """A StyA2K network for inference on pictures of any size.

    Args:
        model: the network; where nothing is folded into its parameters, they are shared.
        max_memory: bytes that feature maps may take, see `a2k.storage`. None: what is free.
    """

    def __init__(self, model: StyA2K, max_memory: int | None = None) -> None:
        self.parameter = next(model.parameters()).detach()
        self.max_memory = max_memory
        self.styled = styled = isinstance(model.decoder, StyledDecoder)
        self.encoder = encoder_chains(model, first_scale=2 if styled else 3)
        self.modules = [FusedA2K(module) for module in (model.a2k3, model.a2k4, model.a2k5)]
        self.decoder = FusedStyledDecoder(model.decoder) if styled else FusedDecoder(model.decoder)

    @torch.inference_mode()
    def encode_style(self, image: Tensor, progress: Progress = int) -> Style:
        """image: (B, 3, H, W) RGB, uint8 or floating point in [0, 1]."""
        padded = pad_style(image)
        maps = self._encode(tuple(padded.shape[-2:]), read_pixels(padded), self._map_maker(len(image), progress))
        keys = (module.style_keys(*pair) for module, pair in zip(self.modules, maps[-3:], strict=True))
        statistics = tuple(x.statistics for x in maps)
        colors, texture = (colors_of(image), texture_of(padded)) if self.styled else (None, None)
        return Style(tuple(keys), statistics, colors, texture)

    @torch.inference_mode()
    def stylize(self, content: Tensor, style: Style, strength: float = 1.0, progress: Progress = int) -> Tensor:
        """Redraw content in the manner of a style.

        content: (B, 3, H, W) RGB, uint8 or floating point in [0, 1]. style: of B pictures or of one. strength: from 0
        to 1. Returns RGB (B, 3, H, W) of the content's dtype and device; floating-point results are not clamped.
        Raises ImageError if a uint8 result would have to be NaN.
        """
        padded, maker = pad_content(content), self._map_maker(len(content), progress)
        maps = self._encode(tuple(padded.shape[-2:]), read_pixels(padded, style.texture, strength), maker)
        if strength:
            for module, (x, statistics), keys in zip(self.modules, maps[-3:], style.keys, strict=True):
                for flops in module.redraw(x, statistics, keys.expand(len(x)), strength):
                    progress(flops)
        if self.styled:
            return self._paint_in_colors(maps, content, style, strength, maker)
        out = torch.empty_like(padded)

        def write(window: Window, tile: Tensor) -> None:
            window.of(out).copy_(tile if out.is_floating_point() else to_levels(tile))

        self.decoder.run(maps, style.statistics, strength, write, maker)
        return out[:, :, : content.shape[2], : content.shape[3]]

    def _paint_in_colors(
        self, maps: list[Map], content: Tensor, style: Style, strength: float, maker: MapMaker
    ) -> Tensor:
        """The decoder's result in the colours of the style, of the content's size, dtype and device."""
        x = maker.storage.new_map(len(content), 3, padded_size(content.shape[-2:]), self.parameter.dtype)
        self.decoder.run(maps, style.statistics, strength, lambda window, tile: window.of(x).copy_(tile), maker)
        x = x[:, :, : content.shape[2], : content.shape[3]]
        colors = style.colors if strength == 1 else colors_of(content).towards(style.colors, strength)
        parts = (planes_of(band.to(self.parameter.device).float()) for band in bands(x))
        matrix, shift = matching(colors_of_parts(parts), colors)
        out = torch.empty_like(content)
        for band, target in zip(bands(x), bands(out), strict=True):
            planes = matrix @ planes_of(band.to(self.parameter.device).float()) + shift
            painted = planes.unflatten(2, band.shape[2:])
            target.copy_(painted if out.is_floating_point() else to_levels(painted))
        return out

    def work(self, size: Size, style: Style | None = None) -> int:
        """Floating-point operations of `stylize` for a content of that height and width, or of `encode_style`."""
        if not style:
            return self._encoding_work(size)
        size = padded_size(size)
        scales = [tuple(side // 2**halvings for side in size) for halvings in (2, 3, 4)]
        redrawing = sum(m.flops(s, k) for m, s, k in zip(self.modules, scales, style.keys, strict=True))
        return self._encoding_work(size) + redrawing + self.decoder.work(scales[0])

    def _encoding_work(self, size: Size) -> int:
        flops = 0
        for chain in self.encoder:
            flops += chain.work(size)
            size = chain.sizes(size)[-1]
        return flops

    def _map_maker(self, batch: int, progress: Progress) -> MapMaker:
        like = self.parameter.new_empty(batch)
        return MapMaker(Storage(self.parameter.device, self.max_memory), like, progress)

    def _encode(self, size: Size, read: Read, maker: MapMaker) -> list[Map]:
        """relu3_1, relu4_1, relu5_1 and their statistics, of a picture of that size; before them relu2_1 if the
        decoder is a styled one.
        """
        maps = []
        for chain in self.encoder:
            maps.append(maker.measure(chain, size, read))
            size, read = tuple(maps[-1].x.shape[-2:]), read_map(maps[-1].x)
        return maps


def read_pixels(image: Tensor, texture: Texture | None = None, strength: float = 1.0) -> Read:
    """How a chain reads its windows from pictures, whose smooth parts are filled with the texture, if there is one."""
    if texture is None or strength == 0:
        return lambda window, out: from_levels(window.of(image), out)
    amount = strength * gaps(image, texture)

    def read(window: Window, out: Tensor) -> None:
        pixels = from_levels(window.of(image), out)
        out.copy_(textured_window(pixels, amount, texture, window.top, window.left))

    return read


class CompiledStyA2K:
    """The plain network through torch.compile, whole pictures at once: for a GPU and many pictures of few sizes.

    Same methods as `FusedStyA2K`.
    """

    def __init__(self, model: StyA2K) -> None:
        self.parameter = next(model.parameters()).detach()
        self._encode = torch.compile(model.encoder)
        self._redraw = torch.compile(model.redraw)
        self._texture_of = model.texture_of

    @torch.inference_mode()
    def encode_style(self, image: Tensor, progress: Progress = int) -> EncodedStyle:
        """image: (B, 3, H, W) RGB, uint8 or floating point in [0, 1]."""
        padded = pad_style(image)
        return EncodedStyle(self._encode(self._pixels(padded)), colors_of(image), self._texture_of(padded))

    @torch.inference_mode()
    def stylize(self, content: Tensor, style: EncodedStyle, strength: float = 1.0, progress: Progress = int) -> Tensor:
        """See `FusedStyA2K.stylize`."""
        features = [x.expand(len(content), *x.shape[1:]) for x in style.features]
        out = self._redraw(self._pixels(content), style._replace(features=features), strength)
        return out if content.is_floating_point() else to_levels(out)

    def work(self, size: Size, style: EncodedStyle | None = None) -> int:
        """1: there is nothing to see before the end."""
        return 1

    def _pixels(self, image: Tensor) -> Tensor:
        out = torch.empty_like(image, dtype=self.parameter.dtype, memory_format=torch.channels_last)
        return from_levels(image, out)


def encoder_chains(model: StyA2K, first_scale: int) -> list[Chain]:
    """From the image to relu{first_scale}_1, from there to relu{first_scale + 1}_1, and so on to relu5_1."""
    encoder, chains, layers, channels = model.encoder, [], [], 3
    for scale, depth in enumerate(encoder.depths, 1):
        for number in range(1, depth + 1):
            conv = getattr(encoder, f"conv{scale}_{number}")
            is_feature = number == 1 and scale >= first_scale
            is_pooled = number == depth and scale < 5
            weight, bias = conv.weight, conv.bias
            if (scale, number) == (1, 1):
                weight, bias = after_1x1(encoder.input, conv)
            relu = not encoder.features_before_relu if is_feature else not is_pooled
            layers.append(Conv(weight, bias, relu))
            if is_feature:
                chains.append(Chain(layers, channels))
                layers, channels = [], len(weight)
            if is_pooled:  # ReLU may follow the maximum, on a quarter of the points
                layers.append(MaxPool(len(weight), relu=encoder.features_before_relu or not is_feature))
    return chains


def after_1x1(first: nn.Conv2d, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Weight and bias of one convolution that equals a 1x1 convolution and then conv."""
    weight = torch.einsum("ojyx,ji->oiyx", conv.weight.float(), first.weight[:, :, 0, 0].float())
    bias = conv.bias + torch.einsum("ojyx,j->o", conv.weight.float(), first.bias.float())
    return weight.to(conv.weight.dtype), bias.to(conv.bias.dtype)
