"""Pictures, labels and captions: from any source to a `Dataset`, and from a Dataset to batches.

    python data.py                        # lists the sources; turns a folder of pictures into batch.png

Every built-in source is a row of SOURCES, below its loaders; any other name is a folder of pictures. A new
source is a loader and one row. Files are looked for in --data-dir and on the system, else downloaded.

Conventions: pictures are uint8 (N, H, W, C) in a Dataset and float32 (B, C, H, W) in [-1, 1] for a model;
sizes are (H, W); splits are "train" and "val". Bad input raises ValueError with one line for the user.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import sys
import tarfile
import tempfile
import textwrap
import urllib.request
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import Tensor
from tqdm import tqdm

from cache import digest, locked, new_array, read_stamp, write_stamp
from toys import (SHAPE_CLASSES, describe_scene, draw_scene, draw_shape, find_emoji_font, omit_details,
                  render_emoji, vary_caption)

Size = tuple[int, int]      # height and width


@dataclass
class Dataset:
    images: np.ndarray          # (N, H, W, C) uint8, in memory or memory-mapped
    labels: np.ndarray | None   # (N,) int64, or None where there are no classes
    classes: list[str]          # names; empty where there are no classes
    fingerprint: str            # changes whenever a pixel or a label may have changed
    captions: list[str] | None = None   # one per picture, or None
    vary: Callable[[str, np.random.Generator], str] | None = None   # rewords a caption at random, in training

    def __len__(self) -> int:
        return len(self.images)

    @property
    def identity(self) -> str:
        """Changes with the fingerprint and with any caption. Cached latents need only the fingerprint."""
        if self.captions is None:
            return self.fingerprint
        return digest(self.fingerprint, self.captions)


# ---- batches

def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) nominally in [-1, 1] -> uint8 (B, H, W, C)."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


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


@functools.lru_cache(maxsize=4)     # a batch needs one order, two across the end of an epoch
def _order(n: int, epoch: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


# ---- shapes and, with captions, scenes

# Both are cached because a VAE and the network on top of it load the same pictures in one process.
@functools.lru_cache(maxsize=2)
def load_shapes(split: str, size: Size, data_dir: Path | None = None, count: int = 20_000) -> Dataset:
    """One shape per picture, with classes. count: pictures for training; validation has 480."""
    first, count = _range_of(split, count)
    first -= first % len(SHAPE_CLASSES)         # so that the first label is 0
    images = np.stack([draw_shape(first + i, size) for i in range(count)])
    labels = np.arange(count) % len(SHAPE_CLASSES)
    return Dataset(images, labels, SHAPE_CLASSES, digest("shapes", split, images, labels))


@functools.lru_cache(maxsize=2)
def load_scenes(split: str, size: Size, data_dir: Path | None = None, count: int = 20_000) -> Dataset:
    """One or two shapes per picture, with captions."""
    first, count = _range_of(split, count)
    scenes = [describe_scene(first + i) for i in range(count)]
    images = np.stack([draw_scene(scene, first + i, size) for i, scene in enumerate(scenes)])
    captions = [scene.caption for scene in scenes]
    return Dataset(images, None, [], digest("scenes", split, images), captions, vary=omit_details)


def _range_of(split: str, count: int) -> tuple[int, int]:
    """First index and number of pictures. Validation begins far beyond any number of training pictures."""
    if split == "train":
        return 0, count
    return 10**9, 480


# ---- emoji, drawn from a font of the system

def load_emoji(split: str, size: Size, data_dir: Path) -> Dataset:
    """Emoji with their names as captions, and without classes. Every 20th picture is for validation."""
    images, names = render_emoji(find_emoji_font(data_dir), size)
    is_val = np.arange(len(names)) % 20 == 0
    chosen = np.flatnonzero(is_val == (split != "train"))
    images, names = images[chosen], [names[i] for i in chosen]
    return Dataset(images, None, [], digest("emoji", split, images), names, vary=vary_caption)


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


def find_file(source: str, name: str, data_dir: Path) -> Path:
    """The file, compressed or not: in data_dir, in data_dir/source, where Debian puts it, or downloaded into
    data_dir/source and checked."""
    for folder in (data_dir, data_dir / source, Path("/usr/share/datasets") / source):
        for candidate in (folder / name, folder / name.removesuffix(".gz")):
            if candidate.is_file():
                return candidate
    target = data_dir / source / name
    partial = data_dir / source / (name + ".part")
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with urllib.request.urlopen(MIRRORS[source] + name, timeout=30) as reply, open(partial, "wb") as out:
            total = int(reply.headers.get("Content-Length", 0)) or None
            with tqdm(desc=f"download {name}", total=total, unit="B", unit_scale=True) as bar:
                while chunk := reply.read(1 << 16):
                    bar.update(out.write(chunk))
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise ValueError(f"{name} of {source} is not in {data_dir} and cannot be downloaded from "
                         f"{MIRRORS[source]} ({error}); put the file there or name its folder with --data-dir"
                         ) from None
    found, expected = hashlib.md5(partial.read_bytes()).hexdigest(), MD5[f"{source}/{name}"]
    if found != expected:
        partial.unlink()
        raise ValueError(f"{MIRRORS[source]}{name}: MD5 {found} is not {expected}; the download was deleted")
    partial.replace(target)
    return target


def read_idx(path: Path) -> np.ndarray:
    """The array of an IDX file (LeCun's format: two zero bytes, 8 = uint8, rank, big-endian sizes, data)."""
    try:
        raw = gzip.open(path).read() if path.suffix == ".gz" else path.read_bytes()
        if raw[:3] != b"\0\0\x08":
            raise ValueError("not an IDX file of bytes")
        shape = np.frombuffer(raw, ">u4", raw[3], 4)
        return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)
    except (ValueError, IndexError, EOFError, OSError) as error:
        raise ValueError(f"{path}: damaged or not an IDX file ({error}); "
                         "delete it to have it downloaded again") from None


