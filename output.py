"""Writing what sample.py has drawn: a grid, a GIF of the steps, an .npz, a folder; of sounds, a .wav.

    python output.py                      # writes three sounds as one .wav and as a folder

Whatever stops a drawing, the file at --out is the complete old one or the complete new one. An .npz and a
folder go on where they were interrupted (files.Unfinished). Where an output cannot be written, because of its
name, its format, the memory or the disk, that is refused before anything is drawn.
"""

from __future__ import annotations

import argparse
import math
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from conditioning import Asked
from files import Unfinished, check_space, unfinished_file, write_atomically, write_npz
from media import Medium, Sounds
from pictures import PICTURES, check_grid, write_picture
from sound import write_wav

PAUSE = 0.2                # seconds between the sounds of one .wav
LARGEST_WAV = 2**31        # bytes


# ---- refusals

def check_folders(out: Path, is_file: bool) -> None:
    """Refuse an output for which its folder is missing, or can never be made. is_file: whether the folder
    must be there; else the output is itself a folder, which is made with those above it."""
    try:
        above = [*reversed(out.parents)] if is_file else [*reversed(out.parents), out]
        for folder in above:
            if folder.is_symlink() and not folder.exists():
                raise ValueError(f"--out {out}: {folder} is a link to a folder that does not exist; make "
                                 "that, or choose another place")
            if folder.exists() and not folder.is_dir() and folder != out:
                raise ValueError(f"--out {out}: {folder} is a file, not a folder; choose another place")
        if is_file and not out.parent.is_dir():
            raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
        out.exists()                                       # which needs the right to enter its folder
    except PermissionError as error:
        raise ValueError(f"--out {out}: {error.filename} cannot be reached (permission denied); choose "
                         "another place") from None
    except OSError:                                        # too long a name, as check_writable says
        return


def check_size(args: argparse.Namespace, shape: tuple[int, ...], medium: Medium, frames: int,
               columns: int | None = None, captions: bool = False) -> None:
    """Refuse an output that its format, the memory or the disk cannot hold, before anything is drawn. shape:
    of one array. frames: how many grids a GIF has. columns, captions: of the grid, where they are known."""
    out = Path(args.out)
    kind = out.suffix.lower()
    size = medium.cell(shape, captions)
    try:
        if kind in (".npz", ".wav"):
            bytes_of_one = math.prod(shape) * np.dtype(medium.dtype).itemsize
            check_space(out, 2 * args.n * bytes_of_one, unfinished_file(out))
            if kind == ".wav" and args.n * bytes_of_one > LARGEST_WAV:
                raise ValueError("more than a .wav holds; draw fewer sounds, or write to a folder")
        elif kind == "":
            check_space(out, 4096 * args.n)                # a file takes at least a block of the disk
        else:
            check_grid(kind, args.n, size, columns, 1, frames if kind == ".gif" else 1)
    except ValueError as error:
        if kind == ".gif":
            raise ValueError(f"--n {args.n} --steps {frames} --out {out}: {frames:,} frames, each {error}, "
                             "or give fewer --steps") from None
        raise ValueError(f"--n {args.n} --out {out}: {error}") from None


# ---- writing

def write_gif(out: Path, batches: Callable[..., Iterator[np.ndarray]], asked: Asked, medium: Medium) -> None:
    """One frame per step: the grid of all pictures after that step. The last frame is shown longest."""
    frames: dict[int, list[np.ndarray]] = {}               # step -> its pictures, batch by batch

    def keep(i: int, images: np.ndarray) -> None:
        frames.setdefault(i, []).append(images)

    last = list(batches(on_step=keep))
    pictures = [medium.show(np.concatenate(frame), asked.columns, asked.captions, asked.seconds)
                for frame in frames.values() or [last]]    # at --strength 0, which takes no step
    write_atomically(out, lambda file: pictures[0].save(
        file, "GIF", save_all=True, append_images=pictures[1:], loop=0,
        duration=[120] * (len(pictures) - 1) + [1500]))    # milliseconds


def trimmed(sounds: np.ndarray, asked: Asked, rate: int | None, first: int = 0) -> list[np.ndarray]:
    """Sounds int16 (n, T), the first of which is number `first`, without the silence that follows them;
    pictures, which have no lengths, as they are."""
    if asked.seconds is None:
        return list(sounds)
    ends = (asked.seconds[first:first + len(sounds)] * rate + 1e-3).astype(int)
    return [sound[:end] for sound, end in zip(sounds, ends)]


