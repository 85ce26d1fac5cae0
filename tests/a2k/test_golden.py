"""Parity with results of the published code (tests/data/golden.npz), at the tolerances it states."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from official import a2k_shapes, fill, official_files

import a2k
from a2k import convert, losses
from a2k.convolution import ReflectedConv2d
from a2k.inference import FusedA2K, FusedStyA2K, Statistics

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import published

GOLDEN = np.load(Path(__file__).parents[1] / "data" / "golden.npz")
BLOCK_SIZES = {3: 8, 4: 8, 5: 4}
BACKENDS = ("reference", "torch")
A2K_CASES = ((64, 3, 32, 2, 100), (64, 4, 48, 1, 200), (64, 5, 16, 2, 300), (256, 3, 32, 1, 400))


def features(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(np.random.RandomState(seed).standard_normal(shape)).clamp(min=0).float()


def assert_close(actual: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(actual.detach(), torch.from_numpy(np.array(GOLDEN[name])), rtol=1e-4, atol=1e-4)


def assert_gradient_close(actual: torch.Tensor, name: str) -> None:
    expected = torch.from_numpy(np.array(GOLDEN[name]))
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-3 * expected.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", A2K_CASES, ids=str)
def test_a2k_module(case, backend):
    channels, layer, h, batch, seed = case
    name = f"a2k_C{channels}_layer{layer}_h{h}_B{batch}_seed{seed}"
    module = a2k.A2K(channels, block_size=BLOCK_SIZES[layer], backend=backend)
    module.load_state_dict(convert.a2k_layer(fill(a2k_shapes(channels, "module."), seed, 1.0)))
    shape = (batch, channels, h, h)
    content, style = (features(seed + i, shape).requires_grad_() for i in (1, 2))
    out = module(content, style)
    assert_close(out[:, ::4], f"{name}/out")
    if f"{name}/grad_content" not in GOLDEN:
        return
    upstream = torch.from_numpy(np.random.RandomState(seed + 3).standard_normal(shape)).float()
    (out * upstream).sum().backward()
    assert_gradient_close(content.grad[:, ::8], f"{name}/grad_content")
    assert_gradient_close(style.grad[:, ::8], f"{name}/grad_style")
    assert_gradient_close(module.sim_alpha.grad, f"{name}/grad_alpha")
    assert_gradient_close(module.sim_beta.grad, f"{name}/grad_beta")
    for conv in ("q2", "k", "v2"):
        assert_gradient_close(getattr(module, conv).weight.grad[::4, ::4, 0, 0], f"{name}/grad_{conv}_weight")


def fused(module: a2k.A2K, content: torch.Tensor, style: torch.Tensor) -> torch.Tensor:
    """The module as inference runs it."""
    content, style = (x.detach().contiguous(memory_format=torch.channels_last) for x in (content, style))
    statistics = Statistics(), Statistics()
    for x, of_x in zip((content, style), statistics, strict=True):
        of_x.add(x)
    layer = FusedA2K(module)
    for _ in layer.redraw(content, statistics[0], layer.style_keys(style, statistics[1]), 1.0):
        pass
    return content


@pytest.mark.parametrize("run", (fused, published.a2k_layer))
@pytest.mark.parametrize("case", A2K_CASES, ids=str)
def test_a2k_module_in_inference_and_in_the_benchmarks(case, run):
    channels, layer, h, batch, seed = case
    module = a2k.A2K(channels, block_size=BLOCK_SIZES[layer]).requires_grad_(False)
    module.load_state_dict(convert.a2k_layer(fill(a2k_shapes(channels, "module."), seed, 1.0)))
    content, style = (features(seed + i, (batch, channels, h, h)) for i in (1, 2))
    assert_close(run(module, content, style)[:, ::4], f"a2k_C{channels}_layer{layer}_h{h}_B{batch}_seed{seed}/out")


@pytest.mark.parametrize("backend", BACKENDS)
def test_losses(backend):
    name, n, seed = "loss_S64_B1_seed500", 64, 500
    channels = (64, 128, 256, 512, 512)

    def pyramid(first_seed: int) -> list[torch.Tensor]:
        return [features(first_seed + i, (1, c, n >> i, n >> i)) for i, c in enumerate(channels)]

    content, style, output = (pyramid(10 * (seed + i)) for i in range(3))
    output = [x.requires_grad_() for x in output]
    values = {
        "content": losses.content_loss(output, content),
        "global": losses.global_style_loss(output, style),
        "local": losses.local_feature_loss(output, content, style, backend=backend),
    }
    for loss, value in values.items():
        assert_close(value, f"{name}/{loss}")
    gradients = torch.autograd.grad(values["global"] + values["local"], output)
    for i, gradient in enumerate(gradients, 1):
        assert_gradient_close(gradient.norm(), f"{name}/grad{i}_norm")


@pytest.mark.parametrize("backend", BACKENDS)
def test_whole_network(backend, monkeypatch):
    name, seed = "model_S128_B1_seed600", 600
    monkeypatch.setenv("A2K_BACKEND", backend)
    model = convert.stya2k(**official_files(seed))
    content, style = (
        torch.from_numpy(np.random.RandomState(seed + i).random_sample((1, 3, 128, 128))).float() for i in (4, 5)
    )
    with torch.no_grad():
        assert_close(model(content, style)[..., ::2, ::2], f"{name}/out")
        assert_close(published.stya2k(model, content, style)[..., ::2, ::2], f"{name}/out")
        inference = FusedStyA2K(model)
        assert_close(inference.stylize(content, inference.encode_style(style))[..., ::2, ::2], f"{name}/out")
        for i, feature in enumerate(model.encoder(content), 1):
            assert_close(torch.stack([feature.mean(), feature.std()]), f"{name}/relu{i}_1_mean_std")


def test_the_baseline_of_benchmarks_does_not_run_our_convolution(monkeypatch):
    """Which is faster than PyTorch's, so that the ratios would be too low."""
    model = convert.stya2k(**official_files(600)).requires_grad_(False)
    monkeypatch.setattr(ReflectedConv2d, "forward", lambda *_: pytest.fail("ran"))
    assert published.stya2k(model, *torch.rand(2, 1, 3, 64, 64)).shape == (1, 3, 64, 64)
