"""Pictures: from a file of any raster format to an array, and from arrays to a grid with captions, in a file.

    python pictures.py                    # writes a captioned grid, and reads it back

Conventions: pictures are uint8 (N, H, W, C) as arrays and float32 (B, C, H, W) in [-1, 1] for a model; sizes
are (H, W).
"""

from __future__ import annotations

import functools
import io
import math
import os
import sys
import textwrap
import unicodedata
import warnings
from pathlib import Path
from typing import IO

import numpy as np
import torch
from PIL import Image, ImageChops, ImageDraw, ImageFont, ImageOps, UnidentifiedImageError
from torch import Tensor

from files import shortened, warn_once, write_atomically

Size = tuple[int, int]      # height and width


# ---- arrays and tensors

def to_tensor(images: np.ndarray) -> Tensor:
    """uint8 (B, H, W, C) -> float32 (B, C, H, W) in [-1, 1]."""
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)


def to_uint8(images: Tensor) -> np.ndarray:
    """(B, C, H, W) nominally in [-1, 1] -> uint8 (B, H, W, C)."""
    return images.float().add(1.0).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


# ---- reading a file

PIXELS = 40_000_000         # of one picture of a collection: check_pixels

# Raster formats that Pillow decodes itself; a file's content decides, not its ending. Never EPS, PS or PDF:
# for them Pillow starts another program, which would run what the file contains. TGA has no mark: it is last.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "PPM", "JPEG2000", "AVIF", "ICO", "ICNS",
           "PCX", "SGI", "SUN", "QOI", "DDS", "PSD", "TGA")


def open_image(path: Path, size: Size, behind: str = "white") -> np.ndarray:
    """read_image, scaled to cover `size` and cropped in the centre: uint8 (H, W, 3)."""
    return cover(read_image(path, behind), size)


def cover(image: Image.Image, size: Size, place: float = 0.5) -> np.ndarray:
    """uint8 (H, W, 3): the picture scaled to cover `size` and cropped; `place` from 0 to 1 says where on the
    side that is too long."""
    return np.asarray(ImageOps.fit(image, size[::-1], Image.Resampling.LANCZOS, centering=(place, place)))


