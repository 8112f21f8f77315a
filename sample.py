"""Draw pictures with a run or a published model: a grid, single files, an .npz for evaluation, or a GIF of
the steps.

    python sample.py runs/shapes-dit-rf --label red-circle --n 64 --steps 10 --cfg 2 --seed 0 --out grid.png
    python sample.py runs/shapes-dit-rf --n 50000 --batch-size 500 --out samples.npz
    python sample.py --published dit-xl-2-256 --weights DiT-XL-2-256x256.pt --vae sd-vae-ft-ema/ --n 1

From noise to a picture: `main` loads a checkpoint, asks its conditioning for the conditions of all pictures,
and hands batches to `draw`, which builds a denoiser, follows a sampler along the path's times and decodes the
latent. Picture i has a random generator of its own, seeded with seed + i, so it does not depend on the batch
size or on how many are drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import conditioning
from cache import replacing, write_atomically
from conditioning import Asked
from data import grid, open_image, to_tensor, to_uint8
from published import load_weights
from run import build_model, build_path, graphed, load_checkpoint, load_published, unpack_vae
from samplers import SAMPLERS, TIMES, guided, inpainting, noise_like
from settings import (OBJECTIVES, Flag, check_compiler, file_path, integer, make_parser, number, one_of,
                      pick_device, published_model)
from vae import VAE

# Flags that are options of one sampler, and that sampler.
SAMPLER_OPTIONS = {"eta": "ddim", "variance": "ddpm", "noise": "reverse_sde"}

FLAGS = {
    # Either a run, or all three parts of a published model: see `check_flags`.
    "what to draw with": [
        Flag("run", "run folder, or a checkpoint file", str, nargs="?"),
        Flag("--published", "instead of a run: a published model, like dit-xl-2-256 or sit-xl-2-256",
             published_model, metavar="NAME"),
        Flag("--weights", "the published model's weights: .pt, .ckpt or .safetensors", str, metavar="FILE"),
        Flag("--vae", "the published model's VAE: a file, or a diffusers folder", str, metavar="PATH"),
        Flag("--raw", "the run's raw weights, not their average"),
    ],
    "what to draw": [
        Flag("--n", "how many pictures (default: 64)", integer(1, 10**8), 64),
        # What a run is conditioned on decides which of these it takes.
        *(Flag(name, type=str, **fields) for name, fields in conditioning.FLAGS.items()),
        Flag("--init-image", "begin with this picture instead of noise", file_path, metavar="FILE"),
        Flag("--strength", "time at which to begin with it: 0 keeps it, 1 is noise alone (default: 0.6; 1 "
                           "where there is a --mask)", number(0, 1)),
        Flag("--mask", "draw only where this picture is white (needs --init-image)", file_path,
             metavar="FILE"),
        Flag("--seed", "picture i is drawn with seed + i (default: 0)", integer(-10**18, 10**18), 0),
        Flag("--out", "NAME.png: one grid; NAME.npz: arr_0, uint8 NHWC; NAME.gif: the steps from noise; "
                      "a folder: single PNGs (default: samples.png)", file_path, "samples.png"),
    ],
    "how": [
        Flag("--cfg", "guidance scale: 1 conditional, 0 unconditional, above 1 guided (default: 2 where the "
                      "run was trained for guidance, else 1)", number(-1e6, 1e6)),
        Flag("--sampler", f"{', '.join(SAMPLERS)} (default: heun for rf, ddim for ddpm)", one_of(SAMPLERS)),
        Flag("--steps", "intervals (default: 10 for rf, 50 for ddpm)", integer(1, 10**5)),
        Flag("--times", "spacing of the steps: even (default), log-snr, karras; ddpm also leading, linspace",
             one_of(TIMES), "even"),
        Flag("--interval", "times between which guidance acts (default: 0 1)", number(0, 1), (0.0, 1.0),
             nargs=2, metavar=("LOW", "HIGH")),
        Flag("--rescale", "how much of the contrast that guidance adds is removed again (default: 0)",
             number(0, 1), 0.0),
        Flag("--eta", "ddim: 0 deterministic (default) to 1 ancestral", number(0, 1)),
        Flag("--variance", "ddpm: variance of each step, small (default), large or learned",
             one_of(("small", "large", "learned"))),
        Flag("--noise", "reverse_sde: how much noise is added (default: 1; 0 is the ODE)", number(0, 100)),
    ],
    "machine": [
        Flag("--batch-size", "pictures at a time (default: 64); affects only speed", integer(1, 10**6), 64),
        Flag("--compile", "torch.compile the network; on CUDA, as graphs"),
        Flag("--device", "auto (default), cpu, cuda, cuda:1, mps", str, "auto"),
        Flag("--precision", "precision of the network: fp32 (default), tf32, bf16; the VAE runs in fp32, or "
                            "in tf32 on CUDA unless this is fp32", one_of(("fp32", "tf32", "bf16")), "fp32"),
    ],
}


# ---- drawing

@torch.no_grad()
def draw(model: Callable, vae: VAE, path, shape: tuple[int, int, int], seeds: range, cond: dict,
         uncond: dict | None = None, *, sampler: str, steps: int, scale: float = 1.0, rescale: float = 0.0,
         interval: tuple[float, float] = (0.0, 1.0), times: str = "even", strength: float = 1.0,
         image: Tensor | None = None, mask: Tensor | None = None, on_step: Callable | None = None,
         **options) -> np.ndarray:
    """One batch of pictures, uint8 (B, H, W, C). shape: that of a latent, (C, h, w). seeds: one per picture.
    cond, uncond: see `guided`. options: passed to the sampler.

    image (1, C, H, W) in [-1, 1]: begin with it at time `strength`, mixed with noise (SDEdit: Meng et al.
    2022, arXiv:2108.01073), and skip the steps before. mask (1, 1, H, W), bool: draw only where it is True;
    every other pixel keeps its value. on_step(i, uint8 pictures) is called after each step with the decoded
    xt."""
    # ---- noise, from generators on the CPU, so that it is the same on every device
    device = next(vae.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = noise_like(torch.empty(len(seeds), *shape), generators).to(device)       # (B, C, h, w)

    # ---- the denoiser, which is all that a sampler sees of the network, and the times to visit
    denoise = guided(model, path, cond, uncond, scale, interval=interval, rescale=rescale,
                     variance=options.get("variance") == "learned")
    t = TIMES[times](path, steps)                          # (steps + 1,), falling to 0

    # ---- from a picture: begin at the time `strength`, where it is mixed with that much noise
    if image is not None:
        with torch.autocast(device.type, enabled=False):   # as in VAE.decode: pixels need more than 8 bits
            x0 = vae.normalize(vae.encode(image.to(device)).mean)
        # Round to the diffusion path's steps of 1/1000, and make the first step at least half as long: a step
        # as short as a rounding error would make multistep solvers divide by almost zero.
        start = round(strength * 1000) / 1000
        if start < t[0]:
            t = torch.cat([t.new_tensor([start]), t[t < start - 5e-4]])      # the steps that are left
            alpha, sigma = path.alpha_sigma(t[0])
            x = alpha * x0 + sigma * x                     # xt of this picture at that time
    if mask is not None:
        # One latent position stands for factor x factor pixels: it is drawn if any of them is.
        repaint = F.max_pool2d(mask.float(), vae.factor).bool().to(device)
        denoise = inpainting(denoise, path, x0, repaint)

    def decode(x0: Tensor) -> np.ndarray:
        pictures = vae.decode(vae.denormalize(x0))         # (B, C, H, W), nominally in [-1, 1]
        if mask is not None:                               # the VAE's reconstruction is close, but not exact
            pictures = torch.where(mask.to(device), pictures, image.to(device))
        return to_uint8(pictures)

    # Samplers report latents; whoever watches wants pictures, of xt and not of the guess x0.
    def show(i: int, xt: Tensor, x0: Tensor) -> None:
        on_step(i, decode(xt))

    # ---- from noise to data
    if len(t) > 1:                                         # at strength 0 no step is left
        x = SAMPLERS[sampler](denoise, path, x, t, generator=generators, on_step=show if on_step else None,
                              **options)
    return decode(x)


def draw_batches(model: Callable, vae: VAE, path, shape: tuple[int, int, int], asked: Asked, seeds: range,
                 batch_size: int, **how) -> Iterator[np.ndarray]:
    """All pictures that were asked for, batch by batch; `how` is passed to `draw`."""
    for start in range(0, len(seeds), batch_size):
        part = seeds[start:start + batch_size]
        cond, uncond = asked.batch(start, len(part))       # uncond: the null condition, once per picture
        yield draw(model, vae, path, shape, part, cond, uncond, **how)


# ---- what the flags mean, and refusals of what cannot work

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("Draw pictures with a run of train.py, or with a published model.", FLAGS)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, whatever the run."""
    # Where the output goes is checked first, so that nothing is drawn that cannot be written.
    out = Path(args.out)
    kind = out.suffix.lower()                              # "" for a folder
    if kind not in (".png", ".npz", ".gif", ""):
        raise ValueError(f"--out {out}: must end in .png, .npz or .gif, or name a folder")
    if kind and not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
    if out.exists() and out.is_dir() == bool(kind):        # a name without an ending means a folder
        found = "folder" if kind else "file"
        raise ValueError(f"--out {out}: there is a {found} of that name; choose another")

    # Either a run, whose checkpoint holds everything, or all three parts of a published model.
    given = [part is not None for part in (args.published, args.weights, args.vae)]
    mixed = args.run is not None and any(given)
    incomplete = args.run is None and not all(given)
    if mixed or incomplete:
        raise ValueError("give a run, or --published NAME with its --weights FILE and --vae PATH")
    if args.raw and args.published:
        raise ValueError(f"--raw with --published {args.published}: a published file has one set of weights")

    low, high = args.interval                              # each in [0, 1], by its type
    if not low < high:
        raise ValueError(f"--interval {low:g} {high:g}: two times between 0 and 1, the lower one first")
    for flag, value in (("--strength", args.strength), ("--mask", args.mask)):
        if value is not None and not args.init_image:
            raise ValueError(f"{flag} {value}: needs --init-image FILE, the picture to begin with")


