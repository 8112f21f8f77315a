"""Score a run on captioned shapes: what of each prompt its picture shows, by `read_scene`.

    python benchmarks/scenes.py runs/shapes-text-mmdit-rf --cfg 3        (from the repository's root)

Prompts are of scenes beyond those of training: of one shape and of two, with pairs of colour and kind (and
relations) that training has and with those that it never shows. Further flags go to sample.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from data import describe_scene, score_scene


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run")
    p.add_argument("--n", type=int, default=500, help="prompts of each sort")
    p.add_argument("--first", type=int, default=2 * 10**9, help="number of the first scene")
    args, more = p.parse_known_args()
    for count, unseen in ((1, False), (1, True), (2, False), (2, True)):
        scenes = [describe_scene(args.first + i, count, unseen) for i in range(args.n)]
        with tempfile.TemporaryDirectory() as folder:
            sample.main([args.run, "--n", str(args.n), "--out", f"{folder}/samples.npz", *more,
                         "--prompt", *(scene.caption for scene in scenes)])
            images = np.load(f"{folder}/samples.npz")["arr_0"]
        scores = [score_scene(scene, image) for scene, image in zip(scenes, images)]
        print(f"{count} shape{'s' * (count > 1)}, {'never seen' if unseen else 'seen'} in training: "
              + ", ".join(f"{part} {np.mean([score[part] for score in scores]):.1%}" for part in scores[0]),
              flush=True)


if __name__ == "__main__":
    main()
