"""A run: its folder, with settings, losses, previews and checkpoints.

    python run.py                         # a run that is killed and continued
    python run.py runs/shapes-dit-rf      # what a run's checkpoint holds

A run lives in one folder: settings.json, metrics.jsonl, previews, loss.png, samples.png and checkpoint.pt
(checkpoints.py). Every file is replaced atomically, so that a run can be read, killed and continued at any
moment.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import IO

import torch
from PIL import Image

import charts
import settings
from checkpoints import TRAINING, damage, damaged, glance, is_count, load_checkpoint
from cli import Flag, make_parser, nonempty, program
from files import fresh_file, locked, warn_once, write_atomically
from networks import build_model, pack_vae
from settings import RESUMABLE


# ---- the folder

class Run:
    """The folder of one run. writes: False in a process that shares the training with the one that writes;
    it reads the files, and keeps its records, but leaves all files as they are. mapped: as load_checkpoint
    has it."""

    def __init__(self, folder: Path, writes: bool = True, mapped: bool = False):
        self.folder = folder
        self.writes = writes
        self.mapped = mapped
        self.checkpoint = folder / "checkpoint.pt"
        self.settings = folder / "settings.json"
        self.metrics = folder / "metrics.jsonl"
        self.records: list[dict] = []                  # the lines of metrics.jsonl

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other processes from training in the folder."""
        if not self.writes:
            yield
            return
        with ExitStack() as stack:
            try:
                written = (self.checkpoint, self.settings, self.metrics, self.folder / "loss.png",
                           self.folder / "samples.png", self.folder / "kept.pt")
                stack.enter_context(locked(self.folder / "lock", clean=written))
            except BlockingIOError:
                raise ValueError(f"{self.folder}: another process is training in this folder; wait for it, "
                                 "or use another --name") from None
            yield

    def load(self) -> dict | None:
        """The checkpoint, if the run has begun. Raises ValueError if it cannot be continued."""
        if not os.path.lexists(self.checkpoint):       # a link to nothing is refused, not replaced
            if hint := other_copy(self.checkpoint):
                raise ValueError(f"{self.checkpoint} is missing{hint}")
            return None
        try:
            checkpoint = load_checkpoint(self.checkpoint, self.mapped)
        except ValueError as error:
            raise ValueError(f"{error}{other_copy(self.checkpoint)}") from None
        training = checkpoint.get("training") or {}
        for part in TRAINING:
            if part not in training:
                raise ValueError(f"{self.checkpoint}: of another version, or not of train.py: it lacks "
                                 f"training.{part}, so it cannot be continued; use another --name")
        for part in ("steps", "rise"):
            if not is_count(training.get(part, 0)):
                raise damaged(self.checkpoint, f"training.{part}", training[part])
        return checkpoint

    def write(self, name: str, content: Callable[[IO[bytes]], object]) -> None:
        """Replace a file of the folder as a whole."""
        if self.writes:
            write_atomically(self.folder / name, content)

    def save(self, checkpoint: dict) -> None:
        self.write("checkpoint.pt", lambda file: torch.save(checkpoint, file))

    def clean(self) -> None:
        """Remove what several processes have written beside checkpoints that are gone, or never came."""
        folders = list(self.folder.glob("optimizer-*")) if self.writes else []
        if not folders:
            return
        named = set()
        for file in (self.checkpoint, self.folder / "best.pt", *self.kept().values()):
            if file.exists():
                try:
                    optimizer = glance(file)["training"]["optimizer"]
                except Exception:                      # of any type: damaged, and it may name any of them
                    return
                named.add(optimizer.get("folder"))
        for folder in folders:
            if folder.name not in named:
                shutil.rmtree(folder, ignore_errors=True)

    def keep(self, name: str) -> None:
        """Keep the present checkpoint under this name too. A second name of the same file takes no space
        until the checkpoint is replaced."""
        if not self.writes:
            return
        target = self.folder / name
        fresh = fresh_file(self.folder / "kept.pt")
        try:
            fresh.unlink()
            os.link(self.checkpoint, fresh)
            os.replace(fresh, target)
        except OSError:                                # a file system without such links: copy it
            with open(self.checkpoint, "rb") as file:
                write_atomically(target, lambda out: shutil.copyfileobj(file, out))
        finally:
            fresh.unlink(missing_ok=True)

    def best_step(self) -> int | None:
        """Whose checkpoint best.pt should be: the latest validated step, or that of best.pt if its loss was
        no higher. The checkpoints of other steps are gone."""
        losses = {record["step"]: record["val_loss"] for record in self.records
                  if math.isfinite(record.get("val_loss", math.nan))}
        try:
            kept = glance(self.folder / "best.pt")["step"]
        except Exception:                              # none, or of something else
            kept = None
        latest = max(losses, default=None)
        steps = [step for step in losses if step in (kept, latest)]
        return min(steps, key=lambda step: (losses[step], step), default=None)

    def kept(self) -> dict[int, Path]:
        """The files checkpoint-STEP.pt, by their steps, the earliest first."""
        files = {int(path.stem[11:]): path for path in self.folder.glob("checkpoint-*.pt")
                 if path.stem[11:].isdecimal()}
        return dict(sorted(files.items()))

    def keep_latest(self, step: int, count: int) -> None:
        """Keep the present checkpoint as checkpoint-STEP.pt, and of those so named up to this step the latest
        `count`. Before others go, it is read back: where that fails, they stay, with a warning."""
        if not self.writes:
            return
        self.keep(f"checkpoint-{step:06d}.pt")
        older = [path for at, path in self.kept().items() if at <= step][:-count]
        problem = damage(self.folder / f"checkpoint-{step:06d}.pt") if older else None
        if problem:
            warn_once("keep", f"{problem}; the disk may be failing, so no earlier checkpoint is removed")
            return
        for path in older:
            path.unlink()

    def save_picture(self, name: str, picture: Image.Image) -> None:
        self.write(name, lambda file: picture.save(file, "PNG"))

    # ---- settings

    def read_settings(self) -> dict | None:
        try:
            if not self.settings.is_file():
                if os.path.lexists(self.checkpoint):   # of which other settings? They would go on with it
                    raise ValueError(f"{self.folder} has a checkpoint.pt but no settings.json; restore it, "
                                     "or remove the folder")
                return None
            text = self.settings.read_text()
        except OSError as error:
            raise ValueError(f"{self.settings}: cannot be read ({error.strerror}); make it readable, or use "
                             "another --name") from None
        except UnicodeDecodeError:
            text = ""
        try:
            return dict(json.loads(text))
        except (ValueError, TypeError, RecursionError):
            raise ValueError(f"{self.settings}: damaged; restore it, or use another --name") from None

    def write_settings(self, args: argparse.Namespace) -> None:
        text = json.dumps({name: getattr(args, name) for name in settings.ROWS}, indent=1)
        self.write("settings.json", lambda file: file.write(text.encode()))

    def check_settings(self, args: argparse.Namespace) -> None:
        """Refuse a folder that holds a run with other settings."""
        found = self.read_settings()
        if found is None:
            return
        found = settings.complete(found, str(self.settings))
        for name in sorted(set(settings.ROWS) - RESUMABLE):
            now = getattr(args, name)
            if settings.same_value(name, found[name], now):
                continue
            changed = name in args.asked
            if name == "steps" and changed:
                changed = now > found[name]
            if not changed:
                remedy = "repeat its settings to continue it, or use another --name"
                if name == "steps":
                    remedy = "repeat its settings, or raise --steps, to continue it, or use another --name"
                if name == "steps" and "steps" not in args.asked:
                    now = f"the default {now}"
                    remedy = f"give --steps {found[name]} to continue it, or more to train on"
                begun, now = ("the default" if value is None else value for value in (found[name], now))
                raise ValueError(f"{self.folder} holds a run with --{name.replace('_', '-')} {begun}, "
                                 f"not {now}; {remedy}")

    # ---- metrics

    def read_metrics(self) -> list[dict]:
        """The records of metrics.jsonl, each a loss or a validation; lines whose losses are not numbers are
        left out."""
        records = []
        lines = self.metrics.read_bytes().splitlines() if self.metrics.is_file() else []
        for line in lines:
            try:
                record = json.loads(line)
                losses = [record["loss"] if "loss" in record else record["val_loss"],
                          *dict(record.get("val_by_time", {})).values()]
                if is_count(record["step"]) and all(type(loss) in (int, float) for loss in losses):
                    list(map(float, losses))           # OverflowError for hundreds of digits
                    records.append(record)
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                continue                               # truncated by a kill, or not a line of ours
        return records

    def rewind_metrics(self, step: int) -> None:
        """Read the records up to this step and drop later ones, which the resumed run will write again."""
        self.records = [record for record in self.read_metrics() if record["step"] <= step]
        text = "".join(json.dumps(record) + "\n" for record in self.records)
        self.write("metrics.jsonl", lambda file: file.write(text.encode()))

    def record(self, entry: dict) -> None:
        self.records.append(entry)
        if not self.writes:
            return
        try:
            with open(self.metrics, "a") as out:
                out.write(json.dumps(entry) + "\n")
        except OSError as error:                       # a full disk, say: it may not end hours of training
            warn_once(f"write {self.metrics}", f"{self.metrics}: cannot be written ({error.strerror}); the "
                      "training goes on without")

    def plot_loss(self) -> None:
        picture = loss_curve(self.records) if self.writes else None
        if picture is not None:
            self.save_picture("loss.png", picture)

    def plot_experts(self) -> None:
        picture = expert_loads(self.records)
        if picture is not None:
            self.save_picture("experts.png", picture)


