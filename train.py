r"""Train a network in latent space: settings, data, VAE, latents, loop, samples. The same command resumes.

    python train.py --arch dit --objective rf               # all from nothing, ten minutes on two cores
    python train.py --arch unet --objective ddpm --prediction v --data fashion-mnist
    python train.py --arch mmdit --objective rf --data shapes --cond text      # words instead of classes
    python train.py --arch vae --data FOLDER --image-size 128 192   # only the autoencoder
    python train.py --arch dit --data FOLDER --image-size 128 192
    python train.py --arch dit --objective ddpm --data FOLDER --image-size 256 --published dit-xl-2-256 \
        --init-from DiT-XL-2-256x256.pt --vae sd-vae-ft-ema/    # fine-tune

A run lives in runs/NAME: settings.json, metrics.jsonl, previews, loss.png, checkpoint.pt. A network without
--vae first trains the VAE of its data, as the run runs/DATA-HxW-vae, and shares it with every other network
on that data.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import shutil
import signal
import sys
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import dit
import unet
import vae as vae_file
from data import (Dataset, LatentCache, TextCache, batch_indices, batches, find_words, fingerprint_files,
                  fingerprint_tensors, grid, load_data, locked, read_embeddings, send, to_tensor, to_uint8)
from sample import (DRAW_DEFAULTS, MODELS, PUBLISHED, build_model, build_path, check_compiler,
                    check_published_vae, check_weights, draw, listen, load_checkpoint, load_vae, load_weights,
                    pick_device, read_published, unpack_vae)
from vae import VAEConfig

# What two cores can do in ten minutes, and with words in thirty where they multiply bf16; each entry
# can be overridden by its flag.
DEFAULTS = {
    "vae":  dict(steps=2000, batch_size=8, lr=2e-3, warmup=50, ema=0.99, weight_decay=0.0),
    "vae with words": dict(steps=4000, batch_size=8, lr=2e-3, warmup=50, ema=0.99, weight_decay=0.0),
    "dit":  dict(steps=2400, batch_size=64, lr=4e-3, warmup=100, ema=0.998, weight_decay=0.01),
    "mmdit": dict(steps=10500, batch_size=32, lr=1e-3, warmup=100, ema=0.998, weight_decay=0.01),
    "unet": dict(steps=2000, batch_size=64, lr=2e-3, warmup=100, ema=0.998, weight_decay=0.01),
    "unet with words": dict(steps=10000, batch_size=32, lr=1e-3, warmup=100, ema=0.998, weight_decay=0.01),
}
PRESETS = {"dit": dit.PRESETS, "mmdit": dit.MMDIT_PRESETS, "unet": unet.PRESETS}
SAMPLE_ROWS = 10   # of samples.png, a column per class
VAE_FLAGS = {"vae_preset": "small", "vae_widths": None, "latent_channels": 4, "kl_weight": 1e-5}
# Flags that may differ when a run is continued: where things are and how often we look, never what is learnt.
FREE = {"name", "runs_dir", "data_dir", "cache_dir", "device", "compile", "grad_checkpoint", "log_every",
        "val_every", "preview_every", "save_every"}
# Flags that mean something only under one value of another flag.
BELONGS = {"schedule": ("objective", "ddpm"), "min_snr": ("objective", "ddpm"),
           "zero_terminal_snr": ("objective", "ddpm"), "density": ("objective", "rf"),
           "density_mean": ("density", "logit_normal"), "density_std": ("density", "logit_normal"),
           "mode_scale": ("density", "mode"), "shift": ("objective", "rf"), "patch": ("arch", "dit mmdit"),
           "block": ("arch", "dit"), "conv": ("arch", "dit mmdit"), "text_encoder": ("cond", "text")}


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Train a VAE, or a DiT or U-Net in its latent space.")
    g = p.add_argument_group("what")
    g.add_argument("--arch", choices=MODELS, required=True, help="network; vae trains only the autoencoder")
    g.add_argument("--objective", choices=DRAW_DEFAULTS, default="rf", help="straight (default) or diffusion")
    g.add_argument("--prediction", choices=("velocity", "eps", "v", "x0"),
                   help="what the network returns (default: velocity for rf, eps for ddpm, but v with words)")
    g.add_argument("--name", help="run folder in --runs-dir "
                                  "(default: DATA-ARCH-OBJECTIVE, with the size unless 32x32)")
    g.add_argument("--runs-dir", default="runs", help="where runs live (default: runs)")
    g = p.add_argument_group("data")
    g.add_argument("--data", default="shapes",
                   help="shapes (default), emoji, fashion-mnist, mnist, cifar10, or a folder")
    g.add_argument("--data-dir", default="data",
                   help="IDX and CIFAR-10 files are or go here, or an emoji font (default: data)")
    g.add_argument("--image-size", type=int, nargs="+", metavar="N",
                   help="side, or height and width (default: 32)")
    g.add_argument("--flip", action="store_true", help="mirror pictures at random")
    g.add_argument("--cond", choices=("class", "text", "none"),
                   help="learn labels, captions or neither (default: text for mmdit, and for a unet on "
                        "emoji; else class)")
    g.add_argument("--text-encoder", metavar="KIND",
                   help="bytes (default): learnt; clip:FOLDER or t5:FOLDER: frozen, by transformers; none: a "
                        "folder's pictures have .npz files of vectors beside them")
    g.add_argument("--cache-dir", help="for decoded pictures and latents (default: the VAE's folder)")
    g = p.add_argument_group("network")
    g.add_argument("--preset", help="a row of PRESETS or MMDIT_PRESETS in dit.py, or of PRESETS in unet.py, "
                                    "like S/2 or sd1 (default: small)")
    g.add_argument("--patch", type=int, nargs="+", metavar="N",
                   help="dit, mmdit: patch side, or height and width")
    g.add_argument("--block", choices=("modern", "published"), help="dit: kind of block")
    g.add_argument("--conv", action="store_true",
                   help="dit, mmdit: a depthwise 3x3 convolution between the tokens in every MLP")
    g.add_argument("--vae", help="a trained VAE: run, checkpoint, published file or diffusers folder "
                                 "(default: this data's own)")
    g.add_argument("--init-from", metavar="PATH",
                   help="begin with the weights of this run or published file (default lr: 1e-4)")
    g.add_argument("--published", choices=PUBLISHED, metavar="NAME",
                   help="what the published file is, like dit-xl-2-256: gives network and objective")
    g = p.add_argument_group("VAE, where one is trained")
    g.add_argument("--vae-preset", choices=vae_file.PRESETS, help="row of PRESETS in vae.py (default: small)")
    g.add_argument("--vae-widths", type=int, nargs="+", metavar="N",
                   help="per level; all but the last halve the image")
    g.add_argument("--latent-channels", type=int, metavar="C", help="channels of the latent (default: 4)")
    g.add_argument("--kl-weight", type=float, help="weight of the KL term (default: 1e-5)")
    g.add_argument("--vae-steps", type=int, help="its steps, when trained on the way to another network")
    g = p.add_argument_group("objective")
    g.add_argument("--schedule", choices=("linear", "scaled_linear", "cosine"),
                   help="ddpm (default: scaled_linear)")
    g.add_argument("--min-snr", type=float, help="ddpm: gamma of the min-SNR loss weight (default: off)")
    g.add_argument("--zero-terminal-snr", action="store_true", help="ddpm: end the schedule in pure noise")
    g.add_argument("--density", choices=("uniform", "logit_normal", "mode", "cosmap"),
                   help="rf: where t is drawn (default: logit_normal)")
    g.add_argument("--density-mean", type=float, help="rf, logit_normal: m (default: 0)")
    g.add_argument("--density-std", type=float, help="rf, logit_normal: s (default: 1)")
    g.add_argument("--mode-scale", type=float, help="rf, mode: s (default: 1.29)")
    g.add_argument("--shift", type=float, help="rf: shift t toward noise, for larger pictures (default: 1)")
    g.add_argument("--label-dropout", type=float, default=0.1,
                   help="share of labels or captions dropped, for guidance (default: 0.1); 0: no guidance "
                        "later")
    g = p.add_argument_group("optimisation (defaults depend on --arch: DEFAULTS in this file)")
    g.add_argument("--steps", type=int, help="optimizer steps")
    g.add_argument("--batch-size", type=int, help="examples per optimizer step")
    g.add_argument("--accumulate", type=int, default=1, help="pieces a batch is cut into, to save memory")
    g.add_argument("--lr", type=float, help="peak learning rate of AdamW")
    g.add_argument("--warmup", type=int, help="steps of linear warm-up")
    g.add_argument("--cooldown", type=float, default=0.5,
                   help="last share of steps, falling to rate 0 (default: 0.5)")
    g.add_argument("--weight-decay", type=float, help="of matrices; never of norms, biases and gains")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm (default: 1)")
    g.add_argument("--ema", type=float, help="decay of the averaged weights, after its warm-up")
    g.add_argument("--seed", type=int, default=0, help="of weights, order and noise (default: 0)")
    g = p.add_argument_group("machine and output")
    g.add_argument("--device", default="auto", help="auto (default), cpu, cuda, cuda:1, mps")
    g.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto",
                   help="bf16 where there is hardware")
    g.add_argument("--compile", action="store_true", help="torch.compile the network, block by block")
    g.add_argument("--grad-checkpoint", action="store_true",
                   help="keep only what enters each block, and compute it again on the way back: less memory")
    g.add_argument("--log-every", type=int, default=20, help="steps per line of metrics.jsonl (default: 20)")
    g.add_argument("--val-every", type=int, default=500, help="steps between validations (default: 500)")
    g.add_argument("--preview-every", type=int, default=1000, help="steps between previews (default: 1000)")
    g.add_argument("--save-every", type=int, default=500, help="steps between checkpoints (default: 500)")
    return p.parse_args(argv)


def resolve(args: argparse.Namespace) -> argparse.Namespace:
    """Refuse what contradicts itself and fill in what depends on other flags, before anything is written."""
    def flag(name: str) -> str:
        value = getattr(args, name)
        return f"--{name.replace('_', '-')} {' '.join(map(str, value)) if isinstance(value, list) else value}"

    for name in ("vae", "init_from"):
        if getattr(args, name) == "":
            raise ValueError(f"--{name.replace('_', '-')} is empty; give a path, or leave it out")
    for name in ("image_size", "patch"):
        if (sides := getattr(args, name)) and (len(sides) > 2 or min(sides) < 1):
            raise ValueError(f"{flag(name)}: give one side, or height and width")
    side = PUBLISHED[args.published]["side"] if args.published else 32
    args.image_size = [args.image_size[0], args.image_size[-1]] if args.image_size else [side, side]
    counts = ("steps", "vae_steps", "batch_size", "accumulate", "latent_channels", "log_every", "val_every",
              "preview_every", "save_every")
    ranges = ({name: (1, 10**9) for name in counts} | {"lr": (1e-12, 1e3), "clip": (1e-12, math.inf)}
              | {name: (0, 1) for name in ("label_dropout", "cooldown", "ema")}
              | {name: (0, 1e9) for name in ("warmup", "weight_decay", "kl_weight", "min_snr", "shift",
                                             "density_std")}
              | {"seed": (0, 2**62), "density_mean": (-100, 100), "mode_scale": (-1, 2)})
    for name, (low, high) in ranges.items():
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            raise ValueError(f"{flag(name)}: must be " + (f"between {low} and {high}" if high < math.inf else
                                                          f"at least {low}"))
    default = "text" if args.arch == "mmdit" or (args.arch == "unet" and args.data == "emoji") else "class"
    args.cond = args.cond or default
    if (args.arch == "dit" and args.cond == "text") or (args.arch == "mmdit" and args.cond != "text"):
        raise ValueError(f"{flag('cond')}: --arch {args.arch} listens to "
                         + ("classes; mmdit and unet listen to words" if args.arch == "dit" else
                            "words (--cond text), which may be the names of classes"))
    encoder, _, path = (args.text_encoder or "bytes").partition(":")
    if encoder not in ("bytes", "clip", "t5", "none") or bool(path) != (encoder in ("clip", "t5")):
        raise ValueError(f"{flag('text_encoder')}: must be bytes, clip:FOLDER, t5:FOLDER or none")
    given = {name for name, value in vars(args).items() if value is not None and value is not False}
    kind = vars(args) | {"density": args.density or ("logit_normal" if args.objective == "rf" else None)}
    for name, (group, owner) in BELONGS.items():
        if name in given and kind[group] not in owner.split():
            raise ValueError(f"{flag(name)}: belongs to --{group} {owner.replace(' ', ' or ')}, not "
                             f"{kind[group]}")
    for name in ("vae", "preset", "vae_steps", "init_from", "published", "prediction", *BELONGS):
        if args.arch == "vae" and name in given:
            raise ValueError(f"{flag(name)}: for a network in latent space; "
                             "--arch vae has --vae-preset and --steps")
    if args.published:
        row = PUBLISHED[args.published]
        if not (args.init_from and args.vae):
            raise ValueError(f"{flag('published')}: needs --init-from FILE, its weights, and --vae PATH")
        if args.arch != "dit" or args.objective != row["objective"]["name"]:
            raise ValueError(f"{flag('published')}: is --arch dit --objective {row['objective']['name']}")
        for name in ("preset", "prediction", *BELONGS):
            if name in given:
                raise ValueError(f"{flag(name)}: settled by --published {args.published}; "
                                 "give one or the other")
    for name in (*VAE_FLAGS, "vae_steps"):
        if args.vae and getattr(args, name) is not None:
            raise ValueError(f"{flag(name)}: --vae {args.vae} is trained already; give one or the other")

    words = f"{args.arch} with words" if args.cond == "text" else args.arch
    defaults = DEFAULTS.get(words, DEFAULTS[args.arch]) | ({"lr": 1e-4} if args.init_from else {})
    for name, value in (defaults | (VAE_FLAGS if args.arch == "vae" else {})).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.batch_size % args.accumulate:
        raise ValueError(f"{flag('accumulate')}: does not divide the batch of {args.batch_size}")
    if args.arch != "vae":
        args.preset = args.preset or "small"
        if args.preset not in PRESETS[args.arch]:
            raise ValueError(f"{flag('preset')}: {args.arch} has {', '.join(PRESETS[args.arch])}")
    if args.cond == "text" and args.arch != "vae":
        args.text_encoder = args.text_encoder or "bytes"
        if args.objective == "ddpm":   # words matter where noise is strong, and eps nearly known
            args.prediction = args.prediction or "v"
    stem = Path(args.data).name or "data"
    stem += "-text" if shows_scenes(args) else ""
    stem += "" if args.image_size == [32, 32] else "-{}x{}".format(*args.image_size)
    args.vae_name = f"{stem}-vae"
    args.name = args.name or (args.vae_name if args.arch == "vae" else f"{stem}-{args.arch}-{args.objective}")
    return args


def shows_scenes(args: argparse.Namespace) -> bool:
    """Shapes with words are other pictures than those with classes."""
    return (args.data, args.cond) == ("shapes", "text")


def objective_of(args: argparse.Namespace) -> dict:
    if args.published:
        return PUBLISHED[args.published]["objective"]
    options = ({"density": args.density, "mean": args.density_mean, "std": args.density_std,
                "mode_scale": args.mode_scale, "shift": args.shift} if args.objective == "rf" else
               {"schedule": args.schedule, "min_snr": args.min_snr,
                "zero_terminal_snr": args.zero_terminal_snr})
    options["prediction"] = args.prediction
    return {"name": args.objective, **{name: value for name, value in options.items() if value is not None}}


def vae_config(args: argparse.Namespace, image_channels: int) -> dict:
    preset, widths, channels, _ = (default if getattr(args, name) is None else getattr(args, name)
                                   for name, default in VAE_FLAGS.items())
    config = vae_file.PRESETS[preset] | {"image_channels": image_channels, "latent_channels": channels}
    return config | ({"widths": tuple(widths)} if widths else {})


def network_config(args: argparse.Namespace, latent_channels: int, num_classes: int,
                   text_widths: tuple[int | None, int | None]) -> dict:
    """text_widths: of the encoder's context and pooled vectors, where there are any."""
    if args.published:
        return PUBLISHED[args.published]["config"] | {"channels": latent_channels, "num_classes": num_classes}
    config = PRESETS[args.arch][args.preset] | {"channels": latent_channels}
    if args.arch == "mmdit":
        config |= {"context_width": text_widths[0], "pooled_width": text_widths[1], "guidance": False}
    else:
        config |= {"num_classes": num_classes}
    if args.arch == "unet":       # Stable Diffusion 1 and 2, which have a width of their own, pool nothing
        if text_widths[0] and not config.get("context_width"):
            levels = len(unet.UNetConfig(**config).widths)   # words reach them all, and say where things are
            config |= {"pooled_width": text_widths[1], "attention": (True,) * levels, "positions": True}
        config |= {"context_width": text_widths[0]}
    config |= {"patch": (args.patch[0], args.patch[-1])} if args.patch else {}
    config |= dit.PUBLISHED if args.block == "published" else {}
    return config | ({"conv": True} if args.conv else {})


