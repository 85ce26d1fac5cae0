"""Seeded weights in the official files' format, as tests/data/golden.npz was made from."""

import numpy as np
import torch
from torch import Tensor

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, out_channels: int, in_channels: int, kernel: int) -> Shapes:
    return {f"{name}.weight": (out_channels, in_channels, kernel, kernel), f"{name}.bias": (out_channels,)}


def a2k_shapes(channels: int, prefix: str = "") -> Shapes:
    shapes = {f"{prefix}sim_alpha": (1,), f"{prefix}sim_beta": (1,)}
    for name in ("q", "k", "v", "q2", "k2", "v2", "fusion1", "fusion2"):
        shapes |= conv(prefix + name, channels, channels, 1)
    return shapes


def transform_shapes() -> Shapes:
    return a2k_shapes(512, "attn_adain_4_1.") | a2k_shapes(512, "attn_adain_5_1.") | conv("merge_conv", 512, 512, 3)


def vgg19_shapes() -> Shapes:
    """The whole official Sequential, up to relu5_4."""
    shapes, in_channels = conv("0", 3, 3, 1), 3
    places = (2, 5, 9, 12, 16, 19, 22, 25, 29, 32, 35, 38, 42, 45, 48, 51)
    widths = (64, 64, 128, 128, *[256] * 4, *[512] * 8)
    for place, width in zip(places, widths, strict=True):
        shapes |= conv(str(place), width, in_channels, 3)
        in_channels = width
    return shapes


def decoder_shapes() -> Shapes:
    shapes, in_channels = conv("decoder_layer_1.1", 256, 512, 3), 512
    for place, width in zip((1, 4, 7, 10, 14, 17, 21, 24), (256, 256, 256, 128, 128, 64, 64, 3), strict=True):
        shapes |= conv(f"decoder_layer_2.{place}", width, in_channels, 3)
        in_channels = width
    return shapes


def fill(shapes: Shapes, seed: int, gain: float) -> dict[str, Tensor]:
    """Seeded weights of the given shapes, drawn in order (shared/golden/README.md of the project's data)."""
    rng, weights = np.random.RandomState(seed), {}
    for name, shape in shapes.items():
        if name.endswith("sim_alpha"):
            values = np.full(shape, 1.3)
        elif name.endswith("sim_beta"):
            values = np.full(shape, -0.2)
        elif len(shape) == 4:
            values = rng.standard_normal(shape) * gain / np.sqrt(np.prod(shape[1:]))
        else:
            values = rng.standard_normal(shape) * 0.1
        weights[name] = torch.from_numpy(values).float()
    return weights


def official_files(seed: int, prefix: str = "") -> dict[str, dict[str, Tensor]]:
    """The four state dicts of the whole network, every key with the given prefix."""
    gain = 1.4142135
    files = {
        "vgg": fill(vgg19_shapes(), seed, gain),
        "a2k": fill(a2k_shapes(256), seed + 1, 1.0),
        "transform": fill(transform_shapes(), seed + 2, 1.0),
        "decoder": fill(decoder_shapes(), seed + 3, gain),
    }
    return {name: {prefix + key: x for key, x in weights.items()} for name, weights in files.items()}
