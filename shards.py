"""Pictures or latents in tar shards of the WebDataset layout: any sample at random, in bounded memory.

    python shards.py                                    # writes two shards, and reads an epoch of them
    python shards.py 'shards/{00000..01023}.tar'        # what these hold
    python train.py --arch dit --objective rf --data 'shards/{00000..01023}.tar' --image-size 256

A sample is KEY.jpg, .jpeg, .png or .webp with KEY.cls (a class), KEY.txt (a caption) or KEY.json ("text" or
"caption", "label"), one after another; KEY ends at the first dot of a member's last part. The headers of
every shard are read once, into an index that is memory-mapped. The order is a function of step and seed: the
shards of an epoch are permuted, then the samples within each group of shards. encode.py writes latents as
shards.
"""

from __future__ import annotations

import functools
import glob
import hashlib
import io
import itertools
import json
import os
import re
import stat
import sys
import tarfile
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ahead import Ahead, in_processes
from files import amount, digest, locked, read_stamp, replacing, shortened, warn_once, write_stamp
from folder import LITTER, clean_text, crop_places, natural
from pictures import Size, cover, read_image

PICTURES = ("jpg", "jpeg", "png", "webp")       # endings of a picture's member
LARGEST = {"picture": 2**28, "text": 2**20}     # bytes of a member; a larger one is left out
GROUP = 16              # shards whose samples are permuted together
TRIES = 64              # how many samples in turn may stand in for one that cannot be decoded
MANIFEST = "manifest.json"      # in a folder of latents: what they were encoded from
VAE_FILE = "vae.pt"             # beside it: the VAE that encoded them


# ---- which shards there are

class Shards(NamedTuple):
    """The shards that --data names, found but not yet read."""
    source: str
    files: tuple[str, ...]
    words: str | None = None        # "captions" where those are asked for
    manifest: dict | None = None    # of latents
    workers: int = 0                # processes that read and decode
    flip: bool = False              # whether latents of mirrored pictures are used


def find_shards(source: str, words: str | None = None) -> Shards | None:
    """The shards that `source` names: a .tar, a pattern with {00000..01023}, {a,b}, *, ? or [...], or a
    folder of shards without pictures. None where it names none of these. Raises ValueError where some are
    missing."""
    patterns = [source]
    if os.path.isdir(source):
        if not _is_folder_of_shards(source):
            return None
        patterns = [os.path.join(glob.escape(source), "*.tar")]
    elif not os.path.exists(source):
        if not source.endswith(".tar"):
            return None
        patterns = list(itertools.islice(expand(source), 10**6 + 1))
        if len(patterns) > 10**6:
            raise ValueError(f"--data {shortened(source)}: names more than a million shards; give fewer")
    elif not source.endswith(".tar"):
        return None
    files, missing = [], []
    for pattern in patterns:
        found = [pattern]
        if not os.path.exists(pattern) and set("*?[") & set(pattern):
            found = sorted(glob.glob(pattern), key=natural)
        found = [file for file in found if os.path.isfile(file)]
        files += found
        if not found:
            missing.append(pattern)
    if missing:
        raise ValueError(f"--data {shortened(source)}: {len(missing):,} of {len(patterns):,} shards are not "
                         f"there, such as {shortened(missing[0])}; fetch them, or name those that are there")
    manifest = read_manifest(Path(files[0]).parent)
    if manifest is not None and os.path.isdir(source):
        absent = sorted(set(manifest["shards"]) - {os.path.basename(file) for file in files})
        if absent:
            raise ValueError(f"--data {source}: {len(absent):,} of {len(manifest['shards']):,} shards are "
                             f"not encoded yet, such as {absent[0]}; repeat the command of encode.py, or "
                             "name those that are there by a pattern")
    return Shards(source, tuple(dict.fromkeys(files)), words, manifest)


def _is_folder_of_shards(folder: str) -> bool:
    """Whether its shards are all that a training could read: an archive that lies beside pictures or class
    folders leaves it a folder of pictures."""
    shards = False
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(".") or entry.name.lower() in LITTER:
                    continue
                if entry.is_dir() or entry.name.rpartition(".")[2].lower() in PICTURES:
                    return False
                shards = shards or entry.name.endswith(".tar")
    except OSError:                 # folder.py names the reason
        return False
    return shards