def initial_weights(args: argparse.Namespace) -> dict[str, Tensor]:
    """What --init-from holds, by our names: a published file, or a run of this project."""
    path = Path(args.init_from)
    try:
        checkpoint = load_checkpoint(path)
    except ValueError:
        if not args.published or path.is_dir():
            raise
        return read_published(args.published, args.init_from)
    if checkpoint["arch"] != args.arch:
        raise ValueError(f"--init-from {args.init_from}: is a {checkpoint['arch']}, not a {args.arch}")
    if args.published and checkpoint["objective"] != PUBLISHED[args.published]["objective"]:
        raise ValueError(f"--init-from {args.init_from}: was trained with {checkpoint['objective']}, not as "
                         f"--published {args.published}")
    return checkpoint["ema"]


def fit_weights(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> dict[str, Tensor]:
    """state for this model: strictly the same, but where the classes are others, their table begins anew."""
    own, state = model.state_dict(), dict(state)
    for name in ("y_embedder.embedding_table.weight", "class_embedding.weight"):
        if name not in own:
            state.pop(name, None)
        elif name not in state or state[name].shape != own[name].shape:
            state[name] = own[name]
    check_weights(model, state, what)
    return state


def text_of(args: argparse.Namespace) -> dict | None:
    """What the checkpoint will say of the encoder of words."""
    if args.arch == "vae" or args.cond != "text":
        return None
    kind, _, path = args.text_encoder.partition(":")
    config = dit.TEXT_PRESETS.get(args.preset, {})
    return {"encoder": kind} | ({"config": asdict(dit.TextConfig(**config))} if kind == "bytes" else
                                {"path": path} if path else {})


def warn_of_cut(encoder, captions: list[str]) -> None:
    if cut := [rest for rest in map(encoder.cut, captions) if rest]:
        print(f"train.py: warning: {len(cut):,} of {len(captions):,} captions are longer than is read; "
              f"of the first of them, cut off: {cut[0]!r}", file=sys.stderr)


def text_widths(text: dict | None, encode) -> tuple[int | None, int | None]:
    """Of the context and of the pooled vector; None where there is none."""
    if text is None:
        return None, None
    if text["encoder"] == "bytes":
        return (text["config"]["width"],) * 2
    cond = encode([""])
    return cond["context"].shape[-1], cond["pooled"].shape[-1] if "pooled" in cond else None


def check_networks(args: argparse.Namespace, vae: VAEConfig, text: dict | None, widths: tuple,
                   initial: dict[str, Tensor] | None) -> None:
    """Build the networks without memory and check the sides of the picture against every halving and patch on
    the way, so that what cannot work is said before the VAE takes its minutes."""
    factors = {"VAE": (2 ** (len(vae.widths) - 1),) * 2}
    with torch.device("meta"):
        build_model("vae", asdict(vae))
        if args.arch != "vae":
            config = network_config(args, vae.latent_channels, 0, widths)
            network = build_model(args.arch, config, text)
            if initial is not None:
                fit_weights(network, initial, args.init_from)
            factors[args.arch] = (network.factor,) * 2 if args.arch == "unet" else network.config.patch
    need = [math.prod(pair[axis] for pair in factors.values()) for axis in (0, 1)]
    if any(side % multiple for side, multiple in zip(args.image_size, need)):
        why = ", ".join(f"{name} {h}x{w}" for name, (h, w) in factors.items())
        raise ValueError("--image-size {} {}: height must be a multiple of {} and width of {} ({})".format(
            *args.image_size, *need, why))


@contextmanager
def hold(run: Path):
    """Hold the run folder for this process."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(run / "lock"))
        except BlockingIOError:
            raise ValueError(f"{run}: another process is training in this folder; wait for it, "
                             "or use another --name") from None
        yield


def write_atomically(path: Path, write) -> None:
    """write(file) into a temporary name, flush to disk, rename: always the old file or the new, whole."""
    partial = path.with_name(path.name + ".part")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:   # torch reports a full disk as RuntimeError of its own words
        free = shutil.disk_usage(path.parent).free / 2**20
        partial.unlink(missing_ok=True)
        message = f"cannot write {path} ({free:.0f} MiB left on the device): {error}"
        raise OSError(message.splitlines()[0]) from None


def read_settings(file: Path) -> dict:
    try:
        return dict(json.loads(file.read_text()))
    except (ValueError, TypeError):
        raise ValueError(f"{file}: damaged; restore it, or use another --name") from None


def check_settings(args: argparse.Namespace, file: Path) -> None:
    """Refuse a folder that holds a run of other settings."""
    found = read_settings(file) if file.is_file() else vars(args)

    def kept(name: str, value):        # a frozen encoder may move; what it says is compared later
        return value.partition(":")[0] if name == "text_encoder" and isinstance(value, str) else value

    for name in sorted(set(vars(args)) - FREE):
        if kept(name, found.get(name)) != kept(name, getattr(args, name)):
            raise ValueError(f"{file.parent} holds a run with --{name.replace('_', '-')} {found.get(name)}, "
                             f"not {getattr(args, name)}; repeat its settings to continue it, "
                             "or use another --name")


def vae_arguments(args: argparse.Namespace) -> argparse.Namespace:
    """The settings of the VAE run that a network shares with all others on its data."""
    folder, vae_args = Path(args.runs_dir) / args.vae_name, parse_args(["--arch", "vae"])
    given = {name: getattr(args, name) for name in VAE_FLAGS} | {"steps": args.vae_steps}
    if (folder / "settings.json").is_file():       # whoever began it chose its settings
        found = read_settings(folder / "settings.json")
        for name, value in ({"data": args.data, "image_size": args.image_size} | given).items():
            if value is not None and value != found.get(name):
                raise ValueError(f"{folder} holds a VAE with {name.replace('_', '-')} {found.get(name)}, not "
                                 f"{value}; train one by --arch vae --name NAME and give it by --vae, "
                                 "or remove that folder")
        vars(vae_args).update(found)
    else:
        shared = ("data", "image_size", "flip", "precision", "seed")
        vars(vae_args).update(given | {name: getattr(args, name) for name in shared}
                              | {"cond": "text" if shows_scenes(args) else "class"})
        resolve(vae_args)
    vars(vae_args).update({name: getattr(args, name) for name in FREE} | {"name": args.vae_name})
    return vae_args


def learning_rate(step: int, args: argparse.Namespace) -> float:
    """Linear warm-up, a plateau, a linear fall to zero over the last `cooldown` share."""
    left = (args.steps - step) / max(1.0, args.cooldown * args.steps)
    return args.lr * min(1.0, (step + 1) / max(1, args.warmup), left)


def plot_loss(path: Path, records: list[dict]) -> None:
    """Training loss (running mean) and validation loss over steps, logarithmic, drawn with Pillow."""
    curves, smooth = {"train": [], "validation": []}, None
    for record in records:
        if "loss" in record:
            smooth = record["loss"] if smooth is None else 0.7 * smooth + 0.3 * record["loss"]
            curves["train"].append((record["step"], smooth))
        elif "val_loss" in record:
            curves["validation"].append((record["step"], record["val_loss"]))
    points = [(step, max(value, 1e-9)) for curve in curves.values() for step, value in curve]
    if not points:
        return
    last, low, high = max(s for s, _ in points), min(v for _, v in points), 1.05 * max(v for _, v in points)
    width, height, left, right, top, bottom = 900, 420, 70, 30, 30, 40
    image = Image.new("RGB", (width, height), "white")
    pen = ImageDraw.Draw(image)

    def place(step: float, value: float) -> tuple[float, float]:
        return (left + step / last * (width - left - right),
                height - bottom
                - math.log(max(value, 1e-9) / low) / math.log(high / low) * (height - bottom - top))

    for i in range(5):
        value, step = low * (high / low) ** (i / 4), last * i / 4
        pen.line([place(0, value), place(last, value)], fill="#dddddd")
        pen.text((8, place(0, value)[1] - 6), f"{value:.3g}", fill="black")
        pen.text((place(step, low)[0] - 10, height - bottom + 10), f"{step:.0f}", fill="black")
    for (name, curve), colour, x in zip(curves.items(), ("#1f77b4", "#d62728"), (left, left + 60)):
        pen.text((x, 8), name, fill=colour)
        pen.line([place(*point) for point in curve], fill=colour, width=2)
    write_atomically(path, lambda file: image.save(file, "PNG"))


def describe(record: dict) -> str:
    """A validation record as a line for the terminal."""
    parts = [f"step {record['step']:,}: validation loss {record['val_loss']:.4f}"]
    parts += [f"PSNR {record['psnr']:.1f} dB, KL {record['kl']:.0f} nats, latent std "
              + " ".join(f"{std:.2f}" for std in record["latent_std"])] if "psnr" in record else []
    parts += ["by time " + "  ".join(f"{name} {loss:.3f}" for name, loss in record["val_by_time"].items())
              ] if "val_by_time" in record else []
    return ", ".join(parts)


class Autoencoding:
    """What the loop asks of a task, answered for the VAE: the loss of a batch, the validation, a preview."""

    def __init__(self, args: argparse.Namespace, data: Dataset, val: Dataset, device: torch.device):
        self.args, self.data, self.device = args, data, device
        self.val = to_tensor(val.images[:256]).to(device)

    def loss(self, model: vae_file.VAE, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B,) loss and (B,) times, of which a VAE has none."""
        x = to_tensor(self.data.images[indices])
        if self.args.flip:
            x = torch.where(torch.rand(len(x), 1, 1, 1) < 0.5, x.flip(-1), x)
        loss, _ = model.loss(send(x, self.device), self.args.kl_weight)
        return loss, loss.new_zeros(len(x))

    def validate(self, model: vae_file.VAE) -> dict:
        generator, parts = torch.Generator(self.device).manual_seed(0), []
        for batch in batches((len(self.val), *self.val.shape[2:], 1)):
            loss, logs = model.loss(self.val[batch.start:batch.stop], self.args.kl_weight, generator)
            parts.append((len(batch), {"val_loss": loss.mean()} | logs))
        return {k: (sum(n * part[k] for n, part in parts) / len(self.val)).tolist() for k in parts[0][1]}

    def preview(self, model: vae_file.VAE) -> Image.Image:
        """Pictures, each with its reconstruction below."""
        x = self.val[:32]
        rows = [torch.cat([a, model.decode(model.encode(a).mean)]) for a in x.split(16)]
        return grid(to_uint8(torch.cat(rows)), columns=min(16, len(x)))


BLOCKS = (dit.Block, dit.JointBlock, dit.SingleBlock, dit.TextBlock, unet.ResnetBlock,
          unet.SpatialTransformer, vae_file.ResnetBlock)


def compile_blocks(model: torch.nn.Module, **options) -> None:
    """torch.compile each block in place, so that the names of the weights stay as they are. Blocks of one
    kind share what is compiled, and from their second size on it is compiled for any size."""
    torch._dynamo.config.cache_size_limit = 64     # a U-Net's blocks have many widths
    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.compile(**options)


def checkpoint_blocks(model: torch.nn.Module) -> None:
    """Gradient checkpointing: a block keeps what enters it and runs again on the way back (Chen et al. 2016,
    arXiv:1604.06174)."""
    def recomputed(forward):       # a function, as torch.compile skips a partial
        def again(*inputs, **more):
            return checkpoint(forward, *inputs, use_reentrant=False, preserve_rng_state=False, **more)
        return again

    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.forward = recomputed(block.forward)


class Denoising:
    """The same for a network in latent space."""

    def __init__(self, args: argparse.Namespace, cache: LatentCache, data: Dataset, val: Dataset,
                 vae: vae_file.VAE, objective: dict, num_classes: int, encode: TextCache | None,
                 device: torch.device):
        self.args, self.cache, self.vae, self.num_classes, self.device = args, cache, vae, num_classes, device
        self.path, self.draw_defaults = build_path(objective), DRAW_DEFAULTS[objective["name"]]
        self.encode, self.vary = encode, data.vary if encode is None else None   # a frozen one has seen none
        self.captions, self.val_captions = ((data.captions, val.captions[:256]) if args.cond == "text" else
                                            (None, None))
        # Validation: fixed pictures, noise and times, spread evenly: each bucket is a quarter of the way.
        with torch.no_grad():
            pictures = to_tensor(val.images[:256]).split(32)
            self.x0 = torch.cat([vae.normalize(vae.encode(x.to(device)).mean) for x in pictures])
        n, generator = len(self.x0), torch.Generator().manual_seed(0)
        self.t = ((torch.arange(n) + 0.5) / n)[torch.randperm(n, generator=generator)].to(device)
        self.eps = torch.randn(self.x0.shape, generator=generator).to(device)
        self.val_labels = torch.from_numpy(val.labels[:256]) if num_classes else None

    def condition(self, model: torch.nn.Module, labels: Tensor | None,
                  prompts: list[str]) -> dict[str, Tensor]:
        """What the network is told: labels, prompts, or nothing."""
        if self.captions:
            return listen(model, self.encode or model.text, prompts)
        return {"y": send(labels, self.device)} if self.num_classes else {}

    def prompt(self, index: int, drop: bool) -> str:
        caption = "" if drop else self.captions[index]
        if self.vary and not drop:
            caption = self.vary(caption, np.random.default_rng(torch.randint(2**31, ()).item()))
        return caption

    def loss(self, model: torch.nn.Module, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B,) loss and (B,) times that it was taken at."""
        z, labels = self.cache.batch(indices)
        x0 = self.vae.normalize(send(z, self.device))
        drop = torch.rand(len(z)) < self.args.label_dropout               # each label or caption on its own
        labels = torch.where(drop, self.num_classes, labels) if self.num_classes else None
        prompts = [self.prompt(i, d) for i, d in zip(indices, drop.tolist())] if self.captions else []
        t = send(self.path.sample_t(len(x0)), self.device)
        return self.path.loss(model, x0, t=t, **self.condition(model, labels, prompts)), t

    def validate(self, model: torch.nn.Module) -> dict:
        cond = self.condition(model, self.val_labels, self.val_captions)
        loss, quarter = self.path.loss(model, self.x0, t=self.t, eps=self.eps, **cond), (self.t * 4).long()
        buckets = {f"{i / 4}-{(i + 1) / 4}": loss[quarter == i].mean().item()
                   for i in quarter.unique().tolist()}
        return {"val_loss": loss.mean().item(), "val_by_time": buckets}

    def preview(self, model: torch.nn.Module, rows: int = 3) -> Image.Image:
        """Samples, a column per class, or one for each of the first captions of the validation part;
        guidance 2 where the run is trained for it."""
        columns = min(self.num_classes, 24) or 8
        turn = torch.arange(rows * columns)
        if self.captions:
            turn = turn % len(self.val_captions)
            every = listen(model, self.encode or model.text, [*self.val_captions[:rows * columns], ""])
        else:
            turn = turn % max(1, self.num_classes)
            every = {"y": torch.arange(self.num_classes + 1, device=self.device)} if self.num_classes else {}
        images = []
        for i in range(0, len(turn), 64):
            seeds = range(i, min(i + 64, len(turn)))
            cond, uncond = ({name: part[which] for name, part in every.items()}
                            for which in (turn[i:i + 64], [-1] * len(seeds)))
            images.append(draw(model, self.vae, self.path, self.x0.shape[1:], seeds, cond, uncond,
                               scale=2.0 if every and self.args.label_dropout > 0 else 1.0,
                               **self.draw_defaults))
        captions = [self.val_captions[i] for i in turn] if self.captions else None
        return grid(np.concatenate(images), columns, captions=captions)


def encode(vae: vae_file.VAE, data: Dataset, args: argparse.Namespace, cache_dir: Path) -> LatentCache:
    encoder = {name: weight for name, weight in vae.state_dict().items()
               if name.startswith(("encoder.", "quant_conv.", "patch_encoder."))}
    device = next(vae.parameters()).device
    return LatentCache(cache_dir / "latents.npy", vae, fingerprint_tensors(encoder), data, args.flip, device)


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself."""
    if device.type == "cpu":
        return getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def train(args: argparse.Namespace) -> bool:
    """Train or continue one run. True when it is finished, False when a signal interrupted it."""
    # ---- refuse early what cannot work; nothing is written yet
    is_vae, run = args.arch == "vae", Path(args.runs_dir) / args.name
    file, settings = run / "checkpoint.pt", run / "settings.json"
    check_settings(args, settings)
    device, objective = pick_device(args.device), None if is_vae else objective_of(args)
    if objective:
        build_path(objective)
    if args.compile:
        check_compiler(device)
    # a run that has begun holds its VAE and its first weights itself
    begun = file.is_file()
    vae = None if not args.vae else unpack_vae(load_checkpoint(file)["vae"]) if begun else load_vae(args.vae)
    if args.published and not begun:
        check_published_vae(args.published, vae, args.vae)
    vae_args = args if is_vae else None if vae else vae_arguments(args)
    initial = initial_weights(args) if args.init_from and not begun else None
    text, encoder = text_of(args), None
    if text and "path" in text:
        encoder = dit.PublishedTextEncoder(text["encoder"], text["path"], device)
    precomputed = text is not None and text["encoder"] == "none"
    words = "embeddings" if precomputed else "captions" if args.cond == "text" else None
    found = find_words(args.data, words)
    widths = text_widths(text, (lambda _: read_embeddings(found[:1])) if precomputed else encoder)
    check_networks(args, vae.config if vae else VAEConfig(**vae_config(vae_args, 3)), text, widths, initial)
    bf16 = args.precision == "bf16" or (args.precision == "auto" and has_bf16(device))
    number_format = "bf16 autocast" if bf16 else "fp32"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"

    def autocast():
        return torch.autocast(device.type, torch.bfloat16, enabled=bf16)

    # ---- the VAE first, then data
    if vae_args is not None and vae_args is not args:
        if not train(vae_args):
            return False
        vae = load_vae(Path(vae_args.runs_dir) / vae_args.name)
    # a VAE from elsewhere keeps its own folder; that of this data shares its cache with every network
    home = run if is_vae or args.vae else Path(vae_args.runs_dir) / vae_args.name
    cache_dir = Path(args.cache_dir) if args.cache_dir else home
    data, val = (load_data(args.data, split, tuple(args.image_size), Path(args.data_dir), cache_dir,
                           words=words) for split in ("train", "val"))
    if vae and vae.config.image_channels != data.images.shape[-1]:
        raise ValueError(f"--vae {args.vae}: for pictures of {vae.config.image_channels} channels; those of "
                         f"--data {args.data} have {data.images.shape[-1]}")
    num_classes = len(data.classes) if args.cond == "class" and not is_vae else 0

    with hold(run):
        if not settings.is_file():
            write_atomically(settings, lambda f: f.write(json.dumps(vars(args), indent=1).encode()))
        saved = load_checkpoint(file) if file.is_file() else None
        if saved and saved["training"]["data"] != data.identity:
            raise ValueError(f"--data {args.data}: changed since {run} began; "
                             "use another --name for what is there now")
        if saved and saved["training"]["finished"]:
            print(f"{run} is finished: {saved['step']:,} steps")
            return True

        # ---- network, averaged weights, optimizer
        if not is_vae:
            vae = (unpack_vae(saved["vae"]) if saved else vae).to(device)   # the VAE that the run began with
            cache = encode(vae, data, args, cache_dir)
        table = fingerprint = None                         # of what a frozen encoder says
        if precomputed or encoder is not None:
            fingerprint = fingerprint_files(Path(args.data if precomputed else text["path"]),
                                            "*.npz" if precomputed else "*.*")
            if saved and saved["training"].get("encoder", fingerprint) != fingerprint:
                raise ValueError(f"--text-encoder {args.text_encoder}: not the files that {run} began with; "
                                 "give those, or use another --name")
            prompts = [*data.captions, *val.captions[:256]]
            table = TextCache(cache_dir / f"text-{text['encoder']}.bin", prompts, encoder or read_embeddings,
                              fingerprint, device)
        torch.manual_seed(args.seed)
        config = (vae_config(args, data.images.shape[-1]) if is_vae else
                  network_config(args, vae.config.latent_channels, num_classes, text_widths(text, table)))
        model = build_model(args.arch, config, text).to(device)
        if text and not precomputed and not saved:
            warn_of_cut(encoder or model.text, data.captions)
        encoder = None                                     # gigabytes, perhaps
        if initial is not None and not saved:
            load_weights(model, fit_weights(model, initial, args.init_from), args.init_from)
        initial = None                                     # gigabytes, perhaps
        if is_vae or (device.type == "cuda" and args.arch == "unet"):   # a bf16 U-Net on the CPU is slower so
            model = model.to(memory_format=torch.channels_last)
        ema = copy.deepcopy(model).eval().requires_grad_(False)
        matrices = [p for p in model.parameters() if p.ndim > 1]
        others = [p for p in model.parameters() if p.ndim <= 1]
        # betas: 0.999 would average over more steps than a short run has
        optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": args.weight_decay},
                                       {"params": others, "weight_decay": 0.0}],
                                      lr=args.lr, fused=device.type != "mps", betas=(0.9, 0.95))
        task = (Autoencoding(args, data, val, device) if is_vae else
                Denoising(args, cache, data, val, vae, objective, num_classes, table, device))
        if args.grad_checkpoint:
            checkpoint_blocks(model)
        if args.compile:
            compile_blocks(model)

        # ---- resume
        start = 0
        if saved:
            start = saved["step"]
            load_weights(model, saved["model"], str(file))
            load_weights(ema, saved["ema"], str(file))
            optimizer.load_state_dict(saved["training"]["optimizer"])
            torch.set_rng_state(saved["training"]["rng"])
            if device.type == "cuda" and saved["training"]["cuda_rng"] is not None:
                torch.cuda.set_rng_state(saved["training"]["cuda_rng"], device)

        def save(step: int, finished: bool = False) -> None:
            write_atomically(file, lambda f: torch.save({
                "arch": args.arch, "config": asdict(model.config), "objective": objective, "step": step,
                "data": {"source": args.data, "size": args.image_size,
                         "classes": data.classes if num_classes else [],
                         "prompts": val.captions[:64] if text else []},
                "text": text, "label_dropout": args.label_dropout if num_classes or text else 0.0,
                "vae": None if is_vae else {"config": asdict(vae.config), "state": vae.state_dict()},
                "model": model.state_dict(), "ema": ema.state_dict(),
                "training": {"optimizer": optimizer.state_dict(), "data": data.identity,
                             "encoder": fingerprint, "finished": finished, "rng": torch.get_rng_state(),
                             "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None},
            }, f))

        metrics = run / "metrics.jsonl"            # lines later than the checkpoint will be written again
        records = []
        for line in metrics.read_text().splitlines() if metrics.is_file() else ():
            with suppress(ValueError):             # a line cut short by a kill
                records.append(json.loads(line))
        records = [record for record in records if record["step"] <= start]
        write_atomically(metrics, lambda f: f.write("".join(json.dumps(r) + "\n" for r in records).encode()))
        if not saved:
            save(0)
        print(f"{run}: {args.arch} with {sum(p.numel() for p in model.parameters()) / 1e6:.1f} M parameters "
              f"on {len(data):,} pictures; {device.type}, {number_format}; "
              f"step {start:,} of {args.steps:,}", flush=True)

        # ---- the loop
        pending: list[Tensor] = []     # per step: loss, gradient norm, first and last time; read now and then

        def read_pending(done: int) -> dict:
            values = torch.stack(pending).tolist()
            pending.clear()
            for step, (loss, norm, low, high) in enumerate(values, done + 1 - len(values)):
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    raise FloatingPointError(
                        f"loss {loss} with gradient norm {norm} at step {step}, times {low:.3f} "
                        f"to {high:.3f}, {number_format}: stopped. {file} holds the last good weights; "
                        f"begin another --name with a lower --lr" + (" or --precision fp32" if bf16 else ""))
            return {"loss": sum(v[0] for v in values) / len(values),
                    "grad_norm": sum(v[1] for v in values) / len(values)}

        def record(entry: dict) -> None:
            records.append(entry)
            with open(metrics, "a") as out:
                out.write(json.dumps(entry) + "\n")

        stop: list[int] = []
        handlers = {s: signal.signal(s, lambda number, _: stop.append(number))
                    for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.name, unit="step",
                       mininterval=0.5)
            for step in bar:
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, args)
                model.train()
                losses, times = [], []
                for indices in np.split(batch_indices(len(data), args.batch_size, step, args.seed),
                                        args.accumulate):
                    with autocast():
                        loss, t = task.loss(model, indices)
                    (loss.mean() / args.accumulate).backward()
                    losses.append(loss.detach().mean())
                    times.append(t)
                norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.clip)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                decay = min(args.ema, (step + 1) / (step + 10))   # short at first, so that early weights fade
                with torch.no_grad():
                    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
                times = torch.cat(times)
                pending.append(torch.stack([torch.stack(losses).mean(), norm, times.min(), times.max()]))

                done, last = step + 1, step + 1 == args.steps or bool(stop)
                log, validate, preview, checkpoint = (last or done % every == 0 for every in (
                    args.log_every, args.val_every, args.preview_every, args.save_every))
                if log or validate or preview or checkpoint:
                    entry = {"step": done, **read_pending(done), "lr": learning_rate(step, args)}
                    bar.set_postfix(loss=f"{entry['loss']:.4f}")
                    record(entry)
                model.eval()
                with torch.no_grad(), autocast():
                    if validate:
                        record({"step": done, **task.validate(ema)})
                        bar.write(describe(records[-1]))
                    if preview and not stop:
                        for name, network in (("ema", ema), ("raw", model)):
                            picture = task.preview(network)
                            write_atomically(run / f"preview-{done:06d}-{name}.png",
                                             lambda f: picture.save(f, "PNG"))
                        plot_loss(run / "loss.png", records)
                if checkpoint:
                    save(done)
                if stop:
                    bar.close()
                    print(f"stopped at step {done:,} of {args.steps:,}, saved; the same command continues",
                          flush=True)
                    return False
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

        # ---- what a finished run leaves
        if is_vae:               # the scale of the latents: measured once, with the weights that will be used
            statistics = encode(ema, data, args, cache_dir).statistics()
            for network in (ema, model):
                network.set_latent_statistics(*statistics)
        with torch.no_grad():
            picture = task.preview(ema) if is_vae else task.preview(ema, rows=SAMPLE_ROWS)
        write_atomically(run / "samples.png", lambda f: picture.save(f, "PNG"))
        plot_loss(run / "loss.png", records)
        save(args.steps, finished=True)
    return True


def main(argv: list[str] | None = None) -> None:
    started, args = time.time(), resolve(parse_args(argv))
    if not train(args):
        return
    run, defaults = Path(args.runs_dir) / args.name, DRAW_DEFAULTS[args.objective]
    print(f"{run / 'samples.png'}, {run / 'loss.png'} after {(time.time() - started) / 60:.1f} minutes")
    if args.arch != "vae":
        data, text, dropout = (load_checkpoint(run)[key] for key in ("data", "text", "label_dropout"))
        what = (f" --label {data['classes'][0]}" if data["classes"] else
                f" --embedding {data['prompts'][0]}" if text and text["encoder"] == "none" else
                f' --prompt "{data["prompts"][0]}"' if text else "")
        print(f"more: python sample.py {run}{what} --n 64 --sampler {defaults['sampler']} "
              f"--steps {defaults['steps']}" + (" --cfg 2" if dropout else "") + " --seed 0 --out grid.png")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(print(f"train.py: error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:                    # outside the loop; inside it, the step is finished and saved
        sys.exit(print("train.py: interrupted; the same command continues", file=sys.stderr) or 130)
