"""Can this run be trusted? Its loss beside reference runs, the best average of the weights and guidance,
whether it copies training pictures, and the spread of its figures over seeds. Ten minutes on two cores.

    python benchmarks/report.py runs/fashion-mnist-dit-rf --out report.png      (from the repository's root)
    python benchmarks/report.py runs/seed-0 runs/seed-1 runs/seed-2         # the spread over runs as well
    python benchmarks/report.py --make-reference runs/seed-0 runs/seed-1 runs/seed-2

It writes one picture and one JSON of the same name. Fashion-MNIST runs are scored by agreement and distance
(fashion_mnist.py), class-conditional shapes by the share that is read back right; for any other run there are
the loss and the neighbours. After an interruption, the same command continues. The JSON has every command of
sample.py that was run, and the protocol is written out at the end of both.
"""

from __future__ import annotations

import argparse
import contextlib
import glob
import io
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import conditioning
import sample
import settings
from benchmarks import losses, neighbours
from benchmarks.fashion_mnist import classify, frechet, frechet_limit, load_classifier
from benchmarks.neighbours import Vectors
from benchmarks.report_picture import draw_report, read_report
from benchmarks.samples import check_out, check_replaces
from checkpoints import load_checkpoint
from cli import Flag, integer, make_parser, nonempty, number, one_of, program
from data import CLASSES, Dataset, load_data, load_mnist
from files import digest, fingerprint_tensors, open_array, read_stamp, write_atomically
from media import medium_of
from networks import encoder_fingerprint, unpack_vae
from run import Run
from sample_settings import PRECISIONS
from samplers import SAMPLERS
from settings import OBJECTIVES
from times import TIMES
from toys import SHAPE_CLASSES, read_shape
from vae import VAE

PARTS = ("loss", "sweep", "seeds", "neighbours")
LEAST = 100            # samples of a cell, however little time there is
HELD_OUT = 1000        # pictures, at most, of each set of which the neighbours are searched


class Cell(NamedTuple):
    """A way to draw samples: which weights, at which guidance scale, from which seed on."""
    weights: str       # "averaged", "raw", or the relative width of an average, like "0.05"
    scale: float
    first: int = 0     # seed of the first picture

    def flags(self) -> list[str]:
        chosen = {"averaged": [], "raw": ["--raw"]}.get(self.weights, ["--ema", self.weights])
        return [*chosen, "--cfg", f"{self.scale:g}", "--seed", str(self.first)]


class Measure(NamedTuple):
    """A figure of a set of samples."""
    name: str
    lower_is_better: bool
    what: str          # for the protocol


@dataclass
class Score:
    """How samples of this data are scored: `of` maps pictures, whose classes are taken in turn, to a figure
    for each measure, the decisive measure first. references(n): the figures of n other pictures."""
    measures: list[Measure] = field(default_factory=list)
    of: Callable[[np.ndarray], dict[str, float]] = lambda images: {}
    references: Callable[[int], dict[str, dict[str, float]]] = lambda n: {}
    least: int = LEAST # samples, of fewer of which these figures are mostly noise


@dataclass
class Job:
    """The report in progress: what is asked for, and what it is about."""
    args: argparse.Namespace
    name: str                      # the run, as it was given
    checkpoint: dict
    vae: VAE
    score: Score
    work: Path                     # folder of what is done so far
    commands: list[str] = field(default_factory=list)

    @property
    def how(self) -> list[str]:
        """The flags of sample.py that all samples share."""
        args = self.args
        return ["--sampler", args.sampler, "--steps", str(args.steps), "--times", args.times,
                "--precision", args.precision, "--batch-size", str(args.batch_size)]

    def part(self, name: str, compute: Callable[[], dict]) -> dict:
        """The result of this part, from an earlier process or computed now."""
        file = self.work / f"{name}.json"
        if not file.is_file():
            result = compute()
            write_atomically(file, lambda out: out.write(json.dumps(result).encode()))
        return json.loads(file.read_text())

    def draw(self, cell: Cell, n: int, run: str = "") -> np.ndarray:
        """n samples, uint8 (n, H, W, C), by sample.py; run: another one than the report's."""
        flags = [run or self.name, "--n", str(n), *self.how, *cell.flags()]
        out = self.work / f"{digest(flags)}.npz"
        self.commands.append("python sample.py " + " ".join([*flags, "--out", "samples.npz"]))
        if not out.is_file():
            with contextlib.redirect_stdout(io.StringIO()):
                sample.main([*flags, "--out", str(out)])
        return np.load(out)["arr_0"]


