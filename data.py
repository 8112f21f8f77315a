"""Images, labels and captions in, batches out: shapes, emoji, IDX and CIFAR-10 files, any folder, and caches.

    python data.py                       # writes shapes.png: one of every class, as drawn and as read back

Every source becomes one `Dataset`: uint8 images (N, H, W, C), integer labels or none, class names, captions
or none. `LatentCache` holds what a VAE's encoder says of the pictures, `TextCache` what a frozen text encoder
says of the captions. `batch_indices` is the only source of order: a pure
function of (seed, step), so that a run resumed at any step sees exactly the batches that it would have seen.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import os
import re
import shutil
import sys
import tarfile
import textwrap
import unicodedata
import urllib.request
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

FASHION = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
           "ankle-boot"]
BUILT_IN = ("shapes", "emoji", "fashion-mnist", "mnist", "cifar10")
CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


@dataclass
class Dataset:
    images: np.ndarray          # (N, H, W, C) uint8, in memory or memory-mapped
    labels: np.ndarray | None   # (N,) int64, or None where there are no classes
    classes: list[str]          # names; empty where there are no classes
    fingerprint: str            # changes whenever a pixel or a label may have
    captions: list[str] | None = None   # one a picture, where there are any
    vary: Callable[[str, np.random.Generator], str] | None = None   # another wording, for training

    def __len__(self) -> int:
        return len(self.images)

    @property
    def identity(self) -> str:
        """Changes whenever the fingerprint or a caption does."""
        return self.fingerprint if self.captions is None else _digest(self.fingerprint, self.captions)


def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def send(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device. From pinned memory, so that neither side waits for the other."""
    pinned = torch.device(device).type == "cuda"
    return (x.pin_memory() if pinned else x).to(device, non_blocking=pinned)


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) nominally in [-1, 1] -> uint8 (B, H, W, C)."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """(batch_size,) indices into n examples for one step: epochs in fresh random order, joined seamlessly."""
    k = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: _order(n, int(epoch), seed) for epoch in np.unique(k // n)}
    return np.array([orders[epoch][i] for epoch, i in zip(k // n, k % n)])


def batches(shape: tuple[int, ...]) -> list[range]:
    """Ranges that cut (N, H, W, C) images into batches of 256 pictures of 32 x 32, or of as many pixels."""
    n, h, w, _ = shape
    size = max(1, 256 * 32 * 32 // (h * w))
    return [range(i, min(i + size, n)) for i in range(0, n, size)]


@contextmanager
def locked(path: Path, wait: bool = False):
    """Hold the lock file for this process; where another holds it, wait or raise BlockingIOError.
    The lock goes with the process, however that ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if os.name == "nt":
            import msvcrt
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
            except OSError as error:
                raise BlockingIOError(str(error)) from None
        else:
            import fcntl
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield


