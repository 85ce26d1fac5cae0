import os
import random
from pathlib import Path

import pytest
import torch
from tiny import TINY, picture, tiny_model

from a2k.checkpoint import VGG_CHANNELS, save_encoder, save_model
from a2k.encoder import Encoder
from a2k.model import init_kaiming

random.seed(os.environ.get("PYTEST_XDIST_TESTRUNUID"))  # numbers drawn while tests are collected: workers must agree


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory) -> Path:
    """Weights of a tiny network."""
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    save_model(tiny_model(), path)
    return path


@pytest.fixture(scope="session")
def vgg16() -> Encoder:
    """A VGG16 with random weights."""
    torch.manual_seed(1)
    encoder = Encoder("vgg16", VGG_CHANNELS).apply(init_kaiming)
    torch.nn.init.dirac_(encoder.input.weight)
    return encoder.eval().requires_grad_(False)


@pytest.fixture(scope="session")
def vgg16_file(vgg16, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("vgg16") / "vgg16.safetensors"
    save_encoder(vgg16, "vgg16", path)
    return path


@pytest.fixture(scope="session")
def tiny_vgg() -> Encoder:
    """A network of a VGG16's form that takes no time."""
    torch.manual_seed(2)
    encoder = Encoder("vgg16", TINY.channels).apply(init_kaiming)
    torch.nn.init.dirac_(encoder.input.weight)
    return encoder.eval().requires_grad_(False)


@pytest.fixture
def photo(tmp_path) -> Path:
    return picture(tmp_path / "in" / "photo.png", 40, 34, seed=1)


@pytest.fixture
def painting(tmp_path) -> Path:
    return picture(tmp_path / "in" / "painting.png", 37, 50, seed=2)