def load_mnist(source: str, split: str, size: Size, data_dir: Path) -> Dataset:
    """source: "mnist" or "fashion-mnist", of the same format."""
    part = "train" if split == "train" else "t10k"
    images = read_idx(find_file(source, f"{part}-images-idx3-ubyte.gz", data_dir))
    labels = read_idx(find_file(source, f"{part}-labels-idx1-ubyte.gz", data_dir)).astype(np.int64)
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
            raw = b"".join(tar.extractfile(f"cifar-10-batches-bin/{name}").read() for name in names)
        rows = np.frombuffer(raw, np.uint8).reshape(-1, 3073)      # a label, then 3 planes of 32 x 32
    except (KeyError, ValueError, EOFError, OSError, tarfile.TarError) as error:
        raise ValueError(f"{path}: damaged or not CIFAR-10's binary version ({error}); "
                         "delete it to have it downloaded again") from None
    images = rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
    labels = rows[:, 0].astype(np.int64)
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


# ---- a folder of any pictures

class Folder(NamedTuple):
    """A folder's pictures in sorted order: listed, and their captions read, but not yet decoded."""
    path: Path
    pictures: list[Path]
    labels: list[int] | None        # indices into classes; None for a flat folder
    classes: list[str]
    words: list[str] | None = None  # one per picture: captions, or names of .npz files; None if not asked for


def find_folder(source: str, words: str | None) -> Folder | None:
    """The folder that --data names, or None for a built-in source. words: None, "captions" (`Folder.words`
    stays None where class names must serve as captions) or "embeddings". Raises ValueError where there are no
    pictures, or pictures without the words asked for."""
    if source in SOURCES:
        if words == "embeddings":
            raise ValueError(f"--text-encoder none with --data {source}: it has no .npz files of vectors; "
                             "give a folder that has")
        return None
    folder = _list_pictures(Path(source))
    if words == "captions":
        captions = _read_captions(folder)
        if captions is None and folder.labels is None:
            raise ValueError(f"--data {source}: pictures without words; put NAME.txt beside each, or "
                             "metadata.jsonl with file_name and text")
        return folder._replace(words=captions)
    if words == "embeddings":
        files = [path.with_suffix(".npz") for path in folder.pictures]
        for file in files:
            if not file.is_file():
                raise ValueError(f"--data {source}: no {file} beside its picture, "
                                 "as --text-encoder none needs")
        return folder._replace(words=[str(file) for file in files])
    return folder


def _list_pictures(path: Path) -> Folder:
    """A flat folder, or a folder of class folders."""
    if not path.is_dir():
        raise ValueError(f"--data {path}: neither a built-in source ({', '.join(SOURCES)}) nor a folder")
    endings = {ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN}
    pictures = sorted(p for p in path.rglob("*") if p.suffix.lower() in endings and p.is_file())
    if not pictures:
        raise ValueError(f"--data {path}: no pictures in this folder "
                         "(looked for files that Pillow opens, such as .png, .jpg)")
    flat = [p for p in pictures if p.parent == path]
    if flat and len(flat) < len(pictures):
        raise ValueError(f"--data {path}: {flat[0].name} lies beside class folders; "
                         "use a flat folder or class folders, not both")
    if flat:
        return Folder(path, flat, labels=None, classes=[])
    names = [p.relative_to(path).parts[0] for p in pictures]
    classes = sorted(set(names))
    index = {name: i for i, name in enumerate(classes)}
    return Folder(path, pictures, [index[name] for name in names], classes)


