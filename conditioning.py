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
import functools
import itertools
import os
import re
import shlex
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from torch import Tensor

from cache import TextCache, TextWidths, check_embeddings, read_embeddings
from data import Dataset, send
from encoders import (BLOCKS, SIZE_FEATURES, WITHOUT_T5, FrozenTextEncoder, from_folder, from_states,
                      no_tokenizer, parts_of, with_sizes)
from files import UNPRINTABLE, amount, digest, fingerprint_files, shortened
from folder import Folder, clean_text
from offload import Resident, visit_blocks
from published import DISTILLED, find_text_encoders, read_text_encoders
from shards import ShardCaptions
from text import TextConfig, TextEncoder
from unet import UNetConfig
from weights import check_readable, stored_bytes

Encoder = Callable[[list[str]], dict[str, Tensor]]   # prompts -> context, mask and perhaps pooled
VALIDATED = 256        # validation pictures that are used
PREVIEW_COLUMNS = 8    # columns of a preview that has no classes
CLASS_COLUMNS = 24    # at most, where each class has a column
ENCODED_AT_ONCE = 256  # distinct prompts; of more, each is encoded with the batch that needs it
CAPTION = 300          # characters of a prompt that a grid shows below a picture
LONGEST_FILE = 2**26   # bytes of a file of prompts
O_NONBLOCK = getattr(os, "O_NONBLOCK", 0)      # Windows has none


