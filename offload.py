"""What is too large for a device: modules that are there only while they work, whole or block by block, and
pictures in tiles.

    python offload.py                    # visits of blocks, and how much tiles change a picture

`Resident` is a module's stay on a device, `visit_blocks` one stay per block and call, and `in_tiles` a call
on one part of a picture after another. `Stage` is what draw.py needs of them: where a batch is drawn.

Shapes: B batch, C channels of the latent, h w its size, H W that of the picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from vae import VAE


# ---- on a device only while they work

class Resident:
    """A context manager within which a module is on a device. Outside it, its weights are where they were,
    and nothing is copied back."""

    def __init__(self, module: torch.nn.Module, device: torch.device):
        self.tensors = [*module.parameters(), *module.buffers()]
        self.home = [tensor.data for tensor in self.tensors]
        self.device = device

    def __enter__(self) -> None:
        for tensor, weight in zip(self.tensors, self.home):
            tensor.data = weight.to(self.device)

    def __exit__(self, *error) -> None:
        for tensor, weight in zip(self.tensors, self.home):
            tensor.data = weight


def visit_blocks(network: torch.nn.Module, kinds: tuple[type, ...], device: torch.device) -> None:
    """Have each block of these kinds on the device only while it computes; everything else stays there."""
    blocks = [module for module in network.modules() if isinstance(module, kinds)]
    homes = [Resident(block, device) for block in blocks]
    inside = {id(tensor) for home in homes for tensor in home.tensors}
    for tensor in [*network.parameters(), *network.buffers()]:
        if id(tensor) not in inside:
            tensor.data = tensor.data.to(device)
    for block, home in zip(blocks, homes):
        block.register_forward_pre_hook(lambda module, inputs, home=home: home.__enter__())
        block.register_forward_hook(lambda module, inputs, output, home=home: home.__exit__())


# ---- pictures in tiles

def in_tiles(call: Callable[[Tensor], Tensor], x: Tensor, side: int, fold_in: int, fold_out: int) -> Tensor:
    """call(x), one picture and one tile at a time. A tile has `side` positions, each of which is fold_in
    numbers of x and fold_out of the output. Tiles overlap by at least a quarter, where they are blended
    linearly. The norms of each tile are its own, so the result is not exactly that of the whole."""
    def starts(length: int) -> list[int]:
        room = length - side
        count = 1 + math.ceil(max(0, room) / (side - side // 4))
        return [round(i * max(0, room) / max(1, count - 1)) for i in range(count)]

    height, width = x.shape[2] // fold_in, x.shape[3] // fold_in
    sizes = min(side, height), min(side, width)
    ramps = []
    for size in sizes:                                     # rises over a quarter at each end, never to 0
        distance = torch.arange(size * fold_out, device=x.device) + 0.5
        edge = torch.minimum(distance, distance.flip(0))
        ramps.append((edge / (size * fold_out / 4)).clamp(max=1))
    weight = ramps[0][:, None] * ramps[1]                  # (tile's H, W)

    pictures = []
    for picture in x.split(1):
        if max(height, width) <= side:                     # as it would be without tiles, to the bit
            pictures.append(call(picture))
            continue
        total, weights = None, None
        for top in starts(height):
            for left in starts(width):
                rows, columns = [slice(start * fold_in, (start + size) * fold_in)
                                 for start, size in zip((top, left), sizes)]
                part = call(picture[..., rows, columns])
                if total is None:
                    total = part.new_zeros(1, part.shape[1], height * fold_out, width * fold_out)
                    weights = torch.zeros_like(total[0, 0])
                rows, columns = [slice(start * fold_out, (start + size) * fold_out)
                                 for start, size in zip((top, left), sizes)]
                total[..., rows, columns] += part * weight
                weights[rows, columns] += weight
        pictures.append(total / weights)
    return torch.cat(pictures)


# ---- where a batch is drawn

class Stage(NamedTuple):
    """Where a batch is drawn, and what comes there only to work."""
    device: torch.device
    network: Resident | nullcontext = nullcontext()
    vae: Resident | nullcontext = nullcontext()
    tile: int | None = None             # of pictures that the VAE takes in tiles: their side in pixels

    def encode(self, vae: VAE, image: Tensor) -> Tensor:
        """Normalised mean (1, C, h, w) of a picture (1, C, H, W)."""
        # As in VAE.decode: pixels need more than 8 bits.
        with self.vae, torch.autocast(self.device.type, enabled=False):
            def mean(part: Tensor) -> Tensor:
                return vae.encode(part).mean

            image = image.to(self.device)
            if self.tile is None:
                return vae.normalize(mean(image))
            return vae.normalize(in_tiles(mean, image, self.tile // vae.factor, vae.factor, 1))

    def decode(self, vae: VAE, x0: Tensor) -> Tensor:
        """Pictures (B, C, H, W), nominally in [-1, 1], of normalised latents."""
        with self.vae:
            z = vae.denormalize(x0)
            if self.tile is None:
                return vae.decode(z)
            return in_tiles(vae.decode, z, self.tile // vae.factor, 1, vae.factor)


def demo() -> None:
    """Decode pictures in tiles, and with blocks that come and go."""
    from vae import ResnetBlock, VAEConfig

    torch.manual_seed(0)
    vae = VAE(VAEConfig(widths=(16, 16), groups=4)).eval().requires_grad_(False)
    z = torch.randn(2, vae.config.latent_channels, 24, 32)
    whole = vae.decode(z)
    tiled = in_tiles(vae.decode, z, 16, 1, vae.factor)
    apart = (tiled - whole).abs().mean() / whole.std()
    print(f"pictures of {tuple(whole.shape[2:])} in tiles of {16 * vae.factor}: {apart:.3f} of their "
          "deviation apart, on average")
    sizes = [sum(weight.nbytes for weight in block.parameters()) for block in vae.decoder.modules()
             if isinstance(block, ResnetBlock)]
    visit_blocks(vae.decoder, (ResnetBlock,), torch.device("cpu"))
    print(f"block by block: {(vae.decode(z) - whole).abs().max():.0f} apart, with at most {max(sizes):,} of "
          f"{sum(sizes):,} bytes on the device at a time")


if __name__ == "__main__":
    demo()
