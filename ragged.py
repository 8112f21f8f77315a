"""Pictures of different sizes: their size at a budget of pixels, and arrays of different shapes on disk; and
strings of different lengths, millions of them, in memory.

    python ragged.py                      # the sizes of pictures at a budget, and a ragged array read back

A picture keeps its own aspect ratio. It is scaled to at most a budget of pixels, enlarged only to the next
multiple of the patch, and both of its sides are the nearest multiples: the sizes of FiT (Lu et al. 2024,
arXiv:2402.12376) and of NaViT (Dehghani et al. 2023, arXiv:2307.06304). Sizes are (H, W).
"""

from __future__ import annotations

import math
import tempfile
from array import array as packed
from collections.abc import Iterable, Sequence
from hashlib import blake2b
from pathlib import Path

import numpy as np

from files import replacing

Size = tuple[int, int]
LONGEST = 4     # times the other side: longer pictures are cropped


# ---- sizes

def fitted(size: Size, pixels: int, multiple: Size) -> Size:
    """The size, in multiples of `multiple` and of at most `pixels`, that is nearest to a picture's own size
    and aspect ratio. Raises ValueError where the budget is less than one multiple."""
    if math.prod(multiple) > pixels:
        raise ValueError(f"{pixels:,} pixels are less than one token of {multiple[0]}x{multiple[1]}")
    area = min(pixels, math.prod(size))
    ratio = min(max(size[0] / size[1], 1 / LONGEST), LONGEST)
    ideal = (math.sqrt(area * ratio), math.sqrt(area / ratio))
    best, smallest = multiple, math.inf
    for height in _around(ideal[0], multiple[0]):
        most = pixels // height // multiple[1] * multiple[1]
        for width in (*_around(ideal[1], multiple[1]), most):
            if not 0 < width <= most:
                continue
            # relative differences of the aspect ratio and of the area
            cost = abs(math.log(height / width / ratio)) + abs(math.log(height * width / area))
            if cost < smallest:
                best, smallest = (height, width), cost
    return best


def _around(side: float, multiple: int) -> list[int]:
    """The multiples next to a side, at least one of them."""
    return sorted({multiple * max(1, count(side / multiple)) for count in (math.floor, math.ceil)})


