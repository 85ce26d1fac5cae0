"""What a training run is told: `Recipe`, which differs between networks, and `TrainOptions`."""

import math
import os
from dataclasses import asdict, dataclass

from a2k.schedules import SCHEDULES

WORKERS_PER_PROCESSOR = 4  # thousands of them would take all memory, and with it the machine


class TrainingError(ValueError):
    """Training cannot start or go on; the message is one line."""


@dataclass(frozen=True)
class Recipe:
    """What differs between networks: learning rate and schedule, loss weights, keys of the local loss, and the start.

    schedule: see `a2k.schedules`. robust: the global loss is `a2k.losses.robust_style_loss`. autoencode_steps: first
    steps, which only reproduce the pictures (A2K bypassed, L1 loss), so that features carry colour before they are
    matched, and in which the encoder of a styled network learns to tell the perceptual network's features. A VGG
    network needs none. sharpness_weight: of the MSE of `a2k.losses.band_energies`. identity_weight: of the L1 distance
    between a picture and itself redrawn in its own manner (after Park & Lee 2019, arXiv 1812.02342), which keeps colour
    and detail alive. clip: largest norm of the gradient. ema_decay: of the averaged weights, which are the ones saved.
    """

    lr: float = 2e-4
    schedule: str = "published"
    robust: bool = False
    global_weight: float = 10.0
    local_weight: float = 1.25
    content_weight: float = 0.0
    sharpness_weight: float = 0.0
    identity_weight: float = 0.0
    keys: str = "cumulative"
    autoencode_steps: int = 0
    clip: float = 1.0
    ema_decay: float = 0.999


RECIPES = {
    "vgg19": Recipe(),
    "vgg16": Recipe(),
    "lite": Recipe(
        lr=5e-4, schedule="linear", local_weight=0.4, identity_weight=50.0, keys="own", autoencode_steps=500
    ),
    "styled": Recipe(
        lr=5e-4,
        schedule="cosine",
        robust=True,
        local_weight=0.0,
        content_weight=6.0,
        sharpness_weight=1.0,
        keys="own",
        autoencode_steps=500,
        ema_decay=0.997,
    ),
}


@dataclass(frozen=True)
class TrainOptions:
    """Everything a run is told. Folders and files are paths; sizes are in pixels; weights are loss weights.

    crop: sides, which steps take in turn; validation takes the first. batch_size: pairs that one process computes at a
    time, fewer where the crop is not the smallest; a step takes accumulate such batches in every process.
    """

    content_dir: str
    style_dir: str
    perceptual: str
    output: str
    config: str = "styled"
    recipe: Recipe = RECIPES["styled"]
    crop: tuple[int, ...] = (128,)
    scale: tuple[float, float] = (2.0, 2.0)
    batch_size: int = 6
    accumulate: int = 1
    steps: int = 5000
    seed: int = 0
    dtype: str = "float32"
    checkpoint_activations: bool = False
    checkpoint_steps: int = 500
    checkpoint_minutes: float = 10.0
    keep: int = 3
    validate_steps: int = 500
    holdout: int = 40
    workers: int = 1
    weights: str | None = None
    resume: bool = False
    device: str = "cpu"
    backend: str | None = None

    def __post_init__(self) -> None:
        """Raises TrainingError for a number out of range."""
        for crop in self.crop:
            if crop < 32 or crop % 16:
                raise TrainingError(f"crop is {crop}; it must be a multiple of 16, at least 32")
        at_least_1 = ("batch_size", "accumulate", "steps", "checkpoint_steps", "validate_steps", "keep")
        for name, lowest in (*((name, 1) for name in at_least_1), ("workers", 0), ("seed", 0)):
            if getattr(self, name) < lowest:
                raise TrainingError(f"{name} is {getattr(self, name)}; it must be at least {lowest}")
        processors = os.cpu_count() or 1
        if self.workers > (most := WORKERS_PER_PROCESSOR * processors):
            raise TrainingError(f"workers is {self.workers}; on {processors} processors give at most {most}")
        least = -(-(max(self.crop) ** 2) // min(self.crop) ** 2)
        if self.batch_size < least:
            raise TrainingError(
                f"batch_size is {self.batch_size}; with crops of {min(self.crop)} and {max(self.crop)} it must be at "
                f"least {least}, for one pair of the largest"
            )
        if self.seed >= 1 << 63:
            raise TrainingError(f"seed is {self.seed}; it must be below 2**63")
        if not self.checkpoint_minutes >= 0:
            raise TrainingError(f"checkpoint_minutes is {self.checkpoint_minutes}; it must be at least 0")
        self._check_recipe()

    def _check_recipe(self) -> None:
        if self.recipe.autoencode_steps < 0:
            raise TrainingError(f"autoencode_steps is {self.recipe.autoencode_steps}; it must be at least 0")
        for name, weight in asdict(self.recipe).items():
            if name.endswith("_weight") and not 0 <= weight < math.inf:
                raise TrainingError(f"{name} is {weight}; it must be at least 0 and finite")
        if not 0 < self.recipe.lr < math.inf:
            raise TrainingError(f"lr is {self.recipe.lr}; it must be above 0 and finite")
        if not self.recipe.clip > 0:
            raise TrainingError(f"clip is {self.recipe.clip}; it must be above 0")
        if not 0 <= self.recipe.ema_decay < 1:
            raise TrainingError(f"ema_decay is {self.recipe.ema_decay}; it must be at least 0 and below 1")
        if self.recipe.schedule not in SCHEDULES:
            raise TrainingError(f"schedule is {self.recipe.schedule!r}; choose one of {', '.join(SCHEDULES)}")

    def flat(self) -> dict[str, object]:
        """What makes the run: all options but `resume`, the recipe's too, by the names of the flags of `a2k train`."""
        options = asdict(self)
        del options["resume"]
        return options | options.pop("recipe")
