"""Training: the published losses on random crops, with checkpoints, samples and logs (see `a2k train --help`)."""

import copy
import json
import math
import signal
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from a2k.checkpoint import load_encoder, load_model, load_strictly, save_model, write_atomically
from a2k.convert import read_file
from a2k.data import PairDataset, make_loader, readable_images, split_files
from a2k.images import to_pil, to_tensor, write_image
from a2k.losses import content_loss, global_style_loss, local_feature_loss
from a2k.model import CONFIGS, StyA2K
from a2k.sheet import contact_sheet

LOSSES = ("pixel", "global", "local", "content", "identity")
SAMPLE_FILES = 4  # rows and columns of the sample grid
SAMPLE_SIZE = 256  # pixels, long side


class TrainingError(ValueError):
    """Training cannot start or go on; the message is one line."""


@dataclass(frozen=True)
class Recipe:
    """What differs between networks: learning rate, loss weights, keys of the local loss, and the start.

    autoencode_steps: first steps that only reproduce the content (A2K bypassed, L1 loss), so that a lite
    network's features carry colour before they are matched; a VGG network is frozen and needs none.
    identity_weight: of the L1 distance between a picture and itself redrawn in its own manner (after Park & Lee
    2019, arXiv 1812.02342), which keeps colour and detail alive. ema_decay: of the averaged weights that are saved.
    """

    lr: float = 2e-4
    global_weight: float = 10.0
    local_weight: float = 1.25
    content_weight: float = 0.0
    identity_weight: float = 0.0
    keys: str = "cumulative"
    autoencode_steps: int = 0
    clip: float = 1.0
    ema_decay: float = 0.999


RECIPES = {
    "vgg19": Recipe(),
    "vgg16": Recipe(),
    "lite": Recipe(lr=5e-4, local_weight=0.4, identity_weight=50.0, keys="own", autoencode_steps=500),
}


@dataclass(frozen=True)
class TrainOptions:
    """Everything a run is told. Folders and files are paths; sizes are in pixels; weights are loss weights."""

    content_dir: str
    style_dir: str
    perceptual: str
    output: str
    config: str = "lite"
    recipe: Recipe = RECIPES["lite"]
    crop: int = 128
    scale: tuple[float, float] = (2.0, 2.0)
    batch_size: int = 6
    steps: int = 5000
    seed: int = 0
    dtype: str = "float32"
    checkpoint_steps: int = 500
    checkpoint_minutes: float = 10.0
    holdout: int = 40
    workers: int = 1
    weights: str | None = None
    resume: bool = False
    device: str = "cpu"
    backend: str | None = None


