"""data.py: every source, datasets of folders, their identities, and batches."""

import gzip
import hashlib
import io
import json
import os
import socket
import sys
import tarfile
from urllib.error import HTTPError, URLError

import numpy as np
import pytest
import torch
from benchmarks.scenes import score_scene
from conftest import EPS, RED, captioned, colours, count_reads, other_profile, picture, write_idx
from PIL import Image

import data
import folder
import toys
from data import batch_indices, find_folder, load_data
from files import digest, read_stamp
from toys import COLOURS, KINDS, SHAPE_CLASSES, describe_scene, read_shape


def load(source, split="train", size=None, tmp=None, **options):
    return load_data(str(source), split, size, tmp, tmp / "cache", **options)


# ---- shapes and scenes

def test_shapes_are_deterministic_varied_and_split(tmp_path):
    train, val = load("shapes", tmp=tmp_path, count=480), load("shapes", "val", tmp=tmp_path)
    again = load("shapes", tmp=tmp_path, count=480)
    assert (train.images == again.images).all() and train.fingerprint == again.fingerprint != val.fingerprint
    assert ((np.bincount(train.labels) == 20).all()
            and train.classes == [f"{c}-{k}" for c in COLOURS for k in KINDS])
    for i in range(0, 480, 48):
        assert "-".join(read_shape(val.images[i])) == SHAPE_CLASSES[val.labels[i]]
    seen = {image.tobytes() for image in train.images}
    assert len(seen) == 480 and not any(image.tobytes() in seen for image in val.images)


def test_captioned_shapes(tmp_path):
    """Every picture matches its caption, and training has nothing of what it must not see."""
    part = load("shapes", tmp=tmp_path, words="captions", count=200)
    assert len(part) == 200 and part.labels is None and not part.classes
    for i, (image, caption) in enumerate(zip(part.images, part.captions)):
        scene = describe_scene(i)
        assert scene.caption == caption and not scene.unseen and score_scene(scene, image)["all"]
    val = load("shapes", "val", tmp=tmp_path, words="captions")
    assert len(val) == 480 and not any((val.images[i] == part.images).all((1, 2, 3)).any() for i in range(50))


# ---- emoji

@pytest.fixture
def emoji_font(tmp_path):
    try:
        return toys.find_emoji_font(tmp_path)
    except ValueError:
        pytest.skip("no emoji font on this system")


def test_emoji(tmp_path, emoji_font):
    train, val = (load("emoji", split, (24, 32), tmp_path, words="captions") for split in ("train", "val"))
    names, images = train.captions + val.captions, np.concatenate([train.images, val.images])
    assert images.shape == (len(names), 24, 32, 3) and len(names) > 1000 and train.vary
    assert len(set(names)) == len(names) == len({image.tobytes() for image in images})       # no duplicates
    assert all(image.min() < 240 for image in images)                                         # no blanks
    assert {"pineapple", "cat face", "octopus", "red apple", "green apple"} <= set(names)
    assert all(name == name.lower() for name in names) and not any("modifier" in name for name in names)

    def colour(name):
        image = images[names.index(name)].astype(float)
        return image[np.ptp(image, axis=-1) > 60].mean(0)

    assert colour("red apple").argmax() == 0 and colour("green apple").argmax() == 1    # picture and name
    assert colour("blue heart").argmax() == 2


def test_emoji_without_a_font(tmp_path, monkeypatch):
    monkeypatch.setattr(toys, "EMOJI_FONTS", [])
    with pytest.raises(ValueError, match="no colour font in .* --data-dir"):
        load("emoji", tmp=tmp_path)
    (tmp_path / "emoji.ttf").write_bytes(b"no font")
    with pytest.raises(ValueError, match="emoji.ttf: not a font"):
        load("emoji", tmp=tmp_path)


# ---- batches

