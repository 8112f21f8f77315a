"""Charts for the README, drawn with Pillow: lines over a logarithmic or linear axis, or over named places.

    python benchmarks/figures.py             # writes chart.png, a chart of made-up figures

Every point has the values of all seeds: the mark is their mean, the bar their range. Colours are those of
Okabe and Ito (jfly.uni-koeln.de/color), which people with any colour vision can tell apart; marks differ too.
A chart is drawn at twice the width at which a README shows it. It holds a digest of its figures, by which a
test knows whether it was drawn from the present ones.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from files import digest, write_atomically
from pictures import caption_font

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
MARKS = ("circle", "square", "triangle", "diamond")
WIDTH, HEIGHT = 1600, 900
LEFT, RIGHT, TOP, BOTTOM = 150, 40, 90, 130          # margins around the axes
TEXT = 30                                            # height of a letter


class Series(NamedTuple):
    name: str
    x: list                        # numbers, or names of places
    y: list[list[float]]           # per x, the values of all seeds
    colour: int | None = None      # default: one after another
    mark: int | None = None


class Chart(NamedTuple):
    title: str
    x: str                         # the axes' names, with units
    y: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False

    @property
    def digest(self) -> str:
        return digest(*(repr(part) for part in self))


def look(i: int, series: Series) -> tuple[str, str]:
    """The colour and the mark of series i."""
    colour = i if series.colour is None else series.colour
    kind = i if series.mark is None else series.mark
    return COLOURS[colour % len(COLOURS)], MARKS[kind % len(MARKS)]


class Axis:
    """From values to pixels, and where to write numbers."""

    def __init__(self, values: list[float], begin: int, end: int, log: bool):
        self.log = log
        low, high = min(values), max(values)
        if log:
            low, high = math.log10(low), math.log10(high)
        margin = 0.04 * (high - low) or 0.5
        self.low = low - margin
        self.high = high + margin
        self.begin = begin
        self.end = end

    def __call__(self, value: float) -> float:
        value = math.log10(value) if self.log else value
        return self.begin + (value - self.low) / (self.high - self.low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if self.log:
            powers = range(math.floor(self.low), math.ceil(self.high) + 1)
            found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
            found = [value for value in found if self.low <= math.log10(value) <= self.high]
            if len(found) > 8:
                found = [value for value in found if f"{value:e}".startswith("1.0")]
            return found
        step = 10.0 ** math.floor(math.log10(self.high - self.low))
        for finer in (5, 2):
            if (self.high - self.low) / step < 4:
                step /= finer if finer == 2 else 2.5
        first = math.ceil(self.low / step)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step) + 1)]


def number(value: float) -> str:
    """As short as it can be written on an axis."""
    if value >= 1e6 or 0 < abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:g}"


def mark(pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, colour: str, size: float = 11) -> None:
    if kind == "circle":
        pen.ellipse((x - size, y - size, x + size, y + size), fill=colour)
    elif kind == "square":
        pen.rectangle((x - size, y - size, x + size, y + size), fill=colour)
    elif kind == "triangle":
        pen.polygon([(x, y - 1.3 * size), (x - 1.2 * size, y + size), (x + 1.2 * size, y + size)],
                    fill=colour)
    else:
        pen.polygon([(x, y - 1.4 * size), (x + 1.4 * size, y), (x, y + 1.4 * size), (x - 1.4 * size, y)],
                    fill=colour)


def draw(chart: Chart) -> Image.Image:
    """RGB. Raises ValueError for a chart without a point."""
    points = [value for series in chart.series for values in series.y for value in values]
    if not points:
        raise ValueError(f"chart {chart.title!r}: has no point")
    picture = Image.new("RGB", (WIDTH, HEIGHT), "white")
    places = list(dict.fromkeys(x for series in chart.series for x in series.x))
    named = isinstance(places[0], str)
    # Places lie side by side, and the series of one place a little apart.
    x_values = [-0.5, len(places) - 0.5] if named else [float(x) for x in places]
    across = Axis(x_values, LEFT, WIDTH - RIGHT, chart.log_x)
    up = Axis(points, HEIGHT - BOTTOM, TOP, chart.log_y)
    frame(picture, chart, across, up, places if named else [])
    pen = ImageDraw.Draw(picture)
    for i, series in enumerate(chart.series):
        colour, kind = look(i, series)
        aside = (i - (len(chart.series) - 1) / 2) * 0.12 if named else 0.0
        line = []
        for x, values in zip(series.x, series.y):
            where = across(places.index(x) + aside if named else float(x))
            line.append((where, up(float(np.mean(values)))))
            pen.line((where, up(min(values)), where, up(max(values))), fill=colour, width=5)
        if not named:
            pen.line(line, fill=colour, width=5, joint="curve")
        for x, y in line:
            mark(pen, kind, x, y, colour)
    legend(pen, chart)
    return picture


def frame(picture: Image.Image, chart: Chart, across: Axis, up: Axis, places: list[str]) -> None:
    """The axes with their numbers and names, and the title."""
    pen = ImageDraw.Draw(picture)
    font = caption_font(chart.title + chart.x + chart.y, TEXT)
    for value in up.ticks():
        y = up(value)
        pen.line((LEFT, y, WIDTH - RIGHT, y), fill="#dddddd", width=2)
        pen.text((LEFT - 12, y), number(value), "black", font, anchor="rm")
    named = [(across(i), name) for i, name in enumerate(places)]
    for x, text in named or [(across(value), number(value)) for value in across.ticks()]:
        pen.line((x, HEIGHT - BOTTOM, x, HEIGHT - BOTTOM + 10), fill="black", width=2)
        pen.text((x, HEIGHT - BOTTOM + 16), text, "black", font, anchor="ma")
    pen.line([(LEFT, TOP), (LEFT, HEIGHT - BOTTOM), (WIDTH - RIGHT, HEIGHT - BOTTOM)], fill="black", width=3)
    pen.text((WIDTH / 2, 14), chart.title, "black", caption_font(chart.title, TEXT + 4), anchor="ma")
    pen.text((WIDTH / 2, HEIGHT - 16), chart.x, "black", font, anchor="md")
    # The name of the vertical axis is written along it: on a strip of its own, which is then turned.
    strip = Image.new("RGB", (HEIGHT, TEXT + 20), "white")
    ImageDraw.Draw(strip).text((HEIGHT / 2, 4), chart.y, "black", font, anchor="ma")
    picture.paste(strip.rotate(90, expand=True), (6, 0))


def legend(pen: ImageDraw.ImageDraw, chart: Chart) -> None:
    """In the upper right corner, over whatever is there."""
    font = caption_font("".join(series.name for series in chart.series), TEXT - 2)
    wide = max(pen.textlength(series.name, font) for series in chart.series) + 70
    left, line = WIDTH - RIGHT - wide - 10, TEXT + 10
    pen.rectangle((left, TOP, WIDTH - RIGHT, TOP + line * len(chart.series) + 16), fill="white",
                  outline="#bbbbbb")
    for i, series in enumerate(chart.series):
        y = TOP + 8 + line * (i + 0.5)
        colour, kind = look(i, series)
        mark(pen, kind, left + 30, y, colour)
        pen.text((left + 55, y), series.name, "black", font, anchor="lm")


def save(path: Path, chart: Chart) -> None:
    """Write the chart, unless the file shows these figures already."""
    if drawn_from(path) == chart.digest:
        return
    info = PngImagePlugin.PngInfo()
    info.add_text("figures", chart.digest)
    picture = draw(chart).quantize(64)                # a few colours: a quarter of the size
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: picture.save(file, "PNG", pnginfo=info, optimize=True))


def rows_of_pictures(rows: list[tuple[str, np.ndarray]], zoom: int = 2) -> Image.Image:
    """Rows of equally many pictures, uint8 (N, H, W, C), each behind its name."""
    n, height, width, channels = rows[0][1].shape
    font = caption_font("".join(name for name, _ in rows), TEXT)
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


def drawn_from(path: Path) -> str | None:
    """The digest of the figures that a chart shows; None where there is no such file."""
    if not path.is_file():
        return None
    with Image.open(path) as picture:
        return picture.info.get("figures")


def demo() -> None:
    """Draw two made-up series."""
    rng = np.random.default_rng(0)
    x = [1, 2, 4, 8, 16, 32]
    y = {name: [[scale / i + 2 + spread for spread in rng.normal(0, 0.2, 3)] for i in x]
         for name, scale in (("one", 40.0), ("the other", 25.0))}
    save(Path("chart.png"), Chart("An example", "evaluations of the network", "distance",
                                  [Series(name, x, values) for name, values in y.items()], log_x=True))
    print(f"chart.png written, drawn from {drawn_from(Path('chart.png'))}")


if __name__ == "__main__":
    demo()
