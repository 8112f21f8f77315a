"""Score a run on captioned shapes: how much of its prompt does each sample show, as `read_scene` reads it?

    python benchmarks/scenes.py runs/shapes-text-mmdit-rf --cfg 3        (from the repository's root)

Prompts describe scenes outside the training set, with one shape and with two. Half of them combine colour,
kind and relation as in training, half in ways that training never contains. Further flags are passed to
sample.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from cli import Parser, integer, program
from toys import RELATIONS, Scene, Thing, describe_scene, read_scene


def score_scene(scene: Scene, image: np.ndarray) -> dict[str, bool]:
    """Which parts of a scene its picture, uint8 (H, W, 3), shows correctly: colour, kind, size, and place
    (one shape) or relation (two); "all" is all of them. All are False where the number of shapes is wrong."""
    asked = list(scene.things)
    seen = read_scene(image)
    last_part = "relation" if scene.relation else "place"
    if len(seen) != len(asked):
        return dict.fromkeys(["colour", "kind", "size", last_part, "all"], False)

    if scene.relation:
        seen = _ordered_along(scene.relation, seen)
        in_order = _looks(seen) == _looks(asked)
        last_is_right = in_order and _holds(scene.relation, *seen)
        # If the right shapes are in the wrong order, only the relation counts as wrong.
        if not in_order and _looks(seen[::-1]) == _looks(asked):
            seen = seen[::-1]
    else:
        last_is_right = seen[0].place == asked[0].place

    score = {part: all(getattr(a, part) == getattr(b, part) for a, b in zip(seen, asked))
             for part in ("colour", "kind", "size")}
    score[last_part] = last_is_right
    score["all"] = all(score.values())
    return score


def _looks(things: list[Thing]) -> list[tuple[str, str]]:
    return [(thing.colour, thing.kind) for thing in things]


def _ordered_along(relation: str, things: list[Thing]) -> list[Thing]:
    """The things in the order in which the relation would name them: for "left of", the leftmost first."""
    dx, dy = RELATIONS[relation]
    return sorted(things, key=lambda thing: -(dx * thing.x + dy * thing.y))


def _holds(relation: str, first: Thing, second: Thing) -> bool:
    """Whether the two lie further apart along the relation's axis, and in its direction, than across it."""
    dx, dy = RELATIONS[relation]
    x, y = first.x - second.x, first.y - second.y
    along = dx * x + dy * y
    across = dy * x + dx * y
    return along > abs(across)


def main() -> None:
    from benchmarks.samples import drawn, network_run      # here, so that score_scene needs only toys.py

    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("run", help="a run folder")
    p.add_argument("--n", type=integer(1), default=500, help="prompts of each kind (default: 500)")
    p.add_argument("--first", type=integer(0, 10**12), default=2 * 10**9,
                   help="index of the first scene (default: 2e9)")
    args, more = p.parse_known_args()
    if network_run(args.run, "shapes")["text"] is None:
        raise ValueError(f"{args.run}: draws classes; benchmarks/shapes.py scores it")
    for count, unseen in ((1, False), (1, True), (2, False), (2, True)):
        scenes = [describe_scene(args.first + i, count, unseen) for i in range(args.n)]
        prompts = [scene.caption for scene in scenes]
        images = drawn([args.run, "--n", str(args.n), *more, "--prompt", *prompts])
        scores = [score_scene(scene, image) for scene, image in zip(scenes, images)]
        shares = [f"{part} {np.mean([score[part] for score in scores]):.1%}" for part in scores[0]]
        shapes = "1 shape" if count == 1 else f"{count} shapes"
        kind = "never seen" if unseen else "seen"
        print(f"{shapes}, {kind} in training: {', '.join(shares)}", flush=True)


if __name__ == "__main__":
    sys.exit(program("scenes.py", main))
