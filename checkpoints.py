"""Checkpoints: read and checked, and published models in the same form.

    python checkpoints.py                 # what is refused, and how

A checkpoint is all that sample.py needs: the architecture and its configuration, the objective, the size of
the pictures, class names or the text encoder, the VAE, raw and averaged weights; and, under "training", what
continues it. It holds plain types and tensors and is always read with weights_only=True. Whatever is wrong
with it is one line for the user, a ValueError.
"""

from __future__ import annotations

import tempfile
import zipfile
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

import ema
import moments
import published
from encoders import RECIPES
from networks import build_model, build_path, pack_vae, unpack_vae
from settings import ARCHITECTURES
from vae import VAE
from weights import check_finite, check_readable, check_weights


# ---- what each part must be

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


# ---- reading

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


# ---- what is made of them

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


def is_finished(checkpoint: dict) -> bool:
    """Whether its training came to its end."""
    return bool((checkpoint.get("training") or {}).get("finished"))


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
    if not is_finished(checkpoint):
        raise ValueError(f"{path}: this VAE is not finished (step {checkpoint['step']:,}); "
                         "run its command again")
    return unpack_vae({"config": checkpoint["config"], "state": checkpoint["ema"]}, str(path))


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


def demo() -> None:
    """A checkpoint as it was saved, then with a part that is missing, wrong or damaged."""
    model, autoencoder = build_model("dit", {"width": 64, "depth": 2, "heads": 2}), build_model("vae", {})
    state = model.state_dict()
    whole = {"arch": "dit", "config": asdict(model.config), "objective": {"name": "rf"}, "step": 2,
             "data": {"size": [32, 32], "classes": []}, "label_dropout": 0.0, "vae": pack_vae(autoencoder),
             "model": state, "ema": state}
    name = next(iter(state))
    endless = state | {name: torch.full_like(state[name], torch.inf)}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "checkpoint.pt"
        for change in ({}, {"data": {"size": [32, 32]}}, {"config": whole["config"] | {"depth": 3}},
                       {"objective": {"name": "drift"}}, {"ema": endless}, {"step": -1}):
            torch.save(whole | change, file)
            try:
                print(f"read: step {load_checkpoint(file)['step']}")
            except ValueError as error:
                print(f"refused: {str(error).replace(folder, '...')}")
        file.write_bytes(file.read_bytes()[:-1000])
        print(f"cut off: {damage(file)}".replace(folder, "..."))


if __name__ == "__main__":
    demo()
