"""RESULTS.md's picture of prompts: half of them captions of training pictures, half new combinations, and
below each sample the training picture that is nearest to it.

    python benchmarks/gallery.py runs/emoji-64x64-mmdit-rf gallery.png --cfg 3 (from the repository's root)

Each caption says whether a picture of that caption was trained on, is held out for validation, or does not
exist (NEW). Nearest means the smallest root mean square difference of pixels (neighbours.py). Prompts are
those of PROMPTS, whose rows are checked, or any others, lines of --prompts FILE. Further flags are passed to
sample.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import settings
from benchmarks.neighbours import compare, nearest, of_array
from benchmarks.samples import check_out, drawn
from checkpoints import load_checkpoint
from cli import Parser, program
from conditioning import read_prompts
from data import Dataset, load_data
from pictures import PICTURES, grid
from run import Run

COLUMNS = 8
PROMPTS = {         # rows of COLUMNS: trained, NEW, trained, NEW
    "emoji": [
        "pineapple", "cat face", "red apple", "octopus", "blue heart", "rocket", "hamburger", "sun with face",
        "blue pineapple", "cat face with sunglasses", "blue apple", "green octopus", "brown apple",
        "red rocket", "green heart with arrow", "blue sun with face",
        "dog face", "strawberry", "green book", "penguin", "alarm clock", "four leaf clover", "maple leaf",
        "frog face",
        "pouting dog face", "blue strawberry", "purple book", "red penguin", "red clock", "red leaf clover",
        "green maple leaf", "frog face with sunglasses",
    ],
    "clipart": [
        "cartoon tree", "simple teddy bear", "hammer", "christmas tree", "lightbulb", "jigsaw green",
        "germany", "apple",
        "blue cartoon tree", "green teddy bear", "red hammer", "blue christmas tree", "blue lightbulb",
        "jigsaw purple", "star red", "blue apple",
        "arrow-up-green", "tree", "musical note", "scissors", "house", "umbrella", "penguin", "butterfly",
        "arrow-up-brown", "red tree", "red musical note", "green scissors", "green house", "green umbrella",
        "red penguin", "green butterfly",
    ],
    "stamps": [
        "a green apple", "a strawberry", "a cow", "a butterfly", "a yellow lemon", "an owl", "a red apple",
        "a green bus",
        "a blue apple", "a green strawberry", "a red cow", "a green butterfly", "a red lemon", "a red owl",
        "a black apple", "a yellow bus",
        "a flower", "a black cat", "a pink cake", "a tiger", "a green fedora", "an electric guitar",
        "a carrot", "the letter b",
        "a green flower", "a white cat", "a green cake", "a green tiger", "a red fedora", "a blue guitar",
        "a blue carrot", "a red letter b",
    ],
}


def pictures_of(run: Path, data_dir: Path) -> tuple[str, Dataset, Dataset]:
    """The name of a run's data, and the training and validation pictures with their captions. Raises
    ValueError for a run without captions."""
    if load_checkpoint(run)["text"] is None:
        raise ValueError(f"{run}: draws no captions; give a run of --cond text")
    found = argparse.Namespace(**settings.complete(Run(run).read_settings() or {}, str(run)))
    cache_dir = Path(found.cache_dir or found.vae or run.parent / settings.vae_name(found))
    train, val = (load_data(found.data, split, tuple(found.image_size), data_dir, cache_dir, "captions",
                            crop=found.crop) for split in ("train", "val"))
    return found.data, train, val


def origin(prompt: str, train: Dataset, val: Dataset) -> str:
    """Where a picture of this caption is."""
    if prompt in train.captions:
        return "trained"
    return "held out" if prompt in val.captions else "NEW"


def check_rows(name: str, prompts: list[str], origins: list[str]) -> None:
    """Raise ValueError unless rows of captions that were trained on and of new ones take turns."""
    wrong = []
    for i, (prompt, where) in enumerate(zip(prompts, origins)):
        right = "NEW" if i // COLUMNS % 2 else "trained"
        if where != right:
            wrong.append(f"{prompt} ({where}, not {right})")
    if wrong:
        raise ValueError(f"PROMPTS of {name}: not what their rows should be: {', '.join(wrong)}")


def with_nearest(samples: np.ndarray, images: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Samples (M, H, W, 3) with the nearest of the pictures (N, H, W, 3) below each, (M, 2 H, W, 3); which
    ones these are (M,); and how far they are, in grey levels (M,)."""
    found = nearest(samples.reshape(len(samples), -1), of_array(images.reshape(len(images), -1)))
    return np.concatenate([samples, images[found.index]], axis=1), found.index, found.distance


def main() -> None:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", type=Path, help="a run folder")
    p.add_argument("out", type=Path, help="PNG file to write")
    p.add_argument("--prompts", type=Path, help="text file, one prompt per line (default: PROMPTS)")
    p.add_argument("--data-dir", type=Path, default=Path("data"))
    args, more = p.parse_known_args()
    check_out("OUT", args.out, PICTURES)
    prompts = read_prompts("--prompts", str(args.prompts)) if args.prompts else None
    name, train, val = pictures_of(args.run, args.data_dir)
    prompts = prompts or PROMPTS.get(name)
    if prompts is None:
        raise ValueError(f"--prompts FILE: needed for --data {name}; PROMPTS has {', '.join(PROMPTS)}")
    origins = [origin(prompt, train, val) for prompt in prompts]
    if not args.prompts:
        check_rows(name, prompts, origins)
    samples = drawn([str(args.run), "--n", str(len(prompts)), *more, "--prompt", *prompts])
    images = train.images[:]
    tiles, index, distance = with_nearest(samples, images)
    captions = [f"{prompt} ({where}) above {train.captions[i]}"
                for prompt, where, i in zip(prompts, origins, index)]
    picture = grid(tiles, COLUMNS, captions=captions)
    picture.quantize(256, dither=Image.Dither.NONE).save(args.out, optimize=True)
    vectors = of_array(images.reshape(len(images), -1))
    sets = {where: samples[[each == where for each in origins]] for where in sorted(set(origins))}
    sets["held-out pictures"] = val.images[:]
    found = compare({key: part.reshape(len(part), -1) for key, part in sets.items()}, vectors)
    for key, row in found.items():
        print(f"{key}: {row['count']}, {row['close']:.0%} close to a training picture, median distance "
              f"{row['median distance']:.1f} levels")
    print(args.out)


if __name__ == "__main__":
    sys.exit(program("gallery.py", main))
