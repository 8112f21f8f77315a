"""Pictures or sounds, labels and captions: from any source to a `Dataset`, and from a Dataset to batches.

    python data.py                        # lists the sources; turns a folder of pictures into batch.png

Every built-in source is a row of SOURCES, below its loaders; any other name is a folder of pictures. A new
source is a loader and one row. Files are looked for in --data-dir and on the system, else downloaded.

Conventions: pictures are uint8 (N, H, W, C) in a Dataset and float32 (B, C, H, W) in [-1, 1] for a model;
sounds int16 (N, T) and float32 (B, 1, T); sizes are (H, W), and (1, T); splits are "train" and "val". Bad
input raises ValueError with one line for the user.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import math
import os
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple
from urllib.error import URLError

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from decoded import Decoded, open_pictures
from drawings import open_drawings
from files import amount, digest, replacing, warn_once
from folder import RANDOM_CROPS, Folder, Rows, clean_text, list_folder, split_rows
from pictures import Size, grid, to_tensor, to_uint8
from ragged import Ragged, fitted, ragged
from shards import (GROUP, Chosen, NoPictures, ShardCaptions, ShardLabels, ShardLatents, ShardOrder,
                    ShardPictures, Shards, TrainingRows, find_shards, open_index, validation_samples)
from sounds import list_sounds, open_sounds
from speech import KINDS, open_speech
from speech import RATE as SPEECH_RATE
from tones import (LENGTH, RATE, TONE_CLASSES, describe_events, draw_events, draw_tone, seconds_of_events,
                   seconds_of_tone)
from tones import omit_details as omit_tone_details
from toys import (SHAPE_CLASSES, any_size, describe_corners, describe_scene, draw_corners, draw_scene,
                  draw_shape, find_emoji_font, omit_details, render_emoji, vary_caption)


@dataclass
class Dataset:
    images: np.ndarray | Ragged # (N, H, W, C) uint8, in memory or memory-mapped; Ragged where sizes differ
    labels: np.ndarray | None   # (N,) int64, or None where there are no classes
    classes: list[str]          # names; empty where there are no classes
    fingerprint: str            # changes whenever a pixel or a label may have changed
    captions: Sequence[str] | None = None           # one per picture, or None
    vary: Callable[[str, np.random.Generator], str] | None = None   # rewords a caption at random, in training
    root: str = ""              # where captions are names of files: the folder they lie in
    former_fingerprints: tuple[str, ...] = ()       # under which an earlier version knew the same data
    shard_counts: np.ndarray | None = None          # of shards: how many examples each of them has
    latents: ShardLatents | None = None             # where the latents are there already, and no pictures
    rate: int | None = None                         # of sounds, int16 (N, T): samples a second
    seconds: np.ndarray | None = None               # (N,) float32, their lengths; silence follows up to T

    def __len__(self) -> int:
        return len(self.images)

    @property
    def size(self) -> Size:
        """Height and width of the pictures; 1 and T of sounds."""
        if self.rate is None:
            return tuple(self.images.shape[1:3])
        return 1, self.images.shape[1]

    @property
    def identity(self) -> str:
        """Changes with the fingerprint and with any caption. Cached latents need only the fingerprint."""
        if self.captions is None or isinstance(self.captions, ShardCaptions):
            return self.fingerprint             # which covers the captions of shards
        # A folder is the same by whatever path it is reached.
        names = iter(self.captions)
        if self.root:
            names = (os.path.relpath(file, self.root) for file in names)
        return digest(self.fingerprint, names)

    @property
    def former_identities(self) -> tuple[str, ...]:
        """Identities of the same data in an earlier version: a run that began under one of them goes on."""
        if self.captions is None:
            return self.former_fingerprints
        former = [digest(fingerprint, iter(self.captions)) for fingerprint in self.former_fingerprints]
        return tuple(former)


# ---- batches

def send(x: Tensor, device: torch.device | str) -> Tensor:
    """x on the device."""
    if torch.device(device).type != "cuda" or x.device.type != "cpu":     # only CPU memory can be pinned
        return x.to(device)
    # A copy from pinned memory is asynchronous: neither the CPU nor the GPU waits for it.
    return x.pin_memory().to(device, non_blocking=True)


def batch_indices(n: int, batch_size: int, step: int, seed: int) -> np.ndarray:
    """(batch_size,) indices into n examples for one step: every epoch in a new random order, epochs joined
    without a gap. This alone decides the order of the data, and it is a pure function of step and seed, so a
    resumed run gets exactly the batches that it would have got without the interruption."""
    k = np.arange(step * batch_size, (step + 1) * batch_size)
    orders = {epoch: _order(n, int(epoch), seed) for epoch in np.unique(k // n)}
    return np.array([orders[epoch][i] for epoch, i in zip(k // n, k % n)])


def packed_indices(tokens: np.ndarray, budget: int, step: int, seed: int) -> np.ndarray:
    """Indices into pictures of so many tokens each, (n,), for one step of `budget` tokens: a pure function of
    step and seed, as batch_indices, with every picture once an epoch.

    All pictures of an epoch, in its random order, lie on one line, each as long as its tokens, and epochs
    follow one another without a gap. Step k takes those that begin in [k * budget, (k + 1) * budget): the
    budget on average, and less than one picture more or less than it. As all epochs are equally long, the
    place of a step is known without the steps before. Raises ValueError for a budget below the largest
    picture, with which a step could be empty."""
    if budget < tokens.max():
        raise ValueError(f"a budget of {budget:,} tokens is less than the largest picture's "
                         f"{tokens.max():,}")
    length = int(tokens.sum())
    chosen = []
    for epoch in range(step * budget // length, ((step + 1) * budget - 1) // length + 1):
        order = _order(len(tokens), epoch, seed)
        starts = np.cumsum(tokens[order]) - tokens[order] + epoch * length
        first, end = np.searchsorted(starts, (step * budget, (step + 1) * budget))
        chosen.append(order[first:end])
    return np.concatenate(chosen)


def shares(tokens: np.ndarray, count: int) -> list[slice]:
    """Cut a step's pictures, in their order, into `count` contiguous parts of nearly equal tokens: each part
    ends within half a picture of its place. Raises ValueError for fewer pictures than parts."""
    if len(tokens) < count:
        raise ValueError(f"{len(tokens)} pictures in a step cannot be cut into {count} parts; give more "
                         "--tokens")
    ends = np.cumsum(tokens)
    middles = ends - tokens / 2
    cuts = np.searchsorted(middles, ends[-1] * np.arange(count + 1) / count)
    for i in range(1, count):               # none is empty
        cuts[i] = min(max(cuts[i], cuts[i - 1] + 1), len(tokens) - (count - i))
    return [slice(int(a), int(b)) for a, b in zip(cuts, cuts[1:])]


def grouped_indices(shapes: np.ndarray, batch_size: int, step: int, seed: int) -> np.ndarray:
    """batch_indices for pictures of different sizes (n, 2), where a batch should have few of them: within
    every 64 batches of an epoch's order, pictures are sorted by size, and the batches are shuffled again."""
    k = np.arange(step * batch_size, (step + 1) * batch_size)
    n = len(shapes)
    orders = {int(epoch): _grouped_order(shapes, batch_size, int(epoch), seed) for epoch in np.unique(k // n)}
    return np.array([orders[epoch][i] for epoch, i in zip((k // n).tolist(), k % n)])


def _grouped_order(shapes: np.ndarray, batch_size: int, epoch: int, seed: int) -> np.ndarray:
    order = _order(len(shapes), epoch, seed)
    rng = np.random.default_rng([seed, epoch, 1])
    parts = []
    for start in range(0, len(order), 64 * batch_size):
        window = order[start:start + 64 * batch_size]
        window = window[np.lexsort(shapes[window].T)]
        batches = [window[i:i + batch_size] for i in range(0, len(window), batch_size)]
        # A shorter last batch stays last, so that the others keep their pictures.
        rest = [batches.pop()] if len(window) % batch_size else []
        parts += [batches[i] for i in rng.permutation(len(batches))] + rest
    return np.concatenate(parts)


def some_pictures(n: int, limit: int | None) -> np.ndarray:
    """The indices of the pictures that are trained on: all n, or `limit` of them, chosen at random but always
    the same, whatever the seed. Raises ValueError where there are not so many."""
    if limit is None:
        return np.arange(n)
    if limit > n:
        raise ValueError(f"--limit {limit}: there are {n:,} pictures to train on; give fewer, or leave it "
                         "out")
    return np.sort(np.random.default_rng(0).permutation(n)[:limit])


class Order(NamedTuple):
    """The order of the data: called with a step, it returns the indices of its examples. Its length is the
    number of examples in an epoch."""
    chosen: np.ndarray                              # (n,), those that are trained on
    positions: Callable[[int], np.ndarray]          # where in `chosen` the examples of a step are

    def __len__(self) -> int:
        return len(self.chosen)

    def __call__(self, step: int) -> np.ndarray:
        return self.chosen[self.positions(step)]


def order_of(data: Dataset, count: int, batch_size: int, seed: int, limit: int | None = None,
             group: int | None = None) -> Order | ShardOrder:
    """The order of pictures of one size, or of pairs. count: how many there are, where they are not those of
    `data`. limit: as in some_pictures. group: how many shards are shuffled together."""
    if data.shard_counts is not None and count == len(data):
        return ShardOrder(data.shard_counts, batch_size, seed, group or GROUP, limit)
    chosen = some_pictures(count, limit)
    return Order(chosen, lambda step: batch_indices(len(chosen), batch_size, step, seed))


@functools.lru_cache(maxsize=4)     # a batch needs one order, two across the end of an epoch
def _order(n: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


# ---- pictures that are drawn here, any number of them

class Drawn(NamedTuple):
    """Pictures that are functions of their number."""
    draw: Callable[[int, Size], np.ndarray]
    classes: list[str] = []                                         # number i is of class i % len(classes)
    caption: Callable[[int], str] | None = None
    vary: Callable[[str, np.random.Generator], str] | None = None   # see Dataset


def _describe_pair(i: int) -> str:
    thing = describe_corners(i).things[0]
    return f"two {thing.colour} {thing.kind}s"


DRAWN = {
    "shapes": Drawn(draw_shape, SHAPE_CLASSES),                     # one in each picture
    "scenes": Drawn(lambda i, size: draw_scene(describe_scene(i), i, size), vary=omit_details,
                    caption=lambda i: describe_scene(i).caption),   # one or two
    # The same shape in two opposite corners, without classes: a label would tell both what to be. So does a
    # caption; a network that is conditioned on neither has to make them agree.
    "corners": Drawn(draw_corners, caption=_describe_pair),
}


@functools.lru_cache(maxsize=4)     # as a VAE and the network on top of it load the same pictures
def load_drawn(name: str, split: str, size: Size, data_dir: Path | None = None, count: int = 20_000,
               multiple: Size | None = None) -> Dataset:
    """The pictures of DRAWN[name]. count: of those for training; validation has 480. multiple: see
    load_data."""
    row = DRAWN[name]
    first, count = _range_of(split, count)
    labels = captions = None
    if row.classes:
        first -= first % len(row.classes)       # so that the first label is 0
        labels = np.arange(count) % len(row.classes)
    numbers = range(first, first + count)
    if row.caption:
        captions = [row.caption(i) for i in numbers]
    if multiple is None:
        images = np.stack([row.draw(i, size) for i in numbers])
        parts = [images] if labels is None else [images, labels]
    else:
        pixels = math.prod(size)
        images = ragged([row.draw(i, fitted(any_size(i, pixels), pixels, multiple)) for i in numbers])
        parts = ["mixed", images.shapes, images.flat]
    return Dataset(images, labels, row.classes, digest(name, split, *parts), captions, vary=row.vary)


def _range_of(split: str, count: int) -> tuple[int, int]:
    """First index and number of pictures. Validation begins far beyond any number of training pictures."""
    if split == "train":
        return 0, count
    return 10**9, 480


# ---- sounds that are drawn here, any number of them

@functools.lru_cache(maxsize=2)     # training and validation; 8,000 sounds take 125 MiB
def load_tones(split: str, size: Size, data_dir: Path | None = None, count: int = 8_000,
               multiple: Size | None = None) -> Dataset:
    """Tones with classes. size: (1, T), T samples. count: of those for training; validation has 480. Raises
    ValueError where T samples do not hold them, and for `multiple`, which is for pictures."""
    first, count = _range_of(split, count)
    first -= first % len(TONE_CLASSES)          # so that the first label is 0
    labels = np.arange(count) % len(TONE_CLASSES)
    sounds = _draw_sounds(draw_tone, first, count, size, multiple)
    seconds = [seconds_of_tone(i, sounds.shape[1]) for i in range(first, first + count)]
    return Dataset(sounds, labels, TONE_CLASSES, digest("tones", split, sounds, labels), rate=RATE,
                   seconds=np.array(seconds, np.float32))


@functools.lru_cache(maxsize=2)
def load_events(split: str, size: Size, data_dir: Path | None = None, count: int = 8_000,
                multiple: Size | None = None) -> Dataset:
    """One or two tones with a caption; the arguments are those of load_tones."""
    first, count = _range_of(split, count)
    events = [describe_events(i) for i in range(first, first + count)]
    sounds = _draw_sounds(lambda i, length: draw_events(events[i - first], i, length), first, count, size,
                          multiple)
    seconds = [seconds_of_events(what, first + i, sounds.shape[1]) for i, what in enumerate(events)]
    return Dataset(sounds, None, [], digest("events", split, sounds), [what.caption for what in events],
                   vary=omit_tone_details, rate=RATE, seconds=np.array(seconds, np.float32))


def _draw_sounds(draw: Callable[[int, int], np.ndarray], first: int, count: int, size: Size,
                 multiple: Size | None) -> np.ndarray:
    """(count, T) int16, from number `first` on."""
    _check_sound_size("tones", size)
    if multiple is not None:
        raise ValueError("--data tones with --aspect: sounds have no aspect ratio; leave it out")
    sounds = np.empty((count, size[1]), np.int16)       # filled in place: a stack would need twice as much
    for i in range(count):
        sounds[i] = draw(first + i, size[1])
    return sounds


# ---- emoji, drawn from a font of the system

def load_emoji(split: str, size: Size, data_dir: Path) -> Dataset:
    """Emoji with their names as captions, and without classes. Every 20th picture is for validation."""
    images, names = render_emoji(find_emoji_font(data_dir), size)
    is_val = np.arange(len(names)) % 20 == 0
    chosen = np.flatnonzero(is_val == (split != "train"))
    images, names = images[chosen], [names[i] for i in chosen]
    return Dataset(images, None, [], digest("emoji", split, images), names, vary=vary_caption)


# ---- collections that Debian packages: clip art, stamps

def load_drawings(name: str, split: str, size: Size, data_dir: Path, cache_dir: Path) -> Dataset:
    """Captioned drawings and photographs, decoded once into cache_dir."""
    images, captions, fingerprint = open_drawings(name, size, data_dir, cache_dir).part(split)
    return Dataset(images, None, [], fingerprint, captions, vary=vary_caption)


# ---- words that are spoken

def load_speech(kind: str, split: str, size: Size, data_dir: Path) -> Dataset:
    """kind: "words", with classes, or "phrases", with captions. size: (1, T). Raises ValueError as
    open_speech, and for another size."""
    _check_sound_size("speech", size)
    found = open_speech(kind, split, size[1], data_dir)
    texts = list(KINDS[kind].texts)
    labels, captions = found.texts, None
    if kind == "phrases":
        labels, captions, texts = None, [texts[i] for i in found.texts], []
    return Dataset(found.sounds, labels, texts, found.fingerprint, captions, rate=SPEECH_RATE,
                   seconds=found.seconds)


def _check_sound_size(source: str, size: Size) -> None:
    if size[0] != 1 or size[1] < 1:
        raise ValueError(f"--data {source} at a size of {size[0]} x {size[1]}: the size of sounds is 1 x "
                         "samples")


# ---- published data sets: MNIST, Fashion-MNIST, CIFAR-10

CLASSES = {
    "mnist": [str(digit) for digit in range(10)],
    "fashion-mnist": ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag",
                      "ankle-boot"],
    "cifar10": ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
}
MIRRORS = {
    "mnist": "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "fashion-mnist": "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "cifar10": "https://www.cs.toronto.edu/~kriz/",
}
MD5 = {
    "mnist/train-images-idx3-ubyte.gz": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
    "mnist/train-labels-idx1-ubyte.gz": "d53e105ee54ea40749a09fcbcd1e9432",
    "mnist/t10k-images-idx3-ubyte.gz": "9fb629c4189551a2d022fa330f9573f3",
    "mnist/t10k-labels-idx1-ubyte.gz": "ec29112dd5afa0611ce80d1b7f02629c",
    "fashion-mnist/train-images-idx3-ubyte.gz": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
    "fashion-mnist/train-labels-idx1-ubyte.gz": "25c81989df183df01b3e8a0aad5dffbe",
    "fashion-mnist/t10k-images-idx3-ubyte.gz": "bef4ecab320f06d8554ea6380940ec79",
    "fashion-mnist/t10k-labels-idx1-ubyte.gz": "bb300cfdad3c16e7a12a480ee83cd310",
    "cifar10/cifar-10-binary.tar.gz": "c32a1d4ab5d03f1284b67883e8d87530",
}
LARGEST = 2**30     # bytes that are unpacked: more is not one of these files, and may fill the memory


def find_file(source: str, name: str, data_dir: Path) -> Path:
    """The file, compressed or not: in data_dir, in data_dir/source, where Debian puts it, or downloaded into
    data_dir/source and checked."""
    if os.path.exists(data_dir) and not os.path.isdir(data_dir):
        raise ValueError(f"--data-dir {data_dir}: is no folder; name the one that has the files")
    for folder in (data_dir, data_dir / source, Path("/usr/share/datasets") / source):
        for candidate in (folder / name, folder / name.removesuffix(".gz")):
            if os.path.isfile(candidate):
                return candidate
    target = data_dir / source / name
    md5 = hashlib.md5()
    expected = MD5[f"{source}/{name}"]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with urllib.request.urlopen(MIRRORS[source] + name, timeout=30) as reply, replacing(target) as out:
            length = reply.headers.get("Content-Length") or ""
            total = int(length) if length.isdecimal() else None
            with tqdm(desc=f"download {name}", total=total, unit="B", unit_scale=True) as bar:
                while chunk := reply.read(1 << 16):
                    md5.update(chunk)
                    bar.update(out.write(chunk))
            if md5.hexdigest() != expected:             # within `replacing`, which then keeps nothing
                raise ValueError(f"{MIRRORS[source]}{name}: MD5 {md5.hexdigest()} is not {expected}; the "
                                 "download was deleted")
    except (OSError, HTTPException) as error:
        reason = str(error)
        if isinstance(error, URLError) and isinstance(error.reason, OSError):
            reason = f"no connection: {error.reason.strerror or error.reason}"
        raise ValueError(f"{name} of {source} is not in {data_dir} and cannot be downloaded from "
                         f"{MIRRORS[source]} ({reason}); put the file there or name its folder with "
                         "--data-dir") from None
    return target


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file (LeCun's format: two zero bytes, 8 = uint8, rank, big-endian sizes, data)."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as file:
            start = file.read(4)
            if start[:3] != b"\0\0\x08":
                raise ValueError("not an IDX file of bytes")
            shape = np.frombuffer(file.read(4 * start[3]), ">u4", start[3]).tolist()
            need = math.prod(shape)
            if need > LARGEST:
                raise ValueError(f"by its header it holds {amount(need)}, of at most {amount(LARGEST)}")
            raw = file.read(need + 1)               # beyond the end as well, where gzip has its checksum
        return np.frombuffer(raw, np.uint8).reshape(shape)
    except PermissionError:
        raise ValueError(f"{path}: may not be read") from None
    except Exception as error:              # gzip, zlib and NumPy raise half a dozen types
        raise ValueError(f"{path}: damaged or not an IDX file ({error}); "
                         "delete it to have it downloaded again") from None


def check_labels(path: Path, images_path: Path, images: np.ndarray, labels: np.ndarray,
                 classes: list[str]) -> None:
    """Raises ValueError unless there are pictures, each with a label of a class. path: the labels' file."""
    if len(images) == 0 or 0 in images.shape:
        raise ValueError(f"{images_path}: holds no picture (shape {images.shape})")
    if labels.shape != images.shape[:1]:
        raise ValueError(f"{path}: labels of shape {labels.shape} for {len(images):,} pictures; each needs "
                         "one")
    if labels.max() >= len(classes):
        raise ValueError(f"{path}: label {labels.max()} of picture {labels.argmax()} is none of the "
                         f"{len(classes)} classes, which are numbered from 0")


def load_mnist(source: str, split: str, size: Size, data_dir: Path) -> Dataset:
    """source: "mnist" or "fashion-mnist", of the same format."""
    part = "train" if split == "train" else "t10k"
    images_path = find_file(source, f"{part}-images-idx3-ubyte.gz", data_dir)
    labels_path = find_file(source, f"{part}-labels-idx1-ubyte.gz", data_dir)
    images, labels = read_idx(images_path), read_idx(labels_path).astype(np.int64)
    if images.ndim != 3:
        raise ValueError(f"{images_path}: an array of shape {images.shape}, not pictures (N, H, W)")
    check_labels(labels_path, images_path, images, labels, CLASSES[source])
    images = np.pad(images, ((0, 0), (2, 2), (2, 2)))[..., None]   # 28 -> 32, so that powers of two divide it
    fingerprint = digest(source, split, size, images, labels)
    return Dataset(_resize(images, size), labels, CLASSES[source], fingerprint)


def load_cifar10(split: str, size: Size, data_dir: Path) -> Dataset:
    path = find_file("cifar10", "cifar-10-binary.tar.gz", data_dir)
    names = ["test_batch.bin"]
    if split == "train":
        names = [f"data_batch_{i}.bin" for i in range(1, 6)]
    try:
        with tarfile.open(path) as tar:
            parts = [tar.getmember(f"cifar-10-batches-bin/{name}") for name in names]
            if sum(part.size for part in parts) > LARGEST:
                raise ValueError(f"it holds more than {amount(LARGEST)}")
            raw = b"".join(tar.extractfile(part).read() for part in parts)
        rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)      # a label, then 3 planes of 32 x 32
    except PermissionError:
        raise ValueError(f"{path}: may not be read") from None
    except Exception as error:              # tarfile, zlib and NumPy raise a dozen types
        raise ValueError(f"{path}: damaged or not CIFAR-10's binary version ({error}); "
                         "delete it to have it downloaded again") from None
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = rows[:, 0].astype(np.int64)
    check_labels(path, path, images, labels, CLASSES["cifar10"])
    fingerprint = digest("cifar10", split, size, images, labels)
    return Dataset(_resize(images, size), labels, CLASSES["cifar10"], fingerprint)


def _resize(images: np.ndarray, size: Size) -> np.ndarray:
    """uint8 (N, h, w, C) -> (N, H, W, C), scaled to cover and cropped in the centre; unchanged if it fits."""
    if images.shape[1:3] == tuple(size):
        return images
    if images.shape[-1] == 1:
        images = images[..., 0]                     # Pillow expects a grey picture as (h, w)
    resized = [ImageOps.fit(Image.fromarray(image), size[::-1], Image.Resampling.BICUBIC) for image in images]
    return np.stack([np.asarray(image).reshape(*size, -1) for image in resized])


# ---- a folder of any pictures, or sounds

def find_folder(source: str, words: str | None, rate: int | None = None) -> Folder | Shards | None:
    """The listing of the folder or the shards that --data names, or None for a built-in source. words: as in
    list_folder. rate: of sounds; None: of pictures.
    Raises ValueError with one line if --data names neither, or the folder has no such words."""
    if source in SOURCES:
        if words == "embeddings":
            raise ValueError(f"--text-encoder none with --data {source}: it has no .npz files of vectors; "
                             "give a folder that has")
        return None
    shards = find_shards(source, words) if rate is None else None
    if shards is not None:
        if words == "embeddings":
            raise ValueError(f"--text-encoder none with --data {source}: shards have no .npz files of "
                             "vectors; give a folder that has")
        return shards
    if not os.path.isdir(source):
        raise ValueError(f"--data {source}: neither a built-in source ({', '.join(SOURCES)}), nor a "
                         "folder, nor .tar shards")
    return list_folder(Path(source), words) if rate is None else list_sounds(Path(source), words)


def load_folder(folder: Folder, split: str, size: Size, cache_dir: Path, crop: str = "centre",
                multiple: Size | None = None) -> Dataset:
    """The pictures of a folder, decoded once into cache_dir/images.npy and memory-mapped from then on. With
    crop "random", the training part holds several crops of each picture. multiple: as in load_data."""
    crops = RANDOM_CROPS if crop == "random" else 1
    if multiple is not None:
        crops = 1
    decoded = open_pictures(folder, size, cache_dir, crops, multiple)
    return _part_of(folder, decoded, split, crops, mixed=multiple is not None)


def load_sound_folder(folder: Folder, split: str, size: Size, rate: int, cache_dir: Path,
                      crop: str = "centre") -> Dataset:
    """The sounds of a folder of sounds.list_sounds, at `rate`, decoded once into cache_dir/sounds.npy and
    memory-mapped from then on. size: (1, T). What is longer is cut: its start is kept and, with crop
    "random", the training part holds other parts of each sound as well."""
    _check_sound_size(str(folder.path), size)
    crops = RANDOM_CROPS if crop == "random" else 1
    decoded = open_sounds(folder, size, rate, cache_dir, crops)
    seconds = decoded.sizes[:, 1].astype(np.float32) / rate
    return _part_of(folder, decoded, split, crops, rate=rate, seconds=seconds)


def _part_of(folder: Folder, decoded: Decoded, split: str, crops: int, mixed: bool = False,
             rate: int | None = None, seconds: np.ndarray | None = None) -> Dataset:
    """Training or validation of what a folder holds. crops: rows of each file. mixed: pictures of different
    sizes. seconds: of each file that is kept."""
    images, keep, fingerprint, former, _ = decoded
    classes, labels = folder.classes, None
    if folder.labels is not None:
        present, labels = np.unique(folder.labels[keep], return_inverse=True)
        classes = [folder.classes[i] for i in present]      # none whose pictures are all broken
    train, val = split_rows(len(keep), labels)
    # The former version split every folder as a flat one, and listed all classes.
    as_formerly = zip((train, val), split_rows(len(keep), None))
    same = all(np.array_equal(*rows) for rows in as_formerly) and len(classes) == len(folder.classes)
    formers = (digest(former, split),) if former and same else ()
    if split == "train":
        chosen = train.repeat(crops)
        rows = crops * chosen + np.tile(np.arange(crops), len(train))
        # images[rows] of an array would copy the whole file into memory
        images = images[rows] if mixed else Rows(images, rows)
    else:
        chosen = val
        images = images[crops * chosen]     # the first crop is that in the centre
    captions = None
    if folder.words is not None:
        captions = folder.words[keep[chosen]]
        if split != "train":
            captions = list(captions)       # few, and a checkpoint takes some of them
    if labels is not None:
        labels = labels[chosen].astype(np.int64)
    if seconds is not None:
        seconds = seconds[chosen]
    return Dataset(images, labels, classes, digest(fingerprint, split), captions, root=folder.root,
                   former_fingerprints=formers, rate=rate, seconds=seconds)


# ---- tar shards

def load_shards(shards: Shards, split: str, size: Size, cache_dir: Path, crop: str = "centre") -> Dataset:
    """Pictures or latents in shards, read on demand, and their index in cache_dir. The validation part, at
    most 256 pictures, is read at once."""
    index = open_index(shards, cache_dir)
    for part, number in (("a caption", index.stamp["captions"]), ("a class", index.stamp["labels"])):
        if 0 < number < len(index) and (part == "a class" or shards.words == "captions"):
            field, value = ("label", -1) if part == "a class" else ("text_bytes", 0)
            without = index.where(index.first_without(field, value))
            message = f"--data {shards.source}: only {number:,} of {len(index):,} samples have {part}"
            if part == "a caption":
                raise ValueError(f"{message}, not {without}; put KEY.txt, or KEY.json with \"text\", right "
                                 "before or after each picture")
            warn_once("classes", f"{message}, not {without}, so classes are not used")
    labelled = index.stamp["labels"] == len(index)
    if shards.words == "captions" and not index.stamp["captions"] and not labelled:
        raise ValueError(f"--data {shards.source}: pictures without words; put KEY.txt, or KEY.json with "
                         "\"text\", beside each")
    crops = RANDOM_CROPS if crop == "random" and split == "train" else 1
    held_out = validation_samples(len(index))
    rows = TrainingRows(len(index), held_out)
    latents = None
    if split != "train":
        rows = Chosen(held_out)
    if shards.manifest is None:
        images = ShardPictures(index, size, rows, crops, shards.workers)
    else:
        images = NoPictures((len(rows), *size, shards.manifest["channels"]))
        latents = ShardLatents(index, shards.manifest, rows, shards.flip, shards.workers)
    if split != "train" and latents is None:
        images = images[:]
    names = None
    if not index.stamp["captions"]:
        names = [clean_text(name.replace("-", " ")) for name in index.classes]
    captions = ShardCaptions(index, rows, crops, names) if shards.words == "captions" else None
    labels = ShardLabels(index, rows, crops) if labelled else None
    counts = None
    if split == "train":
        counts = crops * rows.per_shard(index)
    else:
        captions = captions and captions[:]
        labels = labels and labels[:]
    fingerprint = digest("shards", index.fingerprint, size, RANDOM_CROPS if crop == "random" else 1, split)
    return Dataset(images, labels, index.classes if labelled else [], fingerprint, captions,
                   shard_counts=counts, latents=latents)


# ---- the table of sources

class Source(NamedTuple):
    """One row: load(split, size, data_dir) -> Dataset, and what sets the source apart."""
    load: Callable[..., Dataset]
    load_captioned: Callable[..., Dataset] | None = None    # set where captions belong to other pictures
    captions_only: bool = False                             # it has captions and no classes
    endless: bool = False       # pictures are drawn on demand: the loaders also take count and multiple
    cached: bool = False        # pictures are decoded once: the loader also takes cache_dir
    fewest: int = 20_000        # pictures or sounds that it has for sure
    rate: int | None = None     # of sounds: samples a second


SOURCES = {
    "shapes": Source(functools.partial(load_drawn, "shapes"), endless=True,
                     load_captioned=functools.partial(load_drawn, "scenes")),
    "corners": Source(functools.partial(load_drawn, "corners"), captions_only=True, endless=True),
    "tones": Source(load_tones, endless=True, load_captioned=load_events, rate=RATE, fewest=8_000),
    "speech": Source(functools.partial(load_speech, "words"), rate=SPEECH_RATE, fewest=1,
                     load_captioned=functools.partial(load_speech, "phrases")),
    "emoji": Source(load_emoji, captions_only=True, fewest=1_300),
    "clipart": Source(functools.partial(load_drawings, "clipart"), captions_only=True, cached=True, fewest=1),
    "stamps": Source(functools.partial(load_drawings, "stamps"), captions_only=True, cached=True, fewest=1),
    "fashion-mnist": Source(functools.partial(load_mnist, "fashion-mnist")),
    "mnist": Source(functools.partial(load_mnist, "mnist")),
    "cifar10": Source(load_cifar10),
}


def load_data(source: str, split: str, size: Size | None, data_dir: Path, cache_dir: Path,
              words: str | None = None, folder: Folder | Shards | None = None, count: int | None = None,
              crop: str = "centre", multiple: Size | None = None, rate: int | None = None) -> Dataset:
    """The part `split` of a source at `size`, by default 32 x 32; of sounds, 1 x T.

    words: None; "captions", which are class names where a source has no others; or "embeddings", where the
    captions are the names of the .npz files beside a folder's pictures. folder: what `find_folder` returned,
    if it was called before. count: how many pictures an endless source draws for training, instead of its
    own number. crop: "centre" or, for a folder, "random". multiple: pictures keep their aspect ratio, with
    sides that are multiples of this and at most as many pixels as `size` has. rate: of a folder of sounds."""
    is_sound = rate is not None or (source in SOURCES and SOURCES[source].rate is not None)
    size = tuple(size or ((1, LENGTH) if is_sound else (32, 32)))
    if folder is None:
        folder = find_folder(source, words, rate)
    if isinstance(folder, Shards):
        return load_shards(folder, split, size, cache_dir, crop)
    if folder is not None and rate is not None:
        data = load_sound_folder(folder, split, size, rate, cache_dir, crop)
    elif folder is not None:
        data = load_folder(folder, split, size, cache_dir, crop, multiple)
    else:
        row = SOURCES[source]
        load = row.load
        if words and row.load_captioned:
            load = row.load_captioned
        if row.endless:
            load = functools.partial(load, multiple=multiple)
            if count is not None:
                load = functools.partial(load, count=count)
        if row.cached:
            load = functools.partial(load, cache_dir=cache_dir)
        data = load(split, size, data_dir)
    if words == "captions" and data.captions is None:
        names = [clean_text(name.replace("-", " ")) for name in data.classes]
        data = replace(data, captions=[names[label] for label in data.labels])
    return data


def demo() -> None:
    """Write a captioned folder, load it as a user's, and put a batch of it into batch.png."""
    print("SOURCES:", ", ".join(SOURCES), "and any folder of pictures")
    with tempfile.TemporaryDirectory() as temporary:
        # a folder as a user would bring it: pictures, and a caption beside each
        source, cache_dir = Path(temporary) / "pictures", Path(temporary) / "cache"
        source.mkdir()
        for i in range(40):
            scene = describe_scene(i)
            Image.fromarray(draw_scene(scene, i, (48, 64))).save(source / f"{i:02d}.png")
            (source / f"{i:02d}.txt").write_text(scene.caption, "utf-8")
        folder = find_folder(str(source), "captions")
        for split in ("val", "train"):
            data = load_data(str(source), split, (32, 32), source, cache_dir, words="captions", folder=folder)
            print(f"{split}: {len(data)} pictures of shape {data.images.shape[1:]}, identity {data.identity}")
        indices = batch_indices(len(data), batch_size=8, step=0, seed=0)
        x = to_tensor(data.images[indices])
        print(f"batch 0: pictures {indices.tolist()}, {tuple(x.shape)} from {x.min():.2f} to {x.max():.2f}")
        grid(to_uint8(x), 4, captions=[data.captions[i] for i in indices]).save("batch.png")
        print("batch.png written")
        del data                                # Windows does not delete a file that is still mapped


if __name__ == "__main__":
    demo()
