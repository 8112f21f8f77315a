"""Score a run on the built-in shapes: how many samples have the colour and kind of their class?

    python benchmarks/shapes.py runs/shapes-dit-rf                       (from the repository's root)
    python benchmarks/shapes.py runs/shapes-dit-rf --strength 0.6 0.7 0.8 0.9     # beginning with pictures

`toys.read_shape` reads both back from the pixels. With --strength, ten pictures of the validation part are
turned into every class.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.samples import drawn, network_run
from cli import Parser, integer, program
from data import load_drawn
from toys import COLOURS, KINDS, SHAPE_CLASSES, read_shape

ASKED = [tuple(name.split("-")) for name in SHAPE_CLASSES]


def draw(args: argparse.Namespace, *more: str) -> np.ndarray:
    """The pictures that sample.py draws with these flags, (N, H, W, 3) uint8."""
    return drawn([args.run, "--sampler", args.sampler, "--steps", args.steps, "--cfg", args.cfg, *more])


def from_pictures(args: argparse.Namespace, strength: str) -> None:
    """Count the samples that show the class asked for, and those that still show the picture's."""
    pictures = load_drawn("shapes", "val", (32, 32))
    right = kept = total = 0
    with tempfile.TemporaryDirectory() as folder:
        for i in range(0, 230, 23):             # of ten different classes
            source = ASKED[pictures.labels[i]]
            Image.fromarray(pictures.images[i]).save(f"{folder}/in.png")
            images = draw(args, "--n", str(len(ASKED)), "--init-image", f"{folder}/in.png", "--strength",
                          strength, "--seed", str(i))
            seen = [read_shape(image) for image in images]
            others = [(s, a) for s, a in zip(seen, ASKED) if a != source]
            total += len(others)
            right += sum(s == a for s, a in others)
            kept += sum(s == source for s, _ in others)
    print(f"{args.run}, --strength {strength}: {right} of {total} ({right / total:.1%}) show the class asked "
          f"for, {kept} ({kept / total:.1%}) the one before")


def main() -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="a run folder")
    p.add_argument("--n", type=integer(1), default=240, help="number of samples (default: 240)")
    p.add_argument("--sampler", default="heun", help="see sample.py (default: heun)")
    p.add_argument("--steps", default="10", help="see sample.py (default: 10)")
    p.add_argument("--cfg", default="2", help="guidance scale (default: 2)")
    p.add_argument("--strength", nargs="+", default=[], help="begin with pictures at these times")
    args = p.parse_args()
    if network_run(args.run, "shapes")["text"] is not None:
        raise ValueError(f"{args.run}: draws from captions; benchmarks/scenes.py scores it")
    for strength in args.strength:
        from_pictures(args, strength)
    if args.strength:
        return
    seen = [read_shape(image) for image in draw(args, "--n", str(args.n))]
    asked = [ASKED[i % len(ASKED)] for i in range(args.n)]
    right = sum(a == b for a, b in zip(seen, asked))
    print(f"{args.run}: {right} of {args.n} ({right / args.n:.1%}) have the colour and kind asked for; "
          f"{args.sampler} x {args.steps}, guidance {args.cfg}")
    for axis, names in ((0, COLOURS), (1, KINDS)):
        for name in names:
            hits = [s[axis] == name for s, a in zip(seen, asked) if a[axis] == name]
            print(f"  {name:9s} {sum(hits)} of {len(hits)}")


if __name__ == "__main__":
    sys.exit(program("shapes.py", main))
