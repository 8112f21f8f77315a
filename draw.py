"""From noise to pictures or sounds: one batch, and as many batches as were asked for.

    python draw.py                       # draws pictures one by one and all at once, and in tiles

`draw` builds a denoiser, follows a sampler along the path's times and decodes the latent. Picture i has a
random generator of its own, so it does not depend on the batch size or on how many are drawn. What is too
large for the device is there only while it works (offload.py), block by block if need be.

Shapes: B batch, C channels of the latent, h w its size, H W that of the picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from conditioning import Asked
from media import medium_of
from offload import Stage
from ranks import ALONE, Ranks
from samplers import SAMPLERS, guided, inpainting, noise_at, noise_like
from times import TIMES, interval_of_steps
from vae import VAE


# ---- drawing

def in_own_dtype(network: Callable, dtype: torch.dtype) -> Callable:
    """A network with weights of this dtype, for latents and conditions in float32. Times and guidance scales
    stay in float32, in which they are embedded."""
    def call(xt: Tensor, t: Tensor, **cond) -> Tensor:
        for name, part in cond.items():
            if name not in ("s", "guidance", "seconds") and part.is_floating_point():
                cond[name] = part.to(dtype)
        return network(xt.to(dtype), t, **cond).float()

    return network if dtype == torch.float32 else call


class Guide(NamedTuple):
    """The weaker network of autoguidance, and what was asked for as its conditions."""
    network: Callable
    asked: Asked


class Skip(NamedTuple):
    """Skip-layer guidance: without which blocks, how strong, and between which shares of the steps."""
    layers: tuple[int, ...]
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2


@torch.no_grad()
def draw(model: Callable, vae: VAE, path, shape: tuple[int, int, int], seeds: range, cond: dict,
         uncond: dict | None = None, *, sampler: str, steps: int, scale: float = 1.0, rescale: float = 0.0,
         interval: tuple[float, float] = (0.0, 1.0), weak: Callable | None = None, times: str = "even",
         strength: float = 1.0, image: Tensor | None = None, mask: Tensor | None = None,
         channels: int | None = None, skip: Skip | None = None, skipped: Callable | None = None,
         stage: Stage | None = None, on_step: Callable | None = None,
         progress: Callable[[float], None] | None = None, **options) -> np.ndarray:
    """One batch of pictures, uint8 (B, H, W, C), or of sounds, int16 (B, T). shape: that of a latent,
    (C, h, w). seeds: one per picture.
    cond, uncond, weak, channels: see `guided`. skipped: the network without the blocks of `skip`. stage:
    where to draw (None: where the VAE is). options: passed to the sampler.

    image (1, C, H, W) in [-1, 1]: begin with it at time `strength`, mixed with noise (SDEdit: Meng et al.
    2022, arXiv:2108.01073), and skip the steps before. mask (1, 1, H, W), bool: draw only where it is True;
    every other pixel keeps its value, and the drawn side of the border is blended. Of sounds, image is
    (1, 1, T) and mask as well. on_step(i, pictures) is called after each step with the decoded xt;
    progress(share) with how much of the batch is done: from 0 to 1, where decoding counts as one more
    step."""
    # ---- noise, from generators on the CPU, so that it is the same on every device
    stage = stage or Stage(next(vae.parameters()).device)
    device = stage.device
    medium = medium_of(vae.config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    noise = noise_like(torch.empty(len(seeds), *shape), generators).to(device)   # (B, C, h, w)

    # ---- the times to visit, and the denoiser, which is all that a sampler sees of the network
    t = TIMES[times](path, steps)                          # (steps + 1,), falling to 0 or nearly
    skipping = {}
    if skip is not None:
        skipping = {"skipped": skipped, "skip_scale": skip.scale,
                    "skip_interval": interval_of_steps(t, skip.start, skip.stop)}
    denoise = guided(model, path, cond, uncond, scale, weak=weak, interval=interval, rescale=rescale,
                     channels=channels, variance=options.get("variance") == "learned", **skipping)

    x = noise_at(path, noise, t[0])

    # ---- from a picture: begin at the time `strength`, where it is mixed with that much noise
    if image is not None:
        x0 = stage.encode(vae, image)
        # Round to the diffusion path's steps of 1/1000, and make the first step at least half as long: a step
        # as short as a rounding error would make multistep solvers divide by almost zero.
        start = round(strength * 1000) / 1000
        if start < t[0]:
            t = torch.cat([t.new_tensor([start]), t[t < start - 5e-4]])      # the steps that are left
            alpha, sigma = path.alpha_sigma(t[0])
            x = alpha * x0 + sigma * noise                 # xt of this picture at that time
    if mask is not None:
        # One latent position stands for factor x factor pixels: it is drawn if any of them is.
        repaint = medium.of_latent(mask, vae.factor).to(device)
        denoise = inpainting(denoise, path, x0, repaint)
        blend = medium.border(mask, vae.factor).to(device)

    def decode(x0: Tensor) -> np.ndarray:
        pictures = stage.decode(vae, x0)                   # (B, C, H, W), nominally in [-1, 1]
        if mask is not None:                               # the VAE's reconstruction is close, but not exact
            known = image.to(device)
            # to_array makes a sound that is too loud quieter as a whole, which would change what is kept.
            pictures = pictures.clamp(-1, 1 - 2**-15)
            pictures = torch.where(mask.to(device), torch.lerp(known, pictures, blend), known)
        return medium.to_array(pictures)

    # Samplers report latents; whoever watches wants pictures, of xt and not of the guess x0.
    def report(i: int, xt: Tensor, x0: Tensor) -> None:
        if on_step:
            on_step(i, decode(xt))
        if progress:
            progress((i + 1) / len(t))

    # ---- from noise to data
    if len(t) > 1:                                         # at strength 0 no step is left
        with stage.network:
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


def picture_bar(total: int, first: int = 0, unit: str = "img", **options) -> tqdm:
    """A bar that counts pictures, whole ones although it also moves within a batch."""
    return tqdm(total=total, initial=first, unit=unit, **options,
                bar_format="{l_bar}{bar}| {n:,.0f}/{total:,} [{elapsed}<{remaining}, {rate_fmt}]")


def demo() -> None:
    """Pictures of an untrained network, alone and together; and a VAE's pictures in tiles."""
    from dit import DiT, DiTConfig
    from rectified_flow import RectifiedFlow
    from vae import VAEConfig

    torch.manual_seed(0)
    model = DiT(DiTConfig(width=64, depth=2, heads=2)).eval()
    vae = VAE(VAEConfig(widths=(16, 16), groups=4, shortcut=True)).eval()
    how = dict(sampler="heun", steps=4)
    together = draw(model, vae, RectifiedFlow(), (4, 16, 16), range(3), {}, **how)
    alone = [draw(model, vae, RectifiedFlow(), (4, 16, 16), range(i, i + 1), {}, **how) for i in range(3)]
    largest = np.abs(together.astype(int) - np.concatenate(alone)).max()
    print(f"{len(together)} pictures of {together.shape[1:]}; alone or together, they differ by {largest}")
    tiled = draw(model, vae, RectifiedFlow(), (4, 16, 16), range(3), {}, **how,
                 stage=Stage(torch.device("cpu"), tile=16))
    print(f"in tiles of 16 x 16: {np.abs(together.astype(int) - tiled).mean():.2f} of 255 on average")


if __name__ == "__main__":
    demo()
