"""Weights files: one safetensors file that holds the network and, in its metadata, how it is built.

Nothing here unpickles: safetensors holds plain tensors only.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from a2k.encoder import PERCEPTUAL_DEPTHS, Encoder
from a2k.files import replace_file
from a2k.model import StyA2K, StyA2KConfig

WEIGHTS_DIR = Path(__file__).parent / "weights"
VGG_CHANNELS = (64, 128, 256, 512, 512)


class WeightsError(ValueError):
    """A weights file is missing, damaged or of another kind; the message is one line."""


def write_atomically(path: str | os.PathLike, write: Callable[[str], object]) -> None:
    """`a2k.files.replace_file`, with errors of one line.

    Raises OSError.
    """
    try:
        replace_file(path, write)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise OSError(f"cannot write {path}: {reason}; choose another path or make room") from error


def save_tensors(tensors: dict[str, Tensor], path: str | os.PathLike, metadata: dict[str, str]) -> None:
    """Write a safetensors file atomically.

    With one entry of metadata equal tensors make equal files; of several the order would be random.
    """
    tensors = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))


def read_tensors(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a safetensors file. Raises WeightsError."""
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"weights file {path} does not exist; give a .safetensors file")
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"weights file {path} is not a whole safetensors file ({error}); get it again") from None


def load_strictly(module: torch.nn.Module, tensors: dict[str, Tensor], source: object) -> None:
    """module.load_state_dict(strict), with one line that says what does not fit."""
    expected = module.state_dict()
    missing, unexpected = expected.keys() - tensors.keys(), tensors.keys() - expected.keys()
    wrong = [n for n in expected.keys() & tensors.keys() if expected[n].shape != tensors[n].shape]
    for what, names in (("lacks", missing), ("has no place for", unexpected), ("has another shape of", wrong)):
        if names:
            first = min(names)
            raise WeightsError(
                f"{source} does not fit a {type(module).__name__}: it {what} {first!r}"
                + (f" and {len(names) - 1} more tensors" if len(names) > 1 else "")
            )
    bad = next((name for name, x in tensors.items() if not x.isfinite().all()), None)
    if bad is not None:
        raise WeightsError(f"{source} holds NaN or infinity in {bad!r}")
    module.load_state_dict({name: x.float() for name, x in tensors.items()})


def save_model(model: StyA2K, path: str | os.PathLike, dtype: torch.dtype | None = None) -> None:
    """Write a StyA2K network and its config; dtype, if given, is that of the stored weights."""
    tensors = {name: x.to(dtype or x.dtype) for name, x in model.state_dict().items()}
    save_tensors(tensors, path, {"config": json.dumps(asdict(model.config))})


def load_model(path: str | os.PathLike, backend: str | None = None) -> StyA2K:
    """Read what `save_model` wrote: a float32 StyA2K in eval mode. Raises WeightsError."""
    tensors, metadata = read_tensors(path)
    try:
        config = StyA2KConfig(**json.loads(metadata["config"]))
    except KeyError:
        raise WeightsError(f"{path} is not an A2K checkpoint: its metadata has no config") from None
    except (TypeError, ValueError) as error:
        raise WeightsError(f"{path} has a config this version does not know: {error}") from None
    model = StyA2K(config, backend=backend)
    load_strictly(model, tensors, path)
    return model.eval()


def save_encoder(encoder: Encoder, kind: str, path: str | os.PathLike) -> None:
    """Write a VGG encoder alone, for training."""
    save_tensors(encoder.state_dict(), path, {"arch": kind})


def load_encoder(path: str | os.PathLike) -> tuple[Encoder, str]:
    """Read a VGG encoder file: (frozen Encoder in eval mode, "vgg19" or "vgg16"). Raises WeightsError.

    In place of `input.weight` and `input.bias` a file may have `input_mean`, which is subtracted from the image;
    convolutions beyond conv5_1 are ignored.
    """
    tensors, metadata = read_tensors(path)
    kind = metadata.get("arch")
    if kind not in PERCEPTUAL_DEPTHS:
        raise WeightsError(f"{path} is not a VGG encoder file: its metadata has no arch; make one by `a2k convert`")
    if "input_mean" in tensors:
        tensors["input.weight"] = torch.eye(3)[:, :, None, None]
        tensors["input.bias"] = -tensors.pop("input_mean")
    encoder = Encoder(kind, VGG_CHANNELS)
    beyond = {name for name in tensors if name.startswith("conv5_") and not name.startswith("conv5_1.")}
    load_strictly(encoder, {n: x for n, x in tensors.items() if n not in beyond}, path)
    return encoder.eval().requires_grad_(False), kind


def find_weights(weights: str | os.PathLike) -> Path:
    """The file of a bundled model's name ("a2k-lite") or of a path. Raises WeightsError."""
    if str(weights) in bundled_names():
        return WEIGHTS_DIR / f"{weights}.safetensors"
    if Path(weights).is_file():
        return Path(weights)
    names = ", ".join(bundled_names()) or "none"
    raise WeightsError(f"weights {str(weights)!r} are neither a file nor a bundled model ({names})")


def bundled_names() -> list[str]:
    return sorted(path.stem for path in WEIGHTS_DIR.glob("*.safetensors"))
