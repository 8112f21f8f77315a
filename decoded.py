"""The pictures of a folder, decoded once: kept at one size or at their own aspect ratios, and known again.
Sounds likewise: see sounds.py.

    python decoded.py                     # decodes a folder of two classes, and opens it again from its cache

Beside the decoded pictures lies what they were made of: name, size, times and hash of every file. A picture
whose times have changed is read again, to compare its hash, and a folder is decoded again only where a hash,
a name or the order differs. The fingerprint covers just those, wherever the folder lies. Memory holds about
a hundred bytes of every picture.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from PIL import Image
from tqdm import tqdm

from files import (Head, counted, digest, locked, new_array, open_array, read_stamp, shortened,
                   write_atomically, write_stamp)
from folder import Files, Folder, crop_places, endings, list_folder, split_rows
from pictures import Size, check_pixels, contain, cover, open_header, read_image, srgb_transform
from ragged import Ragged, fitted, open_ragged, places, write_ragged


class Decoded(NamedTuple):
    """The pictures, or the sounds, of a folder that could be decoded."""
    images: np.ndarray | Ragged # memory-mapped; one row each, or as many as there are crops
    keep: np.ndarray            # the index of each in folder.pictures
    fingerprint: str
    former: str | None          # the fingerprint of these rows when it was computed from file times
    sizes: np.ndarray           # (n, 2), of each that is kept


class Form(Protocol):
    """In which form the files of a folder are kept once they are decoded: see Cropped."""
    file: str

    def fingerprint(self, contents: Iterator[tuple]) -> str: ...

    def read(self, path: Path, useless: Head) -> list[np.ndarray]: ...

    def size_of(self, array: np.ndarray) -> tuple[int, int]: ...

    def write(self, path: Path, count: int, arrays: Iterator[np.ndarray]) -> None: ...

    def open(self, path: Path, count: int, sizes: np.ndarray) -> np.ndarray | Ragged | None: ...


class Cropped(NamedTuple):
    """Pictures of one size, each scaled to cover it, with one or more crops: see crop_places."""
    size: Size
    crops: int

    @property
    def file(self) -> str:
        return "images.npy"

    def fingerprint(self, contents: Iterator[tuple]) -> str:
        found = digest("folder", "content", self.size, contents)
        return digest(found, self.crops) if self.crops > 1 else found

    def read(self, path: Path, useless: Head) -> list[np.ndarray]:
        """The rows of a file. useless: as in read_image."""
        image = read_image(path, "white", useless)
        return [cover(image, self.size, place) for place in crop_places(path.name, self.crops)]

    def size_of(self, array: np.ndarray) -> tuple[int, int]:
        return array.shape[:2]

    def shape(self, count: int) -> tuple[int, ...]:
        return self.crops * count, *self.size, 3

    def write(self, path: Path, count: int, arrays: Iterator[np.ndarray]) -> None:
        """An array of `count` pictures that replaces `path` when it is complete."""
        write_rows(path, np.uint8, self.shape(count), arrays)

    def open(self, path: Path, count: int, sizes: np.ndarray) -> np.ndarray | None:
        """sizes: (n, 2), of those of the `count` pictures that are there."""
        images = open_array(path, np.uint8, self.shape(count))
        return None if images is None else images[:self.crops * len(sizes)]


def write_rows(path: Path, dtype, shape: tuple[int, ...], rows: Iterator[np.ndarray]) -> None:
    """An array that replaces `path` when it is complete. What rows leave out is zero: those that are too few,
    and the end of those that are too short."""
    store = new_array(path, dtype, shape)
    partial = Path(store.filename)
    try:
        for i, row in enumerate(rows):
            store[i, :len(row)] = row
        store.flush()
    except BaseException:                   # also Ctrl-C: leave no half-built file behind
        store = None                        # Windows does not delete a file that is still mapped
        partial.unlink(missing_ok=True)
        raise
    store = None
    partial.replace(path)


class Whole(Cropped):
    """Pictures cropped to what differs from white, and put on a white one of this size as a whole."""

    def fingerprint(self, contents: Iterator[tuple]) -> str:
        return digest("whole", self.size, contents)

    def read(self, path: Path, useless: Head) -> list[np.ndarray]:
        check_pixels(path)
        return [contain(read_image(path, "white", useless), self.size)]


class Fitted(NamedTuple):
    """Pictures at their own aspect ratios, each at its size of ragged.fitted."""
    pixels: int
    multiple: Size

    @property
    def file(self) -> str:
        return "images-{}x{}.bin".format(*self.multiple)

    def fingerprint(self, contents: Iterator[tuple]) -> str:
        return digest("folder", "mixed", self.pixels, self.multiple, contents)

    def read(self, path: Path, useless: Head) -> list[np.ndarray]:
        image = read_image(path, "white", useless)
        return [cover(image, fitted(image.size[::-1], self.pixels, self.multiple))]

    def size_of(self, array: np.ndarray) -> tuple[int, int]:
        return array.shape[:2]

    def write(self, path: Path, count: int, arrays: Iterator[np.ndarray]) -> None:
        write_ragged(path, arrays)

    def open(self, path: Path, count: int, sizes: np.ndarray) -> Ragged | None:
        return open_ragged(path, np.uint8, np.insert(sizes, 2, 3, axis=1))


# What the cache knows of every picture, in the order of the listing: 49 bytes in a file beside the stamp.
ABOUT = np.dtype([("key", "<u8"),           # of its name
                  ("size", "<u8"), ("modified", "<u8"), ("changed", "<u8"),     # of the file: bytes, ns
                  ("hash", "<u8"), ("read", "?"),                               # of its content
                  ("height", "<u4"), ("width", "<u4")])                         # 0 where it is not decoded


def open_pictures(folder: Folder, size: Size, cache_dir: Path, crops: int = 1,
                  multiple: Size | None = None) -> Decoded:
    """The pictures of a folder. crops: rows per picture, see crop_places. multiple: instead, each keeps its
    aspect ratio, with sides that are multiples of this and at most as many pixels as `size` has. Raises as
    open_decoded."""
    return open_decoded(folder, Fitted(math.prod(size), multiple) if multiple else Cropped(size, crops),
                        cache_dir)


def open_decoded(folder: Folder, form: Form, cache_dir: Path) -> Decoded:
    """The files of a folder from its cache, which is rebuilt where it is damaged or of other files. Raises
    ValueError where none can be decoded, and then creates nothing where there was no cache."""
    array_path = cache_dir / form.file
    stamp_path, about_path = array_path.with_suffix(".json"), array_path.with_suffix(".about.npy")
    count = len(folder.pictures)
    if not stamp_path.exists():
        _check_one_decodes(folder, form)
    with locked(array_path.with_suffix(".lock"), wait=True, clean=(stamp_path, array_path, about_path)):
        stamp = read_stamp(stamp_path)
        known = _known(stamp, about_path, form, count)
        about = _contents(folder, known)
        fingerprint = form.fingerprint(_named(folder, about))
        begun = stamp.get("fingerprint")
        former = stamp.get("former") if begun == fingerprint else _former_fingerprint(folder, form)
        images = None
        fits = begun == fingerprint or (begun == former and former is not None)
        if fits and len(known) == count:
            about["height"], about["width"] = known["height"], known["width"]
            images = form.open(array_path, count, _sizes(about))
        if images is None or not len(images):
            if fits:
                path = array_path if len(known) else about_path
                print(f"{path} is {'damaged' if path.exists() else 'missing'}: rebuilding it")
            about["height"] = about["width"] = 0
            form.write(array_path, count, _decode(folder, form, about, stamp_path))
            images = form.open(array_path, count, _sizes(about))
        found = {"fingerprint": fingerprint, "former": former, "pictures": count,
                 "sizes": digest(about["height"], about["width"])}
        if found != read_stamp(stamp_path) or not np.array_equal(known, about):
            # Only file times differ where there is a stamp still, so it fits both versions.
            write_atomically(about_path, lambda file: np.save(file, about))
            write_stamp(stamp_path, found)
    return Decoded(images, np.flatnonzero(about["height"]), fingerprint, former, _sizes(about))


def _sizes(about: np.ndarray) -> np.ndarray:
    """(n, 2), of the pictures that are decoded."""
    keep = np.flatnonzero(about["height"])
    return np.stack([about["height"][keep], about["width"][keep]], axis=1)


def _known(stamp: dict, path: Path, form: Form, count: int) -> np.ndarray:
    """What an earlier process knew of every picture, or nothing where that is damaged."""
    if "keep" in stamp:
        return _known_formerly(stamp, form, count)
    about = open_array(path, ABOUT, (stamp.get("pictures"),))
    if about is None or digest(about["height"], about["width"]) != stamp.get("sizes"):
        return np.zeros(0, ABOUT)
    return np.array(about)                  # no memory map, as the file is replaced


def _known_formerly(stamp: dict, form: Form, count: int) -> np.ndarray:
    """The same of an earlier version, whose stamp held all of it, and at first no files."""
    files = stamp.get("files")
    files = files if isinstance(files, dict) else {}
    about = np.zeros(len(files) or count, ABOUT)
    for i, (name, entry) in enumerate(files.items()):
        try:
            *numbers, content = entry
            about[i] = _row(Files.key(name), numbers, content)
        except (TypeError, ValueError, OverflowError):
            continue
    keep, shapes = stamp["keep"], stamp.get("shapes")
    if _are_indices(keep, len(about)):
        try:
            if isinstance(form, Cropped):
                shapes = [form.size] * len(keep)
            about["height"][keep], about["width"][keep] = np.array(shapes, np.uint32)[:, :2].T
        except (TypeError, ValueError, IndexError, OverflowError):
            about["height"] = 0
    return about


def _row(key: int, numbers: Sequence[int], content: str) -> tuple:
    size, modified, changed = [number % 2**64 for number in numbers]        # times may be before 1970
    read = content != "unreadable"
    return key, size, modified, changed, int(content, 16) if read else 0, read, 0, 0


def _are_indices(keep: object, count: int) -> bool:
    """Whether a stamp's list names some of `count` pictures, in order."""
    if not isinstance(keep, list) or not keep or not all(isinstance(i, int) for i in keep):
        return False
    return 0 <= keep[0] and keep[-1] < count and all(a < b for a, b in zip(keep, keep[1:]))


