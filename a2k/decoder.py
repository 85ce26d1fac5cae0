"""Decoders: from the A2K outputs at three scales to a picture."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2k.attention import channel_statistics, normalize
from a2k.convolution import conv3x3
from a2k.encoder import ENCODER_DEPTHS

# Convolutions per scale; scale 4 has one, as published.
DECODER_DEPTHS = {**ENCODER_DEPTHS, "lite": (1, 2, 2, 1, 1)}

STYLE_FEATURES = 256  # width of the hidden layer between a style's statistics and the scales and shifts it sets
RESIDUAL_BLOCKS = {4: 2, 3: 2}  # by scale
NOISE_PERIOD = 256  # points after which a map's noise repeats, in both directions
LEAST_DEVIATION = 0.01  # of a statistic, between styles


def upsample(x: Tensor) -> Tensor:
    """Twice the height and width, nearest neighbour."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


def upsample_smoothly(x: Tensor) -> Tensor:
    """Twice the height and width, bilinear: what equal pairs of points leave in a picture is seen at full size."""
    return F.interpolate(x, scale_factor=2, mode="bilinear")


class Decoder(nn.Module):
    """Image from the A2K outputs at three scales (Zhu et al. 2023, section 3.1).

    `conv{scale}_{number}` mirrors the encoder's convolution of that name, `merge` joins scales 4 and 5.

    Args:
        kind: of the encoder to mirror: "vgg19", "vgg16" or "lite".
        channels: of the encoder's five scales.
    """

    def __init__(self, kind: str, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.depths = DECODER_DEPTHS[kind]
        c1, c2, c3, c4, _ = channels
        self.merge = conv3x3(c4, c4)
        self.conv4_1 = conv3x3(c4, c3)
        in_channels = 2 * c3
        for scale, width, out_channels in ((3, c3, c2), (2, c2, c1), (1, c1, 3)):
            for number in range(self.depths[scale - 1], 0, -1):
                out = out_channels if number == 1 else width
                setattr(self, f"conv{scale}_{number}", conv3x3(in_channels, out))
                in_channels = out

    def forward(self, x3: Tensor, x4: Tensor, x5: Tensor) -> Tensor:
        """x3: (B, c3, 4h, 4w), x4: (B, c4, 2h, 2w), x5: (B, c4, h, w). Returns RGB (B, 3, 16h, 16w), unclamped."""
        x = self.merge(x4 + upsample(x5))
        x = upsample(F.relu(self.conv4_1(x), inplace=True))
        x = torch.cat([x, x3], 1)
        for scale in (3, 2, 1):
            for number in range(self.depths[scale - 1], 0, -1):
                conv = getattr(self, f"conv{scale}_{number}")
                is_upsampled = scale < 3 and number == self.depths[scale - 1]
                x = conv.of_upsampled(x) if is_upsampled else conv(x)
                if (scale, number) != (1, 1):
                    x = F.relu(x, inplace=True)
        return x


def style_vector(features: list[Tensor]) -> Tensor:
    """Channel means and standard deviations of relu2_1 .. relu5_1, joined: (B, D), at least float32."""
    statistics = [channel_statistics(x) for x in features[1:]]
    return torch.cat([x for mean, variance in statistics for x in (mean, (variance + 1e-5).sqrt())], 1).flatten(1)


def noise_tile() -> Tensor:
    """White noise of variance 1, (NOISE_PERIOD, NOISE_PERIOD), the same always: numpy's old generator is frozen."""
    return torch.from_numpy(np.random.RandomState(0).standard_normal((NOISE_PERIOD, NOISE_PERIOD))).float()


def periodic_window(tile: Tensor, top: int, bottom: int, left: int, right: int) -> Tensor:
    """(..., bottom - top, right - left) of the plane that is covered with the tile (..., h, w)."""
    rows, cols = (
        torch.arange(*ends, device=tile.device) % period
        for ends, period in zip(((top, bottom), (left, right)), tile.shape[-2:], strict=True)
    )
    return tile.index_select(-2, rows).index_select(-1, cols)


class StyledConv(nn.Module):
    """3x3 convolution whose output gets, channel by channel, a mean and a deviation that the style sets
    (conditional instance normalisation, Dumoulin et al. 2017, Ghiasi et al. 2017), and grain: as much of one fixed
    noise as the style sets (Karras et al. 2019). Without it nothing could vary where the content does not.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = conv3x3(in_channels, out_channels)
        self.scale = nn.Linear(STYLE_FEATURES, out_channels)
        self.shift = nn.Linear(STYLE_FEATURES, out_channels)
        self.grain = nn.Linear(STYLE_FEATURES, out_channels)

    def forward(self, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
        """x: (B, C_in, H, W), style: (B, STYLE_FEATURES), noise: (H, W)."""
        scale, shift, grain = (linear(style)[:, :, None, None] for linear in (self.scale, self.shift, self.grain))
        x = self.conv(x)
        return (normalize(x) * scale + (shift + grain * noise)).to(x.dtype)


class StyledDecoder(nn.Module):
    """The decoder of `styled` networks: the style sets the statistics of its maps too, and edges come from relu2_1.

    `merge` and `conv4_1` as in `Decoder`, with residual blocks at scales 4 and 3, and one convolution each at scales 2
    and 1. The result is luminance, with grain, and colour differences; their scale is left to `a2k.colors`.
    """

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        c1, c2, c3, c4, c5 = channels
        statistics = 2 * (c2 + c3 + c4 + c5)
        self.register_buffer("vector_mean", torch.zeros(statistics))
        self.register_buffer("vector_deviation", torch.ones(statistics))
        self.register_buffer("noise", noise_tile(), persistent=False)
        self.style = nn.Linear(statistics, STYLE_FEATURES)
        self.merge = conv3x3(c4, c4)
        self.blocks4 = residual_blocks(c4, RESIDUAL_BLOCKS[4])
        self.conv4_1 = conv3x3(c4, c3)
        self.join = StyledConv(2 * c3, c3)
        self.blocks3 = residual_blocks(c3, RESIDUAL_BLOCKS[3])
        self.conv3_1 = StyledConv(c3 + c2, c2)
        self.conv2_1 = nn.Conv2d(c2, c1, 3, padding=1, padding_mode="replicate")
        self.conv1_1 = conv3x3(c1, 3)
        self.grain = nn.Linear(STYLE_FEATURES, 1)

    @torch.no_grad()
    def standardize(self, vectors: Tensor) -> None:
        """Learn what is usual from the vectors of many styles, (N, D): without it, the differences between styles are
        small beside what all have in common, and training follows them slowly.
        """
        self.vector_mean.copy_(vectors.mean(0))
        self.vector_deviation.copy_(vectors.std(0).clamp_min(LEAST_DEVIATION))

    def style_features(self, vector: Tensor) -> Tensor:
        """What sets scales and shifts: (B, STYLE_FEATURES), from the vector of a style.

        Inputs of linear layers are divided by the root of their number: a step of Adam, which moves all weights
        alike, would else throw the scales about (equalized learning rate, Karras et al. 2018).
        """
        vector = (vector - self.vector_mean) / (self.vector_deviation * self.style.in_features**0.5)
        return F.relu(self.style(vector.to(self.style.weight.dtype))) / self.style.out_features**0.5

    def forward(self, x3: Tensor, x4: Tensor, x5: Tensor, x2: Tensor, vector: Tensor) -> Tensor:
        """x2: (B, c2, 8h, 8w), vector: (B, D) of `style_vector`; the rest as for `Decoder`.

        Returns luminance and colour differences (B, 3, 16h, 16w).
        """
        style = self.style_features(vector)
        noise4, noise3, noise2 = (periodic_window(self.noise, 0, x.shape[2], 0, x.shape[3]) for x in (x4, x3, x2))
        x = add_blocks(self.blocks4, self.merge(x4 + upsample(x5)), style, noise4)
        x = upsample(F.relu(self.conv4_1(x), inplace=True))
        x = add_blocks(self.blocks3, F.relu(self.join(torch.cat([x, x3], 1), style, noise3)), style, noise3)
        x = F.relu(self.conv3_1(torch.cat([upsample(x), x2], 1), style, noise2))
        x = self.conv1_1(F.relu(self.conv2_1(upsample_smoothly(x)), inplace=True))
        noise1 = periodic_window(self.noise, 0, x.shape[2], 0, x.shape[3])
        grain = (self.grain(style)[:, :, None, None] * noise1).to(x.dtype)
        return torch.cat([x[:, :1] + grain, x[:, 1:]], 1)


def residual_blocks(channels: int, count: int) -> nn.ModuleList:
    """Two convolutions for each block."""
    return nn.ModuleList(StyledConv(channels, channels) for _ in range(2 * count))


def add_blocks(blocks: nn.ModuleList, x: Tensor, style: Tensor, noise: Tensor) -> Tensor:
    """x after the residual blocks, each of which adds what its two convolutions make of it."""
    for first, second in zip(blocks[::2], blocks[1::2], strict=True):
        x = x + second(F.relu(first(x, style, noise)), style, noise)
    return x
