"""The losses of a few steps by the reference and by the Triton backend, in Triton's interpreter, as JSON:
TRITON_INTERPRET=1 python train_interpreted.py OPTIONS.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from train_tiny import use_tiny_networks

from a2k.train import Trainer
from a2k.train_options import TrainOptions

sys.path.append(str(Path(__file__).parents[1] / "a2k_kernels"))
import interpreter_fixes


def losses(options: TrainOptions, backend: str) -> list[dict]:
    options = replace(options, backend=backend, output=f"{options.output}_{backend}")
    trainer = Trainer(options)
    trainer.save = lambda: None  # its samples take longer than the steps
    trainer.run()
    return [json.loads(line) for line in (Path(options.output) / "log.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    use_tiny_networks()
    options = torch.load(sys.argv[1], weights_only=False)
    with pytest.MonkeyPatch.context() as patch:
        interpreter_fixes.install(patch)
        print(json.dumps({backend: losses(options, backend) for backend in ("reference", "triton")}))
