"""The picture of a report, drawn from its JSON by Pillow: charts, pairs of neighbours, and its words.

    python benchmarks/report_picture.py report.json report.png     # draws it again, without the pairs

Everything is drawn at twice the size and reduced, which smooths edges and letters.
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import unicodedata
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.samples import check_out
from charts import COLOURS, GREY, MARKS, SKY, VERMILLION, Chart, Series, draw, line
from cli import Parser, program
from pictures import PICTURES, write_picture

SCALE = 2              # everything is drawn this many times larger, and reduced
WIDTH = 1440           # of the picture, in its own pixels
COLUMNS = 3            # charts side by side
CHART = (WIDTH // COLUMNS - 16, 270)


def plain(text: str) -> str:
    """The text in the letters that Pillow's own font has: without accents."""
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()


def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size * SCALE)


def drawn(title: str, lines: list[Series], across: str, log: bool = False) -> list[Image.Image]:
    """A chart of these lines, or nothing where they have no point. across: the name of the horizontal axis;
    log: whether the vertical one is logarithmic."""
    size = (CHART[0] * SCALE, CHART[1] * SCALE)
    if not any(each.x for each in lines):
        return []
    return [draw(Chart(title, across, "", lines, log_y=log, size=size, text=11 * SCALE))]


# ---- the charts of each part

def loss_charts(loss: dict) -> list[Image.Image]:
    """Training loss, validation loss, and validation loss by the quarters of the times, over the steps."""
    curve, reference = loss["curve"], loss["reference"]
    runs = reference["runs"] if reference else []

    def lines(ours: list, theirs: list[list]) -> list[Series]:
        name = "reference" if len(theirs) == 1 else f"{len(theirs)} reference seeds"
        below = [line(name if i == 0 else "", points, SKY, width=2) for i, points in enumerate(theirs)]
        return [*below, line("this run", ours, VERMILLION)]

    charts = drawn("Training loss", lines(curve["train"], [run["train"] for run in runs]), "step", log=True)
    charts += drawn("Validation loss", lines(curve["validation"], [run["validation"] for run in runs]),
                    "step", log=True)
    for name, points in curve["by time"].items():
        theirs = [run["by time"].get(name, []) for run in runs]
        charts += drawn(f"Validation loss, t in {name.replace('-', ' to ')}", lines(points, theirs), "step",
                        log=True)
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
            lines.append(line(name, points, COLOURS[i % len(COLOURS)], MARKS[i % len(MARKS)]))
        seeds = [row[measure] for row in report.get("seeds", ())]
        if len(seeds) > 1:
            at = report["chosen"]["scale"]
            lines.append(line("seeds", [(at, min(seeds)), (at, max(seeds))], GREY, width=3))
        charts += drawn(f"{measure.capitalize()}, {report['n']} samples each", lines, "guidance scale")
    return charts


def neighbour_charts(result: dict) -> list[Image.Image]:
    """Share of the queries whose ratio of distances is at most the value across."""
    charts = []
    for space in ("pixels", "latents"):
        lines = []
        for i, (name, row) in enumerate(result[space].items()):
            points = [(ratio, j / 100) for j, ratio in enumerate(row["ratio quantiles"]) if ratio <= 2]
            short = name.removeprefix("samples ").replace(" pictures", "").replace(" through the", ",")
            lines.append(line(short, points, COLOURS[i % len(COLOURS)]))
        lines.insert(0, line("", [(1.0, 0.0), (1.0, 1.0)], GREY, width=0.5))
        charts += drawn(f"Nearest training picture in {space}: below 1 is close", lines,
                        "distance / distance of that picture to its own nearest")
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
    for i, text in enumerate(lines):
        pen.text((10 * SCALE, (28 + 17 * i) * SCALE), text, "black", font(12))
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


def read_report(file: Path) -> dict:
    """The JSON of a report. Raises ValueError for a file that is none."""
    try:
        report = json.loads(file.read_text())
        if {"run", "step", "versions", "words", "protocol"} <= set(report):
            return report
    except (OSError, ValueError, TypeError):
        pass
    raise ValueError(f"{file}: not a report, or damaged; make one by python benchmarks/report.py RUN")


def main() -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("json", help="a report's JSON")
    p.add_argument("out", help="PNG file to write")
    args = p.parse_args()
    check_out("OUT", args.out, PICTURES)
    write_picture(Path(args.out), draw_report(read_report(Path(args.json))))


if __name__ == "__main__":
    sys.exit(program("report_picture.py", main))