def test_some_pictures_are_always_the_same_and_no_pattern():
    assert (data.some_pictures(7, None) == np.arange(7)).all()
    assert (data.some_pictures(7, 7) == np.arange(7)).all()
    tenth = data.some_pictures(20_000, 2000)
    assert len(set(tenth)) == 2000 and (np.diff(tenth) > 0).all() and tenth[-1] < 20_000
    assert (tenth == data.some_pictures(20_000, 2000)).all()
    counts = np.bincount(tenth % 24, minlength=24)        # shapes come in turn: no class is left out
    assert counts.min() > 50 and counts.max() < 120
    with pytest.raises(ValueError, match="--limit 8: there are 7 pictures to train on; give fewer"):
        data.some_pictures(7, 8)


def test_batch_indices():
    n = 10
    stream = np.concatenate([batch_indices(n, 4, step, seed=3) for step in range(10)])
    for epoch in stream.reshape(4, n):
        assert sorted(epoch) == list(range(n))                       # every example once per epoch, no gap
    assert (batch_indices(n, 4, 7, seed=3) == stream[28:32]).all()   # a pure function of the step
    assert (stream[:10] != stream[10:20]).any() and (batch_indices(n, 4, 0, seed=4) != stream[:4]).any()
    assert len(batch_indices(3, 8, 0, seed=0)) == 8                  # a batch larger than the data


def test_only_cpu_memory_is_pinned():
    """The outputs of an encoder on the GPU are there already; the meta device stands in for it."""
    x = torch.ones(2, device="meta")
    assert data.send(x, "meta") is x
    with pytest.raises((RuntimeError, AssertionError)) as error:
        data.send(x, "cuda")               # without a GPU the copy fails, but nothing is pinned before it
    assert "pin" not in str(error.value)


# ---- IDX, CIFAR-10

@pytest.mark.parametrize("packed", [True, False])
def test_mnist_files(tmp_path, packed):
    images = np.random.default_rng(0).integers(0, 256, (5, 28, 28))
    ending = ".gz" if packed else ""
    write_idx(tmp_path / "mnist" / f"train-images-idx3-ubyte{ending}", images)
    write_idx(tmp_path / "mnist" / f"train-labels-idx1-ubyte{ending}", np.arange(5))
    found = load("mnist", tmp=tmp_path)
    assert (found.images[:, 2:-2, 2:-2, 0] == images).all() and found.images.shape == (5, 32, 32, 1)
    assert (found.images[:, :2].max() == 0 and found.labels.tolist() == [0, 1, 2, 3, 4]
            and found.classes[3] == "3")
    assert load("mnist", size=(16, 24), tmp=tmp_path).images.shape == (5, 16, 24, 1)


def test_an_archive_that_would_fill_the_memory(tmp_path, monkeypatch):
    """By its header, before anything is unpacked; and what the header does not name is not unpacked."""
    write_mnist(tmp_path, np.zeros((3, 28, 28)), [0, 1, 2])
    write_cifar(tmp_path, np.zeros((3, 3073)))
    monkeypatch.setattr(data, "LARGEST", 2000)
    with pytest.raises(ValueError, match="ubyte.gz: .*by its header it holds 2 KiB, of at most 2 KiB"):
        load("mnist", tmp=tmp_path)
    with pytest.raises(ValueError, match="binary.tar.gz: .*it holds more than 2 KiB"):
        load("cifar10", tmp=tmp_path)
    path = tmp_path / "mnist" / "train-labels-idx1-ubyte.gz"
    whole = gzip.decompress(path.read_bytes()) + bytes(2**20)
    path.write_bytes(gzip.compress(whole))
    asked, plain = [], gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: asked.append(size) or plain(file, size))
    with pytest.raises(ValueError, match="labels-idx1-ubyte.gz: damaged"):
        data.read_idx(path)
    assert asked == [4, 4, 4]                       # mark and rank, sizes, and one byte more than they say


def test_what_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(data.gzip, "open", refuse)
    with pytest.raises(ValueError, match="a.gz: may not be read$"):
        data.read_idx(tmp_path / "a.gz")


def write_mnist(folder, images, labels):
    write_idx(folder / "mnist" / "train-images-idx3-ubyte.gz", np.asarray(images))
    write_idx(folder / "mnist" / "train-labels-idx1-ubyte.gz", np.asarray(labels))


