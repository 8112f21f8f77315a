"""Collections that Debian packages: captions, what is left out, the split, pictures as a whole on white."""

import os

import numpy as np
import pytest
from conftest import QUICK, same
from PIL import Image, ImageDraw

import checkpoints
import data
import drawings
import pictures
import train

REAL = drawings.SYSTEM / "tuxpaint" / "stamps"
SVG = """<?xml version="1.0"?>
<svg xmlns:dc="http://purl.org/dc/elements/1.1/"><title>of no work</title><metadata>
 <cc:Work rdf:about="">{title}
  <dc:creator><cc:Agent><dc:title>{author}</dc:title></cc:Agent></dc:creator></cc:Work></metadata></svg>"""


@pytest.fixture(autouse=True)
def nowhere_else(monkeypatch, tmp_path):
    """The packages of this machine are not found."""
    monkeypatch.setattr(drawings, "SYSTEM", tmp_path / "share")
    drawings.open_drawings.cache_clear()


def draw(box, colour, size=(48, 32), mode="RGBA"):
    picture = Image.new(mode, size)
    ImageDraw.Draw(picture).rectangle(box, fill=colour)
    return picture


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)


def noise(seed, size=(48, 48)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), np.uint8)).resize(size, 0)


def clipart(root, name, picture, title=None, author="Ann Onymous"):
    save(picture, root / "openclipart" / "png" / f"{name}.png")
    svg = root / "openclipart" / "svg" / f"{name}.svg"
    svg.parent.mkdir(parents=True, exist_ok=True)
    element = "" if title is None else f"<dc:title>{title}</dc:title>"
    svg.write_text(SVG.format(title=element, author=author))


def load(name, split, tmp_path, size=(32, 32)):
    return data.load_data(name, split, size, tmp_path, tmp_path / "cache", words="captions")


def both(name, tmp_path, size=(32, 32)):
    """Captions, and pictures, of both parts."""
    parts = [load(name, split, tmp_path, size) for split in ("train", "val")]
    assert all(part.labels is None and part.vary for part in parts)
    return parts[0].captions + parts[1].captions, np.concatenate([part.images[:] for part in parts])


# ---- captions

@pytest.mark.parametrize("text, clean", [
    ("2 dead frogs", "2 dead frogs"), ("BlueMan#211", "blue man"), ("Aircraft3", "aircraft"),
    ("Clipart by Ann Onymous - note_with_clip_02", "note with clip"), ("LED Rounded H (Yellow)",
                                                                      "led rounded h yellow"),
    ("star_46pt05step", "star"), ("Grampa&amp;#39;n Gramma", "grampa'n gramma"), ("A rat.\n", "a rat"),
    ("“No U-Turn”.", "no u-turn"), ("tree - RPG map elements 04", "tree rpg map elements"),
    ("R15 General", "r15 general"), ("45 RPM Record", "45 rpm record"), ("17", "17"), ("", ""), ("---", ""),
    ("A coin of 20 cents (0.20 €).", "a coin of 20 cents"), ("Fire! Fire!", "fire! fire"),
    ("arrow-up-green", "arrow-up-green"), ("Ελλάδα", "ελλάδα"), ("smiley103.svg", "smiley"),
])
def test_captions_are_cleaned(text, clean):
    assert drawings.clean_caption(text) == clean
    assert drawings.clean_caption(clean) == clean


@pytest.mark.parametrize("stem, author, kept", [
    ("siringa_architetto_franc_01", "Architetto Francesco Rollandin", "siringa"),
    ("medicina_dottore_archite_01", "Architetto Francesco Rollandin", "medicina dottore"),
    ("people_juliane_krug_04c", "Juliane Krug", "people"),
    ("pear_jean-victor_bal", "Jean-Victor Balin", "pear"),
    ("map_a_01", "Ann", "map a"), ("17", "Ann", "17"),
    ("christmas_balls_mo_01", "Mo", "christmas balls"),
    ("crawfish1_bw_ganson", "Gerald G.", "crawfish1 bw ganson"),
    ("woman_reading_gerald_g._01", "Gerald G.", "woman reading"), ("mo_01", "Mo", "mo"),
    ("old_house", "", "old house"), ("old_house_02", "Anna House", "old house"),
])
def test_authors_are_taken_off_file_names(stem, author, kept):
    assert drawings.without_author(stem, author) == kept


