"""Draw pictures from a run: grids, single files, an .npz for evaluation, or a film of the way from noise.

    python sample.py runs/shapes-dit-rf --label red-circle --n 64 --steps 10 --cfg 2 --seed 0 --out grid.png
    python sample.py runs/shapes-dit-rf --n 50000 --batch-size 500 --out samples.npz

One checkpoint says everything: network, objective, data shape, class names, VAE, raw and EMA weights. Picture
i is drawn by a generator of its own, seeded with seed + i, so it does not depend on the batch size or on how
many are asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from data import grid, to_uint8
from ddpm import DDPM
from dit import DiT, DiTConfig
from rectified_flow import RectifiedFlow
from samplers import SAMPLERS, guided, noise_like
from unet import UNet, UNetConfig
from vae import VAE, VAEConfig

MODELS = {"dit": (DiT, DiTConfig), "unet": (UNet, UNetConfig), "vae": (VAE, VAEConfig)}
PATHS = {"rf": RectifiedFlow, "ddpm": DDPM}
# 19 and 50 evaluations of the network
DRAW_DEFAULTS = {"rf": dict(sampler="heun", steps=10), "ddpm": dict(sampler="ddim", steps=50)}


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


def load_checkpoint(path: str | Path) -> dict:
    """Read a run folder's or a file's checkpoint to the CPU. Raises ValueError with a line for the user."""
    path = Path(path)
    file = path / "checkpoint.pt" if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"{path}: no checkpoint there ({file} does not exist); train one with train.py")
    try:
        checkpoint = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint["arch"], checkpoint["config"], checkpoint["ema"]
    except Exception as error:  # torch raises a dozen kinds for a damaged file; all mean the same to the user
        raise ValueError(f"{file}: not a checkpoint of train.py, or damaged "
                         f"({type(error).__name__})") from None
    return checkpoint


def build_model(arch: str, config: dict) -> torch.nn.Module:
    model_class, config_class = MODELS[arch]
    known = {field.name for field in fields(config_class)}
    if surplus := set(config) - known:
        raise ValueError(f"{arch} has no setting {sorted(surplus)[0]!r}; "
                         "this checkpoint is from another version")
    return model_class(config_class(**config))


def build_path(objective: dict) -> DDPM | RectifiedFlow:
    return PATHS[objective["name"]](**{k: v for k, v in objective.items() if k != "name"})


def load_weights(model: torch.nn.Module, state: dict[str, Tensor], what: str) -> torch.nn.Module:
    """Strict loading, with one line that names the first keys at fault."""
    own, given = model.state_dict(), set(state)
    wrong = [f"missing {k}" for k in own if k not in given] + [f"surplus {k}" for k in state if k not in own]
    wrong += [f"{k} of shape {tuple(state[k].shape)}, not {tuple(own[k].shape)}" for k in own
              if k in given and state[k].shape != own[k].shape]
    if wrong:
        raise ValueError(f"{what}: weights do not fit the network: {'; '.join(wrong[:3])}"
                         + (f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""))
    model.load_state_dict(state)
    return model


def load_vae(path: str | Path) -> VAE:
    """The VAE of a finished VAE run or, of any other run, the one inside it; EMA weights, evaluation mode."""
    checkpoint = load_checkpoint(path)
    if checkpoint["arch"] != "vae":
        return unpack_vae(checkpoint["vae"])
    if not checkpoint["training"]["finished"]:     # the scale of its latents is measured at the end
        raise ValueError(f"{path}: this VAE is not finished (step {checkpoint['step']:,}); "
                         "run its command again")
    return unpack_vae({"config": checkpoint["config"], "state": checkpoint["ema"]}, str(path))


def unpack_vae(packed: dict, what: str = "VAE") -> VAE:
    return load_weights(
        build_model("vae", packed["config"]), packed["state"], what).eval().requires_grad_(False)


@torch.no_grad()
def draw(model: torch.nn.Module, vae: VAE, path, shape: tuple[int, int, int], labels: Tensor | None,
         seeds: range, *, sampler: str, steps: int, scale: float = 1.0, num_classes: int = 0, on_step=None,
         **options) -> np.ndarray:
    """One batch of pictures, uint8 (B, H, W, C). shape (C, h, w) of the latent; labels (B,) or None; one
    seed per picture.

    num_classes is also the null label. on_step(i, decoded uint8 pictures) shows the way."""
    device = next(vae.parameters()).device
    # on the CPU: the same noise on every device
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    x = noise_like(torch.empty(len(seeds), *shape), generators).to(device)
    cond, uncond = {}, {}
    if labels is not None:
        cond, uncond = {"y": labels.to(device)}, {"y": torch.full_like(labels, num_classes).to(device)}
    denoise = guided(model, path, cond, uncond, scale)

    def decode(x0: Tensor) -> np.ndarray:
        return to_uint8(vae.decode(vae.denormalize(x0)))

    show = (lambda i, xs, x0: on_step(i, decode(xs))) if on_step else None
    return decode(SAMPLERS[sampler](denoise, path, x, path.times(steps), generator=generators,
                                    on_step=show, **options))


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
    if text.isdigit() and int(text) < len(classes):
        return int(text)
    known = ", ".join(classes[:12]) + (", ..." if len(classes) > 12 else "")
    raise ValueError(f"--label {text}: not a class of this run; it has 0 to {len(classes) - 1}: {known}")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description="Draw pictures from a run of train.py.")
    p.add_argument("run", help="run folder, or a checkpoint file")
    p.add_argument("--out", default="samples.png",
                   help="NAME.png: one grid; NAME.npz: arr_0, uint8 NHWC; NAME.gif: the way from noise; "
                        "a folder: single PNGs")
    p.add_argument("--n", type=int, default=64, help="how many pictures (default 64)")
    p.add_argument("--label", help="class, by number or name (default: all in turn)")
    p.add_argument("--cfg", type=float, help="guidance scale: 1 conditional, 0 unconditional, above 1 guided "
                                             "(default: 2 where the run was trained for it, else 1)")
    p.add_argument("--sampler", choices=SAMPLERS, help="default: heun for rf, ddim for ddpm")
    p.add_argument("--steps", type=int, help="intervals (default: 10 for rf, 50 for ddpm)")
    p.add_argument("--eta", type=float, help="ddim only: 0 deterministic (default) to 1 ancestral")
    p.add_argument("--seed", type=int, default=0, help="picture i is drawn with seed + i (default 0)")
    p.add_argument("--batch-size", type=int, default=64,
                   help="pictures at a time (default 64); changes speed only")
    p.add_argument("--weights", choices=("ema", "raw"), default="ema",
                   help="which of the run's weights (default ema)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps (default auto)")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32",
                   help="of the network (default fp32)")
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
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.run)
    if checkpoint["arch"] == "vae":
        raise ValueError(f"{args.run}: this run is a VAE, which reconstructs but does not draw; "
                         "give a dit or unet run")

    classes, trained_with_dropout = checkpoint["data"]["classes"], checkpoint["label_dropout"] > 0
    labelled = bool(classes)
    if args.label is not None and not labelled:
        raise ValueError(f"--label {args.label}: this run was trained without classes")
    if args.cfg is not None and args.cfg != 1 and not (labelled and trained_with_dropout):
        reason = "with label dropout 0, so it has no unconditional branch" if labelled else "without classes"
        raise ValueError(f"--cfg {args.cfg:g}: this run was trained {reason}; use --cfg 1")
    if args.label is not None and args.cfg == 0:
        raise ValueError(f"--label {args.label} with --cfg 0: scale 0 is unconditional and ignores the label;"
                         " drop one of them")
    scale = args.cfg if args.cfg is not None else 2.0 if labelled and trained_with_dropout else 1.0
    defaults = DRAW_DEFAULTS[checkpoint["objective"]["name"]]
    sampler = args.sampler or ("ddim" if args.eta is not None else defaults["sampler"])
    steps = args.steps or defaults["steps"]
    if args.eta is not None and sampler != "ddim":
        raise ValueError(f"--eta {args.eta:g} with --sampler {sampler}: eta belongs to ddim")
    if args.eta is not None and not 0 <= args.eta <= 1:
        raise ValueError(f"--eta {args.eta:g}: must be between 0 and 1")
    options = {"eta": args.eta} if args.eta is not None else {}

    weights = checkpoint["ema" if args.weights == "ema" else "model"]
    model = load_weights(
        build_model(checkpoint["arch"], checkpoint["config"]), weights, args.run).to(device).eval()
    vae, path = unpack_vae(checkpoint["vae"]).to(device), build_path(checkpoint["objective"])
    path.times(steps)                 # a step count that the path does not have fails here, before any work
    height, width = checkpoint["data"]["size"]
    shape = (vae.config.latent_channels, height // vae.factor, width // vae.factor)
    labels = None
    if args.label is not None:
        labels = torch.full((args.n,), parse_label(args.label, classes))
    elif labelled:
        labels = torch.arange(args.n) % len(classes)

    def batches(on_step=None) -> Iterator[np.ndarray]:
        with tqdm(total=args.n, unit="img", desc=f"{sampler} x {steps}, guidance {scale:g}") as bar:
            for i in range(0, args.n, args.batch_size):
                seeds = range(args.seed + i, args.seed + min(i + args.batch_size, args.n))
                batch = labels[i:i + args.batch_size] if labels is not None else None
                with torch.autocast(device.type, torch.bfloat16, enabled=args.precision == "bf16"):
                    images = draw(model, vae, path, shape, batch, seeds, sampler=sampler, steps=steps,
                                  scale=scale, num_classes=len(classes), on_step=on_step, **options)
                yield images
                bar.update(len(seeds))

    columns = len(classes) if labelled and args.label is None and len(classes) <= min(24, args.n) else None
    if kind == ".npz":
        partial = out.with_name(out.name + ".part")
        try:
            with npz_writer(partial, (args.n, height, width, vae.config.image_channels)) as write:
                for images in batches():
                    write(images)
            partial.replace(out)
        finally:
            partial.unlink(missing_ok=True)
    elif kind == ".gif":
        frames: list[list[np.ndarray]] = [[] for _ in range(steps)]
        for _ in batches(on_step=lambda i, images: frames[i].append(images)):
            pass
        pictures = [grid(np.concatenate(frame), columns) for frame in frames]
        pictures[0].save(out, save_all=True, append_images=pictures[1:], loop=0,
                         duration=[120] * (steps - 1) + [1500])
    elif kind == ".png":
        grid(np.concatenate(list(batches())), columns).save(out)
    else:
        out.mkdir(parents=True, exist_ok=True)
        names = (f"{args.seed + i:06d}" + (f"-{classes[labels[i]]}" if labelled else "")
                 for i in range(args.n))
        for images in batches():
            for image, name in zip(images, names):
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
