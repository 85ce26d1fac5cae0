"""Training: the published losses on random crops, with checkpoints, samples and logs (see `a2k train --help`)."""

import copy
import json
import math
import signal
import sys
import time
import warnings
from functools import cached_property
from pathlib import Path

import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn
from tqdm import tqdm

from a2k.allocator import keep_freed_memory
from a2k.checkpoint import load_encoder, load_model, load_strictly, save_model
from a2k.data import PairDataset, hold_out, make_loader, readable_images
from a2k.decoder import StyledDecoder, style_vector
from a2k.encoder import PERCEPTUAL_DEPTHS
from a2k.images import find_images, to_pil, to_tensor, write_image
from a2k.model import CONFIGS, StyA2K
from a2k.processes import join_processes
from a2k.schedules import SCHEDULES
from a2k.sheet import contact_sheet
from a2k.train_log import TrainLog, describe, plot_losses, significant
from a2k.train_losses import TrainingLosses
from a2k.train_options import TrainingError, TrainOptions
from a2k.train_state import StateFiles, list_file, random_state, restore_random_state, write_json
from a2k.validation import VALIDATION_PAIRS, Validation

STANDARDIZE_PAIRS = 64  # pairs of crops from which a styled decoder learns what is usual
STANDARDIZE_STEPS = 25  # between its lessons while the encoder changes
MOST_DROPPED = 10  # gradients in a row that are not finite: then it is not for single pictures
SAMPLE_FILES = 4  # rows and columns of the sample grid
SAMPLE_SIZE = 256  # pixels, long side


