"""The losses of one training batch, as a module that `DistributedDataParallel` can wrap."""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

from a2k.attention import at_least_float32
from a2k.colors import colors_of, match_colors
from a2k.decoder import StyledDecoder
from a2k.encoder import Encoder
from a2k.losses import (
    band_energies,
    content_distance,
    content_targets,
    global_distance,
    hint_loss,
    local_loss,
    local_targets,
    robust_distance,
    style_statistics,
)
from a2k.model import StyA2K
from a2k.texture import add_texture
from a2k.train_options import Recipe

PIXEL_WEIGHT = 10.0  # of copying, beside 1 for the hints


@dataclass(frozen=True)
class Targets:
    """What the features of the outputs of some pairs are compared with; empty where the recipe does not ask for it.

    style: the painting's statistics. content: see `content_targets`. local: see `local_targets`.
    """

    style: list[Tensor]
    content: list[Tensor]
    local: list[Tensor]


class WithGradient(torch.autograd.Function):
    """A value whose gradient with respect to x is known."""

    @staticmethod
    def forward(ctx, x: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream * gradient, None, None


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
        self.model, self.recipe = model, recipe
        # Autocast would convert what is frozen in every call.
        self.perceptual = perceptual if dtype == torch.float32 else copy.deepcopy(perceptual).to(dtype)
        self.dtype, self.backend, self.checkpoint_activations = dtype, backend, checkpoint_activations
        self.shares_encoder = same_tensors(model.encoder, perceptual)
        if self.shares_encoder:  # in memory too
            model.encoder.load_state_dict(perceptual.state_dict(), assign=True)
        self.autoencoding = False
        self.hints = nn.ModuleList()
        if model.config.encoder == "styled":
            widths = zip(model.encoder.channels, perceptual.channels, strict=True)
            self.hints.extend(nn.Conv2d(*pair, 1) for pair in widths)

    def forward(self, content: Tensor, style: Tensor, first: int = 0, step_pairs: int = 0) -> dict[str, Tensor]:
        """content, style: (B, 3, crop, crop), of which `first` is the number within a step of step_pairs (0: of these).

        Returns every loss at weight 1, and their weighted sum as "total", which alone has a gradient. Means over the
        batches of a step are the losses of the step.
        """
        with torch.autocast(content.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            images = torch.cat([content, style])
            return (
                self._copying(images) if self.autoencoding else self._style(images, first, step_pairs or len(content))
            )

    def _copying(self, images: Tensor) -> dict[str, Tensor]:
        features = self.model.encoder(images)
        copy = self._decode(self.model.transform(features, features, strength=0.0), images)
        losses = {"pixel": F.l1_loss(at_least_float32(copy), images)}
        total = PIXEL_WEIGHT * losses["pixel"]
        if self.hints:
            with torch.no_grad():
                targets = self.perceptual(images)
            predictions = [hint(x) for hint, x in zip(self.hints, features, strict=True)]
            losses["hint"] = hint_loss(predictions, targets)
            total = total + losses["hint"]
        return losses | {"total": total}

    def _style(self, images: Tensor, first: int, step_pairs: int) -> dict[str, Tensor]:
        recipe, batch = self.recipe, len(images) // 2
        features, targets = self._targets(images)
        if self.shares_encoder:
            content, style = ([x[part] for x in features] for part in (slice(batch), slice(batch, None)))
        else:
            content, style = self._encode_pairs(*images.split(batch))
        output = self._decode(self.model.transform(content, style), images[batch:])
        losses, total = self._compare(output, targets)
        if recipe.sharpness_weight:
            losses["sharpness"] = F.mse_loss(band_energies(output), band_energies(images[batch:]))
            total = total + recipe.sharpness_weight * losses["sharpness"]
        if recipe.identity_weight:
            losses["identity"] = self._identity(images, features, first, step_pairs)
            total = total + recipe.identity_weight * losses["identity"]
        return losses | {"total": total}

    def _identity(self, images: Tensor, features: list[Tensor], first: int, step_pairs: int) -> Tensor:
        """Of every second pair of the step, in turn the photo and the painting; 0 where none of them is here."""
        batch = len(images) // 2
        chosen = [n for n in range(first, first + batch) if n % 2 == 0]
        if not chosen:
            return images.new_zeros(())
        own = torch.tensor([n - first + (batch if n % 4 else 0) for n in chosen], device=images.device)
        own_features = [x[own] for x in features] if self.shares_encoder else self.model.encoder(images[own])
        copy = self._decode(self.model.transform(own_features, own_features), images[own])
        share = (len(chosen) / batch) / (-(-step_pairs // 2) / step_pairs)  # batches have more or fewer than the step
        return share * F.l1_loss(at_least_float32(copy), images[own])

    def _encode_pairs(self, content: Tensor, style: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Feature maps of photos and paintings, by the model's own encoder."""
        content = add_texture(content, self.model.texture_of(style))
        maps = self.model.encoder(torch.cat([content, style]))
        return tuple(zip(*(x.chunk(2) for x in maps), strict=True))

    @torch.no_grad()
    def _targets(self, images: Tensor) -> tuple[list[Tensor], list[Targets]]:
        """The perceptual network's features of all pictures, those of relu1_1 and relu2_1 left empty as only the losses
        need them; and what every group of pairs is compared with.
        """
        groups, targets = [], []
        for content, style in zip(*(half.split(self._pairs(images)) for half in images.chunk(2)), strict=True):
            maps = self.perceptual(torch.cat([content, style]))
            of_content, of_style = zip(*(x.chunk(2) for x in maps), strict=True)
            targets.append(self._targets_of(of_content, of_style))
            groups.append([x.new_empty(len(x), 0, *x.shape[2:]) for x in maps[:2]] + maps[2:])
        features = [
            torch.cat([x.chunk(2)[half] for half in (0, 1) for x in maps]) for maps in zip(*groups, strict=True)
        ]
        return features, targets

    def _targets_of(self, content: list[Tensor], style: list[Tensor]) -> Targets:
        """Of the features of some pairs."""
        recipe, local = self.recipe, []
        if recipe.local_weight:
            local = local_targets(content, style, keys=recipe.keys, backend=self.backend)
        return Targets(style_statistics(style), content_targets(content) if recipe.content_weight else [], local)

    def _compare(self, output: Tensor, targets: list[Targets]) -> tuple[dict[str, Tensor], Tensor]:
        """Losses of the output, without gradient, and their weighted sum, with one.

        The losses are means over pairs. So a few pairs at a time go through the perceptual network and back, and what
        it keeps for the way back is theirs only.
        """
        losses, gradients = {}, []
        for group, target in zip(output.detach().split(self._pairs(output)), targets, strict=True):
            share = len(group) / len(output)
            group.requires_grad_()
            with torch.enable_grad():
                found = self._compare_group(self._encode(group), target)
                total = share * self._weighted(found)
            with torch.autocast(output.device.type, enabled=False):
                gradients.extend(torch.autograd.grad(total, group))
            for name, loss in found.items():
                losses[name] = losses.get(name, 0) + share * loss.detach()
        return losses, WithGradient.apply(output, torch.cat(gradients), self._weighted(losses))

    def _weighted(self, losses: dict[str, Tensor]) -> Tensor:
        """Their sum, weighted as the recipe says."""
        return sum(getattr(self.recipe, f"{name}_weight") * loss for name, loss in losses.items())

    def _compare_group(self, features: list[Tensor], targets: Targets) -> dict[str, Tensor]:
        """Losses of some outputs' features."""
        distance = robust_distance if self.recipe.robust else global_distance
        losses = {"global": distance(style_statistics(features), targets.style)}
        if self.recipe.local_weight:
            losses["local"] = local_loss(features, targets.local)
        if self.recipe.content_weight:
            losses["content"] = content_distance(features, targets.content)
        return losses

    def _pairs(self, images: Tensor) -> int:
        """How many are compared at a time: on a processor one is enough to keep it busy."""
        return 1 if images.device.type == "cpu" else len(images)

    def _decode(self, features: list[Tensor], in_colors_of: Tensor) -> Tensor:
        out = self._run(self.model.decoder, *features)
        if not isinstance(self.model.decoder, StyledDecoder):
            return out
        out = match_colors(out, colors_of(in_colors_of))
        return out + (out.clamp(0, 1) - out).detach()  # what will be seen; beyond the range of colours gradients go on

    def _encode(self, image: Tensor) -> list[Tensor]:
        return self._run(self.perceptual, image)

    def _run(self, module: nn.Module, *inputs: Tensor) -> Tensor | list[Tensor]:
        if self.checkpoint_activations:
            return checkpoint(module, *inputs, use_reentrant=False)
        return module(*inputs)


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)