def expand(pattern: str) -> Iterator[str]:
    """The names that braces stand for, in their order: a{01..03}b is a01b, a02b, a03b, and {x,y} is x, y."""
    found = re.search(r"\{([^{}]*)\}", pattern)
    if found is None:
        yield pattern
        return
    parts: Iterable[str] = found[1].split(",")
    bounds = re.fullmatch(r"(\d+)\.\.(\d+)", found[1])
    if bounds:
        first, last = int(bounds[1]), int(bounds[2])
        width = max(map(len, bounds.groups())) if any(text[0] == "0" for text in bounds.groups()) else 0
        parts = (f"{i:0{width}d}" for i in range(first, last + 1))
    for part in parts:
        for rest in expand(pattern[found.end():]):
            yield pattern[:found.start()] + part + rest


def read_manifest(folder: Path) -> dict | None:
    """The manifest that encode.py wrote, or None. Raises ValueError where it is damaged."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    found = read_stamp(path)
    if "latents" not in found and found:
        return None                                 # another program's
    kinds = {"vae": str, "size": list, "shape": list, "flips": int, "channels": int, "shards": list,
             "source": str, "vae_path": str}
    if any(type(found.get(name)) is not kind for name, kind in kinds.items()) or not all(
            type(side) is int and 0 < side < 2**16 for side in [*found["size"], *found["shape"]]):
        raise ValueError(f"{path}: damaged; encode into another folder, or restore it")
    return found


# ---- the index: where each sample lies

ROW = np.dtype([("offset", "<i8"), ("bytes", "<u4"),            # of the picture, or the latent
                ("text", "<i8"), ("text_bytes", "<u4"), ("json", "?"),      # of the caption; 0 bytes: none
                ("label", "<i4")])                              # in the order of first appearance; -1: none


Place = tuple[int, int]         # of a member in a shard: where its content begins, and its bytes


class Scanned(NamedTuple):
    """What the headers of one shard say."""
    rows: np.ndarray            # (n,) of ROW
    labels: list[str]           # their classes, in the order of first appearance
    digest: str                 # changes with any name or size in it
    stat: tuple[int, int]       # bytes of the file, and its time
    left_out: list[str]         # members, with the reason; the first dozen
    left_out_count: int
    error: str = ""             # why it cannot be used, and the remedy


class _Headers(io.FileIO):
    """A file of which tarfile reads headers: a header that claims gigabytes is refused, not read."""

    def read(self, size: int = -1) -> bytes:
        if not 0 <= size <= 2**20:
            raise ValueError(f"a header of {size:,} bytes")
        return super().read(size)


def scan_shard(path: str) -> Scanned:
    """Read the headers of a shard, and its classes. What is no plain file, or lies outside by its name, is
    left out; nothing is ever extracted."""
    return _scan(_Scan(path))


def members_of(path: str) -> list[tuple[str, dict[str, Place]]]:
    """Every sample of a shard: its key, and where its "picture", "cls", "txt" and "json" lie. Raises
    ValueError where the shard is damaged."""
    found = _Scan(path)
    found.samples = []
    error = _scan(found).error
    if error:
        raise ValueError(f"{path}: {error}")
    return found.samples


def _scan(found: _Scan) -> Scanned:
    path = found.path
    error = ""
    try:
        with _Headers(path) as file:
            about = os.fstat(file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise ValueError("is no file")
            end = _walk(file, found)
            file.seek(end)
            mark = file.read(512)
            if len(mark) < 512:
                where = f"after {found.last}" if about.st_size <= end else "in its mark of the end"
                error = f"truncated: it ends {where}, without the mark of the end; write or copy it again"
            elif any(mark):
                error = f"damaged at byte {end:,}: no header of an archive is there; write or copy it again"
    except (OSError, ValueError, tarfile.TarError, RecursionError, OverflowError) as problem:
        reason = getattr(problem, "strerror", None) or str(problem) or type(problem).__name__
        error = f"damaged, or not an uncompressed .tar ({shortened(reason)}); write or copy it again"
        if "unexpected end of data" in reason:
            error = f"truncated: it ends within {found.last}; write or copy it again"
        if isinstance(problem, OSError):
            error = f"cannot be read ({reason}); make it readable"
        return found.result((0, 0), error)
    return found.result((about.st_size, about.st_mtime_ns), error)


def _walk(file: _Headers, found: _Scan) -> int:
    """Give every member to `found`; return where the last one ends."""
    with tarfile.open(fileobj=file, mode="r:") as tar:
        end = -1
        while (member := tar.next()) is not None:
            tar.members.clear()                     # tarfile would keep them all
            if member.size < 0 or tar.offset <= end:
                raise ValueError(f"the header of {shortened(member.name)} points backwards")
            end = tar.offset
            found.last = shortened(member.name)
            found.add(member, file)
        return tar.offset


class _Scan:
    """The samples of one shard, member by member."""

    def __init__(self, path: str):
        self.path = path
        self.last = "its start"
        self.parts: list[np.ndarray] = []           # complete rows, as arrays
        self.rows: list[tuple] = []                 # and those since
        self.labels: dict[str, int] = {}
        self.sha256 = hashlib.sha256()
        self.left_out: list[str] = []
        self.left_out_count = 0
        self.samples: list[tuple[str, dict[str, Place]]] | None = None      # of members_of
        self.begin(None)

    def begin(self, key: str | None) -> None:
        self.key = key
        self.picture = self.text = None             # their places
        self.label = self.json_label = None         # the former, of .cls, counts
        self.is_json = False
        self.places: dict[str, Place] = {}

    def end(self) -> None:
        if self.picture is not None and self.samples is not None:
            self.samples.append((self.key, {"picture": self.picture} | self.places))
        elif self.picture is not None:
            text = self.text or (0, 0)
            label = self.json_label if self.label is None else self.label
            number = -1 if label is None else self.labels.setdefault(label, len(self.labels))
            self.rows.append((*self.picture, *text, self.is_json, number))
            if len(self.rows) == 2**16:             # tuples take ten times as much as an array
                self.parts.append(np.array(self.rows, ROW))
                self.rows = []
        elif self.text is not None or self.label is not None or self.json_label is not None:
            self.leave_out(self.key, "has no picture of its key right before or after it")
        self.begin(None)

    def leave_out(self, name: str, reason: str) -> None:
        self.left_out_count += 1
        if len(self.left_out) < 12:
            self.left_out.append(f"{self.path}: {shortened(name)} {reason}")

    def add(self, member: tarfile.TarInfo, file: IO[bytes]) -> None:
        name = member.name
        self.sha256.update(f"{name}\0{member.size}\n".encode("utf-8", "surrogateescape"))
        if member.isdir():
            return
        folder, _, base = name.rpartition("/")
        stem, _, ending = base.partition(".")
        ending = ending.lower()
        parts = name.lower().split("/")
        hidden = any(part.startswith(".") and part not in (".", "..") for part in parts)
        if not stem or hidden or set(parts) & LITTER:       # the last are files that systems leave
            return
        if member.type not in (tarfile.REGTYPE, tarfile.AREGTYPE) or member.sparse is not None:
            return self.leave_out(name, "is a link, a device or a sparse file")
        if name.startswith("/") or ".." in name.split("/"):
            return self.leave_out(name, "has a name that leads out of the archive")
        key = f"{folder}/{stem}" if folder else stem
        if key != self.key:
            self.end()
            self.begin(key)
        place = (member.offset_data, member.size)
        if ending in PICTURES or ending == "npy":
            if self.picture is not None:
                self.leave_out(name, "is a second picture of its key")
            elif not 0 < member.size <= LARGEST["picture"]:
                self.leave_out(name, f"has {amount(member.size)}, where at most "
                                     f"{amount(LARGEST['picture'])} are read")
            else:
                self.picture = place
        elif ending in ("cls", "txt", "json"):
            if member.size > LARGEST["text"]:
                self.leave_out(name, f"has {amount(member.size)}, where at most {amount(LARGEST['text'])} "
                                     "are read")
            elif ending == "txt" and member.size:
                self.text, self.is_json = place, False
                self.places[ending] = place
            elif member.size:
                file.seek(member.offset_data)
                self.add_annotation(name, ending, place, file.read(member.size))

    def add_annotation(self, name: str, ending: str, place: tuple[int, int], raw: bytes) -> None:
        """A class, or a JSON object that may hold a class and a caption."""
        try:
            if ending == "cls":
                self.label = _class_name(raw.decode("utf-8-sig"))
                self.places[ending] = place
                return
            row = json.loads(raw)
            if "label" in row:
                self.json_label = _class_name(row["label"])
            if self.text is None and isinstance(_caption_of(row), str):
                self.text, self.is_json = place, True
            self.places[ending] = place
        except (ValueError, TypeError, KeyError, RecursionError):
            self.leave_out(name, "cannot be read as " + ("a class" if ending == "cls" else "a JSON object"))

    def result(self, about: tuple[int, int], error: str) -> Scanned:
        self.end()
        rows = np.concatenate([*self.parts, np.array(self.rows, ROW)])
        return Scanned(rows, list(self.labels), self.sha256.hexdigest()[:32], about, self.left_out,
                       self.left_out_count, error)


def _class_name(value: object) -> str:
    """A number, or a name in one line; 7, "7" and "07" are one class."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise ValueError("no class")
    name = clean_text(str(value))
    if not name or len(name) > 200:
        raise ValueError("no class")
    return str(int(name)) if name.isdecimal() else name


