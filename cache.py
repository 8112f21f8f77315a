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
import time
import zipfile
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from files import (amount, digest, locked, open_array, place_array, read_stamp, replacing, shortened,
                   write_atomically, write_stamp)
from ragged import Ragged, Strings, groups_of_equal


# ---- latents

PIECE = 256 * 32 * 32       # pixels that are encoded at a time
SAVE_SECONDS = 10           # between two savings of how far an encoding is


def filled(path: Path, shape: tuple[int, ...], groups: list[np.ndarray], put: Callable | None, stamp: dict,
           former: tuple[str, ...] = (), pictures: object = None, what: str = "encode latents") -> np.ndarray:
    """The float16 array of this shape at `path`, memory-mapped, computed now where it is not there yet.

    put(array, group), called without gradients, fills the rows of a group, which are numbers of examples;
    the groups hold each number once. stamp: what the array is made from, which is kept beside it; an array
    of another stamp is made anew. While it is computed, the stamp tells now and then how many examples are
    done, so that an interrupted one goes on where it was. former: other names of the same data, under which
    an earlier version may have stored it. pictures: may have `replaced`, the examples that others stand in
    for, which the stamp keeps, and `expect`, which reads ahead. Raises ValueError where something is left to
    do and put is None."""
    count = sum(map(len, groups))
    stamp_path = path.with_suffix(".json")
    # A second process that needs the same array waits here, then finds it complete.
    with locked(path.with_suffix(".lock"), wait=True, clean=(path, stamp_path)):
        found = read_stamp(stamp_path)
        replaced = found.pop("replaced", [])
        done = found.pop("done", count)                     # a complete array has no such entry
        fits = found == stamp or any(found == stamp | {"data": name} for name in former)
        # The array is checked because an interrupted copy of a run leaves a file that is too short.
        array = open_array(path, np.float16, shape) if fits else None
        if array is None or not _is_progress(done, replaced, count):
            if found and not fits:
                print(f"{path} was made from another VAE, other data or settings: rebuilding it")
            elif found:
                print(f"{path} is {'damaged' if path.exists() else 'missing'}: rebuilding it")
            # First, so that an interruption cannot leave the old stamp beside a new array.
            stamp_path.unlink(missing_ok=True)
            place_array(path, np.float16, shape)
            done, replaced = 0, []
        if hasattr(pictures, "replaced"):
            pictures.replaced.update(replaced)
        if done < count:
            if put is None:
                raise ValueError(f"{path}: {done:,} of {count:,} are there, and what they are made from is "
                                 "not")
            _fill(path, groups, put, stamp, done, pictures, what)
        complete = stamp | _replaced(pictures)
        if read_stamp(stamp_path) != complete:
            write_stamp(stamp_path, complete)
        return np.load(path, mmap_mode="r")


@torch.no_grad()
def _fill(path: Path, groups: list[np.ndarray], put: Callable, stamp: dict, done: int, pictures: object,
          what: str) -> None:
    """Fill an array, beginning with example number `done` in the order of the groups."""
    array = np.load(path, mmap_mode="r+")
    starts = np.cumsum([0, *map(len, groups)])
    todo = [group[max(0, done - start):] for start, group in zip(starts, groups)
            if start + len(group) > done]

    def save() -> None:
        array.flush()                   # first the values, then their number
        write_stamp(path.with_suffix(".json"), stamp | {"done": done} | _replaced(pictures))

    if hasattr(pictures, "expect"):
        pictures.expect(todo)
    saved = time.monotonic()
    try:
        for group in tqdm(todo, desc=what, unit="batch"):
            put(array, group)
            done += len(group)
            if time.monotonic() - saved > SAVE_SECONDS and done < starts[-1]:
                save()
                saved = time.monotonic()
        array.flush()
    except BaseException:               # also Ctrl-C
        if done:
            save()
        raise
    finally:
        if hasattr(pictures, "expect"):
            pictures.expect(())