@functools.lru_cache(maxsize=4)
def _order(n: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


# ------------------------------------------------------------------------------------------------------------
# shapes: one coloured shape on a grey background, drawn from a signed distance, read back by drawing again

KINDS = ["circle", "square", "triangle", "cross"]
COLOURS = {"red": (220, 40, 40), "green": (40, 170, 60), "blue": (50, 80, 220),
           "yellow": (235, 205, 40), "magenta": (200, 50, 190), "cyan": (40, 195, 210)}
SHAPE_CLASSES = [f"{colour}-{kind}" for colour in COLOURS for kind in KINDS]
# of each kind at radius 1
AREA = {"circle": np.pi, "square": 1.7**2, "triangle": 1.15**2 * 27**0.5 / 4, "cross": 4 * 0.7 - 0.7**2}


def coverage(kind: str, x: np.ndarray, y: np.ndarray, radius: np.ndarray) -> np.ndarray:
    """Share of each pixel that the shape covers; x and y are pixel offsets from its centroid, y downward."""
    ax, ay = np.abs(x), np.abs(y)
    if kind == "circle":
        distance = np.hypot(x, y) - radius
    elif kind == "square":
        distance = np.maximum(ax, ay) - 0.85 * radius
    elif kind == "triangle":
        distance = np.maximum(y, 0.75**0.5 * ax - 0.5 * y) - 0.575 * radius
    else:
        distance = np.minimum(np.maximum(ax - radius, ay - 0.35 * radius),
                              np.maximum(ax - 0.35 * radius, ay - radius))
    return np.clip(0.5 - distance, 0.0, 1.0)


def draw_shape(index: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """Picture `index` of the infinite sequence, uint8 (H, W, 3); class index % 24 = colour * 4 + kind."""
    height, width = size
    rng, label = np.random.default_rng([24, index]), index % len(SHAPE_CLASSES)
    colour, kind = list(COLOURS.values())[label // len(KINDS)], KINDS[label % len(KINDS)]
    radius = rng.uniform(0.2, 0.34) * min(size)
    margin = 1.15 * radius + 1
    cx, cy = rng.uniform(margin, width - margin), rng.uniform(margin, height - margin)
    x, y = np.arange(width) + 0.5 - cx, np.arange(height)[:, None] + 0.5 - cy
    grey, slope = rng.uniform(15, 95), rng.uniform(-30, 30)
    background = np.clip(grey + slope * (x + cx - width / 2) / width + 0 * y, 0, 255)[..., None]
    alpha = coverage(kind, x, y, radius)[..., None]
    return np.round(alpha * np.array(colour) + (1 - alpha) * background).astype(np.uint8)


def read_shape(image: np.ndarray) -> tuple[str, str]:
    """(colour, kind) of a picture, uint8 (H, W, 3). Exact for what `draw_shape` draws, else a best guess.

    The background is grey, so a pixel's max - min channel is its coverage times that of the colour. Given
    coverage, centroid and area place one candidate of each kind, and the candidate nearest to the coverage is
    the answer."""
    image = image.astype(np.float64)
    chroma = image.max(-1) - image.min(-1)
    inside = chroma >= 0.7 * np.quantile(chroma, 0.98)
    mean = image[inside].mean(0)
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float64)
    nearest = int(((palette - mean) ** 2).sum(1).argmin())
    alpha = np.clip(chroma / np.ptp(palette[nearest]), 0, 1)
    alpha[alpha < 0.15] = 0                       # decoder haze on the background would pull the centroid
    area = max(alpha.sum(), 1.0)
    y, x = np.mgrid[:image.shape[0], :image.shape[1]] + 0.5
    x, y = x - (alpha * x).sum() / area, y - (alpha * y).sum() / area
    errors = [((coverage(kind, x, y, (area / AREA[kind]) ** 0.5) - alpha) ** 2).sum() for kind in KINDS]
    return names[nearest], KINDS[int(np.argmin(errors))]


# Scenes: one or two shapes of two sizes, described, drawn and read back

SIZES = {"small": (0.125, 0.14), "large": (0.185, 0.2)}            # radius over the shorter side
PLACES = [["top left", "top", "top right"], ["left", "centre", "right"],
          ["bottom left", "bottom", "bottom right"]]
RELATIONS = {"left of": (-1, 0), "right of": (1, 0), "above": (0, -1), "below": (0, 1)}   # x, y downward
# What training never shows, alone or in a pair, and the compositional test asks for
UNSEEN_PAIRS = {("red", "cross"), ("green", "circle"), ("blue", "triangle"), ("yellow", "square")}
UNSEEN_RELATIONS = {("circle", "above", "square"), ("square", "below", "circle"),
                    ("triangle", "left of", "cross"), ("cross", "right of", "triangle")}


@dataclass(frozen=True)
class Thing:
    colour: str
    kind: str
    size: str
    x: float            # centre, as a share of width and height
    y: float

    @property
    def place(self) -> str:
        column, row = (min(2, max(0, round((v - 0.24) / 0.26))) for v in (self.x, self.y))
        return PLACES[row][column]


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    relation: str | None = None     # of the first to the second, where there are two

    @property
    def unseen(self) -> bool:
        kinds = tuple(thing.kind for thing in self.things)
        return any((thing.colour, thing.kind) in UNSEEN_PAIRS for thing in self.things) or (
            len(kinds) == 2 and (kinds[0], self.relation, kinds[1]) in UNSEEN_RELATIONS)

    @property
    def caption(self) -> str:
        names = [f"a {thing.size} {thing.colour} {thing.kind}" for thing in self.things]
        if self.relation:
            return f"{names[0]} {self.relation} {names[1]}"
        place = self.things[0].place
        return f"{names[0]} {'in' if place == 'centre' else 'at'} the {place}"


def describe_scene(index: int, count: int | None = None, unseen: bool = False) -> Scene:
    """Scene `index` of an infinite sequence: of `count` shapes, or of one or two; with something that
    training never shows, or without."""
    rng = np.random.default_rng([41, index])
    while True:
        number = count or int(rng.integers(1, 3))
        looks = [(str(rng.choice(list(COLOURS))), str(rng.choice(KINDS)), str(rng.choice(list(SIZES))))
                 for _ in range(number)]
        if number == 1:
            x, y = 0.24 + 0.26 * rng.integers(0, 3, 2) + rng.uniform(-0.05, 0.05, 2)
            scene = Scene((Thing(*looks[0], float(x), float(y)),))
        else:
            relation = str(rng.choice(list(RELATIONS)))
            along = np.array(RELATIONS[relation])
            middle = 0.5 + rng.uniform(-0.2, 0.2) * (1 - abs(along))
            offset = 0.26 * along + rng.uniform(-0.08, 0.08) * (1 - abs(along))
            centres = [middle + sign * offset + rng.uniform(-0.02, 0.02, 2) for sign in (1, -1)]
            scene = Scene(tuple(Thing(*look, float(x), float(y)) for look, (x, y) in zip(looks, centres)),
                          relation)
        if scene.unseen == unseen:
            return scene


def draw_scene(scene: Scene, index: int, size: tuple[int, int] = (32, 32)) -> np.ndarray:
    """uint8 (H, W, 3); the index chooses background and exact sizes. A shape that would leave the picture is
    moved inside."""
    (height, width), rng = size, np.random.default_rng([42, index])
    grey, slope = rng.uniform(15, 95), rng.uniform(-30, 30)
    shade = np.clip(grey + slope * ((np.arange(width) + 0.5) / width - 0.5), 0, 255)
    image = np.broadcast_to(shade[None, :, None], (height, width, 3)).copy()
    for thing in scene.things:
        radius = rng.uniform(*SIZES[thing.size]) * min(size)
        margin = 1.15 * radius + 0.5
        cx = np.clip(thing.x * width, margin, width - margin)
        cy = np.clip(thing.y * height, margin, height - margin)
        alpha = coverage(thing.kind, np.arange(width) + 0.5 - cx, np.arange(height)[:, None] + 0.5 - cy,
                         radius)[..., None]
        image = alpha * np.array(COLOURS[thing.colour]) + (1 - alpha) * image
    return np.round(image).astype(np.uint8)


def read_scene(image: np.ndarray) -> list[Thing]:
    """What a picture, uint8 (H, W, 3), shows, the largest first. Exact for what `draw_scene` draws, else a
    best guess. Each connected patch of colour is read as `read_shape` reads its one shape."""
    image = image.astype(np.float64)
    (height, width), chroma = image.shape[:2], np.ptp(image, axis=-1)
    names, palette = list(COLOURS), np.array(list(COLOURS.values()), dtype=np.float64)
    y, x = np.mgrid[:height, :width] + 0.5
    left, found = chroma > 30, []
    while left.any():
        patch = np.zeros_like(left)
        patch.flat[left.argmax()] = True
        while (grown := _grow(patch) & left).sum() > patch.sum():
            patch = grown
        left &= ~patch
        inside = patch & (chroma >= 0.7 * np.quantile(chroma[patch], 0.9))
        nearest = int(((palette - image[inside].mean(0)) ** 2).sum(1).argmin())
        alpha = np.where(_grow(patch), np.clip(chroma / np.ptp(palette[nearest]), 0, 1), 0)
        area = alpha.sum()
        if area < 0.002 * height * width:                    # a speck
            continue
        cx, cy = (alpha * x).sum() / area, (alpha * y).sum() / area
        radii = [(area / AREA[kind]) ** 0.5 for kind in KINDS]
        errors = [((coverage(kind, x - cx, y - cy, radius) - alpha) ** 2).sum()
                  for kind, radius in zip(KINDS, radii)]
        best = int(np.argmin(errors))
        size = "small" if radii[best] < 0.162 * min(height, width) else "large"
        found.append((area, Thing(names[nearest], KINDS[best], size, cx / width, cy / height)))
    return [thing for _, thing in sorted(found, key=lambda pair: -pair[0])]


def _grow(mask: np.ndarray) -> np.ndarray:
    """The mask and its eight neighbours."""
    padded = np.pad(mask, 1)
    rows = padded[:-2] | padded[1:-1] | padded[2:]
    return rows[:, :-2] | rows[:, 1:-1] | rows[:, 2:]


def score_scene(scene: Scene, image: np.ndarray) -> dict[str, bool]:
    """Which of colour, kind, size and place (one shape) or relation (two) a picture gets right; all of them
    False where it shows another number of shapes. "all" is every one of them."""
    seen, asked = read_scene(image), list(scene.things)
    parts = ["colour", "kind", "size", "relation" if scene.relation else "place"]
    if len(seen) != len(asked):
        return dict.fromkeys([*parts, "all"], False)
    if scene.relation:          # the two as they lie: the first is the one that the relation makes first
        dx, dy = RELATIONS[scene.relation]
        seen.sort(key=lambda thing: -(dx * thing.x + dy * thing.y))
        apart = [dx * (seen[0].x - seen[1].x) + dy * (seen[0].y - seen[1].y),
                 dy * (seen[0].x - seen[1].x) + dx * (seen[0].y - seen[1].y)]
        as_asked = [(thing.colour, thing.kind) for thing in seen] == [(t.colour, t.kind) for t in asked]
        result = {"relation": as_asked and apart[0] > abs(apart[1])}
        pairs = zip(seen, asked)
        if not as_asked and [(t.colour, t.kind) for t in seen[::-1]] == [(t.colour, t.kind) for t in asked]:
            pairs = zip(seen[::-1], asked)          # the right things in the wrong order
        pairs = list(pairs)
    else:
        pairs = list(zip(seen, asked))
        result = {"place": seen[0].place == asked[0].place}
    result |= {part: all(getattr(a, part) == getattr(b, part) for a, b in pairs)
               for part in ("colour", "kind", "size")}
    return {part: result[part] for part in parts} | {"all": all(result.values())}


@functools.lru_cache(maxsize=2)
def load_shapes(split: str, size: tuple[int, int], count: int) -> Dataset:
    # The sequence is infinite: validation is a part that training never reaches.
    first = 0 if split == "train" else 10**9
    first -= first % len(SHAPE_CLASSES)
    images = np.stack([draw_shape(first + i, size) for i in range(count)])
    labels = np.arange(count) % len(SHAPE_CLASSES)
    return Dataset(images, labels, SHAPE_CLASSES, _digest("shapes", split, images, labels))


@functools.lru_cache(maxsize=2)
def load_scenes(split: str, size: tuple[int, int], count: int) -> Dataset:
    first = 0 if split == "train" else 10**9
    scenes = [describe_scene(first + i) for i in range(count)]
    images = np.stack([draw_scene(scene, first + i, size) for i, scene in enumerate(scenes)])
    captions = [scene.caption for scene in scenes]
    return Dataset(images, None, [], _digest("scenes", split, images), captions, vary=omit_details)


def omit_details(caption: str, rng: np.random.Generator) -> str:
    """A scene's caption with each detail left out one time in seven: a size, a colour, a place; for a kind it
    then says "shape". So a word is also learnt alone, not only beside those that training has it with."""
    what, *where = re.split(" (?=at the |in the )", caption)
    words = []
    for word in what.split():
        if word in (*SIZES, *COLOURS, *KINDS) and rng.random() < 1 / 7:
            word = "shape" if word in KINDS else ""
        words += [word] * bool(word)
    return " ".join(words + [place for place in where if rng.random() >= 1 / 7])


# ------------------------------------------------------------------------------------------------------------
# emoji: every character of a colour font, captioned by its Unicode name

EMOJI_FONTS = ["/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf",          # Debian: fonts-noto-color-emoji
               "/usr/share/fonts/noto/NotoColorEmoji.ttf",
               "/usr/share/fonts/google-noto-emoji/NotoColorEmoji.ttf",
               "/System/Library/Fonts/Apple Color Emoji.ttc", "C:/Windows/Fonts/seguiemj.ttf"]


def find_emoji_font(data_dir: Path) -> Path:
    candidates = [*sorted(data_dir.glob("*[eE]moji*.tt[fc]")), *map(Path, EMOJI_FONTS)]
    if font := next((path for path in candidates if path.is_file()), None):
        return font
    raise ValueError(f"--data emoji: no colour font in {data_dir} or the usual places; install one (Debian: "
                     "apt install fonts-noto-color-emoji), or name by --data-dir a folder that has "
                     "NotoColorEmoji.ttf")


def open_emoji_font(path: Path) -> ImageFont.FreeTypeFont:
    for pixels in (109, 160, 137, 136, 128, 96, 64):       # a font of bitmaps has a few sizes only
        try:
            return ImageFont.truetype(str(path), pixels, layout_engine=ImageFont.Layout.BASIC)
        except OSError:
            continue
    raise ValueError(f"{path}: not a font that Pillow can open at any usual size of emoji")


@functools.lru_cache(maxsize=2)
def render_emoji(path: Path, size: tuple[int, int]) -> tuple[np.ndarray, list[str]]:
    """(N, H, W, 3) uint8 pictures on white and their names in lower case: every single character that has a
    name and, in this font, a coloured picture of its own. No blanks, no duplicates, no modifiers."""
    font, tiles = open_emoji_font(path), []
    for character in map(chr, range(0xA9, 0x20000)):
        name, category = unicodedata.name(character, None), unicodedata.category(character)
        if name is None or category[0] in "LM" or category in ("Cf", "Sk"):
            continue
        left, top, right, bottom = font.getbbox(character)
        if right <= left or bottom <= top:
            continue
        tile = Image.new("RGBA", (right - left, bottom - top))
        ImageDraw.Draw(tile).text((-left, -top), character, font=font, embedded_color=True)
        if box := tile.getchannel("A").getbbox():
            tiles.append((name.lower(), tile.crop(box)))
    side, found = max((max(tile.size) for _, tile in tiles), default=0), {}
    for name, tile in tiles:
        square = Image.new("RGBA", (side, side), "white")
        square.alpha_composite(tile, ((side - tile.width) // 2, (side - tile.height) // 2))
        picture = np.asarray(ImageOps.pad(square.convert("RGB"), size[::-1], Image.Resampling.LANCZOS,
                                          color="white"))
        if picture.min() < 240:                            # no blank
            found.setdefault(picture.tobytes(), (name, picture))
    if not found:
        raise ValueError(f"{path}: no emoji in this font that Pillow can draw")
    names, images = zip(*found.values())
    return np.stack(images), list(names)


def load_emoji(split: str, size: tuple[int, int], data_dir: Path) -> Dataset:
    """Every 20th validates."""
    images, names = render_emoji(find_emoji_font(data_dir), size)
    chosen = np.flatnonzero((np.arange(len(names)) % 20 == 0) == (split != "train"))
    images, names = images[chosen], [names[i] for i in chosen]
    return Dataset(images, None, [], _digest("emoji", split, images), names, vary=vary_caption)


def vary_caption(caption: str, rng: np.random.Generator) -> str:
    """One time in two as it is; else its words in another order, or some of them, at least one."""
    words = caption.split()
    if rng.random() < 0.5 or len(words) < 2:
        return caption
    if rng.random() < 0.5:
        return " ".join(rng.permutation(words))
    keep = rng.random(len(words)) < 0.6
    keep[rng.integers(len(words))] = True
    return " ".join(word for word, kept in zip(words, keep) if kept)


# ------------------------------------------------------------------------------------------------------------
# published data sets, from --data-dir, the system, or the network

MIRRORS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "cifar10": "https://www.cs.toronto.edu/~kriz/",
}
MD5 = {
    "mnist/train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "mnist/train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "mnist/t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "mnist/t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    "fashion-mnist/train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "fashion-mnist/train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "fashion-mnist/t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "fashion-mnist/t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    "cifar10/cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
}


def find_file(source: str, name: str, data_dir: Path) -> Path:
    """The file in data_dir (packed or not, there or in data_dir/source), where Debian puts it, or downloaded
    and checked."""
    for folder in (data_dir, data_dir / source, Path("/usr/share/datasets") / source):
        for candidate in (folder / name, folder / name.removesuffix(".gz")):
            if candidate.is_file():
                return candidate
    target, partial = data_dir / source / name, data_dir / source / (name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(MIRRORS[source] + name, timeout=30) as reply, open(partial, "wb") as out:
            total = int(reply.headers.get("Content-Length", 0)) or None
            with tqdm(desc=f"download {name}", total=total, unit="B", unit_scale=True) as bar:
                while chunk := reply.read(1 << 16):
                    bar.update(out.write(chunk))
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"{name} of {source} is not in {data_dir} and cannot be downloaded from "
                         f"{MIRRORS[source]} ({error}); put the file there or name its folder with --data-dir"
                         ) from None
    if (found := hashlib.md5(partial.read_bytes()).hexdigest()) != MD5[f"{source}/{name}"]:
        partial.unlink()
        raise ValueError(f"{MIRRORS[source]}{name}: MD5 {found} is not {MD5[f'{source}/{name}']}; "
                         "the download was dropped")
    partial.replace(target)
    return target


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file (LeCun's format: two zero bytes, 8 = uint8, rank, big-endian sizes, data)."""
    try:
        raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(raw, ">u4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (ValueError, IndexError, EOFError, OSError) as error:
        raise ValueError(f"{path}: damaged or not an IDX file ({error}); "
                         "delete it to have it downloaded again") from None


def _resize(images: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """uint8 (N, h, w, C) -> (N, H, W, C), scaled to cover and cropped in the centre; as it is if it fits."""
    if images.shape[1:3] == tuple(size):
        return images
    return np.stack([np.asarray(ImageOps.fit(
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image), size[::-1],
        Image.Resampling.BICUBIC)).reshape(*size, -1) for image in images])


def load_mnist(source: str, split: str, size: tuple[int, int], data_dir: Path) -> Dataset:
    part = "train" if split == "train" else "t10k"
    images = read_idx(find_file(source, f"{part}-images-idx3-ubyte.gz", data_dir))
    labels = read_idx(find_file(source, f"{part}-labels-idx1-ubyte.gz", data_dir)).astype(np.int64)
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]   # 28 -> 32, so that powers of two divide it
    classes = FASHION if source == "fashion-mnist" else [str(digit) for digit in range(10)]
    return Dataset(_resize(images, size), labels, classes, _digest(source, split, size, images, labels))


def load_cifar10(split: str, size: tuple[int, int], data_dir: Path) -> Dataset:
    path = find_file("cifar10", "cifar-10-binary.tar.gz", data_dir)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] if split == "train" else ["test_batch.bin"]
    try:
        with tarfile.open(path) as tar:
            raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names)
        rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)
    except (KeyError, ValueError, EOFError, OSError, tarfile.TarError) as error:
        raise ValueError(f"{path}: damaged or not CIFAR-10's binary version ({error}); "
                         "delete it to download again") from None
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = rows[:, 0].astype(np.int64)
    return Dataset(_resize(images, size), labels, CIFAR10, _digest("cifar10", split, size, images, labels))


# ------------------------------------------------------------------------------------------------------------
# a folder of any pictures

def open_image(path: Path, size: tuple[int, int]) -> np.ndarray:
    """Any picture that Pillow opens -> uint8 (H, W, 3): turned as its EXIF says, transparency on white,
    scaled to cover `size` and cropped in the centre. Raises OSError or ValueError for a file that cannot be
    decoded."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I") or image.mode == "F":      # 16 and 32 bits: convert() would clip at 255
            values = np.asarray(image, dtype=np.float64)
            top = 65535.0 if image.mode.startswith("I") and values.max() <= 65535 else max(values.max(), 1e-9)
            image = Image.fromarray(np.round(np.clip(values / top, 0, 1) * 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.LANCZOS))


def list_folder(folder: Path) -> tuple[list[Path], list[int] | None, list[str]]:
    """Pictures of a flat folder (labels None) or of a folder of class folders, in sorted order."""
    endings = {e for e, fmt in Image.registered_extensions().items() if fmt in Image.OPEN}
    if not folder.is_dir():
        raise ValueError(f"--data {folder}: neither a built-in source ({', '.join(BUILT_IN)}) nor "
                         "a folder")
    pictures = sorted(p for p in folder.rglob("*") if p.suffix.lower() in endings and p.is_file())
    flat = [p for p in pictures if p.parent == folder]
    if not pictures:
        raise ValueError(f"--data {folder}: no pictures in this folder "
                         "(looked for files that Pillow opens, such as .png, .jpg)")
    if flat and len(flat) < len(pictures):
        raise ValueError(f"--data {folder}: {flat[0].name} lies beside class folders; "
                         "use a flat folder or class folders, not both")
    if flat:
        return flat, None, []
    names = [p.relative_to(folder).parts[0] for p in pictures]
    index = {name: i for i, name in enumerate(sorted(set(names)))}
    return pictures, [index[name] for name in names], list(index)


def clean(text: str) -> str:
    """One line of valid Unicode, with single spaces: how captions and prompts enter."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def read_captions(folder: Path, paths: list[Path]) -> list[str] | None:
    """One a picture: from a metadata.jsonl in any of the folders, lines of {"file_name": ..., "text": ...},
    or from NAME.txt beside it. None where no picture has one; raises ValueError where some have not."""
    table = {}
    for metadata in sorted(folder.rglob("metadata.jsonl")):
        for number, line in enumerate(metadata.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else None
                table |= {metadata.parent / row["file_name"]: clean(row["text"])} if row else {}
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{metadata}, line {number}: not an object with file_name and text"
                                 ) from None
    asked = bool(table)
    for path in paths:
        beside = path.with_suffix(".txt")
        if path not in table and beside.is_file():
            try:
                table[path] = clean(beside.read_text("utf-8-sig"))
            except UnicodeDecodeError:
                raise ValueError(f"{beside}: not in UTF-8; save it so") from None
    missing = [path for path in paths if path not in table]
    if missing and (asked or len(missing) < len(paths)):
        raise ValueError(f"--data {folder}: {len(missing)} of {len(paths)} pictures have no caption, such as "
                         f"{missing[0]}; write one into {missing[0].with_suffix('.txt').name} beside it, or "
                         "into metadata.jsonl")
    return None if missing else [table[path] for path in paths]


def find_words(source: str, words: str | None) -> list[str] | None:
    """What goes with each picture of a folder, in the order of `list_folder`, before any is decoded: the
    captions, the files of "embeddings", or None where there are names of classes only, or nothing is asked.
    Raises ValueError with one line for the user where pictures have no words."""
    if source in BUILT_IN and words == "embeddings":
        raise ValueError(f"--text-encoder none with --data {source}: it has no .npz files of vectors; give a "
                         "folder that has")
    if source in BUILT_IN or words is None:
        return None
    paths, labels, _ = list_folder(Path(source))
    if words == "captions":
        captions = read_captions(Path(source), paths)
        if captions is None and labels is None:
            raise ValueError(f"--data {source}: pictures without words; put NAME.txt beside each, or "
                             "metadata.jsonl with file_name and text")
        return captions
    files = [str(path.with_suffix(".npz")) for path in paths]
    if missing := [file for file in files if not Path(file).is_file()]:
        raise ValueError(f"--data {source}: no {missing[0]} beside its picture, as --text-encoder none needs")
    return files


def read_embeddings(files: list[str]) -> dict[str, Tensor]:
    """Text vectors that another program has computed: .npz files of context (L, D), mask (L,) if some rows
    are padding, pooled (P,) if there is one; "" is a single vector of zeros. -> context (B, L, D), mask
    (B, L) and perhaps pooled (B, P), as a TextEncoder gives them."""
    found = {}
    for file in filter(None, dict.fromkeys(files)):
        try:
            with np.load(file) as arrays:
                context = torch.from_numpy(arrays["context"].astype(np.float32))
                mask = torch.from_numpy(arrays["mask"].astype(bool)) if "mask" in arrays else slice(None)
                pooled = torch.from_numpy(arrays["pooled"].astype(np.float32)) if "pooled" in arrays else None
            if context[mask].ndim != 2 or not len(context[mask]):
                raise ValueError("context must be of shape (L, D)")
            found[file] = context[mask], pooled
        except Exception as error:
            raise ValueError(f"{file}: not an .npz with context (L, D), and perhaps mask (L,) and pooled "
                             f"(P,) ({type(error).__name__})") from None
    zeros = tuple(None if part is None else torch.zeros_like(part) for part in next(iter(found.values())))
    rows = [found[file] if file else (zeros[0][:1], zeros[1]) for file in files]
    if len({(context.shape[1:], None if pooled is None else pooled.shape) for context, pooled in rows}) > 1:
        raise ValueError(f"{files[-1]} and others: their vectors differ in width, or only some have pooled")
    return pad_context([context for context, _ in rows],
                       None if zeros[1] is None else torch.stack([pooled for _, pooled in rows]))


def pad_context(rows: list[Tensor], pooled: Tensor | None) -> dict[str, Tensor]:
    """(L, D) each -> context (B, L, D), 0 where padded, and its mask (B, L); and pooled if there is one."""
    lengths = torch.tensor([len(row) for row in rows])
    mask = torch.arange(lengths.max()) < lengths[:, None]
    cond = {"context": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True), "mask": mask}
    return cond if pooled is None else cond | {"pooled": pooled}


