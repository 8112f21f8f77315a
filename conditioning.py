"""What a network is conditioned on: nothing, class labels or text.

    python conditioning.py                # shows what a network gets from each kind in training

Each kind is a class. It provides its part of the network's configuration, the conditions of training batches
(with dropout), of validation and of previews, the null condition that guidance needs, its part of the
checkpoint, and its flags of sample.py. A new kind is a class, a row in KINDS, and a network that takes it and
names it in its row of settings.ARCHITECTURES.

`cond` is the dict of keyword arguments of the network: {} or y (B,) labels, with `num_classes` standing for
"no class"; or context (B, L, D) with mask (B, L), True at valid positions, and pooled (B, P).
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from cache import TextCache, TextWidths, fingerprint_files, read_embeddings
from data import Dataset, Folder, clean_text, send
from text import FrozenTextEncoder, TextConfig, TextEncoder
from unet import UNetConfig

Encoder = Callable[[list[str]], dict[str, Tensor]]   # prompts -> context, mask and perhaps pooled
VALIDATED = 256        # validation pictures that are used
PREVIEW_COLUMNS = 8    # columns of a preview that has no classes
CLASS_COLUMNS = 24    # at most, where each class has a column


class Asked(NamedTuple):
    """The conditions of n pictures that are to be drawn."""
    turn: Tensor                          # (n,) for each picture, the index of its condition in `every`
    every: dict[str, Tensor]              # every distinct condition once, the null condition last
    names: list[str]                      # names of the distinct conditions, without the null condition
    columns: int | None = None            # width of a grid of these pictures; None: about square
    captions: list[str] | None = None     # what to print below each picture

    def batch(self, start: int, size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(cond, uncond) for `size` pictures from `start` on."""
        cond = {name: part[self.turn[start:start + size]] for name, part in self.every.items()}
        uncond = {name: part[[-1] * size] for name, part in self.every.items()}
        return cond, uncond


class Conditioning:
    """What all kinds have in common. Where a kind does not say otherwise, there are no conditions.

    The constructor takes a checkpoint. For a new run, `of_settings` passes an incomplete one, with only the
    text encoder and the label dropout, and `attach` adds the rest."""

    flags: dict[str, dict] = {}           # flags of sample.py: name -> fields of settings.Flag
    use = ""                              # the flag that selects what to draw
    fingerprint: str | None = None        # identifies encoder outputs, which must not change on resume

    def __init__(self, checkpoint: dict, device: torch.device):
        self.classes: list[str] = checkpoint["data"]["classes"]
        self.prompts: list[str] = checkpoint["data"].get("prompts", [])     # examples for sample.py
        self.text: dict | None = checkpoint["text"]                         # the text encoder
        self.dropout: float = checkpoint["label_dropout"]
        self.device = device

    @classmethod
    def fits(cls, checkpoint: dict) -> bool:
        """Whether the network of this checkpoint has this kind of conditioning."""
        return False

    def stored(self) -> dict:
        """This kind's entries of the checkpoint."""
        return {"data": {"classes": [], "prompts": []}, "text": None, "label_dropout": 0.0}

    # ---- training

    def load_encoder(self, source: str, folder: Folder | None) -> None:
        """Load what it takes to build the network, before anything is written. source: --data; folder: its
        listing."""

    def attach(self, train: Dataset, val: Dataset, cache_dir: Path, resumed: bool) -> None:
        """Take the labels or captions from the data. resumed: whether the run continues an earlier one."""

    def network_options(self, arch: str, preset: dict) -> dict:
        """This kind's part of the network's configuration."""
        options = {"num_classes": len(self.classes)}
        if arch == "unet":
            options["context_width"] = None    # the presets of Stable Diffusion expect text
        return options

    def batch(self, model: nn.Module, indices: np.ndarray, dropped: Tensor) -> dict[str, Tensor]:
        """The conditions of training pictures; where `dropped` (B,) is True, the null condition."""
        return {}

    def validation(self, model: nn.Module) -> dict[str, Tensor]:
        """The conditions of the first VALIDATED validation pictures."""
        return {}

    def preview(self, model: nn.Module, rows: int) -> Asked:
        """The conditions of a preview with this many rows."""
        return Asked(torch.zeros(rows * PREVIEW_COLUMNS, dtype=torch.long), {}, [], PREVIEW_COLUMNS)

    # ---- sampling

    @property
    def described(self) -> str:
        """A phrase that completes "this run ..." in messages."""
        return "was trained without conditions"

    @property
    def guidable(self) -> bool:
        """Whether the network was trained on the null condition too, which guidance needs."""
        return False

    def accepted(self) -> set[str]:
        """The conditioning flags of sample.py that this run takes."""
        return set(self.flags)

    def ask(self, args: argparse.Namespace, model: nn.Module) -> Asked:
        """The conditions of the args.n pictures that sample.py's flags ask for."""
        return Asked(torch.zeros(args.n, dtype=torch.long), {}, [])

    def hint(self) -> str:
        """An example of sample.py's flags for this run: something that it was trained on."""
        return ""


