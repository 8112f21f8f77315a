"""data.py: every source, every kind of picture, and the caches."""

import gzip
import hashlib
import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (COLOURS, KINDS, SHAPE_CLASSES, UNSEEN_PAIRS, UNSEEN_RELATIONS, LatentCache, Scene,
                  Thing, batch_indices, describe_scene, draw_scene, draw_shape, grid, load_data, open_image,
                  read_scene, read_shape, score_scene, to_tensor, to_uint8)
from vae import VAE, VAEConfig

SIZE = (32, 32)


def load(source, split="train", size=None, tmp=None, **options):
    return load_data(str(source), split, size, tmp, tmp / "cache", **options)


def test_shapes_are_read_back_exactly():
    for i in range(2400):
        assert "-".join(read_shape(draw_shape(i))) == SHAPE_CLASSES[i % 24]
    for i in range(96):
        assert "-".join(read_shape(draw_shape(i, (48, 64)))) == SHAPE_CLASSES[i % 24]


@pytest.mark.parametrize("unseen", [False, True])
def test_scenes_are_read_as_drawn(unseen):
    """10,000 clean pictures: number, colours, kinds, sizes, place or relation, all exact."""
    for i in range(9_000 if not unseen else 1_000):
        scene = describe_scene(i, unseen=unseen)
        assert score_scene(scene, draw_scene(scene, i))["all"], (i, scene.caption)
    for i in range(100):
        scene = describe_scene(i, unseen=unseen)
        assert score_scene(scene, draw_scene(scene, i, (48, 64)))["all"], (i, scene.caption)


def test_scenes_keep_what_is_unseen_apart():
    seen = [describe_scene(i) for i in range(4000)]
    assert not any((t.colour, t.kind) in UNSEEN_PAIRS for scene in seen for t in scene.things)
    triples = {(s.things[0].kind, s.relation, s.things[1].kind) for s in seen if s.relation}
    assert not triples & UNSEEN_RELATIONS and len(triples) == 4 * 4 * 4 - len(UNSEEN_RELATIONS)
    asked = [describe_scene(i, unseen=True) for i in range(4000)]
    assert {(t.colour, t.kind) for scene in asked for t in scene.things} >= UNSEEN_PAIRS
    assert {(s.things[0].kind, s.relation, s.things[1].kind) for s in asked if s.relation} >= UNSEEN_RELATIONS
    # the unseen relations are closed under saying the same the other way round
    opposite = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
    assert {(b, opposite[relation], a) for a, relation, b in UNSEEN_RELATIONS} == UNSEEN_RELATIONS
    assert {len(scene.things) for scene in seen} == {1, 2}
    assert describe_scene(5) == describe_scene(5)
    assert {len(describe_scene(i, 1).things) for i in range(50)} == {1}


def test_captions():
    circle = Thing("red", "circle", "small", 0.24, 0.76)
    square = Thing("blue", "square", "large", 0.5, 0.5)
    assert Scene((circle,)).caption == "a small red circle at the bottom left"
    assert Scene((square,)).caption == "a large blue square in the centre"
    assert Scene((circle, square), "left of").caption == "a small red circle left of a large blue square"


def test_captioned_shapes(tmp_path):
    """Every picture shows what its caption says, and training has nothing of what it must not see."""
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
    monkeypatch.setattr(data, "EMOJI_FONTS", [])
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


def test_omitted_details():
    """Every detail comes and goes by itself; what remains is true, and stays on its side of the relation."""
    rng, one = np.random.default_rng(0), "a small red cross in the centre"
    made = [data.omit_details(one, rng) for _ in range(4000)]
    assert {*made} == {f"a {size}{colour}{kind}{place}" for size in ("", "small ") for colour in ("", "red ")
                       for kind in ("shape", "cross") for place in ("", " in the centre")}
    assert abs(np.mean([m == one for m in made]) - (6 / 7) ** 4) < 0.03
    assert abs(np.mean(["red" in m for m in made]) - 6 / 7) < 0.03
    two = data.describe_scene(3, count=2).caption
    relation = next(r for r in data.RELATIONS if r in two)
    for _ in range(100):
        assert all(set(told.split()) <= {*said.split(), "shape"} for told, said in
                   zip(data.omit_details(two, rng).split(relation), two.split(relation), strict=True))


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


def test_captions_are_drawn_below():
    images = np.zeros((4, 32, 32, 3), np.uint8)
    plain, labelled = grid(images), np.asarray(grid(images, captions=["", "words", "many " * 12, "x"]))
    assert labelled.shape[0] > 4 * plain.height and labelled.shape[1] == 2 * 128 + 3 * 2
    assert (labelled[:, :130] < 128).sum() != (labelled[:, 130:] < 128).sum()


def test_score_sees_each_mistake():
    asked = Scene((Thing("red", "circle", "small", 0.24, 0.5), Thing("blue", "square", "large", 0.76, 0.5)),
                  "left of")

    def score(scene):
        return score_scene(asked, draw_scene(scene, 0))

    assert all(score(asked).values())
    wrong = {"colour": Scene((Thing("cyan", "circle", "small", 0.24, 0.5), asked.things[1]), "left of"),
             "kind": Scene((Thing("red", "cross", "small", 0.24, 0.5), asked.things[1]), "left of"),
             "size": Scene((Thing("red", "circle", "large", 0.24, 0.5), asked.things[1]), "left of")}
    for part, scene in wrong.items():
        assert not score(scene)[part] and not score(scene)["all"]
    mirrored = Scene((Thing("red", "circle", "small", 0.76, 0.5),
                      Thing("blue", "square", "large", 0.24, 0.5)))
    result = score(mirrored)
    assert not result["relation"] and result["colour"] and result["kind"] and result["size"]
    assert not any(score(Scene(asked.things[:1])).values())                          # one of two is missing
    alone = Scene((Thing("red", "circle", "small", 0.24, 0.24),))
    moved = score_scene(alone, draw_scene(Scene((Thing("red", "circle", "small", 0.76, 0.24),)), 0))
    assert not moved["place"] and moved["colour"] and moved["kind"] and moved["size"]
    assert read_scene(np.full((32, 32, 3), 80, np.uint8)) == []


