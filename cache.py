"""What is computed once and kept on disk: latents of pictures, text vectors of prompts, a run's samples.

    python cache.py                       # caches the outputs of a toy encoder and opens the cache again

A cache is an array beside its stamp, a small JSON file that names what the array was computed from; with any
other stamp it is rebuilt, never used. Encoders are callbacks and pictures are plain arrays.

Shapes: N pictures, B batch, C channels, h w latent size, L tokens, D and P widths of context and pooled.
"""

from __future__ import annotations

import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from files import (amount, digest, locked, new_array, open_array, read_stamp, replacing, shortened,
                   write_atomically, write_stamp)
from ragged import Ragged, groups_of_equal


# ---- latents

PIECE = 256 * 32 * 32       # pixels that are encoded at a time


class LatentCache:
    """The Gaussian posterior of every picture, encoded once: `latents`, float16 (N, flips, 2, C, h, w),
    memory-mapped. The axis of 2 holds mean and standard deviation, so that each training step draws a fresh
    z ~ q(z|x). With `flip`, flips is 2: a mirrored picture has its own latent, which is not the mirror image
    of the latent.

    images: array-like (N, H, W, channels) uint8, indexed by arrays of ints. encode(images, mirrored), called
    without gradients, returns mean and standard deviation, each (B, *latent_shape); it mirrors the pictures
    itself. stamp: the fingerprints {"vae": ..., "data": ...}. former: other fingerprints of the same
    data, under which an earlier version may have stored its latents."""

    def __init__(self, path: Path, images: np.ndarray,
                 encode: Callable[[np.ndarray, bool], tuple[Tensor, Tensor]],
                 latent_shape: tuple[int, int, int], stamp: dict[str, str], flip: bool = False,
                 former: tuple[str, ...] = ()):
        flips = 2 if flip else 1
        shape = (len(images), flips, 2, *latent_shape)
        stamp = stamp | {"shape": list(shape)}
        stamp_path = path.with_suffix(".json")
        # A second process that needs the same latents waits here, then finds them complete.
        with locked(path.with_suffix(".lock"), wait=True, clean=(path, stamp_path)):
            found = read_stamp(stamp_path)
            fits = found == stamp or any(found == stamp | {"data": name} for name in former)
            # The array is checked because an interrupted copy of a run leaves a file that is too short.
            latents = open_array(path, np.float16, shape) if fits else None
            if latents is None:
                if found and not fits:
                    print(f"{path} was made from another VAE or other data: rebuilding it")
                elif found:
                    print(f"{path} is {'damaged' if path.exists() else 'missing'}: rebuilding it")
                # First, so that an interruption cannot leave the old stamp beside a new array.
                stamp_path.unlink(missing_ok=True)
                self._build(path, images, encode, shape)
                latents = np.load(path, mmap_mode="r")
            if read_stamp(stamp_path) != stamp:
                write_stamp(stamp_path, stamp)
            self.latents = latents

    @staticmethod
    @torch.no_grad()
    def _build(path: Path, images: np.ndarray, encode: Callable, shape: tuple[int, ...]) -> None:
        store = new_array(path, np.float16, shape)
        partial = Path(store.filename)
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

    def batch(self, indices: np.ndarray, part: slice = slice(None),
              generator: torch.Generator | None = None) -> Tensor:
        """z (B, C, h, w) float32, not normalised: drawn from the posteriors of the chosen pictures, each of
        which is mirrored or not at random where the cache holds both. part: which of them are returned; the
        random numbers are drawn for all."""
        # Runs resume bit for bit only as long as the order of these two draws stays: flip, then noise.
        flip = torch.randint(self.latents.shape[1], (len(indices),), generator=generator)
        noise = torch.randn((len(indices), *self.latents.shape[3:]), generator=generator)
        chosen = torch.from_numpy(self.latents[indices[part], flip.numpy()[part]]).float()
        mean, std = chosen.unbind(1)                                                      # (B, 2, C, h, w)
        return mean + std * noise[part]


