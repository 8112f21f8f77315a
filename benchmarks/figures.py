"""The pictures of the comparison: charts, each with a digest of its figures, and rows of samples.

A chart's file holds the digest, by which a test knows whether it was drawn from the present results.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from charts import Chart, draw
from files import digest, write_atomically
from pictures import caption_font


def chart_digest(chart: Chart) -> str:
    return digest(*(repr(part) for part in chart))


def save(path: Path, chart: Chart) -> None:
    """Write the chart, unless the file shows these figures already."""
    if drawn_from(path) == chart_digest(chart):
        return
    info = PngImagePlugin.PngInfo()
    info.add_text("figures", chart_digest(chart))
    picture = draw(chart).quantize(64)                # a few colours: a quarter of the size
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: picture.save(file, "PNG", pnginfo=info, optimize=True))


def drawn_from(path: Path) -> str | None:
    """The digest of the figures that a chart shows; None where there is no such file."""
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        return picture.info.get("figures")


def rows_of_pictures(heads: list[str], rows: list[tuple[str, list[np.ndarray]]],
                     zoom: int = 2) -> Image.Image:
    """Rows of equally many pictures, uint8 (N, H, W, C) in each of the groups that `heads` names, behind the
    row's name."""
    n, height, width, channels = rows[0][1][0].shape
    font = caption_font("".join([*heads, *(name for name, _ in rows)]), 30)
    left = int(max(font.getlength(name) for name, _ in rows)) + 30
    across, down = width * zoom + 4, height * zoom + 4
    gap = 30                                           # between the groups
    top = 50                                           # of the first row, below the heads
    size = (left + len(heads) * (n * across + gap) - gap, top + len(rows) * down)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    begins = [left + group * (n * across + gap) for group in range(len(heads))]
    for begin, head in zip(begins, heads):
        pen.text((begin + n * across / 2, top / 2), head, "black", font, anchor="mm")
    for i, (name, groups) in enumerate(rows):
        y = top + i * down
        pen.text((left - 15, y + height * zoom / 2), name, "black", font, anchor="rm")
        for begin, images in zip(begins, groups):
            for j, image in enumerate(images.repeat(3 // channels, -1)):
                large = Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
                picture.paste(large, (begin + j * across, y))
    return picture
