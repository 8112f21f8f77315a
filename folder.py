"""A folder of pictures as people have it: its classes and captions, and its pictures, decoded once.

    python folder.py                      # lists a folder of two classes, decodes it, and lists it again
    python folder.py FOLDER               # lists this one

A flat folder has no classes; otherwise each folder in it is a class, at any depth. Captions are NAME.txt
beside NAME.png, or rows of metadata.jsonl or metadata.csv. Bad input raises ValueError with one line.
"""

from __future__ import annotations

import csv
import errno
import functools
import hashlib
import io
import json
import os
import re
import stat
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image
from tqdm import tqdm

from files import digest, locked, new_array, open_array, read_stamp, shortened, write_stamp
from pictures import FORMATS, Size, cover, open_header, read_image, srgb_transform
from ragged import Ragged, fitted, open_ragged, write_ragged


# ---- the listing

# What systems leave in folders, besides names that begin with a dot; in lower case.
LITTER = {"__macosx", "__pycache__", "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot", "$recycle.bin",
          "lost+found", "system volume information", "thumbs.db", "ehthumbs.db", "desktop.ini"}
RANDOM_CROPS = 4    # rows that a picture has with --crop random
METADATA = ("metadata.csv", "metadata.jsonl")       # where both name a picture, the latter counts


class Folder(NamedTuple):
    """A folder's pictures, class by class: listed, and their captions read, but not yet decoded."""
    path: Path
    pictures: list[Path]
    labels: list[int] | None        # indices into classes; None for a flat folder
    classes: list[str]
    words: list[str] | None = None  # one per picture: captions, or names of .npz files; None if not asked for
    metadata: tuple[Path, ...] = () # files that hold captions of many pictures
    root: str = ""                  # the folder again where words are names of files


def list_folder(path: Path, words: str | None = None) -> Folder:
    """words: None, "captions" (`Folder.words` stays None where class names must serve as captions) or
    "embeddings". Raises ValueError where there are no pictures, or pictures without the words asked for."""
    folder = _list_pictures(path)
    if words == "captions":
        captions = _read_captions(folder)
        if captions is None and folder.labels is None:
            raise ValueError(f"--data {path}: pictures without words; put NAME.txt beside each, or "
                             "metadata.jsonl or metadata.csv with file_name and text")
        return folder._replace(words=captions)
    if words == "embeddings":
        files = [picture.with_suffix(".npz") for picture in folder.pictures]
        for file in files:
            if not os.path.isfile(file):
                raise ValueError(f"--data {path}: no {file} beside its picture, "
                                 "as --text-encoder none needs")
        return folder._replace(words=[str(file) for file in files], root=str(path))
    return folder


def _list_pictures(path: Path) -> Folder:
    """A flat folder, or a folder of class folders. What is left out is named on stderr."""
    files = _walk(path)
    endings = _endings()
    pictures = [file for file in files if endings.get(file.suffix.lower()) in FORMATS]
    if not pictures:
        raise ValueError(f"--data {path}: no pictures in this folder (looked for files that Pillow opens, "
                         "such as .png, .jpg; never PostScript or PDF)")
    metadata = tuple(file for file in files if file.name in METADATA)
    flat = sorted(p for p in pictures if p.parent == path)
    if flat and len(flat) < len(pictures):
        raise ValueError(f"--data {path}: {flat[0].name} lies beside class folders; "
                         "use a flat folder or class folders, not both")
    if flat:
        return Folder(path, flat, labels=None, classes=[], metadata=metadata)
    by_class: dict[str, list[Path]] = {}
    for picture in sorted(pictures):
        by_class.setdefault(picture.relative_to(path).parts[0], []).append(picture)
    classes = sorted(by_class, key=natural)
    labels = [i for i, name in enumerate(classes) for _ in by_class[name]]
    return Folder(path, [p for name in classes for p in by_class[name]], labels, classes, metadata=metadata)


def natural(name: str) -> tuple[list, str]:
    """A key that sorts numbers within names by their value: 2 before 10."""
    parts = re.split(r"(\d+)", name)                # text and digits in turn, text first
    return [int(part) if i % 2 else part for i, part in enumerate(parts)], name


