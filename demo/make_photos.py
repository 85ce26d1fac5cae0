"""Export the demo photos from the sample data that ships inside the scikit-image wheel.

Run ``python demo/make_photos.py``: it writes ``demo/photos/*.jpg``.  Nothing is downloaded; where the
pictures come from and their licences are listed in ``demo/CREDITS.md``.
"""

from __future__ import annotations

from pathlib import Path

import skimage.data
from PIL import Image

OUT = Path(__file__).resolve().parent / "photos"
LONG_SIDE = 640
QUALITY = 90
NAMES = ("astronaut", "chelsea", "coffee", "rocket")


def main() -> None:
    """Write each photo as a JPEG whose long side is at most `LONG_SIDE` pixels."""
    OUT.mkdir(parents=True, exist_ok=True)
    for name in NAMES:
        image = Image.fromarray(getattr(skimage.data, name)()).convert("RGB")
        image.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
        path = OUT / f"{name}.jpg"
        image.save(path, quality=QUALITY, optimize=True)
        print(f"{path.name}: {image.width}x{image.height}, {path.stat().st_size / 1000:.0f} kB")


if __name__ == "__main__":
    main()
