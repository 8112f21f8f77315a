"""What a sampling begins with instead of noise, and where it draws: sample.py's --init-image, --init-sound
and --mask, from files to tensors.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from media import Medium, Sounds
from pictures import open_image, to_tensor
from sound import read_sound
from vae import VAE


def check_beginning(args: argparse.Namespace, medium: Medium) -> None:
    """Refuse several pictures or sounds to begin with, which only the run of a VAE takes."""
    for flag, begin in (("--init-image", args.init_image), ("--init-sound", args.init_sound)):
        if begin and len(begin) > 1:
            raise ValueError(f"{flag} {' '.join(begin)}: a network begins with one of the {medium.name}; "
                             "give only one")


def read_beginning(args: argparse.Namespace, size: tuple[int, int], vae: VAE,
                   medium: Medium) -> tuple[Tensor | None, Tensor | None]:
    """--init-image or --init-sound, and --mask; None where not given."""
    if medium.rate is None:
        return read_image_and_mask(args, size, vae.config.image_channels)
    return read_sound_and_mask(args, size[1], medium)


def read_image_and_mask(args: argparse.Namespace, size: tuple[int, int],
                        channels: int) -> tuple[Tensor | None, Tensor | None]:
    """--init-image (1, C, H, W) in [-1, 1] and --mask (1, 1, H, W), bool; None where not given."""
    image, mask = None, None
    # Both are scaled and cropped alike, so what lies on each other in the files does so here.
    if args.init_image:
        image = read_image(args.init_image[0], size, channels)
    if args.mask:
        # Greys lighter than the middle count as white; what is transparent is kept, whatever its colour.
        grey = read_picture("--mask", args.mask, size, behind="black").mean(-1)
        if not (grey > 127).any():
            raise ValueError(f"--mask {args.mask}: is nowhere lighter than middle grey (its brightest pixel "
                             f"is {grey.max():.0f} of 255), so there is nothing to draw")
        mask = torch.from_numpy(grey > 127)[None, None]
    return image, mask


def read_image(file: str, size: tuple[int, int], channels: int) -> Tensor:
    """One --init-image, (1, C, H, W) in [-1, 1]."""
    image = to_tensor(read_picture("--init-image", file, size)[None])
    return image.mean(1, keepdim=True) if channels == 1 else image       # every file is read as RGB


def read_picture(flag: str, file: str, size: tuple[int, int], behind: str = "white") -> np.ndarray:
    """uint8 (H, W, 3)."""
    try:
        return open_image(Path(file), size, behind).copy()
    except Exception as error:                             # Pillow raises a dozen exception types
        raise ValueError(f"{flag} {file}: cannot be read as a picture ({error})") from None


def read_sound_and_mask(args: argparse.Namespace, length: int,
                        medium: Sounds) -> tuple[Tensor | None, Tensor | None]:
    """--init-sound (1, c, T) in [-1, 1), followed by silence up to T, and --mask (1, 1, T), bool; None where
    not given."""
    if not args.init_sound:
        return None, None
    rate = medium.rate
    found = read_init_sound(args.init_sound[0], length, medium)
    if args.mask is None:
        return found, None
    start, end = mask_times(args.mask)
    if not start < end:
        raise ValueError(f"--mask {args.mask}: of sounds, two times in seconds, the earlier one first, like "
                         "0.2-0.5")
    if end > length / rate:
        raise ValueError(f"--mask {args.mask}: ends after the sound, of {length / rate:g} seconds; for a "
                         "longer one, give --seconds")
    mask = torch.zeros(1, 1, length, dtype=torch.bool)
    mask[..., round(start * rate):round(end * rate)] = True
    return found, mask


def mask_times(mask: str) -> tuple[float, float]:
    """FROM and TO of a sound's --mask, in seconds; 0 and 0 where it is not of that form."""
    times = re.fullmatch(r"(\d*\.?\d+)-(\d*\.?\d+)", mask)
    return (float(times[1]), float(times[2])) if times else (0.0, 0.0)


def seconds_begun(args: argparse.Namespace, length: int, medium: Sounds) -> float:
    """How long a sound is that begins with --init-sound: as long as that one and, where --mask ends later, up
    to there; at most `length` samples."""
    seconds = len(read_samples("--init-sound", args.init_sound[0], length, medium.rate)) / medium.rate
    if args.mask is not None:
        seconds = max(seconds, mask_times(args.mask)[1])
    return min(seconds, length / medium.rate)


def read_samples(flag: str, file: str, length: int, rate: int) -> np.ndarray:
    """int16 (n,): the first `length` samples of a sound, or all if it has fewer."""
    try:
        return read_sound(Path(file), rate, length / rate)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{flag} {file}: cannot be read as a sound ({reason})") from None


def read_init_sound(file: str, length: int, medium: Sounds) -> Tensor:
    """One --init-sound, (1, c, T) in [-1, 1): mono, in every channel."""
    samples = read_samples("--init-sound", file, length, medium.rate)
    x = medium.to_tensor(np.pad(samples, (0, length - len(samples)))[None])
    return x.expand(-1, medium.channels, -1)
