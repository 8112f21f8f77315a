"""A picture and the sound that belongs to it, by one network: both from text, or either from the other.

    python pairs.py                       # trains on toy pairs in seconds, and draws in all three directions
    python pairs.py train --picture-vae runs/shapes-vae --sound-vae runs/tones-vae --name pairs
    python pairs.py sample runs/pairs --prompt "a red circle" --n 4 --out drawn
    python pairs.py sample runs/pairs --picture drawn/000000.png --out its-sound        # or --sound FILE
    python pairs.py score runs/pairs      # the share of pairs in which both agree, in each direction

The two VAEs are runs of `train.py --arch vae`, with `--data shapes` and `--data tones`. A pair is a shape and
the tone of its colour and kind (tones.tone_of). mmdit.py has a stream of tokens for each, with a time of its
own: 0 where a side is given, 1 (noise) where it is not to matter; Bao et al. 2023 (arXiv:2303.06555,
UniDiffuser). What is drawn is one vector (B, n), so that samplers.py draws both at once.
"""

from __future__ import annotations

import cli

cli.quiet_imports(__name__)             # before those that take seconds

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import ema
import pictures
import sound
import tones
from beginning import read_picture, read_samples
from cache import LatentCache
from checkpoints import load_checkpoint, load_vae
from cli import Flag, folder_name, integer, make_parser, nonempty, number, one_of, program, signals
from data import batch_indices
from files import check_writable, digest
from machine import has_bf16, pick_device
from media import medium_of
from mmdit import MMDiTConfig
from networks import build_model, build_path, encoder_fingerprint, pack_vae, unpack_vae
from rectified_flow import RectifiedFlow
from run import Run
from samplers import SAMPLERS, guided, noise_like
from state import State
from tasks import posteriors
from text import TextConfig
from toys import SHAPE_CLASSES, draw_shape, read_shape
from train import forecast, learning_rate, parameter_groups

SIDES = ("picture", "sound")
# What is drawn, as shares of the training examples. Where it is one side alone, the other is given.
SHARES = {"both": 0.35, "picture": 0.25, "sound": 0.4}
# How often an example has no text. The kind of a shape is harder to read from a picture than the timbre of a
# tone from a sound, and it is read only where no text names it.
NO_TEXT = {"both": 0.1, "picture": 0.5, "sound": 0.8}
UNKNOWN = 0.1                                                # how often a given side is noise instead
PRESETS = {"tiny": dict(width=64, depth=2, heads=2, rope=(8, 12, 12)),
           "small": dict(width=192, depth=4, heads=3, rope=(24, 20, 20))}
CAPTIONS = ["a " + name.replace("-", " ") for name in SHAPE_CLASSES]
UNSEEN = 10**9 - 10**9 % len(CAPTIONS)                       # the first pair that training never contains


class Pair(NamedTuple):
    """What belongs to a picture and to a sound: latents, noise, times."""
    picture: Tensor
    sound: Tensor


# ---- training: which sides are drawn, at which times

class Draws(NamedTuple):
    """What is drawn of n examples, at random."""
    times: Pair           # (n,) each
    drawn: Pair           # (n,) each, bool: which sides are learned to draw
    silent: Tensor        # (n,) bool: without text


def draw_times(path, n: int) -> Draws:
    """A side that is drawn has a time from the path's density, the same for both; one that is given has time
    0, or now and then 1, where nothing of it is known: guidance leads away from what is drawn then. The text
    is left out independently of that."""
    what = torch.multinomial(torch.tensor(list(SHARES.values())), n, replacement=True)
    t = path.sample_t(n)
    given = (torch.rand(n) < UNKNOWN).float()
    silent = torch.rand(n) < torch.tensor(list(NO_TEXT.values()))[what]
    drawn = Pair(what != 2, what != 1)    # by the order of SHARES: 1 is the picture alone, 2 the sound alone
    return Draws(Pair(*(torch.where(side, t, given) for side in drawn)), drawn, silent)


