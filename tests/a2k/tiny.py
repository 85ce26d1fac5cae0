"""Small networks and pictures, and the command line in this process."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from a2k import StyA2K, StyA2KConfig
from a2k.cli import main
from a2k.decoder import StyledConv, StyledDecoder
from a2k.model import init_kaiming

TINY = StyA2KConfig(encoder="styled", channels=(8, 8, 16, 16, 16), num_heads=2, residual="adain")


def tiny_model(config: StyA2KConfig = TINY, backend: str | None = None, seed: int = 0) -> StyA2K:
    """A network whose outputs are mostly in [0, 1] and depend on all that they should."""
    torch.manual_seed(seed)
    model = StyA2K(config, backend=backend).eval()
    model.encoder.apply(init_kaiming)
    model.decoder.apply(init_kaiming)
    torch.nn.init.dirac_(model.encoder.input.weight)
    with torch.no_grad():
        for module in (model.a2k3, model.a2k4, model.a2k5):
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, StyledConv | StyledDecoder):
                torch.nn.init.normal_(module.grain.bias, std=0.2)
        model.decoder.conv1_1.weight.mul_(0.1)
        model.decoder.conv1_1.bias.fill_(0.5)
    return model


def noise(width: int = 40, height: int = 34, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Pixels (height, width, channels), smooth enough to survive a JPEG."""
    coarse = np.random.default_rng(seed).integers(0, 256, (-(-height // 8), -(-width // 8), channels), np.uint8)
    return coarse.repeat(8, 0).repeat(8, 1)[:height, :width]


def picture(path: Path, width: int = 40, height: int = 34, channels: int = 3, seed: int = 0, **options) -> Path:
    """Write a picture; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noise(width, height, channels, seed)).save(path, **options)
    return path


def pictures(folder: Path, count: int, **options) -> Path:
    """A folder of pictures 0.png, 1.png, ..."""
    for seed in range(count):
        picture(folder / f"{seed}.png", seed=seed, **options)
    return folder


def files(folder: Path) -> list[str]:
    """Every file below a folder, hidden ones too."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refusal(capsys, *arguments) -> str:
    """The one line on stderr of a command line that must fail with exit code 2."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 2, captured
    assert captured.err.startswith("a2k: error: "), captured.err
    assert captured.err.count("\n") == 1, captured.err
    return captured.err


def succeed(capsys, *arguments) -> str:
    """The stdout of a command line that must succeed without a word on stderr."""
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    assert not captured.err
    return captured.out