def clean_text(text: str) -> str:
    """One line of valid Unicode with single spaces. Every caption and prompt passes through here, so that the
    same words are the same string."""
    return " ".join(text.encode("utf-8", "replace").decode().split())


def _read_captions(folder: Folder) -> list[str] | None:
    """One caption per picture, from metadata.jsonl or else from NAME.txt beside it. None where no picture has
    one; raises ValueError where only some have."""
    table = _read_metadata(folder.path)
    all_must_have_one = bool(table)
    for path in folder.pictures:
        beside = path.with_suffix(".txt")
        if path not in table and beside.is_file():
            try:
                table[path] = clean_text(beside.read_text("utf-8-sig"))
            except UnicodeDecodeError:
                raise ValueError(f"{beside}: not in UTF-8; save it in that encoding") from None
    missing = [path for path in folder.pictures if path not in table]
    if not missing:
        return [table[path] for path in folder.pictures]
    if all_must_have_one or len(missing) < len(folder.pictures):
        raise ValueError(f"--data {folder.path}: {len(missing)} of {len(folder.pictures)} pictures have no "
                         f"caption, such as {missing[0]}; write one into "
                         f"{missing[0].with_suffix('.txt').name} beside it, or into metadata.jsonl")
    return None


def _read_metadata(path: Path) -> dict[Path, str]:
    """Captions by picture, from every metadata.jsonl in the folder: lines {"file_name": ..., "text": ...}."""
    table = {}
    for metadata in sorted(path.rglob("metadata.jsonl")):
        for number, line in enumerate(metadata.read_bytes().splitlines(), 1):
            try:
                row = json.loads(line) if line.strip() else None
                if row:
                    table[metadata.parent / row["file_name"]] = clean_text(row["text"])
            except (ValueError, KeyError, TypeError, AttributeError):
                raise ValueError(f"{metadata}, line {number}: not an object with file_name and text"
                                 ) from None
    return table