@functools.cache
def _endings() -> dict[str, str]:
    """The format of every file ending that Pillow knows."""
    return {ending: kind for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}


def _walk(path: Path) -> list[Path]:
    """The files in a folder and in the folders within it that are pictures by their ending, or metadata.
    Links are followed, each folder is entered once. What is left out is named on stderr; raises ValueError
    where that is the folder itself."""
    root = path.resolve()
    entered = {root}
    waiting = [path]
    files: list[Path] = []
    ignored: list[str] = []                         # hidden or litter
    skipped: list[str] = []                         # anything else, with the reason
    while waiting:
        folder = waiting.pop()
        try:
            names = sorted(os.listdir(folder))
            if not os.access(folder, os.X_OK):
                raise PermissionError(errno.EACCES, "it may be listed, but not entered")
        except OSError as error:
            if folder == path:
                raise ValueError(f"--data {path}: this folder may not be read ({error.strerror})") from None
            skipped.append(f"{folder}: {error.strerror}")
            continue
        for name in names:
            child = folder / name
            kind = _endings().get(child.suffix.lower())
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
                if around or real in entered:
                    skipped.append(f"{child}: a link to a folder that is read already, or around it")
                else:
                    entered.add(real)
                    waiting.append(child)
            elif not stat.S_ISREG(mode):
                skipped.append(f"{child}: a pipe, socket or device, not a file")
            elif kind in FORMATS or name in METADATA:
                files.append(child)
            elif kind:
                skipped.append(f"{child}: {kind} is not among the formats that are opened")
    _tell(f"--data {path}: ignored as hidden or left by a system", ignored)
    _tell(f"--data {path}: skipped", skipped)
    return sorted(files)


def _tell(what: str, names: list[str]) -> None:
    """One line on stderr, of a bounded length, for all the names."""
    if names:
        more = f" and {len(names) - 12:,} more" if len(names) > 12 else ""
        print(f"{shortened(what, 400)}: {'; '.join(shortened(name, 300) for name in names[:12])}{more}",
              file=sys.stderr)


