"""Is my loss normal? A run's losses beside those of reference runs that differ only in their seeds.

    python benchmarks/report.py runs/shapes-dit-rf --only loss              (from the repository's root)
    python benchmarks/report.py --make-reference runs/seed-0 runs/seed-1 runs/seed-2

References are JSON files, benchmarks/results/reference-*.json. A run is compared with the one whose settings
differ least among those whose losses mean the same: the same data, conditioning and objective. Validation
losses are compared at the last step that both have, and per quarter of the times; training losses as means
over windows of steps.
"""

from __future__ import annotations

import datetime
import json
import math
import platform
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import settings
from benchmarks.compare import git_commit
from benchmarks.samples import check_out, check_replaces
from checkpoints import is_finished, load_checkpoint
from files import write_atomically
from networks import latent_space, unpack_vae
from run import Run

RESULTS = Path(__file__).with_name("results")
SAME = ("data", "objective", "conditioning")       # of a reference: what makes losses comparable
# Settings of the VAE: what they have made is compared instead.
OF_THE_VAE = ("vae", "vae_steps", *settings.VAE_DEFAULTS)


# ---- a run's losses

def folder_of(run: str) -> Path:
    """The folder of a run that is named by it, or by a checkpoint in it."""
    path = Path(run)
    return path.parent if path.is_file() else path


def curve(folder: Path, window: int | None = None) -> dict:
    """The losses of a run from its metrics.jsonl: "window", "train" and "validation" as [step, loss] and
    "by time", such a list for each quarter of the times. Training losses are means over windows of that many
    steps, up to the named step. Raises ValueError where the run has no validation yet."""
    records = sorted(Run(folder).read_metrics(), key=lambda record: record["step"])
    validated = [record for record in records if "val_loss" in record]
    if not validated:
        raise ValueError(f"{folder}: its metrics.jsonl holds no validation loss; train it for longer, or "
                         "with a smaller --val-every")
    steps = [record["step"] for record in records if "loss" in record]
    if window is None:
        every = min((b - a for a, b in zip(steps, steps[1:]) if b > a), default=1)
        window = every * math.ceil(max(steps, default=1) / 40 / every)
    windows: dict[int, list[float]] = {}
    for record in records:
        if "loss" in record:
            windows.setdefault(math.ceil(record["step"] / window) * window, []).append(record["loss"])
    by_time: dict[str, list] = {}
    for record in validated:
        for name, loss in record.get("val_by_time", {}).items():
            by_time.setdefault(name, []).append([record["step"], loss])
    return {"window": window, "train": [[step, sum(part) / len(part)] for step, part in windows.items()],
            "validation": [[record["step"], record["val_loss"]] for record in validated], "by time": by_time}


def identity(folder: Path, checkpoint: dict) -> dict:
    """What a run's losses depend on: SAME, its other settings, and its latents by a fingerprint."""
    path = folder / "settings.json"
    found = Run(folder).read_settings()
    if found is None:
        raise ValueError(f"{path}: does not exist; give a run folder of train.py")
    found = settings.complete(found, str(path))
    data = {name: checkpoint["data"][name] for name in ("source", "size")}
    conditioning = [(checkpoint["text"] or {}).get("encoder"), len(checkpoint["data"]["classes"])]
    others = {name: found[name] for name in settings.ROWS
              if name not in settings.RESUMABLE and name not in ("seed", *OF_THE_VAE)}
    return {"data": data, "objective": checkpoint["objective"], "conditioning": conditioning,
            "settings": others, "seed": found["seed"],
            "latents": "-".join(latent_space(unpack_vae(checkpoint["vae"])))}


def versions() -> dict:
    """What a figure depends on besides settings: the date, the commit, the version of torch, and the kind of
    machine."""
    return {"date": datetime.date.today().isoformat(), "commit": git_commit() or "unknown",
            "torch": torch.__version__, "machine": platform.machine()}


# ---- the reference

def make_reference(runs: list[str], out: Path | None) -> Path:
    """Write the losses of runs that differ in their seeds alone. out: by default a name in RESULTS that says
    what they are. Raises ValueError for runs that differ in more, are not finished or have diverged, and for
    an `out` that is another file."""
    check_out("--out", out, (".json",))
    if out is not None:
        check_replaces(out, out, read_reference, "reference")
    rows, first = [], None
    for name in runs:
        folder, checkpoint = folder_of(name), load_checkpoint(name)
        if checkpoint["arch"] == "vae":
            raise ValueError(f"{name}: is a VAE; a reference is made of runs of a network")
        if not is_finished(checkpoint):
            raise ValueError(f"{name}: is not finished (step {checkpoint['step']:,}); run its command again")
        found = identity(folder, checkpoint)
        first = first or found
        for part in (*SAME, "settings"):
            if found[part] != first[part]:
                raise ValueError(f"{name}: its {part} is not that of {runs[0]} "
                                 f"({differences(found, first)}); a reference is made of runs that differ in "
                                 "--seed alone")
        if found["seed"] in [row["seed"] for row in rows]:
            raise ValueError(f"{name}: has the --seed {found['seed']} of another run here; give it once")
        losses = curve(folder)
        if not all(math.isfinite(loss) for part in ("train", "validation") for _, loss in losses[part]):
            raise ValueError(f"{name}: has losses that are not finite, so its training diverged; a reference "
                             "needs runs that did not")
        rows.append({"seed": found["seed"], "latents": found["latents"], **losses})
    if out is None:
        args = first["settings"]
        out = RESULTS / f"reference-{Path(args['data']).name}-{args['arch']}-{args['objective']}.json"
    reference = {part: first[part] for part in (*SAME, "settings")} | versions() | {"runs": rows}
    write_atomically(out, lambda file: file.write((json.dumps(reference) + "\n").encode()))
    return out


