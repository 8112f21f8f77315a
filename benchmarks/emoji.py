"""The README's picture of an emoji run: 8 x 8 prompts, half of them names of emoji, half new combinations.

    python benchmarks/emoji.py runs/emoji-64x64-mmdit-rf emoji.png --cfg 3   (from the repository's root)

Below each sample is its prompt, and whether an emoji of that name was trained on, is held out for validation,
or does not exist (NEW). Further flags are passed to sample.py.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sample
from data import load_emoji
from pictures import grid

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
    p.add_argument("run", help="a run folder")
    p.add_argument("out", help="PNG file to write")
    args, more = p.parse_known_args()
    prompts = []
    for i in range(0, 32, 8):               # rows of eight: known, new, known, new, ...
        prompts += KNOWN[i:i + 8] + NEW[i:i + 8]
    label = dict.fromkeys(prompts, "NEW")
    # Look the names up in the font's, so that the labels are right whatever the two lists above contain.
    for split, name in (("val", "held out"), ("train", "trained")):
        names = load_emoji(split, (64, 64), Path("data")).captions
        label |= {prompt: name for prompt in prompts if prompt in names}
    with tempfile.TemporaryDirectory() as folder:
        sample.main([args.run, "--n", "64", "--out", f"{folder}/emoji.npz", *more, "--prompt", *prompts])
        images = np.load(f"{folder}/emoji.npz")["arr_0"]
    grid(images, 8, captions=[f"{prompt} ({label[prompt]})" for prompt in prompts]).save(args.out)
    counts = {name: list(label.values()).count(name) for name in ("trained", "held out", "NEW")}
    print(args.out, counts)


if __name__ == "__main__":
    main()
