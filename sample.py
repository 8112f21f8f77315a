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

import cli

cli.quiet_imports(__name__)             # before those that take seconds

import argparse
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import conditioning
from cli import Flag, integer, make_parser, nonempty, number, one_of, program
from conditioning import Asked
from ema import WIDEST
from files import (Unfinished, check_space, check_writable, digest, fingerprint_tensors, unfinished_file,
                   write_atomically, write_npz)
from ranks import ALONE, Ranks, launched
from pictures import PICTURES, check_grid, enlargement, grid, open_image, to_tensor, to_uint8, write_picture
from run import (average_of_width, build_model, build_path, graphed, latent_space, load_checkpoint,
                 load_published, unpack_vae)
from samplers import SAMPLERS, TIMES, guided, inpainting, noise_like, soft_border
from settings import OBJECTIVES, SIZE, check_compiler, check_room, memory, pick_device, published_model
from vae import VAE
from weights import load_weights

# Flags that are options of one sampler, and that sampler.
SAMPLER_OPTIONS = {"eta": "ddim", "variance": "ddpm", "noise": "reverse_sde"}

FLAGS = {
    # Either a run, or all three parts of a published model: see `check_flags`.
    "what to draw with": [
        Flag("run", "run folder, or a checkpoint file", nonempty, nargs="?"),
        Flag("--published", "instead of a run: a published model, like dit-xl-2-256 or sit-xl-2-256",
             published_model, metavar="NAME"),
        Flag("--weights", "the published model's weights: .pt, .ckpt or .safetensors", nonempty,
             metavar="FILE"),
        Flag("--vae", "the published model's VAE: a file, or a diffusers folder", nonempty,
             metavar="PATH"),
        Flag("--raw", "the run's raw weights, not their average"),
        Flag("--ema", "width of the average, relative to the training: made of those that the run has kept "
                      "(default: the --ema of the training)", number(0, WIDEST, above=True), metavar="WIDTH"),
    ],
    "what to draw": [
        Flag("--n", "how many pictures (default: 64)", integer(1, 10**8), 64),
        # What a run is conditioned on decides which of these it takes.
        *(Flag(name, **{"type": str} | fields) for name, fields in conditioning.FLAGS.items()),
        Flag("--size", "height and width of the pictures (default: those of the training; of --aspect, a "
                       "square)", integer(1, SIZE), nargs=2, metavar=("H", "W")),
        Flag("--init-image", "begin with this picture instead of noise; the run of a VAE reconstructs all "
                             "pictures given here", nonempty, nargs="+", metavar="FILE"),
        Flag("--strength", "time at which to begin with it: 0 keeps it, 1 is noise alone. At 0.6 a fifth of "
                           "the pictures may not yet show what was asked for; at 0.9 little of the picture "
                           "is left (default: 0.8; 1 where there is a --mask)", number(0, 1)),
        Flag("--mask", "draw only where this picture is white (needs --init-image)", nonempty,
             metavar="FILE"),
        Flag("--seed", "picture i is drawn with seed + i (default: 0)", integer(-10**18, 10**18), 0),
        Flag("--out", "NAME.png, .jpg or .webp: one grid; NAME.gif: the steps from noise; NAME.npz: arr_0, "
                      "uint8 NHWC; a folder: single PNGs (default: samples.png). After an interruption, the "
                      "same command continues an .npz or a folder", nonempty, "samples.png"),
    ],
    "how": [
        Flag("--cfg", "guidance scale: 1 conditional, 0 unconditional, above 1 guided (default: 2 where the "
                      "run was trained for guidance, else 1; 1 for meanflow, which has learned its guidance)",
             number(-1e6, 1e6)),
        Flag("--guide", "autoguidance: instead of the unconditional branch, guide by this checkpoint, like "
                        "an earlier one of the run (checkpoint-STEP.pt of train.py --keep)", nonempty,
             metavar="CHECKPOINT"),
        Flag("--sampler", f"{', '.join(SAMPLERS)} (default: heun for rf, ddim for ddpm, jump for meanflow)",
             one_of(SAMPLERS)),
        Flag("--steps", "intervals (default: 10 for rf, 50 for ddpm, 1 for meanflow)", integer(1, 10**5)),
        Flag("--times", "spacing of the steps: even (default), log-snr, karras; ddpm also leading, linspace",
             one_of(TIMES), "even"),
        Flag("--shift", "rf: shift of the sampling times (default: that of the training)",
             number(0, 1e9, above=True)),
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
        Flag("--device", "auto (default), cpu, cuda, cuda:1, mps", nonempty, "auto"),
        Flag("--precision", "precision of the network: fp32 (default), tf32, bf16; the VAE runs in fp32, or "
                            "in tf32 on CUDA unless this is fp32", one_of(("fp32", "tf32", "bf16")), "fp32"),
    ],
}


