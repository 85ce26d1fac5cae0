"""Scoring networks and folders of results on pairs of held-out photos and paintings (see `a2k evaluate --help`)."""

import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from pathlib import Path
from statistics import fmean, median
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from a2k.checkpoint import load_encoder
from a2k.data import split_files
from a2k.encoder import Encoder
from a2k.images import ImageError, find_images, read_image, result_stem, to_pil, to_tensor
from a2k.losses import content_loss, style_statistics
from a2k.model import MINIMUM
from a2k.sheet import comparison_sheet
from a2k.stylize import StyleTransfer

PHOTO = "photo unchanged"
SHEET_PAIRS = 8
KEPT_PAINTINGS = 128  # whose statistics are kept: 1.4 MB each
COLOR_DIRECTIONS, COLOR_QUANTILES = 32, 256


@dataclass(frozen=True)
class Scores:
    """Means over the pairs, of one network or one folder of results.

    Against the painting: style_loss (`a2k.losses.global_style_loss`), gram_loss (`gram_matrices`) and color_distance
    (`color_quantiles`). style_loss_shuffled: the style loss against a painting that was not asked for. Against the
    photo: content_loss (`a2k.losses.content_loss`), `vgg_distance` and `ssim`. seconds_per_picture: of a network,
    from PIL image to PIL image, their median; dtype: of its computation. Both are None for a folder.
    """

    name: str
    style_loss: float
    style_loss_shuffled: float
    gram_loss: float
    color_distance: float
    content_loss: float
    vgg_distance: float
    ssim: float
    seconds_per_picture: float | None
    dtype: str | None


@dataclass(frozen=True)
class Report:
    """Scores on the same pairs by the same perceptual network; the first are those of the photos unchanged."""

    perceptual: str
    pairs: int
    size: int
    scores: list[Scores]

    def table(self) -> str:
        """The scores as lines of text, one for each network or folder."""
        names = [field.name for field in fields(Scores)][1:]
        rows = [["", *(name.replace("_", " ").replace("seconds per", "s /") for name in names)]]
        for scores in self.scores:
            rows.append([scores.name, *(cell(getattr(scores, name)) for name in names)])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [f"{self.pairs} pairs at {self.size} px, scored by {self.perceptual}"]
        for name, *cells in rows:
            lines.append("  ".join([name.ljust(widths[0]), *map(str.rjust, cells, widths[1:])]))
        return "\n".join(lines)


def cell(value: float | str | None) -> str:
    """Of the table."""
    return f"{value:.4f}" if isinstance(value, float) else value or "-"


def evaluate(
    content_dir: str | Path,
    style_dir: str | Path,
    perceptual: str | Path,
    networks: Mapping[str, StyleTransfer],
    *,
    results: Sequence[str | Path] = (),
    size: int = 256,
    pairs: int = 200,
    holdout: int = 0,
) -> tuple[Report, Image.Image]:
    """Score networks and results on fixed pairs of a photo and a painting, each cut to its central square.

    Args:
        content_dir, style_dir: folders of pictures. perceptual: a VGG encoder file. networks: by the names that the
        report gives them. results: folders of pictures that any tool made of these photos and paintings, named as
        `a2k stylize` does: {photo}_stylized_{painting}, with any extension; they are cut to their central squares
        too. size: side of the squares in pixels. pairs: number of pairs, drawn from all by a fixed seed. holdout:
        use only the last so many files of each folder, by name (0: all).

    Returns the report, and a sheet of some pairs: photo, painting and every result. A pair with a picture that cannot
    be read or redrawn is named in a warning and left out of all rows.

    Raises ImageError or WeightsError if a folder, the network's file or all pairs cannot be used, ValueError for a
    number out of range, and where the report would call two rows the same.
    """
    check_names([*networks, *map(str, results)])
    if pairs < 1 or size < MINIMUM:
        raise ValueError(f"pairs={pairs} and size={size}; they must be at least 1 and {MINIMUM}")
    encoder, kind = load_encoder(perceptual)
    chosen = held_pairs(content_dir, style_dir, pairs, holdout)
    ruler = Ruler(encoder, size)
    sources = {PHOTO: lambda photo, painting: ruler.square(photo)}
    sources |= {name: Network(transfer, ruler) for name, transfer in networks.items()}
    sources |= {str(folder): Folder(folder, chosen, size) for folder in results}
    measured = {name: [] for name in sources}
    shown, rows = np.linspace(0, len(chosen) - 1, SHEET_PAIRS).round(), []
    with torch.inference_mode():
        for number, (photo, painting, other) in enumerate(tqdm(chosen, unit="pair", disable=None)):
            try:
                outputs = {name: source(photo, painting) for name, source in sources.items()}
                found = [ruler.measure(output, photo, painting, other) for output in outputs.values()]
            except ImageError as error:
                warnings.warn(f"skipped: {error}", stacklevel=2)
                continue
            for values, value in zip(measured.values(), found, strict=True):
                values.append(value)
            if number in shown or not rows:
                pictures = (outputs.pop(PHOTO), ruler.square(painting), *outputs.values())
                rows.append([to_pil(picture) for picture in pictures])
    scored = len(measured[PHOTO])
    if not scored:
        raise ImageError(f"none of {len(chosen)} pairs could be scored; see the warnings, and check the folders")
    scores = []
    for name, values in measured.items():
        means = {measure: fmean(value[measure] for value in values) for measure in values[0]}
        seconds, dtype = sources[name].cost() if name in networks else (None, None)
        scores.append(Scores(name, **means, seconds_per_picture=seconds, dtype=dtype))
    report = Report(f"{kind} ({Path(perceptual).name})", scored, size, scores)
    return report, comparison_sheet(["photo", "painting", *networks, *map(str, results)], rows)