@pytest.mark.parametrize("broken", [b"", b"\0\0\x08", b"PNG", b"\0\0\x08\x01\0\0\0\x05\1",
                                    b"\0\0\x0d\1\0\0\0\0", b"\0\0\x08\x03" + b"\xff" * 12, b"\0\0\x08\xff"])
def test_damaged_idx(tmp_path, broken):
    good = tmp_path / "mnist" / "train-labels-idx1-ubyte"
    write_idx(good, np.arange(5))
    (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(broken)
    with pytest.raises(ValueError, match="train-images-idx3-ubyte: damaged"):
        load("mnist", tmp=tmp_path)


def write_cifar(folder, rows, kind=tarfile.REGTYPE):
    rows = rows.astype(np.uint8)
    with tarfile.open(folder / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = rows.nbytes if kind == tarfile.REGTYPE else 0
            info.type = kind
            tar.addfile(info, io.BytesIO(rows.tobytes()))


@pytest.mark.parametrize("damage", [lambda raw: b"\0" + raw[1:], lambda raw: raw[:len(raw) // 2],
                                    lambda raw: raw[:len(raw) // 2] + bytes(40) + raw[len(raw) // 2 + 40:],
                                    lambda raw: raw[:3]])
@pytest.mark.parametrize("source, name, message", [
    ("mnist", "mnist/train-images-idx3-ubyte.gz", "train-images-idx3-ubyte.gz: damaged"),
    ("cifar10", "cifar-10-binary.tar.gz", "cifar-10-binary.tar.gz: damaged or not CIFAR-10"),
])
def test_a_damaged_stream(tmp_path, damage, source, name, message):
    write_mnist(tmp_path, np.random.default_rng(0).integers(0, 256, (3, 28, 28)), [0, 1, 2])
    write_cifar(tmp_path, np.random.default_rng(0).integers(0, 9, (4, 3073)))
    path = tmp_path / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=message):
        load(source, tmp=tmp_path)


@pytest.mark.parametrize("images, labels, message", [
    (np.zeros((3, 28, 28)), [0, 1, 10], r"labels-idx1-ubyte.gz: label 10 of picture 2 is none of the 10"),
    (np.zeros((3, 28, 28)), [255, 1, 1], "label 255 of picture 0"),
    (np.zeros((3, 28, 28)), [0, 1], r"labels-idx1-ubyte.gz: labels of shape \(2,\) for 3 pictures"),
    (np.zeros((3, 28, 28)), [0, 1, 2, 3], r"labels of shape \(4,\) for 3 pictures"),
    (np.zeros((3, 28, 28)), [[0, 1, 2]], r"labels of shape \(1, 3\) for 3 pictures"),
    (np.zeros((0, 28, 28)), [], r"images-idx3-ubyte.gz: holds no picture"),
    (np.zeros((3, 0, 28)), [0, 1, 2], r"images-idx3-ubyte.gz: holds no picture"),
    (np.zeros((3, 28)), [0, 1, 2], r"images-idx3-ubyte.gz: an array of shape \(3, 28\), not pictures"),
])
def test_labels_and_pictures_of_mnist_belong_together(tmp_path, images, labels, message):
    write_mnist(tmp_path, images, labels)
    with pytest.raises(ValueError, match=message):
        load("mnist", tmp=tmp_path)


@pytest.mark.parametrize("rows, kind, message", [
    (np.full((2, 3073), 10), tarfile.REGTYPE, "cifar-10-binary.tar.gz: label 10 of picture 0"),
    (np.zeros((0, 3073)), tarfile.REGTYPE, "holds no picture"),
    (np.zeros((2, 3000)), tarfile.REGTYPE, "damaged or not CIFAR-10"),
    (np.zeros((2, 3073)), tarfile.DIRTYPE, "damaged or not CIFAR-10"),
    (np.zeros((2, 3073)), tarfile.FIFOTYPE, "damaged or not CIFAR-10"),
])
def test_bad_cifar10(tmp_path, rows, kind, message):
    write_cifar(tmp_path, rows, kind)
    with pytest.raises(ValueError, match=message):
        load("cifar10", "val", tmp=tmp_path)


def test_cifar10(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (4, 3073), dtype=np.uint8)
    rows[:, 0] = [3, 1, 4, 1]
    write_cifar(tmp_path, rows)
    val = load("cifar10", "val", tmp=tmp_path)
    assert val.labels.tolist() == [3, 1, 4, 1] and len(load("cifar10", tmp=tmp_path)) == 20
    assert val.images[2, 5, 7, 1] == rows[2, 1 + 1024 + 5 * 32 + 7]  # planes, then rows, then columns
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"not a tar")
    with pytest.raises(ValueError, match="damaged or not CIFAR-10"):
        load("cifar10", tmp=tmp_path)


# ---- downloads

def test_download_is_checked(tmp_path, monkeypatch):
    payload = gzip.compress(b"\0\0\x08\x01" + (3).to_bytes(4, "big") + bytes([7, 8, 9]))
    source = tmp_path / "mirror"
    source.mkdir()
    (source / "train-labels-idx1-ubyte.gz").write_bytes(payload)
    monkeypatch.setitem(data.MIRRORS, "mnist", source.as_uri() + "/")
    with pytest.raises(ValueError, match="MD5"):
        data.find_file("mnist", "train-labels-idx1-ubyte.gz", tmp_path / "data")
    assert not list((tmp_path / "data").rglob("*ubyte*"))                      # nothing half-trusted stays
    monkeypatch.setitem(data.MD5, "mnist/train-labels-idx1-ubyte.gz", hashlib.md5(payload).hexdigest())
    path = data.find_file("mnist", "train-labels-idx1-ubyte.gz", tmp_path / "data")
    assert data.read_idx(path).tolist() == [7, 8, 9]
    monkeypatch.setitem(data.MIRRORS, "mnist", (tmp_path / "nowhere").as_uri() + "/")
    with pytest.raises(ValueError, match="--data-dir"):
        data.find_file("mnist", "t10k-labels-idx1-ubyte.gz", tmp_path / "data")


@pytest.mark.parametrize("error, said", [
    (URLError(socket.gaierror(-2, "Name or service not known")), "no connection: Name or service not known"),
    (URLError(OSError(101, "Network is unreachable")), "no connection: Network is unreachable"),
    (URLError("unknown url type: x"), "<urlopen error unknown url type: x>"),
    (HTTPError("http://x", 404, "Not Found", {}, None), "HTTP Error 404: Not Found"),
    (TimeoutError("timed out"), "timed out")])
def test_why_a_download_failed_is_said(tmp_path, monkeypatch, error, said):
    def urlopen(url, timeout):
        raise error

    monkeypatch.setattr(data.urllib.request, "urlopen", urlopen)
    with pytest.raises(ValueError, match=rf"cannot be downloaded from http.* \({said}\); put"):
        data.find_file("mnist", "t10k-labels-idx1-ubyte.gz", tmp_path)


def test_a_file_in_the_place_of_the_folder_of_data(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ValueError, match="--data-dir .*file: is no folder"):
        load("mnist", tmp=tmp_path / "file")
    with pytest.raises(ValueError, match="cannot be downloaded .*File exists"):
        monkeypatch.setitem(data.MIRRORS, "file", "http://x/")
        monkeypatch.setitem(data.MD5, "file/x", "")
        data.find_file("file", "x", tmp_path)


@pytest.mark.parametrize("failure", ["refused", "short", "status", "length"])
def test_a_failed_download_is_one_line_and_leaves_nothing(tmp_path, monkeypatch, failure):
    from http.client import BadStatusLine, IncompleteRead

    class Reply(io.BytesIO):
        headers = {"Content-Length": "many" if failure == "length" else "100"}

        def read(self, size=-1):
            if failure == "short":
                raise IncompleteRead(b"", 100)
            return super().read(size)

    def urlopen(url, timeout):
        if failure == "refused":
            raise OSError(111, "Connection refused")
        if failure == "status":
            raise BadStatusLine("x")
        return Reply(b"not the file")

    monkeypatch.setattr(data.urllib.request, "urlopen", urlopen)
    with pytest.raises(ValueError, match="t10k-labels") as error:
        data.find_file("mnist", "t10k-labels-idx1-ubyte.gz", tmp_path)
    assert len(str(error.value).splitlines()) == 1 and not list((tmp_path / "mnist").iterdir())


# ---- folders

def test_a_folder_or_a_built_in_source(tmp_path):
    for source in data.SOURCES:
        assert find_folder(source, None) is None and find_folder(source, "captions") is None
        with pytest.raises(ValueError, match=f"--data {source}: it has no .npz files of vectors"):
            find_folder(source, "embeddings")
    with pytest.raises(ValueError, match="--data .*missing: neither a built-in source .shapes, .* nor a"):
        find_folder(str(tmp_path / "missing"), None)


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    """With what find_folder returned, load_data neither lists the folder nor reads its captions again."""
    captioned(tmp_path / "a", ["x", "y"])
    listed = find_folder(str(tmp_path / "a"), "captions")
    assert [path.name for path in listed.pictures] == ["0.png", "1.png"]
    assert listed.words == ["x", "y"] and listed.labels is None and listed.classes == []
    monkeypatch.setattr(data, "find_folder", None)
    monkeypatch.setattr(data, "list_folder", None)
    (tmp_path / "a/1.txt").unlink()
    part = load(tmp_path / "a", size=(8, 8), tmp=tmp_path, words="captions", folder=listed)
    assert part.captions == ["y"]


def test_folders_flat_and_with_classes(tmp_path, capsys):
    for i in range(9):
        picture(tmp_path / f"flat/{i}.png")
    (tmp_path / "flat" / "broken.png").write_bytes(b"\x89PNG no")
    (tmp_path / "flat" / "notes.txt").write_text("not a picture")
    flat = load(tmp_path / "flat", size=(8, 12), tmp=tmp_path)
    # 9 pictures, one of them for validation
    assert len(flat) == 8 and flat.labels is None and flat.classes == []
    assert len(load(tmp_path / "flat", "val", size=(8, 12), tmp=tmp_path)) == 1
    assert capsys.readouterr().err.count("skipped") == 1                        # by name, once for both parts
    for kind, colour in (("red", RED), ("blue", (0, 0, 255))):
        for i in range(30):
            picture(tmp_path / "classes" / kind / f"{i}.png", colour, size=(9, 9))
    for split, count in (("train", 56), ("val", 4)):                          # two of each class validate
        part = load_data(str(tmp_path / "classes"), split, (8, 8), tmp_path, tmp_path / "cache2")
        assert part.classes == ["blue", "red"] and len(part) == count
        assert colours(part.images) == [((0, 0, 255), RED)[label] for label in part.labels]
        assert (part.images[np.array([2, 0])][:, 4, 4] == [colours(part.images)[i] for i in (2, 0)]).all()


def test_classes_are_listed_after_decoding(tmp_path, capsys):
    for name in ("2", "10", "1", "3"):
        for i in range(3):
            picture(tmp_path / f"p/{name}/{i}.png", (int(name), 0, 0))
    for name in ("3", "1"):
        for i in range(3):
            (tmp_path / f"p/{name}/{i}.png").write_bytes(b"broken")
    for _ in range(2):
        train, val = (load(tmp_path / "p", split, (8, 8), tmp_path, words="captions")
                      for split in ("train", "val"))
        assert train.classes == val.classes == ["2", "10"]
        assert train.labels.tolist() == [0, 0, 1, 1] and val.labels.tolist() == [0, 1]
        assert [colour[0] for colour in colours(train.images)] == [2, 2, 10, 10]
        assert train.captions == ["2", "2", "10", "10"]
    error = capsys.readouterr().err
    assert error.count("classes left out, because none of their pictures can be used: 1; 3\n") == 1


def test_a_folder_with_captions(tmp_path):
    """Every picture keeps its own; the captions are part of the data's identity, not of the latents'."""
    captioned(tmp_path / "a", ["none"] + [f"words {i} 緑" for i in range(1, 6)])
    part = load(tmp_path / "a", size=(8, 8), tmp=tmp_path, words="captions")
    assert part.captions == [f"words {i} 緑" for i in range(1, 6)]                         # 0 validates
    assert [colour[0] for colour in colours(part.images)] == [40 * i for i in range(1, 6)]
    assert load(tmp_path / "a", "val", (8, 8), tmp_path, words="captions").captions == ["none"]
    (tmp_path / "a/3.txt").write_text("other")
    other = load(tmp_path / "a", size=(8, 8), tmp=tmp_path, words="captions")
    assert other.fingerprint == part.fingerprint and other.identity != part.identity
    assert load(tmp_path / "a", size=(8, 8), tmp=tmp_path).identity == part.fingerprint    # without captions


def test_class_names_serve_as_captions(tmp_path):
    captioned(tmp_path / "a/green-thing", [None, None])
    assert load(tmp_path / "a", size=(8, 8), tmp=tmp_path, words="captions").captions == ["green thing"]
    if sys.platform == "linux":                                 # a name that is not in UTF-8
        captioned(tmp_path / "b" / os.fsdecode(b"caf\xe9-x"), [None, None])
        assert load(tmp_path / "b", size=(8, 8), tmp=tmp_path, words="captions").captions == ["caf? x"]
    assert load("shapes", tmp=tmp_path, count=48).captions is None


def test_random_crops_of_a_folder(tmp_path):
    """Several of each picture for training, with its label and caption; the central one for validation."""
    for i in range(4):
        for name in ("a", "b"):
            path = picture(tmp_path / f"p/{name}/{i}.png")
            wide = np.full((8, 16, 3), 60 * i, np.uint8)
            wide[..., 1] = 10 * np.arange(16)
            Image.fromarray(wide).save(path)
            path.with_suffix(".txt").write_text(f"{name}{i}")
    plain, crops = ([load(tmp_path / "p", split, (8, 8), tmp_path, words="captions", crop=crop)
                     for split in ("train", "val")] for crop in ("centre", "random"))
    count = folder.RANDOM_CROPS
    assert crops[0].captions == [caption for caption in plain[0].captions for _ in range(count)]
    assert crops[0].labels.tolist() == plain[0].labels.repeat(count).tolist() and len(crops[0]) == 6 * count
    assert (crops[0].images[::count] == plain[0].images[:]).all()
    for i in range(6):
        own = crops[0].images[count * i:count * (i + 1)]
        assert (own[..., 0] == plain[0].images[i][0, 0, 0]).all() and len(np.unique(own[:, 0, 0, 1])) > 1
    assert (crops[1].images == plain[1].images).all() and crops[1].captions == ["a0", "b0"]
    assert not {part.identity for part in plain} & {part.identity for part in crops}


def test_vectors_of_a_folder_are_the_same_by_any_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    captioned(tmp_path / "a", [None] * 3)
    for i in range(3):
        (tmp_path / f"a/{i}.npz").write_bytes(b"")
    spellings = [load(name, size=(8, 8), tmp=tmp_path, words="embeddings")
                 for name in ("a", "./a", tmp_path / "a", "a/../a")]
    assert [os.path.basename(name) for name in spellings[0].captions] == ["1.npz", "2.npz"]
    assert len({part.identity for part in spellings}) == 1


# ---- folders that a former version has read

def former(place, cache, size=(8, 8)):
    """Write the cache of a former version, with pictures that tell whether it is used, and return the
    fingerprints of its parts."""
    paths = sorted(path for path in place.rglob("*") if path.suffix in (".png", ".eps") and path.is_file())
    files = [(str(p.relative_to(place)), p.stat().st_size, p.stat().st_mtime_ns) for p in paths]
    fingerprint = digest("folder", size, files)
    cache.mkdir()
    np.save(cache / "images.npy", np.full((len(paths), *size, 3), 77, np.uint8))
    keep = list(range(len(paths)))
    (cache / "images.json").write_text(json.dumps({"fingerprint": fingerprint, "keep": keep}))
    return [digest(fingerprint, split) for split in ("train", "val")]


def test_a_cache_of_the_former_version_is_used(tmp_path, monkeypatch):
    for i in range(25):
        picture(tmp_path / f"p/only/{i:02d}.png")
    was = former(tmp_path / "p", tmp_path / "cache")
    calls = count_reads(monkeypatch)
    for _ in range(2):
        train, val = (load(tmp_path / "p", split, (8, 8), tmp_path) for split in ("train", "val"))
        assert set(colours(train.images) + colours(val.images)) == {(77, 77, 77)} and len(val) == 2
        assert [train.former_identities, val.former_identities] == [(was[0],), (was[1],)]
        assert train.identity != was[0]
    assert len(calls) == 25                                         # each hashed once, none decoded
    for path in (tmp_path / "p").rglob("*.png"):                    # the stamp now vouches for the bytes
        os.utime(path, (1, 1))
    assert load(tmp_path / "p", size=(8, 8), tmp=tmp_path).former_identities == (was[0],)


def test_captions_are_part_of_a_former_identity(tmp_path):
    captioned(tmp_path / "p", ["zero", "one", "two"])
    was = former(tmp_path / "p", tmp_path / "cache")
    part = load(tmp_path / "p", size=(8, 8), tmp=tmp_path, words="captions")
    assert part.former_identities == (digest(was[0], ["one", "two"]),)
    assert part.former_fingerprints == (was[0],)                    # by which latents are found
    assert part.identity == digest(part.fingerprint, ["one", "two"])


def as_it_was(place):
    pass


def with_litter(place):
    picture(place / "a/.x.png")


def with_numbers(place):
    (place / "a").rename(place / "10")
    (place / "b").rename(place / "9")


def with_one_of_a_class(place):
    picture(place / "0/alone.png")


def with_another_split(place):
    picture(place / "a/22.png")


def with_a_broken_class(place):
    for path in (place / "b").iterdir():
        path.write_bytes(b"broken")


def with_postscript(place):
    (place / "a/x.eps").write_bytes(EPS)


def with_a_profile(place):
    picture(place / "a/00.png", icc_profile=other_profile())


@pytest.mark.parametrize("change", [as_it_was, with_litter, with_numbers, with_one_of_a_class,
                                    with_another_split, with_a_broken_class, with_postscript,
                                    with_a_profile])
def test_a_run_on_what_was_read_otherwise_is_another(tmp_path, change):
    """Other pictures, another order, split or colours than the former version's: no identity of it."""
    for i in range(23):
        picture(tmp_path / f"p/{'ab'[i // 20]}/{i:02d}.png")
    change(tmp_path / "p")
    was = former(tmp_path / "p", tmp_path / "cache")
    if change == with_a_broken_class:                   # the former version found that out as well
        stamp = read_stamp(tmp_path / "cache/images.json") | {"keep": list(range(20))}
        (tmp_path / "cache/images.json").write_text(json.dumps(stamp))
    for split, identity in zip(("train", "val"), was):
        part = load(tmp_path / "p", split, (8, 8), tmp_path)
        assert part.identity not in was
        assert part.former_identities == ((identity,) if change == as_it_was else ())
        assert change != with_a_profile or (77, 77, 77) not in colours(part.images)        # decoded anew


@pytest.mark.parametrize("change", [lambda path: os.utime(path, (1, 1)),
                                    lambda path: picture(path, (1, 2, 3))])
def test_a_former_run_needs_its_times_or_its_cache(tmp_path, change):
    for i in range(3):
        picture(tmp_path / f"p/{i}.png")
    was = former(tmp_path / "p", tmp_path / "cache")
    change(tmp_path / "p/1.png")
    assert not set(was) & set(load(tmp_path / "p", size=(8, 8), tmp=tmp_path).former_identities)


def test_single_pictures_of_classes_were_split_otherwise(tmp_path):
    for name in "abc":
        picture(tmp_path / f"p/{name}/1.png")
    former(tmp_path / "p", tmp_path / "cache")
    part = load(tmp_path / "p", size=(8, 8), tmp=tmp_path)
    assert part.former_identities == () and part.labels.tolist() == [0, 1, 2]
