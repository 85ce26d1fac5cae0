"""`a2k train` with tiny networks, for tests that need a process of its own: python train_tiny.py train ..."""

import sys
from pathlib import Path

import a2k.checkpoint
import a2k.train
import a2k.train_log
from a2k.cli import main
from a2k.model import CONFIGS

sys.path.append(str(Path(__file__).parent))
from tiny import TINY


def use_tiny_networks() -> None:
    """And no plots, whose libraries take longer to load than the training takes."""
    CONFIGS["styled"] = TINY
    a2k.checkpoint.VGG_CHANNELS = TINY.channels
    a2k.train.plot_losses = lambda log, target: target.touch()
    a2k.train_log.open_tensorboard = lambda folder, step: None


if __name__ == "__main__":
    use_tiny_networks()
    sys.exit(main())
