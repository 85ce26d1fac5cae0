import pytest
import torch
import torch.nn.functional as F

from a2k import A2K
from a2k.attention import center, channel_statistics, conv1x1, match_statistics, normalize
from a2k_kernels import distributed_attention, progressive_attention

SHAPES = ((2, 3, 5, 7), (1, 4, 1, 9), (1, 1, 2, 1))


def random_map(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


# --- statistics


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_statistics_are_those_of_var_mean(shape, memory_format):
    x = random_map(*shape).to(memory_format=memory_format)
    variance, mean = torch.var_mean(x, (2, 3), correction=1, keepdim=True)
    torch.testing.assert_close(channel_statistics(x), (mean, variance))
    centered, _, _ = center(x)
    torch.testing.assert_close(centered, x - mean)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", ((2, 3, 5, 7), (3, 64, 120, 70)))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last))
def test_statistics_of_16_bit_maps(shape, memory_format, dtype):
    x = (3 * random_map(*shape) + 8 * random_map(1, shape[1], 1, 1, seed=1)).to(dtype, memory_format=memory_format)
    variance, mean = torch.var_mean(x.double(), (2, 3), correction=1, keepdim=True)
    actual = channel_statistics(x)
    assert all(a.dtype == torch.float32 and a.shape == (*shape[:2], 1, 1) for a in actual)
    torch.testing.assert_close(tuple(a.double() for a in actual), (mean, variance), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_one_point_has_variance_zero(dtype):
    x = random_map(2, 3, 1, 1, dtype=dtype)
    mean, variance = (y.to(dtype) for y in channel_statistics(x))
    torch.testing.assert_close(mean, x)
    assert not variance.any()
    assert not normalize(x).any()


@pytest.mark.parametrize("offset", (1e3, 1e5))
def test_variance_is_exact_at_a_big_offset(offset):
    x = (random_map(1, 2, 40, 40) + offset).float()
    expected = torch.var(x.double(), (2, 3), correction=1, keepdim=True)
    torch.testing.assert_close(channel_statistics(x)[1].double(), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("size", ((5, 4), (1, 1)))
def test_gradients_of_statistics(size):
    x = torch.randn(2, 3, *size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(channel_statistics, x)


def test_gradients_of_half_precision_statistics():
    """In float32 up to the end."""
    x = torch.randn(2, 3, 50, 40).add_(30).bfloat16()
    grads = []
    for dtype in (torch.bfloat16, torch.float64):
        leaf = x.detach().to(dtype).requires_grad_()
        mean, variance = channel_statistics(leaf)
        (mean.square() + variance.square()).sum().backward()
        grads.append(leaf.grad)
    assert grads[0].dtype == torch.bfloat16
    torch.testing.assert_close(grads[0].double(), grads[1], rtol=2**-8, atol=1e-6)


def test_normalize():
    x = 3 * random_map(2, 3, 6, 5) + 7
    variance, mean = torch.var_mean(x, (2, 3), correction=1, keepdim=True)
    torch.testing.assert_close(normalize(x), (x - mean) / torch.sqrt(variance + 1e-5))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_half_precision_is_normalised_in_float32(dtype):
    x = random_map(1, 2, 40, 40, dtype=dtype) * 200  # squares overflow float16
    assert normalize(x).dtype == torch.float32
    torch.testing.assert_close(normalize(x), normalize(x.float()))


def test_float64_stays_float64():
    x = random_map(1, 2, 4, 4, dtype=torch.float64)
    variance, mean = torch.var_mean(x, (2, 3), correction=1, keepdim=True)
    torch.testing.assert_close(normalize(x), (x - mean) / torch.sqrt(variance + 1e-5), rtol=1e-14, atol=1e-14)


def test_match_statistics():
    content, style = random_map(2, 3, 9, 8), 4 * random_map(2, 3, 5, 6, seed=1) - 2
    out = match_statistics(content, style)
    for actual, expected in zip(channel_statistics(out), channel_statistics(style), strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    correlation = (normalize(out) * normalize(content)).sum((2, 3)) / (9 * 8 - 1)
    torch.testing.assert_close(correlation, torch.ones(2, 3), rtol=1e-4, atol=1e-4)


def test_conv1x1_is_several_convolutions():
    convs = [torch.nn.Conv2d(4, width, 1) for width in (2, 5, 4)]
    x = random_map(2, 4, 3, 5)
    for actual, conv in zip(conv1x1(x, *convs), convs, strict=True):
        torch.testing.assert_close(actual, conv(x))


# --- the module


def perturbed(module: A2K) -> A2K:
    """Weights and biases unlike the start, where many are zero."""
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return module


@pytest.mark.parametrize("residual", ("content", "adain"))
def test_module_is_its_formula(residual):
    module = perturbed(A2K(8, block_size=4, num_heads=2, residual=residual))
    content, style = random_map(2, 8, 9, 6), random_map(2, 8, 5, 11, seed=1)
    q, q2 = (conv(normalize(content)) for conv in (module.q, module.q2))
    k, k2 = (conv(normalize(style)) for conv in (module.k, module.k2))
    options = {"block_size": 4, "num_heads": 2, "backend": "reference"}
    distributed = distributed_attention(q, k, module.v(style), alpha=module.sim_alpha, beta=module.sim_beta, **options)
    progressive = progressive_attention(q2, k2, module.v2(style), **options)
    base = content if residual == "content" else match_statistics(content, style)
    expected = base + module.fusion1(distributed) + module.fusion2(progressive)
    torch.testing.assert_close(module(content, style), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sizes", (((1, 1), (1, 1)), ((1, 7), (9, 1)), ((13, 2), (3, 3))))
def test_backends_agree_at_any_size(sizes):
    content, style = (random_map(1, 8, *size, seed=seed) for seed, size in enumerate(sizes))
    outputs = [
        perturbed(A2K(8, num_heads=2, residual="adain", backend=backend))(content, style)
        for backend in ("reference", "torch")
    ]
    assert outputs[0].shape == content.shape
    assert outputs[0].isfinite().all()
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_every_parameter_learns():
    module = perturbed(A2K(8, block_size=2, num_heads=2, residual="adain"))
    module(random_map(1, 8, 4, 4), random_map(1, 8, 4, 4, seed=1)).square().sum().backward()
    assert all(parameter.grad.any() for parameter in module.parameters())


@pytest.mark.parametrize("residual", ("content", "adain"))
def test_gradients_are_exact(residual):
    module = perturbed(A2K(4, block_size=2, num_heads=2, residual=residual)).double()
    content, style = (random_map(1, 4, 3, 3, seed=seed, dtype=torch.float64).requires_grad_() for seed in (0, 1))
    assert torch.autograd.gradcheck(module, (content, style))


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
@pytest.mark.parametrize("residual", ("content", "adain"))
def test_half_precision(dtype, residual):
    module = A2K(8, block_size=4, num_heads=2, residual=residual)
    content, style = random_map(1, 8, 6, 6), random_map(1, 8, 6, 6, seed=1)
    expected = module(content, style)
    out = module.to(dtype)(content.to(dtype), style.to(dtype))
    assert out.dtype == dtype
    assert F.mse_loss(out.float(), expected) < 1e-3 * expected.var()


def test_autocast():
    module = A2K(8, block_size=4, num_heads=2)
    content, style = random_map(1, 8, 6, 6), random_map(1, 8, 6, 6, seed=1)
    expected = module(content, style)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = module(content, style)
    assert F.mse_loss(out.float(), expected) < 1e-3 * expected.var()


def test_published_start():
    torch.manual_seed(0)
    module = A2K(64)
    for _, conv in module.named_children():
        assert 0.018 < conv.weight.std() < 0.022
        assert not conv.bias.any()
    assert (module.sim_alpha.item(), module.sim_beta.item()) == (1, 0)
    assert (module.block_size, module.num_heads, module.residual) == (8, 8, "content")


@pytest.mark.parametrize("num_heads", (3, 0, -1))
def test_heads_that_do_not_divide(num_heads):
    with pytest.raises(ValueError, match=f"num_heads={num_heads} does not divide channels=8"):
        A2K(8, num_heads=num_heads)


def test_unknown_residual():
    with pytest.raises(ValueError, match=r"residual is 'none'; choose one of 'content', 'adain'"):
        A2K(8, residual="none")


def test_maps_that_do_not_fit():
    module = A2K(8, num_heads=2)
    with pytest.raises(ValueError, match="batch size 1 but query has 2"):
        module(random_map(2, 8, 4, 4), random_map(1, 8, 4, 4))
