"""data.py: every source, every kind of picture, batches and grids."""

import gzip
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from benchmarks.scenes import score_scene
from PIL import Image

import data
import toys
from data import batch_indices, find_folder, grid, load_data, open_image, to_tensor, to_uint8
from toys import COLOURS, KINDS, SHAPE_CLASSES, describe_scene, read_shape


def load(source, split="train", size=None, tmp=None, **options):
    return load_data(str(source), split, size, tmp, tmp / "cache", **options)


def test_captioned_shapes(tmp_path):
    """Every picture matches its caption, and training has nothing of what it must not see."""
    part = load("shapes", tmp=tmp_path, words="captions", count=200)
    assert len(part) == 200 and part.labels is None and not part.classes
    for i, (image, caption) in enumerate(zip(part.images, part.captions)):
        scene = describe_scene(i)
        assert scene.caption == caption and not scene.unseen and score_scene(scene, image)["all"]
    val = load("shapes", "val", tmp=tmp_path, words="captions")
    assert len(val) == 480 and not any((val.images[i] == part.images).all((1, 2, 3)).any() for i in range(50))


@pytest.fixture
def emoji_font():
    try:
        return data.find_emoji_font(data.Path("nowhere"))
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


def test_varied_captions():
    rng, caption = np.random.default_rng(0), "smiling cat face with heart-shaped eyes"
    made = [data.vary_caption(caption, rng) for _ in range(1000)]
    assert 0.4 < np.mean([m == caption for m in made]) < 0.65
    assert all(m and set(m.split()) <= set(caption.split()) for m in made)
    assert any(sorted(m.split()) == sorted(caption.split()) and m != caption for m in made)
    assert {data.vary_caption("cat face", rng) for _ in range(200)} == {"cat face", "face cat", "cat", "face"}
    assert data.vary_caption("dog", rng) == "dog"


def captioned(folder, captions):
    folder.mkdir(parents=True, exist_ok=True)
    for i, caption in enumerate(captions):
        Image.fromarray(np.full((8, 8, 3), i * 40, np.uint8)).save(folder / f"{i}.png")
        if caption is not None:
            (folder / f"{i}.txt").write_text(caption, "utf-8")