# ---- drawing

class Guide(NamedTuple):
    """The weaker network of autoguidance, and what was asked for as its conditions."""
    network: Callable
    asked: Asked


@torch.no_grad()
def draw(model: Callable, vae: VAE, path, shape: tuple[int, int, int], seeds: range, cond: dict,
         uncond: dict | None = None, *, sampler: str, steps: int, scale: float = 1.0, rescale: float = 0.0,
         interval: tuple[float, float] = (0.0, 1.0), weak: Callable | None = None, times: str = "even",
         strength: float = 1.0, image: Tensor | None = None, mask: Tensor | None = None,
         on_step: Callable | None = None, progress: Callable[[float], None] | None = None,
         **options) -> np.ndarray:
    """One batch of pictures, uint8 (B, H, W, C). shape: that of a latent, (C, h, w). seeds: one per picture.
    cond, uncond, weak: see `guided`. options: passed to the sampler.

    image (1, C, H, W) in [-1, 1]: begin with it at time `strength`, mixed with noise (SDEdit: Meng et al.
    2022, arXiv:2108.01073), and skip the steps before. mask (1, 1, H, W), bool: draw only where it is True;
    every other pixel keeps its value, and the drawn side of the border is blended. on_step(i, uint8 pictures)
    is called after each step with the decoded xt; progress(share) with how much of the batch is done: from 0
    to 1, where decoding counts as one more step."""
    # ---- noise, from generators on the CPU, so that it is the same on every device
    device = next(vae.parameters()).device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = noise_like(torch.empty(len(seeds), *shape), generators).to(device)       # (B, C, h, w)

    # ---- the denoiser, which is all that a sampler sees of the network, and the times to visit
    denoise = guided(model, path, cond, uncond, scale, weak=weak, interval=interval, rescale=rescale,
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
        blend = soft_border(mask, vae.factor // 2).to(device)

    def decode(x0: Tensor) -> np.ndarray:
        pictures = vae.decode(vae.denormalize(x0))         # (B, C, H, W), nominally in [-1, 1]
        if mask is not None:                               # the VAE's reconstruction is close, but not exact
            known = image.to(device)
            pictures = torch.where(mask.to(device), torch.lerp(known, pictures, blend), known)
        return to_uint8(pictures)

    # Samplers report latents; whoever watches wants pictures, of xt and not of the guess x0.
    def report(i: int, xt: Tensor, x0: Tensor) -> None:
        if on_step:
            on_step(i, decode(xt))
        if progress:
            progress((i + 1) / len(t))

    # ---- from noise to data
    if len(t) > 1:                                         # at strength 0 no step is left
        x = SAMPLERS[sampler](denoise, path, x, t, generator=generators, on_step=report, **options)
    return decode(x)


def draw_batches(model: Callable, vae: VAE, path, shape: tuple[int, int, int], asked: Asked, seeds: range,
                 batch_size: int, first: int = 0, progress: Callable[[float], None] = lambda done: None,
                 guide: Guide | None = None, ranks: Ranks = ALONE, **how) -> Iterator[np.ndarray]:
    """The pictures that were asked for, from the first on, batch by batch; `how` is passed to `draw`.
    progress(done) is called after each step with how many are done; of the present batch, a share. ranks: the
    processes that draw one batch each at a time; rank 0 gets the pictures of all, in their order."""
    weak = None if guide is None else guide.network
    for begin in range(first, len(seeds), batch_size * ranks.size):
        end = min(begin + batch_size * ranks.size, len(seeds))         # of the batches drawn side by side
        start = begin + ranks.rank * batch_size
        part = seeds[start:min(start + batch_size, end)]   # may be empty for the last ranks
        images = None
        if len(part) > 0:
            cond, uncond = asked.batch(start, len(part))   # uncond: the null condition, once per picture
            if guide is not None:
                uncond, _ = guide.asked.batch(start, len(part))     # the same conditions as cond
            images = draw(model, vae, path, shape, part, cond, uncond, weak=weak,
                          progress=lambda share: progress(begin + share * (end - begin)), **how)
        for found in ranks.gathered(images):
            if found is not None:
                yield found
        progress(end)


def picture_bar(total: int, first: int = 0, **options) -> tqdm:
    """A bar that counts pictures, whole ones although it also moves within a batch."""
    return tqdm(total=total, initial=first, unit="img", **options,
                bar_format="{l_bar}{bar}| {n:,.0f}/{total:,} [{elapsed}<{remaining}, {rate_fmt}]")


# ---- what the flags mean, and refusals of what cannot work

def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = make_parser("Draw pictures with a run of train.py, or with a published model.", FLAGS)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace, ranks: Ranks = ALONE) -> None:
    """Refuse flags that contradict each other, whatever the run."""
    # Where the output goes is checked first, so that nothing is drawn that cannot be written.
    out = Path(args.out)
    kind = out.suffix.lower()                              # "" for a folder
    if kind not in (*PICTURES, ".npz", ".gif", ""):
        raise ValueError(f"--out {out}: must end in {', '.join(PICTURES)}, .npz or .gif, or name a folder")
    if kind and not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
    check_writable(out)
    if kind == ".gif" and ranks.size > 1:
        raise ValueError(f"--out {out}: a .gif is drawn by one process; start it with python")
    if out.exists() and out.is_dir() == bool(kind):        # a name without an ending means a folder
        found = "folder" if kind else "file"
        raise ValueError(f"--out {out}: there is a {found} of that name; choose another")

    # Either a run, whose checkpoint holds everything, or all three parts of a published model.
    given = [part is not None for part in (args.published, args.weights, args.vae)]
    mixed = args.run is not None and any(given)
    incomplete = args.run is None and not all(given)
    if mixed or incomplete:
        behind = ""
        if args.init_image and len(args.init_image) > 1:
            behind = "; --init-image takes all names behind it, so name a run before it"
        raise ValueError(f"give a run, or --published NAME with its --weights FILE and --vae PATH{behind}")
    for flag, value in (("--raw", args.raw), (f"--ema {args.ema}", args.ema)):
        if value and args.published:
            raise ValueError(f"{flag} with --published {args.published}: a published file has one set of "
                             "weights")
    if args.raw and args.ema:
        raise ValueError(f"--raw with --ema {args.ema}: the weights themselves, or an average; give one")

    sampler_options(args)
    low, high = args.interval                              # each in [0, 1], by its type
    if not low < high:
        raise ValueError(f"--interval {low:g} {high:g}: two times between 0 and 1, the lower one first")
    for flag, value in (("--strength", args.strength), ("--mask", args.mask)):
        if value is not None and not args.init_image:
            raise ValueError(f"{flag} {value}: needs --init-image FILE, the picture to begin with")


def check_size(args: argparse.Namespace, size: tuple[int, int], channels: int, frames: int,
               columns: int | None = None, zoom: int = 1) -> None:
    """Refuse an output that its format, the memory or the disk cannot hold, before anything is drawn. frames:
    how many grids a GIF has. columns, zoom: of the grid, where they are known."""
    out = Path(args.out)
    kind = out.suffix.lower()
    try:
        if kind == ".npz":
            check_space(out, 2 * args.n * math.prod(size) * channels, unfinished_file(out))
        elif kind == "":
            check_space(out, 4096 * args.n)                # a file takes at least a block of the disk
        else:
            check_grid(kind, args.n, size, columns, zoom, frames if kind == ".gif" else 1)
    except ValueError as error:
        if kind == ".gif":
            raise ValueError(f"--n {args.n} --steps {frames} --out {out}: {frames:,} frames, each {error}, "
                             "or give fewer --steps") from None
        raise ValueError(f"--n {args.n} --out {out}: {error}") from None


def check_decoding(args: argparse.Namespace, size: tuple[int, int], vae: VAE, device: torch.device) -> None:
    """Refuse a batch that the VAE cannot decode in the memory of the device."""
    # Input and output, in fp32, of a convolution of the decoder's last level: the very least.
    at_once = min(args.batch_size, args.n)
    need = {f"decoding {at_once:,} pictures": at_once * math.prod(size) * vae.config.widths[0] * 2 * 4}
    check_room(f"--batch-size {args.batch_size}", need, memory(device), f"memory ({device.type})",
               "give a smaller one")


def read_network(args: argparse.Namespace) -> dict:
    """The checkpoint to draw with."""
    if args.published:
        return load_published(args.published, args.weights, args.vae)
    return load_checkpoint(args.run)


def sampler_options(args: argparse.Namespace) -> tuple[str | None, dict]:
    """The sampler asked for, or the one whose option was given, or None; and its options."""
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
    return sampler, options


def choose_sampler(args: argparse.Namespace, objective: dict) -> tuple[str, dict]:
    """The sampler asked for or implied, or the objective's default; and its options. Refuses what does not go
    with the objective."""
    sampler, options = sampler_options(args)
    # The straight path has no thousand steps from which these spacings choose.
    if args.times in ("leading", "linspace") and objective["name"] != "ddpm":
        raise ValueError(f"--times {args.times}: a spacing of the ddpm path; this run is on the path of rf")
    if sampler == "jump" and not OBJECTIVES[objective["name"]].second_time:
        raise ValueError(f"--sampler jump: needs a run of --objective meanflow; this one is of "
                         f"{objective['name']}")
    if args.variance == "learned" and not objective.get("learned_variance"):
        what = args.run or args.weights
        raise ValueError(f"--variance learned: {what} was not trained to predict a variance")
    return sampler or OBJECTIVES[objective["name"]].sampler, options


def chosen_weights(args: argparse.Namespace, checkpoint: dict) -> dict:
    """The raw weights, their average, or one of another width."""
    if args.ema:
        return average_of_width(args.run, checkpoint, args.ema)
    return checkpoint["model" if args.raw else "ema"]


def read_guide(args: argparse.Namespace, checkpoint: dict, vae: VAE) -> dict | None:
    """The checkpoint of --guide. Refuses one whose output is not that of the run's network under the same
    conditions, so that their difference would mean nothing."""
    if args.guide is None:
        return None
    try:
        guide = load_checkpoint(args.guide)
    except ValueError as error:
        raise ValueError(f"--guide {error}") from None

    def refuse(what: str, theirs: object, ours: object) -> None:
        raise ValueError(f"--guide {args.guide}: {what} {theirs}, where the run has {ours}; give an earlier "
                         "checkpoint of the run, or a smaller network trained like it")

    if guide["arch"] == "vae":
        refuse("is a VAE", "alone", f"a {checkpoint['arch']}")
    paths = [build_path(part["objective"]) for part in (guide, checkpoint)]
    t = torch.linspace(0, 1, 1001, dtype=torch.float64)    # every time at which the path of ddpm is defined
    schedules = [torch.stack(path.alpha_sigma(t)) for path in paths]
    names = [part["objective"]["name"] for part in (guide, checkpoint)]
    if names[0] != names[1]:
        refuse("was trained with --objective", *names)
    if not torch.equal(*schedules):
        refuse("was trained on", "a path with another noise schedule", "its own")
    for name in ("prediction", "learned_variance"):
        theirs, ours = (getattr(path, name, False) for path in paths)
        if theirs != ours:
            refuse(f"its {name.replace('_', ' ')} is", theirs, ours)
    sizes = ["{}x{}".format(*part["data"]["size"]) for part in (guide, checkpoint)]
    if sizes[0] != sizes[1]:
        refuse("draws pictures of", *sizes)
    # ---- conditions: the same kind, in the same words or numbers
    kinds = [(part["text"] or {}).get("encoder", "none at all") for part in (guide, checkpoint)]
    if kinds[0] != kinds[1]:
        refuse("its text encoder is", *kinds)
    if guide["data"]["classes"] != checkpoint["data"]["classes"]:
        theirs, ours = (", ".join(part["data"]["classes"][:4]) or "none" for part in (guide, checkpoint))
        refuse("its classes are", theirs, ours)
    if kinds[1] not in ("bytes", "none at all"):           # encoder outputs, which both networks are given
        widths = [[part["config"].get(name) for name in ("context_width", "pooled_width")]
                  for part in (guide, checkpoint)]
        encoders = [(part.get("training") or {}).get("encoder") for part in (guide, checkpoint)]
        if widths[0] != widths[1] or (None not in encoders and encoders[0] != encoders[1]):
            refuse("takes text vectors of", "another encoder", "those of its own")
    if latent_space(unpack_vae(guide["vae"])) != latent_space(vae):
        refuse("was trained on the latents of", "another VAE", "its own")
    return guide


def build_guide(args: argparse.Namespace, checkpoint: dict | None, condition: conditioning.Conditioning,
                asked: Asked, device: torch.device) -> Guide | None:
    """The network of --guide, with averaged weights, and its conditions. checkpoint: of `read_guide`."""
    if checkpoint is None:
        return None
    model = build_model(checkpoint["arch"], checkpoint["config"], checkpoint["text"])
    load_weights(model, checkpoint["ema"], args.guide).to(device).eval()
    if device.type == "cuda":
        model = model.to(memory_format=torch.channels_last)
    return Guide(graphed(model) if args.compile else model, condition.ask_again(asked, model))


def multiple_of(checkpoint: dict, vae: VAE) -> tuple[int, int]:
    """What the sides of a network's pictures must be multiples of."""
    if checkpoint["arch"] == "unet":
        with torch.device("meta"):                         # only its number of levels is needed
            unet = build_model("unet", checkpoint["config"], checkpoint["text"])
        return (vae.factor * unet.factor,) * 2
    p, q = checkpoint["config"].get("patch", (2, 2))
    return vae.factor * p, vae.factor * q


def chosen_size(args: argparse.Namespace, checkpoint: dict,
                multiple: tuple[int, int]) -> tuple[tuple[int, int], float]:
    """--size, or the size of the training, and its tokens, of a `multiple` each. Raises ValueError for sides
    that the network cannot have, and says where it was trained on others."""
    data = checkpoint["data"]
    size = tuple(args.size or data["size"])
    if any(side % part for side, part in zip(size, multiple)):
        raise ValueError("--size {} {}: height must be a multiple of {} and width of {}".format(
            *size, *multiple))
    trained = None
    if "aspect" in data:
        low, high = data["aspect"]["smallest"], data["aspect"]["largest"]
        pixels = data["aspect"]["pixels"]
        if math.prod(size) > pixels or any(not a <= side <= b for side, a, b in zip(size, low, high)):
            trained = "heights of {} to {}, widths of {} to {} and at most {:,} pixels".format(
                low[0], high[0], low[1], high[1], pixels)
    elif size != tuple(data["size"]):
        trained = "{}x{} only".format(*data["size"])
    if trained:
        print(f"--size {size[0]} {size[1]}: the run was trained on {trained}; other sizes work, but may look "
              "worse", file=sys.stderr)
    return size, math.prod(size) / math.prod(multiple)


def sampling_path(args: argparse.Namespace, objective: dict, tokens: float = 1) -> dict:
    """The objective whose path is sampled along: the run's own, with the shift asked for or, where it follows
    the tokens of a picture, that of so many. It moves only the times at which the network is evaluated.
    Raises ValueError on a path that has no shift."""
    base = objective.get("shift_tokens")
    if base is not None:
        objective = {name: value for name, value in objective.items() if name != "shift_tokens"}
        objective["shift"] = (tokens / base) ** 0.5        # as rectified_flow.RectifiedFlow.shift_of
    if args.shift is None:
        return objective
    if objective["name"] != "rf":
        raise ValueError(f"--shift {args.shift:g}: of the times of rf; this run is on the path of "
                         f"{objective['name']}; leave it out")
    return objective | {"shift": args.shift}


def read_picture(flag: str, file: str, size: tuple[int, int], behind: str = "white") -> np.ndarray:
    """uint8 (H, W, 3)."""
    try:
        return open_image(Path(file), size, behind).copy()
    except Exception as error:                             # Pillow raises a dozen exception types
        raise ValueError(f"{flag} {file}: cannot be read as a picture ({error})") from None


def read_image_and_mask(args: argparse.Namespace, size: tuple[int, int],
                        channels: int) -> tuple[Tensor | None, Tensor | None]:
    """--init-image (1, C, H, W) in [-1, 1] and --mask (1, 1, H, W), bool; None where not given."""
    image, mask = None, None
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


# ---- writing

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


def write_folder(out: Path, batches: Callable[..., Iterator[np.ndarray]], asked: Asked, first_seed: int,
                 batch_size: int, settings: dict) -> None:
    """Write each picture to SEED-NAME.png, or to SEED.png where its condition has no name."""
    out.mkdir(parents=True, exist_ok=True)
    # Prompts become file names: letters, digits and dashes only, and of bounded length.
    endings = [re.sub(r"[^\w-]+", "-", f"-{name}")[:80] for name in asked.names] or [""]

    def file(i: int) -> Path:
        return out / f"{first_seed + i:06d}{endings[asked.turn[i]]}.png"

    unfinished = Unfinished(out / "unfinished.json", settings)
    there = 0
    while there < unfinished.done and file(there).is_file():
        there += 1
    if there < unfinished.done:                            # one has been removed since: go back to its batch
        unfinished.done = there // batch_size * batch_size
    for images in batches(unfinished.done):                # each is written as soon as it is drawn
        for i, image in enumerate(images, unfinished.done):
            if image.shape[-1] == 1:                       # Pillow expects a grey picture as (H, W)
                image = image.squeeze(-1)
            write_picture(file(i), Image.fromarray(image), sync=False)       # of thousands, each would wait
        unfinished.advance(unfinished.done + len(images))
    unfinished.finish()


def write(args: argparse.Namespace, batches: Callable[..., Iterator[np.ndarray]], asked: Asked,
          shape: tuple[int, int, int], settings: Callable[[], dict], written: list[int]) -> None:
    """Draw and write; the file at --out is always the complete old one or the complete new one. shape: of a
    picture, (H, W, C). written: ends with how many are written, for the line after an interruption."""
    out = Path(args.out)
    kind = out.suffix.lower()
    try:
        if kind == ".npz":
            write_npz(out, batches, (args.n, *shape), settings())
        elif kind == ".gif":
            write_gif(out, batches, asked)
        elif kind in PICTURES:                             # one grid
            write_picture(out, grid(np.concatenate(list(batches())), asked.columns, captions=asked.captions))
        else:
            write_folder(out, batches, asked, args.seed, args.batch_size, settings())
    except KeyboardInterrupt:
        # Said here and not in `program`, whose line holds for every program and says less.
        how_far = ": nothing was written"
        if kind in (".npz", ""):
            if not written:                                # before it was known how many are there
                raise
            how_far = f" after {written[-1]:,} of {args.n:,} pictures; the same command continues"
        print(f"sample.py: interrupted{how_far}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def reconstruct(args: argparse.Namespace, checkpoint: dict, device: torch.device) -> None:
    """What sample.py does with the run of a VAE: every --init-image, and its reconstruction beside it."""
    taken = ("run", "raw", "init_image", "size", "out", "device")
    for flag in (flag for group in FLAGS.values() for flag in group):
        if flag.key not in taken and getattr(args, flag.key) not in (flag.default, False):
            raise ValueError(f"{flag.name}: this run is a VAE, which reconstructs but does not draw; leave "
                             "it out")
    if not args.init_image:
        raise ValueError(f"{args.run}: this run is a VAE, which reconstructs but does not draw; give it "
                         "pictures by --init-image FILE, or give a run that draws")
    kind = Path(args.out).suffix.lower()
    if kind not in PICTURES:
        raise ValueError(f"--out {args.out}: a VAE's reconstruction is a .png, .jpg or .webp")
    factor = 2 ** (len(checkpoint["config"]["widths"]) - 1)
    size, _ = chosen_size(args, checkpoint, (factor, factor))
    zoom = enlargement(size[1])
    count = len(args.init_image)
    try:
        check_grid(kind, 2 * count, size, 2, zoom, 1)
    except ValueError:
        raise ValueError(f"--out {args.out}: {count:,} pictures and their reconstructions are more than "
                         f"{kind} or the memory holds; give fewer by --init-image") from None
    vae = unpack_vae({"config": checkpoint["config"], "state": checkpoint["model" if args.raw else "ema"]})
    vae = vae.to(device)
    images = [read_image(file, size, vae.config.image_channels) for file in args.init_image]
    pairs = []
    with torch.no_grad():
        for image in tqdm(images, desc="reconstruct", unit="img", delay=2, leave=False):
            pairs += [image, vae.decode(vae.encode(image.to(device)).mean).cpu()]
    pictures = to_uint8(torch.cat(pairs)).repeat(zoom, 1).repeat(zoom, 2)
    write_picture(Path(args.out), grid(pictures, columns=2))
    print(args.out)


# ---- the program

def main(argv: list[str] | None = None) -> None:
    with launched() as ranks:              # of one process, or of several that torchrun has started
        run_command(argv, ranks)


def run_command(argv: list[str] | None, ranks: Ranks) -> None:
    """What this process does of the command."""
    args = parse_args(argv)
    check_flags(args, ranks)
    device = pick_device(args.device, ranks.local)
    if args.compile:
        check_compiler(device)

    # ---- the checkpoint, and what the flags mean for it; nothing is built until they are checked
    what = args.run or args.weights
    checkpoint = read_network(args)
    if checkpoint["arch"] == "vae":
        if ranks.first:
            reconstruct(args, checkpoint, device)
        return
    if args.init_image and len(args.init_image) > 1:
        raise ValueError(f"--init-image {' '.join(args.init_image)}: a network begins with one picture; give "
                         "only one")
    condition = conditioning.of_checkpoint(checkpoint, device)
    conditioning.check_flags(condition, args)
    objective = OBJECTIVES[checkpoint["objective"]["name"]]
    scale = conditioning.guidance_scale(condition, args, objective.scale)
    sampler, options = choose_sampler(args, checkpoint["objective"])
    steps = args.steps or objective.steps
    vae = unpack_vae(checkpoint["vae"])                  # the one that the network was trained on
    size, tokens = chosen_size(args, checkpoint, multiple_of(checkpoint, vae))
    path = build_path(sampling_path(args, checkpoint["objective"], tokens))
    TIMES[args.times](path, steps)                         # refuses more steps than the path has
    weaker = read_guide(args, checkpoint, vae)
    check_size(args, size, vae.config.image_channels, steps)
    check_decoding(args, size, vae, device)

    # ---- the network, the VAE and their inputs
    model = build_model(checkpoint["arch"], checkpoint["config"], checkpoint["text"])
    load_weights(model, chosen_weights(args, checkpoint), what).to(device).eval()
    vae = vae.to(device)
    shape = (vae.config.latent_channels, size[0] // vae.factor, size[1] // vae.factor)
    image, mask = read_image_and_mask(args, size, vae.config.image_channels)
    strength = args.strength
    if strength is None:
        strength = 1.0 if args.mask else 0.8               # within a mask, start from noise alone
    with torch.no_grad():
        asked = condition.ask(args, model)
    zoom = enlargement(size[1]) if asked.captions else 1
    check_size(args, size, vae.config.image_channels, steps, asked.columns, zoom)
    if device.type == "cuda":                              # faster, at the precision asked for
        torch.backends.cuda.matmul.allow_tf32 = args.precision != "fp32"
        torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
        model = model.to(memory_format=torch.channels_last)
        vae = vae.to(memory_format=torch.channels_last)
    network = graphed(model) if args.compile else model
    guide = build_guide(args, weaker, condition, asked, device)

    how = dict(sampler=sampler, steps=steps, scale=scale, rescale=args.rescale, interval=tuple(args.interval),
               times=args.times, strength=strength, **options)

    written: list[int] = []                                # how many pictures, after each batch

    # A generator, so that each batch can be written before the next is drawn.
    def batches(first: int = 0, on_step: Callable | None = None) -> Iterator[np.ndarray]:
        first = ranks.highest(first)                       # rank 0 knows how many are there
        written.append(first)
        seeds = range(args.seed, args.seed + args.n)
        with (picture_bar(args.n, first, desc=f"{sampler} x {steps}, guidance {scale:g}") as bar,
              torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16")):
            for images in draw_batches(network, vae, path, shape, asked, seeds, args.batch_size, first,
                                       progress=lambda done: bar.update(done - bar.n),
                                       image=image, mask=mask, on_step=on_step, guide=guide,
                                       ranks=ranks, **how):
                yield images
                written.append(written[-1] + len(images))

    def settings() -> dict:
        """All that decides the pictures: only with the same settings may they be continued."""
        flags = ("n", "seed", "batch_size", "precision", "compile", "negative_prompt", "shift")
        parts = {"weights": fingerprint_tensors(model.state_dict()),
                 "VAE": fingerprint_tensors(vae.state_dict()), "objective": checkpoint["objective"],
                 "conditions": digest(asked.names, asked.turn.numpy(),
                                      *(part.cpu().numpy() for part in asked.every.values())),
                 "guide": fingerprint_tensors(weaker["ema"]) if weaker else None, "size": list(size),
                 "pictures": digest(*(part.numpy() for part in (image, mask) if part is not None))}
        return {flag: getattr(args, flag) for flag in flags} | how | parts | {"device": device.type}

    # ---- draw, and write on rank 0
    if not ranks.first:
        list(batches())                                    # nothing, but its share has been drawn
        return
    write(args, batches, asked, (*size, vae.config.image_channels), settings, written)
    print(args.out)


if __name__ == "__main__":
    sys.exit(program("sample.py", main))
