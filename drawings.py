"""Captioned pictures that Debian packages: clip art of openclipart.org, stamps of Tux Paint.

    python drawings.py                    # lists, cleans and splits a small collection of the same layout
    python train.py --arch mmdit --objective rf --data clipart --image-size 64

A collection is a row of COLLECTIONS: the packages that it is in, where they put it, and how its captions are
read. Each picture is cropped to what it shows and put on white as a whole, decoded once (decoded.py). Links,
duplicates and pictures that show next to nothing are left out. Validation has every 20th group of pictures
that look or are called alike, so that no near copy of its pictures is trained on.
"""

from __future__ import annotations

import functools
import html
import os
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

from decoded import Whole, open_decoded
from files import counted, digest, shortened
from folder import Files, Folder, Rows, clean_text, natural
from pictures import Size
from ragged import Strings

SYSTEM = Path("/usr/share")
COPY = 4.0          # grey levels, root mean square over SIDE x SIDE pixels: pictures nearer are the same
ALIKE = 16.0        # likewise: pictures nearer are not on both sides of the split
SIDE = 16
LARGEST_GROUP = 20  # a larger one would take more of the pictures than validation should have
SHARED = 3          # a title of more pictures than this names a collection


# ---- captions

class Listed(NamedTuple):
    """Names of picture files, relative to their folder, with captions; and what was left out, and why."""
    path: Path
    names: list[str]
    captions: list[str]
    left_out: dict[str, int]


def clean_caption(text: str) -> str:
    """Lower case, words apart, without the numbers at the end by which files of one kind are told apart.

    "BlueMan#211" -> "blue man", "Clipart by Ann Onymous - note_03" -> "note"."""
    text = html.unescape(html.unescape(text))               # some titles are escaped twice
    text = re.sub(r"(?i)^\s*clip ?art by [^-]*-\s", "", clean_text(text))
    text = re.sub(r"(?<=[a-z])(?=[A-Z][a-z])", " ", text)   # words that are told apart by capitals
    text = re.sub(r"[^\w'&%$+.,!?-]|_|(?<!\w)-|-(?!\w)", " ", text.lower().replace("’", "'"))
    words = [word for word in text.replace(".svg", "").split() if re.search(r"[^\W_]|&", word)]
    while len(words) > 1 and re.fullmatch(r"[(#]?\d[\w.]*", words[-1]):
        words.pop()
    if words:
        words[-1] = re.sub(r"(?<=[^\W\d])[-.]?\d+$", "", words[-1]).rstrip(".,!?-")
    return " ".join(word for word in words if word)


def without_author(stem: str, author: str) -> str:
    """The stem of a file name "title_author_01", without the author, whose name may be truncated."""
    words = (re.sub(r"([_.-]*\d+)*[_.]*$|_\d+[a-z]$", "", stem) or stem).replace("_", " ").split()
    name = re.sub(r"[^a-z]", "", author.lower())
    for start in range(1, len(words)):
        end = re.sub(r"[^a-z]", "", "".join(words[start:]).lower())
        if end == name or (name.startswith(end) and len(end) > 3):
            return " ".join(words[:start])
    return " ".join(words)


def title_and_author(content: str) -> tuple[str, str]:
    """From an SVG's metadata; empty where it does not name them."""
    title = r"<dc:title\b[^>]*>([^<]*)</dc:title>"
    creator = re.search(rf"<dc:creator\b.*?{title}.*?</dc:creator>", content, re.S)
    # Authors and publishers have titles too; the one outside of them is the picture's.
    work = re.search(title, re.sub(r"<cc:Agent\b.*?</cc:Agent>", "", content, flags=re.S))
    found = [clean_text(html.unescape(part.group(1))) if part else "" for part in (work, creator)]
    return found[0], found[1]


def list_clipart(path: Path) -> Listed:
    """Pictures in path/png, with their titles from path/svg. Titles that many pictures share are of whole
    collections; then, and where there is none, the file's name serves."""
    png, svg = path / "png", path / "svg"
    names, links = _pictures_in(png)
    titles, authors = [], []
    for name in names:
        try:
            content = (svg / name).with_suffix(".svg").read_text("utf-8", "replace")
        except OSError:
            content = ""
        title, author = title_and_author(content)
        titles.append(clean_caption(title))
        authors.append(author)
    shared = Counter(titles)
    captions = []
    for name, title, author in zip(names, titles, authors):
        *_, folder, stem = Path("pictures", name).with_suffix("").parts
        stem = clean_caption(without_author(stem, author))
        if not re.search(r"[^\W\d_]{3}", stem):        # a number, or letters that stand for something
            stem = clean_caption(f"{folder} {stem}")
        captions.append(title if title and shared[title] <= SHARED else stem)
    return _with_captions(png, names, captions, {"links": links})


