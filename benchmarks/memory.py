"""How much memory each published text model takes to draw one picture or sound of its own size, from shapes.

    python benchmarks/memory.py                 # all of them, by the modes of sample.py --offload
    python benchmarks/memory.py --models flux-dev sdxl --tile 512

Network and VAE run on the meta device, which holds no numbers, and the storages that are alive at a time are
added up: network and text encoders in bf16, the VAE in fp32. Attention counts as a fused kernel, which keeps
no weights of N x N. What a device allocates beside tensors (its context, kernels' workspaces) is not in it.
"""

from __future__ import annotations

import math
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import encoders
import published
from cli import Flag, integer, make_parser, one_of, program
from offload import in_tiles
from settings import ALL_ARCHITECTURES

GIB = 2**30
TEXT_MODELS = [name for name, row in published.MODELS.items() if row.text]
FLAGS = {"": [Flag("--models", f"which (default: all): {', '.join(TEXT_MODELS)}", one_of(TEXT_MODELS),
                   nargs="+", metavar="NAME"),
              Flag("--tile", "side of the VAE's tiles in the last column (default: 512)", integer(64), 512)]}


# ---- counting

class FusedAttention(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class Alive(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are still referred to; `most` of them at a
    time. Storages that were there before, of the weights, are not counted."""

    def __init__(self, before: list[Tensor]):
        super().__init__()
        self.now, self.most = 0, 0
        self.references: set[weakref.ref] = set()
        self.known = {tensor.untyped_storage()._cdata for tensor in before}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage())
        return out

    def add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.now += size
        self.most = max(self.most, self.now)

        def freed(_: object) -> None:
            self.now -= size
            self.known.discard(key)
            self.references.discard(reference)
        reference = weakref.ref(storage, freed)
        self.references.add(reference)


@torch.no_grad()
def peak(module: nn.Module, call: Callable[[], object]) -> int:
    """Bytes that call() takes at most, beside the weights of a module on the meta device."""
    with torch.device("meta"), FusedAttention(), Alive([*module.parameters(), *module.buffers()]) as alive:
        call()
    return alive.most


def size_of(module: nn.Module) -> int:
    return sum(part.numel() * part.itemsize for part in (*module.parameters(), *module.buffers()))


# ---- a model

def latent_size(row: published.Published) -> tuple[int, int]:
    """Height and width of a latent; that of a sound is one row."""
    height, width = (math.ceil(side / row.latents.factor) for side in row.size)
    return height, width


def drawing(row: published.Published, network: nn.Module) -> Callable[[], object]:
    """A call of the network as for one picture or sound: with guidance, two at a time."""
    batch = 1 if row.guidance == 1 else 2
    recipe = encoders.RECIPES[row.text]
    kind = dict(device="meta", dtype=torch.bfloat16)
    contexts = []
    for part in recipe.parts:
        config = encoders.CONFIGS[part.kind]
        width = config.get("hidden_size") or config["d_model"]
        if part.layer is not None:
            tokens = part.tokens if row.rate is None else part.tokens + 2              # of the seconds
            contexts.append(torch.empty(batch, tokens, width, **kind))
    cond = {"context": recipe.join(contexts)}
    if network.config.pooled_width:
        cond["pooled"] = torch.empty(batch, network.config.pooled_width, **kind)
    if getattr(network.config, "guidance", False):
        cond["guidance"] = torch.empty(batch, device="meta")
    xt = torch.empty(batch, row.latents.channels, *latent_size(row), **kind)
    t = torch.empty(batch, device="meta")
    return lambda: network(xt, t, **cond)


def needs(name: str, tile: int) -> dict[str, int]:
    """Bytes at most, by mode: all on the device, `parts`, `blocks`, and `blocks` with the VAE in tiles, of
    which a sound has none."""
    row = published.MODELS[name]
    network = published.build_network(name).eval().bfloat16()
    autoencoder = published.build_vae(name).eval()
    step = peak(network, drawing(row, network))
    z = torch.empty(1, row.latents.channels, *latent_size(row), device="meta")
    if row.rate is not None:
        z = z.squeeze(2)
    decode = peak(autoencoder, lambda: autoencoder.decoder(z))       # not VAE.decode: autocast lacks meta
    tiled = decode
    if row.rate is None:
        tiled = peak(autoencoder, lambda: in_tiles(autoencoder.decoder, z, tile // 8, 1, 8))
    blocks = [size_of(module) for module in network.modules()
              if isinstance(module, ALL_ARCHITECTURES[row.arch].blocks)]
    outside = size_of(network) - sum(blocks)
    texts = [2 * encoders.count_parameters(part) for part in encoders.RECIPES[row.text].parts]
    drawn = size_of(network) + step
    by_block = outside + max(blocks) + step
    vae_whole, vae_tiled = size_of(autoencoder) + decode, size_of(autoencoder) + tiled
    return {"all": max(sum(texts), size_of(network) + size_of(autoencoder) + max(step, decode)),
            "parts": max(*texts, drawn, vae_whole), "blocks": max(by_block, vae_whole),
            "tiles": max(by_block, vae_tiled)}


def main(argv: list[str] | None = None) -> None:
    args = make_parser(__doc__.splitlines()[0], FLAGS).parse_args(argv)
    print(f"GiB for one picture or sound   all on the device   --offload parts   blocks   "
          f"and --tile {args.tile}")
    for name in args.models or TEXT_MODELS:
        found = {mode: size / GIB for mode, size in needs(name, args.tile).items()}
        side = published.MODELS[name].side
        print(f"{name:21s} {side:8d} {found['all']:18.1f} {found['parts']:17.1f} {found['blocks']:8.1f} "
              f"{found['tiles']:12.1f}", flush=True)


if __name__ == "__main__":
    sys.exit(program("memory.py", main))
