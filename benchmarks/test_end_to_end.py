"""The A2K layer and the whole network, as published and as `a2k stylize` runs them: `pytest benchmarks/`.

`make performance` measures larger pictures, and memory.
"""

import pytest
import torch
from conftest import DEVICE
from end_to_end import ARRANGEMENTS, LAYERS, layer_run, network, picture


@pytest.mark.parametrize("arrangement", ("published", "float32"))
@pytest.mark.parametrize("layer", [name for name in LAYERS if "1024" not in name])
def test_layer(layer, arrangement, benchmark, time_of):
    """One A2K module, style side included."""
    benchmark.group = f"A2K layer {layer}"
    with torch.inference_mode():
        time_of(layer_run(arrangement, *LAYERS[layer], DEVICE)[0])


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
