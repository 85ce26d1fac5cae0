import numpy as np
import pytest
import torch
import torch.nn.functional as F

from a2k.attention import normalize
from a2k.losses import (
    LOCAL_BLOCK_SIZES,
    band_energies,
    content_loss,
    global_style_loss,
    hint_loss,
    local_feature_loss,
    local_targets,
    robust_style_loss,
    stacked_features,
)
from a2k_kernels import distributed_attention, progressive_attention

CHANNELS = (4, 8, 8, 16, 16)


def pyramid(seed: int, height: int = 96, width: int = 80, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Five feature maps as an encoder gives them."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [(-(-height // 2**i), -(-width // 2**i)) for i in range(5)]
    maps = [torch.randn((2, c, *size), generator=generator) for c, size in zip(CHANNELS, sizes, strict=True)]
    return [x.relu().to(dtype).requires_grad_() for x in maps]


def gradients(features: list[torch.Tensor]) -> list[bool]:
    """Which maps have got a gradient."""
    return [x.grad is not None and bool(x.grad.any()) for x in features]


@pytest.fixture
def content():
    return pyramid(0)


@pytest.fixture
def style():
    return pyramid(1, 75, 102)  # relu5_1 is 5x7: cut blocks of 4


@pytest.fixture
def output():
    return pyramid(2)


def test_global_style_loss_is_its_formula(output, style):
    expected = 0
    for a, b in zip(output[:4], style[:4], strict=True):
        (var_a, mean_a), (var_b, mean_b) = (torch.var_mean(x, (2, 3), correction=1) for x in (a, b))
        expected += (mean_a - mean_b).square().mean()
        expected += ((var_a + 1e-5).sqrt() - (var_b + 1e-5).sqrt()).square().mean()
    torch.testing.assert_close(global_style_loss(output, style), expected)


def test_global_style_loss_is_zero_for_the_style_itself(style):
    assert global_style_loss(style, style) == 0
    flipped = [x.flip(-1, -2) for x in style]  # statistics do not see places
    assert global_style_loss(flipped, style) < 1e-10


def test_robust_style_loss_is_its_formula(output, style):
    output, expected, large = [x * 30 for x in output], 0, []
    scales = zip((1.5, 1.5, 1.2, 1.1), (3, 3, 3, 10), output[:4], style[:4], strict=True)
    for weight, knee, a, b in scales:
        for statistic in (lambda x: x.mean((2, 3)), lambda x: (x.var((2, 3)) + 1e-5).sqrt()):
            d = (statistic(a) - statistic(b)).abs()
            large.append(d.max() > knee)
            expected += weight * torch.where(d <= knee, d.square(), 2 * knee * d - knee**2).mean()
    torch.testing.assert_close(robust_style_loss(output, style), expected)
    assert any(large)


def test_band_energies_are_second_differences():
    image = torch.rand(2, 3, 30, 25)
    image[1] = F.avg_pool2d(image[1], 3, 1, 1)
    energies = band_energies(image)
    x = image.double().mean(1).numpy()
    for scale in range(3):
        columns, rows = np.diff(x, 2, 1) / 2, np.diff(x, 2, 2) / 2
        both = np.diff(rows, 2, 1) / 2
        for place, band in enumerate((columns, rows, both)):
            expected = np.log(np.square(band).mean((1, 2)) + 1e-6)
            np.testing.assert_allclose(energies[:, 3 * scale + place], expected, rtol=1e-4, atol=1e-4)
        height, width = (side // 2 for side in x.shape[1:])
        x = x[:, : 2 * height, : 2 * width].reshape(2, height, 2, width, 2).mean((2, 4))
    assert (energies[0, :3] > energies[1, :3]).all()  # blurred


def test_strong_channel_pulls_no_harder_in_the_robust_style_loss(output, style):
    """One channel a hundred and a thousand times too strong: its gradient."""
    pulls = {}
    for loss in (global_style_loss, robust_style_loss):
        for times in (100, 1000):
            x = [torch.cat([times * a[:, :1], a[:, 1:]], 1).detach().requires_grad_() for a in output]
            loss(x, style).backward()
            pulls[loss, times] = sum(a.grad[:, :1].abs().sum() for a in x[:4])
    assert pulls[global_style_loss, 1000] > 9 * pulls[global_style_loss, 100]
    assert pulls[robust_style_loss, 1000] < 1.1 * pulls[robust_style_loss, 100]


def test_content_loss_is_its_formula(output, content):
    expected = sum(F.mse_loss(normalize(a), normalize(b)) for a, b in zip(output[3:], content[3:], strict=True))
    torch.testing.assert_close(content_loss(output, content), expected)


def test_content_loss_ignores_colour(content):
    assert content_loss(content, content) == 0
    assert content_loss([3 * x + 5 for x in content], content) < 1e-6


@pytest.mark.parametrize("keys", ("cumulative", "own"))
def test_local_feature_loss_is_its_formula(output, content, style, keys):
    expected = 0
    for layer, block_size in zip(range(1, 5), (16, 8, 8, 4), strict=True):
        layers = range(layer + 1) if keys == "cumulative" else [layer]
        query, key = (
            torch.cat([normalize(F.interpolate(maps[i], maps[layer].shape[-2:], mode="nearest")) for i in layers], 1)
            for maps in (content, style)
        )
        options = {"block_size": block_size, "num_heads": 4, "backend": "reference"}
        target = content[layer] + distributed_attention(query, key, style[layer], **options)
        target = target + progressive_attention(query, key, style[layer], **options)
        expected += F.mse_loss(output[layer], target)
    actual = local_feature_loss(output, content, style, num_heads=4, keys=keys)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_keys_count(output, content, style):
    values = [local_feature_loss(output, content, style, num_heads=4, keys=k).item() for k in ("cumulative", "own")]
    assert values[0] != values[1]
    assert local_feature_loss(output, content, style, num_heads=4).item() == values[0]


def test_local_feature_loss_is_zero_at_its_target(content, style):
    targets = local_targets(content, style, num_heads=4)
    assert len(targets) == len(LOCAL_BLOCK_SIZES)
    assert local_feature_loss([content[0], *targets], content, style, num_heads=4) == 0


@pytest.mark.parametrize("keys", ("cumulative", "own"))
def test_backends_agree(output, content, style, keys):
    values = [
        local_feature_loss(output, content, style, num_heads=2, keys=keys, backend=backend)
        for backend in ("reference", "torch")
    ]
    torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)


def test_targets_carry_no_gradient(output, content, style):
    total = global_style_loss(output, style) + content_loss(output, content)
    total = total + hint_loss(output, content)
    (total + local_feature_loss(output, content, style, num_heads=4)).backward()
    assert gradients(output) == [True] * 5
    assert gradients(content) == gradients(style) == [False] * 5


@pytest.mark.parametrize(
    ("loss", "reached"),
    [
        (global_style_loss, [True] * 4 + [False]),
        (robust_style_loss, [True] * 4 + [False]),
        (content_loss, [False] * 3 + [True] * 2),
    ],
)
def test_scales_that_count(output, content, loss, reached):
    loss(output, content).backward()
    assert gradients(output) == reached


def test_scales_that_the_local_loss_compares(output, content, style):
    local_feature_loss(output, content, style, num_heads=4).backward()
    assert gradients(output) == [False] + [True] * 4


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float64, torch.float64)],
)
def test_dtype_of_losses(dtype, expected):
    output, content, style = (pyramid(seed, dtype=dtype) for seed in range(3))
    exact = [pyramid(seed) for seed in range(3)]

    def losses(output, content, style):
        yield global_style_loss(output, style)
        yield content_loss(output, content)
        yield local_feature_loss(output, content, style, num_heads=4)

    for loss, value in zip(losses(output, content, style), losses(*exact), strict=True):
        assert loss.dtype == expected
        assert loss.shape == ()
        torch.testing.assert_close(loss.float(), value, rtol=0.02, atol=0)


def test_stacked_features_are_resized_first(content):
    stacked = stacked_features(content[:3])
    assert stacked.shape == (2, sum(CHANNELS[:3]), 24, 20)
    torch.testing.assert_close(stacked[:, -CHANNELS[2] :], normalize(content[2]))
    torch.testing.assert_close(stacked[:, : CHANNELS[0]], normalize(content[0][:, :, ::4, ::4]))


def test_unknown_keys(output, content, style):
    with pytest.raises(ValueError, match=r"keys is 'all'; choose 'cumulative' or 'own'"):
        local_feature_loss(output, content, style, keys="all")


def test_heads_that_do_not_divide(output, content, style):
    with pytest.raises(ValueError, match="num_heads"):
        local_feature_loss(output, content, style, num_heads=5)