def test_scenes_survive_a_decoder():
    rng = np.random.default_rng(0)
    right = []
    for i in range(300):
        scene = describe_scene(i)
        noisy = np.clip(draw_scene(scene, i) + rng.normal(0, 5, (32, 32, 3)), 0, 255).astype(np.uint8)
        right.append(score_scene(scene, noisy)["all"])
    assert np.mean(right) > 0.97


def test_read_shape_survives_a_decoder_and_sees_a_wrong_picture():
    rng = np.random.default_rng(0)
    noisy = [np.clip(draw_shape(i) + rng.normal(0, 6, (32, 32, 3)), 0, 255).astype(np.uint8)
             for i in range(240)]
    assert np.mean(["-".join(read_shape(image)) == SHAPE_CLASSES[i % 24]
                    for i, image in enumerate(noisy)]) >= 0.99
    swapped = [draw_shape(i)[..., [1, 2, 0]] for i in range(48)]   # another colour is not the asked one
    assert not any("-".join(read_shape(image)) == SHAPE_CLASSES[i % 24] for i, image in enumerate(swapped))
    # upside-down triangles are no triangles' match
    turned = [np.rot90(draw_shape(i), 2) for i in range(2, 240, 4)]
    assert all(draw_shape(i).shape == image.shape for i, image in zip(range(2, 240, 4), turned))


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


# ---- latents

def make_cache(tmp_path, vae, flip=False, stamp="v1", count=48):
    return LatentCache(tmp_path / "latents.npy", vae, stamp, load("shapes", tmp=tmp_path, count=count), flip)


def test_latent_cache(tmp_path):
    vae = VAE(VAEConfig(widths=(8, 16), groups=4)).eval()
    cache, shapes = make_cache(tmp_path, vae, flip=True), load("shapes", tmp=tmp_path, count=48)
    x = to_tensor(shapes.images[:5])
    with torch.no_grad():
        posterior, mirrored = vae.encode(x), vae.encode(x.flip(-1))
    assert cache.latents.shape == (48, 2, 2, 4, 16, 16) and isinstance(cache.latents, np.memmap)
    for f, q in enumerate((posterior, mirrored)):   # the mirrored picture's latent, not a mirrored one
        np.testing.assert_allclose(cache.latents[:5, f, 0], q.mean, atol=2e-3)
        np.testing.assert_allclose(cache.latents[:5, f, 1], q.std, atol=2e-3)
    draws = torch.stack([cache.batch(np.arange(5))[0] for _ in range(400)])
    want = torch.stack([torch.stack([q.mean, q.mean**2 + q.std**2]) for q in (posterior, mirrored)]).mean(0)
    error = (draws.mean(0) - want[0]).abs() / draws.std(0)
    assert error.max() < 5.5 / 400**0.5 and draws.std(0).min() > 0.1  # resampled, both flips equally often
    assert (cache.batch(np.array([3]))[1] == torch.tensor([3])).all()
    mean, var = cache.statistics()
    latents = torch.from_numpy(cache.latents.astype(np.float64))
    total = latents[:, :, 0].mean((0, 1, 3, 4))
    torch.testing.assert_close(mean, total)
    torch.testing.assert_close(
        var, (latents[:, :, 0] ** 2 + latents[:, :, 1] ** 2).mean((0, 1, 3, 4)) - total**2)


def test_stale_latents_are_rebuilt(tmp_path, capsys):
    vae = VAE(VAEConfig(widths=(8, 16), groups=4)).eval()
    make_cache(tmp_path, vae)
    first = (tmp_path / "latents.npy").stat().st_mtime_ns
    make_cache(tmp_path, vae)
    assert ((tmp_path / "latents.npy").stat().st_mtime_ns == first
            and "rebuilding" not in capsys.readouterr().out)
    for change in (dict(stamp="v2"), dict(stamp="v2", flip=True), dict(stamp="v2", flip=True, count=72)):
        cache = make_cache(tmp_path, vae, **change)
        assert "rebuilding" in capsys.readouterr().out
        assert json.loads((tmp_path / "latents.json").read_text())["shape"] == list(cache.latents.shape)
    # a copy cut short
    (tmp_path / "latents.npy").write_bytes((tmp_path / "latents.npy").read_bytes()[:1000])
    assert make_cache(tmp_path, vae, **change).latents.shape[0] == 72


def test_grid():
    images = np.stack([np.full((4, 6, 3), 10 * i, np.uint8) for i in range(5)])
    picture = np.asarray(grid(images, columns=3))
    assert picture.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    assert picture[2, 2, 0] == 0 and picture[2 + 6, 2 + 8, 0] == 40 and picture[0, 0, 0] == 255
    assert grid(images[..., :1]).mode == "L"


def test_no_space_for_a_cache(tmp_path, monkeypatch):
    """A memory map would only fail when its pages are written, and then by killing the process."""
    vae = VAE(VAEConfig(widths=(8, 16), groups=4)).eval()
    monkeypatch.setattr(data.shutil, "disk_usage", lambda path: type("usage", (), {"free": 1000}))
    with pytest.raises(OSError, match=r"cannot write .*latents.part of 0 MiB: No space left"):
        make_cache(tmp_path, vae)
    assert {p.name for p in tmp_path.glob("latents*")} == {"latents.lock"}
