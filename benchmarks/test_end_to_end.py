"""The A2K layer and the whole network, as published and as `a2k stylize` runs them: `pytest benchmarks/`.

`make performance` measures larger pictures, and memory.
"""

import published
import pytest
import torch
from conftest import DEVICE
from end_to_end import ARRANGEMENTS, network, picture

from a2k import A2K
from a2k.inference import FusedA2K, Statistics

LAYERS = {"relu3_256px": (256, 64), "relu3_512px": (256, 128), "relu4_512px": (512, 64)}


def layer_run(arrangement: str, channels: int, side: int):
    torch.manual_seed(0)
    module = A2K(channels).to(DEVICE).requires_grad_(False)
    content, style = torch.randn(2, 1, channels, side, side, device=DEVICE).relu()
    if arrangement == "published":
        return lambda: published.a2k_layer(module, content, style)
    content, style = (x.contiguous(memory_format=torch.channels_last) for x in (content, style))
    fused = FusedA2K(module)

    def run() -> torch.Tensor:
        statistics, out = (Statistics(), Statistics()), content.clone(memory_format=torch.channels_last)
        for x, of_x in zip((content, style), statistics, strict=True):
            of_x.add(x)
        for _ in fused.redraw(out, statistics[0], fused.style_keys(style, statistics[1]), 1.0):
            pass
        return out

    return run


@pytest.mark.parametrize("arrangement", ("published", "float32"))
@pytest.mark.parametrize("layer", LAYERS)
def test_layer(layer, arrangement, benchmark, time_of):
    """One A2K module, style side included."""
    benchmark.group = f"A2K layer {layer}"
    with torch.inference_mode():
        time_of(layer_run(arrangement, *LAYERS[layer]))


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@pytest.mark.parametrize("size", (256, 512))
def test_network(size, arrangement, benchmark, time_of):
    """A picture and a style of that size."""
    benchmark.group = f"network {size}px"
    (run, _), content = network(arrangement, DEVICE), picture(size, DEVICE)
    if arrangement == "published":
        content = content.float().div(255).contiguous()
    with torch.inference_mode():
        time_of(lambda: run(content, content))