def _contents(folder: Folder, known: np.ndarray) -> np.ndarray:
    """(N,) of ABOUT, without sizes. known: what this returned before; a file that has not changed since then
    is not read again."""
    found = np.zeros(len(folder.pictures), ABOUT)
    found["key"] = folder.pictures.keys()
    place = places(found["key"], known["key"])
    desc = f"compare {folder.wanted.thing}s"
    for i, picture in enumerate(tqdm(folder.pictures, desc=desc, unit="file", delay=2)):
        try:
            about = picture.stat()
        except OSError:                     # removed, or its folder closed, since the folder was listed
            continue
        # The second time is that of any change: nothing can set it back, as archives set back the first.
        numbers = (about.st_size, about.st_mtime_ns, about.st_ctime_ns)
        before = known[place[i]].item() if place[i] >= 0 else ()
        now = _row(int(found["key"][i]), numbers, "unreadable")
        if before[:4] == now[:4]:
            found[i] = (*before[:6], 0, 0)
        else:
            found[i] = _row(now[0], numbers, _hash_content(picture))
    return found


def _named(folder: Folder, about: np.ndarray) -> Iterator[tuple[str, int, str]]:
    """Name, size and hash of every picture, from which fingerprints are computed."""
    for start in range(0, len(about), 256):
        part = about[start:start + 256]
        content = [f"{number:016x}" if read else "unreadable"
                   for number, read in zip(part["hash"].tolist(), part["read"].tolist())]
        yield from zip(folder.pictures.names[start:start + 256], part["size"].tolist(), content)


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


