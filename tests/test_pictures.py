"""pictures.py: files of every kind to arrays, colour profiles, and grids with captions."""

import numpy as np
import pytest
import torch
from conftest import RED, other_profile
from PIL import Image, ImageCms, ImageFont

import files
import pictures
from pictures import CAPTION_LINES, caption_font, cover, grid, open_image, to_tensor, to_uint8, wrap_caption


def test_uint8_round_trip():
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 6, 3), dtype=np.uint8)
    assert (to_uint8(to_tensor(images)) == images).all()
    assert to_tensor(images).min() >= -1 and to_tensor(np.full((1, 1, 1, 1), 255, np.uint8)).item() == 1
    assert to_uint8(torch.tensor([[[[-9.0]], [[9.0]]]])).ravel().tolist() == [0, 255]


# ---- reading a file

def test_formats_are_those_that_pillow_decodes_itself():
    assert {"PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"} <= set(pictures.FORMATS)
    assert not {"EPS", "PDF", "WMF", "GRIB", "BUFR", "HDF5", "MPEG"} & set(pictures.FORMATS)


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


@pytest.mark.parametrize("size", [(20, 60), (60, 20)])
def test_a_crop_may_lie_anywhere_on_the_longer_side(size):
    """Red, green and blue thirds, from left to right or from top to bottom."""
    ramp = np.zeros((*size, 3), np.uint8)
    for i in range(3):
        third = slice(20 * i, 20 * i + 20)
        ramp[(slice(None), third) if size[1] == 60 else third] = np.eye(3)[i] * 255
    for place, colour in ((0.0, 0), (0.5, 1), (1.0, 2)):
        crop = cover(Image.fromarray(ramp), (20, 20), place)
        assert crop.shape == (20, 20, 3) and crop[..., colour].min() > 250 and crop.sum(-1).max() < 260
    between = cover(Image.fromarray(ramp), (20, 20), 0.25)                     # half red, half green
    assert abs(between[..., 0].mean() - 127.5) < 1 and abs(between[..., 1].mean() - 127.5) < 1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_picture_of_no_numbers_is_refused(tmp_path, value):
    values = np.zeros((4, 4), np.float32)
    values[1, 2] = value
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(ValueError, match="holds values that are no numbers"):
        open_image(tmp_path / "a.tif", (4, 4))


# ---- colour profiles

