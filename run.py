"""A run: its folder, its checkpoints, and the models that they hold.

    python run.py                         # a run that is killed and continued
    python run.py runs/shapes-dit-rf      # what a run's checkpoint holds

A run lives in one folder: settings.json, metrics.jsonl, previews, loss.png, samples.png and checkpoint.pt.
The checkpoint is all that sample.py needs: the architecture and its configuration, the objective, the size of
the pictures, class names or the text encoder, the VAE, raw and averaged weights. It holds plain types and
tensors and is always read with weights_only=True. Every file is replaced atomically, so that a run can be
read, killed and continued at any moment.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO

import torch
import torch.utils.checkpoint
from PIL import Image
from torch import Tensor

import attention
import charts
import ema
import moe
import moments
import parallel
import published
import settings
from audio_vae import AudioVAE, AudioVAEConfig
from cli import Flag, make_parser, nonempty, program
from cuts import cuts_of
from encoders import RECIPES
from files import fingerprint_tensors, fresh_file, locked, warn_once, write_atomically
from parallel import Sharding
from settings import ALL_ARCHITECTURES, ALL_OBJECTIVES, ARCHITECTURES, BLOCKS, RESUMABLE
from text import TextConfig, TextEncoder
from vae import VAE, VAEConfig
from weights import check_finite, check_readable, check_weights, load_weights


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
                raise ValueError(f"{self.folder} holds a run with --{name.replace('_', '-')} {found[name]}, "
                                 f"not {now}; {remedy}")

    # ---- metrics

    def read_metrics(self) -> list[dict]:
        """The records of metrics.jsonl: a loss or a validation each."""
        records = []
        lines = self.metrics.read_bytes().splitlines() if self.metrics.is_file() else []
        for line in lines:
            try:
                record = json.loads(line)
                loss = record["loss"] if "loss" in record else record["val_loss"]
                if is_count(record["step"]) and type(loss) in (int, float):
                    float(loss)                        # OverflowError for hundreds of digits
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


# ---- checkpoints

def is_count(value: object) -> bool:
    return type(value) is int and value >= 0           # a bool is no count


def is_state(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) and isinstance(weight, Tensor)
                                           for name, weight in value.items())


def is_config(value: object) -> bool:
    return isinstance(value, dict) and all(isinstance(name, str) for name in value)


def is_size(value: object) -> bool:
    return isinstance(value, (list, tuple)) and len(value) == 2 and all(
        is_count(side) and 0 < side < 10**9 for side in value)


def is_averages(value: object) -> bool:
    return isinstance(value, list) and all(
        isinstance(entry, dict) and set(entry) == {"width", "state"} and type(entry["width"]) is float
        and 0 < entry["width"] <= ema.WIDEST and is_state(entry["state"]) for entry in value)


def is_text(value: object) -> bool:
    """None, or a text encoder, each kind with what it needs."""
    needs = {"bytes": ("config", dict), "none": ("encoder", str)} | dict.fromkeys(RECIPES, ("path", str))
    if not isinstance(value, dict) or value.get("encoder") not in tuple(needs):
        return value is None
    name, kind = needs[value["encoder"]]
    return isinstance(value.get(name), kind) and type(value.get("no_t5", False)) is bool


PARTS = {                                              # of every checkpoint: what each must be
    "arch": lambda value: isinstance(value, str), "config": is_config,
    "objective": lambda value: value is None or is_config(value), "step": is_count,
    "data": is_config, "data.size": is_size,
    "data.classes": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value),
    "label_dropout": lambda value: type(value) in (int, float) and 0 <= value <= 1,
    "vae": lambda value: value is None or (is_config(value) and is_config(value.get("config"))
                                           and is_state(value.get("state"))),
    "model": is_state, "ema": is_state}
OPTIONAL = {                                           # and of some
    "data.aspect": lambda value: is_config(value) and is_count(value.get("pixels")) and all(
        is_size(value.get(name)) for name in ("multiple", "smallest", "largest")),
    "text": is_text, "averages": is_averages, "training": lambda value: value is None or is_config(value),
    "data.prompts": lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)}
TRAINING = ("optimizer", "rng", "data", "finished")    # under "training", to continue it
DEPTHS = ("depth", "single_depth", "layers")           # fields of configurations that count layers


def load_checkpoint(path: str | Path, mapped: bool = False) -> dict:
    """A checkpoint, from its run folder or file, on the CPU. mapped: leave its weights on the disk until they
    are used, and in no more memory than the system can spare, as for a process that needs a share of them.
    Raises ValueError with a line for the user."""
    path = Path(path)
    try:
        file = path / "checkpoint.pt" if path.is_dir() else path
        if file.is_symlink() and not file.exists():
            raise ValueError(f"{file}: a link to a file that does not exist; restore that file, or remove "
                             "the link")
        if not file.exists():
            raise ValueError(f"{path}: no checkpoint there ({file} does not exist); train one with train.py")
        if not file.is_file():
            raise ValueError(f"{path}: no checkpoint there ({file} is a folder, a pipe or a device, not a "
                             "file); train one with train.py")
        open(file, "rb").close()
    except OSError as error:
        raise ValueError(f"{str(path)[:200]}: cannot be read ({error.strerror}); make it readable, or give "
                         "another") from None
    if published.read_metadata(file) is not None:      # weights alone, by export.py
        try:
            checkpoint = published.read_export(file)
        except (KeyError, TypeError, AttributeError):
            raise ValueError(f"{file}: not a file of export.py, or damaged") from None
    else:
        checkpoint = read_checkpoint(file, mapped)
    check_parts(checkpoint, file)
    check_networks(checkpoint, file)
    return checkpoint


def read_checkpoint(file: Path, mapped: bool) -> dict:
    """What torch.save has written, with all of its parts."""
    try:
        # torch.load does not compare the checksums that torch.save writes
        with zipfile.ZipFile(file) as archive:
            corrupt = archive.testzip()
        checkpoint = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
        parts = set(checkpoint) | {f"data.{part}" for part in checkpoint.get("data", ())}
    except Exception as error:      # a dozen types for a damaged file; all mean the same to the user
        raise ValueError(f"{file}: not a checkpoint of train.py, or damaged ({type(error).__name__})"
                         ) from None
    if corrupt:
        raise ValueError(f"{file}: damaged: the checksum of {corrupt} in it does not fit; use another copy")
    for part in PARTS:
        if part not in parts:
            raise ValueError(f"{file}: not a checkpoint of train.py, or of another version: it lacks {part}")
    checkpoint.setdefault("text", None)                # older checkpoints lack it
    return checkpoint


def glance(file: Path) -> dict:
    """A checkpoint whose weights stay on the disk until they are used. Raises errors of any type."""
    return torch.load(file, "cpu", weights_only=True, mmap=True)


def damage(file: Path) -> str | None:
    """What is wrong with a checkpoint, by the checksums in it and those of its optimizer's folder; None if
    nothing is. It is read from the disk, piece by piece."""
    try:
        with moments.open_from_disk(file) as content, zipfile.ZipFile(content) as archive:
            corrupt = archive.testzip()
        optimizer = (glance(file).get("training") or {}).get("optimizer") or {}
    except Exception as error:                         # a dozen types, as in read_checkpoint
        return f"{file}: damaged ({type(error).__name__})"
    if corrupt:
        return f"{file}: damaged: the checksum of {corrupt} in it does not fit"
    problem = moments.damage_of(file.parent, optimizer) if "folder" in optimizer else None
    return f"{file}: damaged: {problem}" if problem else None


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


def damaged(file: Path, part: str, value: object) -> ValueError:
    """The error to raise for a value that train.py has not written."""
    what = " ".join(repr(value)[:80].split())
    return ValueError(f"{file}: damaged, or changed by another program: its {part} is {what}; use another "
                      "copy")


def check_parts(checkpoint: dict, file: Path) -> None:
    """Raise ValueError for a part that is of the wrong type or out of range."""
    for part, is_right in (PARTS | OPTIONAL).items():
        holder = checkpoint["data"] if part.startswith("data.") else checkpoint
        name = part.removeprefix("data.")
        if (name in holder or part in PARTS) and not is_right(holder.get(name)):
            raise damaged(file, part, holder.get(name))
    arch = checkpoint["arch"]
    if arch not in ARCHITECTURES:
        raise ValueError(f"{file}: arch {arch} does not exist in this version")
    if arch != "vae":
        for part in ("objective", "vae"):
            if checkpoint[part] is None:
                raise damaged(file, part, None)
        try:
            build_path(checkpoint["objective"])
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        except Exception:                              # of any type, for values that are no numbers
            raise damaged(file, "objective", checkpoint["objective"]) from None


def check_networks(checkpoint: dict, file: Path) -> None:
    """Raise ValueError where the weights do not fit the networks of their configurations, or have values that
    are not numbers. The networks are built without memory for their weights."""
    parts = [(checkpoint["arch"], checkpoint["config"], checkpoint["text"],
              [checkpoint["model"], checkpoint["ema"],
               *(average["state"] for average in checkpoint.get("averages", ()))])]
    if checkpoint["vae"]:
        parts.append(("vae", checkpoint["vae"]["config"], None, [checkpoint["vae"]["state"]]))
    for arch, config, text, states in parts:
        words = (text or {}).get("config") or {}
        for name in DEPTHS:                            # every layer has weights; a million would take minutes
            for value in (config.get(name), words.get(name)):
                if isinstance(value, int) and value > len(states[0]):
                    raise damaged(file, name, value)
        try:
            with torch.device("meta"):
                model = build_model(arch, config, text)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None
        except Exception as error:                     # of any type, for values that are no sizes
            reason = " ".join(str(error).split())[:80]
            raise ValueError(f"{file}: damaged, or changed by another program: no {arch} can be built from "
                             f"its configuration ({type(error).__name__}: {reason}); use another copy"
                             ) from None
        for state in states:
            check_weights(model, state, str(file))
            for name, weight in state.items():
                whole = weight.layout == torch.strided and weight.device.type == "cpu"
                if not (whole and weight.is_floating_point()
                        and weight.untyped_storage().nbytes() >= weight.numel() * weight.itemsize):
                    raise ValueError(f"{file}: damaged, or changed by another program: {name} is no tensor "
                                     "of plain numbers; use another copy")
            check_finite(state, str(file))
        names, rows = len(checkpoint["data"]["classes"]), getattr(model.config, "num_classes", 0)
        if arch != "vae" and names != rows:
            raise ValueError(f"{file}: damaged, or changed by another program: it names {names} classes, "
                             f"where its network has {rows}; use another copy")


def average_of_width(run: str, checkpoint: dict, width: float) -> dict:
    """The averaged weights that a training would have had with `--ema width`, from those that it has kept, in
    `checkpoint` and in the checkpoint-STEP.pt of the folder `run`. Raises ValueError with a line for the user
    where they cannot make it."""
    if not checkpoint.get("averages"):
        raise ValueError(f"--ema {width:g}: {run} has no averages of which another can be made; its training "
                         f"needs an --ema of at most {ema.WIDEST / 2}")
    sources = [checkpoint]
    for file in sorted(Path(run).glob("checkpoint-*.pt")):         # none if `run` is a file
        sources.append(load_checkpoint(file))
    profiles, states = [], []
    for source in sources:
        for average in source.get("averages", ()):
            profile = (source["step"], ema.gamma_of(average["width"]))
            if profile not in profiles and source["step"] <= checkpoint["step"]:
                profiles.append(profile)
                states.append(average["state"])

    def combination(width: float) -> tuple[list[float], float]:
        wanted = (checkpoint["step"], ema.gamma_of(width))
        weights = ema.coefficients(profiles, wanted)
        return weights, ema.distance(profiles, weights, wanted)

    weights, distance = combination(width)
    if distance > 0.1:
        possible = [i / 1000 for i in range(1, int(1000 * ema.WIDEST)) if combination(i / 1000)[1] <= 0.1]
        raise ValueError(f"--ema {width:g}: the averages that {run} has kept make those between "
                         f"{min(possible)} and {max(possible)}; give one of these, or train with --keep, "
                         "which leaves more")
    return ema.combine(states, weights)


def load_published(name: str, weights: str | Path, vae: str | Path | None = None) -> dict:
    """A published network and its VAE, in the form of a checkpoint. The network's weights are mapped, in the
    file's dtypes. vae: where it is, if not with the weights. Under "sampling" are the row's defaults of
    sample.py. Raises ValueError with a line for the user."""
    row = published.MODELS[name]
    for flag, path in (("--weights", weights), ("--vae", vae)):
        if path is None:
            continue
        try:
            check_readable(path)
        except ValueError as error:
            raise ValueError(f"{flag} {error}") from None
        if not Path(path).exists():
            raise ValueError(f"{flag} {path}: no such file or folder; download it first")
    state = published.read_network(name, weights)
    published.check_prediction(name, weights)
    place, flag = (weights, "--weights") if vae is None else (vae, "--vae")
    try:
        autoencoder = load_vae(place, name)
    except ValueError as error:
        if vae is not None:
            raise ValueError(f"--vae {error}") from None
        raise ValueError(f"--weights {weights}: no VAE there ({error}); give it by --vae PATH") from None
    published.check_vae(name, autoencoder, f"{flag} {place}")
    data = {"source": name, "size": list(row.size), "prompts": [], "classes": []}
    if row.rate is not None:                           # of sounds, one row of samples
        data["rate"] = row.rate
    text = {"encoder": row.text, "path": str(weights), "published": name}
    if row.text is None:
        text, data["classes"] = None, [str(i) for i in range(1000)]        # of ImageNet
    sampling = {"sampler": row.sampler, "steps": row.steps, "scale": row.guidance, "times": row.times,
                "shift_points": row.shift_points, "distilled": row.distilled_guidance}
    # The rate at which the condition was dropped in training does not matter here, but that it was.
    return {"arch": row.arch, "config": row.config, "objective": row.objective, "step": 0, "data": data,
            "text": text, "label_dropout": 0.0 if row.guidance == 1 else 0.1, "model": state, "ema": state,
            "vae": pack_vae(autoencoder), "sampling": sampling}


@dataclass
class State:
    """The parts of a run that training steps change."""
    model: torch.nn.Module
    averages: dict[float, torch.nn.Module]             # by --ema's length: the model with averaged weights
    device: torch.device
    optimizer: torch.optim.Optimizer | None = None     # made last, of the weights as they are then
    # Where several processes train, models are called by way of a step: see parallel.py.
    steps: dict[torch.nn.Module, torch.nn.Module] = field(default_factory=dict)
    sharding: Sharding | None = None
    moments: tuple[int, dict] | None = None            # a step, and what save_moments returned of it

    @property
    def ema(self) -> torch.nn.Module:
        """The average that is validated, drawn from and exported."""
        return next(iter(self.averages.values()))

    def shard(self, sharding: Sharding, initial: Mapping | None = None, experts: bool = False) -> None:
        """Keep only this process's share of all weights. initial: the state of a model on the meta device;
        None where it is whole, or will be restored. experts: whether each process keeps whole experts, to
        which the tokens travel, in place of a share of all of them."""
        self.sharding = sharding
        for network in (self.model, *self.averages.values()):
            if experts:
                moe.distribute_experts(network, sharding.mesh["data"])
            self.steps[network] = sharding.shard(network, trained=network is self.model)
        if initial is not None:
            sharding.load(self.model, initial)
            for network in self.averages.values():     # cut alike, so that each copies its own share
                network.load_state_dict(self.model.state_dict())

    def run(self, network: torch.nn.Module, call: Callable, *inputs):
        """call(network, *inputs)."""
        return parallel.run(self.steps.get(network), network, call, *inputs)

    def clip_gradients(self, most: float) -> Tensor:
        """Scale the gradients so that their norm is at most this. Returns that norm before."""
        if self.sharding is not None:
            return self.sharding.finish_gradients(self.model, most)
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), most)

    @torch.no_grad()
    def average(self, step: int) -> None:
        """Add the weights of this step, from 1, to the averages."""
        weights = list(map(parallel.local, self.model.parameters()))
        for length, network in self.averages.items():
            # average = share * average + (1 - share) * weights, for all weights in one call
            torch._foreach_lerp_(list(map(parallel.local, network.parameters())), weights,
                                 1 - ema.remains(length, step))

    def whole(self, network: torch.nn.Module) -> dict[str, Tensor]:
        """The state dict, with whole weights also where each process has a share of them."""
        return network.state_dict() if self.sharding is None else self.sharding.state_of(network)

    def whole_average(self, build: Callable[[], torch.nn.Module]) -> torch.nn.Module:
        """The average, with all of its weights in this process. build: makes such a network."""
        if self.sharding is None:
            return self.ema
        with torch.random.fork_rng():                  # its initial weights are replaced
            network = build()
        network.load_state_dict(self.sharding.state_of(self.ema, everywhere=True))
        return network.to(self.device).eval().requires_grad_(False)

    def weights(self) -> dict:
        states = {length: self.whole(network) for length, network in self.averages.items()}
        parts = {"model": self.whole(self.model), "ema": next(iter(states.values()))}
        if len(states) > 1:                            # "ema" is one of them; a file holds a tensor only once
            parts["averages"] = [{"width": length, "state": state} for length, state in states.items()]
        return parts

    def training(self, run: Run, step: int) -> dict:
        """What a resumed run needs besides the weights. The position in the data is not among it, because
        data.batch_indices is a function of the step."""
        cuda_rng = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        if self.sharding is None:
            optimizer = self.optimizer.state_dict()
        else:                                          # never whole in one process: a folder beside the file
            if self.moments is None or self.moments[0] != step:
                self.moments = (step, moments.save_moments(run.folder, step, self.model, self.optimizer,
                                                           self.sharding))
            optimizer = self.moments[1]
        return {"optimizer": optimizer, "rng": torch.get_rng_state(), "cuda_rng": cuda_rng}

    def restore(self, saved: dict, what: str) -> None:
        theirs = make_config(saved["arch"], type(self.model.config), saved["config"])
        for name, value in asdict(self.model.config).items():     # shapes alone do not show every difference
            if getattr(theirs, name) != value:
                raise ValueError(f"{what}: its network has {name} {getattr(theirs, name)}, where these "
                                 f"settings make it {value}; give the settings that it began with")
        self.load(self.model, saved["model"], what)
        kept = {average["width"]: average["state"] for average in saved.get("averages", ())}
        for length, network in self.averages.items():
            state = saved["ema"] if network is self.ema else kept.get(length)
            if state is None:
                raise ValueError(f"{what}: damaged, or of another version: it lacks the average of width "
                                 f"{length:g}; use another --name")
            self.load(network, state, what)
        training = saved["training"]
        if is_config(training["optimizer"]) and "folder" in training["optimizer"]:
            try:
                moments.check_moments(Path(what).parent, training["optimizer"])
            except ValueError as error:
                raise ValueError(f"{what}: damaged: {error}; use another copy{other_copy(Path(what))}"
                                 ) from None
            self.moments = (saved["step"], training["optimizer"])
        try:
            self.restore_optimizer(training["optimizer"], Path(what).parent,
                                   ARCHITECTURES[saved["arch"]].blocks)
            torch.set_rng_state(training["rng"])
            if self.device.type == "cuda" and training.get("cuda_rng") is not None:
                torch.cuda.set_rng_state(training["cuda_rng"], self.device)
        except (ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            raise ValueError(f"{what}: damaged, or of another version: its optimizer or generator does not "
                             f"fit ({type(error).__name__}); use another --name") from None
        for values in self.optimizer.state.values():
            check_finite({f"the optimizer's {name}": parallel.local(value) for name, value in values.items()
                          if isinstance(value, Tensor)}, what)

    def load(self, network: torch.nn.Module, state: dict[str, Tensor], what: str) -> None:
        if self.sharding is None:
            load_weights(network, state, what)
        else:
            check_weights(network, state, what)
            self.sharding.load(network, state)

    def restore_optimizer(self, saved: dict, folder: Path, blocks: tuple[type, ...]) -> None:
        """saved: what `training` stored, in this or in another layout of processes. folder: of the run.
        blocks: those of the network that can be tensor parallel."""
        if "folder" in saved:
            cuts = (self.sharding and self.sharding.cuts) or cuts_of(self.model, blocks)
            moments.load_moments(folder, saved, self.model, self.optimizer, self.sharding, cuts)
        elif self.sharding is not None:
            moments.share_moments(saved, self.model, self.optimizer, self.sharding)
        else:
            self.optimizer.load_state_dict(saved)

    def is_finite(self) -> bool:
        finite = all(bool(torch.isfinite(parallel.local(weight)).all()) for weight in self.model.parameters())
        return finite if self.sharding is None else self.sharding.everywhere(finite)


# ---- building what a checkpoint holds

def build_model(arch: str, config: dict, text: dict | None = None) -> torch.nn.Module:
    """text: the checkpoint's text encoder. The built-in one becomes a part of the model, `model.text`,
    because it is trained, averaged and saved with it."""
    if arch == "vae":
        config = config_of_vae(config)
        return (AudioVAE if isinstance(config, AudioVAEConfig) else VAE)(config)
    row = ALL_ARCHITECTURES[arch]
    model = row.model(make_config(arch, row.config, config))
    if text is not None and text["encoder"] == "bytes":
        model.text = TextEncoder(make_config("text encoder", TextConfig, text["config"]))
    return model


def config_of_vae(values: dict) -> VAEConfig | AudioVAEConfig:
    """Of the autoencoder of pictures or, where it has a rate, of sounds."""
    return make_config("vae", AudioVAEConfig if "rate" in values else VAEConfig, values)


def make_config(name: str, kind: type, values: dict):
    """The dataclass `kind` with these values. Raises ValueError for a value that it has no field for."""
    surplus = sorted(set(values) - {field.name for field in fields(kind)})
    if surplus:
        raise ValueError(f"{name} has no setting {surplus[0]!r}; this checkpoint is from another version")
    try:
        return kind(**values)
    except TypeError as error:
        raise ValueError(f"{name}: {error}; this checkpoint is from another version") from None


def build_path(objective: dict):
    """The path of an objective as the checkpoint stores it: its name in ALL_OBJECTIVES and its options."""
    options = dict(objective)
    name = options.pop("name", None)
    if name not in ALL_OBJECTIVES:
        raise ValueError(f"objective {name}: not in this version, which has {', '.join(ALL_OBJECTIVES)}")
    try:
        return ALL_OBJECTIVES[name].path(**options)
    except TypeError as error:                         # an option that its path does not have
        raise ValueError(f"objective {name}: {error}; this checkpoint is from another version") from None


def pack_vae(vae: VAE | AudioVAE) -> dict:
    return {"config": asdict(vae.config), "state": vae.state_dict()}


def unpack_vae(packed: dict, what: str = "VAE") -> VAE | AudioVAE:
    vae = load_weights(build_model("vae", packed["config"]), packed["state"], what)
    return vae.eval().requires_grad_(False)


def load_vae(path: str | Path, name: str | None = None) -> VAE:
    """A VAE with averaged weights, in evaluation mode: from a finished VAE run, from inside another run's
    checkpoint, or a published one (see published.load_vae, also for the name). Raises ValueError with a line
    for the user."""
    path = Path(path)
    check_readable(path)
    # A folder without a checkpoint is no run of ours; with a model's name, it is one of that model's.
    is_published = published.has_vae(path) or (name is not None and path.is_dir())
    if is_published and not (path / "checkpoint.pt").is_file():
        return published.load_vae(path, name)
    try:
        checkpoint = load_checkpoint(path)
    except ValueError:
        if path.is_file():
            return published.load_vae(path, name)
        raise
    if checkpoint["arch"] != "vae":
        return unpack_vae(checkpoint["vae"])
    # The scale of its latents is measured at the end.
    if not (checkpoint.get("training") or {}).get("finished"):
        raise ValueError(f"{path}: this VAE is not finished (step {checkpoint['step']:,}); "
                         "run its command again")
    return unpack_vae({"config": checkpoint["config"], "state": checkpoint["ema"]}, str(path))


def compile_blocks(model: torch.nn.Module, **options) -> None:
    """torch.compile each block in place, so that the names of the weights stay as they are. Blocks of one
    class share the compiled code. It is compiled for the first size and, when a second one appears, once more
    for all sizes."""
    torch._dynamo.config.cache_size_limit = 64         # a U-Net's blocks have many widths
    # The lengths of packed pictures differ in every step: what goes by them is not compiled.
    attention.attention_apart = torch.compiler.disable(attention.attention_apart)
    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.compile(**options)


def checkpoint_blocks(model: torch.nn.Module) -> None:
    """Gradient checkpointing: keep the input of each block only, and run the block again in the backward pass
    (Chen et al. 2016, arXiv:1604.06174)."""
    def recomputed(forward: Callable) -> Callable:
        def again(*inputs, **more):                    # not functools.partial, which torch.compile skips
            # No block draws random numbers, so the state of the generator need not be restored.
            return torch.utils.checkpoint.checkpoint(forward, *inputs, use_reentrant=False,
                                                     preserve_rng_state=False, **more)
        return again

    for block in model.modules():
        if isinstance(block, BLOCKS):
            block.forward = recomputed(block.forward)


def graphed(model: torch.nn.Module) -> Callable[..., Tensor]:
    """The model compiled for sampling and, on CUDA, replayed as a graph. The first call runs without either,
    because it fills the network's tables of positions, whose memory a graph would overwrite."""
    compiled = None

    def call(*inputs: Tensor, **cond: Tensor) -> Tensor:
        nonlocal compiled
        if compiled is None:
            print("--compile: the next step compiles the network, which can take minutes", file=sys.stderr)
            compiled = torch.compile(model, mode="reduce-overhead")
            return model(*inputs, **cond)
        return compiled(*inputs, **cond).clone()       # a graph overwrites its output in the next call
    return call


def encoder_fingerprint(vae: VAE) -> str:
    """Latents depend on the encoder alone: a change of the decoder leaves a cache of them valid."""
    return fingerprint_tensors({name: weight for name, weight in vae.state_dict().items()
                                if name.startswith(("encoder.", "quant_conv.", "patch_encoder."))})


def latent_space(vae: VAE) -> tuple[str, str]:
    """Identifies what a network sees of a VAE: its encoder and the statistics that normalise latents."""
    return encoder_fingerprint(vae), fingerprint_tensors({"mean": vae.latent_mean, "std": vae.latent_std})


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
