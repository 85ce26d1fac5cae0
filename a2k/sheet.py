"""Contact sheets: results in a grid, with the photos down the left side and the paintings along the top."""

from PIL import Image, ImageOps

MARGIN = 6
BACKGROUND = (255, 255, 255)


def contact_sheet(
    photos: list[Image.Image], paintings: list[Image.Image], results: list[list[Image.Image]], cell: int = 192
) -> Image.Image:
    """results[i][j] is photos[i] in the manner of paintings[j]; every picture fits a cell x cell square (pixels)."""
    step = cell + MARGIN
    sheet = Image.new("RGB", ((len(paintings) + 1) * step + MARGIN, (len(photos) + 1) * step + MARGIN), BACKGROUND)
    rows = [[None, *paintings], *([photo, *row] for photo, row in zip(photos, results, strict=True))]
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            if picture is not None:
                fitted = ImageOps.pad(picture, (cell, cell), Image.Resampling.LANCZOS, BACKGROUND)
                sheet.paste(fitted, (MARGIN + x * step, MARGIN + y * step))
    return sheet
