"""Pictures in shards, encoded once: their latents as shards, which train.py then trains on without the
pictures.

    python encode.py 'shards/{00000..01023}.tar' latents/ --vae runs/vae --image-size 256
    python train.py --arch dit --objective rf --data latents/ --image-size 256

Every shard becomes one of the same name, with KEY.npy (mean and deviation of the posterior, float16, and
those of the mirrored picture with --flip) beside the KEY.cls, .txt and .json of its pictures. The folder
also holds the VAE and a manifest. A finished shard is kept, so the same command goes on after an
interruption; started several times, on one machine or on many, it shares the work, because each shard is
locked.
"""

from __future__ import annotations

import cli

cli.quiet_imports(__name__)

import argparse
import functools
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

import machine
from ahead import default_workers, in_processes
from cache import pieces
from checkpoints import load_vae
from cli import Flag, integer, make_parser, nonempty, one_of, program
from files import locked, shortened, write_atomically, write_stamp
from media import medium_of
from networks import encoder_fingerprint
from pictures import Size, cover, read_image, to_tensor
from shards import (MANIFEST, VAE_FILE, Named, Place, find_shards, members_of, npy_bytes, open_index,
                    read_manifest, write_shard)
from vae import VAE

FLAGS = {
    "what to encode": [
        Flag("source", "tar shards of pictures: a pattern like 'shards/{00000..01023}.tar', or their folder",
             nonempty),
        Flag("out", "folder for the shards of latents", nonempty),
        Flag("--vae", "a trained VAE: run, checkpoint, published file or diffusers folder", nonempty),
        Flag("--image-size", "side, or height and width, that the pictures are scaled and cropped to "
                             "(default: 32)", integer(1), nargs="+", metavar="N", most=2),
        Flag("--flip", "encode the mirrored pictures too, for train.py --flip"),
    ],
    "machine": [
        Flag("--device", "auto (default), cpu, cuda, cuda:1, mps", nonempty, "auto"),
        Flag("--precision", "fp32 (default) or bf16, which differs in the third digit",
             one_of(("fp32", "bf16")), "fp32"),
        Flag("--batch-size", "pictures at a time (default: by their size)", integer(1)),
        Flag("--workers", "processes that read and decode ahead (default: one for each core, at most 16; "
                          "0: none)", integer(0, 512)),
    ],
}


class Sample(NamedTuple):
    """A picture, decoded, with what it takes along; or why it cannot be decoded."""
    key: str
    image: np.ndarray | None            # (H, W, 3) uint8
    members: dict[str, bytes]           # by their ending: cls, txt, json
    fault: str = ""


def decode(part: range, listed: list[tuple[str, dict[str, Place]]], path: str, size: Size) -> list[Sample]:
    """A part of the samples of a shard. listed: the key of each, and the places of its members."""
    found = []
    with open(path, "rb") as file:
        for key, places in listed[part.start:part.stop]:
            members = {}
            for ending, (offset, length) in places.items():
                file.seek(offset)
                members[ending] = file.read(length)
            picture = members.pop("picture")
            try:
                found.append(Sample(key, cover(read_image(Named(picture), "white", []), size), members))
            except Exception as error:          # Pillow raises a dozen types; each means: leave it out
                found.append(Sample(key, None, members, f"{type(error).__name__}: {error}"))
    return found


class Encoder:
    """Encodes shards with one VAE."""

    def __init__(self, args: argparse.Namespace, vae: VAE, size: Size):
        self.vae = vae
        self.size = size
        self.flips = 2 if args.flip else 1
        self.device = next(vae.parameters()).device
        self.bf16 = args.precision == "bf16"
        self.workers = default_workers() if args.workers is None else args.workers
        self.at_once = args.batch_size or len(pieces((10**6, *size, 3))[0])

    @torch.no_grad()
    def latents(self, images: np.ndarray) -> np.ndarray:
        """(B, H, W, 3) uint8 -> (B, flips, 2, C, h, w) float16: mean and deviation, as cache.LatentCache."""
        x = to_tensor(images).to(self.device)
        if self.vae.config.image_channels == 1:
            x = x.mean(1, keepdim=True)
        found = []
        for mirrored in range(self.flips):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
                posterior = self.vae.encode(x.flip(-1) if mirrored else x)
            found.append(torch.stack([posterior.mean, posterior.std], 1))
        return torch.stack(found, 1).half().cpu().numpy()

    def samples(self, path: str, skipped: list[str]) -> Iterator[tuple[str, dict[str, bytes]]]:
        """The samples of the shard of latents that a shard of pictures becomes. skipped: takes what is wrong
        with pictures that cannot be decoded, which are left out."""
        listed = members_of(path)
        parts = [range(i, min(i + self.at_once, len(listed))) for i in range(0, len(listed), self.at_once)]
        read = functools.partial(decode, listed=listed, path=path, size=self.size)
        decoded = in_processes(read, parts, self.workers)
        for part in tqdm(decoded, total=len(parts), desc=os.path.basename(path), unit="batch", leave=False):
            skipped += [f"{path}: {shortened(sample.key)}: {shortened(sample.fault, 300)}" for sample in part
                        if sample.image is None]
            part = [sample for sample in part if sample.image is not None]
            if not part:
                continue
            latents = self.latents(np.stack([sample.image for sample in part]))
            if not np.isfinite(latents).all():
                raise ValueError(f"{path}: a latent that float16 cannot hold; give --precision fp32, or "
                                 "another --vae")
            for sample, latent in zip(part, latents):
                yield sample.key, {"npy": npy_bytes(latent)} | sample.members


