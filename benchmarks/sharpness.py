"""How clean are the pictures of an autoencoder: its reconstructions, and what it makes of imperfect latents?

    python benchmarks/sharpness.py runs/emoji-64x64-vae --out sharpness.png     (from the repository's root)

A sampled latent is never exactly one that the encoder makes, so latents are decoded as they are and with
noise, whose standard deviation is a share of the latent's (--noise). Three figures, over validation pictures:

- PSNR in dB.
- High frequencies: the energy in waves shorter than four pixels, as a share of that in the pictures
  themselves. Below 100 % is blur; above, detail that is not there.
- Blotches: root mean square error, in grey levels, where the picture is flat within two pixels.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import settings
from benchmarks.samples import check_out
from checkpoints import load_vae
from cli import Parser, integer, number, program
from data import load_data
from media import medium_of
from pictures import PICTURES, grid, to_tensor, to_uint8
from run import Run

CUT = 0.25      # cycles a pixel; the finest wave that pixels can show has 0.5


def high_frequencies(images: np.ndarray) -> float:
    """Mean energy per pixel and channel of uint8 pictures (N, H, W, C), in squared grey levels, in the waves
    of at least CUT cycles a pixel along either axis. By the theorem of Parseval it is the mean square of the
    pictures without their other waves."""
    height, width = images.shape[1:3]
    # A picture's opposite borders are neighbours to the transform. Mirrored, no step arises between them.
    mirrored = np.concatenate([images, images[:, ::-1]], axis=1)
    mirrored = np.concatenate([mirrored, mirrored[:, :, ::-1]], axis=2)
    waves = np.fft.fft2(mirrored.astype(np.float64), axes=(1, 2)) / (4 * height * width)
    fine = np.maximum(np.abs(np.fft.fftfreq(2 * height))[:, None], np.abs(np.fft.fftfreq(2 * width))) >= CUT
    return float((np.abs(waves[:, fine]) ** 2).sum(axis=1).mean())


def flat(images: np.ndarray, radius: int = 2, levels: int = 4) -> np.ndarray:
    """(N, H, W) bool: pixels whose neighbourhood of uint8 pictures (N, H, W, C) spans at most so many grey
    levels in each channel."""
    side = 2 * radius + 1
    padded = np.pad(images, ((0, 0), (radius, radius), (radius, radius), (0, 0)), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))
    span = windows.max(axis=(-1, -2)).astype(int) - windows.min(axis=(-1, -2))
    return (span <= levels).all(axis=-1)


def blotches(images: np.ndarray, originals: np.ndarray) -> float:
    """Root mean square error in grey levels where the originals are flat; NaN where they are nowhere."""
    error = (images.astype(np.float64) - originals)[flat(originals)]
    return float(np.sqrt(np.mean(error**2))) if len(error) else float("nan")


def psnr(images: np.ndarray, originals: np.ndarray) -> float:
    """Mean over pictures, in dB."""
    mse = np.square(images.astype(np.float64) - originals).mean(axis=(1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / np.maximum(mse, 1e-4))))


@torch.no_grad()
def decoded(vae: torch.nn.Module, images: np.ndarray, noise: float) -> np.ndarray:
    """The pictures, uint8 (N, H, W, C), through the encoder and, with so much noise, the decoder."""
    generator = torch.Generator().manual_seed(0)
    parts = []
    for x in to_tensor(images).split(32):
        x0 = vae.normalize(vae.encode(x).mean)
        eps = torch.randn(x0.shape, generator=generator)
        parts.append(to_uint8(vae.decode(vae.denormalize(x0 + noise * eps))))
    return np.concatenate(parts)


def main() -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="folders of VAE runs on the same pictures")
    p.add_argument("--noise", type=number(0, 100), nargs="+", default=[0.0, 0.1, 0.2, 0.4],
                   help="shares of noise")
    p.add_argument("--n", type=integer(1), default=256, help="pictures at most (default: 256)")
    p.add_argument("--data-dir", type=Path, default=Path("data"))
    p.add_argument("--out", help="PNG file: pictures, and for each run what is made of them by each noise")
    args = p.parse_args()
    check_out("--out", args.out, PICTURES)
    rows, originals = [], None
    for run in args.runs:
        vae = load_vae(run).eval()
        if medium_of(vae.config).rate is not None:
            raise ValueError(f"{run}: an autoencoder of sounds; give one of pictures")
        found = argparse.Namespace(**settings.complete(Run(Path(run)).read_settings() or {}, run))
        if originals is None:
            cache_dir = Path(found.cache_dir or run)
            originals = load_data(found.data, "val", tuple(found.image_size), args.data_dir, cache_dir,
                                  crop=found.crop).images[:args.n]
            rows.append(originals[:16])
            print(f"{len(originals)} pictures: high frequencies {high_frequencies(originals):.1f} squared "
                  "grey levels")
        for noise in args.noise:
            images = decoded(vae, originals, noise)
            rows.append(images[:16])
            print(f"{run}, noise {noise:g}: PSNR {psnr(images, originals):.2f} dB, high frequencies "
                  f"{high_frequencies(images) / high_frequencies(originals):.1%}, blotches "
                  f"{blotches(images, originals):.2f} levels", flush=True)
    if args.out:
        grid(np.concatenate(rows), columns=len(rows[0])).save(args.out)


if __name__ == "__main__":
    sys.exit(program("sharpness.py", main))
