"""Training data: random crops of random pairs of a photo and a painting."""

import math
import signal
import warnings
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from a2k.images import ImageError, find_images, read_image, to_tensor


class PairDataset(Dataset):
    """Pairs of crops (3, crop, crop), RGB in [0, 1]. Item i depends on i and the arguments alone.

    A picture is resized so that its short side is `scale` times the crop, keeping its aspect, then cropped at random
    and flipped by chance. A file that cannot be read, or is no longer there, is named in a warning and another one is
    drawn.

    Args:
        content_files, style_files: what to draw from. crops: sides in pixels; steps take them in turn. step_size: items
        of a step. length: number of items. seed: of all random choices. scale: lowest and highest; each pair draws its
        own, log-uniformly. The published one is 2 (512 and 256 pixels).

    Raises ValueError unless 1 <= lowest <= highest, and (from an item) ImageError after 100 unreadable files in a row.
    """

    def __init__(
        self,
        content_files: list[Path],
        style_files: list[Path],
        crops: tuple[int, ...],
        step_size: int,
        length: int,
        seed: int,
        scale: tuple[float, float] = (2.0, 2.0),
    ) -> None:
        lowest, highest = scale
        if not 1 <= lowest <= highest < math.inf:
            raise ValueError(f"scale is {lowest:g} {highest:g}; give a lowest of at least 1 and a highest of no less")
        self.files = (content_files, style_files)
        self.crops, self.step_size, self.length, self.seed, self.scale = crops, step_size, length, seed, scale

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, item: int) -> tuple[Tensor, Tensor]:
        rng = np.random.default_rng([self.seed, item])
        lowest, highest = self.scale
        crop = self.crop_of(item)
        short_side = crop * lowest * (highest / lowest) ** rng.random()
        drawn = (draw_image(files, rng, math.ceil(short_side)) for files in self.files)
        content, style = (random_crop(image, crop, short_side, rng) for image in drawn)
        return content, style

    def crop_of(self, item: int) -> int:
        """Side of the crops of the step that the item belongs to."""
        return self.crops[item // self.step_size % len(self.crops)]


def draw_image(files: list[Path], rng: np.random.Generator, short_side: int | None = None) -> Image.Image:
    """A random readable picture of the list, see `read_image`. Raises ImageError after 100 unreadable ones."""
    for _ in range(100):
        path = files[rng.integers(len(files))]
        try:
            return read_image(path, short_side=short_side).rgb
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


def random_crop(image: Image.Image, crop: int, short_side: float, rng: np.random.Generator) -> Tensor:
    """A crop of the picture at that short side; only the crop is resized, so any aspect is cheap."""
    scale = short_side / min(image.size)
    left, top = (int(rng.integers(int(n * scale + 1e-6) - crop + 1)) for n in image.size)
    box = tuple(
        min(n / scale, side) for n, side in zip((left, top, left + crop, top + crop), 2 * image.size, strict=True)
    )
    pixels = to_tensor(image.resize((crop, crop), Image.Resampling.LANCZOS, box))[0]
    return pixels.flip(-1) if rng.random() < 0.5 else pixels


def split_files(folder: str | Path, holdout: int) -> tuple[list[Path], list[Path]]:
    """The images of a folder by name: (all but the last `holdout`, the last `holdout`). Raises ImageError."""
    return hold_out(find_images([folder]), holdout)


def hold_out(files: list[Path], holdout: int) -> tuple[list[Path], list[Path]]:
    """(all but the last `holdout` files, the last `holdout`). Raises ImageError."""
    if holdout < 0:
        raise ImageError(f"holdout is {holdout}; it must be at least 0")
    if len(files) <= holdout:
        folder = files[0].parent
        raise ImageError(f"{folder} has {len(files)} images, of which holdout={holdout} leaves none; lower it")
    return files[: len(files) - holdout], files[len(files) - holdout :]


def make_loader(
    dataset: PairDataset,
    batch_size: int,
    workers: int,
    first_batch: int = 0,
    accumulate: int = 1,
    rank: int = 0,
    ranks: int = 1,
    pin_memory: bool = False,
) -> DataLoader:
    """What one of the ranks takes in each step from first_batch on: accumulate * batch_size items, fewer where the crop
    is not the smallest. In every step the ranks take items in their order.
    """
    step_size, lots = accumulate * batch_size * ranks, []
    for start in range(first_batch * step_size, len(dataset) - step_size + 1, step_size):
        count = accumulate * crops_of_area(batch_size, dataset.crops, dataset.crop_of(start))
        lots.append(range(start + rank * count, start + (rank + 1) * count))
    return DataLoader(
        dataset,
        batch_sampler=lots,
        num_workers=workers,
        worker_init_fn=ignore_signals,
        pin_memory=pin_memory,
    )


def crops_of_area(batch_size: int, crops: tuple[int, ...], crop: int) -> int:
    """How many crops of a side have the area of a batch of the smallest ones, rounded down."""
    return batch_size * min(crops) ** 2 // crop**2


def ignore_signals(_worker: int) -> None:
    """Ctrl-C and SIGTERM reach a whole group of processes, but it is the training that ends its workers."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