def text_of(model: torch.nn.Module, prompts: list[str]) -> dict[str, Tensor]:
    """The conditions of B prompts, of which each different one is encoded once."""
    different = sorted({*prompts})
    rows = torch.tensor([different.index(prompt) for prompt in prompts])
    return {name: part[rows.to(part.device)] for name, part in model.text(different).items()}


def pair_loss(model: torch.nn.Module, path, pair: Pair, captions: Sequence[str],
              draws: Draws | None = None) -> Tensor:
    """(B,) the sum of the path's errors of the sides that are drawn; each side counts the same, however many
    numbers it has. pair: normalised latents, (B, C, h, w) and (B, C, 1, n)."""
    device = pair.picture.device
    draws = draws or draw_times(path, len(captions))
    times = Pair(*(t.to(device) for t in draws.times))
    eps = Pair(*map(torch.randn_like, pair))
    noisy = Pair(*map(path.add_noise, pair, eps, times))     # at time 0 exactly the side that is given
    text = text_of(model, ["" if silent else caption for silent, caption in zip(draws.silent, captions)])
    raws = model(noisy.picture, times.picture, **text, sound=noisy.sound, sound_t=times.sound)
    errors = [path.error(raw, *rest) for raw, *rest in zip(raws, pair, eps, times)]
    return sum(error * side.to(device) for error, side in zip(errors, draws.drawn))


# ---- drawing

class AsOne:
    """The network as samplers.guided calls one: xt (B, n) holds the sides that are drawn, one after another,
    at one time. known: the side that is given, (B, C, h, w), at the times known_t (B,)."""

    def __init__(self, model: torch.nn.Module, shapes: dict[str, tuple[int, ...]]):
        self.model = model
        self.shapes = shapes                                 # of the sides that are drawn

    def split(self, x: Tensor) -> dict[str, Tensor]:
        parts = x.split([math.prod(shape) for shape in self.shapes.values()], dim=1)
        return {side: part.unflatten(1, shape) for part, (side, shape) in zip(parts, self.shapes.items())}

    def __call__(self, xt: Tensor, t: Tensor, *, known: Tensor | None = None, known_t: Tensor | None = None,
                 **text: Tensor) -> Tensor:
        parts = self.split(xt)
        x = Pair(*(parts.get(side, known) for side in SIDES))
        times = Pair(*(t if side in parts else known_t for side in SIDES))
        raws = self.model(x.picture, times.picture, **text, sound=x.sound, sound_t=times.sound)
        return torch.cat([raw.flatten(1) for side, raw in zip(SIDES, raws) if side in parts], dim=1)


@torch.no_grad()
def draw(model: torch.nn.Module, path, shapes: dict[str, tuple[int, ...]], prompts: list[str], seeds: range,
         given: dict[str, Tensor] | None = None, *, sampler: str = "heun", steps: int = 10,
         scale: float = 2.0) -> Pair:
    """Normalised latents of B pairs, of which sample i depends on seeds[i] alone. shapes: of the latent of
    each side. given: one of the sides, which is returned as it is, or none. scale: of the guidance, away from
    what is drawn without text and without what is given."""
    given = given or {}
    device = next(model.parameters()).device
    drawn = {side: shape for side, shape in shapes.items() if side not in given}
    network = AsOne(model, drawn)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    count = sum(map(math.prod, drawn.values()))
    x = noise_like(torch.empty(len(seeds), count), generators).to(device)
    text = text_of(model, prompts + [""] * len(prompts))     # together, so that both are padded alike
    cond = {name: part[:len(prompts)] for name, part in text.items()}
    uncond = {name: part[len(prompts):] for name, part in text.items()}
    # Guidance leads away from noise at time 1, with which training has replaced a given side (UNKNOWN).
    for side, latent in given.items():
        noise = noise_like(torch.empty(len(seeds), *shapes[side]), generators).to(device)
        cond |= {"known": latent, "known_t": x.new_zeros(len(x))}
        uncond |= {"known": noise, "known_t": x.new_ones(len(x))}
    denoise = guided(network, path, cond, uncond, scale)
    x = SAMPLERS[sampler](denoise, path, x, path.times(steps), generator=generators)
    found = network.split(x) | given
    return Pair(*(found[side] for side in SIDES))


