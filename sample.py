"""Draw pictures from a run: grids, single files, an .npz for evaluation, or a film of the way from noise.

    python sample.py runs/shapes-dit-rf --label red-circle --n 64 --steps 10 --cfg 2 --seed 0 --out grid.png
    python sample.py runs/shapes-dit-rf --n 50000 --batch-size 500 --out samples.npz
    python sample.py --published dit-xl-2-256 --weights DiT-XL-2-256x256.pt --vae sd-vae-ft-ema/ --n 1

One checkpoint says everything: network, objective, data shape, class names, VAE, raw and EMA weights; of a
published model, its row in PUBLISHED and the files that you have downloaded. Picture i is drawn by a
generator of its own, seeded with seed + i, so it does not depend on the batch size or on how many are drawn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shutil
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import dit
import vae as vae_file
from data import clean, grid, open_image, read_embeddings, to_tensor, to_uint8
from ddpm import DDPM
from dit import DiT, DiTConfig, MMDiT, MMDiTConfig, PublishedTextEncoder, TextConfig, TextEncoder
from rectified_flow import RectifiedFlow
from samplers import SAMPLERS, guided, inpainting, karras_times, log_snr_times, noise_like
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

MODELS = {"dit": (DiT, DiTConfig), "mmdit": (MMDiT, MMDiTConfig), "unet": (UNet, UNetConfig),
          "vae": (VAE, VAEConfig)}
PATHS = {"rf": RectifiedFlow, "ddpm": DDPM}
# 19 and 50 evaluations of the network
DRAW_DEFAULTS = {"rf": dict(sampler="heun", steps=10), "ddpm": dict(sampler="ddim", steps=50)}
# How times are spread: the path's own spacings, or evenly in something else
TIMES = {"even": lambda path, steps: path.times(steps),
         "leading": lambda path, steps: path.times(steps, "leading"),
         "linspace": lambda path, steps: path.times(steps, "linspace"),
         "log-snr": log_snr_times, "karras": karras_times}
# Options of one sampler alone: sampler, least and largest value
OPTIONS = {"eta": ("ddim", 0, 1), "variance": ("ddpm", None, None), "noise": ("reverse_sde", 0, 100)}
# Published class-conditional models of ImageNet, in the latents of Stable Diffusion's VAE (SCALE), by
# FAMILY-SIZE-PATCH-SIDE. DiT: Peebles & Xie 2023 (arXiv:2212.09748); SiT: Ma et al. 2024 (arXiv:2401.08740).
SCALE = 0.18215
PUBLISHED = {
    f"{family}-{size.lower()}-{patch}-{side}": {
        "config": (dit.PRESETS[f"{size}/{patch}"] | dit.PUBLISHED | time
                   | {"learn_sigma": True, "num_classes": 1000} | ({"heads": 16} if size == "XL" else {})),
        "objective": objective, "side": side}
    for family, time, objective in (
        ("dit", {"time_scale": 1000.0, "time_offset": -1.0},
         {"name": "ddpm", "schedule": "linear", "learned_variance": True}),
        ("sit", {"time_scale": -1.0, "time_offset": 1.0}, {"name": "rf", "density": "uniform"}))
    for size in ("S", "B", "L", "XL") for patch in (2, 4, 8) for side in (256, 512)}


def pick_device(name: str = "auto") -> torch.device:
    """"auto" takes CUDA, then MPS, then the CPU. Raises ValueError for a device that is not there."""
    present = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        name = next(kind for kind, there in present.items() if there)
    kind, _, index = name.partition(":")
    if not present.get(kind) or (index and not (kind == "cuda" and index.isdigit()
                                                and int(index) < torch.cuda.device_count())):
        raise ValueError(f"--device {name}: not available here (there is "
                         f"{', '.join(kind for kind, there in present.items() if there)})")
    return torch.device(name)


def check_compiler(device: torch.device) -> None:
    """Raises ValueError where torch.compile would find no compiler."""
    names = (os.environ.get("CXX", "g++"), "clang++", "cl")
    if device.type == "cpu" and not any(map(shutil.which, names)):
        raise ValueError("--compile: found no C++ compiler, which the CPU needs; install g++, or drop it")


def load_checkpoint(path: str | Path) -> dict:
    """Read a run folder's or a file's checkpoint to the CPU. Raises ValueError with a line for the user."""
    path = Path(path)
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: no checkpoint there ({file} does not exist); train one with train.py")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        for part in ("arch", "config", "objective", "data", "label_dropout", "vae", "model", "ema"):
            checkpoint[part]
        checkpoint.setdefault("text", None)
    except Exception as error:  # torch raises a dozen kinds for a damaged file; all mean the same to the user
        raise ValueError(f"{file}: not a checkpoint of train.py, or damaged "
                         f"({type(error).__name__})") from None
    return checkpoint


def build_model(arch: str, config: dict, text: dict | None = None) -> torch.nn.Module:
    """text: what a checkpoint says of the encoder of its words. The built-in one becomes a part of the model,
    `model.text`, as it is trained, averaged and saved with it."""
    def make(name: str, kind: type, config_kind: type, values: dict) -> torch.nn.Module:
        if surplus := set(values) - {field.name for field in fields(config_kind)}:
            raise ValueError(f"{name} has no setting {sorted(surplus)[0]!r}; "
                             "this checkpoint is from another version")
        return kind(config_kind(**values))

    model = make(arch, *MODELS[arch], config)
    if text is not None and text["encoder"] == "bytes":
        model.text = make("text encoder", TextEncoder, TextConfig, text["config"])
    return model


def listen(model: torch.nn.Module, encode, prompts: list[str]) -> dict[str, Tensor]:
    """The conditions that `encode`, of a TextEncoder's kind, makes of prompts, as far as the model asks for
    them."""
    cond, asked = encode(prompts), {"context": model.config.context_width,
                                    "pooled": getattr(model.config, "pooled_width", None)}
    for name, width in asked.items():
        given = cond[name].shape[-1] if name in cond else None
        if width and given != width:
            raise ValueError(f"text vectors ({name}) of width {given}: this network takes {width}")
    return {name: cond[name] for name in ("context", "mask", *["pooled"] * bool(asked["pooled"]))}


def build_path(objective: dict) -> DDPM | RectifiedFlow:
    return PATHS[objective["name"]](**{k: v for k, v in objective.items() if k != "name"})


def check_weights(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> None:
    """Raise ValueError, one line, with the first keys that do not fit."""
    own, given = model.state_dict(), set(state)
    wrong = [f"missing {k}" for k in own if k not in given] + [f"surplus {k}" for k in state if k not in own]
    wrong += [f"{k} of shape {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own
              if k in given and state[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{what}: weights do not fit the network: {'; '.join(wrong[:3])}"
                         + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))


def load_weights(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> torch.nn.Module:
    """Strict loading."""
    check_weights(model, state, what)
    model.load_state_dict(state)
    return model


def read_weights(file: str | Path) -> dict[str, Tensor]:
    """A published state dict: .safetensors, or a torch file, of which the EMA weights if it has several.
    Raises ValueError with a line for the user, also for a checkpoint of train.py."""
    file = Path(file)
    if not file.is_file():
        raise ValueError(f"{file}: no such file; download it first")
    if file.suffix == ".safetensors":
        try:
            from safetensors.torch import load_file
        except ImportError:
            raise ValueError(f"{file}: needs the package safetensors (pip install safetensors)") from None
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):   # the settings in DiT's own checkpoints
            state = (load_file(file) if file.suffix == ".safetensors" else
                     torch.load(file, map_location="cpu", weights_only=True))
        own = "arch" in state and "ema" in state
        for part in ("ema", "state_dict", "model"):
            state = state[part] if isinstance(state.get(part), dict) else state
        state = {name: weight for name, weight in state.items()
                 if isinstance(weight, Tensor) and isinstance(name, str)}
    except Exception as error:
        raise ValueError(f"{file}: not a file of weights alone, or damaged ({type(error).__name__}); "
                         "where it holds other things too, convert it to .safetensors") from None
    if own:
        raise ValueError(f"{file}: is a run of train.py, not a published file; give it by itself")
    return state


def load_published(name: str, weights: str | Path, vae: str | Path) -> dict:
    """A published network and its VAE as what `load_checkpoint` returns. Raises ValueError with a line for
    the user."""
    if name not in PUBLISHED:
        raise ValueError(f"--published {name}: known are {', '.join(n for n in PUBLISHED if '-xl-2-' in n)}, "
                         "and the sizes s, b, l, xl at patch 2, 4, 8")
    row = PUBLISHED[name]
    with torch.device("meta"):
        model = build_model("dit", row["config"])
    state = read_published(name, weights)
    check_weights(model, state, str(weights))
    autoencoder = load_vae(vae)
    check_published_vae(name, autoencoder, str(vae))
    return {"arch": "dit", "config": row["config"], "objective": row["objective"], "step": 0,
            "data": {"source": "imagenet", "size": [row["side"]] * 2,
                     "classes": [str(i) for i in range(1000)]},
            "text": None, "label_dropout": 0.1, "model": state, "ema": state,
            "vae": {"config": asdict(autoencoder.config), "state": autoencoder.state_dict()}}


def read_published(name: str, weights: str | Path) -> dict[str, Tensor]:
    """The weights of PUBLISHED[name] by our names. Raises ValueError for a file of another picture size."""
    state, row = read_weights(weights), PUBLISHED[name]
    config = DiTConfig(**row["config"])
    tokens, table = (row["side"] // 8 // config.patch[0]) ** 2, state.get("pos_embed")
    if table is not None and table.shape[1:2] != (tokens,):
        raise ValueError(f"{weights}: its table of positions, {tuple(table.shape)}, is not for the {tokens} "
                         f"patches of {name}; give the name that belongs to the file")
    return dit.published(state, config)


def check_published_vae(name: str, autoencoder: VAE, vae: str) -> None:
    """Raise ValueError where these are not the latents that PUBLISHED[name] knows."""
    channels, factor = autoencoder.config.latent_channels, autoencoder.factor
    scale = 1 / autoencoder.latent_std
    same = channels == 4 and factor == 8 and not autoencoder.latent_mean.any()
    if not (same and ((scale - SCALE).abs() < 1e-4).all()):
        raise ValueError(f"--vae {vae}: {name} was trained in latents of 4 channels at 1/8, scaled by "
                         f"{SCALE} (Stable Diffusion 1 and 2); this one has {channels} at 1/{factor}, scaled "
                         f"by {scale.mean():.5f}")


def load_vae(path: str | Path) -> VAE:
    """A VAE, EMA weights, evaluation mode: that of a finished VAE run or, of another run, the one inside it;
    a folder of diffusers (config.json beside the weights); or a published file, which says nothing of the
    scale of its latents: that of Stable Diffusion 1 and 2 where it has 4 channels (give XL's as a folder)."""
    path, config, checkpoint = Path(path), {}, None
    is_folder = (path / "config.json").is_file() and not (path / "checkpoint.pt").is_file()
    file = path
    if is_folder:
        try:
            config = dict(json.loads((path / "config.json").read_text()))
        except (ValueError, TypeError):
            raise ValueError(f"{path / 'config.json'}: damaged; download it again") from None
        files = [path / f"diffusion_pytorch_model.{kind}" for kind in ("safetensors", "bin")]
        file = next((file for file in files if file.is_file()), files[0])
    else:
        with contextlib.suppress(ValueError):
            checkpoint = load_checkpoint(path)
    if checkpoint is None and (is_folder or path.is_file()):
        state = read_weights(file)
        channels = next((weight.shape[1] for name, weight in state.items()
                         if name.endswith("decoder.conv_in.weight")), 4)
        scale = config.get("scaling_factor") or (SCALE if channels == 4 else None)
        if scale is None:
            raise ValueError(f"{path}: the scale of latents of {channels} channels is not in this file; "
                             "give the diffusers folder, whose config.json has it")
        try:
            return vae_file.published(state, scale, config.get("shift_factor") or 0.0,
                                      config.get("norm_num_groups") or 32)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
    checkpoint = checkpoint or load_checkpoint(path)   # which says what is wrong
    if checkpoint["arch"] != "vae":
        return unpack_vae(checkpoint["vae"])
    if not checkpoint["training"]["finished"]:     # the scale of its latents is measured at the end
        raise ValueError(f"{path}: this VAE is not finished (step {checkpoint['step']:,}); "
                         "run its command again")
    return unpack_vae({"config": checkpoint["config"], "state": checkpoint["ema"]}, str(path))


def unpack_vae(packed: dict, what: str = "VAE") -> VAE:
    return load_weights(
        build_model("vae", packed["config"]), packed["state"], what).eval().requires_grad_(False)


def graphed(model: torch.nn.Module):
    """The model compiled, on CUDA replayed as a graph. Not so its first call, which leaves the tables of
    positions behind: a graph would overwrite them."""
    compiled = None

    def call(*inputs, **cond) -> Tensor:
        nonlocal compiled
        if compiled is None:
            compiled = torch.compile(model, mode="reduce-overhead")
            return model(*inputs, **cond)
        return compiled(*inputs, **cond).clone()     # a graph's output lives until its next call
    return call


@torch.no_grad()
def draw(model: torch.nn.Module, vae: VAE, path, shape: tuple[int, int, int], seeds: range, cond: dict,
         uncond: dict | None = None, *, sampler: str, steps: int, scale: float = 1.0, rescale: float = 0.0,
         interval: tuple[float, float] = (0.0, 1.0), times: str = "even", strength: float = 1.0,
         image: Tensor | None = None, mask: Tensor | None = None, on_step=None, **options) -> np.ndarray:
    """One batch of pictures, uint8 (B, H, W, C). shape (C, h, w) of the latent; one seed per picture; cond
    and uncond as `guided` takes them, of the batch's length.

    image (1, C, H, W) in [-1, 1]: begin with it at time `strength`, mixed with noise (SDEdit: Meng et al.
    2022, arXiv:2108.01073); of the steps of the whole way those above `strength` are gone. mask (1, 1, H, W),
    bool: draw only there; every other pixel stays as it is.
    on_step(i, decoded uint8 pictures) shows the way."""
    device = next(vae.parameters()).device
    # on the CPU: the same noise on every device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = noise_like(torch.empty(len(seeds), *shape), generators).to(device)
    denoise = guided(model, path, cond, uncond, scale, interval=interval, rescale=rescale,
                     variance=options.get("variance") == "learned")
    times = TIMES[times](path, steps)
    if image is not None:
        with torch.autocast(device.type, enabled=False):   # as in decode
            x0 = vae.normalize(vae.encode(image.to(device)).mean)
        start = round(strength * 1000) / 1000              # in thousandths, as the diffusion path counts
        if start < times[0]:                               # and no step shorter than half of one
            times = torch.cat([times.new_tensor([start]), times[times < start - 5e-4]])
            alpha, sigma = path.alpha_sigma(times[0])
            x = alpha * x0 + sigma * x
    if mask is not None:                                   # a latent is drawn anew where any of its pixels is
        repaint = F.max_pool2d(mask.float(), vae.factor).bool().to(device)
        denoise = inpainting(denoise, path, x0, repaint)

    def decode(x0: Tensor) -> np.ndarray:
        pictures = vae.decode(vae.denormalize(x0))
        if mask is not None:
            pictures = torch.where(mask.to(device), pictures, image.to(device))
        return to_uint8(pictures)

    if len(times) > 1:
        show = (lambda i, xs, x0: on_step(i, decode(xs))) if on_step else None
        x = SAMPLERS[sampler](denoise, path, x, times, generator=generators, on_step=show, **options)
    return decode(x)


@contextlib.contextmanager
def npz_writer(file: Path, shape: tuple[int, ...]) -> Iterator:
    """An .npz with the one array `arr_0`, uint8 of `shape`, written batch by batch: the layout of ADM's
    evaluation suite."""
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive, archive.open(
            "arr_0.npy", "w", force_zip64=True) as out:
        np.lib.format.write_array_header_1_0(out, {"descr": "|u1", "fortran_order": False, "shape": shape})
        yield lambda images: out.write(np.ascontiguousarray(images).tobytes())


def parse_label(text: str, classes: list[str]) -> int:
    if text in classes:
        return classes.index(text)
    if text.isdecimal() and int(text) < len(classes):
        return int(text)
    known = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
    raise ValueError(f"--label {text}: not a class of this run; it has 0 to {len(classes) - 1}: {known}")


def text_encoder(text: dict, model: torch.nn.Module, place: str | None, device: torch.device):
    """What a run's prompts go through, called like a TextEncoder. place: "KIND:PATH" of a frozen one."""
    if text["encoder"] == "bytes":
        return model.text
    if text["encoder"] == "none":
        return read_embeddings
    kind, _, path = (place or f"{text['encoder']}:{text['path']}").partition(":")
    if kind != text["encoder"]:
        raise ValueError(f"--text-encoder {place}: this run listens to {text['encoder']}:PATH")
    return PublishedTextEncoder(kind, path, device)


def conditions(args: argparse.Namespace, checkpoint: dict, model: torch.nn.Module,
               device: torch.device) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """What is asked for: the number of its condition for each picture, (n,); every distinct condition once,
    the last the unconditional one; and their names."""
    turn, classes, text = torch.arange(args.n), checkpoint["data"]["classes"], checkpoint["text"]
    if classes:
        turn = turn % len(classes) if args.label is None else turn * 0 + parse_label(args.label, classes)
        return turn, {"y": torch.arange(len(classes) + 1, device=device)}, classes
    if not text:
        return turn * 0, {}, []
    encode = text_encoder(text, model, args.text_encoder, device)
    asked = (args.prompt or args.embedding or checkpoint["data"]["prompts"])[:args.n]
    negative = clean(args.negative_prompt or "")
    asked = asked if args.embedding else [clean(prompt) for prompt in asked]
    prompts = list(dict.fromkeys(asked))                   # each is encoded once, however often asked for
    number = torch.tensor([prompts.index(prompt) for prompt in asked])
    for prompt in (*prompts, negative) if text["encoder"] != "none" else ():
        if rest := encode.cut(prompt):
            print(f"sample.py: warning: a prompt is longer than this run reads; cut off: {rest!r}",
                  file=sys.stderr)
    cond = listen(model, encode, [*prompts, negative])
    return number[turn % len(asked)], {name: part.to(device) for name, part in cond.items()}, prompts


def read_image(flag: str, file: str, size: tuple[int, int]) -> np.ndarray:
    try:
        return open_image(Path(file), size).copy()
    except Exception as error:       # Pillow raises a dozen kinds
        raise ValueError(f"{flag} {file}: cannot be read as a picture ({error})") from None


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Draw pictures from a run of train.py.")
    p.add_argument("run", nargs="?", help="run folder, or a checkpoint file")
    p.add_argument("--published", metavar="NAME",
                   help="instead of a run: a published model, like dit-xl-2-256 or sit-xl-2-256")
    p.add_argument("--weights", metavar="FILE", help="of the published model: .pt, .ckpt or .safetensors")
    p.add_argument("--vae", metavar="PATH", help="of the published model: a file, or a diffusers folder")
    p.add_argument("--out", default="samples.png",
                   help="NAME.png: one grid; NAME.npz: arr_0, uint8 NHWC; NAME.gif: the way from noise; "
                        "a folder: single PNGs")
    p.add_argument("--n", type=int, default=64, help="how many pictures (default 64)")
    p.add_argument("--label", help="class, by number or name (default: all in turn)")
    p.add_argument("--prompt", nargs="+", metavar="TEXT", help="what to draw; several are drawn in turn "
                                                               "(default: captions of the validation data)")
    p.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from (default: empty)")
    p.add_argument("--text-encoder", metavar="KIND:PATH",
                   help="where the run's frozen encoder is now (default: where it was)")
    p.add_argument("--embedding", metavar="FILE", nargs="+",
                   help="instead of prompts, for a run trained on them: .npz with context, mask, pooled")
    p.add_argument("--init-image", metavar="FILE", help="begin with this picture instead of noise")
    p.add_argument("--strength", type=float, help="time at which to begin with it: 0 keeps it, 1 is noise "
                                                  "alone (default 0.6, with --mask 1)")
    p.add_argument("--mask", metavar="FILE",
                   help="draw only where this picture is white (needs --init-image)")
    p.add_argument("--cfg", type=float, help="guidance scale: 1 conditional, 0 unconditional, above 1 guided "
                                             "(default: 2 where the run was trained for it, else 1)")
    p.add_argument("--sampler", choices=SAMPLERS, help="default: heun for rf, ddim for ddpm")
    p.add_argument("--steps", type=int, help="intervals (default: 10 for rf, 50 for ddpm)")
    p.add_argument("--times", choices=TIMES, default="even",
                   help="how the steps are spread (default even; leading and linspace are of ddpm)")
    p.add_argument("--interval", type=float, nargs=2, metavar=("LOW", "HIGH"), default=(0.0, 1.0),
                   help="times between which guidance acts (default 0 1)")
    p.add_argument("--rescale", type=float, default=0.0,
                   help="share of the contrast that guidance adds and this takes back (default 0)")
    p.add_argument("--eta", type=float, help="ddim only: 0 deterministic (default) to 1 ancestral")
    p.add_argument("--variance", choices=("small", "large", "learned"), help="ddpm only: of each step "
                                                                             "(default small)")
    p.add_argument("--noise", type=float, help="reverse_sde only: how much of it (default 1; 0 the ODE)")
    p.add_argument("--seed", type=int, default=0, help="picture i is drawn with seed + i (default 0)")
    p.add_argument("--batch-size", type=int, default=64,
                   help="pictures at a time (default 64); changes speed only")
    p.add_argument("--raw", action="store_true", help="the run's raw weights, not their average")
    p.add_argument("--compile", action="store_true", help="torch.compile the network; on CUDA, as graphs")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    p.add_argument("--precision", choices=("fp32", "tf32", "bf16"), default="fp32",
                   help="of the network (default fp32); on CUDA the VAE, which stays fp32, then uses tf32")
    return p.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    out = Path(args.out)
    kind = out.suffix.lower()
    for flag, value in (("--n", args.n), ("--batch-size", args.batch_size), ("--steps", args.steps)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: must be at least 1")
    if kind not in (".png", ".npz", ".gif", ""):
        raise ValueError(f"--out {out}: must end in .png, .npz or .gif, or name a folder")
    if kind and not out.parent.is_dir():
        raise ValueError(f"--out {out}: the folder {out.parent} does not exist")
    if out.exists() and out.is_dir() == bool(kind):
        raise ValueError(f"--out {out}: there is a {'folder' if kind else 'file'} of that name; "
                         "choose another")
    published = [args.published is not None, args.weights is not None, args.vae is not None]
    if (args.run is not None) == any(published) or any(published) != all(published):
        raise ValueError("give a run, or --published NAME with its --weights FILE and --vae PATH")
    given = [name for name in OPTIONS if getattr(args, name) is not None]
    for name in given:
        owner, low, high = OPTIONS[name]
        value = getattr(args, name)
        if (args.sampler or owner) != owner or len(given) > 1:
            raise ValueError(f"--{name} {value} with --sampler {args.sampler or OPTIONS[given[-1]][0]}: "
                             f"{name} belongs to {owner}")
        if low is not None and not low <= value <= high:
            raise ValueError(f"--{name} {value:g}: must be between {low} and {high}")
    low, high = args.interval
    if not 0 <= low < high <= 1:
        raise ValueError(f"--interval {low:g} {high:g}: two times between 0 and 1, the lower one first")
    for flag, value, limit in (("--cfg", args.cfg, 1e6), ("--seed", args.seed, 1e18), ("--n", args.n, 1e8),
                               ("--steps", args.steps, 1e5), ("--batch-size", args.batch_size, 1e6)):
        if value is not None and not -limit < value < limit:
            raise ValueError(f"{flag} {value}: out of range")
    for flag, value in (("--strength", args.strength), ("--rescale", args.rescale)):
        if value is not None and not 0 <= value <= 1:
            raise ValueError(f"{flag} {value:g}: must be between 0 and 1")
    for flag, value in (("--init-image", args.init_image), ("--mask", args.mask)):
        if value == "":
            raise ValueError(f"{flag} is empty; give a picture, or leave it out")
    for flag, value in (("--strength", args.strength), ("--mask", args.mask)):
        if value is not None and not args.init_image:
            raise ValueError(f"{flag} {value}: needs --init-image FILE, the picture to begin with")
    if args.raw and args.published:
        raise ValueError(f"--raw with --published {args.published}: a published file has one set of weights")
    device = pick_device(args.device)
    if args.compile:
        check_compiler(device)
    if args.published is None:
        what, checkpoint = args.run, load_checkpoint(args.run)
    else:
        what, checkpoint = args.weights, load_published(args.published, args.weights, args.vae)
    if checkpoint["arch"] == "vae":
        raise ValueError(f"{args.run}: this run is a VAE, which reconstructs but does not draw; "
                         "give a dit or unet run")

    classes, text = checkpoint["data"]["classes"], checkpoint["text"]
    learnt = "to words" if text else "to classes" if classes else "without conditions"
    guidable = (text or classes) and checkpoint["label_dropout"] > 0
    precomputed = text is not None and text["encoder"] == "none"
    for flag, value, fits, remedy in (
            ("--label", args.label, classes, "use --embedding" if precomputed else
             "use --prompt" if text else "leave it out"),
            ("--prompt", args.prompt, text and not precomputed, "use --embedding" if precomputed else
             "use --label" if classes else "leave it out"),
            ("--negative-prompt", args.negative_prompt, text and not precomputed, "leave it out"),
            ("--embedding", args.embedding, precomputed, "use --prompt" if text else "leave it out"),
            ("--text-encoder", args.text_encoder, text and "path" in text, "leave it out")):
        if value is not None and not fits:
            raise ValueError(f"{flag} {value if isinstance(value, str) else value[0]}: this run was trained "
                             f"{learnt}{' given as vectors' if precomputed else ''}; {remedy}")
    if precomputed and not args.embedding:
        raise ValueError(f"{what}: was trained on computed vectors; give some by --embedding FILE.npz")
    if args.cfg is not None and args.cfg != 1 and not guidable:
        if text or classes:
            learnt += " with label dropout 0, so it has no unconditional branch"
        raise ValueError(f"--cfg {args.cfg:g}: this run was trained {learnt}; use --cfg 1")
    scale = args.cfg if args.cfg is not None else 2.0 if guidable else 1.0
    for flag, value in (("--label", args.label), ("--prompt", args.prompt)):
        if value is not None and scale == 0:
            raise ValueError(f"{flag} with --cfg 0: scale 0 is unconditional and ignores it; "
                             "drop one of them")
    for flag, given_here in ((f"--interval {low:g} {high:g}", (low, high) != (0, 1)),
                             (f"--rescale {args.rescale:g}", args.rescale > 0),
                             ("--negative-prompt", args.negative_prompt is not None and scale != 0)):
        if given_here and scale in (0, 1):
            raise ValueError(f"{flag} with guidance {scale:g}: there is none for it to act on")
    defaults = DRAW_DEFAULTS[checkpoint["objective"]["name"]]
    options = {name: getattr(args, name) for name in given}
    sampler = args.sampler or (OPTIONS[given[0]][0] if given else defaults["sampler"])
    steps = args.steps or defaults["steps"]
    if args.times in ("leading", "linspace") and checkpoint["objective"]["name"] != "ddpm":
        raise ValueError(f"--times {args.times}: a spacing of the ddpm path; this run is on the straight one")
    if args.variance == "learned" and not checkpoint["objective"].get("learned_variance"):
        raise ValueError(f"--variance learned: {what} was not trained to say anything of the variance")

    weights = checkpoint["model" if args.raw else "ema"]
    model = load_weights(build_model(checkpoint["arch"], checkpoint["config"], text),
                         weights, what).to(device).eval()
    vae, path = unpack_vae(checkpoint["vae"]).to(device), build_path(checkpoint["objective"])
    TIMES[args.times](path, steps)    # a step count that the path does not have fails here, before any work
    height, width = checkpoint["data"]["size"]
    shape = (vae.config.latent_channels, height // vae.factor, width // vae.factor)
    image = mask = None
    if args.init_image:
        image = to_tensor(read_image("--init-image", args.init_image, (height, width))[None])
        if vae.config.image_channels == 1:
            image = image.mean(1, keepdim=True)
    if args.mask:
        mask = torch.from_numpy(read_image("--mask", args.mask, (height, width)).mean(-1) > 127)[None, None]
        if not mask.any():
            raise ValueError(f"--mask {args.mask}: has no white pixel, so there is nothing to draw")
    strength = args.strength if args.strength is not None else 1.0 if args.mask else 0.6
    with torch.no_grad():
        turn, every, names = conditions(args, checkpoint, model, device)

    if device.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = args.precision != "fp32"
        model, vae = (network.to(memory_format=torch.channels_last) for network in (model, vae))
    network = graphed(model) if args.compile else model

    def batches(on_step=None) -> Iterator[np.ndarray]:
        with tqdm(total=args.n, unit="img", desc=f"{sampler} x {steps}, guidance {scale:g}") as bar:
            for i in range(0, args.n, args.batch_size):
                seeds = range(args.seed + i, args.seed + min(i + args.batch_size, args.n))
                cond = {name: part[turn[i:i + args.batch_size]] for name, part in every.items()}
                uncond = {name: part[[-1] * len(seeds)] for name, part in every.items()}
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    images = draw(network, vae, path, shape, seeds, cond, uncond, sampler=sampler,
                                  steps=steps, scale=scale, rescale=args.rescale,
                                  interval=tuple(args.interval), times=args.times, strength=strength,
                                  image=image, mask=mask, on_step=on_step, **options)
                yield images
                bar.update(len(seeds))

    several = len(names) > 1 and args.label is None
    columns = len(names) if several and len(names) <= min(24 if classes else 8, args.n) else None
    captions = [names[i] for i in turn] if several and text else None
    partial = out.with_name(out.name + ".part")         # the old file or the new one, whole
    try:
        if kind == ".npz":
            with npz_writer(partial, (args.n, height, width, vae.config.image_channels)) as write:
                for images in batches():
                    write(images)
        elif kind == ".gif":
            frames: dict[int, list[np.ndarray]] = {}
            last = list(batches(on_step=lambda i, images: frames.setdefault(i, []).append(images)))
            pictures = [grid(np.concatenate(frame), columns, captions=captions)
                        for frame in frames.values() or [last]]
            pictures[0].save(partial, "GIF", save_all=True, append_images=pictures[1:], loop=0,
                             duration=[120] * (len(pictures) - 1) + [1500])
        elif kind == ".png":
            grid(np.concatenate(list(batches())), columns, captions=captions).save(partial, "PNG")
        if kind:
            partial.replace(out)
    except OSError as error:
        raise OSError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        partial.unlink(missing_ok=True)
    if not kind:
        out.mkdir(parents=True, exist_ok=True)
        labels = [re.sub(r"[^\w-]+", "-", f"-{name}")[:80] for name in names] or [""]
        files = (f"{args.seed + i:06d}{labels[turn[i]]}" for i in range(args.n))
        for images in batches():
            for image, name in zip(images, files):
                Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
                    out / f"{name}.png")
    print(out)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(print(f"sample.py: error: {error}", file=sys.stderr) or 2)
    except KeyboardInterrupt:
        sys.exit(print("sample.py: interrupted", file=sys.stderr) or 130)