def expert_loads(records: list[dict]) -> Image.Image | None:
    """The loads of the last validation, of every expert by layer and quarter of the time. None without."""
    for record in reversed(records):
        layers = record.get("expert_load")
        if layers:
            rows = [(f"{layer}, t {quarter}", loads) for layer, quarters in layers.items()
                    for quarter, loads in quarters.items()]
            return charts.heat_map(f"Load of each expert, 1 is even, step {record['step']:,}", rows)
    return None


def loss_curve(records: list[dict]) -> Image.Image | None:
    """Training loss (running mean) and validation loss over steps, on a logarithmic axis."""
    train: list[tuple[int, float]] = []
    validation: list[tuple[int, float]] = []
    smooth = None
    for record in records:
        value = record.get("loss", record.get("val_loss"))
        if not isinstance(value, (int, float)) or not math.isfinite(value):
            continue                                   # a damaged line, or a loss in bf16 that overflowed
        if "loss" in record:
            smooth = value if smooth is None else 0.7 * smooth + 0.3 * value
            train.append((record["step"], smooth))
        else:
            validation.append((record["step"], value))
    if not train and not validation:
        return None
    floored = [[(step, max(value, 1e-9)) for step, value in points] for points in (train, validation)]
    lines = [charts.line("training, running mean", floored[0], charts.BLUE),
             charts.line("validation", floored[1], charts.VERMILLION)]
    chart = charts.Chart("Loss", "step", "", lines, log_y=True, size=(1800, 840), text=26)
    return charts.draw(chart).reduce(2)                # smooths edges


