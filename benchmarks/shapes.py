"""Score a run on the built-in shapes: how many samples have the colour and kind of their class?

    python benchmarks/shapes.py runs/shapes-dit-rf                       (from the repository's root)

`toys.read_shape` reads both back from the pixels.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from toys import COLOURS, KINDS, SHAPE_CLASSES, read_shape


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="a run folder")
    p.add_argument("--n", type=int, default=240, help="number of samples (default: 240)")
    p.add_argument("--sampler", default="heun", help="see sample.py (default: heun)")
    p.add_argument("--steps", default="10", help="see sample.py (default: 10)")
    p.add_argument("--cfg", default="2", help="guidance scale (default: 2)")
    args = p.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sample.main([args.run, "--n", str(args.n), "--sampler", args.sampler, "--steps", args.steps,
                     "--cfg", args.cfg, "--out", f"{folder}/samples.npz"])
        images = np.load(f"{folder}/samples.npz")["arr_0"]
    seen = [read_shape(image) for image in images]
    asked = [tuple(SHAPE_CLASSES[i % len(SHAPE_CLASSES)].split("-")) for i in range(args.n)]
    right = sum(a == b for a, b in zip(seen, asked))
    print(f"{args.run}: {right} of {args.n} ({right / args.n:.1%}) have the colour and kind asked for; "
          f"{args.sampler} x {args.steps}, guidance {args.cfg}")
    for axis, names in ((0, COLOURS), (1, KINDS)):
        for name in names:
            hits = [s[axis] == name for s, a in zip(seen, asked) if a[axis] == name]
            print(f"  {name:9s} {sum(hits)} of {len(hits)}")


if __name__ == "__main__":
    main()
