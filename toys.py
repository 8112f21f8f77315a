"""Procedural pictures with captions: coloured shapes, which can be read back from the pixels, and emoji.

    python toys.py                        # writes shapes.png, and reads 2,400 pictures back

Because `read_shape` and `read_scene` recover exactly what was drawn, a model trained on these pictures can be
scored without a classifier: a sample is right if it shows what was asked for.

Conventions: pictures are uint8 (H, W, 3); sizes are (H, W); x points right and y down. Picture `index` of a
sequence is a pure function of its index, and every sequence is infinite.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import re
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

KINDS = ["circle", "square", "triangle", "cross"]
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220),
           "yellow": (235, 205, 40), "magenta": (200, 50, 190), "cyan": (40, 195, 210)}
SHAPE_CLASSES = [f"{colour}-{kind}" for colour in COLOURS for kind in KINDS]
# the area of each kind at radius 1, from the distances in `coverage`
AREA = {"circle": np.pi, "square": 1.7**2, "triangle": 1.15**2 * 27**0.5 / 4, "cross": 4 * 0.7 - 0.7**2}


# ---- shapes: one shape on a grey background

def coverage(kind: str, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Share of each pixel that the shape covers, from its signed distance; x and y are the pixels' offsets
    from the shape's centroid."""
    ax, ay = np.abs(x), np.abs(y)
    if kind == "circle":
        distance = np.hypot(x, y) - radius
    elif kind == "square":
        distance = np.maximum(ax, ay) - 0.85 * radius
    elif kind == "triangle":
        distance = np.maximum(y, 0.75**0.5 * ax - 0.5 * y) - 0.575 * radius
    else:                                            # a cross is the union of two bars
        distance = np.minimum(np.maximum(ax - radius, ay - 0.35 * radius),
                              np.maximum(ax - 0.35 * radius, ay - radius))
    # One pixel of transition around distance 0 is antialiasing enough.
    return np.clip(0.5 - distance, 0.0, 1.0)