class Nothing(Conditioning):
    """No conditions: the network is called with the latent and the time alone."""


class Labels(Conditioning):
    """Class labels. Data without classes (a flat folder) makes an unconditional network."""

    flags = {"--label": dict(help="class, by number or name (default: all in turn)")}
    use = "--label"

    @classmethod
    def fits(cls, checkpoint: dict) -> bool:
        return bool(checkpoint["data"]["classes"])

    def stored(self) -> dict:
        data = {"classes": self.classes, "prompts": []}
        return {"data": data, "text": None, "label_dropout": self.dropout if self.classes else 0.0}

    def attach(self, train: Dataset, val: Dataset, cache_dir: Path, resumed: bool) -> None:
        self.classes = train.classes
        if self.classes:
            self.labels = torch.from_numpy(train.labels)
            self.val_labels = torch.from_numpy(val.labels[:VALIDATED])

    def batch(self, model: nn.Module, indices: np.ndarray, dropped: Tensor) -> dict[str, Tensor]:
        if not self.classes:
            return {}
        null = len(self.classes)
        y = torch.where(dropped, null, self.labels[torch.from_numpy(indices)])
        return {"y": send(y, self.device)}

    def validation(self, model: nn.Module) -> dict[str, Tensor]:
        return {"y": send(self.val_labels, self.device)} if self.classes else {}

    def every(self) -> dict[str, Tensor]:
        """Every label once, the null class last."""
        return {"y": torch.arange(len(self.classes) + 1, device=self.device)}

    def preview(self, model: nn.Module, rows: int) -> Asked:
        if not self.classes:
            return super().preview(model, rows)
        columns = min(len(self.classes), CLASS_COLUMNS)                       # a column per class
        turn = torch.arange(rows * columns) % len(self.classes)
        return Asked(turn, self.every(), self.classes, columns)

    @property
    def described(self) -> str:
        return "is conditioned on class labels"

    @property
    def guidable(self) -> bool:
        return bool(self.classes) and self.dropout > 0

    def ask(self, args: argparse.Namespace, model: nn.Module) -> Asked:
        turn = torch.arange(args.n) % len(self.classes)
        columns = None
        if args.label is not None:
            turn = torch.full((args.n,), self.index(args.label))
        elif 1 < len(self.classes) <= min(CLASS_COLUMNS, args.n):
            columns = len(self.classes)
        return Asked(turn, self.every(), self.classes, columns)

    def index(self, label: str) -> int:
        """The index of a class, given by name or by number."""
        if label in self.classes:
            return self.classes.index(label)
        if label.isdecimal() and int(label) < len(self.classes):
            return int(label)
        known = ", ".join(self.classes[:12])
        if len(self.classes) > 12:
            known += ", ..."
        raise ValueError(f"--label {label}: not a class of this run; it has 0 to {len(self.classes) - 1}: "
                         f"{known}")

    def hint(self) -> str:
        return f" --label {shlex.quote(self.classes[0])}" if self.classes else ""


