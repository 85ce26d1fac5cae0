"""Contact sheets: pictures in a grid."""

from PIL import Image, ImageDraw, ImageOps

MARGIN = 6
HEADING = 16  # pixels of height
BACKGROUND = (255, 255, 255)


def contact_sheet(
    photos: list[Image.Image], paintings: list[Image.Image], results: list[list[Image.Image]], cell: int = 192
) -> Image.Image:
    """results[i][j] is photos[i] in the manner of paintings[j], with the photos down the left side and the paintings
    along the top; every picture fits a cell x cell square (pixels).
    """
    return grid([[None, *paintings], *([photo, *row] for photo, row in zip(photos, results, strict=True))], cell)


def comparison_sheet(headings: list[str], rows: list[list[Image.Image]], cell: int = 256) -> Image.Image:
    """Rows of as many pictures as there are headings, which stand above the columns, cut to the cell's width."""
    pictures = grid(rows, cell)
    sheet = Image.new("RGB", (pictures.width, pictures.height + HEADING), BACKGROUND)
    sheet.paste(pictures, (0, HEADING))
    draw = ImageDraw.Draw(sheet)
    for x, heading in enumerate(headings):
        while draw.textlength(heading) > cell:
            heading = heading[1:]  # the end of a path says more than its start
        draw.text((MARGIN + x * (cell + MARGIN), MARGIN // 2), heading, fill=(0, 0, 0))
    return sheet


def grid(rows: list[list[Image.Image | None]], cell: int) -> Image.Image:
    """Pictures in rows of equal length, each fitted into a cell x cell square; None leaves its cell empty."""
    step = cell + MARGIN
    sheet = Image.new("RGB", (len(rows[0]) * step + MARGIN, len(rows) * step + MARGIN), BACKGROUND)
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            if picture is not None:
                fitted = ImageOps.pad(picture, (cell, cell), Image.Resampling.LANCZOS, BACKGROUND)
                sheet.paste(fitted, (MARGIN + x * step, MARGIN + y * step))
    return sheet