def choose_sampler(args: argparse.Namespace, objective: dict) -> tuple[str, dict]:
    """The sampler asked for, the one whose option was given, or the objective's default; and its options."""
    sampler = args.sampler
    options = {}
    for name, owner in SAMPLER_OPTIONS.items():
        value = getattr(args, name)
        if value is None:
            continue
        if sampler not in (None, owner):                   # by --sampler, or by the option of another
            raise ValueError(f"--{name} {value}: belongs to --sampler {owner}, not {sampler}")
        sampler = owner                                    # the option implies its sampler
        options[name] = value
    # The straight path has no thousand steps from which these spacings choose.
    if args.times in ("leading", "linspace") and objective["name"] != "ddpm":
        raise ValueError(f"--times {args.times}: a spacing of the ddpm path; this run is on the path of rf")
    if args.variance == "learned" and not objective.get("learned_variance"):
        what = args.run or args.weights
        raise ValueError(f"--variance learned: {what} was not trained to predict a variance")
    return sampler or OBJECTIVES[objective["name"]].sampler, options


def read_picture(flag: str, file: str, size: tuple[int, int]) -> np.ndarray:
    try:
        return open_image(Path(file), size).copy()         # scaled to cover `size`, and cropped
    except Exception as error:                             # Pillow raises a dozen exception types
        raise ValueError(f"{flag} {file}: cannot be read as a picture ({error})") from None