def srgb_of(linear):
    return 255 * (1.055 * (linear / 255) ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("mode, ending", [("RGB", "png"), ("RGB", "tif"), ("RGB", "jpg"), ("RGB", "webp"),
                                          ("RGBA", "png"), ("P", "png")])
def test_colour_profiles_become_srgb(tmp_path, mode, ending):
    values = (60, 128, 200)
    image = Image.new("RGB", (8, 8), values)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    options = {"quality": 100} if ending in ("jpg", "webp") else {}
    image.save(tmp_path / f"a.{ending}", icc_profile=other_profile(), **options)
    found = open_image(tmp_path / f"a.{ending}", (8, 8))[4, 4].astype(float)
    assert np.abs(found - [srgb_of(value) for value in values]).max() < 4


def test_a_profile_keeps_transparency(tmp_path):
    image = Image.new("RGBA", (8, 8), (60, 128, 200, 0))
    image.paste((60, 128, 200, 255), (0, 0, 4, 8))
    image.save(tmp_path / "a.png", icc_profile=other_profile())
    found = open_image(tmp_path / "a.png", (8, 8)).astype(float)
    assert found[4, 7].tolist() == [255] * 3 and abs(found[4, 0, 1] - srgb_of(128)) < 4


@pytest.mark.parametrize("profile", [b"", b"no profile", b"\0" * 400, "cut", "of another mode", "of sRGB",
                                     None])
def test_other_profiles_leave_every_bit(tmp_path, capsys, profile):
    """Pictures in sRGB, without a profile, or with one that is no use."""
    mode = "L" if profile == "of another mode" else "RGB"
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    image = Image.fromarray(noise).convert(mode)
    image.save(tmp_path / "plain.png")
    if isinstance(profile, str):
        srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
        profile = {"cut": other_profile()[:200], "of another mode": other_profile(), "of sRGB": srgb}[profile]
        told = profile != srgb
    else:
        told = bool(profile)
    image.save(tmp_path / "a.png", icc_profile=profile)
    assert (open_image(tmp_path / "a.png", (8, 8)) == open_image(tmp_path / "plain.png", (8, 8))).all()
    error = capsys.readouterr().err
    assert error.count("\n") == told and ("a.png: its colour profile" in error) == told


# ---- a grid of pictures, with captions

def test_grid():
    images = np.stack([np.full((4, 6, 3), 10 * i, np.uint8) for i in range(5)])
    picture = np.asarray(grid(images, columns=3))
    assert picture.shape == (2 * 6 + 2, 3 * 8 + 2, 3)
    assert picture[2, 2, 0] == 0 and picture[2 + 6, 2 + 8, 0] == 40 and picture[0, 0, 0] == 255
    assert grid(images[..., :1]).mode == "L"


def test_captions_are_drawn_below():
    images = np.zeros((4, 32, 32, 3), np.uint8)
    plain, labelled = grid(images), np.asarray(grid(images, captions=["", "words", "many " * 12, "x"]))
    assert labelled.shape[0] > 4 * plain.height and labelled.shape[1] == 2 * 128 + 3 * 2
    assert (labelled[:, :130] < 128).sum() != (labelled[:, 130:] < 128).sum()


def test_long_captions_are_shortened():
    images = np.zeros((2, 32, 32, 3), np.uint8)
    for caption in ("word " * 4000, "x" * 20_000, "\u7dd1" * 7000):
        assert grid(images, captions=[caption, "x"]).height < 400
        lines = wrap_caption(caption, 21)
        assert len(lines) == CAPTION_LINES and lines[-1].endswith("...") and lines[0][:1] == caption[0]
    assert wrap_caption("a large red circle left of a small blue square", 21) == [
        "a large red circle", "left of a small blue", "square"]
    assert wrap_caption("", 21) == []
    assert wrap_caption("\u7dd1" * 12, 21) == ["\u7dd1" * 11, "\u7dd1"]


def ink(text):
    return np.asarray(grid(np.full((1, 32, 32, 3), 255, np.uint8), captions=[text])).tobytes()


def test_captions_in_other_scripts(monkeypatch, capsys):
    monkeypatch.setattr(pictures, "_system_fonts", lambda: ())
    pictures._font_for.cache_clear()
    monkeypatch.setattr(files, "_warned", set())
    boxes = {ink(letter) for letter in "\u00e9\u00fc\u0416"}        # told of once, by the first
    error = capsys.readouterr().err
    assert len(boxes) == 1 and error.count("no font of this system") == 1 and ": \u00e9; install" in error
    monkeypatch.undo()
    pictures._font_for.cache_clear()
    usual = {"DejaVuSans.ttf", "LiberationSans-Regular.ttf"}
    if not usual & {path.name for path in pictures._system_fonts()}:
        pytest.skip("none of the usual fonts on this system")
    drawn = {ink(letter) for letter in "\u00fc\u00e9u"}
    assert len(drawn) == 3 and not drawn & boxes
    assert caption_font("plain").getname() == ImageFont.load_default(11).getname()    # as ever


def test_fonts_of_a_user_without_a_home(tmp_path, monkeypatch):
    """As in containers. Fonts are looked for in the other folders, in order."""
    for name in ("b/deep/x.otf", "b/Arial.ttf", "b/notes.txt", "a/y.ttc"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    monkeypatch.setattr("os.path.expanduser", lambda name: name)             # as it does for such a user
    folders = ("~/.fonts", str(tmp_path / "b"), str(tmp_path / "missing"), str(tmp_path / "a"))
    monkeypatch.setattr(pictures, "FONT_FOLDERS", folders)
    found = pictures._system_fonts.__wrapped__()
    assert [str(path.relative_to(tmp_path)) for path in found] == ["b/Arial.ttf", "b/deep/x.otf", "a/y.ttc"]


def test_damaged_fonts_are_passed_over(tmp_path, monkeypatch):
    for name, content in {"a.ttf": b"", "b.otf": b"no font", "c.ttc": b"ttcf" + b"\xff" * 60}.items():
        (tmp_path / name).write_bytes(content)
    plain = pictures._system_fonts()
    monkeypatch.setattr(pictures, "_system_fonts", lambda: (*sorted(tmp_path.iterdir()), *plain))
    pictures._font_for.cache_clear()
    assert caption_font("\u00fc")
    pictures._font_for.cache_clear()