def list_stamps(path: Path) -> Listed:
    """Pictures with a caption in English, the first line of the .txt beside each. Pillow reads no SVG."""
    names, links = _pictures_in(path)
    vectors = sum(1 for file in path.rglob("*.svg"))
    captions = []
    for name in names:
        try:
            with (path / name).with_suffix(".txt").open(encoding="utf-8", errors="replace") as file:
                captions.append(clean_caption(file.readline()))
        except OSError:
            captions.append("")
    return _with_captions(path, names, captions, {"links": links, "SVG files": vectors})


def _pictures_in(path: Path) -> tuple[list[str], int]:
    """The names of the PNG files in a folder and those within it, in order, and how many more are links."""
    files = [Path(folder, name) for folder, _, names in os.walk(path) for name in names
             if name.lower().endswith(".png")]
    names = [file.relative_to(path).as_posix() for file in files if not file.is_symlink()]
    return sorted(names, key=natural), len(files) - len(names)


def _with_captions(path: Path, names: list[str], captions: list[str], left_out: dict[str, int]) -> Listed:
    keep = [i for i, caption in enumerate(captions) if caption]
    left_out["without a caption"] = len(names) - len(keep)
    return Listed(path, [names[i] for i in keep], [captions[i] for i in keep], left_out)


# ---- the table of collections

class Collection(NamedTuple):
    """One row."""
    packages: str                       # of Debian
    places: tuple[str, ...]             # where it may be, in --data-dir and in /usr/share
    parts: tuple[str, ...]              # folders that are there, by which a place is known
    read: Callable[[Path], Listed]
    about: str                          # what it is, and its licence


COLLECTIONS = {
    "clipart": Collection("openclipart-png openclipart-svg", ("openclipart", "clipart", "."), ("png", "svg"),
                          list_clipart, "drawings of openclipart.org, in the public domain"),
    "stamps": Collection("tuxpaint-stamps-default", ("tuxpaint/stamps", "stamps"), (".",),
                         list_stamps, "stamps of Tux Paint, under the GPL, version 2"),
}


def find_collection(name: str, data_dir: Path) -> Path:
    """The folder of a collection. Raises ValueError with one line where it is nowhere."""
    row = COLLECTIONS[name]
    for base in (data_dir, SYSTEM):
        for place in row.places:
            if all((base / place / part).is_dir() for part in row.parts):
                return base / place
    folders = " and ".join(f"{row.places[0]}/{part}".removesuffix("/.") for part in row.parts)
    raise ValueError(f"--data {name}: not found in {data_dir} or {SYSTEM}; install it (Debian: apt install "
                     f"{row.packages}), or name by --data-dir a folder that has {folders}")


# ---- from a collection to pictures

class Drawings(NamedTuple):
    images: np.ndarray          # (M, H, W, 3) uint8, memory-mapped; more rows than are used
    rows: np.ndarray            # (N,) of those that are used
    captions: list[str]         # (N,)
    held_out: np.ndarray        # (N,) bool: for validation
    fingerprint: str

    def part(self, split: str) -> tuple[Rows | np.ndarray, list[str], str]:
        """Pictures, captions and fingerprint of "train" or "val"."""
        chosen = np.flatnonzero(self.held_out == (split != "train"))
        images = Rows(self.images, self.rows[chosen])
        captions = [self.captions[i] for i in chosen]
        return images if split == "train" else images[:], captions, digest(self.fingerprint, split)


@functools.lru_cache(maxsize=2)     # as the parts for training and validation are loaded in turn
def open_drawings(name: str, size: Size, data_dir: Path, cache_dir: Path) -> Drawings:
    """The pictures of a collection at one size, decoded into cache_dir. One line is printed: what they are,
    their licence, and what was left out. Raises ValueError where there are none."""
    listed = COLLECTIONS[name].read(find_collection(name, data_dir))
    if not listed.names:
        raise ValueError(f"--data {name}: no pictures with captions in {listed.path}; install "
                         f"{COLLECTIONS[name].packages} again")
    folder = Folder(listed.path, Files(listed.path, Strings.of(iter(listed.names))), None, [])
    decoded = open_decoded(folder, Whole(size, 1), cache_dir / f"{name}-{size[0]}x{size[1]}")
    images, captions = decoded.images, [listed.captions[i] for i in decoded.keep]
    thumbs = thumbnails(images)
    empty = (np.ptp(thumbs, axis=1) < 24) | (np.mean(thumbs < 247, axis=1) < 0.01)
    filled = np.flatnonzero(~empty)
    if not len(filled):
        raise ValueError(f"--data {name}: none of the {counted(len(images))} in {listed.path} shows anything")
    first = first_of_copies(thumbs[filled])
    rows = filled[first]
    captions = [captions[i] for i in rows]
    held_out = hold_out(groups_of(thumbs[rows], captions))
    left_out = listed.left_out | {"not decoded": len(listed.names) - len(decoded.keep),
                                  "nearly empty": int(empty.sum()), "duplicates": len(filled) - len(first)}
    others = ", ".join(f"{number:,} {what}" for what, number in left_out.items() if number)
    print(f"{name}: {len(rows):,} {COLLECTIONS[name].about}" + (f" (left out: {others})" if others else ""))
    return Drawings(images, rows, captions, held_out, digest(name, decoded.fingerprint, rows, held_out))


