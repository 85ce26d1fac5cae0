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

from benchmarks.audit import compiler, limits, page, shapes  # noqa: E402

PAGE = Path(__file__).parents[2] / "docs" / "gpu-audit.md"
CHOICES = {
    "target": shapes.TARGETS,
    "dtype": shapes.DTYPES,
    "layer": tuple(layer.name for layer in shapes.LAYERS),
    "picture": shapes.PICTURES,
}


QUICK = {
    "target": ("sm_80", "sm_90", "gfx942"),
    "dtype": ("bfloat16",),
    "layer": ("vgg relu3",),
    "picture": (1024,),
}


def parse_arguments() -> argparse.Namespace:
    """Every option narrows the audit."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.audit",
        description="Compile, read and model the GPU kernels without a GPU, and compare them with their limits. Writes "
        "docs/gpu-audit.md, or prints the page where an option narrows the audit. Fails where a limit is broken.",
    )
    for name, choices in CHOICES.items():
        kind = int if name == "picture" else str
        parser.add_argument(f"--{name}", type=kind, choices=choices, nargs="+", default=choices, metavar="X",
                            help=f"only these of {', '.join(map(str, choices))}")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="a part that takes less than two minutes")
    options = parser.parse_args()
    if options.quick:
        vars(options).update(QUICK)
    return options


def in_order(entry: dict) -> tuple[int, ...]:
    return tuple(choices.index(entry[name]) for name, choices in CHOICES.items())


def main() -> int:
    options = parse_arguments()
    layers = [layer.only(options.picture) for layer in shapes.LAYERS if layer.name in options.layer]
    tasks = [compiler.Task(t, d, x) for t in options.target for d in options.dtype for x in layers if x.pictures]
    progress = tqdm(compiler.run_tasks(tasks), total=len(tasks), desc="compiling", unit="layer", smoothing=0)
    entries = sorted((entry for found in progress for entry in found), key=in_order)
    compiler.save(entries)

    compiled = limits.kernels(entries)
    modelled, problems = limits.operations(entries)
    verdicts = limits.judge(compiled, modelled)
    text = page.render(compiled, modelled, verdicts)
    if all(getattr(options, name) == choices for name, choices in CHOICES.items()):
        partial = PAGE.with_suffix(".partial")
        partial.write_text(text)
        partial.replace(PAGE)
    else:
        print(text)
    broken = page.broken_list(verdicts) + "".join(f"Not modelled: {problem}\n" for problem in problems)
    print(broken or "all limits are kept", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
