"""A folder of pictures or sounds as people have it: its files, their classes and their captions, in order.

    python folder.py                      # lists a folder of two classes with captions
    python folder.py FOLDER               # lists this one

A flat folder has no classes; otherwise each folder in it is a class, at any depth. Captions are NAME.txt
beside NAME.png, or rows of metadata.jsonl or metadata.csv. Bad input raises ValueError with one line. Folders
may have millions of pictures: memory holds the names of their files and 12 bytes more of each, and its
caption and 8 or 16 more.
"""

from __future__ import annotations

import csv
import errno
import functools
import json
import os
import re
import stat
import sys
import tempfile
from array import array as packed
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

from files import Head, counted, shortened
from pictures import FORMATS
from ragged import Strings, key_of, places


# ---- the listing

# What systems leave in folders, besides names that begin with a dot; in lower case.
LITTER = {"__macosx", "__pycache__", "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin",
          "lost+found", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"}
RANDOM_CROPS = 4    # rows that a picture has with --crop random
METADATA = ("metadata.csv", "metadata.jsonl")       # where both name a picture, the latter counts


class Files(Sequence):
    """The paths of files in a folder, of which memory holds the names alone. names: relative to the folder,
    with slashes."""

    def __init__(self, path: Path, names: Strings):
        self.path = path
        self.names = names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index):
        """A path, by its number; or some of them, by a slice or an array of ints."""
        found = self.names[index]
        return self.path / found if isinstance(found, str) else Files(self.path, found)

    def name_of(self, path: Path) -> str:
        """A path as names are, or the whole of it where it is not in the folder."""
        return (path.relative_to(self.path) if path.is_relative_to(self.path) else path).as_posix()

    @staticmethod
    def key(name: str) -> int:
        return key_of(os.path.normcase(name))

    def keys(self) -> np.ndarray:
        """(N,) uint64: see key_of."""
        return np.fromiter(map(self.key, self.names), np.uint64, len(self))


class Wanted(NamedTuple):
    """What a folder is listed for."""
    thing: str                                  # one of them, in messages
    formats: Callable[[], dict[str, str]]       # the format of every file ending, in lower case
    refusal: Callable[[str], str | None]        # why a format is not opened; None for those that are
    looked_for: str                             # said where there is none


