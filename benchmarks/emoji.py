"""The README's picture of an emoji run: 8 x 8 prompts, half of them names that it was trained on, half new.

    python benchmarks/emoji.py runs/emoji-64x64-mmdit-rf emoji.png --cfg 3   (from the repository's root)

Further flags go to sample.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from data import grid, load_emoji

KNOWN = [
    "pineapple", "cat face", "red apple", "octopus", "blue heart", "rocket", "hamburger", "sun with face",
    "dog face", "strawberry", "honeybee", "green book", "hot beverage", "penguin", "alarm clock",
    "four leaf clover", "snowman", "bicycle", "fish", "crown", "house building", "guitar", "maple leaf",
    "panda face", "smiling face with sunglasses", "orange book", "purple heart", "frog face", "banana",
    "electric light bulb", "christmas tree", "slice of pizza",
]
NEW = [
    "blue pineapple", "cat face with sunglasses", "blue apple", "green octopus", "brown apple",
    "red rocket", "green heart with arrow", "blue sun with face", "pouting dog face", "blue strawberry",
    "blue ball", "purple book", "cold beverage", "red penguin", "red clock", "red leaf clover",
    "crying cat", "red bicycle", "blue fish", "green crown", "blue house", "red guitar", "green maple leaf",
    "smiling panda face", "frog face with sunglasses", "yellow book", "two blue hearts", "sleeping frog",
    "green banana", "red light bulb", "blue tree", "black cat with heart-shaped eyes",
]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run")
    p.add_argument("out")
    args, more = p.parse_known_args()
    trained, held_out = (load_emoji(split, (64, 64), Path("data")).captions for split in ("train", "val"))
    prompts = [prompt for i in range(0, 32, 8) for half in (KNOWN, NEW) for prompt in half[i:i + 8]]
    label = {prompt: "trained" if prompt in trained else "held out" if prompt in held_out else "NEW"
             for prompt in prompts}
    with tempfile.TemporaryDirectory() as folder:
        sample.main([args.run, "--n", "64", "--out", f"{folder}/emoji.npz", *more, "--prompt", *prompts])
        images = np.load(f"{folder}/emoji.npz")["arr_0"]
    grid(images, 8, captions=[f"{prompt} ({label[prompt]})" for prompt in prompts]).save(args.out)
    print(args.out, {kind: list(label.values()).count(kind) for kind in ("trained", "held out", "NEW")})


if __name__ == "__main__":
    main()
