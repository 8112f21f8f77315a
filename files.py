"""Files on disk: fingerprints, locks, atomic writes, memory-mapped arrays, and outputs that a later process
continues.

    python files.py                       # a file that is written and interrupted, and a lock that is held

Every file of this project is replaced as a whole, by `replacing` or `write_atomically`: it is always the
complete old one or the complete new one, whatever kills the process. What is computed once lies beside its
stamp, a small JSON file that names what it was computed from.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import torch
from torch import Tensor


# ---- messages

# Control characters, line separators, marks that turn the direction of text, halves of surrogate pairs.
UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_warned: set[str] = set()       # what this process has warned of


def shortened(text: str, limit: int = 80) -> str:
    """For messages: a name or a caption may be of any length, and hold what a terminal would obey."""
    cut = text if len(text) <= limit else f"{text[:limit]}..."
    return UNPRINTABLE.sub(lambda found: found[0].encode("unicode_escape").decode(), cut)


def amount(size: int) -> str:
    """A number of bytes as a person would say it."""
    for unit, digits, bytes_of_unit in (("GiB", 1, 2**30), ("MiB", 0, 2**20)):
        if size >= bytes_of_unit:
            return f"{size / bytes_of_unit:,.{digits}f} {unit}"
    return f"{size / 2**10:,.0f} KiB"


def counted(number: int, thing: str = "picture") -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


class Head:
    """The first of many names, for a message of a bounded length, and how many there are."""

    def __init__(self):
        self.names: list[str] = []
        self.count = 0

    @property
    def others(self) -> int:
        return self.count - len(self.names)

    def append(self, name: str) -> bool:
        """Whether it is among the first."""
        self.count += 1
        if self.count <= 12:
            self.names.append(name)
        return self.count <= 12

    def tell(self, what: str) -> None:
        """One line on stderr, if there are any."""
        if self.count:
            more = f" and {self.others:,} more" if self.others else ""
            print(f"{shortened(what, 400)}: {'; '.join(shortened(name, 300) for name in self.names)}{more}",
                  file=sys.stderr)


def warn_once(kind: str, text: str) -> None:
    """A warning on stderr, only the first of its kind in this process, also while a progress bar is open."""
    if kind not in _warned:
        from tqdm import tqdm
        _warned.add(kind)
        tqdm.write(f"warning: {shortened(text, 1000)}", file=sys.stderr)


# ---- fingerprints: short names that change with the content

def digest(*parts) -> str:
    """32 hexadecimal digits of SHA-256 over arrays (their bytes) and any other values (their repr). An
    iterator gives what a list of its items would, none of which is kept."""
    sha256 = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha256.update(np.ascontiguousarray(part))
        elif isinstance(part, Iterator):
            sha256.update(b"[")
            for i, item in enumerate(part):
                sha256.update(f"{', ' if i else ''}{item!r}".encode())
            sha256.update(b"]")
        else:
            sha256.update(repr(part).encode())
    return sha256.hexdigest()[:32]


def fingerprint_tensors(tensors: dict[str, Tensor]) -> str:
    """The digest of these weights and their names."""
    parts = []
    for name in sorted(tensors):
        weight = tensors[name].detach().cpu()
        if weight.dtype == torch.bfloat16:                 # which numpy does not have
            weight = weight.view(torch.int16)
        parts += [name, weight.numpy()]
    return digest(*parts)


def fingerprint_files(folder: Path, pattern: str) -> str:
    """The digest of the matching files' names, sizes and last 4 KiB, wherever the folder lies. The end of an
    archive holds its checksums, so that gigabytes of weights need not be read."""
    parts = []
    for file in sorted(path for path in folder.rglob(pattern) if path.is_file()):
        with open(file, "rb") as content:
            size = content.seek(0, os.SEEK_END)
            content.seek(max(0, size - 4096))
            end = hashlib.sha256(content.read()).hexdigest()
        parts.append((str(file.relative_to(folder)), size, end))
    return digest(parts)


# ---- files: locks, atomic writes, stamps, memory-mapped arrays

@contextmanager
def locked(path: Path, wait: bool = False, clean: tuple[Path, ...] = ()) -> Iterator[None]:
    """Hold a lock on this file. If another process holds it, wait or raise BlockingIOError. The operating
    system releases the lock when the process ends, however it ends. A file system that has no locks is warned
    of, and the block runs without one.

    clean: files that are written under this lock only; what a killed process left of them is removed. Raises
    OSError with one line where a folder has the name of one of them."""
    for written in clean:
        if written.is_dir():
            raise OSError(f"{written}: a folder, where a file belongs; remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_symlink() or (path.exists() and not path.is_file()):
        raise OSError(f"{path}: a link or no ordinary file, so it cannot serve as a lock; remove it")
    with open(path, "a") as file, _held_here_only(file):
        try:
            _lock(file, wait)
        except BlockingIOError:
            raise
        except OSError as error:
            # Safe, because every file is replaced as a whole: at worst two processes do the same work.
            warn_once("locks", f"{path}: this file system has no locks ({error}); going on without any, so "
                      "start no second process that uses its folder")
        else:
            for written in clean:
                remove_leftovers(written)
        yield


_held: set[int] = set()         # descriptors of the locks of this process


@contextmanager
def _held_here_only(file: IO) -> Iterator[None]:
    _held.add(file.fileno())
    try:
        yield
    finally:
        _held.discard(file.fileno())


def _let_go() -> None:
    """In a forked process, which would otherwise hold its parent's locks after the parent's death."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