def _caption_of(row: dict) -> object:
    return row["text"] if "text" in row else row.get("caption")


class Index:
    """Where every sample of some shards lies. Samples are numbered through all shards, in their order.
    `replaced` holds the samples that turned out to be broken, each with the one that stands in for it."""

    def __init__(self, path: Path, stamp: dict, files: Sequence[str]):
        self.path = path
        self.stamp = stamp
        self.files = list(files)
        self.abouts = [tuple(about) for about in stamp["abouts"]]
        self.rows = np.memmap(path, ROW, "r")
        self.starts = np.concatenate([[0], np.cumsum(stamp["counts"], dtype=np.int64)])     # (S + 1,)
        self.fingerprint: str = stamp["digest"]
        self.classes = sorted(stamp["classes"], key=natural)
        place = {name: i for i, name in enumerate(self.classes)}
        self.order = np.array([place[name] for name in stamp["classes"]], np.int64)     # by first appearance
        self.replaced: dict[int, int] = {}
        self._open: OrderedDict[int, IO[bytes]] = OrderedDict()
        self._process = os.getpid()

    def __reduce__(self):                           # for workers on systems that cannot fork
        return Index, (self.path, self.stamp, self.files)

    def __len__(self) -> int:
        return len(self.rows)

    def shard_of(self, samples: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, samples, "right") - 1

    def file(self, shard: int) -> IO[bytes]:
        """The open shard. Raises ValueError where it is not what the index was made of."""
        if self._process != os.getpid():            # a forked worker would share the position in the file
            self._open, self._process = OrderedDict(), os.getpid()
        if shard not in self._open:
            path = self.files[shard]
            try:
                file = open(path, "rb", buffering=0)
            except OSError as error:
                raise ValueError(f"{path}: cannot be read ({error.strerror}); restore it") from None
            about = os.fstat(file.fileno())
            if (about.st_size, about.st_mtime_ns) != self.abouts[shard]:
                raise ValueError(f"{path}: changed since this program began; start it again")
            self._open[shard] = file
            if len(self._open) > 2 * GROUP:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(shard)
        return self._open[shard]

    def bytes(self, sample: int, offset: int, size: int) -> bytes:
        """`size` bytes of the shard of this sample."""
        file = self.file(int(self.shard_of(sample)))
        file.seek(offset)
        parts = []
        while size > 0 and (part := file.read(size)):       # a raw file may return less than asked for
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def payload(self, sample: int) -> bytes:
        row = self.rows[sample]
        return self.bytes(sample, int(row["offset"]), int(row["bytes"]))

    def name(self, sample: int) -> str:
        """The name of its picture in the shard, at most its last 100 bytes."""
        header = self.bytes(sample, int(self.rows[sample]["offset"]) - 512, 100)
        return header.rstrip(b"\0").decode("utf-8", "replace")

    def where(self, sample: int) -> str:
        return f"{self.files[int(self.shard_of(sample))]}: {shortened(self.name(sample))}"

    def caption(self, sample: int) -> str:
        row = self.rows[sample]
        raw = self.bytes(sample, int(row["text"]), int(row["text_bytes"]))
        if row["json"]:
            return clean_text(_caption_of(json.loads(raw)))
        return clean_text(raw.decode("utf-8-sig", "replace"))

    def first_without(self, part: str, value: int) -> int:
        """The first sample of which this part of its row has this value."""
        for start in range(0, len(self), 2**20):
            wrong = np.flatnonzero(self.rows[start:start + 2**20][part] == value)
            if len(wrong):
                return start + int(wrong[0])
        return 0


