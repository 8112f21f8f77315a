"""A folder of sounds as people have it, decoded once: the twin of pictures in folder.py and decoded.py.

    python sounds.py                      # lists and decodes a folder of four sounds, one of them broken

Files are listed as pictures are, with classes and captions. Each is kept at one rate in a window of one
length: what is shorter is followed by silence, of what is longer the start is kept and, where there are to be
several crops, other parts. Silent and very long files are skipped as broken ones are.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from decoded import Decoded, open_decoded, write_rows
from files import Head, digest, open_array
from folder import LITTER, PICTURES, Folder, Wanted, crop_places, list_folder
from sound import FULL, duration, package_found, read_sound, write_wav

Size = tuple[int, int]      # of sounds (1, T)

# The formats of file endings. Those without an ending of their own here are taken for no sounds at all.
FORMATS = {".wav": "WAV", ".wave": "WAV", ".flac": "FLAC", ".ogg": "Ogg", ".oga": "Ogg", ".opus": "Ogg",
           ".mp3": "MP3", ".m4a": "AAC", ".aac": "AAC", ".aif": "AIFF", ".aiff": "AIFF", ".wma": "WMA",
           ".au": "AU", ".amr": "AMR"}
BY_PACKAGE = {"FLAC", "Ogg", "MP3"}
LONGEST = 600.0             # seconds: what is longer is a recording to be cut up first
SILENT = 8 / FULL           # a peak of less than that, -72 dB


def _refusal(kind: str) -> str | None:
    if kind in BY_PACKAGE:
        return None if package_found() else f"{kind} is read by the package soundfile; pip install soundfile"
    return None if kind == "WAV" else f"{kind} is not among the formats that are opened"


SOUNDS = Wanted("sound", lambda: FORMATS, _refusal,
                ".wav and, with the package soundfile, .flac, .ogg, .mp3")


def list_sounds(path: Path, words: str | None = None) -> Folder:
    """list_folder for sounds."""
    return list_folder(path, words, SOUNDS)


def wanted_in(path: Path) -> Wanted:
    """SOUNDS for a folder that has sounds at any depth, and no picture; else PICTURES."""
    found = PICTURES
    entered: set[str] = set()
    waiting = [str(path)]
    while waiting:
        folder = waiting.pop()
        real = os.path.realpath(folder)
        if real in entered:
            continue
        entered.add(real)
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.startswith(".") or entry.name.lower() in LITTER:
                        continue
                    ending = os.path.splitext(entry.name)[1].lower()
                    if entry.is_dir():
                        waiting.append(entry.path)
                    elif _listed(PICTURES, ending) and entry.is_file():
                        return PICTURES
                    elif ending in FORMATS:
                        found = SOUNDS
        except OSError:                     # list_folder says so
            continue
    return found


def _listed(wanted: Wanted, ending: str) -> bool:
    kind = wanted.formats().get(ending)
    return kind is not None and wanted.refusal(kind) is None


class Recorded(NamedTuple):
    """Sounds of one length at one rate, each with one or more crops. See decoded.Form."""
    rate: int
    length: int
    crops: int

    @property
    def file(self) -> str:
        return "sounds.npy"

    def fingerprint(self, contents: Iterator[tuple]) -> str:
        return digest("folder", "sound", self.rate, self.length, self.crops, contents)

    def read(self, path: Path, useless: Head) -> list[np.ndarray]:
        """The crops of a file, all of the same length, without the silence that follows. Raises OSError or
        ValueError for a file that is skipped."""
        window = self.length / self.rate
        seconds = duration(path)
        if seconds > max(LONGEST, 4 * window):
            raise ValueError(f"{seconds / 60:,.0f} minutes long, of at most {LONGEST / 60:.0f}: cut it into "
                             "sounds first")
        spare = max(0.0, seconds - window)
        places = [0.0, *crop_places(path.name, self.crops)[1:]]
        crops = [read_sound(path, self.rate, window, place * spare) for place in places]
        # The start of a resampled sound may lie half a sample elsewhere.
        crops = [crop[:min(map(len, crops))] for crop in crops]
        if max(np.abs(crop.astype(int)).max(initial=0) for crop in crops) < SILENT * FULL:
            raise ValueError("silent, at least where it would be kept")
        return crops

    def size_of(self, array: np.ndarray) -> Size:
        return 1, len(array)

    def shape(self, count: int) -> tuple[int, int]:
        return self.crops * count, self.length

    def write(self, path: Path, count: int, arrays: Iterator[np.ndarray]) -> None:
        write_rows(path, np.int16, self.shape(count), arrays)

    def open(self, path: Path, count: int, sizes: np.ndarray) -> np.ndarray | None:
        sounds = open_array(path, np.int16, self.shape(count))
        return None if sounds is None else sounds[:self.crops * len(sizes)]


def open_sounds(folder: Folder, size: Size, rate: int, cache_dir: Path, crops: int = 1) -> Decoded:
    """The sounds of a folder, int16 (N * crops, T), memory-mapped from cache_dir/sounds.npy, which is rebuilt
    where it is damaged or of other sounds. `sizes` of the result has the samples of each, before silence.
    size: (1, T). crops: rows of each, the first from its start. Raises ValueError where none can be decoded,
    and then creates nothing where there was no cache."""
    return open_decoded(folder, Recorded(rate, size[1], crops), cache_dir)


def demo() -> None:
    """Write a folder of four sounds, one of them broken, and decode it twice, at last from a cache."""
    with tempfile.TemporaryDirectory() as temporary:
        path, cache_dir = Path(temporary) / "sounds", Path(temporary) / "cache"
        path.mkdir()
        for i in range(1, 4):
            time = np.arange(round(44_100 * i / 4)) / 44_100
            write_wav(path / f"{i}.wav", 0.5 * np.sin(2 * np.pi * 440 * time), 44_100)
            (path / f"{i}.txt").write_text(f"{i} quarters of a second", "utf-8")
        (path / "4.wav").write_bytes(b"no sound")
        (path / "4.txt").write_text("broken", "utf-8")
        for _ in range(2):
            folder = list_sounds(path, "captions")
            found = open_sounds(folder, (1, 4000), 8000, cache_dir)
            seconds = " and ".join(f"{length / 8000:g}" for length in found.sizes[:, 1])
            print(f"{len(folder.pictures)} sounds: {len(found.keep)} decoded, of {seconds} seconds, "
                  f"fingerprint {found.fingerprint}")
        del found                           # Windows does not delete a file that is still mapped


if __name__ == "__main__":
    demo()