class LatentCache:
    """The Gaussian posterior of every picture, encoded once: `latents`, float16 (N, flips, 2, C, h, w),
    memory-mapped. The axis of 2 holds mean and standard deviation, so that each training step draws a fresh
    z ~ q(z|x). With `flip`, flips is 2: a mirrored picture has its own latent, which is not the mirror image
    of the latent.

    images: array-like (N, H, W, channels) uint8, or sounds (N, T) int16, indexed by arrays of ints.
    encode(images, mirrored), called without gradients, returns mean and standard deviation, each
    (B, *latent_shape); it mirrors the pictures itself. stamp: the fingerprints {"vae": ..., "data": ...}.
    former: see `filled`."""

    def __init__(self, path: Path, images: np.ndarray,
                 encode: Callable[[np.ndarray, bool], tuple[Tensor, Tensor]],
                 latent_shape: tuple[int, int, int], stamp: dict[str, str], flip: bool = False,
                 former: tuple[str, ...] = ()):
        shape = (len(images), 2 if flip else 1, 2, *latent_shape)

        def put(latents: np.ndarray, group: np.ndarray) -> None:
            pictures = images[group]
            for mirrored in range(shape[1]):
                mean, std = encode(pictures, mirrored == 1)
                latents[group, mirrored] = torch.stack([mean, std], dim=1).cpu().numpy()

        groups = [np.array(piece) for piece in pieces(images.shape)]
        self.latents = filled(path, shape, groups, put, stamp | {"shape": list(shape)}, former, images)

    def __len__(self) -> int:
        return len(self.latents)

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Per-channel mean and variance, each (C,) float64, of z ~ q(z|x) over all pictures and pixels, so
        that a large picture counts more than a small one."""
        total = total_of_squares = count = 0
        for part in self.parts():
            part = part.astype(np.float64)                              # (n, flips, 2, C, h, w)
            mean, std = part.transpose(2, 3, 0, 1, 4, 5)                # each (C, n, flips, h, w)
            total = total + mean.reshape(len(mean), -1).sum(1)
            # E[z^2] of a Gaussian is mean^2 + std^2: exact, without drawing a sample.
            total_of_squares = total_of_squares + (mean**2 + std**2).reshape(len(mean), -1).sum(1)
            count += mean.size // len(mean)                             # numbers per channel
        mean = total / count
        return torch.from_numpy(mean), torch.from_numpy(total_of_squares / count - mean**2)

    def parts(self) -> Iterator[np.ndarray]:
        """All latents, (n, flips, 2, C, h, w) at a time."""
        for i in range(0, len(self), 1024):
            yield self.latents[i:i + 1024]

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


class MixedLatentCache(LatentCache):
    """The same for pictures of different sizes: `latents` is a Ragged of float16 (flips, 2, C, h, w) for
    each. images: a Ragged of (H, W, channels) uint8. channels, factor: of the VAE. encode is called with
    pictures of one size."""

    def __init__(self, path: Path, images: Ragged,
                 encode: Callable[[np.ndarray, bool], tuple[Tensor, Tensor]], channels: int,
                 factor: int, stamp: dict[str, str], flip: bool = False):
        sides = images.shapes[:, :2] // factor
        ahead = np.tile([2 if flip else 1, 2, channels], (len(images), 1))
        shapes = np.concatenate([ahead, sides], axis=1)                 # (N, 5)

        def put(flat: np.ndarray, group: np.ndarray) -> None:
            pictures, store = images.stack(group), Ragged(flat, shapes)
            for mirrored in range(shapes[0, 0]):
                mean, std = encode(pictures, mirrored == 1)
                for i, pair in zip(group, torch.stack([mean, std], dim=1).cpu().numpy()):
                    store[i][mirrored] = pair

        groups = groups_of_equal(images.shapes[:, :2], PIECE)
        stamp = stamp | {"shapes": digest(shapes)}
        flat = filled(path, (int(shapes.prod(1).sum()),), groups, put, stamp)
        self.latents = Ragged(flat, shapes)

    def parts(self) -> Iterator[np.ndarray]:
        for i in range(len(self)):
            yield self.latents[i][None]

    def batch(self, indices: np.ndarray, part: slice = slice(None),
              generator: torch.Generator | None = None) -> Tensor:
        """z of the chosen pictures, float32 and not normalised, one after another in (n,): `split` cuts it
        into them."""
        flip = torch.randint(int(self.latents.shapes[0, 0]), (len(indices),), generator=generator)
        shapes = self.latents.shapes[indices, 2:]                       # (B, 3): C, h, w
        numbers = shapes.prod(1)
        noise = torch.randn(int(numbers.sum()), generator=generator)
        chosen = [torch.from_numpy(self.latents[int(i)][f].astype(np.float32)).flatten(1)
                  for i, f in zip(indices[part], flip[part])]
        mean, std = torch.cat(chosen, dim=1).unbind()
        start = int(numbers[:range(len(indices))[part].start].sum())    # of the first of them
        return mean + std * noise[start:start + mean.numel()]

    def split(self, z: Tensor, indices: np.ndarray) -> list[Tensor]:
        """Views of it, (C, h, w) each."""
        shapes = self.latents.shapes[indices, 2:].tolist()
        parts = z.split([math.prod(shape) for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes)]


def _is_progress(done: object, replaced: object, count: int) -> bool:
    """Whether these entries of a stamp are what `filled` writes."""
    pairs = isinstance(replaced, list) and all(
        isinstance(pair, list) and len(pair) == 2 and all(type(i) is int for i in pair) for pair in replaced)
    return pairs and type(done) is int and 0 <= done <= count


def _replaced(images: object) -> dict:
    """The stamp's entry on pictures that others stand in for, where there are any."""
    found = getattr(images, "replaced", None)
    return {"replaced": sorted(map(list, found.items()))} if found else {}


