"""What is trained: the two tasks that train.py's loop knows, the VAE's and the network's.

    python tasks.py                      # one loss and one validation of each, on pictures drawn here

A task provides the model, the loss of a batch, validation, previews, and what is measured at the end.
Validation and previews take minutes on large pictures, so they raise Interrupted soon after a signal has
come: once `stop`, the list that `cli.signals` fills, is no longer empty.

Shapes: B batch, C channels, H W picture size, h w latent size, N validation pictures.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import conditioning
import moe
import settings
from cache import LatentCache, PairCache, noise_of, pieces
from cli import program
from conditioning import VALIDATED
from data import Dataset, Order, load_drawn, order_of, send
from draw import draw_batches, picture_bar
from files import fingerprint_tensors
from media import medium_at, medium_of
from networks import build_model, build_path, encoder_fingerprint
from plan import Plan, prepare, reflow_scale
from ranks import Ranks
from samplers import SAMPLERS, guided
from settings import OBJECTIVES
from shards import ShardLatents, ShardOrder, ShardPictures
from vae import VAE

PREVIEW_BATCH = 64     # pictures drawn at a time, for samples.png and previews
# Samples of a sound that its autoencoder sees in a step, from a random place on: parts of four sounds teach
# more than one sound of four times the length.
CROP = 2048


# ---- what is done outside training steps: in how many pieces, and when it ends

def at_once(args: argparse.Namespace, ranks: Ranks, most: int, size: tuple[int, int] | None = None) -> int:
    """How many of `most` pictures to take at a time where no gradients are kept. ranks: the processes that
    share each batch. size: of pictures that pass the VAE, which needs much memory for large ones.

    What fits is known from the training step. It keeps the outputs of all layers, dozens of them, where a
    pass without gradients holds two or three at a time: at least four times as many pictures fit. A step with
    --grad-checkpoint keeps few, so no more pictures than it has may fit."""
    if size is not None:
        most = len(pieces((most, *size, 1))[0])
    piece = args.batch_size // args.accumulate // ranks.shares
    return min(most, piece if args.grad_checkpoint else 4 * piece)


class Interrupted(Exception):
    """A signal came during a validation or a preview, which therefore ended without a result."""


def watched(parts: Iterable, stop: list[int], what: str, **options) -> Iterator:
    """The parts, one by one, behind a bar that appears where they take more than two seconds. Raises
    Interrupted once `stop` is not empty."""
    for part in tqdm(parts, desc=what, delay=2, leave=False, **options):
        if stop:
            raise Interrupted
        yield part


# ---- the two tasks

class Batches:
    """Which examples a step takes, for the tasks on pictures of one size."""

    order: Order | ShardOrder       # called with a step, it returns their indices

    def order_for(self, data: Dataset, count: int) -> Order | ShardOrder:
        args = self.args
        return order_of(data, count, args.batch_size, args.seed, args.limit, args.shuffle_shards)

    def split(self, batch: np.ndarray) -> list[np.ndarray]:
        """The pieces of --accumulate."""
        return np.split(batch, self.args.accumulate)


class Autoencoding(Batches):
    """The task of the VAE: reconstruct pictures through a Gaussian latent."""

    objective = None      # a VAE's checkpoint has no objective and no other VAE
    vae = None
    pairs = None

    def __init__(self, args: argparse.Namespace, data: Dataset, val: Dataset, plan: Plan, cache_dir: Path):
        self.args = args
        self.data = data
        self.cache_dir = cache_dir
        self.device = plan.device
        self.ranks = plan.ranks
        self.order = self.order_for(data, len(data))
        self.medium = medium_at(data.rate)
        self.val = self.medium.to_tensor(val.images[:VALIDATED]).to(self.device)   # kept for every validation
        self.val_seconds = val.seconds

    def expect(self, batches: Iterable[np.ndarray]) -> None:
        """Read ahead what the coming calls of `loss` need. batches: their indices."""
        if isinstance(self.data.images, ShardPictures):
            self.data.images.expect(batch[self.ranks.part(len(batch))] for batch in batches)

    def build(self) -> VAE:
        return build_model("vae", settings.vae_config(self.args, self.data.images.shape[-1]))

    def weights(self) -> dict:
        """Arguments of `model.loss` that only an autoencoder of sounds takes."""
        return {} if self.medium.rate is None else {"waveform": self.args.waveform_weight}

    def loss(self, model: VAE, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B,) loss, and (B,) zeros in place of times, which a VAE does not have; of this rank's part of the
        batch."""
        part = self.ranks.part(len(indices))
        x = self.medium.to_tensor(self.data.images[indices[part]])     # (B, C, H, W) in [-1, 1]
        if self.args.flip:                                             # each picture independently
            mirrored = torch.rand(len(indices), 1, 1, 1) < 0.5
            x = torch.where(mirrored[part], x.flip(-1), x)
        if self.medium.rate is not None and x.shape[-1] > CROP:
            starts = (torch.rand(len(indices)) * (x.shape[-1] - CROP + 1)).long()[part]
            x = torch.stack([row[:, start:start + CROP] for row, start in zip(x, starts.tolist())])
        more = self.weights()
        if self.args.equivariance:                                     # of pictures only
            more["equivariance"] = self.args.equivariance
        loss, _ = model.loss(send(x, self.device), self.args.kl_weight, noise=self.args.latent_noise,
                             rows=(len(indices), part), **more)
        return loss, loss.new_zeros(len(x))

    def validate(self, model: VAE, stop: list[int]) -> dict:
        generator = torch.Generator(self.device).manual_seed(0)        # the same noise each time
        size = at_once(self.args, self.ranks, VALIDATED, self.val.shape[2:])
        losses, latents, totals = [], [], {}
        for x in watched(self.val.split(size), stop, "validate"):
            loss, logs = model.loss(x, self.args.kl_weight, generator, **self.weights())
            losses.append(loss)
            for name in (self.medium.quality, "kl"):                   # means, weighted by the piece's size
                totals[name] = totals.get(name, 0.0) + len(x) / len(self.val) * logs[name]
            # The spread over all pictures does not follow from that of the pieces.
            latents.append(model.encode(x).mean)
        record = {"val_loss": torch.cat(losses).mean()} | totals
        record["latent_std"] = torch.cat(latents).std(dim=(0, 2, 3))
        return {name: value.tolist() for name, value in record.items()}

    def preview(self, model: VAE, stop: list[int], rows: int = 0) -> Image.Image:
        """Pictures, each with its reconstruction below."""
        row = 16 if self.medium.rate is None else 8
        x = self.val[:2 * row]
        parts = x.split(at_once(self.args, self.ranks, 16, x.shape[2:]))
        again = torch.cat([model.decode(model.encode(part).mean)
                           for part in watched(parts, stop, "reconstruct")])
        pairs = [torch.cat(pair) for pair in zip(x.split(row), again.split(row))]
        return self.medium.show(self.medium.to_array(torch.cat(pairs)), columns=min(row, len(x)))

    def finish(self, networks: list[VAE], average: Callable[[], VAE]) -> None:
        """Measure the scale of the latents, once. networks: the trained one and its averages. average: makes
        the first of these, which later runs use, with all of its weights in this process."""
        mean, var = self.encoded(average()).statistics()
        for network in networks:
            network.set_latent_statistics(mean, var)

    def encoded(self, vae: VAE) -> LatentCache:
        """The latents of all pictures."""
        return encode_latents(self.args, self.ranks, vae, self.data, self.cache_dir)