class Trainer:
    """One training run in one folder; `a2k train --help` says what it holds.

    Under `torchrun` every process has a Trainer of its own; the first one writes. Set
    `stop_requested` to have the run save and leave after the present step.

    Raises TrainingError, ImageError, WeightsError or another ValueError when an option does not fit.
    """

    def __init__(self, options: TrainOptions) -> None:
        torch.manual_seed(options.seed)
        self.options, self.recipe = options, options.recipe
        self.folder = Path(options.output)
        self.states = StateFiles(self.folder, options.keep)
        self.lock = FileLock(self.folder / ".lock")  # two runs would mix their logs and states
        if self.states.all() and not options.resume:
            raise TrainingError(f"{self.folder} holds a run already; go on with --resume or give another -o")
        if options.resume and not self.states.all():
            raise TrainingError(f"{self.folder} holds no run to resume; leave out --resume")
        self.processes = join_processes(options.device)
        self.device = self.processes.device
        held = self._open_data()
        self.perceptual, kind = load_encoder(options.perceptual)
        self.model = self._build_model(kind)
        for module in (self.perceptual, self.model):
            module.to(self.device, memory_format=torch.channels_last)
        self.average = copy.deepcopy(self.model).eval().requires_grad_(False)
        state, source = self._load_state() if options.resume else (None, None)
        self.validation = Validation(*held, self.perceptual, options.crop[0], options.batch_size, self.device)
        self.samples = [[sample(image) for image in images[:SAMPLE_FILES]] for images in held]
        self.style_start = 0 if options.weights else self.recipe.autoencode_steps  # step of the first style loss
        self.step, self.best = 0, float("inf")
        self.dropped = 0  # gradients in a row that were not finite
        self.stop_requested = self.stopping = False  # here; agreed on by all processes
        self.losses = TrainingLosses(
            self.model,
            self.perceptual,
            self.recipe,
            dtype=getattr(torch, options.dtype),
            backend=options.backend,
            checkpoint_activations=options.checkpoint_activations,
        )
        self.losses.to(self.device)
        if state:
            self._restore(state, source)
        self._begin_phase()
        if state and self.step != self.style_start:  # there a new phase begins
            self.optimizer.load_state_dict(state["optimizer"])

    def _open_data(self) -> list[list[Image.Image]]:
        """Set up the crops; returns some photos and paintings that are held back."""
        options, training, held = self.options, [], []
        self.file_names = {}
        for kind, folder in (("content", options.content_dir), ("style", options.style_dir)):
            files = find_images([folder])
            listed = self._listed(kind, files)
            self.file_names[kind] = [path.name for path in listed]
            kept, held_files = hold_out(listed, options.holdout)
            training.append(kept)
            shown = held_files or kept
            if not set(shown) & set(files):
                raise TrainingError(
                    f"--{kind}-dir {folder} has none of the {len(shown)} validation pictures that "
                    f"{list_file(self.folder, kind)} lists; resume with the folder that the run began with"
                )
            held.append(readable_images(shown, VALIDATION_PAIRS))
        step_size = options.batch_size * options.accumulate * self.processes.count
        length = options.steps * step_size
        self.data = PairDataset(*training, options.crop, step_size, length, options.seed, options.scale)
        self.data[0]  # raises ImageError here and not in another process, where its message would drown
        return held

    def _listed(self, kind: str, files: list[Path]) -> list[Path]:
        """The pictures of one kind that the run draws from: where it goes on, those of its beginning."""
        names = list_file(self.folder, kind)
        if not (self.options.resume and names.exists()):  # of a run that died before its first state
            return files
        return [files[0].with_name(name) for name in json.loads(names.read_text())]

    def _build_model(self, perceptual_kind: str) -> StyA2K:
        options = self.options
        if options.resume:  # the state has all weights
            return StyA2K(CONFIGS[options.config], backend=options.backend)
        if options.weights:
            model = load_model(options.weights, backend=options.backend)
            if model.config != CONFIGS[options.config]:
                raise TrainingError(f"--weights {options.weights} is not a {options.config} network; give its --config")
            return model.train()
        model = StyA2K(CONFIGS[options.config], backend=options.backend)
        if options.config in PERCEPTUAL_DEPTHS:
            if perceptual_kind != options.config:
                raise TrainingError(
                    f"--config {options.config} needs a {options.config} file as --perceptual, "
                    f"but {options.perceptual} is {perceptual_kind}"
                )
            model.encoder.load_state_dict(self.perceptual.state_dict())
        return model

    def _begin_phase(self) -> None:
        """Set up the copying or, once it is over, the styles: what learns, and an optimiser without memories.

        Moments of the copying are far too small for the style losses.
        """
        copying = self.losses.autoencoding = self.step < self.style_start
        if not copying and self.losses.hints:
            self.losses.hints = nn.ModuleList()
        self.parameters = [p for p in self.losses.parameters() if p.requires_grad]
        self.optimizer = torch.optim.Adam(self.parameters, lr=self.recipe.lr, betas=(0.9, 0.999))
        self.parallel_losses = self.processes.parallel(self.losses, some_unused=copying)

    def run(self) -> None:
        """Train to the last step, or until told to stop; either way the run can be resumed."""
        options, writes = self.options, self.processes.rank == 0
        log = self._open_log() if writes else None
        loader = make_loader(
            self.data,
            options.batch_size,
            options.workers,
            first_batch=self.step,
            accumulate=options.accumulate,
            rank=self.processes.rank,
            ranks=self.processes.count,
            pin_memory=self.device.type == "cuda",
        )
        bar = {"initial": self.step, "total": options.steps, "unit": "step", "dynamic_ncols": True}
        saved_at, saved_step = time.monotonic(), None
        try:
            with tqdm(loader, disable=not writes, **bar) as progress:
                for content, style in progress:
                    entry = self.train_step(content, style)
                    if writes:
                        if self.step % options.validate_steps == 0:
                            entry |= self.validate()
                        log.write(entry)
                        progress.set_postfix_str(describe(entry))
                        minutes = (time.monotonic() - saved_at) / 60
                        if self.step % options.checkpoint_steps == 0 or minutes >= options.checkpoint_minutes:
                            self.save()
                            saved_at, saved_step = time.monotonic(), self.step
                    if self.stopping:
                        break
            if writes and self.stopping:
                print("interrupted; saving", file=sys.stderr)
            if writes and saved_step != self.step:
                self.save()
        finally:
            if writes:
                log.close()
                self.lock.release()

    def _open_log(self) -> TrainLog:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self.lock.acquire(timeout=0)
            self.states.delete_halves()
            for kind, names in self.file_names.items():
                write_json(names, list_file(self.folder, kind))
            write_json(self.options.flat(), self.folder / "options.json")
            return TrainLog(self.folder, self.step)
        except Timeout:
            raise TrainingError(f"another process trains in {self.folder}; stop it, or give another -o") from None
        except OSError as error:
            raise TrainingError(
                f"cannot write to {self.folder}: {error.strerror or error}; choose another -o"
            ) from error

    def train_step(self, content: Tensor, style: Tensor) -> dict[str, float | int | None]:
        """One optimiser step on this process's pairs (accumulate * B, 3, crop, crop). Returns the log entry."""
        started = time.perf_counter()
        if self.step == self.style_start and not self.options.weights:
            self._begin_style()
        elif self.losses.autoencoding and self.step % STANDARDIZE_STEPS == 0:
            self._standardize()
        lr = self._set_learning_rate()
        losses = self._gradients(content, style)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.recipe.clip)
        numbers = torch.stack([*losses.values(), norm, norm.new_tensor(self.stop_requested)])
        *values, norm, stopping = self.processes.mean(numbers).tolist()  # the step's only wait for a GPU
        entry = {name: significant(value) for name, value in zip(losses, values, strict=True)}
        self._check(entry.pop("total"), norm)
        self.optimizer.step()
        self.step += 1
        self.stopping = stopping > 0
        self._update_average()
        seconds = round(time.perf_counter() - started, 4)
        return {"step": self.step, "global": None, "local": None, **entry, "lr": lr, "seconds": seconds}

    def _check(self, loss: float, norm: float) -> None:
        """Raises TrainingError for a loss or for several gradients in a row that are not finite.

        A single gradient that is not, as of a picture of one colour, whose maps have no deviation to divide by, is
        dropped: a run that was resumed would meet that picture again.
        """
        self.dropped = 0 if math.isfinite(norm) else self.dropped + 1
        remedy = "lower --lr and --resume" if self.states.all() else "lower --lr"
        if not math.isfinite(loss):
            raise TrainingError(f"the loss is {loss} at step {self.step + 1}; {remedy}")
        if self.dropped == MOST_DROPPED:
            raise TrainingError(f"the gradient's norm is {norm} up to step {self.step + 1}; {remedy}")
        if self.dropped:
            warnings.warn(f"the gradient's norm is {norm} at step {self.step + 1}; it is dropped", stacklevel=2)
            self.optimizer.zero_grad(set_to_none=True)

    def _begin_style(self) -> None:
        self._begin_phase()
        self._standardize()
        self.average.load_state_dict(self.model.state_dict())
        self.best = float("inf")  # copies do not count

    @torch.no_grad()
    def _standardize(self) -> None:
        """Tell a styled decoder what statistics are usual; the same ones in every process."""
        if isinstance(self.model.decoder, StyledDecoder):
            crops = (x.to(self.parameters[0], memory_format=torch.channels_last) for x in self.usual_crops)
            vectors = torch.cat([style_vector(self.model.encoder(pair)) for pair in crops])
            self.model.decoder.standardize(vectors)

    @cached_property
    def usual_crops(self) -> list[Tensor]:
        """The first pairs of the data: each (2, 3, crop, crop)."""
        return [torch.stack(self.data[number]) for number in range(min(STANDARDIZE_PAIRS, len(self.data)))]

    def _set_learning_rate(self) -> float:
        phase_step = self.step if self.losses.autoencoding else self.step - self.style_start
        factor = SCHEDULES[self.recipe.schedule](phase_step, self.step, self.options.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = factor * self.recipe.lr
        return factor * self.recipe.lr

    def _gradients(self, content: Tensor, style: Tensor) -> dict[str, Tensor]:
        """Backward passes over the batches of one step; returns the mean losses of this process."""
        self.optimizer.zero_grad(set_to_none=True)
        parts, sums = self.options.accumulate, {}
        first, step_pairs = self.processes.rank * len(content), self.processes.count * len(content)
        for number, pair in enumerate(zip(content.chunk(parts), style.chunk(parts), strict=True), 1):
            if self.processes.count > 1:
                self.parallel_losses.require_backward_grad_sync = number == parts
            pair = (x.to(self.device, memory_format=torch.channels_last, non_blocking=True) for x in pair)
            losses = self.parallel_losses(*pair, first, step_pairs)
            first += len(content) // parts
            (losses["total"] / parts).backward()
            for name, loss in losses.items():
                sums[name] = sums.get(name, 0) + loss.detach() / parts
        return sums

    @torch.no_grad()
    def _update_average(self) -> None:
        """Exponential moving average of the weights; its decay rises, to forget the start. Buffers are the model's."""
        decay = min(self.recipe.ema_decay, (1 + self.step) / (10 + self.step))
        update = get_ema_multi_avg_fn(decay)
        update(list(self.average.parameters()), list(self.model.parameters()), self.step)
        for own, buffer in zip(self.average.buffers(), self.model.buffers(), strict=True):
            own.copy_(buffer)

    def validate(self) -> dict[str, float]:
        """Losses of the averaged network on the validation pairs; the best network so far is written."""
        losses = self.validation.measure(self.average)
        if sum(losses.values()) < self.best:
            self.best = sum(losses.values())
            save_model(self.average, self.folder / "best.safetensors")
        return {name: significant(loss) for name, loss in losses.items()}

    def save(self) -> None:
        """Write the state to resume from, the averaged weights, a sample grid and the loss plot."""
        state = {name: getattr(self, name).state_dict() for name in ("model", "average", "optimizer")}
        state["hints"] = self.losses.hints.state_dict()
        state |= {name: getattr(self, name) for name in ("step", "style_start", "best")}
        state["best_scale"] = self.validation.scale
        self.states.save(self.step, state | {"random": random_state(self.device)})
        save_model(self.average, self.folder / "weights.safetensors")
        write_image(self.sample_grid(), self.folder / "samples" / f"step_{self.step:06d}.png")
        plot_losses(self.folder / "log.jsonl", self.folder / "loss.png")

    def _load_state(self) -> tuple[dict, Path]:
        """The last state and its file. Fills the networks, before the losses look whether they share an encoder."""
        keys = {"model", "average", "hints", "optimizer", "step", "style_start", "best", "random"}
        state, source = self.states.load(keys)
        if state["step"] > self.options.steps:
            raise TrainingError(f"steps is {self.options.steps}, but {source} is of step {state['step']}; give more")
        for name in ("model", "average"):
            load_strictly(getattr(self, name), state[name], source)
        return state, source

    def _restore(self, state: dict, source: Path) -> None:
        self.step, self.style_start = state["step"], state["style_start"]
        if state.get("best_scale") == self.validation.scale:  # else other pictures or another network measured it
            self.best = state["best"]
        if self.step < self.style_start:
            load_strictly(self.losses.hints, state["hints"], source)
        restore_random_state(state["random"], self.device)

    @torch.no_grad()
    def sample_grid(self) -> Image.Image:
        """A contact sheet of the sample photos (rows) redrawn in the sample paintings (columns)."""
        photos, paintings = self.samples
        rows = []
        for photo in photos:
            content = to_tensor(photo).to(self.device)
            styles = (to_tensor(painting).to(self.device) for painting in paintings)
            rows.append([to_pil(self.average(content, style)) for style in styles])
        return contact_sheet(photos, paintings, rows)


def sample(image: Image.Image) -> Image.Image:
    """A copy whose long side is at most SAMPLE_SIZE."""
    image = image.copy()
    image.thumbnail((SAMPLE_SIZE, SAMPLE_SIZE))
    return image


def stop_on_signals(trainer: Trainer) -> None:
    """Ctrl-C and SIGTERM have the run save and leave; a second one ends it at once."""

    def stop(_number, _frame) -> None:
        if trainer.stop_requested:
            raise KeyboardInterrupt
        trainer.stop_requested = True

    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell had the process ignore Ctrl-C
        signal.signal(number, stop)


def main(options: TrainOptions) -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise TrainingError("training plots its losses with matplotlib; pip install 'a2k[train]'") from None
    keep_freed_memory()
    trainer = Trainer(options)
    stop_on_signals(trainer)
    trainer.run()
    trainer.processes.leave()
    if trainer.processes.rank == 0:
        print(f"{trainer.folder / 'weights.safetensors'}  step {trainer.step}")