def write_one_wav(out: Path, batches: Callable[..., Iterator[np.ndarray]], asked: Asked, rate: int) -> None:
    """All sounds, one after another."""
    parts = []
    for sound in trimmed(np.concatenate(list(batches())), asked, rate):
        parts += [sound, np.zeros((round(PAUSE * rate), *sound.shape[1:]), np.int16)]
    write_wav(out, np.concatenate(parts[:-1]), rate)


def write_folder(out: Path, batches: Callable[..., Iterator[np.ndarray]], asked: Asked, first_seed: int,
                 batch_size: int, settings: dict, medium: Medium) -> None:
    """Write each picture to SEED-NAME.png, or to SEED.png where its condition has no name; sounds to .wav."""
    out.mkdir(parents=True, exist_ok=True)
    # Prompts become file names: letters, digits and dashes only, and of bounded length.
    endings = [re.sub(r"[^\w-]+", "-", f"-{name}")[:80] for name in asked.names] or [""]
    unfinished = Unfinished(out / "unfinished.json", settings)
    # Programs would take a name that begins with a dash for a flag. A folder begun before that was thought of
    # goes on as it began.
    formerly = out / f"{first_seed:06d}{endings[asked.turn[0]]}{medium.ending}"
    begun_with_dash = unfinished.done > 0 and formerly.is_file()

    def file(i: int) -> Path:
        seed = first_seed + i
        number = f"minus-{-seed:06d}" if seed < 0 and not begun_with_dash else f"{seed:06d}"
        return out / f"{number}{endings[asked.turn[i]]}{medium.ending}"

    there = 0
    while there < unfinished.done and file(there).is_file():
        there += 1
    if there < unfinished.done:                            # one has been removed since: go back to its batch
        unfinished.done = there // batch_size * batch_size
    for images in batches(unfinished.done):                # each is written as soon as it is drawn
        for i, image in enumerate(trimmed(images, asked, medium.rate, unfinished.done), unfinished.done):
            medium.write(file(i), image)
        unfinished.advance(unfinished.done + len(images))
    unfinished.finish()


def write(args: argparse.Namespace, batches: Callable[..., Iterator[np.ndarray]], asked: Asked,
          medium: Medium, shape: tuple[int, ...], settings: Callable[[], dict], written: list[int]) -> None:
    """Draw and write; the file at --out is always the complete old one or the complete new one. shape: of a
    picture, (H, W, C), or sound, (T,). written: ends with how many are written, for the line after an
    interruption."""
    out = Path(args.out)
    kind = out.suffix.lower()
    try:
        if kind == ".npz":
            write_npz(out, batches, (args.n, *shape), settings(), medium.dtype)
        elif kind == ".gif":
            write_gif(out, batches, asked, medium)
        elif kind == ".wav":
            write_one_wav(out, batches, asked, medium.rate)
        elif kind in PICTURES and args.published and args.n == 1 and medium.rate is None:
            # No grid around one large picture.
            write_picture(out, Image.fromarray(np.concatenate(list(batches()))[0]))
        elif kind in PICTURES:                             # one grid
            drawn = np.concatenate(list(batches()))
            write_picture(out, medium.show(drawn, asked.columns, asked.captions, asked.seconds))
        else:
            write_folder(out, batches, asked, args.seed, args.batch_size, settings(), medium)
    except KeyboardInterrupt:
        # Said here and not in `program`, whose line holds for every program and says less.
        how_far = ": nothing was written"
        if kind in (".npz", ""):
            if not written:                                # before it was known how many are there
                raise
            how_far = f" after {written[-1]:,} of {args.n:,} {medium.name}; the same command continues"
        print(f"sample.py: interrupted{how_far}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def demo() -> None:
    """Write three tones, of which each is shorter than the one before."""
    time = np.arange(4000) / 8000
    waves = [20_000 * np.sin(2 * np.pi * hertz * time) for hertz in (300, 400, 500)]
    sounds = np.stack(waves).astype(np.int16)
    asked = Asked(torch.arange(3), {}, ["low", "middle", "high"], seconds=np.array([0.5, 0.4, 0.3]))
    with tempfile.TemporaryDirectory() as folder:
        write_one_wav(Path(folder) / "all.wav", lambda: [sounds], asked, 8000)
        size = (Path(folder) / "all.wav").stat().st_size
        write_folder(Path(folder) / "each", lambda first: [sounds], asked, -1, 3, {}, Sounds(8000))
        names = sorted(path.name for path in (Path(folder) / "each").iterdir())
        print(f"all.wav: {size - 44:,} bytes of sound; each: {', '.join(names)}")


if __name__ == "__main__":
    demo()
