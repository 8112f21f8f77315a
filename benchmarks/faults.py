"""Kill trainings of several processes again and again, and see that nothing is lost.

    python benchmarks/faults.py --kills 100

Two runs are trained, one data parallel and one with --shard, on pictures that are drawn here. Of a launch of
two processes, one or both are killed (SIGKILL), at a random moment or as soon as a file of a save appears.
The next launch continues. After each kill, the checkpoint has to be whole, by its checksums and those of the
optimizer's folder, and no older than before, and a survivor has to end by itself with one line. In the end,
each run has to equal the one that nobody killed, bit for bit; one that has come to its end begins anew.
"""

from __future__ import annotations

import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
from PIL import Image

import checkpoints
import cli
import toys
from benchmarks.processes import Launch, Server
from cli import Flag, integer

# ---- the runs

TINY = ["--data", "pictures", "--cond", "none", "--preset", "tiny", "--vae-preset", "tiny", "--precision",
        "fp32", "--vae-steps", "2", "--batch-size", "4", "--ema", "0.1", "--log-every", "1", "--val-every",
        "1000", "--preview-every", "1000"]
# Samples would take most of the time of so short a run.
FEW = """
import train
from PIL import Image
train.Denoising.preview = lambda self, model, stop, rows=3: Image.new("RGB", (8, 8))
"""


def draw_pictures(folder: Path, count: int = 24) -> None:
    folder.mkdir(parents=True)
    for i in range(count):
        Image.fromarray(toys.draw_scene(toys.describe_scene(i), i)).save(folder / f"{i}.png")


def same(found: object, wanted: object) -> bool:
    """Whether two checkpoints, or parts of them, are equal bit by bit."""
    if isinstance(wanted, torch.Tensor):
        return torch.equal(found, wanted)
    if isinstance(wanted, dict):
        return found.keys() == wanted.keys() and all(same(found[key], wanted[key]) for key in wanted)
    if isinstance(wanted, (list, tuple)):
        return len(found) == len(wanted) and all(map(same, found, wanted))
    return found == wanted


