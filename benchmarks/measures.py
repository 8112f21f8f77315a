"""What benchmarks/compare.py measures of a run, in units that mean the same on every path.

A raw loss compares nothing: it is an error in eps for one run and in the velocity for another. Every path
becomes the straight one when xt is divided by alpha + sigma, at the time u = sigma / (alpha + sigma), and it
then has the same signal-to-noise ratio. Errors and straightness are therefore measured in these coordinates.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks import fashion_mnist
from benchmarks.scenes import score_scene
from checkpoints import load_checkpoint, load_vae
from conditioning import network_inputs
from data import load_data, load_drawn, load_mnist
from machine import has_bf16
from networks import build_model, build_path, unpack_vae
from pictures import to_tensor
from samplers import SAMPLERS, guided, noise_at, noise_like
from toys import Scene, describe_scene, draw_scene, read_corners
from weights import load_weights

# Times u at which errors are measured: a path of diffusion ends at u = 0.94, before all is noise.
FIRST, LAST = 0.02, 0.92
PROMPT = 54          # bytes of the longest caption of scenes in a batch of 32, on average


# ---- what a training costs

def training_flops(arch: str, config: dict, shape: tuple[int, int, int]) -> int:
    """FLOPs of the forward and backward pass of one example, attention included; a multiplication and an
    addition count as two, without a text encoder, which all networks share. shape: of a latent, (C, h, w)."""
    with torch.device("meta"):                             # counts without computing
        model = build_model(arch, config)
        x, t = torch.zeros(1, *shape), torch.zeros(1)
        cond = {"y": torch.zeros(1, dtype=torch.long)} if config.get("num_classes") else {}
        if config.get("context_width"):
            cond = {"context": torch.zeros(1, PROMPT, config["context_width"]),
                    "pooled": torch.zeros(1, config["pooled_width"])}
    # written out, as the counter does not know every fused kernel of attention
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        model(x, t, **cond).square().mean().backward()
    return counter.get_total_flops()


# ---- a network in common units

class Trained(NamedTuple):
    model: torch.nn.Module       # with averaged weights
    path: object
    step: int
    arch: str
    shape: tuple[int, int, int]  # of a latent


class Examples(NamedTuple):
    x0: Tensor                   # (N, C, h, w), normalised latents
    y: Tensor | None = None      # (N,) labels, or None
    captions: list[str] | None = None

    def cond(self, model: torch.nn.Module, part: Tensor) -> dict:
        """The conditions of the examples with these indices, for this network."""
        if self.captions is not None and getattr(model, "text", None) is not None:
            return network_inputs(model, model.text, [self.captions[i] for i in part], torch.device("cpu"))
        return {} if self.y is None else {"y": self.y[part]}


def load_trained(file: Path) -> Trained:
    """The network of a checkpoint, on the CPU."""
    checkpoint = load_checkpoint(file)
    model = load_weights(build_model(checkpoint["arch"], checkpoint["config"], checkpoint["text"]),
                         checkpoint["ema"], str(file)).eval()
    vae = unpack_vae(checkpoint["vae"])
    shape = (vae.config.latent_channels, *(side // vae.factor for side in checkpoint["data"]["size"]))
    return Trained(model, build_path(checkpoint["objective"]), checkpoint["step"], checkpoint["arch"], shape)


@torch.no_grad()
def examples(source: str, side: int, data_dir: Path, vae_run: Path, captioned: bool = False,
             count: int = 512) -> Examples:
    """The first validation pictures as latents of this VAE."""
    vae = load_vae(vae_run)
    val = load_data(source, "val", (side, side), data_dir, vae_run, "captions" if captioned else None)
    parts = to_tensor(val.images[:count]).split(64)
    x0 = torch.cat([vae.normalize(vae.encode(part).mean) for part in parts])
    labels = None if val.labels is None else torch.from_numpy(np.asarray(val.labels[:count])).long()
    return Examples(x0, labels, val.captions and val.captions[:count])


@torch.no_grad()
def errors(trained: Trained, held_out: Examples) -> dict:
    """Mean squared error of the x0 and of the straight path's velocity that the network implies, averaged
    over times u between FIRST and LAST, and by quarters of them. The same examples, noise and signal-to-noise
    ratios for every network, whatever its path and its prediction."""
    n = len(held_out.x0)
    generator = torch.Generator().manual_seed(0)
    spread = (torch.arange(n, dtype=torch.float64) + 0.5) / n              # (N,) in (0, 1)
    u = (FIRST + (LAST - FIRST) * spread)[torch.randperm(n, generator=generator)]
    eps = torch.randn(held_out.x0.shape, generator=generator)
    t = trained.path.t_at(torch.log((1 - u) / u)).float()
    squares = []
    for part in torch.arange(n).split(128):
        x0, time = held_out.x0[part], t[part]
        alpha, sigma = (each[:, None, None, None] for each in trained.path.alpha_sigma(time))
        xt = alpha * x0 + sigma * eps[part]
        raw = trained.model(xt, time, **held_out.cond(trained.model, part))
        guess, _ = trained.path.to_x0_eps(raw, xt, time)
        squares.append((guess - x0).square().flatten(1).mean(1))
    x0_error = torch.cat(squares).double()
    # At a given xt, an error in x0 fixes that in eps and so that in eps - x0, which is 1 / u times as large.
    velocity_error = x0_error / u**2
    quarter = ((u - FIRST) / (LAST - FIRST) * 4).long().clamp(max=3)
    by_time = [velocity_error[quarter == i].mean().item() for i in range(4)]
    return {"x0": x0_error.mean().item(), "velocity": velocity_error.mean().item(),
            "velocity_by_time": by_time}


@torch.no_grad()
def straightness(trained: Trained, held_out: Examples, count: int = 100, steps: int = 20) -> float:
    """How straight sampling is, at the path's own times, from noise: `deviation` (Liu et al. 2022,
    arXiv:2209.03003)."""
    chosen = torch.arange(count) % len(held_out.x0)
    noise = noise_like(torch.empty(count, *held_out.x0.shape[1:]),
                       [torch.Generator().manual_seed(i) for i in range(count)])
    times = trained.path.times(steps)
    start = noise_at(trained.path, noise, times[0])
    return deviation(trained, start, held_out.cond(trained.model, chosen), times)


@torch.no_grad()
def curvature(trained: Trained, held_out: Examples, count: int = 100, steps: int = 20) -> float:
    """The same for a comparison of paths: at the same signal-to-noise ratios u, LAST and below, from the same
    mixtures of data and noise. In these coordinates the exact flow does not depend on the path."""
    chosen = torch.arange(count) % len(held_out.x0)
    u = torch.linspace(LAST, 0, steps + 1, dtype=torch.float64)
    times = trained.path.t_at(torch.log((1 - u[:-1]) / u[:-1]))
    times = torch.cat([times, times.new_zeros(1)])
    alpha, sigma = trained.path.alpha_sigma(times[0])
    eps = torch.randn(count, *held_out.x0.shape[1:], generator=torch.Generator().manual_seed(0))
    start = alpha.float() * held_out.x0[chosen] + sigma.float() * eps
    return deviation(trained, start, held_out.cond(trained.model, chosen), times)


def deviation(trained: Trained, start: Tensor, cond: dict, times: Tensor) -> float:
    """The mean square of the difference between the velocity and the chord of a trajectory, per latent value,
    averaged over u = sigma / (alpha + sigma); 0 if all trajectories are straight."""
    path = trained.path
    velocities = []
    denoise = guided(trained.model, path, cond)

    def watched(xt: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        x0, eps = denoise(xt, t)
        velocities.append(eps - x0)
        return x0, eps

    end = SAMPLERS["euler"](watched, path, start, times)
    alpha, sigma = path.alpha_sigma(times)
    u = sigma / (alpha + sigma)                                            # (steps + 1,), falling to 0
    chord = (start / (alpha[0] + sigma[0]) - end) / u[0]
    squares = torch.stack([(velocity - chord).square().mean() for velocity in velocities]).double()
    lengths = u[:-1] - u[1:]
    return ((squares * lengths).sum() / lengths.sum()).item()


def evaluations(sampler: str, steps: int, scale: float, path) -> int:
    """How often this sampler evaluates the network for one picture; guidance evaluates it twice."""
    calls = 0

    def count(xt: Tensor, t: Tensor, s: Tensor | None = None) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        return xt, torch.zeros_like(xt)

    SAMPLERS[sampler](count, path, torch.zeros(1, 1), path.times(steps))
    return calls * (1 if scale in (0.0, 1.0) else 2)


@torch.no_grad()
def speed(trained: Trained, batches: tuple[int, ...], least: float = 1.0) -> list[dict]:
    """Seconds that one evaluation of the network takes, by the size of the batch: the median of at least five
    and of as many as fit into `least` seconds, in bf16 where the hardware multiplies it, as samples are
    drawn."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = trained.model.to(device)
    bf16 = has_bf16(device)

    def seconds(x: Tensor, t: Tensor, y: Tensor) -> float:
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            model(x, t, y=y)
        if device.type == "cuda":                          # which only then has done it
            torch.cuda.synchronize()
        return time.perf_counter() - began

    rows = []
    for batch in batches:
        x, t = torch.randn(batch, *trained.shape, device=device), torch.full((batch,), 0.5, device=device)
        y = torch.zeros(batch, dtype=torch.long, device=device)
        seconds(x, t, y)                                   # the first call also chooses kernels
        found = []
        while len(found) < 5 or sum(found) < least:
            found.append(seconds(x, t, y))
        rows.append({"batch": batch, "seconds": float(np.median(found))})
    return rows