def read_reference(file: Path) -> dict:
    """Raises ValueError for a file that is none."""
    try:
        reference = json.loads(file.read_text())
        parts = (*SAME, "settings", "runs")
        if all(part in reference for part in parts) and reference["runs"]:
            return reference
    except (OSError, ValueError, TypeError):
        pass
    raise ValueError(f"{file}: not a reference, or damaged; make one by --make-reference RUN ...")


def find_reference(found: dict, folder: Path) -> tuple[Path, dict] | None:
    """The reference whose losses mean the same and whose settings differ least, or None. found: as
    `identity` returns."""
    fitting = []
    for file in sorted(folder.glob("reference-*.json")):
        reference = read_reference(file)
        if all(reference[part] == found[part] for part in SAME):
            differing = sum(reference["settings"].get(name) != value
                            for name, value in found["settings"].items())
            fitting.append((differing, file, reference))
    if not fitting:
        return None
    _, file, reference = min(fitting, key=lambda row: row[:2])
    return file, reference


def choose_reference(found: dict, file: str | None) -> tuple[Path, dict] | None:
    """The reference in this file or, without one, the best in RESULTS. Raises ValueError for a reference
    whose losses mean something else."""
    if file is None:
        return find_reference(found, RESULTS)
    reference = read_reference(Path(file))
    for part in SAME:
        if reference[part] != found[part]:
            raise ValueError(f"--reference {file}: its {part} is {reference[part]}, where the run has "
                             f"{found[part]}, so their losses cannot be compared; give another")
    return Path(file), reference


def differences(found: dict, reference: dict) -> str:
    """In words, what differs between the settings of a run and others."""
    words = []
    for name, value in found["settings"].items():
        theirs = reference["settings"].get(name)
        if theirs != value:
            words.append(f"--{name.replace('_', '-')} {value}, there {theirs}")
    return "; ".join(words) or "other data, conditioning or objective"


# ---- the comparison

def verdict(value: float, seeds: list[float]) -> str:
    """Where a loss lies among those of the reference's seeds, in words."""
    low, high = min(seeds), max(seeds)
    every = "all of them" if len(seeds) > 1 else "the only one"
    if value > high:
        return f"above {every} by {100 * (value / high - 1):.1f} %"
    if value < low:
        return f"below {every} by {100 * (1 - value / low):.1f} %"
    return "within the seeds' range" if len(seeds) > 1 else "equal to the only one"


def quantile(value: float, seeds: list[float]) -> float:
    """The share of the seeds whose loss is lower; equal ones count half."""
    return sum((seed < value) + 0.5 * (seed == value) for seed in seeds) / len(seeds)


def compare_curve(ours: list, seeds: list[list]) -> dict | None:
    """[step, loss] of a run and of each seed, at every step that all of them have: the quantile at each, and
    the verdict at the last. None where there is no such step."""
    tables = [dict(map(tuple, points)) for points in seeds]
    rows = []
    for step, loss in ours:
        if all(step in table for table in tables):
            rows.append((step, loss, [table[step] for table in tables]))
    if not rows:
        return None
    step, loss, others = rows[-1]
    return {"step": step, "loss": loss, "seeds": others, "verdict": verdict(loss, others),
            "quantile": quantile(loss, others), "range": [min(others), max(others)],
            "quantiles": [[at, quantile(value, those)] for at, value, those in rows]}


def compare(folder: Path, found: dict, reference: tuple[Path, dict] | None) -> dict:
    """A run's losses, those of the reference, and the verdicts: "train", "validation", and one per quarter of
    the times. found: `identity` of the run."""
    if reference is None:
        return {"curve": curve(folder), "reference": None, "verdicts": {},
                "words": ["No reference has this data, conditioning and objective, so whether the loss is "
                          "normal is not known; --make-reference RUN ... makes one from your own seeds."]}
    file, reference = reference
    runs = reference["runs"]
    ours = curve(folder, runs[0]["window"])
    verdicts = {"validation": compare_curve(ours["validation"], [run["validation"] for run in runs])}
    for name, points in ours["by time"].items():
        verdicts[f"t {name}"] = compare_curve(points, [run["by time"].get(name, []) for run in runs])
    verdicts["train"] = compare_curve(ours["train"], [run["train"] for run in runs])
    verdicts = {name: row for name, row in verdicts.items() if row is not None}

    words = []
    count = len(runs)
    for name, row in verdicts.items():
        what = f"Validation loss at {name}"
        if name in ("validation", "train"):
            what = "Training loss" if name == "train" else "Validation loss"
        words.append(f"{what} {row['loss']:.4f} at step {row['step']:,}: {row['verdict']} "
                     f"({' '.join(f'{loss:.4f}' for loss in sorted(row['seeds']))}; "
                     f"quantile {row['quantile']:.2f}).")
    note = f"Reference: {file.name}, {count} seed{'s' if count > 1 else ''}. "
    if count > 1:
        # Of count + 1 runs that are alike, each is equally likely to be the lowest or the highest.
        note += (f"A further seed lies outside the range of {count} by chance in "
                 f"{100 * 2 / (count + 1):.0f} % of cases, so a small distance from it means nothing.")
    else:
        note += "With one seed, the spread between seeds is not known, so a small difference means nothing."
    if any(reference["settings"].get(name) != value for name, value in found["settings"].items()):
        note += f" Its settings are others: {differences(found, reference)}."
    if found["latents"] not in [run["latents"] for run in runs]:
        note += " Its latents are of another VAE, on which the level of the loss depends too."
    words.append(note)
    return {"curve": ours, "verdicts": verdicts, "words": words,
            "reference": {"file": file.name, "runs": runs}}
