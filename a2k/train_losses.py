"""The losses of one training batch, as a module that `DistributedDataParallel` can wrap."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from a2k.attention import at_least_float32
from a2k.encoder import Encoder
from a2k.losses import (
    content_loss,
    global_style_loss,
    hint_loss,
    local_loss,
    local_targets,
    robust_style_loss,
)
from a2k.model import StyA2K
from a2k.train_options import Recipe

PIXEL_WEIGHT = 10.0  # of copying, beside 1 for the hints


class TrainingLosses(nn.Module):
    """Losses of a batch: of copying the pictures while `autoencoding`, else the style losses.

    While it copies, the encoder of a styled network also learns to tell the perceptual network's features, each from
    its own of the same scale by a 1x1 convolution (`hints`); what only copies leaves most of its channels at zero.

    Args:
        model: in training. perceptual: the frozen network that compares. recipe: the weights of the losses.
        backend: of the attention in the local loss. checkpoint_activations: compute the activations of the decoder
        and of the perceptual network a second time in the backward pass, instead of keeping them.
    """

    def __init__(
        self,
        model: StyA2K,
        perceptual: Encoder,
        recipe: Recipe,
        *,
        dtype: torch.dtype = torch.float32,
        backend: str | None = None,
        checkpoint_activations: bool = False,
    ) -> None:
        super().__init__()
        self.model, self.perceptual, self.recipe = model, perceptual, recipe
        self.dtype, self.backend, self.checkpoint_activations = dtype, backend, checkpoint_activations
        self.shares_encoder = same_tensors(model.encoder, perceptual)
        self.autoencoding = False
        self.hints = nn.ModuleList()
        if model.config.encoder == "styled":
            widths = zip(model.encoder.channels, perceptual.channels, strict=True)
            self.hints.extend(nn.Conv2d(*pair, 1) for pair in widths)

    def forward(self, content: Tensor, style: Tensor) -> dict[str, Tensor]:
        """content, style: (B, 3, crop, crop). Returns every loss at weight 1, and their weighted sum as "total"."""
        with torch.autocast(content.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            images = torch.cat([content, style])
            return self._copying(images) if self.autoencoding else self._style(images)

    def _copying(self, images: Tensor) -> dict[str, Tensor]:
        features = self.model.encoder(images)
        copy = self._decode(self.model.transform(features, features, strength=0.0))
        losses = {"pixel": F.l1_loss(at_least_float32(copy), images)}
        total = PIXEL_WEIGHT * losses["pixel"]
        if self.hints:
            with torch.no_grad():
                targets = self.perceptual(images)
            predictions = [hint(x) for hint, x in zip(self.hints, features, strict=True)]
            losses["hint"] = hint_loss(predictions, targets)
            total = total + losses["hint"]
        return losses | {"total": total}

    def _style(self, images: Tensor) -> dict[str, Tensor]:
        recipe, batch = self.recipe, len(images) // 2
        with torch.no_grad():
            targets = self.perceptual(images)
        content_targets, style_targets = ([x[part] for x in targets] for part in (slice(batch), slice(batch, None)))
        if recipe.local_weight:  # before anything is kept for the backward pass
            options = {"keys": recipe.keys, "backend": self.backend}
            expected = local_targets(content_targets, style_targets, **options)
        features = targets if self.shares_encoder else self.model.encoder(images)
        output = self._decode(self.model.transform([x[:batch] for x in features], [x[batch:] for x in features]))
        output_features = self._encode(output)
        style_loss = robust_style_loss if recipe.robust else global_style_loss
        losses = {"global": style_loss(output_features, style_targets)}
        if recipe.local_weight:
            losses["local"] = local_loss(output_features, expected)
        if recipe.content_weight:
            losses["content"] = content_loss(output_features, content_targets)
        if recipe.identity_weight:  # of every second pair, in turn the photo and the painting
            own = torch.arange(0, batch, 2, device=images.device)
            own[1::2] += batch
            own_features = [x[own] for x in features]
            copy = self._decode(self.model.transform(own_features, own_features))
            losses["identity"] = F.l1_loss(at_least_float32(copy), images[own])
        total = sum(getattr(recipe, f"{name}_weight") * loss for name, loss in losses.items())
        return losses | {"total": total}

    def _decode(self, features: list[Tensor]) -> Tensor:
        return self._run(self.model.decoder, *features)

    def _encode(self, image: Tensor) -> list[Tensor]:
        return self._run(self.perceptual, image)

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor | list[Tensor]:
        if self.checkpoint_activations:
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
