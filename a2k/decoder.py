"""The merge of the two coarse scales and the decoder that mirrors the encoder."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2k.encoder import ENCODER_DEPTHS, conv3x3

# Convolutions per scale; scale 4 has one, as published.
DECODER_DEPTHS = {**ENCODER_DEPTHS, "lite": (1, 2, 2, 1, 1)}


def upsample(x: Tensor) -> Tensor:
    """Twice the height and width, nearest neighbour."""
    return F.interpolate(x, scale_factor=2, mode="nearest")


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
                x = getattr(self, f"conv{scale}_{number}")(x)
                if (scale, number) != (1, 1):
                    x = F.relu(x, inplace=True)
            if scale > 1:
                x = upsample(x)
        return x
