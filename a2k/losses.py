"""Training losses (Zhu et al. 2023, section 3.4) on lists of the five feature maps relu1_1 .. relu5_1.

Targets carry no gradient. A loss is a float32 scalar (float64 for float64 features) of weight 1; the published weights
are in `a2k.train_options`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from a2k.attention import at_least_float32, channel_statistics, normalize
from a2k_kernels import distributed_attention, progressive_attention

LOCAL_BLOCK_SIZES = (16, 8, 8, 4)  # at relu2_1 .. relu5_1
KNEE = 20.0  # where features are compressed, those well above it count by their logarithm
# Of `robust_style_loss`, at relu1_1 .. relu4_1. Weights: a small network else neglects fine strokes. Differences are
# squared up to a knee; that of relu4_1 is higher, as one of its channels is a hundred strong in enlarged paintings.
ROBUST_WEIGHTS = (1.5, 1.5, 1.2, 1.1)
ROBUST_KNEES = (3.0, 3.0, 3.0, 10.0)


def global_style_loss(output_features: list[Tensor], style_features: list[Tensor]) -> Tensor:
    """Sum over relu1_1 .. relu4_1 of the MSE of channel means plus the MSE of channel standard deviations.

    The two lists may have different H, W.
    """
    with torch.no_grad():
        targets = style_statistics(style_features)
    return global_distance(style_statistics(output_features), targets)


def global_distance(statistics: list[Tensor], targets: list[Tensor]) -> Tensor:
    """`global_style_loss` of two results of `style_statistics`."""
    return sum(F.mse_loss(x, target) for x, target in zip(statistics, targets, strict=True))


def robust_style_loss(output_features: list[Tensor], style_features: list[Tensor]) -> Tensor:
    """`global_style_loss` in which no channel can drown the others: a difference d above the knee D counts as
    2 D |d| - D^2 in place of d^2 (Huber 1964), see ROBUST_KNEES; scales are weighted by ROBUST_WEIGHTS.

    A few channels of VGG16 fire rarely and then a hundred times stronger than the rest. On a step in which one does,
    the gradient of the plain loss is its alone, and a network trained from scratch loses the others.
    """
    with torch.no_grad():
        targets = style_statistics(style_features)
    return robust_distance(style_statistics(output_features), targets)


def robust_distance(statistics: list[Tensor], targets: list[Tensor]) -> Tensor:
    """`robust_style_loss` of two results of `style_statistics`."""
    of_scales = [
        of_scale for of_scale in zip(ROBUST_WEIGHTS, ROBUST_KNEES, strict=True) for _ in range(2)
    ]  # mean and deviation
    return sum(
        2 * weight * F.huber_loss(x, target, delta=knee)
        for (weight, knee), x, target in zip(of_scales, statistics, targets, strict=True)
    )


def band_energies(image: Tensor) -> Tensor:
    """How sharp a picture is: logarithms of the mean squares of second differences of its brightness along columns,
    rows and both, at full, half and quarter size: (B, 9), from RGB (B, 3, H, W), H and W at least 12.

    Of outputs and paintings their MSE is a loss: what a painting has of grain and fine strokes, its VGG statistics
    hardly tell from noise or from blur.
    """
    x, energies = at_least_float32(image).mean(1, keepdim=True), []
    for _ in range(3):
        columns, rows = second_difference(x, 2), second_difference(x, 3)
        for band in (columns, rows, second_difference(rows, 2)):
            energies.append((band.square().mean((1, 2, 3)) + 1e-6).log())
        x = F.avg_pool2d(x, 2)
    return torch.stack(energies, 1)


def second_difference(x: Tensor, dim: int) -> Tensor:
    """Of neighbours along a dimension, which loses two."""
    length = x.shape[dim] - 2
    before, here, after = (x.narrow(dim, start, length) for start in range(3))
    return here - (before + after) / 2


def style_statistics(features: list[Tensor]) -> list[Tensor]:
    """Channel means and standard deviations of relu1_1 .. relu4_1: eight maps (B, C, 1, 1)."""
    statistics = [channel_statistics(x) for x in features[:4]]
    return [x for mean, variance in statistics for x in (mean, torch.sqrt(variance + 1e-5))]


def hint_loss(predictions: list[Tensor], features: list[Tensor]) -> Tensor:
    """Sum over the maps of the distance between a prediction and the compressed features (hints, Romero et al. 2015),
    squared below 1 and linear above, as in `robust_style_loss`.
    """
    pairs = zip(predictions, features, strict=True)
    return sum(2 * F.huber_loss(at_least_float32(x), compress(target).detach()) for x, target in pairs)


def compress(features: Tensor) -> Tensor:
    """KNEE * log(1 + x / KNEE), at least float32: nearly x where x is small."""
    return KNEE * torch.log1p(at_least_float32(features) / KNEE)


def content_loss(output_features: list[Tensor], content_features: list[Tensor]) -> Tensor:
    """Sum over relu4_1 and relu5_1 of the MSE between norm(output) and norm(content)."""
    return content_distance(output_features, content_targets(content_features))


@torch.no_grad()
def content_targets(content_features: list[Tensor]) -> list[Tensor]:
    """What `content_loss` compares norm(output) with."""
    return [normalize(x) for x in content_features[3:5]]


def content_distance(output_features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """`content_loss` with the results of `content_targets`."""
    return sum(F.mse_loss(normalize(x), target) for x, target in zip(output_features[3:5], targets, strict=True))


def local_feature_loss(
    output_features: list[Tensor],
    content_features: list[Tensor],
    style_features: list[Tensor],
    *,
    num_heads: int = 8,
    keys: str = "cumulative",
    backend: str | None = None,
) -> Tensor:
    """Sum over relu2_1 .. relu5_1 of the MSE between output and content + DA + PA, attention without parameters.

    keys: "cumulative", as published: queries and keys are the features of all scales up to that one, resized and
    normalised; "own": those of that scale only. The value is the style feature.
    """
    targets = local_targets(content_features, style_features, num_heads=num_heads, keys=keys, backend=backend)
    return local_loss(output_features, targets)


def local_loss(output_features: list[Tensor], targets: list[Tensor]) -> Tensor:
    """`local_feature_loss` with the results of `local_targets`."""
    pairs = zip(output_features[1:5], targets, strict=True)
    return sum(F.mse_loss(at_least_float32(output), target) for output, target in pairs)


@torch.no_grad()
def local_targets(
    content_features: list[Tensor],
    style_features: list[Tensor],
    *,
    num_heads: int = 8,
    keys: str = "cumulative",
    backend: str | None = None,
) -> list[Tensor]:
    """What `local_feature_loss` compares the output's relu2_1 .. relu5_1 with: maps of at least float32."""
    if keys not in ("cumulative", "own"):
        raise ValueError(f"keys is {keys!r}; choose 'cumulative' or 'own'")
    targets = []
    for layer, block_size in enumerate(LOCAL_BLOCK_SIZES, 1):
        first = 0 if keys == "cumulative" else layer
        query = stacked_features(content_features[first : layer + 1])
        key = stacked_features(style_features[first : layer + 1])
        content, value = content_features[layer], style_features[layer].to(query.dtype)
        options = {"block_size": block_size, "num_heads": num_heads, "backend": backend}
        distributed = distributed_attention(query, key, value, **options)
        progressive = progressive_attention(query, key, value, **options)
        targets.append(at_least_float32(content) + distributed + progressive)
    return targets


def stacked_features(features: list[Tensor]) -> Tensor:
    """All maps resized to the last one's size (nearest) and normalised, then joined along the channels."""
    size = features[-1].shape[-2:]
    return torch.cat([normalize(F.interpolate(x, size, mode="nearest")) for x in features], 1)
