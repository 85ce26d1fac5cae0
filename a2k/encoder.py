"""Encoders: five feature maps relu1_1 .. relu5_1 of an image, each half the size of the one before.

`vgg19` and `vgg16` are the perceptual networks (frozen); `lite` and `styled` are small ones of the same form, trained
with the rest of their networks. `styled` first learns from a perceptual one.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from a2k.convolution import conv3x3

# Convolutions per scale, up to the one whose output is relu5_1.
PERCEPTUAL_DEPTHS = {"vgg19": (2, 2, 4, 4, 1), "vgg16": (2, 2, 3, 3, 1)}
ENCODER_DEPTHS = {**PERCEPTUAL_DEPTHS, "lite": (1, 1, 1, 1, 1), "styled": (1, 1, 1, 1, 1)}


class Encoder(nn.Module):
    """A VGG-style encoder (Simonyan & Zisserman 2015) with reflection padding and ceil-mode pooling.

    Its layers are `input` (1x1, the input normalisation) and `conv{scale}_{number}`, as in the literature.

    The features of "styled" are taken before the ReLU: after it, many channels are zero all over a picture, and have no
    statistics to match.

    Args:
        kind: "vgg19", "vgg16", "lite" or "styled".
        channels: of the five scales.
    """

    def __init__(self, kind: str, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.depths, self.channels = ENCODER_DEPTHS[kind], tuple(channels)
        self.features_before_relu = kind == "styled"
        self.input = nn.Conv2d(3, 3, 1)
        in_channels = 3
        for scale, (depth, out_channels) in enumerate(zip(self.depths, channels, strict=True), 1):
            for number in range(1, depth + 1):
                setattr(self, f"conv{scale}_{number}", conv3x3(in_channels, out_channels))
                in_channels = out_channels

    def forward(self, image: Tensor) -> list[Tensor]:
        """image: (B, 3, H, W) RGB in [0, 1], H, W >= 17. Returns relu1_1 .. relu5_1, sizes ceil(H / 2**k)."""
        x, features = self.input(image), []
        for scale, depth in enumerate(self.depths, 1):
            for number in range(1, depth + 1):
                convolved = getattr(self, f"conv{scale}_{number}")(x)
                x = F.relu(convolved, inplace=not self.features_before_relu)
                if number == 1:
                    features.append(convolved if self.features_before_relu else x)
            if scale < len(self.depths):
                x = F.max_pool2d(x, 2, ceil_mode=True)
        return features