def read_image_and_mask(args: argparse.Namespace, size: tuple[int, int],
                        channels: int) -> tuple[Tensor | None, Tensor | None]:
    """--init-image (1, C, H, W) in [-1, 1] and --mask (1, 1, H, W), bool; None where not given."""
    image, mask = None, None
    if args.init_image:
        image = to_tensor(read_picture("--init-image", args.init_image, size)[None])     # a batch of one
        if channels == 1:                                  # every file is read as RGB
            image = image.mean(1, keepdim=True)
    if args.mask:                                          # greys lighter than the middle count as white
        white = read_picture("--mask", args.mask, size).mean(-1) > 127
        if not white.any():
            raise ValueError(f"--mask {args.mask}: has no white pixel, so there is nothing to draw")
        mask = torch.from_numpy(white)[None, None]
    return image, mask


# ---- writing

@contextlib.contextmanager
def npz_writer(file: IO[bytes], shape: tuple[int, ...]) -> Iterator[Callable[[np.ndarray], object]]:
    """Write an .npz in the layout of the ADM evaluation suite, with one uint8 array `arr_0` of this shape,
    batch by batch, so that 50,000 pictures need not fit into memory."""
    # force_zip64: the size is not known in advance, and may exceed 4 GiB
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive, archive.open(
            "arr_0.npy", "w", force_zip64=True) as out:
        # the header of a .npy file, then the pictures as they come
        np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
        yield lambda images: out.write(np.ascontiguousarray(images).tobytes())


def write_gif(out: Path, batches: Callable[..., Iterator[np.ndarray]], asked: Asked) -> None:
    """One frame per step: the grid of all pictures after that step. The last frame is shown longest."""
    frames: dict[int, list[np.ndarray]] = {}               # step -> its pictures, batch by batch

    def keep(i: int, images: np.ndarray) -> None:
        frames.setdefault(i, []).append(images)

    last = list(batches(on_step=keep))
    pictures = [grid(np.concatenate(frame), asked.columns, captions=asked.captions)
                for frame in frames.values() or [last]]    # at --strength 0, which takes no step
    write_atomically(out, lambda file: pictures[0].save(
        file, "GIF", save_all=True, append_images=pictures[1:], loop=0,
        duration=[120] * (len(pictures) - 1) + [1500]))    # milliseconds