def check_names(names: Sequence[str]) -> None:
    """Raises ValueError if rows of the report, which are known by their names, would have the same."""
    names = [PHOTO, *names]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(
                f"two rows would be called {name!r}; give it once, or write the path another way (./ before it)"
            )


class Network:
    """Redraws the ruler's squares and counts the seconds."""

    def __init__(self, transfer: StyleTransfer, ruler: "Ruler") -> None:
        self.transfer, self.square, self.seconds = transfer, ruler.square, []

    def __call__(self, photo: Path, painting: Path) -> Tensor:
        pictures = [to_pil(self.square(path)) for path in (photo, painting)]
        if not self.seconds:
            self.transfer.stylize(*pictures)  # the first call sets up
        started = time.perf_counter()
        output = self.transfer.stylize(*pictures)
        self.seconds.append(time.perf_counter() - started)
        return to_tensor(output)

    def cost(self) -> tuple[float, str]:
        """Median seconds, and the dtype they were computed in."""
        return median(self.seconds), str(self.transfer.dtype).removeprefix("torch.")


class Folder:
    """Finds the results in a folder. Raises ImageError unless there is one, and only one, for every pair."""

    def __init__(self, folder: str | Path, pairs: list[tuple[Path, Path, Path]], size: int) -> None:
        self.size = size
        photos, paintings, _ = zip(*pairs, strict=True)
        for sources in (photos, paintings):
            by_stem(sources)
        needed = [result_stem(photo.stem, painting.stem) for photo, painting, _ in pairs]
        known = set(needed)
        self.files = by_stem(path for path in find_images([folder]) if path.stem in known)
        missing = [name for name in needed if name not in self.files]
        if missing:
            raise ImageError(
                f"{folder} lacks {len(missing)} of {len(pairs)} results, the first {missing[0]}.png; "
                "name them as `a2k stylize` does, or lower the number of pairs"
            )

    def __call__(self, photo: Path, painting: Path) -> Tensor:
        return load_square(self.files[result_stem(photo.stem, painting.stem)], self.size)


def by_stem(files: Iterable[Path]) -> dict[str, Path]:
    """The files by their names without extension. Raises ImageError where two of one folder have the same."""
    found: dict[str, Path] = {}
    for file in files:
        other = found.setdefault(file.stem, file)
        if other != file:
            raise ImageError(f"{other} and {file} differ only in their extension; move one to another folder")
    return found


class StyleMeasures(NamedTuple):
    """What a result and a painting are compared by."""

    statistics: list[Tensor]
    grams: list[Tensor]
    colors: np.ndarray


class Ruler:
    """Measures results by a perceptual network; of a painting only the statistics are kept, of the photo all."""

    def __init__(self, encoder: Encoder, size: int) -> None:
        self.square = lru_cache(4)(partial(load_square, size=size))
        self.features = lru_cache(2)(encoder)  # of the photo's square and of the last result
        self.painting = lru_cache(KEPT_PAINTINGS)(
            lambda path: style_measures(self.square(path), encoder(self.square(path)))
        )

    def measure(self, output: Tensor, photo: Path, painting: Path, other: Path) -> dict[str, float]:
        """The measures of `Scores` of one result (1, 3, size, size)."""
        image = self.square(photo)
        features, photo_features = self.features(output), self.features(image)
        style = style_measures(output, features)
        target, wrong = self.painting(painting), self.painting(other)
        return {
            "style_loss": total_mse(style.statistics, target.statistics),
            "style_loss_shuffled": total_mse(style.statistics, wrong.statistics),
            "gram_loss": total_mse(style.grams, target.grams),
            "color_distance": float(np.abs(style.colors - target.colors).mean()),
            "content_loss": float(content_loss(features, photo_features)),
            "vgg_distance": vgg_distance(features, photo_features),
            "ssim": ssim(output, image),
        }


