"""Scoring a network on pairs of held-out photos and paintings (see `a2k evaluate --help`)."""

import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from a2k.checkpoint import load_encoder
from a2k.data import split_files
from a2k.encoder import Encoder
from a2k.images import ImageError, read_image, to_tensor
from a2k.losses import content_loss, global_style_loss
from a2k.model import MINIMUM
from a2k.stylize import StyleTransfer

KEPT_PICTURES = 32  # whose features are kept: 32 MB each at 256 px


@dataclass(frozen=True)
class Scores:
    """Means over the pairs. Losses are those of `a2k.losses` with weight 1 on the perceptual network named."""

    weights: str
    perceptual: str
    pairs: int
    size: int
    style_loss: float
    style_loss_identity: float  # of the photos unchanged
    style_loss_shuffled: float  # of the outputs, against a painting that was not asked for
    content_loss: float
    seconds_per_picture: float

    def table(self) -> str:
        """The scores as lines of text."""
        rows = [
            ("style loss", self.style_loss, f"{self.style_loss / self.style_loss_identity:.2f} of the identity's"),
            ("  photo unchanged", self.style_loss_identity, "the identity"),
            ("  shuffled styles", self.style_loss_shuffled, f"right style {self._gain():.0%} lower"),
            ("content loss", self.content_loss, ""),
            ("seconds per picture", self.seconds_per_picture, ""),
        ]
        title = f"{self.weights}: {self.pairs} pairs at {self.size} px, scored by {self.perceptual}"
        return "\n".join([title, *(f"  {name:<22}{value:>9.4f}   {note}".rstrip() for name, value, note in rows)])

    def _gain(self) -> float:
        return 1 - self.style_loss / self.style_loss_shuffled


def evaluate(
    content_dir: str | Path,
    style_dir: str | Path,
    perceptual: str | Path,
    transfer: StyleTransfer,
    *,
    name: str,
    size: int = 256,
    pairs: int = 200,
    holdout: int = 0,
) -> Scores:
    """Score a network on fixed pairs of a photo and a painting, each cropped to the central size x size pixels.

    Args:
        content_dir, style_dir: folders of pictures. perceptual: a VGG encoder file. transfer: the network.
        name: of the network, for the table. size: in pixels. pairs: number of pairs, drawn from all by a fixed
        seed. holdout: use only the last so many files of each folder, by name (0: all).

    Raises ImageError or WeightsError if a folder or file cannot be used, ValueError for a number out of range.
    """
    if pairs < 1 or size < MINIMUM:
        raise ValueError(f"pairs={pairs} and size={size}; they must be at least 1 and {MINIMUM}")
    encoder, kind = load_encoder(perceptual)
    contents, styles = (held_files(folder, holdout) for folder in (content_dir, style_dir))
    if len(styles) < 2:
        raise ImageError(f"{style_dir} has one picture; shuffling styles needs at least two")
    chosen = choose_pairs(len(contents), len(styles), pairs)

    @lru_cache(KEPT_PICTURES)
    def read(path: Path) -> tuple[Tensor, list[Tensor]]:
        image = load_square(path, size)
        return image, _features(encoder, image)

    with torch.inference_mode():
        sums, seconds = np.zeros(4), 0.0
        transfer.model(*(_to(transfer, read(files[0])[0]) for files in (contents, styles)))  # the first call sets up
        for c, s, other in tqdm(chosen, unit="pair", disable=None):
            (photo, photo_features), (painting, painting_features) = read(contents[c]), read(styles[s])
            started = time.perf_counter()
            output = transfer.model(_to(transfer, photo), _to(transfer, painting)).float().cpu().clamp(0, 1)
            seconds += time.perf_counter() - started
            features = _features(encoder, output)
            sums += [
                float(global_style_loss(features, painting_features)),
                float(global_style_loss(photo_features, painting_features)),
                float(global_style_loss(features, read(styles[other])[1])),
                float(content_loss(features, photo_features)),
            ]
    style, identity, shuffled, content = (float(x) for x in sums / len(chosen))
    return Scores(
        weights=name,
        perceptual=f"{kind} ({Path(perceptual).name})",
        pairs=len(chosen),
        size=size,
        style_loss=style,
        style_loss_identity=identity,
        style_loss_shuffled=shuffled,
        content_loss=content,
        seconds_per_picture=seconds / len(chosen),
    )


def held_files(folder: str | Path, holdout: int) -> list[Path]:
    rest, held = split_files(folder, holdout)
    return held or rest


def load_square(path: Path, size: int) -> Tensor:
    """The central square of a picture at size x size pixels: (1, 3, size, size)."""
    return to_tensor(ImageOps.fit(read_image(path).rgb, (size, size), Image.Resampling.LANCZOS))


def choose_pairs(contents: int, styles: int, pairs: int) -> list[tuple[int, int, int]]:
    """(content, style, another style) for a fixed choice of distinct pairs, sorted by content."""
    rng = np.random.default_rng(0)
    chosen = np.sort(rng.permutation(contents * styles)[:pairs])
    others = rng.integers(1, styles, len(chosen))
    return [(int(p) // styles, int(p) % styles, int(p + o) % styles) for p, o in zip(chosen, others, strict=True)]


def _to(transfer: StyleTransfer, image: Tensor) -> Tensor:
    return image.to(transfer.device, transfer.dtype, memory_format=torch.channels_last)


def _features(encoder: Encoder, image: Tensor) -> list[Tensor]:
    return encoder(image.to(memory_format=torch.channels_last))
