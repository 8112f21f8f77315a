"""What the README lets a reader hear and see of sounds: a .wav of some, one after another, and a picture of
the spectrograms of more."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from pictures import write_picture
from sound import spectrograms, write_wav

FOLDER = Path(__file__).parent
LARGEST = 100_000               # bytes of a .wav
PAUSE = 0.12                    # seconds between its sounds
COLUMNS = 4


def joined(sounds: list[np.ndarray], rate: int) -> np.ndarray:
    """int16 (t,) each -> one sound, with a pause between, of as many of them as LARGEST allows."""
    pause = np.zeros(round(PAUSE * rate), np.int16)
    whole = np.zeros(0, np.int16)
    for sound in sounds:
        longer = np.concatenate([whole, pause, sound]) if len(whole) else sound
        if 44 + 2 * len(longer) > LARGEST:
            break
        whole = longer
    return whole


def publish(name: str, heard: list[np.ndarray], shown: np.ndarray, captions: list[str], rate: int,
            folder: Path = FOLDER) -> list[Path]:
    """NAME.wav of the sounds `heard`, int16 (t,) each, and pictures/NAME.png of those shown, int16 (N, T)."""
    wav, picture = folder / f"{name}.wav", folder / "pictures" / f"{name}.png"
    write_wav(wav, joined(heard, rate), rate)
    picture.parent.mkdir(exist_ok=True)
    drawn = spectrograms(shown, rate, COLUMNS, captions)
    write_picture(picture, drawn.quantize(128, dither=Image.Dither.NONE))
    return [wav, picture]
