"""Training data: random crops of random pairs of a photo and a painting."""

import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from a2k.images import ImageError, find_images, read_image, to_tensor


class PairDataset(Dataset):
    """Pairs of crops (3, crop, crop), RGB in [0, 1]. Item i depends on the seed and i alone.

    A picture is resized so that its short side is twice the crop (as published: 512 and 256, but keeping the
    aspect), then cropped at random and flipped by chance. A file that cannot be read is named in a warning and
    another one is drawn.

    Args:
        content_files, style_files: what to draw from. crop: side in pixels. length: number of items. seed: of
        all random choices.
    """

    def __init__(self, content_files: list[Path], style_files: list[Path], crop: int, length: int, seed: int) -> None:
        self.files = (content_files, style_files)
        self.crop, self.length, self.seed = crop, length, seed

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, item])
        content, style = (random_crop(draw_image(files, rng), self.crop, rng) for files in self.files)
        return content, style


def draw_image(files: list[Path], rng: np.random.Generator) -> Image.Image:
    """A random readable picture of the list. Raises ImageError after 100 unreadable ones."""
    for _ in range(100):
        path = files[rng.integers(len(files))]
        try:
            return read_image(path).rgb
        except ImageError as error:
            warnings.warn(f"skipped: {error}", stacklevel=2)
    raise ImageError(f"100 pictures in a row could not be read, the last one {path}; check the data folders")


def readable_images(files: list[Path], count: int) -> list[Image.Image]:
    """The first `count` pictures that can be read. Raises ImageError if there are none."""
    images = []
    for path in files:
        if len(images) < count:
            try:
                images.append(read_image(path).rgb)
            except ImageError as error:
                warnings.warn(f"skipped: {error}", stacklevel=2)
    if not images:
        raise ImageError(f"none of {len(files)} pictures in {files[0].parent} can be read; check the folder")
    return images


def random_crop(image: Image.Image, crop: int, rng: np.random.Generator) -> Tensor:
    """A crop of the picture at a short side of 2 * crop; only the crop is resized, so any aspect is cheap."""
    scale = 2 * crop / min(image.size)
    left, top = (int(rng.integers(int(n * scale) - crop + 1)) for n in image.size)
    box = tuple(n / scale for n in (left, top, left + crop, top + crop))
    pixels = to_tensor(image.resize((crop, crop), Image.Resampling.LANCZOS, box))[0]
    return pixels.flip(-1) if rng.random() < 0.5 else pixels


def split_files(folder: str | Path, holdout: int) -> tuple[list[Path], list[Path]]:
    """The images of a folder by name: (all but the last `holdout`, the last `holdout`). Raises ImageError."""
    files = find_images([folder])
    if holdout < 0:
        raise ImageError(f"holdout is {holdout}; it must be at least 0")
    if len(files) <= holdout:
        raise ImageError(f"{folder} has {len(files)} images, of which holdout={holdout} leaves none; lower it")
    return files[: len(files) - holdout], files[len(files) - holdout :]


def make_loader(dataset: Dataset, batch_size: int, workers: int, first_item: int = 0) -> DataLoader:
    """Batches in the dataset's order, from first_item on."""
    items = torch.utils.data.Subset(dataset, range(first_item, len(dataset)))
    return DataLoader(items, batch_size, num_workers=workers, drop_last=True, persistent_workers=False)