def even_times(n: int, generator: torch.Generator) -> Tensor:
    """(n,) times spread evenly over [0, 1], in random order: each bucket of val_by_time holds a quarter."""
    return ((torch.arange(n) + 0.5) / n)[torch.randperm(n, generator=generator)]


class Denoising(Batches):
    """The task of a network in latent space: predict the path's target from a noisy latent."""

    def __init__(self, args: argparse.Namespace, data: Dataset, val: Dataset, plan: Plan, cache_dir: Path):
        self.args = args
        self.device = plan.device
        self.ranks = plan.ranks
        self.vae = plan.vae.to(plan.device)
        self.conditioning = plan.conditioning
        self.objective = settings.objective_config(args)
        self.path = build_path(self.objective)
        self.medium = medium_at(data.rate)
        self.pairs = None
        self.open_latents(data, plan, cache_dir)
        self.hold_out(val, plan)

    def open_latents(self, data: Dataset, plan: Plan, cache_dir: Path) -> None:
        """Set what is trained on, latents or pairs, and its order."""
        if self.args.reflow:
            self.pairs = draw_pairs(self.args, plan, data, cache_dir)
            count = len(self.pairs) - VALIDATED
            self.order = self.order_for(data, count)
            self.conditioning.take_turns(count)
        else:
            self.order = self.order_for(data, len(data))
            self.cache = data.latents or encode_latents(self.args, self.ranks, self.vae, data, cache_dir)

    def hold_out(self, val: Dataset, plan: Plan) -> None:
        """Set what validation uses: fixed pictures, noise and times, so that its losses can be compared
        between steps."""
        if val.latents is not None:
            self.x0 = self.vae.normalize(val.latents.means().to(self.device))
        else:
            parts = self.medium.to_tensor(val.images[:VALIDATED])
            parts = parts.split(at_once(self.args, self.ranks, 32, val.images.shape[1:3]))
            with torch.no_grad():
                self.x0 = torch.cat([self.vae.normalize(self.vae.encode(x.to(self.device)).mean)
                                     for x in tqdm(parts, desc=f"encode validation {self.medium.name}",
                                                   leave=False)])
        n = len(self.x0)
        generator = torch.Generator().manual_seed(0)
        self.t = even_times(n, generator).to(self.device)
        self.eps = torch.randn(self.x0.shape, generator=generator).to(self.device)
        if self.pairs is not None:             # those that are not trained on; n may be less in small data
            first = len(self.pairs) - VALIDATED
            held_out = self.pairs.batch(np.arange(first, first + n))
            self.x0, self.eps = (part.to(self.device) for part in held_out)

    def build(self) -> torch.nn.Module:
        config = settings.network_config(self.args, self.vae.config.latent_channels, self.conditioning)
        model = build_model(self.args.arch, config, self.conditioning.text)
        # The losses of the pieces of a batch are averaged, and so is this one.
        moe.set_balance(model, (self.args.balance or 0.0) / self.args.accumulate)
        return model

    def expect(self, batches: Iterable[np.ndarray]) -> None:
        """Read ahead what the coming calls of `loss` need. batches: their indices."""
        if self.pairs is None and isinstance(self.cache, ShardLatents):
            self.cache.expect(batch[self.ranks.part(len(batch))] for batch in batches)

    def loss(self, model: torch.nn.Module, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        """(B,) loss and the (B,) times at which it was taken; of this rank's part of the batch."""
        # Keep the order of the random draws (latent, dropout, rewording, time, noise): otherwise a seed would
        # mean another run, and runs that began before the change would not resume bit for bit.
        n = len(indices)
        part = self.ranks.part(n)                                      # of numbers that are drawn for all
        if self.pairs is not None:
            x0, eps = (send(half, self.device) for half in self.pairs.batch(indices[part]))
        else:
            z = self.cache.batch(indices, part)                        # a fresh draw from the posterior
            x0 = self.vae.normalize(send(z, self.device))              # (B, C, h, w), mean 0 and std 1
        dropped = torch.rand(n) < self.args.label_dropout              # each example independently
        cond = self.conditioning.batch(model, indices, dropped, part)  # y, or context, mask, pooled
        length = self.conditioning.lengths(indices[part])              # of sounds, never dropped
        drawn = self.path.training_times(n)
        times = {name: send(t[part], self.device) for name, t in drawn.items()}
        if self.pairs is None:                                         # else the one that x0 was drawn from
            eps = torch.randn(n, *x0.shape[1:], device=self.device)[part]
        fixed = self.guiding(model, dropped[part], length)
        if "s" in drawn:                                               # as one for all parts of the batch
            fixed["derive"] = bool((drawn["s"] < drawn["t"]).any())
        return self.path.loss(model, x0, eps=eps, **times, **fixed, **cond, **length), times["t"]

    def guiding(self, model: torch.nn.Module, dropped: Tensor, length: dict[str, Tensor]) -> dict:
        """Further arguments of a loss that learns guided velocities. dropped (B,), bool: where there is no
        condition to guide toward. length: of the sounds, which guidance leaves as it is."""
        if getattr(self.path, "guidance", 1) == 1 or not self.conditioning.guidable:
            return {}
        any_pictures = np.zeros(len(dropped), dtype=int)               # all of their conditions are dropped
        with torch.no_grad():
            null = self.conditioning.batch(model, any_pictures, torch.ones_like(dropped))
        return {"uncond": null | length, "dropped": send(dropped, self.device)}

    def validate(self, model: torch.nn.Module, stop: list[int]) -> dict:
        losses = []
        size = at_once(self.args, self.ranks, VALIDATED)
        with moe.counted(model) as loads:                              # of experts, where there are any
            for start in watched(range(0, len(self.x0), size), stop, "validate"):
                part = slice(start, min(start + size, len(self.x0)))
                cond = self.conditioning.validation(model, part)
                length = self.conditioning.validation_lengths(part)
                cond |= length | self.guiding(model, torch.zeros(len(self.t[part]), dtype=torch.bool), length)
                losses.append(self.path.loss(model, self.x0[part], t=self.t[part], eps=self.eps[part],
                                             **cond))
        return self.record(torch.cat(losses)) | loads.record()

    def record(self, loss: Tensor) -> dict:
        """The record of a validation with these losses (N,)."""
        # A mean over all times hides where a network fails: near noise, near data or in between.
        quarter = (self.t * 4).long()
        by_time = {}
        for i in quarter.unique().tolist():
            by_time[f"{i / 4}-{(i + 1) / 4}"] = loss[quarter == i].mean().item()
        return {"val_loss": loss.mean().item(), "val_by_time": by_time}

    def preview(self, model: torch.nn.Module, stop: list[int], rows: int = 3) -> Image.Image:
        """Samples, with guidance 2 where the network is trained for it."""
        asked = self.conditioning.with_lengths(self.conditioning.preview(model, rows))
        defaults = OBJECTIVES[self.objective["name"]]
        # Picture i is drawn with seed i in every preview, so that previews of two steps can be compared.
        seeds = range(len(asked.turn))
        # Guidance takes each picture twice.
        size = max(1, at_once(self.args, self.ranks, 2 * PREVIEW_BATCH) // 2)
        with picture_bar(len(seeds), desc="draw samples", unit=self.medium.unit, delay=2,
                         leave=False) as bar:
            def progress(done: float) -> None:                         # after each step of the sampler
                if stop:
                    raise Interrupted
                bar.update(done - bar.n)

            images = list(draw_batches(model, self.vae, self.path, self.x0.shape[1:], asked, seeds, size,
                                       progress=progress, sampler=defaults.sampler, steps=defaults.steps,
                                       scale=defaults.scale if self.conditioning.guidable else 1.0))
        return self.medium.show(np.concatenate(images), asked.columns, asked.captions, asked.seconds)

    def finish(self, networks: list[torch.nn.Module], average: Callable[[], torch.nn.Module]) -> None:
        pass                                                           # nothing is left to measure


Task = Autoencoding | Denoising


def posteriors(vae: VAE, most: Callable[[np.ndarray], int]) -> Callable[[np.ndarray, bool],
                                                                        tuple[Tensor, Tensor]]:
    """What a cache of latents calls to encode pictures, most(pictures) of them at a time."""
    device = next(vae.parameters()).device

    def encode(images: np.ndarray, mirrored: bool) -> tuple[Tensor, Tensor]:
        means, stds = [], []
        for x in medium_of(vae.config).to_tensor(images).split(most(images)):
            # The picture is mirrored, not the latent: an encoder does not commute with mirroring.
            x = x.to(device)
            posterior = vae.encode(x.flip(-1) if mirrored else x)
            means.append(posterior.mean)
            stds.append(posterior.std)
        return torch.cat(means), torch.cat(stds)
    return encode


def encode_latents(args: argparse.Namespace, ranks: Ranks, vae: VAE, data: Dataset,
                   cache_dir: Path) -> LatentCache:
    encode = posteriors(vae, lambda images: at_once(args, ranks, len(images)))
    shape = vae.latent_shape(data.size)
    stamp = {"vae": encoder_fingerprint(vae), "data": data.fingerprint}
    with ranks.in_turn():
        return LatentCache(cache_dir / "latents.npy", data.images, encode, shape, stamp, args.flip,
                           former=data.former_fingerprints)


def draw_pairs(args: argparse.Namespace, plan: Plan, data: Dataset, cache_dir: Path) -> PairCache:
    """The pairs of --reflow and VALIDATED more, as latents: sample i of sample.py, of seed i and, where there
    are classes, with these in turn. Liu et al. 2022 (arXiv:2209.03003), algorithm 1."""
    count = args.reflow_pairs + VALIDATED
    shape = plan.vae.latent_shape(data.size)
    if plan.pairs_stamp and plan.reflow is None:               # the run goes on; they were complete
        return PairCache(cache_dir / "pairs.npy", count, shape, None, plan.pairs_stamp)
    theirs = plan.reflow
    if theirs["data"]["classes"] != plan.conditioning.classes:
        raise ValueError(f"--reflow {args.reflow}: its classes are not those of --data {args.data}; give the "
                         "--data and --cond that it was trained with")
    model = build_model(theirs["arch"], theirs["config"])
    model.load_state_dict(theirs["ema"])
    model = model.to(plan.device).eval()
    path = build_path(theirs["objective"])
    row = OBJECTIVES[theirs["objective"]["name"]]
    condition = conditioning.of_checkpoint(theirs, plan.device)
    asked = condition.ask(argparse.Namespace(n=count, label=None), model)
    scale = reflow_scale(args, theirs, condition)

    def draw(part: range) -> Tensor:
        noise = noise_of(part, shape).to(plan.device)
        cond, uncond = asked.batch(part.start, len(part))
        with plan.autocast():
            return SAMPLERS[row.sampler](guided(model, path, cond, uncond, scale), path, noise,
                                         path.times(args.reflow_steps))

    stamp = {"weights": fingerprint_tensors(theirs["ema"]), "objective": theirs["objective"],
             "classes": theirs["data"]["classes"], "sampler": row.sampler, "steps": args.reflow_steps,
             "guidance": scale, "precision": plan.number_format}
    if plan.pairs_stamp and plan.pairs_stamp != stamp:
        raise ValueError(f"--reflow {args.reflow}: has changed since this run began; restore it, or use "
                         "another --name")
    plan.reflow = None                                         # frees memory, as the model will
    size = max(1, at_once(args, plan.ranks, 2 * PREVIEW_BATCH) // 2)
    with plan.ranks.in_turn():
        return PairCache(cache_dir / "pairs.npy", count, shape, draw, stamp, at_once=size)


def demo() -> None:
    """A loss and a validation of an untrained VAE, and of an untrained network on its latents."""
    torch.manual_seed(0)
    data, val = [load_drawn("shapes", split, (32, 32), count=240) for split in ("train", "val")]
    batch = np.arange(8)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--preset", "tiny", "--vae-preset", "tiny", "--runs-dir", folder]
        plan = prepare(settings.parse(["--arch", "dit", *flags]))
        task = Autoencoding(plan.vae_args, data, val, plan, Path(folder))
        plan.vae = task.build().eval().requires_grad_(False)
        with torch.no_grad():
            loss, _ = task.loss(plan.vae, batch)
            print(f"VAE: loss {loss.mean():.3f} of a batch; validation {task.validate(plan.vae, [])}")
        plan.conditioning.attach(data, val, Path(folder), resumed=False)
        task = Denoising(settings.parse(["--arch", "dit", *flags]), data, val, plan, Path(folder))
        model = task.build().eval()
        with torch.no_grad():
            loss, t = task.loss(model, batch)
            print(f"DiT: loss {loss.mean():.3f} at times {t.min():.2f} to {t.max():.2f}; "
                  f"validation {task.validate(model, [])}")
        del task                                # Windows does not delete a file that is still mapped


if __name__ == "__main__":
    sys.exit(program("tasks.py", demo))