class MixedLatentCache:
    """LatentCache for pictures of different sizes: `latents`, a Ragged of float16 (flips, 2, C, h, w) for
    each. images: a Ragged of (H, W, channels) uint8. channels, factor: of the VAE. encode, stamp, flip: as
    there; it is called with pictures of one size."""

    def __init__(self, path: Path, images: Ragged,
                 encode: Callable[[np.ndarray, bool], tuple[Tensor, Tensor]], channels: int,
                 factor: int, stamp: dict[str, str], flip: bool = False):
        sides = images.shapes[:, :2] // factor
        ahead = np.tile([2 if flip else 1, 2, channels], (len(images), 1))
        shapes = np.concatenate([ahead, sides], axis=1)                 # (N, 5)
        numbers = int(shapes.prod(1).sum())
        stamp = stamp | {"shapes": digest(shapes)}
        stamp_path = path.with_suffix(".json")
        with locked(path.with_suffix(".lock"), wait=True, clean=(path, stamp_path)):
            found = read_stamp(stamp_path)
            flat = open_array(path, np.float16, (numbers,)) if found == stamp else None
            if flat is None:
                if found:
                    why = "was made from another VAE or other data"
                    if found == stamp:
                        why = f"is {'damaged' if path.exists() else 'missing'}"
                    print(f"{path} {why}: rebuilding it")
                stamp_path.unlink(missing_ok=True)                      # never an old stamp and a new array
                self._build(path, images, encode, shapes, numbers)
                write_stamp(stamp_path, stamp)
                flat = np.load(path, mmap_mode="r")
            self.latents = Ragged(flat, shapes)

    @staticmethod
    @torch.no_grad()
    def _build(path: Path, images: Ragged, encode: Callable, shapes: np.ndarray, numbers: int) -> None:
        flat = new_array(path, np.float16, (numbers,))
        store, partial = Ragged(flat, shapes), Path(flat.filename)
        try:
            groups = groups_of_equal(images.shapes[:, :2], PIECE)
            for group in tqdm(groups, desc="encode latents", unit="batch"):
                pictures = images.stack(group)
                for flip in range(shapes[0, 0]):
                    mean, std = encode(pictures, flip == 1)
                    for i, *pair in zip(group, mean.cpu().numpy(), std.cpu().numpy()):
                        store[i][flip] = pair
            flat.flush()
            flat = store = None              # Windows does not rename a file that is still mapped
            partial.replace(path)
        except BaseException:                # also Ctrl-C: leave no half-built file behind
            flat = store = None
            partial.unlink(missing_ok=True)
            raise

    def __len__(self) -> int:
        return len(self.latents)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """As LatentCache: over all pixels, so that a large picture counts more than a small one."""
        total = total_of_squares = count = 0
        for i in range(len(self)):
            mean, std = self.latents[i].astype(np.float64).swapaxes(0, 1)       # each (flips, C, h, w)
            total = total + mean.sum((0, 2, 3))
            total_of_squares = total_of_squares + (mean**2 + std**2).sum((0, 2, 3))
            count += mean.size // mean.shape[1]
        mean = total / count
        return torch.from_numpy(mean), torch.from_numpy(total_of_squares / count - mean**2)

    def batch(self, indices: np.ndarray, generator: torch.Generator | None = None) -> Tensor:
        """z of the chosen pictures, float32 and not normalised, one after another in (n,): `split` cuts it
        into them."""
        flip = torch.randint(int(self.latents.shapes[0, 0]), (len(indices),), generator=generator)
        chosen = [torch.from_numpy(self.latents[int(i)][f].astype(np.float32)).flatten(1)
                  for i, f in zip(indices, flip)]
        mean, std = torch.cat(chosen, dim=1).unbind()
        return mean + std * torch.randn(mean.shape, generator=generator)

    def split(self, z: Tensor, indices: np.ndarray) -> list[Tensor]:
        """Views of it, (C, h, w) each."""
        shapes = self.latents.shapes[indices, 2:].tolist()
        parts = z.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes)]


