"""The StyA2K network: encoder, A2K at three scales, merge and decoder."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from a2k.attention import A2K, RESIDUALS, match_statistics
from a2k.colors import Colors, colors_of, match_colors
from a2k.decoder import Decoder, StyledConv, StyledDecoder, style_vector
from a2k.encoder import ENCODER_DEPTHS, Encoder
from a2k.texture import Texture, add_texture, texture_of

MULTIPLE = 16  # content sizes are padded to a multiple of this, so that every scale halves exactly
MINIMUM = 32  # shortest side, so that relu5_1 has at least 2 points to reflect


@dataclass(frozen=True)
class StyA2KConfig:
    """Shape of a StyA2K network. The defaults are the published one.

    encoder: "vgg19", "vgg16", "lite" or "styled". channels: of the encoder's five scales. block_sizes: of the A2K
    modules at scales 3, 4, 5. num_heads: of each of them. residual: "content" or "adain", see `A2K`.
    """

    encoder: str = "vgg19"
    channels: tuple[int, ...] = (64, 128, 256, 512, 512)
    block_sizes: tuple[int, ...] = (8, 8, 4)
    num_heads: int = 8
    residual: str = "content"

    def __post_init__(self) -> None:
        object.__setattr__(self, "channels", tuple(self.channels))
        object.__setattr__(self, "block_sizes", tuple(self.block_sizes))
        numbers = (*self.channels, *self.block_sizes, self.num_heads)
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError(f"channels, block_sizes and num_heads are {numbers}; they must be whole numbers")
        if self.encoder not in ENCODER_DEPTHS:
            raise ValueError(f"encoder is {self.encoder!r}; choose one of {', '.join(ENCODER_DEPTHS)}")
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual is {self.residual!r}; choose one of {', '.join(RESIDUALS)}")
        if len(self.channels) != 5 or min(self.channels) < 1:
            raise ValueError(f"channels is {self.channels}; it must be five positive numbers")
        if self.channels[3] != self.channels[4]:
            raise ValueError(f"channels is {self.channels}; scales 4 and 5 are added, so must be equally wide")
        if len(self.block_sizes) != 3 or min(self.block_sizes) < 1:
            raise ValueError(f"block_sizes is {self.block_sizes}; it must be three positive numbers")
        if self.num_heads < 1 or any(c % self.num_heads for c in self.channels[2:]):
            raise ValueError(f"num_heads={self.num_heads} does not divide the channels {self.channels[2:]}")


CONFIGS = {
    "vgg19": StyA2KConfig(),
    "vgg16": StyA2KConfig(encoder="vgg16"),
    "lite": StyA2KConfig(encoder="lite", channels=(24, 48, 96, 192, 192), num_heads=4, residual="adain"),
    "styled": StyA2KConfig(encoder="styled", channels=(16, 32, 64, 128, 128), num_heads=4, residual="adain"),
}


def pad_image(image: Tensor, size: tuple[int, int]) -> Tensor:
    """Pad right and bottom to (height, width) by reflection, or by replication where that is impossible.

    Takes any dtype, which F.pad does not.
    """
    for dim, (old, new) in enumerate(zip(image.shape[2:], size, strict=True), 2):
        if new > old:
            place = torch.arange(new, device=image.device)
            mirrored = 2 * (old - 1) - place if new - old < old else torch.full_like(place, old - 1)
            image = image.index_select(dim, torch.where(place < old, place, mirrored))
    return image


def padded_size(size: tuple[int, int]) -> tuple[int, int]:
    """Height and width as multiples of 16, at least 32."""
    height, width = (max(MINIMUM, -(-n // MULTIPLE) * MULTIPLE) for n in size)
    return height, width


def pad_content(image: Tensor) -> Tensor:
    """Pad to multiples of 16, at least 32."""
    return pad_image(image, padded_size(image.shape[-2:]))


def pad_style(image: Tensor) -> Tensor:
    """Pad to at least 32; larger styles stay as they are."""
    height, width = (max(MINIMUM, n) for n in image.shape[-2:])
    return pad_image(image, (height, width))


class EncodedStyle(NamedTuple):
    """Of paintings: the five feature maps, the colours, and, for a styled network, the texture."""

    features: list[Tensor]
    colors: Colors
    texture: Texture | None


class StyA2K(nn.Module):
    """Arbitrary style transfer by all-to-key attention (Zhu et al. 2023).

    Args:
        config: shape of the network; the published one by default.
        backend: of the attention operations, see `a2k_kernels`.
    """

    def __init__(self, config: StyA2KConfig | None = None, backend: str | None = None) -> None:
        super().__init__()
        self.config = config = config or StyA2KConfig()
        self.encoder = Encoder(config.encoder, config.channels)
        for scale, block_size in zip((3, 4, 5), config.block_sizes, strict=True):
            module = A2K(config.channels[scale - 1], block_size, config.num_heads, config.residual, backend)
            setattr(self, f"a2k{scale}", module)
        styled = config.encoder == "styled"
        self.decoder = StyledDecoder(config.channels) if styled else Decoder(config.encoder, config.channels)
        if config.encoder in ("lite", "styled"):
            for module in (self.encoder, self.decoder):
                module.apply(init_kaiming)
        else:
            self.decoder.apply(init_published)
            self.encoder.requires_grad_(False)

    def forward(self, content: Tensor, style: Tensor, strength: float = 1.0) -> Tensor:
        """Redraw content in the manner of style.

        content: (B, 3, H, W), style: (B, 3, H_s, W_s), RGB in [0, 1]. strength: 0 keeps the content's features,
        1 is the published network. Returns RGB (B, 3, H, W), unclamped.
        """
        return self.redraw(content, self.encode_style(style), strength)

    def encode_style(self, style: Tensor) -> EncodedStyle:
        """style: (B, 3, H_s, W_s), RGB in [0, 1]."""
        padded = pad_style(style)
        return EncodedStyle(self.encoder(padded), colors_of(style), self.texture_of(padded))

    def texture_of(self, style: Tensor) -> Texture | None:
        """What a styled network fills smooth parts of photos with."""
        return texture_of(style) if isinstance(self.decoder, StyledDecoder) else None

    def redraw(self, content: Tensor, style: EncodedStyle, strength: float = 1.0) -> Tensor:
        """As forward, from what `encode_style` returns."""
        features = self.encoder(add_texture(pad_content(content), style.texture, strength))
        out = self.decoder(*self.transform(features, style.features, strength))
        out = out[:, :, : content.shape[2], : content.shape[3]]
        if not isinstance(self.decoder, StyledDecoder):
            return out
        colors = style.colors if strength == 1 else colors_of(content).towards(style.colors, strength)
        return match_colors(out, colors).to(content.dtype)

    def transform(
        self, content_features: list[Tensor], style_features: list[Tensor], strength: float = 1.0
    ) -> list[Tensor]:
        """What the decoder takes, from the five feature maps of content and style: the A2K outputs at scales 3, 4, 5,
        and for a styled decoder relu2_1 with the style's statistics, and the style's vector.
        """
        styled = isinstance(self.decoder, StyledDecoder)
        own = list(content_features[2:])
        if styled:
            own += [content_features[1], style_vector(content_features)]
        if strength == 0:
            return own
        pairs = zip((self.a2k3, self.a2k4, self.a2k5), content_features[2:], style_features[2:], strict=True)
        out = [module(content, style) for module, content, style in pairs]
        if styled:
            edges = match_statistics(content_features[1], style_features[1])
            out += [edges.to(content_features[1].dtype), style_vector(style_features)]
        if strength == 1:
            return out
        return [c + strength * (x - c) for c, x in zip(own, out, strict=True)]


def init_published(module: nn.Module) -> None:
    """Weights N(0, 0.02), biases 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


def init_kaiming(module: nn.Module) -> None:
    """Weights that keep the variance through ReLU (He et al. 2015), biases 0; styled scales near 1, shifts near 0."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
        nn.init.zeros_(module.bias)
    if isinstance(module, StyledConv):
        for linear, bias in ((module.scale, 1.0), (module.shift, 0.0)):
            nn.init.normal_(linear.weight, std=0.1)
            nn.init.constant_(linear.bias, bias)
    if isinstance(module, StyledConv | StyledDecoder):
        nn.init.zeros_(module.grain.weight)
        nn.init.zeros_(module.grain.bias)
    if isinstance(module, StyledDecoder):
        nn.init.constant_(module.grain.bias, 0.05)  # its sign means nothing, but between the two lies no grain
        nn.init.normal_(module.style.weight, std=2**0.5)
        nn.init.zeros_(module.style.bias)
        with torch.no_grad():  # else all colours would be nearly one, the mean of the channels
            module.conv1_1.weight -= module.conv1_1.weight.mean(1, keepdim=True)