def contain(image: Image.Image, size: Size) -> np.ndarray:
    """uint8 (H, W, 3): an RGB picture, cropped to what differs from white, as a whole in the middle of a
    white one of this size, as large as fits."""
    large = min(image.width // size[1], image.height // size[0]) // 3
    if large > 1:                                   # averages come cheaper than the filter that follows
        image = image.reduce(large)
    ink = ImageChops.difference(image, Image.new("RGB", image.size, "white"))
    box = ink.convert("L").point(lambda level: 255 * (level > 8)).getbbox()
    if box:
        image = image.crop(box)
    return np.asarray(ImageOps.pad(image, size[::-1], Image.Resampling.LANCZOS, color="white"))


def check_pixels(path: Path) -> None:
    """Raise ValueError for a picture of more than PIXELS, which takes gigabytes to decode."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with open_header(path) as image:
            pixels = math.prod(image.size)
    if pixels > PIXELS:
        raise ValueError(f"{pixels / 1e6:,.0f} megapixels, of at most {PIXELS / 1e6:,.0f}")


def read_image(path: Path | IO[bytes], behind: str = "white",
               useless: list[str] | None = None) -> Image.Image:
    """A picture of any of FORMATS, a file or its name, in RGB: rotated according to its EXIF data, in sRGB,
    transparency on the colour `behind`. Raises OSError or ValueError for a file that cannot be decoded.
    useless: takes the names of files whose colour profile cannot be used, with the reason, which are else
    told on stderr."""
    with open_header(path) as image:
        profile = image.info.get("icc_profile", b"")
        image = ImageOps.exif_transpose(image)
        # Pillow's own conversion from 16 or 32 bits would clip at 255.
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image, dtype=np.float64)
            if not np.isfinite(values).all():
                raise ValueError("holds values that are no numbers")
            white = max(values.max(), 1e-9)
            if image.mode.startswith("I") and values.max() <= 65535:
                white = 65535.0
            image = Image.fromarray(np.round(np.clip(values / white, 0, 1) * 255).astype(np.uint8))
        if profile != b"":
            try:
                image = _to_srgb(image, profile)
            except Exception as error:      # Pillow raises half a dozen types for a profile that is no use
                if useless is not None:
                    useless.append(f"{path}: {error}")
                else:
                    print(f"{shortened(str(path), 300)}: its colour profile cannot be used ({error}); its "
                          "colours are taken as sRGB", file=sys.stderr)
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, behind), image)
        return image.convert("RGB")


def open_header(path: Path | IO[bytes]) -> Image.Image:
    """The picture, of which only the header is read yet. Raises as read_image."""
    # opening a pipe would wait for ever
    if isinstance(path, (str, os.PathLike)) and os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{path} is a folder, pipe, socket or device")
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        return Image.open(path, formats=known)
    except UnidentifiedImageError:
        raise ValueError(f"not a picture of a format that is opened ({', '.join(known[:4])}, ...)") from None


def _to_srgb(image: Image.Image, profile: bytes) -> Image.Image:
    """The picture in sRGB, or the very same where its profile means sRGB or cannot be applied to its mode."""
    from PIL import ImageCms
    plain = image
    if image.mode in ("P", "PA", "La", "RGBa") or "transparency" in image.info:
        plain = image.convert("LA" if image.mode == "La" else "RGBA")
    alpha = plain.getchannel("A") if plain.mode in ("RGBA", "LA") else None
    mode = {"RGBA": "RGB", "LA": "L", "1": "L"}.get(plain.mode, plain.mode)
    if mode not in ("RGB", "L", "CMYK"):
        return image
    transform = srgb_transform(profile, mode)
    if transform is None:
        return image
    converted = ImageCms.applyTransform(plain.convert(mode), transform)
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


@functools.lru_cache(maxsize=64)            # a folder's pictures share a few profiles
def srgb_transform(profile: bytes, mode: str):
    """From the profile's colours to sRGB, by Little CMS; None where hardly a colour changes, because pictures
    in sRGB keep their bits. Raises an error for a profile that is damaged or of another mode."""
    from PIL import ImageCms
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    if mode == "CMYK":
        return transform
    levels = np.arange(0, 256, 15, dtype=np.uint8)
    probe = levels[None, :]                                                     # greys
    if mode == "RGB":
        probe = np.stack(np.meshgrid(levels, levels, levels), -1).reshape(1, -1, 3)
    probe = Image.fromarray(probe)
    found = np.asarray(ImageCms.applyTransform(probe, transform)).astype(int)
    return transform if np.abs(found - np.asarray(probe.convert("RGB"))).max() > 2 else None


# ---- a grid of pictures, with captions

CAPTION_LINES = 12      # below a picture; what is longer ends in "..."
# A Latin, a Chinese and a Unicode-wide font of the usual systems come first; then any other font.
FONT_FOLDERS = ("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts",
                "/System/Library/Fonts", "/Library/Fonts", "C:/Windows/Fonts")
FONT_ENDINGS = (".ttf", ".otf", ".ttc", ".otc")
FONT_NAMES = ("DejaVuSans.ttf", "NotoSans-Regular.ttf", "LiberationSans-Regular.ttf", "Arial.ttf",
              "arial.ttf", "NotoSansCJK-Regular.ttc", "wqy-microhei.ttc", "PingFang.ttc", "msyh.ttc",
              "Arial Unicode.ttf")


def enlargement(width: int) -> int:
    """How many times pictures with captions are enlarged: to at least 112 pixels, where words have room."""
    return -(-112 // width)                         # rounded up


def grid(images: np.ndarray, columns: int | None = None, pad: int = 2,
         captions: list[str] | None = None) -> Image.Image:
    """uint8 (N, H, W, C) -> one picture, row by row, on white. Captions stand below the pictures, which are
    enlarged for them."""
    if captions:
        zoom = enlargement(images.shape[2])
        images = images.repeat(zoom, 1).repeat(zoom, 2)
        if images.shape[3] == 1:
            images = images.repeat(3, 3)
        lines = [wrap_caption(caption, images.shape[2] // 6) for caption in captions]
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
        pen = ImageDraw.Draw(picture)
        for text, (top, left) in zip(lines, corners):
            for i, line in enumerate(text):
                pen.text((left, top + h - strip + 13 * i), line, "black", caption_font(line))
    return picture


def wrap_caption(caption: str, columns: int) -> list[str]:
    """At most CAPTION_LINES lines of about this many Latin letters."""
    if any(unicodedata.east_asian_width(letter) in "WF" for letter in caption[:1000]):
        columns = -(-columns // 2)                  # such letters are twice as wide
    # More of a long caption would never be shown.
    return textwrap.wrap(caption[:columns * (CAPTION_LINES + 1) * 2], columns, max_lines=CAPTION_LINES,
                         placeholder=" ...")


def caption_font(text: str, size: int = 11) -> ImageFont.FreeTypeFont:
    """Pillow's own font, or where it lacks a letter, the font of the system that lacks fewest."""
    return _font_for("".join(sorted({letter for letter in text if letter > "~"})), size)


@functools.lru_cache(maxsize=1024)
def _font_for(letters: str, size: int) -> ImageFont.FreeTypeFont:
    best = ImageFont.load_default(size)
    lacking = letters_without_glyph(best, letters)
    for path in _system_fonts() if lacking else ():
        try:
            with open(path, "rb") as file:          # by its name, Pillow would replace a damaged one
                font = ImageFont.truetype(file, size)
            without = letters_without_glyph(font, letters)
        except Exception:                           # a font of fixed sizes, or damaged
            continue
        if len(without) < len(lacking):
            best, lacking = font, without
        if not lacking:
            break
    if lacking:
        warn_once("fonts", f"no font of this system has these letters of the captions, which are drawn as "
                  f"boxes: {shortened(' '.join(lacking), 40)}; install one that has (Debian: apt install "
                  "fonts-dejavu fonts-noto-core fonts-noto-cjk fonts-noto-color-emoji)")
    return best


def letters_without_glyph(font: ImageFont.FreeTypeFont, letters: str) -> list[str]:
    """The letters that the font draws as a box, like a character that no font has."""
    box = bytes(font.getmask("\U0010fffe"))
    return [letter for letter in letters if bytes(font.getmask(letter)) == box]


@functools.cache
def _system_fonts() -> tuple[Path, ...]:
    found: list[Path] = []
    # These functions pass over a user without a home, and over folders that may not be read.
    for folder in map(os.path.expanduser, FONT_FOLDERS):
        paths = [Path(place, file) for place, _, files in os.walk(folder) for file in files]
        found += sorted(path for path in paths if path.suffix in FONT_ENDINGS and os.path.isfile(path))
    rank = {name: i for i, name in enumerate(FONT_NAMES)}
    return tuple(sorted(found, key=lambda path: rank.get(path.name, len(rank))))


# ---- writing a file

# Endings of a written picture: Pillow's format and its options. And the longest side that a format can hold.
PICTURES = {".png": dict(format="PNG"), ".jpg": dict(format="JPEG", quality=95, subsampling=0),
            ".jpeg": dict(format="JPEG", quality=95, subsampling=0),
            ".webp": dict(format="WEBP", lossless=True)}
LONGEST_SIDE = {".gif": 65535, ".jpg": 65500, ".jpeg": 65500, ".webp": 16383}
MOST_PIXELS = 2 * Image.MAX_IMAGE_PIXELS       # Pillow opens no larger picture


def write_picture(out: Path, picture: Image.Image, sync: bool = True) -> None:
    """out: with one of the endings in PICTURES. sync: see files.replacing."""
    write_atomically(out, lambda file: picture.save(file, **PICTURES[out.suffix.lower()]), sync)


def check_grid(kind: str, n: int, size: Size, columns: int | None, zoom: int, frames: int) -> None:
    """Raise ValueError for a grid that a file with the ending `kind` cannot hold. zoom: how much `grid`
    enlarges the pictures; frames: how many such grids there are."""
    columns = columns or math.ceil(math.sqrt(n))
    width, height = columns * (size[1] * zoom + 2), math.ceil(n / columns) * (size[0] * zoom + 2)
    if max(width, height) > LONGEST_SIDE.get(kind, 2**31 - 1) or width * height * frames > MOST_PIXELS:
        raise ValueError(f"a grid of {width:,} x {height:,} pixels is more than {kind} or the memory holds; "
                         "draw fewer pictures, or write to a folder or an .npz")


def demo() -> None:
    """Write eight captioned gradients as one picture, and read it back."""
    ramp = np.linspace(0, 255, 64).astype(np.uint8)
    images = np.stack([np.stack([np.full((64, 64), 36 * i), *np.meshgrid(ramp, ramp)], -1) for i in range(8)])
    captions = [f"red {36 * i} of 255, naïve and größer" for i in range(8)]
    picture = grid(images.astype(np.uint8), 4, captions=captions)
    write_picture(Path("grid.webp"), picture)
    again = open_image(Path("grid.webp"), picture.size[::-1])
    width, height = picture.size
    differing = (again != picture).any(-1).sum()
    print(f"grid.webp: {width} x {height} pixels, of which {differing} differ when read back")


if __name__ == "__main__":
    demo()