def load_folder(folder: Path, split: str, size: tuple[int, int], cache_dir: Path,
                captions: list[str] | None = None) -> Dataset:
    """Decode once into cache_dir, memory-mapped from then on. Every 20th picture (at most 256) validates.
    captions: of every picture, as `find_words` gives them."""
    paths, labels, classes = list_folder(folder)
    stats = [(str(p.relative_to(folder)), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    fingerprint = _digest("folder", size, stats)
    stamp_path, array_path = cache_dir / "images.json", cache_dir / "images.npy"
    with locked(cache_dir / "images.lock", wait=True):
        if _read_stamp(stamp_path).get("fingerprint") != fingerprint or not array_path.is_file():
            keep, partial = [], cache_dir / "images.npy.part"
            store = _new_array(partial, np.uint8, (len(paths), *size, 3))
            for i, path in enumerate(tqdm(paths, desc="decode pictures", unit="img")):
                try:
                    store[len(keep)] = open_image(path, size)
                    keep.append(i)
                except Exception as error:   # Pillow raises a dozen kinds; each means: skip this file
                    tqdm.write(f"skipped {path}: {type(error).__name__}: {error}", file=sys.stderr)
            store.flush()
            del store                        # Windows renames no file that is still mapped
            if not keep:
                partial.unlink()
                raise ValueError(f"--data {folder}: none of its {len(paths)} pictures can be decoded")
            stamp_path.unlink(missing_ok=True)
            partial.replace(array_path)
            _write_stamp(stamp_path, {"fingerprint": fingerprint, "keep": keep})
        keep = np.array(_read_stamp(stamp_path)["keep"])
        images = np.load(array_path, mmap_mode="r")[: len(keep)]
    held_out = np.arange(len(keep))[::20][:256]
    chosen = held_out if split != "train" or len(keep) == 1 else np.setdiff1d(np.arange(len(keep)), held_out)
    if split == "train":
        # A gather would read the whole file into memory: index through the map instead.
        images = _Rows(images, chosen)
    else:
        images = images[chosen]
    chosen_labels = np.array(labels)[keep][chosen] if labels is not None else None
    captions = [captions[keep[i]] for i in chosen] if captions else None
    return Dataset(images, chosen_labels, classes, _digest(fingerprint, split), captions)


class _Rows:
    """`array[rows]` that reads only the rows asked for."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array, self.rows, self.shape = array, rows, (len(rows), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:
        return self.array[self.rows[index]]


def load_data(source: str, split: str, size: tuple[int, int] | None, data_dir: Path, cache_dir: Path,
              count: int = 20_000, words: str | None = None) -> Dataset:
    """The training or validation part ("train", "val") of a source at `size` = (H, W), by default 32 x 32.

    `words`: None; "captions", which are the names of the classes where a source has nothing else; or
    "embeddings": captions are then the .npz files beside a folder's pictures. `count` is how many `shapes`
    are drawn for training. Raises ValueError with one line for the user."""
    size = tuple(size or (32, 32))
    captions = find_words(source, words)
    if source == "shapes":
        load = load_scenes if words else load_shapes
        data = load(split, size, count if split == "train" else 480)
    elif source == "emoji":
        data = load_emoji(split, size, data_dir)
    elif source in ("mnist", "fashion-mnist"):
        data = load_mnist(source, split, size, data_dir)
    elif source == "cifar10":
        data = load_cifar10(split, size, data_dir)
    else:
        data = load_folder(Path(source), split, size, cache_dir, captions)
    if words == "captions" and data.captions is None:
        data = replace(data, captions=[data.classes[label].replace("-", " ") for label in data.labels])
    return data


# ------------------------------------------------------------------------------------------------------------
# latents

class LatentCache:
    """What the encoder says of every picture, encoded once: float16 (N, flips, 2, C, h, w) on disk, 2 = mean
    and standard deviation, so that each step draws a fresh z ~ q(z|x); flips = 2 keeps the mirrored picture's
    own latent as well.

    Stamped with the VAE's and the data's fingerprint: a cache with any other stamp is rebuilt, never used."""

    def __init__(self, path: Path, vae, vae_fingerprint: str, data: Dataset, flip: bool,
                 device: torch.device | str = "cpu"):
        h, w = data.images.shape[1] // vae.factor, data.images.shape[2] // vae.factor
        shape = (len(data), 1 + flip, 2, vae.config.latent_channels, h, w)
        stamp = {"vae": vae_fingerprint, "data": data.fingerprint, "shape": list(shape)}
        stamp_path = path.with_suffix(".json")
        size = int(np.prod(shape)) * 2
        with locked(path.with_suffix(".lock"), wait=True):
            found = _read_stamp(stamp_path)
            if found != stamp or not path.is_file() or path.stat().st_size < size:
                if found:
                    print(f"{path} was made from another VAE or other data: rebuilding it")
                self._build(path, vae, data, shape, device)
                _write_stamp(stamp_path, stamp)
            self.latents, self.labels = np.load(path, mmap_mode="r"), data.labels

    def _build(self, path: Path, vae, data: Dataset, shape: tuple[int, ...], device) -> None:
        path.with_suffix(".json").unlink(missing_ok=True)
        partial = path.with_suffix(".part")
        store = _new_array(partial, np.float16, shape)
        try:
            for batch in tqdm(batches(data.images.shape), desc="encode latents", unit="batch"):
                x = to_tensor(data.images[np.array(batch)]).to(device)
                for f in range(shape[1]):
                    with torch.no_grad():
                        posterior = vae.encode(x.flip(-1) if f else x)
                    store[batch.start:batch.stop, f, 0] = posterior.mean.cpu().numpy()
                    store[batch.start:batch.stop, f, 1] = posterior.std.cpu().numpy()
            store.flush()
            del store                        # Windows renames no file that is still mapped
            partial.replace(path)
        except BaseException:
            store = None                     # unmapped, so that Windows lets it go
            partial.unlink(missing_ok=True)
            raise

    def __len__(self) -> int:
        return len(self.latents)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Per-channel mean and variance (C,) of z ~ q(z|x) over all pictures and pixels, in float64."""
        first, second = 0.0, 0.0
        for i in range(0, len(self), 1024):
            # each (C, N, flips, h, w)
            mean, std = self.latents[i:i + 1024].astype(np.float64).transpose(2, 3, 0, 1, 4, 5)
            first = first + mean.reshape(len(mean), -1).sum(1)
            second = second + (mean**2 + std**2).reshape(len(mean), -1).sum(1)
        count = self.latents.size / (2 * self.latents.shape[3])
        mean = first / count
        return torch.from_numpy(mean), torch.from_numpy(second / count - mean**2)

    def batch(self, indices: np.ndarray,
              generator: torch.Generator | None = None) -> tuple[Tensor, Tensor | None]:
        """Raw latents (B, C, h, w) float32, freshly drawn from the posterior with a random flip each, and
        labels (B,)."""
        flip = torch.randint(self.latents.shape[1], (len(indices),), generator=generator)
        mean, std = torch.from_numpy(self.latents[indices, flip.numpy()]).float().unbind(1)
        z = mean + std * torch.randn(mean.shape, generator=generator)
        return z, None if self.labels is None else torch.from_numpy(self.labels[indices])


class TextCache:
    """What a frozen encoder says of every distinct prompt, and of "", encoded once; called like a
    TextEncoder.

    On disk: every real row of every context, one after another, float16 (rows, D) without a header; which
    rows are whose, and the pooled vectors, in an .npz. Stamped with the fingerprints of encoder and
    prompts."""

    def __init__(self, path: Path, prompts: list[str], encode: Callable[[list[str]], dict[str, Tensor]],
                 encoder_fingerprint: str, device: torch.device | str = "cpu"):
        prompts = sorted({"", *prompts})
        stamp = {"encoder": encoder_fingerprint, "prompts": _digest(prompts)}
        stamp_path, index = path.with_suffix(".json"), path.with_suffix(".npz")
        with locked(path.with_suffix(".lock"), wait=True):
            size = path.stat().st_size if path.is_file() else None
            if _read_stamp(stamp_path) != stamp | {"bytes": size} or not index.is_file():
                stamp_path.unlink(missing_ok=True)
                self._build(path, index, prompts, encode)
                _write_stamp(stamp_path, stamp | {"bytes": path.stat().st_size})
            arrays = np.load(index)
            self.ends, self.pooled = arrays["ends"], arrays["pooled"] if "pooled" in arrays else None
            self.rows = np.memmap(path, np.float16, "r").reshape(self.ends[-1], -1)
        self.index, self.device = {prompt: i for i, prompt in enumerate(prompts)}, device

    @staticmethod
    def _build(path: Path, index: Path, prompts: list[str], encode) -> None:
        lengths, pooled, widths, partial = [0], [], None, path.with_suffix(".part")
        try:
            with open(partial, "wb") as out:
                for i in tqdm(range(0, len(prompts), 64), desc="encode prompts", unit="batch"):
                    cond = encode(prompts[i:i + 64])
                    here = [cond[name].shape[-1] for name in ("context", "pooled") if name in cond]
                    if here != (widths := widths or here):
                        raise ValueError(f"{prompts[i]} or one of the next: text vectors of widths {here}, "
                                         f"not {widths} as of those before")
                    if not (cond["context"].abs() < 65504).all():
                        raise ValueError(f"{prompts[i]} or one of the next: text vectors that are not finite "
                                         "numbers below 65504, which float16 holds")
                    for row, mask in zip(cond["context"], cond["mask"]):
                        out.write(row[mask].half().cpu().numpy().tobytes())
                        lengths.append(int(mask.sum()))
                    pooled += [cond["pooled"].float().cpu().numpy()] if "pooled" in cond else []
            np.savez(index, ends=np.cumsum(lengths), **({"pooled": np.concatenate(pooled)} if pooled else {}))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    @property
    def widths(self) -> tuple[int, int | None]:
        """Of context and of pooled."""
        return self.rows.shape[1], None if self.pooled is None else self.pooled.shape[1]

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """-> context (B, L, D), mask (B, L), and pooled (B, P) where the encoder has one."""
        chosen = [self.index[prompt] for prompt in prompts]
        rows = [torch.from_numpy(self.rows[self.ends[i]:self.ends[i + 1]].astype(np.float32)) for i in chosen]
        cond = pad_context(rows, None if self.pooled is None else torch.from_numpy(self.pooled[chosen]))
        return {name: send(part, self.device) for name, part in cond.items()}


def _new_array(path: Path, dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped array in a new file. Its room is claimed at once: a map that meets a full disk later
    kills the process."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(28, "No space left on device")
        array = np.lib.format.open_memmap(path, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):
            with open(path, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} of {size / 2**20:.0f} MiB: {error.strerror}") from None
    return array


def _digest(*parts) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(np.ascontiguousarray(part) if isinstance(part, np.ndarray) else repr(part).encode())
    return digest.hexdigest()[:32]


def fingerprint_tensors(tensors: dict[str, Tensor]) -> str:
    """A name for these very weights."""
    return _digest(*(part for name in sorted(tensors)
                     for part in (name, tensors[name].detach().cpu().numpy())))


def fingerprint_files(folder: Path, pattern: str) -> str:
    """A name for the files of a folder, wherever that lies: their names, sizes and last 4 KiB, which in an
    archive are its checksums."""
    parts = []
    for file in sorted(path for path in folder.rglob(pattern) if path.is_file()):
        with open(file, "rb") as content:
            size = content.seek(0, os.SEEK_END)
            content.seek(max(0, size - 4096))
            parts.append((str(file.relative_to(folder)), size, hashlib.sha256(content.read()).hexdigest()))
    return _digest(parts)


def _read_stamp(path: Path) -> dict:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _write_stamp(path: Path, stamp: dict) -> None:
    partial = path.with_name(path.name + ".part")
    partial.write_text(json.dumps(stamp))
    os.replace(partial, path)


def grid(images: np.ndarray, columns: int | None = None, pad: int = 2,
         captions: list[str] | None = None) -> Image.Image:
    """uint8 (N, H, W, C) -> one picture, row by row, on white; captions stand below pictures enlarged for
    them."""
    if captions:
        zoom = -(-112 // images.shape[2])
        images = images.repeat(zoom, 1).repeat(zoom, 2).repeat(4 - images.shape[3], 3)
        lines = [textwrap.wrap(caption, images.shape[2] // 6) for caption in captions]
        strip = 13 * max(map(len, lines)) + 3
        images = np.pad(images, ((0, 0), (0, strip), (0, 0), (0, 0)), constant_values=255)
    n, h, w, c = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    canvas = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, c), 255, np.uint8)
    corners = [(pad + i // columns * (h + pad), pad + i % columns * (w + pad)) for i in range(n)]
    for image, (top, left) in zip(images, corners):
        canvas[top:top + h, left:left + w] = image
    picture = Image.fromarray(canvas[..., 0] if c == 1 else canvas)
    if captions:
        pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
        for text, (top, left) in zip(lines, corners):
            for i, line in enumerate(text):
                pen.text((left, top + h - strip + 13 * i), line, "black", font)
    return picture


if __name__ == "__main__":
    pictures = np.stack([draw_shape(i) for i in range(2400)])
    right = [f"{colour}-{kind}" == SHAPE_CLASSES[i % 24]
             for i, (colour, kind) in enumerate(map(read_shape, pictures))]
    grid(pictures[:96], 24).resize((24 * 68, 4 * 68), Image.Resampling.NEAREST).save("shapes.png")
    print(f"shapes.png written; {sum(right)} of {len(right)} pictures read back as drawn")
