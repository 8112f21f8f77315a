"""The picture of a report, drawn from its JSON by Pillow: charts, pairs of neighbours, and its words.

    python benchmarks/report_picture.py report.json report.png     # draws it again, without the pairs

Colours are those of Okabe and Ito, which colour-blind readers can tell apart, and lines also differ in the
shape of their marks. Everything is drawn at twice the size and reduced, which smooths edges and letters.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import textwrap
import unicodedata
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"
BLUE, VERMILLION, PURPLE, GREY = "#0072B2", "#D55E00", "#CC79A7", "#888888"
SERIES = (VERMILLION, BLUE, GREEN, PURPLE, ORANGE, SKY, BLACK)
SCALE = 2              # everything is drawn this many times larger, and reduced
WIDTH = 1440           # of the picture, in its own pixels
COLUMNS = 3            # charts side by side
CHART = (WIDTH // COLUMNS - 16, 270)


class Line(NamedTuple):
    name: str                              # "" where it has no entry in the legend
    points: list[tuple[float, float]]
    colour: str
    width: int = 2
    marks: int = 0                         # corners of a mark at each point: 0 none, 3, 4, 5 ...


def plain(text: str) -> str:
    """The text in the letters that Pillow's own font has: without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * SCALE)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round numbers from low to high."""
    rough = (high - low) / count
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def chart(title: str, lines: list[Line], across: str, log: bool = False) -> Image.Image:
    """A chart of these lines on white. across: the name of the horizontal axis; log: whether the vertical
    one is logarithmic."""
    width, height = (side * SCALE for side in CHART)
    left = 58 * SCALE
    right = 14 * SCALE
    top = 46 * SCALE
    bottom = 40 * SCALE
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)
    pen.text((left, 4 * SCALE), title, "black", font(14))
    points = [point for line in lines for point in line.points if all(map(math.isfinite, point))]
    if not points:
        return image

    def scaled(value: float) -> float:
        return math.log(max(value, 1e-9)) if log else value

    xs = [x for x, _ in points]
    ys = [scaled(y) for _, y in points]
    x_low, x_high = min(xs), max(xs)
    y_low, y_high = min(ys), max(ys)
    margin = 0.06 * (y_high - y_low) or 0.05 * abs(y_high) or 1.0
    y_low, y_high = y_low - margin, y_high + margin
    if x_low == x_high:
        x_low, x_high = x_low - 0.5, x_high + 0.5

    def place(x: float, y: float) -> tuple[float, float]:
        return (left + (x - x_low) / (x_high - x_low) * (width - left - right),
                height - bottom - (scaled(y) - y_low) / (y_high - y_low) * (height - top - bottom))

    # ---- axes
    if log:
        levels = ticks(math.exp(y_low), math.exp(y_high), 6)
    else:
        levels = ticks(y_low, y_high)
    for value in levels:
        at = place(x_low, value)[1]
        pen.line([(left, at), (width - right, at)], "#e4e4e4", SCALE)
        pen.text((left - 6 * SCALE, at), f"{value:.6g}", "black", font(11), anchor="rm")
    for value in ticks(x_low, x_high):
        at = place(value, 1.0)[0]
        pen.line([(at, height - bottom), (at, height - bottom + 4 * SCALE)], "black", SCALE)
        pen.text((at, height - bottom + 6 * SCALE), f"{value:,.6g}", "black", font(11), anchor="ma")
    pen.line([(left, top), (left, height - bottom), (width - right, height - bottom)], "black", SCALE)
    pen.text((width - right, height - 14 * SCALE), across, "black", font(11), anchor="ra")

    # ---- lines, and their names beside a short piece of each
    at = left
    for line in lines:
        places = [place(*point) for point in line.points if all(map(math.isfinite, point))]
        pen.line(places, line.colour, line.width * SCALE, joint="curve")
        for x, y in places if line.marks else ():
            pen.regular_polygon((x, y, 5 * SCALE), line.marks, fill=line.colour)
        if line.name:
            middle = 32 * SCALE
            pen.line([(at, middle), (at + 16 * SCALE, middle)], line.colour, line.width * SCALE)
            if line.marks:
                pen.regular_polygon((at + 8 * SCALE, middle, 5 * SCALE), line.marks, fill=line.colour)
            at += 20 * SCALE
            pen.text((at, middle), line.name, "black", font(11), anchor="lm")
            at += pen.textlength(line.name, font(11)) + 12 * SCALE
    return image


# ---- the charts of each part

def loss_charts(loss: dict) -> list[Image.Image]:
    """Training loss, validation loss, and validation loss by the quarters of the times, over the steps."""
    curve, reference = loss["curve"], loss["reference"]
    runs = reference["runs"] if reference else []

    def lines(ours: list, theirs: list[list]) -> list[Line]:
        name = "reference" if len(theirs) == 1 else f"{len(theirs)} reference seeds"
        drawn = [Line(name if i == 0 else "", points, SKY, 4) for i, points in enumerate(theirs) if points]
        return [*drawn, Line("this run", ours, VERMILLION)]

    charts = [chart("Training loss", lines(curve["train"], [run["train"] for run in runs]), "step", log=True),
              chart("Validation loss", lines(curve["validation"], [run["validation"] for run in runs]),
                    "step", log=True)]
    for name, points in curve["by time"].items():
        theirs = [run["by time"].get(name, []) for run in runs]
        charts.append(chart(f"Validation loss, t in {name.replace('-', ' to ')}", lines(points, theirs),
                            "step", log=True))
    return charts