class Words(Conditioning):
    """Text, through an encoder. text["encoder"] is one of
    "bytes": built in, a part of the network (`model.text`) that is trained and saved with it;
    "clip" or "t5": frozen, from the folder text["path"];
    "none": vectors that another program computed, in one .npz file per picture. The names of these files then
    take the place of captions and prompts."""

    flags = {
        "--prompt": dict(help="what to draw; several prompts are drawn in turn (default: captions of the "
                              "validation data)", nargs="+", metavar="TEXT"),
        "--negative-prompt": dict(help="what guidance steers away from (default: empty)", metavar="TEXT"),
        "--text-encoder": dict(help="where the run's frozen encoder is now (default: where it was when "
                                    "training)", metavar="KIND:PATH"),
        "--embedding": dict(help="instead of prompts, for a run trained on precomputed vectors: .npz with "
                                 "context, mask, pooled", nargs="+", metavar="FILE"),
    }

    def __init__(self, checkpoint: dict, device: torch.device):
        super().__init__(checkpoint, device)
        self.kind = self.text["encoder"]
        self.precomputed = self.kind == "none"
        self.encoder: FrozenTextEncoder | None = None      # frozen, held only until its outputs are cached
        self.table: TextCache | None = None                # those outputs, in training

    @classmethod
    def fits(cls, checkpoint: dict) -> bool:
        return checkpoint["text"] is not None

    def stored(self) -> dict:
        data = {"classes": [], "prompts": self.prompts}
        return {"data": data, "text": self.text, "label_dropout": self.dropout}

    @property
    def use(self) -> str:
        return "--embedding" if self.precomputed else "--prompt"

    # ---- training

    def load_encoder(self, source: str, folder: Folder | None) -> None:
        if self.kind == "bytes":
            width = self.text["config"]["width"]
            self.widths = TextWidths(width, width)
            return
        if self.precomputed:
            cond = read_embeddings(folder.words[:1])
            self.fingerprint = fingerprint_files(Path(source), "*.npz")
        else:
            self.encoder = FrozenTextEncoder(self.kind, self.text["path"], self.device)
            cond = self.encoder([""])
            self.fingerprint = fingerprint_files(Path(self.text["path"]), "*.*")
        pooled = cond["pooled"].shape[-1] if "pooled" in cond else None
        self.widths = TextWidths(cond["context"].shape[-1], pooled)

    def attach(self, train: Dataset, val: Dataset, cache_dir: Path, resumed: bool) -> None:
        self.captions = train.captions
        self.val_captions = val.captions[:VALIDATED]
        self.prompts = val.captions[:64]
        self.vary = None
        if self.kind == "bytes":
            self.vary = train.vary
        if not (self.precomputed or resumed):
            self.warn_of_truncation()
        if self.kind != "bytes":
            # The outputs of a frozen encoder never change, so each caption is encoded once. Captions are then
            # not reworded, because only their original wording is in the cache.
            self.table = TextCache(cache_dir / f"text-{self.kind}.bin", [*self.captions, *self.val_captions],
                                   self.encoder or read_embeddings, self.fingerprint)
            self.encoder = None                            # frees memory: it may take several GB

    def warn_of_truncation(self) -> None:
        encoder = self.encoder
        if encoder is None:
            with torch.device("meta"):                     # only its limit is needed
                encoder = TextEncoder(TextConfig(**self.text["config"]))
        truncated = [rest for rest in map(encoder.truncated, self.captions) if rest]
        if truncated:
            print(f"warning: {len(truncated):,} of {len(self.captions):,} captions are longer than the "
                  f"encoder's limit and are truncated; the first of them loses {truncated[0]!r}",
                  file=sys.stderr)

    def network_options(self, arch: str, preset: dict) -> dict:
        options = {"context_width": self.widths.context}
        if arch == "mmdit":
            options |= {"pooled_width": self.widths.pooled, "guidance": False}
        elif preset.get("context_width") is None:
            # In a U-Net of our own, text reaches every level, and positions are added before attention. The
            # presets of Stable Diffusion, which have a context width, stay as published, without a pooled
            # vector.
            levels = len(preset.get("widths", UNetConfig.widths))
            options |= {"pooled_width": self.widths.pooled, "attention": (True,) * levels, "positions": True}
        return options

    def encode(self, model: nn.Module, prompts: list[str]) -> dict[str, Tensor]:
        """The conditions of these captions, in training."""
        return network_inputs(model, self.table or model.text, prompts, self.device)

    def batch(self, model: nn.Module, indices: np.ndarray, dropped: Tensor) -> dict[str, Tensor]:
        prompts = []
        for index, drop in zip(indices, dropped.tolist()):
            prompts.append("" if drop else self.caption(index))
        return self.encode(model, prompts)

    def caption(self, index: int) -> str:
        """The caption of a training picture, reworded if the data has a function for that."""
        caption = self.captions[index]
        if self.vary:
            # Seeded by torch's generator, whose state the checkpoint holds: a resumed run rewords the same
            # way.
            caption = self.vary(caption, np.random.default_rng(torch.randint(2**31, ()).item()))
        return caption

    def validation(self, model: nn.Module) -> dict[str, Tensor]:
        return self.encode(model, self.val_captions)

    def preview(self, model: nn.Module, rows: int) -> Asked:
        """One sample for each of the first validation captions."""
        n = rows * PREVIEW_COLUMNS
        turn = torch.arange(n) % len(self.val_captions)
        every = self.encode(model, [*self.val_captions[:n], ""])
        captions = [self.val_captions[i] for i in turn]
        return Asked(turn, every, self.val_captions, PREVIEW_COLUMNS, captions)

    # ---- sampling

    @property
    def described(self) -> str:
        return "is conditioned on precomputed text vectors" if self.precomputed else "is conditioned on text"

    @property
    def guidable(self) -> bool:
        return self.dropout > 0

    def accepted(self) -> set[str]:
        if self.precomputed:
            return {"--embedding"}
        if self.kind == "bytes":
            return {"--prompt", "--negative-prompt"}
        return {"--prompt", "--negative-prompt", "--text-encoder"}

    def ask(self, args: argparse.Namespace, model: nn.Module) -> Asked:
        encode = self.sampling_encoder(model, args.text_encoder)
        asked = args.embedding
        negative = ""
        if not self.precomputed:
            asked = [clean_text(prompt) for prompt in args.prompt or self.prompts]
            negative = clean_text(args.negative_prompt or "")
        asked = asked[:args.n]
        prompts = list(dict.fromkeys(asked))               # without repetitions, so that each is encoded once
        if not self.precomputed:
            for prompt in (*prompts, negative):
                rest = encode.truncated(prompt)
                if rest:
                    print("warning: a prompt is longer than the encoder's limit and is truncated; it loses "
                          f"{rest!r}", file=sys.stderr)
        # A negative prompt takes the place of the null condition, which is the empty prompt.
        every = network_inputs(model, encode, [*prompts, negative], self.device)

        turn = torch.tensor([prompts.index(prompt) for prompt in asked])[torch.arange(args.n) % len(asked)]
        columns, captions = None, None
        if len(prompts) > 1:
            captions = [prompts[i] for i in turn]
            if len(prompts) <= min(PREVIEW_COLUMNS, args.n):
                columns = len(prompts)
        return Asked(turn, every, prompts, columns, captions)

    def sampling_encoder(self, model: nn.Module, place: str | None) -> Encoder:
        """The encoder to sample with. place: KIND:PATH of a frozen encoder that has moved since training."""
        if self.kind == "bytes":
            return model.text
        if self.precomputed:
            return read_embeddings
        kind, _, path = (place or f"{self.kind}:{self.text['path']}").partition(":")
        if kind != self.kind:
            raise ValueError(f"--text-encoder {place}: this run was trained with {self.kind}:PATH")
        return FrozenTextEncoder(kind, path, self.device)

    def hint(self) -> str:
        return f" {self.use} {shlex.quote(self.prompts[0])}"