def thumbnails(images: np.ndarray) -> np.ndarray:
    """(N, 3 * SIDE**2) float32, from 0 to 255: the pictures at SIDE x SIDE."""
    small = [np.asarray(Image.fromarray(image).resize((SIDE, SIDE), Image.Resampling.BOX))
             for image in images]
    return np.reshape(small, (len(images), -1)).astype(np.float32)


def near_pairs(thumbs: np.ndarray, limit: float) -> Iterator[np.ndarray]:
    """(n, 2) pairs i < j whose root mean square difference is below the limit, in the order of i."""
    centred = thumbs - thumbs.mean(axis=0)          # smaller numbers, so that less precision cancels
    squares = np.square(centred).sum(axis=1)
    for start in range(0, len(thumbs), 512):
        part = slice(start, start + 512)
        distance = squares[part, None] + squares[start:] - 2 * centred[part] @ centred[start:].T
        near = np.argwhere(distance < limit**2 * thumbs.shape[1]) + start
        yield near[near[:, 0] < near[:, 1]]


def first_of_copies(thumbs: np.ndarray) -> np.ndarray:
    """Rows in order, without those that are nearer than COPY to an earlier one that is kept."""
    kept = np.ones(len(thumbs), bool)
    for pairs in near_pairs(thumbs, COPY):
        for i, j in pairs.tolist():
            if kept[i]:
                kept[j] = False
    return np.flatnonzero(kept)


def groups_of(thumbs: np.ndarray, captions: list[str]) -> np.ndarray:
    """(N,) the first row of each picture's group: pictures with one caption, and those nearer than ALIKE, and
    whatever is so related to any of them."""
    leader = np.arange(len(thumbs))

    def leader_of(i: int) -> int:
        while leader[i] != i:
            leader[i] = leader[leader[i]]           # halves the way for whoever comes next
            i = leader[i]
        return i

    def join(i: int, j: int) -> None:
        a, b = sorted((leader_of(i), leader_of(j)))
        leader[b] = a

    named: dict[str, int] = {}
    for i, caption in enumerate(captions):
        join(named.setdefault(caption, i), i)
    for pairs in near_pairs(thumbs, ALIKE):
        for i, j in pairs.tolist():
            join(i, j)
    return np.array([leader_of(i) for i in range(len(leader))])


def hold_out(groups: np.ndarray) -> np.ndarray:
    """(N,) bool: the pictures of every 20th group, of those with at most LARGEST_GROUP pictures."""
    _, of, counts = np.unique(groups, return_inverse=True, return_counts=True)
    small = np.flatnonzero(counts <= LARGEST_GROUP)
    chosen = small[::20] if len(small) > 1 else small[:0]
    held_out = np.isin(of, chosen)
    if not held_out.any() and len(groups) > 1:      # one group of all: then a picture of it has to do
        held_out[0] = True
    return held_out


# ---- demonstration

def demo() -> None:
    """A small collection as Debian lays it out, some of it useless, read twice."""
    with tempfile.TemporaryDirectory() as temporary:
        stamps = Path(temporary) / "stamps" / "shapes"
        stamps.mkdir(parents=True)
        for i in range(40):
            picture = Image.new("RGBA", (90, 60))
            pen = ImageDraw.Draw(picture)
            pen.ellipse((10, 5, 20 + 6 * (i % 10), 55), fill=(40 + 5 * i, 200 - 5 * i, 6 * i % 256, 255))
            if i == 39:
                picture = Image.new("RGBA", (90, 60))
            picture.save(stamps / f"disc_{i:02d}.png")
            caption = f"A disc of kind {'abcdefghij'[i % 10]}."
            (stamps / f"disc_{i:02d}.txt").write_text(f"{caption}\nde.utf8=...\n")
        (stamps / "disc_99.svg").write_text("<svg/>")
        for _ in range(2):
            found = open_drawings("stamps", (32, 32), Path(temporary), Path(temporary) / "cache")
            train, val = (found.part(split) for split in ("train", "val"))
            print(f"{len(train[0])} for training, {len(val[0])} for validation, among them "
                  f"'{shortened(val[1][0])}'; fingerprint {train[2]}")
            open_drawings.cache_clear()
        del found, train, val                       # Windows does not delete a file that is still mapped


if __name__ == "__main__":
    demo()