def gradient_norms(records: list[dict]) -> dict:
    """Median, spread (range of the middle half over the median) and maximum of the logged norms of the
    gradient in the second half of a training. records: the lines of its metrics.jsonl."""
    logged = [record for record in records if "grad_norm" in record]
    if not logged:
        return {}
    half = logged[-1]["step"] / 2
    norms = np.array([record["grad_norm"] for record in logged if record["step"] >= half])
    low, median, high = np.quantile(norms, [0.25, 0.5, 0.75])
    return {"median": float(median), "spread": float((high - low) / median), "max": float(norms.max())}


# ---- judges: what a set of samples is worth

class FashionMNIST:
    """Agreement and Fréchet distance in the features of a classifier: see benchmarks/fashion_mnist.py. Larger
    pictures are scaled down to the classifier's 32 x 32, each pixel the mean of those it covers, so that the
    figures of all sizes can be compared; what only a larger picture shows is not judged."""

    classes = 10

    def __init__(self, data_dir: Path, side: int = 32):
        if side % 32:
            raise ValueError(f"side {side}: must be a multiple of 32, the side of the classifier's pictures")
        self.side = side
        self.classifier = fashion_mnist.load_classifier(data_dir)
        self.fingerprint = fashion_mnist.classifier_in_use()
        self.test = load_mnist("fashion-mnist", "val", (32, 32), data_dir)
        self.reference, self.predicted = fashion_mnist.classify(self.classifier, self.test.images)
        self.data_dir = data_dir

    def score(self, images: np.ndarray) -> dict:
        """images: uint8 (N, side, side, 1), of the classes 0, 1, .. 9 in turn."""
        features, predicted = fashion_mnist.classify(self.classifier, area_scaled(images, 32))
        return {"agreement": float((predicted == np.arange(len(images)) % self.classes).mean()),
                "frechet": fashion_mnist.frechet(features, self.reference)}

    def floor(self, vae_run: Path, n: int) -> list[dict]:
        """What no network on this VAE can exceed, and what real pictures score: on all and on n of them, as
        the distance of fewer pictures is biased upward."""
        test = load_mnist("fashion-mnist", "val", (self.side, self.side), self.data_dir)
        restored = area_scaled(fashion_mnist.reconstruct(load_vae(vae_run), test.images), 32)
        # The border of 2 pixels is padding, not part of the picture.
        error = (restored[:, 2:-2, 2:-2] / 255.0 - self.test.images[:, 2:-2, 2:-2] / 255.0) ** 2
        psnr = float(np.mean(-10 * np.log10(error.mean((1, 2, 3)).clip(min=1e-12))))
        train = load_mnist("fashion-mnist", "train", (32, 32), self.data_dir)
        chosen = np.random.default_rng(0).permutation(len(train))[:len(self.test)]
        ideal, _ = fashion_mnist.classify(self.classifier, train.images[chosen])
        features, predicted = fashion_mnist.classify(self.classifier, restored)
        agreement = float((predicted == self.test.labels).mean())
        accuracy = float((self.predicted == self.test.labels).mean())
        return [
            {"label": "training images", "n": len(ideal), "agreement": accuracy,
             "frechet": fashion_mnist.frechet(ideal, self.reference)},
            {"label": "training images", "n": n, "frechet": fashion_mnist.frechet(ideal[:n], self.reference)},
            {"label": "reconstructions of the test images", "n": len(features), "agreement": agreement,
             "psnr": psnr, "frechet": fashion_mnist.frechet(features, self.reference)},
            {"label": "reconstructions of the test images", "n": n,
             "frechet": fashion_mnist.frechet(features[:n], self.reference)},
        ]


