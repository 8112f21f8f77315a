"""Train a network in latent space: settings, data, VAE, latents, the loop, samples. Rerunning the same command resumes.

    python train.py --arch dit --objective rf                          # everything from nothing, about 10 minutes on two cores
    python train.py --arch unet --objective ddpm --prediction v --data fashion-mnist
    python train.py --arch vae --data FOLDER --image-size 128 192      # only the autoencoder
    python train.py --arch dit --objective rf --data FOLDER --image-size 128 192

A run lives in runs/NAME: settings.json, metrics.jsonl, previews, loss.png, checkpoint.pt. A network without --vae trains the
VAE of its data first, as the run runs/DATA-HxW-vae, and shares it with every other network on that data.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

import dit
import unet
import vae as vae_file
from data import Dataset, LatentCache, batch_indices, fingerprint_tensors, grid, load_data, to_tensor, to_uint8
from sample import DRAW_DEFAULTS, MODELS, build_model, build_path, draw, load_checkpoint, load_vae, load_weights, pick_device

# What two cores can do in ten minutes; everything here can be overridden by its flag.
DEFAULTS = {
    "vae":  dict(steps=3000, batch_size=32, lr=4e-3, warmup=50, ema=0.99, weight_decay=0.0),
    "dit":  dict(steps=5000, batch_size=64, lr=1e-3, warmup=100, ema=0.998, weight_decay=0.01),
    "unet": dict(steps=5000, batch_size=64, lr=5e-4, warmup=100, ema=0.998, weight_decay=0.01),
}
# Flags that may differ between the runs of one command line: where things are and how often we look, never what is learnt.
FREE = {"device", "compile", "data_dir", "cache_dir", "runs_dir", "name", "log_every", "save_every", "preview_every", "val_every"}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Train a VAE, or a DiT or U-Net in its latent space.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    g = p.add_argument_group("what")
    g.add_argument("--arch", choices=MODELS, required=True, help="the network; vae trains only the autoencoder")
    g.add_argument("--objective", choices=("rf", "ddpm"), default="rf", help="straight path, or diffusion")
    g.add_argument("--prediction", choices=("velocity", "eps", "v", "x0"), help="what the network returns (rf: velocity, ddpm: eps)")
    g.add_argument("--name", help="run folder below --runs-dir (default: DATA-HxW-ARCH-OBJECTIVE, sizes other than 32x32 only)")
    g.add_argument("--runs-dir", default="runs", help="where runs live")
    g = p.add_argument_group("data")
    g.add_argument("--data", default="shapes", help="shapes, fashion-mnist, mnist, cifar10, or a folder of pictures")
    g.add_argument("--data-dir", default="data", help="where IDX and CIFAR-10 files are, or are downloaded to")
    g.add_argument("--image-size", type=int, nargs="+", metavar="N", help="one side, or height and width (default: 32)")
    g.add_argument("--flip", action="store_true", help="mirror pictures at random")
    g.add_argument("--cond", choices=("class", "none"), default="class", help="learn the labels, where the data has any")
    g.add_argument("--cache-dir", help="where decoded pictures and latents are cached (default: the VAE's folder)")
    g = p.add_argument_group("network")
    g.add_argument("--preset", help="dit, unet: a row of PRESETS in the network's file, such as S/2 or sd1 (default: small)")
    g.add_argument("--patch", type=int, nargs="+", metavar="N", help="dit: patch side, or height and width (default: the preset's)")
    g.add_argument("--block", choices=("modern", "published"), default="modern", help="dit: which transformer block")
    g.add_argument("--vae", help="a trained VAE's run folder or checkpoint (default: train one, or use this data's)")
    g = p.add_argument_group("VAE (where one is trained)")
    g.add_argument("--vae-preset", choices=vae_file.PRESETS, help="a row of PRESETS in vae.py (default: small)")
    g.add_argument("--vae-widths", type=int, nargs="+", metavar="N", help="width per level; each level but the last halves the image")
    g.add_argument("--latent-channels", type=int, metavar="C", help="channels of the latent (default: 4)")
    g.add_argument("--kl-weight", type=float, help="weight of the KL term (default: 1e-6)")
    g.add_argument("--vae-steps", type=int, help="its optimizer steps, where it is trained on the way to another network")
    g = p.add_argument_group("objective")
    g.add_argument("--schedule", choices=("linear", "scaled_linear", "cosine"), help="ddpm (default scaled_linear)")
    g.add_argument("--min-snr", type=float, help="ddpm: gamma of the min-SNR loss weight (default: off)")
    g.add_argument("--zero-terminal-snr", action="store_true", help="ddpm: rescale the schedule to end in pure noise")
    g.add_argument("--density", choices=("uniform", "logit_normal", "mode", "cosmap"), help="rf: of t (default logit_normal)")
    g.add_argument("--density-mean", type=float, help="rf, logit_normal: m (default 0)")
    g.add_argument("--density-std", type=float, help="rf, logit_normal: s (default 1)")
    g.add_argument("--mode-scale", type=float, help="rf, mode: s (default 1.29)")
    g.add_argument("--shift", type=float, help="rf: shift of t toward noise, for larger pictures (default 1)")
    g.add_argument("--label-dropout", type=float, default=0.1, help="share of labels dropped, for guidance; 0: no guidance later")
    g = p.add_argument_group("optimisation (defaults by --arch)")
    g.add_argument("--steps", type=int, help="optimizer steps of this network")
    g.add_argument("--batch-size", type=int, help="examples per optimizer step")
    g.add_argument("--accumulate", type=int, default=1, help="pieces that a batch is cut into, to save memory")
    g.add_argument("--lr", type=float, help="peak learning rate")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up")
    g.add_argument("--cooldown", type=float, default=0.5, help="last share of the run in which the rate falls linearly to 0")
    g.add_argument("--weight-decay", type=float, help="of AdamW")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    g.add_argument("--ema", type=float, help="decay of the averaged weights, after its warm-up")
    g.add_argument("--seed", type=int, default=0, help="of weights, order, noise")
    g = p.add_argument_group("machine and output")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    g.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto", help="bf16 autocast where the device has it")
    g.add_argument("--compile", action="store_true", help="torch.compile the network")
    g.add_argument("--log-every", type=int, default=20, help="steps between lines of metrics.jsonl")
    g.add_argument("--val-every", type=int, default=500, help="steps between validation losses")
    g.add_argument("--preview-every", type=int, default=1000, help="steps between preview grids")
    g.add_argument("--save-every", type=int, default=500, help="steps between checkpoints")
    return p.parse_args(argv)


VAE_FLAGS = {"vae_preset": "small", "vae_widths": None, "latent_channels": 4, "kl_weight": 1e-6}


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Refuse what contradicts itself and fill in what depends on other flags, before anything is written."""
    def flag(name: str) -> str:
        return f"--{name.replace('_', '-')} {getattr(args, name)}"

    args.image_size = args.image_size or [32]
    if len(args.image_size) > 2 or min(args.image_size) < 1:
        raise ValueError(f"{flag('image_size')}: give one side, or height and width")
    args.image_size = [args.image_size[0], args.image_size[-1]]
    for name in ("steps", "vae_steps", "batch_size", "accumulate", "latent_channels", "log_every", "val_every", "preview_every", "save_every"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise ValueError(f"{flag(name)}: must be at least 1")
    for name in ("label_dropout", "cooldown", "ema"):
        if getattr(args, name) is not None and not 0 <= getattr(args, name) <= 1:
            raise ValueError(f"{flag(name)}: must be between 0 and 1")
    belongs = {"objective": {"schedule": "ddpm", "min_snr": "ddpm", "zero_terminal_snr": "ddpm", "density": "rf",
                             "density_mean": "rf", "density_std": "rf", "mode_scale": "rf", "shift": "rf"},
               "arch": {"patch": "dit"}}
    for group, owners in belongs.items():
        for name, owner in owners.items():
            if getattr(args, group) != owner and getattr(args, name) not in (None, False):
                raise ValueError(f"{flag(name)}: belongs to --{group} {owner}, not {getattr(args, group)}")
    if args.arch == "vae" and (args.vae or args.preset or args.vae_steps):
        name = next(name for name in ("vae", "preset", "vae_steps") if getattr(args, name))
        raise ValueError(f"{flag(name)}: is for a network in latent space; for --arch vae there are --vae-preset and --steps")
    if args.vae and (given := [name for name in (*VAE_FLAGS, "vae_steps") if getattr(args, name) is not None]):
        raise ValueError(f"{flag(given[0])}: --vae {args.vae} is trained already; give one or the other")

    for name, value in (DEFAULTS[args.arch] | (VAE_FLAGS if args.arch == "vae" else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.batch_size % args.accumulate:
        raise ValueError(f"{flag('accumulate')}: does not divide the batch of {args.batch_size}")
    if args.arch != "vae":
        presets = dit.PRESETS if args.arch == "dit" else unet.PRESETS
        args.preset = args.preset or "small"
        if args.preset not in presets:
            raise ValueError(f"{flag('preset')}: {args.arch} has {', '.join(presets)}")
    stem = Path(args.data).name or "data"
    stem += "" if args.image_size == [32, 32] else "-{}x{}".format(*args.image_size)
    args.name = args.name or (f"{stem}-vae" if args.arch == "vae" else f"{stem}-{args.arch}-{args.objective}")
    args.vae_name = f"{stem}-vae"
    return args


def objective_of(args: argparse.Namespace) -> dict:
    names = {"rf": dict(density="density", density_mean="mean", density_std="std", mode_scale="mode_scale", shift="shift"),
             "ddpm": dict(schedule="schedule", min_snr="min_snr", zero_terminal_snr="zero_terminal_snr")}[args.objective]
    options = {own: getattr(args, name) for name, own in (names | {"prediction": "prediction"}).items()}
    return {"name": args.objective, **{own: value for own, value in options.items() if value is not None}}


def vae_config(args: argparse.Namespace, image_channels: int) -> dict:
    chosen = {name: default if getattr(args, name) is None else getattr(args, name) for name, default in VAE_FLAGS.items()}
    config = dict(vae_file.PRESETS[chosen["vae_preset"]], image_channels=image_channels, latent_channels=chosen["latent_channels"])
    return config | ({"widths": tuple(chosen["vae_widths"])} if chosen["vae_widths"] else {})


def network_config(args: argparse.Namespace, latent_channels: int, num_classes: int) -> dict:
    shared = dict(channels=latent_channels, num_classes=num_classes)
    if args.arch == "unet":
        return unet.PRESETS[args.preset] | shared | {"context_width": None}
    patch = {"patch": (args.patch[0], args.patch[-1])} if args.patch else {}
    return dit.PRESETS[args.preset] | shared | patch | (dit.PUBLISHED if args.block == "published" else {})


def check_size(args: argparse.Namespace, vae_factor: int, config: dict) -> None:
    """The sides must be multiples of all the halvings and patches on the way: say so before the VAE takes its minutes."""
    factors = {"VAE": (vae_factor, vae_factor)}
    if args.arch == "dit":
        factors["patch"] = tuple(config.get("patch", dit.DiTConfig.patch))
    elif args.arch == "unet":
        factors["U-Net"] = (2 ** (len(config.get("widths", unet.UNetConfig.widths)) - 1),) * 2
    need = [math.prod(pair[axis] for pair in factors.values()) for axis in (0, 1)]
    if any(side % multiple for side, multiple in zip(args.image_size, need)):
        why = " x ".join(f"{name} {h}x{w}" for name, (h, w) in factors.items())
        raise ValueError("--image-size {} {}: height must be a multiple of {} and width of {} ({})".format(*args.image_size, *need, why))


@contextmanager
def locked(folder: Path):
    """Hold the run folder for this process; the lock goes with the process, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "a") as file:
        try:
            if os.name == "nt":
                import msvcrt
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f"{folder}: another process is training in this folder; wait for it, or use another --name") from None
        yield


def write_atomically(path: Path, write) -> None:
    """write(file) into a temporary name, flush to the disk, rename: at every moment the old file or the new, whole."""
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:       # torch reports a full disk as RuntimeError
        partial.unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {error}".splitlines()[0]) from None


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, a plateau, a linear fall to zero over the last `cooldown` share."""
    left = (args.steps - step) / max(1.0, args.cooldown * args.steps)
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup), left)


def plot_loss(path: Path, records: list[dict]) -> None:
    """Training and validation loss over steps, on a logarithmic axis, drawn with Pillow."""
    width, height, left, bottom = 900, 420, 70, 40
    series = {"train": [(r["step"], r["loss"]) for r in records if "loss" in r],
              "validation": [(r["step"], r["val_loss"]) for r in records if "val_loss" in r]}
    if series["train"]:                            # a running mean: the loss of one batch is mostly the times it drew
        smooth, points = series["train"][0][1], []
        for step, value in series["train"]:
            smooth = 0.9 * smooth + 0.1 * value
            points.append((step, smooth))
        series["train"] = points
    values = [v for points in series.values() for _, v in points if v > 0]
    if not values:
        return
    low, high = math.log(min(values)), math.log(max(values) * 1.05)
    last = max(s for points in series.values() for s, _ in points) or 1
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)

    def place(step: float, value: float) -> tuple[float, float]:
        share = (math.log(max(value, 1e-12)) - low) / max(high - low, 1e-9)
        return left + step / last * (width - left - 20), height - bottom - share * (height - bottom - 20)

    for i in range(5):
        value = math.exp(low + (high - low) * i / 4)
        y = place(0, value)[1]
        pen.line([(left, y), (width - 20, y)], fill="#dddddd")
        pen.text((8, y - 6), f"{value:.3g}", fill="black")
        x = place(last * i / 4, 1)[0]
        pen.text((x - 12, height - bottom + 10), f"{round(last * i / 4)}", fill="black")
    for (name, points), colour, x in zip(series.items(), ("#1f77b4", "#d62728"), (left + 10, left + 110)):
        if len(points) > 1:
            pen.line([place(s, v) for s, v in points], fill=colour, width=2)
        pen.text((x, 6), name, fill=colour)
    write_atomically(path, lambda file: image.save(file, "PNG"))