def network_inputs(model: nn.Module, encode: Encoder, prompts: list[str],
                   device: torch.device) -> dict[str, Tensor]:
    """The outputs of the encoder that the network takes, on the device. Raises ValueError if their width is
    not the one that the network was built for."""
    cond = encode(prompts)
    wanted = {"context": model.config.context_width, "pooled": getattr(model.config, "pooled_width", None)}
    for name, width in wanted.items():
        found = cond[name].shape[-1] if name in cond else None
        if width and found != width:
            raise ValueError(f"text vectors ({name}) of width {found}: this network takes {width}")
    names = ["context", "mask"]
    if wanted["pooled"]:
        names.append("pooled")
    return {name: send(cond[name], device) for name in names}


# The value of --cond -> the kind.
KINDS = {"text": Words, "class": Labels, "none": Nothing}
FLAGS = {name: fields for kind in KINDS.values() for name, fields in kind.flags.items()}     # of sample.py


def of_settings(cond: str, text: dict | None, dropout: float, device: torch.device) -> Conditioning:
    """The conditioning of a new run; cond is a key of KINDS."""
    incomplete = {"data": {"classes": []}, "text": text, "label_dropout": dropout}
    return KINDS[cond](incomplete, device)


def of_checkpoint(checkpoint: dict, device: torch.device) -> Conditioning:
    """The conditioning of a trained network: the kind that fits its checkpoint, or none."""
    for kind in KINDS.values():
        if kind.fits(checkpoint):
            return kind(checkpoint, device)
    return Nothing(checkpoint, device)


