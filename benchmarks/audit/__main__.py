"""python -m benchmarks.audit: compile, read and model the GPU kernels; nothing is run and no GPU is needed."""

import argparse
import os
import sys
from pathlib import Path

BUILD = Path(__file__).parents[2] / "build" / "audit"
# Before Triton is imported, here and in the workers: kernels for its interpreter cannot be compiled, and the default
# of the fusion of products and sums differs between its versions.
os.environ.pop("TRITON_INTERPRET", None)
os.environ["TRITON_DEFAULT_FP_FUSION"] = "1"
os.environ["TRITON_CACHE_DIR"] = str(BUILD / "triton")

from tqdm import tqdm  # noqa: E402

from benchmarks.audit import compiler, shapes  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.audit", description=__doc__)
    for name, choices in (
        ("target", shapes.TARGETS),
        ("dtype", shapes.DTYPES),
        ("layer", tuple(layer.name for layer in shapes.LAYERS)),
        ("picture", shapes.PICTURES),
    ):
        kind = int if name == "picture" else str
        parser.add_argument(f"--{name}", type=kind, choices=choices, nargs="+", default=choices, metavar="X",
                            help=f"only these of {', '.join(map(str, choices))}")  # fmt: skip
    return parser.parse_args()


def main() -> None:
    options = parse_arguments()
    layers = [layer.only(options.picture) for layer in shapes.LAYERS if layer.name in options.layer]
    tasks = [compiler.Task(t, d, x) for t in options.target for d in options.dtype for x in layers if x.pictures]
    progress = tqdm(compiler.run_tasks(tasks), total=len(tasks), desc="compiling", unit="layer", smoothing=0)
    found = [entry for entries in progress for entry in entries]
    seen = set()
    for entry in sorted(found, key=lambda x: (x["target"], x["dtype"], x["layer"], x["picture"])):
        for launch in entry["launches"]:
            code = {name: x for name, x in launch["code"].items() if name != "regions"}
            line = (entry["target"], entry["dtype"], entry["layer"], launch["kernel"], str(code))
            if line not in seen:
                seen.add(line)
                print(*line)


if __name__ == "__main__":
    sys.exit(main())
