"""Validation on fixed pairs of held-out photos and paintings."""

import hashlib
from functools import cached_property
from itertools import cycle, islice

import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from a2k.encoder import Encoder
from a2k.images import to_tensor
from a2k.losses import content_loss, global_style_loss

VALIDATION_PAIRS = 16


class Validation:
    """Style and content loss by the perceptual network on fixed pairs, each cut to its central square.

    Photo i meets painting i; where there are fewer of one kind they are taken again.

    Args:
        photos, paintings: at least one of each. perceptual: the network that scores. size: side of the squares in
        pixels. batch_size: pairs at a time. device: of the computation.
    """

    def __init__(
        self,
        photos: list[Image.Image],
        paintings: list[Image.Image],
        perceptual: Encoder,
        size: int,
        batch_size: int,
        device: torch.device,
    ) -> None:
        count = max(len(photos), len(paintings))
        squares = [torch.cat([central_square(image, size) for image in images]) for images in (photos, paintings)]
        content, style = (torch.stack(list(islice(cycle(images), count))) for images in squares)
        self.batches = list(zip(content.split(batch_size), style.split(batch_size), strict=True))
        self.perceptual, self.device = perceptual, device

    @cached_property
    def scale(self) -> str:
        """A digest of the pairs and of the perceptual network: sums are comparable where it is the same."""
        digest = hashlib.sha256()
        tensors = [*(x for batches in zip(*self.batches, strict=True) for x in batches), *self.perceptual.parameters()]
        for x in tensors:
            digest.update(x.detach().float().cpu().numpy().tobytes())
        return digest.hexdigest()

    @torch.no_grad()
    def measure(self, model: nn.Module) -> dict[str, float]:
        """Mean losses of weight 1 over the pairs: {"validation_style", "validation_content"}."""
        sums, count = torch.zeros(2, dtype=torch.float64), 0
        for content, style in self.batches:
            content, style = (x.to(self.device, memory_format=torch.channels_last) for x in (content, style))
            features = self.perceptual(model(content, style))
            losses = (
                global_style_loss(features, self.perceptual(style)),
                content_loss(features, self.perceptual(content)),
            )
            sums += len(content) * torch.stack(losses).double().cpu()
            count += len(content)
        style, content = (sums / count).tolist()
        return {"validation_style": style, "validation_content": content}


def central_square(image: Image.Image, size: int) -> Tensor:
    """The largest square around the centre, resized: (1, 3, size, size)."""
    return to_tensor(ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS))
