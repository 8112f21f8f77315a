"""The two tasks with pictures of different sizes (--aspect): every step packs them by a budget of tokens.

    python mixed.py                       # one loss and one validation of each, on pictures drawn here
    python train.py --arch dit --data FOLDER --image-size 256 --aspect --tokens 4096

A network's step takes pictures by their tokens (data.packed_indices) and packs them into one sequence, in
which each has its own time, condition and positions, so nothing is padded ("Patch n' Pack": Dehghani et al.
2023, arXiv:2307.06304). The VAE, a convolutional network, cannot pack: its batch has a few sizes
(data.grouped_indices), and it runs once for each.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import moe
import settings
from cache import MixedLatentCache
from cli import program
from conditioning import VALIDATED
from data import (Dataset, Order, grouped_indices, load_drawn, packed_indices, send, shares,
                  some_pictures)
from draw import draw_batches, picture_bar
from media import medium_at
from networks import encoder_fingerprint
from pictures import grid, to_tensor, to_uint8
from plan import Plan, prepare
from ragged import Ragged, groups_of_equal
from settings import OBJECTIVES
from tasks import Autoencoding, Denoising, Interrupted, even_times, posteriors, watched
from vae import VAE

SIZES = 3              # of previews: wide, middling, tall


class MixedAutoencoding(Autoencoding):
    """Autoencoding of pictures of different sizes."""

    def __init__(self, args: argparse.Namespace, data: Dataset, val: Dataset, plan: Plan, cache_dir: Path):
        self.args = args
        self.plan = plan
        self.data = data
        self.cache_dir = cache_dir
        self.device = plan.device
        self.ranks = plan.ranks
        self.medium = medium_at(None)
        self.val = val.images[:VALIDATED]
        chosen = some_pictures(len(data), args.limit)
        shapes = data.images.shapes[chosen, :2]
        self.order = Order(chosen, lambda step: grouped_indices(shapes, args.batch_size, step, args.seed))

    def loss(self, model: VAE, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        losses = []
        mine = self.ranks.part(len(indices))
        # A batch is at most batch_size pictures of the budget's size, so no group needs to be cut.
        for group in groups_of_equal(self.data.images.shapes[indices, :2], 2**62):
            # A group is in order, so this rank's part of it is one piece. Where that is empty, one picture
            # passes for nothing, as the random numbers of the whole group are drawn by every rank.
            start, stop = np.searchsorted(group, (mine.start, mine.stop)).tolist()
            part = slice(start, stop) if start < stop else slice(0, 1)
            x = to_tensor(self.data.images.stack(indices[group[part]]))
            if self.args.flip:
                x = torch.where((torch.rand(len(group), 1, 1, 1) < 0.5)[part], x.flip(-1), x)
            loss, _ = model.loss(send(x, self.device), self.args.kl_weight, noise=self.args.latent_noise,
                                 equivariance=self.args.equivariance, rows=(len(group), part))
            losses.append(loss[:stop - start])
        loss = torch.cat(losses)
        return loss, loss.new_zeros(len(loss))

    def validate(self, model: VAE, stop: list[int]) -> dict:
        generator = torch.Generator(self.device).manual_seed(0)        # the same noise each time
        losses, latents = [], []
        totals = {"psnr": 0.0, "kl": 0.0}
        groups = groups_of_equal(self.val.shapes[:, :2], self.plan.pixels_at_once)
        for group in watched(groups, stop, "validate"):
            x = to_tensor(self.val.stack(group)).to(self.device)
            loss, logs = model.loss(x, self.args.kl_weight, generator)
            losses.append(loss)
            for name in totals:                                        # means over the pictures
                totals[name] += len(x) / len(self.val) * logs[name]
            latents.append(model.encode(x).mean.transpose(0, 1).flatten(1))       # (C, pixels)
        record = {"val_loss": torch.cat(losses).mean()} | totals
        record["latent_std"] = torch.cat(latents, dim=1).std(dim=1)
        return {name: value.tolist() for name, value in record.items()}

    def preview(self, model: VAE, stop: list[int], rows: int = 0) -> Image.Image:
        """Pictures, each with its reconstruction below."""
        pictures = [self.val.stack([i])[0] for i in range(min(32, len(self.val)))]
        again = []
        for picture in watched(pictures, stop, "reconstruct"):
            x = to_tensor(picture[None]).to(self.device)
            again.append(to_uint8(model.decode(model.encode(x).mean))[0])
        pairs = []
        for start in range(0, len(pictures), 16):                      # 16 pictures per row
            pairs += pictures[start:start + 16] + again[start:start + 16]
        return grid(framed(pairs), columns=min(16, len(pictures)))

    def encoded(self, vae: VAE) -> MixedLatentCache:
        return encode_mixed(self.args, vae, self.data, self.cache_dir, self.plan)

    def sizes(self) -> dict:
        return sizes_of(self.data.images, self.args, self.plan)


class MixedDenoising(Denoising):
    """Denoising of latents of different sizes, a list of (C, h, w) wherever its parent has (B, C, h, w)."""

    def open_latents(self, data: Dataset, plan: Plan, cache_dir: Path) -> None:
        self.plan = plan
        self.conditioning.packed = True
        self.images = data.images
        self.cache = encode_mixed(self.args, self.vae, data, cache_dir, plan)
        self.tokens = tokens_of(data.images, plan)
        self.order = Order(some_pictures(len(data), self.args.limit), self.positions)

    def hold_out(self, val: Dataset, plan: Plan) -> None:
        pictures = val.images[:VALIDATED]
        self.val_tokens = tokens_of(pictures, plan)
        n = len(pictures)
        self.x0: list[Tensor] = [torch.empty(0)] * n
        with torch.no_grad():
            for group in groups_of_equal(pictures.shapes[:, :2], plan.pixels_at_once):
                x = to_tensor(pictures.stack(group)).to(self.device)
                for i, x0 in zip(group, self.vae.normalize(self.vae.encode(x).mean)):
                    self.x0[i] = x0
        generator = torch.Generator().manual_seed(0)
        self.t = even_times(n, generator).to(self.device)
        self.eps = [torch.randn(x0.shape, generator=generator).to(self.device) for x0 in self.x0]

    def positions(self, step: int) -> np.ndarray:
        """The pictures of a step, those of equal tokens beside each other, as attention computes them
        together."""
        tokens = self.tokens[self.order.chosen]
        positions = packed_indices(tokens, self.plan.tokens, step, self.args.seed)
        return positions[np.argsort(tokens[positions], kind="stable")]

    def split(self, batch: np.ndarray) -> list[np.ndarray]:
        """Pieces of nearly equal tokens, for --accumulate."""
        if self.args.accumulate == 1:
            return [batch]
        return [batch[part] for part in shares(self.tokens[batch], self.args.accumulate)]

    def loss(self, model: torch.nn.Module, indices: np.ndarray) -> tuple[Tensor, Tensor]:
        # The order of the random draws is the parent's: latent, dropout, rewording, time, noise.
        n = len(indices)
        part = shares(self.tokens[indices], self.ranks.shares)[self.ranks.share]
        z = send(self.cache.batch(indices, part), self.device)         # one copy for all pictures
        x0 = [self.vae.normalize(x) for x in self.cache.split(z, indices[part])]
        dropped = torch.rand(n) < self.args.label_dropout
        cond = self.conditioning.batch(model, indices, dropped, part)
        times = self.path.training_times(n, torch.from_numpy(self.tokens[indices]))
        times = {name: send(t[part], self.device) for name, t in times.items()}
        shapes = self.cache.latents.shapes[indices, 2:].tolist()
        eps = [torch.randn(shape, device=self.device) for shape in shapes][part]
        return self.path.loss(model, x0, eps=eps, **times, **cond), times["t"]

    def validate(self, model: torch.nn.Module, stop: list[int]) -> dict:
        losses = []
        # without gradients, four times the tokens of a training step fit: see tasks.at_once
        budget = self.plan.tokens // (self.args.accumulate * self.ranks.shares)
        budget *= 1 if self.args.grad_checkpoint else 4
        first = np.cumsum(self.val_tokens) // budget
        parts = [np.flatnonzero(first == number) for number in np.unique(first)]
        with moe.counted(model) as loads:                              # of experts, where there are any
            for part in watched(parts, stop, "validate"):
                part = slice(int(part[0]), int(part[-1]) + 1)
                cond = self.conditioning.validation(model, part)
                losses.append(self.path.loss(model, self.x0[part], t=self.t[part], eps=self.eps[part],
                                             **cond))
        return self.record(torch.cat(losses)) | loads.record()

    def preview(self, model: torch.nn.Module, stop: list[int], rows: int = 3) -> Image.Image:
        """Samples of three sizes of the data, from wide to tall, each in a third of the rows."""
        asked = self.conditioning.preview(model, rows)
        defaults = OBJECTIVES[self.objective["name"]]
        count = len(asked.turn)
        sides = self.images.shapes[:, :2]
        ratios = np.argsort(sides[:, 0] / sides[:, 1], kind="stable")
        images = []
        with picture_bar(count, desc="draw samples", delay=2, leave=False) as bar:
            def progress(done: float) -> None:
                if stop:
                    raise Interrupted
                bar.update(part.start + done - bar.n)

            for number in range(SIZES):
                part = slice(*(end * rows // SIZES * asked.columns for end in (number, number + 1)))
                size = sides[ratios[(2 * number + 1) * len(ratios) // (2 * SIZES)]]
                seeds = range(count)[part]
                chosen = asked._replace(turn=asked.turn[part])
                shape = (self.x0[0].shape[0], *(int(side) // self.vae.factor for side in size))
                at_once = max(1, self.plan.pixels_at_once // int(size.prod()) // 2)    # guidance doubles it
                for drawn in draw_batches(model, self.vae, self.path_for(size), shape, chosen, seeds, at_once,
                                          progress=progress, sampler=defaults.sampler, steps=defaults.steps,
                                          scale=defaults.scale if self.conditioning.guidable else 1.0):
                    images += list(drawn)
        return grid(framed(images), asked.columns, captions=asked.captions)

    def path_for(self, size: np.ndarray):
        """The path of pictures of this size, whose shift may follow their tokens."""
        path = copy.copy(self.path)
        if getattr(path, "shift_tokens", None) is not None:
            path.shift = path.shift_of(math.prod(size) / math.prod(self.plan.multiple))
            path.shift_tokens = None
        return path

    def sizes(self) -> dict:
        return sizes_of(self.images, self.args, self.plan)


def tokens_of(images: Ragged, plan: Plan) -> np.ndarray:
    """(N,) tokens of each picture: `multiple` is the side of one in pixels."""
    return (images.shapes[:, :2] // plan.multiple).prod(1)


def sizes_of(images: Ragged, args: argparse.Namespace, plan: Plan) -> dict:
    """What a checkpoint keeps of the sizes: the budget, the multiple, and the range of either side."""
    sides = images.shapes[:, :2]
    return {"pixels": math.prod(args.image_size), "multiple": list(plan.multiple),
            "smallest": sides.min(0).tolist(), "largest": sides.max(0).tolist()}


def framed(pictures: list[np.ndarray]) -> np.ndarray:
    """Pictures of different sizes on white, in the middle of cells of one size: uint8 (N, H, W, C)."""
    height, width = (max(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    cells = np.full((len(pictures), height, width, pictures[0].shape[2]), 255, np.uint8)
    for cell, picture in zip(cells, pictures):
        h, w = picture.shape[:2]
        top, left = (height - h) // 2, (width - w) // 2
        cell[top:top + h, left:left + w] = picture
    return cells


def encode_mixed(args: argparse.Namespace, vae: VAE, data: Dataset, cache_dir: Path,
                 plan: Plan) -> MixedLatentCache:
    encode = posteriors(vae, lambda images: max(1, plan.pixels_at_once // math.prod(images.shape[1:3])))
    # Pictures of another multiple are other pictures, so both may lie side by side.
    path = cache_dir / "latents-{}x{}.npy".format(*plan.multiple)
    stamp = {"vae": encoder_fingerprint(vae), "data": data.fingerprint}
    with plan.ranks.in_turn():
        return MixedLatentCache(path, data.images, encode, vae.config.latent_channels, vae.factor, stamp,
                                args.flip)


def demo() -> None:
    """A loss and a validation of an untrained VAE, and of an untrained network on its latents."""
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        flags = ["--aspect", "--preset", "tiny", "--vae-preset", "tiny", "--runs-dir", folder]
        args = settings.parse(["--arch", "dit", *flags])
        plan = prepare(args)
        data, val = [load_drawn("shapes", split, (32, 32), count=240, multiple=plan.multiple)
                     for split in ("train", "val")]
        task = MixedAutoencoding(plan.vae_args, data, val, plan, Path(folder))
        plan.vae = task.build().eval().requires_grad_(False)
        print(f"sizes: {task.sizes()}")
        with torch.no_grad():
            batch = task.order(0)
            print(f"VAE: loss {task.loss(plan.vae, batch)[0].mean():.3f} of a batch of {len(batch)}; "
                  f"validation {task.validate(plan.vae, [])}")
        plan.conditioning.attach(data, val, Path(folder), resumed=False)
        task = MixedDenoising(args, data, val, plan, Path(folder))
        model = task.build().eval()
        with torch.no_grad():
            batch = task.order(0)
            print(f"DiT: loss {task.loss(model, batch)[0].mean():.3f} of {len(batch)} pictures, "
                  f"{task.tokens[batch].sum()} tokens; validation {task.validate(model, [])}")
        del task                                # Windows does not delete a file that is still mapped


if __name__ == "__main__":
    sys.exit(program("mixed.py", demo))