def open_image(path: Path, size: Size) -> np.ndarray:
    """Any picture that Pillow opens -> uint8 (H, W, 3): rotated according to its EXIF data, transparency on
    white, scaled to cover `size` and cropped in the centre. Raises OSError or ValueError for a file that
    cannot be decoded."""
    with Image.open(path) as image:
        image = ImageOps.exif_transpose(image)
        # Pillow's own conversion from 16 or 32 bits would clip at 255.
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image, dtype=np.float64)
            white = max(values.max(), 1e-9)
            if image.mode.startswith("I") and values.max() <= 65535:
                white = 65535.0
            image = Image.fromarray(np.round(np.clip(values / white, 0, 1) * 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.asarray(ImageOps.fit(image.convert("RGB"), size[::-1], Image.Resampling.LANCZOS))


def load_folder(folder: Folder, split: str, size: Size, cache_dir: Path) -> Dataset:
    """The pictures of a folder, decoded once into cache_dir/images.npy and memory-mapped from then on. Every
    20th picture, at most 256 in all, is for validation."""
    files = []
    for picture in folder.pictures:
        stat = picture.stat()
        files.append((str(picture.relative_to(folder.path)), stat.st_size, stat.st_mtime_ns))
    fingerprint = digest("folder", size, files)
    stamp_path, array_path = cache_dir / "images.json", cache_dir / "images.npy"
    with locked(cache_dir / "images.lock", wait=True):
        if read_stamp(stamp_path).get("fingerprint") != fingerprint or not array_path.is_file():
            partial = cache_dir / "images.npy.part"
            decoded = _decode(folder, size, partial)
            stamp_path.unlink(missing_ok=True)      # never an old stamp beside a new array
            partial.replace(array_path)
            write_stamp(stamp_path, {"fingerprint": fingerprint, "keep": decoded})
        keep = np.array(read_stamp(stamp_path)["keep"])     # row of the array -> index into folder.pictures
        images = np.load(array_path, mmap_mode="r")[:len(keep)]
    val = np.arange(len(keep))[::20][:256]
    chosen = val
    if split == "train" and len(keep) > 1:          # a single picture serves for both
        chosen = np.setdiff1d(np.arange(len(keep)), val)
    if split == "train":
        images = _Rows(images, chosen)      # images[chosen] would copy the whole file into memory
    else:
        images = images[chosen]
    labels = captions = None
    if folder.labels is not None:
        labels = np.array(folder.labels)[keep][chosen]
    if folder.words is not None:
        captions = [folder.words[keep[i]] for i in chosen]
    return Dataset(images, labels, folder.classes, digest(fingerprint, split), captions)


def _decode(folder: Folder, size: Size, path: Path) -> list[int]:
    """Write the pictures to an array at `path` and return the indices of those that could be decoded."""
    decoded = []
    store = new_array(path, np.uint8, (len(folder.pictures), *size, 3))
    for i, picture in enumerate(tqdm(folder.pictures, desc="decode pictures", unit="img")):
        try:
            store[len(decoded)] = open_image(picture, size)
            decoded.append(i)
        except Exception as error:          # Pillow raises a dozen types; each means: skip this file
            tqdm.write(f"skipped {picture}: {type(error).__name__}: {error}", file=sys.stderr)
    store.flush()
    del store                               # Windows does not rename a file that is still mapped
    if not decoded:
        path.unlink()
        raise ValueError(f"--data {folder.path}: none of its {len(folder.pictures)} pictures can be decoded")
    return decoded


class _Rows:
    """`array[rows]` of a memory map, of which only what is indexed is read."""

    def __init__(self, array: np.ndarray, rows: np.ndarray):
        self.array = array
        self.rows = rows
        self.shape = (len(rows), *array.shape[1:])

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index) -> np.ndarray:
        return self.array[self.rows[index]]


# ---- the table of sources

class Source(NamedTuple):
    """One row: load(split, size, data_dir) -> Dataset, and what sets the source apart."""
    load: Callable[..., Dataset]
    load_captioned: Callable[..., Dataset] | None = None    # set where captions belong to other pictures
    captions_only: bool = False                             # it has captions and no classes
    endless: bool = False       # pictures are drawn on demand: the loaders also take count, for training


SOURCES = {
    "shapes": Source(load_shapes, load_captioned=load_scenes, endless=True),
    "emoji": Source(load_emoji, captions_only=True),
    "fashion-mnist": Source(functools.partial(load_mnist, "fashion-mnist")),
    "mnist": Source(functools.partial(load_mnist, "mnist")),
    "cifar10": Source(load_cifar10),
}


def load_data(source: str, split: str, size: Size | None, data_dir: Path, cache_dir: Path,
              words: str | None = None, folder: Folder | None = None, count: int = 20_000) -> Dataset:
    """The part `split` of a source at `size`, by default 32 x 32.

    words: None; "captions", which are class names where a source has no others; or "embeddings", where the
    captions are the names of the .npz files beside a folder's pictures. folder: what `find_folder` returned,
    if it was called before. count: how many pictures an endless source draws for training."""
    size = tuple(size or (32, 32))
    if folder is None:
        folder = find_folder(source, words)
    if folder is not None:
        data = load_folder(folder, split, size, cache_dir)
    else:
        row = SOURCES[source]
        load = row.load
        if words and row.load_captioned:
            load = row.load_captioned
        if row.endless:
            load = functools.partial(load, count=count)
        data = load(split, size, data_dir)
    if words == "captions" and data.captions is None:
        data = replace(data, captions=[data.classes[label].replace("-", " ") for label in data.labels])
    return data


# ---- many pictures as one

def grid(images: np.ndarray, columns: int | None = None, pad: int = 2,
         captions: list[str] | None = None) -> Image.Image:
    """uint8 (N, H, W, C) -> one picture, row by row, on white. Captions stand below the pictures, which are
    enlarged to at least 112 pixels so that there is room for words."""
    if captions:
        zoom = -(-112 // images.shape[2])           # rounded up
        images = images.repeat(zoom, 1).repeat(zoom, 2)
        if images.shape[3] == 1:
            images = images.repeat(3, 3)
        lines = [textwrap.wrap(caption, images.shape[2] // 6) for caption in captions]
        strip = 13 * max(map(len, lines)) + 3       # 13 pixels per line of text
        images = np.pad(images, ((0, 0), (0, strip), (0, 0), (0, 0)), constant_values=255)
    n, h, w, c = images.shape
    columns = columns or int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    canvas = np.full((rows * (h + pad) + pad, columns * (w + pad) + pad, c), 255, np.uint8)
    corners = [(pad + i // columns * (h + pad), pad + i % columns * (w + pad)) for i in range(n)]
    for image, (top, left) in zip(images, corners):
        canvas[top:top + h, left:left + w] = image
    picture = Image.fromarray(canvas[..., 0] if c == 1 else canvas)
    if captions:
        pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
        for text, (top, left) in zip(lines, corners):
            for i, line in enumerate(text):
                pen.text((left, top + h - strip + 13 * i), line, "black", font)
    return picture


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