# ---- data: what is drawn by number, and its latents

class Side:
    """The autoencoder of one side, for pictures or sounds of one size."""

    def __init__(self, vae: torch.nn.Module, size: Sequence[int]):
        self.vae = vae
        self.size = tuple(size)
        self.medium = medium_of(vae.config)
        self.shape = vae.latent_shape(self.size)

    def example(self, i: int) -> np.ndarray:
        """Pair number i, of class i % 24: its picture, or the sound with other details of its own."""
        if self.medium.rate is None:
            return draw_shape(i, self.size)
        label = tones.tone_of(*SHAPE_CLASSES[i % len(SHAPE_CLASSES)].split("-"))
        return tones.draw_class(label, i, self.size[1], self.medium.rate)

    @torch.no_grad()
    def encode(self, arrays: np.ndarray) -> Tensor:
        """Normalised means of the latents."""
        x = self.medium.to_tensor(arrays).to(self.vae.latent_mean.device)
        return self.vae.normalize(self.vae.encode(x).mean)

    @torch.no_grad()
    def decode(self, x0: Tensor) -> np.ndarray:
        return self.medium.to_array(self.vae.decode(self.vae.denormalize(x0)))

    def latents(self, folder: Path, count: int) -> LatentCache:
        """Those of the first pairs, encoded once."""
        examples = Examples(self.example, count)
        # Two pairs of each class show whether what is drawn by number has changed.
        stamp = {"vae": encoder_fingerprint(self.vae),
                 "data": digest("pairs", examples[np.arange(min(count, 48))])}
        return LatentCache(folder / f"{self.medium.name}.npy", examples,
                           posteriors(self.vae, lambda arrays: 64), self.shape, stamp)    # 64 at a time


class Examples:
    """What a cache of latents encodes: arrays by their numbers, drawn when they are asked for."""

    def __init__(self, example: Callable[[int], np.ndarray], count: int):
        self.example = example
        self.shape = (count, *example(0).shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return np.stack([self.example(int(i)) for i in numbers])


def side_of_run(flag: str, path: str | None, sounds: bool, patch: int = 2) -> Side:
    """The side whose VAE is the run at `path`, in the size that it was trained on. patch: what must divide
    the sides of its latent. Raises ValueError with a line for the user."""
    data = "tones" if sounds else "shapes"
    if path is None:
        raise ValueError(f"{flag} is missing: give a run of python train.py --arch vae --data {data}")
    size = load_checkpoint(path)["data"]["size"]
    side = Side(load_vae(path), size)
    if (side.medium.rate is not None) != sounds:
        raise ValueError(f"{flag} {path}: an autoencoder of {side.medium.name}; give a run of python "
                         f"train.py --arch vae --data {data}")
    if sounds:
        tones.check_window(size[1], side.medium.rate)
        if side.shape[2] % patch:
            raise ValueError(f"--sound-patch {patch}: does not divide the {side.shape[2]} frames of {path}; "
                             "give a divisor")
    elif side.vae.config.image_channels != 3:
        raise ValueError(f"{flag} {path}: for pictures with {side.vae.config.image_channels} channels; "
                         "shapes have 3")
    elif side.shape[1] % patch or side.shape[2] % patch:
        raise ValueError(f"{flag} {path}: a latent of {side.shape[1]} x {side.shape[2]} for {size[0]} x "
                         f"{size[1]} pixels; must be even")
    return side


def stored_sides(checkpoint: dict) -> dict[str, Side]:
    sizes = checkpoint["data"]["size"], [1, checkpoint["data"]["length"]]
    vaes = unpack_vae(checkpoint["vae"]), unpack_vae(checkpoint["sound_vae"])
    return {side: Side(vae, size) for side, vae, size in zip(SIDES, vaes, sizes)}


# ---- train

def new_state(args: argparse.Namespace, sides: dict[str, Side], device: torch.device) -> State:
    torch.manual_seed(args.seed)
    words = TextConfig(width=64, depth=1, heads=2)
    config = MMDiTConfig(channels=sides["picture"].shape[0], sound_channels=sides["sound"].shape[0],
                         sound_patch=(1, args.sound_patch), context_width=words.width,
                         pooled_width=words.width, **PRESETS[args.preset])
    model = build_model("mmdit", asdict(config), {"encoder": "bytes", "config": asdict(words)}).to(device)
    averages = {length: copy.deepcopy(model).eval().requires_grad_(False)
                for length in ema.widths_kept(args.ema)}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.01), lr=args.lr, betas=(0.9, 0.95))
    return State(model, averages, device, optimizer)