def test_titles_of_collections_give_way_to_file_names(tmp_path):
    for i, name in enumerate(["cup", "saw_ann_onym_01", "door"]):
        clipart(tmp_path, f"tools/{name}", noise(i), "Three of a kind")
    for i, name in enumerate(["house", "tree_01", "sun_ann_onymous_01", "moon2"], 3):
        clipart(tmp_path, f"icons/{name}", noise(i), "My Theme 2004")
    clipart(tmp_path, "icons/blank", noise(7), None)
    clipart(tmp_path, "icons/flow/8_01", noise(8), "")
    clipart(tmp_path, "icons/fc02", noise(10), "")
    clipart(tmp_path, "icons/eye", noise(9), "Red&amp;Eye")
    captions, _ = both("clipart", tmp_path)
    assert sorted(captions) == sorted(["three of a kind"] * 3 + ["house", "tree", "sun", "moon", "blank",
                                                                 "flow", "icons fc", "red&eye"])


# ---- what is left out

@pytest.mark.parametrize("size", [32, 64, 128])
def test_clipart(tmp_path, capsys, size):
    """Links, copies, pictures of nothing and broken ones are left out, and counted on one line."""
    for i in range(30):
        clipart(tmp_path, f"a/thing_{'abcdefghijklmnopqrstuvwxyzäöüß'[i]}", noise(i))
    clipart(tmp_path, "b/again", noise(3).resize((300, 300), 0), "a larger copy")
    clipart(tmp_path, "b/empty", Image.new("RGBA", (50, 50)), "nothing")
    clipart(tmp_path, "b/white", Image.new("RGB", (50, 50), "white"), "white")
    clipart(tmp_path, "b/grey", Image.new("L", (50, 50), 100), "grey")
    clipart(tmp_path, "b/broken", noise(50), "broken")
    (tmp_path / "openclipart/png/b/broken.png").write_bytes(b"no picture")
    os.symlink("../a/thing_a.png", tmp_path / "openclipart/png/b/link.png")
    captions, images = both("clipart", tmp_path, (size, size))
    assert captions == sorted(set(captions), key=captions.index) and len(captions) == 30
    assert all(caption.startswith("thing ") for caption in captions)
    # as a whole: each picture's 8 x 8 colours are there, at their places
    order = [captions.index(f"thing {letter}") for letter in "abcdefghijklmnopqrstuvwxyz"]
    for i, row in enumerate(order):
        expected = np.asarray(noise(i, (8, 8))).astype(int)
        middles = images[row][size // 16 - 1::size // 8, size // 16 - 1::size // 8]
        assert np.abs(middles.astype(int) - expected).mean() < 40
    out, err = capsys.readouterr()
    assert out.count("in the public domain") == 1
    assert "(left out: 1 links, 1 not decoded, 3 nearly empty, 1 duplicates)" in out and "broken.png" in err


def test_next_to_nothing_is_left_out(tmp_path):
    """Of the 16 x 16 x 3 numbers by which pictures are compared, eight must not be white, and they must span
    24 levels. In pictures of 32 x 32, a dot of 2 x 2 makes three such numbers."""
    def dots(*places):
        picture = Image.new("RGB", (32, 32), "white")
        for place in places:
            picture.paste((0, 0, 0), (*place, place[0] + 2, place[1] + 2))
        return picture

    def halves(left, right):
        return Image.fromarray(np.repeat([left, right], 16)[None].repeat(32, 0).astype(np.uint8))

    clipart(tmp_path, "one dot", dots((14, 14)))                        # cropped to it: of one colour
    clipart(tmp_path, "two dots", dots((0, 0), (30, 30)))
    clipart(tmp_path, "three dots", dots((0, 0), (30, 30), (0, 30)))
    clipart(tmp_path, "faint", halves(100, 122))
    clipart(tmp_path, "clear", halves(150, 176))
    captions, images = both("clipart", tmp_path)
    assert sorted(captions) == ["clear", "three dots"]
    assert (images[captions.index("three dots")] == np.asarray(dots((0, 0), (30, 30), (0, 30)))).all()


def test_what_is_transparent_is_white(tmp_path):
    """Whatever colour is stored there; and half of a colour is mixed with white."""
    values = np.zeros((32, 32, 4), np.uint8)
    values[:, :8], values[:, 8:16] = (0, 0, 0, 0), (40, 80, 120, 0)
    values[8:, 16:] = (200, 0, 100, 128)
    values[24:, :4] = (0, 0, 0, 255)                                    # so that nothing is cropped
    clipart(tmp_path, "glass", Image.fromarray(values).crop((0, 8, 32, 32)))
    clipart(tmp_path, "other", noise(1))
    captions, images = both("clipart", tmp_path)
    found = images[captions.index("glass")].astype(int)                 # 24 rows, from the fifth on
    assert (found[:4] == 255).all() and (found[4:20, :16] == 255).all() and (found[20:28, :4] == 0).all()
    assert np.abs(found[4:28, 16:] - (227, 127, 177)).max() <= 1


def test_stamps(tmp_path, capsys):
    folder = tmp_path / "stamps"
    for i in range(25):
        save(noise(i), folder / "kind" / f"{i:03d}thing.png")
        (folder / "kind" / f"{i:03d}thing.txt").write_text(
            f"A “thing” of sort {chr(97 + i)}.\nde.utf8=Ein Ding.\n", "utf-8")
    save(noise(90), folder / "kind" / "009thing_mirror.png")                    # has no caption
    (folder / "drawn.svg").write_text("<svg/>")
    captions, images = both("stamps", tmp_path)
    assert sorted(captions) == [f"a thing of sort {chr(97 + i)}" for i in range(25)]
    out = capsys.readouterr().out
    assert "25 stamps of Tux Paint, under the GPL" in out
    assert "(left out: 1 SVG files, 1 without a caption)" in out


@pytest.mark.skipif(not REAL.is_dir(), reason="needs Debian's tuxpaint-stamps-default")
def test_the_stamps_of_debian(tmp_path, monkeypatch):
    monkeypatch.setattr(drawings, "SYSTEM", REAL.parent.parent)
    train, val = (load("stamps", split, tmp_path) for split in ("train", "val"))
    captions = train.captions + val.captions
    assert len(train.images) + len(val.images) == len(captions) and all(captions)
    captioned = sum(file.with_suffix(".txt").is_file() for file in REAL.rglob("*.png")
                    if not file.is_symlink())
    assert 500 < 0.95 * captioned < len(captions) <= captioned < 1500   # versions of the package differ
    assert 0.03 < len(val) / len(captions) < 0.07
    # No picture has one on the other side that is as good as the same, or is called the same.
    small = [part.images[:].reshape(len(part), 16, 2, 16, 2, 3).mean((2, 4)) for part in (train, val)]
    nearest = [np.sqrt(np.square(small[0] - picture).mean((1, 2, 3)).min()) for picture in small[1]]
    assert min(nearest) > drawings.ALIKE - 0.5                          # thumbnails are rounded
    assert not set(train.captions) & set(val.captions)


def test_train_and_sample_on_stamps(tmp_path, monkeypatch, quick):
    """A VAE, its latents and a network on captions, from one command, and a second from their caches."""
    monkeypatch.chdir(tmp_path)
    for i in range(44):
        save(noise(i), tmp_path / "data" / "stamps" / f"{i}.png")
        (tmp_path / "data" / "stamps" / f"{i}.txt").write_text(f"A thing of sort {chr(97 + i // 2)}.")
    flags = ["--arch", "mmdit", "--data", "stamps", "--image-size", "16", "24", *QUICK, "--vae-preset",
             "tiny", "--vae-steps", "2"]
    train.main(flags)
    drawings.open_drawings.cache_clear()
    monkeypatch.setattr("decoded.read_image", lambda *_: pytest.fail("decoded again"))
    train.main([*flags, "--name", "second"])
    first = checkpoints.load_checkpoint("runs/stamps-16x24-mmdit-rf")
    second = checkpoints.load_checkpoint("runs/second")
    assert first["data"] == second["data"] and same(first["model"], second["model"])


@pytest.mark.parametrize("name, packages", [("clipart", "openclipart-png openclipart-svg"),
                                            ("stamps", "tuxpaint-stamps-default")])
def test_a_package_that_is_missing_is_named(name, packages, tmp_path):
    (tmp_path / "openclipart" / "png").mkdir(parents=True)                      # and no titles
    with pytest.raises(ValueError, match=f"--data {name}: .*apt install {packages}.*--data-dir") as error:
        load(name, "train", tmp_path)
    assert "\n" not in str(error.value) and not (tmp_path / "cache").exists()


def test_collections_are_found_on_the_system_and_where_data_dir_says(tmp_path, monkeypatch):
    for base in ("share", "mine"):
        clipart(tmp_path / base, "thing", noise(len(base)), base)
    row = drawings.find_collection
    assert row("clipart", tmp_path / "elsewhere") == tmp_path / "share" / "openclipart"
    assert row("clipart", tmp_path / "mine") == tmp_path / "mine" / "openclipart"
    assert row("clipart", tmp_path / "mine" / "openclipart") == tmp_path / "mine" / "openclipart"


def test_a_collection_without_pictures(tmp_path):
    (tmp_path / "stamps").mkdir()
    with pytest.raises(ValueError, match="--data stamps: no pictures with captions in .*stamps; install"):
        load("stamps", "train", tmp_path)
    save(Image.new("RGB", (9, 9), "white"), tmp_path / "stamps" / "white.png")
    (tmp_path / "stamps" / "white.txt").write_text("White.")
    with pytest.raises(ValueError, match="none of the 1 picture in .* shows anything"):
        load("stamps", "train", tmp_path)


# ---- the cache

def test_pictures_are_decoded_once(tmp_path, monkeypatch):
    for i in range(21):
        clipart(tmp_path, f"thing_{chr(97 + i)}", noise(i))
    first = load("clipart", "train", tmp_path, (24, 40))
    drawings.open_drawings.cache_clear()
    with monkeypatch.context() as patch:
        patch.setattr("decoded.read_image", lambda *_: pytest.fail("decoded again"))
        second = load("clipart", "train", tmp_path, (24, 40))
        val = load("clipart", "val", tmp_path, (24, 40))
    assert first.identity == second.identity != val.identity and first.images.shape == (len(first), 24, 40, 3)
    assert (first.images[:] == second.images[:]).all()
    # Another picture or another title is other data.
    drawings.open_drawings.cache_clear()
    clipart(tmp_path, "thing_c", noise(2), "another title")
    renamed = load("clipart", "train", tmp_path, (24, 40))
    assert renamed.fingerprint == first.fingerprint and renamed.identity != first.identity
    drawings.open_drawings.cache_clear()
    clipart(tmp_path, "thing_b", noise(77))
    assert load("clipart", "train", tmp_path, (24, 40)).fingerprint != first.fingerprint


# ---- copies and the split

def test_near_pairs_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    thumbs = rng.uniform(0, 255, (700, 12)).astype(np.float32)
    thumbs[600:] = thumbs[:100] + rng.normal(0, 4, (100, 12))
    found = {tuple(pair) for pairs in drawings.near_pairs(thumbs, 20.0) for pair in pairs.tolist()}
    distance = np.sqrt(np.square(thumbs[:, None] - thumbs).mean(-1))
    expected = {(i, j) for i, j in np.argwhere(distance < 20).tolist() if i < j}
    assert found == expected and len(found) >= 100


def test_copies_of_a_copy_that_is_left_out_stay():
    """In a row of pictures, each near the next, every second one is left out."""
    thumbs = np.arange(6, dtype=np.float32)[:, None] * 3 + np.zeros((6, 5), np.float32)    # COPY is 4
    assert drawings.first_of_copies(thumbs).tolist() == [0, 2, 4]


def test_groups_join_what_is_alike_or_has_one_name():
    thumbs = np.repeat([0.0, 200, 10, 100, 205, 60], 4).reshape(6, 4).astype(np.float32)
    groups = drawings.groups_of(thumbs, ["cat", "dog", "sun", "cat", "cow", "dog"])
    # cat 0 - sun 2 by their looks, cat 0 - cat 3 by name; dog 1 - cow 4 by looks, dog 1 - dog 5 by name
    assert groups.tolist() == [0, 1, 0, 0, 1, 1]


def test_every_20th_group_is_held_out_and_large_ones_never():
    assert np.flatnonzero(drawings.hold_out(np.arange(100))).tolist() == [0, 20, 40, 60, 80]
    groups = np.array([0] * 21 + [30] * 2 + list(range(40, 60)))     # the first is too large
    assert np.flatnonzero(drawings.hold_out(groups)).tolist() == [21, 22, 42]
    assert drawings.hold_out(np.zeros(30, int)).sum() == 1           # one group: one picture has to do
    assert drawings.hold_out(np.zeros(1, int)).sum() == 0


def test_near_copies_are_on_one_side(tmp_path):
    """Twenty kinds, of each four pictures: two that look alike, two others of its name."""
    for i in range(20):
        base = np.asarray(noise(i, (48, 48))).astype(int)
        shifted = Image.fromarray(np.clip(base + 12, 0, 255).astype(np.uint8))
        clipart(tmp_path, f"a{i}/1", Image.fromarray(base.astype(np.uint8)), f"kind {chr(97 + i)}")
        clipart(tmp_path, f"a{i}/2", shifted, f"other {chr(97 + i)}")
        clipart(tmp_path, f"a{i}/3", noise(100 + i), f"Kind {chr(97 + i)} 2")
        clipart(tmp_path, f"a{i}/4", noise(200 + i), f"other {chr(97 + i)}")
    train, val = (load("clipart", split, tmp_path) for split in ("train", "val"))
    assert len(train) + len(val) == 80 and len(val) == 4
    assert len({caption[-1] for caption in val.captions}) == 1
    assert not {caption[-1] for caption in train.captions} & {caption[-1] for caption in val.captions}


# ---- pictures as a whole

def test_contain_crops_to_what_is_shown_and_keeps_its_shape():
    picture = draw((10, 8, 29, 17), (200, 30, 60), (64, 48), "RGB")            # 20 x 10, on black
    found = pictures.contain(Image.eval(picture, lambda level: level or 255), (32, 40))
    # twice as large, 40 x 20, in the middle of 32 rows; colours other than 0 are kept
    assert (found[6:26] == (200, 30, 60)).all() and (found[:6] == 255).all() and (found[26:] == 255).all()
    white = pictures.contain(Image.new("RGB", (10, 10), "white"), (8, 8))
    assert white.shape == (8, 8, 3) and (white == 255).all()


def test_contain_of_a_large_picture_is_as_if_resized_at_once():
    small = np.random.default_rng(0).integers(0, 200, (16, 16, 3), np.uint8)
    large = Image.fromarray(small).resize((960, 960), Image.Resampling.BICUBIC)
    at_once = np.asarray(large.resize((32, 32), Image.Resampling.LANCZOS)).astype(int)
    assert np.abs(pictures.contain(large, (32, 32)) - at_once).mean() < 1


def test_pictures_that_take_gigabytes_are_refused(tmp_path, monkeypatch):
    save(Image.new("1", (300, 300)), tmp_path / "large.png")
    pictures.check_pixels(tmp_path / "large.png")
    monkeypatch.setattr(pictures, "PIXELS", 89_999)
    with pytest.raises(ValueError, match="megapixels, of at most"):
        pictures.check_pixels(tmp_path / "large.png")