def moments_of(folder: Path, checkpoint: dict) -> dict:
    """The optimizer's state: what the checkpoint holds of it, or the content of its folder."""
    import torch.distributed.checkpoint as dcp

    saved = checkpoint["training"]["optimizer"]
    if "folder" not in saved:
        return saved
    metadata = dcp.FileSystemReader(folder / saved["folder"]).read_metadata().state_dict_metadata
    state = {name: torch.zeros(entry.size) for name, entry in metadata.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                # of a single process, which is as intended
        dcp.load(state, checkpoint_id=folder / saved["folder"], no_dist=True)
    return state


def equal(folder: Path, other: Path) -> bool:
    """Whether two runs have the same checkpoint, with its optimizer."""
    found, wanted = (checkpoints.load_checkpoint(path) for path in (folder, other))
    if not same(moments_of(folder, found), moments_of(other, wanted)):
        return False
    for checkpoint in (found, wanted):
        checkpoint["training"].pop("optimizer")
    return same(found, wanted)


class Victim:
    """A run that is killed and continued, and the same one undisturbed."""

    def __init__(self, server: Server, place: Path, name: str, flags: list[str], steps: int, saves: int):
        self.server = server
        self.place = place
        self.name = name
        self.words = [["--arch", "dit", *TINY, *flags, "--steps", str(steps), "--save-every", str(saves),
                       "--keep", "2"]] * 2
        self.whole = place / f"{name}-whole"
        self.folder = place / name
        for folder in (self.whole, self.folder):
            folder.mkdir()
            (folder / "pictures").symlink_to(place / "pictures")
        started = time.monotonic()
        first = server.launch(self.whole, self.words)
        statuses, printed = first.end()
        if statuses != [0, 0]:
            raise RuntimeError(f"{name} does not run: {printed}")
        self.seconds = 0.6 * (time.monotonic() - started)      # without the VAE and the import of all rooms
        self.run = "runs/pictures-dit-rf"
        self.begin()

    def begin(self) -> None:
        shutil.rmtree(self.folder / "runs", ignore_errors=True)
        shutil.copytree(self.whole / "runs/pictures-vae", self.folder / "runs/pictures-vae")
        self.step = -1                                 # of the checkpoint, which may never go back

    def kill(self, rng: random.Random, rank: int | None, in_save: bool) -> str:
        """Launch, kill this rank, or all, and check what is left. Returns what is wrong, or nothing."""
        launch = self.server.launch(self.folder, self.words)
        folder = self.folder / self.run
        if in_save:
            before = set(os.listdir(folder)) if folder.is_dir() else set()
            number = rng.randrange(4)                  # saves that are let through
            while launch.running():
                now = set(os.listdir(folder)) if folder.is_dir() else set()
                new = [entry for entry in now - before if entry.startswith((".checkpoint", "optimizer"))]
                if new and number == 0:
                    break
                number -= bool(new)
                before = now | before
            time.sleep(rng.uniform(0, 0.02))
        else:
            until = time.monotonic() + rng.uniform(0, self.seconds)
            while launch.running() and time.monotonic() < until:
                time.sleep(0.005)
        launch.running()
        killed = [number for number in range(2) if rank in (None, number) and launch.statuses[number] is None]
        for number in killed:
            launch.kill(number)
        statuses, _ = launch.end(60)
        return self.problem(launch, killed, statuses)

    def problem(self, launch: Launch, killed: list[int], statuses: list[int]) -> str:
        self.hit = bool(killed)
        for number, status in enumerate(statuses):
            if number not in killed and status not in ((0, 2) if killed else (0,)):
                return f"rank {number} ended with {status}: {launch.printed()[number][-1500:]}"
        if any("Traceback" in text for text in launch.printed()) or len(launch.errors()) > 1:
            return f"more than a line: {launch.printed()}"
        file = self.folder / self.run / "checkpoint.pt"
        if not file.exists():
            return "the checkpoint is gone" if self.step >= 0 else ""
        try:
            checkpoint = checkpoints.load_checkpoint(file)
        except ValueError as error:
            return str(error)
        damage = checkpoints.damage(file)
        if damage or checkpoint["step"] < self.step:
            return damage or f"step {checkpoint['step']} after {self.step}"
        self.step = checkpoint["step"]
        if checkpoint["training"]["finished"]:         # compared, and begun again
            if not equal(self.folder / self.run, self.whole / self.run):
                return "the end differs"
            self.begin()
        return ""

    def finish(self) -> str:
        statuses, printed = self.server.launch(self.folder, self.words).end()
        if statuses != [0, 0]:
            return f"does not go on: {printed}"
        if not equal(self.folder / self.run, self.whole / self.run):
            return "the end differs"
        return ""


FLAGS = {"what to do": [
    Flag("--kills", "how many (default: 100)", integer(1), 100),
    Flag("--seed", "of the moments at which they come (default: 0)", integer(0), 0),
    Flag("--steps", "of each run (default: 30)", integer(1), 30),
]}


def main(argv: list[str] | None = None) -> int:
    args = cli.make_parser("Kill trainings of several processes again and again.", FLAGS).parse_args(argv)
    rng = random.Random(args.seed)
    counts: dict[str, int] = {}
    lost = 0
    with tempfile.TemporaryDirectory() as place, Server(FEW) as server:
        draw_pictures(Path(place) / "pictures")
        victims = [Victim(server, Path(place), name, flags, args.steps, 2)
                   for name, flags in (("data parallel", []), ("sharded", ["--shard"]))]
        kinds = [(victim, rank, in_save) for rank in (0, None, 1, None) for in_save in (False, True)
                 for victim in victims]
        turn = 0
        while sum(counts.values()) < args.kills:
            victim, rank, in_save = kinds[turn % len(kinds)]
            turn += 1
            problem = victim.kill(rng, rank, in_save)
            if problem:
                lost += 1
                print(f"{victim.name}, {rank=}, {in_save=}: {problem}", flush=True)
                victim.begin()
            if victim.hit:                             # else it had come to its end before
                who = "all" if rank is None else "one"
                kind = f"{victim.name}, {who}, {'in a save' if in_save else 'at any moment'}"
                counts[kind] = counts.get(kind, 0) + 1
            if turn % 4 == 0:
                print(f"{sum(counts.values())} kills, {lost} lost", flush=True)
        for victim in victims:
            if problem := victim.finish():
                lost += 1
                print(f"{victim.name}: {problem}", flush=True)
    for kind, count in sorted(counts.items()):
        print(f"  {kind}: {count}")
    print(f"{sum(counts.values())} kills, {lost} lost")
    return int(lost > 0)


if __name__ == "__main__":
    sys.exit(cli.program("faults.py", main))