def _former_fingerprint(folder: Folder, form: Form) -> str | None:
    """What an earlier version computed from names, sizes and times, or None where it would have found other
    pictures, in another order, or with other colours."""
    if type(form) is not Cropped or form.crops > 1:
        return None
    if folder.classes != sorted(folder.classes, key=os.path.normcase):      # it did not sort numbers
        return None
    pictures = folder.pictures
    try:
        # Sums of hashes are equal where the names are, in whatever order.
        count, total = 0, 0
        for path, _, names in os.walk(folder.path):
            for file in (Path(path, name) for name in names):
                if file.suffix.lower() in endings() and os.path.isfile(file):
                    count += 1
                    total += pictures.key(pictures.name_of(file))
        ours = sum(map(pictures.key, pictures.names))
        if (count, total) != (len(pictures), ours) or any(map(_changes_colours, pictures)):
            return None
        return digest("folder", form.size, _with_times(folder))
    except OSError:                         # a folder that may not be entered stopped that version
        return None


def _with_times(folder: Folder) -> Iterator[tuple[str, int, int]]:
    for picture in folder.pictures:
        about = picture.stat()
        yield str(picture.relative_to(folder.path)), about.st_size, about.st_mtime_ns


def _changes_colours(path: Path) -> bool:
    """Whether the picture has a colour profile other than sRGB, which was not applied formerly."""
    try:
        with open_header(path) as image:
            profile = image.info.get("icc_profile")
            mode = {"1": "L", "LA": "L", "L": "L", "CMYK": "CMYK"}.get(image.mode, "RGB")
            return bool(profile) and srgb_transform(profile, mode) is not None
    except Exception:                       # such a profile is not applied now either
        return False


