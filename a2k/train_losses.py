"""The losses of one training batch, as a module that `DistributedDataParallel` can wrap."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from a2k.attention import at_least_float32
from a2k.encoder import Encoder
from a2k.losses import content_loss, global_style_loss, local_loss, local_targets
from a2k.model import StyA2K
from a2k.train_options import Recipe


class TrainingLosses(nn.Module):
    """Losses of a batch: of copying the photo while `autoencoding`, else the style losses.

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

    def forward(self, content: Tensor, style: Tensor) -> dict[str, Tensor]:
        """content, style: (B, 3, crop, crop). Returns every loss at weight 1, and their weighted sum as "total"."""
        with torch.autocast(content.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            return self._copying(content) if self.autoencoding else self._style(content, style)

    def _copying(self, content: Tensor) -> dict[str, Tensor]:
        features = self.model.encoder(content)
        copy = self._decode(self.model.transform(features, features, strength=0.0))
        loss = F.l1_loss(at_least_float32(copy), content)
        return {"pixel": loss, "total": loss}

    def _style(self, content: Tensor, style: Tensor) -> dict[str, Tensor]:
        recipe, batch, images = self.recipe, len(content), torch.cat([content, style])
        with torch.no_grad():
            targets = self.perceptual(images)
        content_targets, style_targets = ([x[part] for x in targets] for part in (slice(batch), slice(batch, None)))
        if recipe.local_weight:  # before anything is kept for the backward pass
            options = {"keys": recipe.keys, "backend": self.backend}
            expected = local_targets(content_targets, style_targets, **options)
        features = targets if self.shares_encoder else self.model.encoder(images)
        output = self._decode(self.model.transform([x[:batch] for x in features], [x[batch:] for x in features]))
        output_features = self._encode(output)
        losses = {"global": global_style_loss(output_features, style_targets)}
        if recipe.local_weight:
            losses["local"] = local_loss(output_features, expected)
        if recipe.content_weight:
            losses["content"] = content_loss(output_features, content_targets)
        if recipe.identity_weight:  # of photos at even places of the batch and of paintings at odd ones
            own = torch.arange(batch, device=images.device)
            own += batch * (own % 2)
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