def check_flags(condition: Conditioning, args: argparse.Namespace) -> None:
    """Refuse the conditioning flags of sample.py that this run does not take."""
    for flag in FLAGS:
        value = getattr(args, flag.lstrip("-").replace("-", "_"))
        if value is None or flag in condition.accepted():
            continue
        remedy = "leave it out"
        if condition.use and flag in ("--label", "--prompt", "--embedding"):     # these select what to draw
            remedy = f"use {condition.use}"
        first = value if isinstance(value, str) else value[0]
        raise ValueError(f"{flag} {first}: this run {condition.described}; {remedy}")
    if condition.use == "--embedding" and not args.embedding:
        raise ValueError(f"{args.run}: this run {condition.described}; give some by --embedding FILE.npz")


def guidance_scale(condition: Conditioning, args: argparse.Namespace) -> float:
    """The guidance scale asked for, or the run's default. Refuses a scale that the run does not support and
    flags that have no effect at this scale."""
    scale = args.cfg
    if scale is None:
        scale = 2.0 if condition.guidable else 1.0
    # Every scale but 1 needs the unconditional branch, which label dropout trains.
    if scale != 1 and not condition.guidable:
        why = condition.described
        if condition.use:
            why += " with label dropout 0, so it has no unconditional branch"
        raise ValueError(f"--cfg {scale:g}: this run {why}; use --cfg 1")
    for flag, value in (("--label", args.label), ("--prompt", args.prompt)):
        if value is not None and scale == 0:
            raise ValueError(f"{flag} with --cfg 0: scale 0 is unconditional and ignores it; "
                             "drop one of them")

    # At scale 1 there is no guidance, and at scale 0 only the unconditional branch.
    without_effect = None
    if tuple(args.interval) != (0, 1):
        without_effect = "--interval {:g} {:g}".format(*args.interval)
    elif args.rescale > 0:
        without_effect = f"--rescale {args.rescale:g}"
    elif args.negative_prompt is not None and scale != 0:  # it conditions the unconditional branch
        without_effect = "--negative-prompt"
    if without_effect and scale in (0, 1):
        raise ValueError(f"{without_effect} with guidance {scale:g}: there is none for it to act on")
    return scale


def demo() -> None:
    """Print the network's options and a batch with one dropped condition, for each kind."""
    cpu = torch.device("cpu")
    images = np.zeros((4, 8, 8, 3), np.uint8)
    with_classes = Dataset(images, np.array([0, 1, 2, 0]), ["red", "green", "blue"], "demo")
    with_captions = Dataset(images, None, [], "demo", captions=["a red square", "green", "blue", "red"])
    model = nn.Module()
    model.text = TextEncoder(TextConfig(width=16, depth=1, heads=2))
    model.config = SimpleNamespace(context_width=16, pooled_width=16)
    text = {"encoder": "bytes", "config": {"width": 16, "depth": 1, "heads": 2}}
    for cond, data in (("none", with_classes), ("class", with_classes), ("text", with_captions)):
        condition = of_settings(cond, text if cond == "text" else None, 0.5, cpu)
        condition.load_encoder("demo", None)
        condition.attach(data, data, Path("."), resumed=False)
        batch = condition.batch(model, np.arange(4), torch.tensor([False, False, False, True]))
        print(f"--cond {cond}: this run {condition.described}; network options "
              f"{condition.network_options('unet', {})}")
        for name, part in batch.items():
            print(f"    {name:8s} {tuple(part.shape)}", part.tolist() if part.ndim < 2 else "")


if __name__ == "__main__":
    demo()
