"""StyA2K in the arrangement of the published code, from the formulas in the paper: the baseline of the benchmarks.

Contiguous NCHW maps, PyTorch's own convolutions, one of them per projection, blocks unfolded into copies, whole score
tensors in memory. It runs with the weights of an `a2k.StyA2K` whose residual is "content", at sizes that the blocks
divide, as the published code does.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from a2k import A2K, StyA2K
from a2k.encoder import ENCODER_DEPTHS


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """PyTorch's own convolution of the padded map, whatever `conv`, a module of ours, does."""
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="reflect"), conv.weight, conv.bias)


def norm(x: Tensor) -> Tensor:
    """(x - mean) / sqrt(var + 1e-5) per channel."""
    flat = x.flatten(2)
    mean, variance = flat.mean(2), flat.var(2) + 1e-5
    return (x - mean[..., None, None]) / variance.sqrt()[..., None, None]


def unfold_blocks(x: Tensor, block_size: int, num_heads: int) -> Tensor:
    """(B, C, H, W) -> (B, heads, n, d, r), a copy."""
    d = x.shape[1] // num_heads
    return F.unfold(x, block_size, stride=block_size).unflatten(1, (num_heads, d, block_size**2)).permute(0, 1, 4, 2, 3)


def fold_blocks(blocks: Tensor, size: tuple[int, int], block_size: int) -> Tensor:
    """Inverse of unfold_blocks."""
    return F.fold(blocks.permute(0, 1, 3, 4, 2).flatten(1, 3), size, block_size, stride=block_size)


def distributed_attention(query: Tensor, key: Tensor, value: Tensor, alpha, beta, block_size: int, num_heads: int):
    k, v = (unfold_blocks(x, block_size, num_heads) for x in (key, value))
    k_mean, v_mean = k.mean(-1, keepdim=True), v.mean(-1, keepdim=True)
    gate = torch.sigmoid(beta + alpha * (k_mean * k).sum(-2, keepdim=True))
    k_agg, v_agg = (((gate * x).sum(-1) + mean[..., 0]) / (block_size**2 + 1) for x, mean in ((k, k_mean), (v, v_mean)))
    q = query.flatten(2).unflatten(1, (num_heads, -1)).mT
    scores = (q @ k_agg.mT).softmax(-1)  # (B, heads, H W, n)
    return (scores @ v_agg).mT.flatten(1, 2).unflatten(2, query.shape[-2:])


def progressive_attention(query: Tensor, key: Tensor, value: Tensor, block_size: int, num_heads: int):
    q, k, v = (unfold_blocks(x, block_size, num_heads) for x in (query, key, value))
    index = (q.flatten(-2) @ k.flatten(-2).mT).argmax(-1)[..., None, None]  # of (B, heads, n_query, n_key) scores
    k, v = (torch.take_along_dim(x, index, 2) for x in (k, v))
    scores = (q.mT @ k).softmax(-1)  # (B, heads, n, r, r)
    return fold_blocks((scores @ v.mT).mT, query.shape[-2:], block_size)


def a2k_layer(module: A2K, content: Tensor, style: Tensor) -> Tensor:
    """content + fusion1(DA) + fusion2(PA)."""
    blocks = (module.block_size, module.num_heads)
    q, k, v = module.q(norm(content)), module.k(norm(style)), module.v(style)
    distributed = distributed_attention(q, k, v, module.sim_alpha, module.sim_beta, *blocks)
    q, k, v = module.q2(norm(content)), module.k2(norm(style)), module.v2(style)
    progressive = progressive_attention(q, k, v, *blocks)
    return content + module.fusion1(distributed) + module.fusion2(progressive)


def encode(model: StyA2K, image: Tensor) -> list[Tensor]:
    """relu1_1 .. relu5_1."""
    encoder = model.encoder
    x, features = encoder.input(image), []
    for scale, depth in enumerate(ENCODER_DEPTHS[model.config.encoder], 1):
        for number in range(1, depth + 1):
            x = F.relu(convolve(getattr(encoder, f"conv{scale}_{number}"), x))
            if number == 1:
                features.append(x)
        if scale < 5:
            x = F.max_pool2d(x, 2, ceil_mode=True)
    return features


def decode(model: StyA2K, x3: Tensor, x4: Tensor, x5: Tensor) -> Tensor:
    """RGB from the A2K outputs at three scales."""
    decoder = model.decoder
    x = convolve(decoder.merge, x4 + F.interpolate(x5, scale_factor=2))
    x = F.interpolate(F.relu(convolve(decoder.conv4_1, x)), scale_factor=2)
    x = torch.cat([x, x3], 1)
    for scale in (3, 2, 1):
        for number in range(decoder.depths[scale - 1], 0, -1):
            x = convolve(getattr(decoder, f"conv{scale}_{number}"), x)
            x = F.relu(x) if (scale, number) != (1, 1) else x
        x = F.interpolate(x, scale_factor=2) if scale > 1 else x
    return x


def stya2k(model: StyA2K, content: Tensor, style: Tensor) -> Tensor:
    """The whole network: RGB in [0, 1] of sides that 64 divides -> RGB, unclamped."""
    maps = [encode(model, image)[2:] for image in (content, style)]
    layers = (model.a2k3, model.a2k4, model.a2k5)
    return decode(model, *(a2k_layer(layer, c, s) for layer, c, s in zip(layers, *maps, strict=True)))


# ---- training losses


def global_loss(output: list[Tensor], style: list[Tensor]) -> Tensor:
    """MSE of channel means and of channel standard deviations, relu1_1 .. relu4_1."""
    loss = 0.0
    for x, y in zip(output[:4], style[:4], strict=True):
        (mean, std), (style_mean, style_std) = (
            (z.flatten(2).mean(2), (z.flatten(2).var(2) + 1e-5).sqrt()) for z in (x, y)
        )
        loss = loss + F.mse_loss(mean, style_mean) + F.mse_loss(std, style_std)
    return loss


def keys_up_to(features: list[Tensor], layer: int) -> Tensor:
    """All maps up to that layer, resized to it, normalised and joined."""
    size = features[layer].shape[-2:]
    return torch.cat([norm(F.interpolate(x, size)) for x in features[: layer + 1]], 1)


def local_loss(output: list[Tensor], content: list[Tensor], style: list[Tensor]) -> Tensor:
    """MSE between output and content + DA + PA without parameters, relu2_1 .. relu5_1."""
    loss = 0.0
    for layer, block_size in zip(range(1, 5), (16, 8, 8, 4), strict=True):
        query, key = keys_up_to(content, layer), keys_up_to(style, layer)
        distributed = distributed_attention(query, key, style[layer], 1.0, 0.0, block_size, 8)
        progressive = progressive_attention(query, key, style[layer], block_size, 8)
        loss = loss + F.mse_loss(output[layer], content[layer] + distributed + progressive)
    return loss


def training_losses(model: StyA2K, content: Tensor, style: Tensor) -> dict[str, Tensor]:
    """The two losses of a training step, at weight 1, and their weighted sum. content, style: RGB, (B, 3, H, W)."""
    content_features, style_features = encode(model, content), encode(model, style)
    layers = (model.a2k3, model.a2k4, model.a2k5)
    maps = zip(layers, content_features[2:], style_features[2:], strict=True)
    output = encode(model, decode(model, *(a2k_layer(layer, c, s) for layer, c, s in maps)))
    of_style, local = global_loss(output, style_features), local_loss(output, content_features, style_features)
    return {"global": of_style, "local": local, "total": 10 * of_style + 1.25 * local}