def sweep_charts(report: dict) -> list[Image.Image]:
    """Each measure over the guidance scale, a line for each set of weights; the range of the seeds as a bar
    at the chosen scale."""
    rows = report["sweep"]
    charts = []
    for measure in report["measures"]:
        lines = []
        for i, weights in enumerate(dict.fromkeys(row["weights"] for row in rows)):
            points = sorted((row["scale"], row[measure]) for row in rows if row["weights"] == weights)
            name = weights if weights in ("raw", "averaged") else f"width {weights}"
            lines.append(Line(name, points, SERIES[i % len(SERIES)], marks=3 + i))
        seeds = [row[measure] for row in report.get("seeds", ())]
        if len(seeds) > 1:
            at = report["chosen"]["scale"]
            lines.append(Line("seeds", [(at, min(seeds)), (at, max(seeds))], GREY, 6))
        charts.append(chart(f"{measure.capitalize()}, {report['n']} samples each", lines, "guidance scale"))
    return charts


def neighbour_charts(result: dict) -> list[Image.Image]:
    """Share of the queries whose ratio of distances is at most the value across."""
    charts = []
    for space in ("pixels", "latents"):
        lines = []
        for i, (name, row) in enumerate(result[space].items()):
            points = [(ratio, j / 100) for j, ratio in enumerate(row["ratio quantiles"]) if ratio <= 2]
            short = name.removeprefix("samples ").replace(" pictures", "").replace(" through the", ",")
            lines.append(Line(short, points, SERIES[i]))
        lines.insert(0, Line("", [(1.0, 0.0), (1.0, 1.0)], GREY, 1))
        charts.append(chart(f"Nearest training picture in {space}: below 1 is close", lines,
                            "distance / distance of that picture to its own nearest"))
    return charts


def pair_picture(pairs: np.ndarray, result: dict) -> Image.Image:
    """The pairs (K, 2, H, W, C) as two rows: samples above, their nearest training pictures below."""
    count, _, height, width, channels = pairs.shape
    if channels == 1:
        pairs = pairs.repeat(3, -1)
    cell = (WIDTH - 20) // max(count, 1)
    zoom = max(1, (cell - 8) * SCALE // width)
    title = 48 * SCALE
    image = Image.new("RGB", (WIDTH * SCALE, title + 2 * (height * zoom + 4 * SCALE) + 8 * SCALE), "white")
    pen = ImageDraw.Draw(image)
    words = ("The closest pairs in latents: samples above, training pictures below, and the ratio of "
             "distances")
    pen.text((10 * SCALE, 2 * SCALE), words, "black", font(14))
    name = next(iter(result["latents"]))
    for i, (pair, row) in enumerate(zip(pairs, result["latents"][name]["worst"])):
        x = (10 + i * cell) * SCALE
        pen.text((x, 24 * SCALE), f"{row['ratio']:.2f}", "black", font(11))
        for j, picture in enumerate(pair):
            large = Image.fromarray(picture).resize((width * zoom, height * zoom), Image.Resampling.NEAREST)
            image.paste(large, (x, title + j * (height * zoom + 4 * SCALE)))
    return image


def text_picture(title: str, words: list[str]) -> Image.Image:
    """Paragraphs below a title."""
    lines = [line for paragraph in words for line in textwrap.wrap(plain(paragraph), 205)]
    image = Image.new("RGB", (WIDTH * SCALE, (30 + 17 * len(lines)) * SCALE), "white")
    pen = ImageDraw.Draw(image)
    pen.text((10 * SCALE, 6 * SCALE), plain(title), "black", font(15))
    for i, line in enumerate(lines):
        pen.text((10 * SCALE, (28 + 17 * i) * SCALE), line, "black", font(12))
    return image


def rows_of(charts: list[Image.Image]) -> list[Image.Image]:
    """The charts, COLUMNS side by side."""
    rows = []
    for start in range(0, len(charts), COLUMNS):
        row = Image.new("RGB", (WIDTH * SCALE, CHART[1] * SCALE), "white")
        for i, image in enumerate(charts[start:start + COLUMNS]):
            row.paste(image, (i * WIDTH // COLUMNS * SCALE, 0))
        rows.append(row)
    return rows


def draw_report(report: dict, pairs: np.ndarray | None = None) -> Image.Image:
    """The whole picture. pairs: uint8 (K, 2, H, W, C), the most suspicious samples and training pictures."""
    parts = [text_picture(f"{report['run']}, step {report['step']:,}, {report['versions']['date']}", [])]
    titles = {"loss": "Is the loss normal?", "sweep": "Averages of the weights, and guidance",
              "seeds": "Spread", "neighbours": "Are samples copies of training pictures?"}
    for name, title in titles.items():
        if name not in report:
            continue
        parts.append(text_picture(title, report["words"][name]))
        if name == "loss":
            parts += rows_of(loss_charts(report["loss"]))
        elif name == "sweep":
            parts += rows_of(sweep_charts(report))
        elif name == "neighbours":
            parts += rows_of(neighbour_charts(report["neighbours"]))
            if pairs is not None:
                parts.append(pair_picture(pairs, report["neighbours"]))
    parts.append(text_picture("Protocol", [report["protocol"]]))
    image = Image.new("RGB", (WIDTH * SCALE, sum(part.height for part in parts)), "white")
    top = 0
    for part in parts:
        image.paste(part, (0, top))
        top += part.height
    return image.reduce(SCALE)


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("json", help="a report's JSON")
    p.add_argument("out", help="PNG file to write")
    args = p.parse_args()
    draw_report(json.loads(Path(args.json).read_text())).save(args.out)


if __name__ == "__main__":
    main()