def _counted(number: int, thing: str = "picture") -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def clean_text(text: str) -> str:
    """One line of valid Unicode with single spaces. Every caption and prompt passes through here, so that the
    same words are the same string."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _read_captions(folder: Folder) -> list[str] | None:
    """One caption per picture, from metadata.jsonl or metadata.csv, or else from NAME.txt beside it. None
    where no picture has one; raises ValueError where only some have."""
    table = _read_metadata(folder.metadata)
    unknown = sorted(set(table) - set(folder.pictures))
    all_must_have_one = bool(table)
    for path in folder.pictures:
        beside = path.with_suffix(".txt")
        if path not in table and os.path.isfile(beside):
            table[path] = clean_text(_read_text(beside))
    missing = [path for path in folder.pictures if path not in table]
    if not missing:
        return [table[path] for path in folder.pictures]
    if all_must_have_one or len(missing) < len(folder.pictures):
        metadata = METADATA[-1]
        if folder.metadata:
            metadata = folder.metadata[0].relative_to(folder.path)
        message = (f"--data {folder.path}: {len(missing)} of {_counted(len(folder.pictures))} have no "
                   f"caption, such as {missing[0]}; write one into {missing[0].with_suffix('.txt').name} "
                   f"beside it, or into {metadata}")
        if unknown:
            message += f", which names {_counted(len(unknown))} not there, such as {unknown[0].name}"
        raise ValueError(message)
    return None


def _read_text(path: Path) -> str:
    """A text file in UTF-8, with a mark at its start or without. Raises ValueError with one line."""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not in UTF-8; save it in that encoding") from None


def _read_metadata(files: tuple[Path, ...]) -> dict[Path, str]:
    """Captions by picture, from files with a row {"file_name": ..., "text": ...} for each."""
    table = {}
    for metadata in sorted(files, key=lambda file: (METADATA.index(file.name), file)):
        rows = _csv_rows if metadata.suffix == ".csv" else _json_rows
        for name, text in rows(metadata, _read_text(metadata)):
            table[metadata.parent / name] = clean_text(text)
    return table


def _json_rows(path: Path, text: str) -> Iterator[tuple[str, str]]:
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            try:
                row = json.loads(line)
                if not row:
                    continue
                yield row["file_name"] + "", row["text"] + ""           # fails for what is no string
            except (ValueError, KeyError, TypeError, RecursionError):
                raise ValueError(f"{path}, line {number}: not an object with file_name and text") from None


def _csv_rows(path: Path, text: str) -> Iterator[tuple[str, str]]:
    csv.field_size_limit(1 << 24)                   # a caption may be longer than the usual limit
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if text and not {"file_name", "text"} <= set(reader.fieldnames or ()):
            raise ValueError(f"{path}: its first line is '{shortened(text.splitlines()[0])}'; it must name "
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


# ---- the pictures, decoded once

class Decoded(NamedTuple):
    """The pictures of a folder that could be decoded."""
    images: np.ndarray | Ragged # memory-mapped; one row each, or as many as there are crops
    keep: np.ndarray            # the index of each in folder.pictures
    fingerprint: str
    former: str | None          # the fingerprint of these rows when it was computed from file times


def open_pictures(folder: Folder, size: Size, cache_dir: Path, crops: int = 1) -> Decoded:
    """The pictures of a folder from its cache, which is rebuilt where it is damaged or of other pictures.
    crops: rows per picture, see crop_places. Raises ValueError where none can be decoded, and then creates
    nothing where there was no cache."""
    stamp_path, array_path = cache_dir / "images.json", cache_dir / "images.npy"
    if not stamp_path.exists():
        _check_one_decodes(folder)
    with locked(cache_dir / "images.lock", wait=True, clean=(stamp_path, array_path)):
        stamp = read_stamp(stamp_path)
        files = _contents(folder, stamp.get("files"))
        named = [(name, entry[0], entry[-1]) for name, entry in files.items()]      # size and hash
        fingerprint = digest("folder", "content", size, named)
        if crops > 1:
            fingerprint = digest(fingerprint, crops)
        begun = stamp.get("fingerprint")
        former = stamp.get("former") if begun == fingerprint else _former_fingerprint(folder, size, crops)
        images = open_array(array_path, np.uint8, (crops * len(folder.pictures), *size, 3))
        keep = stamp.get("keep")
        fits = begun == fingerprint or (begun == former and former is not None)
        if not fits or images is None or not _are_indices(keep, len(folder.pictures)):
            if fits:
                print(f"{array_path} is {'damaged' if array_path.exists() else 'missing'}: rebuilding it")
            partial, keep = _decode(folder, size, array_path, crops)
            stamp_path.unlink(missing_ok=True)      # never an old stamp beside a new array
            partial.replace(array_path)
            images = np.load(array_path, mmap_mode="r")
        found = {"fingerprint": fingerprint, "keep": keep, "former": former, "files": files}
        if found != read_stamp(stamp_path):         # which a rebuilding has removed
            write_stamp(stamp_path, found)
    return Decoded(images[:crops * len(keep)], np.array(keep), fingerprint, former)


def open_mixed(folder: Folder, pixels: int, multiple: Size, cache_dir: Path) -> Decoded:
    """The pictures of a folder at their own aspect ratios, each at its size of ragged.fitted, from a cache
    that is kept as that of open_pictures. Raises ValueError where none can be decoded."""
    name = "images-{}x{}".format(*multiple)
    stamp_path, array_path = cache_dir / f"{name}.json", cache_dir / f"{name}.bin"
    if not stamp_path.exists():
        _check_one_decodes(folder)
    with locked(cache_dir / f"{name}.lock", wait=True, clean=(stamp_path, array_path)):
        stamp = read_stamp(stamp_path)
        files = _contents(folder, stamp.get("files"))
        named = [(name, entry[0], entry[-1]) for name, entry in files.items()]      # size and hash
        fingerprint = digest("folder", "mixed", pixels, multiple, named)
        keep, shapes = stamp.get("keep"), stamp.get("shapes")
        images = open_ragged(array_path, np.uint8, shapes)
        fits = stamp.get("fingerprint") == fingerprint
        if not fits or images is None or not (_are_indices(keep, len(folder.pictures))
                                              and len(keep) == len(images)):
            if fits:
                print(f"{array_path} is {'damaged' if array_path.exists() else 'missing'}: rebuilding it")
            stamp_path.unlink(missing_ok=True)      # never an old stamp beside a new array
            keep = []
            shapes = write_ragged(array_path, _decode_mixed(folder, pixels, multiple, keep))
            images = open_ragged(array_path, np.uint8, shapes)
        found = {"fingerprint": fingerprint, "keep": keep, "shapes": shapes, "files": files}
        if found != read_stamp(stamp_path):
            write_stamp(stamp_path, found)
    return Decoded(images, np.array(keep), fingerprint, None)


def _decode_mixed(folder: Folder, pixels: int, multiple: Size, keep: list[int]) -> Iterator[np.ndarray]:
    """Every picture that can be decoded, uint8 (H, W, 3), one at a time; `keep` takes their indices."""
    useless: list[str] = []                 # colour profiles
    for i, picture in enumerate(tqdm(folder.pictures, desc="decode pictures", unit="img")):
        try:
            image = read_image(picture, "white", useless)
            array = cover(image, fitted(image.size[::-1], pixels, multiple))
        except Exception as error:          # Pillow raises a dozen types; each means: skip this file
            _tell_of_skipped(picture, error)
            continue
        keep.append(i)
        yield array
    if not keep:
        raise _none_decodes(folder)
    _tell_of_decoding(folder, keep, useless)


def _are_indices(keep: object, count: int) -> bool:
    """Whether a stamp's list names some of `count` pictures, in order."""
    if not isinstance(keep, list) or not keep or not all(isinstance(i, int) for i in keep):
        return False
    return 0 <= keep[0] and keep[-1] < count and all(a < b for a, b in zip(keep, keep[1:]))