def describe(record: dict) -> str:
    """A validation record as a line for the terminal."""
    line = f"step {record['step']:,}: validation loss {record['val_loss']:.4f}"
    for name in ("psnr", "snr"):
        if name in record:
            stds = " ".join(f"{std:.2f}" for std in record["latent_std"])
            line += f", {name.upper()} {record[name]:.1f} dB, KL {record['kl']:.0f} nats, latent std {stds}"
    if "val_by_time" in record:
        line += ", by time " + "  ".join(f"{name} {loss:.3f}" for name, loss in record["val_by_time"].items())
    if "expert_load" in record:
        loads = [load for layer in record["expert_load"].values() for row in layer.values() for load in row]
        shares = [share for layer in record["without_expert"].values() for share in layer.values()]
        line += (f", loads of the experts {min(loads):.2f} to {max(loads):.2f} of an even one, "
                 f"{sum(shares) / len(shares):.1%} of the tokens without")
    return line


def other_copy(file: Path) -> str:
    """For the error of a checkpoint that cannot be used: which one in its folder can; nothing if none can."""
    for step, kept in reversed(Run(file.parent).kept().items()):
        try:
            load_checkpoint(kept)
        except ValueError:
            continue
        if damage(kept) is None:
            return f"; {kept.name} beside it is whole: copy it to {file.name} to continue from step {step:,}"
    return ""


def show(path: str) -> None:
    """Print what a checkpoint holds."""
    checkpoint = load_checkpoint(path)
    with torch.device("meta"):
        model = build_model(checkpoint["arch"], checkpoint["config"], checkpoint["text"])
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{path}: {checkpoint['arch']} with {parameters / 1e6:.1f} M parameters, "
          f"step {checkpoint['step']:,}")
    for name in ("config", "objective", "text", "label_dropout", "data"):
        print(f"  {name}: {checkpoint[name]}")


def demo() -> None:
    """A run that is killed after its checkpoint of step 2, and continued."""
    with tempfile.TemporaryDirectory() as folder:
        run = Run(Path(folder) / "killed")
        with run.hold():
            try:
                with Run(run.folder).hold():
                    pass
            except ValueError as error:
                print(f"a second process: {str(error).replace(folder, '...')}")
            model = build_model("dit", {"width": 64, "depth": 2, "heads": 2})
            autoencoder = build_model("vae", {"widths": (8, 16)})
            for step in (1, 2, 3):
                run.record({"step": step, "loss": 1 / step})
                if step == 2:
                    state = model.state_dict()
                    run.save({"arch": "dit", "config": asdict(model.config), "objective": {"name": "rf"},
                              "step": step, "data": {"size": [32, 32], "classes": []}, "label_dropout": 0.0,
                              "vae": pack_vae(autoencoder), "model": state, "ema": state,
                              "training": dict.fromkeys(TRAINING)})
        again = Run(run.folder)
        step = again.load()["step"]
        again.rewind_metrics(step)
        print(f"it logged step 3 and continues from step {step}: {again.records}")
        show(str(again.folder))


def main(argv: list[str] | None = None) -> None:
    flags = {"what to show": [Flag("run", "run folder, or a checkpoint file (default: a demonstration)",
                                   nonempty, nargs="?")]}
    args = make_parser("Show what a run's checkpoint holds.", flags).parse_args(argv)
    if args.run is None:
        demo()
    else:
        show(args.run)


if __name__ == "__main__":
    sys.exit(program("run.py", main))
