import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from a2k.colors import colors_of, match_colors
from a2k.losses import content_loss, robust_distance, style_statistics
from a2k.train_losses import TrainingLosses
from a2k.train_options import RECIPES

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))
import training_step

RECIPE = replace(RECIPES["vgg16"], content_weight=1.0, identity_weight=1.0)


def step(tiny_vgg, autoencoding: bool, checkpoint_activations: bool) -> tuple[dict, dict, int, int]:
    """Losses, gradients, bytes kept for the backward pass, and calls of the decoder, of one batch."""
    model, kept, calls = tiny_model().train(), {}, []
    losses = TrainingLosses(model, tiny_vgg, RECIPE, checkpoint_activations=checkpoint_activations)
    losses.autoencoding = autoencoding
    model.decoder.register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(3)

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        results = losses(torch.rand(2, 3, 64, 48), torch.rand(2, 3, 64, 48))
    kept_bytes = sum(kept.values())
    results["total"].backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return results, gradients, kept_bytes, len(calls)


@pytest.mark.parametrize("autoencoding", (True, False))
def test_checkpointed_activations(tiny_vgg, autoencoding):
    """Same losses and gradients; less is kept, and computed twice."""
    kept, again = (step(tiny_vgg, autoencoding, checkpoint_activations) for checkpoint_activations in (False, True))
    for expected, actual in zip(kept[:2], again[:2], strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert any(name.startswith("a2k3.") for name in kept[1]) != autoencoding
    assert again[2] < 0.8 * kept[2]
    assert again[3] == 2 * kept[3]


def batch_of(arrangement: str, double: bool) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and gradients of two pairs, by the benchmark of a training step."""
    training = training_step.Training(arrangement, 64, 2, "cpu")
    module = training.model if arrangement == "published" else training.losses
    batch = training.batch
    if double:
        module.double()
        batch = [x.double() for x in batch]
    losses = training.losses(*batch)
    losses["total"].backward()
    gradients = {name: p.grad for name, p in training.model.named_parameters() if p.requires_grad}
    return [losses[name].item() for name in ("global", "local")], gradients


def test_losses_and_gradients_are_those_of_the_published_arrangement():
    expected, actual = (batch_of(x, double=True) for x in ("published", "float32"))
    assert actual[0] == pytest.approx(expected[0], rel=1e-10)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():  # that of a2k5.k2.bias is zero, but for rounding
        assert (actual[1][name] - gradient).abs().max() <= 1e-8 * gradient.abs().max() + 1e-12, name


def test_losses_in_float32():
    expected, actual = (batch_of(x, double=False) for x in ("published", "float32"))
    assert actual[0] == pytest.approx(expected[0], rel=1e-4)


def test_gpu_table(monkeypatch):
    """`make gpu-check`, without a GPU."""
    monkeypatch.setattr(training_step, "ARRANGEMENTS", ("published", "bfloat16"))
    rows = [line.split(" | ") for line in training_step.gpu_table(64, 1, 1, "cpu").splitlines()]
    assert [row[0] for row in rows[2:]] == ["| published", "| bfloat16"]
    assert all(row[1].count(" s (") == row[2].count(" GB (") == 1 for row in rows[2:])
    assert rows[2][1].endswith("(1.00x)") and rows[2][4] == "0.0e+00 |"
    assert 0 < float(rows[3][4].removesuffix(" |")) < 0.1


def test_losses_are_those_of_what_the_network_paints(tiny_vgg):
    """Of smooth photos too, which a styled network fills with texture."""
    model = tiny_model().train()
    losses = TrainingLosses(model, tiny_vgg, replace(RECIPES["styled"], identity_weight=1.0))
    content, style = torch.linspace(0.45, 0.55, 48).expand(2, 3, 64, 48), torch.rand(2, 3, 64, 48)
    found = losses(content, style)
    with torch.no_grad():
        painted = tiny_vgg(model(content, style).clamp(0, 1))
        expected = robust_distance(style_statistics(painted), style_statistics(tiny_vgg(style)))
        assert found["global"].item() == pytest.approx(expected.item(), rel=1e-4)
        assert found["content"].item() == pytest.approx(content_loss(painted, tiny_vgg(content)).item(), rel=1e-4)
        photo = model.encoder(content[:1])  # is copied, without texture
        copy = match_colors(model.decoder(*model.transform(photo, photo)), colors_of(content[:1])).clamp(0, 1)
        assert found["identity"].item() == pytest.approx((copy - content[:1]).abs().mean().item(), rel=1e-4)