def checkpoint_of(args: argparse.Namespace, state: State, sides: dict[str, Side], run: Run,
                  step: int) -> dict:
    """As that of any run, with a second VAE."""
    if not state.is_finite():
        raise diverged("weights that are not finite", step, run)
    training = {"settings": settings_of(args), "data": "pairs", "finished": step == args.steps}
    return {"arch": "mmdit", "config": asdict(state.model.config), "step": step,
            "objective": {"name": "rf", "shift": args.shift},
            "data": {"source": "pairs", "size": list(sides["picture"].size), "classes": [],
                     "length": sides["sound"].size[1]},
            "text": {"encoder": "bytes", "config": asdict(state.model.text.config)},
            "label_dropout": NO_TEXT["both"], "vae": pack_vae(sides["picture"].vae),
            "sound_vae": pack_vae(sides["sound"].vae), **state.weights(),
            "training": training | state.training(run, step)}


def diverged(what: str, step: int, run: Run) -> FloatingPointError:
    return FloatingPointError(f"{what} at step {step:,}: stopped. {run.checkpoint} holds the last good "
                              "weights; begin another --name with a lower --lr")


def settings_of(args: argparse.Namespace) -> dict:
    """The settings with which a run must be continued."""
    return {flag.key: getattr(args, flag.key) for flag in FLAGS["train"] if not flag.resumable}


def load_pairs(run: Run) -> dict | None:
    """The checkpoint, if the run has begun. Raises ValueError for one of another program."""
    saved = run.load()
    if saved is not None and "sound_vae" not in saved:
        raise ValueError(f"{run.checkpoint}: not a run of pairs.py; give another")
    return saved


def check_settings(args: argparse.Namespace, run: Run, saved: dict) -> None:
    for name, now in settings_of(args).items():
        before = saved["training"].get("settings", {}).get(name)
        if before != now:
            raise ValueError(f"{run.folder} holds a run with --{name.replace('_', '-')} {before}, not {now}; "
                             "repeat its settings to continue it, or use another --name")


def sides_of(args: argparse.Namespace, run: Run, saved: dict | None) -> dict[str, Side]:
    """Those of the checkpoint, whose settings must be these, and which needs --picture-vae and --sound-vae no
    longer; or those that a new run begins with."""
    if saved:
        check_settings(args, run, saved)
        return stored_sides(saved)
    return {"picture": side_of_run("--picture-vae", args.picture_vae, sounds=False),
            "sound": side_of_run("--sound-vae", args.sound_vae, sounds=True, patch=args.sound_patch)}