def open_index(shards: Shards, cache_dir: Path) -> Index:
    """The index of these shards, from its cache, which is rebuilt where a shard has another size or time.
    Raises ValueError with one line where a shard is truncated, damaged or without pictures."""
    stamp_path, path = cache_dir / "shards.json", cache_dir / "shards.index"
    with locked(cache_dir / "shards.lock", wait=True, clean=(stamp_path, path)):
        stamp = read_stamp(stamp_path)
        try:
            abouts = [[about.st_size, about.st_mtime_ns] for about in map(os.stat, shards.files)]
            size = sum(stamp["counts"]) * ROW.itemsize
            fits = (stamp["abouts"] == abouts and len(stamp["counts"]) == len(abouts)
                    and size == path.stat().st_size and stamp["row"] == str(ROW))
        except (OSError, KeyError, TypeError):
            fits = False
        if not fits:
            stamp_path.unlink(missing_ok=True)
            stamp = _build_index(shards, path)
            write_stamp(stamp_path, stamp)
        return Index(path, stamp, shards.files)


def _build_index(shards: Shards, path: Path) -> dict:
    """Write the rows of all shards, in their order, and return the stamp."""
    counts, abouts, digests, left_out = [], [], [], []
    classes: dict[str, int] = {}
    totals = {"left out": 0, "captions": 0, "labels": 0}
    scans = in_processes(scan_shard, shards.files, shards.workers)
    with replacing(path) as out:
        for file, found in zip(shards.files, tqdm(scans, desc="index shards", unit="shard", delay=2,
                                                  total=len(shards.files))):
            if found.error:
                raise ValueError(f"{file}: {found.error}, or leave it out of --data")
            rows = found.rows
            numbers = np.array([classes.setdefault(name, len(classes)) for name in found.labels] + [-1],
                               "<i4")
            rows["label"] = numbers[rows["label"]]      # -1 is the last of them
            if len(classes) > 10**5:
                raise ValueError(f"{file}: more than 100,000 classes; put captions into .txt, not .cls")
            out.write(rows.tobytes())
            counts.append(len(rows))
            abouts.append(list(found.stat))
            digests.append(found.digest)
            left_out += found.left_out[:12 - len(left_out)]
            totals["left out"] += found.left_out_count
            totals["captions"] += int((rows["text_bytes"] > 0).sum())
            totals["labels"] += int((rows["label"] >= 0).sum())
        if not sum(counts):
            first = f"; {left_out[0]}" if left_out else ""
            raise ValueError(f"--data {shortened(shards.source)}: no pictures in these shards (looked for "
                             f"members KEY.{', KEY.'.join(PICTURES)}){first}")
    if left_out:
        more = totals["left out"] - len(left_out)
        print(f"--data {shortened(shards.source, 400)}: left out: {'; '.join(left_out)}"
              f"{f' and {more:,} more' if more else ''}", file=sys.stderr)
    return {"digest": digest("shards", digests), "counts": counts, "abouts": abouts, "classes": list(classes),
            "captions": totals["captions"], "labels": totals["labels"], "row": str(ROW)}


