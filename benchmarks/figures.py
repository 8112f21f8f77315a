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


def rows_of_pictures(rows: list[tuple[str, np.ndarray]], zoom: int = 2) -> Image.Image:
    """Rows of equally many pictures, uint8 (N, H, W, C), each behind its name."""
    n, height, width, channels = rows[0][1].shape
    font = caption_font("".join(name for name, _ in rows), 30)
    left = int(max(font.getlength(name) for name, _ in rows)) + 30
    picture = Image.new("RGB", (left + n * (width * zoom + 4), len(rows) * (height * zoom + 4)), "white")
    pen = ImageDraw.Draw(picture)
    for i, (name, images) in enumerate(rows):
        top = i * (height * zoom + 4)
        pen.text((left - 15, top + height * zoom / 2), name, "black", font, anchor="rm")
        for j, image in enumerate(images.repeat(3 // channels, -1)):
            large = Image.fromarray(image).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            picture.paste(large, (left + j * (width * zoom + 4), top))
    return picture