def begin(args: argparse.Namespace, out: Path, names: list[str], files: tuple[str, ...], vae: VAE,
          size: Size) -> None:
    """Write the manifest and the VAE, or check that those of an earlier command say the same."""
    config = vae.config
    for side in size:
        if side % vae.factor:
            raise ValueError("--image-size {} {}: both sides must be multiples of {}, by which --vae {} "
                             "downsamples".format(*size, vae.factor, args.vae))
    manifest = {"latents": 1, "vae": encoder_fingerprint(vae), "size": list(size),
                "flips": 2 if args.flip else 1,
                "shape": [config.latent_channels, size[0] // vae.factor, size[1] // vae.factor],
                "channels": config.image_channels, "shards": names, "precision": args.precision,
                "bytes": [os.path.getsize(file) for file in files]}
    with locked(out / ".encode.lock", wait=True, clean=(out / MANIFEST, out / VAE_FILE)):
        before = read_manifest(out)
        if before is None:
            state = vae.state_dict()
            checkpoint = {"arch": "vae", "config": vars(config) | {}, "objective": None, "step": 0,
                          "data": {"size": list(size), "classes": []}, "text": None, "label_dropout": 0.0,
                          "vae": None, "model": state, "ema": state, "training": {"finished": True}}
            write_atomically(out / VAE_FILE, lambda file: torch.save(checkpoint, file))
            write_stamp(out / MANIFEST, manifest | {"source": args.source, "vae_path": args.vae})
            return
        words = {"vae": "another VAE", "size": "another --image-size", "flips": "another --flip",
                 "shards": "other shards", "bytes": "shards that have changed since",
                 "precision": "another --precision"}
        for name, value in manifest.items():
            if before.get(name) != value:
                raise ValueError(f"{out}: holds latents of {words.get(name, f'another {name}')}; repeat "
                                 "that command to continue, or give another folder")


def finish(out: Path) -> None:
    """Add the classes and the number of samples to the manifest."""
    with locked(out / ".encode.lock", wait=True), tempfile.TemporaryDirectory() as temporary:
        manifest = read_manifest(out)
        index = open_index(find_shards(str(out)), Path(temporary))
        write_stamp(out / MANIFEST, manifest | {"classes": index.classes, "samples": len(index)})
        print(f"{out}: {len(index):,} latents in {len(index.files):,} shards; train on them by: python "
              f"train.py --arch dit --objective rf --data {shlex.quote(str(out))} --image-size "
              f"{' '.join(map(str, manifest['size']))}"
              f"{' --flip' if manifest['flips'] == 2 else ''}")


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    return make_parser("Encode tar shards of pictures as tar shards of latents.", FLAGS).parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    if args.vae is None:
        raise ValueError("--vae is required: a trained VAE, such as runs/vae; python train.py --arch vae "
                         "trains one")
    sides = args.image_size or [32]
    size = (sides[0], sides[-1])
    found = find_shards(args.source)
    if found is None:
        raise ValueError(f"{args.source}: neither a .tar, a pattern of some, nor a folder of shards")
    if found.manifest is not None:
        raise ValueError(f"{args.source}: holds latents already; give the pictures")
    names = [os.path.basename(file) for file in found.files]
    if len(set(names)) < len(names):
        raise ValueError(f"{args.source}: two shards have the same name; give each of these folders alone")
    local = os.environ.get("LOCAL_RANK")                   # of the processes that torchrun starts here
    device = machine.pick_device(args.device, None if local is None else int(local))
    vae = load_vae(args.vae).to(device)
    if medium_of(vae.config).rate is not None:
        raise ValueError(f"--vae {args.vae}: is for sounds, and shards hold pictures; give another")
    if vae.config.image_channels not in (1, 3):
        raise ValueError(f"--vae {args.vae}: for pictures with {vae.config.image_channels} channels, where "
                         "those of shards have 3")
    out = Path(args.out)
    settings_of_run = Encoder(args, vae, size)
    begin(args, out, names, found.files, vae, size)
    return encode_all(settings_of_run, found.files, out)


def encode_all(encoder: Encoder, files: tuple[str, ...], out: Path) -> int:
    """Encode every shard that is not there yet and that no other process encodes."""
    skipped: list[str] = []
    for file in tqdm(files, desc="encode shards", unit="shard"):
        target = out / os.path.basename(file)
        if target.is_file():
            continue
        lock = out / f".{target.name}.lock"
        try:
            with locked(lock, clean=(target,)):
                if not target.is_file():                       # it may have been finished meanwhile
                    write_shard(target, encoder.samples(file, skipped))
                # Whoever waits for the removed file finds the shard complete, so it is safe.
                lock.unlink(missing_ok=True)
        except BlockingIOError:                                # another process encodes it
            pass
    if skipped:
        more = f" and {len(skipped) - 12:,} more" if len(skipped) > 12 else ""
        print(f"skipped {'; '.join(skipped[:12])}{more}", file=sys.stderr)
    # Whichever process ends last finds all of them there, also those that others have encoded.
    missing = sum(not (out / os.path.basename(file)).is_file() for file in files)
    if missing:
        print(f"other processes still encode {missing:,} of {len(files):,} shards; the last one to end tells "
              "when all are done")
    else:
        finish(out)
    return 0


if __name__ == "__main__":
    sys.exit(program("encode.py", main))