def train(args: argparse.Namespace) -> int:
    """Train, or continue a training bit for bit; the exit status is 0, or 128 + N after signal N."""
    # ---- whatever can be refused is refused before a file is written
    run = Run(Path(args.runs_dir) / args.name)
    check_writable(run.folder)
    device = pick_device(args.device)
    sides = sides_of(args, run, load_pairs(run))
    with run.hold():
        saved = load_pairs(run)                # another process may have begun it, or gone on, meanwhile
        if saved:
            sides = sides_of(args, run, saved)
        if saved and saved["step"] == args.steps:
            print(f"{run.folder} is finished: {args.steps:,} steps")
            return 0
        for side in sides.values():
            side.vae.to(device)
        caches = Pair(*(side.latents(run.folder, args.pairs) for side in sides.values()))
        state = new_state(args, sides, device)
        start = 0
        if saved:
            start = saved["step"]
            state.restore(saved, str(run.checkpoint))
        run.rewind_metrics(start)
        return loop(args, run, state, sides, caches, start)


def loop(args: argparse.Namespace, run: Run, state: State, sides: dict[str, Side], caches: Pair,
         start: int) -> int:
    """From the first or the saved step to the last. Returns the exit status, as `train`."""
    path = RectifiedFlow(shift=args.shift)
    millions = sum(p.numel() for p in state.model.parameters()) / 1e6
    bf16 = has_bf16(state.device)
    print(f"{run.folder}: a network with {millions:.1f} M parameters on {args.pairs:,} pairs; "
          f"{state.device.type}, {'bf16 autocast' if bf16 else 'fp32'}; step {start:,} of {args.steps:,}",
          flush=True)
    losses = []
    with signals() as received:
        bar = tqdm(range(start, args.steps), initial=start, total=args.steps, desc=args.name, unit="step",
                   mininterval=0.5)
        for step in bar:
            for group in state.optimizer.param_groups:
                group["lr"] = learning_rate(step, args)
            numbers = batch_indices(args.pairs, args.batch_size, step, args.seed)
            pair = Pair(*(side.vae.normalize(cache.batch(numbers).to(state.device))
                          for side, cache in zip(sides.values(), caches)))
            captions = [CAPTIONS[i % len(CAPTIONS)] for i in numbers]
            with torch.autocast(state.device.type, torch.bfloat16, enabled=bf16):
                loss = pair_loss(state.model, path, pair, captions).mean()
            loss.backward()
            state.clip_gradients(1.0)
            state.optimizer.step()
            state.optimizer.zero_grad(set_to_none=True)
            done = step + 1
            state.average(done)
            losses.append(loss.detach())

            # the first steps are slower
            if done == start + 5:
                began = time.monotonic()
            if done == start + 25:
                seconds = (time.monotonic() - began) / 20
                bar.write(forecast(seconds, args.steps - done, state.device, "and then it can be scored"))
            stopping = bool(received)          # read once: a later signal ends the next step
            saves = done == args.steps or stopping or done % args.save_every == 0
            # Also before each checkpoint, so that a run that goes on logs the same means.
            if done % 20 == 0 or saves:
                mean = torch.stack(losses).mean().item()
                if not math.isfinite(mean):
                    raise diverged(f"loss {mean}", done, run)
                run.record({"step": done, "loss": mean})
                bar.set_postfix(loss=f"{mean:.4f}")
                losses.clear()
            if saves:
                run.save(checkpoint_of(args, state, sides, run, done))
                run.plot_loss()
            if stopping and done < args.steps:
                bar.close()
                print(f"stopped at step {done:,} of {args.steps:,}, saved; the same command continues")
                return 128 + received[0]
    print(f"{run.folder}: done; python pairs.py score {run.folder}")
    return 0


# ---- sample and score

class Trained(NamedTuple):
    """A run's network, with averaged weights, its path, and its autoencoders."""
    model: torch.nn.Module
    path: RectifiedFlow
    sides: dict[str, Side]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: side.shape for name, side in self.sides.items()}


