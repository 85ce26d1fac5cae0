"""Redraw every demo photo in every demo style with the bundled model: `make demo`."""

import time
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from a2k import StyleTransfer
from a2k.images import find_images, write_image
from a2k.sheet import contact_sheet

HERE = Path(__file__).parent
OUT = HERE / "out"


def main() -> None:
    photos, styles = find_images([HERE / "photos"]), find_images([HERE / "styles"])
    transfer = StyleTransfer()
    rows, started = [], time.perf_counter()
    with tqdm(total=len(photos) * len(styles), unit="picture", disable=None) as progress:
        for photo in photos:
            rows.append([])
            for style in styles:
                picture = transfer.stylize(photo, style)
                write_image(picture, OUT / f"{photo.stem}_stylized_{style.stem}.jpg")
                rows[-1].append(picture)
                progress.update()
    seconds = time.perf_counter() - started
    sheet = contact_sheet([Image.open(p) for p in photos], [Image.open(p) for p in styles], rows)
    write_image(sheet, OUT / "contact_sheet.jpg")
    count = len(photos) * len(styles)
    print(f"{count} pictures in {OUT}, {seconds / count:.2f} s each\nAll on one sheet: {OUT / 'contact_sheet.jpg'}")


if __name__ == "__main__":
    main()