def draw_shape(index: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Picture `index`, uint8 (H, W, 3), of class index % 24 = colour * 4 + kind."""
    height, width = size
    rng = np.random.default_rng([24, index])
    label = index % len(SHAPE_CLASSES)
    colour, kind = SHAPE_CLASSES[label].split("-")
    radius = rng.uniform(0.2, 0.34) * min(size)
    # Keeps the whole shape inside the picture; where the short side is below about ten pixels, in its middle.
    margin = min(1.15 * radius + 1, min(size) / 2)
    cx, cy = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
    x, y = np.arange(width) + 0.5 - cx, np.arange(height)[:, None] + 0.5 - cy
    grey, slope = rng.uniform(15, 95), rng.uniform(-30, 30)
    background = np.clip(grey + slope * (x + cx - width / 2) / width + 0 * y, 0, 255)[..., None]   # (H, W, 1)
    alpha = coverage(kind, x, y, radius)[..., None]                                                # (H, W, 1)
    return np.round(alpha * np.array(COLOURS[colour]) + (1 - alpha) * background).astype(np.uint8)


def any_size(index: int, pixels: int) -> tuple[int, int]:
    """A size for picture `index`, where they are of different sizes: an aspect ratio from 1:2 to 2:1 and from
    half of the pixels to all of them."""
    rng = np.random.default_rng([44, index])
    ratio, area = 2 ** rng.uniform(-1, 1), pixels * rng.uniform(0.5, 1)
    return round((area * ratio) ** 0.5), round((area / ratio) ** 0.5)


class Fit(NamedTuple):
    """The shape that explains an observed coverage best, with its centroid in pixels."""
    kind: str
    radius: float
    x: float
    y: float


def fit_shape(alpha: np.ndarray, area: float) -> Fit:
    """Centroid and area determine one candidate of each kind; the best differs least from alpha (H, W)."""
    y, x = np.mgrid[:alpha.shape[0], :alpha.shape[1]] + 0.5
    cx, cy = (alpha * x).sum() / area, (alpha * y).sum() / area
    radii = [(area / AREA[kind]) ** 0.5 for kind in KINDS]
    errors = [((coverage(kind, x - cx, y - cy, radius) - alpha) ** 2).sum()
              for kind, radius in zip(KINDS, radii)]
    best = int(np.argmin(errors))
    return Fit(KINDS[best], radii[best], cx, cy)


def nearest_colour(rgb: np.ndarray) -> str:
    palette = np.array(list(COLOURS.values()), dtype=np.float64)
    return list(COLOURS)[int(((palette - rgb) ** 2).sum(1).argmin())]


def read_shape(image: np.ndarray) -> tuple[str, str]:
    """(colour, kind) of a picture, uint8 (H, W, 3). Exact for pictures by `draw_shape`, else a best guess.

    The background is grey, so a pixel's chroma (max - min channel) is its coverage times the chroma of the
    colour. This turns the picture into a coverage, to which a shape is fitted."""
    image = image.astype(np.float64)
    chroma = np.ptp(image, axis=-1)
    inside = chroma >= 0.7 * np.quantile(chroma, 0.98)     # pixels well inside the shape show its pure colour
    colour = nearest_colour(image[inside].mean(0))
    alpha = np.clip(chroma / np.ptp(COLOURS[colour]), 0, 1)
    alpha[alpha < 0.15] = 0                                # a decoder's haze would move the centroid
    return colour, fit_shape(alpha, max(alpha.sum(), 1.0)).kind


# ---- scenes: one or two shapes of two sizes, with a caption

SIZES = {"small": (0.125, 0.14), "large": (0.185, 0.2)}            # radius over the shorter side
PLACES = [["top left", "top", "top right"], ["left", "centre", "right"],
          ["bottom left", "bottom", "bottom right"]]
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}     # direction (x, y)
# Training never contains these, alone or as one of two shapes; benchmarks/scenes.py asks for them.
UNSEEN_PAIRS = {("red", "cross"), ("green", "circle"), ("blue", "triangle"), ("yellow", "square")}
UNSEEN_RELATIONS = {("circle", "above", "square"), ("square", "below", "circle"),
                    ("triangle", "left of", "cross"), ("cross", "right of", "triangle")}


@dataclass(frozen=True)
class Thing:
    colour: str
    kind: str
    size: str
    x: float            # centre, as a share of the width
    y: float            # and of the height

    @property
    def place(self) -> str:
        # The centres of the nine places lie at 0.24, 0.5 and 0.76 in either direction.
        column = min(2, max(0, round((self.x - 0.24) / 0.26)))
        row = min(2, max(0, round((self.y - 0.24) / 0.26)))
        return PLACES[row][column]


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    relation: str | None = None     # of the first thing to the second, where there are two

    @property
    def unseen(self) -> bool:
        """Whether the scene holds anything that training never contains."""
        if any((thing.colour, thing.kind) in UNSEEN_PAIRS for thing in self.things):
            return True
        if len(self.things) != 2:
            return False
        first, second = self.things
        return (first.kind, self.relation, second.kind) in UNSEEN_RELATIONS

    @property
    def caption(self) -> str:
        names = [f"a {thing.size} {thing.colour} {thing.kind}" for thing in self.things]
        if self.relation:
            return f"{names[0]} {self.relation} {names[1]}"
        place = self.things[0].place
        preposition = "in" if place == "centre" else "at"
        return f"{names[0]} {preposition} the {place}"


def describe_scene(index: int, count: int | None = None, unseen: bool = False) -> Scene:
    """Scene `index` with `count` shapes (default: one or two). unseen: whether it holds something that
    training never contains."""
    rng = np.random.default_rng([41, index])
    while True:                                      # draws scenes until one is of the kind asked for
        number = count or int(rng.integers(1, 3))
        looks = [(str(rng.choice(list(COLOURS))), str(rng.choice(KINDS)), str(rng.choice(list(SIZES))))
                 for _ in range(number)]
        if number == 1:
            relation = None
            centres = [0.24 + 0.26 * rng.integers(0, 3, 2) + rng.uniform(-0.05, 0.05, 2)]
        else:
            # Two shapes lie on both sides of a middle: far apart along the relation's axis, hardly across it.
            relation = str(rng.choice(list(RELATIONS)))
            along = np.array(RELATIONS[relation])
            across = 1 - abs(along)
            middle = 0.5 + rng.uniform(-0.2, 0.2) * across
            offset = 0.26 * along + rng.uniform(-0.08, 0.08) * across
            centres = [middle + sign * offset + rng.uniform(-0.02, 0.02, 2) for sign in (1, -1)]
        things = tuple(Thing(*look, float(x), float(y)) for look, (x, y) in zip(looks, centres))
        scene = Scene(things, relation)
        if scene.unseen == unseen:
            return scene


def draw_scene(scene: Scene, index: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """uint8 (H, W, 3). The index determines the background and the exact radii. A shape that would leave the
    picture is moved inside."""
    height, width = size
    rng = np.random.default_rng([42, index])
    grey, slope = rng.uniform(15, 95), rng.uniform(-30, 30)
    shade = np.clip(grey + slope * ((np.arange(width) + 0.5) / width - 0.5), 0, 255)
    image = np.broadcast_to(shade[None, :, None], (height, width, 3)).copy()
    for thing in scene.things:
        radius = rng.uniform(*SIZES[thing.size]) * min(size)
        margin = 1.15 * radius + 0.5
        cx = np.clip(thing.x * width, margin, width - margin)
        cy = np.clip(thing.y * height, margin, height - margin)
        x, y = np.arange(width) + 0.5 - cx, np.arange(height)[:, None] + 0.5 - cy
        alpha = coverage(thing.kind, x, y, radius)[..., None]
        image = alpha * np.array(COLOURS[thing.colour]) + (1 - alpha) * image
    return np.round(image).astype(np.uint8)


def read_scene(image: np.ndarray) -> list[Thing]:
    """The shapes of a picture, uint8 (H, W, 3), the largest first. Exact for pictures by `draw_scene`, else a
    best guess. Each connected patch of colour is read as `read_shape` reads its one shape."""
    image = image.astype(np.float64)
    height, width = image.shape[:2]
    chroma = np.ptp(image, axis=-1)
    found = []
    left = chroma > 30                               # coloured pixels not yet read
    while left.any():
        patch = _first_patch(left)
        left &= ~patch
        inside = patch & (chroma >= 0.7 * np.quantile(chroma[patch], 0.9))
        colour = nearest_colour(image[inside].mean(0))
        # The pixels around the patch are its faint rim, below the threshold of 30.
        alpha = np.where(_grow(patch), np.clip(chroma / np.ptp(COLOURS[colour]), 0, 1), 0)
        area = alpha.sum()
        if area < 0.002 * height * width:            # a speck, not a shape
            continue
        fit = fit_shape(alpha, area)
        size = "small" if fit.radius < 0.162 * min(height, width) else "large"
        found.append((area, Thing(colour, fit.kind, size, fit.x / width, fit.y / height)))
    found.sort(key=lambda pair: -pair[0])
    return [thing for _, thing in found]


def _first_patch(mask: np.ndarray) -> np.ndarray:
    """The connected patch of a mask (H, W) that holds its first pixel."""
    patch = np.zeros_like(mask)
    patch.flat[mask.argmax()] = True
    while True:
        grown = _grow(patch) & mask
        if grown.sum() == patch.sum():
            return patch
        patch = grown


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask (H, W) and the eight neighbours of each of its pixels."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


# ---- corners: two shapes far from each other that agree

CORNERS = ("top left", "bottom right")


def describe_corners(index: int) -> Scene:
    """The same shape in two opposite corners. Nothing between them tells one of them what the other is, so a
    model that draws them alike relates distant parts of its picture."""
    rng = np.random.default_rng([43, index])
    colour, kind = SHAPE_CLASSES[index % len(SHAPE_CLASSES)].split("-")
    centres = [centre + rng.uniform(-0.02, 0.02, 2) for centre in (0.25, 0.75)]
    return Scene(tuple(Thing(colour, kind, "large", float(x), float(y)) for x, y in centres))


def draw_corners(index: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Picture `index`, uint8 (H, W, 3)."""
    return draw_scene(describe_corners(index), index, size)


def read_corners(image: np.ndarray) -> tuple[Thing, Thing] | None:
    """The shapes of the two corners, as `read_scene` reads them; None where the picture does not have exactly
    one shape in each."""
    found = read_scene(image)
    by_place = {thing.place: thing for thing in found}
    if len(found) != 2 or set(by_place) != set(CORNERS):
        return None
    return by_place[CORNERS[0]], by_place[CORNERS[1]]


def omit_details(caption: str, rng: np.random.Generator) -> str:
    """A scene's caption with each detail (size, colour, kind, place) omitted one time in seven; an omitted
    kind becomes "shape". A model thus learns each word separately, not only in combinations from training."""
    what, *places = re.split(" (?=at the |in the )", caption)
    words = []
    for word in what.split():
        if word in (*SIZES, *COLOURS, *KINDS) and rng.random() < 1 / 7:
            if word in KINDS:
                words.append("shape")
        else:
            words.append(word)
    words += [place for place in places if rng.random() >= 1 / 7]
    return " ".join(words)


# ---- emoji: every character of a colour font, with its Unicode name as caption

EMOJI_FONTS = ["/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",          # Debian: fonts-noto-color-emoji
               "/usr/share/fonts/noto/NotoColorEmoji.ttf",
               "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
               "/System/Library/Fonts/Apple Color Emoji.ttc", "C:/Windows/Fonts/seguiemj.ttf"]


def find_emoji_font(data_dir: Path) -> Path:
    for path in [*sorted(data_dir.glob("*[eE]moji*.tt[fc]")), *map(Path, EMOJI_FONTS)]:
        if os.path.isfile(path):
            return path
    raise ValueError(f"--data emoji: no colour font in {data_dir} or the usual places; install one (Debian: "
                     "apt install fonts-noto-color-emoji), or name by --data-dir a folder that has "
                     "NotoColorEmoji.ttf")


def open_emoji_font(path: Path) -> ImageFont.FreeTypeFont:
    try:
        # Not by its name: Pillow would look for a font of that name in the system if this one is damaged.
        content = path.read_bytes()
        for pixels in (109, 160, 137, 136, 128, 96, 64):       # a bitmap font has a few sizes only
            with contextlib.suppress(OSError):
                return ImageFont.truetype(io.BytesIO(content), pixels, layout_engine=ImageFont.Layout.BASIC)
    except Exception as error:              # FreeType raises other types for some damaged files
        raise ValueError(f"{path}: cannot be read as a font ({error})") from None
    raise ValueError(f"{path}: not a font that Pillow can open at any usual size of emoji")


def draw_character(character: str, font: ImageFont.FreeTypeFont) -> Image.Image | None:
    """RGBA, cropped to the ink; None for a character without any."""
    left, top, right, bottom = font.getbbox(character)
    if right <= left or bottom <= top:
        return None
    tile = Image.new("RGBA", (right - left, bottom - top))
    ImageDraw.Draw(tile).text((-left, -top), character, font=font, embedded_color=True)
    box = tile.getchannel("A").getbbox()
    return tile.crop(box) if box else None


@functools.lru_cache(maxsize=2)
def render_emoji(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """(N, H, W, 3) uint8 pictures on white and their names in lower case: every single character that has a
    name and, in this font, a coloured picture of its own. No blanks, no duplicates, no modifiers."""
    font = open_emoji_font(path)
    tiles = []
    for character in map(chr, range(0xA9, 0x20000)):
        name = unicodedata.name(character, None)
        category = unicodedata.category(character)
        # Letters (L) and marks (M) are text; formats (Cf) and modifiers (Sk) only change other characters.
        if name is None or category[0] in "LM" or category in ("Cf", "Sk"):
            continue
        try:
            tile = draw_character(character, font)
        except Exception as error:              # FreeType reads a glyph only when it is drawn
            raise ValueError(f"{path}: damaged at the glyph of {name} ({error})") from None
        if tile is not None:
            tiles.append((name.lower(), tile))
    side = max((max(tile.size) for _, tile in tiles), default=0)    # one scale for all
    found = {}                                                      # by its pixels: duplicates appear once
    for name, tile in tiles:
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(tile, ((side - tile.width) // 2, (side - tile.height) // 2))
        picture = np.asarray(ImageOps.pad(square.convert("RGB"), size[::-1], Image.Resampling.LANCZOS,
                                          color="white"))
        if picture.min() < 240:                                     # something other than white
            found.setdefault(picture.tobytes(), (name, picture))
    if not found:
        raise ValueError(f"{path}: no emoji in this font that Pillow can draw")
    return np.stack([picture for _, picture in found.values()]), [name for name, _ in found.values()]


def vary_caption(caption: str, rng: np.random.Generator) -> str:
    """The caption itself half of the time; else its words in another order, or at least one of its words."""
    words = caption.split()
    if rng.random() < 0.5 or len(words) < 2:
        return caption
    if rng.random() < 0.5:
        return " ".join(rng.permutation(words))
    keep = rng.random(len(words)) < 0.6
    keep[rng.integers(len(words))] = True
    return " ".join(word for word, kept in zip(words, keep) if kept)


# ---- demonstration

def demo() -> None:
    """Draw 2,400 shapes, read them back, and write 96 of them to shapes.png."""
    pictures = np.stack([draw_shape(i) for i in range(2400)])
    right = sum("-".join(read_shape(picture)) == SHAPE_CLASSES[i % 24] for i, picture in enumerate(pictures))
    # four rows with one picture of every class, on white
    tiles = np.pad(pictures[:96], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=255)
    sheet = tiles.reshape(4, 24, 34, 34, 3).transpose(0, 2, 1, 3, 4).reshape(4 * 34, 24 * 34, 3)
    Image.fromarray(sheet).resize((24 * 68, 4 * 68), Image.Resampling.NEAREST).save("shapes.png")
    print(f"shapes.png written; {right} of {len(pictures)} pictures read back as drawn")


if __name__ == "__main__":
    demo()