def _decode(folder: Folder, form: Form, about: np.ndarray, stamp_path: Path) -> Iterator[np.ndarray]:
    """The arrays of every picture that can be decoded, one at a time; `about` takes their sizes."""
    useless, broken = Head(), Head()        # of colour profiles, and of pictures
    thing = folder.wanted.thing
    for i, picture in enumerate(tqdm(folder.pictures, desc=f"decode {thing}s", unit="file")):
        try:
            arrays = form.read(picture, useless)
        except Exception as error:          # Pillow raises a dozen types; each means: skip this file
            line = _skipped(picture, error)
            if broken.append(line):
                tqdm.write(line, file=sys.stderr)
            continue
        about["height"][i], about["width"][i] = form.size_of(arrays[0])
        yield from arrays
    _tell_of_others(folder, broken)
    keep = about["height"] > 0
    if not keep.any():
        raise _none_decodes(folder)
    useless.tell(f"--data {folder.path}: colours taken as sRGB, because a colour profile cannot be used")
    if folder.labels is not None:
        empty = Head()
        for label in np.flatnonzero(np.bincount(folder.labels[keep], minlength=len(folder.classes)) == 0):
            empty.append(folder.classes[label])
        empty.tell(f"--data {folder.path}: classes left out, because none of their {thing}s can be used")
    stamp_path.unlink(missing_ok=True)      # never an old stamp beside a new array


def _check_one_decodes(folder: Folder, form: Form) -> None:
    """Raises ValueError, and names the first pictures, where none can be decoded."""
    broken = Head()
    for picture in folder.pictures:
        try:
            form.read(picture, Head())
            return
        except Exception as error:
            broken.append(_skipped(picture, error))
    for line in broken.names:
        print(line, file=sys.stderr)
    _tell_of_others(folder, broken)
    raise _none_decodes(folder)


def _none_decodes(folder: Folder) -> ValueError:
    thing, count = folder.wanted.thing, len(folder.pictures)
    what = f"its one {thing} cannot" if count == 1 else f"none of its {counted(count, thing)} can"
    return ValueError(f"--data {folder.path}: {what} be used")


def _skipped(picture: Path, error: Exception) -> str:
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, (OSError, ValueError)) and str(error):         # written for people, as a rule
        reason = getattr(error, "strerror", None) or str(error)
    return f"skipped {shortened(str(picture), 300)}: {shortened(reason, 300)}"


def _tell_of_others(folder: Folder, broken: Head) -> None:
    if broken.others:
        count = counted(len(folder.pictures), folder.wanted.thing)
        print(f"skipped {broken.others:,} more of {count}, which cannot be used either", file=sys.stderr)


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
        train, val = split_rows(len(decoded.keep), folder.labels[decoded.keep])
        print(f"{len(train)} for training, {len(val)} for validation")
        del decoded                             # Windows does not delete a file that is still mapped


if __name__ == "__main__":
    demo()