class Corners:
    """How many samples have the same shape in both corners, as `toys.read_corners` reads them."""

    fingerprint = None                   # no weights decide

    def __init__(self, data_dir: Path, side: int = 32):
        self.side = side

    def score(self, images: np.ndarray) -> dict:
        """images: uint8 (N, side, side, 3). whole: one shape in each corner and none elsewhere."""
        pairs = [read_corners(image) for image in images]
        whole = [pair for pair in pairs if pair is not None]
        same = {part: sum(getattr(a, part) == getattr(b, part) for a, b in whole) / len(images)
                for part in ("colour", "kind")}
        right = sum((a.colour, a.kind) == (b.colour, b.kind) for a, b in whole)
        return {"agreement": right / len(images), "whole": len(whole) / len(images), **same}

    def floor(self, vae_run: Path, n: int) -> list[dict]:
        """What the VAE's reconstructions of validation pictures score."""
        images = load_drawn("corners", "val", (self.side, self.side)).images[:n]
        restored = fashion_mnist.reconstruct(load_vae(vae_run), images)
        return [{"label": "reconstructions of validation pictures", "n": len(images), **self.score(restored)}]


class Scenes:
    """How much of its prompt each picture shows, by benchmarks/scenes.py: prompts with one shape and with
    two, of combinations that training contains and of others, in turn."""

    fingerprint = None
    kinds = [(count, unseen) for count in (1, 2) for unseen in (False, True)]

    def __init__(self, data_dir: Path, side: int = 32):
        self.side = side

    def scene(self, i: int) -> Scene:
        """The one that picture i is asked to show."""
        count, unseen = self.kinds[i % len(self.kinds)]
        return describe_scene(2 * 10**9 + i, count, unseen)

    def prompts(self, n: int) -> list[str]:
        return [self.scene(i).caption for i in range(n)]

    def score(self, images: np.ndarray) -> dict:
        """images: uint8 (N, side, side, 3). agreement: the share that shows its whole prompt, also by
        the kind of prompt."""
        whole = np.array([score_scene(self.scene(i), image)["all"] for i, image in enumerate(images)])
        found = {"agreement": float(whole.mean())}
        for k, (count, unseen) in enumerate(self.kinds):
            found[f"{count} {'unseen' if unseen else 'seen'}"] = float(whole[k::len(self.kinds)].mean())
        return found

    def floor(self, vae_run: Path, n: int) -> list[dict]:
        """What the VAE's reconstructions of pictures drawn by the program score."""
        images = np.stack([draw_scene(self.scene(i), 0) for i in range(n)])
        restored = fashion_mnist.reconstruct(load_vae(vae_run), images)
        return [{"label": "reconstructions", "n": n, **self.score(restored)}]


def area_scaled(images: np.ndarray, side: int) -> np.ndarray:
    """uint8 (N, H, W, C) -> (N, side, side, C): each pixel the rounded mean of those it covers. Raises
    ValueError where side does not divide H and W."""
    n, height, width, channels = images.shape
    if height % side or width % side:
        raise ValueError(f"side {side}: does not divide pictures of {height} x {width}")
    blocks = images.reshape(n, side, height // side, side, width // side, channels)
    return np.round(blocks.mean((2, 4))).astype(np.uint8)


JUDGES = {"fashion-mnist": FashionMNIST, "corners": Corners, "shapes": Scenes}