def test_captions_beside_pictures(tmp_path):
    captioned(tmp_path / "a", ["none"] + [f" two \n words {i} 緑" for i in range(1, 6)])
    part = load(tmp_path / "a", size=(8, 8), tmp=tmp_path, words="captions")
    assert part.captions == [f"two words {i} 緑" for i in range(1, 6)]                       # 0 validates
    assert [image.max() for image in part.images[:]] == [40 * i for i in range(1, 6)]
    (tmp_path / "a/3.txt").write_text("other")
    other = load(tmp_path / "a", size=(8, 8), tmp=tmp_path, words="captions")
    assert other.fingerprint == part.fingerprint and other.identity != part.identity   # latents stay
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"line {i}"}) for i in range(6)]
    (tmp_path / "a/metadata.jsonl").write_text("\n".join(lines) + "\n\n")                   # this goes first
    assert load(tmp_path / "a", size=(8, 8), tmp=tmp_path, words="captions").captions[0] == "line 1"
    (tmp_path / "a/metadata.jsonl").write_text(lines[0] + '\n{"text": 3}')
    with pytest.raises(ValueError, match="metadata.jsonl, line 2: not an object with file_name and text"):
        load(tmp_path / "a", size=(8, 8), tmp=tmp_path, words="captions")
    for text in ('{"file_name": "0.png", "text": null}', '{"file_name": "0.png", "text": ["a"]}'):
        (tmp_path / "a/metadata.jsonl").write_text(text)
        with pytest.raises(ValueError, match="metadata.jsonl, line 1: not an object"):
            load(tmp_path / "a", size=(8, 8), tmp=tmp_path, words="captions")
    captioned(tmp_path / "b", ["x", None, "y"])
    with pytest.raises(ValueError, match="1 of 3 pictures have no caption, such as .*1.png"):
        load(tmp_path / "b", size=(8, 8), tmp=tmp_path, words="captions")
    captioned(tmp_path / "c", [None, None])
    with pytest.raises(ValueError, match="pictures without words"):
        load(tmp_path / "c", size=(8, 8), tmp=tmp_path, words="captions")
    captioned(tmp_path / "d/green-thing", [None, None])
    assert load(tmp_path / "d", size=(8, 8), tmp=tmp_path, words="captions").captions == ["green thing"]
    # metadata in the folder of the pictures
    rows = [{"file_name": f"{i}.png", "text": f"row {i}"} for i in range(2)]
    (tmp_path / "d/green-thing/metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert load(tmp_path / "d", size=(8, 8), tmp=tmp_path, words="captions").captions == ["row 1"]
    (tmp_path / "d/green-thing/metadata.jsonl").write_text(json.dumps({"file_name": "no.png", "text": "x"}))
    with pytest.raises(ValueError, match="2 of 2 pictures have no caption"):
        load(tmp_path / "d", size=(8, 8), tmp=tmp_path, words="captions")
    captioned(tmp_path / "e", ["x", "y"])
    (tmp_path / "e/1.txt").write_text("a red circle", "utf-8-sig")                          # as Notepad does
    assert load(tmp_path / "e", size=(8, 8), tmp=tmp_path, words="captions").captions == ["a red circle"]
    (tmp_path / "e/1.txt").write_text("a red circle", "utf-16")
    with pytest.raises(ValueError, match="1.txt: not in UTF-8"):
        load(tmp_path / "e", size=(8, 8), tmp=tmp_path, words="captions")
    with pytest.raises(ValueError, match="0.npz beside its picture"):
        load(tmp_path / "c", size=(8, 8), tmp=tmp_path, words="embeddings")


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    """With what find_folder returned, load_data neither lists the folder nor reads its captions again."""
    captioned(tmp_path / "a", ["x", "y"])
    folder = find_folder(str(tmp_path / "a"), "captions")
    assert [path.name for path in folder.pictures] == ["0.png", "1.png"]
    assert folder.words == ["x", "y"] and folder.labels is None and folder.classes == []
    monkeypatch.setattr(data, "find_folder", None)
    monkeypatch.setattr(data, "_list_pictures", None)
    (tmp_path / "a/1.txt").unlink()
    part = load(tmp_path / "a", size=(8, 8), tmp=tmp_path, words="captions", folder=folder)
    assert part.captions == ["y"]


def test_built_in_sources_are_no_folders():
    for source in data.SOURCES:
        assert find_folder(source, None) is None and find_folder(source, "captions") is None
        with pytest.raises(ValueError, match=f"--data {source}: it has no .npz files of vectors"):
            find_folder(source, "embeddings")


def test_captions_are_drawn_below():
    images = np.zeros((4, 32, 32, 3), np.uint8)
    plain, labelled = grid(images), np.asarray(grid(images, captions=["", "words", "many " * 12, "x"]))
    assert labelled.shape[0] > 4 * plain.height and labelled.shape[1] == 2 * 128 + 3 * 2
    assert (labelled[:, :130] < 128).sum() != (labelled[:, 130:] < 128).sum()


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


def test_uint8_round_trip():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    assert (to_uint8(to_tensor(images)) == images).all()
    assert to_tensor(images).min() >= -1 and to_tensor(np.full((1, 1, 1, 1), 255, np.uint8)).item() == 1
    assert to_uint8(torch.tensor([[[[-9.0]], [[9.0]]]])).ravel().tolist() == [0, 255]


# ---- IDX, CIFAR-10

def write_idx(path, array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(int(n).to_bytes(4, "big") for n in array.shape)
    raw = header + array.astype(np.uint8).tobytes()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)


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


def test_damaged_idx(tmp_path):
    good = tmp_path / "mnist" / "train-labels-idx1-ubyte"
    write_idx(good, np.arange(5))
    for broken in (b"", b"\0\0\x08", b"PNG", good.read_bytes()[:-2]):
        (tmp_path / "mnist" / "train-images-idx3-ubyte").write_bytes(broken)
        with pytest.raises(ValueError, match="train-images-idx3-ubyte: damaged"):
            load("mnist", tmp=tmp_path)


def test_cifar10(tmp_path):
    rows = np.random.default_rng(0).integers(0, 256, (4, 3073), dtype=np.uint8)
    rows[:, 0] = [3, 1, 4, 1]
    with tarfile.open(tmp_path / "cifar-10-binary.tar.gz", "w:gz") as tar:
        for name in [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]:
            info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
            info.size = rows.nbytes
            tar.addfile(info, io.BytesIO(rows.tobytes()))
    val = load("cifar10", "val", tmp=tmp_path)
    assert val.labels.tolist() == [3, 1, 4, 1] and len(load("cifar10", tmp=tmp_path)) == 20
    assert val.images[2, 5, 7, 1] == rows[2, 1 + 1024 + 5 * 32 + 7]  # planes, then rows, then columns
    (tmp_path / "cifar-10-binary.tar.gz").write_bytes(b"not a tar")
    with pytest.raises(ValueError, match="damaged or not CIFAR-10"):
        load("cifar10", tmp=tmp_path)


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


# ---- folders

RED = (250, 10, 20)


def save_all_kinds(folder):
    """One picture of every kind, all red or mid-grey, 20 wide and 10 high."""
    folder.mkdir(parents=True, exist_ok=True)
    rgb = Image.new("RGB", (20, 10), RED)
    rgb.save(folder / "rgb.png")
    rgb.save(folder / "jpeg.jpg", quality=100)
    rgb.quantize(4).save(folder / "palette.png")
    rgb.convert("CMYK").save(folder / "cmyk.tif")
    Image.new("L", (20, 10), 128).save(folder / "grey.png")
    Image.fromarray(np.full((10, 20), 128 * 257, np.uint16)).save(folder / "grey16.png")
    Image.new("RGBA", (20, 10), (*RED, 0)).save(folder / "clear.png")
    Image.new("LA", (20, 10), (0, 0)).save(folder / "clear-grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6                                                 # turn by 90 degrees to show it
    wide = Image.new("RGB", (20, 10), RED)
    wide.paste((0, 0, 255), (0, 0, 10, 10))                          # stored: blue left; shown: blue on top
    wide.save(folder / "turned.png", exif=exif)


def test_every_kind_of_picture(tmp_path):
    save_all_kinds(tmp_path)
    for name, want in {"rgb.png": RED, "jpeg.jpg": RED, "palette.png": RED, "cmyk.tif": RED,
                       "grey.png": (128,) * 3, "grey16.png": (128,) * 3, "clear.png": (255,) * 3,
                       "clear-grey.png": (255,) * 3}.items():
        image = open_image(tmp_path / name, (8, 12))
        assert image.shape == (8, 12, 3) and np.abs(image.astype(int) - want).max() <= 3, name
    turned = open_image(tmp_path / "turned.png", (8, 4)).astype(int)
    assert turned[0, 2, 2] > 200 > 60 > turned[-1, 2, 2]


def test_crop_is_central_and_keeps_the_aspect(tmp_path):
    image = Image.new("RGB", (60, 20), (0, 0, 0))
    image.paste((255, 255, 255), (20, 0, 40, 20))
    image.save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png", (20, 20)).min() > 250      # the middle third, not a squeezed whole


def test_folders_flat_and_with_classes(tmp_path, capsys):
    save_all_kinds(tmp_path / "flat")
    (tmp_path / "flat" / "broken.png").write_bytes(b"\x89PNG no")
    (tmp_path / "flat" / "notes.txt").write_text("not a picture")
    flat = load(tmp_path / "flat", size=(8, 12), tmp=tmp_path)
    # 9 pictures, one of them for validation
    assert len(flat) == 8 and flat.labels is None and flat.classes == []
    assert len(load(tmp_path / "flat", "val", size=(8, 12), tmp=tmp_path)) == 1
    assert capsys.readouterr().err.count("skipped") == 1                        # by name, once for both parts
    for kind, colour in (("red", RED), ("blue", (0, 0, 255))):
        (tmp_path / "classes" / kind).mkdir(parents=True)
        for i in range(30):
            Image.new("RGB", (9, 9), colour).save(tmp_path / "classes" / kind / f"{i}.png")
    for split, count in (("train", 57), ("val", 3)):
        part = load_data(str(tmp_path / "classes"), split, (8, 8), tmp_path, tmp_path / "cache2")
        assert part.classes == ["blue", "red"] and len(part) == count
        for i in range(count):
            assert tuple(part.images[np.array([i])][0, 4, 4]) == ((0, 0, 255), RED)[part.labels[i]]


def test_stale_picture_cache_is_rebuilt(tmp_path):
    folder = tmp_path / "p"
    folder.mkdir()
    Image.new("RGB", (8, 8), RED).save(folder / "a.png")
    first = load(folder, size=(8, 8), tmp=tmp_path)
    Image.new("RGB", (8, 8), (0, 0, 255)).save(folder / "a.png")
    second = load(folder, size=(8, 8), tmp=tmp_path)
    assert (tuple(second.images[np.array([0])][0, 0, 0]) == (0, 0, 255)
            and first.fingerprint != second.fingerprint)
    assert load(folder, size=(4, 8), tmp=tmp_path).images.shape == (1, 4, 8, 3)


def test_bad_folders(tmp_path):
    with pytest.raises(ValueError, match="neither a built-in source"):
        load(tmp_path / "missing", tmp=tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no pictures"):
        load(tmp_path / "empty", tmp=tmp_path)
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(ValueError, match="none of its 1 pictures"):
        load(tmp_path / "empty", tmp=tmp_path)
    (tmp_path / "empty" / "sub").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "empty" / "sub" / "b.png")
    with pytest.raises(ValueError, match="beside class folders"):
        load(tmp_path / "empty", tmp=tmp_path)


def test_grid():
    images = np.stack([np.full((4, 6, 3), 10 * i, np.uint8) for i in range(5)])
    picture = np.asarray(grid(images, columns=3))
    assert picture.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    assert picture[2, 2, 0] == 0 and picture[2 + 6, 2 + 8, 0] == 40 and picture[0, 0, 0] == 255
    assert grid(images[..., :1]).mode == "L"