def load_trained(args: argparse.Namespace) -> Trained:
    device = pick_device(args.device)
    checkpoint = load_checkpoint(args.run)
    if "sound_vae" not in checkpoint:
        raise ValueError(f"{args.run}: not a run of pairs.py; train one with pairs.py train")
    model = build_model("mmdit", checkpoint["config"], checkpoint["text"])
    model.load_state_dict(checkpoint["ema"])
    sides = stored_sides(checkpoint)
    for side in sides.values():
        side.vae.to(device)
    model = model.to(device).eval().requires_grad_(False)
    return Trained(model, build_path(checkpoint["objective"]), sides)


def draw_all(args: argparse.Namespace, trained: Trained, prompts: list[str], seed: int,
             given: dict[str, np.ndarray] | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Pictures and sounds, one for each prompt, in batches. A given side is returned as it is."""
    given = given or {}
    found: dict[str, list[np.ndarray]] = {side: [] for side in SIDES}
    for begin in tqdm(range(0, len(prompts), args.batch_size), unit="batch", disable=len(prompts) < 8):
        part = slice(begin, min(begin + args.batch_size, len(prompts)))
        latents = {side: trained.sides[side].encode(arrays[part]) for side, arrays in given.items()}
        pair = draw(trained.model, trained.path, trained.shapes, prompts[part],
                    range(seed + part.start, seed + part.stop), latents, sampler=args.sampler,
                    steps=args.steps, scale=args.cfg)
        for side, x0 in zip(SIDES, pair):
            found[side].append(given[side][part] if side in given else trained.sides[side].decode(x0))
    return tuple(np.concatenate(found[side]) for side in SIDES)


def sample(args: argparse.Namespace) -> None:
    """Draw pairs, and write each as NUMBER.png beside NUMBER.wav."""
    if args.picture and args.sound:
        raise ValueError("--picture with --sound: nothing is left to draw; give one of them")
    if not (args.prompt or args.picture or args.sound):
        raise ValueError("nothing to draw from; give --prompt, --picture or --sound")
    out = Path(args.out)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file; give a folder")
    check_writable(out)
    given = {}
    trained = load_trained(args)
    count = args.n or max(1, len(args.prompt or []))
    rate = trained.sides["sound"].medium.rate
    if args.picture:
        picture = read_picture("--picture", args.picture, trained.sides["picture"].size)
        given["picture"] = np.stack([picture] * count)
    if args.sound:
        length = trained.sides["sound"].size[1]
        samples = read_samples("--sound", args.sound, length, rate)
        given["sound"] = np.stack([np.pad(samples, (0, length - len(samples)))] * count)
    asked = args.prompt or [""]
    prompts = [asked[i % len(asked)] for i in range(count)]
    images, sounds = draw_all(args, trained, prompts, args.seed, given)
    out.mkdir(parents=True, exist_ok=True)
    for i, (image, samples) in enumerate(zip(images, sounds)):
        pictures.write_picture(out / f"{i:06d}.png", Image.fromarray(image))
        sound.write_wav(out / f"{i:06d}.wav", samples, rate)
    print(f"{out}: {count} pictures, each with its sound")


class Read(NamedTuple):
    """Of n pairs, by class: how many pictures and sounds are as asked for, and how many pairs are wholly."""
    pictures: int
    sounds: int
    pairs: int


def read_pairs(images: np.ndarray, sounds: np.ndarray, rate: int) -> Read:
    """Pair i is right if its picture is read as of class i % 24 and its sound as the tone of that class."""
    right = []
    for i, (image, samples) in enumerate(zip(images, sounds)):
        colour, kind = SHAPE_CLASSES[i % len(SHAPE_CLASSES)].split("-")
        tone = tones.read_tone(samples, rate)
        heard = tone is not None and tone.label == tones.tone_of(colour, kind)
        right.append((read_shape(image) == (colour, kind), heard))
    return Read(sum(seen for seen, _ in right), sum(heard for _, heard in right), sum(map(all, right)))


def score(args: argparse.Namespace) -> None:
    """Print how many pairs are right on both sides, in each of the three directions."""
    trained = load_trained(args)
    rate = trained.sides["sound"].medium.rate
    fresh = {name: np.stack([side.example(UNSEEN + i) for i in range(args.n)])
             for name, side in trained.sides.items()}
    captions = [CAPTIONS[i % len(CAPTIONS)] for i in range(args.n)]
    silent = [""] * args.n
    print(f"{args.run}: {args.n} pairs each, {args.sampler} x {args.steps}, guidance {args.cfg:g}")
    # What the autoencoders lose bounds every other row. In eight parts, because of the memory.
    again = [np.concatenate([side.decode(side.encode(part)) for part in np.array_split(fresh[name], 8)])
             for name, side in trained.sides.items()]
    rows = {"the autoencoders alone": again,
            "text -> both": draw_all(args, trained, captions, args.seed),
            "picture -> sound": draw_all(args, trained, silent, args.seed, {"picture": fresh["picture"]}),
            "sound -> picture": draw_all(args, trained, silent, args.seed, {"sound": fresh["sound"]})}
    for name, (images, sounds) in rows.items():
        read = read_pairs(images, sounds, rate)
        print(f"  {name:22s} {read.pairs / args.n:6.1%} of pairs agree; right pictures {read.pictures}, "
              f"sounds {read.sounds}")


# ---- the command line

DRAWING = [
    Flag("run", "run folder of pairs.py, or its checkpoint", nonempty),
    Flag("--cfg", "guidance scale (default: 2; 1: none)", number(-100, 100), 2.0),
    Flag("--sampler", "heun (default), euler or another of samplers.py", one_of(set(SAMPLERS) - {"jump"}),
         "heun"),
    Flag("--steps", "steps of the sampler (default: 10)", integer(1, 10_000), 10),
    Flag("--seed", "seed of the first pair; each further pair has the next one (default: 0)",
         integer(0, 2**62), 0),
    Flag("--batch-size", "pairs that are drawn at a time (default: 60)", integer(1), 60),
    Flag("--device", "auto (default), cpu, cuda, cuda:1, mps", nonempty, "auto"),
]
FLAGS = {
    "train": [
        Flag("--picture-vae", "a finished run of train.py --arch vae --data shapes", nonempty,
             resumable=True),
        Flag("--sound-vae", "a finished run of train.py --arch vae --data tones; its --seconds are those of "
                            "the sounds", nonempty, resumable=True),
        Flag("--name", "run folder within --runs-dir (default: pairs)", folder_name, "pairs", resumable=True),
        Flag("--runs-dir", "folder that holds the runs (default: runs)", nonempty, "runs", resumable=True),
        Flag("--preset", f"size of the network: {' or '.join(PRESETS)} (default: small)", one_of(PRESETS),
             "small"),
        Flag("--sound-patch", "latent frames of the sound in a token (default: 2)", integer(1, 4096), 2),
        Flag("--pairs", "how many different pairs to train on (default: 20,000)", integer(1, 10**8), 20_000),
        Flag("--steps", "optimizer steps (default: 11,000)", integer(1), 11_000),
        Flag("--batch-size", "pairs per step (default: 64)", integer(1), 64),
        Flag("--lr", "learning rate (default: 0.0015)", number(0, 1, above=True), 1.5e-3),
        Flag("--warmup", "steps over which the rate rises (default: 100)", integer(0), 100),
        Flag("--cooldown", "share of the steps, at the end, over which it falls to 0 (default: 0.5)",
             number(0, 1), 0.5),
        Flag("--shift", "shift of the times: the higher, the more of the training is at high noise, where a "
                        "side is not yet recognised and must be read from the other (default: 3; 1: none)",
             number(0, 1000, above=True), 3.0),
        Flag("--ema", "width of the average of the weights, relative to the training (default: 0.05)",
             number(0, ema.WIDEST / 2, above=True), 0.05),
        Flag("--seed", "seed of weights, order and noise (default: 0)", integer(0, 2**62), 0),
        Flag("--save-every", "steps between checkpoints (default: 250)", integer(1), 250, resumable=True),
        Flag("--device", "auto (default), cpu, cuda, cuda:1, mps", nonempty, "auto", resumable=True),
    ],
    "sample": [
        *DRAWING,
        Flag("--prompt", "what to draw, like 'a red circle'; several are taken in turn", str, nargs="+"),
        Flag("--picture", "draw the sound of this picture", nonempty),
        Flag("--sound", "draw the picture of this sound", nonempty),
        Flag("--n", "how many pairs (default: one for each prompt)", integer(1, 10**6)),
        Flag("--out", "folder for NUMBER.png and NUMBER.wav (default: drawn)", nonempty, "drawn"),
    ],
    "score": [
        *DRAWING,
        Flag("--n", "how many pairs in each direction (default: 240)", integer(8, 10**6), 240),
    ],
}
COMMANDS = {"train": train, "sample": sample, "score": score}


def demo() -> None:
    """Toy pairs: one of four patterns as a picture of 4 x 4, and its number as the pitch of a sound of 8."""
    torch.manual_seed(0)
    names = ["one", "two", "three", "four"]
    looks = torch.randn(4, 2, 4, 4)
    waves = torch.stack([torch.sin(math.pi * (k + 1) * (torch.arange(8) + 0.5) / 8) for k in range(4)])
    wanted = Pair(looks, 1.4 * waves[:, None, None])
    shapes = {"picture": (2, 4, 4), "sound": (1, 1, 8)}

    def fresh(labels: Tensor) -> Pair:
        return Pair(*(side[labels] + 0.2 * torch.randn(len(labels), *side.shape[1:]) for side in wanted))

    model = build_model("mmdit", asdict(MMDiTConfig(channels=2, sound_channels=1, context_width=32,
                                                    pooled_width=32, sound_patch=(1, 4), **PRESETS["tiny"])),
                        {"encoder": "bytes", "config": dict(width=32, depth=1, heads=2)})
    path, optimizer = RectifiedFlow(), torch.optim.AdamW(model.parameters(), lr=3e-3, betas=(0.9, 0.95))
    for step in range(401):
        labels = torch.randint(4, (32,))
        loss = pair_loss(model, path, fresh(labels), [names[i] for i in labels]).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step:3d}  loss {loss.item():.3f}")
    labels = torch.arange(32) % 4
    given = fresh(labels)
    for direction, sides in (("text -> both", {}), ("picture -> sound", {"picture": given.picture}),
                             ("sound -> picture", {"sound": given.sound})):
        prompts = [names[i] if not sides else "" for i in labels]
        pair = draw(model, path, shapes, prompts, range(32), sides, steps=5, scale=1.0)
        seen, heard = (torch.cdist(x.flatten(1), side.flatten(1)).argmin(1) for x, side in zip(pair, wanted))
        agree = int(((seen == labels) & (heard == labels)).sum())
        print(f"{direction}: {agree} of 32 pairs agree")


def parse_args(argv: list[str]) -> argparse.Namespace:
    """The flags of a command, whose name comes first."""
    if argv[0] not in COMMANDS:
        raise ValueError(f"{argv[0]}: must be one of {', '.join(COMMANDS)}; each has --help")
    parser = make_parser(COMMANDS[argv[0]].__doc__, {argv[0]: FLAGS[argv[0]]})
    parser.prog = f"pairs.py {argv[0]}"
    return parser.parse_args(argv[1:])


def main(argv: list[str] | None = None) -> int | None:
    """Returns the exit status of a training; None otherwise."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        return demo()
    if argv[0] in ("-h", "--help"):
        print(__doc__)
        return None
    args = parse_args(argv)
    return COMMANDS[argv[0]](args)


if __name__ == "__main__":
    sys.exit(program("pairs.py", main))
