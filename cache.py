"""Encoder outputs that are computed once and kept on disk: latents of pictures, text vectors of prompts.

    python cache.py                       # caches the outputs of a toy encoder and opens the cache again

A cache is an array beside its stamp, a small JSON file that names what the array was computed from; with any
other stamp it is rebuilt, never used. Encoders are callbacks and pictures are plain arrays, so that this file
imports no other of the project. Its second half (fingerprints, locks, atomic writes) serves other files too.

Shapes: N pictures, B batch, C channels, h w latent size, L tokens, D and P widths of context and pooled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm


# ---- latents

class LatentCache:
    """The Gaussian posterior of every picture, encoded once: `latents`, float16 (N, flips, 2, C, h, w),
    memory-mapped. The axis of 2 holds mean and standard deviation, so that each training step draws a fresh
    z ~ q(z|x). With `flip`, flips is 2: a mirrored picture has its own latent, which is not the mirror image
    of the latent.

    images: array-like (N, H, W, channels) uint8, indexed by arrays of ints. encode(images, mirrored), called
    without gradients, returns mean and standard deviation, each (B, *latent_shape); it mirrors the pictures
    itself. stamp: the fingerprints {"vae": ..., "data": ...}."""

    def __init__(self, path: Path, images: np.ndarray,
                 encode: Callable[[np.ndarray, bool], tuple[Tensor, Tensor]],
                 latent_shape: tuple[int, int, int], stamp: dict[str, str], flip: bool = False):
        flips = 2 if flip else 1
        shape = (len(images), flips, 2, *latent_shape)
        stamp = stamp | {"shape": list(shape)}
        stamp_path = path.with_suffix(".json")
        # A second process that needs the same latents waits here, then finds them complete.
        with locked(path.with_suffix(".lock"), wait=True):
            found = read_stamp(stamp_path)
            # The size is checked because an interrupted copy of a run leaves a file that is too short.
            complete = path.is_file() and path.stat().st_size >= _bytes_of(np.float16, shape)
            if found != stamp or not complete:
                if found:
                    print(f"{path} was made from another VAE or other data: rebuilding it")
                # First, so that an interruption cannot leave the old stamp beside a new array.
                stamp_path.unlink(missing_ok=True)
                self._build(path, images, encode, shape)
                write_stamp(stamp_path, stamp)
            self.latents = np.load(path, mmap_mode="r")

    @staticmethod
    @torch.no_grad()
    def _build(path: Path, images: np.ndarray, encode: Callable, shape: tuple[int, ...]) -> None:
        partial = path.with_suffix(".part")
        store = new_array(partial, np.float16, shape)
        try:
            for piece in tqdm(pieces(images.shape), desc="encode latents", unit="batch"):
                pictures = images[np.array(piece)]
                for flip in range(shape[1]):
                    mean, std = encode(pictures, flip == 1)
                    store[piece.start:piece.stop, flip, 0] = mean.cpu().numpy()
                    store[piece.start:piece.stop, flip, 1] = std.cpu().numpy()
            store.flush()
            del store                        # Windows does not rename a file that is still mapped
            partial.replace(path)
        except BaseException:                # also Ctrl-C: leave no half-built file behind
            store = None                     # Windows does not delete a file that is still mapped
            partial.unlink(missing_ok=True)
            raise

    def __len__(self) -> int:
        return len(self.latents)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Per-channel mean and variance, each (C,) float64, of z ~ q(z|x) over all pictures and pixels."""
        total = 0.0
        total_of_squares = 0.0
        for i in range(0, len(self), 1024):
            part = self.latents[i:i + 1024].astype(np.float64)          # (n, flips, 2, C, h, w)
            mean, std = part.transpose(2, 3, 0, 1, 4, 5)                # each (C, n, flips, h, w)
            total = total + mean.reshape(len(mean), -1).sum(1)
            # E[z^2] of a Gaussian is mean^2 + std^2: exact, without drawing a sample.
            total_of_squares = total_of_squares + (mean**2 + std**2).reshape(len(mean), -1).sum(1)
        count = self.latents.size / (2 * self.latents.shape[3])         # numbers per channel
        mean = total / count
        return torch.from_numpy(mean), torch.from_numpy(total_of_squares / count - mean**2)

    def batch(self, indices: np.ndarray, generator: torch.Generator | None = None) -> Tensor:
        """z (B, C, h, w) float32, not normalised: drawn from the posteriors of the chosen pictures, each of
        which is mirrored or not at random where the cache holds both."""
        # Runs resume bit for bit only as long as the order of these two draws stays: flip, then noise.
        flip = torch.randint(self.latents.shape[1], (len(indices),), generator=generator)
        chosen = torch.from_numpy(self.latents[indices, flip.numpy()]).float()            # (B, 2, C, h, w)
        mean, std = chosen.unbind(1)
        return mean + std * torch.randn(mean.shape, generator=generator)