def write_folder(out: Path, batches: Iterator[np.ndarray], asked: Asked, first_seed: int) -> None:
    """Write each picture to SEED-NAME.png, or to SEED.png where its condition has no name."""
    out.mkdir(parents=True, exist_ok=True)
    # Prompts become file names: letters, digits and dashes only, and of bounded length.
    endings = [re.sub(r"[^\w-]+", "-", f"-{name}")[:80] for name in asked.names] or [""]
    i = 0
    for images in batches:                                 # each is written as soon as it is drawn
        for image in images:
            if image.shape[-1] == 1:                       # Pillow expects a grey picture as (H, W)
                image = image.squeeze(-1)
            name = f"{first_seed + i:06d}{endings[asked.turn[i]]}.png"
            Image.fromarray(image).save(out / name)
            i += 1


# ---- the program

def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    check_flags(args)
    device = pick_device(args.device)
    if args.compile:
        check_compiler(device)

    # ---- the checkpoint, and what the flags mean for it; nothing is built until they are checked
    if args.published:
        what = args.weights
        checkpoint = load_published(args.published, args.weights, args.vae)
    else:
        what = args.run
        checkpoint = load_checkpoint(args.run)
    if checkpoint["arch"] == "vae":
        raise ValueError(f"{args.run}: this run is a VAE, which reconstructs but does not draw; give a dit, "
                         "mmdit or unet run")
    condition = conditioning.of_checkpoint(checkpoint, device)
    conditioning.check_flags(condition, args)
    scale = conditioning.guidance_scale(condition, args)
    sampler, options = choose_sampler(args, checkpoint["objective"])
    steps = args.steps or OBJECTIVES[checkpoint["objective"]["name"]].steps
    path = build_path(checkpoint["objective"])
    TIMES[args.times](path, steps)                         # refuses more steps than the path has

    # ---- the network, the VAE and their inputs
    model = build_model(checkpoint["arch"], checkpoint["config"], checkpoint["text"])
    load_weights(model, checkpoint["model" if args.raw else "ema"], what).to(device).eval()
    vae = unpack_vae(checkpoint["vae"]).to(device)         # the one that the network was trained on
    height, width = checkpoint["data"]["size"]
    shape = (vae.config.latent_channels, height // vae.factor, width // vae.factor)
    image, mask = read_image_and_mask(args, (height, width), vae.config.image_channels)
    strength = args.strength
    if strength is None:
        strength = 1.0 if args.mask else 0.6               # within a mask, start from noise alone
    with torch.no_grad():
        asked = condition.ask(args, model)
    if device.type == "cuda":                              # faster, at the precision asked for
        torch.backends.cuda.matmul.allow_tf32 = args.precision != "fp32"
        torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
        model = model.to(memory_format=torch.channels_last)
        vae = vae.to(memory_format=torch.channels_last)
    network = graphed(model) if args.compile else model

    # A generator, so that each batch can be written before the next is drawn.
    def batches(on_step: Callable | None = None) -> Iterator[np.ndarray]:
        seeds = range(args.seed, args.seed + args.n)
        with (tqdm(total=args.n, unit="img", desc=f"{sampler} x {steps}, guidance {scale:g}") as bar,
              torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")):
            for images in draw_batches(
                    network, vae, path, shape, asked, seeds, args.batch_size, sampler=sampler, steps=steps,
                    scale=scale, rescale=args.rescale, interval=tuple(args.interval), times=args.times,
                    strength=strength, image=image, mask=mask, on_step=on_step, **options):
                yield images
                bar.update(len(images))

    # ---- draw and write; the file at --out is always the complete old one or the complete new one
    out = Path(args.out)
    kind = out.suffix.lower()
    if kind == ".npz":                                     # written while it is drawn
        all_pictures = (args.n, height, width, vae.config.image_channels)
        with replacing(out) as file, npz_writer(file, all_pictures) as write:
            for images in batches():
                write(images)
    elif kind == ".gif":
        write_gif(out, batches, asked)
    elif kind == ".png":                                   # one grid
        picture = grid(np.concatenate(list(batches())), asked.columns, captions=asked.captions)
        write_atomically(out, lambda file: picture.save(file, "PNG"))
    else:
        write_folder(out, batches(), asked, args.seed)
    print(out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("sample.py: interrupted", file=sys.stderr)
        sys.exit(130)
