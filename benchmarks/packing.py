"""What packing saves: training steps on pictures at their own aspect ratios, packed, padded to the longest,
and in buckets of one size.

    python benchmarks/packing.py FOLDER --image-size 256 --preset small --tokens 2048
    python benchmarks/packing.py /usr/share/openclipart/png --sizes-only

Only the headers of the pictures are read: the latents are noise, which costs a step the same. Tokens per
second count the pictures' own tokens, never padding. Padding to the longest is timed without the mask that it
would need, and so at its best. Captions are the names of the files, in words, for the share of text.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import machine
from cli import Flag, integer, make_parser, nonempty, one_of, program
from data import packed_indices
from dit import PRESETS, DiT, DiTConfig
from folder import list_folder
from pictures import open_header
from ragged import fitted
from rectified_flow import RectifiedFlow
from text import tokenize

CHANNELS = 4

FLAGS = {"what to measure": [
    Flag("folder", "folder of pictures", nonempty),
    Flag("--image-size", "the budget is N x N pixels (default: 256)", integer(1), 256, metavar="N"),
    Flag("--multiple", "side of a token in pixels: factor of the VAE times patch (default: 16)", integer(1),
         16),
    Flag("--tokens", "tokens of a step (default: 2048)", integer(1), 2048),
    Flag("--preset", "of dit.py (default: small)", one_of(PRESETS), "small"),
    Flag("--steps", "steps of each kind (default: 12)", integer(1), 12),
    Flag("--device", "auto (default), cpu, cuda, mps", nonempty, "auto"),
    Flag("--sizes-only", "do not time anything"),
]}


def read_sizes(pictures: list[Path]) -> list[tuple[int, int]]:
    """Height and width of every picture that can be opened, as its EXIF data turn it."""
    sizes = []
    for path in tqdm(pictures, desc="read headers", unit="img", leave=False):
        try:
            with open_header(path) as image:
                turned = image.getexif().get(274, 1) in (5, 6, 7, 8)
                sizes.append(image.size if turned else image.size[::-1])
        except Exception:                              # as in folder.py: such a file is skipped
            continue
    return sizes


def bucket_batches(grids: np.ndarray, budget: int, rng: np.random.Generator) -> list[np.ndarray]:
    """An epoch in batches of one size, each of at most `budget` tokens; in random order."""
    batches = []
    for grid in np.unique(grids, axis=0):
        members = rng.permutation(np.flatnonzero((grids == grid).all(1)))
        count = max(1, budget // int(grid.prod()))
        batches += [members[i:i + count] for i in range(0, len(members), count)]
    return [batches[i] for i in rng.permutation(len(batches))]


def shares_of_padding(grids: np.ndarray, batches: list[np.ndarray]) -> dict[str, float]:
    """The share of computed tokens that would be padding, over these batches."""
    own = sum(int(grids[batch].prod(1).sum()) for batch in batches)
    longest = sum(len(batch) * int(grids[batch].prod(1).max()) for batch in batches)
    around = sum(len(batch) * int(grids[batch].max(0).prod()) for batch in batches)
    return {"to the longest sequence": 1 - own / longest, "to the largest height and width": 1 - own / around}


def text_share(captions: list[str], batches: list[np.ndarray]) -> float:
    """The share of padding in the texts of these batches."""
    lengths = tokenize(captions, 64)[1].sum(1).numpy()
    own = sum(int(lengths[batch].sum()) for batch in batches)
    return 1 - own / sum(len(batch) * int(lengths[batch].max()) for batch in batches)


def measure(args: argparse.Namespace, grids: np.ndarray, packed: list[np.ndarray],
            buckets: list[np.ndarray]) -> None:
    device = machine.pick_device(args.device)
    torch.manual_seed(0)
    model = DiT(DiTConfig(channels=CHANNELS, **PRESETS[args.preset])).to(device)
    p, q = model.config.patch
    path = RectifiedFlow()

    def step(x0) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=machine.has_bf16(device)):
            loss = path.loss(model, x0).mean()
        loss.backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()

    def as_list(batch: np.ndarray) -> list[torch.Tensor]:
        order = np.argsort(grids[batch].prod(1), kind="stable")        # as mixed.MixedDenoising.batch
        return [torch.randn(CHANNELS, int(h) * p, int(w) * q, device=device) for h, w in grids[batch][order]]

    def padded(batch: np.ndarray) -> torch.Tensor:
        return torch.randn(len(batch), CHANNELS, p, int(grids[batch].prod(1).max()) * q, device=device)

    def alike(batch: np.ndarray) -> torch.Tensor:
        return torch.stack(as_list(batch))

    kinds: dict[str, tuple[list[np.ndarray], Callable]] = {
        "packed": (packed, as_list), "padded to the longest": (packed, padded),
        "buckets of one size": (buckets, alike)}
    seconds, tokens = Counter(), Counter()
    for number in tqdm(range(-2, args.steps), desc="steps", leave=False):    # in turn; two to warm up
        for name, (batches, make) in kinds.items():
            batch = batches[number % len(batches)]
            x0 = make(batch)
            began = time.perf_counter()
            step(x0)
            if number >= 0:
                seconds[name] += time.perf_counter() - began
                tokens[name] += int(grids[batch].prod(1).sum())
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    print(f"dit {args.preset}, {millions:.1f} M parameters, {args.steps} steps each, {device.type}, "
          f"{torch.get_num_threads()} threads:")
    for name in kinds:
        print(f"  {name:24s} {tokens[name] / seconds[name]:8,.0f} tokens/s, "
              f"{tokens[name] / args.steps:6,.0f} tokens a step")


def main() -> None:
    args = make_parser("Measure packing against padding and buckets.", FLAGS).parse_args()
    pictures = list_folder(Path(args.folder)).pictures
    multiple = (args.multiple, args.multiple)
    sizes = [fitted(size, args.image_size**2, multiple) for size in read_sizes(pictures)]
    grids = np.array(sizes) // args.multiple
    tokens = grids.prod(1)
    print(f"{len(grids):,} pictures in {len(np.unique(grids, axis=0))} sizes, {tokens.min()} to "
          f"{tokens.max()} tokens, {tokens.mean():.0f} on average")
    epoch = max(1, int(tokens.sum()) // args.tokens)
    packed = [packed_indices(tokens, args.tokens, step, 0) for step in range(epoch)]
    for name, share in shares_of_padding(grids, packed).items():
        print(f"padding {name} of a batch of {args.tokens:,} tokens: {share:.1%}; packed: 0")
    buckets = bucket_batches(grids, args.tokens, np.random.default_rng(0))
    filled = tokens.sum() / (args.tokens * len(buckets))
    print(f"buckets: {len(buckets):,} batches of {filled:.1%} of the budget on average, where {epoch:,} are "
          "full")
    captions = [path.stem.replace("_", " ").replace("-", " ") for path in pictures[:len(grids)]]
    print(f"padding of texts, the names of the files: {text_share(captions, packed):.1%}; packed: 0")
    if not args.sizes_only:
        measure(args, grids, packed, buckets)


if __name__ == "__main__":
    sys.exit(program("packing.py", main))