class Asked(NamedTuple):
    """The conditions of n pictures that are to be drawn."""
    turn: Tensor                          # (n,) for each picture, the index of its condition in `every`
    every: dict[str, Tensor]              # every distinct condition once, the null condition last
    names: list[str]                      # names of the distinct conditions, without the null condition
    columns: int | None = None            # width of a grid of these pictures; None: about square
    captions: list[str] | None = None     # what to print below each picture
    # Where there are too many conditions for `every`, which is then empty: names -> their conditions, the
    # null condition last.
    encode: Callable[[list[str]], dict[str, Tensor]] | None = None
    # What each of them has besides, (n, ...): guidance leaves it as it is.
    each: dict[str, Tensor] = {}
    seconds: np.ndarray | None = None     # (n,): how long each sound is

    def batch(self, start: int, size: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """(cond, uncond) for `size` pictures from `start` on."""
        turn, every = self.turn[start:start + size], self.every
        if self.encode is not None:
            chosen, turn = turn.unique(return_inverse=True)
            every = self.encode([self.names[i] for i in chosen])
        each = {name: part[start:start + size] for name, part in self.each.items()}
        cond = {name: part[turn] for name, part in every.items()}
        uncond = {name: part[[-1] * size] for name, part in every.items()}
        return cond | each, uncond | each


class Conditioning:
    """What all kinds have in common. Where a kind does not say otherwise, there are no conditions.

    The constructor takes a checkpoint. For a new run, `of_settings` passes an incomplete one, with only the
    text encoder and the label dropout, and `attach` adds the rest."""

    flags: dict[str, dict] = {}           # flags of sample.py: name -> fields of settings.Flag
    use = ""                              # the flag that selects what to draw
    selecting: tuple[str, ...] = ()       # all flags that do
    guiding: tuple[str, ...] = ()         # flags that act on guidance alone
    who = "this run"                      # in messages
    refusals: dict[str, str] = {}         # why a flag is not taken, where that is not plain
    required = ""                         # the flag without which there is nothing to draw
    fingerprint: str | None = None        # identifies encoder outputs, which must not change on resume
    rows_stored: int | None = None        # of every prompt's context, where its padding is not masked
    size: tuple[int, int] | None = None   # of the pictures, in pixels: Stable Diffusion XL takes it too
    packed = False                        # whether training and validation give texts without padding

    def __init__(self, checkpoint: dict, device: torch.device):
        self.classes: list[str] = checkpoint["data"]["classes"]
        self.prompts: list[str] = checkpoint["data"].get("prompts", [])     # examples for sample.py
        self.text: dict | None = checkpoint["text"]                         # the text encoder
        self.dropout: float = checkpoint["label_dropout"]
        self.longest: float | None = checkpoint["data"].get("longest")      # of sounds, in seconds
        self.examples: list[float] = checkpoint["data"].get("seconds", [])  # lengths of some of them
        self.device = device
        self.preview_prompts: list[str] = []               # of --preview-prompts

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

    # ---- the lengths of sounds, which every kind has beside its own conditions

    def attach_lengths(self, train: Dataset, val: Dataset) -> None:
        if self.longest is not None:
            self.train_seconds, self.val_seconds = map(torch.from_numpy, (train.seconds, val.seconds))
            self.examples = val.seconds[:64].tolist()
            if self.classes:                               # of each class in turn, as the classes are drawn
                found = [val.seconds[val.labels == label] for label in range(len(self.classes))]
                found = [lengths if len(lengths) else train.seconds[train.labels == label]
                         for label, lengths in enumerate(found)]
                self.examples = np.stack([np.resize(lengths, 8) for lengths in found], 1).reshape(-1).tolist()

    def lengths(self, indices: np.ndarray) -> dict[str, Tensor]:
        """seconds (B,) of training sounds; nothing of pictures."""
        return {} if self.longest is None else {"seconds": send(self.train_seconds[indices], self.device)}

    def validation_lengths(self, part: slice) -> dict[str, Tensor]:
        return {} if self.longest is None else {"seconds": send(self.val_seconds[part], self.device)}

    def with_lengths(self, asked: Asked, seconds: float | None = None) -> Asked:
        """The same with a length for each sound: this one, or those of some validation sounds in turn, which
        are of the class that is asked for."""
        if self.longest is None:
            return asked
        examples = self.examples if seconds is None else [min(seconds, self.longest)]
        which = torch.arange(len(asked.turn))
        if self.classes and seconds is None:
            # A sound is the nth of its class: it takes the nth length of that class.
            order = asked.turn.argsort(stable=True)
            counts = asked.turn.bincount(minlength=len(self.classes))
            nth = torch.empty_like(which)
            nth[order] = which - (counts.cumsum(0) - counts)[asked.turn[order]]
            which = nth * len(self.classes) + asked.turn
        lengths = torch.tensor(examples)[which % len(examples)]
        written = lengths.numpy()
        if seconds is not None:                            # perhaps longer than any of the training
            written = np.full(len(lengths), seconds)
        return asked._replace(each={"seconds": send(lengths, self.device)}, seconds=written)

    def stored_lengths(self) -> dict:
        """Entries of the checkpoint's "data"."""
        return {} if self.longest is None else {"longest": self.longest, "seconds": self.examples}

    # ---- the conditions of each kind

    def take_turns(self, pairs: int) -> None:
        """Take the conditions of reflow's pairs in place of those of the pictures: of `pairs` to train on and
        VALIDATED more, drawn in turn as `ask` has it."""

    def network_options(self, arch: str, preset: dict) -> dict:
        """This kind's part of the network's configuration."""
        options = {"num_classes": len(self.classes)}
        if arch == "unet":
            options["context_width"] = None    # the presets of Stable Diffusion expect text
        return options

    def batch(self, model: nn.Module, indices: np.ndarray, dropped: Tensor,
              part: slice = slice(None)) -> dict[str, Tensor]:
        """The conditions of training pictures; where `dropped` (B,) is True, the null condition. part: which
        of the pictures they are returned for; random numbers are drawn for all."""
        return {}

    def validation(self, model: nn.Module, part: slice = slice(None)) -> dict[str, Tensor]:
        """The conditions of the first VALIDATED validation pictures, or of a part of these."""
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

    def ask_again(self, asked: Asked, model: nn.Module) -> Asked:
        """The same conditions for another network that is conditioned in the same way. They are other numbers
        only where an encoder is a part of the network."""
        return asked

    def hint(self) -> str:
        """An example of sample.py's flags for this run: something that it was trained on."""
        return ""


class Nothing(Conditioning):
    """No conditions: the network is called with the latent and the time alone."""


class Labels(Conditioning):
    """Class labels. Data without classes (a flat folder) makes an unconditional network."""

    flags = {"--label": dict(help="class, by its name or, where no class is named like a number, by its "
                                  "index from 0 (default: all in turn)")}
    use = "--label"
    selecting = ("--label",)

    @classmethod
    def fits(cls, checkpoint: dict) -> bool:
        return bool(checkpoint["data"]["classes"])

    def stored(self) -> dict:
        data = {"classes": self.classes, "prompts": []}
        return {"data": data, "text": None, "label_dropout": self.dropout if self.classes else 0.0}

    def attach(self, train: Dataset, val: Dataset, cache_dir: Path, resumed: bool) -> None:
        self.classes = train.classes
        if self.classes:
            self.labels = train.labels                     # of shards, read where they are indexed
            self.val_labels = torch.from_numpy(val.labels[:VALIDATED])

    def take_turns(self, pairs: int) -> None:
        if self.classes:
            turn = torch.arange(pairs + VALIDATED) % len(self.classes)
            self.labels, self.val_labels = turn[:pairs].numpy(), turn[pairs:]

    def batch(self, model: nn.Module, indices: np.ndarray, dropped: Tensor,
              part: slice = slice(None)) -> dict[str, Tensor]:
        if not self.classes:
            return {}
        null = len(self.classes)
        y = torch.where(dropped[part], null, torch.from_numpy(self.labels[indices[part]]))
        return {"y": send(y, self.device)}

    def validation(self, model: nn.Module, part: slice = slice(None)) -> dict[str, Tensor]:
        return {"y": send(self.val_labels[part], self.device)} if self.classes else {}

    def every(self) -> dict[str, Tensor]:
        """Every label once, the null class last."""
        return {"y": torch.arange(len(self.classes) + 1, device=self.device)}

    def preview(self, model: nn.Module, rows: int) -> Asked:
        if not self.classes:
            return super().preview(model, rows)
        columns = min(len(self.classes), CLASS_COLUMNS)                       # a column per class
        turn = torch.arange(rows * columns) % len(self.classes)
        return Asked(turn, self.every(), self.classes, columns, self.captions(turn))

    def captions(self, turn: Tensor) -> list[str] | None:
        """Of sounds, the class of each, which a spectrogram does not show at a glance; of pictures, none."""
        return None if self.longest is None else [self.classes[i] for i in turn]

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
        return Asked(turn, self.every(), self.classes, columns, self.captions(turn))

    def index(self, label: str) -> int:
        """The index of a class. A name wins; an index counts where no class is named like a number, as its
        meaning would be a guess there, and the class that it means is said."""
        if label in self.classes:
            return self.classes.index(label)
        if not label:
            raise ValueError("--label is empty; give the name of a class")
        numbers = [name for name in self.classes if re.fullmatch(r"[+-]?\d+([.,]\d+)?", name.strip())]
        if label.isdecimal() and int(label) < len(self.classes) and not numbers:
            print(f"--label {label}: draws {shortened(self.classes[int(label)])}", file=sys.stderr)
            return int(label)
        known = ", ".join(map(shortened, self.classes[:12]))
        if len(self.classes) > 12:
            known += ", ..."
        if self.classes == [str(i) for i in range(len(self.classes))]:
            known = f"its classes are the numbers 0 to {len(self.classes) - 1}"
        elif numbers and len(numbers) == len(self.classes):
            known = f"its classes are named like numbers, so give a name: {known}"
        elif numbers:
            known = f"as {shortened(numbers[0])} is the name of one, give a name: {known}"
        else:
            known = f"it has 0 to {len(self.classes) - 1}: {known}"
        raise ValueError(f"--label {shortened(label)}: not a class of this run; {known}")

    def hint(self) -> str:
        return flag_and_value("--label", self.classes)


class Words(Conditioning):
    """Text, through an encoder. text["encoder"] is one of
    "bytes": built in, a part of the network (`model.text`) that is trained and saved with it;
    a name in encoders.RECIPES: frozen, from the folder text["path"], and with text["no_t5"] without T5;
    "none": vectors that another program computed, in one .npz file per picture. The names of these files then
    take the place of captions and prompts."""

    flags = {
        "--prompt": dict(help="what to draw; several prompts are drawn in turn (default: captions of the "
                              "validation data; a published model needs one)", nargs="+", metavar="TEXT"),
        "--prompts": dict(help="the same from a text file in UTF-8: one prompt per line", metavar="FILE"),
        "--negative-prompt": dict(help="what guidance steers away from (default: empty)", metavar="TEXT"),
        "--text-encoder": dict(help="where the frozen encoder is: of a run, KIND:PATH (default: where it was "
                                    "when training); of a published model, a folder or file, or a file for "
                                    "each, like clip_l.safetensors (default: --weights)", nargs="+",
                               metavar="PATH"),
        "--tokenizer": dict(help="of a published model: folders with the tokenizers of its text encoders, "
                                 "which a single file does not hold", nargs="+", metavar="FOLDER"),
        "--no-t5": dict(help="Stable Diffusion 3 without T5, its largest encoder", type=None),
        "--embedding": dict(help="instead of prompts, for a run trained on precomputed vectors: .npz with "
                                 "context, mask, pooled", nargs="+", metavar="FILE"),
    }
    selecting = ("--prompts", "--prompt", "--embedding")
    guiding = ("--negative-prompt",)

    def __init__(self, checkpoint: dict, device: torch.device):
        super().__init__(checkpoint, device)
        self.kind = self.text["encoder"]
        self.precomputed = self.kind == "none"
        self.encoder: FrozenTextEncoder | None = None      # frozen, held only until its outputs are cached
        self.table: TextCache | None = None                # those outputs, in training
        self.preview_table: TextCache | None = None        # and those for previews

    @classmethod
    def fits(cls, checkpoint: dict) -> bool:
        return checkpoint["text"] is not None

    def stored(self) -> dict:
        data = {"classes": [], "prompts": self.prompts}
        return {"data": data, "text": self.text, "label_dropout": self.dropout}

    @property
    def use(self) -> str:
        return "--embedding" if self.precomputed else "--prompt"

    @property
    def required(self) -> str:
        return "--embedding" if self.precomputed else ""         # the captions of the data are not vectors

    # ---- training

    def load_encoder(self, source: str, folder: Folder | None) -> None:
        if self.kind == "bytes":
            width = self.text["config"]["width"]
            self.widths = TextWidths(width, width)
            return
        if self.precomputed:
            self.widths = check_embeddings(folder.words)
            self.fingerprint = fingerprint_files(Path(source), "*.npz")
            return
        self.encoder = self.frozen_encoder(self.text["path"])
        cond = self.encoder([""])
        if self.kind in ("clip", "t5"):                    # as of the first runs with these
            self.fingerprint = fingerprint_files(Path(self.text["path"]), "*.*")
        else:                                              # a pipeline's folder also holds its network
            prints = [fingerprint_files(Path(part), "*.*") for part in self.encoder.folders]
            self.fingerprint = digest(self.cache_name, prints)
        pooled = cond["pooled"].shape[-1] if "pooled" in cond else None
        self.widths = TextWidths(cond["context"].shape[-1], pooled)
        if "mask" not in cond:
            self.rows_stored = cond["context"].shape[1]

    def frozen_encoder(self, path: str) -> FrozenTextEncoder:
        """In runs of our own, the empty prompt is the null condition, whatever the encoder."""
        check_readable(path)
        return from_folder(self.kind, path, self.device, no_t5=self.without_t5, empty_is_null=True)

    @property
    def without_t5(self) -> bool:
        return self.text.get("no_t5", False)

    @property
    def cache_name(self) -> str:
        return f"{self.kind}-no-t5" if self.without_t5 else self.kind

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
            encode = self.encoder or read_embeddings
            if isinstance(self.captions, ShardCaptions):   # too many to keep: encoded with each batch
                self.table = self.preview_table = functools.partial(encode_alone, self.encoder)
                return
            captions = itertools.chain(self.captions, self.val_captions)
            self.table = TextCache(cache_dir / f"text-{self.cache_name}.bin", captions, encode,
                                   self.fingerprint)
            # In a cache of their own, because they may change on resume.
            self.preview_table = self.table
            if self.preview_prompts:
                self.preview_table = TextCache(cache_dir / f"preview-{self.cache_name}.bin",
                                               self.preview_prompts, encode, self.fingerprint)
            self.encoder = None                            # frees memory: it may take several GB

    def warn_of_truncation(self) -> None:
        encoder = self.encoder
        if encoder is None:
            with torch.device("meta"):                     # only its limit is needed
                encoder = TextEncoder(TextConfig(**self.text["config"]))
        captions = self.captions
        if isinstance(captions, ShardCaptions):            # millions, perhaps: some of them tell enough
            captions = captions[np.linspace(0, len(captions) - 1, min(1000, len(captions))).astype(int)]
        for name, truncated in truncated_by(encoder, captions).items():
            print(f"warning: {len(truncated):,} of {len(captions):,} captions are longer than {name}'s "
                  f"limit and are truncated; the first of them loses {shortened(truncated[0])!r}",
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
        return network_inputs(model, self.table or model.text, prompts, self.device, self.packed, self.size)

    def batch(self, model: nn.Module, indices: np.ndarray, dropped: Tensor,
              part: slice = slice(None)) -> dict[str, Tensor]:
        seeds = torch.zeros(len(indices), dtype=torch.long)
        if self.vary:
            # By torch's generator, whose state the checkpoint holds: a resumed run rewords the same way.
            seeds[~dropped] = torch.randint(2**31, (int((~dropped).sum()),))
        prompts = []
        for index, drop, seed in zip(indices[part], dropped[part].tolist(), seeds[part].tolist()):
            prompts.append("" if drop else self.caption(index, seed))
        return self.encode(model, prompts)

    def caption(self, index: int, seed: int) -> str:
        """The caption of a training picture, reworded if the data has a function for that."""
        caption = self.captions[index]
        if self.vary:
            caption = self.vary(caption, np.random.default_rng(seed))
        return caption

    def validation(self, model: nn.Module, part: slice = slice(None)) -> dict[str, Tensor]:
        return self.encode(model, self.val_captions[part])

    def preview(self, model: nn.Module, rows: int) -> Asked:
        """Samples for the prompts of --preview-prompts in turn, or one for each of the first validation
        captions."""
        prompts = self.preview_prompts or self.val_captions
        columns = PREVIEW_COLUMNS
        if self.preview_prompts:
            columns = min(columns, len(prompts))
        n = rows * columns
        turn = torch.arange(n) % len(prompts)
        every = network_inputs(model, self.preview_table or model.text, [*prompts[:n], ""], self.device,
                               size=self.size)
        captions = [cut(prompts[i]) for i in turn]
        return Asked(turn, every, prompts, columns, captions)

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
            return {"--prompt", "--prompts", "--negative-prompt"}
        return {"--prompt", "--prompts", "--negative-prompt", "--text-encoder"}

    def wanted(self, args: argparse.Namespace) -> tuple[list[str], str | None]:
        """The prompts, or files of vectors, and the negative prompt. None: the null condition."""
        if self.precomputed:
            return args.embedding, ""
        asked = [clean_text(prompt) for prompt in args.prompt or self.prompts]
        if not asked:
            raise ValueError(f"{args.run}: holds no captions to draw as examples; give --prompt TEXT")
        return asked, clean_text(args.negative_prompt or "")

    def ask(self, args: argparse.Namespace, model: nn.Module) -> Asked:
        encode = self.sampling_encoder(model, args)
        asked, negative = self.wanted(args)
        if args.prompt is not None and len(asked) > args.n:
            flag = f"--prompts {args.prompts}" if args.prompts is not None else "--prompt"
            print(f"{flag}: the first {args.n:,} of {len(asked):,} prompts are drawn; "
                  f"--n {len(asked)} draws each of them", file=sys.stderr)
        asked = asked[:args.n]
        prompts = list(dict.fromkeys(asked))               # without repetitions, so that each is encoded once
        if not self.precomputed:
            warn_of_truncated_prompts(encode, [*prompts, negative or ""])

        def encoded(chosen: list[str]) -> dict[str, Tensor]:
            # A negative prompt takes the place of the null condition, which is the empty prompt.
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                return network_inputs(model, encode, [*chosen, negative], self.device, size=self.size)

        every, later = {}, None
        if len(prompts) <= ENCODED_AT_ONCE:
            every = encoded(prompts)
        else:
            later = encoded
            if self.precomputed:                           # refuse a file that does not fit before drawing
                for start in range(0, len(prompts), ENCODED_AT_ONCE):
                    encoded(prompts[start:start + ENCODED_AT_ONCE])

        place = {prompt: i for i, prompt in enumerate(prompts)}
        turn = torch.tensor([place[prompt] for prompt in asked])[torch.arange(args.n) % len(asked)]
        columns, captions = None, None
        if len(prompts) > 1:
            captions = [cut(prompts[i]) for i in turn]
            if len(prompts) <= min(PREVIEW_COLUMNS, args.n):
                columns = len(prompts)
        return Asked(turn, every, prompts, columns, captions, later)

    def ask_again(self, asked: Asked, model: nn.Module) -> Asked:
        if self.kind != "bytes":
            return asked

        def encoded(chosen: list[str]) -> dict[str, Tensor]:
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                return network_inputs(model, model.text, [*chosen, ""], self.device)

        if asked.encode is not None:
            return asked._replace(encode=encoded)
        return asked._replace(every=encoded(asked.names))

    def sampling_encoder(self, model: nn.Module, args: argparse.Namespace) -> Encoder:
        """The encoder to sample with; --text-encoder names a frozen one that has moved since training."""
        if self.kind == "bytes":
            return model.text
        if self.precomputed:
            return read_embeddings
        given = args.text_encoder or [f"{self.kind}:{self.text['path']}"]
        kind, _, path = given[0].partition(":")
        if kind != self.kind or len(given) > 1:
            raise ValueError(f"--text-encoder {' '.join(given)}: this run was trained with {self.kind}:PATH; "
                             "give that, with the folder where it is now")
        return self.frozen_encoder(path)

    def hint(self) -> str:
        return flag_and_value(self.use, sorted(self.prompts, key=len))


class PublishedWords(Words):
    """Text, through the encoders of a published model as its own pipeline uses them."""
    required = "--prompt"

    def __init__(self, checkpoint: dict, device: torch.device):
        super().__init__(checkpoint, device)
        self.who = self.text["published"]
        self.refusals = {"--no-t5": f"{self.who} was not trained to do without T5, as Stable Diffusion 3 was"}

    @classmethod
    def fits(cls, checkpoint: dict) -> bool:
        return "published" in (checkpoint["text"] or {})

    def accepted(self) -> set[str]:
        found = {"--prompt", "--prompts", "--negative-prompt", "--text-encoder", "--tokenizer"}
        return found | {"--no-t5"} if self.kind in WITHOUT_T5 else found

    def wanted(self, args: argparse.Namespace) -> tuple[list[str], str | None]:
        return args.prompt, args.negative_prompt           # word for word, as tokenizers differ in spaces

    def encoder_paths(self, args: argparse.Namespace) -> list[str]:
        return [path.removeprefix(f"{self.kind}:") for path in args.text_encoder or [self.text["path"]]]

    def in_files(self, args: argparse.Namespace) -> dict[str, dict[str, Tensor]] | None:
        """The weights of the text encoders, mapped; None where they are a folder's, which is read whole."""
        paths = self.encoder_paths(args)
        parts = parts_of(self.kind, args.no_t5)
        # the folder of one encoder, where there are others besides
        is_one_of_several = len(parts) > 1 and os.path.isfile(f"{paths[0]}/config.json")
        if len(paths) == 1 and os.path.isdir(paths[0]) and not is_one_of_several:
            return None
        otherwise = self.text["path"] if args.text_encoder else None
        return find_text_encoders(parts, paths, otherwise)

    def encoder_bytes(self, args: argparse.Namespace) -> dict[str, int]:
        """What the weights of the text encoders take as they are used, by their names. Raises ValueError
        where one is missing in files."""
        with self.named(args):
            states = self.in_files(args)
            if states is not None and not self.tokenizers(args):
                raise no_tokenizer(self.kind, parts_of(self.kind, args.no_t5))
        if states is None:
            path = self.encoder_paths(args)[0]
            return {part.folder: stored_bytes(f"{path}/{part.folder}")
                    for part in parts_of(self.kind, args.no_t5) if os.path.isdir(f"{path}/{part.folder}")}
        least = 4 if args.precision == "fp32" else 2       # 8 bits are for storage only
        return {name: sum(weight.numel() * max(least, weight.itemsize) for weight in state.values())
                for name, state in states.items()}

    def tokenizers(self, args: argparse.Namespace) -> list[str]:
        """The folders to look in beside files: those of --tokenizer, else all that are given."""
        given = [*self.encoder_paths(args), self.text["path"]]
        return args.tokenizer or [path for path in given if os.path.isdir(path)]

    def load(self, width: int, args: argparse.Namespace) -> FrozenTextEncoder:
        """The encoders of a folder or of files. width: of the zeros in place of T5."""
        dtype = torch.float32 if args.precision == "fp32" else None        # None: as in the files
        options = dict(dtype=dtype, no_t5=args.no_t5, width=width)
        device = torch.device("cpu") if args.offload else self.device
        paths = self.encoder_paths(args)
        for path in paths:                                 # transformers finds nothing in a closed folder
            check_readable(path)
        states = self.in_files(args)
        if states is None:
            return from_folder(self.kind, paths[0], device, tokenizers=args.tokenizer, **options)
        states = read_text_encoders(parts_of(self.kind, args.no_t5), states, " ".join(paths))
        return from_states(self.kind, states, self.tokenizers(args), device, **options)

    @contextmanager
    def named(self, args: argparse.Namespace) -> Iterator[None]:
        """Within it, errors begin with the flag that names the place."""
        paths = self.encoder_paths(args)
        try:
            yield
        except ValueError as error:
            message = str(error)
            for start in (f"{self.kind}:{paths[0]}: ", f"{self.kind}: ", f"{' '.join(paths)}: "):
                message = message.removeprefix(start)
            flag = "--text-encoder" if args.text_encoder else "--weights"
            # of several paths, the message begins with the one that is meant
            is_of_one = any(message.startswith((f"{path}: ", f"{path.rstrip('/')}/")) for path in paths)
            start = f"{flag} " if is_of_one else f"{flag} {' '.join(paths)}: "
            raise ValueError(f"{start}{message}") from None

    def sampling_encoder(self, model: nn.Module, args: argparse.Namespace) -> Encoder:
        for folder in args.tokenizer or []:
            try:
                check_readable(folder)
            except ValueError as error:
                raise ValueError(f"--tokenizer {error}") from None
            if not os.path.isdir(folder):
                raise ValueError(f"--tokenizer {folder}: no such folder; download it first")
        with self.named(args):
            encoder = self.load(model.config.context_width, args)
        for part in encoder.encoders:                      # each has the device to itself
            if args.offload == "parts" and part.model is not None:
                part.stage = Resident(part.model, self.device)
            elif args.offload == "blocks" and part.model is not None:
                blocks = [module for module in part.model.modules() if type(module).__name__ in BLOCKS]
                visit_blocks(part.model, tuple({type(block) for block in blocks}), self.device)
        return encoder


class PublishedSounds(PublishedWords):
    """Text, and the seconds that a sound lasts, as Stable Audio has them."""

    def __init__(self, checkpoint: dict, device: torch.device):
        super().__init__(checkpoint, device)
        data = checkpoint["data"]
        self.longest: float = data["size"][1] / data["rate"]         # seconds

    @classmethod
    def fits(cls, checkpoint: dict) -> bool:
        return super().fits(checkpoint) and "rate" in checkpoint["data"]

    def sampling_encoder(self, model: nn.Module, args: argparse.Namespace) -> Encoder:
        seconds = self.longest if args.seconds is None else args.seconds
        if not 0 < seconds <= self.longest:
            raise ValueError(f"--seconds {seconds:g}: {self.who} draws more than 0 and at most "
                             f"{int(100 * self.longest) / 100:g}")
        return WithSeconds(super().sampling_encoder(model, args), model, seconds)

    def with_lengths(self, asked: Asked, seconds: float | None = None) -> Asked:
        # The network reads them in its context.
        return asked._replace(seconds=np.full(len(asked.turn), seconds or self.longest))


class WithSeconds:
    """An encoder of text whose context ends in the tokens of a sound's seconds, beside which `pooled` holds
    them again. The null condition has zeros in place of all tokens, but the seconds in `pooled`."""

    @torch.no_grad()
    def __init__(self, encoder: FrozenTextEncoder, model: nn.Module, seconds: float):
        self.encoder = encoder
        self.truncated = encoder.truncated
        tokens, pooled = model.embed_seconds(torch.zeros(1), torch.full((1,), seconds))
        self.tokens = tokens.float()                                         # (1, 2, D)
        self.pooled = pooled.float()                                         # (1, P)

    def __call__(self, prompts: list[str | None]) -> dict[str, Tensor]:
        context = self.encoder(prompts)["context"].float()
        tokens = self.tokens.to(context.device).repeat(len(prompts), 1, 1)
        tokens[[i for i, prompt in enumerate(prompts) if prompt is None]] = 0
        return {"context": torch.cat([context, tokens], dim=1),
                "pooled": self.pooled.to(context.device).expand(len(prompts), -1)}


def encode_alone(encoder: FrozenTextEncoder, prompts: list[str]) -> dict[str, Tensor]:
    """The outputs of a frozen encoder as TextCache would keep them, whatever the training's number format."""
    with torch.no_grad(), torch.autocast(encoder.device.type, enabled=False):
        return encoder(prompts)


def flag_and_value(flag: str, values: list[str]) -> str:
    """For a shell's command line: the flag with the first of these values that can be shown there, or nothing
    where none can. A value that begins with a dash would be read as a flag by itself."""
    value = next((value for value in values if value and not UNPRINTABLE.search(value)), None)
    if value is None:
        return ""
    joined = "=" if value.startswith("-") else " "
    return f" {flag}{joined}{shlex.quote(value)}"


def cut(prompt: str) -> str:
    """For a grid. What it cannot draw is a box there."""
    return prompt if len(prompt) <= CAPTION else f"{prompt[:CAPTION]}..."


def warn_of_truncated_prompts(encoder: TextEncoder | FrozenTextEncoder, prompts: list[str]) -> None:
    for name, truncated in truncated_by(encoder, prompts).items():
        for rest in truncated[:3]:
            print(f"warning: a prompt is longer than {name}'s limit and is truncated; it loses "
                  f"{shortened(rest)!r}", file=sys.stderr)
        if len(truncated) > 3:
            print(f"warning: so are {len(truncated) - 3:,} more prompts", file=sys.stderr)


def truncated_by(encoder: TextEncoder | FrozenTextEncoder, prompts: list[str]) -> dict[str, list[str]]:
    """What the prompts lose, by the encoder that loses it."""
    found: dict[str, list[str]] = {}
    for prompt in prompts:
        for name, rest in encoder.truncated(prompt).items():
            found.setdefault(name, []).append(rest)
    return found


def read_prompts(flag: str, file: str) -> list[str]:
    """The lines of a text file or of a pipe, blank ones left out. Raises ValueError with a line for the
    user."""
    try:
        mode = os.stat(file).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISFIFO(mode)):         # /dev/zero would never end
            what = "folder" if stat.S_ISDIR(mode) else "device"
            raise ValueError(f"{flag} {file}: is a {what}, not a text file")
        # Without O_NONBLOCK, a pipe that nobody writes to would be waited for, for ever.
        with open(file, "rb", opener=lambda name, flags: os.open(name, flags | O_NONBLOCK)) as source:
            if O_NONBLOCK:
                os.set_blocking(source.fileno(), True)
            raw = source.read(LONGEST_FILE + 1)
        if len(raw) > LONGEST_FILE:
            raise ValueError(f"{flag} {file}: is too long; at most {amount(LONGEST_FILE)} are read")
        lines = raw.decode("utf-8-sig").split("\n")
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else error.strerror
        raise ValueError(f"{flag} {file}: {reason}") from None
    except UnicodeDecodeError:
        raise ValueError(f"{flag} {file}: not in UTF-8; save it in that encoding") from None
    prompts = [prompt for prompt in map(clean_text, lines) if prompt]
    if not prompts:
        raise ValueError(f"{flag} {file}: is empty; give one prompt per line")
    return prompts


def network_inputs(model: nn.Module, encode: Encoder, prompts: list[str], device: torch.device,
                   packed: bool = False, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
    """The outputs of the encoder that the network takes, on the device, in float32 whatever the encoder
    computes in. packed: without padding, with context as a list. size: of the picture, in pixels, for a
    network that takes it beside `pooled`. Raises ValueError if their width is not the one that the network
    was built for."""
    cond = encode.packed(prompts) if packed else encode(prompts)
    wanted = {"context": model.config.context_width, "pooled": getattr(model.config, "pooled_width", None)}
    if "pooled" in cond and wanted["pooled"] == cond["pooled"].shape[-1] + 6 * SIZE_FEATURES:
        # Stable Diffusion XL: a picture of this size, of which nothing was cropped
        cond = cond | {"pooled": with_sizes(cond["pooled"], torch.tensor([*size, 0, 0, *size]))}
    for name, width in wanted.items():
        found = cond[name][0].shape[-1] if name in cond else None
        if width and found != width:
            raise ValueError(f"text vectors ({name}) of width {found}: this network takes {width}")
    inputs = {} if packed else {"context": cond["context"].float()}
    if not packed and "mask" in cond:
        inputs["mask"] = cond["mask"]
    if wanted["pooled"]:
        inputs["pooled"] = cond["pooled"].float()
    if getattr(model.config, "guidance", False):           # distilled; sample.py takes another one by --cfg
        inputs["guidance"] = torch.full((len(prompts),), DISTILLED)
    inputs = {name: send(part, device) for name, part in inputs.items()}
    if packed:                                             # sent as one
        rows = send(torch.cat(cond["context"]).float(), device)
        inputs["context"] = list(rows.split([len(part) for part in cond["context"]]))
    return inputs


# The value of --cond -> the kind.
KINDS = {"published-sound": PublishedSounds, "published": PublishedWords, "text": Words, "class": Labels,
         "none": Nothing}
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
    """Refuse the conditioning flags of sample.py that this run does not take. The lines of --prompts become
    the values of --prompt."""
    for flag in FLAGS:
        value = value_of(flag, args)
        if value in (None, False) or flag in condition.accepted():
            continue
        remedy = "leave it out"
        if condition.use and any(flag in kind.selecting for kind in KINDS.values()):
            remedy = f"use {condition.use}"
        first = value[0] if isinstance(value, list) else str(value)
        words = flag if value is True else f"{flag} {shortened(first)}"
        if flag in condition.refusals:
            raise ValueError(f"{words}: {condition.refusals[flag]}; {remedy}")
        raise ValueError(f"{words}: {condition.who} {condition.described}; {remedy}")
    if condition.required and value_of(condition.required, args) is None and args.prompts is None:
        where = f"{args.run}: {condition.who}" if args.run else condition.who
        raise ValueError(f"{where} {condition.described}; give some by {condition.required}")
    if args.prompts is not None:
        if args.prompt is not None:
            raise ValueError(f"--prompts {args.prompts} with --prompt: give one of them")
        args.prompt = read_prompts("--prompts", args.prompts)


def value_of(flag: str, args: argparse.Namespace) -> object:
    return getattr(args, flag.lstrip("-").replace("-", "_"))


def guidance_scale(condition: Conditioning, args: argparse.Namespace, default: float = 2.0) -> float:
    """The guidance scale asked for, or the default of a run that can be guided. Refuses a scale that the run
    does not support and flags that have no effect at this scale."""
    scale = args.cfg
    if scale is None:
        scale = 2.0 if args.guide else 1.0
        if condition.guidable:
            scale = default
    # Every scale but 1 needs the unconditional branch, which label dropout trains, or another network.
    if scale != 1 and not (condition.guidable or args.guide):
        why = condition.described
        if condition.use:
            why += " with label dropout 0, so it has no unconditional branch"
        raise ValueError(f"--cfg {scale:g}: {condition.who} {why}; use --cfg 1")
    for flag in condition.selecting:
        if scale == 0 and flag != condition.required and value_of(flag, args) is not None:
            raise ValueError(f"{flag} with --cfg 0: scale 0 is unconditional and ignores it; "
                             "drop one of them")

    for flag in condition.guiding:
        if args.guide and value_of(flag, args) is not None:
            raise ValueError(f"{flag} with --guide {args.guide}: the guide takes the place of the branch "
                             "that it conditions; give one of them")

    # At scale 1 there is no guidance, and at scale 0 only the unconditional branch.
    without_effect = None
    if tuple(args.interval) != (0, 1):
        without_effect = "--interval {:g} {:g}".format(*args.interval)
    elif args.rescale > 0:
        without_effect = f"--rescale {args.rescale:g}"
    elif args.cfg_channels:
        without_effect = f"--cfg-channels {args.cfg_channels}"
    elif args.guide:
        without_effect = f"--guide {args.guide}"
    else:
        for flag in condition.guiding:                     # they condition the unconditional branch
            if value_of(flag, args) is not None and scale != 0:
                without_effect = flag
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