def pieces(shape: tuple[int, ...]) -> list[range]:
    """Ranges that split pictures of shape (N, H, W, C), or sounds (N, T), into pieces of about equal memory:
    256 pictures of 32 x 32, or as many as have the same number of pixels or samples."""
    n = shape[0]
    size = max(1, PIECE // math.prod(shape[1:3]))
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

    draw(part), of some numbers, returns their samples (len(part), *shape). stamp: names what they are drawn
    from and how; see `filled`. With draw None, raises ValueError where the cache is not complete."""

    def __init__(self, path: Path, count: int, shape: tuple[int, int, int],
                 draw: Callable[[range], Tensor] | None, stamp: dict, at_once: int = 64):
        def put(samples: np.ndarray, part: np.ndarray) -> None:
            samples[part] = draw(range(int(part[0]), int(part[-1]) + 1)).cpu().numpy()

        self.drawn_from = stamp
        parts = np.split(np.arange(count), range(at_once, count, at_once))
        self.samples = filled(path, (count, *shape), parts, put if draw else None,
                              stamp | {"shape": [count, *shape]}, what="draw pairs")

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

    def __init__(self, path: Path, prompts: Iterable[str], encode: Callable[[list[str]], dict[str, Tensor]],
                 encoder_fingerprint: str):
        prompts = Strings.of(sorted({"", *prompts}))                    # there may be millions
        stamp = {"encoder": encoder_fingerprint, "prompts": digest(iter(prompts))}
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
        self.prompts = prompts

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
    def _build(path: Path, index_path: Path, prompts: Strings, encode: Callable) -> None:
        lengths = [0]
        pooled = []
        widths = None
        with replacing(path) as out:
            for i in tqdm(range(0, len(prompts), 64), desc="encode prompts", unit="batch"):
                part = list(prompts[i:i + 64])
                cond = encode(part)
                _check_numbers(part, cond)
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
        chosen = [bisect_left(self.prompts, prompt) for prompt in prompts]
        for i, prompt in zip(chosen, prompts):
            if i == len(self.prompts) or self.prompts[i] != prompt:
                raise KeyError(prompt)
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
