"""The two media: pictures and sounds, between an array and a model.

    python media.py                       # a batch of each, there and back

The networks see latents (B, C, h, w) of either. What is around the autoencoder differs: pictures are uint8
(N, H, W, C) and tensors (B, C, H, W); sounds are int16 (N, T), in stereo (N, T, 2), and tensors (B, c, T).
Both are in [-1, 1]. A size is (H, W) or (1, T). The autoencoder says which medium it is for: that of sounds
has a `rate` in its configuration.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

import pictures
import sound
from samplers import soft_border

COLUMNS = 8        # of spectrograms, at most


class Pictures:
    name = "pictures"
    unit = "img"
    ending = ".png"        # of single files
    dtype = np.uint8
    rate = None
    quality = "psnr"       # of a reconstruction, in the autoencoder's logs

    def to_tensor(self, arrays: np.ndarray) -> Tensor:
        return pictures.to_tensor(arrays)

    def to_array(self, x: Tensor) -> np.ndarray:
        return pictures.to_uint8(x)

    def shape(self, vae, size: tuple[int, int]) -> tuple[int, ...]:
        """Of one array."""
        return (*size, vae.config.image_channels)

    def cell(self, shape: tuple[int, ...], captions: bool) -> tuple[int, int]:
        """Height and width of one in the picture that `show` makes; with captions, without their text."""
        zoom = pictures.enlargement(shape[1]) if captions else 1
        return shape[0] * zoom, shape[1] * zoom

    def show(self, arrays: np.ndarray, columns: int | None = None, captions: list[str] | None = None,
             seconds: np.ndarray | None = None) -> Image.Image:
        """Many of them as one picture, row by row."""
        return pictures.grid(arrays, columns, captions=captions)

    def write(self, file: Path, array: np.ndarray) -> None:
        """One of them, without waiting until it is on the disk, as there may be thousands."""
        if array.shape[-1] == 1:                           # Pillow expects a grey picture as (H, W)
            array = array.squeeze(-1)
        pictures.write_picture(file, Image.fromarray(array), sync=False)

    def of_latent(self, mask: Tensor, factor: int) -> Tensor:
        """mask (1, 1, H, W), bool -> (1, 1, h, w): where any pixel of a latent position is in it."""
        return F.max_pool2d(mask.float(), factor).bool()

    def border(self, mask: Tensor, factor: int) -> Tensor:
        """See samplers.soft_border."""
        return soft_border(mask, factor // 2)


class Sounds:
    name = "sounds"
    unit = "snd"
    ending = ".wav"
    dtype = np.int16
    quality = "snr"

    def __init__(self, rate: int, channels: int = 1):
        self.rate = rate
        self.channels = channels

    def to_tensor(self, arrays: np.ndarray) -> Tensor:
        return sound.to_tensor(arrays)

    def to_array(self, x: Tensor) -> np.ndarray:
        return sound.to_int16(x)

    def shape(self, vae, size: tuple[int, int]) -> tuple[int, ...]:
        return (size[1],) if self.channels == 1 else (size[1], self.channels)

    def cell(self, shape: tuple[int, ...], captions: bool) -> tuple[int, int]:
        width, height = sound.CELL
        return height + 40, width + 12                     # with its axes

    def show(self, arrays: np.ndarray, columns: int | None = None, captions: list[str] | None = None,
             seconds: np.ndarray | None = None) -> Image.Image:
        # A spectrogram is wide, so there is not a column for each of many classes.
        columns = min(columns or math.ceil(math.sqrt(len(arrays))), COLUMNS)
        with torch.autocast("cpu", enabled=False):         # a preview is drawn within the training's
            return sound.spectrograms(arrays, self.rate, columns, captions=captions, seconds=seconds)

    def write(self, file: Path, array: np.ndarray) -> None:
        sound.write_wav(file, array, self.rate, sync=False)

    def of_latent(self, mask: Tensor, factor: int) -> Tensor:
        """mask (1, 1, T) -> (1, 1, 1, n)."""
        return F.max_pool1d(mask.float(), factor).bool()[:, :, None]

    def border(self, mask: Tensor, factor: int) -> Tensor:
        # As a picture one row high, whose neighbours above and below are the same.
        return soft_border(mask[:, :, None], factor // 2)[:, :, 0]


Medium = Pictures | Sounds


def medium_at(rate: int | None) -> Medium:
    """Sounds of this many samples a second; None: pictures."""
    return Pictures() if rate is None else Sounds(rate)


def medium_of(config) -> Medium:
    """The medium of an autoencoder with this configuration."""
    rate = getattr(config, "rate", None)
    return Pictures() if rate is None else Sounds(rate, config.channels)


def demo() -> None:
    """A batch of each medium as a tensor and back."""
    rng = np.random.default_rng(0)
    for medium, arrays in ((Pictures(), rng.integers(0, 256, (2, 8, 8, 3)).astype(np.uint8)),
                           (Sounds(8000), rng.integers(-2**15, 2**15, (2, 512)).astype(np.int16))):
        x = medium.to_tensor(arrays)
        same = bool((medium.to_array(x) == arrays).all())
        print(f"{medium.name}: {arrays.dtype} {arrays.shape} -> {tuple(x.shape)} and back, the same: {same}")


if __name__ == "__main__":
    demo()
