"""Charts of lines, drawn with Pillow: over linear or logarithmic axes, or over named places; and heat maps.

    python charts.py                     # writes chart.png, a chart of made-up figures

A point has one value, or those of several seeds: its mark is their mean, and a bar spans their range. Colours
are those of Okabe and Ito (jfly.uni-koeln.de/color), which people with any colour vision can tell apart, and
marks differ too. Charts are drawn at twice the size at which they are shown, as Pillow smooths no edges.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from pictures import caption_font

BLUE, VERMILLION, GREEN, PURPLE = "#0072B2", "#D55E00", "#009E73", "#CC79A7"
ORANGE, SKY, BLACK, YELLOW, GREY = "#E69F00", "#56B4E9", "#000000", "#F0E442", "#888888"
COLOURS = (BLUE, VERMILLION, GREEN, PURPLE, ORANGE, SKY, BLACK, YELLOW)
MARKS = ("circle", "square", "triangle", "diamond")


class Series(NamedTuple):
    name: str                        # "": not in the legend
    x: list                          # numbers, or names of places; two lines fit if the axis has no name
    y: list[list[float]]             # per x, one value or those of all seeds; none: a gap in the line
    colour: str | None = None        # None: that of its place among the series
    mark: str | None = None          # None: likewise; "": without marks
    width: float = 1.0               # of the line, relative


class Chart(NamedTuple):
    title: str
    x: str                           # the axes' names, with units
    y: str
    series: list[Series]
    log_x: bool = False
    log_y: bool = False
    size: tuple[int, int] = (1600, 900)          # pixels
    text: int = 30                   # height of a letter, from which all other sizes follow


class Frame(NamedTuple):
    """Where the axes are, in pixels."""
    left: int
    right: int
    top: int
    bottom: int


def line(name: str, points: list[tuple[float, float]], colour: str | None = None, mark: str = "",
         width: float = 1.0) -> Series:
    """A series of single values; points that are not finite are left out."""
    known = [point for point in points if all(map(math.isfinite, point))]
    return Series(name, [x for x, _ in known], [[y] for _, y in known], colour, mark, width)


def frame_of(chart: Chart, beside: float = 0.0) -> Frame:
    """beside: the width of a legend to the right of it."""
    width, height = chart.size
    return Frame(5 * chart.text, width - 4 * chart.text // 3 - round(beside), 3 * chart.text,
                 height - 13 * chart.text // 3)


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

    def ticks(self, values: list[float] = ()) -> list[float]:
        """The `values` that the points have, if they are few and short; else a few round numbers."""
        values = sorted(set(values))
        if 2 < len(values) <= 8 and all(len(f"{value:g}") <= 4 for value in values):
            return values
        if not self.log:
            return round_numbers(self.low, self.high)
        low, high = 10**self.low, 10**self.high
        powers = range(math.floor(self.low), math.ceil(self.high) + 1)
        found = [factor * 10.0**power for power in powers for factor in (1, 2, 5)]
        found = [value for value in found if low <= value <= high]
        if len(found) > 8:
            found = [value for value in found if f"{value:e}".startswith("1.0")]
        return found if len(found) > 2 else round_numbers(low, high)


def round_numbers(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10(high - low))
    for divisor in (2.5, 2):                           # from powers of ten to 4 and then to 2 of them
        if (high - low) / step < 4:
            step /= divisor
    first = math.ceil(low / step)
    return [round(i * step, 10) for i in range(first, math.floor(high / step) + 1)]


def number(value: float) -> str:
    """As short as it can be written on an axis."""
    if value >= 1e6 or 0 < abs(value) < 1e-3:
        return f"{value:.0e}".replace("e+0", "e").replace("e-0", "e-").replace("e+", "e")
    return f"{value:g}"


def look(i: int, series: Series) -> tuple[str, str]:
    """The colour and the mark of series i."""
    colour = COLOURS[i % len(COLOURS)] if series.colour is None else series.colour
    kind = MARKS[i % len(MARKS)] if series.mark is None else series.mark
    return colour, kind


def font_of(chart: Chart, size: int) -> ImageFont.FreeTypeFont:
    """One for all that is written in a chart; charts with an accent and without have the same."""
    places = (str(x) for series in chart.series for x in series.x)
    names = (series.name for series in chart.series)
    return caption_font("".join(("é", chart.title, chart.x, chart.y, *places, *names)), size)


def draw_mark(pen: ImageDraw.ImageDraw, kind: str, x: float, y: float, colour: str, size: float) -> None:
    if kind == "circle":
        pen.ellipse((x - size, y - size, x + size, y + size), fill=colour)
    elif kind == "square":
        pen.rectangle((x - size, y - size, x + size, y + size), fill=colour)
    elif kind == "triangle":
        pen.polygon([(x, y - 1.3 * size), (x - 1.2 * size, y + size), (x + 1.2 * size, y + size)],
                    fill=colour)
    elif kind == "diamond":
        pen.polygon([(x, y - 1.4 * size), (x + 1.4 * size, y), (x, y + 1.4 * size), (x - 1.4 * size, y)],
                    fill=colour)


def draw(chart: Chart) -> Image.Image:
    """RGB. Raises ValueError for a chart without a point."""
    if not any(seeds for series in chart.series for seeds in series.y):
        raise ValueError(f"chart {chart.title!r}: has no point")
    frame = frame_of(chart)
    picture, points = draw_points(chart, frame)
    box = legend_box(chart, frame, points)
    if box and covered(box, points):                   # no corner is free: beside the axes
        frame = frame_of(chart, box[2] - box[0])
        picture, _ = draw_points(chart, frame)
        left = frame.right + chart.text // 2
        box = (left, frame.top, left + box[2] - box[0], frame.top + box[3] - box[1])
    if box:
        draw_legend(ImageDraw.Draw(picture), chart, box)
    return picture


def draw_points(chart: Chart, frame: Frame) -> tuple[Image.Image, list[tuple[float, float]]]:
    """Axes, lines and marks; and the pixels of all marks, and some along all lines."""
    picture = Image.new("RGB", chart.size, "white")
    pen = ImageDraw.Draw(picture)
    places = list(dict.fromkeys(x for series in chart.series for x in series.x))
    named = isinstance(places[0], str)
    # Places lie side by side, and the series of one place a little apart.
    across = Axis([-0.5, len(places) - 0.5] if named else places, frame.left, frame.right, chart.log_x)
    values = [value for series in chart.series for seeds in series.y for value in seeds]
    up = Axis(values, frame.bottom, frame.top, chart.log_y)
    draw_axes(picture, chart, frame, across, up, places)
    thick = chart.text / 6
    points = []
    for i, series in enumerate(chart.series):
        if not series.x:
            continue
        colour, kind = look(i, series)
        aside = (i - (len(chart.series) - 1) / 2) * 0.12 if named else 0.0
        pieces = [[]]                                  # of the line, between its gaps
        for x, seeds in zip(series.x, series.y):
            if not seeds:
                pieces.append([])
                continue
            where = across(places.index(x) + aside if named else x)
            pieces[-1].append((where, up(float(np.mean(seeds)))))
            if len(seeds) > 1:
                pen.line((where, up(min(seeds)), where, up(max(seeds))), colour, round(thick))
        for corners in pieces:
            if not named and len(corners) > 1:
                pen.line(corners, colour, max(1, round(thick * series.width)), joint="curve")
                for (x0, y0), (x1, y1) in zip(corners, corners[1:]):
                    points += [(x0 + (x1 - x0) * k / 20, y0 + (y1 - y0) * k / 20) for k in range(1, 20)]
            for x, y in corners:
                draw_mark(pen, kind, x, y, colour, 2.2 * thick)
            points += corners
    return picture, points


def draw_axes(picture: Image.Image, chart: Chart, frame: Frame, across: Axis, up: Axis,
              places: list) -> None:
    """The axes with their numbers and names, and the title. places: all x, numbers or names."""
    pen = ImageDraw.Draw(picture)
    left, right, top, bottom = frame
    width, height = chart.size
    text = chart.text
    font = font_of(chart, text)
    for value in up.ticks():
        y = up(value)
        pen.line((left, y, right, y), "#dddddd", text // 15)
        pen.text((left - text // 2, y), number(value), "black", font, anchor="rm")
    if isinstance(places[0], str):
        marks = [(across(i), name) for i, name in enumerate(places)]
    else:
        marks = [(across(value), number(value)) for value in across.ticks(places)]
    for x, name in marks:
        pen.line((x, bottom, x, bottom + text // 3), "black", text // 15)
        pen.text((x, bottom + text // 2), name, "black", font, anchor="ma", align="center")
    pen.line([(left, top), (left, bottom), (right, bottom)], "black", text // 10)
    pen.text((width / 2, text // 2), chart.title, "black", font_of(chart, text + text // 8), anchor="ma")
    pen.text((width / 2, height - text // 2), chart.x, "black", font, anchor="md")
    # The name of the vertical axis is written along it: on a strip of its own, which is then turned.
    strip = Image.new("RGB", (bottom - top, text + text // 2), "white")
    ImageDraw.Draw(strip).text((strip.width / 2, 4), chart.y, "black", font, anchor="ma")
    picture.paste(strip.rotate(90, expand=True), (text // 5, top))


Box = tuple[float, float, float, float]                # left, top, right, bottom, in pixels


def entries_of(chart: Chart) -> list[tuple[int, Series]]:
    """The series that the legend names, with their places among all."""
    return [(i, series) for i, series in enumerate(chart.series) if series.name and series.x]


def covered(box: Box, points: list[tuple[float, float]]) -> int:
    x0, y0, x1, y1 = box
    return sum(x0 <= x <= x1 and y0 <= y <= y1 for x, y in points)


def legend_box(chart: Chart, frame: Frame, points: list[tuple[float, float]]) -> Box | None:
    """In the corner with the fewest points and, of several, the fewest just beside it, which would look like
    marks of the legend; the upper right corner first. None where no series has a name."""
    entries = entries_of(chart)
    if not entries:
        return None
    text = chart.text
    font = font_of(chart, text - text // 15)
    wide = max(font.getlength(series.name) for _, series in entries) + 2.5 * text
    high = (text + text // 3) * len(entries) + text // 2
    boxes = [(x, y, x + wide, y + high)
             for y in (frame.top, frame.bottom - high - text // 3)
             for x in (frame.right - wide, frame.left + text // 3)]

    def beside(box: Box) -> Box:
        return box[0] - 2 * text, box[1] - text, box[2] + 2 * text, box[3] + text

    return min(boxes, key=lambda box: (covered(box, points), covered(beside(box), points)))


def draw_legend(pen: ImageDraw.ImageDraw, chart: Chart, box: Box) -> None:
    text = chart.text
    font = font_of(chart, text - text // 15)
    pen.rectangle(box, fill="white", outline="#bbbbbb")
    for row, (i, series) in enumerate(entries_of(chart)):
        colour, kind = look(i, series)
        x, y = box[0] + text, box[1] + text // 4 + (text + text // 3) * (row + 0.5)
        if kind:
            draw_mark(pen, kind, x, y, colour, 2.2 * text / 6)
        else:
            pen.line((x - text / 2, y, x + text / 2, y), colour, max(1, round(text / 6 * series.width)))
        pen.text((x + 0.9 * text, y), series.name, "black", font, anchor="lm")


def heat_map(title: str, rows: list[tuple[str, list[float]]], text: int = 15) -> Image.Image:
    """A named row of cells for each list of values of at least 0, as long as one another: white at 1, toward
    vermillion below, toward blue up to 2 and beyond."""
    font = caption_font("".join(name for name, _ in rows) + title, text)
    names = max(font.getlength(name) for name, _ in rows)
    left, top, cell = round(names) + 2 * text, 3 * text, 3 * text
    width = max(left + cell * len(rows[0][1]), round(font.getlength(title))) + text
    picture = Image.new("RGB", (width, top + 2 * text * len(rows) + text), "white")
    pen = ImageDraw.Draw(picture)
    pen.text((text, text), title, "black", font)
    for i, (name, values) in enumerate(rows):
        y = top + 2 * text * i
        pen.text((text, y + text), name, "black", font, anchor="lm")
        for j, value in enumerate(values):
            share = min(abs(value - 1), 1.0)                       # of the full colour
            full = ImageColor.getrgb(BLUE if value > 1 else VERMILLION)
            colour = tuple(round(255 + share * (part - 255)) for part in full)
            x = left + cell * j
            pen.rectangle((x, y, x + cell - 2, y + 2 * text - 2), fill=colour)
            pen.text((x + cell / 2, y + text), f"{value:.1f}", "black", font, anchor="mm")
    return picture


def demo() -> None:
    """Draw two made-up series of three seeds."""
    rng = np.random.default_rng(0)
    x = [1, 2, 4, 8, 16, 32]
    series = [Series(name, x, [[scale / i + 2 + spread for spread in rng.normal(0, 0.2, 3)] for i in x])
              for name, scale in (("one", 40.0), ("the other", 25.0))]
    draw(Chart("An example", "evaluations of the network", "distance", series, log_x=True)).save("chart.png")
    print("chart.png written")


if __name__ == "__main__":
    demo()