def groups_of_equal(shapes: np.ndarray, numbers: int) -> list[np.ndarray]:
    """The positions of equal rows of shapes (N, k), each position once, in arrays of one or more positions
    whose pictures have at most so many numbers in all, or are a single larger one."""
    order = np.lexsort(shapes.T[::-1])
    ends = np.flatnonzero((np.diff(shapes[order], axis=0) != 0).any(1)) + 1
    parts = []
    for group in np.split(order, ends):
        size = max(1, numbers // int(np.prod(shapes[group[0]])))
        parts += [group[i:i + size] for i in range(0, len(group), size)]
    return parts


# ---- arrays

class Ragged:
    """Arrays of one type and of different shapes, one after another in `flat`, which may be memory-mapped;
    only what is indexed by a number is read. shapes: (N, k)."""

    def __init__(self, flat: np.ndarray, shapes: np.ndarray, starts: np.ndarray | None = None):
        self.flat = flat
        self.shapes = np.asarray(shapes, dtype=np.int64)
        if starts is None:
            sizes = self.shapes.prod(1)
            starts = np.cumsum(sizes) - sizes
        self.starts = starts

    def __len__(self) -> int:
        return len(self.shapes)

    @property
    def shape(self) -> tuple:
        """(N, ..., C): what all arrays have in common."""
        return len(self), ..., int(self.shapes[0, -1])

    def __getitem__(self, index):
        """An array, by its number; or another Ragged of the same memory, by a slice or an array of ints."""
        if isinstance(index, (int, np.integer)):
            shape = self.shapes[index]
            start = self.starts[index]
            return self.flat[start:start + int(shape.prod())].reshape(shape)
        return Ragged(self.flat, self.shapes[index], self.starts[index])

    def stack(self, indices: np.ndarray) -> np.ndarray:
        """Arrays of equal shapes as one."""
        return np.stack([self[int(i)] for i in indices])


def ragged(arrays: list[np.ndarray]) -> Ragged:
    """In memory."""
    return Ragged(np.concatenate([array.ravel() for array in arrays]), [array.shape for array in arrays])


def write_ragged(path: Path, arrays: Iterable[np.ndarray]) -> np.ndarray:
    """Write arrays to a file, one at a time, so that memory holds only one. Returns their shapes (N, k).
    Raises OSError with one line where they cannot be written."""
    shapes, rank = packed("q"), 1
    with replacing(path) as file:
        for array in arrays:
            file.write(np.ascontiguousarray(array).tobytes())
            shapes.extend(array.shape)
            rank = array.ndim
    return np.frombuffer(shapes, np.int64).reshape(-1, rank)


def open_ragged(path: Path, dtype, shapes: object) -> Ragged | None:
    """The memory-mapped arrays of a file, or None where it is missing, or not of these shapes."""
    try:
        shapes = np.array(shapes, dtype=np.int64)
        numbers = int(shapes.prod(1).sum())
        size = numbers * np.dtype(dtype).itemsize
        if shapes.ndim != 2 or shapes.min() < 1 or path.stat().st_size != size:
            return None
        return Ragged(np.memmap(path, dtype, "r"), shapes)
    except (OSError, ValueError, TypeError, IndexError, OverflowError):
        return None


# ---- strings

class Strings(Sequence):
    """Strings in UTF-8, one after another in memory: each takes its bytes and 8 more, where a list takes 60
    more. Indexed by a number, one of them; by a slice or an array of ints, some of them in the same memory.
    Halves of surrogate pairs, as in names of files that are not in UTF-8, are kept."""

    def __init__(self, flat: bytearray, starts: np.ndarray, ends: np.ndarray):
        self.flat = flat
        self.starts = starts
        self.ends = ends

    @classmethod
    def of(cls, strings: Iterable[str]) -> Strings:
        flat, bounds = bytearray(), packed("q", [0])
        for string in strings:
            flat += string.encode("utf-8", "surrogatepass")
            bounds.append(len(flat))
        bounds = np.frombuffer(bounds, np.int64)
        return cls(flat, bounds[:-1], bounds[1:])

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index):
        start, end = self.starts[index], self.ends[index]
        if isinstance(start, np.ndarray):
            return Strings(self.flat, start, end)
        return self.flat[start:end].decode("utf-8", "surrogatepass")

    def __eq__(self, other: object) -> bool:
        """Whether it has the strings of another sequence, such as a list."""
        if not isinstance(other, Sequence) or isinstance(other, str):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other))


def key_of(string: str) -> int:
    """64 bits that stand for a string: by them, one among millions is found in a few bytes each."""
    return int.from_bytes(blake2b(string.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def places(keys: np.ndarray, among: np.ndarray) -> np.ndarray:
    """Where each key is among others, (n,), or -1."""
    if np.array_equal(keys, among):
        return np.arange(len(keys))
    if not len(among):
        return np.full(len(keys), -1)
    order = np.argsort(among)
    found = order[np.searchsorted(among, keys, sorter=order).clip(max=len(among) - 1)]
    found[among[found] != keys] = -1
    return found


def demo() -> None:
    """The sizes of some pictures at a budget of 256 x 256, in multiples of 16; pictures of those sizes."""
    sizes = []
    for size in ((480, 640), (1080, 1920), (1000, 1000), (600, 400), (90, 120), (200, 4000)):
        sizes.append(fitted(size, 256 * 256, (16, 16)))
        tokens = math.prod(sizes[-1]) // 256
        print(f"{size[0]:4d} x {size[1]:4d} -> {sizes[-1][0]:3d} x {sizes[-1][1]:3d}, {tokens:3d} tokens")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pictures.bin"
        shapes = write_ragged(path, (np.full((*size, 3), i, np.uint8) for i, size in enumerate(sizes)))
        again = open_ragged(path, np.uint8, shapes)
        right = sum(bool((again[i] == i).all()) for i in range(len(again)))
        print(f"{right} of {len(again)} read back, in {len(groups_of_equal(again.shapes, 10**9))} sizes")
        del again                                # Windows does not delete a file that is still mapped


if __name__ == "__main__":
    demo()