def pieces(shape: tuple[int, ...]) -> list[range]:
    """Ranges that split pictures of shape (N, H, W, C) into pieces of about equal memory: 256 pictures of
    32 x 32, or as many as have the same number of pixels."""
    n, height, width, _ = shape
    size = max(1, PIECE // (height * width))
    return [range(start, min(start + size, n)) for start in range(0, n, size)]


# ---- samples

def noise_of(numbers: Iterable[int], shape: tuple[int, ...]) -> Tensor:
    """(B, *shape), the noise of the samples with these numbers: sample i has a generator of its own, seeded
    with i, as in sample.py."""
    generators = [torch.Generator().manual_seed(int(i)) for i in numbers]
    return torch.stack([torch.randn(shape, generator=generator) for generator in generators])


class PairCache:
    """Samples, each with the noise that it was drawn from: `samples`, float16 (N, *shape), memory-mapped. The
    noise is not stored, but drawn again by `noise_of`.

    draw(part), of a range of numbers, returns their samples (len(part), *shape). The stamp, which names what
    they are drawn from and how, also counts those that are done, so that an interrupted cache goes on where
    it was. With draw None, raises ValueError where the cache is not complete."""

    def __init__(self, path: Path, count: int, shape: tuple[int, int, int],
                 draw: Callable[[range], Tensor] | None, stamp: dict, at_once: int = 64):
        self.drawn_from = stamp
        self.stamp = stamp | {"shape": [count, *shape]}
        stamp_path = path.with_suffix(".json")
        with locked(path.with_suffix(".lock"), wait=True, clean=(path, stamp_path)):
            found = read_stamp(stamp_path)
            done = found.pop("done", 0)
            samples = None
            if found == self.stamp and type(done) is int and 0 <= done <= count:
                samples = open_array(path, np.float16, (count, *shape), mode="r+")
            if samples is None:
                if found:
                    print(f"{path} was drawn otherwise, or is damaged: drawing it again")
                stamp_path.unlink(missing_ok=True)
                samples, done = self._allocate(path, (count, *shape)), 0
            if done < count:
                if draw is None:
                    raise ValueError(f"{path}: {done:,} of {count:,} pairs are there, and the run that drew "
                                     "them is not")
                self._draw(samples, done, draw, stamp_path, at_once)
            del samples
            self.samples = np.load(path, mmap_mode="r")

    @staticmethod
    def _allocate(path: Path, shape: tuple[int, ...]) -> np.ndarray:
        store = new_array(path, np.float16, shape)
        partial = Path(store.filename)
        del store                            # Windows does not rename a file that is still mapped
        partial.replace(path)
        return np.load(path, mmap_mode="r+")

    @torch.no_grad()
    def _draw(self, samples: np.ndarray, done: int, draw: Callable, stamp_path: Path, at_once: int) -> None:
        with tqdm(total=len(samples), initial=done, desc="draw pairs", unit="pair") as bar:
            while done < len(samples):
                part = range(done, min(done + at_once, len(samples)))
                samples[part.start:part.stop] = draw(part).cpu().numpy()
                # First the samples, then their number: a kill between the two only draws them again.
                samples.flush()
                done = part.stop
                write_stamp(stamp_path, self.stamp | {"done": done})
                bar.update(len(part))

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """Samples and their noise, each (B, C, h, w) float32."""
        samples = torch.from_numpy(self.samples[indices].astype(np.float32))
        return samples, noise_of(indices, self.samples.shape[1:])


# ---- text

LARGEST = 65504.0           # the limit of float16
LARGEST_PART = 2**28        # bytes of an array that is read from a file of another program


class TextWidths(NamedTuple):
    """Widths of a text encoder's output: D of context, and P of pooled or None."""
    context: int
    pooled: int | None

    def __str__(self) -> str:
        return f"context {self.context} wide, {f'pooled {self.pooled}' if self.pooled else 'no pooled'}"


class TextCache:
    """The output of a frozen text encoder for every distinct prompt and for "", the null condition. It is
    called like the encoder, with prompts that it was built from, and returns CPU tensors.

    On disk: the valid rows of every context, one prompt after another, as float16 (rows, D) without a header;
    in an .npz beside it, the row where each prompt ends, and the pooled vectors. Where the encoder gives no
    mask, as networks read its padding too, all rows are valid. Raises ValueError where the encoder's outputs
    differ in width or do not fit float16."""

    def __init__(self, path: Path, prompts: list[str], encode: Callable[[list[str]], dict[str, Tensor]],
                 encoder_fingerprint: str):
        prompts = sorted({"", *prompts})
        stamp = {"encoder": encoder_fingerprint, "prompts": digest(prompts)}
        stamp_path, index_path = path.with_suffix(".json"), path.with_suffix(".npz")
        with locked(path.with_suffix(".lock"), wait=True, clean=(path, stamp_path, index_path)):
            # How many rows there are is known only after encoding, so the stamp keeps the size of the file.
            size = path.stat().st_size if path.is_file() else None
            found = read_stamp(stamp_path)
            fits = found == stamp | {"bytes": size}
            if not (fits and self._open(path, index_path, len(prompts))):
                if found == stamp | {"bytes": found.get("bytes")}:
                    whole = path.exists() and index_path.exists()
                    print(f"{path} is {'damaged' if whole else 'missing'}: rebuilding it")
                stamp_path.unlink(missing_ok=True)
                self._build(path, index_path, prompts, encode)
                write_stamp(stamp_path, stamp | {"bytes": path.stat().st_size})
                self._open(path, index_path, len(prompts))
        self.index = {prompt: i for i, prompt in enumerate(prompts)}

    def _open(self, path: Path, index_path: Path, prompts: int) -> bool:
        """Whether the files are readable and fit each other."""
        try:
            with np.load(index_path) as arrays:
                self.ends = arrays["ends"]                              # (prompts + 1,), the first is 0
                self.pooled = arrays["pooled"] if "pooled" in arrays else None
                self.masked = "unmasked" not in arrays
            self.rows = np.memmap(path, np.float16, "r").reshape(self.ends[-1], -1)
            ordered = self.ends[0] == 0 and (np.diff(self.ends) >= 0).all()
        except Exception:               # NumPy and zipfile raise a dozen types for a damaged file
            return False
        pooled = self.pooled
        fits = pooled is None or (pooled.dtype == np.float32 and pooled.ndim == 2 and len(pooled) == prompts)
        return ordered and self.ends.shape == (prompts + 1,) and fits

    @staticmethod
    def _build(path: Path, index_path: Path, prompts: list[str], encode: Callable) -> None:
        lengths = [0]
        pooled = []
        widths = None
        with replacing(path) as out:
            for i in tqdm(range(0, len(prompts), 64), desc="encode prompts", unit="batch"):
                cond = encode(prompts[i:i + 64])
                _check_numbers(prompts[i:i + 64], cond)
                found = [cond[name].shape[-1] for name in ("context", "pooled") if name in cond]
                widths = widths or found
                if found != widths:
                    raise ValueError(f"{shortened(prompts[i])}: text vectors of widths {found}, not {widths} "
                                     "as for the prompts before")
                # Padding, which can be most of a context, is not stored.
                masks = cond.get("mask", torch.ones(cond["context"].shape[:2], dtype=torch.bool))
                for row, mask in zip(cond["context"], masks):
                    out.write(row[mask.to(row.device)].half().cpu().numpy().tobytes())
                    lengths.append(int(mask.sum()))
                if "pooled" in cond:
                    pooled.append(cond["pooled"].float().cpu().numpy())
        arrays = {"ends": np.cumsum(lengths)}
        if pooled:
            arrays["pooled"] = np.concatenate(pooled)
        if "mask" not in cond:
            arrays["unmasked"] = np.array(True)
        write_atomically(index_path, lambda file: np.savez(file, **arrays))

    @property
    def widths(self) -> TextWidths:
        pooled = None if self.pooled is None else self.pooled.shape[1]
        return TextWidths(self.rows.shape[1], pooled)

    def __call__(self, prompts: list[str]) -> dict[str, Tensor]:
        """-> context (B, L, D), and mask (B, L) and pooled (B, P) where the encoder gives them. L is the
        longest of these prompts."""
        cond = self.packed(prompts)
        padded = pad_context(cond["context"], cond.get("pooled"))
        if not self.masked:
            del padded["mask"]
        return padded

    def packed(self, prompts: list[str]) -> dict[str, list[Tensor] | Tensor]:
        """The same with context as a list of (L, D) without padding, and no mask."""
        chosen = [self.index[prompt] for prompt in prompts]
        rows = [torch.from_numpy(self.rows[self.ends[i]:self.ends[i + 1]].astype(np.float32)) for i in chosen]
        pooled = {} if self.pooled is None else {"pooled": torch.from_numpy(self.pooled[chosen])}
        return {"context": rows} | pooled


def _check_numbers(prompts: list[str], cond: dict[str, Tensor]) -> None:
    """Raises ValueError that names the prompt whose vectors float16, or pooled float32, cannot hold."""
    for name, limit in (("context", LARGEST), ("pooled", torch.finfo(torch.float32).max)):
        if name in cond:
            good = (cond[name].float().abs() < limit).flatten(1).all(1)         # NaN fails this as well
            if not good.all():
                prompt = prompts[good.tolist().index(False)]
                raise ValueError(f"{shortened(prompt) or 'the empty prompt'}: text vectors ({name}) that are "
                                 f"not finite numbers below {limit:.5g}")


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

    @property
    def widths(self) -> TextWidths:
        return TextWidths(self.context.shape[1], None if self.pooled is None else self.pooled.shape[0])


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

    for file, vectors in found.items():
        _check_widths(file, vectors.widths, next(iter(found)), first.widths)
    vectors = [found[file] for file in files]
    pooled = None
    if first.pooled is not None:
        pooled = torch.stack([v.pooled for v in vectors])
    return pad_context([v.context for v in vectors], pooled)


def check_embeddings(files: list[str]) -> TextWidths:
    """The widths that the vectors of all these files share. Every file is read, because a bad one should be
    refused before hours of training, not in them. Raises ValueError as read_embeddings."""
    widths = None
    for file in tqdm(dict.fromkeys(files), desc="check vectors", unit="file", delay=2):
        found = _read_vectors(file).widths
        widths = widths or found
        _check_widths(file, found, files[0], widths)
    return widths


def _check_widths(file: str, found: TextWidths, first: str, wanted: TextWidths) -> None:
    if found != wanted:
        raise ValueError(f"{file}: {found}; in {first}: {wanted}; all files need the same widths")


def _read_vectors(file: str) -> TextVectors:
    try:
        if not os.path.isfile(file):        # opening a pipe would wait for ever
            raise FileNotFoundError
        with zipfile.ZipFile(file) as archive:
            names = [name for name in ("mask", "pooled") if f"{name}.npy" in archive.namelist()]
            names.append("context")
            wrong = "; ".join(filter(None, (_fault_of_header(archive, name) for name in names)))
            if not wrong:
                found = {name: _read_part(archive, name) for name in names}
                wrong = _fault_of_values(**found)
    except Exception as error:      # NumPy and zipfile raise a dozen types for a damaged file
        raise ValueError(f"{file}: not an .npz with context (L, D), and optionally mask (L,) and pooled (P,) "
                         f"({type(error).__name__})") from None
    if wrong:
        raise ValueError(f"{file}: {wrong}")
    context = torch.from_numpy(found["context"].astype(np.float32))
    if "mask" in found:
        context = context[torch.from_numpy(found["mask"].astype(bool))]
    pooled = None
    if "pooled" in found:
        pooled = torch.from_numpy(found["pooled"].astype(np.float32))
    return TextVectors(context, pooled)


def _fault_of_header(archive: zipfile.ZipFile, name: str) -> str:
    """What is wrong with an array, by its shape and type alone, before memory is taken for it."""
    with archive.open(f"{name}.npy") as file:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else (
            np.lib.format.read_array_header_2_0)
        shape, _, dtype = read(file)
    wanted = "(L, D)" if name == "context" else "(N,)"
    if dtype.kind not in ("biuf" if name == "mask" else "iuf"):
        return f"its {name} is of type {dtype}, not of real numbers"
    if len(shape) != (2 if name == "context" else 1):
        return f"its {name} is of shape {shape}, not {wanted}"
    if 0 in shape:
        return f"its {name} is empty, of shape {shape}"
    if math.prod(shape) * dtype.itemsize > LARGEST_PART:
        return f"its {name} takes {amount(math.prod(shape) * dtype.itemsize)}; at most {amount(LARGEST_PART)}"
    return ""


def _read_part(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    with archive.open(f"{name}.npy") as file:
        return np.lib.format.read_array(file, allow_pickle=False)


def _fault_of_values(context: np.ndarray, mask: np.ndarray | None = None,
                     pooled: np.ndarray | None = None) -> str:
    if mask is not None:
        if len(mask) != len(context):
            return f"its mask has {len(mask)} entries for {len(context)} rows"
        context = context[mask.astype(bool)]        # padding may hold anything
        if len(context) == 0:
            return "its mask leaves no row of its context"
    if not (np.abs(context.astype(np.float64)) < LARGEST).all():
        return f"its context has values that are not finite numbers below {LARGEST:g}"
    if pooled is not None and not (np.abs(pooled.astype(np.float64)) < np.finfo(np.float32).max).all():
        return "its pooled has values that are not finite numbers of float32"
    return ""


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