def _contents(folder: Folder, known: object) -> dict[str, list]:
    """Size, two times and a hash of the content of every picture. known: what this returned before; a file
    that has not changed since then is not read again."""
    known = known if isinstance(known, dict) else {}
    found = {}
    for picture in tqdm(folder.pictures, desc="compare pictures", unit="img", delay=2):
        name = picture.relative_to(folder.path).as_posix()
        try:
            about = picture.stat()
        except OSError:                     # removed, or its folder closed, since the folder was listed
            found[name] = [0, 0, 0, "unreadable"]
            continue
        # The second time is that of any change: nothing can set it back, as archives set back the first.
        entry = [about.st_size, about.st_mtime_ns, about.st_ctime_ns]
        before = known.get(name)
        if isinstance(before, list) and len(before) == 4 and before[:3] == entry:
            found[name] = before
        else:
            found[name] = [*entry, _hash_content(picture)]
    return found


def _hash_content(path: Path) -> str:
    """A hash of a file's bytes; above 8 MiB, of 64 KiB at each of 32 places from its start to its end."""
    sha256 = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            if size <= 1 << 23:
                sha256.update(file.read())
            for i in range(32 if size > 1 << 23 else 0):
                file.seek((size - (1 << 16)) * i // 31)
                sha256.update(file.read(1 << 16))
    except OSError:                         # it cannot be decoded either, and is named then
        return "unreadable"
    return sha256.hexdigest()[:16]


def _former_fingerprint(folder: Folder, size: Size, crops: int) -> str | None:
    """What an earlier version computed from names, sizes and times, or None where it would have found other
    pictures, in another order, or with other colours."""
    files = []
    try:
        listed = sorted(p for p in folder.path.rglob("*")
                        if p.suffix.lower() in _endings() and os.path.isfile(p))
        if crops > 1 or listed != folder.pictures or any(map(_changes_colours, listed)):
            return None
        for picture in listed:
            about = picture.stat()
            files.append((str(picture.relative_to(folder.path)), about.st_size, about.st_mtime_ns))
    except OSError:                         # a folder that may not be entered stopped that version
        return None
    return digest("folder", size, files)


def _changes_colours(path: Path) -> bool:
    """Whether the picture has a colour profile other than sRGB, which was not applied formerly."""
    try:
        with open_header(path) as image:
            profile = image.info.get("icc_profile")
            mode = {"1": "L", "LA": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
            return bool(profile) and srgb_transform(profile, mode) is not None
    except Exception:                       # such a profile is not applied now either
        return False


def _decode(folder: Folder, size: Size, path: Path, crops: int) -> tuple[Path, list[int]]:
    """Write the pictures to a new array, which is to replace `path`. Return its present name and the indices
    of the pictures that could be decoded."""
    decoded = []
    useless: list[str] = []                 # colour profiles
    store = new_array(path, np.uint8, (crops * len(folder.pictures), *size, 3))
    partial = Path(store.filename)
    try:
        for i, picture in enumerate(tqdm(folder.pictures, desc="decode pictures", unit="img")):
            try:
                image = read_image(picture, "white", useless)
                for k, place in enumerate(crop_places(picture.name, crops)):
                    store[crops * len(decoded) + k] = cover(image, size, place)
                decoded.append(i)
            except Exception as error:      # Pillow raises a dozen types; each means: skip this file
                _tell_of_skipped(picture, error)
        store.flush()
        if not decoded:
            raise _none_decodes(folder)
    except BaseException:                   # also Ctrl-C: leave no half-built file behind
        store = None                        # Windows does not delete a file that is still mapped
        partial.unlink(missing_ok=True)
        raise
    _tell_of_decoding(folder, decoded, useless)
    return partial, decoded


def _tell_of_decoding(folder: Folder, decoded: list[int], useless: list[str]) -> None:
    _tell(f"--data {folder.path}: colours taken as sRGB, because a colour profile cannot be used", useless)
    if folder.labels is not None:
        empty = sorted(set(folder.labels) - {folder.labels[i] for i in decoded})
        _tell(f"--data {folder.path}: classes left out, because none of their pictures can be decoded",
              [folder.classes[i] for i in empty])


def _check_one_decodes(folder: Folder) -> None:
    """Raises ValueError, and names every picture, where none can be decoded."""
    errors = []
    for picture in folder.pictures:
        try:
            read_image(picture, "white", [])
            return
        except Exception as error:
            errors.append(error)
    for picture, error in zip(folder.pictures, errors):
        _tell_of_skipped(picture, error)
    raise _none_decodes(folder)


def _none_decodes(folder: Folder) -> ValueError:
    return ValueError(f"--data {folder.path}: none of its {_counted(len(folder.pictures))} can be decoded")


def _tell_of_skipped(picture: Path, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, (OSError, ValueError)) and str(error):         # written for people, as a rule
        reason = getattr(error, "strerror", None) or str(error)
    tqdm.write(f"skipped {shortened(str(picture), 300)}: {shortened(reason, 300)}", file=sys.stderr)


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
    """List and decode a folder of two classes with a broken picture twice, the second time from a cache."""
    with tempfile.TemporaryDirectory() as temporary:
        path, cache_dir = Path(temporary) / "pictures", Path(temporary) / "cache"
        for i in range(24):
            picture = path / f"class {i % 2 + 9}" / f"{i}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 64), (10 * i, 0, 255)).save(picture)
        (path / "class 9" / "broken.png").write_bytes(b"not a picture")
        (path / ".hidden").mkdir()
        for _ in range(2):
            folder = list_folder(path)
            decoded = open_pictures(folder, (32, 32), cache_dir)
            print(f"{len(folder.pictures)} pictures in {folder.classes}: {len(decoded.keep)} decoded, "
                  f"fingerprint {decoded.fingerprint}")
        train, val = split_rows(len(decoded.keep), np.array(folder.labels)[decoded.keep])
        print(f"{len(train)} for training, {len(val)} for validation")
        del decoded                             # Windows does not delete a file that is still mapped


def main() -> None:
    if len(sys.argv) > 1:
        folder = list_folder(Path(sys.argv[1]))
        classes = ", ".join(map(shortened, folder.classes))
        print(f"{_counted(len(folder.pictures))}; classes: {classes or 'none'}")
    else:
        demo()


if __name__ == "__main__":
    main()