class Trainer:
    """One training run in one folder: `weights.safetensors`, `state.pt`, `log.jsonl`, `loss.png`, `samples/`.

    Raises TrainingError, ImageError or WeightsError when an option does not fit.
    """

    def __init__(self, options: TrainOptions) -> None:
        check_numbers(options)
        torch.manual_seed(options.seed)
        self.options, self.recipe = options, options.recipe
        self.folder = Path(options.output)
        self.state_file = self.folder / "state.pt"
        if self.state_file.exists() and not options.resume:
            raise TrainingError(f"{self.folder} holds a run already; go on with --resume or give another -o")
        if options.resume and not self.state_file.exists():
            raise TrainingError(f"{self.folder} holds no run to resume; leave out --resume")
        content_files, content_held = split_files(options.content_dir, options.holdout)
        style_files, style_held = split_files(options.style_dir, options.holdout)
        length = options.steps * options.batch_size
        self.data = PairDataset(content_files, style_files, options.crop, length, options.seed, options.scale)
        self.data[0]  # raises ImageError here and not in another process, where its message would drown
        self.samples = [
            readable_images(files, SAMPLE_FILES) for files in (content_held or content_files, style_held or style_files)
        ]
        for image in (*self.samples[0], *self.samples[1]):
            image.thumbnail((SAMPLE_SIZE, SAMPLE_SIZE))

        self.perceptual, kind = load_encoder(options.perceptual)
        self.model = self._build_model(kind)
        for module in (self.perceptual, self.model):
            module.to(options.device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = self._new_optimizer()
        self.style_start = 0 if options.weights else self.recipe.autoencode_steps  # step of the first style loss
        self.step = 0
        if options.resume:
            self._restore()
        self.shares_encoder = same_tensors(self.model.encoder, self.perceptual)

    def _build_model(self, perceptual_kind: str) -> StyA2K:
        options = self.options
        if options.weights:
            model = load_model(options.weights, backend=options.backend)
            if model.config != CONFIGS[options.config]:
                raise TrainingError(f"--weights {options.weights} is not a {options.config} network; give its --config")
            return model.train()
        model = StyA2K(CONFIGS[options.config], backend=options.backend)
        if options.config != "lite":
            if perceptual_kind != options.config:
                raise TrainingError(
                    f"--config {options.config} needs a {options.config} file as --perceptual, "
                    f"but {options.perceptual} is {perceptual_kind}"
                )
            model.encoder.load_state_dict(self.perceptual.state_dict())
        return model

    def _new_optimizer(self) -> torch.optim.Adam:
        return torch.optim.Adam(self.parameters, lr=self.recipe.lr, betas=(0.9, 0.999))

    def run(self) -> None:
        """Train to the last step, or until interrupted; either way the run can be resumed."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            trim_log(self.folder / "log.jsonl", self.step)
        except OSError as error:
            raise TrainingError(
                f"cannot write to {self.folder}: {error.strerror or error}; choose another -o"
            ) from error
        options, saved_at = self.options, time.monotonic()
        loader = make_loader(self.data, options.batch_size, options.workers, self.step * options.batch_size)
        progress = tqdm(loader, initial=self.step, total=options.steps, unit="step", dynamic_ncols=True)
        try:
            with open(self.folder / "log.jsonl", "a", buffering=1) as log:
                for content, style in progress:
                    entry = self.train_step(content, style)
                    log.write(json.dumps(entry) + "\n")
                    progress.set_postfix_str(describe(entry))
                    minutes = (time.monotonic() - saved_at) / 60
                    if self.step % options.checkpoint_steps == 0 or minutes >= options.checkpoint_minutes:
                        self.save()
                        saved_at = time.monotonic()
        except KeyboardInterrupt:
            progress.write("interrupted; saving")
        finally:
            progress.close()
        self.save()

    def train_step(self, content: Tensor, style: Tensor) -> dict[str, float | int | None]:
        """One optimiser step on a batch (B, 3, crop, crop). Returns the log entry."""
        started = time.perf_counter()
        if self.step == self.style_start:  # the moments of the pixel loss are far too small for the style losses
            self.optimizer = self._new_optimizer()
        autoencoding = self.step < self.style_start
        warm = self.step if autoencoding else self.step - self.style_start
        lr = self.recipe.lr * learning_rate_factor(warm, self.step, self.options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        content, style = (x.to(self.options.device, memory_format=torch.channels_last) for x in (content, style))
        losses = self._pixel_loss(content) if autoencoding else self._style_losses(content, style)
        total = losses.pop("total")
        if not total.isfinite():
            raise TrainingError(f"the loss is {total.item()} at step {self.step + 1}; lower --lr and --resume")
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip, error_if_nonfinite=True)
        self.optimizer.step()
        self.step += 1
        self._update_average()
        values = {name: round(loss.item(), 6) for name, loss in losses.items()}
        seconds = round(time.perf_counter() - started, 4)
        return {"step": self.step, "global": None, "local": None, **values, "lr": lr, "seconds": seconds}

    @torch.no_grad()
    def _update_average(self) -> None:
        """Exponential moving average of the weights; its decay rises, to forget the start."""
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        pairs = zip(self.average.parameters(), self.model.parameters(), strict=True)
        for average, parameter in pairs:
            average.lerp_(parameter, 1 - decay)

    def _autocast(self) -> torch.autocast:
        dtype = getattr(torch, self.options.dtype)
        device = torch.device(self.options.device).type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16)

    def _pixel_loss(self, content: Tensor) -> dict[str, Tensor]:
        with self._autocast():
            features = self.model.encoder(content)
            output = self.model.decoder(*self.model.transform(features, features, strength=0.0))
        loss = F.l1_loss(output.float(), content)
        return {"pixel": loss, "total": loss}

    def _style_losses(self, content: Tensor, style: Tensor) -> dict[str, Tensor]:
        recipe, batch = self.recipe, len(content)
        images = torch.cat([content, style])
        with self._autocast():
            with torch.no_grad():
                targets = self.perceptual(images)
            content_targets, style_targets = [x[:batch] for x in targets], [x[batch:] for x in targets]
            features = targets if self.shares_encoder else self.model.encoder(images)
            transformed = self.model.transform([x[:batch] for x in features], [x[batch:] for x in features])
            output = self.model.decoder(*transformed)
            output_features = self.perceptual(output)
            if recipe.identity_weight:
                own = [x[batch // 2 : batch // 2 + batch] for x in features]  # half photos, half paintings
                identity = self.model.decoder(*self.model.transform(own, own))
        losses = {"global": global_style_loss(output_features, style_targets)}
        total = recipe.global_weight * losses["global"]
        if recipe.local_weight:
            losses["local"] = local_feature_loss(
                output_features, content_targets, style_targets, keys=recipe.keys, backend=self.options.backend
            )
            total = total + recipe.local_weight * losses["local"]
        if recipe.content_weight:
            losses["content"] = content_loss(output_features, content_targets)
            total = total + recipe.content_weight * losses["content"]
        if recipe.identity_weight:
            losses["identity"] = F.l1_loss(identity.float(), images[batch // 2 : batch // 2 + batch])
            total = total + recipe.identity_weight * losses["identity"]
        return {**losses, "total": total}

    def save(self) -> None:
        """Write the averaged weights, the state to resume from, a sample grid and the loss plot."""
        save_model(self.average, self.folder / "weights.safetensors")
        modules = {"model": self.model, "average": self.average, "optimizer": self.optimizer}
        numbers = {"step": self.step, "style_start": self.style_start}
        state = numbers | {name: module.state_dict() for name, module in modules.items()}
        write_atomically(self.state_file, lambda path: torch.save(state, path))
        (self.folder / "options.json").write_text(json.dumps(asdict(self.options), indent=2) + "\n")
        write_image(self.sample_grid(), self.folder / "samples" / f"step_{self.step:06d}.png")
        plot_losses(self.folder / "log.jsonl", self.folder / "loss.png")

    def _restore(self) -> None:
        state = read_file(self.state_file, "state")
        if not {"model", "average", "optimizer", "step", "style_start"} <= state.keys():
            raise TrainingError(f"{self.state_file} is not the state of a training; get the run's own file back")
        for name in ("model", "average"):
            load_strictly(getattr(self, name), state[name], self.state_file)
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.style_start = state["step"], state["style_start"]

    @torch.no_grad()
    def sample_grid(self):
        """A contact sheet of the sample photos (rows) redrawn in the sample paintings (columns)."""
        photos, paintings = self.samples
        rows = []
        for photo in photos:
            content = to_tensor(photo).to(self.options.device)
            styles = (to_tensor(painting).to(self.options.device) for painting in paintings)
            rows.append([to_pil(self.average(content, style)) for style in styles])
        return contact_sheet(photos, paintings, rows)


def check_numbers(options: TrainOptions) -> None:
    """Raises TrainingError for a number out of range."""
    if options.crop < 32 or options.crop % 16:
        raise TrainingError(f"crop is {options.crop}; it must be a multiple of 16, at least 32")
    for name, lowest in (("batch_size", 1), ("steps", 1), ("checkpoint_steps", 1), ("workers", 0), ("seed", 0)):
        if getattr(options, name) < lowest:
            raise TrainingError(f"{name} is {getattr(options, name)}; it must be at least {lowest}")
    if not 0 <= options.recipe.ema_decay < 1:
        raise TrainingError(f"ema_decay is {options.recipe.ema_decay}; it must be at least 0 and below 1")


def same_tensors(first: nn.Module, second: nn.Module) -> bool:
    first, second = first.state_dict(), second.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def trim_log(log_file: Path, step: int) -> None:
    """Keep one whole entry for every step up to that one: an interrupted run may have logged more than it saved."""
    if log_file.exists():
        lines = [line for line in log_file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        entries = {json.loads(line)["step"]: line for line in lines}  # of a step logged twice, the later
        kept = "".join(line for number, line in entries.items() if number <= step)
        write_atomically(log_file, lambda path: Path(path).write_text(kept))


def learning_rate_factor(phase_step: int, step: int, steps: int, warmup: int = 200, tail: float = 0.4) -> float:
    """Linear warm-up at the start of each phase, then constant, then linear to zero over the last `tail` of all."""
    return min(1.0, (phase_step + 1) / warmup, (steps - step) / max(1.0, tail * steps))


def describe(entry: dict[str, float | int | None]) -> str:
    return " ".join(f"{name} {entry[name]:.3g}" for name in LOSSES if entry.get(name) is not None)


def plot_losses(log_file: Path, target: Path) -> None:
    """Plot every loss of a log.jsonl against the step, smoothed; needs matplotlib (the `train` extra)."""
    from matplotlib.figure import Figure

    entries = [json.loads(line) for line in log_file.read_text().splitlines()]
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for name in LOSSES:
        points = [(e["step"], e[name]) for e in entries if e.get(name) is not None]
        if points:
            steps, values = zip(*points, strict=True)
            axes.plot(steps, smooth(values), label=name)
    axes.set(xlabel="step", ylabel="loss (weight 1)", yscale="log", title="Running mean of 50 steps")
    if entries:
        axes.legend()
    axes.grid(alpha=0.3)
    write_atomically(target, lambda path: figure.savefig(path, format="png", dpi=110))


def smooth(values: tuple[float, ...], window: int = 50) -> list[float]:
    """Mean of the last `window` values at every place."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + (value if math.isfinite(value) else 0.0))
    return [(sums[i] - sums[max(0, i - window)]) / min(i, window) for i in range(1, len(sums))]


def main(options: TrainOptions) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TrainingError("training plots its losses with matplotlib; pip install 'a2k[train]'") from None
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had the process ignore Ctrl-C
        signal.signal(number, signal.default_int_handler)
    trainer = Trainer(options)
    trainer.run()
    print(f"{trainer.folder / 'weights.safetensors'}  step {trainer.step}")