class Autoencoding:
    """What the loop asks of a task, answered for the VAE: the loss of a batch, the validation, a preview."""

    def __init__(self, args: argparse.Namespace, train: Dataset, val: Dataset, device: torch.device):
        self.args, self.train, self.device = args, train, device
        self.val = to_tensor(val.images[:256]).to(device)

    def loss(self, model: vae_file.VAE, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B,) loss and (B,) times, of which a VAE has none."""
        x = to_tensor(self.train.images[indices])
        if self.args.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        loss, _ = model.loss(x.to(self.device), self.args.kl_weight)
        return loss, loss.new_zeros(len(x))

    def validate(self, model: vae_file.VAE) -> dict:
        generator = torch.Generator(self.device).manual_seed(0)
        loss, logs = model.loss(self.val, self.args.kl_weight, generator)
        return {"val_loss": loss.mean().item(), "psnr": logs["psnr"].item(), "kl": logs["kl"].item(),
                "latent_std": logs["latent_std"].tolist()}

    def preview(self, model: vae_file.VAE) -> Image.Image:
        """Pictures, each with its reconstruction below."""
        x = self.val[:32]
        pairs = [torch.cat([a, model.decode(model.encode(a).mean.to(a.dtype)).to(a.dtype)]) for a in x.split(16)]
        return grid(to_uint8(torch.cat(pairs)), columns=min(16, len(x)))


class Denoising:
    """The same for a network in latent space."""

    def __init__(self, args: argparse.Namespace, cache: LatentCache, val: Dataset, vae: vae_file.VAE, objective: dict,
                 num_classes: int, device: torch.device):
        self.args, self.cache, self.vae, self.path, self.num_classes, self.device = (
            args, cache, vae, build_path(objective), num_classes, device)
        self.draw_defaults = DRAW_DEFAULTS[objective["name"]]
        # Validation: fixed pictures, noise and times; the times evenly spread, so that each bucket is a quarter of the way.
        pictures = to_tensor(val.images[:256])
        with torch.no_grad():
            self.x0 = torch.cat([vae.normalize(vae.encode(x.to(device)).mean) for x in pictures.split(32)])
        n = len(self.x0)
        self.t = ((torch.arange(n) + 0.5) / n)[torch.randperm(n, generator=torch.Generator().manual_seed(0))].to(device)
        self.eps = torch.randn(self.x0.shape, generator=torch.Generator().manual_seed(1)).to(device)
        self.cond = {"y": torch.from_numpy(val.labels[:256]).to(device)} if num_classes else {}

    def loss(self, model: torch.nn.Module, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        z, y = self.cache.batch(indices)
        x0, cond = self.vae.normalize(z.to(self.device)), {}
        if self.num_classes:
            dropped = torch.rand(len(y)) < self.args.label_dropout        # each label on its own
            cond = {"y": torch.where(dropped, self.num_classes, y).to(self.device)}
        t = self.path.sample_t(len(x0), self.device)
        return self.path.loss(model, x0, t=t, **cond), t

    def validate(self, model: torch.nn.Module) -> dict:
        loss = self.path.loss(model, self.x0, t=self.t, eps=self.eps, **self.cond)
        quarter = (self.t * 4).long().clamp(max=3)
        return {"val_loss": loss.mean().item(),
                "val_by_time": {f"{i / 4}-{(i + 1) / 4}": loss[quarter == i].mean().item() for i in range(4) if (quarter == i).any()}}

    def preview(self, model: torch.nn.Module, n: int | None = None) -> Image.Image:
        """n samples, class by class; guidance 2 where the run is trained for it."""
        columns = min(self.num_classes, 24) or 8
        n = n or 3 * columns
        labels = torch.arange(n) % self.num_classes if self.num_classes else None
        scale = 2.0 if self.num_classes and self.args.label_dropout > 0 else 1.0
        images = [draw(model, self.vae, self.path, self.x0.shape[1:], labels[i:i + 64] if labels is not None else None,
                       range(i, min(i + 64, n)), scale=scale, num_classes=self.num_classes, **self.draw_defaults)
                  for i in range(0, n, 64)]
        return grid(np.concatenate(images), columns)


def open_run(args: argparse.Namespace, run: Path) -> None:
    """Write the settings of a new run; refuse a folder that holds a run of other settings."""
    settings, file = vars(args), run / "settings.json"
    if not file.is_file():
        write_atomically(file, lambda f: f.write(json.dumps(settings, indent=1).encode()))
        return
    try:
        found = json.loads(file.read_text())
    except ValueError:
        raise ValueError(f"{file}: damaged; restore it, or use another --name") from None
    for name in sorted(set(settings) - FREE):
        if found.get(name) != settings[name]:
            raise ValueError(f"{run} holds a run with --{name.replace('_', '-')} {found.get(name)}, not {settings[name]}; "
                             "repeat its settings to continue it, or use another --name")


def make_vae(args: argparse.Namespace) -> Path | None:
    """The VAE of this data, trained now if need be. None if that was interrupted."""
    folder = Path(args.runs_dir) / args.vae_name
    settings = folder / "settings.json"
    if settings.is_file() and all(getattr(args, name) is None for name in (*VAE_FLAGS, "vae_steps")):
        found = parse_args(["--arch", "vae"])      # whoever trained it chose its settings: keep them
        vars(found).update(json.loads(settings.read_text()), **{name: getattr(args, name) for name in FREE - {"name"}})
    else:
        found = argparse.Namespace(**vars(args))
        vars(found).update(vars(parse_args(["--arch", "vae"])), **{name: getattr(args, name) for name in (
            *VAE_FLAGS, *(FREE - {"name"}), "data", "image_size", "flip", "precision", "seed")}, steps=args.vae_steps)
        found = resolve(found)
    return folder if train(found) else None


def train(args: argparse.Namespace) -> bool:
    """Train or continue one run. True when it is finished, False when a signal interrupted it."""
    # ---- device and number format
    device = pick_device(args.device)
    bf16_here = (torch.cuda.is_bf16_supported() if device.type == "cuda" else
                 device.type == "cpu" and getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False))
    bf16 = args.precision == "bf16" or (args.precision == "auto" and bf16_here)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    # ---- data
    is_vae = args.arch == "vae"
    run, runs = Path(args.runs_dir) / args.name, Path(args.runs_dir)
    vae_folder = run if is_vae else Path(args.vae) if args.vae else runs / args.vae_name
    vae_factor = load_vae(args.vae).factor if args.vae else 2 ** (len(vae_config(args, 3).get("widths", vae_file.VAEConfig.widths)) - 1)
    check_size(args, vae_factor, {} if is_vae else network_config(args, 4, 0))
    objective = None if is_vae else objective_of(args)
    if objective:
        build_path(objective)                      # refuses what the path does not know
    cache_dir = Path(args.cache_dir) if args.cache_dir else vae_folder.parent if vae_folder.is_file() else vae_folder
    datasets = [load_data(args.data, split, tuple(args.image_size), Path(args.data_dir), cache_dir) for split in ("train", "val")]
    data, val = datasets
    num_classes = len(data.classes) if args.cond == "class" and not is_vae else 0

    # ---- the VAE first
    if not is_vae and not args.vae and not make_vae(args):
        return False

    with locked(run):
        open_run(args, run)
        vae, vae_state = None, None
        if not is_vae:
            vae = load_vae(vae_folder).to(device)
            vae_state = {"config": asdict(vae.config), "state": {k: v.cpu() for k, v in vae.state_dict().items()}}
            cache = encode(vae, data, args, cache_dir)

        # ---- network, averaged weights, optimizer
        torch.manual_seed(args.seed)
        config = vae_config(args, data.images.shape[-1]) if is_vae else network_config(args, vae.config.latent_channels, num_classes)
        model = build_model(args.arch, config).to(device)
        if device.type == "cuda" and args.arch != "dit":
            model = model.to(memory_format=torch.channels_last)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        decay = [p for p in model.parameters() if p.ndim > 1]             # norms, biases and gains are not decayed
        rest = [p for p in model.parameters() if p.ndim <= 1]
        optimizer = torch.optim.AdamW([{"params": decay, "weight_decay": args.weight_decay}, {"params": rest, "weight_decay": 0.0}],
                                      lr=args.lr, betas=(0.9, 0.95))      # 0.99 and above average over more steps than a short run has
        task = (Autoencoding(args, data, val, device) if is_vae else
                Denoising(args, cache, val, vae, objective, num_classes, device))
        if args.compile:
            for module in (model.encoder, model.decoder) if is_vae else (model,):
                module.compile()                   # in place: the names of the weights stay as they are

        # ---- resume
        file, start = run / "checkpoint.pt", 0
        if file.is_file():
            saved = load_checkpoint(file)
            if saved["training"]["data"] != data.fingerprint:
                raise ValueError(f"--data {args.data}: changed since {run} began; use another --name to train on what is there now")
            load_weights(model, saved["model"], str(file))
            load_weights(ema, saved["ema"], str(file))
            start = saved["step"]
            optimizer.load_state_dict(saved["training"]["optimizer"])
            torch.set_rng_state(saved["training"]["rng"])
            if device.type == "cuda" and saved["training"]["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["training"]["cuda_rng"], device)

        def save(step: int) -> None:
            write_atomically(file, lambda f: torch.save({
                "arch": args.arch, "config": asdict(model.config), "objective": objective, "vae": vae_state, "step": step,
                "data": {"source": args.data, "size": args.image_size, "channels": data.images.shape[-1],
                         "classes": data.classes if num_classes else []},
                "label_dropout": args.label_dropout if num_classes else 0.0,
                "model": model.state_dict(), "ema": ema.state_dict(),
                "training": {"optimizer": optimizer.state_dict(), "data": data.fingerprint, "rng": torch.get_rng_state(),
                             "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None},
            }, f))

        if start == 0:
            save(0)
        metrics = run / "metrics.jsonl"            # lines behind the checkpoint will be written again
        records = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
        records = [record for record in records if record["step"] <= start]
        write_atomically(metrics, lambda f: f.write("".join(json.dumps(r) + "\n" for r in records).encode()))
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{run}: {args.arch} of {parameters / 1e6:.1f} M parameters on {len(data):,} pictures, {device.type}, "
              f"{'bf16 autocast' if bf16 else 'fp32'}, step {start:,} of {args.steps:,}", flush=True)

        # ---- the loop
        interrupted = []
        handlers = {s: signal.signal(s, lambda number, _: interrupted.append(number)) for s in (signal.SIGINT, signal.SIGTERM)}
        pending: list[tuple[int, Tensor]] = []     # per step: loss, gradient norm, earliest and latest time; read every log_every

        def read_pending() -> dict:
            steps, values = [s for s, _ in pending], torch.stack([v for _, v in pending]).tolist()
            pending.clear()
            for step, (loss, norm, low, high) in zip(steps, values):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise FloatingPointError(
                        f"loss {loss} with gradient norm {norm} at step {step}, times {low:.3f} to {high:.3f}, "
                        f"{'bf16' if bf16 else 'fp32'}: stopped; {file} holds the last good weights. Lower --lr"
                        + (" or use --precision fp32" if bf16 else ""))
            return {"loss": sum(v[0] for v in values) / len(values), "grad_norm": sum(v[1] for v in values) / len(values)}

        def record(entry: dict) -> None:
            records.append(entry)
            with open(metrics, "a") as out:
                out.write(json.dumps(entry) + "\n")

        try:
            bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=f"train {args.name}", unit="step", mininterval=0.5)
            for step in bar:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args)
                model.train()
                losses, times = [], []
                for indices in np.split(batch_indices(len(data), args.batch_size, step, args.seed), args.accumulate):
                    with autocast():
                        loss, t = task.loss(model, indices)
                    (loss.mean() / args.accumulate).backward()
                    losses.append(loss.detach())
                    times.append(t)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                # the average starts short, so that the first weights do not linger in it
                torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - min(args.ema, (step + 1) / (step + 10)))
                t = torch.cat(times)
                pending.append((step + 1, torch.stack([torch.cat(losses).mean(), norm, t.min(), t.max()])))

                done, last = step + 1, step + 1 == args.steps or bool(interrupted)
                looks = [last or done % every == 0 for every in (args.log_every, args.val_every, args.preview_every, args.save_every)]
                if any(looks):
                    entry = {"step": done, **read_pending(), "lr": learning_rate(step, args)}
                    bar.set_postfix(loss=f"{entry['loss']:.4f}")
                    record(entry)
                ema.eval()
                if looks[1]:
                    with torch.no_grad(), autocast():
                        record({"step": done, **task.validate(ema)})
                if looks[2] and not interrupted:
                    for name, network in (("ema", ema), ("raw", model.eval())):
                        with torch.no_grad(), autocast():
                            picture = task.preview(network)
                        write_atomically(run / f"preview-{done:06d}-{name}.png", lambda f: picture.save(f, "PNG"))
                    plot_loss(run / "loss.png", records)
                if looks[3]:
                    save(done)
                if interrupted:
                    bar.close()
                    print(f"stopped at step {done:,} of {args.steps:,}, saved; the same command continues", flush=True)
                    return False
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

        # ---- what a finished run leaves
        if is_vae:
            cache = encode(ema, data, args, cache_dir)
            for network in (ema, model):
                network.set_latent_statistics(*cache.statistics())
            save(args.steps)
        picture = task.preview(ema) if is_vae else task.preview(ema, 10 * (min(num_classes, 24) or 8))
        write_atomically(run / "samples.png", lambda f: picture.save(f, "PNG"))
        plot_loss(run / "loss.png", records)
        if not is_vae:
            defaults = DRAW_DEFAULTS[args.objective]
            guidance = " --cfg 2" if num_classes and args.label_dropout > 0 else ""
            label = f" --label {data.classes[0]}" if num_classes else ""
            print(f"samples: {run / 'samples.png'}\nmore:    python sample.py {run}{label} --n 64 --sampler {defaults['sampler']} "
                  f"--steps {defaults['steps']}{guidance} --out grid.png")
    return True


def encode(vae: vae_file.VAE, data: Dataset, args: argparse.Namespace, cache_dir: Path) -> LatentCache:
    encoder = {k: v for k, v in vae.state_dict().items() if k.startswith(("encoder.", "quant_conv."))}
    return LatentCache(cache_dir / "latents.npy", vae, fingerprint_tensors(encoder), data, args.flip, next(vae.parameters()).device)


def main(argv: list[str] | None = None) -> None:
    started = time.time()
    if train(resolve(parse_args(argv))):
        print(f"done in {(time.time() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(print(f"train.py: error: {error}", file=sys.stderr) or 2)
