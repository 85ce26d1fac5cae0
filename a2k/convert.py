"""Official StyA2K and torchvision weights to ours. Files are read with `weights_only=True`: nothing is executed."""

import os
import pickle
import warnings
from pathlib import Path

import torch
from torch import Tensor

from a2k.checkpoint import VGG_CHANNELS, WeightsError, load_strictly, read_tensors
from a2k.encoder import Encoder
from a2k.model import StyA2K, StyA2KConfig

StateDict = dict[str, Tensor]
Weights = StateDict | str | os.PathLike

# Places of our layers in the official Sequential modules, and of torchvision's `features`.
OFFICIAL_VGG19 = {"input": 0, "conv1_1": 2, "conv1_2": 5, "conv2_1": 9, "conv2_2": 12, "conv3_1": 16,
                  "conv3_2": 19, "conv3_3": 22, "conv3_4": 25, "conv4_1": 29, "conv4_2": 32, "conv4_3": 35,
                  "conv4_4": 38, "conv5_1": 42}  # fmt: skip
TORCHVISION = {
    "vgg19": {"conv1_1": 0, "conv1_2": 2, "conv2_1": 5, "conv2_2": 7, "conv3_1": 10, "conv3_2": 12, "conv3_3": 14,
              "conv3_4": 16, "conv4_1": 19, "conv4_2": 21, "conv4_3": 23, "conv4_4": 25, "conv5_1": 28},
    "vgg16": {"conv1_1": 0, "conv1_2": 2, "conv2_1": 5, "conv2_2": 7, "conv3_1": 10, "conv3_2": 12, "conv3_3": 14,
              "conv4_1": 17, "conv4_2": 19, "conv4_3": 21, "conv5_1": 24},
}  # fmt: skip
OFFICIAL_DECODER = {"conv4_1": "decoder_layer_1.1", "conv3_4": "decoder_layer_2.1", "conv3_3": "decoder_layer_2.4",
                    "conv3_2": "decoder_layer_2.7", "conv3_1": "decoder_layer_2.10", "conv2_2": "decoder_layer_2.14",
                    "conv2_1": "decoder_layer_2.17", "conv1_2": "decoder_layer_2.21",
                    "conv1_1": "decoder_layer_2.24"}  # fmt: skip
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_state_dict(weights: Weights, name: str) -> StateDict:
    """A state dict from a dict or a .pth/.safetensors file, without any `module.` prefix. Raises WeightsError."""
    if not isinstance(weights, dict):
        weights = read_file(Path(weights), name)
    for key in ("state_dict", "model"):  # training scripts often wrap the state dict
        if isinstance(weights.get(key), dict):
            weights = weights[key]
    if not weights or not all(isinstance(key, str) and isinstance(x, Tensor) for key, x in weights.items()):
        raise WeightsError(f"{name} holds no state dict of tensors; give the official file")
    return {key.removeprefix("module."): x for key, x in weights.items()}


def read_file(path: Path, name: str) -> dict:
    """The dict in a .pth/.safetensors file, on the CPU; nothing in it is executed. Raises WeightsError."""
    if path.suffix == ".safetensors":
        return read_tensors(path)[0]
    if not path.is_file():
        raise WeightsError(f"{name} file {path} does not exist; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unusual pickles
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # its message advises to read the file unsafely
        raise WeightsError(f"{name} file {path} holds other things than weights; get the official one") from None
    except Exception as error:  # a damaged file gives errors of many kinds
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
        raise WeightsError(f"{name} file {path} is not a whole weights file ({reason}); get it again") from None
    if not isinstance(weights, dict):
        raise WeightsError(f"{name} file {path} holds a {type(weights).__name__}, not a state dict")
    return weights


def select(state_dict: StateDict, prefixes: dict[str, str], name: str) -> StateDict:
    """Weights and biases renamed: {our prefix: their prefix}. Raises WeightsError where one is missing."""
    renamed = {}
    for ours, theirs in prefixes.items():
        for part in ("weight", "bias"):
            if f"{theirs}.{part}" not in state_dict:
                raise WeightsError(f"{name} lacks {theirs}.{part}; it is not the official file, or another network's")
            renamed[f"{ours}.{part}"] = state_dict[f"{theirs}.{part}"]
    return renamed


def a2k_layer(state_dict: StateDict) -> StateDict:
    """An official A2K module's state dict (with or without `module.`) as one that `a2k.A2K` loads strictly.

    Raises WeightsError if a tensor is missing.
    """
    state_dict = read_state_dict(state_dict, "a2k")
    names = ("q", "k", "v", "q2", "k2", "v2", "fusion1", "fusion2")
    layer = select(state_dict, {name: name for name in names}, "a2k")
    for name in ("sim_alpha", "sim_beta"):
        if name not in state_dict:
            raise WeightsError(f"a2k lacks {name}; it is not the official file, or another network's")
        layer[name] = state_dict[name].reshape(-1)
    return layer


def vgg_encoder(weights: Weights) -> tuple[Encoder, str]:
    """(frozen encoder, "vgg19" or "vgg16") from `vgg_normalised.pth` or torchvision's VGG file (`features.*`).

    torchvision's networks expect images normalised by ImageNet's mean and standard deviation: that becomes the
    encoder's 1x1 `input` layer. Raises WeightsError.
    """
    state_dict = read_state_dict(weights, "vgg")
    if any(key.startswith("features.") for key in state_dict):
        kind = "vgg19" if "features.34.weight" in state_dict else "vgg16"
        places = {ours: f"features.{place}" for ours, place in TORCHVISION[kind].items()}
        tensors = select(state_dict, places, "vgg") | _imagenet_input()
    else:
        kind = "vgg19"
        tensors = select(state_dict, {ours: str(place) for ours, place in OFFICIAL_VGG19.items()}, "vgg")
    encoder = Encoder(kind, VGG_CHANNELS)
    load_strictly(encoder, tensors, "vgg")
    return encoder.eval().requires_grad_(False), kind


def _imagenet_input() -> StateDict:
    mean, std = torch.tensor(IMAGENET_MEAN), torch.tensor(IMAGENET_STD)
    return {"input.weight": torch.diag(1 / std)[:, :, None, None], "input.bias": -mean / std}


def stya2k(*, vgg: Weights, a2k: Weights, transform: Weights, decoder: Weights) -> StyA2K:
    """The published network from the four official state dicts or files, in eval mode. Raises WeightsError."""
    encoder, kind = vgg_encoder(vgg)
    transform, decoder = read_state_dict(transform, "transform"), read_state_dict(decoder, "decoder")
    if kind != "vgg19":
        raise WeightsError(f"vgg is a {kind}; the published network has a VGG19")
    model = StyA2K(StyA2KConfig())
    model.encoder.load_state_dict(encoder.state_dict())
    load_strictly(model.a2k3, a2k_layer(read_state_dict(a2k, "a2k")), "a2k")
    for module, prefix in ((model.a2k4, "attn_adain_4_1."), (model.a2k5, "attn_adain_5_1.")):
        part = {key.removeprefix(prefix): x for key, x in transform.items() if key.startswith(prefix)}
        if not part:
            raise WeightsError(f"transform lacks {prefix}*; it is not the official file, or another network's")
        load_strictly(module, a2k_layer(part), "transform")
    tensors = select(transform, {"merge": "merge_conv"}, "transform") | select(decoder, OFFICIAL_DECODER, "decoder")
    load_strictly(model.decoder, tensors, "decoder")
    return model.eval()