def style_measures(image: Tensor, features: list[Tensor]) -> StyleMeasures:
    return StyleMeasures(style_statistics(features), gram_matrices(features), color_quantiles(image))


def total_mse(first: list[Tensor], second: list[Tensor]) -> float:
    return float(sum(map(F.mse_loss, first, second)))


def gram_matrices(features: list[Tensor]) -> list[Tensor]:
    """Mean over all points of the products of channels (Gatys et al. 2016) of relu1_1 .. relu4_1: (1, C, C) each."""
    flat = [x.flatten(2) for x in features[:4]]
    return [x @ x.mT / x.shape[2] for x in flat]


def color_quantiles(image: Tensor) -> np.ndarray:
    """Quantiles of the pixels along fixed random directions of RGB space: (directions, quantiles).

    The mean absolute difference of two pictures' is their sliced Wasserstein distance (Rabin et al. 2011).
    """
    directions = np.random.default_rng(0).normal(size=(COLOR_DIRECTIONS, 3)).astype(np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    values = np.sort(directions @ image[0].flatten(1).numpy())
    places = (np.arange(COLOR_QUANTILES) + 0.5) / COLOR_QUANTILES * values.shape[1]
    return values[:, places.astype(int)]


def vgg_distance(first: list[Tensor], second: list[Tensor]) -> float:
    """Squared distance of the features, each point's of length 1, mean over the points, sum over relu1_1 .. relu5_1:
    LPIPS (Zhang et al. 2018) without its learned weights.
    """
    pairs = ((F.normalize(x), F.normalize(y)) for x, y in zip(first, second, strict=True))
    return float(sum((x - y).square().sum(1).mean() for x, y in pairs))


def ssim(first: Tensor, second: Tensor) -> float:
    """Structural similarity (Wang et al. 2004) of two images (1, 3, H, W) in [0, 1], mean over RGB.

    11 x 11 Gaussian window of deviation 1.5, no padding.
    """
    window = torch.exp(-(torch.arange(-5, 6, dtype=first.dtype) ** 2) / (2 * 1.5**2))
    window = (window / window.sum()).expand(15, 1, 1, 11)
    moments = torch.cat([first, second, first * first, second * second, first * second], 1)
    moments = F.conv2d(F.conv2d(moments, window, groups=15), window.mT, groups=15)
    mean1, mean2, square1, square2, product = moments.split(3, 1)
    variances = square1 - mean1**2 + square2 - mean2**2
    luminance = (2 * mean1 * mean2 + 0.01**2) / (mean1**2 + mean2**2 + 0.01**2)
    structure = (2 * (product - mean1 * mean2) + 0.03**2) / (variances + 0.03**2)
    return float((luminance * structure).mean())


def held_pairs(
    content_dir: str | Path, style_dir: str | Path, pairs: int, holdout: int
) -> list[tuple[Path, Path, Path]]:
    """(photo, painting, another painting) of the last `holdout` files of two folders (0: of all). Raises ImageError."""
    contents, styles = (held_files(folder, holdout) for folder in (content_dir, style_dir))
    if len(styles) < 2:
        raise ImageError(f"{style_dir} has one picture; shuffling styles needs at least two")
    return [(contents[c], styles[s], styles[other]) for c, s, other in choose_pairs(len(contents), len(styles), pairs)]


def held_files(folder: str | Path, holdout: int) -> list[Path]:
    rest, held = split_files(folder, holdout)
    return held or rest


def choose_pairs(contents: int, styles: int, pairs: int) -> list[tuple[int, int, int]]:
    """(content, style, another style) for a fixed choice of distinct pairs, sorted by content."""
    rng, count = np.random.default_rng(0), contents * styles
    if count <= 10**6:  # published scores are of these pairs
        drawn = rng.permutation(count)[:pairs]
    else:  # without a list of all of them, which may not fit in memory
        drawn = rng.choice(count, min(pairs, count), replace=False)
    chosen = np.sort(drawn)
    others = rng.integers(1, styles, len(chosen))
    return [(int(p) // styles, int(p) % styles, int(p + o) % styles) for p, o in zip(chosen, others, strict=True)]


def load_square(path: Path, size: int) -> Tensor:
    """The central square of a picture at size x size pixels: (1, 3, size, size)."""
    return to_tensor(ImageOps.fit(read_image(path).rgb, (size, size), Image.Resampling.LANCZOS))