# ---- what a training takes from the index

def validation_samples(count: int) -> np.ndarray:
    """The numbers of the samples for validation, in order: every 20th, and of more than 256 of these as many,
    spread over all shards."""
    if count <= 20 * 256:
        return np.arange(0, count, 20)
    return np.arange(256) * count // 256


class TrainingRows:
    """Which sample is the n-th of the training part: all but those for validation, which are few, so that no
    array of all of them is needed."""

    def __init__(self, count: int, left_out: np.ndarray):
        if len(left_out) == count:                  # a single one serves for both parts
            left_out = left_out[:0]
        self.left_out = left_out
        self.ahead = left_out - np.arange(len(left_out))    # how many rows are before each of them
        self.count = count - len(left_out)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return rows + np.searchsorted(self.ahead, rows, "right")

    def per_shard(self, index: Index) -> np.ndarray:
        """(S,) how many rows each shard has."""
        taken = np.bincount(index.shard_of(self.left_out), minlength=len(index.files))
        return np.diff(index.starts) - taken


class Chosen:
    """The few samples of the validation part, in place of TrainingRows."""

    def __init__(self, samples: np.ndarray):
        self.samples = samples
        self.left_out = samples[:0]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, rows: np.ndarray) -> np.ndarray:
        return self.samples[rows]