def _lock(file: IO, wait: bool) -> None:
    if os.name == "nt":
        import msvcrt
        try:
            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        except OSError as error:
            raise BlockingIOError(str(error)) from None
    else:
        import fcntl
        fcntl.flock(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def fresh_file(path: Path) -> Path:
    """A new empty file beside `path`, which is to replace it. Its name is its own and it is created
    exclusively: in a folder from elsewhere, a link under a name that can be guessed would be followed, and
    overwrite the file that it points to."""
    while True:
        fresh = path.with_name(f"{_leftover_prefix(path)}{secrets.token_hex(8)}.part")
        try:
            os.close(os.open(fresh, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
            return fresh
        except FileExistsError:
            continue


def remove_leftovers(path: Path) -> None:
    """Remove what killed processes have left of `path`. Only for the process that may write it."""
    for leftover in path.parent.glob(f"{glob.escape(_leftover_prefix(path))}{'[0-9a-f]' * 16}.part"):
        leftover.unlink(missing_ok=True)


def _leftover_prefix(path: Path) -> str:
    # Hidden, so that nothing takes it for a result; truncated, because names have at most 255 bytes.
    return f".{path.name[:40]}."


@contextmanager
def replacing(path: Path, sync: bool = True) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends. `path` is thus always either the
    complete old file or the complete new one, and a link in its place is replaced, not followed. Raises
    OSError with one line that names the file and, where it may be the reason, the space left. sync: survive
    a power cut as well, at the cost of waiting for the disk."""
    partial = None
    try:
        partial = fresh_file(path)
        with open(partial, "wb") as file:
            yield file
            file.flush()
            if sync:    # before the rename: otherwise a power cut could leave the new name without content
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        message = f"cannot write {path}"
        # a full disk, or any error of torch.save, which does not say which
        if error.errno in (errno.ENOSPC, None) and path.parent.is_dir():
            message += f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB left on the device)"
        # strerror alone, because the whole error names the temporary file
        raise OSError(f"{message}: {error.strerror or error}".splitlines()[0]) from None
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object], sync: bool = True) -> None:
    """Call write(file) on a file that replaces `path` once it is complete. Raises OSError as `replacing`."""
    with replacing(path, sync) as file:
        try:
            write(file)
        except RuntimeError as error:            # this is how torch.save reports a full disk
            reason = str(error)
            if "enforce fail" in reason or "PytorchStreamWriter" in reason:
                reason = "the disk is full or the file too large"
            raise OSError(reason) from None


def check_writable(path: Path) -> None:
    """Raise ValueError where no file of this name can be created, or no file in a folder of this name."""
    try:
        longest = max(len(os.fsencode(part)) for part in path.parts or ("",))
    except UnicodeEncodeError:
        raise ValueError(f"{str(path)!a}: a name that cannot be written in {sys.getfilesystemencoding()}, "
                         "the encoding of this system's file names; choose another") from None
    if longest > 235:                      # of 255 bytes; the rest is for endings of temporary files
        raise ValueError(f"{str(path)[:40]}...: a name of {longest} bytes; at most 235 are possible")
    place = path / "picture" if path.is_dir() else path
    while not place.parent.exists():
        place = place.parent               # the first folder that would be created
    try:
        fresh_file(place).unlink()
    except OSError as error:
        raise ValueError(f"{path}: cannot be written ({error.strerror}); choose another place") from None


def read_stamp(path: Path) -> dict:
    """The stamp, or an empty one where there is none or it is damaged."""
    try:
        stamp = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except (OSError, ValueError, RecursionError):
        stamp = {}
    return stamp if isinstance(stamp, dict) else {}


def write_stamp(path: Path, stamp: dict) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(stamp).encode()))


def new_array(path: Path, dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped array in a new .npy file beside `path`, to be renamed to it when it is complete
    (`filename` is its present name). Its space is allocated at once, because a memory map that later runs
    into a full disk kills the process. Raises OSError with one line where there is no room."""
    size = _bytes_of(dtype, shape)
    partial = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if shutil.disk_usage(path.parent).free < size:
            raise OSError(errno.ENOSPC, "No space left on device")
        partial = fresh_file(path)
        array = np.lib.format.open_memmap(partial, "w+", dtype, shape)
        if hasattr(os, "posix_fallocate"):
            with open(partial, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
    except OSError as error:
        if partial is not None:
            partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path} of {amount(size)}: {error.strerror}") from None
    return array


def place_array(path: Path, dtype, shape: tuple[int, ...]) -> None:
    """A new array in the place of `path`, to be filled piece by piece. Raises OSError as new_array."""
    array = new_array(path, dtype, shape)
    partial = Path(array.filename)
    del array                               # Windows does not rename a file that is still mapped
    partial.replace(path)


def open_array(path: Path, dtype, shape: tuple[int, ...], mode: str = "r") -> np.ndarray | None:
    """The memory-mapped array of a .npy file, or None where the file is missing, truncated, damaged in its
    header, or of another type or shape."""
    try:
        array = np.load(path, mmap_mode=mode) if path.is_file() else None
        return array if array.dtype == dtype and array.shape == tuple(shape) else None
    except Exception:                   # NumPy raises a dozen types for a damaged file
        return None


def _bytes_of(dtype, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


def nearest_folder(path: Path) -> Path:
    """The folder itself, or the first one above it that exists."""
    path = path.absolute()
    while not path.is_dir():
        path = path.parent
    return path


def check_space(path: Path, need: int, counted: Path | None = None) -> None:
    """Raise ValueError where the disk has no room for this many bytes at `path`. counted: a file that is a
    part of them already."""
    free = shutil.disk_usage(nearest_folder(path)).free
    if counted is not None and counted.is_file():
        free += counted.stat().st_size
    if need > free:
        raise ValueError(f"takes {amount(need)}, and {amount(free)} are left on the device; draw fewer "
                         "pictures, or make room")


# ---- long outputs, which a later process continues

class Unfinished:
    """How many pictures of a long output are done, and the settings they were drawn with, in a small file
    beside them. Without such a file, or with a damaged one, none are. Raises ValueError where that file names
    other settings."""

    def __init__(self, path: Path, settings: dict):
        self.path = path
        self.settings = json.loads(json.dumps(settings))       # as it is read again: lists for tuples
        found = read_stamp(path)
        before = found.get("settings")
        self.done: int = found.get("done")
        if type(self.done) is not int or self.done < 0 or not isinstance(before, dict):
            self.done = 0
            before = {}
        for name, value in before.items():
            if value != self.settings.get(name):
                drawn, wanted = (shortened(str(setting)) for setting in (value, self.settings.get(name)))
                raise ValueError(f"{path}: {self.done:,} pictures are there, drawn with {name} {drawn}, not "
                                 f"{wanted}; repeat that command to continue, use another --out, or remove "
                                 "that file to start over")

    def advance(self, done: int) -> None:
        self.done = done
        write_stamp(self.path, {"done": done, "settings": self.settings})

    def finish(self) -> None:
        self.path.unlink(missing_ok=True)


@contextmanager
def continued(path: Path, size: int) -> Iterator[IO[bytes]]:
    """Open a file to write on after its first `size` bytes; what follows is cut off. It stays when the block
    is interrupted. A link in its place is not followed. Raises OSError with one line that names the file,
    also where another process is writing it."""
    try:
        if path.is_symlink():
            raise OSError("it is a link; remove it, or use another --out")
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        with open(path, "r+b", opener=lambda name, _: os.open(name, flags, 0o666)) as file:
            try:
                _lock(file, wait=False)
            except BlockingIOError:
                raise OSError("another process is writing it") from None
            except OSError:                                    # a file system without locks
                pass
            file.truncate(size)
            file.seek(size)
            yield file
    except OSError as error:
        if str(error).startswith("cannot write"):              # of `replacing`, within the block
            raise
        raise OSError(f"cannot write {path}: {error.strerror or error}") from None


def unfinished_file(out: Path) -> Path:
    """The pictures of an .npz that is not finished, one after another."""
    return out.with_name(f"{out.name}.unfinished")


@contextmanager
def npz_writer(file: IO[bytes], shape: tuple[int, ...],
               dtype: type = np.uint8) -> Iterator[Callable[[bytes], object]]:
    """Write an .npz in the layout of the ADM evaluation suite, with one array `arr_0` of this shape, piece by
    piece, so that 50,000 pictures need not fit into memory."""
    # force_zip64: the size is not known in advance, and may exceed 4 GiB. A ZipInfo has no time of day, so
    # that equal arrays make equal files.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive, archive.open(
            zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as out:
        header = {"descr": np.dtype(dtype).str, "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(out, header)
        yield out.write


def write_npz(out: Path, batches: Callable[..., Iterator[np.ndarray]], shape: tuple[int, ...],
              settings: dict, dtype: type = np.uint8) -> None:
    """Write batches(first), from picture `first` on, to an .npz as npz_writer does. They are collected in an
    unfinished file, where a later process finds how far this one came. settings: see Unfinished."""
    raw = unfinished_file(out)
    unfinished = Unfinished(out.with_name(f"{raw.name}.json"), settings)
    size = math.prod(shape[1:]) * np.dtype(dtype).itemsize             # bytes of a picture
    there = raw.stat().st_size if raw.is_file() else 0
    if unfinished.done > shape[0] or there < unfinished.done * size:
        unfinished.done = 0
    with continued(raw, unfinished.done * size) as file:
        for images in batches(unfinished.done):
            file.write(np.ascontiguousarray(images).tobytes())
            file.flush()
            os.fsync(file.fileno())
            unfinished.advance(unfinished.done + len(images))
        file.seek(0)
        with replacing(out) as target, npz_writer(target, shape, dtype) as write:
            while piece := file.read(2**20):
                write(piece)
    unfinished.finish()
    raw.unlink()


def demo() -> None:
    """Interrupt a write, look at what is left, and hold a lock that a second holder is refused."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        write_atomically(path, lambda file: file.write(b"old"))
        try:
            with replacing(path) as file:
                file.write(b"ne")
                raise KeyboardInterrupt
        except KeyboardInterrupt:
            print(f"after an interrupted write: {path.read_bytes().decode()}, {os.listdir(folder)}")
        write_atomically(path, lambda file: file.write(b"new"))
        print(f"after a complete one: {path.read_bytes().decode()}, {os.listdir(folder)}")
        lock = Path(folder) / "lock"
        with locked(lock):
            try:
                with locked(lock):
                    print("held twice")
            except BlockingIOError:
                print("a second holder is refused while the first holds the lock")


if __name__ == "__main__":
    demo()