def pieces(shape: tuple[int, ...]) -> list[range]:
    """Ranges that split pictures of shape (N, H, W, C) into pieces of about equal memory: 256 pictures of
    32 x 32, or as many as have the same number of pixels."""
    n, height, width, _ = shape
    size = max(1, 256 * 32 * 32 // (height * width))
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


# ---- text

class TextWidths(NamedTuple):
    """Widths of a text encoder's output: D of context, and P of pooled or None."""
    context: int
    pooled: int | None


class TextCache:
    """The output of a frozen text encoder for every distinct prompt and for "", the null condition. It is
    called like the encoder, with prompts that it was built from, and returns CPU tensors.

    On disk: the valid rows of every context, one prompt after another, as float16 (rows, D) without a header;
    in an .npz beside it, the row where each prompt ends, and the pooled vectors. Raises ValueError where the
    encoder's outputs differ in width or do not fit float16."""

    def __init__(self, path: Path, prompts: list[str], encode: Callable[[list[str]], dict[str, Tensor]],
                 encoder_fingerprint: str):
        prompts = sorted({"", *prompts})
        stamp = {"encoder": encoder_fingerprint, "prompts": digest(prompts)}
        stamp_path, index_path = path.with_suffix(".json"), path.with_suffix(".npz")
        with locked(path.with_suffix(".lock"), wait=True):
            # How many rows there are is known only after encoding, so the stamp keeps the size of the file.
            size = path.stat().st_size if path.is_file() else None
            if read_stamp(stamp_path) != stamp | {"bytes": size} or not index_path.is_file():
                stamp_path.unlink(missing_ok=True)
                self._build(path, index_path, prompts, encode)
                write_stamp(stamp_path, stamp | {"bytes": path.stat().st_size})
            with np.load(index_path) as arrays:
                self.ends = arrays["ends"]                              # (prompts + 1,), the first is 0
                self.pooled = arrays["pooled"] if "pooled" in arrays else None
            self.rows = np.memmap(path, np.float16, "r").reshape(self.ends[-1], -1)
        self.index = {prompt: i for i, prompt in enumerate(prompts)}

    @staticmethod
    def _build(path: Path, index_path: Path, prompts: list[str], encode: Callable) -> None:
        lengths = [0]
        pooled = []
        widths = None
        with replacing(path) as out:
            for i in tqdm(range(0, len(prompts), 64), desc="encode prompts", unit="batch"):
                cond = encode(prompts[i:i + 64])
                found = [cond[name].shape[-1] for name in ("context", "pooled") if name in cond]
                widths = widths or found
                if found != widths:
                    raise ValueError(f"{prompts[i]} or one of the next: text vectors of widths {found}, "
                                     f"not {widths} as for the prompts before")
                if not (cond["context"].abs() < 65504).all():           # NaN fails this as well
                    raise ValueError(f"{prompts[i]} or one of the next: text vectors that are not finite "
                                     "numbers below 65504, the limit of float16")
                # Padding, which can be most of a context, is not stored.
                for row, mask in zip(cond["context"], cond["mask"]):
                    out.write(row[mask].half().cpu().numpy().tobytes())
                    lengths.append(int(mask.sum()))
                if "pooled" in cond:
                    pooled.append(cond["pooled"].float().cpu().numpy())
        arrays = {"ends": np.cumsum(lengths)}
        if pooled:
            arrays["pooled"] = np.concatenate(pooled)
        write_atomically(index_path, lambda file: np.savez(file, **arrays))

    @property
    def widths(self) -> TextWidths:
        pooled = None if self.pooled is None else self.pooled.shape[1]
        return TextWidths(self.rows.shape[1], pooled)

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """-> context (B, L, D), mask (B, L), and pooled (B, P) where the encoder has one. L is the longest of
        these prompts."""
        chosen = [self.index[prompt] for prompt in prompts]
        rows = [torch.from_numpy(self.rows[self.ends[i]:self.ends[i + 1]].astype(np.float32)) for i in chosen]
        pooled = None if self.pooled is None else torch.from_numpy(self.pooled[chosen])
        return pad_context(rows, pooled)


def pad_context(rows: list[Tensor], pooled: Tensor | None) -> dict[str, Tensor]:
    """B tensors (length, D) -> context (B, L, D) with zeros at padded positions, mask (B, L) that is True at
    valid positions, and pooled (B, P) if given."""
    lengths = torch.tensor([len(row) for row in rows])
    cond = {"context": torch.nn.utils.rnn.pad_sequence(rows, batch_first=True),
            "mask": torch.arange(lengths.max()) < lengths[:, None]}
    if pooled is not None:
        cond["pooled"] = pooled
    return cond


class TextVectors(NamedTuple):
    """One prompt's precomputed encoder output: context (L, D) without padding, pooled (P,) or None."""
    context: Tensor
    pooled: Tensor | None


def read_embeddings(files: list[str]) -> dict[str, Tensor]:
    """Encoder outputs that another program computed, one .npz file per prompt: context (L, D), mask (L,) if
    some rows are padding, pooled (P,) if there is one. The name "" is the null condition, one vector of
    zeros.

    -> context (B, L, D), mask (B, L) and, if the files have it, pooled (B, P), as a text encoder returns
    them. Raises ValueError for a file with any other content and for files that differ in width."""
    found = {file: _read_vectors(file) for file in dict.fromkeys(files) if file}     # each file once
    # Any of the files gives the widths of the null condition.
    first = next(iter(found.values()))
    null_pooled = None if first.pooled is None else torch.zeros_like(first.pooled)
    found[""] = TextVectors(torch.zeros_like(first.context[:1]), null_pooled)

    vectors = [found[file] for file in files]
    widths = {(v.context.shape[1], None if v.pooled is None else v.pooled.shape) for v in vectors}
    if len(widths) > 1:
        raise ValueError(f"{files[-1]} and others: their vectors differ in width, or only some have pooled")
    pooled = None
    if first.pooled is not None:
        pooled = torch.stack([v.pooled for v in vectors])
    return pad_context([v.context for v in vectors], pooled)


def _read_vectors(file: str) -> TextVectors:
    try:
        with np.load(file) as arrays:
            context = torch.from_numpy(arrays["context"].astype(np.float32))
            if "mask" in arrays:
                context = context[torch.from_numpy(arrays["mask"].astype(bool))]
            pooled = None
            if "pooled" in arrays:
                pooled = torch.from_numpy(arrays["pooled"].astype(np.float32))
        if context.ndim != 2 or len(context) == 0:
            raise ValueError("context must be of shape (L, D)")
    except Exception as error:      # NumPy and zipfile raise a dozen types for a damaged file
        raise ValueError(f"{file}: not an .npz with context (L, D), and optionally mask (L,) and pooled (P,) "
                         f"({type(error).__name__})") from None
    return TextVectors(context, pooled)


# ---- fingerprints: short names that change with the content

def digest(*parts) -> str:
    """32 hexadecimal digits of SHA-256 over arrays (their bytes) and any other values (their repr)."""
    sha256 = hashlib.sha256()
    for part in parts:
        if isinstance(part, np.ndarray):
            sha256.update(np.ascontiguousarray(part))
        else:
            sha256.update(repr(part).encode())
    return sha256.hexdigest()[:32]


def fingerprint_tensors(tensors: dict[str, Tensor]) -> str:
    """The digest of these weights and their names."""
    parts = []
    for name in sorted(tensors):
        parts += [name, tensors[name].detach().cpu().numpy()]
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
def locked(path: Path, wait: bool = False) -> Iterator[None]:
    """Hold a lock on this file. If another process holds it, wait or raise BlockingIOError. The operating
    system releases the lock when the process ends, however it ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        if os.name == "nt":
            import msvcrt
            mode = msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK
            try:
                msvcrt.locking(file.fileno(), mode, 1)
            except OSError as error:
                raise BlockingIOError(str(error)) from None
        else:
            import fcntl
            mode = fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB
            fcntl.flock(file, mode)
        yield


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file that replaces `path` when the block ends. `path` is thus always either the
    complete old file or the complete new one. Raises OSError with one line that names the file and the space
    left."""
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            yield file
            # On disk before the rename: otherwise a power cut could leave the new name without content.
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        message = f"cannot write {path}"
        if path.parent.is_dir():
            message += f" ({shutil.disk_usage(path.parent).free / 2**20:.0f} MiB left on the device)"
        raise OSError(f"{message}: {error}".splitlines()[0]) from None
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Call write(file) on a file that replaces `path` once it is complete. Raises OSError as `replacing`."""
    with replacing(path) as file:
        try:
            write(file)
        except RuntimeError as error:            # this is how torch.save reports a full disk
            raise OSError(str(error)) from None


def read_stamp(path: Path) -> dict:
    """The stamp, or an empty one where there is none or it is damaged."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def write_stamp(path: Path, stamp: dict) -> None:
    write_atomically(path, lambda file: file.write(json.dumps(stamp).encode()))


def new_array(path: Path, dtype, shape: tuple[int, ...]) -> np.ndarray:
    """A memory-mapped array in a new .npy file. Its space is allocated at once, because a memory map that
    later runs into a full disk kills the process. Raises OSError with one line where there is no room."""
    size = _bytes_of(dtype, shape)
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


def _bytes_of(dtype, shape: tuple[int, ...]) -> int:
    return int(np.prod(shape)) * np.dtype(dtype).itemsize


# ---- demonstration

def demo() -> None:
    """Open one cache three times: empty, complete, and with another stamp."""
    images = np.random.default_rng(0).integers(0, 256, (1000, 32, 32, 3), dtype=np.uint8)
    encoded = []

    def encode(pictures: np.ndarray, mirrored: bool) -> tuple[Tensor, Tensor]:
        """A toy encoder: means over 4 x 4 pixels and a constant deviation, each (B, 3, 8, 8)."""
        encoded.append(len(pictures))
        x = torch.from_numpy(pictures).permute(0, 3, 1, 2) / 127.5 - 1.0
        mean = torch.nn.functional.avg_pool2d(x.flip(-1) if mirrored else x, 4)
        return mean, torch.full_like(mean, 0.1)

    with tempfile.TemporaryDirectory() as folder:
        for opening, vae in (("first", "vae 1"), ("second", "vae 1"), ("with another stamp", "vae 2")):
            encoded.clear()
            stamp = {"vae": vae, "data": "noise"}
            cache = LatentCache(Path(folder) / "latents.npy", images, encode, (3, 8, 8), stamp, flip=True)
            print(f"opened {opening}: {sum(encoded):,} pictures encoded, {len(cache):,} in the cache")
        mean, variance = cache.statistics()
        print("per channel: mean", mean.numpy().round(3), "variance", variance.numpy().round(3))
        print("a batch of three:", tuple(cache.batch(np.array([3, 1, 4])).shape))
        del cache                                # Windows does not delete a file that is still mapped


if __name__ == "__main__":
    demo()