@functools.cache
def endings() -> dict[str, str]:
    """The format of every file ending that Pillow knows."""
    return {ending: kind for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _not_opened(kind: str) -> str | None:
    return None if kind in FORMATS else f"{kind} is not among the formats that are opened"


PICTURES = Wanted("picture", endings, _not_opened,
                  "files that Pillow opens, such as .png, .jpg; never PostScript or PDF")


class Folder(NamedTuple):
    """A folder's pictures, class by class: listed, and their captions read, but not yet decoded."""
    path: Path
    pictures: Files                 # the files, pictures or sounds
    labels: np.ndarray | None       # (N,) int32 indices into classes; None for a flat folder
    classes: list[str]
    words: Strings | None = None    # one per picture: captions, or names of .npz files; None if not asked for
    metadata: tuple[Path, ...] = () # files that hold captions of many pictures
    root: str = ""                  # the folder again where words are names of files
    wanted: Wanted = PICTURES


def list_folder(path: Path, words: str | None = None, wanted: Wanted = PICTURES) -> Folder:
    """words: None, "captions" (`Folder.words` stays None where class names must serve as captions) or
    "embeddings". Raises ValueError where there are no pictures, or pictures without the words asked for."""
    folder = _list_pictures(path, wanted)
    if words == "captions":
        captions = _read_captions(folder)
        if captions is None and folder.labels is None:
            raise ValueError(f"--data {path}: {wanted.thing}s without words; put NAME.txt beside each, or "
                             "metadata.jsonl or metadata.csv with file_name and text")
        return folder._replace(words=captions)
    if words == "embeddings":
        return folder._replace(words=Strings.of(_vectors(folder)), root=str(path))
    return folder


def _vectors(folder: Folder) -> Iterator[str]:
    for picture in folder.pictures:
        file = picture.with_suffix(".npz")
        if not os.path.isfile(file):
            raise ValueError(f"--data {folder.path}: no {file} beside its {folder.wanted.thing}, as "
                             "--text-encoder none needs")
        yield str(file)


def _list_pictures(path: Path, wanted: Wanted) -> Folder:
    """A flat folder, or a folder of class folders. What is left out is named on stderr."""
    inside, metadata = _walk(path, wanted)
    top = _split(inside[""])
    folders = {name for name in top if name in inside}
    counts: dict[str, int] = {}                     # pictures by class, of those that have any

    def in_classes() -> Iterator[str]:
        for name in sorted(folders, key=natural):
            for counts[name], picture in enumerate(_below(inside, name), 1):
                yield picture

    names, flat = Strings.of(in_classes()), Strings.of(name for name in top if name not in folders)
    if not flat and not names:
        raise ValueError(f"--data {path}: no {wanted.thing}s in this folder (looked for {wanted.looked_for})")
    if not flat:
        labels = np.repeat(np.arange(len(counts), dtype=np.int32), list(counts.values()))
        return Folder(path, Files(path, names), labels, list(counts), metadata=metadata, wanted=wanted)
    if names:
        raise ValueError(f"--data {path}: {flat[0]} lies beside class folders; "
                         "use a flat folder or class folders, not both")
    return Folder(path, Files(path, flat), labels=None, classes=[], metadata=metadata, wanted=wanted)


def _below(inside: dict[str, str], folder: str) -> Iterator[str]:
    """The names of the pictures in a folder and in those within it, sorted as paths are: by the first part,
    then by the second. inside: as of _walk; what is done is removed from it."""
    waiting = [("", iter([folder]))]
    while waiting:
        start, names = waiting[-1]
        name = next(names, None)
        if name is None:
            waiting.pop()
        elif start + name in inside:
            waiting.append((f"{start}{name}/", iter(_split(inside.pop(start + name)))))
        else:
            yield start + name


def _split(names: str) -> list[str]:
    return names.split("\0") if names else []


def natural(name: str) -> tuple[list, str]:
    """A key that sorts numbers within names by their value: 2 before 10."""
    parts = re.split(r"(\d+)", name)                # text and digits in turn, text first
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


def _walk(path: Path, wanted: Wanted) -> tuple[dict[str, str], tuple[Path, ...]]:
    """The folders that are read, by their names relative to `path`, each with the names in it, sorted and
    joined by NUL, of folders that are read and of wanted files by their ending; and the files of
    metadata. Links are followed, each folder is entered once. What is left out is named on stderr; raises
    ValueError where that is the folder itself."""
    root = path.resolve()
    entered = {str(root)}
    waiting = [""]
    inside: dict[str, str] = {}
    metadata: list[Path] = []
    ignored = Head()                                # hidden or litter
    skipped = Head()                                # anything else, with the reason
    formats = wanted.formats()
    while waiting:
        relative = waiting.pop()
        folder = path / relative
        found: list[str] = []
        inside[relative] = ""
        try:
            names = sorted(os.listdir(folder), key=os.path.normcase)    # as paths are compared
            if not os.access(folder, os.X_OK):
                raise PermissionError(errno.EACCES, "it may be listed, but not entered")
        except OSError as error:
            if folder == path:
                raise ValueError(f"--data {path}: this folder may not be read ({error.strerror})") from None
            skipped.append(f"{folder}: {error.strerror}")
            continue
        for name in names:
            # Not folder / name: a Path keeps its parts in Python's table of names, which would then grow by
            # those of the whole folder, as long as the list has them.
            child = Path(os.path.join(folder, name))
            kind = formats.get(child.suffix.lower())
            hidden = name.startswith(".") or name.lower() in LITTER
            try:
                mode = child.stat().st_mode         # follows a link; opening a pipe would wait for ever
                if stat.S_ISDIR(mode):
                    real = child.resolve()
                    is_link = child.is_symlink()
            except (OSError, RuntimeError) as error:        # also a link to nothing
                if not hidden:
                    skipped.append(f"{child}: {getattr(error, 'strerror', None) or error}")
                continue
            if hidden:
                if stat.S_ISDIR(mode) or kind:
                    ignored.append(str(child))
            elif stat.S_ISDIR(mode):
                # What a link finds inside the folder itself is listed under its own name already.
                around = root.is_relative_to(real) or (is_link and real.is_relative_to(root))
                if around or str(real) in entered:
                    skipped.append(f"{child}: a link to a folder that is read already, or around it")
                else:
                    entered.add(str(real))
                    waiting.append(f"{relative}/{name}" if relative else name)
                    found.append(name)
            elif not stat.S_ISREG(mode):
                skipped.append(f"{child}: a pipe, socket or device, not a file")
            elif kind:
                refusal = wanted.refusal(kind)
                if refusal is None:
                    found.append(name)
                else:
                    skipped.append(f"{child}: {refusal}")
            elif name in METADATA:
                metadata.append(child)
        inside[relative] = "\0".join(found)
    ignored.tell(f"--data {path}: ignored as hidden or left by a system")
    skipped.tell(f"--data {path}: skipped")
    return inside, tuple(sorted(metadata))


def clean_text(text: str) -> str:
    """One line of valid Unicode with single spaces. Every caption and prompt passes through here, so that the
    same words are the same string."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _read_captions(folder: Folder) -> Strings | None:
    """One caption per picture, from metadata.jsonl or metadata.csv, or else from NAME.txt beside it. None
    where no picture has one; raises ValueError where only some have."""
    pictures = folder.pictures
    row = np.full(len(pictures), -1)                # where each one's caption is among all that are read
    keys = packed("Q")

    def captions() -> Iterator[str]:
        for path, text in _metadata_rows(folder.metadata):
            keys.append(pictures.key(pictures.name_of(path)))
            yield clean_text(text)
        if keys:
            place = places(np.array(keys), pictures.keys())
            named = np.flatnonzero(place >= 0)
            np.maximum.at(row, place[named], named)                     # the last row counts
        count = len(keys)
        for i in np.flatnonzero(row < 0):
            beside = pictures[i].with_suffix(".txt")
            if os.path.isfile(beside):
                row[i] = count
                count += 1
                with _text_of(beside) as file:
                    text = file.read()
                yield clean_text(text)

    found = Strings.of(captions())
    missing = np.flatnonzero(row < 0)
    if not len(missing):
        return found[row] if keys else found
    if keys or len(missing) < len(pictures):
        raise _missing_captions(folder, pictures[missing[0]], len(missing), np.array(keys, np.uint64))
    return None


def _missing_captions(folder: Folder, first: Path, count: int, keys: np.ndarray) -> ValueError:
    """keys: of the pictures that the metadata names."""
    metadata = METADATA[-1]
    if folder.metadata:
        metadata = folder.metadata[0].relative_to(folder.path)
    thing = folder.wanted.thing
    beside = first.with_suffix(".txt").name
    message = (f"--data {folder.path}: {count} of {counted(len(folder.pictures), thing)} have no caption, "
               f"such as {first}; write one into {beside} beside it, or into {metadata}")
    unknown = places(keys, folder.pictures.keys()) < 0
    if unknown.any():
        other = min(path for i, (path, _) in enumerate(_metadata_rows(folder.metadata)) if unknown[i])
        number = len(np.unique(keys[unknown]))
        message += f", which names {counted(number, thing)} not there, such as {other.name}"
    return ValueError(message)


@contextmanager
def _text_of(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """A text file in UTF-8, with a mark at its start or without. Raises ValueError with one line."""
    try:
        with path.open(encoding="utf-8-sig", newline=newline) as file:
            yield file
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not in UTF-8; save it in that encoding") from None


def _metadata_rows(files: tuple[Path, ...]) -> Iterator[tuple[Path, str]]:
    """Pictures and captions, from files with a row {"file_name": ..., "text": ...} for each."""
    for metadata in sorted(files, key=lambda file: (METADATA.index(file.name), file)):
        newline, rows = ("", _csv_rows) if metadata.suffix == ".csv" else (None, _json_rows)
        with _text_of(metadata, newline) as file:
            for name, text in rows(metadata, file):
                yield metadata.parent / name, text


def _json_rows(path: Path, file: IO[str]) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(file, 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not row:
                    continue
                yield row["file_name"] + "", row["text"] + ""           # fails for what is no string
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}, line {number}: not an object with file_name and text") from None


def _csv_rows(path: Path, file: IO[str]) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(1 << 24)                   # a caption may be longer than the usual limit
    first = file.readline()
    file.seek(0)
    reader = csv.DictReader(file)
    try:
        if first and not {"file_name", "text"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: its first line is '{shortened(first.splitlines()[0])}'; it must name "
                             "the columns file_name and text, separated by commas")
        for row in reader:
            for name in ("file_name", "text"):
                if row[name] is None:
                    raise ValueError(f"{path}, line {reader.line_num}: has no {name}")
            if any(row.get(None, ())):
                raise ValueError(f"{path}, line {reader.line_num}: has more columns than the first line; put "
                                 "a text with commas between quotation marks")
            yield row["file_name"], row["text"]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: {error}") from None


def crop_places(name: str, crops: int) -> list[float]:
    """Where to crop a picture, for pictures.cover: in the centre and, for more crops, at random places, one
    in each of as many equal parts. They depend on the picture's name alone."""
    random = np.random.default_rng(list(name.encode("utf-8", "surrogatepass")))
    others = crops - 1
    return [0.5] + [(part + random.random()) / others for part in range(others)]


class Rows:
    """`array[rows]` of a memory map, of which only what is indexed is read."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array = array
        self.rows = rows
        self.shape = (len(rows), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:
        return self.array[self.rows[index]]


def split_rows(count: int, labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Rows for training and for validation: every 20th picture, at most 256. With labels, which must be in
    order, every 20th of each class, but never a class's only picture."""
    rows = np.arange(count)
    val = rows[::20][:256]
    if labels is not None:
        _, first, of, counts = np.unique(labels, return_index=True, return_inverse=True, return_counts=True)
        val = rows[((rows - first[of]) % 20 == 0) & (counts[of] > 1)]
        if len(val) > 256:                  # spread over all classes
            val = val[np.arange(256) * len(val) // 256]
    train = np.setdiff1d(rows, val)
    if len(val) == 0 or len(train) == 0:    # so few pictures serve for both
        train, val = rows, rows[::20][:256]
    return train, val


def demo() -> None:
    """List a folder of two classes with a caption beside each picture."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary)
        for i in range(24):
            picture = path / f"class {i % 2 + 9}" / f"{i}.png"
            picture.parent.mkdir(exist_ok=True)
            Image.new("RGB", (48, 64), (10 * i, 0, 255)).save(picture)
            picture.with_suffix(".txt").write_text(f"blue, and {10 * i} of red")
        (path / ".hidden").mkdir()
        folder = list_folder(path, "captions")
        print(f"{counted(len(folder.pictures))} in {folder.classes}; the last is "
              f"{folder.pictures[-1].relative_to(path)}, '{folder.words[-1]}'")
        train, val = split_rows(len(folder.pictures), folder.labels)
        print(f"{len(train)} for training, {len(val)} for validation")


def main() -> None:
    if len(sys.argv) > 1:
        folder = list_folder(Path(sys.argv[1]))
        classes = ", ".join(map(shortened, folder.classes))
        print(f"{counted(len(folder.pictures))}; classes: {classes or 'none'}")
    else:
        demo()


if __name__ == "__main__":
    main()