# ---- scores

def score_of(checkpoint: dict, data_dir: Path, vae: VAE) -> Score:
    """The score that fits the data of a run, or one without measures."""
    data = checkpoint["data"]
    if data["source"] == "fashion-mnist" and data["classes"] == CLASSES["fashion-mnist"] \
            and list(data["size"]) == [32, 32]:
        return score_fashion_mnist(data_dir, vae)
    if data["source"] == "shapes" and data["classes"] == SHAPE_CLASSES:
        asked = [tuple(name.split("-")) for name in SHAPE_CLASSES]

        def right(images: np.ndarray) -> dict[str, float]:
            seen = [read_shape(image) for image in images]
            return {"right": float(np.mean([s == asked[i % len(asked)] for i, s in enumerate(seen)]))}

        what = "right: the share of samples with the kind and colour of their class, read from the pixels"
        return Score([Measure("right", False, what)], right)
    return Score()


def score_fashion_mnist(data_dir: Path, vae: VAE) -> Score:
    test, train = (load_mnist("fashion-mnist", split, (32, 32), data_dir) for split in ("val", "train"))
    classifier = load_classifier(data_dir)
    reference, predicted = classify(classifier, test.images)
    accuracy = float((predicted == test.labels).mean())

    def figures(images: np.ndarray) -> dict[str, float]:
        features, seen = classify(classifier, images)
        return {"distance": frechet_limit(features, reference, group=10),
                "agreement": float((seen == np.arange(len(images)) % 10).mean()),
                "plain distance": frechet(features, reference)}

    def references(n: int) -> dict[str, dict[str, float]]:
        # Their classes in turn, as those of samples are. Not of the test pictures, with which they are
        # compared: a part of these is too near to the whole.
        of_class = [np.flatnonzero(train.labels == label)[:n // 10] for label in range(10)]
        pictures = train.images[np.stack(of_class, 1).reshape(-1)]
        return {"training pictures": figures(pictures),
                "training pictures through the VAE": figures(through(vae, pictures))}

    return Score([
        Measure("distance", True, "distance: the Fréchet distance between Gaussians fitted to 64 features of "
                                  f"a classifier, of the samples and of the {len(test):,} test pictures, "
                                  "extrapolated from N and N / 2 to infinitely many samples, because the "
                                  "distance of few is too large, and by more where samples vary more"),
        Measure("agreement", False, "agreement: the share of samples that the classifier assigns to the "
                                    f"class asked for; it is right for {accuracy:.1%} of the test pictures")],
        figures, references, least=300)     # halves of 150 still determine covariances of 64 features


@torch.no_grad()
def through(vae: VAE, images: np.ndarray, size: int = 100) -> np.ndarray:
    """Pictures, or sounds, as the VAE reconstructs them."""
    medium = medium_of(vae.config)
    return np.concatenate([medium.to_array(vae.decode(vae.encode(medium.to_tensor(images[i:i + size])).mean))
                           for i in range(0, len(images), size)])


@torch.no_grad()
def latents_of(vae: VAE, images: np.ndarray, mirrored: bool = False, size: int = 100) -> np.ndarray:
    """The normalised means of their latents, (N, D) float32; of sounds as of pictures."""
    medium = medium_of(vae.config)
    parts = []
    for i in range(0, len(images), size):
        x = medium.to_tensor(images[i:i + size])
        parts.append(vae.normalize(vae.encode(x.flip(-1) if mirrored else x).mean))
    return torch.cat(parts).flatten(1).numpy()


# ---- how many samples the time allows

def choose_n(job: Job, cells: list[Cell], further: list[Cell]) -> dict:
    """Lower --n where the time that all these cells would take is more than --minutes. Measured, as machines
    differ tenfold: the seconds of 8 and of 40 samples, whose difference is that of 32 without the start."""
    cell = Cell("averaged", max((c.scale for c in cells), default=1.0))
    seconds = []
    for n in (8, 40):
        began = time.monotonic()
        job.draw(cell, n)
        seconds.append(time.monotonic() - began)
    job.commands.clear()
    each = max(1e-9, seconds[1] - seconds[0]) / 32
    dear = 2 if cell.scale not in (0, 1) else 1          # guidance evaluates the network twice
    units = sum(2 if c.scale not in (0, 1) else 1 for c in [*cells, *further]) / dear
    # A fifth of the time is kept for the neighbours and the scores; each cell also loads the run.
    left = 0.8 * 60 * job.args.minutes - seconds[0] * len([*cells, *further])
    most = int(left / (units * each)) if units else job.args.n
    n = min(job.args.n, max(job.score.least, most // 10 * 10))
    if n < job.args.n:
        minutes = max(job.args.minutes, (n * units * each - left) / 60 + job.args.minutes)
        print(f"--n {job.args.n}: {n} samples of each cell are drawn, at {1 / each:.1f} a second, which "
              f"takes about {minutes:.0f} minutes")
    return {"n": n, "seconds": each}


# ---- the parts

def kept_averages(job: Job) -> tuple[list[str], list[str]]:
    """The weights that can be sampled, and what to say of those that cannot."""
    weights, words = ["averaged", "raw"], []
    for width in job.args.ema:
        try:                            # one picture in one step: the quickest way to ask
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                sample.main([job.name, "--ema", width, "--n", "1", "--steps", "1", "--out",
                             str(job.work / "probe.png")])
            weights.append(width)
        except ValueError as error:
            words.append(f"Averages of width {width} were left out: {error}.")
    return weights, words[:1]


def sweep(job: Job, cells: list[Cell], n: int) -> list[dict]:
    """The figures of every cell."""
    rows = []
    for i, cell in enumerate(cells, 1):
        print(f"sweep {i} of {len(cells)}: {cell.weights} weights, guidance {cell.scale:g}", flush=True)
        images = job.draw(cell, n)
        figures = job.part(f"cell-{cell.weights}-{cell.scale:g}", lambda: job.score.of(images))
        rows.append({"weights": cell.weights, "scale": cell.scale, **figures})
    return rows


def best(rows: list[dict], measure: Measure) -> dict:
    """The best row; of equal ones the first, which is nearer to the defaults."""
    sign = 1 if measure.lower_is_better else -1
    return min(rows, key=lambda row: sign * row[measure.name])


def spread(job: Job, chosen: Cell, n: int) -> list[dict]:
    """The figures of the chosen cell over --seeds disjoint sets of seeds, and over the other runs given."""
    rows = []
    for seed in range(job.args.seeds):
        print(f"seed {seed + 1} of {job.args.seeds}", flush=True)
        images = job.draw(chosen._replace(first=seed * n), n)
        rows.append({"run": job.name, "first seed": seed * n,
                     **job.part(f"seed-{seed}", lambda: job.score.of(images))})
    for i, run in enumerate(job.args.runs[1:], 1):
        print(f"run {run}", flush=True)
        images = job.draw(chosen, n, run)
        rows.append({"run": run, "first seed": 0, **job.part(f"run-{i}", lambda: job.score.of(images))})
    return rows


def load_pictures(job: Job) -> tuple[Dataset, Dataset, argparse.Namespace, Path]:
    """The training and the validation part of the run's data, its settings, and the folder of its caches."""
    folder = losses.folder_of(job.name)
    found = settings.complete(Run(folder).read_settings() or {}, str(folder / "settings.json"))
    args = argparse.Namespace(**found)
    cache_dir = folder.parent / settings.vae_name(args)
    if args.cache_dir:
        cache_dir = Path(args.cache_dir)
    elif not cache_dir.is_dir():
        cache_dir = Path(args.vae) if args.vae and Path(args.vae).is_dir() else job.work
    words = "captions" if args.cond == "text" and args.text_encoder != "none" else None
    train, val = [load_data(args.data, split, tuple(args.image_size), Path(job.args.data_dir), cache_dir,
                            words, crop=args.crop) for split in ("train", "val")]
    return train, val, args, cache_dir


def pixel_vectors(images: np.ndarray, flip: bool) -> Vectors:
    """Training pictures in grey levels; after them, where training mirrors, their mirror images."""
    count = len(images)

    def read(start: int, stop: int) -> np.ndarray:
        index = np.arange(start, stop)
        rows = images[index % count]
        mirrored = index >= count
        rows[mirrored] = rows[mirrored][:, :, ::-1]
        return rows.reshape(len(rows), -1).astype(np.float32)

    return Vectors(read, count * (2 if flip else 1), count)


def latent_vectors(job: Job, data: Dataset, flip: bool, cache_dir: Path) -> Vectors:
    """The normalised means of the training pictures' latents, from the run's cache where that holds them."""
    vae, count = job.vae, len(data)
    latent = (vae.config.latent_channels, *(side // vae.factor for side in data.images.shape[1:3]))
    shape = (count, 2 if flip else 1, 2, *latent)
    stamp = read_stamp(cache_dir / "latents.json")
    cached = None
    if stamp.get("vae") == encoder_fingerprint(vae) and stamp.get("data") == data.fingerprint:
        cached = open_array(cache_dir / "latents.npy", np.float16, shape)

    def read(start: int, stop: int) -> np.ndarray:
        parts = []
        for mirrored in range(shape[1]):        # which part of the range is of each kind
            low, high = (min(max(end - mirrored * count, 0), count) for end in (start, stop))
            if low == high:
                continue
            if cached is None:
                parts.append(latents_of(vae, data.images[np.arange(low, high)], mirrored == 1))
            else:
                z = torch.from_numpy(cached[low:high, mirrored, 0].astype(np.float32))
                parts.append(vae.normalize(z).flatten(1).numpy())
        return np.concatenate(parts)

    if cached is None:                          # encoded once, although it is read several times
        rows = np.concatenate([read(i, min(i + 1000, shape[0] * shape[1]))
                               for i in range(0, shape[0] * shape[1], 1000)])
        return Vectors(lambda start, stop: rows[start:stop], len(rows), count)
    return Vectors(read, count * shape[1], count)


def search(job: Job, sets: dict[str, np.ndarray]) -> dict:
    """Neighbours of the samples, and of held-out pictures before and after the VAE, in pixels and in latents.
    sets: samples by name, uint8 (N, H, W, C)."""
    train, val, args, cache_dir = load_pictures(job)
    held_out = val.images[np.random.default_rng(0).permutation(len(val))[:HELD_OUT]]
    sets = {name: images[:HELD_OUT] for name, images in sets.items()}
    sets |= {"held-out pictures": held_out, "held-out through the VAE": through(job.vae, held_out)}
    result = {"training pictures": len(train)}
    print("neighbours in pixels", flush=True)
    flat = {name: images.reshape(len(images), -1).astype(np.float32) for name, images in sets.items()}
    result["pixels"] = neighbours.compare(flat, pixel_vectors(train.images, args.flip))
    print("neighbours in latents", flush=True)
    encoded = {name: latents_of(job.vae, images) for name, images in sets.items()}
    result["latents"] = neighbours.compare(encoded, latent_vectors(job, train, args.flip, cache_dir))

    # The most suspicious pairs, kept as numbers: sample above, training picture below.
    name = next(iter(sets))
    pairs = []
    for row in result["latents"][name]["worst"]:
        picture = train.images[row["picture"]]
        pairs.append([sets[name][row["query"]], picture[:, ::-1] if row["mirrored"] else picture])
    with open(job.work / "pairs.npy", "wb") as file:
        np.save(file, np.array(pairs))
    return result


# ---- in words

def describe_sweep(job: Job, rows: list[dict], notes: list[str]) -> list[str]:
    words = []
    for measure in job.score.measures:
        row = best(rows, measure)
        kind = "lowest" if measure.lower_is_better else "highest"
        words.append(f"{kind.capitalize()} {measure.name}: {row[measure.name]:.3f}, with {row['weights']} "
                     f"weights at guidance {row['scale']:g}.")
    return words + notes


def describe_spread(job: Job, rows: list[dict]) -> list[str]:
    words = []
    for measure in job.score.measures:
        for which, chosen in (("sampling seeds", [row for row in rows if row["run"] == job.name]),
                              ("runs", [row for row in rows if row["first seed"] == 0])):
            values = [row[measure.name] for row in chosen]
            if len(values) > 1:
                words.append(f"{measure.name.capitalize()} over {len(values)} {which}: mean "
                             f"{np.mean(values):.3f}, from {min(values):.3f} to {max(values):.3f}.")
    return words


def describe_neighbours(result: dict) -> list[str]:
    """A verdict per space: samples against held-out pictures that have passed the VAE, as samples have."""
    words = []
    for space in ("pixels", "latents"):
        rows = result[space]
        control = rows["held-out through the VAE"]
        for name, row in rows.items():
            if name.startswith("held-out"):
                continue
            excess = row["close"] - control["close"]
            error = float(np.hypot(row["error"], control["error"]))
            judged = "no sign of copying"
            if excess > 3 * error:
                judged = f"more than normal by {100 * excess:.1f} points: look at the pairs"
            words.append(f"In {space}, {row['close']:.1%} of {row['count']:,} {name} are closer to a "
                         "training picture than any other is to it; of held-out pictures "
                         f"{rows['held-out pictures']['close']:.1%}, and {control['close']:.1%} (+- "
                         f"{control['error']:.1%}) once they have passed the VAE: {judged}.")
    return words


def protocol(job: Job, report: dict) -> str:
    """How the figures were taken, in one paragraph, from what was done."""
    checkpoint = job.checkpoint
    height, width = checkpoint["data"]["size"]
    words = [f"{job.name}: {checkpoint['arch']} at step {checkpoint['step']:,}, objective "
             f"{json.dumps(checkpoint['objective'])}, on {checkpoint['data']['source']} at {height}x{width}."]
    if job.commands:
        words.append(f"Samples: sample.py with {' '.join(job.how)}, {report['n']:,} per figure; picture i "
                     "has the seed of its set plus i, and the classes or prompts are taken in turn.")
    for measure in job.score.measures:
        if "sweep" in report or "seeds" in report:
            words.append(f"{measure.what[0].upper()}{measure.what[1:]}.")
    if report.get("references"):
        rows = []
        for name, row in report["references"].items():
            rows.append(f"{name} " + ", ".join(f"{key} {value:.3f}" for key, value in row.items()))
        words.append(f"For comparison, as many pictures that are no samples: {'; '.join(rows)}.")
    if "sweep" in report:
        words.append("The best cell of a sweep is chosen by its own samples, which flatters it; the spread "
                     "over further seeds shows by how much.")
    if "neighbours" in report:
        words.append(f"Neighbours: exact search among all {report['neighbours']['training pictures']:,} "
                     "training pictures, by the root mean square difference of pixels, and of the normalised "
                     "means of the VAE's latents. A sample counts as close if its distance to its nearest "
                     "training picture x is less than that from x to the nearest other one; held-out "
                     "pictures are of the validation part. Three standard errors above their share, once "
                     "they have passed the VAE, count as a sign of copying.")
    words.append("Date {date}, commit {commit}, torch {torch}, {machine}.".format(**report["versions"]))
    return " ".join(words)


# ---- the program

FLAGS = {
    "what to report": [
        Flag("runs", "run folders or checkpoints: the report is about the first; of the others, which should "
                     "differ from it in their seeds, the spread is measured", nonempty, nargs="+",
             metavar="RUN"),
        Flag("--out", "NAME.png; the JSON is beside it (default: report.png in the folder of the run)",
             nonempty),
        Flag("--only", f"parts to make: {', '.join(PARTS)} (default: all)", one_of(PARTS), PARTS, nargs="+",
             metavar="PART"),
        Flag("--reference", "compare the losses with this file (default: the one of benchmarks/results that "
                            "fits best)", nonempty, metavar="FILE"),
        Flag("--make-reference", "write the losses of these finished runs, which differ in --seed alone, as "
                                 "a reference to --out NAME.json (default: "
                                 "reference-DATA-ARCH-OBJECTIVE.json in benchmarks/results)"),
    ],
    "samples": [
        Flag("--n", "samples per figure (default: 500)", integer(LEAST), 500),
        Flag("--minutes", "lower --n where it would take longer (default: 10)", number(0, above=True), 10.0),
        Flag("--scales", "guidance scales of the sweep (default: 1 1.5 2)", number(-1e6, 1e6), nargs="+",
             metavar="CFG"),
        Flag("--ema", "relative widths of averages in the sweep, where the run has kept some (default: 0.04 "
                      "0.05 0.06)", nonempty, ("0.04", "0.05", "0.06"), nargs="+", metavar="WIDTH"),
        Flag("--seeds", "sets of sampling seeds (default: 3)", integer(1, 100), 3),
        Flag("--sampler", "see sample.py (default: heun for rf, ddim for ddpm)", one_of(SAMPLERS)),
        Flag("--steps", "see sample.py (default: 10 for rf, 25 for ddpm)", integer(1)),
        Flag("--times", "see sample.py (default: even)", one_of(TIMES), "even"),
        Flag("--precision", "see sample.py (default: fp32)", one_of(PRECISIONS), "fp32"),
        Flag("--batch-size", "see sample.py (default: 250)", integer(1), 250),
    ],
    "machine": [
        Flag("--data-dir", "folder of the data (default: data)", nonempty, "data"),
    ],
}


def begin(args: argparse.Namespace, out: Path) -> Job:
    """Check what was asked for, and find what an earlier process has done of it."""
    if out.suffix.lower() != ".png":
        raise ValueError(f"--out {out}: must end in .png; the JSON of the same name is written beside it")
    for file in (out, out.with_suffix(".json")):
        check_out("--out", file)
    check_replaces(out, out.with_suffix(".json"), read_report, "report")
    checkpoints = [load_checkpoint(run) for run in args.runs]
    checkpoint = checkpoints[0]
    for run, other in zip(args.runs, checkpoints):
        if other["arch"] == "vae":
            raise ValueError(f"{run}: is a VAE; give the run of a network")
        if other["data"] != checkpoint["data"]:
            raise ValueError(f"{run}: was trained on other data than {args.runs[0]}, so the spread over both "
                             "means nothing; report on each alone")
    objective = checkpoint["objective"]["name"]
    args.sampler = args.sampler or OBJECTIVES[objective].sampler
    args.steps = args.steps or min(25, OBJECTIVES[objective].steps)
    if args.scales is None:
        guidable = conditioning.of_checkpoint(checkpoint, torch.device("cpu")).guidable
        args.scales = [1.0, 1.5, 2.0] if guidable else [1.0]
    vae = unpack_vae(checkpoint["vae"])
    # What is done so far belongs to these weights and these flags; for any others, it begins anew.
    asked = {name: value for name, value in vars(args).items()
             if name not in ("out", "reference", "make_reference")}
    stamp = digest(asked, *(fingerprint_tensors(other["ema"]) for other in checkpoints))
    work = out.with_name(f".{out.stem}-{stamp[:12]}")
    score = Score()
    if {"sweep", "seeds"} & set(args.only):
        score = score_of(checkpoint, Path(args.data_dir), vae)
    return Job(args, args.runs[0], checkpoint, vae, score, work)


def measure(job: Job, report: dict) -> None:
    """Add the parts that need samples to the report, and what they mean in words."""
    args = job.args
    weights, notes = ["averaged"], []
    if "sweep" in args.only and job.score.measures:
        weights, notes = kept_averages(job)
    cells = [Cell(name, scale) for name in weights for scale in args.scales]
    # Nearest to the defaults where there is no sweep to choose by.
    chosen = Cell("averaged", args.scales[len(args.scales) // 2])
    swept = cells if "sweep" in args.only and job.score.measures else []
    further = [chosen] * (args.seeds + len(args.runs) - 1)
    plan = job.part("plan", lambda: choose_n(job, swept, further))
    n = report["n"] = plan["n"]
    report["measures"] = [measure.name for measure in job.score.measures]

    if swept:
        report["sweep"] = sweep(job, swept, n)
        report["words"]["sweep"] = describe_sweep(job, report["sweep"], notes)
        row = best(report["sweep"], job.score.measures[0])
        chosen = Cell(row["weights"], row["scale"])
        report["references"] = job.part("references", lambda: job.score.references(n))
    report["chosen"] = {"weights": chosen.weights, "scale": chosen.scale}
    if "seeds" in args.only and job.score.measures:
        report["seeds"] = spread(job, chosen, n)
        report["words"]["seeds"] = describe_spread(job, report["seeds"])
    if "neighbours" in args.only:
        # Guidance draws what is typical, which is nearer to other pictures without being a copy.
        plain = Cell(chosen.weights, 1.0)
        sets = {"samples without guidance": plain, f"samples at guidance {chosen.scale:g}": chosen}
        if chosen.scale == 1:
            sets.pop("samples at guidance 1")
        drawn = {name: job.draw(cell, n) for name, cell in sets.items()}
        report["neighbours"] = job.part("neighbours", lambda: search(job, drawn))
        report["words"]["neighbours"] = describe_neighbours(report["neighbours"])


def main(argv: list[str] | None = None) -> None:
    args = make_parser("Report on a run: loss, averages and guidance, spread over seeds, copies of training "
                       "pictures.", FLAGS).parse_args(argv)
    if args.make_reference:
        print(losses.make_reference(args.runs, Path(args.out) if args.out else None))
        return
    out = Path(args.out or losses.folder_of(args.runs[0]) / "report.png")
    job = begin(args, out)
    report = {"run": job.name, "step": job.checkpoint["step"], "versions": losses.versions(), "words": {}}
    if "loss" in args.only:
        folder = losses.folder_of(job.name)
        found = losses.identity(folder, job.checkpoint)
        report["loss"] = losses.compare(folder, found, losses.choose_reference(found, args.reference))
        report["words"]["loss"] = report["loss"].pop("words")
        print("\n".join(report["words"]["loss"]), flush=True)
    job.work.mkdir(exist_ok=True)           # whatever can be refused has been
    if set(args.only) - {"loss"}:
        measure(job, report)
    report["protocol"] = protocol(job, report)
    report["commands"] = list(dict.fromkeys(job.commands))

    # ---- the results: the JSON, the picture drawn from it, and the same in words
    pairs = job.work / "pairs.npy"
    picture = draw_report(report, np.load(pairs) if pairs.is_file() and "neighbours" in report else None)
    write_atomically(out.with_suffix(".json"), lambda file: file.write(json.dumps(report, indent=1).encode()))
    write_atomically(out, lambda file: picture.save(file, "PNG"))
    for work in out.parent.glob(f".{glob.escape(out.stem)}-{'[0-9a-f]' * 12}"):
        shutil.rmtree(work)             # of this report, and of those that were interrupted and not continued
    for name in args.only:
        if name != "loss":
            print("\n".join(report["words"].get(name, [f"{name}: nothing is measured for this data"])))
    print(f"{report['protocol']}\n{out}, {out.with_suffix('.json')}")


if __name__ == "__main__":
    sys.exit(program("report.py", main))