class ShardOrder:
    """The order of the data: called with a step, it returns the rows of its batch. The shards of each epoch
    are permuted and cut into groups; the rows of each group are permuted. It is a pure function of step and
    seed (see data.batch_indices), and only the rows of a group or two are ever held.

    counts (S,): rows of every shard, numbered through. limit: how many of all rows are taken, of every shard
    its share, at random but always the same."""

    def __init__(self, counts: np.ndarray, batch_size: int, seed: int, group: int = GROUP,
                 limit: int | None = None):
        self.counts = np.asarray(counts, np.int64)
        self.starts = np.concatenate([[0], np.cumsum(self.counts)])
        self.taken = self.counts
        total = int(self.starts[-1])
        if limit is not None:
            if limit > total:
                raise ValueError(f"--limit {limit}: there are {total:,} pictures to train on; give fewer, or "
                                 "leave it out")
            # In Python's integers, because the product may exceed 64 bits.
            self.taken = np.diff(np.array([int(start) * limit // total for start in self.starts]))
        self.total = int(self.taken.sum())
        self.batch_size = batch_size
        self.seed = seed
        self.group = group
        self._shards = functools.lru_cache(2)(self._shards_of)
        self._rows = functools.lru_cache(2)(self._rows_of)      # two across the end of a group

    def __len__(self) -> int:
        return self.total

    def __call__(self, step: int) -> np.ndarray:
        """(batch_size,) int64."""
        position = step * self.batch_size
        left = self.batch_size
        parts = []
        while left:
            epoch, k = divmod(position, self.total)
            _, ends = self._shards(epoch)
            number = int(np.searchsorted(ends, k, "right"))         # of the group
            first = int(ends[number - 1]) if number else 0
            part = self._rows(epoch, number)[k - first:k - first + left]
            parts.append(part)
            position += len(part)
            left -= len(part)
        return np.concatenate(parts)

    def _shards_of(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The shards in the order of this epoch, and where each group of them ends, in samples."""
        shards = np.random.default_rng([self.seed, epoch]).permutation(len(self.counts))
        ends = np.cumsum(self.taken[shards])
        last = np.minimum(np.arange(self.group, len(shards) + self.group, self.group), len(shards)) - 1
        return shards, ends[last]

    def _rows_of(self, epoch: int, number: int) -> np.ndarray:
        shards, _ = self._shards(epoch)
        chosen = shards[number * self.group:(number + 1) * self.group]
        rows = np.concatenate([self._rows_of_shard(int(shard)) for shard in chosen])
        return np.random.default_rng([self.seed, epoch, number]).permutation(rows)

    def _rows_of_shard(self, shard: int) -> np.ndarray:
        start, count, taken = int(self.starts[shard]), int(self.counts[shard]), int(self.taken[shard])
        if taken == count:
            return np.arange(start, start + count)
        return start + np.sort(np.random.default_rng([0, shard]).permutation(count)[:taken])


# ---- pictures

class Named(io.BytesIO):
    """A picture in memory that messages call by its name."""
    name = ""

    def __str__(self) -> str:
        return self.name


class ShardPictures:
    """(N, H, W, 3) uint8, decoded where it is indexed, by numbers or a slice, as pictures in a folder are. A
    picture that cannot be decoded is replaced, with its class and caption, by the next one of its shard that
    can, and named on stderr."""

    def __init__(self, index: Index, size: Size, rows: TrainingRows | Chosen, crops: int = 1,
                 workers: int = 0):
        self.index = index
        self.rows = rows
        self.crops = crops
        self.shape = (crops * len(rows), *size, 3)
        self.skip = set(rows.left_out.tolist())     # a picture for validation stands in for none in training
        self.ahead = Ahead(self.read, workers)
        self.told = 0

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def replaced(self) -> dict[int, int]:
        return self.index.replaced

    def expect(self, requests: Iterable[np.ndarray]) -> None:
        """See Ahead."""
        self.ahead.expect(requests)

    def __getitem__(self, indices) -> np.ndarray:
        images, notes = self.ahead(as_numbers(indices, len(self)))
        for sample, other, reason in notes:
            if sample not in self.replaced:
                self.replaced[sample] = other
                self.tell(sample, other, reason)
        return images

    def read(self, indices: np.ndarray) -> tuple[np.ndarray, list[tuple]]:
        """The pictures, and of each that was replaced: its sample, the other one, and why."""
        images = np.empty((len(indices), *self.shape[1:]), np.uint8)
        samples = self.rows[indices // self.crops]
        notes: list[tuple] = []
        for i in np.argsort(samples, kind="stable"):        # as they lie in the shards
            image, name = self.decode(int(samples[i]), notes)
            place = crop_places(name, self.crops)[int(indices[i] % self.crops)] if self.crops > 1 else 0.5
            images[i] = cover(image, self.shape[1:3], place)
        return images, notes

    def decode(self, sample: int, notes: list[tuple]):
        """The picture of a sample, or of the one that stands in for it, and its name in the shard."""
        first = reason = None
        for other in self.candidates(sample):
            useless: list[str] = []
            try:
                file = Named(self.index.payload(other))
                file.name = self.index.where(other)
                image = read_image(file, "white", useless)
            except Exception as error:      # Pillow raises a dozen types; each means: leave it out
                reason = f"{type(error).__name__}: {error}"
                if isinstance(error, ValueError) and "changed since" in str(error):
                    raise
                first = first or reason
                continue
            if other != sample:
                notes.append((sample, other, first))
            if useless:
                warn_once("profiles", f"{useless[0]}: its colour profile cannot be used; the colours of such "
                          "pictures are taken as sRGB")
            return image, self.index.name(other) if self.crops > 1 else ""
        raise ValueError(f"{self.index.where(sample)}: neither it nor the {TRIES} pictures after it can be "
                         f"decoded ({shortened(str(reason))}); write this shard again, or leave it out of "
                         "--data")

    def candidates(self, sample: int) -> Iterator[int]:
        """The sample, then those after it in its shard, from whose end it goes on at the start."""
        yield sample
        shard = int(self.index.shard_of(sample))
        start, stop = int(self.index.starts[shard]), int(self.index.starts[shard + 1])
        others = (start + (sample - start + k) % (stop - start) for k in range(1, stop - start))
        yield from itertools.islice((other for other in others if other not in self.skip), TRIES)

    def tell(self, sample: int, other: int, reason: str) -> None:
        """The first few are named; then every tenfold number of them is said."""
        self.told += 1
        if self.told <= 8:
            tqdm.write(f"skipped {self.index.where(sample)}: {shortened(reason, 300)}; "
                       f"{shortened(self.index.name(other))} stands in for it", file=sys.stderr)
        elif str(self.told).strip("0") == "1":
            tqdm.write(f"skipped {self.told:,} pictures so far that cannot be decoded", file=sys.stderr)


def as_numbers(indices, count: int) -> np.ndarray:
    if isinstance(indices, slice):
        return np.arange(count)[indices] if count < 2**20 else np.arange(*indices.indices(count))
    return np.atleast_1d(np.asarray(indices))


class ShardLabels:
    """(N,) int64 classes, read where they are indexed."""

    def __init__(self, index: Index, rows: TrainingRows | Chosen, crops: int = 1):
        self.index = index
        self.rows = rows
        self.crops = crops

    def __len__(self) -> int:
        return self.crops * len(self.rows)

    def samples(self, indices) -> np.ndarray:
        """Whose class and caption belong to these rows: of a broken picture, those of the one in its
        place."""
        samples = self.rows[as_numbers(indices, len(self)) // self.crops]
        if self.index.replaced:
            samples = np.array([self.index.replaced.get(int(sample), int(sample)) for sample in samples],
                               np.int64)
        return samples

    def __getitem__(self, indices) -> np.ndarray:
        return self.index.order[self.index.rows["label"][self.samples(indices)]]


class ShardCaptions(ShardLabels):
    """Captions, read where they are indexed, one by its number or several by a slice. names: of the classes,
    where they serve as captions."""

    def __init__(self, index: Index, rows: TrainingRows | Chosen, crops: int = 1,
                 names: list[str] | None = None):
        super().__init__(index, rows, crops)
        self.names = names

    def __getitem__(self, indices) -> str | list[str]:
        if self.names is not None:
            found = [self.names[label] for label in super().__getitem__(indices)]
        else:
            found = [self.index.caption(int(sample)) for sample in self.samples(indices)]
        return found if isinstance(indices, (slice, np.ndarray, list)) else found[0]


# ---- latents

class NoPictures(NamedTuple):
    """Stands where pictures would be: only their shape is known."""
    shape: tuple[int, int, int, int]

    def __len__(self) -> int:
        return self.shape[0]


def npy_header(shape: tuple[int, ...]) -> bytes:
    """What precedes the numbers of a latent in its .npy."""
    out = io.BytesIO()
    np.lib.format.write_array_header_1_0(out, {"descr": "<f2", "fortran_order": False, "shape": tuple(shape)})
    return out.getvalue()


class ShardLatents:
    """The posteriors of pictures, as cache.LatentCache has them, read from shards where they are asked for.
    flip: whether mirrored ones are among them."""

    def __init__(self, index: Index, manifest: dict, rows: TrainingRows | Chosen, flip: bool,
                 workers: int = 0):
        self.index = index
        self.rows = rows
        self.shape = (manifest["flips"], 2, *manifest["shape"])         # of one sample
        self.flips = 2 if flip else 1
        self.header = npy_header(self.shape)
        self.ahead = Ahead(self.read, workers)

    def __len__(self) -> int:
        return len(self.rows)

    def expect(self, requests: Iterable[np.ndarray]) -> None:
        self.ahead.expect(requests)

    def read(self, indices: np.ndarray) -> np.ndarray:
        """(B, flips, 2, C, h, w) float16."""
        found = np.empty((len(indices), self.flips, *self.shape[1:]), np.float16)
        samples = self.rows[indices]
        for i in np.argsort(samples, kind="stable"):
            raw = self.index.payload(int(samples[i]))
            values = np.frombuffer(raw, "<f2", offset=len(self.header)) if raw.startswith(self.header) else ()
            if len(values) != np.prod(self.shape):
                raise ValueError(f"{self.index.where(int(samples[i]))}: no latent of shape {self.shape}, as "
                                 f"{MANIFEST} has it; encode this shard again")
            found[i] = values.reshape(self.shape)[:self.flips]
        return found

    def means(self) -> Tensor:
        """(N, C, h, w) float32: of all of them, which must be few."""
        return torch.from_numpy(self.read(np.arange(len(self)))[:, 0, 0].astype(np.float32))

    def batch(self, indices: np.ndarray, part: slice = slice(None),
              generator: torch.Generator | None = None) -> Tensor:
        """z (B, C, h, w) float32, as LatentCache.batch draws it, of this part of the batch alone."""
        read = torch.from_numpy(self.ahead(indices[part]))
        flip = torch.randint(self.flips, (len(indices),), generator=generator)[part]
        noise = torch.randn((len(indices), *self.shape[2:]), generator=generator)[part]
        mean, std = read[torch.arange(len(flip)), flip].float().unbind(1)
        return mean + std * noise


# ---- writing

def npy_bytes(values: np.ndarray) -> bytes:
    return npy_header(values.shape) + np.ascontiguousarray(values, "<f2").tobytes()


def add_member(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    """Without a time or an owner, so that equal samples make equal shards."""
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def write_shard(path: Path, samples: Iterable[tuple[str, dict[str, bytes]]]) -> None:
    """Write samples, each a key and its members by their ending, as a shard that replaces `path` when it is
    complete."""
    with replacing(path) as file, tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for key, members in samples:
            for ending, content in members.items():
                add_member(tar, f"{key}.{ending}", content)


def demo() -> None:
    """Two shards of gradients with classes, and an epoch of them, read by two processes."""
    from PIL import Image
    with tempfile.TemporaryDirectory() as temporary:
        for shard in range(2):
            samples = []
            for i in range(30):
                out = io.BytesIO()
                Image.new("RGB", (48, 40), (8 * i, 100 * shard, 0)).save(out, "PNG")
                samples.append((f"{i:04d}", {"png": out.getvalue(), "cls": str(i % 3).encode()}))
            write_shard(Path(temporary) / f"{shard:05d}.tar", samples)
        found = find_shards(f"{temporary}/{{00000..00001}}.tar")
        index = open_index(found, Path(temporary) / "cache")
        rows = TrainingRows(len(index), validation_samples(len(index)))
        images, labels = ShardPictures(index, (32, 32), rows, workers=2), ShardLabels(index, rows)
        order = ShardOrder(rows.per_shard(index), batch_size=19, seed=0)
        images.expect(map(order, range(3)))
        seen = []
        for step in range(3):
            batch = order(step)
            seen += batch.tolist()
            print(f"step {step}: {images[batch].shape}, classes {labels[batch].tolist()}")
        print(f"{len(index)} samples, of which {len(rows)} are trained on; an epoch has each once: "
              f"{sorted(seen) == list(range(57))}")
        images.expect(())


def main() -> None:
    if len(sys.argv) < 2:
        return demo()
    shards = find_shards(sys.argv[1])
    if shards is None:
        raise SystemExit(f"{sys.argv[1]}: neither a .tar, a pattern of some, nor a folder of shards")
    with tempfile.TemporaryDirectory() as temporary:
        index = open_index(shards, Path(temporary))
        print(f"{len(index):,} samples in {len(index.files):,} shards, {index.stamp['captions']:,} with a "
              f"caption, {index.stamp['labels']:,} of {len(index.classes):,} classes")


if __name__ == "__main__":
    main()
